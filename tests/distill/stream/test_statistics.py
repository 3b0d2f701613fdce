"""Statistics of a run's targets: exact over the samples they are of, kept in the folder, stored and live."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dtpipe.distill.losses.whitening import whiten
from dtpipe.distill.stream.data import OpenedData
from dtpipe.distill.stream.order import key_hashes
from dtpipe.distill.stream.sampling import Sampling
from dtpipe.distill.stream.statistics import TARGETS_FILE, run_statistics, run_whitener
from dtpipe.manifests.errors import DamagedDataError, InputError
from dtpipe.manifests.schema import ViewSpec
from parts.memory import PX, MemorySource, tiny_config

CPU = torch.device("cpu")
VIEWS = (ViewSpec(draw=0, timestep=50), ViewSpec(draw=0, timestep=150, flip=True))


class FreshTeacher:
    """Encodes live what the source has stored; keeps what it is asked for."""

    makes_images = False

    def __init__(self, source: MemorySource) -> None:
        self.source, self.asked = source, []

    def prepare(self, samples):
        return samples.keys

    def encode(self, images, samples, prepared):
        self.asked += zip(samples.views.tolist(), samples.flip.tolist(), samples.fresh.tolist(), strict=True)
        rows = [int(key[-7:-4]) for key in prepared]
        for image, row in zip(images, rows, strict=True):
            assert np.array_equal(image.numpy(), self.source.image(row))
        return images, {
            level.name: torch.from_numpy(by_hand(self.source, level.name, rows, samples.views))
            for level in self.source.levels
        }


def by_hand(source: MemorySource, name: str, rows, views) -> np.ndarray:
    (level,) = (level for level in source.levels if level.name == name)
    return np.stack([source.features(level, row, view) for row, view in zip(rows, views, strict=True)])


def opened(source: MemorySource, rows=None) -> OpenedData:
    sampling = None if rows is None else Sampling(np.array(rows), source.num_rows)
    return OpenedData(source, (PX, PX), "0" * 64, sampling)


def config(out: Path, statistics: int | None = None, whiten: str = "dataset", **changes: object):
    return tiny_config(out, loss={"whiten": whiten, "statistics": statistics}, **changes)


@pytest.mark.parametrize("over", ["layer", "dataset"])
def test_they_are_of_all_views_of_all_good_rows_where_there_are_few(tmp_path, over):
    source = MemorySource(views=VIEWS)
    found = run_statistics(config(tmp_path, whiten=over), opened(source), ["l2", "l4"], CPU, None)
    assert set(found) == {"l2", "l4"}
    rows = source.columns.ok_rows.tolist()
    for name, of_level in found.items():
        level = np.concatenate([by_hand(source, name, rows, [view] * 19) for view in (0, 1)])
        values = whiten(torch.from_numpy(level), over).double().numpy()
        np.testing.assert_allclose(of_level.mean, values.mean(axis=(0, 2, 3)), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(of_level.variance, values.var(axis=(0, 2, 3)), rtol=1e-9)


def test_of_many_they_are_of_those_whose_keys_have_the_smallest_hashes(tmp_path):
    source = MemorySource(views=VIEWS)
    rows = np.array([row for row in source.columns.ok_rows if row % 2 == 0])
    run_statistics(config(tmp_path, statistics=7), opened(source, rows), ["l3"], CPU, None)
    hashes = key_hashes(source.columns.keys)
    chosen = sorted(sorted(rows.tolist(), key=lambda row: hashes[row])[:4])  # 4 rows at 2 views hold the 7
    assert sorted({row for read, _, _ in source.reads for row in read}) == chosen


def test_a_live_teacher_encodes_the_same_at_their_first_fresh_draw(tmp_path):
    source = MemorySource(views=VIEWS)
    teacher = FreshTeacher(source)
    stored = run_statistics(config(tmp_path / "stored", 8), opened(source), ["l2"], CPU, None)
    live_config = config(tmp_path / "live", 8, datasets=())
    live = run_statistics(live_config, opened(source), ["l2"], CPU, teacher)
    torch.testing.assert_close(live["l2"].mean, stored["l2"].mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(live["l2"].squares, stored["l2"].squares, rtol=1e-9, atol=0)
    assert teacher.asked == [(0, False, 0)] * 4 + [(1, True, 0)] * 4


def test_the_folder_keeps_them_bit_for_bit_and_data_is_not_read_again(tmp_path):
    source = MemorySource()
    first = run_statistics(config(tmp_path), opened(source), ["l2"], CPU, None)
    source.reads.clear()
    again = run_statistics(config(tmp_path), opened(source), ["l2"], CPU, None)
    assert source.reads == []
    assert all(torch.equal(getattr(first["l2"], name), getattr(again["l2"], name)) for name in ("mean", "squares"))
    other = run_statistics(config(tmp_path, whiten="layer"), opened(source), ["l2"], CPU, None)
    assert source.reads and not torch.equal(other["l2"].mean, first["l2"].mean)


def test_a_changed_record_is_refused_and_a_lost_one_where_it_is_needed(tmp_path):
    run_statistics(config(tmp_path), opened(MemorySource()), ["l2"], CPU, None)
    path = tmp_path / TARGETS_FILE
    assert run_whitener(tmp_path, "dataset").over == "dataset"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({"of": document["of"], "levels": {"l2": {}}}))
    with pytest.raises(DamagedDataError, match=r"targets\.json: holds no statistics of levels"):
        run_whitener(tmp_path, "layer")
    path.unlink()
    with pytest.raises(InputError, match=r"no such file, and the run whitens by what it says; run `dtpipe distill`"):
        run_whitener(tmp_path, "dataset")
    assert run_whitener(tmp_path, "layer").spread("l2", torch.zeros(1, 6, 8, 8)) is None


def test_a_sample_that_a_live_teacher_encodes_to_no_number_is_named(tmp_path):
    """Stored ones were looked at when they were written."""
    source = MemorySource()
    teacher = FreshTeacher(source)
    encode = teacher.encode

    def poisoned(images, samples, prepared):
        images, levels = encode(images, samples, prepared)
        levels["l3"][[key == "images/005.png" for key in samples.keys]] = torch.inf
        return images, levels

    teacher.encode = poisoned
    with pytest.raises(InputError, match=r"sample images/005\.png: level l3 holds values that are not finite"):
        run_statistics(config(tmp_path, datasets=()), opened(source), ["l2", "l3"], CPU, teacher)
    assert not (tmp_path / TARGETS_FILE).exists()


def test_without_levels_nothing_is_read_or_kept(tmp_path):
    source = MemorySource()
    assert run_statistics(config(tmp_path), opened(source), [], CPU, None) == {}
    assert source.reads == [] and not (tmp_path / TARGETS_FILE).exists()
