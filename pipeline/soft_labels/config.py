"""Settings of soft labels: `dtpipe extract --interpreter`."""

from __future__ import annotations

from pydantic import Field, field_validator

from dtpipe.extract.config import ExtractRun
from dtpipe.manifests.schema import ShardFormat, StoredDtype, StrictModel
from dtpipe.manifests.store.paths import any_place, whole_place


class SoftLabelConfig(StrictModel):
    """Which interpreter reads which features, and how its logits are stored."""

    interpreter: str = Field(description="Folder of an interpreter; makes soft labels in place of features.")
    features: str | None = Field(
        default=None,
        description="URL of the feature dataset that the interpreter reads; default: the teacher runs, and its "
        "features are not kept.",
    )
    stride: int | None = Field(
        default=None, ge=1, description="Student pixels per cell of the logits; default: that of the finest level read."
    )
    top_k: int | None = Field(
        default=None, ge=1, description="Keep only so many largest logits of each cell; default: all, in float16."
    )
    keep_features: str | None = Field(
        default=None, description="Folder or URL: the teacher's features are extracted there first, and then read."
    )

    _whole = field_validator("interpreter", "features")(whole_place)
    _at_home = field_validator("keep_features")(any_place)


class LabelShardConfig(StrictModel):
    """How the dataset of soft labels lies on disk; as `extract.shard`."""

    format: ShardFormat = "zarr"
    samples: int | None = Field(default=None, ge=1)
    dtype: StoredDtype = "float16"
    zstd_level: int = Field(default=3, ge=0, le=19)


class CachedConfig(StrictModel):
    """The part of the `extract` section that goes with features which are there already."""

    shard: LabelShardConfig = LabelShardConfig()
    batch_size: int = Field(default=32, ge=1)
    threads: int = Field(default=1, ge=1)
    run: ExtractRun
