"""What the documents say about commands is true: the reference is fresh, every example parses, the runnable block runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dtpipe.pipeline.cli.main import COMMANDS, main
from dtpipe.pipeline.cli.reference import help_text, reference
from parts.images import write_images
from parts.paths import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(<!-- runnable -->\n)?```sh\n(.*?)```", re.DOTALL)
SMALL = {  # settings that make a README command small enough for a test; they change no flag that the README shows
    "train-teacher": "train_teacher: {px: 32, channels: [8, 8, 8, 8, 8, 8], blocks: 1, head_channels: 8, norm_groups: 4, steps: 2,"
    " batch_size: 4, num_samples: 1, sample_steps: 2}",
    "plan": "extract: {batch_size: 8, inline: true}",
    "extract": "extract: {batch_size: 8, inline: true}",
    "distill": "distill: {epochs: 1, batch_size: 8, regressor: {width: 8}}",
    "eval": "eval: {seeds: 1, limit: 24, probe: {max_iter: 3, l2_grid: [0.1], folds: 2}}",
    "report": "report: {num_images: 1}",
}


def commands_in(text: str) -> Iterator[list[str]]:
    """Command lines of dtpipe in a text, without comments; lines that end with a backslash go on."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "dtpipe" in words:
            yield words[words.index("dtpipe") + 1 :]
        elif words and words[0].endswith("/dtpipe"):
            yield words[1:]


def parse(words: list[str]) -> None:
    """Parse one command line without running it; click raises on an unknown command, flag or choice."""
    group = click.Context(main, info_name="dtpipe", **main.context_settings)
    command = main.get_command(group, words[0])
    assert command is not None, words[0]
    command.make_context(words[0], words[1:], parent=group)


def test_the_command_reference_is_fresh() -> None:
    page = (REPO / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == reference(), "run `python -m dtpipe.pipeline.cli.reference docs/cli.md`"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_that_parses(name: str) -> None:
    _, _, after = help_text(name).partition("Example:\n")
    examples = list(commands_in(after.partition("\n\n")[0]))
    assert examples
    for words in examples:
        assert words[0] == name
        parse(words)


def test_every_command_line_in_the_readme_parses() -> None:
    found = [words for _, block in BLOCK.findall(README) for words in commands_in(block)]
    assert len(found) >= 8
    for words in found:
        parse(words)


@pytest.mark.slow
def test_runnable_blocks_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "labelled"):
        write_images(tmp_path / folder, 24)
    blocks = [block for marked, block in BLOCK.findall(README) if marked]
    commands = [words for block in blocks for words in commands_in(block)]
    assert len(commands) >= 8
    for words in commands:
        small = tmp_path / f"{words[0]}.yaml"
        small.write_text(SMALL.get(words[0], ""))
        extra = ["-c", str(small)] if words[0] in SMALL else []
        done = CliRunner().invoke(main, [*words, *extra])
        assert done.exit_code == 0, f"dtpipe {shlex.join(words)}\n{done.output}"
    assert (tmp_path / "runs" / "r50" / "report.html").is_file()
    assert (tmp_path / "r50" / "model.safetensors").is_file()
