"""Segmenters take any student, refuse what does not fit in a sentence, and their losses are means over images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dtpipe.distill.downstream.labelled import IGNORE
from dtpipe.distill.downstream.tuned.config import AugmentConfig, HeadConfig, InferenceConfig, TuneConfig
from dtpipe.distill.downstream.tuned.segmentation.network import Segmenter, build_fcn, build_upernet, pixel_loss
from dtpipe.distill.student.student import StudentSpec, build_student
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import ClassTable

CLASSES = ClassTable(("sky", "ground", "thing"))


def network(name: str = "test_resnet", build=build_upernet, min_stride: int = 4, px: int = 64, **config) -> Segmenter:
    head = {"width": 16} | config.pop("head", {})
    settings = TuneConfig(steps=1, head=HeadConfig(**head), **config)
    torch.manual_seed(0)
    return build(build_student(StudentSpec(name, min_stride, (px, px))), CLASSES, settings)


def examples(num: int = 2, px: int = 64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    images = list(torch.rand(num, 3, px, px, generator=generator) * 2 - 1)
    targets = [{"mask": torch.randint(-1, 3, (px, px), generator=generator)} for _ in range(num)]
    return images, targets


@pytest.mark.parametrize("build", [build_upernet, build_fcn])
@pytest.mark.parametrize("name", ["resnet10t", "test_convnext", "test_vit"])
def test_any_student_learns_and_predicts_images_of_several_sizes(name, build) -> None:
    segmenter = network(name, build)
    losses = segmenter(*examples())
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in segmenter.parameters())
    assert set(losses) == ({"loss"} if build is build_fcn else {"loss", "main", "aux"})
    sizes = [(64, 64), (64, 64), (40, 75), (20, 9)]
    predictions = segmenter.eval().predict([torch.zeros(3, *size) for size in sizes])
    assert [one.numbers.shape for one in predictions] == sizes
    assert all(one.numbers.dtype == np.uint8 and one.foreground is None for one in predictions)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_a_head_on_one_level_leaves_no_weight_without_a_gradient(name) -> None:
    segmenter = network(name, build_fcn, head={"stride": 16})
    segmenter(*examples())["loss"].backward()
    own = {key: value for key, value in segmenter.named_parameters() if not key.startswith("student.")}
    assert [key for key, value in own.items() if value.grad is None] == []


def test_the_auxiliary_loss_is_weighted_and_its_head_has_half_the_width() -> None:
    segmenter = network(head={"width": 32, "aux_weight": 0.25})
    losses = segmenter(*examples())
    torch.testing.assert_close(losses["loss"], losses["main"] + 0.25 * losses["aux"])
    assert segmenter.aux.classifier.in_channels == 16
    assert network(head={"aux_weight": 0}).aux is None


def test_the_loss_is_a_sum_over_known_pixels_by_hand_and_a_mean_over_images() -> None:
    rng = np.random.default_rng(0)
    logits, masks = rng.normal(size=(3, 4, 5, 6)), rng.integers(-1, 4, (3, 5, 6))
    masks[2] = IGNORE
    by_image = []
    for image, mask in zip(logits, masks, strict=True):
        shares = np.exp(image) / np.exp(image).sum(axis=0)
        terms = [-np.log(shares[mask[y, x], y, x]) for y in range(5) for x in range(6) if mask[y, x] != IGNORE]
        by_image.append(sum(terms) / 30)
    loss = pixel_loss(torch.tensor(logits), torch.tensor(masks))
    assert float(loss) == pytest.approx(np.mean(by_image), rel=1e-6)  # float32 inside
    assert by_image[2] == 0


def test_images_of_several_sizes_are_filled_up_and_nothing_is_learned_there() -> None:
    segmenter = network(head={"norm": "group"}, name="test_convnext").eval()
    (image,), (target,) = examples(1)
    small_image, small_mask = image[:, :40, :50], target["mask"][:40, :50]
    filled_image, filled_mask = torch.zeros(3, 64, 64), torch.full((64, 64), IGNORE)
    filled_image[:, :40, :50], filled_mask[:40, :50] = small_image, small_mask
    mixed = segmenter([image, small_image], [target, {"mask": small_mask}])
    filled = segmenter([image, filled_image], [target, {"mask": filled_mask}])
    assert mixed["loss"] == filled["loss"]


def test_two_classes_have_a_probability_of_the_second() -> None:
    settings = TuneConfig(steps=1, head=HeadConfig(width=8))
    student = build_student(StudentSpec("test_resnet", 4, (64, 64)))
    segmenter = build_upernet(student, ClassTable(("background", "foreground")), settings).eval()
    (prediction,) = segmenter.predict(examples(1)[0])
    assert np.array_equal(prediction.numbers == 1, prediction.foreground > 0.5)


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(
        ConfigError, match=r"stride 16, and student test_resnet has those of 32; give -s eval\.tune\.head\.aux_weight=0"
    ):
        network(min_stride=32)
    assert network(min_stride=32, head={"aux_weight": 0}).levels.strides == (32,)
    with pytest.raises(
        ConfigError, match=r"head\.stride asks for a level of stride 2, and student test_resnet has those of 4, 8"
    ):
        network(build=build_fcn, head={"stride": 2})
    with pytest.raises(ConfigError, match="norm is none"):
        network(head={"norm": "none"})
    with pytest.raises(ConfigError, match=r"64x64 px alone, and crops are 32x32 px; .*crop_px=\[64,64\]"):
        network("test_vit", augment=AugmentConfig(crop_px=(32, 32)))
    with pytest.raises(ConfigError, match=r"leave eval\.tune\.inference\.window_px out"):
        network("test_vit", inference=InferenceConfig(window_px=(32, 32)))
    with pytest.raises(ConfigError, match="batch_size and micro_batch of 2 or more"):
        network()(*examples(1))
