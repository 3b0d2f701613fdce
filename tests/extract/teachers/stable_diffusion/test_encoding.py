"""How a latent comes to timestep T: DDIM inversion and ensembles, against plain loops through diffusers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.noise import draw_noise
from dtpipe.extract.teachers.stable_diffusion.teacher import StableDiffusionTeacher, load_stable_diffusion
from dtpipe.manifests.errors import ConfigError, ShapeError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_level
from parts import sd_pipelines as pipelines
from parts.stored import pixels_of
from parts.tensors import hooked, randn, random_images, view

INVERSION = {"encoding": "ddim_inversion", "inversion_stride": 20}
PREDICTIONS = ("epsilon", "v_prediction")
EXACT = {"shard": {"samples": 3, "dtype": "float32"}, "noise": {"timesteps": [40]}, "transform": {"px": 64}}
Levels = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: pipelines.save_pipeline(tmp_path_factory.mktemp(name), prediction=name) for name in PREDICTIONS}


@pytest.fixture(scope="module")
def load(folders) -> Callable[..., StableDiffusionTeacher]:
    @functools.cache
    def loaded(prediction: str = "epsilon", dtype: str = "float32", **options: Any) -> StableDiffusionTeacher:
        return load_stable_diffusion(
            TeacherConfig.model_validate({"path": str(folders[prediction]), "dtype": dtype, "options": options})
        )

    return loaded


class Plain:
    """diffusers' own parts, called step by step."""

    def __init__(self, folder: Path, prediction: str) -> None:
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).eval()
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).eval()
        self.text = pipelines.plain_text(folder, "")
        self.kept = DDPMScheduler(**pipelines.BETAS).alphas_cumprod.double()
        self.prediction = prediction

    def latent(self, shown: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        with torch.no_grad():
            posterior = self.vae.encode(shown).latent_dist
        return (
            posterior.mean if noise is None else posterior.mean + posterior.std * noise
        ) * self.vae.config.scaling_factor

    def call(self, noisy: torch.Tensor, timestep: int) -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = self.unet(noisy, timestep, self.text.expand(len(noisy), -1, -1)).sample
        return output

    def inverted(self, latent: torch.Tensor, last: int, stride: int) -> torch.Tensor:
        """guided-diffusion's rule, written out: predict at the timestep that x is at, then go to the next."""
        x = latent
        for now in range(0, last, stride):
            a, b = self.kept[now], self.kept[now + stride]
            output = self.call(x, now).double()
            if self.prediction == "v_prediction":
                clean = a.sqrt() * x.double() - (1 - a).sqrt() * output
                noise = a.sqrt() * output + (1 - a).sqrt() * x.double()
            else:
                noise = output
                clean = (x.double() - (1 - a).sqrt() * noise) / a.sqrt()
            x = (b.sqrt() * clean + (1 - b).sqrt() * noise).float()
        return x

    def levels(self, noisy: torch.Tensor, timestep: int, taps: dict[str, str]) -> Levels:
        return hooked(self.unet, taps, lambda: self.call(noisy, timestep))


def taps_of(teacher: StableDiffusionTeacher) -> dict[str, str]:
    return {level.name: level.tap for level in teacher.spec.levels if level.tap != "vae"}


def assert_close(found: Levels, wanted: Levels, view_idx: int = 0) -> None:
    """1e-4 of the largest value: float32 through several whole passes."""
    for name, level in wanted.items():
        torch.testing.assert_close(found[name][:, view_idx], level, rtol=0, atol=1e-4 * float(level.abs().max()))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inversion_is_the_rule_written_out(load, folders, prediction):
    teacher, plain = load(prediction, **INVERSION), Plain(folders[prediction], prediction)
    assert teacher.spec.noise_shapes == {}
    views = [view(100), view(40), view(40, flip=True), view(0)]
    found = teacher.encode(random_images(), {}, views)
    for idx, each in enumerate(views):
        shown = random_images().flip(-1) if each.flip else random_images()
        noisy = plain.inverted(plain.latent(shown), each.timestep, 20)
        assert_close(found, plain.levels(noisy, each.timestep, taps_of(teacher)), idx)


def test_a_prediction_read_as_another_goes_elsewhere(load, folders):
    """The two pipelines have the same weights; only the scheduler says what they predict."""
    found = [load(prediction, **INVERSION).encode(random_images(), {}, [view(100)])["l3"] for prediction in PREDICTIONS]
    assert float((found[0] - found[1]).abs().max() / found[0].abs().max()) > 0.01


def test_the_views_of_one_image_share_a_trajectory(load, monkeypatch):
    teacher = load(**INVERSION)
    calls: list[int] = []
    whole = teacher.predict_noise
    monkeypatch.setattr(
        teacher, "predict_noise", lambda noisy, timestep: calls.append(timestep) or whole(noisy, timestep)
    )
    teacher.encode(random_images(), {}, [view(60), view(20)])
    assert calls == [0, 20, 40]


def test_an_ensemble_is_the_mean_over_its_draws(load, folders):
    teacher, plain = load(ensemble=3), Plain(folders["epsilon"], "epsilon")
    assert teacher.spec.noise_shapes == {"forward": (3, 4, -8, -8)}
    draws = randn(2, 1, 3, 4, 8, 8)
    found = teacher.encode(random_images(), {"forward": draws}, [view(150)])
    scheduler, steps = DDPMScheduler(**pipelines.BETAS), torch.full((2,), 150)
    members = [
        plain.levels(scheduler.add_noise(plain.latent(random_images()), draws[:, 0, idx], steps), 150, taps_of(teacher))
        for idx in range(3)
    ]
    assert_close(found, {name: torch.stack([each[name] for each in members]).mean(0) for name in members[0]})


def test_each_member_has_its_own_sample_of_the_posterior(load, folders):
    """As in DIFT, whose copies of an image each draw both."""
    teacher, plain = load(ensemble=2, latent="sampled"), Plain(folders["epsilon"], "epsilon")
    assert set(teacher.spec.noise_shapes.values()) == {(2, 4, -8, -8)}
    noise = {"forward": randn(2, 1, 2, 4, 8, 8), "vae": randn(2, 1, 2, 4, 8, 8, seed=1)}
    found = teacher.encode(random_images(), noise, [view(150)])
    scheduler, steps = DDPMScheduler(**pipelines.BETAS), torch.full((2,), 150)
    members = []
    for idx in range(2):
        latent = plain.latent(random_images(), noise["vae"][:, 0, idx])
        members.append(
            plain.levels(scheduler.add_noise(latent, noise["forward"][:, 0, idx], steps), 150, taps_of(teacher))
        )
    assert_close(found, {name: torch.stack([each[name] for each in members]).mean(0) for name in members[0]})


def test_draws_of_the_posterior_are_inverted_apart(load, folders):
    teacher, plain = load(latent="sampled", **INVERSION), Plain(folders["epsilon"], "epsilon")
    assert teacher.spec.noise_shapes == {"vae": (4, -8, -8)}
    noise = {"vae": randn(2, 2, 4, 8, 8, seed=1)}
    found = teacher.encode(random_images(), noise, [view(40, draw=0), view(40, draw=1)])
    for idx in range(2):
        noisy = plain.inverted(plain.latent(random_images(), noise["vae"][:, idx]), 40, 20)
        assert_close(found, plain.levels(noisy, 40, taps_of(teacher)), idx)


def test_channels_last_gives_the_same_up_to_rounding(load):
    noise = {"forward": randn(2, 1, 4, 8, 8)}
    plain, laid_out = load().encode(random_images(), noise, [view(150)]), load(channels_last=True)
    assert laid_out._unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(
        laid_out.encode(random_images(), noise, [view(150)]), {name: level[:, 0] for name, level in plain.items()}
    )


def test_compiled_layers_give_the_same_under_the_constant_text(load, graphs):
    noise = {"forward": randn(2, 1, 4, 8, 8)}
    wanted = load().encode(random_images(), noise, [view(150)])
    for _ in range(2):
        assert_close(
            load(compile=True).encode(random_images(), noise, [view(150)]),
            {name: level[:, 0] for name, level in wanted.items()},
        )
    assert len(graphs) >= 8


def test_a_recipe_says_what_differs_and_nothing_else(load):
    plain = load().spec.options
    assert load(encoding="stochastic", ensemble=1, inversion_stride=5).spec.options == plain
    assert load(**INVERSION).spec.options == plain | INVERSION | {"prediction_type": "epsilon"}
    assert load("v_prediction").spec.options == plain  # one call needs no prediction
    assert load(ensemble=2).spec.options == plain | {"ensemble": 2}
    assert "channels_last" not in plain


@pytest.mark.parametrize(
    ("options", "views", "noise", "error", "message"),
    [
        (INVERSION, [view(50)], {}, ConfigError, "timestep 50 is no multiple of the inversion's stride 20"),
        (INVERSION, [view(40), view(40, draw=1)], {}, ConfigError, "all draws of an image are equal"),
        (INVERSION, [view(1000)], {}, ConfigError, "beyond this teacher's 1000"),
        (
            {"ensemble": 2},
            [view(40)],
            {"forward": randn(2, 1, 4, 8, 8)},
            ShapeError,
            r"is \(2, 1, 4, 8, 8\), .* \(2, 1, 2, 4, 8, 8\)",
        ),
        (INVERSION | {"ensemble": 2}, [], {}, ConfigError, "ddim_inversion has none"),
        ({"clip_denoised": True}, [], {}, ConfigError, "clip_denoised"),
    ],
)
def test_what_does_not_fit_is_refused(load, options, views, noise, error, message):
    with pytest.raises(error, match=message):
        load(**options).encode(random_images(), noise, views)


@pytest.mark.parametrize("keep", [False, True])
def test_an_inverted_dataset_holds_inverted_features(load, folders, extract, keep):
    teacher = {"path": str(folders["epsilon"]), "options": INVERSION | {"keep_latents": keep}}
    dataset, plain = FeatureDataset.open(extract(teacher=teacher, **EXACT)), Plain(folders["epsilon"], "epsilon")
    latent = plain.latent(pixels_of(dataset, 5))
    wanted = plain.levels(plain.inverted(latent, 40, 20), 40, taps_of(load(**INVERSION)))
    for level in dataset.levels:
        if level.tap != "vae":
            name = f"l{int(level.name[1:]) + 1}"  # counted in the teacher's image, twice the student's
            tolerance = 5e-3 if keep else 1e-4  # kept latents are rounded to float16
            np.testing.assert_allclose(
                read_level(dataset, level.name, 5), wanted[name][0], atol=tolerance * float(wanted[name].abs().max())
            )


def test_an_ensembles_noise_follows_from_the_key(load, folders, extract):
    teacher = {"path": str(folders["epsilon"]), "options": {"ensemble": 2}}
    dataset = FeatureDataset.open(extract(teacher=teacher, **EXACT))
    noise = torch.from_numpy(draw_noise(0, dataset.columns.keys[3], 0, "forward", (2, 4, 8, 8)))
    wanted = load(ensemble=2).encode(pixels_of(dataset, 3), {"forward": noise[None, None]}, [view(40)])["l3"]
    np.testing.assert_allclose(read_level(dataset, "l2", 3), wanted[0, 0], atol=1e-4)
