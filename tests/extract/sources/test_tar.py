"""Tars are listed without being unpacked, in their order; whatever is damaged is refused with the byte where."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import BadImage, InputError
from dtpipe.manifests.write.listing import build_listing
from parts.images import write_files
from parts.packing import contents, labels, no_fault_of_the_image, write_tar

FILES = {"b/2.png": b"two", "a/1.jpg": b"one" * 1000, "ä.webp": b"", "a/10.png": b"ten"}


def keyed(tar: str, files: dict[str, bytes] = FILES) -> dict[str, bytes]:
    return {f"{tar}/{name}": data for name, data in files.items()}


def test_one_tar_keeps_its_order(tmp_path: Path) -> None:
    source = open_source(str(write_tar(tmp_path / "train.tar", FILES | {"note.txt": b"", ".x.png": b""})))
    assert source.kind == "webdataset"
    assert list(contents(source).items()) == list(keyed("train.tar").items())
    assert source.ignored() == {".txt": 1, "hidden": 1}
    assert build_listing(source.list(), order="container").keys == tuple(keyed("train.tar"))


def test_folder_of_tars_in_any_depth(tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", {"1.png": b"b1"})
    write_tar(tmp_path / "a" / "a.tar", {"1.png": b"a1"})
    write_tar(tmp_path / ".partial" / "c.tar", {"1.png": b"c1"})
    (tmp_path / "index.json").write_text("{}")
    source = open_source(str(tmp_path))
    assert contents(source) == {"a/a.tar/1.png": b"a1", "b.tar/1.png": b"b1"}
    assert source.ignored() == {".json": 1, "hidden": 1}


def test_patterns_name_tars_below_what_is_fixed_in_them(tmp_path: Path) -> None:
    for idx in (9, 10, 11):
        write_tar(tmp_path / f"train-{idx:04d}.tar", {"1.png": str(idx).encode()})
    write_tar(tmp_path / "val-0000.tar", {"1.png": b"held out"})
    expected = {"train-0009.tar/1.png": b"9", "train-0010.tar/1.png": b"10"}
    assert contents(open_source(f"{tmp_path}/train-{{0009..0010}}.tar")) == expected
    assert contents(open_source(f"{tmp_path}/train-*.tar")) == expected | {"train-0011.tar/1.png": b"11"}
    assert contents(open_source(f"{tmp_path}/{{train-0011,val-0000}}.tar")) == {
        "train-0011.tar/1.png": b"11",
        "val-0000.tar/1.png": b"held out",
    }


def test_missing_tars_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", FILES)
    with pytest.raises(InputError, match=r"train-1\.tar: cannot be read \(No such file"):
        open_source(f"{tmp_path}/train-{{0..2}}.tar").list()
    with pytest.raises(InputError, match=r"val-\*\.tar: no \.tar file"):
        open_source(f"{tmp_path}/val-*.tar").list()
    with pytest.raises(InputError, match=r"nowhere\.tar: no such file"):
        open_source(str(tmp_path / "nowhere.tar")).list()
    with pytest.raises(InputError, match="braces are not in pairs"):
        open_source(f"{tmp_path}/train-{{0..2.tar").list()


def test_brackets_in_the_name_of_a_file_are_no_pattern(tmp_path: Path) -> None:
    assert contents(open_source(str(write_tar(tmp_path / "photos [1].tar", FILES)))) == keyed("photos [1].tar")


def test_labels_of_webdataset(tmp_path: Path) -> None:
    files = {
        "0.jpg": b"",
        "0.cls": b"7\n",
        "0.json": json.dumps({"label": 8}).encode(),
        "d/1.json": json.dumps({"label": "cat", "caption": "x"}).encode(),  # before its image
        "d/1.crop.jpg": b"",
        "2.jpg": b"",
        "2.json": b"{not json",
        "3.jpg": b"",
        "3.json": json.dumps({"label": [1, 2]}).encode(),
        "4.jpg": b"",
    }
    source = open_source(str(write_tar(tmp_path / "a.tar", files)))
    assert list(labels(source).values()) == ["7", "cat", None, None, None]
    assert source.ignored() == {".json that is damaged": 1, "labels in .json that are list": 1}


@pytest.mark.parametrize(
    ("values", "expected", "lost"),
    [
        ([1.0, 2.0, None], ["1", "2", None], {".json": 1}),
        ([True, False], ["True", "False"], {}),
        ([0.5, 2.0, "cat"], [None, None, "cat"], {"labels in .json that are no whole numbers": 2}),
        ([{"id": 1}, "", float("nan")], [None, None, None], {"labels in .json that are dict": 1, ".json": 1}),
        ([7, 1e20], ["7", str(10**20)], {}),
    ],
)
def test_json_labels_are_used_or_counted(
    values: list[object], expected: list[str | None], lost: dict[str, int], tmp_path: Path
) -> None:
    files: dict[str, bytes] = {}
    for idx, value in enumerate(values):
        files |= {f"{idx}.jpg": b"", f"{idx}.json": json.dumps({"label": value}).encode()}
    source = open_source(str(write_tar(tmp_path / "a.tar", files)))
    assert list(labels(source).values()) == expected
    assert source.ignored() == lost


def test_files_too_long_for_a_label_are_counted(tmp_path: Path) -> None:
    files = {"0.jpg": b"", "0.cls": b"7", "1.jpg": b"", "1.cls": b"7" * (2**20 + 1)}
    source = open_source(str(write_tar(tmp_path / "a.tar", files)))
    assert list(labels(source).values()) == ["7", None]
    assert source.ignored() == {".cls over 1048576 bytes, not read for a label": 1}


def test_shards_of_webdatasets_own_writer(tmp_path: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for idx in range(5):
            writer.write({"__key__": f"{idx:04d}", "png": bytes([idx]), "cls": idx * 10, "json": {"caption": "x"}})
    source = open_source(str(tmp_path / "a.tar"))
    assert contents(source) == {f"a.tar/{idx:04d}.png": bytes([idx]) for idx in range(5)}
    assert list(labels(source).values()) == ["0", "10", "20", "30", "40"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_form(tmp_path: Path, form: int) -> None:
    name = "/".join(["folder" * 5] * (2 if form == tarfile.USTAR_FORMAT else 12)) + "/ä.png"
    assert contents(open_source(str(write_tar(tmp_path / "a.tar", {name: b"x"}, format=form)))) == {
        f"a.tar/{name}": b"x"
    }


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar on this machine")
def test_tar_of_a_folder_with_links(tmp_path: Path) -> None:
    root = write_files(tmp_path / "folder", {"cat/1.png": b"one"})
    (root / "cat" / "2.png").hardlink_to(root / "cat" / "1.png")
    (root / "cat" / "3.png").symlink_to("1.png")
    subprocess.run(["tar", "--sort=name", "-cf", "../a.tar", "."], cwd=root, check=True)
    source = open_source(str(tmp_path / "a.tar"))
    assert contents(source) == {"a.tar/cat/1.png": b"one", "a.tar/cat/2.png": b"one"}
    assert source.ignored() == {"special": 1}


def test_threads_read_at_once(tmp_path: Path) -> None:
    files = {f"{idx}.png": bytes([idx]) * (1000 + idx) for idx in range(100)}
    source = open_source(str(write_tar(tmp_path / "a.tar", files)))
    items = list(source.list()) * 3
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(source.read, [item.uri for item in items])
        assert [keyed("a.tar", files)[item.key] for item in items] == list(found)


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{00..02}.tar"])
def test_object_store_gives_the_same(upload: Callable[..., str], pattern: str, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", FILES).read_bytes()
    url = upload({f"{idx:02d}.tar": tar for idx in range(3)}) + pattern
    source = open_source(url)
    assert source.kind == "webdataset"
    assert contents(source) == keyed("00.tar") | keyed("01.tar") | keyed("02.tar")
    assert open_source(url, "webdataset").read(source.list()[1].uri) == b"one" * 1000


def test_tar_that_is_gone_or_shorter_is_no_fault_of_the_image(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", FILES)
    source = open_source(str(path))
    last = source.list()[-1].uri
    path.write_bytes(path.read_bytes()[:2000])
    with no_fault_of_the_image(r"a\.tar ends before byte \d+, so it changed since it was listed"):
        source.read(last)
    path.unlink()
    with no_fault_of_the_image(r"No such file.*run again"):
        source.read(last)


def test_oversized_member_is_not_read(tmp_path: Path) -> None:
    source = open_source(str(write_tar(tmp_path / "a.tar", FILES)))
    with pytest.raises(BadImage, match="2147483649 bytes is over the limit"):
        source.read(f"{tmp_path}/a.tar#0,{2**31 + 1}")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_compressed_tars_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(write_tar(tmp_path / "plain", FILES).read_bytes()))
    with pytest.raises(InputError, match=r"compressed by gzip.*decompress it to a plain \.tar"):
        open_source(str(tmp_path / name)).list()


def member_ends(path: Path) -> list[int]:
    """Where each member's padded data ends."""
    with tarfile.open(path) as archive:
        return [member.offset_data + -(-member.size // 512) * 512 for member in archive]


def test_tar_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", FILES)
    whole = path.read_bytes()
    for end in range(0, member_ends(path)[-1] + 1, 256):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"a\.tar: damaged or cut off at byte \d+ "):
            open_source(str(path)).list()


def test_missing_end_mark_says_how_to_add_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", FILES)
    end = member_ends(path)[-1]
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(InputError, match=f"byte {end} .the end mark is missing; .*`(head .*)`"):
        open_source(str(path)).list()
    subprocess.run(f"head -c 1024 /dev/zero >> {path}", shell=True, check=True)
    assert contents(open_source(str(path))) == keyed("a.tar")


def test_damaged_header_is_refused_with_its_place(tmp_path: Path) -> None:
    """Python's tarfile takes it for the end: the members behind it would be missing without a word."""
    path = write_tar(tmp_path / "a.tar", FILES)
    second = member_ends(path)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: second + 3] + b"\xff" + whole[second + 4 :])
    with tarfile.open(path) as archive:
        assert len(archive.getmembers()) == 1
    with pytest.raises(InputError, match=f"damaged or cut off at byte {second} .*fetch or write this tar again"):
        open_source(str(path)).list()


def test_tars_joined_by_cat_are_refused(tmp_path: Path) -> None:
    one, other = (write_tar(tmp_path / name, {f"{name}.png": b"x"}).read_bytes() for name in ("1", "2"))
    (tmp_path / "a.tar").write_bytes(one + other)
    with pytest.raises(InputError, match="more follows behind the end mark"):
        open_source(str(tmp_path / "a.tar")).list()


def test_what_is_no_tar_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(InputError, match="damaged or cut off at byte 0"):
        open_source(str(tmp_path / "a.tar")).list()
    with pytest.raises(InputError, match=r"no image in it \(1 \.txt\)"):
        open_source(str(write_tar(tmp_path / "b.tar", {"1.txt": b""}))).list()
    (tmp_path / "c.tar").write_bytes(b"")
    with pytest.raises(InputError, match="damaged or cut off at byte 0"):
        open_source(str(tmp_path / "c.tar")).list()


def test_same_member_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for data in (b"one", b"other"):
            member = tarfile.TarInfo("1.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(InputError, match=r"two samples have the key 'a\.tar/1\.png'"):
        build_listing(open_source(str(path)).list())


def test_names_that_are_no_unicode_have_keys(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"caf\udce9.png": b"x"}, errors="surrogateescape", format=tarfile.GNU_FORMAT)
    assert contents(open_source(str(path))) == {"a.tar/caf\\xe9.png": b"x"}
