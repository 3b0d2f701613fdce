"""A zip archive gives what its unpacked folder gives, whatever wrote it; damage is named and never read."""

from __future__ import annotations

import random
import shutil
import stat
import struct
import subprocess
import tracemalloc
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import BadImage, InputError
from dtpipe.manifests.write.listing import build_listing
from parts.damage import flipped
from parts.images import write_files
from parts.packing import contents, labels, no_fault_of_the_image, write_zip

FILES = {"cat/1.png": b"one" * 100, "cat/b/2.jpg": b"two", "dog/ä 1#2,3.png": b"three" * 1000}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archive_equals_its_folder(tmp_path: Path, method: int) -> None:
    others = {"readme.md": b"", ".hidden.png": b"", "__MACOSX/cat/._1.png": b"", "Makefile": b""}
    folder = open_source(str(write_files(tmp_path / "folder", FILES | others)))
    archive = open_source(str(write_zip(tmp_path / "photos.ZIP", dict(reversed((FILES | others).items())), method)))
    assert (folder.kind, archive.kind) == ("class_folder", "zip")
    assert contents(archive) == contents(folder) == FILES
    assert [item.key for item in archive.list()] == [item.key for item in folder.list()]
    assert labels(archive) == labels(folder)
    assert archive.ignored() == folder.ignored() == {".md": 1, "hidden": 2, "without extension": 1}


def test_image_outside_of_class_folders_takes_all_labels_away(tmp_path: Path) -> None:
    files = FILES | {"0.png": b"zero"}
    folder = str(write_files(tmp_path / "folder", files))
    for source in (open_source(str(write_zip(tmp_path / "a.zip", files))), open_source(folder)):
        assert set(labels(source).values()) == {None}
        assert source.ignored() == {"labels by class folder, as 0.png lies in none": 3}
    assert open_source(folder, "folder").ignored() == {}  # as it was asked for


def test_one_folder_of_an_archive_is_a_source(tmp_path: Path) -> None:
    files = {f"train/{name}": data for name, data in FILES.items()} | {
        "val/cat/9.png": b"held out",
        "train.png": b"beside",
    }
    path = write_zip(tmp_path / "photos.zip", files)
    source = open_source(f"{path}/train")
    assert contents(source) == FILES
    assert set(labels(source).values()) == {"cat", "dog"}
    with pytest.raises(InputError, match="no image in it"):
        open_source(f"{path}/nothing").list()


def test_folder_that_is_called_zip_is_a_folder(tmp_path: Path) -> None:
    root = write_files(tmp_path / "old.zip", FILES)
    assert open_source(str(root)).kind == "class_folder"
    assert open_source(str(root / "cat")).kind == "folder"
    write_zip(root / "new.zip", FILES)
    assert open_source(str(root / "new.zip")).kind == "zip"


@pytest.mark.skipif(shutil.which("zip") is None, reason="Info-ZIP's zip is not installed")
def test_archive_of_info_zip_equals_its_folder(tmp_path: Path) -> None:
    root = write_files(tmp_path / "folder", FILES | {"empty.png": b""})
    (root / "cat" / "link.png").symlink_to("1.png")
    subprocess.run(["zip", "-qry", "../a.zip", "."], cwd=root, check=True)
    source = open_source(str(tmp_path / "a.zip"))
    assert contents(source) == FILES | {"empty.png": b""}
    assert source.ignored()["special"] == 1


def raw_zip(path: Path, name: bytes, flags: int = 0, extra: bytes = b"", system: int = 3) -> Path:
    """An archive of one stored member with any bytes as its name. Source: APPNOTE.TXT 4.3.7, 4.3.12, 4.3.16."""
    data = b"pixels"
    common = struct.pack("<HHHHIIIHH", flags, 0, 0, 0x21, zlib.crc32(data), len(data), len(data), len(name), len(extra))
    local = b"PK\3\4" + struct.pack("<H", 20) + common + name + extra + data
    central = (
        b"PK\1\2"
        + bytes([20, system, 20, 0])
        + common
        + struct.pack("<HHHII", 0, 0, 0, 0o100644 << 16, 0)
        + name
        + extra
    )
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    path.write_bytes(local + central + end)
    return path


def unicode_extra(name: bytes, text: str) -> bytes:
    content = struct.pack("<BI", 1, zlib.crc32(name)) + text.encode()
    return struct.pack("<HH", 0x5455, 1) + b"\0" + struct.pack("<HH", 0x7075, len(content)) + content


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("a/ü.png", {"name": "a/ü.png".encode(), "flags": 0x800}),
        ("a/ü.png", {"name": "a/ü.png".encode()}),  # macOS
        ("a/ü.png", {"name": "a/ü.png".encode("cp437")}),
        ("a/ü.png", {"name": unicodedata.normalize("NFD", "a/ü.png").encode()}),
        ("a/я.png", {"name": b"a/_.png", "extra": unicode_extra(b"a/_.png", "a/я.png")}),
        ("a/_.png", {"name": b"a/_.png", "extra": unicode_extra(b"another", "a/я.png")}),
        ("a/b.png", {"name": b"a\\b.png", "system": 0}),  # .NET before 4.6
        ("a\\b.png", {"name": b"a\\b.png"}),
        ("a/b.png", {"name": b"/./a//b.png"}),
        ("a/b.png", {"name": b"a/b.png", "extra": b"\0\xd9\x00\x10" + bytes(0x1000)}),  # longer than what is read along
    ],
)
def test_names_are_those_that_unzip_writes(tmp_path: Path, key: str, options: dict[str, object]) -> None:
    source = open_source(str(raw_zip(tmp_path / "a.zip", **options)))  # type: ignore[arg-type]
    assert contents(source) == {key: b"pixels"}


def test_names_that_lead_out_of_the_archive_are_ignored(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"../../out.png": b"", "in.png": b"in"})
    assert contents(open_source(str(path))) == {"in.png": b"in"}


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.png", b"one")
        archive.writestr("1.png", b"other")
    with pytest.raises(InputError, match=r"two samples have the key '1\.png'"):
        build_listing(open_source(str(tmp_path / "a.zip")).list())


def test_threads_read_at_once(tmp_path: Path) -> None:
    files = {f"{idx % 7}/{idx:04d}.png": random.Random(idx).randbytes(20_000) for idx in range(300)}
    source = open_source(str(write_zip(tmp_path / "a.zip", files)))
    items = list(source.list()) * 3
    with ThreadPoolExecutor(16) as pool:
        assert [files[item.key] for item in items] == list(pool.map(source.read, [item.uri for item in items]))


def test_another_process_reads_by_uri_without_listing(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", FILES)
    uris = [item.uri for item in open_source(str(path)).list()]
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"PK\5\6")])  # could not be listed now
    assert [open_source(str(path), "zip").read(uri) for uri in uris] == list(FILES.values())


def test_object_store_gives_the_same(upload: Callable[..., str], tmp_path: Path) -> None:
    url = upload({"a.zip": write_zip(tmp_path / "a.zip", FILES).read_bytes()}) + "/a.zip"
    source = open_source(url)
    assert contents(source) == FILES
    uri = source.list()[0].uri
    upload({"a.zip": b""})
    with pytest.raises(BadImage, match="its header is gone"):
        source.read(uri)
    with no_fault_of_the_image("cannot be read"):
        source.read(uri.replace("a.zip", "c.zip"))


@pytest.mark.parametrize("at", [0, 0.5, 0.99])
def test_archive_that_is_cut_off_is_refused(tmp_path: Path, at: float) -> None:
    path = write_zip(tmp_path / "a.zip", FILES)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * at)])
    with pytest.raises(InputError, match=r"a\.zip: is no whole zip archive .*fetch or pack it again"):
        open_source(str(path)).list()


def test_archive_without_its_middle_is_refused_or_bad(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", FILES, zipfile.ZIP_STORED)
    data = path.read_bytes()
    path.write_bytes(data[:100] + data[400:])
    source = open_source(str(path))
    with pytest.raises(InputError):
        for item in source.list():
            source.read(item.uri)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_flipped_byte_of_a_member_is_noticed(tmp_path: Path, method: int) -> None:
    path = write_zip(tmp_path / "a.zip", {"1.png": b"pixels" * 10}, method)
    item = open_source(str(path)).list()[0]
    whole = path.read_bytes()
    start, end = 30 + len("1.png"), whole.index(b"PK\1\2")
    noticed = 0
    for place in range(start, end):
        path.write_bytes(flipped(whole, place))
        try:
            assert open_source(str(path), "zip").read(item.uri) == b"pixels" * 10
        except BadImage as err:
            assert str(err).startswith("damaged in the archive")
            noticed += 1
    assert noticed >= end - start - (method == zipfile.ZIP_DEFLATED)  # its last byte may have bits that mean nothing


def test_bomb_is_never_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A true directory is enough to refuse; one that lies is believed for its own size plus one byte."""
    path = write_zip(tmp_path / "a.zip", {"1.png": bytes(50_000_000)})
    item = open_source(str(path)).list()[0]
    truth, limit = item.uri, 1_000_000
    monkeypatch.setattr("dtpipe.extract.sources.zip.MAX_FILE_BYTES", limit)
    with pytest.raises(BadImage, match="50000000 bytes is over the limit of 1000000"):
        open_source(str(path)).read(truth)
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 50_000_000), struct.pack("<I", 999_999)))
    source = open_source(str(path))
    liar = source.list()[0].uri
    tracemalloc.start()
    with pytest.raises(BadImage, match="damaged in the archive"):
        source.read(liar)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 1_000_000 < peak_bytes < 4_000_000


def test_encrypted_and_unknown_methods_are_refused_with_the_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a/1\.png is encrypted; .*without a password"):
        open_source(str(raw_zip(tmp_path / "a.zip", b"a/1.png", flags=1))).list()
    with pytest.raises(InputError, match=r"cat/1\.png is packed by method 12"):
        open_source(str(write_zip(tmp_path / "b.zip", FILES, zipfile.ZIP_BZIP2))).list()


def test_links_and_folders_are_no_samples(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.mkdir("folder.png")
        archive.writestr(link, "1.png")
        archive.writestr("1.png", b"one")
    source = open_source(str(tmp_path / "a.zip"))
    assert contents(source) == {"1.png": b"one"}
    assert source.ignored() == {"special": 1}


def test_members_of_four_gigabytes_and_more_are_bad(tmp_path: Path) -> None:
    """Zip64 sizes, in a file that says so: `force_zip64` writes the fields, whatever the size."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, archive.open("1.png", "w", force_zip64=True) as file:
        file.write(b"small after all")
    source = open_source(str(tmp_path / "a.zip"))
    item = source.list()[0]
    assert source.read(item.uri) == b"small after all"
    archive_uri, _, numbers = item.uri.rpartition("#")
    offset, stored, _, crc32, method = numbers.split(",")
    with pytest.raises(BadImage, match="4294967296 bytes is over the limit"):
        source.read(f"{archive_uri}#{offset},{stored},{2**32},{crc32},{method}")


def test_missing_and_empty_archives_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.zip: no such zip file"):
        open_source(str(tmp_path / "nowhere.zip"))
    with pytest.raises(InputError, match="no such file or folder"):
        open_source(str(tmp_path / "nowhere.zip" / "inside"))
    with pytest.raises(InputError, match=r"no image in it \(1 \.txt\)"):
        open_source(str(write_zip(tmp_path / "a.zip", {"a.txt": b""}))).list()
    (tmp_path / "not.zip").write_bytes(b"no zip" * 100)
    with pytest.raises(InputError, match="is no whole zip archive"):
        open_source(str(tmp_path / "not.zip")).list()


def test_prepended_bytes_do_not_matter(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"1.png": b"one"})
    path.write_bytes(b"#!/bin/sh self-extracting\n" + path.read_bytes())
    assert contents(open_source(str(path))) == {"1.png": b"one"}


def test_archive_with_a_name_that_is_no_unicode(tmp_path: Path) -> None:
    import os

    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.zip"))
    try:
        write_zip(path, FILES)
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    source = open_source(str(path))
    assert contents(source) == FILES
    assert all(item.uri.encode() for item in source.list())
