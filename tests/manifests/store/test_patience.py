"""Stores on a bad day: what is waited for, how long, what is said; and that nothing half-written comes of it."""

from __future__ import annotations

import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from dtpipe.manifests.canonical import blake3_hex
from dtpipe.manifests.errors import MissingObjectError, StoreError
from dtpipe.manifests.store.client import Client
from dtpipe.manifests.store.patience import Patience, Request, patiently
from dtpipe.manifests.store.store import Store
from parts import toy
from parts.faulty_server import (
    Fault,
    FaultyServer,
    cut_answer,
    faulty_server,
    hang,
    lose_answer,
    reset_midway,
    status,
    trickle,
)

FAST = Patience(
    connect_s=1.0, silence_s=0.5, attempt_s=5.0, total_s=6.0, first_s=6.0, first_pause_s=0.02, longest_pause_s=0.1
)
IMPATIENT = replace(FAST, silence_s=0.15, attempt_s=0.3, total_s=0.8, first_s=0.8)  # for what fails anyway
SHORT = replace(FAST, total_s=1.0, first_s=1.0)
BUSY = status(503, "SlowDown", "Please reduce your request rate")
CLOCK = r"\d\d:\d\d:\d\d"


@pytest.fixture(scope="module")
def server(s3_endpoint: str) -> Iterator[FaultyServer]:
    """What stands between this module's clients, which keep their connections, and moto."""
    import s3fs

    settings = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with faulty_server(s3_endpoint) as faulty, pytest.MonkeyPatch.context() as patch:
        for name, value in {**settings, "AWS_ENDPOINT_URL": faulty.url}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        for patience in (FAST, IMPATIENT):
            Client("s3://any", patience).fs.connect()  # takes a second
        yield faulty
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def s3(s3_endpoint: str, server: FaultyServer) -> Iterator[Any]:
    """A client that knows the way past the faulty server."""
    import botocore.session

    client = botocore.session.get_session().create_client("s3", endpoint_url=s3_endpoint)
    yield client
    client.close()


@pytest.fixture
def faulty(server: FaultyServer) -> FaultyServer:
    server.faults.clear()
    server.seen.clear()
    return server


@pytest.fixture
def store(faulty: FaultyServer, s3: Any, request: pytest.FixtureRequest) -> Store:
    """An empty folder of a bucket that no other test's troubles touch."""
    bucket = f"b{blake3_hex(request.node.name.encode())[:20]}"
    s3.create_bucket(Bucket=bucket)
    return Store(f"s3://{bucket}/features", FAST)


def stored(s3: Any, store: Store) -> dict[str, bytes]:
    """What lies in the store, past the faulty server: name to bytes."""
    bucket, _, folder = store.url.removeprefix("s3://").partition("/")
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]
    return {key.removeprefix(f"{folder}/"): s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


FAULTS = {
    "busy": BUSY,
    "server error": status(500, "InternalError", "We encountered an internal error"),
    "gateway": status(502),
    "hangs": hang,
    "resets midway": reset_midway,
    "loses the answer": lose_answer,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_gets_through_a_store_that_fails_twice(faulty, store, s3, fault):
    store.write("a", b"one")
    uses = {
        "PUT": lambda: (store.write("b", b"two" * 1000), store.create("c", b"three" * 1000)),
        "GET": lambda: (store.read("a"), store.read_ranges([("a", 0, 2), ("a", 1, 2)]), store.list()),
        "HEAD": lambda: store.size("a"),
        "DELETE": lambda: store.rename("a", "d"),
    }
    for method, use in uses.items():
        faulty.faults[:] = [Fault(FAULTS[fault], method, times=1 if fault == "hangs" else 2)]
        answer = use()
        if method == "PUT":
            assert answer[1] is True
        if method == "GET":
            assert answer == (b"one", [b"on", b"ne"], ["a", "b", "c"])
        assert faulty.faults[0].times == 0
    assert stored(s3, store) == {"b": b"two" * 1000, "c": b"three" * 1000, "d": b"one"}


@pytest.mark.parametrize("fault", [BUSY, hang, lose_answer, trickle, cut_answer])
def test_a_read_that_never_succeeds_ends_by_its_deadline_and_says_since_when(faulty, store, fault, notices):
    store.write("plan.json", b"x" * 1000)
    faulty.faults[:] = [Fault(fault, "GET", "plan.json")]
    started_s = time.monotonic()
    with pytest.raises(StoreError, match=rf"plan\.json cannot be read: .*attempts? failed since {CLOCK}") as error:
        Store(store.url, IMPATIENT).read("plan.json")
    assert time.monotonic() - started_s < 5  # 0.8 s, on a busy machine
    assert error.value.exit_code == 8
    assert len(notices()) == 1
    assert f"read {store.url}/plan.json: " in notices()[0]


def test_a_notice_names_request_error_since_when_and_what_comes_next(faulty, store, notices):
    faulty.faults[:] = [Fault(BUSY, "PUT", times=1)]
    store.write("data/00042.tar", b"bytes")
    assert len(notices()) == 1
    assert re.fullmatch(
        rf"write {store.url}/data/00042\.tar: 503 SlowDown: Please reduce your request rate; fails since {CLOCK}, "
        rf"next attempt in 0\.0\d+ s, given up at {CLOCK}",
        notices()[0],
    )


def _reset(_limit_s: float) -> None:
    raise ConnectionResetError("reset")


def test_a_thousand_failing_requests_are_one_line_and_a_count(notices):
    failures: list[str] = []

    def ask() -> None:
        for idx in range(63):
            with pytest.raises(ConnectionResetError) as error:
                patiently(_reset, Request("test://down", "read", str(idx)), IMPATIENT)
            failures.extend(error.value.__notes__)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) > 1000
    assert len(notices()) == 1
    assert max(int(text.split(" attempts failed since")[0]) for text in failures) > 1000


def test_an_outage_has_one_deadline_for_all_that_is_asked_meanwhile(faulty, store):
    """The second operation does not wait as long again: a run whose store is gone ends."""
    faulty.faults[:] = [Fault(BUSY)]
    store = Store(store.url, SHORT)
    with pytest.raises(StoreError):
        store.list()
    time.sleep(SHORT.silence_s)
    num_requests = len(faulty.seen)
    for use in (store.list, lambda: store.write("a", b""), lambda: store.stat("a")):
        with pytest.raises(StoreError, match="503"):
            use()
    assert len(faulty.seen) == num_requests + 3


def test_it_says_when_the_store_answers_again(faulty, store, notices):
    store = Store(store.url, replace(FAST, notice_s=0.3))
    store.list()
    faulty.faults[:] = [Fault(BUSY, times=8)]
    store.list()
    assert "answers again after" in notices()[-1]
    assert "8 failed attempts" in notices()[-1]


def test_a_long_attempt_is_told_while_it_lasts(faulty, store, notices):
    store = Store(store.url, replace(FAST, notice_s=0.1))
    store.write("a", b"x")
    faulty.faults[:] = [Fault(hang, "GET", times=1)]
    assert store.read("a") == b"x"
    assert any("not done after" in text for text in notices())


@pytest.mark.parametrize("fault", [BUSY, hang])
def test_the_clients_do_not_try_again_by_themselves(faulty, store, fault):
    faulty.faults[:] = [Fault(fault)]
    with pytest.raises(StoreError, match="1 attempt failed"):
        Store(store.url, replace(FAST, total_s=0, first_s=0)).write("a", b"x")
    assert len(faulty.seen) == 1


def test_a_server_that_never_answered_is_given_up_sooner():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/features"
    store = Store(url, replace(FAST, total_s=600, first_s=0.8))
    with pytest.raises(StoreError, match=r"Cannot connect.*attempts failed.*store is reachable"):
        store.read_range("plan.json", 0, 10)


# --- puts whose answer is lost, and puts that another won ------------------------------------------------------------


def test_a_create_whose_answer_was_lost_is_known_as_our_own(faulty, store, s3):
    faulty.faults[:] = [Fault(lose_answer, "PUT", times=1)]
    assert store.create("commits/00001.json", b"ours")
    assert faulty.count("PUT") > 1  # the last was refused with 412
    assert stored(s3, store) == {"commits/00001.json": b"ours"}


def test_a_create_that_another_won_while_ours_was_lost_is_not_ours(faulty, store, s3):
    store.create("commits/00001.json", b"theirs")
    faulty.faults[:] = [Fault(reset_midway, "PUT", times=1)]
    assert not store.create("commits/00001.json", b"ours")
    assert stored(s3, store) == {"commits/00001.json": b"theirs"}


def test_a_conflict_of_two_creates_is_tried_again(faulty, store):
    faulty.faults[:] = [Fault(status(409, "ConditionalRequestConflict", "At the same time"), "PUT", times=1)]
    assert store.create("lock/00001.json", b"ours")


def test_412_for_an_object_that_is_not_there_blames_the_store(faulty, store):
    faulty.faults[:] = [Fault(status(412, "PreconditionFailed", "At least one precondition did not hold"), "PUT")]
    with pytest.raises(StoreError, match=r"commits/00001\.json cannot be written: put-if-absent is refused.*412"):
        store.create("commits/00001.json", b"ours")


def test_a_large_upload_in_parts_leaves_nothing_when_a_part_is_dropped(faulty, store, s3, monkeypatch):
    import s3fs

    whole = s3fs.S3FileSystem._pipe_file

    async def in_parts(self, path, value, **options):  # of 1 kB, in place of 50 MiB
        return await whole(self, path, value, chunksize=1000, **options)

    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1000)
    monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", in_parts)
    data = os.urandom(3500)
    faulty.faults[:] = [Fault(reset_midway, "PUT", "partNumber=2")]
    with pytest.raises(StoreError):
        Store(store.url, IMPATIENT).write("data/00001.tar", data)
    assert stored(s3, store) == {}
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=store.url.split("/")[2])  # nor parts that cost money
    faulty.faults[:] = [Fault(lose_answer, "POST", "uploadId=", times=1)]  # of the request that completes it
    assert store.create("data/00001.tar", data)
    assert stored(s3, store) == {"data/00001.tar": data}


def test_a_dataset_written_over_a_bad_line_is_the_same_dataset(faulty, store, s3, unbroken, monkeypatch):
    """Every third request fails in one way or another: no commit is lost, doubled or taken for somebody else's."""
    monkeypatch.setattr("dtpipe.manifests.store.client.STORE_PATIENCE", FAST)
    count, acts = itertools.count(), itertools.cycle([BUSY, lose_answer, cut_answer, reset_midway])

    def sometimes(handler: Any) -> None:
        act = next(acts) if next(count) % 3 == 2 else lambda handler: handler.answer(*handler.server.ask(handler))
        act(handler)

    faulty.faults[:] = [Fault(sometimes)]
    manifest, written = toy.extract(store.url)
    assert (manifest.digest, written) == (unbroken[0], [0, 1, 2, 3])
    objects = stored(s3, store)
    assert {name: data for name, data in objects.items() if name in unbroken[1]} == unbroken[1]
    assert not [name for name in objects if "rejected" in name or "probe" in name]


def test_a_run_whose_store_is_gone_ends_once_its_deadline_has_passed(faulty, store, monkeypatch):
    """Not once more for the lock, and once more for each thing it still tries on its way out."""
    monkeypatch.setattr("dtpipe.manifests.store.client.STORE_PATIENCE", SHORT)
    gone = Fault(BUSY, "PUT", "data/00001")

    def everything(handler: Any) -> None:
        gone.method = gone.path = ""
        BUSY(handler)

    gone.act = everything
    faulty.faults[:] = [gone]
    started_s = time.monotonic()
    with pytest.raises(StoreError, match="503 SlowDown"):
        toy.extract(store.url)
    assert time.monotonic() - started_s < 10  # 1 s after some requests of a busy machine


# --- what waiting does not mend --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            status(403, "ExpiredToken", "The provided token has expired."),
            "ExpiredToken.*credentials have expired: renew",
        ),
        (status(403, "InvalidAccessKeyId", "No such key."), "does not know your credentials"),
        (status(403, "SignatureDoesNotMatch", "Check your key."), "does not know your credentials"),
        (status(403, "RequestTimeTooSkewed", "Too far."), "clock of this machine is off"),
        (status(403, "AccessDenied", "Access Denied"), "credentials do not allow that"),
        (status(404, "NoSuchBucket", "The specified bucket does not exist"), "bucket does not exist: check the URL"),
        (
            status(301, "PermanentRedirect", "Use another endpoint.", **{"x-amz-bucket-region": "eu-west-1"}),
            r"another region \(eu-west-1\)",
        ),
        (status(501, "NotImplemented", "A header is not implemented"), "lacks what a dataset needs"),
        (status(507, "XMinioStorageFull", "Storage is full"), "free some space"),
    ],
)
def test_refusals_say_what_is_the_matter_at_once(faulty, store, answer, said, notices):
    """Also where the answer to HEAD has no body that says it."""
    faulty.faults[:] = [Fault(answer)]
    for use in (
        lambda: store.write("a", b"x"),
        lambda: store.create("a", b"x"),
        lambda: store.read("a"),
        lambda: store.read_range("a", 0, 1),
        lambda: store.exists("a"),
        store.list,
    ):
        with pytest.raises(StoreError, match=said):
            use()
    assert not notices()


def test_no_credentials_at_all_say_what_to_set(store, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        Store(store.url, replace(FAST, connect_s=0.8)).list()


def test_a_missing_object_is_asked_for_once(faulty, store):
    with pytest.raises(MissingObjectError):
        store.read("plan.json")
    assert faulty.count("GET", "plan.json") == 1
