"""The teacher of a dataset is opened again as it was recorded, and only if it is the same one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.noise import draw_noise
from dtpipe.extract.teachers.base import TapSpec, TeacherSpec, makes_no_images
from dtpipe.manifests.errors import ConfigError, TeacherError
from dtpipe.manifests.plan import load_plan
from dtpipe.manifests.schema import LevelSpec, Plan, ViewSpec
from dtpipe.manifests.storage import Store
from dtpipe.pipeline.live import RecipeTeacher, open_teacher


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


class EchoTeacher:
    """Levels that hold image plus noise plus timestep, mirrored where the view is; one tap of the image's size."""

    spec = TeacherSpec("echo", "0" * 64, (4, 4), (TapSpec("l0", 1, 3, "tap"),), 1000, {"forward": (3, -1, -1)})

    def encode(self, images, noise, views):  # type: ignore[no-untyped-def]
        shown = [(images.flip(-1) if view.flip else images) + noise["forward"][:, idx] + view.timestep for idx, view in enumerate(views)]
        return {"l0": torch.stack(shown, dim=1)}

    def synthesize(self, noise):  # type: ignore[no-untyped-def]
        raise makes_no_images("echo")


def test_live_features_belong_to_their_key_draw_and_view(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views mixed within a batch; the reference is the definition, written out for one image at a time."""
    monkeypatch.setattr("dtpipe.extract.teachers.base.load_teacher", lambda _config, _device: EchoTeacher())
    level = LevelSpec(name="l0", stride=1, channels=3, height=4, width=4, tap="tap", dtype="float32")
    teacher = plan.recipe.teacher.model_copy(update={"weights_blake3": "0" * 64})
    recipe = plan.recipe.model_copy(update={"levels": (level,), "teacher": teacher})
    opened = RecipeTeacher(recipe, TeacherConfig(path="echo"), "cpu")
    pixels = torch.randint(0, 256, (4, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    images = pixels.float() / 127.5 - 1
    keys, draws = ["a.png", "b.png", "c.png", "d.png"], [7, 7, 8, 7]
    views = [ViewSpec(draw=0, timestep=at, flip=flip) for at, flip in ((50, False), (50, True), (50, True), (150, False))]
    live = opened.live(images, keys, draws, views)["l0"]
    assert live.shape == (4, 3, 4, 4)
    for idx, view in enumerate(views):
        noise = torch.from_numpy(draw_noise(recipe.noise_seed, keys[idx], draws[idx], "forward", (3, 4, 4)))
        shown = images[idx].flip(-1) if view.flip else images[idx]
        torch.testing.assert_close(live[idx], shown + noise + view.timestep)
