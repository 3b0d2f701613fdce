"""Panoptic FPN: its layers, its two losses, and segments merged by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dtpipe.distill.downstream.tuned.heads.detector import Detector
from dtpipe.distill.downstream.tuned.heads.panoptic import PanopticFPN, SemanticBranch, merge_segments
from dtpipe.distill.downstream.tuned.predictions import Detections
from dtpipe.distill.student.student import StudentSpec, build_student
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import ClassTable
from parts.objects import learned, rectangle_mask, rectangles, small_config

TABLE = ClassTable(("sky", "cat", "road", "dog"), frozenset({1, 3}))


def make_network(classes: ClassTable = TABLE, **head: object) -> PanopticFPN:
    torch.manual_seed(0)
    return PanopticFPN(build_student(StudentSpec("test_resnet", 4, (64, 64))), classes, small_config(head))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_at_resnet50_are_those_of_the_papers_layers() -> None:
    """Figure 3: one convolution at strides 4 and 8, two at 16, three at 32, to 128 channels with group norm."""
    coco = ClassTable.numbered(133)
    coco = ClassTable(coco.names, frozenset(range(80)))
    with torch.device("meta"):
        student = build_student(StudentSpec("resnet50", 4, (800, 1088)))
        config = small_config({"width": 256, "norm": "none"})
        network, detector = PanopticFPN(student, coco, config), Detector(student, 80, config)
    first, later = 256 * 128 * 9 + 2 * 128, 128 * 128 * 9 + 2 * 128
    classifier = 128 * 54 + 54  # 53 kinds of stuff, and any thing
    assert count(network.semantic) == 4 * first + 3 * later + classifier
    assert count(network) == count(detector) + count(network.semantic)
    levels = [torch.empty(2, 256, 64 >> idx, 80 >> idx, device="meta") for idx in range(4)]
    assert network.semantic(levels).shape == (2, 54, 64, 80)


def test_levels_are_summed_at_the_finest_stride() -> None:
    branch = SemanticBranch((4, 8), 16, 3)
    fine, coarse = torch.rand(1, 16, 8, 8), torch.rand(1, 16, 4, 4)
    with torch.no_grad():
        raised = F.interpolate(branch.levels[1][0](coarse), scale_factor=2, mode="bilinear")
        torch.testing.assert_close(branch([fine, coarse]), branch.logits(branch.levels[0][0](fine) + raised))


def test_unknown_pixels_and_padding_teach_nothing() -> None:
    network = make_network(semantic_weight=2.0).train()
    target = learned(rectangles((40, 64), [], []))
    semantic = torch.full((40, 64), 255)
    losses = network([torch.rand(3, 40, 64)], [{**target, "semantic": semantic}])
    assert losses["semantic"] == 0 and torch.isfinite(losses["loss"])
    semantic[0, 0] = 2
    network.eval().branch.train()  # samples of its branch; norms of the rest stay
    image = torch.rand(3, 40, 64)
    batch = F.pad(image, (0, 0, 0, 24))[None]
    with torch.no_grad():
        found = network([image], [{**target, "semantic": semantic}])["semantic"]
        pyramid = network.branch.pyramid(network.student(batch), (64, 64))
        logits = F.interpolate(network.semantic([pyramid[name] for name in "0123"]), size=(64, 64), mode="bilinear")
    torch.testing.assert_close(found, 2.0 * -logits[0, :, 0, 0].log_softmax(dim=0)[2], rtol=1e-3, atol=1e-3)


def test_surer_objects_lie_on_top_and_stuff_fills_what_is_free() -> None:
    size = (20, 20)
    boxes = [(0, 0, 10, 10), (0, 0, 10, 12), (4, 0, 15, 10), (0, 10, 4, 20), (12, 12, 20, 20)]
    masks = np.stack([rectangle_mask(size, box) for box in boxes])
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.4], np.float32)
    detections = Detections(size, np.array(boxes, np.float32), np.array([1, 0, 0, 1, 0]), scores, masks)
    semantic = np.ones(size, np.int64)
    semantic[18:] = 2
    semantic[:, 16:] = 0  # where any thing is expected
    merged = merge_segments(detections, semantic, things=(1, 3), stuff=(0, 2), min_stuff_px=30)
    # the second object is covered by the first, the last is not sure enough, the third keeps 5 of its 11 columns:
    # less than half; the lower stuff has 2 rows of 12 columns free, too few
    assert sorted(merged.classes.items()) == [(1, 3), (2, 3), (3, 0)]
    expected = np.where(semantic == 1, 3, 0)
    expected[:10, :10] = 1
    expected[10:, :4] = 2
    np.testing.assert_array_equal(merged.segments, expected)


def test_predictions_have_the_images_own_sizes() -> None:
    network = make_network().eval()
    images = [torch.rand(3, 30, 90), torch.rand(3, 80, 40)]
    for image, prediction in zip(images, network.predict(images), strict=True):
        assert prediction.segments.shape == tuple(image.shape[1:])
        assert set(np.unique(prediction.segments)) - {0} == prediction.classes.keys()


@pytest.mark.parametrize(
    ("things", "message"),
    [((), "none of the 4 classes is things to count; use task segment"), (range(4), "is stuff; use task detect")],
)
def test_classes_of_one_kind_alone_are_refused(things, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_network(ClassTable(TABLE.names, frozenset(things)))


def test_a_mask_head_is_needed() -> None:
    with pytest.raises(ConfigError, match="needs the mask head"):
        make_network(masks=False)
