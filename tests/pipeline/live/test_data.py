"""Training data is one object: it can be sent to other processes, opens without writing, and looks at images once."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.stream.data import StoredData, TrainingData
from dtpipe.distill.trainer import train
from dtpipe.extract.teachers.registry import KINDS
from dtpipe.manifests.errors import PlanChangedError
from dtpipe.pipeline.live.data import CheckedImages
from dtpipe.pipeline.live.source import LiveData
from dtpipe.pipeline.live.teacher import open_live
from parts.extractions import Extract, MakeConfig, live_config
from parts.memory import tiny_config
from parts.runs import losses
from parts.settings import changed


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    return tiny_config(tmp_path / "run", datasets=(), reencode=1.0, epochs=1)


@pytest.fixture
def live(make_config: MakeConfig, image_folder: Path) -> LiveData:
    """Eight good images and a broken one, which may be."""
    (image_folder / "cat" / "broken.png").write_bytes(b"junk")
    return LiveData(live_config(make_config(max_bad=1)), CheckedImages())


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the diffusion teachers that were loaded."""
    paths: list[str] = []

    def load(config: Any, device: str) -> Any:
        paths.append(config.path)
        return kind.load(config, device)

    kind = KINDS["ddpm"]
    monkeypatch.setitem(KINDS, "ddpm", replace(kind, load=load))
    return paths


def sent(data: TrainingData) -> TrainingData:
    """As another process has it."""
    received: TrainingData = pickle.loads(pickle.dumps(data))
    return received


def keys(data: TrainingData, config: DistillConfig) -> list[str]:
    opened = data.open(config)
    assert opened.sampling is not None
    return [opened.source.columns.keys[row] for row in opened.sampling.rows]


def test_opening_writes_nothing_and_after_a_check_leaves_out_what_that_found(
    live: LiveData, config: DistillConfig, image_folder: Path
) -> None:
    assert "cat/broken.png" in keys(live, config)
    assert not Path(config.run.out).exists()
    checked = live.open_checked(config)
    elsewhere = sent(live)
    (image_folder / "cat" / "broken.png").write_bytes(next(image_folder.glob("dog/*.png")).read_bytes())
    files = {path: path.stat().st_mtime_ns for path in Path(config.run.out).iterdir()}
    assert len(keys(elsewhere, config)) == 8 and "cat/broken.png" not in keys(elsewhere, config)
    assert elsewhere.open(config).digest == elsewhere.open_checked(config).digest == checked.digest
    assert {path: path.stat().st_mtime_ns for path in Path(config.run.out).iterdir()} == files


def test_of_processes_on_one_machine_one_looks_at_the_images(live: LiveData, config: DistillConfig) -> None:
    looks: list[int] = []

    def on_checked(num: int, total: int, bad: Sequence[object]) -> None:
        looks.append(num)

    with ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(lambda data: data.open_checked(config), [replace(live, on_checked=on_checked)] * 3))
    assert looks == [9]
    assert len({data.digest for data in opened}) == 1


def test_opening_refuses_the_data_of_another_run(live: LiveData, config: DistillConfig) -> None:
    train(config, live)
    other = replace(live, extract=live.extract.model_copy(update={"limit": 5}))
    for open_data in (other.open, other.open_checked):
        with pytest.raises(PlanChangedError, match=r"listing\.num: 9 -> 5"):
            open_data(config)


def test_a_run_loads_each_teacher_once(
    live: LiveData, config: DistillConfig, extract: Extract, loads: list[str], tmp_path: Path
) -> None:
    train(config, live)
    assert loads == [live.extract.teacher.path]
    urls = tuple(extract(f"at{timestep}", noise={"timesteps": [timestep]}, max_bad=1) for timestep in (50, 150))
    loads.clear()
    joined = changed(config, datasets=urls, join=True, out=str(tmp_path / "joined"))
    train(joined, sent(StoredData(partial(open_live, {}))))
    assert loads == [live.extract.teacher.path]


def test_a_dataset_with_its_live_teacher_can_be_sent_to_another_process(
    extract: Extract, config: DistillConfig, tmp_path: Path
) -> None:
    url = extract("features")
    here, there = (
        changed(config, datasets=(url,), reencode=0.5, out=str(tmp_path / name), log_every=1)
        for name in ("here", "there")
    )
    data = StoredData(partial(open_live, {}))
    train(here, data)
    train(there, sent(data))
    np.testing.assert_array_equal(losses(here), losses(there))
    assert data.teacher(data.open(here).source, torch.device("cpu")) is not None
