"""A file that is no checkpoint of a teacher is refused by name, whatever it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dtpipe.extract.train_state import load_checkpoint
from dtpipe.manifests.errors import DamagedDataError

OURS = {"config": "{}", "unet": {}, "ema": {}, "optimizer": {}, "step": 1, "losses": []}


@pytest.mark.parametrize("content", [7, torch.zeros(3), ["config"], {"student": {}, "step": 3}, {**OURS, "config": '{"px": "wide"}'}])
def test_a_checkpoint_of_another_kind_is_refused_by_name(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(DamagedDataError, match=r"last\.pt: .*(no checkpoint of a teacher|lacks|settings)"):
        load_checkpoint(tmp_path / "last.pt")
