"""What a run says about its training is found, whatever it was trained on; what is gone is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dtpipe.manifests.errors import InputError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import LevelSpec, TransformRecipe, ViewSpec
from dtpipe.manifests.soft_labels import interpreter_recipe
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.listing import Listing
from dtpipe.manifests.write.plan import start_plan
from dtpipe.pipeline.trained_on import TrainedOn
from parts import paths
from parts.datasets import make_recipe

GOLDEN = paths.GOLDEN / "v1_zarr"


def write_run(folder: Path, **sections: object) -> TrainedOn:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"distill": {}, **sections}))
    return TrainedOn.of(str(folder))


def test_a_run_on_datasets_knows_their_keys_and_their_teacher(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", distill={"datasets": [str(GOLDEN), str(tmp_path / "gone")]})
    dataset = FeatureDataset.open(GOLDEN)
    recipe, teacher = dataset.manifest.recipe, run.teacher()
    assert teacher.timestep == recipe.views[0].timestep
    assert teacher.image_px == (recipe.transform.height, recipe.transform.width)
    assert not teacher.synthesizes


def test_the_teacher_of_a_run_is_of_its_features_whatever_stands_first(tmp_path: Path) -> None:
    levels = (LevelSpec(name="l2.labels", stride=4, channels=2, height=8, width=8, tap="logits", role="soft_labels"),)
    teacher = interpreter_recipe("0" * 64, ("a", "b"), {"dataset": "1" * 64})
    labels = make_recipe(levels=levels, teacher=teacher, views=(ViewSpec(draw=0, timestep=999),))
    start_plan(Store(tmp_path / "labels"), labels, Listing(("a",), ("0",), (None,)), {})
    run = write_run(tmp_path / "run", distill={"datasets": [str(tmp_path / "labels"), str(GOLDEN)]})
    assert run.teacher().timestep == FeatureDataset.open(GOLDEN).views[0].timestep
    alone = write_run(tmp_path / "alone", distill={"datasets": [str(tmp_path / "labels")]})
    assert "path" not in alone.teacher().settings


def test_a_run_on_images_knows_them_and_its_live_teacher(tmp_path: Path, image_folder: Path) -> None:
    extract = {
        "images": str(image_folder),
        "teacher": {"path": "teacher"},
        "transform": {"px": 32},
        "noise": {"timesteps": [7]},
        "max_bad": 0.5,  # as recorded before settings had halves
    }
    run = write_run(tmp_path / "run", extract=extract)
    keys = set(run.live_listing()[1].keys)
    assert keys == {str(path.relative_to(image_folder)) for path in image_folder.rglob("*.png")}
    assert run.live_transform() == TransformRecipe(height=32, width=32)
    teacher = run.teacher()
    assert (dict(teacher.settings), teacher.timestep, teacher.image_px) == ({"path": "teacher"}, 7, (32, 32))
    gone = write_run(tmp_path / "gone", extract={**extract, "images": str(tmp_path / "moved")})
    with pytest.raises(InputError):
        gone.live_listing()


def test_a_checkpoint_outside_a_run_folder_says_nothing(tmp_path: Path) -> None:
    alone = TrainedOn.of(str(tmp_path / "last.pt"))
    assert not alone.urls and not alone.live and "path" not in alone.teacher().settings
