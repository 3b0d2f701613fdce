"""Digit scenes: a pure function of (seed, index, part), with masks that fit the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from PIL import Image

from dtpipe.manifests.errors import ConfigError, StoreError
from dtpipe.pipeline.demo.scenes import EXTRA_SHARE, iterate_scenes, make_scene, write_scenes


@pytest.fixture(scope="module")
def scenes():
    return list(iterate_scenes(80, seed=5))


def test_a_scene_is_a_function_of_seed_and_index():
    first, again = make_scene(3, 7), make_scene(3, 7)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.instance, again.instance)
    assert first.digit == again.digit
    for other in (make_scene(3, 8), make_scene(4, 7), make_scene(3, 7, part="held_out")):
        assert (other.image != first.image).any()


def test_masks_stay_as_they_were():
    """Golden: numpy's Philox, scikit-learn's digits and Pillow's integer resampling; no JPEG decoder rounds masks."""
    digest = blake3(
        b"".join(scene.semantic.tobytes() + scene.instance.tobytes() for scene in iterate_scenes(16, seed=0))
    )
    assert digest.hexdigest()[:16] == "4765f278f060ccd4"


def test_masks_name_the_main_digit_and_tell_instances_apart(scenes):
    for scene in scenes:
        assert scene.image.shape == (64, 64, 3)
        assert scene.image.dtype == scene.semantic.dtype == scene.instance.dtype == np.uint8
        assert scene.semantic.max() < 11  # background and ten digits
        np.testing.assert_array_equal(scene.semantic > 0, scene.instance > 0)
        assert set(np.unique(scene.semantic[scene.instance == 1])) == {1 + scene.digit}
        numbers = np.unique(scene.instance)
        np.testing.assert_array_equal(numbers, np.arange(len(numbers)))  # no gap: every digit shows
        for number in numbers[1:]:
            assert len(np.unique(scene.semantic[scene.instance == number])) == 1


def test_the_main_digit_is_24_to_44_px_and_larger_than_the_others(scenes):
    for scene in scenes:
        rows, _ = np.nonzero(scene.instance == 1)
        assert 16 <= np.ptp(rows) + 1 <= 44  # ink fills most of the 8x8 cell's height
        for number in range(2, scene.instance.max() + 1):
            rows, _ = np.nonzero(scene.instance == number)
            assert np.ptp(rows) + 1 <= 18


def test_about_the_stated_share_of_scenes_holds_more_digits():
    more = [make_scene(11, index).instance.max() > 1 for index in range(300)]
    spread = 3 * (EXTRA_SHARE * (1 - EXTRA_SHARE) / 300) ** 0.5
    assert abs(np.mean(more) - EXTRA_SHARE) < spread + 0.03  # a few find no place


def test_digits_stand_out_from_their_surroundings(scenes):
    distances = []
    for scene in scenes:
        inside = scene.instance == 1
        colour = np.median(scene.image[inside].astype(float), axis=0)
        distances.append(np.linalg.norm(colour - scene.image[~inside].mean(axis=0)) / 255)
    assert np.mean(distances) > 0.35


def test_all_digits_occur(scenes):
    assert {scene.digit for scene in scenes} == set(range(10))


def test_parts_share_no_digit_image():
    from dtpipe.pipeline.demo.scenes import _material

    (_, train, train_labels), (_, held_out, labels) = _material("train"), _material("held_out")
    assert len(train) + len(held_out) == 1797
    assert set(labels) == set(train_labels) == set(range(10))
    assert len(held_out) > 400


@pytest.mark.parametrize("px", [16, 32, 96, 128])
def test_scenes_come_at_other_sizes(px):
    scene = make_scene(0, 1, px)
    assert scene.image.shape == (px, px, 3)
    assert 0.01 < (scene.instance == 1).mean() < 0.5


def test_a_tiny_scene_is_refused():
    with pytest.raises(ConfigError, match="8 px"):
        make_scene(0, 0, px=8)


def test_files_hold_the_scenes(tmp_path: Path):
    images = write_scenes(tmp_path, 6, seed=2)
    assert images == tmp_path / "images"
    names = sorted(path.relative_to(images) for path in images.rglob("*.png"))
    assert sorted(name.name for name in names) == [f"{index:05d}.png" for index in range(6)]
    for name in names:
        scene = make_scene(2, int(name.stem))
        assert name.parent.name == str(scene.digit)
        for kind in ("image", "semantic", "instance"):
            with Image.open(tmp_path / kind.replace("image", "images") / name) as file:
                np.testing.assert_array_equal(np.asarray(file), getattr(scene, kind))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_pycocotools_reads_the_objects(tmp_path: Path):
    from pycocotools.coco import COCO

    write_scenes(tmp_path, 12, seed=2, px=48)
    coco = COCO(tmp_path / "instances.json")
    assert len(coco.imgs) == 12
    for index in coco.imgs:
        scene, objects = make_scene(2, index, 48), coco.imgToAnns[index]
        assert len(objects) == len(np.unique(scene.instance)) - 1
        for number, one in enumerate(objects, 1):
            mask = coco.annToMask(one).astype(bool)
            np.testing.assert_array_equal(mask, scene.instance == number)
            assert set(scene.semantic[mask]) == {1 + one["category_id"]}
            left, top, width, height = one["bbox"]
            assert mask[top : top + height, left : left + width].sum() == mask.sum() == one["area"]


def test_an_unwritable_folder_is_named(tmp_path: Path):
    (tmp_path / "images").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot write scenes"):
        write_scenes(tmp_path, 1, seed=0)
