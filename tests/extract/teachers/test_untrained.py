"""Teachers without training: every family draws new weights from a seed, as its authors' code begins with them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers import registry
from dtpipe.extract.teachers.base import Generator, TeacherKind
from dtpipe.extract.teachers.biggan.initial import initial_biggan_weight
from dtpipe.extract.teachers.diffusion.adm.keys import initial_adm_weight
from dtpipe.extract.teachers.files.untrained import redrawn, torchs_default
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.extract.teachers.stylegan2.initial import initial_stylegan2_weights
from dtpipe.manifests.errors import TeacherError
from dtpipe.manifests.read.source import read_images, read_level
from dtpipe.manifests.schema import ViewSpec
from parts.extractions import Extract
from parts.tiny_teachers import MAKERS, TinyDecoder, TinyTeacher
from parts.tiny_teachers import module as make_module


def untrained(tiny: TinyTeacher, seed: int | None) -> TeacherConfig:
    return tiny.config().model_copy(update={"untrained": seed})


def features(teacher: Any, px: int | tuple[int, int]) -> dict[str, torch.Tensor]:
    spec = teacher.spec
    size = px if isinstance(px, tuple) else (px, px)
    generator = torch.Generator().manual_seed(0)
    if isinstance(teacher, Generator):
        noise = {name: torch.randn(2, *shape, generator=generator) for name, shape in spec.noise_shapes.items()}
        return teacher.synthesize(noise)[1]
    view = ViewSpec(draw=0, timestep=50 if spec.num_timesteps else None)
    shapes = {
        name: [side if side > 0 else px // -side for side, px in zip(shape, (1, *size), strict=True)]
        for name, shape in spec.noise_shapes.items()
    }
    noise = {name: torch.randn(2, 1, *shape, generator=generator) for name, shape in shapes.items()}
    return teacher.encode(torch.rand(2, 3, *size, generator=generator) * 2 - 1, noise, [view])


@pytest.mark.parametrize("family", sorted(MAKERS.keys() - {"null"}))
def test_weights_follow_the_seed_and_nothing_else(family: str, tmp_path: Path) -> None:
    tiny = MAKERS[family](tmp_path)
    trained = load_teacher(tiny.config()).spec
    teachers = [load_teacher(untrained(tiny, seed)) for seed in (7, 7, 8)]
    first, again, other = (teacher.spec for teacher in teachers)
    assert first.weights_blake3 == again.weights_blake3
    assert len({trained.weights_blake3, first.weights_blake3, other.weights_blake3}) == 3
    assert "untrained" not in trained.options
    assert (first.options["untrained"], other.options["untrained"]) == (7, 8)
    assert (first.levels, first.noise_shapes) == (trained.levels, trained.noise_shapes)
    levels, twin = features(teachers[0], tiny.px), features(teachers[1], tiny.px)
    assert all(torch.equal(levels[name], twin[name]) and bool(levels[name].isfinite().all()) for name in levels)
    assert all(float(level.float().std()) > 0 for level in levels.values())


@pytest.mark.parametrize(("family", "network"), [("ddpm", UNet2DModel), ("vae", AutoencoderKL)])
def test_diffusers_networks_begin_as_diffusers_begins_them(family: str, network: Any, tmp_path: Path) -> None:
    tiny = MAKERS[family](tmp_path)
    teacher: Any = load_teacher(untrained(tiny, 3))
    folder = tiny.path / "unet" if family == "ddpm" else tiny.path
    torch.manual_seed(3)
    expected = network.from_config(network.load_config(folder)).state_dict()
    loaded = (teacher.unet if family == "ddpm" else teacher.network).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_adm_begins_as_torch_does_with_zeros_at_the_end_of_each_block() -> None:
    """Uniform within 1/sqrt(fan in), of deviation bound / sqrt(3); 20 % over 4,608 and 96 numbers."""
    shapes: dict[str, tuple[int, ...]] = {
        "input_blocks.1.0.in_layers.2.weight": (32, 16, 3, 3),
        "input_blocks.1.0.in_layers.2.bias": (96,),
        "input_blocks.1.0.in_layers.0.weight": (16,),
        "input_blocks.1.0.in_layers.0.bias": (16,),
        "input_blocks.1.0.out_layers.3.weight": (32, 32, 3, 3),
        "input_blocks.1.1.proj_out.bias": (32,),
        "out.2.weight": (6, 16, 3, 3),
        "label_emb.weight": (500, 8),
    }
    drawn = redrawn({name: torch.zeros(shape) for name, shape in shapes.items()}, initial_adm_weight, 0)
    convolution = torch.nn.Conv2d(16, 32, 3)
    for leaf, own in (("weight", convolution.weight), ("bias", convolution.bias)):
        tensor, bound = drawn[f"input_blocks.1.0.in_layers.2.{leaf}"], 1 / math.sqrt(16 * 9)
        assert own is not None and float(own.detach().abs().max()) <= bound
        assert float(tensor.abs().max()) <= bound
        assert float(tensor.std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)
    assert bool((drawn["input_blocks.1.0.in_layers.0.weight"] == 1).all())
    assert not drawn["input_blocks.1.0.in_layers.0.bias"].any()
    assert not any(
        drawn[name].any() for name in shapes if "out_layers.3" in name or "proj_out" in name or "out.2" in name
    )
    assert float(drawn["label_emb.weight"].std()) == pytest.approx(1, rel=0.1)


def test_biggan_begins_orthogonal_without_statistics() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "blocks.0.0.conv1.weight": (8, 4, 3, 3),
        "blocks.0.0.conv1.bias": (64,),
        "blocks.0.0.conv1.u0": (1, 8),
        "blocks.0.0.conv1.sv0": (1,),
        "blocks.0.0.bn1.stored_mean": (4,),
        "blocks.0.0.bn1.stored_var": (4,),
        "blocks.0.1.gamma": (),
        "output_layer.0.gain": (4,),
        "output_layer.0.bias": (4,),
    }
    drawn = redrawn({name: torch.full(shape, 7.0) for name, shape in shapes.items()}, initial_biggan_weight, 0)
    rows = drawn["blocks.0.0.conv1.weight"].flatten(1)
    assert torch.allclose(rows @ rows.T, torch.eye(8), atol=1e-5)
    assert float(drawn["blocks.0.0.conv1.bias"].abs().max()) <= 1 / 6 and drawn["blocks.0.0.conv1.u0"].std() > 0
    fixed = {"sv0": 1, "bn1.stored_mean": 0, "bn1.stored_var": 1, "1.gamma": 0, "0.gain": 1, "layer.0.bias": 0}
    for ending, value in fixed.items():
        (tensor,) = [tensor for name, tensor in drawn.items() if name.endswith(ending)]
        assert bool((tensor == value).all()), ending


def test_stylegan2_begins_normal_over_the_learning_rate_with_biases_of_one_where_channels_are_scaled() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "mapping.fc0.weight": (64, 64),
        "mapping.fc0.bias": (64,),
        "mapping.w_avg": (64,),
        "synthesis.b4.const": (64, 4, 4),
        "synthesis.b8.conv0.affine.weight": (64, 64),
        "synthesis.b8.conv0.affine.bias": (64,),
        "synthesis.b8.conv0.noise_strength": (),
    }
    drawn = redrawn(
        {name: torch.full(shape, 7.0) for name, shape in shapes.items()}, initial_stylegan2_weights(0.01), 0
    )
    deviations = {
        name.rpartition(".")[0].rpartition(".")[2]: float(drawn[name].std())
        for name in shapes
        if name.endswith("weight")
    }
    assert deviations["fc0"] == pytest.approx(100, rel=0.1) and deviations["affine"] == pytest.approx(1, rel=0.1)
    assert bool((drawn["synthesis.b8.conv0.affine.bias"] == 1).all())
    assert not any(
        drawn[name].any() for name in ("mapping.fc0.bias", "mapping.w_avg", "synthesis.b8.conv0.noise_strength")
    )
    assert float(drawn["synthesis.b4.const"].std()) == pytest.approx(1, rel=0.1)


class Unseeded(TinyDecoder):
    """Draws weights by another generator than torch's global one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.fine.bias.copy_(torch.from_numpy(np.random.default_rng().random(3, np.float32)))


def test_a_module_that_draws_otherwise_is_refused(tmp_path: Path) -> None:
    tiny = make_module(tmp_path, Unseeded)
    with pytest.raises(TeacherError, match="begins with other weights each time, whatever torch's seed is"):
        load_teacher(untrained(tiny, 0))


def test_a_family_that_does_not_say_how_it_begins_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = MAKERS["ddpm"](tmp_path)
    kind: TeacherKind = replace(registry.KINDS["ddpm"], untrained=False)
    monkeypatch.setattr(registry, "KINDS", {"ddpm": kind})
    with pytest.raises(TeacherError, match=r"kind ddpm does not say what its weights are before training; leave out"):
        load_teacher(untrained(tiny, 0))


def test_drawing_leaves_torchs_generator_as_it_was() -> None:
    before = torch.random.get_rng_state()
    drawn = [redrawn({"a.weight": torch.zeros(4, 4)}, torchs_default, seed)["a.weight"] for seed in (1, 1, 2, None)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]) and not drawn[3].any()
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_dataset_of_an_untrained_teacher_is_made_again_and_says_what_it_is(extract: Extract, ddpm: Path) -> None:
    from click.testing import CliRunner

    from dtpipe.manifests.read.dataset import FeatureDataset
    from dtpipe.pipeline.commands.inspect import command as inspect
    from dtpipe.pipeline.live.recompute import Recomputation

    first, second = (extract(name, teacher={"path": str(ddpm), "untrained": 5}) for name in ("first", "second"))
    trained = FeatureDataset.open(extract("trained"))
    dataset = FeatureDataset.open(first)
    assert dataset.manifest is not None and trained.manifest is not None
    assert dataset.manifest.digest == FeatureDataset.open(second).manifest.digest  # type: ignore[union-attr]
    assert dataset.recipe.teacher.options["untrained"] == 5 and dataset.manifest.digest != trained.manifest.digest
    assert "untrained" not in trained.recipe.teacher.options
    rows = dataset.columns.ok_rows[:2]
    keys = [dataset.columns.keys[row] for row in rows]
    again = Recomputation(first, None, "cpu")(read_images(dataset, rows), keys, dataset.recipe.compute.batch_size)
    for name, levels in again.items():  # float16 of what is computed
        assert np.array_equal(levels[:, 0].astype(np.float16), [read_level(dataset, name, int(row)) for row in rows])
    shown = CliRunner().invoke(inspect, [first])
    assert "ddpm, UNTRAINED: new weights from seed 5, weights " in shown.output
