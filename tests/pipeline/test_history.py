"""The command that a dataset's recorded settings amount to gives these settings."""

from __future__ import annotations

import shlex
from typing import Any

from click.testing import CliRunner

from dtpipe.extract.config import ExtractConfig
from dtpipe.pipeline.commands.extract import EXAMPLE, FLAGS
from dtpipe.pipeline.history import rebuild_command
from dtpipe.pipeline.options import Call, settings_command


def parse(line: str) -> ExtractConfig:
    """The settings that a command line gives."""
    seen: list[Any] = []

    @settings_command("extract", FLAGS, EXAMPLE)
    def command(call: Call) -> None:
        """Keep the settings."""
        seen.append(call.settings("extract"))

    result = CliRunner().invoke(command, shlex.split(line)[2:], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    config: ExtractConfig = seen[0]
    return config


def rebuilt(config: ExtractConfig) -> str:
    return rebuild_command("extract", "extract", config.model_dump(mode="json"), FLAGS)


def test_defaults_are_left_out() -> None:
    config = ExtractConfig(images="my photos", out="features", teacher={"path": "teacher"})
    assert rebuilt(config) == "dtpipe extract --images 'my photos' --out features --teacher teacher"


def test_a_rebuilt_command_gives_the_same_settings() -> None:
    config = ExtractConfig(
        images="a",
        out="b",
        teacher={"path": "c", "taps": {"l2": "up_blocks.3", "l3": "up_blocks.2"}, "dtype": "bfloat16"},
        transform={"px": (128, 256), "antialias": False},
        noise={"timesteps": (50, 150), "flips": True},
        shard={"samples": 256},
        max_bad=3,
        inline=True,
    )
    line = rebuilt(config)
    assert "--timesteps 50,150" in line
    assert parse(line) == config
