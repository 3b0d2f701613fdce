from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtpipe.manifests.errors import ConfigError, DamagedDataError, ManifestError, MissingObjectError, StoreError
from dtpipe.manifests.store import publish
from dtpipe.manifests.store.local import is_temporary
from dtpipe.manifests.store.store import Store


def test_probe_passes_and_leaves_nothing(store_url):
    store = Store(store_url)
    store.probe()
    assert store.list() == []


def test_write_read_list_and_stat(store_url):
    store = Store(store_url)
    store.write("data/00001.tar", b"one")
    store.write("data/00000.tar", b"zero")
    store.write("plan.json", b"")
    assert store.read("data/00001.tar") == b"one"
    assert store.read("plan.json") == b""
    assert store.list() == ["data/00000.tar", "data/00001.tar", "plan.json"]
    assert store.list("data/") == store.list("da") == ["data/00000.tar", "data/00001.tar"]
    assert store.list("data/00001") == ["data/00001.tar"]
    assert store.list("nothing/") == []
    assert store.size("data/00000.tar") == 4
    assert store.exists("plan.json")
    assert not store.exists("data")
    assert not store.exists("plan")


def test_stats_agree_with_stat(store_url):
    store = Store(store_url)
    for name in ("a/1", "a/2", "b"):
        store.write(name, name.encode() * 3)
    assert store.stats() == {name: store.stat(name) for name in ("a/1", "a/2", "b")}
    assert list(store.stats("a/")) == ["a/1", "a/2"]


def test_create_never_replaces(store_url):
    store = Store(store_url)
    assert store.create("commits/00001.json", b"first")
    assert not store.create("commits/00001.json", b"other")
    assert store.read("commits/00001.json") == b"first"


def test_rename_keeps_the_bytes(store_url):
    store = Store(store_url)
    store.write("commits/1", b"entry")
    store.rename("commits/1", "commits/1.rejected")
    assert store.list() == ["commits/1.rejected"]
    assert store.read("commits/1.rejected") == b"entry"
    with pytest.raises(MissingObjectError):
        store.rename("commits/1", "commits/2")


def test_identity_changes_with_other_bytes_of_the_same_size(store_url):
    store = Store(store_url)
    store.write("object", b"aaaa")
    before = store.stat("object")
    assert store.stat("object") == before
    assert store.write("object", b"bbbb") == store.stat("object")
    assert store.stat("object").size == before.size
    assert store.identity("object") != before.identity


def test_write_tells_of_its_own_bytes_when_another_writes_right_after(tmp_path, monkeypatch):
    store = Store(tmp_path)

    def zombie(folder):
        (folder / "aside").write_bytes(b"zombie")
        (folder / "aside").replace(folder / "object")

    monkeypatch.setattr(publish, "_sync_folder", zombie)  # the step after the name was published
    written = store.write("object", b"ours!!")
    assert store.read("object") == b"zombie"
    assert store.identity("object") != written.identity


def test_write_tells_the_etag_of_its_own_bytes_over_s3(s3_url, monkeypatch):
    monkeypatch.setattr(Store, "stat", None)  # asking afterwards might tell of another's
    written = Store(s3_url).write("object", b"ours!!")
    assert written.identity == hashlib.md5(b"ours!!").hexdigest()  # what S3 documents for one plain PUT


def test_missing_objects_are_named(store_url):
    store = Store(store_url)
    store.write("there", b"x")
    for look in (store.read, store.size, store.identity, lambda name: store.read_range(name, 0, 4)):
        with pytest.raises(MissingObjectError, match=r"data/00007\.tar"):
            look("data/00007.tar")


@pytest.mark.parametrize("url", ["memory://ranges/here", "local"])
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(min_size=1, max_size=200),
    ranges=st.lists(st.tuples(st.integers(0, 210), st.integers(0, 210)), max_size=6),
)
def test_ranges_are_exact_or_an_error(url, data, ranges, tmp_path):
    store = Store(tmp_path if url == "local" else url)
    store.write("object", data)
    wanted = [("object", offset, size) for offset, size in ranges]
    if any(size and offset + size > len(data) for offset, size in ranges):
        with pytest.raises(DamagedDataError, match="object"):
            store.read_ranges(wanted)
    else:
        assert store.read_ranges(wanted) == [data[offset : offset + size] for offset, size in ranges]


def test_ranges_over_s3(s3_url):
    store = Store(s3_url)
    store.write("a", bytes(range(100)))
    store.write("b", bytes(range(100, 200)))
    assert store.read_ranges([("b", 5, 3), ("a", 0, 100), ("a", 99, 1), ("a", 7, 0)]) == [
        b"ijk",
        bytes(range(100)),
        b"c",
        b"",
    ]
    for offset, size in ((90, 11), (100, 1), (500, 5)):
        with pytest.raises(DamagedDataError, match="cut short"):
            store.read_range("a", offset, size)


def test_s3_objects_lie_where_another_client_finds_them(s3_url):
    import botocore.session

    Store(s3_url).write("data/00001.tar", b"bytes")
    client = botocore.session.get_session().create_client("s3")
    bucket, _, folder = s3_url.removeprefix("s3://").partition("/")
    found = client.get_object(Bucket=bucket, Key=f"{folder}/data/00001.tar")
    assert found["Body"].read() == b"bytes"
    assert Store(s3_url).identity("data/00001.tar") == found["ETag"].strip('"')
    client.close()


@pytest.mark.usefixtures("s3_url")
def test_no_bucket_is_a_store_error():
    with pytest.raises(StoreError, match=r"cannot be written.*bucket does not exist"):
        Store("s3://no-such-bucket-here/features").probe()


def test_a_store_that_ignores_put_if_absent_is_refused(s3_url, monkeypatch):
    import s3fs

    whole = s3fs.S3FileSystem._pipe_file

    async def ignore_mode(self, path, data, **options):
        options.pop("mode", None)
        return await whole(self, path, data, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", ignore_mode)
    with pytest.raises(StoreError, match="put-if-absent"):
        Store(s3_url).probe()


def test_urls_of_local_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store("out/features").local == tmp_path / "out/features"
    assert Store(f"file://{tmp_path}/out").local == tmp_path / "out"
    assert Store(tmp_path).url == str(tmp_path)
    assert Store("memory://a/b").local is None


def test_unknown_protocols_are_refused():
    with pytest.raises(ConfigError, match="nosuch"):
        Store("nosuch://bucket/folder")


def test_a_store_travels_by_pickle(store_url):
    Store(store_url).write("a", b"1")
    assert pickle.loads(pickle.dumps(Store(store_url))).read("a") == b"1"


@pytest.mark.parametrize("name", ["../escape", "a/../../b", "/etc/passwd", "a\0b"])
def test_names_that_leave_the_dataset_are_refused(tmp_path, name):
    store = Store(tmp_path / "features")
    for use in (store.read, lambda name: store.write(name, b""), lambda name: store.read_range(name, 0, 1), store.size):
        with pytest.raises(ManifestError, match="leaves the dataset"):
            use(name)


def test_data_cannot_be_deleted(tmp_path):
    store = Store(tmp_path)
    store.write("data/1.tar", b"")
    with pytest.raises(AssertionError):
        store.delete("data/1.tar")


def test_read_only_places_are_store_errors():
    if not Path("/sys").is_dir():
        pytest.skip("needs a pseudo file system that refuses new files")
    with pytest.raises(StoreError, match="cannot be written"):
        Store("/sys/dtpipe-probe").probe()


def test_a_file_in_place_of_the_folder_is_a_store_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(tmp_path / "file" / "features").probe()


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only")]
)
def test_a_full_disk_leaves_the_old_object_and_no_litter(tmp_path, monkeypatch, number, advice):
    store = Store(tmp_path)
    store.write("object", b"old")

    def full(_descriptor):
        raise OSError(number, os.strerror(number))  # delayed allocation reports a full disk at the sync

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for publish in (store.write, store.create):
            with pytest.raises(StoreError, match=advice):
                publish("object" if publish == store.write else "new", b"x" * 10)
    assert store.read("object") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["object"]


def test_a_file_size_limit_is_a_store_error(tmp_path):
    code = (
        "import resource, signal, sys; from dtpipe.manifests.store.store import Store\n"
        "from dtpipe.manifests.errors import StoreError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: Store(sys.argv[1]).write('big', bytes(5000))\n"
        "except StoreError as err: print(err)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert "big cannot be written: File too large" in shown
    assert list(tmp_path.iterdir()) == []


def test_one_of_many_creators_wins(tmp_path):
    store, won = Store(tmp_path), []
    barrier = threading.Barrier(8)

    def race(idx):
        barrier.wait()
        if store.create("one", str(idx).encode()):
            won.append(idx)

    threads = [threading.Thread(target=race, args=(idx,)) for idx in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("one") == str(won[0]).encode()


def test_readers_see_the_old_or_the_new_object_whole(tmp_path):
    store, old, new = Store(tmp_path), b"o" * 300_000, b"n" * 200_000
    store.write("object", old)
    stop = threading.Event()

    def rewrite():
        while not stop.is_set():
            store.write("object", new)
            store.write("object", old)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        assert {store.read("object") in (old, new) for _ in range(200)} == {True}
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("step", ["write", "create"])
def test_a_kill_before_publishing_leaves_only_a_temporary_file(tmp_path, step):
    store = Store(tmp_path)
    store.write("there", b"old")
    name = "there" if step == "write" else "new"
    code = (
        "import sys; from dtpipe.manifests.store.faults import arm; from dtpipe.manifests.store.store import Store\n"
        f"arm('store.temporary'); Store(sys.argv[1]).{step}('{name}', b'new bytes')"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (killed.returncode, "store.temporary" in killed.stderr) == (-9, True)
    assert store.list() == ["there"]
    assert store.read("there") == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    assert store.sweep() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_file_systems_without_hard_links_are_refused_with_the_way_out(tmp_path, monkeypatch):
    def no_links(_old, _new):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StoreError, match="hard links"):
        Store(tmp_path).probe()


def test_temporary_names():
    assert is_temporary("commits/.00001.json.0123456789ab.tmp")
    assert is_temporary(".probe-0123456789abcdef")
    assert is_temporary("..probe-0123456789abcdef.0123456789ab.tmp")
    for name in (
        "commits/00001.json",
        "data/.hidden",
        ".bashrc.tmp",
        ".~lock.thesis.odt.tmp",
        ".probe-my-notes",
    ):  # not ours to sweep
        assert not is_temporary(name)


def test_memory_and_s3_agree_with_fsspec(store_url):
    store = Store(store_url)
    store.write("x/y", b"abc")
    fs, path = fsspec.core.url_to_fs(store_url)
    fs.invalidate_cache()
    assert fs.cat_file(f"{path}/x/y") == b"abc"


@pytest.mark.parametrize(
    ("put", "words"),
    [
        (Path.mkdir, "plan.json is a folder, not a file; move it away, then run `dtpipe verify --repair"),
        (lambda path: path.symlink_to("away"), "plan.json is a link to away, which is not there; move it away"),
        (lambda path: path.symlink_to(path.name), "plan.json is a link that leads back to itself; move it away"),
        (lambda path: None, "plan.json is missing; run `dtpipe verify --repair"),
    ],
)
def test_what_lies_in_an_objects_place_is_named_and_hides_no_other(put, words: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("data/0", b"x")
    put(tmp_path / "plan.json")
    put(tmp_path / "data" / "1")
    for read in (store.read, store.stat, lambda name: store.read_range(name, 0, 1)):
        with pytest.raises(MissingObjectError, match=re.escape(words)):
            read("plan.json")
    assert not store.exists("plan.json")
    assert list(store.stats("data")) == ["data/0"]


def test_a_folder_where_a_file_belongs_is_said_when_writing(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(StoreError, match=r"cannot be written: .*a folder lies where this file belongs: move it away"):
        Store(tmp_path).write("manifest.json", b"x")
