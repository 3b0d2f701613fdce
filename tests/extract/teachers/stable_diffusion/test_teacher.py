"""Stable Diffusion: features against diffusers' plain forward pass, and what text, latents and precision do."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.latents import StoredLatents
from dtpipe.extract.recipe import make_recipe
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.extract.teachers.stable_diffusion import teacher as stable_diffusion
from dtpipe.extract.teachers.stable_diffusion.teacher import StableDiffusionTeacher, load_stable_diffusion
from dtpipe.manifests.errors import ConfigError, MissingPackageError, ShapeError, TeacherError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image
from dtpipe.manifests.schema import ViewSpec
from parts import sd_pipelines as pipelines
from parts.stored import recomputed, stored_level
from parts.tensors import randn, random_images, relative, view

SD2 = {
    "layers_per_block": 2,
    "use_linear_projection": True,
    "upcast_attention": True,
    "attention_head_dim": (2, 4, 4, 8),
}


images = functools.partial(random_images, width=128)


def noise(batch: int = 2, views: int = 1, *streams: str) -> dict[str, torch.Tensor]:
    return {stream: randn(batch, views, 4, 8, 16, seed=idx) for idx, stream in enumerate(streams or ("forward",))}


def load(
    folder: Path | str, dtype: str = "float32", taps: dict[str, str] | None = None, **options: object
) -> StableDiffusionTeacher:
    return load_stable_diffusion(TeacherConfig(path=str(folder), dtype=dtype, taps=taps, options=options))


loaded = functools.cache(load)  # for tests that leave the teacher as it is


def taps_of(teacher: StableDiffusionTeacher) -> dict[str, str]:
    return {level.name: level.tap for level in teacher.spec.levels}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pipelines.save_pipeline(tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def teacher(folder) -> StableDiffusionTeacher:
    return loaded(folder)


# Features


def test_levels_are_the_last_layers_before_the_upsamplers(teacher):
    assert [(level.name, level.stride, level.channels, level.tap) for level in teacher.spec.levels] == [
        ("l3", 8, 8, "up_blocks.3.attentions.1"),
        ("l4", 16, 16, "up_blocks.2.attentions.1"),
        ("l5", 32, 24, "up_blocks.1.attentions.1"),
        ("l6", 64, 32, "up_blocks.0.resnets.1"),
    ]
    assert teacher.spec.image_px == (64, 64)
    assert teacher.spec.num_timesteps == 1000
    assert teacher.spec.noise_shapes == {"forward": (4, -8, -8)}
    json.dumps(teacher.spec.options)


@pytest.mark.parametrize("prompt", ["", "a cat"])
def test_features_are_those_of_diffusers(folder, prompt):
    """All views at once, on images that are not square; 1e-5 covers float32 sums in another order."""
    teacher = loaded(folder, prompt=prompt)
    views = [view(50), view(150, flip=True), view(999)]
    draws = noise(2, 3)
    found = teacher.encode(images(), draws, views)
    for idx, each in enumerate(views):
        shown = images().flip(-1) if each.flip else images()
        wanted = pipelines.plain_features(
            folder, shown, draws["forward"][:, idx], each.timestep, taps_of(teacher), prompt
        )
        for level in teacher.spec.levels:
            assert found[level.name].shape == (2, 3, level.channels, 64 // level.stride, 128 // level.stride)
            assert relative(found[level.name][:, idx], wanted[level.name]) < 1e-5


def test_stable_diffusion_2_has_heads_by_level_and_predicts_velocity(tmp_path):
    folder = pipelines.save_pipeline(tmp_path, prediction="v_prediction", pad="!", **SD2)
    teacher = load(folder, prompt="a cat")
    found = teacher.encode(images(), noise(), [view()])
    wanted = pipelines.plain_features(folder, images(), noise()["forward"][:, 0], 150, taps_of(teacher), "a cat")
    assert all(relative(found[name][:, 0], wanted[name]) < 1e-5 for name in wanted)


def test_latents_can_be_drawn_from_the_posterior(folder, teacher):
    drawing = loaded(folder, latent="sampled")
    assert drawing.spec.noise_shapes == {"forward": (4, -8, -8), "vae": (4, -8, -8)}
    assert drawing.spec.options != teacher.spec.options
    draws = noise(2, 1, "forward", "vae")
    found = drawing.encode(images(), draws, [view()])
    forward, posterior = draws["forward"][:, 0], draws["vae"][:, 0]
    wanted = pipelines.plain_features(folder, images(), forward, 150, taps_of(teacher), vae_noise=posterior)
    assert all(relative(found[name][:, 0], wanted[name]) < 1e-5 for name in wanted)
    assert relative(teacher.encode(images(), draws, [view()])["l3"], found["l3"]) > 1e-3


def test_features_depend_on_nothing_but_their_own_row(teacher):
    draws, state = noise(3)["forward"], torch.get_rng_state()
    whole = teacher.encode(images(3), {"forward": draws}, [view()])
    for row in range(3):
        alone = teacher.encode(images(3)[row : row + 1], {"forward": draws[row : row + 1]}, [view()])
        assert all(relative(alone[name], whole[name][row : row + 1]) < 1e-5 for name in whole)
    assert torch.equal(torch.get_rng_state(), state)


def test_padding_rows_are_finite_and_leave_the_others_alone(teacher):
    shown, draws = images(), noise()["forward"]
    shown[1], draws[1] = 0, 0
    padded = teacher.encode(shown, {"forward": draws}, [view()])
    other = teacher.encode(images(), noise(), [view()])
    assert all(padded[name].isfinite().all() and torch.equal(padded[name][0], other[name][0]) for name in padded)


def test_named_taps_end_the_pass_where_the_last_is_read(folder):
    teacher = load(folder, taps={"l5": "up_blocks.1.resnets.0", "l6": "mid_block"})
    reached: list[str] = []
    teacher._unet.up_blocks[2].register_forward_hook(lambda *_: reached.append("up_blocks.2"))
    found = teacher.encode(images(), noise(), [view()])
    assert [(level.name, level.stride) for level in teacher.spec.levels] == [("l5", 32), ("l6", 64)]
    wanted = pipelines.plain_features(folder, images(), noise()["forward"][:, 0], 150, taps_of(teacher))
    assert all(relative(found[name][:, 0], wanted[name]) < 1e-5 for name in wanted)
    assert not reached
    with pytest.raises(TeacherError, match="tap mid_block has stride 64, so it is level l6, not l2"):
        load(folder, taps={"l2": "mid_block"})


# Latents


def test_features_from_kept_latents_are_the_same(folder):
    teacher = loaded(folder, latent="sampled")
    views, draws = [view(50), view(150, flip=True)], noise(2, 2, "forward", "vae")
    moments = teacher.encode_latents(images(), views)
    assert {flip: tuple(each.shape) for flip, each in moments.items()} == {False: (2, 8, 8, 16), True: (2, 8, 8, 16)}
    whole, kept = teacher.encode(images(), draws, views), teacher.encode_from_latents(moments, draws, views)
    assert all(torch.equal(kept[name], whole[name]) for name in whole)


def test_latents_kept_in_float16_cost_less_than_storing_features_in_it(teacher):
    moments = {flip: each.half() for flip, each in teacher.encode_latents(images(), [view()]).items()}
    exact, kept = (
        teacher.encode_from_latents(each, noise(), [view()])
        for each in (teacher.encode_latents(images(), [view()]), moments)
    )
    assert all(0 < relative(kept[name], exact[name]) < 2**-11 for name in exact)


# Text


def test_keys_and_values_of_the_text_are_computed_once(folder):
    teacher = load(folder)
    calls: list[str] = []
    for name, module in teacher._unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "attn1.to_k")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    teacher.encode(images(), noise(), [view()])
    assert calls
    assert all(name.endswith("attn1.to_k") for name in calls)


def test_a_prompt_changes_features_and_recipe(folder, teacher):
    other = loaded(folder, prompt="a cat")
    assert other.spec.options["prompt"] == "a cat"
    assert other.spec.weights_blake3 != teacher.spec.weights_blake3
    assert (
        relative(other.encode(images(), noise(), [view()])["l3"], teacher.encode(images(), noise(), [view()])["l3"])
        > 1e-4
    )


def test_an_embedding_file_stands_for_the_prompt(folder, tmp_path, monkeypatch):
    embedding = pipelines.plain_text(folder, "a cat")
    save_file({"text": embedding}, tmp_path / "text.safetensors")
    wanted = loaded(folder, prompt="a cat").encode(images(), noise(), [view()])
    monkeypatch.setitem(sys.modules, "transformers", None)
    teacher = load(folder, text_embedding=str(tmp_path / "text.safetensors"))
    found = teacher.encode(images(), noise(), [view()])
    assert all(
        relative(found[name], wanted[name]) < 1e-5 for name in wanted
    )  # the encoder's last bits move with memory alignment
    with pytest.raises(MissingPackageError, match=r"pip install .dtpipe.sd.*text_embedding"):
        load(folder)


def test_a_machine_without_transformers_can_encode(folder, tmp_path):
    """In a process of its own: diffusers looks for the package when it is imported."""
    save_file({"text": pipelines.plain_text(folder, "")[0].clone()}, folder / "empty.safetensors")
    script = tmp_path / "encode.py"
    script.write_text(f"""
import sys
sys.modules["transformers"] = None
from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.stable_diffusion.teacher import load_stable_diffusion
teacher = load_stable_diffusion(TeacherConfig(path={str(folder)!r}, options={{"text_embedding": "empty.safetensors"}}))
print(teacher.spec.options["text_blake3"])
""")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert len(result.stdout.strip()) == 64, result.stderr


# Datasets


@pytest.mark.parametrize("latent", ["mean", "sampled"])
def test_a_dataset_has_the_papers_levels_for_a_student_of_half_the_size(folder, extract, latent):
    teacher = {"path": str(folder), "options": {"latent": latent}}
    noise = {"timesteps": [50], "flips": True}
    dataset = FeatureDataset.open(extract(teacher=teacher, noise=noise, shard={"samples": 8}))
    assert dataset.recipe.student_px == (32, 32)
    assert (dataset.recipe.transform.height, dataset.recipe.transform.width) == (64, 64)
    assert [(level.name, level.stride, level.channels) for level in dataset.levels] == [
        ("l2", 4, 8),
        ("l3", 8, 16),
        ("l4", 16, 24),
        ("l5", 32, 32),
    ]
    for name, level in recomputed(dataset, load(folder, latent=latent), range(8)).items():
        np.testing.assert_array_equal(level.numpy().astype(np.float16), stored_level(dataset, name, range(8)))


class NoVae(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the VAE ran")


def test_kept_latents_give_other_timesteps_and_draws_without_the_vae(folder, extract, monkeypatch):
    """As extracted from the source itself, up to rounding: the VAE's tensors lie in memory in another layout."""
    teacher = {"path": str(folder), "options": {"keep_latents": True, "latent": "sampled"}}
    first = {"noise": {"timesteps": [50], "flips": True}, "shard": {"samples": 8}}
    kept = FeatureDataset.open(extract("kept", teacher=teacher, **first))
    assert [(level.name, level.channels, level.dtype) for level in kept.levels][-1] == ("l2.latent", 8, "float16")
    other = {"teacher": teacher, "noise": {"timesteps": [150, 20], "draws": 2, "flips": True}, "shard": {"samples": 8}}
    direct = FeatureDataset.open(extract("direct", **other))
    with monkeypatch.context() as patched:
        patched.setattr(stable_diffusion, "_vae_encoder", lambda files: _without_vae(files))
        patched.setattr(stable_diffusion, "_load", _load_but_vae)
        again = FeatureDataset.open(extract("again", **other, images=kept.url))
    assert again.recipe.source.kind == "features"
    assert sorted(again.columns.keys) == sorted(direct.columns.keys) == sorted(kept.columns.keys)
    for key in direct.columns.keys:
        rows = [dataset.columns.row_of(key) for dataset in (direct, again)]
        np.testing.assert_array_equal(read_image(direct, rows[0]), read_image(again, rows[1]))
        for level in direct.levels:
            expected, found = (
                stored_level(each, level.name, [row]) for each, row in zip((direct, again), rows, strict=True)
            )
            for idx in range(len(direct.views)):
                limit = 2**-10 * np.abs(expected[0, idx]).max()
                np.testing.assert_allclose(found[0, idx], expected[0, idx], rtol=0, atol=limit)


def _without_vae(files: object) -> torch.nn.Module:
    return NoVae()


def _load_but_vae(network: torch.nn.Module, tensors: object, where: Path, device: str) -> str:
    if not isinstance(network, NoVae):
        stable_diffusion.assign_weights(network, tensors, where, device)
    return stable_diffusion.weights_digest(tensors)


@pytest.mark.parametrize(
    ("changes", "reads"),
    [
        ({}, True),
        ({"noise": {"timesteps": [50], "flips": True}}, False),  # flipped latents were not kept
        ({"teacher": {"options": {}}}, False),  # features of unrounded latents are wanted
        ({"teacher": {"options": {"keep_latents": True, "prompt": "cat"}}}, False),  # another teacher, by its digest
    ],
)
def test_kept_latents_are_read_only_where_they_are_what_the_vae_would_give(
    folder, make_config, extract, changes, reads
):
    dataset = FeatureDataset.open(extract(teacher={"path": str(folder), "options": {"keep_latents": True}}))
    options = changes.get("teacher", {}).get("options", {"keep_latents": True})
    config = make_config(
        teacher={"path": str(folder), "options": options}, noise=changes.get("noise", {"timesteps": [150]})
    )
    teacher = load_teacher(config.teacher)
    found = StoredLatents.find(dataset, teacher.spec, make_recipe(config, teacher, "features", "cpu"))
    assert (found is not None) == reads


# Precision


@pytest.mark.parametrize(("dtype", "vae_dtype", "returned", "largest"), [
    ("float16", "float32", torch.float16, 5e-3),
    ("bfloat16", "float32", torch.float32, 4e-2),
    ("bfloat16", "bfloat16", torch.float32, 6e-2),
])  # fmt: skip
def test_low_precision_is_close_and_comes_back_storable(folder, teacher, dtype, vae_dtype, returned, largest):
    low = loaded(folder, dtype=dtype, vae_dtype=vae_dtype)
    found, exact = (each.encode(images(), noise(), [view()]) for each in (low, teacher))
    assert {level.dtype for level in found.values()} == {returned}
    assert all(0 < relative(found[name], exact[name]) < largest for name in exact)


def test_norms_time_and_first_convolution_stay_in_float32(folder):
    teacher = load(folder, dtype="float16", vae_dtype="bfloat16")
    half = {name for name, value in teacher._unet.named_parameters() if value.dtype == torch.float16}
    kept = {name for name, _ in teacher._unet.named_parameters()} - half
    assert all("norm" in name or "time_emb" in name or name.startswith("conv_in.") for name in kept)
    assert not any("norm" in name or "time_emb" in name for name in half)
    seen: dict[str, torch.Tensor] = {}
    for each in (teacher, load(folder)):
        each._unet.time_embedding.register_forward_hook(lambda _m, _a, out, each=each: seen.update({id(each): out}))
        each.encode(images(), noise(), [view()])
    first, second = seen.values()
    assert torch.equal(first, second)


def test_the_vae_stays_in_float32_with_a_float32_teacher(folder, teacher):
    """So that the error of low precision, which is measured against such a teacher, counts the VAE's too."""
    exact = load(folder, vae_dtype="bfloat16").encode(images(), noise(), [view()])
    assert torch.equal(exact["l3"], teacher.encode(images(), noise(), [view()])["l3"])


# What does not fit


def test_sizes_noise_and_timesteps_that_do_not_fit_are_refused(teacher):
    with pytest.raises(ShapeError, match="images are 64x96; this teacher needs sides that are multiples of 64"):
        teacher.encode(random_images(2, 64, 96), noise(), [view()])
    with pytest.raises(
        ShapeError, match=r"noise\['forward'\] is \(2, 1, 4, 8, 16\), images and views ask for \(2, 2, 4, 8, 16\)"
    ):
        teacher.encode(images(), noise(), [view(), view(50)])
    with pytest.raises(ConfigError, match=r"timestep 1000 is beyond this teacher's 1000 \(0..999\)"):
        teacher.encode(images(), noise(), [view(1000)])
    with pytest.raises(ConfigError, match="needs a timestep in every view"):
        teacher.encode(images(), noise(), [ViewSpec(draw=0)])
