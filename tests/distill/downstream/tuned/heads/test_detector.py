"""Mask R-CNN on a student: torchvision's numbers, layer by layer and box by box."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.ops import roi_align
from torchvision.transforms import v2

from dtpipe.distill.downstream.tuned.heads import detector
from dtpipe.distill.downstream.tuned.heads.detector import Detector
from dtpipe.distill.downstream.tuned.heads.regions import RoIPool
from dtpipe.distill.student.student import StudentSpec, build_student
from dtpipe.manifests.errors import ConfigError, ShapeError
from parts.objects import learned, rectangles, small_config

PUBLISHED = 44_401_393  # torchvision's maskrcnn_resnet50_fpn, whose batch norms are frozen and count none
BATCH_NORMS = 53_120  # scales and shifts of a ResNet-50
PROPOSAL_CONV = 256 * 256 * 9 + 256  # the one more that torchvision's second version has before its proposals


def make_detector(head: dict[str, Any] | None = None, **settings: Any) -> Detector:
    torch.manual_seed(0)
    return Detector(build_student(StudentSpec("test_resnet", 4, (64, 64))), 3, small_config(head, **settings))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def resnet50() -> Detector:
    with torch.device("meta"):
        student = build_student(StudentSpec("resnet50", 4, (800, 1088)))
        return Detector(student, 90, small_config({"width": 256, "norm": "none"}))


@pytest.fixture(scope="module")
def published() -> MaskRCNN:
    with torch.device("meta"):
        return maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)


def test_parameters_at_resnet50_are_the_published_ones(resnet50, published) -> None:
    assert count(resnet50) == count(published) == PUBLISHED + BATCH_NORMS
    sizes, others = (sorted(tuple(p.shape) for p in module.parameters()) for module in (resnet50, published))
    assert sizes == others


def test_norms_and_four_convolutions_are_those_of_torchvisions_second_version() -> None:
    with torch.device("meta"):
        second = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91)
        student = build_student(StudentSpec("resnet50", 4, (800, 1088)))
        ours = Detector(student, 90, small_config({"width": 256, "norm": "batch", "convs": 4}))
    assert count(ours) == count(second) - PROPOSAL_CONV


def test_output_shapes_at_resnet50_are_the_published_ones(resnet50, published) -> None:
    images = torch.empty(2, 3, 256, 320, device="meta")
    pyramid = resnet50.branch.pyramid(resnet50.student(images), images.shape[-2:])
    levels = published.backbone(images)
    assert {name: level.shape for name, level in pyramid.items()} == {n: level.shape for n, level in levels.items()}
    regions = torch.empty(7, 256, 7, 7, device="meta")
    ours, theirs = resnet50.branch.roi_heads, published.roi_heads
    for heads in (ours, theirs):
        logits, deltas = heads.box_predictor(heads.box_head(regions))
        assert (logits.shape, deltas.shape) == ((7, 91), (7, 364))
        masks = heads.mask_predictor(heads.mask_head(torch.empty(7, 256, 14, 14, device="meta")))
        assert masks.shape == (7, 91, 28, 28)


class _Levels(nn.Module):
    """A detector's student and pyramid as torchvision's models take their backbone."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.parts, self.out_channels = [detector], 32

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        (detector,) = self.parts
        return detector.branch.pyramid(detector.student(images), images.shape[-2:])


def as_torchvision(detector: Detector) -> MaskRCNN:
    """The same layers inside torchvision's own model, which resizes nothing of 64 px and normalises nothing."""
    heads, rpn = detector.branch.roi_heads, detector.branch.rpn
    return MaskRCNN(
        _Levels(detector),
        min_size=64,
        max_size=64,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=rpn.anchor_generator,
        rpn_head=rpn.head,
        box_roi_pool=heads.box_roi_pool.align,
        box_head=heads.box_head,
        box_predictor=heads.box_predictor,
        mask_roi_pool=heads.mask_roi_pool.align,
        mask_head=heads.mask_head,
        mask_predictor=heads.mask_predictor,
        box_batch_size_per_image=32,
        _skip_resize=True,  # which would draw a size, and other samples after it
    )


@pytest.mark.parametrize("pasted", [1 << 28, 3 * 4 * 64 * 64], ids=["all", "three at a time"])
def test_losses_and_detections_are_those_of_torchvisions_model(pasted, monkeypatch) -> None:
    monkeypatch.setattr(detector, "_PASTED_BYTES", pasted)
    ours = make_detector()
    theirs = as_torchvision(ours)
    images = list(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    targets = [learned(rectangles((64, 64), [(4, 6, 40, 50), (30, 30, 60, 60)], [0, 2]))] * 2
    losses = []
    for network in (ours.train(), theirs.train()):
        torch.manual_seed(1)
        losses.append(network(images, targets))
    mine, other = losses
    assert torch.isclose(mine["loss"], sum(other.values()), atol=1e-6)
    for name, value in other.items():
        assert torch.isclose(mine[name.removeprefix("loss_")], value, atol=1e-6)
    found = ours.eval().predict(images)
    with torch.no_grad():
        expected = theirs.eval()(images)
    for detections, result in zip(found, expected, strict=True):
        assert len(detections.scores) > 0
        np.testing.assert_array_equal(detections.boxes, result["boxes"].numpy())
        np.testing.assert_array_equal(detections.classes, result["labels"].numpy() - 1)
        np.testing.assert_array_equal(detections.masks, result["masks"][:, 0].numpy() >= 0.5)


def test_small_images_on_a_canvas_are_read_at_their_true_strides() -> None:
    """torchvision infers strides from image and level: 40 px on a canvas of 64 makes it read stride 4 as 2."""
    pyramid = make_detector().branch.pyramid
    features = {str(idx): torch.rand(1, 8, 64 // stride, 64 // stride) for idx, stride in enumerate(pyramid.strides)}
    boxes = [torch.tensor([[3.0, 5.0, 30.0, 21.0]])]
    pooled = RoIPool(pyramid, 7, anchor_scale=8.0)(features, boxes, [(40, 40)])
    assert torch.equal(pooled, roi_align(features["0"], boxes, 7, spatial_scale=0.25, sampling_ratio=2))


@pytest.mark.parametrize("cascade", [False, True])
def test_images_without_objects_are_trained_on_and_break_no_norm(cascade) -> None:
    network = make_detector({"cascade": cascade, "convs": 1}).train()
    empty = learned(rectangles((48, 64), [], []))
    losses = network([torch.rand(3, 48, 64)] * 2, [empty, empty])
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values()) and losses["mask"] == 0
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    assert all(torch.isfinite(buffer).all() for buffer in network.buffers())
    assert all(p.grad is not None for p in network.parameters())  # so that processes can train together


def test_predictions_have_the_images_own_sizes_whatever_size_they_are_looked_at() -> None:
    network = make_detector(inference={"short_px": 64, "long_px": 100}).eval()
    images = [torch.rand(3, 30, 90), torch.rand(3, 80, 40)]
    assert [tuple(network.canvas.fit(image).shape[1:]) for image in images] == [(33, 100), (100, 50)]
    large = torch.rand(3, 120, 360)
    shrunk = v2.functional.resize(large, [33, 100], antialias=True)  # as training views are
    torch.testing.assert_close(network.canvas.fit(large), shrunk, rtol=0, atol=1e-6)
    for image, detections in zip(images, network.predict(images), strict=True):
        height, width = image.shape[1:]
        assert detections.size_px == (height, width) and detections.masks.shape[1:] == (height, width)
        assert (detections.boxes >= 0).all() and (detections.boxes <= [width, height, width, height]).all()
        assert (np.diff(detections.scores) <= 0).all()


def test_labels_without_masks_need_no_mask_head() -> None:
    network = make_detector({"masks": False})
    target = learned(rectangles((64, 64), [(4, 6, 40, 50)], [1]))
    losses = network.train()([torch.rand(3, 64, 64)], [{name: target[name] for name in ("boxes", "labels")}])
    assert "mask" not in losses
    assert network.eval().predict([torch.rand(3, 64, 64)])[0].masks is None


def test_under_mixed_precision_boxes_are_computed_in_float32() -> None:
    network = make_detector()
    with torch.autocast("cpu", torch.bfloat16):
        losses = network.train()([torch.rand(3, 64, 64)], [learned(rectangles((64, 64), [(4, 6, 40, 50)], [1]))])
        boxes = network.eval().predict([torch.rand(3, 64, 64)])[0].boxes
    assert torch.isfinite(losses["loss"])
    rounded = torch.from_numpy(boxes).bfloat16().float().numpy()
    assert (boxes != rounded).any()


def test_a_student_of_one_size_gets_its_own_canvas_and_a_pyramid() -> None:
    network = Detector(build_student(StudentSpec("test_vit", 4, (160, 160))), 2, small_config())
    assert network.branch.pyramid.strides == (4, 8, 16, 32)
    (detections,) = network.eval().predict([torch.rand(3, 90, 320)])
    assert detections.masks.shape[1:] == (90, 320)
    with pytest.raises(
        ShapeError, match=r"90x320 px does not fit the student, which takes 160x160 px alone; .*long_px=160"
    ):
        network.train()([torch.rand(3, 90, 320)], [learned(rectangles((90, 320), [], []))])


def test_one_small_image_at_a_time_is_too_little_for_batch_norms() -> None:
    with pytest.raises(ConfigError, match="batch norms cannot be trained on one image at a time"):
        make_detector().train()([torch.rand(3, 32, 32)], [learned(rectangles((32, 32), [], []))])


@pytest.mark.parametrize("setting", [{"flips": True}, {"scales": (1.0, 2.0)}, {"window_px": (32, 32)}])
def test_several_looks_at_an_image_are_refused(setting) -> None:
    with pytest.raises(ConfigError, match=rf"inference\.{next(iter(setting))} asks for more; leave it out"):
        make_detector(inference=setting)


def test_a_student_of_fine_strides_alone_is_refused() -> None:
    student = build_student(StudentSpec("test_resnet", 2, (64, 64)))
    student.strides, student.channels = student.strides[:1], student.channels[:1]
    with pytest.raises(ConfigError, match=r"strides \[2\] alone, and detection needs 4 or more"):
        Detector(student, 2, small_config())
