"""The interpreter against the paper's layers by hand, its shapes, and its folder, where no changed byte is unseen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dtpipe.distill.labels.files import INTERPRETER_RECORD, load_interpreter, save_interpreter
from dtpipe.distill.labels.head import OpenHead, label_level
from dtpipe.distill.labels.interpreter import FeatureInterpreter, InterpreterLevel, InterpreterSpec, views_in_channels
from dtpipe.distill.student.load import WEIGHTS
from dtpipe.manifests.errors import DamagedDataError, InputError, ShapeError
from dtpipe.manifests.labels import ClassTable
from dtpipe.manifests.schema import ViewSpec
from dtpipe.manifests.soft_labels import label_views
from parts.memory import level_spec

LEVELS = (InterpreterLevel("l2", 4, 6), InterpreterLevel("l4", 16, 10), InterpreterLevel("l4.b", 16, 3))
PYRAMID = (InterpreterLevel("l2", 4, 6), InterpreterLevel("l3", 8, 5), InterpreterLevel("l4", 16, 10))


def spec(**changes: object) -> InterpreterSpec:
    return InterpreterSpec(**{"levels": LEVELS, "classes": ClassTable(("sky", "sea")), "width": 32} | changes)  # type: ignore[arg-type]


def features(num_views: int = 1, levels: tuple[InterpreterLevel, ...] = LEVELS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def view(level: InterpreterLevel) -> torch.Tensor:
        return torch.randn(2, level.channels, 64 // level.stride, 32 // level.stride, generator=generator)

    return views_in_channels({level.name: [view(level) for _ in range(num_views)] for level in levels})


def built(**changes: object) -> FeatureInterpreter:
    torch.manual_seed(0)
    return FeatureInterpreter(spec(**changes)).eval()


def stirred(**changes: object) -> FeatureInterpreter:
    """An interpreter of the pyramid in which every weight matters, those of norms too."""
    network = built(levels=PYRAMID, dropout=0.5, **changes)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    return network


def by_hand(network: FeatureInterpreter, levels: dict[str, torch.Tensor], num_groups: int) -> np.ndarray:
    """Logits of the pyramid, section 3.2 layer by layer in float64.

    Shapes: {level: (B, C, h, w)} -> (B, K, H, W), or (B, K, 1, 1) of classes.
    """
    weights = {name: tensor.double().numpy() for name, tensor in network.state_dict().items()}

    def mixed(values: np.ndarray, name: str) -> np.ndarray:
        return np.einsum("oi,bihw->bohw", weights[f"{name}.weight"][:, :, 0, 0], values)

    def by_channel(values: np.ndarray, name: str) -> np.ndarray:
        (height, width), kernel = values.shape[-2:], weights[f"{name}.weight"]  # (C, 1, 3, 3)
        padded = np.pad(values, ((0, 0), (0, 0), (1, 1), (1, 1)))
        shifted = [padded[..., y : y + height, x : x + width] * kernel[:, :, y, x, None] for y, x in np.ndindex(3, 3)]
        return np.sum(shifted, axis=0)

    def norm_swish(values: np.ndarray, name: str) -> np.ndarray:
        groups = values.reshape(len(values), num_groups, -1)
        white = (groups - groups.mean(axis=2, keepdims=True)) / np.sqrt(groups.var(axis=2, keepdims=True) + 1e-5)
        gain, bias = (weights[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        scaled = white.reshape(values.shape) * gain + bias
        return scaled / (1 + np.exp(-scaled))

    def doubled(values: np.ndarray) -> np.ndarray:
        rows, columns = (
            [np.interp(np.arange(2 * num) / 2 - 0.25, np.arange(num), unit) for unit in np.eye(num)]
            for num in values.shape[-2:]
        )
        return np.einsum("bchw,hy,wx->bcyx", values, rows, columns)

    laterals = [
        norm_swish(mixed(levels[name].double().numpy(), f"laterals.{idx}.0"), f"laterals.{idx}.1")
        for idx, name in enumerate(("l4", "l3", "l2"))
    ]
    fused = laterals[0]
    for idx, lateral in enumerate(laterals[1:]):
        joined = np.concatenate([doubled(fused), lateral], axis=1)
        fused = norm_swish(mixed(by_channel(joined, f"fusions.{idx}.0"), f"fusions.{idx}.1"), f"fusions.{idx}.2")
    if network.spec.kind == "classes":
        fused = fused.mean(axis=(2, 3), keepdims=True)
    return mixed(fused, "classifier") + weights["classifier.bias"][:, None, None]


@pytest.mark.parametrize(
    ("width", "num_groups", "kind"), [(256, 32, "masks"), (128, 32, "masks"), (32, 8, "masks"), (32, 8, "classes")]
)
def test_logits_are_those_of_the_papers_layers_by_hand(width: int, num_groups: int, kind: str) -> None:
    """Both in float64; logits leave in float32, which rounds by 6e-8."""
    network, levels = stirred(width=width, kind=kind), features(levels=PYRAMID)
    norms = [module for module in network.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [num_groups] * 5
    logits = network.double()({name: level.double() for name, level in levels.items()})
    np.testing.assert_allclose(logits.detach(), by_hand(network, levels, num_groups), rtol=1e-6)


def test_soft_labels_are_the_mean_of_the_logits_in_each_cell() -> None:
    """Two views of two images, in a batch with room for three; float32 keeps 1e-5 of the largest."""
    network, size = stirred(), (64, 32)
    read = [level_spec(level.name, level.stride, level.channels, size) for level in PYRAMID]
    level = label_level(network.spec, read, size, stride=8)
    head = OpenHead(network, level, label_views([ViewSpec(draw=0), ViewSpec(draw=1)], 1), "cpu")
    views = {name: values.unflatten(1, (2, -1)) for name, values in features(2, PYRAMID).items()}  # (B, V, C, h, w)
    labels = head.soft_labels(views, 3)["l3.labels"]
    assert labels.shape == (2, 2, 2, 8, 4)
    for view in (0, 1):
        logits = by_hand(network, {name: values[:, view] for name, values in views.items()}, 8)
        cells = logits.reshape(2, 2, 8, 2, 4, 2).mean(axis=(3, 5))
        np.testing.assert_allclose(labels[:, view], cells, rtol=1e-5, atol=1e-5 * np.abs(cells).max())


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
