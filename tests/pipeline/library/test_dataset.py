"""`dtpipe.open`: what a key, a position, a slice and torch's loader give is what was written."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import dtpipe
from dtpipe.manifests.schema import ViewSpec
from parts.memory import MemorySource, level_spec, write_dataset

VIEWS = (ViewSpec(draw=0, timestep=50), ViewSpec(draw=0, timestep=50, flip=True))
TRUTH = MemorySource(num_rows=13, bad=(3, 11), views=VIEWS)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("library") / "features", TRUTH)


def number(key: str) -> int:
    """Of the row that the key's truth is of."""
    return int(key[-7:-4])


def test_a_sample_by_key_has_its_image_levels_and_label(url):
    dataset = dtpipe.open(url)
    assert len(dataset) == len(dataset.keys) == 11
    sample = dataset["images/007.png"]
    assert (sample.key, sample.label, dataset["images/008.png"].label) == ("images/007.png", None, "even")
    np.testing.assert_array_equal(sample.image, TRUTH.image(7))
    assert list(sample.levels) == ["l2", "l3", "l4"]
    for level in dataset.levels:
        np.testing.assert_array_equal(sample.levels[level.name], TRUTH.features(level, 7))
        assert sample.levels[level.name].dtype == np.float16


def test_a_flipped_view_has_the_mirrored_image_that_its_levels_are_of(url):
    flipped = dtpipe.open(url)["images/007.png"].view(1)
    np.testing.assert_array_equal(flipped.image, TRUTH.image(7)[:, ::-1])
    np.testing.assert_array_equal(flipped.levels["l3"], TRUTH.features(TRUTH.levels[1], 7, 1))


def test_positions_slices_and_iteration_go_over_good_samples_in_one_order(url):
    dataset = dtpipe.open(url)
    keys = [sample.key for sample in dataset]
    assert keys == list(dataset.keys) and {number(key) for key in keys} == {*range(13)} - {3, 11}
    assert dataset[0].key == keys[0] and dataset[-1].key == keys[-1]
    part = dataset[2:9:3]
    assert list(part.keys) == keys[2:9:3] and len(part) == 3
    assert [part[key].key for key in part.keys] == keys[2:9:3]
    assert list(dataset[[4, -1]].keys) == [keys[4], keys[-1]]
    assert keys[2] in part and keys[3] not in part and 7 not in part
    assert list(part.labels) == [dataset[key].label for key in part.keys]


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("nobody.png", "has no sample 'nobody.png'; keys look like 'images/"),
        ("images/003.png", "sample 'images/003.png' is bad: broken"),
        (11, "there is no sample 11; positions are 0 to 10"),
        (-12, "there is no sample -12"),
    ],
)
def test_what_is_not_there_is_said(url, which, words):
    with pytest.raises(dtpipe.DtpipeError, match=words):
        dtpipe.open(url)[which]


def test_a_sample_outside_of_a_slice_is_said_to_be_so(url):
    dataset = dtpipe.open(url)
    with pytest.raises(dtpipe.DtpipeError, match="is not in this part of the dataset"):
        dataset[:2][dataset.keys[5]]


def test_unknown_levels_and_views_are_named_with_those_there_are(url):
    dataset = dtpipe.open(url)
    with pytest.raises(dtpipe.DtpipeError, match="has no level 'l9'; choose from l2, l3, l4"):
        dataset.torch(levels=["l9"])
    with pytest.raises(dtpipe.DtpipeError, match="has no level 'l9'; choose from l2, l3, l4"):
        dataset[0].levels["l9"]
    for look in (lambda: dataset.torch(view=2), lambda: dataset[0].view(2), lambda: dataset.show(0, view=-1)):
        with pytest.raises(dtpipe.DtpipeError, match="views 0 to 1"):
            look()


def test_no_dataset_and_a_folder_that_is_none_are_refused(tmp_path):
    with pytest.raises(dtpipe.DtpipeError, match="no dataset is named"):
        dtpipe.open()
    with pytest.raises(dtpipe.DtpipeError, match="holds no feature dataset"):
        dtpipe.open(tmp_path)


def test_an_unfinished_dataset_opens_on_request_with_what_is_written(tmp_path):
    write_dataset(tmp_path / "part", TRUTH, merged=False)
    with pytest.raises(dtpipe.DtpipeError, match="unfinished"):
        dtpipe.open(tmp_path / "part")
    dataset = dtpipe.open(tmp_path / "part", allow_incomplete=True)
    assert 0 < len(dataset) < 11
    np.testing.assert_array_equal(dataset[0].image, TRUTH.image(number(dataset.keys[0])))


def test_several_datasets_are_one_after_the_other_or_joined_by_key(url, tmp_path):
    more = MemorySource(num_rows=5, bad=(), views=VIEWS)
    write_dataset(tmp_path / "more", more, prefix="more")
    both = dtpipe.open(url, tmp_path / "more")
    assert len(both) == 16 and "more/002.png" in both
    np.testing.assert_array_equal(both["more/002.png"].image, more.image(2))
    deep = MemorySource(num_rows=13, bad=(3, 11), views=VIEWS, levels=(level_spec("l5", 32, 4),))
    write_dataset(tmp_path / "deep", deep)
    joined = dtpipe.open(url, tmp_path / "deep", join=True)
    assert list(joined[0].levels) == ["l2", "l3", "l4", "l5"]
    key = joined.keys[4]
    np.testing.assert_array_equal(joined[key].levels["l5"], deep.features(deep.levels[0], number(key)))


def check_batches(samples, **loading) -> None:
    seen = []
    for batch in DataLoader(samples, batch_size=4, **loading):
        assert batch["image"].dtype == torch.uint8 and batch["image"].shape[1:] == (3, 32, 32)
        for idx, key in enumerate(batch["key"]):
            np.testing.assert_array_equal(batch["image"][idx].permute(1, 2, 0), TRUTH.image(number(key)))
            np.testing.assert_array_equal(batch["levels"]["l3"][idx], TRUTH.features(TRUTH.levels[1], number(key)))
            expected = "even" if number(key) % 2 == 0 else None
            assert (samples.classes[batch["label"][idx]] if batch["label"][idx] >= 0 else None) == expected
        seen += batch["key"]
    assert sorted(seen) == sorted(dtpipe.open(samples.source.url).keys)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("start", [None, "fork"])
def test_torchs_loader_gives_the_true_batches_with_workers_and_without(url, start):
    samples = dtpipe.open(url).torch(levels=["l3"])
    samples[0]  # reads, so that there are threads and files to leave behind
    workers = {} if start is None else {"num_workers": 2, "multiprocessing_context": start}
    check_batches(samples, shuffle=True, **workers)


def test_a_pickled_one_reads_the_same_as_a_spawned_worker_would(url):
    samples = dtpipe.open(url).torch(levels=["l3"])
    samples[0]
    check_batches(pickle.loads(pickle.dumps(samples)))


def test_items_of_a_drawn_view_have_the_image_of_that_view(url):
    samples = dtpipe.open(url).torch(view=None)
    torch.manual_seed(0)
    items = [samples[idx] for idx in range(11) for _ in range(2)]
    assert {item["view"] for item in items} == {0, 1}
    for item in items:
        image = TRUTH.image(number(item["key"]))
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0), image[:, ::-1] if item["view"] else image)
        features = TRUTH.features(TRUTH.levels[0], number(item["key"]), item["view"])
        np.testing.assert_array_equal(item["levels"]["l2"], features)


def test_a_transform_sees_each_item_and_images_can_be_left_out(url):
    samples = dtpipe.open(url)[:3].torch(levels=(), images=False, transform=sorted)
    assert samples[0] == ["key", "label", "levels", "view"] and len(samples) == 3


def test_a_sample_is_shown_as_one_picture_with_its_image_in_it(url):
    dataset = dtpipe.open(url)
    picture = dataset.show("images/007.png")
    assert picture.mode == "RGB" and picture.size[0] > 4 * 192  # the image and three levels
    corner = np.asarray(picture)[22 : 22 + 6, 6 : 6 + 6]  # below the caption: the first pixel, six times as large
    np.testing.assert_array_equal(corner, np.broadcast_to(TRUTH.image(7)[0, 0], (6, 6, 3)))
    assert picture._repr_png_()  # what a notebook asks for


def test_what_a_dataset_is_stands_in_its_representation(url):
    text = repr(dtpipe.open(url))
    assert text == f"Dataset({url}: 11 samples, 32x32 px, l2 6x8x8, l3 8x4x4, l4 10x2x2, 2 views)"
