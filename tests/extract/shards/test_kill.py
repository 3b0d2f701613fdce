"""Whatever is killed, whenever: the same command run again gives the same dataset and repeats at most one shard."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dtpipe.extract.config import ExtractConfig
from dtpipe.extract.run import run_extraction
from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.store.faults import FAULT_POINTS
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import committed_shards
from dtpipe.manifests.write.plan import PLAN_FILE, load_plan
from dtpipe.pipeline.soft_labels.config import SoftLabelConfig
from parts.damage import flipped
from parts.extractions import MakeConfig, extract_config
from parts.interpreters import LabelSettings, label_settings, write_interpreter

MakeLabels = Callable[[Path], LabelSettings]
NUM_SHARDS = 20
REPAIR_POINTS = tuple(name for name in FAULT_POINTS if name.startswith("repair."))
EXTRACT_POINTS = tuple(name for name in FAULT_POINTS if name not in (*REPAIR_POINTS, "merge.rejected", "fit.kept"))
CODED_POINTS = ("fit.kept", "plan.listing", "shard.object", "merge.before_manifest")  # of levels that are fitted
NTH = {"store.temporary": 9, "shard.object": 5, "shard.objects": 3, "commit.before": 3, "commit.after": 3}  # or 1


@pytest.fixture(scope="session")
def digests() -> dict[str, str]:
    """Digest of the unbroken run, by shard format."""
    return {}


@pytest.fixture
def unbroken(many_config: MakeConfig, runs: Any, digests: dict[str, str], tmp_path: Path) -> Callable[[str], str]:
    """The digest that an unbroken inline run gives."""

    def digest(form: str) -> str:
        if form not in digests:
            answer = runs.finish(many_config(out=str(tmp_path / f"unbroken-{form}"), **stored_as(form)))
            assert answer["shards_written"] == NUM_SHARDS
            digests[form] = answer["digest"]
        return digests[form]

    return digest


def stored_as(form: str) -> dict[str, Any]:
    """Settings of a form: a shard format, and a coder where codecs are fitted."""
    shard_format, _, coder = form.partition(" ")
    codec = {"codec": {"max_error": 0.1, "fit_samples": 12, "coder": coder}} if coder else {}
    return {"shard": {"samples": 3, "format": shard_format}, **codec}


def begun_shards(out: str) -> set[int]:
    """Shards that have at least one object in the store."""
    names = (re.search(r"^data\.zarr/[^/]+/c/(\d+)/|^data/(\d+)\.tar$", name) for name in Store(out).list("data"))
    return {int(match[1] or match[2]) for match in names if match}


def done_shards(out: str) -> set[int]:
    """Shards that are committed."""
    store = Store(out)
    return set(committed_shards(store, load_plan(store))) if store.exists(PLAN_FILE) else set()


def assert_recovers(
    runs: Any, config: ExtractConfig | LabelSettings, digest: str, workers: int = 1, num_shards: int = NUM_SHARDS
) -> None:
    """The same command again: the same digest, and only what was not committed is done, at most one shard twice."""
    done = done_shards(config.run.out)
    assert len(begun_shards(config.run.out) - done) <= workers
    answer = runs.finish(config)
    assert answer["digest"] == digest
    assert answer["shards_written"] == num_shards - len(done)
    assert not verify(config.run.out, "digest").problems


@pytest.mark.parametrize(
    ("point", "form"),
    [
        *((point, form) for point in EXTRACT_POINTS for form in ("zarr", "webdataset")),
        *((point, "zarr rans") for point in CODED_POINTS),
        ("fit.kept", "webdataset rans"),
    ],
)
def test_kill_at_each_step_of_extraction_loses_at_most_one_shard(
    point: str, form: str, many_config: MakeConfig, runs: Any, unbroken: Any
) -> None:
    digest = unbroken(form)
    settings = many_config(**stored_as(form))
    pid = runs.start(settings, fault=f"{point}:{NTH.get(point, 1)}")
    assert runs.wait(pid) == -signal.SIGKILL
    assert f"fault point {point}: kill" in runs.log(pid)
    assert_recovers(runs, settings, digest)


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_kill_while_the_merge_sends_a_shard_back(form: str, many_config: MakeConfig, runs: Any, unbroken: Any) -> None:
    digest = unbroken(form)
    settings = many_config(shard={"samples": 3, "format": form})
    assert runs.wait(runs.start(settings, fault="merge.shards")) == -signal.SIGKILL
    damage(settings.run.out)
    pid = runs.start(settings, fault="merge.rejected")
    assert runs.wait(pid) == -signal.SIGKILL
    assert "fault point merge.rejected: kill" in runs.log(pid)
    assert runs.finish(settings)["digest"] == digest
    assert not verify(settings.run.out, "digest").problems


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
@pytest.mark.parametrize("point", REPAIR_POINTS)
def test_kill_at_each_step_of_repair(point: str, form: str, many_config: MakeConfig, runs: Any, unbroken: Any) -> None:
    digest = unbroken(form)
    settings = many_config(shard={"samples": 3, "format": form})
    runs.finish(settings)
    damage(settings.run.out)
    pid = runs.start(settings, fault=point, action="repair")
    assert runs.wait(pid) == -signal.SIGKILL
    assert f"fault point {point}: kill" in runs.log(pid)
    assert runs.wait(runs.start(settings, action="repair")) == 0
    answer = runs.finish(settings)
    assert (answer["digest"], answer["shards_written"]) == (digest, 1)
    assert not verify(settings.run.out, "digest").problems


def damage(out: str) -> None:
    """Write one object of shard 7 again with a flipped byte."""
    store = Store(out)
    name = next(name for name in store.list("data") if re.search(r"/l\d/c/7/|/00007\.tar$", name))
    data = store.read(name)
    store.write(name, flipped(data, len(data) // 3, 0x10))


@pytest.fixture(scope="module")
def labels(
    many_images: Path, ddpm: Path, runs: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[MakeLabels, str]]:
    """Settings of soft labels of sixty images, from stored features and from a live teacher, and their digests."""
    folder = tmp_path_factory.mktemp("features")
    url = run_extraction(extract_config(many_images, ddpm, folder / "all", shard={"samples": 60}, batch_size=60)).url
    head = write_interpreter(folder / "head", FeatureDataset.open(url).levels)

    def live(out: Path) -> LabelSettings:
        teacher = extract_config(many_images, ddpm, out, batch_size=3)
        return LabelSettings(extract=teacher, soft_labels=SoftLabelConfig(interpreter=head))

    settings = {"stored": partial(label_settings, head, url), "live": live}
    return {name: (make, runs.finish(make(folder / name))["digest"]) for name, make in settings.items()}


@pytest.mark.parametrize("features", ["stored", "live"])
@pytest.mark.parametrize("point", ["plan.created", "shard.object", "commit.before", "merge.before_manifest"])
def test_a_kill_loses_at_most_one_shard_of_soft_labels(
    point: str, features: str, labels: dict[str, tuple[MakeLabels, str]], runs: Any, tmp_path: Path
) -> None:
    make, digest = labels[features]
    settings = make(tmp_path / "labels")
    pid = runs.start(settings, fault=f"{point}:{NTH.get(point, 1)}")
    assert runs.wait(pid) == -signal.SIGKILL
    assert f"fault point {point}: kill" in runs.log(pid)
    assert_recovers(runs, settings, digest)


def test_twenty_random_kills_of_an_inline_run(
    many_config: MakeConfig, runs: Any, unbroken: Any, tmp_path: Path
) -> None:
    digest = unbroken("zarr")
    rng = np.random.Generator(np.random.Philox(20))
    shard_s = _writing_seconds(many_config(out=str(tmp_path / "timed")), runs) / NUM_SHARDS
    midway = 0
    for number in range(20):
        settings = many_config(out=str(tmp_path / f"killed{number}"))
        pid = runs.start(settings, sync=True)
        _wait_for(lambda out=settings.run.out: begun_shards(out))
        num_done = rng.integers(NUM_SHARDS - 5)  # counted: how fast a run is changes with what else the machine does
        _wait_for(lambda out=settings.run.out, num=num_done: len(done_shards(out)) >= num)
        time.sleep(rng.uniform(0, shard_s))
        os.kill(pid, signal.SIGKILL)
        killed = runs.wait(pid) == -signal.SIGKILL
        midway += bool(killed and begun_shards(settings.run.out) and len(done_shards(settings.run.out)) < NUM_SHARDS)
        assert_recovers(runs, settings, digest)
    assert midway >= 15


def _writing_seconds(settings: ExtractConfig, runs: Any) -> float:
    """Seconds between the first object and the last commit of an unbroken run."""
    pid = runs.start(settings, sync=True)
    _wait_for(lambda: begun_shards(settings.run.out))
    started_s = time.monotonic()
    _wait_for(lambda: len(done_shards(settings.run.out)) == NUM_SHARDS)
    ended_s = time.monotonic()
    assert runs.wait(pid) == 0
    return ended_s - started_s


def _wait_for(happened: Callable[[], Any], timeout_s: float = 60.0) -> None:
    """Poll until something is true."""
    end_s = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("point", "form"),
    [
        *((point, "zarr") for point in ("store.temporary:12", "shard.object:4", "commit.before:3", "merge.index:1")),
        *((point, "webdataset") for point in ("store.temporary:8", "shard.objects:3")),
    ],
)
def test_zombie_that_wakes_after_its_successor_changes_nothing(
    point: str, form: str, many_config: MakeConfig, runs: Any, unbroken: Any
) -> None:
    digest = unbroken(form)
    settings = many_config(shard={"samples": 3, "format": form}, lock_stale_s=0.5)
    zombie = runs.start(settings, fault=f"{point}:stop")
    _wait_for(lambda: psutil.Process(zombie).status() == psutil.STATUS_STOPPED)
    time.sleep(0.8)  # its lock goes stale
    assert runs.finish(settings)["digest"] == digest
    os.kill(zombie, signal.SIGCONT)
    assert runs.wait(zombie) == 0
    assert runs.answer(zombie)["error"] in ("LockHeldError", "StoreError")
    assert runs.finish(settings)["digest"] == digest
    assert not verify(settings.run.out, "digest").problems


def test_second_extract_is_refused_and_a_stale_lock_is_taken_over(
    many_config: MakeConfig, runs: Any, unbroken: Any
) -> None:
    digest = unbroken("zarr")
    settings = many_config()
    first = runs.start(settings, fault="shard.object:7:stop")
    _wait_for(lambda: psutil.Process(first).status() == psutil.STATUS_STOPPED)
    second = runs.start(settings)
    assert runs.wait(second) == 0
    answer = runs.answer(second)
    assert (answer["error"], answer["exit_code"]) == ("LockHeldError", 2)
    os.kill(first, signal.SIGKILL)
    runs.wait(first)
    assert_recovers(runs, settings, digest)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_stops_an_inline_run_cleanly(
    number: int, exit_code: int, many_config: MakeConfig, runs: Any, unbroken: Any
) -> None:
    digest = unbroken("zarr")
    settings = many_config()
    pid = runs.start(settings, sync=True)
    _wait_for(lambda: done_shards(settings.run.out))
    os.kill(pid, number)
    assert runs.wait(pid) == 0
    answer = runs.answer(pid)
    assert (answer["error"], answer["exit_code"]) == ("StoppedError", exit_code)
    assert begun_shards(settings.run.out) == done_shards(settings.run.out)  # nothing half-written is left
    assert_recovers(runs, settings, digest)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["the driver", "everything"])
def test_kill_on_ray(victim: str, many_config: MakeConfig, runs: Any, tmp_path: Path) -> None:
    """Killed workers alone are replaced: that is a test of the cluster."""
    small = {"shard": {"samples": 1}, "batch_size": 1}  # sixty shards: the kill comes long before the last
    inline = many_config(out=str(tmp_path / "unbroken"), **small)
    digest = runs.finish(inline)["digest"]
    settings = many_config(inline=False, workers=2, **small)
    driver = runs.start(settings)
    _wait_for(lambda: len(_actors(driver)) == 2, timeout_s=180)  # Ray starts slowly on a busy machine
    family, actors = psutil.Process(driver).children(recursive=True), _actors(driver)
    _wait_for(lambda: done_shards(settings.run.out), timeout_s=180)
    for each in {
        "the driver": [psutil.Process(driver)],
        "everything": [psutil.Process(driver), *family],
    }[victim]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    assert len(done_shards(settings.run.out)) < 60, "the kill came too late to show anything"
    assert runs.wait(driver) == -signal.SIGKILL
    _, left = psutil.wait_procs(actors, timeout=60)  # Ray's own agents may linger; they write nothing
    assert not left, "workers of the dead driver are still there"
    run = settings.run.model_copy(update={"inline": True})  # how it runs may change; this spares starting Ray again
    again = settings.model_copy(update={"run": run})
    assert_recovers(runs, again, digest, workers=2, num_shards=60)


def _actors(driver: int) -> list[psutil.Process]:
    return [each for each in psutil.Process(driver).children(recursive=True) if "ExtractActor" in _command(each)]


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""
