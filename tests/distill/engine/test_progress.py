"""What a run says of itself: where the time went, and what to do about it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from dtpipe.distill.engine.progress import TrainProgress, shares
from dtpipe.distill.engine.timing import Stopwatch

CPU = torch.device("cpu")


def test_time_that_no_activity_has_is_waiting_for_data():
    watch = Stopwatch(CPU)
    with watch.time("model"):
        time.sleep(0.05)
    time.sleep(0.1)
    with watch.time("model"):
        time.sleep(0.05)
    seconds = watch.seconds()
    assert seconds.keys() == {"data", "model"}
    assert 0.1 <= seconds["model"] < 0.2
    assert 0.1 <= seconds["data"] < 0.2
    assert sum(shares(seconds).values()) == pytest.approx(1)


def test_an_activity_that_fails_is_charged_too():
    watch = Stopwatch(CPU)
    with pytest.raises(ValueError, match="no"), watch.time("model"):
        time.sleep(0.02)
        raise ValueError("no")
    assert watch.seconds()["model"] >= 0.02


@pytest.mark.parametrize(("advice", "limit_step"), [(None, None), ("raise it", 5)])
def test_a_line_of_metrics_reads_back(advice, limit_step):
    progress = TrainProgress(
        step=3,
        num_steps=9,
        epoch=1,
        num_epochs=2,
        lr=0.1,
        grad_norm=2.0,
        losses={"loss": 1.5, "mse/l2": 0.5},
        throughput_img_s=7.0,
        remaining_s=6.0,
        shares={"data": 0.25, "model": 0.75},
        advice=advice,
        limit_step=limit_step,
    )
    assert TrainProgress.from_record(progress.record()) == progress
    assert ("advice" in progress.record()) == (advice is not None)


# GPU


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
def test_work_queued_on_a_gpu_is_charged_to_its_activity_and_copies_overlap(gpu):
    """A wait of the host while the device computes is no wait for data."""
    watch = Stopwatch(gpu)
    matrix = torch.randn(4096, 4096, device=gpu)
    with watch.time("model"):
        for _ in range(50):
            matrix = torch.nn.functional.normalize(matrix @ matrix)
    seconds = watch.seconds()
    assert seconds["model"] > 5 * seconds["data"]


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"sync_bn": True}, {"opt": "lamb", "ema_decay": 0.9}])
def test_training_on_a_gpu_lowers_the_loss_as_the_cpu_does(gpu, tmp_path, changes):
    from dtpipe.distill.engine.run_folder import read_metrics
    from dtpipe.distill.trainer import train
    from parts.memory import MemorySource, tiny_config, write_dataset
    from parts.settings import changed

    url = str(write_dataset(tmp_path / "features", MemorySource()))
    base = tiny_config(
        tmp_path / "gpu", datasets=(url,), epochs=8, log_every=1, precision="float32", device="cuda", **changes
    )
    train(base)
    cpu = changed(base, out=str(tmp_path / "cpu"), device="cpu", sync_bn=False)
    train(cpu)
    losses = [[line["loss"] for line in read_metrics(Path(each.run.out))] for each in (base, cpu)]
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-2)
    assert losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.gpu
def test_batches_arrive_whole_on_a_gpu_however_many_threads_send_them(gpu):
    import numpy as np

    from dtpipe.distill.stream.transfer import DeviceCopies

    copies = DeviceCopies(gpu)
    arrays = [{"a": np.full((64, 256, 256), idx, np.float32)} for idx in range(8)]
    for idx, sent in enumerate([copies.send(each) for each in arrays]):
        assert bool((copies.receive(sent)["a"] == idx).all())
