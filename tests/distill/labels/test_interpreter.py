"""The interpreter's shapes, and its folder: the same logits after a round trip, and no changed byte unseen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dtpipe.distill.labels.files import INTERPRETER_RECORD, load_interpreter, save_interpreter
from dtpipe.distill.labels.interpreter import FeatureInterpreter, InterpreterLevel, InterpreterSpec, views_in_channels
from dtpipe.distill.student.load import WEIGHTS
from dtpipe.manifests.errors import DamagedDataError, InputError, ShapeError
from dtpipe.manifests.labels import ClassTable

LEVELS = (InterpreterLevel("l2", 4, 6), InterpreterLevel("l4", 16, 10), InterpreterLevel("l4.b", 16, 3))


def spec(**changes: object) -> InterpreterSpec:
    return InterpreterSpec(**{"levels": LEVELS, "classes": ClassTable(("sky", "sea")), "width": 32} | changes)  # type: ignore[arg-type]


def features(num_views: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def view(level: InterpreterLevel) -> torch.Tensor:
        return torch.randn(2, level.channels, 64 // level.stride, 32 // level.stride, generator=generator)

    return views_in_channels({level.name: [view(level) for _ in range(num_views)] for level in LEVELS})


def built(**changes: object) -> FeatureInterpreter:
    torch.manual_seed(0)
    return FeatureInterpreter(spec(**changes)).eval()


def test_logits_have_the_size_of_the_finest_level_and_one_cell_for_classes_of_images() -> None:
    assert built()(features()).shape == (2, 2, 16, 8)
    assert built(kind="classes")(features()).shape == (2, 2, 1, 1)
    assert built(num_views=3)(features(3)).shape == (2, 2, 16, 8)
    with pytest.raises(ShapeError, match="reads 18 channels of level l2"):
        built(num_views=3)(features(1))
    with pytest.raises(ShapeError, match=r"reads level l4\.b"):
        built()({name: level for name, level in features().items() if name != "l4.b"})


def test_every_level_reaches_the_logits() -> None:
    network, clean = built(), features()
    for name in clean:
        changed = network({**clean, name: clean[name] + torch.randn(clean[name].shape)})
        assert not torch.allclose(changed, network(clean)), name


def test_an_interpreter_is_the_same_after_its_folder(tmp_path: Path) -> None:
    network = built(kind="classes", num_views=2)
    save_interpreter(network, {"scores": {"miou": 0.5}}, tmp_path)
    loaded = load_interpreter(tmp_path)
    assert loaded.network.spec == network.spec and loaded.record == {"scores": {"miou": 0.5}}
    assert torch.equal(loaded.network(features(2)), network(features(2)))
    save_interpreter(network, {"scores": {"miou": 0.6}}, tmp_path)
    assert load_interpreter(tmp_path).digest == loaded.digest  # scores change no logit
    save_interpreter(built(dropout=0.2, kind="classes", num_views=2), {}, tmp_path)
    assert load_interpreter(tmp_path).digest != loaded.digest


@pytest.mark.parametrize("name", [INTERPRETER_RECORD, WEIGHTS])
def test_a_changed_byte_of_an_interpreter_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no interpreter"):
        load_interpreter(tmp_path)
    save_interpreter(built(), {}, tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedDataError, match="train the interpreter again"):
        load_interpreter(tmp_path)
