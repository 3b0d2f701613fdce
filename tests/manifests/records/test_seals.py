"""Each kind of file that dtpipe writes for itself carries its digest: any flipped bit in it is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from dtpipe.manifests.errors import DamagedDataError, InputError, StoreError
from dtpipe.manifests.records.document import read_document, write_document
from dtpipe.manifests.records.ending import SealingFile, is_sealed, read_text, seal_text
from dtpipe.manifests.records.files import FILES, check_files, file_digests
from dtpipe.manifests.records.lines import append_line, keep_lines, read_lines
from dtpipe.manifests.records.tensors import DIGEST_KEY, UNSEALED, check_tensors, seal_tensors
from parts.damage import flipped

RECORD = {"lr": 0.1, "name": "größe", "nested": {"levels": ["l2", "l3"], "empty": {}}, "none": None}
REMEDY = "mend it"


@dataclass(frozen=True)
class Kind:
    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    """The content; raises on damage."""
    harmless: Callable[[Any, Any], bool] = lambda _read, _whole: False
    """What may be read of a damaged file: never anything else than was written."""


def _write_ending(path: Path) -> None:
    with path.open("wb") as file:
        sealing = SealingFile(file)
        sealing.write(b"some bytes, ")
        sealing.write(memoryview(b"and more"))
        sealing.seal()


def _read_ending(path: Path) -> bytes:
    assert is_sealed(path, REMEDY) or len(path.read_bytes()) < 50  # without a seal its reader looks further
    return path.read_bytes()


def _write_lines(path: Path) -> None:
    for step in (1, 2, 3):
        append_line(path, {"step": step, "loss": 1 / step, "advice": "größe"})


def _write_tensors(path: Path) -> None:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.int64)}
    save_file(tensors, path, metadata={"format": "pt", DIGEST_KEY: UNSEALED})
    seal_tensors(path)


def _read_tensors(path: Path) -> dict[str, Any]:
    check_tensors(path, REMEDY)
    return {name: tensor.tolist() for name, tensor in load_file(path).items()}


KINDS = {
    "checkpoint": Kind(_write_ending, _read_ending),
    "settings": Kind(
        lambda path: path.write_bytes(seal_text(yaml.safe_dump(RECORD, allow_unicode=True))),
        lambda path: yaml.safe_load(read_text(path, REMEDY)),
    ),
    "document": Kind(lambda path: write_document(path, RECORD, REMEDY), lambda path: read_document(path, REMEDY)),
    "lines": Kind(  # the end of the last line may be gone, and the line with it
        _write_lines,
        lambda path: [line.record for line in read_lines(path)],
        lambda read, whole: read == whole[:-1],
    ),
    "tensors": Kind(_write_tensors, _read_tensors),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def test_every_flipped_bit_of_every_byte_is_found(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "file"
    kind.write(path)
    data, whole = path.read_bytes(), kind.read(path)
    for place in range(len(data)):
        for bit in range(8):
            path.write_bytes(flipped(data, place, 1 << bit))
            try:
                read = kind.read(path)
            except (DamagedDataError, ValueError):  # ValueError: safetensors' own, of a header that is none
                continue
            except Exception as err:
                assert type(err).__name__ == "SafetensorError"
                continue
            assert kind.harmless(read, whole) and place == len(data) - 1, f"bit {bit} of byte {place}"


def test_a_file_that_was_cut_off_or_ends_in_zeros_is_found(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "file"
    kind.write(path)
    data, whole = path.read_bytes(), kind.read(path)
    for size in range(1, len(data), 7):
        for end in (b"", bytes(len(data) - size)):
            path.write_bytes(data[:size] + end)
            try:
                read = kind.read(path)
            except Exception as err:
                assert (
                    isinstance(err, DamagedDataError | ValueError | AssertionError | yaml.YAMLError)
                    or "Safetensor" in type(err).__name__
                )
                continue
            if kind is KINDS["lines"]:
                assert read == whole[: len(read)]
            elif kind is KINDS["settings"]:
                assert read is None  # of which the reader says that it is no config
            else:
                assert kind is KINDS["checkpoint"] and not is_sealed(path, REMEDY)


def test_a_file_without_a_seal_is_read_as_it_is(tmp_path: Path) -> None:
    """As versions before this one wrote them."""
    path = tmp_path / "file"
    path.write_text(json.dumps(RECORD, indent=1) + "\n")
    assert read_document(path, REMEDY) == RECORD
    path.write_text(json.dumps({"blake3": "0" * 64}, indent=1) + "\n")
    assert read_document(path, REMEDY) == {"blake3": "0" * 64}
    path.write_text(yaml.safe_dump(RECORD))
    assert yaml.safe_load(read_text(path, REMEDY)) == RECORD
    path.write_text('{"step": 1}\n{"step": 2, "advice": "read"}\n')
    append_line(path, {"step": 3})
    assert [line.record for line in read_lines(path)] == [{"step": 1}, {"step": 2, "advice": "read"}, {"step": 3}]
    save_file({"a": np.ones(3)}, path, metadata={"format": "pt", "layout": "timm"})
    check_tensors(path, REMEDY)
    path.write_bytes(b"no seal")
    assert not is_sealed(path, REMEDY)


def test_lines_that_are_kept_keep_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    _write_lines(path)
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(before) + b'{"step"' + bytes(70_000))
    assert keep_lines(path, read_lines(path)[:2]) == 70_007
    assert path.read_bytes() == b"".join(before[:2])
    assert keep_lines(tmp_path / "none", []) == 0 and read_lines(tmp_path / "none") == []


@pytest.mark.parametrize("place", ["folder", "device", "huge"])
def test_nothing_is_read_from_what_is_no_file_or_too_large(kind: Kind, tmp_path: Path, place: str) -> None:
    path = tmp_path / "file"
    if place == "folder":
        path.mkdir()
    elif place == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2**40)  # sparse
        if kind in (KINDS["checkpoint"], KINDS["tensors"]):
            pytest.skip("weights may be of any size; they are read in blocks")
    with pytest.raises(
        DamagedDataError, match=r"is a folder, not|is a device or a pipe, not|has 1099511627776 bytes, and at most \d+"
    ):
        kind.read(path)


def test_deep_and_endless_values_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"a": ' * 5000 + "1" + "}" * 5000):
        path.write_text(text + "\n")
        with pytest.raises(DamagedDataError):
            read_document(path, REMEDY)
        with pytest.raises(DamagedDataError, match="line 1"):
            read_lines(path)


def test_a_file_that_may_not_be_written_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        write_document(tmp_path / "file" / "document.json", RECORD, REMEDY)
    with pytest.raises(StoreError, match="cannot be written"):
        append_line(tmp_path / "none" / "lines.jsonl", RECORD)
    with pytest.raises(InputError, match="there is no such file"):
        read_document(tmp_path / "file" / "document.json", REMEDY)


def test_a_record_of_files_names_the_one_that_was_changed(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_bytes(bytes(100))
    (tmp_path / "config.json").write_text("{}")
    assert check_files(tmp_path, "record.json", REMEDY) == {}
    write_document(tmp_path / "record.json", {FILES: file_digests(tmp_path)}, REMEDY)
    assert check_files(tmp_path, "record.json", REMEDY)[FILES].keys() == {"unet/weights", "config.json"}
    (tmp_path / "unet" / "weights").write_bytes(bytes(99) + b"\1")
    with pytest.raises(DamagedDataError, match=r"unet/weights: is not the file that record\.json names; mend it"):
        check_files(tmp_path, "record.json", REMEDY)
    (tmp_path / "unet" / "weights").unlink()
    with pytest.raises(DamagedDataError, match=r"unet/weights: cannot be read"):
        check_files(tmp_path, "record.json", REMEDY)
