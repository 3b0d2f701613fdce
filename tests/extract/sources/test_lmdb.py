"""LMDB databases as LSUN publishes them: read-only, from threads, forks and several sources of one process."""

from __future__ import annotations

import multiprocessing
import sys
import unicodedata
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import BadImage, InputError, MissingPackageError
from parts.packing import contents, labels, write_lmdb

pytest.importorskip("lmdb", reason="needs the extra `lmdb`")

FILES = {f"{idx:040x}": bytes([idx]) * 5000 for idx in range(20)}  # LSUN's keys are 40 hexadecimal digits


def test_keys_are_the_databases_keys(tmp_path: Path) -> None:
    source = open_source(str(write_lmdb(tmp_path / "cat_lmdb", FILES)))
    assert source.kind == "lmdb"
    assert list(contents(source).items()) == list(FILES.items())
    assert set(labels(source).values()) == {None}
    assert source.ignored() == {}
    assert [path.name for path in (tmp_path / "cat_lmdb").iterdir()] == ["data.mdb"]  # no lock file is made


@pytest.mark.parametrize("name", ["cat.lmdb", "cat_lmdb/data.mdb"])
def test_database_in_one_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "cat_lmdb").mkdir()
    write_lmdb(tmp_path / name, FILES, subdir=False)
    assert contents(open_source(str(tmp_path / name))) == FILES


def test_counts_that_tools_write_are_no_samples(tmp_path: Path) -> None:
    source = open_source(str(write_lmdb(tmp_path / "a", FILES | {"length": b"20", "__keys__": b""})))
    assert contents(source) == FILES
    assert source.ignored() == {"metadata": 2}


def test_any_bytes_may_be_a_key(tmp_path: Path) -> None:
    files = {unicodedata.normalize("NFD", "ö").encode(): b"o", b"caf\xe9#1,2%": b"e", b"256-00001": b"1"}
    source = open_source(str(write_lmdb(tmp_path / "a", files)))
    assert contents(source) == {"256-00001": b"1", "caf\\xe9#1,2%": b"e", "ö": b"o"}
    assert all(item.uri.isascii() for item in source.list())


def test_threads_and_sources_share_one_database(tmp_path: Path) -> None:
    """LMDB itself refuses to open a database twice in a process."""
    path = str(write_lmdb(tmp_path / "a", FILES))
    sources = [open_source(path) for _ in range(3)]
    items = list(sources[0].list()) * 20
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda pair: sources[pair[0] % 3].read(pair[1].uri), enumerate(items))
        assert [FILES[item.key] for item in items] == list(found)


def _read_all(path: str, uris: list[str]) -> list[bytes]:
    source = open_source(path, "lmdb")
    return [source.read(uri) for uri in uris]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of a process with threads; nothing here holds a lock
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_by_uri(tmp_path: Path, method: str) -> None:
    path = str(write_lmdb(tmp_path / "a", FILES))
    uris = [item.uri for item in open_source(path).list()]
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        assert list(pool.map(_read_all, [path] * 2, [uris] * 2)) == [list(FILES.values())] * 2


def test_read_only_database(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "a", FILES)
    (path / "data.mdb").chmod(0o444)
    path.chmod(0o555)
    try:
        assert contents(open_source(str(path))) == FILES
    finally:
        path.chmod(0o755)


def test_key_that_is_gone_is_a_bad_sample(tmp_path: Path) -> None:
    source = open_source(str(write_lmdb(tmp_path / "a", FILES)))
    with pytest.raises(BadImage, match="its key is gone"):
        source.read(f"{tmp_path}/a#nothing")


def test_what_is_no_database_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no LMDB database; give the folder that data\.mdb lies in"):
        open_source(str(tmp_path), "lmdb")
    (tmp_path / "data.mdb").write_bytes(b"something else" * 1000)
    with pytest.raises(InputError, match=r"no LMDB database that can be read \(MDB_INVALID.*fetch or write it again"):
        open_source(str(tmp_path))
    with pytest.raises(InputError, match="has no image in it"):
        open_source(str(write_lmdb(tmp_path / "empty", {}))).list()
    with pytest.raises(InputError, match="from a local disk only"):
        open_source("memory://somewhere", "lmdb")


def test_database_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    """Its pages are mapped: touching one behind the end of the file would end the process."""
    whole = write_lmdb(tmp_path / "whole", FILES).joinpath("data.mdb").read_bytes()
    for idx, size in enumerate((0, 100, 8192, 50_000, len(whole) - 1)):
        path = tmp_path / str(idx)
        path.mkdir()
        path.joinpath("data.mdb").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut off|cannot be read|can be read"):
            open_source(str(path))


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lmdb(tmp_path / "a", FILES)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'dtpipe\[lmdb\]'"):
        open_source(str(path))
