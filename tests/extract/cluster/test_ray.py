"""Extraction on Ray: equal digests, and what happens when workers, nodes and shards misbehave."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dtpipe.extract.cluster.actor import ExtractActor, News
from dtpipe.extract.cluster.placement import Node, WorkerShape, live_nodes, most_workers, place_workers, slots
from dtpipe.extract.cluster.preflight import check_space, check_versions, package_versions
from dtpipe.extract.run import run_extraction, run_work
from dtpipe.extract.shards.progress import Progress
from dtpipe.manifests.errors import (
    ConfigError,
    ErrorBudgetError,
    IncompleteError,
    StoppedError,
    StoreError,
    TeacherError,
)
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import committed_shards, load_entries
from dtpipe.manifests.write.plan import load_plan, plan_digest
from dtpipe.pipeline.soft_labels.request import request_of
from parts.extractions import MakeConfig
from parts.interpreters import label_settings, write_interpreter
from parts.packing import folder_files, write_zip

GPU_WORKER, CPU_WORKER = WorkerShape(cpus=1, gpus=1), WorkerShape(cpus=1, gpus=0)


def node(name: str, cpus: float = 8, gpus: float = 0) -> Node:
    return Node(name, name, cpus, gpus)


def test_one_worker_per_gpu_within_the_cpus_of_its_node() -> None:
    nodes = [node("a", gpus=4), node("b", gpus=8, cpus=2), node("head", cpus=64)]
    assert [slots(each, GPU_WORKER) for each in nodes] == [4, 2, 0]
    assert most_workers(nodes, GPU_WORKER, None) == 6
    assert place_workers(nodes, GPU_WORKER, 6) == {"a": 4, "b": 2, "head": 0}
    assert slots(node("c", gpus=1), WorkerShape(cpus=1, gpus=0.25)) == 4


def test_cpu_workers_are_dealt_over_nodes_up_to_the_cap() -> None:
    nodes = [node("a", cpus=4), node("b", cpus=4)]
    assert most_workers(nodes, CPU_WORKER, None) == 4  # one per two CPUs
    assert most_workers([node("a", cpus=1)], CPU_WORKER, None) == 1
    assert place_workers(nodes, CPU_WORKER, 3) == {"a": 2, "b": 1}
    assert place_workers(nodes, CPU_WORKER, most_workers(nodes, CPU_WORKER, 99)) == {"a": 4, "b": 4}
    assert place_workers([], CPU_WORKER, 3) == {}


def test_dead_nodes_do_not_count() -> None:
    answer = [
        {"NodeID": "b", "Alive": True, "NodeManagerHostname": "one", "Resources": {"CPU": 2.0, "GPU": 1.0}},
        {"NodeID": "a", "Alive": False, "NodeManagerHostname": "two", "Resources": {"CPU": 2.0}},
        {"NodeID": "0", "Alive": True, "NodeManagerHostname": "head", "Resources": {"memory": 1.0}},
    ]
    assert live_nodes(answer) == [Node("0", "head", 0, 0), Node("b", "one", 2, 1)]


def test_node_with_other_versions_is_refused() -> None:
    check_versions(package_versions())
    with pytest.raises(ConfigError, match=r"has torch .* \(driver: 0\.0\.1\); install the same"):
        check_versions({**package_versions(), "torch": "0.0.1"})


def test_cluster_that_does_not_answer_is_said_at_once(make_config: MakeConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(IncompleteError, match=f"127.0.0.1:{port} does not answer"):
        run_extraction(make_config(inline=False, ray_address=f"127.0.0.1:{port}"))
    assert time.monotonic() - started < 30  # Ray alone tries for more than a minute


def test_what_a_worker_logs_reaches_the_driver_once() -> None:
    """Ray keeps a worker's log in its own folder, where nobody who waits looks."""
    context: Any = None  # of no use before `prepare`
    actor = ExtractActor(context)
    logging.getLogger("dtpipe.manifests.store.patience").warning("write s3://%s: 503", "bucket/a")
    logging.getLogger("another.library").warning("not ours")
    assert actor.news() == News(0, ("write s3://bucket/a: 503",))
    assert actor.news() == News(0, ())


def test_full_disk_is_said_before_work(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    run_extraction(config)
    store = Store(config.run.out)
    assert check_space(store, load_plan(store)) > 0  # type: ignore[operator]
    monkeypatch.setattr(
        "dtpipe.extract.cluster.preflight.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})
    )
    with pytest.raises(StoreError, match=r"0\.00 GB free, 2 shards need"):
        check_space(store, load_plan(store))


@pytest.fixture
def ray_config(many_config: MakeConfig) -> MakeConfig:
    """Settings for 60 images in 20 shards on two workers."""
    return lambda **changes: many_config(**{"inline": False, "workers": 2, **changes})


def actors() -> list[psutil.Process]:
    """Processes of extraction workers below this one."""
    return [each for each in psutil.Process().children(recursive=True) if _is_actor(each)]


def _is_actor(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # it may end while we look
        return process.status() != psutil.STATUS_ZOMBIE and "ExtractActor" in " ".join(process.cmdline())
    return False


def left_running() -> list[psutil.Process]:
    """Workers that a run left behind; to end those it killed takes Ray a moment."""
    return list(psutil.wait_procs(actors(), timeout=60)[1])


class Once:
    """A progress callback that acts once, when so many shards are committed, and keeps all messages."""

    def __init__(self, shards_done: int, act: Callable[[], None]) -> None:
        self.messages: list[str] = []
        self.most_workers = 0
        self._when, self._act = shards_done, act
        self.acted_at: int | None = None

    def __call__(self, progress: Progress) -> None:
        self.most_workers = max(self.most_workers, progress.workers)
        if progress.message:
            self.messages.append(progress.message)
        if self.acted_at is None and progress.shards_done >= self._when:
            self.acted_at = progress.shards_done
            self._act()

    def said(self, text: str) -> bool:
        return any(text in message for message in self.messages)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_one_digest_for_one_or_two_actors_and_inline(form: str, ray_config: MakeConfig, tmp_path: Path) -> None:
    """Tars by one worker that reads a zip, arrays by two that read a folder."""
    workers, shard = {"zarr": 2, "webdataset": 1}[form], {"samples": 3, "format": form}
    images = str(ray_config().images)
    if form == "webdataset":
        images = str(write_zip(tmp_path / "images.zip", folder_files(Path(images))))
    results = {
        name: run_extraction(ray_config(out=str(tmp_path / name), images=images, shard=shard, **changes))
        for name, changes in {"ray": {"workers": workers}, "inline": {"inline": True}}.items()
    }
    assert len({each.digest for each in results.values()}) == 1
    assert {each.shards_written for each in results.values()} == {20}
    assert len(writers(str(tmp_path / "inline"))) == 1 <= len(writers(str(tmp_path / "ray"))) <= workers
    assert not left_running()  # nothing is left running on the cluster


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_soft_labels_have_one_digest_on_two_actors_and_inline(many_config: MakeConfig, tmp_path: Path) -> None:
    """The job travels to the workers, and each opens the features and the interpreter itself."""
    features = run_extraction(many_config(shard={"samples": 60}, batch_size=60)).url
    head = write_interpreter(tmp_path / "head", FeatureDataset.open(features).levels)

    def digest(out: str, **run: Any) -> str:
        settings = label_settings(head, features, tmp_path / out).model_dump(mode="json")
        settings["extract"]["run"] |= run
        request = request_of(settings, {})
        return run_work(request.run, request.resolve, request.record).digest

    assert digest("two", inline=False, workers=2) == digest("inline")


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_progress_moves_inside_a_shard_and_each_worker_says_where_its_time_goes(
    ray_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtpipe.extract.cluster.ray._TICK_S", 0.02)
    seen: list[Progress] = []
    result = run_extraction(ray_config(shard={"samples": 30}, batch_size=1), seen.append)
    assert any(each.samples_done == 0 and 0 < each.samples_encoded < 30 for each in seen)
    names = {name.partition(" on ")[0] for name in result.stalls}
    assert names <= {"worker 1", "worker 2"}  # the first to be ready may have done all before the other is
    assert names
    for stalls in result.stalls.values():
        assert sum(stalls.shares().values()) == pytest.approx(1)
        assert stalls.seconds <= result.seconds
    assert sum(stalls.spans.get("teacher", 0) for stalls in result.stalls.values()) > 0


def writers(out: str) -> set[int]:
    """Processes that wrote the shards."""
    store = Store(out)
    return {
        entry.provenance["pid"] for entry in load_entries(store, load_plan(store), plan_digest(store), partial=True)
    }


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_killed_and_hung_workers_are_replaced_and_their_shards_tried_again(
    ray_config: MakeConfig, tmp_path: Path
) -> None:
    expected = run_extraction(ray_config(out=str(tmp_path / "inline"), inline=True)).digest
    killed = Once(2, lambda: os.kill(min(writers(str(tmp_path / "killed"))), signal.SIGKILL))
    assert run_extraction(ray_config(out=str(tmp_path / "killed")), killed).digest == expected
    assert killed.acted_at is not None
    assert killed.acted_at < 20
    assert killed.said("died")
    hung = Once(
        2, lambda: os.kill(min(writers(str(tmp_path / "hung"))), signal.SIGSTOP)
    )  # one that has more shards in hand
    assert run_extraction(ray_config(out=str(tmp_path / "hung"), shard_deadline_s=3), hung).digest == expected
    assert hung.said("it took longer than extract.run.shard_deadline_s (3 s)")
    stopped = actors()
    for each in stopped:
        each.resume()  # Ray's kill reaches a stopped process only when it wakes
    assert not psutil.wait_procs(stopped, timeout=60)[1]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_bad_samples_and_failing_shards_end_a_ray_run_with_their_names(
    ray_config: MakeConfig, image_folder: Path
) -> None:
    (image_folder / "cat" / "001.png").write_bytes(b"")
    with pytest.raises(ErrorBudgetError, match=r"cat/001\.png: empty file"):
        run_extraction(ray_config(images=str(image_folder), max_bad=0))
    result = run_extraction(ray_config(images=str(image_folder), max_bad=1))
    assert [(each.key, each.reason) for each in result.bad] == [("cat/001.png", "empty file")]
    assert not left_running()


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_node_without_the_teacher_is_left_out_with_its_reason(
    ray_config: MakeConfig, ddpm: Path, tmp_path: Path
) -> None:
    link = tmp_path / "teacher"
    link.symlink_to(ddpm)
    config = ray_config(teacher={"path": str(link)}, noise={"timesteps": [50]})

    def lose_teacher(progress: Progress) -> None:
        if progress.workers == 0 and link.is_symlink():
            link.unlink()

    with pytest.raises(TeacherError, match="teacher"):
        run_extraction(config, lose_teacher)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_cluster_that_the_environment_names_is_said_whose_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    """By the commands that join it, and by the doctor."""
    import ray

    address = ray.get_runtime_context().gcs_address
    named = f"joined the Ray cluster at {address}, which RAY_ADDRESS in your environment names and "
    code = "from dtpipe.extract.cluster.connection import connect; connect(None)"
    environ = {**os.environ, "RAY_ADDRESS": address}
    for command in (("-c", code), ("-m", "dtpipe.pipeline.cli.main", "doctor")):
        subprocess.run([sys.executable, *command], env=environ, check=True)
        said = " ".join("".join(capfd.readouterr()).split())
        assert named in said
        assert "): 1 node (" in said
        assert ", 2 CPUs, 0 GPUs" in said
        assert ("unset it to use this machine alone" in said) == (command[0] == "-c")


def _is_server(process: psutil.Process) -> bool:
    """Whether a process runs that is no agent; those notice in their own time, of minutes, that the others are gone."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and not process.name().startswith("ray::")
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_sigterm_while_ray_starts_ends_the_command_as_asked() -> None:
    code = (
        "import sys\nfrom dtpipe.extract.cluster.connection import Connection\n"
        "from dtpipe.manifests.errors import StoppedError\nfrom dtpipe.manifests.stopping import StopRequest\n"
        "try:\n    with Connection(None) as connection, StopRequest() as stop:\n"
        "        print('starting', flush=True); connection.join(); stop.raise_if_requested('joined')\n"
        "except StoppedError as err:\n    print(err); sys.exit(err.exit_code)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1.5)  # Ray's own handler is there, its processes are starting
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "stopped by SIGTERM" in said
    marker = f"_{process.pid}/"  # in the name of the session's folder
    session = [each for each in psutil.process_iter(["cmdline"]) if marker in " ".join(each.info["cmdline"] or ())]
    deadline = time.monotonic() + 60
    while (left := [each for each in session if _is_server(each)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_no_worker_in_time_asks_to_be_run_again(ray_config: MakeConfig) -> None:
    with pytest.raises(IncompleteError, match=r"no worker was ready for 2 s .* each needs 99 CPUs"):
        run_extraction(ray_config(cpus_per_worker=99, worker_wait_s=2))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_stops_a_ray_run_cleanly(number: int, exit_code: int, ray_config: MakeConfig, tmp_path: Path) -> None:
    expected = run_extraction(ray_config(out=str(tmp_path / "inline"), inline=True)).digest
    config = ray_config()
    stop = Once(2, lambda: os.kill(os.getpid(), number))
    handler = signal.getsignal(number)
    with pytest.raises(StoppedError, match="of 20 shards committed") as caught:
        run_extraction(config, stop)
    assert caught.value.exit_code == exit_code
    assert signal.getsignal(number) is handler
    store = Store(config.run.out)
    done = committed_shards(store, load_plan(store))
    assert 2 <= len(done) < 20
    result = run_extraction(config.model_copy(update={"run": config.run.model_copy(update={"inline": True})}))
    assert (result.digest, result.shards_written) == (expected, 20 - len(done))
    assert not left_running()


@pytest.mark.slow
def test_worker_joins_with_a_node_and_its_shards_go_back_when_it_leaves(ray_config: MakeConfig, tmp_path: Path) -> None:
    """A cluster of its own: one CPU at first, a second node later, which is then lost."""
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():  # the one of the tests above; this is the last of them
        ray.shutdown()
    settings = {"shard": {"samples": 1}, "batch_size": 1, "workers": 4}
    expected = run_extraction(ray_config(out=str(tmp_path / "inline"), inline=True, **settings)).digest
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    added: list[Any] = []

    class Elastic(Once):
        def __call__(self, progress: Progress) -> None:
            super().__call__(progress)
            if len(added) == 1 and progress.workers == 1:
                time.sleep(1)  # holds the run back until the worker on the new node is ready
            elif len(added) == 1 and progress.workers == 2:
                added.append("left")
                cluster.remove_node(added[0], allow_graceful=False)

    elastic = Elastic(1, lambda: added.append(cluster.add_node(num_cpus=1)))
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        result = run_extraction(ray_config(out=str(tmp_path / "elastic"), **settings), elastic)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert added[1:] == ["left"], elastic.messages
    assert elastic.most_workers == 2
    assert elastic.said("is gone") or elastic.said("died")
    assert result.digest == expected
