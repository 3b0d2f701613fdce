"""What a text names: a path on a disk, with `~` and `::` as people write them, or a URL."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.run_folder import changed_fields
from dtpipe.distill.teacher.config import TrainTeacherConfig
from dtpipe.extract.sources.places import open_place
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.store.paths import any_place, is_url, local_place, path_on_disk, whole_if_there, whole_place
from dtpipe.manifests.store.store import Store
from dtpipe.pipeline.cli.settings import SECTIONS, section_model, submodel, validate
from dtpipe.pipeline.config import whole_labelled

NOT_UTF8 = os.fsdecode(b"caf\xe9")
PLACES = (whole_place, whole_if_there, local_place, any_place, whole_labelled)
OTHERS = frozenset({"kind", "revision"})
"""Settings that speak of files and name none."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder, and a folder `work` in it to stand in."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("photos", False),
        ("a::b", False),
        ("./zip::b", False),
        ("/photos/a::b/c", False),
        ("/odd/s3://name", False),
        ("~/a::b", False),
        ("file:///photos", False),
        ("s3://bucket/photos", True),
        ("memory://photos", True),
        ("simplecache::s3://bucket/photos", True),
        ("zip://*.png::/photos/a.zip", True),
        ("simplecache::/photos/a.zip", True),
    ],
)
def test_a_double_colon_alone_makes_no_url(text: str, url: bool) -> None:
    assert is_url(text) is url
    assert (path_on_disk(text) is None) is url


def test_a_folder_named_as_a_chain_is_taken_as_it_is(home: Path) -> None:
    assert is_url("zip::photos")
    (home / "work" / "zip::photos").mkdir()
    assert not is_url("zip::photos")
    assert whole_place("zip::photos") == f"{home}/work/zip::photos"


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("~", "HOME"),
        ("~/photos/../a", "HOME/a"),
        ("./~", "HOME/work/~"),
        ("./~/a", "HOME/work/~/a"),
        ("~nobody-of-this-name/a", "HOME/work/~nobody-of-this-name/a"),
        ("~photos", "HOME/work/~photos"),
        ("a~b", "HOME/work/a~b"),
        ("../a", "HOME/a"),
        ("a/{b,c}/*.tar", "HOME/work/a/{b,c}/*.tar"),
        ("a::b", "HOME/work/a::b"),
        ("file:///a/b", "/a/b"),
        ("s3://bucket/~/a", "s3://bucket/~/a"),
    ],
)
def test_a_place_is_written_so_that_it_means_the_same_anywhere(text: str, whole: str, home: Path) -> None:
    whole = whole.replace("HOME", str(home))
    assert whole_place(text) == whole_place(whole_place(text)) == whole
    assert whole_place((text, "b")) == (whole, f"{home}/work/b")
    assert whole_place(None) is None


def test_stores_and_sources_open_what_a_text_names(home: Path) -> None:
    for text, path in [("./~", "work/~"), ("~/a::b", "a::b"), ("a::b", "work/a::b"), ("file:///a", "/a")]:
        assert Store(text).url == open_place(text).path == str(home / path)
    assert not open_place("simplecache::memory://photos").is_local
    assert Store("simplecache::memory://photos").local is None


def test_a_name_is_made_whole_where_a_file_has_it(home: Path) -> None:
    (home / "google").mkdir()
    assert whole_if_there("google/ddpm-celebahq-256") == "google/ddpm-celebahq-256"
    assert whole_if_there("~/teacher") == f"{home}/teacher"
    (home / "work" / "teacher").symlink_to("away")
    assert whole_if_there("teacher") == f"{home}/work/teacher"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("text", "words"), [(f"/a/{NOT_UTF8}", r"/a/caf\\xe9, which is not UTF-8"), ("a\0b", "NUL")])
def test_what_no_settings_file_can_hold_is_refused(place, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        place(text)


def test_a_relative_path_below_a_folder_that_is_not_utf8_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NOT_UTF8).mkdir()
    monkeypatch.chdir(tmp_path / NOT_UTF8)
    document = {"distill": {"datasets": ["features"], "run": {"out": "run"}}}
    with pytest.raises(ConfigError, match=r"distill.datasets is .*caf\\xe9/features, which is not UTF-8; rename it"):
        validate(document, "distill")


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A settings model and those within it."""
    yield model
    for field in model.model_fields.values():
        if inner := submodel(field.annotation):
            yield from models(inner)


def names_a_place(field: FieldInfo) -> bool:
    """Whether a setting is text that its own description calls a file, folder or URL."""
    text = re.search(r"\bstr\b", str(field.annotation)) and not re.search("dict|Literal", str(field.annotation))
    return bool(text and re.search(r"\b([Ff]older|[Ff]ile|URLs?|checkpoint|^Teacher)\b", field.description or ""))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_that_names_a_place_is_read_as_one(section: str) -> None:
    for model in models(section_model(section)):
        checks = model.__pydantic_decorators__.field_validators.values()
        read = {name for check in checks if check.func in PLACES for name in check.info.fields}
        named = {name for name, field in model.model_fields.items() if names_a_place(field)}
        assert named - OTHERS == read, model.__name__


def test_old_runs_with_relative_paths_are_gone_on_with(home: Path) -> None:
    distill = DistillConfig.model_validate({"datasets": ["features"], "keys": "~/keys", "run": {"out": "run"}})
    assert distill.datasets == (f"{home}/work/features",)
    old = {**distill.model_dump(mode="json"), "datasets": ["features"], "keys": "../keys"}
    assert changed_fields(old, distill, "distill") == []
    teacher = TrainTeacherConfig.model_validate({"images": "photos", "init_from": "first", "run": {"out": "second"}})
    old = {**teacher.model_dump(mode="json"), "images": "photos", "init_from": "first"}
    assert changed_fields(old, teacher, "train_teacher") == []
    other = {**old, "init_from": "other"}
    assert [change.name for change in changed_fields(other, teacher, "train_teacher")] == ["train_teacher.init_from"]
