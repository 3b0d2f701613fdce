"""Settings of `dtpipe interpret`: how an interpreter is trained, on which features and which labelled images."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator

from dtpipe.distill.labels.config import InterpreterConfig
from dtpipe.manifests.store.paths import whole_if_there, whole_place
from dtpipe.pipeline.config import LabelledImages


class InterpretConfig(InterpreterConfig, LabelledImages):
    """All settings of one interpreter."""

    SECTION: ClassVar[str] = "interpret"
    PLACES: ClassVar[frozenset[str]] = frozenset(
        {"features", "images", "masks", "class_names", "test_images", "test_masks", "teacher", "keys"}
    )

    features: str = Field(description="URL of the feature dataset of the teacher whose features are interpreted.")
    labelled: int | None = Field(
        default=None, ge=1, description="Labelled images that are drawn to learn from; default: all."
    )
    teacher: str | None = Field(
        default=None,
        description="Teacher of the dataset, for images that are not in it; default: where it was at the extraction.",
    )

    _whole_features = field_validator("features")(whole_place)
    _whole_teacher = field_validator("teacher")(whole_if_there)
