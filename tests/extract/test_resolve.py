"""What is wrong with the command is said before a teacher is loaded, and before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtpipe.extract.config import ExtractConfig
from dtpipe.extract.run import run_extraction
from dtpipe.manifests.errors import ConfigError, DtpipeError, InputError

MakeConfig = Callable[..., ExtractConfig]


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
        (no_images, InputError, "nowhere: no such folder"),
        (empty_folder, InputError, "no image in this folder"),
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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dtpipe.extract.resolve.load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    monkeypatch.setattr("dtpipe.extract.cluster.connect", lambda *_: pytest.fail("a cluster was joined"))
    config = make_config(inline=inline, device="auto", **wrong(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=says):
        run_extraction(config)
    assert sorted(tmp_path.rglob("*")) == before


def test_fresh_is_refused_before_the_teacher_is_loaded(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run_extraction(make_config())
    monkeypatch.setattr("dtpipe.extract.resolve.load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    with pytest.raises(ConfigError, match="--fresh"):
        run_extraction(make_config(), fresh=True)
