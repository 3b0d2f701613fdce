"""A predictor is the tuned network in a folder: the same weights and predictions, nothing of it run, damage named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dtpipe.distill.downstream.tuned.load import load_tuned
from dtpipe.distill.export import predictor as module
from dtpipe.distill.export.predictor import export_predictor, load_predictor
from dtpipe.distill.stream.batch import scaled
from dtpipe.manifests.errors import ConfigError, DamagedDataError, DeviceMemoryError, ExportError, InputError
from parts.damage import flip
from parts.predictors import train_cell

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that keeps an average of its weights."""
    return train_cell(tmp_path_factory.mktemp("runs") / "cell", "segment", ema_decay=0.5)


@pytest.fixture(scope="module")
def folder(cell: Path) -> Path:
    export_predictor(cell, cell.parent / "predictor")
    return cell.parent / "predictor"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_predictor_says_what_the_tuned_network_says(cell: Path, folder: Path) -> None:
    """Of the average of the weights, on an image of another size than those of training."""
    tuned, predictor = load_tuned(cell), load_predictor(folder)
    assert (predictor.task.name, predictor.classes) == (tuned.task.name, tuned.classes)
    assert predictor.config.identity() == tuned.config.identity()
    with torch.inference_mode():
        (expected,) = tuned.network.predict([scaled(torch.tensor(IMAGE)[None])[0]])
    (prediction,) = predictor.predict([IMAGE])
    assert prediction.numbers.shape == (40, 56)
    np.testing.assert_array_equal(prediction.numbers, expected.numbers)
    last = load_tuned(cell, ema=False).network.state_dict()
    assert any(not torch.equal(last[name], weight) for name, weight in load_file(folder / "model.safetensors").items())


def test_a_predictor_is_whole_without_its_run_and_nothing_is_unpickled(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_predictor(copy).predict([IMAGE])[0].numbers

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("something was unpickled")

    for loader in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(loader, refuse)
    np.testing.assert_array_equal(load_predictor(copy).predict([IMAGE])[0].numbers, expected)
    assert sorted(path.suffix for path in copy.iterdir()) == [".json", ".safetensors"]


@pytest.mark.parametrize(
    ("file", "place"), [("model.safetensors", -1), ("model.safetensors", 40), ("predictor.json", 60)]
)
def test_a_changed_byte_is_found(file: str, place: int, copy: Path) -> None:
    flip(copy / file, place)
    with pytest.raises(DamagedDataError, match=rf"{file}.*export the predictor again"):
        load_predictor(copy)


def test_weights_of_another_predictor_are_found(copy: Path, cell: Path, tmp_path: Path) -> None:
    export_predictor(cell, tmp_path / "other", ema=False)
    shutil.copyfile(tmp_path / "other" / "model.safetensors", copy / "model.safetensors")
    with pytest.raises(DamagedDataError, match=r"is not the file that predictor.json names"):
        load_predictor(copy)


def test_what_is_no_predictor_is_said_with_the_command_that_makes_one(cell: Path, tmp_path: Path) -> None:
    for path in (tmp_path, cell, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"holds no predictor; `dtpipe export .* --head"):
            load_predictor(path)


def test_a_run_of_distillation_has_no_head_to_export(tmp_path: Path) -> None:
    from parts.memory import write_student

    write_student(tmp_path / "run" / "last.pt", "test_resnet")
    with pytest.raises(InputError, match=r"last\.pt"):
        export_predictor(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out" / "predictor.json").exists()


def test_a_folder_of_something_else_is_refused_and_a_predictor_is_replaced(
    cell: Path, copy: Path, tmp_path: Path
) -> None:
    assert export_predictor(cell, copy, ema=False).digest != json.loads((copy / "predictor.json").read_text())["task"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes holds what dtpipe export --head did not write"):
        export_predictor(cell, tmp_path / "notes")


def test_a_predictor_that_differs_is_not_written(cell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faithful = module.save_file

    def corrupt(weights: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        name = next(name for name, weight in weights.items() if name.startswith("head") and weight.is_floating_point())
        faithful(weights | {name: weights[name] * 1.01}, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", corrupt)
    with pytest.raises(ExportError, match=r"the loaded predictor differs in head\."):
        export_predictor(cell, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_images_without_room_say_what_to_lower(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = load_predictor(folder)
    monkeypatch.setattr(predictor.network, "predict", lambda _images: torch.empty(1 << 55))
    with pytest.raises(DeviceMemoryError, match=r"predicting: cpu has no memory for 2 images .* smaller --batch-size"):
        predictor.predict([IMAGE, IMAGE])
