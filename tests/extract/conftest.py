"""Runs in forked processes that can be killed, and torch.compile as tests want it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtpipe.extract.config import ExtractConfig
from parts.extractions import MakeConfig
from parts.images import write_images
from parts.interpreters import LabelSettings
from parts.paths import PARTS


@pytest.fixture(scope="session")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty 32 px PNG files in three class folders."""
    return write_images(tmp_path_factory.mktemp("images"), 60, classes=("a", "b", "c"))


@pytest.fixture
def many_config(make_config: MakeConfig, many_images: Path) -> MakeConfig:
    """Settings for those sixty images in twenty shards."""
    fields = {"images": str(many_images), "shard": {"samples": 3}, "batch_size": 3}
    return lambda **changes: make_config(**{**fields, **changes})


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A local Ray of two CPUs for the tests of one file."""
    import ray

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    memory = {"object_store_memory": 128 * 1024**2}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, **memory)
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray leaves log files to the collector
        ray.shutdown()


class Runs:
    """Starts runs as forks of one process that has torch imported, so that a run costs a fraction of a second."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        server = PARTS / "run_server.py"
        self._process = subprocess.Popen(
            [sys.executable, str(server)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._count = 0
        assert self._read() == "ready"

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def start(
        self, config: ExtractConfig | LabelSettings, fault: str = "", action: str = "extract", sync: bool = False
    ) -> int:
        """Begin a run; its process id. With `sync` it writes at a disk's pace, so that it can be killed in between."""
        pid = self._ask(
            action=action, config=config.model_dump(mode="json"), fault=fault, folder=str(self._folder), sync=sync
        )
        return int(pid)

    def wait(self, pid: int) -> int:
        """Wait for the end of a run: its exit code, or minus the signal that killed it."""
        return int(self._ask(action="wait", pid=pid))

    def answer(self, pid: int) -> dict[str, Any]:
        """What an ended run answered: its result, or its error."""
        answer: dict[str, Any] = json.loads((self._folder / f"{pid}.json").read_text())
        return answer

    def log(self, pid: int) -> str:
        """What a run wrote to stderr."""
        return (self._folder / f"{pid}.log").read_text()

    def finish(self, config: ExtractConfig | LabelSettings) -> dict[str, Any]:
        """Run to the end; the result."""
        pid = self.start(config)
        assert self.wait(pid) == 0, self.log(pid)
        answer = self.answer(pid)
        assert "digest" in answer, answer
        return answer

    def close(self) -> None:
        """End the process that forks."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """One forking process for all kill tests."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    yield runs
    runs.close()


@pytest.fixture
def dynamo() -> Iterator[None]:
    """torch.compile as in a process that never compiled."""
    import torch

    torch.ones(
        1, requires_grad=True
    ).sum().backward()  # autograd starts no threads if it runs before dynamo; forks need that
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(dynamo: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every graph that torch.compile is given from now on; traced as usual and run as they are, which is fast."""
    import torch

    seen: list[Any] = []

    def keep(graph: Any, _inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, **options: compiler(forward, backend=keep, **options))
    return seen
