"""Where commands may write: free places and their own; nothing is lost that somebody else put there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.store.outputs import content_of, refuse_no_folder, refuse_other_file, refuse_other_folder


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    root.mkdir(exist_ok=True)
    return root


DATASET = ("plan.json", "listing.parquet", "commits/00000.json")


@pytest.mark.parametrize(
    ("names", "content"),
    [
        (DATASET, "a feature dataset"),
        (("manifest.json", "shards.parquet"), "a feature dataset"),
        (("config.yaml", "last.pt"), "a run"),
        (("config.yaml", ".lock"), "a run"),
        (("export.yaml", "model.safetensors"), "an export"),
        (("model_index.json", "unet/config.json"), "a teacher"),
        (("manifest.json", "index.html"), None),
        (("cat/0.jpg", "dog/0.jpg"), None),
        ((), None),
    ],
)
def test_what_a_folder_holds_is_told_by_its_names(names: tuple[str, ...], content: str | None, tmp_path: Path) -> None:
    assert content_of(put(tmp_path / "out", *names)) == content


@pytest.mark.parametrize("names", [DATASET, ("config.yaml", "last.pt"), ("cat/0.jpg", "dog/0.jpg"), ("a.txt",)])
def test_a_folder_of_others_is_refused_naming_what_it_holds(names: tuple[str, ...], tmp_path: Path) -> None:
    out = put(tmp_path / "out", *names)
    content = content_of(out) or "what dtpipe distill did not write"
    with pytest.raises(ConfigError, match=rf"out holds {content} \(.*{names[0].split('/')[0]}.*\); choose an empty"):
        refuse_other_folder(out, "dtpipe distill")


def test_free_folders_logs_and_leftovers_are_taken(tmp_path: Path) -> None:
    refuse_other_folder(tmp_path / "new" / "deep", "dtpipe distill")
    refuse_other_folder(put(tmp_path / "empty"), "dtpipe distill")
    begun = put(tmp_path / "out", ".lock", ".checking", "slurm-1.out", "run.log", "data.json")
    refuse_other_folder(begun, "dtpipe distill", ["data.json"])
    assert not (tmp_path / "new").exists()


def a_file(out: Path) -> Path:
    out.write_text("x")
    return out


def below_a_file(out: Path) -> Path:
    return a_file(out) / "run" / "a"


def a_link_into_nothing(out: Path) -> Path:
    out.symlink_to("moved/away")
    return out


def in_a_dataset(out: Path) -> Path:
    return put(out, *DATASET) / "runs" / "a"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (a_file, "out is a file; give a folder"),
        (below_a_file, "a lies below .*out, which is a file"),
        (a_link_into_nothing, "is a link to moved/away, which is not there"),
        (in_a_dataset, "a lies in .*out, a feature dataset"),
    ],
)
def test_a_place_that_can_be_no_folder_is_refused(make: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    with pytest.raises(ConfigError, match=words):
        refuse_no_folder(out)


def test_a_file_of_others_is_not_written_over(tmp_path: Path) -> None:
    ours = tmp_path / "ours.html"
    refuse_other_file(ours, b"by us", "dtpipe report")
    ours.write_bytes(b"x" * 10**6 + b"by us")
    refuse_other_file(ours, b"by us", "dtpipe report")
    refuse_other_file(put(tmp_path / "a", "empty") / "empty", b"x", "dtpipe report")
    theirs = put(tmp_path / "b", "photo.jpg") / "photo.jpg"
    with pytest.raises(ConfigError, match=r"photo.jpg is there, and dtpipe report did not write it"):
        refuse_other_file(theirs, b"by us", "dtpipe report")
    with pytest.raises(ConfigError, match="b is a folder; give a file as --png"):
        refuse_other_file(theirs.parent, b"by us", "dtpipe inspect", "--png")
    with pytest.raises(ConfigError, match=r"lies below .*photo.jpg, which is a file"):
        refuse_other_file(theirs / "page.html", b"by us", "dtpipe report")
