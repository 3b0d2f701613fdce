"""A device that is asked for and is not there is refused before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from dtpipe.distill.engine.device import training_device
from dtpipe.extract.device import pick_device
from dtpipe.manifests.errors import ConfigError


@pytest.mark.parametrize("pick", [training_device, pick_device])
@pytest.mark.parametrize(("name", "where"), [("cuda", torch.cuda), ("mps", torch.backends.mps)])
def test_a_gpu_that_torch_does_not_find_is_refused(monkeypatch, pick, name, where):
    monkeypatch.setattr(where, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=rf"device is (to be )?{name} and torch (finds|sees) no GPU.*dtpipe doctor.*cpu"
    ):
        pick(name)


@pytest.mark.parametrize("pick", [training_device, pick_device])
def test_apples_gpu_is_taken_where_it_is_named_and_not_by_itself(monkeypatch, pick):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(pick("mps")) == "mps"
    assert str(pick("auto")) == "cpu"
