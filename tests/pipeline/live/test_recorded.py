"""The teacher of a dataset is opened again as it was recorded, and only if it is the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtpipe.manifests.errors import ConfigError, DtpipeError, TeacherError
from dtpipe.manifests.schema import Plan
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.plan import load_plan
from dtpipe.pipeline.live.recorded import open_teacher
from parts.extractions import Extract
from parts.teachers import write_ddpm


@pytest.fixture
def plan(extract: Extract) -> Plan:
    return load_plan(Store(extract("features")))


def test_the_recorded_teacher_is_opened_from_where_it_is_now(plan: Plan, ddpm: Path, tmp_path: Path) -> None:
    (moved := tmp_path / "moved").symlink_to(ddpm)
    assert open_teacher(plan, {}, "cpu").teacher.spec == open_teacher(plan, {"path": str(moved)}, "cpu").teacher.spec


def test_a_dataset_without_a_record_asks_for_its_teacher(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="--teacher"):
        open_teacher(plan.model_copy(update={"provenance": {}}), {}, "cpu")


def test_other_weights_are_refused(plan: Plan, other_ddpm: Path) -> None:
    digest = plan.recipe.teacher.weights_blake3[:16]
    with pytest.raises(
        TeacherError,
        match=rf"{other_ddpm} is not .*\(weights have digest [0-9a-f]{{16}}.., the dataset was made with {digest}",
    ):
        open_teacher(plan, {"path": str(other_ddpm)}, "cpu")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "bfloat16"}, 'teacher.dtype: "float32" -> "bfloat16"'),
        ({"options": {"ensemble": 2}}, "teacher.options.ensemble: not set -> 2"),
        (
            {"options": {"encoding": "ddim_inversion"}},
            'options.encoding: .* -> "ddim_inversion"; .*options.inversion_stride: not set -> 10',
        ),
        (
            {"taps": {"l2": "up_blocks.1.resnets.0", "l3": "up_blocks.0.resnets.1"}},
            r"level l2 .* read at tap up_blocks.1.resnets.1, and",
        ),
        ({"options": {"ensemble": "many"}}, r"options.ensemble"),
        ({"dtype": "float64"}, r"extract.teacher: .*float64"),
    ],
)
def test_other_settings_are_refused_naming_them(plan: Plan, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(DtpipeError, match=said):
        open_teacher(plan, settings, "cpu")


def test_another_noise_schedule_of_the_same_weights_is_refused(plan: Plan, tmp_path: Path) -> None:
    other = write_ddpm(tmp_path / "other", beta_end=0.03)
    with pytest.raises(TeacherError, match=r"options\.scheduler\.beta_end: 0\.02 -> 0\.03"):
        open_teacher(plan, {"path": str(other)}, "cpu")
    short = write_ddpm(tmp_path / "short", num_train_timesteps=40)
    with pytest.raises(
        TeacherError, match=r"num_train_timesteps: .* -> 40.*it has timesteps 0 to 39, the dataset was made at 50"
    ):
        open_teacher(plan, {"path": str(short)}, "cpu")
