"""Small extractions in this process, and their settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtpipe.extract.config import ExtractConfig, LiveConfig
from parts.settings import build

MakeConfig = Callable[..., ExtractConfig]
Extract = Callable[..., str]


def extract_config(images: Path, teacher: Path, out: Path, /, **changes: Any) -> ExtractConfig:
    """Settings of an inline extraction of a few images at timestep 50; `changes` replace fields, of `run` too."""
    fields = {
        "images": str(images),
        "out": str(out),
        "teacher": {"path": str(teacher)},
        "noise": {"timesteps": [50]},
        "shard": {"samples": 3},
        "batch_size": 2,
        "inline": True,
        "device": "cpu",
    }
    return build(ExtractConfig, fields, **changes)


def live_config(config: ExtractConfig) -> LiveConfig:
    """The settings of live training on the samples of an extraction."""
    return LiveConfig.model_validate({**config.model_dump(), "run": {"max_bad": config.run.max_bad}})
