"""A folder on a web server is read like the folder itself, by the links on its pages, whatever its files are called."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dtpipe.extract.sources import folder, web
from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import BadImage, InputError
from dtpipe.manifests.store.patience import Patience
from parts.faulty_server import Fault, FaultyServer, faulty_server, status, whole_answers
from parts.images import write_files
from parts.packing import contents, labels, no_fault_of_the_image, write_parquet, write_tar, write_zip

FILES = {
    name: name.encode() * 100
    for name in (
        "cat/a b.jpg",
        "cat/what?.jpg",
        "cat/100%.jpg",
        "cat/%20.jpg",
        "cat/no #1.jpg",
        "cat/ä.png",
        "cat/a&b+c=d;e,f@g.jpg",
        'cat/it\'s "x".jpg',
        "dog & cat/deep/x.png",
    )
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return write_files(tmp_path / "site", FILES | {"cat/empty.png": b"", "cat/notes.txt": b"x", "cat/.x.png": b""})


@pytest.fixture
def server(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """Of the site; a failing one is given up at once, a late one is not."""
    patience = Patience(silence_s=20.0, attempt_s=20.0, total_s=0.5, first_s=0.5)
    monkeypatch.setattr("dtpipe.manifests.store.client.STORE_PATIENCE", patience)
    with faulty_server(site) as faulty:
        yield faulty


@contextmanager
def standard_server(root: Path) -> Iterator[str]:
    """`python -m http.server`, which knows no ranges."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_arguments: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root))) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.mark.parametrize("standard", [True, False])
def test_keys_labels_bytes_and_counts_are_those_of_the_folder(standard: bool, site: Path) -> None:
    local = open_source(str(site))
    with standard_server(site) if standard else faulty_server(site) as server:
        url = server if isinstance(server, str) else server.url
        for root in (url, url + "/"):
            source = open_source(root)
            assert contents(source) == contents(local) == FILES | {"cat/empty.png": b""}
            assert (source.kind, labels(source)) == ("class_folder", labels(local))
            assert source.ignored() == local.ignored() == {".txt": 1, "hidden": 1}
        assert {item.key for item in open_source(f"{url}/dog%20&%20cat").list()} == {"deep/x.png"}


@pytest.mark.parametrize("query", ["", "?signature=a/b.c&expires=1"])
@pytest.mark.parametrize("name", ["a b.zip", "a b.tar", "a b.parquet"])
def test_containers_are_named_decoded_and_without_their_query(
    name: str, query: str, site: Path, server: FaultyServer
) -> None:
    files = {"x 1.png": b"one" * 100, "y/2.png": b"two"}
    write = {"zip": write_zip, "tar": write_tar, "parquet": write_parquet}[name.rpartition(".")[2]]
    local = contents(open_source(str(write(site / name, files))))
    assert len(local) == 2
    assert contents(open_source(f"{server.url}/{name.replace(' ', '%20')}{query}")) == local
    if name.endswith(".zip"):
        assert contents(open_source(f"{server.url}/a%20b.zip/y{query}")) == {"2.png": b"two"}


def test_pattern_of_tars(site: Path, server: FaultyServer) -> None:
    for idx in range(3):
        write_tar(site / f"a-{idx}.tar", {"x.png": b"%d" % idx})
    expected = {f"a-{idx}.tar/x.png": b"%d" % idx for idx in range(3)}
    assert contents(open_source(f"{server.url}/a-{{0..2}}.tar")) == expected


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_server_that_lost_its_ranges_after_listing_is_named(name: str, site: Path, server: FaultyServer) -> None:
    """As behind another proxy; else the start of the archive would pass for the image."""
    write = {"zip": write_zip, "tar": write_tar}[name.rpartition(".")[2]]
    write(site / name, {"x.png": b"one" * 9000, "y.png": b"two"})
    source = open_source(f"{server.url}/{name}")
    uri = source.list()[1].uri
    server.faults[:] = [Fault(whole_answers)]
    with no_fault_of_the_image(rf"{name}: .*HTTP ranges.*download it"):
        source.read(uri)


@pytest.mark.parametrize(
    ("number", "said"), [(401, "401.*credentials"), (403, "403.*credentials"), (404, "no such|404|not"), (500, "500")]
)
def test_what_a_server_answers_is_said(number: int, said: str, site: Path, server: FaultyServer) -> None:
    write_zip(site / "a.zip", {"x.png": b"x"})
    server.faults[:] = [Fault(status(number))]
    for path in ("/", "/a.zip"):
        with no_fault_of_the_image(said):
            open_source(server.url + path).list()
    server.faults[:] = [Fault(status(number), path="/cat/")]
    with no_fault_of_the_image(rf"/cat/?.*{said}|{said}"):
        open_source(server.url).list()


APACHE = b"""<!DOCTYPE HTML><html><head><title>Index of /</title></head><body>
<table><tr><th><a href="?C=N;O=D">Name</a></th><th><a href='?C=M;O=A'>Last modified</a></th></tr>
<tr><td><a href="/">Parent Directory</a></td></tr>
<tr><td><A HREF="a&amp;b%20c.png">a&amp;b c.png</A></td></tr>
<tr><td><a class=x href=plain.png>plain.png</a></td></tr>
<tr><td><a href="/pages/whole%20path.png">whole path.png</a> <a href="#top">top</a></td></tr>
<tr><td><a href="http://elsewhere.example/x.png">elsewhere</a> <a href="../up.png">up</a></td></tr>
<tr><td><a href="./">here</a></td></tr>
</table></body></html>"""


def test_pages_of_other_servers_are_understood(server: FaultyServer) -> None:
    """Sorting links, entities, no quotes, absolute paths, links that leave the folder."""
    page = Fault(lambda handler: handler.answer(200, {"Content-Type": "text/html"}, APACHE), path="/pages")
    server.faults[:] = [page]
    keys = [item.key for item in open_source(server.url + "/pages/").list()]
    assert keys == ["a&b c.png", "plain.png", "whole path.png"]


def test_pages_and_images_of_any_size_are_not_taken_into_memory(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(server.url)
    uri = next(item.uri for item in source.list() if item.key == "cat/a b.jpg")
    monkeypatch.setattr(folder, "MAX_FILE_BYTES", 99)
    with pytest.raises(BadImage, match="over the limit of 99 bytes"):
        source.read(uri)
    monkeypatch.setattr(web, "MAX_PAGE_BYTES", 99)
    with pytest.raises(InputError, match="a page of over 99 bytes"):
        open_source(server.url)
