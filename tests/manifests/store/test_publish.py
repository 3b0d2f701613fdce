"""Local files are whole or not there: after errors, kills, and for those who look while they are written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtpipe.manifests.store.publish import create_whole, rename, whole_file, write_whole


def in_a_block(path: Path, content: bytes) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


WRITERS = [write_whole, in_a_block]


@pytest.mark.parametrize("write", WRITERS)
def test_content_is_on_disk_before_it_takes_the_name_and_the_name_after(tmp_path, monkeypatch, write):
    path, synced = tmp_path / "new" / "folder" / "last.pt", []
    write(path, b"old")

    def look(descriptor: int) -> None:
        opened = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((opened.name, opened.read_bytes() if opened.is_file() else b"", path.read_bytes()))

    monkeypatch.setattr(os, "fsync", look)
    write(path, b"new")
    assert synced == [(".last.pt.tmp", b"new", b"old"), ("folder", b"", b"new")]
    assert os.listdir(path.parent) == ["last.pt"]  # noqa: PTH208


@pytest.mark.parametrize("write", [*WRITERS, create_whole])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, write):
    path = tmp_path / ("new" if write is create_whole else "file")
    write_whole(tmp_path / "file", "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(path, b"new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path):
    write_whole(tmp_path / "file", "old")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


@pytest.mark.parametrize("write", WRITERS)
def test_what_a_killed_process_left_is_replaced_and_never_written_through(tmp_path, write):
    path = tmp_path / "last.pt"
    write(path, b"old")
    (tmp_path / "kept.pt").hardlink_to(path)
    (tmp_path / ".last.pt.tmp").hardlink_to(path)
    write(path, b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"kept.pt": b"old", "last.pt": b"new"}


def test_a_kill_leaves_one_temporary_file_however_often(tmp_path):
    code = (
        "import sys; from pathlib import Path; from dtpipe.manifests.store import faults, publish\n"
        "faults.arm('store.temporary'); publish.write_whole(Path(sys.argv[1]), sys.argv[2])"
    )
    write_whole(tmp_path / "file", "old")
    for content in ("new", "newer"):
        killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file"), content], check=False)
        assert killed.returncode == -9
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old", ".file.tmp": "newer"}


def test_the_status_is_of_what_was_written_and_created_files_follow_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        written = write_whole(tmp_path / "file", b"12345")
        assert create_whole(tmp_path / "made", b"")
        assert not create_whole(tmp_path / "made", b"later")
    finally:
        os.umask(before)
    found = (tmp_path / "file").stat()
    assert (written.st_ino, written.st_mtime_ns, written.st_size) == (found.st_ino, found.st_mtime_ns, 5)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "made")} == {0o644}
    assert (tmp_path / "made").read_bytes() == b""


def test_a_folder_never_takes_the_name_of_another_with_content(tmp_path):
    for name in ("first", "second"):
        write_whole(tmp_path / name / "file", name)
    with pytest.raises(OSError, match="not empty"):
        rename(tmp_path / "second", tmp_path / "first")
    rename(tmp_path / "second", tmp_path / "third")
    assert (tmp_path / "third" / "file").read_text() == "second"
