"""Sources behind a web server on a bad day: waited for, with a notice and a clear end; no image is written off."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dtpipe.extract.shards.reader import ImageReader
from dtpipe.extract.sources.registry import open_source
from dtpipe.extract.teachers.files.remote import fetch_remote
from dtpipe.manifests.errors import BadImage, InputError, TeacherError, UnreachableError
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.manifests.store.patience import Patience
from dtpipe.manifests.write.listing import build_listing
from parts.faulty_server import (
    Fault,
    FaultyServer,
    cut_answer,
    faulty_server,
    hang,
    reset_midway,
    status,
    whole_answers,
)
from parts.images import write_images
from parts.packing import contents, folder_files, write_parquet, write_tar, write_zip

SOON = Patience(  # tries again soon, and waits long for an answer, which a busy machine may give late
    connect_s=20.0, silence_s=20.0, attempt_s=30.0, total_s=90.0, first_s=90.0, first_pause_s=0.02, longest_pause_s=0.1
)
IMPATIENT = replace(SOON, total_s=0.8, first_s=0.8)  # with what fails; not with what is late
HASTY = replace(SOON, silence_s=2.0, attempt_s=2.0, total_s=4.5, first_s=4.5)  # with what is late, the second time
BUSY = status(503)


@pytest.fixture(scope="module")
def web_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images: in class folders, a zip, a tar and a Parquet file."""
    root = tmp_path_factory.mktemp("web")
    files = folder_files(write_images(root / "images", 4))
    write_zip(root / "a.zip", files)
    write_tar(root / "a.tar", files)
    write_parquet(root / "a.parquet", files, [0, 0, 1, 1], ["cat", "dog"])
    return root


@pytest.fixture
def server(web_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """A server of its own for each test, so that no test's troubles touch another's."""
    monkeypatch.setattr("dtpipe.manifests.store.client.STORE_PATIENCE", SOON)
    with faulty_server(web_folder) as faulty:
        yield faulty


@pytest.fixture
def notices(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was said so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("dtpipe.")]


@pytest.mark.parametrize("what", ["images/", "a.zip", "a.tar", "a.parquet"])
def test_every_kind_of_source_gets_through_a_server_that_fails(what, server, web_folder, notices):
    expected = contents(open_source(str(web_folder / what)))
    server.faults[:] = [Fault(BUSY, times=2), Fault(reset_midway, times=1), Fault(cut_answer, "GET", times=1)]
    source = open_source(f"{server.url}/{what}")
    assert len(source.list()) == 4
    server.faults[:] = [Fault(BUSY, "GET", times=2), Fault(cut_answer, "GET", times=1)]
    assert sorted(contents(source).values()) == sorted(expected.values())
    assert server.faults[0].times == 0
    assert re.search(rf"{server.url}/.*503: Service Unavailable; fails since .* given up at", notices()[0])
    assert len(notices()) == 1


@pytest.mark.parametrize("fault", [BUSY, hang, reset_midway])
def test_a_source_that_fails_for_good_ends_with_what_failed_since_when(fault, server, monkeypatch):
    monkeypatch.setattr("dtpipe.manifests.store.client.STORE_PATIENCE", HASTY if fault is hang else IMPATIENT)
    source = open_source(f"{server.url}/images/")
    item = source.list()[0]
    server.faults[:] = [Fault(fault)]
    said = r"cannot be (read|opened) \(.*attempts? failed since .*store is reachable"
    for use in (lambda: source.read(item.uri), lambda: open_source(f"{server.url}/a.zip")):
        with pytest.raises(UnreachableError, match=said) as error:
            use()
        assert not isinstance(error.value, BadImage)
        assert error.value.exit_code == 3
    with pytest.raises(TeacherError, match=said):
        fetch_remote(f"{server.url}/a.zip", Path("nowhere"))


def test_what_was_waited_for_is_not_tried_again_by_the_reader(server, monkeypatch):
    monkeypatch.setattr("dtpipe.manifests.store.client.STORE_PATIENCE", IMPATIENT)
    source = open_source(f"{server.url}/images/")
    items = source.list()
    reader = ImageReader(source, build_listing(items, "source"), TransformRecipe(height=32, width=32), 10**6)
    assert reader.image(0).shape == (32, 32, 3)
    server.faults[:] = [Fault(BUSY)]
    with pytest.raises(InputError, match="503"):
        reader.image(1)
    server.seen.clear()
    time.sleep(IMPATIENT.total_s)
    with pytest.raises(InputError, match=rf"sample {re.escape(items[2].key)}: .*503"):
        reader.image(2)
    assert len(server.seen) == 1  # the deadline of the outage had passed


@pytest.mark.parametrize("fault", [BUSY, reset_midway])
def test_a_folder_that_cannot_be_listed_is_not_left_out(fault, server):
    """fsspec passes over folders whose listing fails; half of the images would be missing."""
    server.faults[:] = [Fault(fault, "GET", "images/dog", times=2)]
    assert len(open_source(f"{server.url}/images/").list()) == 4
    assert len(open_source(f"{server.url}/images/").list()) == 4


@pytest.mark.parametrize("what", ["a.zip", "a.tar", "a.parquet"])
def test_archives_on_a_server_without_ranges_are_refused_with_what_to_do(what, server):
    server.faults[:] = [Fault(whole_answers)]
    with pytest.raises(InputError, match=r"gives no parts of files.*download it"):
        open_source(f"{server.url}/{what}").list()


def test_a_file_that_is_gone_is_a_bad_image_and_asked_for_once(server):
    source = open_source(f"{server.url}/images/")
    item = source.list()[0]
    server.faults[:] = [Fault(status(404))]
    server.seen.clear()
    with pytest.raises(BadImage):
        source.read(item.uri)
    assert len(server.seen) == 1
    server.faults[:] = [Fault(status(403))]
    with pytest.raises(InputError, match=r"403: Forbidden.*credentials") as error:
        source.read(item.uri)
    assert not isinstance(error.value, BadImage)
