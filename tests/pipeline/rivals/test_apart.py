"""Copies are found by their pixels, however many images there are, and each is read once in the life of a run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.labelled import LabelledSet, join_sets
from dtpipe.manifests.errors import ConfigError
from dtpipe.pipeline import labelled as labelled_module
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.evaluate import evaluate
from dtpipe.pipeline.labelled import LabelledReader, open_labelled
from dtpipe.pipeline.rivals import digests as digests_module
from dtpipe.pipeline.rivals.apart import check_apart_by_content, without_copies
from dtpipe.pipeline.rivals.digests import DigestStore, known_digests
from parts.images import draw_image, png, write_files
from parts.labelled import with_classes
from parts.memory import write_student


def with_digests(prefix: str, *pixels: int) -> LabelledSet:
    images = np.stack([np.full((4, 4, 3), value, np.uint8) for value in pixels])
    digests = tuple(blake3(image.tobytes()).hexdigest() for image in images)
    return replace(
        with_classes(images, [f"{prefix}{idx}" for idx in range(len(images))], [0] * len(images)), digests=digests
    )


def test_copies_within_one_source_are_left_out_of_the_held_out_ones_with_a_note() -> None:
    said: list[str] = []
    train, test = check_apart_by_content(
        with_digests("a", 1, 2, 3), with_digests("b", 3, 4, 1, 5), True, known_digests, said.append
    )
    assert test.keys == ("b1", "b3") and train.keys == ("a0", "a1", "a2")
    assert said == ["left out 2 held-out images that labelled ones are copies of: b0 is a2"]
    with pytest.raises(ConfigError, match="2 of 2 held-out images are among the labelled ones"):
        check_apart_by_content(with_digests("a", 1, 2), with_digests("b", 1, 2), True, known_digests, said.append)
    apart = with_digests("b", 7, 8)
    assert check_apart_by_content(with_digests("a", 1), apart, False, known_digests, said.append)[1] is apart


def test_copies_on_one_side_are_left_out_where_each_seed_splits_anew() -> None:
    images = np.zeros((4, 2, 2, 3), np.uint8)
    whole = replace(
        with_classes(images, list("abcd"), [0, 1, 0, 1]), digests=("1f" * 32, "2f" * 32, "1f" * 32, "3f" * 32)
    )
    said: list[str] = []
    assert without_copies(whole, known_digests, said.append).keys == ("a", "b", "d")
    assert said == ["left out 1 copy, since each seed splits the images anew: c is a"]
    assert (
        without_copies(whole.subset([0, 1, 3]), known_digests, said.append).keys == ("a", "b", "d") and len(said) == 1
    )


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of over four images are large, and their digests are kept."""
    monkeypatch.setattr(labelled_module, "LOOKED_AT", 4)
    monkeypatch.setattr(labelled_module, "_FEW", 2)
    monkeypatch.setattr(digests_module, "KEPT_FROM", 1)
    monkeypatch.setattr(digests_module, "BATCH", 2)


def write_images(root: Path, *numbers: int) -> Path:
    return write_files(root, {f"{'ab'[idx % 2]}/{idx}.png": png(draw_image(num)) for idx, num in enumerate(numbers)})


def open_set(root: Path, prefix: str = "") -> LabelledSet:
    reader = LabelledReader(open_labelled(str(root)), None, str(root))
    return reader.select(range(len(reader.items)), lambda _: None, prefix)


class Reads:
    """Counts the images that are read of a set."""

    def __init__(self, labelled: LabelledSet) -> None:
        self.rows: list[int] = []
        self.labelled = replace(labelled, image=lambda row: self.rows.append(row) or labelled.image(row))


def test_copies_among_very_many_images_are_refused_by_name(many, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_student(run / "last.pt", "test_resnet", (16, 16))
    own = write_images(tmp_path / "own", *range(6))
    held = write_images(tmp_path / "held", 50, 51, 52, 4, 53, 54)
    config = EvalConfig(
        checkpoint=str(run),
        task="probe",
        images=str(own),
        test_images=str(held),
        labelled=("all",),
        seeds=1,
        probe=ProbeConfig(max_iter=5, l2_grid=(0.1,), folds=2),
    )
    said: list[str] = []
    with pytest.raises(
        ConfigError, match=r"1 of 6 held-out images is among the labelled ones: held out/b/3\.png is a/4"
    ):
        evaluate(config, said.append)
    assert "labelled images are looked at, to find copies: 6 of 6 read" in said
    assert [file.name for file in (run / "eval" / "seen").iterdir()] == ["labelled.blake3"]


def test_each_image_is_read_once_and_a_changed_one_again(many, tmp_path: Path) -> None:
    root, store = write_images(tmp_path / "own", *range(6)), DigestStore(tmp_path / "seen", print)
    first = Reads(open_set(root))
    digests = store.of_set(first.labelled, "labelled")
    assert sorted(first.rows) == list(range(6))
    assert [f"{digest:016x}" for digest in digests] == [
        blake3(first.labelled.image(row).tobytes()).hexdigest()[:16] for row in range(6)
    ]
    part = Reads(open_set(root).subset([4, 1]))
    assert np.array_equal(store.of_set(part.labelled, "labelled"), digests[[4, 1]]) and part.rows == []
    both = Reads(join_sets(open_set(root), open_set(write_images(tmp_path / "more", *range(60, 65)), "held out/")))
    assert np.array_equal(store.of_set(both.labelled, "all")[:6], digests) and sorted(both.rows) == list(range(6, 11))
    (root / "a" / "0.png").write_bytes(png(draw_image(99)))
    os.utime(root / "a" / "0.png", ns=(1, 1))
    again = Reads(open_set(root))
    changed = store.of_set(again.labelled, "labelled")
    assert again.rows == [0] and np.array_equal(changed[1:], digests[1:]) and changed[0] != digests[0]


def test_a_changed_file_of_digests_is_made_anew(many, tmp_path: Path) -> None:
    labelled, store = open_set(write_images(tmp_path / "own", *range(6))), DigestStore(tmp_path / "seen", print)
    digests = store.of_set(labelled, "labelled")
    kept = tmp_path / "seen" / "labelled.blake3"
    kept.write_bytes(kept.read_bytes()[:-1])
    assert np.array_equal(store.of_set(labelled, "labelled"), digests)


def test_what_was_read_before_a_stop_is_kept(many, tmp_path: Path) -> None:
    labelled, store = open_set(write_images(tmp_path / "own", *range(30))), DigestStore(tmp_path / "seen", print)

    def stops(row: int) -> np.ndarray:
        if row == 20:
            raise KeyboardInterrupt
        return labelled.image(row)

    with pytest.raises(KeyboardInterrupt):
        store.of_set(replace(labelled, image=stops), "labelled")
    rest = Reads(labelled)
    store.of_set(rest.labelled, "labelled")
    assert 10 <= len(rest.rows) < 20


def test_images_that_cannot_be_read_are_left_out_with_a_note(many, tmp_path: Path) -> None:
    root = write_images(tmp_path / "own", *range(7))
    (root / "b" / "1.png").write_bytes(b"no")
    said: list[str] = []
    store = DigestStore(None, lambda _: None)
    train, test = check_apart_by_content(
        open_set(root), open_set(write_images(tmp_path / "held", *range(60, 66))), False, store.of_set, said.append
    )
    assert len(train) == 6 and len(test) == 6
    assert said == ["left out 1 image that cannot be read: b/1.png for one"]
