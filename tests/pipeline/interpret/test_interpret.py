"""`dtpipe interpret` from the command line: a head in a folder, its scores, where its features came from, refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dtpipe.distill.labels.files import load_interpreter
from dtpipe.extract.run import run_extraction
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_level
from dtpipe.manifests.records.image_digests import TRAIN_IMAGES, image_digest, read_digests
from dtpipe.manifests.schema import ViewSpec
from dtpipe.pipeline.cli.main import main
from dtpipe.pipeline.interpret.config import InterpretConfig
from dtpipe.pipeline.interpret.features import open_both, readings_of
from dtpipe.pipeline.interpret.places import FoundRows
from dtpipe.pipeline.interpret.run import open_labels
from dtpipe.pipeline.rivals import digests as digests_module
from dtpipe.pipeline.rivals.digests import DigestStore, known_digests
from dtpipe.pipeline.sets import open_sets
from parts.extractions import extract_config
from parts.images import draw_image, png, write_files
from parts.published_trees import npy

NUM = 10
SMALL = ("--epochs", "2", "--width", "8", "--pixel-models", "2", "-s", "interpret.rivals.pixel_epochs=1")
SMALLER = (*SMALL, "-s", "interpret.rivals.max_pixels=512", "-s", "interpret.run.num_pictures=2", "--device", "cpu")

NOWHERE = DigestStore(None, print)


@dataclass(frozen=True)
class Scene:
    """Ten labelled images. The dataset holds the first seven, of these the seventh under another key."""

    images: Path
    masks: Path
    features: str
    plain: str
    """Another dataset, of the same images at two timesteps without flips."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, ddpm: Path) -> Scene:
    root = tmp_path_factory.mktemp("scene")
    images = {f"{idx}.png": draw_image(idx) for idx in range(NUM)}
    masks = {name: (image.mean(axis=2) > image.mean()).astype(np.uint8) for name, image in images.items()}
    write_files(root / "images", {name: png(image) for name, image in images.items()})
    write_files(root / "masks", {name: png(mask) for name, mask in masks.items()})
    stored = {name: png(image) for name, image in list(images.items())[:6]}
    write_files(root / "stored", {**stored, "other.png": png(images["6.png"]), "7.png": png(draw_image(99))})
    config = extract_config(root / "stored", ddpm, root / "features", noise={"timesteps": [50], "flips": True})
    plain = extract_config(root / "stored", ddpm, root / "plain", noise={"timesteps": [50, 150], "draws": 2})
    return Scene(root / "images", root / "masks", run_extraction(config).url, run_extraction(plain).url)


def command(scene: Scene, out: Path, *more: str, features: str | None = None) -> tuple[int, str]:
    args = ["interpret", features or scene.features, "--labels", str(scene.images), "--masks", str(scene.masks)]
    done = CliRunner().invoke(main, [*args, "--out", str(out), *SMALLER, *more])
    return done.exit_code, done.output


def settings(scene: Scene, **changes: Any) -> InterpretConfig:
    fields = {"features": scene.features, "images": str(scene.images), "masks": str(scene.masks), "run": {"out": "x"}}
    return InterpretConfig.model_validate({**fields, **changes})


def document(text: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(text[text.index("\n{") if not text.startswith("{") else 0 :])
    return values


def test_a_head_is_written_scored_beside_its_rivals_and_drawn(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = command(scene, tmp_path / "head", "--json")
    assert code == 0, text
    result = document(text)
    assert list(result["scores"]) == ["interpreter", "linear read-out", "pixel classifiers"]
    assert (result["measure"], result["num_labelled"], result["num_held_out"]) == ("mIoU", 5, 5)
    for arm in result["scores"].values():
        ious = list(arm["by_class"].values())
        assert arm["value"] == pytest.approx(sum(ious) / len(ious)) and 0 <= arm["others"]["foreground AP"] <= 1
    loaded = load_interpreter(tmp_path / "head")
    dataset = FeatureDataset.open(scene.features)
    assert loaded.record["teacher"]["weights_blake3"] == dataset.recipe.teacher.weights_blake3
    assert loaded.record["taps"] == {level.name: level.tap for level in dataset.levels}
    assert loaded.record["transform"]["height"] == dataset.recipe.transform.height
    seen = set(read_digests(tmp_path / "head" / TRAIN_IMAGES))
    assert len(seen) == 5 and seen < {image_digest(draw_image(idx)) for idx in range(NUM)}  # the labelled ones
    assert loaded.record["scores"] == result["scores"] and loaded.record["timesteps"] == [50]
    assert [level.name for level in loaded.network.spec.levels] == ["l2", "l3", "l4", "l5"][: len(dataset.levels)]
    with Image.open(tmp_path / "head" / "pictures" / "001.png") as picture:
        assert picture.width > 4 * picture.height and len(result["pictures"]) == 2
    nothing = lambda *_: pytest.fail("a rival is fitted again")  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr("dtpipe.pipeline.interpret.run.fit_linear", nothing)
        code, text = command(scene, tmp_path / "head", "--json")  # all steps are taken; nothing changes
    assert code == 0 and document(text)["resumed_step"] == document(text)["num_steps"] == result["num_steps"]
    again = document(text)
    assert (again["scores"], again["pictures"]) == (result["scores"], result["pictures"])
    (tmp_path / "head" / "pictures" / "001.png").unlink()
    code, text = command(scene, tmp_path / "head", "--json")  # what is gone is made again
    assert document(text)["scores"] == result["scores"] and (tmp_path / "head" / "pictures" / "001.png").is_file()
    assert load_interpreter(tmp_path / "head").digest == loaded.digest
    code, text = command(scene, tmp_path / "head", "--lr", "1e-3")
    assert code == 2 and "interpret.lr" in text


def test_it_is_there_before_its_rivals_which_may_be_others_in_the_same_folder(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise InputError("nearly all cells are ignored; leave it out")

    out = tmp_path / "head"
    with monkeypatch.context() as patched:
        patched.setattr("dtpipe.pipeline.interpret.run.fit_linear", fail)
        code, text = command(scene, out)
    assert code == 3 and "leave it out" in text
    digest = load_interpreter(out).digest
    code, text = command(scene, out, "-s", "interpret.rivals.linear=false", "--json")
    result = document(text)
    assert code == 0 and list(result["scores"]) == ["interpreter", "pixel classifiers"]
    code, text = command(scene, out, "--pixel-models", "0", "--json")  # the linear one is fitted now
    again = document(text)
    assert code == 0 and list(again["scores"]) == ["interpreter", "linear read-out"]
    assert again["scores"]["interpreter"] == result["scores"]["interpreter"]
    assert again["resumed_step"] == again["num_steps"] and load_interpreter(out).digest == digest


def test_images_of_a_set_too_large_to_look_at_first_are_compared_and_remembered_too(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtpipe.pipeline.labelled.LOOKED_AT", 4)
    monkeypatch.setattr("dtpipe.pipeline.labelled._FEW", 2)
    names = ("--class-names", str(write_files(tmp_path, {"names.txt": b"dark\nbright\n"}) / "names.txt"))
    code, text = command(scene, tmp_path / "head", *names, "--pixel-models", "0", "--labelled", "3")
    assert code == 0, text
    seen = set(read_digests(tmp_path / "head" / TRAIN_IMAGES))
    assert len(seen) == 3 and seen < {image_digest(draw_image(idx)) for idx in range(NUM)}
    copies = shutil.copytree(scene.images, tmp_path / "copies")
    held_out = ("--test-labels", str(copies), "-s", f"interpret.test_masks={scene.masks}")
    code, text = command(scene, tmp_path / "other", *names, *held_out)
    assert code == 2 and "10 of 10 held-out images are among the labelled ones" in text, text


def test_features_come_by_key_by_content_and_from_the_teacher(scene: Scene, tmp_path: Path) -> None:
    """An image whose key holds other pixels is none of the dataset's."""
    code, text = command(scene, tmp_path / "head", "-n", "--json")
    plan = document(text)
    assert (code, plan["num_by_key"], plan["num_by_content"], plan["num_live"]) == (0, 6, 1, 3), text
    assert plan["train_s"] > 0 and plan["read_s"] > 0 and 0 < plan["rivals_s"][0] <= plan["rivals_s"][1]
    assert not (tmp_path / "head").exists()
    config, dataset = settings(scene), FeatureDataset.open(scene.features)
    train, test = open_sets(config, dataset.recipe.transform, print, as_masks=True)
    sides = open_both(config, dataset, (train, test), NOWHERE, print)
    rows = {key: (side, row) for side in (sides.train, sides.test) for row, key in enumerate(side.labelled.keys)}
    for key, stored in (("2.png", "2.png"), ("6.png", "other.png")):
        side, row = rows[key]
        place = dataset.columns.row_of(stored)
        for flip in (False, True):
            expected = read_level(dataset, "l2", place, dataset.views.index(ViewSpec(draw=0, timestep=50, flip=flip)))
            np.testing.assert_array_equal(side.read(row, 0, flip)["l2"].numpy(), expected.astype(np.float32))


def test_images_of_a_large_dataset_are_looked_through_once(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests_module, "KEPT_FROM", 1)
    config, dataset = settings(scene), FeatureDataset.open(scene.features)
    train, test = open_sets(config, dataset.recipe.transform, print, as_masks=True)
    notes: list[str] = []
    store = DigestStore(tmp_path / "seen", notes.append)
    first = open_both(config, dataset, (train, test), store, print)
    num = len(dataset.columns.ok_rows)
    assert notes[-1] == f"labelled images are looked for in {dataset.url}: {num} of {num} read"
    monkeypatch.setattr(digests_module, "read_images", lambda *_: pytest.fail("the dataset is read again"))
    again = open_both(config, dataset, (train, test), store, print)
    assert (again.found, again.held_out) == (first.found, first.held_out)
    assert first.found.num_by_content + first.held_out.num_by_content == 1
    assert [path.parent for path in tmp_path.rglob("*.blake3")] == [tmp_path / "seen"]


def test_the_live_teacher_gives_what_would_be_stored(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The features of stored images, as if they were not: of all views, but for float16's rounding."""
    config, dataset = settings(scene, features=scene.plain, together=True), FeatureDataset.open(scene.plain)
    train, test = open_sets(config, dataset.recipe.transform, print, as_masks=True)
    stored = open_both(config, dataset, (train, test), NOWHERE, print).train
    nowhere = lambda _dataset, labelled, _by_content: FoundRows((None,) * len(labelled), 0, 0)  # noqa: E731
    monkeypatch.setattr("dtpipe.pipeline.interpret.features.find_rows", nowhere)
    live = open_both(config, dataset, (train, test), NOWHERE, print).train
    row = next(row for row, key in enumerate(train.keys) if key[0] in "012345")
    assert (stored.num_views, stored.num_readings, stored.flips) == (2, 2, True)
    for place in ((row, 0, False), (row, 1, False), (row, 0, True)):
        for level in stored.levels:
            values = stored.read(*place)[level.name]
            assert values.shape[0] == 2 * level.channels
            torch.testing.assert_close(values, live.read(*place)[level.name], rtol=2e-3, atol=2e-3)
    assert not torch.equal(stored.read(row, 0, False)["l2"], stored.read(row, 1, False)["l2"])
    assert not torch.equal(stored.read(row, 0, False)["l2"], stored.read(row, 0, True)["l2"])


def test_readings_are_views_one_by_one_or_the_timesteps_of_a_draw() -> None:
    views = [ViewSpec(draw=draw, timestep=step, flip=flip) for step in (50, 9) for draw in (0, 1) for flip in (0, 1)]
    assert [len(reading) for reading in readings_of(views, False)] == [1] * 4
    together = readings_of(views, True)
    assert [[(view.draw, view.timestep) for view in reading] for reading in together] == [
        [(0, 50), (0, 9)],
        [(1, 50), (1, 9)],
    ]
    with pytest.raises(ConfigError, match="more timesteps of some noise draws"):
        readings_of(views[:-2], True)


def test_without_a_teacher_nothing_is_mirrored_and_images_must_be_in_the_dataset(scene: Scene, tmp_path: Path) -> None:
    missing = ("--teacher", str(tmp_path / "gone"))
    code, text = command(scene, tmp_path / "head", *missing)
    assert code == 3 and "3 labelled or held-out images are not in" in text and "gone" in text, text
    known = replace(
        scene, images=write_files(tmp_path / "known", {f"{idx}.png": png(draw_image(idx)) for idx in range(6)})
    )
    code, text = command(known, tmp_path / "head", "-n", *missing, features=scene.plain)
    assert code == 0 and "images are not mirrored: no flipped views are stored" in text, text
    code, text = command(known, tmp_path / "head", "-n", *missing, "--flip", "always", features=scene.plain)
    assert code == 2 and "images cannot be mirrored" in text
    assert command(known, tmp_path / "head", "-n", *missing, "--flip", "always")[0] == 0  # flipped views are stored


def test_what_cannot_be_is_refused(scene: Scene, tmp_path: Path) -> None:
    code, text = command(scene, tmp_path / "head", "--levels", "l2,l9")
    assert code == 2 and "no features called l9; choose from l2" in text
    code, text = command(scene, tmp_path / "head", "--test-labels", str(scene.images))
    assert code == 2 and "interpret.masks and interpret.test_masks go together" in text
    code, text = command(scene, tmp_path / "head", "--labelled", "50")
    assert code == 2 and "ask for 1 to 5" in text
    code, text = command(scene, tmp_path / "head", features=str(scene.images))
    assert code == 3 and "holds no feature dataset" in text
    assert not (tmp_path / "head").exists()


def test_classes_have_a_pooled_head_and_no_pixel_classifiers(scene: Scene, tmp_path: Path, ddpm: Path) -> None:
    files = {f"{'ab'[idx % 2]}/{idx}.png": png(draw_image(idx)) for idx in range(6)}
    folder = write_files(tmp_path / "classes", files)
    url = run_extraction(extract_config(folder, ddpm, tmp_path / "features")).url
    args = ["interpret", url, "--labels", str(folder), "--out", str(tmp_path / "head"), *SMALLER, "--json"]
    done = CliRunner().invoke(main, [*args, "--labelled", "2"])
    assert done.exit_code == 0, done.output
    result = document(done.output)
    assert (result["measure"], result["classes"], result["num_labelled"]) == ("accuracy", ["a", "b"], 2)
    assert list(result["scores"]) == ["interpreter", "linear read-out"] and result["pictures"] == []
    assert load_interpreter(tmp_path / "head").network.spec.kind == "classes"


def test_foreground_and_content_are_part_of_what_a_run_is_of(scene: Scene) -> None:
    plain, merged = (
        open_labels(settings(scene, foreground=merge), NOWHERE, known_digests, print) for merge in (False, True)
    )
    assert plain.sides.train.labelled.classes.names == ("0", "1")
    assert merged.sides.train.labelled.classes.names == ("background", "foreground")
    assert plain.content["labelled"] != merged.content["labelled"]
    assert plain.content["features"] == merged.content["features"]


def test_specks_in_masks_to_learn_from_are_ignored_and_what_is_scored_is_whole(tmp_path: Path, ddpm: Path) -> None:
    """Cats of 128 px, where 20 px at 256 px are 5: four are a speck."""
    mask = np.zeros((128, 128), np.int64)
    mask[64:] = 3
    mask[0, :4], mask[10, :5] = 5, 6
    sides = enumerate(("train", "train", "test"))
    files = {f"real/{side}/{idx}.png": png(draw_image(idx, 128)) for idx, side in sides}
    arrays = {name.replace(".png", ".npy"): npy(mask) for name in files}
    root = write_files(tmp_path / "cat_15", {**files, **arrays})
    url = run_extraction(extract_config(root / "real", ddpm, tmp_path / "features", transform={"px": 128})).url
    sets = {"images": f"ddpm-seg:{root}@train", "test_images": f"ddpm-seg:{root}@test"}
    config = InterpretConfig.model_validate({"features": url, **sets, "run": {"out": str(tmp_path / "head")}})
    opened = open_labels(config, NOWHERE, known_digests, print)
    for row in (0, 1):
        target = opened.sides.train.target(row)
        assert set(target.unique().tolist()) == {-1, 0, 3, 6} and int((target == -1).sum()) == 4
    assert set(opened.sides.test.target(0).unique().tolist()) == {0, 3, 5, 6}
    assert opened.content["specks"] == "ignored"
    merged = open_labels(config.model_copy(update={"foreground": True}), NOWHERE, known_digests, print)
    assert set(merged.sides.train.target(0).unique().tolist()) == {0, 1} and "specks" not in merged.content
