"""The teacher that costs nothing: its shapes are ADM-256's, and nobody takes its dataset for features."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.stream.data import STORED
from dtpipe.distill.trainer import train
from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_level
from dtpipe.pipeline.cli.main import main
from parts.extractions import Extract
from parts.memory import tiny_config
from parts.paths import FIXTURES

NULL = {"path": "measure-only", "options": {"channels": {"l2": 4, "l3": 6}, "px": 32}}


def test_levels_have_the_shapes_of_adm_256() -> None:
    """Channels of the decoder blocks at strides 4 to 32, by the published layout: what stands in its state dict."""
    spec = load_teacher(TeacherConfig(path="measure-only")).spec
    assert spec.image_px == (256, 256)
    cells = {level.name: 256 // level.stride for level in spec.levels}
    channels = {level.name: level.channels for level in spec.levels}
    assert channels == adm_256_channels()
    assert 2 * sum(number * cells[name] ** 2 for name, number in channels.items()) == 5.625 * 2**20


def adm_256_channels() -> dict[str, int]:
    """From the fixture, an eighth as wide: the last residual block of each resolution of the decoder."""
    shapes = json.loads(str(np.load(FIXTURES / "adm" / "adm256_layout.npz")["about"]))["shapes"]
    blocks: dict[int, int] = {}
    for name, shape in shapes.items():
        if found := re.fullmatch(r"output_blocks\.(\d+)\.0\.out_layers\.3\.weight", name):
            blocks[int(found[1])] = 8 * shape[0]
    per_level = len(blocks) // 6  # six resolutions, 8 to 256 px
    return {f"l{5 - idx}": blocks[per_level * (idx + 1) - 1] for idx in range(4)}


def test_its_dataset_is_noise_by_role_and_is_refused_where_something_is_learned(
    extract: Extract, tmp_path: Path
) -> None:
    url = extract(teacher=NULL, noise={})
    dataset = FeatureDataset.open(url)
    assert {level.role for level in dataset.levels} == {"noise"}
    assert dataset.plan.format == "dtpipe-features/2"  # what does not know the role refuses to read it
    first, other = (read_level(dataset, "l2", row) for row in (0, 1))
    np.testing.assert_array_equal(first, other)
    assert abs(float(first.astype(np.float32).std()) - 1) < 0.1
    for levels in (None, ["l2"]):
        config = DistillConfig.model_validate(
            tiny_config(tmp_path / "run", datasets=(url,), levels=levels).model_dump()
        )
        with pytest.raises(ConfigError, match="l2, l3 are noise: teacher null"):
            train(config, STORED)
    shown = CliRunner().invoke(main, ["inspect", url])
    assert "null: NOISE for measuring speed, no features" in shown.output
    assert "FOR MEASURING ONLY" in CliRunner().invoke(main, ["list", "teachers"]).output
