"""What is wrong with the command is said before a teacher is loaded, and before anything is written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dtpipe.extract.config import ExtractConfig
from dtpipe.extract.recipe import list_source
from dtpipe.extract.run import run_extraction
from dtpipe.extract.shards.task import WorkerContext
from dtpipe.extract.sources.base import SourceItem
from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.errors import ConfigError, DtpipeError, InputError
from dtpipe.manifests.read.dataset import FeatureDataset
from parts.extractions import MakeConfig


def no_images(tmp_path: Path) -> dict[str, Any]:
    return {"images": str(tmp_path / "nowhere")}


def empty_folder(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "empty").mkdir()
    return {"images": str(tmp_path / "empty"), "source": {"kind": "folder"}}


def unknown_key(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "keys").write_text("cat/999.png\n")
    return {"keys": str(tmp_path / "keys")}


def foreign_output(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("important")
    return {"out": str(tmp_path / "home")}


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (no_images, InputError, "nowhere: no such file or folder"),
        (empty_folder, InputError, "no image in it"),
        (unknown_key, InputError, r"cat/999\.png"),
        (foreign_output, ConfigError, r"thesis\.tex"),
    ],
)
def test_a_wrong_path_costs_no_teacher_no_cluster_and_no_file(
    wrong: Callable[[Path], dict[str, Any]],
    error: type[DtpipeError],
    says: str,
    inline: bool,
    make_config: MakeConfig,
    tmp_path: Path,
) -> None:
    """Teacher and cluster are wrong too, so one of them would be named if it were looked at first."""
    nowhere = {"teacher": {"path": str(tmp_path / "gone")}, "ray_address": "127.0.0.1:1"}
    config = make_config(inline=inline, device="auto", **nowhere, **wrong(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=says):
        run_extraction(config)
    assert sorted(tmp_path.rglob("*")) == before


class GoneList:
    """A source whose listing fails as files do."""

    kind = "folder"

    def list(self) -> Sequence[SourceItem]:
        return [SourceItem(line, line) for line in Path("gone.list").read_text().splitlines()]

    def ignored(self) -> Mapping[str, int]:
        return {}

    def read(self, uri: str) -> bytes:
        return Path(uri).read_bytes()


def test_a_source_that_cannot_be_listed_is_one_sentence(make_config: MakeConfig) -> None:
    with pytest.raises(InputError, match=r"cannot be listed \(.*gone\.list.*\); check the path"):
        list_source(make_config(), GoneList())


def test_fresh_is_refused_before_the_teacher_is_loaded(make_config: MakeConfig, tmp_path: Path) -> None:
    run_extraction(make_config())
    with pytest.raises(ConfigError, match="--fresh"):
        run_extraction(make_config(teacher={"path": str(tmp_path / "gone")}), fresh=True)


def test_workers_in_other_folders_get_whole_paths(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_config()
    monkeypatch.chdir(tmp_path)
    config = make_config(
        images=os.path.relpath(whole.images),
        out=os.path.relpath(whole.run.out),
        teacher={"path": os.path.relpath(whole.teacher.path)},
    )
    seen: list[WorkerContext] = []
    monkeypatch.setattr("dtpipe.extract.shards.worker.ShardWorker", lambda context: seen.append(context) or pytest.exit)
    with contextlib.suppress(AttributeError):  # what stands in for a worker does no work
        run_extraction(config)
    seen_job = seen[0].job
    assert (seen_job.images, seen[0].out, seen_job.teacher.path) == (whole.images, whole.run.out, whole.teacher.path)


def test_command_and_settings_stand_in_plan_and_manifest(make_config: MakeConfig) -> None:
    url = run_extraction(make_config(), command="dtpipe extract --out features").url
    run_extraction(make_config(), command="dtpipe extract --again")
    dataset = FeatureDataset.open(url)
    assert dataset.manifest is not None
    for provenance in (dataset.plan.provenance, dataset.manifest.provenance):
        assert provenance["command"] == "dtpipe extract --out features"
        assert ExtractConfig.model_validate(provenance["config"]) == make_config()
    assert verify(url).ok
