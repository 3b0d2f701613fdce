"""Device mistakes, found without a GPU: what computes does so on tensors of a GPU that is not there.

The registries say what there is, so that a new family, codec, loss or regressor is run at once. Values are not
computed: what they are is tested elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dtpipe.distill.config import LossConfig, RegressorConfig
from dtpipe.distill.downstream.extractors import student_extractor
from dtpipe.distill.downstream.frozen.knn import knn_votes
from dtpipe.distill.downstream.frozen.linear import LinearClassifier, _round_units
from dtpipe.distill.downstream.frozen.readout import Readout, masks_at_stride
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.heads.classifier import CLASS
from dtpipe.distill.downstream.tuned.segmentation.inference import Views, class_probabilities
from dtpipe.distill.downstream.tuned.segmentation.network import MASK_TARGET, build_upernet
from dtpipe.distill.downstream.tuned.tasks.finetune import build_classifier, mix_classes
from dtpipe.distill.engine.optim import build_optimizer
from dtpipe.distill.losses.base import LossKind
from dtpipe.distill.losses.features import feature_loss
from dtpipe.distill.losses.registry import LOSSES
from dtpipe.distill.losses.whitening import ChannelStatistics, Whitener, Whitening
from dtpipe.distill.stream.batch import flip_where, mirror_where, student_images
from dtpipe.distill.stream.decode import SentLevels
from dtpipe.distill.stream.live import LiveSamples
from dtpipe.distill.stream.transfer import DeviceCopies, Sent
from dtpipe.distill.student.distiller import Distiller, build_distiller, freeze_unused
from dtpipe.distill.student.regressor import FeatureRegressor, TargetLevel
from dtpipe.distill.student.regressors.base import RegressorKind, lateral
from dtpipe.distill.student.regressors.registry import REGRESSORS
from dtpipe.distill.student.student import StudentSpec, build_student
from dtpipe.distill.teacher.data import NoiseBatch
from dtpipe.distill.teacher.trainer import TeacherTraining
from dtpipe.extract.encode import Rows, Sample, encode, stack_rows
from dtpipe.extract.noise import row_noise
from dtpipe.extract.shards.codecs import encode_on_device
from dtpipe.extract.teachers.base import Teacher
from dtpipe.extract.teachers.registry import KINDS, load_teacher
from dtpipe.manifests.codecs.base import LevelCodec, encode_level
from dtpipe.manifests.codecs.coded import CodedLevels, CodedPiece
from dtpipe.manifests.codecs.fit import FitTarget
from dtpipe.manifests.codecs.registry import CODECS, is_fitted_codec, open_codec
from dtpipe.manifests.labels import ClassTable
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import LATENT_SUFFIX, CodecSpec, ComputeRecipe, ViewSpec
from dtpipe.pipeline.live import recorded
from dtpipe.pipeline.live.teacher import open_live
from parts.ddpm_training import noise_images, tiny_teacher
from parts.extractions import Extract
from parts.fake_device import CUDA, META, blank, moved_to, running_on
from parts.fits import fitted_codec, smooth_features
from parts.memory import level_spec, tiny_config
from parts.tiny_teachers import MAKERS, TinyDecoder, TinyTeacher, module

MIXED = r"same device|at least two devices"
LEVELS = (level_spec("l2", 4, 6), level_spec("l3", 8, 8), level_spec("l4", 16, 10))  # of images of 32 px
TinyOf = Callable[[str], TinyTeacher]


def on(device: str, values: Mapping[str, Tensor]) -> bool:
    return len(values) > 0 and {value.device.type for value in values.values()} == {device}


# Teachers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyOf:
    """A tiny checkpoint of each family, made once."""
    made: dict[str, TinyTeacher] = {}

    def make(kind: str) -> TinyTeacher:
        if kind not in MAKERS:
            pytest.fail(
                f"teacher family {kind} has no tiny checkpoint: add a maker to MAKERS in parts/tiny_teachers.py"
            )
        if kind not in made:
            made[kind] = MAKERS[kind](tmp_path_factory.mktemp(kind))
        return made[kind]

    return make


LONGEST_WAY: dict[str, dict[str, Any]] = {
    "adm": {"encoding": "ddim_inversion", "clip_denoised": True},
    "ddpm": {"ensemble": 2},
    "stable_diffusion": {"encoding": "ddim_inversion", "keep_latents": True, "latent": "sampled"},
}
"""Options with which most of a family's code is run."""


def row_of(teacher: Teacher, tiny: TinyTeacher) -> Rows:
    """Image and noise of one row on the host, as a worker stacks them."""
    px = tiny.px if isinstance(tiny.px, tuple) else (tiny.px, tiny.px)
    timestep = None if teacher.spec.num_timesteps is None else 10
    views = [ViewSpec(draw=0, timestep=timestep, flip=not tiny.synthesizes)]
    image = None if tiny.synthesizes else np.zeros((*px, 3), np.uint8)
    return stack_rows([Sample(row_noise(0, "key", views, teacher.spec.noise_shapes, px), image)], views, ())


def encoded(tiny: TinyTeacher, dtype: str = "float32", **options: Any) -> dict[str, Tensor]:
    """Levels of one row in a batch of two, the other being padding, by a teacher that was loaded on the GPU."""
    with moved_to(CUDA):
        teacher = load_teacher(tiny.config(dtype, **options), CUDA)
    rows, compute = row_of(teacher, tiny), ComputeRecipe(device=CUDA, batch_size=2, threads=1)
    with running_on(CUDA):
        levels = encode(teacher, rows, CUDA, compute).levels
        if "keep_latents" in options:
            (latent,) = (level for name, level in levels.items() if name.endswith(LATENT_SUFFIX))
            levels = encode(teacher, replace(rows, latents={True: latent[:, 0]}), CUDA).levels
    return levels


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_computes_where_it_was_loaded(tiny: TinyOf, kind: str) -> None:
    levels = encoded(tiny(kind), "float16", **LONGEST_WAY.get(kind, {}))
    assert on(CUDA, levels)
    assert {level.shape[:2] for level in levels.values()} == {(1, 1)}


def test_a_family_without_a_tiny_checkpoint_is_named(tiny: TinyOf) -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"family new has no tiny checkpoint: add a maker to MAKERS in parts"
    ):
        tiny("new")


class MakesOnTheCpu(TinyDecoder):
    """A tensor that is made in the pass, on the CPU."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z + torch.linspace(0, 1, 6)[None, :, None, None])


class KeepsOnTheCpu(TinyDecoder):
    """A tensor that is no buffer, so that it stays where it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = [torch.ones(3, 1, 1)]

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) + self.shift[0]


@pytest.mark.parametrize("network", [MakesOnTheCpu, KeepsOnTheCpu])
def test_a_network_with_a_tensor_on_the_cpu_is_found(network: type[nn.Module], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=MIXED):
        encoded(module(tmp_path, network))


def test_live_features_are_made_where_the_student_is_trained(extract: Extract, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "pick_device", lambda name: name)  # which looks for a GPU
    dataset = FeatureDataset.open(extract())
    keys = tuple(str(key) for key in dataset.columns.keys[:3])
    samples = LiveSamples(keys, np.zeros(3, np.int64), np.array([True, False, True]), np.arange(3))
    with moved_to(CUDA):
        live = open_live({}, dataset, torch.device(CUDA))
        prepared = live.prepare(samples)
    with running_on(CUDA):
        shown, levels = live.encode(blank(CUDA, 3, 32, 32, 3, dtype=torch.uint8), samples, prepared)
    assert on(CUDA, {**levels, "images": shown})


# Codecs


class FakeCopies(DeviceCopies):
    """As on a GPU, without its streams."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def send(self, arrays: Mapping[str, np.ndarray]) -> Sent:
        with running_on(CUDA):
            return Sent({name: torch.from_numpy(array).to(CUDA) for name, array in arrays.items()}, None)


OF_CODEC: dict[str, dict[str, Any]] = {
    "topk": {"role": "soft_labels", "codec": CodecSpec(name="topk", parameters={"k": 2})}
}
"""What a level needs that lies under a codec with parameters."""


def opened_codec(name: str, dtype: str) -> LevelCodec:
    """The codec of a level of 6 channels and 8x8 cells, fitted where it is to be."""
    if is_fitted_codec(name):
        return fitted_codec(smooth_features(16), FitTarget(relative_mse=0.05), name, dtype)
    return open_codec(level_spec("l2", 4, 6, dtype=dtype, **OF_CODEC.get(name, {"codec": CodecSpec(name=name)})))


@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", CODECS)
def test_a_codec_works_where_the_features_are(
    name: str, dtype: str, float64: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not float64:
        monkeypatch.setattr("dtpipe.extract.shards.codecs._WITHOUT_FLOAT64", {CUDA})
        monkeypatch.setattr("dtpipe.distill.stream.decode._bases", {})
    codec = opened_codec(name, dtype)
    with running_on(CUDA, float64):
        parts, finite = encode_on_device(codec, blank(CUDA, 3, 2, 6, 8, 8))
    assert on(CUDA, {**parts, "finite": finite})
    pieces = [
        CodedPiece(codec, encode_level(codec, np.zeros((len(rows), 6, 8, 8), np.float32)), np.array(rows))
        for rows in ([2, 0], [1])
    ]
    whole = CodedPiece(codec, encode_level(codec, np.zeros((3, 6, 8, 8), np.float32)))
    copies = FakeCopies()
    sent = SentLevels.send(CodedLevels(3, {"l2": pieces, "l3": [whole]}), copies)
    with running_on(CUDA, float64):
        levels = sent.receive(copies)
    assert on(CUDA, levels)
    assert {(level.shape, level.dtype) for level in levels.values()} == {((3, 6, 8, 8), getattr(torch, dtype))}


def test_the_fake_of_a_device_without_float64_has_none() -> None:
    values = blank(CUDA, 2)
    with running_on(CUDA, float64=False), pytest.raises(TypeError, match="cuda has no float64, and double makes"):
        values.double()


# Student, regressors, losses


def regressed(kind: str, strides: tuple[int, ...]) -> dict[str, Tensor]:
    targets = [TargetLevel(level.name, level.stride, level.channels, (level.height, level.width)) for level in LEVELS]
    with moved_to(CUDA):
        regressor = FeatureRegressor(strides, [5] * len(strides), targets, RegressorConfig(width=8, kind=kind)).to(CUDA)
    with running_on(CUDA):
        levels: dict[str, Tensor] = regressor([blank(CUDA, 2, 5, 64 // stride, 64 // stride) for stride in strides])
    return levels


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (16,)], ids=["levels", "pyramid"])
@pytest.mark.parametrize("kind", REGRESSORS)
def test_a_regressor_computes_where_the_levels_are(kind: str, strides: tuple[int, ...]) -> None:
    assert on(CUDA, regressed(kind, strides))


def loss_of(kind: LossKind, whitening: Whitening = "layer") -> Tensor:
    known = {"l2": ChannelStatistics(2, torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64))}
    with running_on(CUDA):
        whitener = Whitener(whitening, known, torch.device(CUDA))
        teacher = blank(CUDA, 2, 6, 8, 8, dtype=torch.float16)
        white = whitener("l2", teacher)
        assert on(CUDA, {"spread": whitener.spread("l2", white)})
        return kind.build(LossConfig())(blank(CUDA, 2, 6, 8, 8), teacher, white)


@pytest.mark.parametrize("whitening", get_args(Whitening))
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_computed_where_the_levels_are(name: str, whitening: Whitening) -> None:
    value = loss_of(LOSSES[name], whitening)
    assert (value.device.type, value.shape) == (CUDA, ())


def test_statistics_and_units_of_a_probe_need_no_float64_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtpipe.distill.engine.device._WITHOUT_FLOAT64", {CUDA})
    with running_on(CUDA, float64=False):
        statistics = ChannelStatistics.of(blank(CUDA, 2, 6, 8, 8, dtype=torch.float16))
        units = _round_units(blank(CUDA, 6, 6), 0.25, 0.1)
    assert on("cpu", {"mean": statistics.mean, "variance": statistics.variance})
    assert on(CUDA, {"units": units})


def test_a_loss_or_regressor_with_a_tensor_on_the_cpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def weighted(student: Tensor, teacher: Tensor, white: Tensor) -> Tensor:
        return ((student - teacher) * torch.linspace(0, 1, 6)[:, None, None]).mean()

    with pytest.raises(RuntimeError, match=MIXED):
        loss_of(LossKind("weighted", "", lambda _config: weighted))
    kept = torch.ones(8, 1, 1)
    shifted = RegressorKind("shifted", "", lambda channels, config: Shifted(lateral(channels, config), kept))
    monkeypatch.setitem(REGRESSORS, "shifted", shifted)
    with pytest.raises(RuntimeError, match=MIXED):
        regressed("shifted", (4, 8, 16))


class Shifted(nn.Module):
    """A constant that is no buffer behind a layer."""

    def __init__(self, layer: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.layer, self.shift = layer, shift

    def forward(self, hidden: Tensor) -> Tensor:
        shifted: Tensor = self.layer(hidden) + self.shift
        return shifted


def every_loss() -> LossConfig:
    return LossConfig.model_validate({f"{name}_weight": 1.0 for name in LOSSES})


def losses_of(model: Distiller, device: str) -> Tensor:
    """The sum of all losses of four images, some of them flipped."""
    flip = blank(device, 4, dtype=torch.bool)
    images = flip_where(blank(device, 4, 64, 64, 3, dtype=torch.uint8), flip)
    levels = {
        level.name: mirror_where(blank(device, 4, level.channels, level.height, level.width, dtype=torch.float16), flip)
        for level in LEVELS
    }
    loss = feature_loss(model(student_images(images, (32, 32))), levels, every_loss(), {"l2": 2.0})
    assert on(device, {"total": loss.total, **loss.terms, **loss.levels})
    return loss.total


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_student_gives_levels_where_it_is(name: str, tmp_path: Path) -> None:
    with moved_to(CUDA):
        model = build_distiller(tiny_config(tmp_path, student={"name": name}), LEVELS, (32, 32)).to(CUDA).train()
    with running_on(CUDA):
        losses_of(model, CUDA)
    assert on(CUDA, dict(model.named_buffers()))


def test_a_student_is_trained_where_it_is(tmp_path: Path) -> None:
    """Whole steps, where torch needs no driver for the backward pass."""
    with moved_to(META):
        model = build_distiller(tiny_config(tmp_path), LEVELS, (32, 32)).to(META).train()
        optimizers = [build_optimizer(model, opt, 1e-3, 0.05, (0.9, 0.95)) for opt in ("adamw", "lamb")]
    with running_on(META):
        freeze_unused(model, torch.device(META))
        losses_of(model, META).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert on(META, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})


def test_cells_and_levels_of_a_frozen_student_are_where_it_is() -> None:
    with moved_to(CUDA):
        extractor = student_extractor(build_student(StudentSpec("test_resnet", 4, (32, 32))), CUDA)
    with running_on(CUDA):
        cells = masks_at_stride(blank(CUDA, 4, 64, 64, dtype=torch.int64), 4, 3)
        levels = extractor(blank(CUDA, 4, 64, 64, 3, dtype=torch.uint8))
    assert on(CUDA, {"cells": cells, **levels})


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_classes_are_learnt_and_seen_where_the_student_is(name: str) -> None:
    config = TuneConfig.model_validate(
        {"steps": 1, "augment": {"crop_px": [32, 32], "mixup": 0.8}, "inference": {"flips": True}}
    )
    table = ClassTable.numbered(3)
    with moved_to(CUDA):
        network = build_classifier(build_student(StudentSpec(name, 4, (32, 32))), table, config).to(CUDA).train()
    mix = mix_classes(table, config)
    assert mix is not None
    with running_on(CUDA):
        images, targets = mix(blank(CUDA, 3, 3, 32, 32), [{CLASS: blank(CUDA, dtype=torch.int64)}] * 3)
        losses = network(list(images), targets)
    assert on(CUDA, losses)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_masks_are_learnt_and_seen_where_the_student_is(name: str) -> None:
    """Through windows, mirrored and at two sizes."""
    config = TuneConfig.model_validate({"steps": 1, "head": {"width": 8}})
    views = Views(scales=(1.0, 1.5), flips=True, window_px=(64, 64))
    with moved_to(CUDA):
        student = build_student(StudentSpec(name, 4, (64, 64)))
        network = build_upernet(student, ClassTable.numbered(3), config).to(CUDA).train()
    with running_on(CUDA):
        losses = network([blank(CUDA, 3, 64, 64)] * 2, [{MASK_TARGET: blank(CUDA, 64, 64, dtype=torch.int64)}] * 2)
        seen = list(class_probabilities(network.eval().logits, blank(CUDA, 2, 3, 40, 100), views))
    assert on(CUDA, {**losses, **{str(idx): image for idx, image in enumerate(seen)}})
    assert [tuple(image.shape) for image in seen] == [(3, 40, 100)] * 2


def test_frozen_features_are_classified_where_they_are() -> None:
    with running_on(CUDA):
        features, labels = blank(CUDA, 6, 7), blank(CUDA, 6, dtype=torch.int64)
        readout = Readout({"l2": blank(CUDA, 3, 7), "l3": blank(CUDA, 3, 5)}, blank(CUDA, 3))
        predicted = {
            "votes": knn_votes(features, features, labels, 3, 2, 0.1, leave_one_out=True),
            "cells": readout.logits({"l2": blank(CUDA, 2, 7, 8, 8), "l3": blank(CUDA, 2, 5, 4, 4)}, (8, 8)),
            "classes": LinearClassifier(blank(CUDA, 3, 7), blank(CUDA, 3)).predict(features),
        }
    assert on(CUDA, predicted)


@pytest.mark.parametrize("classes", [False, True])
def test_a_teacher_is_trained_where_it_is(classes: bool) -> None:
    config = tiny_teacher(class_conditional=classes, label_dropout=0.1 if classes else 0.0)
    with moved_to(CUDA):
        training = TeacherTraining(config, noise_images(config), torch.device(CUDA))
    shape = (3, 3, *config.image_px)
    timesteps, labels = (blank(CUDA, 3, dtype=torch.int64) for _ in range(2))
    batch = NoiseBatch(
        blank(CUDA, *shape), timesteps, blank(CUDA, *shape), labels if classes else None, ("a", "b", "c"), 3
    )
    with running_on(CUDA):
        assert on(CUDA, training.losses(batch))
        training.updated(1)
    assert on(CUDA, dict(training.ema.named_parameters()))
