"""Published teachers by name: fetched once from a real server, recorded, and never without saying so."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from blake3 import blake3

from dtpipe.extract.config import ExtractConfig, TeacherConfig
from dtpipe.extract.run import run_extraction
from dtpipe.extract.teachers.files.published import PublishedTeacher, fetch, locate
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import DamagedDataError, TeacherError
from dtpipe.manifests.records.document import read_document
from dtpipe.manifests.store.patience import Patience
from parts.damage import flip
from parts.faulty_server import Fault, cut_answer, faulty_server, reset_midway, status

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a folder with one checkpoint."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "model.pt").write_bytes(WEIGHTS)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DTPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache" / "teachers"


def entry(url: str) -> PublishedTeacher:
    return PublishedTeacher(
        name="tiny",
        kind="adm",
        url=url,
        licence="MIT",
        image_px=(32, 32),
        levels={"l2": 8},
        options={"learn_sigma": True, "heads": 4},
    )


def test_a_name_becomes_a_file_with_its_family_and_options(server: str, cache: Path) -> None:
    found = locate(TeacherConfig(path="tiny", options={"heads": 2}), [entry(f"{server}/model.pt")])
    assert (found.kind, found.options) == ("adm", {"learn_sigma": True, "heads": 2})
    assert Path(found.path) == cache / "tiny" / "model.pt"
    assert Path(found.path).read_bytes() == WEIGHTS


def test_a_name_or_path_that_there_is_not_is_told_from_a_file_that_nobody_reads(tmp_path: Path) -> None:
    with pytest.raises(
        TeacherError,
        match=r"adm-imagnet: no such file or folder, and no published teacher of this name; .*adm-imagenet",
    ):
        load_teacher(TeacherConfig(path="adm-imagnet"))
    with pytest.raises(TeacherError, match=r"nothing/here: no such file or folder, .* `dtpipe list teachers` shows$"):
        load_teacher(TeacherConfig(path="./nothing/here"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(TeacherError, match=r"notes.txt: no teacher family recognises this path"):
        load_teacher(TeacherConfig(path=str(tmp_path / "notes.txt")))


def test_fetched_once_and_recorded(server: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch(entry(f"{server}/model.pt"))
    assert read_document(cache / "tiny" / "model.pt.json", "") == {
        "url": f"{server}/model.pt",
        "licence": "MIT",
        "size_bytes": len(WEIGHTS),
        "blake3": blake3(WEIGHTS).hexdigest(),
    }
    (tmp_path / "www" / "model.pt").unlink()  # a second fetch would fail
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(entry(f"{server}/model.pt")) == path


def test_offline_says_where_to_get_and_where_to_put_it(
    server: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TeacherError, match="HF_HUB_OFFLINE is set") as caught:
        fetch(entry(f"{server}/model.pt"))
    assert f"{server}/model.pt" in str(caught.value)
    assert str(cache / "tiny" / "model.pt") in str(caught.value)


def test_a_failed_download_leaves_nothing(server: str, cache: Path) -> None:
    with pytest.raises(TeacherError, match=r"cannot be fetched .*404"):
        fetch(entry(f"{server}/other.pt"))
    assert list((cache / "tiny").iterdir()) == []


def test_a_server_that_fails_is_asked_again(
    server: str, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with faulty_server(tmp_path / "www") as faulty:
        faulty.faults += [Fault(status(503), times=1), Fault(reset_midway, times=1), Fault(cut_answer, times=1)]
        assert fetch(entry(f"{faulty.url}/model.pt")).read_bytes() == WEIGHTS
        assert len(faulty.seen) == 4
    assert "503: Service Unavailable; fails since" in caplog.text
    assert len(list((cache / "tiny").iterdir())) == 2  # and its record


def test_a_cut_connection_is_no_whole_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtpipe.extract.teachers.files.published.STORE_PATIENCE", Patience(total_s=0, first_s=0))
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_answer_half, args=(server,), daemon=True).start()
        with pytest.raises(TeacherError, match="ended after 10 of 100 bytes"):
            fetch(entry(f"http://127.0.0.1:{server.getsockname()[1]}/model.pt"))
    assert list((cache / "tiny").iterdir()) == []


def _answer_half(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + bytes(10))


def test_a_file_of_another_size_than_was_fetched_is_refused(server: str) -> None:
    path = fetch(entry(f"{server}/model.pt"))
    path.write_bytes(WEIGHTS[:-1])
    with pytest.raises(TeacherError, match=f"{len(WEIGHTS) - 1} bytes, {len(WEIGHTS)} were fetched"):
        fetch(entry(f"{server}/model.pt"))


def test_a_cached_file_that_was_changed_since_is_refused(server: str, cache: Path) -> None:
    """Of equal size; also one that an older version fetched, whose record has no seal."""
    path = fetch(entry(f"{server}/model.pt"))
    flip(path)
    with pytest.raises(DamagedDataError, match=r"model\.pt: is not the file that was fetched.*delete the folder"):
        fetch(entry(f"{server}/model.pt"))
    record = cache / "tiny" / "model.pt.json"
    flip(record)
    with pytest.raises(DamagedDataError, match=r"model\.pt\.json: "):
        fetch(entry(f"{server}/model.pt"))
    old = {"url": server, "licence": "MIT", "size_bytes": len(WEIGHTS), "blake3": blake3(WEIGHTS).hexdigest()}
    record.write_text(json.dumps(old, indent=1) + "\n")
    with pytest.raises(DamagedDataError, match="is not the file that was fetched"):
        fetch(entry(f"{server}/model.pt"))
    flip(path)
    assert fetch(entry(f"{server}/model.pt")) == path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<!DOCTYPE html><title>Sign in</title>", "web page .'Sign in'"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
)
def test_a_page_or_pointer_in_place_of_the_file_is_not_kept(
    content: str, said: str, server: str, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "www" / "model.pt").write_text(content)
    with pytest.raises(TeacherError, match=f"what came is a .*{said}"):
        fetch(entry(f"{server}/model.pt"))
    assert not list(cache.rglob("*.pt"))
    (tmp_path / "www" / "model.pt").write_bytes(WEIGHTS)
    assert fetch(entry(f"{server}/model.pt")).read_bytes() == WEIGHTS


def test_a_page_without_a_direct_link_asks_for_the_path() -> None:
    with pytest.raises(
        TeacherError, match=r"put it at .*view, or give .*kind=adm -s .*\{learn_sigma: True, heads: 4\}"
    ):
        fetch(entry("https://drive.example.org/file/d/1abc/view"))


def test_hub_entries_become_id_and_commit_and_paths_stay(tmp_path: Path) -> None:
    commit = "0" * 40
    found = locate(TeacherConfig(path="tiny"), [entry(f"hf://owner/model@{commit}")])
    assert (found.path, found.revision) == ("owner/model", commit)
    (tmp_path / "tiny").mkdir()
    config = TeacherConfig(path=str(tmp_path / "tiny"))
    assert locate(config, [entry("https://example.org/model.pt")]) is config
    assert locate(TeacherConfig(path="tiny", kind="biggan"), [entry("https://example.org/model.pt")]).path == "tiny"


@pytest.mark.parametrize("as_file", [True, False])
def test_a_teacher_behind_a_url_is_copied_once_and_again_when_it_changes(as_file: bool, cache: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/teacher/unet/config.json": b"{}", "/bucket/teacher/unet/model.safetensors": WEIGHTS})
    url = "memory://bucket/teacher/unet/model.safetensors" if as_file else "memory://bucket/teacher"
    found = Path(locate(TeacherConfig(path=url), []).path)
    file = found if as_file else found / "unet" / "model.safetensors"
    assert file.read_bytes() == WEIGHTS
    assert found.is_relative_to(cache)
    assert (found.name == "model.safetensors") == as_file
    assert Path(locate(TeacherConfig(path=url), []).path) == found
    memory.pipe("/bucket/teacher/unet/model.safetensors", WEIGHTS[:-5])
    again = Path(locate(TeacherConfig(path=url), []).path)
    assert (again if as_file else again / "unet" / "model.safetensors").read_bytes() == WEIGHTS[:-5]
    assert not list((cache / "remote").glob(".*"))
    flip(again if as_file else again / "unet" / "model.safetensors")
    with pytest.raises(DamagedDataError, match=rf"model\.safetensors: is not the file .*to copy it from {url} again"):
        locate(TeacherConfig(path=url), [])
    memory.rm("/bucket", recursive=True)


def test_a_url_without_a_teacher_is_said() -> None:
    with pytest.raises(TeacherError, match=r"nothing lies there|cannot be read"):
        locate(TeacherConfig(path="memory://nowhere/teacher"), [])


def test_a_teacher_behind_a_url_extracts(ddpm: Path, make_config: Callable[..., ExtractConfig]) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(ddpm), "/bucket/tiny", recursive=True)
    there = run_extraction(make_config(teacher={"path": "memory://bucket/tiny"}))
    here = run_extraction(make_config(teacher={"path": str(ddpm)}, out=there.url + "2"))
    assert there.digest == here.digest
    memory.rm("/bucket", recursive=True)
