"""Held-out images that something was trained on are found by their pixels, whatever they are called."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from dtpipe.distill.config import DistillConfig, DistillRun
from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.engine.run_folder import RunFolder
from dtpipe.distill.trainer import run_settings
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.records.image_digests import TRAIN_IMAGES, as_digests, image_digest, pack_digests
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.evaluate import evaluate
from dtpipe.pipeline.rivals import digests as digests_module
from dtpipe.pipeline.rivals.digests import DigestStore
from dtpipe.pipeline.rivals.seen import Seen, TrainingImages, find_seen, seen_notes
from parts.command_line import dtpipe
from parts.extractions import Extract
from parts.images import draw_image, png, write_files
from parts.interpreters import write_interpreter
from parts.labelled import with_classes
from parts.memory import write_student

UNKNOWN = "the images that the teacher was trained on are not known"
TASK = TransformRecipe(height=16, width=16)
HERE = DigestStore(None, print)


def bmp(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="BMP")
    return buffer.getvalue()


def labelled(root: Path, start: int, num: int = 6) -> Path:
    """New images in two class folders."""
    return write_files(root, {f"{'ab'[idx % 2]}/{idx}.png": png(draw_image(start + idx)) for idx in range(num)})


def write_run(folder: Path, *datasets: str) -> Path:
    run = DistillConfig(datasets=datasets, run=DistillRun(out=str(folder)))
    RunFolder.open(run_settings(run)).close()
    write_student(folder / "last.pt", "test_resnet", (16, 16))
    return folder


def settings(run: Path, images: Path, test_images: Path | None = None, **more: Any) -> EvalConfig:
    return EvalConfig(
        checkpoint=str(run),
        task="probe",
        images=str(images),
        test_images=None if test_images is None else str(test_images),
        labelled=("all",),
        seeds=1,
        probe=ProbeConfig(max_iter=5, l2_grid=(0.1,), folds=2),
        **more,
    )


def test_held_out_copies_of_images_of_distillation_are_counted_whatever_they_are_called(
    extract: Extract, image_folder: Path, tmp_path: Path
) -> None:
    """The dataset has them at 32 px, the task at 16; the copies are BMP files under other names."""
    run = write_run(tmp_path / "run", extract(transform={"px": 32}))
    held = labelled(tmp_path / "held", 200, 4)
    for idx, path in enumerate(sorted(image_folder.rglob("*.png"))[:3]):
        with Image.open(path) as image:
            write_files(held, {f"{'ab'[idx % 2]}/new{idx}.bmp": bmp(np.asarray(image.convert("RGB")))})
    foreign = tmp_path / "theirs.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), foreign)
    rivals = {"compare": (f"theirs=test_resnet@{foreign}",)}
    notes = evaluate(settings(run, labelled(tmp_path / "own", 100), held, **rivals), print).result.notes
    assert "which images theirs was pre-trained on is not known" in notes
    assert [note for note in notes if "seen there, without labels" in note] == [
        f"3 of 7 held-out images are in the distillation dataset {tmp_path / 'features'}: seen there, without labels"
    ]
    assert UNKNOWN in notes


def test_labelled_images_given_as_held_out_ones_are_refused(tmp_path: Path) -> None:
    run, own = write_run(tmp_path / "run", str(tmp_path / "gone")), labelled(tmp_path / "own", 0)
    held = labelled(tmp_path / "held", 50)
    write_files(held, {"a/twin.bmp": bmp(draw_image(2))})
    with pytest.raises(
        ConfigError, match=r"1 of 7 held-out images is among the labelled ones: held out/a/twin\.bmp is"
    ):
        evaluate(settings(run, own, held), print)
    with pytest.raises(ConfigError, match=r"6 of 6 held-out images are among the labelled ones"):
        evaluate(settings(run, own, labelled(tmp_path / "same", 0)), print)


def test_a_run_without_a_dataset_is_compared_with_its_source(tmp_path: Path, image_folder: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    extract = {"images": str(image_folder), "teacher": {"path": "gone"}, "transform": {"px": 32}}
    (run / "config.yaml").write_text(yaml.safe_dump({"distill": {}, "extract": extract}))
    seen = find_seen([str(run)], HERE)
    (images,) = seen.images
    assert images.where == f"the images of distillation, {image_folder}" and len(images.digests) == 8
    assert images.transform == TransformRecipe(height=32, width=32) and seen.unknown == (UNKNOWN,)


def write_teacher(folder: Path, *pixels: np.ndarray) -> Path:
    record = {"train_teacher": {"px": 16, "resize": "stretch", "filter": "bilinear"}}
    digests = pack_digests(as_digests(map(image_digest, pixels)))
    return write_files(folder, {"train.json": json.dumps(record).encode(), TRAIN_IMAGES: digests})


def live_run(folder: Path, teacher: Path, images: Path, **settings: object) -> str:
    folder.mkdir()
    extract = {"images": str(images), "teacher": {"path": str(teacher), **settings}, "transform": {"px": 32}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"distill": {}, "extract": extract}))
    return str(folder)


def test_the_training_images_of_a_teacher_of_ones_own_are_known(tmp_path: Path, image_folder: Path) -> None:
    pixels = draw_image(3, 16)
    teacher = write_teacher(tmp_path / "teacher", pixels, draw_image(4, 16))
    seen = find_seen([live_run(tmp_path / "run", teacher, image_folder)], HERE)
    own = seen.images[-1]
    assert own.transform == TransformRecipe(resize="stretch", height=16, width=16, filter="bilinear")
    test = replace(with_classes(np.stack([pixels, draw_image(9, 16)]), ["x", "y"], [0, 1]))
    notes = seen_notes(Seen((own,)), test, own.transform, lambda _: test, HERE)
    assert notes == [
        f"1 of 2 held-out images is in the training images of the teacher {teacher}: seen there, without labels"
    ]
    assert seen.unknown == ()


def test_an_untrained_teacher_has_seen_nothing(tmp_path: Path, image_folder: Path) -> None:
    assert find_seen([live_run(tmp_path / "run", tmp_path, image_folder, untrained=0)], HERE).unknown == ()


def test_labels_that_an_interpreter_learned_from_are_known(extract: Extract, tmp_path: Path) -> None:
    """Held-out images that taught the interpreter of a run's soft labels, stored or live."""
    features = extract(transform={"px": 32})
    dataset, pixels = FeatureDataset.open(features), [draw_image(70), draw_image(71)]
    record = {"transform": dataset.recipe.transform.model_dump(mode="json")}
    images = as_digests(map(image_digest, pixels))
    head = write_interpreter(tmp_path / "head", dataset.levels, record=record, images=images)
    dtpipe("extract", "--interpreter", head, "--from", features, "--out", str(tmp_path / "labels"), "--inline")
    stored = str(write_run(tmp_path / "stored", features, str(tmp_path / "labels")))
    live = write_run(tmp_path / "live", features)
    config = yaml.safe_load((live / "config.yaml").read_text())
    config["distill"]["interpreter"] = head
    (live / "config.yaml").write_text(yaml.safe_dump(config))
    test = with_classes(np.stack([pixels[0], draw_image(90)]), ["x", "y"], [0, 1])
    for run in (stored, str(live)):
        seen = find_seen([run], HERE)
        assert seen_notes(seen, test, dataset.recipe.transform, lambda _: test, HERE) == [
            f"1 of 2 held-out images is in the labelled images of the interpreter {head}: seen there, with their "
            "labels, so this is no held-out score",
            UNKNOWN,
        ]
    features_only = write_run(tmp_path / "features_only", features, str(tmp_path / "labels"))
    config = yaml.safe_load((features_only / "config.yaml").read_text())
    config["distill"]["labels"] = {"weight": 0.0}
    (features_only / "config.yaml").write_text(yaml.safe_dump(config))
    seen = find_seen([str(features_only)], HERE)
    assert seen_notes(seen, test, dataset.recipe.transform, lambda _: test, HERE) == [UNKNOWN]
    before = f"held-out images are not compared with the labelled images of the interpreter {head}: "
    write_interpreter(tmp_path / "head", dataset.levels, 1, record=record)
    assert find_seen([stored], HERE).unknown[0].startswith(f"{before}another interpreter is in")
    write_interpreter(tmp_path / "head", dataset.levels, images=images)
    assert "does not say at which size its images were" in find_seen([stored], HERE).unknown[0]
    shutil.rmtree(head)
    assert find_seen([stored], HERE).unknown[0].startswith(f"{before}{head}: holds no interpreter")


def test_what_is_not_known_is_said(tmp_path: Path, image_folder: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher", draw_image(3, 16))
    (teacher / TRAIN_IMAGES).write_bytes(b"x" * 40)
    unknown = find_seen([live_run(tmp_path / "run", teacher, image_folder)], HERE).unknown
    assert len(unknown) == 1 and unknown[0].startswith(f"{UNKNOWN}: ") and "bytes were changed" in unknown[0]
    gone = find_seen([str(write_run(tmp_path / "of", str(tmp_path / "gone")))], HERE).unknown
    assert gone[0].startswith(f"held-out images are not compared with the distillation dataset {tmp_path / 'gone'}: ")
    alone = str(tmp_path / "last.pt")
    assert find_seen([alone], HERE).unknown[0] == f"{alone} does not say which images it was trained on"


def test_digests_of_large_datasets_are_made_once_and_kept_beside_the_run(
    extract: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests_module, "KEPT_FROM", 8)
    monkeypatch.setattr(digests_module, "BATCH", 3)
    run = write_run(tmp_path / "run", extract(transform={"px": 32}))
    said: list[str] = []
    first = find_seen([str(run)], DigestStore(run / "eval" / "seen", said.append)).images[0]
    (kept,) = (run / "eval" / "seen").iterdir()
    assert said[-1].endswith("8 of 8 read")
    monkeypatch.setattr(digests_module, "read_images", None)
    again = find_seen([str(run)], DigestStore(run / "eval" / "seen", print)).images[0]
    assert np.array_equal(again.digests, first.digests) and len(first.digests) == 8
    monkeypatch.undo()
    monkeypatch.setattr(digests_module, "KEPT_FROM", 8)
    kept.write_bytes(kept.read_bytes()[:-1])
    store = DigestStore(run / "eval" / "seen", print)
    assert np.array_equal(find_seen([str(run)], store).images[0].digests, first.digests)


def test_a_size_that_held_out_images_cannot_come_to_is_none_they_were_seen_at() -> None:
    images = TrainingImages("somewhere", TransformRecipe(resize="none", height=5, width=5), as_digests([1]))

    def test_at(_recipe: TransformRecipe) -> LabelledSet:
        raise InputError("no image can be used")

    assert (
        seen_notes(Seen((images,)), with_classes(np.zeros((1, 4, 4, 3), np.uint8), ["b"], [0]), TASK, test_at, HERE)
        == []
    )
