"""Which of timm's models can be students: those with stages as they are, plain transformers by a pyramid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm

from dtpipe.distill.config import LossConfig
from dtpipe.distill.downstream.extractors import student_extractor
from dtpipe.distill.engine.loop import Loop
from dtpipe.distill.engine.progress import Meter
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.losses.registry import LOSSES
from dtpipe.distill.stream.data import OpenedData
from dtpipe.distill.student.distiller import build_distiller
from dtpipe.distill.student.pyramid import SimplePyramid
from dtpipe.distill.student.regressors.registry import REGRESSORS
from dtpipe.distill.student.student import StudentSpec, build_student
from dtpipe.distill.trainer import Distillation
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.schema import LevelSpec
from parts.memory import tiny_config
from parts.runs import train_on

HEIGHT, WIDTH = 64, 96
FOUR = tuple(
    LevelSpec(name=f"l{n}", stride=2**n, channels=n, height=HEIGHT >> n, width=WIDTH >> n, dtype="float32", tap="up")
    for n in (2, 3, 4, 5)
)
STAGED = (
    *(
        "resnet10t",
        "regnetx_002",
        "densenet121",
        "convnext_atto",
        "mambaout_femto",
        "hrnet_w18_small",
        "ese_vovnet19b_slim_dw",
    ),
    *("test_efficientnet", "mobilenetv3_small_050", "ghostnet_050", "edgenext_xx_small", "fastvit_t8", "repvit_m0_9"),
    *("swin_tiny_patch4_window7_224", "pvt_v2_b0", "maxvit_rmlp_pico_rw_256", "coat_lite_tiny"),
)
PLAIN = ("test_vit", "vit_tiny_patch16_224", "xcit_nano_12_p16_224", "mixer_s32_224")


@pytest.mark.parametrize("name", STAGED + PLAIN)
def test_each_student_serves_four_levels_of_an_oblong_image_and_is_trained_whole(name, tmp_path):
    model = build_distiller(tiny_config(tmp_path, student={"name": name}), FOUR, (HEIGHT, WIDTH)).train()
    images = torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    for stride, channels, level in zip(
        model.student.strides, model.student.channels, model.student(images), strict=True
    ):
        assert level.shape == (2, channels, HEIGHT // stride, WIDTH // stride)
    regressed = model(images)
    assert {key: tuple(level.shape[1:]) for key, level in regressed.items()} == {
        s.name: (s.channels, s.height, s.width) for s in FOUR
    }
    assert (model.regressor.pyramid is not None) == (name in PLAIN)
    sum(level.square().mean() for level in regressed.values()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["test_efficientnet", "regnetx_002", "test_vit"])
def test_batch_norms_are_synchronised_by_timms_function(name, tmp_path):
    """torch's own drops the activation that timm's batch norms hold; where nothing is shared, no number changes."""
    model = build_distiller(tiny_config(tmp_path, student={"name": name}), FOUR, (HEIGHT, WIDTH)).train()
    images = torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    before = model(images)
    synced = convert_sync_batchnorm(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in synced.modules())
    for key, level in synced(images).items():
        torch.testing.assert_close(level, before[key], rtol=0, atol=0)


def test_the_pyramid_doubles_by_one_matrix_per_cell_and_halves_by_the_largest_value():
    """A transposed 2x2 convolution of stride 2 is a 1x1 convolution to 4 times the channels, shuffled to pixels."""
    pyramid = SimplePyramid(16, 24, (4, 8, 16, 32), "batch")
    assert pyramid.channels == (6, 12, 24, 24)
    level = torch.randn(2, 24, 3, 5, generator=torch.Generator().manual_seed(0))

    def doubled(conv: torch.nn.ConvTranspose2d, cells: torch.Tensor) -> torch.Tensor:
        matrix = conv.weight.flatten(1).T[:, :, None, None]  # (out * 4, in, 1, 1)
        return F.pixel_shuffle(F.conv2d(cells, matrix, conv.bias.repeat_interleave(4)), 2)

    first, norm, _, second = pyramid.levels[0]
    middle = doubled(first, level)
    finest = doubled(second, F.gelu(F.batch_norm(middle, None, None, norm.weight, norm.bias, training=True)))
    largest = F.pad(level, (0, 1, 0, 1), value=-torch.inf).unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(-1, -2))
    expected = [finest, doubled(pyramid.levels[1][0], level), level, largest]
    assert [tuple(each.shape[-2:]) for each in expected] == [(12, 20), (6, 10), (3, 5), (2, 3)]
    for ours, theirs in zip(pyramid(level), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_pyramid_is_made_only_where_strides_are_missing(tmp_path):
    config = tiny_config(tmp_path, student={"name": "test_vit"})
    assert build_distiller(config, FOUR[2:3], (HEIGHT, WIDTH)).regressor.pyramid is None
    assert len(build_distiller(config, FOUR[1:2], (HEIGHT, WIDTH)).regressor.laterals) == 3  # strides 8, 16 and 32


def test_patches_of_14_px_count_as_stride_16_and_must_divide_the_image(tmp_path):
    name = "eva02_tiny_patch14_224"
    with pytest.raises(ConfigError, match=r"patches of 14 px.*64x96 px; give -s distill.student_px=\[70,98\]"):
        build_student(StudentSpec(name, 4, (HEIGHT, WIDTH)))
    student = build_student(StudentSpec(name, 4, (56, 98)))
    assert (student.strides, student.channels) == ((16,), (192,))
    levels = student_extractor(student)(torch.zeros(2, HEIGHT, WIDTH, 3, dtype=torch.uint8))
    assert {key: tuple(level.shape) for key, level in levels.items()} == {"l4": (2, 192, 4, 7)}
    model = build_distiller(tiny_config(tmp_path, student={"name": name}), FOUR, (56, 98))
    assert model(torch.zeros(2, 3, 56, 98))["l2"].shape == (2, 2, 16, 24)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
@pytest.mark.parametrize("student_px", [(64, 64), (32, 64)])
def test_students_train_at_another_size_than_the_stored_images(tmp_path, data: OpenedData, name, student_px):
    losses = losses_of(tiny_config(tmp_path, student={"name": name}, student_px=student_px), data)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("kind", REGRESSORS)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_each_regressor_trains(tmp_path, data: OpenedData, kind, norm):
    losses = losses_of(tiny_config(tmp_path, regressor={"width": 8, "kind": kind, "norm": norm}), data)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("whiten", ["layer", "channel", "none"])
@pytest.mark.parametrize("on", [*((name,) for name in LOSSES), ("mse", "at")])
def test_each_loss_trains(tmp_path, data: OpenedData, on, whiten):
    weights = {f"{name}_weight": float(name in on) for name in LossConfig().weights}
    losses = losses_of(tiny_config(tmp_path, loss={**weights, "whiten": whiten}), data)
    assert losses[-1] < 0.97 * losses[0]


def test_metrics_and_result_name_the_losses_that_are_on(tmp_path, data: OpenedData):
    config = tiny_config(tmp_path, epochs=1, loss={"mse_weight": 1, "at_weight": 0, "cosine_weight": 1})
    result = train_on(data, config)
    wanted = {
        "loss",
        "mse",
        "cosine",
        *(f"{name}/{level}" for name in ("mse", "cosine") for level in ("l2", "l3", "l4")),
    }
    assert set(result.losses) == wanted | {f"r2/{level}" for level in ("l2", "l3", "l4")}
    assert {name for name in read_metrics(tmp_path)[-1] if name.partition("/")[0] in ("loss", *LOSSES)} == wanted


def losses_of(config, data: OpenedData) -> list[float]:
    """Of each epoch: 8 epochs over 19 images whose features are mostly noise, to be learnt by heart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = config.model_copy(update={"epochs": 8, "lr": 1e-2, "warmup_steps": 2})
        trainer = Distillation(config, data, torch.device("cpu"))
        loop, losses = Loop(trainer), []
        for _ in loop.steps():
            if loop.step % trainer.course.save_every == 0:
                losses.append(loop.meter.losses()["loss"])
                loop.meter = Meter(trainer.watch)
    return losses


def test_weights_that_cannot_be_fetched_are_answered_with_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    spec = StudentSpec("resnet10t", 4, (HEIGHT, WIDTH))
    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(
        InputError, match=r"resnet10t cannot be fetched: no network; .* as MODEL@FILE .* without --pretr"
    ):
        build_student(spec, pretrained=True)
