"""Folders become sorted samples with stable keys, whatever lies in them."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.registry import SOURCES, open_source
from dtpipe.manifests.errors import BadImage, ConfigError, InputError, MissingPackageError
from dtpipe.manifests.store.patience import Patience
from parts.images import write_files
from parts.packing import no_fault_of_the_image


def touch(root: Path, *names: str) -> Path:
    """Files that hold their own names."""
    return write_files(root, {name: name.encode() for name in names})


def keys(root: Path, kind: str = "folder") -> list[str]:
    return [item.key for item in open_source(str(root), kind).list()]


def test_class_folders_give_first_folder_as_label(tmp_path: Path) -> None:
    root = touch(tmp_path, "dog/1.png", "cat/b/2.jpg", "cat/1.png")
    source = open_source(str(root))
    assert source.kind == "class_folder"
    assert [(item.key, item.label) for item in source.list()] == [
        ("cat/1.png", "cat"),
        ("cat/b/2.jpg", "cat"),
        ("dog/1.png", "dog"),
    ]


def test_image_outside_of_class_folders_makes_a_plain_folder(tmp_path: Path) -> None:
    root = touch(tmp_path, "dog/1.png", "2.png")
    source = open_source(str(root))
    assert source.kind == "folder"
    assert [(item.key, item.label) for item in source.list()] == [("2.png", None), ("dog/1.png", None)]


def test_class_folder_names_the_image_outside(tmp_path: Path) -> None:
    root = touch(tmp_path, "dog/1.png", "2.png")
    with pytest.raises(InputError, match=r"2\.png lies in no class folder"):
        open_source(str(root), "class_folder").list()


def test_folder_on_request_leaves_labels_out(tmp_path: Path) -> None:
    root = touch(tmp_path, "dog/1.png")
    assert open_source(str(root), "folder").list() == [SourceItem("dog/1.png", str(root / "dog/1.png"), None)]


def test_listing_does_not_depend_on_the_order_of_creation(tmp_path: Path) -> None:
    names = ["b.png", "a/2.png", "a/10.png", "B.png", "ä.png", "a.png"]
    first, second = touch(tmp_path / "1", *names), touch(tmp_path / "2", *reversed(names))
    assert keys(first) == keys(second) == sorted(names)


def test_samples_read_back_in_threads(tmp_path: Path) -> None:
    root = touch(tmp_path, *(f"{idx % 3}/{idx}.png" for idx in range(50)))
    source = open_source(str(root))
    with ThreadPoolExecutor(8) as pool:
        for item, data in zip(source.list(), pool.map(source.read, [item.uri for item in source.list()]), strict=True):
            assert data == item.key.encode()


def test_another_process_reads_by_uri_without_listing(tmp_path: Path) -> None:
    root = touch(tmp_path, "a/1.png")
    uri = open_source(str(root)).list()[0].uri
    fresh = open_source(str(root), "class_folder")
    (root / "a" / "2.png").mkdir()  # a listing now would differ
    assert fresh.read(uri) == b"a/1.png"


def test_other_files_are_ignored_and_counted(tmp_path: Path) -> None:
    names = "1.PNG 2.Jpeg notes.txt LIST.tsv Makefile .hidden.png .git/3.png __MACOSX/._1.png a.tar.gz"
    root = touch(tmp_path, *names.split())
    source = open_source(str(root), "folder")
    assert [item.key for item in source.list()] == ["1.PNG", "2.Jpeg"]
    assert source.ignored() == {".txt": 1, ".tsv": 1, "without extension": 1, "hidden": 3, ".gz": 1}


def test_link_loops_end_and_linked_folders_are_read(tmp_path: Path) -> None:
    root = touch(tmp_path / "images", "a/1.png", "b/2.png")
    touch(tmp_path / "elsewhere", "3.png")
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "self.png").symlink_to("self.png")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    source = open_source(str(root), "folder")
    assert [item.key for item in source.list()] == ["a/1.png", "b/2.png", "b/self.png", "c/3.png"]
    assert source.ignored() == {"link loop": 1}


def test_mutual_links_end(tmp_path: Path) -> None:
    root = touch(tmp_path, "a/1.png", "b/2.png")
    (root / "a" / "to_b").symlink_to(root / "b")
    (root / "b" / "to_a").symlink_to(root / "a")
    assert keys(root) == ["a/1.png", "a/to_b/2.png", "b/2.png", "b/to_a/1.png"]


def test_dangling_link_is_a_bad_sample(tmp_path: Path) -> None:
    root = touch(tmp_path, "1.png")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    source = open_source(str(root), "folder")
    gone = next(item for item in source.list() if item.key == "gone.png")
    with pytest.raises(BadImage, match="unreadable: No such file"):
        source.read(gone.uri)


def test_pipes_and_sockets_never_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = touch(tmp_path, "1.png")
    os.mkfifo(root / "pipe.png")
    monkeypatch.chdir(root)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        source = open_source(str(root), "folder")
        assert [item.key for item in source.list()] == ["1.png"]
        assert source.ignored() == {"special": 2}
        with pytest.raises(BadImage, match="not a regular file"):
            source.read(str(root / "pipe.png"))  # became one after the listing


def test_unreadable_file_is_a_bad_sample_with_its_reason(tmp_path: Path) -> None:
    root = touch(tmp_path, "1.png")
    source = open_source(str(root), "folder")
    uri = source.list()[0].uri
    (root / "1.png").unlink()
    (root / "1.png").mkdir()
    with pytest.raises(BadImage, match="not a regular file"):
        source.read(uri)


def test_oversized_file_is_not_read(tmp_path: Path) -> None:
    root = touch(tmp_path, "1.png")
    os.truncate(root / "1.png", 2**31 + 1)  # sparse
    source = open_source(str(root), "folder")
    with pytest.raises(BadImage, match="2147483649 bytes"):
        source.read(source.list()[0].uri)


def test_keys_are_nfc(tmp_path: Path) -> None:
    root = touch(tmp_path, unicodedata.normalize("NFD", "é/ö.png"))
    source = open_source(str(root))
    item = source.list()[0]
    assert (item.key, item.label) == (unicodedata.normalize("NFC", "é/ö.png"), unicodedata.normalize("NFC", "é"))
    assert source.read(item.uri) == unicodedata.normalize("NFD", "é/ö.png").encode()


def test_names_that_are_no_unicode_have_keys_and_read_back(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"caf\xe9 100%.png")).write_bytes(b"bytes")
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    source = open_source(str(tmp_path), "folder")
    item = source.list()[0]
    assert item.key == "caf\\xe9 100%.png"
    item.uri.encode()  # goes into a listing
    assert source.read(item.uri) == b"bytes"


@pytest.mark.parametrize("kind", ["auto", "folder", "class_folder"])
def test_wrong_path_says_so(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such file or folder"):
        open_source(str(tmp_path / "nowhere"), kind)


def test_file_instead_of_folder_says_so(tmp_path: Path) -> None:
    touch(tmp_path, "1.png")
    with pytest.raises(InputError, match=r"1\.png: is a file"):
        open_source(str(tmp_path / "1.png"))


def test_containers_are_asked_before_folders() -> None:
    assert list(SOURCES)[-2:] == ["class_folder", "folder"]
    assert {"zip", "webdataset", "parquet", "lmdb"} <= set(SOURCES)


def test_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is empty"):
        open_source(str(tmp_path))
    touch(tmp_path, "a.txt", "b.txt", "c.csv")
    with pytest.raises(InputError, match=r"2 \.txt, 1 \.csv"):
        open_source(str(tmp_path), "folder").list()


def test_unlistable_folder_is_named(tmp_path: Path) -> None:
    root = touch(tmp_path, "a/1.png", "b/2.png")
    (root / "b").chmod(0)
    try:
        if os.access(root / "b", os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(InputError, match="b: cannot be listed"):
            open_source(str(root))
    finally:
        (root / "b").chmod(0o755)


def test_unknown_kind_and_protocol_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'fodler'.*class_folder"):
        open_source(str(tmp_path), "fodler")
    with pytest.raises(InputError, match="noproto"):
        open_source("noproto://images")


def test_missing_file_system_package_has_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    with pytest.raises(MissingPackageError, match="s3://bucket/images: Install s3fs"):
        open_source("s3://bucket/images")


def test_kinds_describe_themselves() -> None:
    assert {"folder", "class_folder"} <= set(SOURCES)
    assert all(kind.kind == name and kind.reads.endswith(".") for name, kind in SOURCES.items())


@pytest.fixture
def memory_images(upload: Callable[..., str]) -> str:
    return upload({name: name.encode() for name in ("dog/1.png", "cat/2.jpg", "cat/.hidden.png", "cat/readme.md")})


def test_object_store_lists_and_reads_like_a_folder(memory_images: str) -> None:
    source = open_source(memory_images)
    assert source.kind == "class_folder"
    items = source.list()
    assert [(item.key, item.label) for item in items] == [("cat/2.jpg", "cat"), ("dog/1.png", "dog")]
    assert [open_source(memory_images, "folder").read(item.uri) for item in items] == [b"cat/2.jpg", b"dog/1.png"]
    assert source.ignored() == {"hidden": 1, ".md": 1}


def test_object_that_has_gone_is_a_bad_sample_and_a_failing_store_is_not(
    memory_images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(memory_images)
    with pytest.raises(BadImage, match="FileNotFoundError"):
        source.read("memory://source-test/dog/gone.png")

    def fail(*_: object, **__: object) -> bytes:
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fail)
    monkeypatch.setattr("dtpipe.manifests.store.client.STORE_PATIENCE", Patience(total_s=0, first_s=0))
    source = open_source(memory_images)
    with no_fault_of_the_image(r"reset by peer.*run again"):
        source.read(source.list()[0].uri)


def test_image_that_is_gone_is_bad_and_a_lost_mount_is_not(tmp_path: Path) -> None:
    """With the images' folder gone, or empty as a mount point is, every good image would be written off."""
    source = open_source(str(touch(tmp_path / "mount", "a/1.png", "a/2.png")))
    gone, kept = (item.uri for item in source.list())
    Path(gone).unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.read(gone)
    shutil.rmtree(tmp_path / "mount" / "a")
    for wrong in (gone, kept):
        with no_fault_of_the_image(r"mount.*run again"):
            source.read(wrong)
    (tmp_path / "mount").rmdir()
    with no_fault_of_the_image("mount"):
        source.read(kept)


def test_transport_errors_are_no_fault_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(touch(tmp_path, "a/1.png")))

    def unreachable(_: Path) -> bytes:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr(Path, "read_bytes", unreachable)
    with no_fault_of_the_image("not connected"):
        source.read(source.list()[0].uri)


def test_expired_credentials_are_no_fault_of_the_image(memory_images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(memory_images)

    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError("The provided token has expired")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", refuse)
    with no_fault_of_the_image("token has expired"):
        source.read(source.list()[0].uri)


def test_file_url_equals_path(tmp_path: Path) -> None:
    root = touch(tmp_path, "a b/1#2.png")
    by_path, by_url = open_source(str(root)), open_source(f"file://{root}")
    assert by_path.list() == by_url.list()
    assert by_url.read(by_url.list()[0].uri) == b"a b/1#2.png"
