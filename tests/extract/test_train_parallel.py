"""Several processes train one teacher as one process would, stop together, and end with the same sentence."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.parallel import distributed  # noqa: F401  imported once, not in each fork

from dtpipe.extract import train_teacher as module
from dtpipe.extract.train_config import TrainTeacherConfig
from dtpipe.extract.train_parallel import Ranks, join_ranks
from dtpipe.extract.train_state import CHECKPOINT, load_checkpoint
from dtpipe.extract.train_step import train_step
from dtpipe.manifests.errors import ConfigError, DtpipeError
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.lock import Lock
from parts.paths import FIXTURES

TINY = json.loads((FIXTURES / "train" / "tiny.json").read_text())
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes")


@pytest.fixture
def config(image_folder: Path, tmp_path: Path) -> TrainTeacherConfig:
    settings: dict[str, Any] = {
        "images": str(image_folder),
        "out": str(tmp_path / "two"),
        "log_every": 1,
        "class_conditional": True,
        "label_dropout": 0.3,
    }
    settings["grad_clip"] = 1e6  # clipping and AdamW would hide a wrong scale of the gradient; its moments do not
    return TrainTeacherConfig.model_validate(TINY | settings)


def changed(config: TrainTeacherConfig, **changes: object) -> TrainTeacherConfig:
    return TrainTeacherConfig.model_validate(config.model_dump() | changes)


def run_ranks(
    config: TrainTeacherConfig, folder: Path, size: int = 2, before: Callable[[int], None] = lambda _: None
) -> list[Any]:
    """What each of `size` processes answers: its result as text, or its error's type, sentence and exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(size):
        pid = os.fork()
        if not pid:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ |= {name: str(value) for name, value in ranks.items()} | {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            _be_a_rank(config, folder / f"rank{rank}.json", rank, before)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return [
        json.loads(path.read_text()) if (path := folder / f"rank{rank}.json").exists() else None for rank in range(size)
    ]


def _be_a_rank(config: TrainTeacherConfig, answer: Path, rank: int, before: Callable[[int], None]) -> None:
    answer.unlink(missing_ok=True)
    try:
        before(rank)
        result = module.train_teacher(config)
        answer.write_text(json.dumps([result.step, result.finished, result.rank]))
    except DtpipeError as err:
        answer.write_text(json.dumps([type(err).__name__, str(err), err.exit_code]))
    finally:
        os._exit(0)


def losses(config: TrainTeacherConfig) -> list[float]:
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def moments(config: TrainTeacherConfig) -> dict[int, torch.Tensor]:
    """The optimiser's mean gradients, which grow with the gradient, as its steps do not."""
    state = load_checkpoint(Path(config.out) / CHECKPOINT)["optimizer"]["state"]
    return {parameter: values["exp_avg"] for parameter, values in state.items()}


def at_step(step: int, of_rank: int, do: Callable[[], Any]) -> Callable[[int], None]:
    """A `before` of run_ranks: when one rank comes to a step, it does something first."""

    def stepping(at: Any, state: Any, *rest: Any) -> float:
        if state.step == step:
            do()
        return train_step(at, state, *rest)

    def before(rank: int) -> None:
        if rank == of_rank:
            module.train_step = stepping

    return before


def test_two_processes_take_the_steps_of_one(config, tmp_path):
    """Three images a step: one process computes one of them, the other two."""
    one = changed(config, out=str(tmp_path / "one"))
    module.train_teacher(one)
    assert run_ranks(config, tmp_path) == [[6, True, 0], [6, True, 1]]
    np.testing.assert_allclose(losses(config), losses(one), rtol=0, atol=1e-5)
    assert (Path(config.out) / "samples.png").exists()
    expected = moments(one)
    for parameter, values in moments(config).items():
        torch.testing.assert_close(values, expected[parameter], rtol=1e-2, atol=1e-5)


def test_a_signal_to_any_process_stops_all_and_the_run_goes_on_with_another_number_of_them(config, tmp_path):
    one = changed(config, out=str(tmp_path / "one"))
    module.train_teacher(one)
    stop = at_step(2, of_rank=1, do=lambda: signal.raise_signal(signal.SIGTERM))
    answers = run_ranks(changed(config, checkpoint_every=100), tmp_path, before=stop)
    sentence = f"step 3 of 6: stopped by SIGTERM; {config.out}/last.pt is saved, run the same command to go on"
    assert answers == [["StoppedError", sentence, 143]] * 2
    assert load_checkpoint(Path(config.out) / CHECKPOINT)["step"] == 3
    assert module.train_teacher(config).finished
    np.testing.assert_allclose(losses(config), losses(one), rtol=0, atol=1e-5)


def test_a_process_that_is_gone_ends_the_others_with_a_sentence(config, tmp_path):
    gone = at_step(3, of_rank=1, do=lambda: os.kill(os.getpid(), signal.SIGKILL))
    answers = run_ranks(config, tmp_path, before=gone)
    assert answers[1] is None
    assert answers[0][0] == "IncompleteError"
    assert "process 0 of 2 lost the others" in answers[0][1]
    assert module.train_teacher(config).finished  # its lock is free, its checkpoint whole


def test_an_error_of_the_first_process_is_everyones(config, tmp_path):
    Path(config.out).mkdir()
    with Lock.acquire(Store(config.out)):
        answers = run_ranks(config, tmp_path)
    assert [answer[2] for answer in answers] == [2, 2]
    assert answers[0][1] == answers[1][1]
    assert "is being written by process" in answers[0][1]


def test_processes_that_see_different_images_are_refused(config, tmp_path):
    def before(rank: int) -> None:
        if rank == 1:
            load = module.load_images
            module.load_images = lambda at, copies: load(changed(at, limit=5), copies)

    answers = run_ranks(config, tmp_path, before=before)
    assert [answer[0] for answer in answers] == ["ConfigError"] * 2
    assert r"different checkpoints or images (step, images: [(0, 8), (0, 5)])" in answers[1][1]


def test_more_processes_than_images_in_a_batch_are_refused(config, tmp_path):
    answers = run_ranks(changed(config, batch_size=1), tmp_path)
    assert [answer[0] for answer in answers] == ["ConfigError"] * 2
    assert "batch_size is 1, too few for 2 processes" in answers[0][1]


def test_processes_that_cannot_meet_are_told_to_use_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(
            ConfigError, match=r"WORLD_SIZE is set, but the processes cannot meet at .*start them with torchrun"
        ),
        join_ranks("cpu"),
    ):
        pass


def test_a_process_without_a_gpu_of_its_own_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("LOCAL_RANK", "63")
    with pytest.raises(ConfigError, match="process 63 of this machine has no GPU, torch sees"), join_ranks("cuda"):
        pass


@pytest.mark.parametrize(("num", "size"), [(7, 3), (3, 2), (4, 4), (256, 8)])
def test_parts_cover_a_batch_and_differ_by_at_most_one(num, size):
    parts = [Ranks(rank, size).part(num) for rank in range(size)]
    assert [place for part in parts for place in part] == list(range(num))
    assert {len(part) for part in parts} <= {num // size, num // size + 1}


def test_one_process_is_the_case_of_one_rank():
    with join_ranks("cpu") as ranks:
        assert (ranks.rank, ranks.size, ranks.gather(7), ranks.first(lambda: 8)) == (0, 1, [7], 8)
        assert ranks.sum(torch.ones(2)).tolist() == [1, 1]
