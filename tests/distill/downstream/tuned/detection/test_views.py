"""Objects and segments go with their image through every change of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dtpipe.distill.downstream.tuned.detection.views import InstanceViews, PanopticViews, outer_boxes
from dtpipe.distill.downstream.tuned.heads.canvas import Canvas
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import Panoptic
from dtpipe.pipeline.demo.scenes import make_scene
from parts.objects import rectangles, scene_objects, small_config

SCENE = make_scene(3, 0, 64)


def views(head: dict | None = None, **augment: object) -> InstanceViews:
    return InstanceViews(small_config(head, augment={"flip": 0.0, **augment}))


def test_without_changes_image_and_objects_are_as_they_are() -> None:
    objects = scene_objects(SCENE)
    example = views()(SCENE.image, objects)
    np.testing.assert_allclose(example.image.permute(1, 2, 0).numpy(), SCENE.image / 127.5 - 1, atol=1e-6)
    assert example.image.dtype == torch.float32
    np.testing.assert_array_equal(example.target["boxes"].numpy(), objects.boxes)
    np.testing.assert_array_equal(example.target["labels"].numpy(), objects.classes + 1)
    np.testing.assert_array_equal(example.target["masks"].numpy(), objects.masks)
    assert all(type(value) is torch.Tensor for value in (example.image, *example.target.values()))


def test_a_mirrored_image_has_mirrored_objects() -> None:
    objects = scene_objects(SCENE)
    example = views(flip=1.0)(SCENE.image, objects)
    np.testing.assert_allclose(example.image.permute(1, 2, 0).numpy(), SCENE.image[:, ::-1] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(example.target["masks"].numpy(), objects.masks[:, :, ::-1])
    left, top, right, bottom = objects.boxes.T
    np.testing.assert_array_equal(example.target["boxes"].numpy(), np.stack([64 - right, top, 64 - left, bottom], 1))


def test_sizes_follow_the_drawn_short_side_and_the_limit_of_the_long_one() -> None:
    image, objects = np.zeros((40, 80, 3), np.uint8), rectangles((40, 80), [(10, 10, 30, 20)], [0])
    torch.manual_seed(0)
    make = views(short_px=(20, 60), long_px=100)
    examples = [make(image, objects) for _ in range(12)]
    assert {tuple(example.image.shape[1:]) for example in examples} == {(20, 40), (50, 100)}
    for example in examples:
        scale = example.image.shape[1] / 40
        torch.testing.assert_close(example.target["boxes"], torch.tensor([[10.0, 10.0, 30.0, 20.0]]) * scale)
        torch.testing.assert_close(outer_boxes(example.target["masks"]), example.target["boxes"], atol=1.0, rtol=0)
    assert views(scale=(0.5, 0.5))(image, objects).image.shape == (3, 20, 40)


def test_images_shrink_in_training_as_in_scoring() -> None:
    """Up to the rounding of training's bytes, 1/127.5."""
    example = views(short_px=(24,))(SCENE.image, scene_objects(SCENE))
    whole = torch.from_numpy(SCENE.image).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(Canvas(32, short_px=24).fit(whole), example.image, rtol=0, atol=1 / 127.5)


def test_after_a_crop_boxes_are_those_of_what_is_left_of_the_masks() -> None:
    objects = rectangles((64, 64), [(0, 0, 64, 64), (30, 30, 34, 34), (0, 0, 2, 2)], [0, 1, 2])
    image = (64 * np.arange(64)[:, None] + np.arange(64))[..., None].repeat(3, axis=2)
    torch.manual_seed(0)
    make, seen = views(crop_px=(20, 100)), set()
    for _ in range(20):
        example = make((image // 16).astype(np.uint8), objects)
        assert example.image.shape == (3, 20, 64)  # never larger than the image
        target = example.target
        assert target["boxes"][0].tolist() == [0, 0, 64, 20]
        assert torch.equal(outer_boxes(target["masks"]), target["boxes"])
        seen.add(tuple(target["labels"].tolist()))
    assert (1,) in seen and (1, 2) in seen  # objects outside are gone with their labels


def test_crowds_are_not_learned_from_and_images_without_objects_are_kept() -> None:
    objects = rectangles((64, 64), [(0, 0, 20, 20), (30, 30, 60, 60)], [4, 4], crowd=[True, False])
    assert views(flip=1.0)(SCENE.image, objects).target["boxes"].tolist() == [[4, 30, 34, 60]]
    for nothing in (rectangles((64, 64), [], []), rectangles((64, 64), [(0, 0, 20, 20)], [4], crowd=[True])):
        target = views(flip=1.0, short_px=(80,), crop_px=(30, 30))(SCENE.image, nothing).target
        shapes = {name: tuple(value.shape) for name, value in target.items()}
        assert shapes == {"boxes": (0, 4), "labels": (0,), "masks": (0, 30, 30)}


def test_boxes_without_masks_are_learned_from_where_no_mask_head_stands() -> None:
    objects = replace(scene_objects(SCENE), masks=None)
    with pytest.raises(ConfigError, match=r"boxes without masks.*head\.masks=false"):
        views()(SCENE.image, objects)
    target = views({"masks": False}, crop_px=(40, 40))(SCENE.image, objects).target
    assert target.keys() == {"boxes", "labels"}
    assert (target["boxes"] >= 0).all() and (target["boxes"] <= 40).all()


def test_colours_vary_and_nothing_else() -> None:
    objects = scene_objects(SCENE)
    torch.manual_seed(1)
    make = views(photometric=True)
    examples = [make(SCENE.image, objects) for _ in range(4)]
    assert any(not torch.equal(examples[0].image, example.image) for example in examples[1:])
    assert all(torch.equal(examples[0].target["masks"], example.target["masks"]) for example in examples)


def test_segments_become_things_for_the_detector_and_a_map_of_stuff() -> None:
    segments = np.zeros((8, 8), np.int32)
    segments[:2], segments[2:4], segments[4:6, :4], segments[4:6, 4:], segments[7] = 70000, 5, 9, 11, 13
    target = Panoptic(segments, {70000: 0, 5: 1, 9: 3, 11: 2, 13: 3}, crowd=frozenset({13}))
    config = small_config(augment={"flip": 1.0})
    learned = PanopticViews((1, 3), (0, 2), config)(np.zeros((8, 8, 3), np.uint8), target).target
    assert sorted(zip(learned["labels"].tolist(), learned["boxes"].tolist(), strict=True)) == [
        (1, [0, 2, 8, 4]),
        (2, [4, 4, 8, 6]),
    ]
    assert learned["masks"].dtype == torch.uint8 and learned["masks"].shape == (2, 8, 8)
    rows = [[1] * 8] * 2 + [[0] * 8] * 2 + [[2] * 4 + [0] * 4] * 2 + [[255] * 8] * 2
    assert learned["semantic"].tolist() == rows


def test_segments_without_things_are_kept() -> None:
    target = Panoptic(np.full((8, 8), 3, np.int32), {3: 0})
    learned = PanopticViews((1,), (0,), small_config())(np.zeros((8, 8, 3), np.uint8), target).target
    assert learned["boxes"].shape == (0, 4) and learned["masks"].shape == (0, 8, 8)
    assert learned["semantic"].unique().tolist() == [1]
