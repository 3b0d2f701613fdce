"""Entries are those of the json module, whatever the window they are read through, and little else is in memory."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dtpipe.extract.sources.layouts import json_stream
from dtpipe.extract.sources.layouts.json_stream import read_entries
from parts.peak import peaks

WINDOWS_BYTES = 8 << 20  # of text and of what the allocator keeps, whatever the file's size
DOCUMENT = {
    "info": {"a": [1, {"b": "]}"}], "c": None},
    "images": [{"id": 12345, "name": 'quo"te\\'}, "häß 図 \U0001f600", -1.25e-3, [], {}, True],
    "none": [],
    "annotations": [[[1.5, 22], {}], 7],
    "licenses": [{"id": 1}],
    "number": 17,
}


def read(data: bytes) -> tuple[dict[str, bool], list[tuple[str, Any]]]:
    taken: list[tuple[str, Any]] = []
    return read_entries(data, ("images", "annotations", "none"), lambda *entry: taken.append(entry)), taken


@pytest.mark.parametrize("window", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize(
    ("encoding", "options"),
    [("utf-8", {}), ("utf-8", {"ensure_ascii": False, "indent": 1}), ("utf-8-sig", {}), ("utf-16", {})],
)
def test_entries_are_those_of_the_json_module(window, encoding, options, monkeypatch) -> None:
    monkeypatch.setattr(json_stream, "_WINDOW_BYTES", window)
    names, taken = read(json.dumps(DOCUMENT, **options).encode(encoding))
    assert list(names) == list(DOCUMENT)
    assert [name for name, is_list in names.items() if is_list] == ["images", "none", "annotations"]
    assert taken == [(name, entry) for name in ("images", "annotations") for entry in DOCUMENT[name]]


@pytest.mark.parametrize("window", [1, 1 << 20])
def test_what_the_json_module_refuses_is_refused_and_nothing_else(window, monkeypatch) -> None:
    monkeypatch.setattr(json_stream, "_WINDOW_BYTES", window)
    rng, text = random.Random(0), json.dumps({"images": [{"id": 1}, 2], "x": "y"})
    num_refused = 0
    for _ in range(200):
        place = rng.randrange(len(text))
        changed = (
            text[:place] + rng.choice(["", "}", "]", ",", '"', ":", " ", "7", "{"]) + text[place + rng.randint(0, 1) :]
        )
        try:
            expected = json.loads(changed)
        except ValueError:
            num_refused += 1
            with pytest.raises((ValueError, TypeError)):
                read(changed.encode())
            continue
        if isinstance(expected, dict):
            assert [entry for _, entry in read(changed.encode())[1]] == list(expected.get("images", []))
    assert 50 < num_refused < 200


@pytest.mark.parametrize(
    "data", [b"", b" ", b"{", b'{"images": [1', b'{"images": [1]} x', b'{"images": [], "images": [2]}x']
)
def test_what_is_cut_short_or_goes_on_is_no_json(data: bytes) -> None:
    with pytest.raises(ValueError):
        read(data)
    with pytest.raises(TypeError):
        read(b"[1]")


def test_a_file_in_cocos_format_takes_little_more_than_itself(tmp_path: Path) -> None:
    """As one document it takes over six times its size; the file's bytes are in memory before."""
    rng = random.Random(0)
    images = [{"id": idx, "file_name": f"{idx:012d}.jpg", "height": 480, "width": 640} for idx in range(500)]
    annotations = [
        {
            "id": idx,
            "image_id": rng.randrange(500),
            "category_id": 1,
            "bbox": [1, 2, 3, 4],
            "area": 5.5,
            "iscrowd": 0,
            "segmentation": [[round(rng.uniform(0, 479), 2) for _ in range(60)]],
        }
        for idx in range(8_000)
    ]
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(document))
    setup = f"from dtpipe.extract.sources.layouts.coco_json import parse_coco; data = open({str(path)!r}, 'rb').read()"
    peak = peaks(setup, {"parse": "len(parse_coco(data, 'x').images)"})["parse"]
    assert peak.answer == "500" and peak.size_bytes < 2 * path.stat().st_size + WINDOWS_BYTES, peak
