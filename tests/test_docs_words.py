"""What stands in code spans and blocks of the documents exists: commands, flags, settings, presets, files, modules."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dtpipe.pipeline.cli.main import COMMANDS
from dtpipe.pipeline.cli.reference import help_text
from dtpipe.pipeline.cli.settings import check_key, gather, preset_names
from parts.documents import PAGES, blocks, commands_in
from parts.paths import REPO

WRITTEN = [page for page in PAGES if page.name != "cli.md"]  # which the commands write themselves
OTHERS = frozenset(("--nproc-per-node", "--no-python", "--head", "--nodes", "--append", "--logdir"))
"""Of torchrun, ray, sbatch, wandb and tensorboard."""
BY_OPTIONS = re.compile(r"extract\.(teacher\.(options|taps)|codec\.levels)\.")  # whose names are another's
EXAMPLES = {"distill.loss.huber_weight"}  # that a page shows how to add
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@cache
def flags_of(command: str) -> frozenset[str]:
    return frozenset(re.findall(r"--[a-z][\w-]*", help_text(command)))


def spans(page: Path) -> list[str]:
    """Code within sentences and tables."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return SPAN.findall(text)


def sh_lines(page: Path) -> list[list[str]]:
    return [words for block in blocks(page.read_text(), "sh", "console") for words in commands_in(block)]


def known_flags(span: str) -> frozenset[str]:
    """Flags of the command, or of our script, that a span calls; else of all commands together."""
    program, *rest = span.split()
    if program == "dtpipe" and rest and rest[0] in COMMANDS:
        return flags_of(rest[0])
    if program == "python" and (REPO / rest[0]).is_file():
        return frozenset(re.findall(r"--[a-z][\w-]*", (REPO / rest[0]).read_text()))
    return OTHERS.union(*(flags_of(command) for command in COMMANDS))


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_commands_and_flags_in_sentences_exist(page: Path) -> None:
    for span in spans(page):
        if match := re.match(r"dtpipe ([a-z-]+)", span):
            assert match[1] in COMMANDS, span
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", span)) <= known_flags(span), span


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_settings_and_presets_that_are_given_can_be_read(page: Path) -> None:
    lines = [*sh_lines(page), *(span.split() for span in spans(page) if span.startswith(("-s ", "-c ", "dtpipe ")))]
    for words in lines:
        for flag, value in pairwise(words):
            key = value.strip("'").partition("=")[0]
            if flag in ("-s", "--set") and "=" in value and key not in EXAMPLES:
                assert re.match(BY_OPTIONS, key) or check_key(key, page.name), value
            elif flag in ("-c", "--config") and re.fullmatch(r"[a-z0-9_]+", value):
                assert value in preset_names(), value


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_yaml_and_python_in_the_documents_can_be_read(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in blocks(text, "yaml"):
        (tmp_path / "shown.yaml").write_text(block)
        gather([str(tmp_path / "shown.yaml")], {}, {})
    for block in blocks(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dtpipe."):
                assert importlib.util.find_spec(node.module or "") is not None, node.module


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_files_of_the_repository_that_are_named_are_there(page: Path) -> None:
    of_ours = re.compile(
        r"^(?:python |sh |pytest -s )?((?:benchmarks|examples|pipeline|manifests|extract|distill|tests)/[\w./]+\.\w+)$"
    )
    named = [match[1] for span in spans(page) if (match := of_ours.match(span))]
    assert [name for name in named if "NAME" not in name and not (REPO / name).exists()] == []


def test_words_of_shell_blocks_close_their_quotes() -> None:
    for page in WRITTEN:
        for block in blocks(page.read_text(), "sh"):
            shlex.split(block, comments=True)


def test_the_config_of_mmdet_has_the_colours_of_imagenet() -> None:
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    page = (REPO / "docs" / "exports.md").read_text()
    (code,) = (block for block in blocks(page, "python") if block.startswith("_base_ ="))
    names: dict[str, Any] = {}
    exec(code, names)
    colours = names["model"]["data_preprocessor"]
    assert colours["mean"] == pytest.approx([255 * value for value in IMAGENET_DEFAULT_MEAN])
    assert colours["std"] == pytest.approx([255 * value for value in IMAGENET_DEFAULT_STD])
    assert colours["bgr_to_rgb"] is True
