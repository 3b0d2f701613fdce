"""Fine-tuning on classes: targets, losses, metric and whole images against timm, torchmetrics and numbers by hand."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from dtpipe.distill.downstream.classes import ClassMetric
from dtpipe.distill.downstream.tuned.examples import seeded_generators
from dtpipe.distill.downstream.tuned.heads.class_views import ClassView, class_augmentation
from dtpipe.distill.downstream.tuned.heads.classifier import Classifier
from dtpipe.distill.downstream.tuned.load import load_tuned
from dtpipe.distill.downstream.tuned.network import resolve
from dtpipe.distill.downstream.tuned.predictions import ClassPrediction
from dtpipe.distill.downstream.tuned.registry import find_tuned
from dtpipe.distill.downstream.tuned.run import tune
from dtpipe.distill.downstream.tuned.scoring import image_tensor
from dtpipe.distill.downstream.tuned.tasks.finetune import mix_classes
from dtpipe.distill.student.student import Student, StudentSpec, build_student
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import Class, ClassTable
from parts.labelled import with_classes
from parts.tuning import STUDENT, bright_halves, tune_config, tune_job


def student(name: str = STUDENT.name, px: int = 32) -> Student:
    torch.manual_seed(0)
    return build_student(StudentSpec(name, 4, (px, px)))


def classifier(**changes: object) -> Classifier:
    backbone = student()
    return Classifier(backbone, 3, resolve(find_tuned("finetune"), backbone, tune_config(**changes))).train()


@pytest.mark.parametrize("task", ["finetune", "linear"])
def test_a_handful_of_images_is_learned_by_heart_and_the_network_is_found_again(task: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    labelled = with_classes(images, [f"{idx}.png" for idx in range(6)], [0, 1, 2, 0, 1, 2])
    config = tune_config(
        steps=40, batch_size=6, lr=5e-3 if task == "finetune" else 0.1, head={"dropout": 0.0}, augment={"flip": 0}
    )
    result = tune(tune_job(config, labelled, task), labelled, tmp_path, "cpu")
    assert (result.value, set(result.by_class["accuracy"].values())) == (1.0, {1.0})
    model = load_tuned(tmp_path)
    assert (model.task.name, model.classes.names) == (task, ("0", "1", "2"))
    predictions = model.network.predict([image_tensor(image) for image in images])
    assert [int(each.probabilities.argmax()) for each in predictions] == [0, 1, 2, 0, 1, 2]
    kept = json.loads((tmp_path / "predictions" / "00004.json").read_text())["classes"]
    assert max(kept, key=kept.__getitem__) == "1"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["cross_entropy", "binary"])
def test_losses_are_timms(loss: str, smoothing: float) -> None:
    model = classifier(head={"loss": loss, "dropout": 0}, augment={"smoothing": smoothing})
    images, numbers = torch.rand(4, 3, 32, 32) * 2 - 1, torch.tensor([0, 2, 1, 2])
    found = model.eval()(list(images), [{"class": number} for number in numbers])["loss"]
    theirs = BinaryCrossEntropy(smoothing) if loss == "binary" else LabelSmoothingCrossEntropy(smoothing)
    torch.testing.assert_close(found, theirs(model.logits(images), numbers))


def test_mixed_images_and_targets_are_timms_and_an_odd_one_stays() -> None:
    config = tune_config(augment={"mixup": 0.8, "smoothing": 0.1})
    mix = mix_classes(ClassTable.numbered(3), config)
    images, numbers = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 1, 0])
    assert mix is not None and mix_classes(ClassTable.numbered(3), tune_config()) is None
    with seeded_generators("mix"):
        mixed, targets = mix(images, [{"class": number} for number in numbers])
    with seeded_generators("mix"):
        np.random.rand()  # whether to mix at all
        lam = float(np.random.beta(0.8, 0.8))
    expected = lam * images[:4] + (1 - lam) * images[:4].flip(0)
    torch.testing.assert_close(mixed, torch.cat([expected, images[4:]]))
    soft = torch.stack([target["probabilities"] for target in targets])
    torch.testing.assert_close(soft[:4], mixup_target(numbers[:4], 3, lam, 0.1))
    assert soft[4].tolist() == pytest.approx([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3])
    model = classifier().eval()
    found = model(list(torch.rand(5, 3, 32, 32)), targets)
    assert torch.isfinite(found["loss"])
    logits = torch.randn(5, 3)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, soft), SoftTargetCrossEntropy()(logits, soft))


def test_top1_top5_and_classes_are_those_by_hand_however_ranks_share_the_images() -> None:
    """Six classes; of class 0 one of two is right, of class 3 one of one; class 5 of the third image is sixth."""
    table = ClassTable.numbered(6)
    rows = [([9, 1, 1, 1, 1, 1], 0), ([1, 9, 1, 1, 1, 1], 0), ([6, 5, 4, 3, 2, 1], 5), ([0, 0, 0, 1, 0, 0], 3)]
    whole, *parts = ClassMetric(table), ClassMetric(table), ClassMetric(table)
    for idx, (scores, number) in enumerate(rows):
        prediction = ClassPrediction(np.asarray(scores, np.float32) / sum(scores))
        for metric in (whole, parts[idx % 2]):
            metric.add(str(idx), prediction, Class(number))
    first, second = (cast(ClassMetric, pickle.loads(pickle.dumps(part))) for part in parts)
    first.merge(second)
    for scores_of in (whole.scores(), first.scores()):
        assert scores_of.value == 0.5
        assert scores_of.others == {"accuracy of the mean class": pytest.approx(0.5), "top-5 accuracy": 0.75}
        assert scores_of.by_class == {"accuracy": {"0": 0.5, "1": None, "2": None, "3": 1.0, "4": None, "5": 0.0}}


def test_whole_images_are_seen_as_timm_evaluates() -> None:
    config = tune_config(augment={"crop_px": [32, 32]}, inference={"short_px": 40})
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    theirs = create_transform((3, 32, 32), crop_pct=32 / 40, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert torch.equal(ClassView(config)(image_tensor(pixels)), theirs(Image.fromarray(pixels)))


def test_training_views_are_timms_and_without_variation_the_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    varied = {"crop_px": [24, 24], "scale": [0.3, 1.0], "policy": "rand-m9-mstd0.5", "erasing": 1.0, "flip": 1.0}
    theirs = create_transform(
        (3, 24, 24), is_training=True, scale=(0.3, 1.0), hflip=1.0, color_jitter=None, auto_augment="rand-m9-mstd0.5",
        interpolation="bicubic", re_prob=1.0, re_mode="pixel",
    )  # fmt: skip
    with seeded_generators("view"):
        found = class_augmentation(tune_config(augment=varied))(pixels)
    with seeded_generators("view"):
        expected = theirs(Image.fromarray(pixels))
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close((found / 2 + 0.5 - mean) / std, expected, rtol=0, atol=1e-5)
    plain = class_augmentation(tune_config(augment={"crop_px": [48, 40], "flip": 0}))(pixels)
    torch.testing.assert_close(plain, image_tensor(pixels), rtol=0, atol=1e-6)


def test_a_crop_of_the_whole_image_keeps_its_aspect_as_scoring_does() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    config = tune_config(augment={"crop_px": [32, 32], "flip": 0})
    view, tops = class_augmentation(config), set()
    for number in range(8):
        with seeded_generators(number):
            seen = (view(pixels) + 1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        tops |= {top for top in range(33) if np.array_equal(seen, pixels[top : top + 32])}
    assert len(tops) > 3
    scored = (ClassView(config)(image_tensor(pixels)) + 1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(scored, pixels[16:48])


@pytest.mark.parametrize("policy", ["nosuch", "rand-x9"])
def test_a_policy_that_timm_does_not_read_is_refused(policy: str) -> None:
    with pytest.raises(ConfigError, match=rf"eval.tune.augment.policy is '{policy}', which timm does not read"):
        class_augmentation(tune_config(augment={"crop_px": [32, 32], "policy": policy}))


def test_trivial_augment_replaces_the_policy() -> None:
    config = tune_config(augment={"crop_px": [32, 32], "policy": "trivial", "flip": 0})
    view, pixels = class_augmentation(config), bright_halves(1, 0).image(0)
    seen = []
    for number in range(4):
        with seeded_generators(number):
            seen.append(view(pixels))
    assert len({tuple(each.flatten().tolist()) for each in seen}) > 2


def test_convnexts_pool_through_a_norm_and_others_do_not() -> None:
    with torch.device("meta"):
        heads = {
            (name, kind): Classifier(
                build_student(StudentSpec(name, 4, (64, 64))),
                3,
                tune_config(augment={"crop_px": [64, 64]}, head={"pooled_norm": kind}),
            )
            for name, kind in [("convnext_atto", "auto"), ("resnet10t", "auto"), ("resnet10t", "batch")]
        }
    norms = [type(head.norm).__name__ for head in heads.values()]
    assert norms == ["LayerNorm", "Identity", "BatchNorm1d"]


def test_other_labels_than_classes_and_a_single_class_are_refused(tmp_path: Path) -> None:
    masks, one = bright_halves(4, 0, masked=True), with_classes(np.zeros((2, 32, 32, 3), np.uint8), "ab", [0, 0])
    with pytest.raises(ConfigError, match="task finetune learns from classes, and these labels are masks"):
        tune(tune_job(tune_config(), masks), masks, tmp_path, "cpu")
    with pytest.raises(ConfigError, match=r"all labelled images are of one class, 0; give a second one"):
        tune(tune_job(tune_config(), one), one, tmp_path, "cpu")
