"""What `eval` says about its own comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.downstream.base import LabelledSet
from dtpipe.distill.run_folder import RunFolder
from dtpipe.manifests.reader import FeatureDataset
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.evaluate import overlap_notes

GOLDEN = Path(__file__).parent.parent / "golden" / "v1_zarr"


def labelled(*keys: str) -> LabelledSet:
    return LabelledSet(np.zeros((len(keys), 8, 8, 3), np.uint8), keys)


def test_held_out_images_that_any_dataset_of_the_run_held_are_counted(tmp_path: Path) -> None:
    keys = FeatureDataset.open(GOLDEN).keys
    RunFolder.open(DistillConfig(datasets=(str(tmp_path / "gone"), str(GOLDEN)), out=str(tmp_path))).__exit__(None, None, None)
    config = EvalConfig(checkpoint=str(tmp_path), task="knn", images="photos")
    notes = overlap_notes(config, labelled(*keys[:2], "unseen.png"))
    assert len(notes) == 1
    assert notes[0].startswith("2 of the held-out images")
    assert overlap_notes(config, labelled("unseen.png")) == []
    assert overlap_notes(config.model_copy(update={"test_images": "others"}), labelled(*keys[:2])) == []
