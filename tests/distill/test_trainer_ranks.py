"""Several processes train one student as one process would, stop together, and go on in any number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtpipe.distill import trainer as module
from dtpipe.distill.config import DistillConfig
from dtpipe.distill.stream.data import open_data
from dtpipe.distill.stream.order import StreamPosition
from dtpipe.distill.stream.stream import FeatureStream
from parts.memory import FLIPPED_VIEWS, MemorySource, tiny_config, write_dataset
from parts.ranks import fork_ranks
from parts.runs import WITHOUT_BATCH_NORM, losses
from parts.settings import changed

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes")


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    """19 good rows in batches of 8, so a tail of 3; 6 steps."""
    url = write_dataset(tmp_path / "features", MemorySource(views=FLIPPED_VIEWS))
    return tiny_config(tmp_path / "two", datasets=(str(url),), **WITHOUT_BATCH_NORM)


def train_ranks(
    config: DistillConfig, folder: Path, size: int = 2, before: Callable[[int], None] = lambda _: None
) -> list[Any]:
    """`train` on each rank: the steps it resumed from and ended at."""

    def call(rank: int) -> list[int]:
        before(rank)
        result = module.train(config)
        return [result.resumed_step, result.num_steps]

    return fork_ranks(call, folder, size)


def at_step(step: int, of_rank: int, do: Callable[[], Any]) -> Callable[[int], None]:
    """A `before` of train_ranks: when one rank has taken a step, it does something."""
    updated = module.Distillation.updated

    def updating(trainer: module.Distillation, taken: int) -> None:
        updated(trainer, taken)
        if taken == step:
            do()

    def before(rank: int) -> None:
        if rank == of_rank:
            module.Distillation.updated = updating

    return before


@pytest.mark.parametrize("size", [2, 3])
def test_processes_take_the_steps_of_one(config, tmp_path, size):
    """Gradients are those of one process, or the losses of later steps would part."""
    one = changed(config, out=str(tmp_path / "one"))
    module.train(one)
    assert train_ranks(config, tmp_path, size) == [[0, 6]] * size
    np.testing.assert_allclose(losses(config), losses(one), rtol=0, atol=1e-5)


def test_levels_that_leave_weights_unused_train_on_several_ranks(config, tmp_path):
    """Only the coarsest level is taught, so laterals of finer ones have no gradient to wait for."""
    one = changed(config, out=str(tmp_path / "one"), levels=("l4",))
    module.train(one)
    two = changed(config, levels=("l4",))
    stop = at_step(4, of_rank=0, do=lambda: signal.raise_signal(signal.SIGTERM))
    assert [answer[2] for answer in train_ranks(two, tmp_path, before=stop)] == [143, 143]
    assert module.train(two).resumed_step == 4  # and their optimiser's state fits one process
    np.testing.assert_allclose(losses(two), losses(one), rtol=0, atol=1e-5)


def test_a_run_goes_on_with_two_one_and_three_processes_and_takes_every_sample_once(config, tmp_path):
    """Stopped in the middle of the first and of the second epoch, by a signal to one of the processes."""
    one = changed(config, out=str(tmp_path / "one"))
    module.train(one)
    seen = tmp_path / "seen"
    seen.mkdir()
    losses_of = module.Distillation.losses

    def noting(trainer: module.Distillation, batch: Any) -> dict[str, torch.Tensor]:
        if batch.weight:
            with (seen / f"{os.getpid()}.jsonl").open("a") as file:
                file.write("".join(json.dumps([batch.epoch, key]) + "\n" for key in batch.keys))
        return losses_of(trainer, batch)

    def stopping(step: int) -> Callable[[int], None]:
        stop = at_step(step, of_rank=0, do=lambda: signal.raise_signal(signal.SIGTERM))

        def before(rank: int) -> None:
            module.Distillation.losses = noting
            stop(rank)

        return before

    assert [answer[2] for answer in train_ranks(config, tmp_path, 2, stopping(1))] == [143, 143]
    assert [answer[2] for answer in train_ranks(config, tmp_path, 1, stopping(5))] == [143]
    assert train_ranks(config, tmp_path, 3, stopping(99)) == [[5, 6]] * 3
    np.testing.assert_allclose(losses(config), losses(one), rtol=0, atol=1e-5)
    found = Counter(line for file in seen.iterdir() for line in file.read_text().splitlines())
    assert len(found) == 2 * 19
    assert set(found.values()) == {1}


def test_a_loss_that_is_not_finite_on_one_process_names_its_samples_on_all(config, tmp_path):
    student_images = module.student_images

    def before(rank: int) -> None:
        if rank == 1:
            module.student_images = lambda images, size: student_images(images, size) * float("nan")

    answers = train_ranks(config, tmp_path, before=before)
    assert answers[0] == answers[1]
    assert answers[0][0] == "DivergedError"
    assert "the loss is nan in step 1" in answers[0][1]
    alone = module.Distillation(config, open_data(config), torch.device("cpu")).stream
    stream = FeatureStream(alone.source, replace(alone.settings, rank=1, world=2), alone.device)
    assert all(key in answers[0][1] for key in next(stream.batches(StreamPosition())).keys)


def test_torchrun_trains_with_the_command_line_unchanged(config, tmp_path):
    """The command a user types, in two processes."""
    one = changed(config, out=str(tmp_path / "one"), epochs=1)
    module.train(one)
    settings = tmp_path / "run.yaml"
    settings.write_text(json.dumps({"distill": changed(config, epochs=1).model_dump(mode="json")}))
    dtpipe = Path(sys.executable).with_name("dtpipe")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*torchrun, dtpipe, "distill", "-c", settings, *config.datasets], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint") == 1  # the first process reports
    np.testing.assert_allclose(losses(config), losses(one), rtol=0, atol=1e-5)
