"""What a source held and ignored is on record, outside the digest; a source that changed since is mentioned."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtpipe.extract.census import LISTED_AGAIN_S, change_since, take_census
from dtpipe.extract.config import ExtractConfig
from dtpipe.extract.run import run_extraction
from dtpipe.extract.shards.progress import Progress
from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import InputError
from dtpipe.pipeline.cli.console import Console
from dtpipe.pipeline.commands import extract as extract_command
from dtpipe.pipeline.commands import inspect as inspect_command
from dtpipe.pipeline.plan.extraction import plan_extraction, print_extraction
from dtpipe.pipeline.report.inspect import describe_dataset
from parts.extractions import Extract, MakeConfig
from parts.images import draw_image, png, write_files
from parts.packing import write_tar, write_zip

IMAGE = png(draw_image(9))
LINE = "ignored: 6 .mov, 3 without extension that look like images (images need an ending such as .jpg to be read)"


def test_what_is_ignored_is_told_by_plan_extract_and_inspect_and_changes_no_digest(
    image_folder: Path, make_config: MakeConfig, extract: Extract, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = describe_dataset(extract("before"))["digest"]
    write_files(image_folder, {f"cat/{idx}.MOV": b"video" for idx in range(6)})
    write_files(image_folder, {f"{idx:064x}": IMAGE for idx in range(3)})
    config = make_config()
    print_extraction(Console(), plan_extraction(config))
    said: list[str] = []
    first = run_extraction(config, on_progress=lambda progress: said.append(progress.message or ""))
    assert said.index(LINE) < said.index("")  # before any work
    results = [first, run_extraction(config)]
    for result in results:
        extract_command._print_result(Console(), result, "dtpipe distill")
    inspect_command._print(Console(), describe_dataset(results[0].url))
    assert capsys.readouterr().out.count(LINE + "\n") == 4
    assert {result.digest for result in results} == {digest}


def test_what_is_ignored_is_known_of_an_unfinished_dataset(image_folder: Path, make_config: MakeConfig) -> None:
    (image_folder / "notes.txt").write_text("")
    config = make_config()
    with pytest.raises(RuntimeError, match="stop"):
        run_extraction(config, on_progress=_stop_after_a_shard)
    assert describe_dataset(config.run.out)["ignored"] == {".txt": 1}


def _stop_after_a_shard(progress: Progress) -> None:
    if progress.shards_done:
        raise RuntimeError("stop")


@pytest.mark.parametrize(("write", "name"), [(write_tar, "a.tar"), (write_zip, "a.zip")])
def test_members_that_are_ignored_are_counted_too(write, name: str, tmp_path: Path) -> None:
    files = {"cat/0.png": IMAGE, "cat/1.MOV": b"", "cat/2.mov": b"", "cat/digest": IMAGE, ".x/y.png": IMAGE}
    census = take_census(open_source(str(write(tmp_path / name, files))))
    assert (census.samples, census.ignored) == (1, {".mov": 2, "hidden": 1, "without extension": 1})


def test_names_with_as_many_endings_as_files_make_no_long_record(tmp_path: Path) -> None:
    """Frames of a video tool end in their number."""
    files = {f"frame.{idx:05d}": b"" for idx in range(300)} | {"a.png": IMAGE, "b.json": b"", "c.json": b""}
    write_files(tmp_path, files)
    ignored = take_census(open_source(str(tmp_path))).ignored
    assert (len(ignored), sum(ignored.values()), ignored[".json"]) == (21, 302, 2)
    assert ignored["of other endings"] == 281


# --- a source that changed -------------------------------------------------------------------------------------------


def note_of(config: ExtractConfig) -> str | None:
    messages: list[str] = []
    result = run_extraction(config, on_progress=lambda progress: messages.append(progress.message or ""))
    assert result.num_ok == 8
    told = [message for message in messages if message.startswith("the source lists")]
    assert told == ([result.source_change] if result.source_change else [])
    return result.source_change


def test_source_that_grew_shrank_or_was_renamed_since_its_plan_is_mentioned(
    image_folder: Path, make_config: MakeConfig
) -> None:
    config = make_config()
    assert note_of(config) is None
    assert note_of(config) is None
    (image_folder / "cat" / "new.png").write_bytes(IMAGE)
    note = note_of(config)
    assert note == (
        f"the source lists 9 images now, and {config.run.out} was planned from 8: it keeps them; "
        f"for what the source holds now, extract into another --out"
    )
    (image_folder / "cat" / "001.png").unlink()
    assert "lists 8 images now, of other names" in (note_of(config) or "")
    (image_folder / "cat" / "new.png").unlink()
    assert "lists 7 images now, and" in (note_of(config) or "")


def test_limit_is_no_change_of_the_source(image_folder: Path, make_config: MakeConfig) -> None:
    config = make_config(limit=3)
    first = run_extraction(config)
    assert (first.num_ok, run_extraction(config).source_change) == (3, None)
    (image_folder / "cat" / "new.png").write_bytes(IMAGE)
    assert "9 images now" in (run_extraction(config).source_change or "")


def test_source_that_no_longer_is_what_it_was_is_mentioned(image_folder: Path, make_config: MakeConfig) -> None:
    """An image beside class folders: as class folders, which the dataset is made of, they cannot be listed again."""
    config = make_config()
    run_extraction(config)
    (image_folder / "new.png").write_bytes(IMAGE)
    note = run_extraction(config).source_change or ""
    assert "cannot be listed now" in note
    assert "new.png lies in no class folder" in note
    assert "keeps the 8 images" in note


def test_dataset_that_is_gone_on_with_keeps_its_kind_of_source(tmp_path: Path, make_config: MakeConfig) -> None:
    """As a new one, images in two kinds of files would be refused."""
    write_tar(tmp_path / "mixed" / "a.tar", {"0.png": IMAGE, "1.png": IMAGE})
    config = make_config(images=str(tmp_path / "mixed"))
    first = run_extraction(config)
    write_files(tmp_path / "mixed", {"cat/0.png": IMAGE})
    again = run_extraction(config)
    assert (again.digest, again.source_change) == (first.digest, None)
    with pytest.raises(InputError, match="images lie in files of 2 kinds"):
        run_extraction(make_config(images=config.images, out=str(tmp_path / "new")))


def test_tar_that_was_packed_anew_is_mentioned(tmp_path: Path, make_config: MakeConfig) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.png": IMAGE, "1.png": IMAGE})
    config = make_config(images=str(path))
    run_extraction(config)
    write_tar(path, {"0.png": IMAGE})
    assert "lists 1 image now" in (run_extraction(config).source_change or "")


def test_source_that_took_long_to_list_or_is_gone_is_not_looked_at(tmp_path: Path) -> None:
    source = open_source(str(write_files(tmp_path / "a", {"0.png": IMAGE})))
    record = take_census(source).record()
    write_files(tmp_path / "a", {"1.png": IMAGE})
    grown = open_source(str(tmp_path / "a"))
    assert "2 images now" in (change_since(record, grown, "out") or "")
    assert change_since(record | {"seconds": LISTED_AGAIN_S}, grown, "out") is None
    assert change_since({}, grown, "out") is None  # of a dataset from before there was a record
    gone = open_source(str(tmp_path / "a"), "folder")
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    (tmp_path / "a").rmdir()
    assert "cannot be listed now" in (change_since(record, gone, "out") or "")
