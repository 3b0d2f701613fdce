"""Ray Train runs the same loop: the losses of one process, also when a worker dies or the driver is told to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.downstream.tuned.run import tune, tune_with_workers
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.progress import TrainProgress
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.trainer import train, train_with_workers
from dtpipe.manifests.errors import DtpipeError, PlanChangedError
from parts.memory import MemorySource, tiny_config, write_dataset
from parts.runs import WITHOUT_BATCH_NORM, losses
from parts.settings import changed
from parts.tuning import bright_halves, tune_config, tune_job, tune_losses

# Ray Data, which Ray Train imports, warns of its own settings.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    from dtpipe.extract.cluster.connection import connect, disconnect

    connect(None)
    yield
    disconnect()


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    """Three steps an epoch; a checkpoint after each."""
    url = write_dataset(tmp_path / "features", MemorySource())
    return tiny_config(tmp_path / "ray", datasets=(str(url),), **WITHOUT_BATCH_NORM)


def train_workers() -> list[psutil.Process]:
    """Processes of this user in which Ray trains, under this one."""
    return [each for each in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(each.cmdline())]


def test_ray_workers_take_the_steps_of_one_process_although_one_is_killed(ray, config, tmp_path):
    one = changed(config, out=str(tmp_path / "one"), epochs=20)
    train(one)
    killed: list[int] = []

    def kill(progress: TrainProgress) -> None:
        if progress.step >= 4 and not killed:
            victim = train_workers()[1]
            killed.append(progress.step)
            victim.kill()

    result = train_with_workers(changed(config, epochs=20), 2, False, on_progress=kill)
    assert killed
    assert result.resumed_step >= 3  # of the process that ended it
    assert (result.num_ranks, result.num_steps) == (2, 60)
    np.testing.assert_allclose(losses(changed(config, epochs=20)), losses(one), rtol=0, atol=1e-5)
    assert {path.name for path in Path(config.run.out).iterdir()} == {
        "config.yaml",
        "data.json",
        "targets.json",
        "metrics.jsonl",
        "last.pt",
        "previous.pt",
        "checkpoints",
        ".lock",
    }


def test_a_tuned_task_takes_the_steps_of_one_process(ray, tmp_path):
    job, test = tune_job(tune_config(steps=3, frozen_norms=True, head={"dropout": 0})), bright_halves(4, 1)
    one = tune(job, test, tmp_path / "one", "cpu")
    two = tune_with_workers(job, test, tmp_path / "two", 2, False, "cpu")
    assert (two.num_ranks, two.scores) == (2, one.scores)
    np.testing.assert_allclose(tune_losses(tmp_path / "two"), tune_losses(tmp_path / "one"), rtol=0, atol=1e-5)


def test_what_a_worker_finds_wrong_is_said_once_and_not_tried_again(ray, config, tmp_path):
    train(config)
    with pytest.raises(PlanChangedError, match=r"distill\.lr: 0\.001 -> 0\.002"):  # before any worker starts
        train_with_workers(changed(config, lr=2e-3), 2, False)
    broken = changed(config, out=str(tmp_path / "broken"), levels=("l9",))
    with pytest.raises(DtpipeError, match=r"distill\.levels names \['l9'\]") as error:
        train_with_workers(broken, 2, False)
    assert error.value.exit_code == 2


def test_sigterm_to_the_command_saves_and_stops_all_workers(config):
    """Its paths are relative to where it is given; workers begin elsewhere."""
    settings = Path(config.run.out).with_name("run.yaml")
    settings.write_text(json.dumps({"distill": changed(config, epochs=2000, train_workers=2).model_dump(mode="json")}))
    command = [Path(sys.executable).with_name("dtpipe"), "distill", "-c", settings.name, Path(config.datasets[0]).name]
    process = subprocess.Popen(
        command, cwd=settings.parent, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 300
    while not (Path(config.run.out) / "metrics.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 143, said
    assert "stopped by SIGTERM; " in said
    assert (
        load_checkpoint(Path(config.run.out) / "last.pt", "distill")["step"]
        == read_metrics(Path(config.run.out))[-1]["step"]
    )
