"""The teacher of a dataset is opened again as it was recorded, and only if it is the same one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dtpipe.extract.config import TeacherConfig
from dtpipe.manifests.errors import ConfigError, TeacherError
from dtpipe.manifests.plan import load_plan
from dtpipe.manifests.schema import Plan
from dtpipe.manifests.storage import Store
from dtpipe.pipeline.live import open_teacher


@pytest.fixture
def plan() -> Plan:
    return load_plan(Store(Path(__file__).parent.parent / "golden" / "v1_zarr"))


def test_only_the_teacher_of_the_recipe_is_opened(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, seen = ["0" * 64], list[TeacherConfig]()

    def load(config: TeacherConfig, _device: str) -> SimpleNamespace:
        seen.append(config)
        return SimpleNamespace(spec=SimpleNamespace(weights_blake3=weights[0]))

    monkeypatch.setattr("dtpipe.extract.teachers.base.load_teacher", load)
    recorded = plan.model_copy(update={"provenance": {"config": {"teacher": {"path": "old/place", "dtype": "float16"}}}})
    with pytest.raises(TeacherError, match=r"old/place: these weights have digest 0000.*made with abab"):
        open_teacher(recorded, {}, "cpu")
    weights[0] = plan.recipe.teacher.weights_blake3
    open_teacher(recorded, {"path": "new/place"}, "cpu")
    assert [(config.path, config.dtype) for config in seen] == [("old/place", "float16"), ("new/place", "float16")]


def test_a_dataset_without_a_record_asks_for_its_teacher(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="--teacher"):
        open_teacher(plan.model_copy(update={"provenance": {}}), {}, "cpu")
