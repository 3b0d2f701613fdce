"""`train` on real feature datasets: both stores, joined and concatenated, killed, damaged, unfinished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.stream.data import open_data
from dtpipe.distill.stream.order import StreamPosition
from dtpipe.distill.stream.stream import FeatureStream, StreamSettings
from dtpipe.distill.trainer import train
from dtpipe.manifests.errors import ConfigError, DamagedDataError, IncompleteError, PlanChangedError
from dtpipe.manifests.read.source import read_image, read_level
from dtpipe.manifests.schema import ShardRecipe
from parts.memory import FLIPPED_VIEWS, MemorySource, level_spec, tiny_config, write_dataset
from parts.runs import assert_equal_checkpoints

TRAIN = """
import sys, yaml, torch
torch.set_num_threads(1)
from dtpipe.distill.config import DistillConfig
from dtpipe.distill.trainer import train
train(DistillConfig(**yaml.safe_load(sys.argv[1])), on_progress=lambda progress: print(progress.step, flush=True))
"""


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes started here: bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_config(out: Path, *datasets: Path, **changes: object):
    return tiny_config(out, datasets=tuple(map(str, datasets)), **changes)


@pytest.mark.parametrize("shard_format", ["zarr", "webdataset"])
def test_batches_from_a_dataset_hold_what_was_written(tmp_path, shard_format):
    source = MemorySource(views=FLIPPED_VIEWS)
    url = write_dataset(tmp_path / "features", source, shard=ShardRecipe(samples=8, format=shard_format))
    opened = open_data(run_config(tmp_path / "run", url))
    settings = StreamSettings(levels=("l2", "l3"), seed=0, epochs=1, batch_size=8, micro_batch=4)
    stream = FeatureStream(opened.source, settings, torch.device("cpu"))
    seen = []
    for batch in stream.batches(StreamPosition()):
        for idx, key in enumerate(batch.keys):
            row = int(key[-7:-4])
            view = next(
                v for v in range(4) if np.array_equal(batch.levels["l2"][idx].numpy(), read_level(source, "l2", row, v))
            )
            assert np.array_equal(batch.levels["l3"][idx].numpy(), read_level(source, "l3", row, view))
            stored = read_image(source, row)
            assert np.array_equal(batch.images[idx].numpy(), stored[:, ::-1] if FLIPPED_VIEWS[view].flip else stored)
            assert batch.labels[idx] == source.columns.labels[row]
            seen.append(row)
    assert sorted(seen) == source.columns.ok_rows.tolist()


def test_both_stores_train_to_the_same_weights_but_are_other_data(tmp_path, source):
    urls = [
        write_dataset(tmp_path / name, source, shard=ShardRecipe(samples=8, format=name))
        for name in ("zarr", "webdataset")
    ]
    runs = [train(run_config(tmp_path / f"run-{url.name}", url, epochs=1)).checkpoint for url in urls]
    students = [load_checkpoint(run, "distill")["student"] for run in runs]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
    with pytest.raises(PlanChangedError, match="other data"):
        train(run_config(tmp_path / "run-zarr", urls[1], epochs=1))


def test_a_moved_dataset_goes_on(tmp_path, source):
    url = write_dataset(tmp_path / "features", source)
    train(run_config(tmp_path / "run", url, epochs=1))
    moved = url.rename(tmp_path / "elsewhere")
    assert train(run_config(tmp_path / "run", moved, epochs=1)).resumed_step == 3


def test_joined_levels_train_side_by_side_and_images_come_from_the_one_that_has_them(tmp_path, source):
    other = MemorySource(levels=(level_spec("l3", 8, 5),), bad=(5,))
    first = write_dataset(tmp_path / "first", source)
    second = write_dataset(tmp_path / "second", other, images="joined")
    result = train(run_config(tmp_path / "run", second, first, join=True, epochs=1))
    assert result.num_samples == 18  # good in both
    assert {"mse/l3", "mse/l3.b", "mse/l2"} <= set(result.losses)
    with pytest.raises(ConfigError, match="join"):
        train(run_config(tmp_path / "alone", second, epochs=1))
    assert not (tmp_path / "alone").exists()  # nothing was begun, so the mended command is not another run
    with pytest.raises(ConfigError, match="second stores no images"):
        open_data(run_config(tmp_path / "run", first, second))


def test_concatenated_datasets_train_one_after_the_other(tmp_path, source):
    first = write_dataset(tmp_path / "first", source)
    second = write_dataset(tmp_path / "second", source, prefix="more")
    assert train(run_config(tmp_path / "run", first, second, epochs=1)).num_samples == 38


def test_an_unfinished_dataset_trains_only_on_request(tmp_path, source):
    url = write_dataset(tmp_path / "features", source, merged=False)
    with pytest.raises(IncompleteError):
        train(run_config(tmp_path / "run", url))
    assert not (tmp_path / "run").exists()  # refused before any work
    assert 0 < train(run_config(tmp_path / "run", url, allow_incomplete=True, epochs=1)).num_samples < 19


def test_a_flipped_byte_stops_training_naming_level_and_sample(tmp_path, source):
    url = write_dataset(tmp_path / "features", source)
    victim = max((url / "data.zarr" / "l3").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(victim.read_bytes())
    data[40] ^= 1
    victim.write_bytes(data)
    with pytest.raises(DamagedDataError, match=r"l3.*images/\d{3}\.png|images/\d{3}\.png.*l3"):
        train(run_config(tmp_path / "run", url))


def test_levels_of_another_student_size_are_regressed_at_the_teachers(tmp_path, source):
    url = write_dataset(tmp_path / "features", source)
    result = train(run_config(tmp_path / "run", url, student_px=64, epochs=1, levels=("l2", "l3")))
    assert load_checkpoint(result.checkpoint, "distill")["student_spec"]["image_px"] == [64, 64]
    terms = {f"{term}/{level}" for term in ("mse", "at", "r2") for level in ("l2", "l3")}
    assert set(result.losses) == {"loss", "mse", "at"} | terms


def start(config) -> subprocess.Popen[str]:
    values = json.dumps(config.model_dump(mode="json"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", TRAIN, values], stdout=subprocess.PIPE, text=True, env=environment)


def test_a_process_killed_in_mid_epoch_and_run_again_gives_the_same_bits(tmp_path):
    url = write_dataset(tmp_path / "features", MemorySource(views=FLIPPED_VIEWS))
    changes = {"epochs": 4, "log_every": 1, "ema_decay": 0.9}
    train(run_config(tmp_path / "whole", url, **changes))
    broken = run_config(tmp_path / "broken", url, save_every_s=1e-9, **changes)
    with start(broken) as process:
        steps = [int(process.stdout.readline()) for _ in range(5)]  # line 5 is printed before step 5 is saved
        process.kill()
    assert steps == [1, 2, 3, 4, 5]
    saved = load_checkpoint(tmp_path / "broken" / "last.pt", "distill")
    assert saved["step"] < 12
    assert saved["step"] % 3 != 0
    assert train(broken).resumed_step == saved["step"]
    assert_equal_checkpoints(tmp_path / "whole" / "last.pt", tmp_path / "broken" / "last.pt")


def test_sigterm_ends_a_process_between_steps_with_its_state_saved(tmp_path, source):
    url = write_dataset(tmp_path / "features", source)
    config = run_config(tmp_path / "run", url, epochs=200, log_every=1, warmup_steps=5)
    with start(config) as process:
        process.stdout.readline()
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        assert time.monotonic() - asked < 30
    assert process.returncode == 1  # an uncaught StoppedError; the command line turns it into 143
    assert load_checkpoint(tmp_path / "run" / "last.pt", "distill")["step"] >= 1
