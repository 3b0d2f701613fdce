"""How an image comes to timestep T: the diffusion process, DDIM and its inversion, and ensembles of noise draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.noise import draw_noise
from dtpipe.extract.teachers.diffusion.ddpm import load_ddpm_teacher
from dtpipe.extract.teachers.diffusion.process import alphas_cumprod, ddim_invert, ddim_sample, ddim_timesteps, q_sample
from dtpipe.extract.teachers.diffusion.unet import DiffusionTeacher
from dtpipe.manifests.errors import ConfigError, ShapeError, TeacherError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_level
from dtpipe.manifests.schema import ViewSpec
from parts.extractions import Extract
from parts.stored import pixels_of
from parts.tensors import hooked, randn, relative, views

PX = 32
LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
BETAS = np.linspace(1e-4, 0.02, 1000)
KEPT = np.cumprod(1 - BETAS)
INVERSION: dict[str, Any] = {"encoding": "ddim_inversion", "inversion_stride": 20}
TAPS = {"l3": "up_blocks.0.resnets.1", "l2": "up_blocks.1.resnets.1"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beta_end": None}, "no schedule of betas"),
        ({"num_train_timesteps": "many"}, "no schedule of betas"),
        ({"num_train_timesteps": -1}, "no schedule of betas"),
        ({"num_train_timesteps": 0}, "no variances"),
        ({"trained_betas": {}}, "no schedule of betas"),
        ({"trained_betas": [[0.1]]}, "no variances"),
        ({"beta_end": 5.0}, "no variances"),  # whose products are negative, and their roots NaN
        ({"beta_start": float("nan")}, "no variances"),
        ({"beta_schedule": []}, "linear, scaled_linear"),
    ],
)
def test_a_schedule_that_is_none_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(TeacherError, match=words):
        alphas_cumprod(LINEAR | change)


@pytest.fixture
def load(ddpm: Path) -> Callable[..., DiffusionTeacher]:
    def loaded(dtype: str = "float32", **options: Any) -> DiffusionTeacher:
        return load_ddpm_teacher(TeacherConfig.model_validate({"path": str(ddpm), "dtype": dtype, "options": options}))

    return loaded


@pytest.fixture(scope="module")
def unet(ddpm: Path) -> Any:
    """The tiny teacher as diffusers itself loads it."""
    return UNet2DModel.from_pretrained(ddpm / "unet").eval()


def levels_of(unet: Any, noisy: torch.Tensor, timestep: int) -> dict[str, torch.Tensor]:
    """Levels of the tiny teacher by a whole forward pass."""
    return hooked(unet, TAPS, lambda: unet(noisy, timestep))


def inverted(unet: Any, images: torch.Tensor, last: int, stride: int, clip: bool = False) -> torch.Tensor:
    """x at timestep `last`, by the rule in words: noise is predicted where x is, and moves x a stride on; float64."""
    current = images.double()
    for timestep in range(0, last, stride):
        with torch.inference_mode():
            noise = unet(current.float(), timestep).sample.double()
        clean = (current - (1 - KEPT[timestep]) ** 0.5 * noise) / KEPT[timestep] ** 0.5
        if clip:
            clean = clean.clamp(-1, 1)
            noise = (current - KEPT[timestep] ** 0.5 * clean) / (1 - KEPT[timestep]) ** 0.5
        current = KEPT[timestep + stride] ** 0.5 * clean + (1 - KEPT[timestep + stride]) ** 0.5 * noise
    return current.float()


# The diffusion process


def test_noise_is_added_as_the_formula_says():
    schedule = alphas_cumprod(LINEAR)
    images, noise = randn(1, 3, 4, 4, seed=1), randn(1, 3, 4, 4, seed=2)
    for timestep in (0, 1, 50, 150, 999):
        kept = 1.0
        for step in range(timestep + 1):  # 0-based: timestep 0 is one noise step
            kept *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
        wanted = kept**0.5 * images.double() + (1 - kept) ** 0.5 * noise.double()
        torch.testing.assert_close(
            q_sample(schedule, images, timestep, noise).double(), wanted, rtol=0, atol=5e-7
        )  # float32 rounding


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules_are_those_of_diffusers(name):
    scheduler = DDPMScheduler(num_train_timesteps=200, beta_schedule=name, beta_start=0.001, beta_end=0.01)
    ours = alphas_cumprod(scheduler.config)
    np.testing.assert_allclose(
        ours, scheduler.alphas_cumprod.double().numpy(), rtol=2e-4, atol=1e-9
    )  # theirs is float32
    trained = DDPMScheduler(num_train_timesteps=2, trained_betas=[0.1, 0.2])
    np.testing.assert_allclose(alphas_cumprod(trained.config), [0.9, 0.72])


def test_an_unknown_schedule_is_named():
    with pytest.raises(TeacherError, match="'sigmoid'"):
        alphas_cumprod({"beta_schedule": "sigmoid"})


def test_ddim_follows_the_flow_of_a_gaussian():
    """For data N(0, s^2) the best estimate is known; the flow scales x_T by s / sqrt(a s^2 + 1 - a), a at T."""
    schedule, spread = (
        alphas_cumprod(LINEAR | {"num_train_timesteps": 10_000, "beta_start": 1e-5, "beta_end": 0.002}),
        0.25,
    )

    def best_noise(noisy: torch.Tensor, timestep: int) -> torch.Tensor:
        kept = schedule[timestep]
        return noisy * float((1 - kept) ** 0.5 / (kept * spread**2 + 1 - kept))

    start = randn(1, 1, 8, 8).double()
    found = ddim_sample(best_noise, schedule, start, 10_000)
    last = schedule[-1]
    wanted = start * float(spread / (last * spread**2 + 1 - last) ** 0.5)
    assert relative(found, wanted) < 0.002  # steps of finite size
    assert relative(ddim_sample(best_noise, schedule, start, 10), wanted) > 0.02


def test_ddim_timesteps_hold_both_ends():
    assert ddim_timesteps(1000, 5) == [999, 749, 500, 250, 0]
    assert ddim_timesteps(4, 100) == [3, 2, 1, 0]


# DDIM inversion


def best_noise(noisy: torch.Tensor, kept: float, spread: float) -> torch.Tensor:
    return noisy * float((1 - kept) ** 0.5 / (kept * spread**2 + 1 - kept))


def test_inversion_follows_the_flow_of_a_gaussian():
    """For data N(0, s^2) the flow scales by the ratio of x_t's deviations, sqrt(a s^2 + 1 - a), at its two ends."""
    spread, start = 0.25, randn(1, 1, 8, 8).double()
    first, last = (float(KEPT[at] * spread**2 + 1 - KEPT[at]) ** 0.5 for at in (0, 800))
    errors = []
    for stride in (1, 10):
        *_, (timestep, found) = ddim_invert(
            lambda noisy, at: best_noise(noisy, KEPT[at], spread), KEPT, start, range(0, 801, stride)
        )
        assert timestep == 800
        errors.append(relative(found, start * (last / first)))
    assert errors[0] < 0.006
    assert 7 < errors[1] / errors[0] < 13  # first order in the stride: it goes to zero with it


def test_sampling_from_an_inverted_image_gives_it_back():
    """With a network that knows the data, the two directions are inverse up to the size of a step."""
    start = randn(1, 1, 8, 8).double() * 0.25
    *_, (_, far) = ddim_invert(lambda noisy, at: best_noise(noisy, KEPT[at], 0.25), KEPT, start, range(1000))
    back = ddim_sample(lambda noisy, at: best_noise(noisy, KEPT[at], 0.25), KEPT, far, 1000)
    assert relative(back, start) < 0.02


@pytest.mark.parametrize("clip", [False, True])
def test_inverted_features_are_those_of_the_rule(load, unet, clip):
    images = randn(2, 3, PX, PX, seed=1).clamp(-1, 1)
    teacher = load(**INVERSION, clip_denoised=clip)
    encoded = teacher.encode(images, {}, views(60, 0, 120, flips=(False, True)))
    for view_idx, view in enumerate(views(60, 0, 120, flips=(False, True))):
        shown = images.flip(-1) if view.flip else images
        noisy = inverted(unet, shown, view.timestep, 20, clip)
        for name, wanted in levels_of(unet, noisy, view.timestep).items():
            assert relative(encoded[name][:, view_idx], wanted) < 2e-5  # theirs is float64 between the calls
    assert relative(noisy, inverted(unet, shown, 120, 20, not clip)) > 0.01


def test_inversion_is_not_diffusers_inverse_scheduler(load, unet):
    """That one predicts at the timestep to come. Here: which timesteps it asks for, and that noise changes nothing."""
    teacher, asked = load(**INVERSION), []
    teacher.unet.register_forward_pre_hook(lambda _m, args: asked.append(args[1]))
    teacher.encode(randn(1, 3, PX, PX), {}, views(40, 80, flips=(False, True)))
    once = [0, 20, 40, 40, 60, 80]  # up to 40, its features, on to 80, its features
    assert sorted(asked) == sorted(2 * once)  # one trajectory per flip, not one per view


def test_inversion_needs_no_noise(load):
    teacher, images = load(**INVERSION), randn(2, 3, PX, PX)
    assert teacher.spec.noise_shapes == {}
    assert teacher.spec.options | INVERSION | {"clip_denoised": False} == teacher.spec.options
    for size in (1, 2):  # batch mates: up to float32 rounding
        found = teacher.encode(images[:size], {}, views(40))
        assert relative(found["l2"], teacher.encode(images, {}, views(40))["l2"][:size]) < 2e-5
    assert torch.isfinite(teacher.encode(torch.zeros(1, 3, PX, PX), {}, views(40))["l2"]).all()  # a padded row


def test_the_usual_stride_is_ten_timesteps_without_clipping(load, unet):
    teacher, images = load(encoding="ddim_inversion"), randn(1, 3, PX, PX, seed=1).clamp(-1, 1)
    assert teacher.spec.options.items() >= {"inversion_stride": 10, "clip_denoised": False}.items()
    wanted = levels_of(unet, inverted(unet, images, 50, 10), 50)
    found = teacher.encode(images, {}, views(50))
    assert all(relative(found[name][:, 0], wanted[name]) < 2e-5 for name in wanted)


def test_a_timestep_off_the_stride_is_refused(load):
    with pytest.raises(
        ConfigError, match=r"timestep 50 is no multiple of the inversion's stride 20; .*inversion_stride"
    ):
        load(**INVERSION).encode(randn(1, 3, PX, PX), {}, views(40, 50))


def test_equal_draws_are_refused(load):
    twice = [ViewSpec(draw=draw, timestep=40) for draw in range(2)]
    with pytest.raises(ConfigError, match=r"ddim_inversion has no noise, .*extract\.noise\.draws"):
        load(**INVERSION).encode(randn(1, 3, PX, PX), {}, twice)


# Ensembles


def test_an_ensemble_is_the_mean_of_its_members(load):
    images, noise = randn(2, 3, PX, PX, seed=1), randn(2, 2, 3, 3, PX, PX, seed=2)
    single, many = load(), load(ensemble=3)
    assert many.spec.noise_shapes == {"forward": (3, 3, -1, -1)}
    assert many.spec.options == single.spec.options | {"ensemble": 3}
    found = many.encode(images, {"forward": noise}, views(50, 300))
    members = [single.encode(images, {"forward": noise[:, :, idx]}, views(50, 300)) for idx in range(3)]
    for name, level in found.items():
        wanted = torch.stack([member[name].double() for member in members]).mean(0)
        torch.testing.assert_close(level.double(), wanted, rtol=0, atol=1e-6)
        assert relative(members[0][name], level) > 0.05


def test_an_ensemble_in_half_precision_stays_in_it(load):
    noise = randn(1, 1, 2, 3, PX, PX, seed=2)
    assert (
        load("float16", ensemble=2).encode(randn(1, 3, PX, PX), {"forward": noise}, views(50))["l2"].dtype
        == torch.float16
    )


def test_noise_of_another_ensemble_is_refused(load):
    with pytest.raises(ShapeError, match=r"noise\['forward'\] is \(1, 1, 3, 32, 32\), .* \(1, 1, 2, 3, 32, 32\)"):
        load(ensemble=2).encode(randn(1, 3, PX, PX), {"forward": randn(1, 1, 3, PX, PX)}, views(50))


# Options


def test_defaults_leave_recipes_as_they_were(load):
    spec = load(encoding="stochastic", ensemble=1, inversion_stride=10).spec
    assert set(spec.options) == {"scheduler", "unet_blake3"}
    assert spec.noise_shapes == {"forward": (3, -1, -1)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (INVERSION | {"ensemble": 2}, "ensemble averages over noise draws, and ddim_inversion has none"),
        ({"encoding": "exact"}, r"options\.encoding: .*'ddim_inversion'"),
        ({"ensemble": 0}, r"options\.ensemble"),
        ({"inversion_stride": 0}, r"options\.inversion_stride"),
        (
            {"stride": 5},
            r"options\.stride.*options of this teacher: encoding, ensemble, inversion_stride, channels_last, compile, "
            "clip_denoised",
        ),
    ],
)
def test_options_that_make_no_sense_are_named(load, options, message):
    with pytest.raises(ConfigError, match=message):
        load(**options)


def test_blocks_that_half_precision_was_not_checked_for_are_refused(tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("SkipDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    UNet2DModel(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, **blocks).save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    config = TeacherConfig(path=str(tmp_path), taps={"l1": "up_blocks.0.resnets.0"})
    assert load_ddpm_teacher(config).spec.levels
    with pytest.raises(TeacherError, match=r"SkipDownBlock2D run in float32 only; leave out extract\.teacher\.dtype"):
        load_ddpm_teacher(config.model_copy(update={"dtype": "float16"}))


# Whole extractions


def extracted(extract: Extract, ddpm: Path, **options: Any) -> FeatureDataset:
    teacher, exact = {"path": str(ddpm), "options": options}, {"samples": 3, "dtype": "float32"}
    return FeatureDataset.open(extract(teacher=teacher, shard=exact, noise={"timesteps": [40]}))


def test_an_inverted_dataset_holds_inverted_features(extract, ddpm, unet):
    dataset = extracted(extract, ddpm, **INVERSION)
    assert dataset.recipe.teacher.options["encoding"] == "ddim_inversion"
    for row in (0, 7):
        noisy = inverted(unet, pixels_of(dataset, row), 40, 20)
        for name, wanted in levels_of(unet, noisy, 40).items():
            np.testing.assert_allclose(read_level(dataset, name, row, 0), wanted[0], rtol=1e-4, atol=5e-5)


def test_an_ensemble_dataset_holds_means(extract, ddpm, unet):
    dataset = extracted(extract, ddpm, ensemble=2)
    scheduler = DDIMScheduler.from_pretrained(ddpm / "scheduler")
    noise = torch.from_numpy(draw_noise(0, dataset.columns.keys[4], 0, "forward", (2, 3, PX, PX)))
    noisy = scheduler.add_noise(pixels_of(dataset, 4).expand(2, -1, -1, -1), noise, torch.tensor([40, 40]))
    for name, members in levels_of(unet, noisy, 40).items():
        np.testing.assert_allclose(read_level(dataset, name, 4, 0), members.mean(0), rtol=1e-4, atol=2e-5)
