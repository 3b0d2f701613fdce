"""Diffusion teachers: features, noise and loading against independent restatements."""

from __future__ import annotations

import json
import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.diffusion.ddpm import load_ddpm_teacher
from dtpipe.extract.teachers.diffusion.unet import DiffusionTeacher
from dtpipe.extract.teachers.files.weights import weights_digest
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import ConfigError, ShapeError, TeacherError
from dtpipe.manifests.schema import ViewSpec
from parts.damage import Attack, edit_json
from parts.tensors import hooked, randn, relative, views

PX = 64
WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_unet(folder: Path, scheduler: bool = True, **changes: object) -> Path:
    """A UNet2DModel of six resolutions with random weights, in a folder of its own."""
    torch.manual_seed(0)
    settings = {
        "sample_size": PX,
        "block_out_channels": (8, 8, 8, 16, 16, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) * 3 + ("AttnDownBlock2D",) * 2 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("AttnUpBlock2D",) * 2 + ("UpBlock2D",) * 3,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    UNet2DModel(**settings | changes).save_pretrained(folder)
    if scheduler:
        DDPMScheduler(num_train_timesteps=1000).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory) -> Path:
    return save_unet(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def teacher(unet_folder) -> DiffusionTeacher:
    return load(unet_folder)


@pytest.fixture
def broken(unet_folder, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(unet_folder, tmp_path / "teacher"))


def load(folder: Path | str, **changes: object) -> DiffusionTeacher:
    return load_ddpm_teacher(TeacherConfig.model_validate({"path": str(folder), **changes}))


# What a teacher says of itself


def test_levels_are_found_by_stride(teacher):
    assert [(level.name, level.stride, level.channels, level.tap) for level in teacher.spec.levels] == [
        ("l2", 4, 8, "up_blocks.3.resnets.1"),
        ("l3", 8, 16, "up_blocks.2.attentions.1"),
        ("l4", 16, 16, "up_blocks.1.attentions.1"),
        ("l5", 32, 16, "up_blocks.0.resnets.1"),
    ]
    assert teacher.spec.image_px == (PX, PX)
    assert teacher.spec.num_timesteps == 1000
    assert teacher.spec.noise_shapes == {"forward": (3, -1, -1)}
    json.dumps(teacher.spec.options)


def test_levels_of_the_adm_256_layout_are_the_papers_blocks(tmp_path):
    """Blocks 3, 6, 9 and 12 before their upsamplers are these modules, by the mapping of guided-diffusion's names."""
    folder = save_unet(
        tmp_path,
        block_out_channels=(8, 8, 16, 16, 32, 32),
        layers_per_block=2,
        down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=4,
        out_channels=6,
    )
    teacher = load(folder)
    assert {level.name: level.tap for level in teacher.spec.levels} == {
        "l5": "up_blocks.0.attentions.2",
        "l4": "up_blocks.1.attentions.2",
        "l3": "up_blocks.2.attentions.2",
        "l2": "up_blocks.3.resnets.2",
    }
    assert teacher.predict_noise(randn(1, 3, PX, PX), 10).shape == (1, 3, PX, PX)  # learned variances left out


def test_the_registry_finds_the_teacher(unet_folder):
    assert isinstance(load_teacher(TeacherConfig(path=str(unet_folder))), DiffusionTeacher)


def test_taps_can_be_named(unet_folder):
    teacher = load(unet_folder, taps={"l1": "up_blocks.4.resnets.0", "l2": "up_blocks.3.resnets.0"})
    assert [(level.name, level.stride) for level in teacher.spec.levels] == [("l1", 2), ("l2", 4)]


def test_the_weights_digest_is_of_content_not_layout(broken, teacher):
    tensors = load_file(broken / WEIGHTS)
    (broken / WEIGHTS).unlink()
    torch.save(dict(reversed(tensors.items())), broken / "diffusion_pytorch_model.bin")
    assert load(broken).spec == teacher.spec
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].nextafter(torch.tensor(9.0))
    assert weights_digest(tensors) != teacher.spec.weights_blake3


def test_the_digest_tells_names_dtypes_and_shapes_apart():
    base = {"a": torch.zeros(2, 3)}
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        base | {"b": torch.zeros(0)},
    ]
    digests = {weights_digest(each) for each in [base, *others]}
    assert len(digests) == 5
    assert weights_digest({"a": torch.zeros(3, 2).T}) == weights_digest(base)


def test_another_architecture_with_the_same_weights_is_another_teacher(broken, teacher):
    edit_json(broken / "config.json", attention_head_dim=16)
    other = load(broken)
    assert other.spec.weights_blake3 == teacher.spec.weights_blake3
    assert other.spec.options != teacher.spec.options


# Features


def test_features_are_those_of_one_whole_denoising_call(unet_folder, teacher):
    """Independent: diffusers loads the folder, noise is added in float64, and hooks read a pass that is not stopped."""
    images, noise = randn(2, 3, PX, PX, seed=1).clamp(-1, 1), randn(2, 2, 3, PX, PX, seed=2)
    encoded = teacher.encode(images, {"forward": noise}, views(50, 400))
    unet = UNet2DModel.from_pretrained(unet_folder).eval()
    taps = {level.name: level.tap for level in teacher.spec.levels}
    betas = np.linspace(1e-4, 0.02, 1000)
    for view_idx, timestep in enumerate((50, 400)):
        kept = np.prod(1 - betas[: timestep + 1])
        noisy = kept**0.5 * images.double() + (1 - kept) ** 0.5 * noise[:, view_idx].double()
        noisy, steps = noisy.float(), torch.tensor([timestep, timestep])
        seen = hooked(unet, taps, partial(unet, noisy, steps))
        for name, features in encoded.items():
            assert features[:, view_idx].shape == seen[name].shape
            assert relative(features[:, view_idx], seen[name]) < 1e-5  # x_T differs by float32 rounding


def test_a_flipped_view_is_the_flipped_image_encoded(teacher):
    images, noise = randn(2, 3, PX, PX, seed=1), randn(2, 1, 3, PX, PX, seed=2)
    flipped = teacher.encode(images, {"forward": noise}, views(50, flips=[True]))
    wanted = teacher.encode(images.flip(-1), {"forward": noise}, views(50))
    plain = teacher.encode(images, {"forward": noise}, views(50))
    for name in wanted:
        assert torch.equal(flipped[name], wanted[name])
        assert relative(flipped[name], plain[name].flip(-1)) > 0.05  # not the mirrored features


def test_features_do_not_depend_on_batch_mates(teacher):
    """Float32 kernels depend on the batch size: at most 1.1e-6 of the largest value with trained weights."""
    images, noise = randn(8, 3, PX, PX, seed=3), randn(8, 1, 3, PX, PX, seed=4)
    together = teacher.encode(images, {"forward": noise}, views(100))
    for size in (1, 3):
        alone = teacher.encode(images[2 : 2 + size], {"forward": noise[2 : 2 + size]}, views(100))
        for name in alone:
            assert relative(alone[name], together[name][2 : 2 + size]) < 2e-5


def test_images_need_not_be_square(teacher):
    encoded = teacher.encode(randn(1, 3, 32, 96), {"forward": randn(1, 1, 3, 32, 96)}, views(50))
    assert {name: tuple(level.shape[2:]) for name, level in encoded.items()} == {
        "l2": (8, 8, 24),
        "l3": (16, 4, 12),
        "l4": (16, 2, 6),
        "l5": (16, 1, 3),
    }


def test_an_image_that_does_not_fit_is_refused(teacher):
    with pytest.raises(ShapeError, match=r"48x64.*multiples of 32.*extract\.transform\.px"):
        teacher.encode(randn(1, 3, 48, 64), {"forward": randn(1, 1, 3, 48, 64)}, views(50))


def test_noise_of_another_shape_is_refused(teacher):
    images = randn(2, 3, PX, PX)
    for noise in ({"forward": randn(2, 1, 3, PX, PX)}, {"vae": randn(2, 2, 3, PX, PX)}):
        with pytest.raises(ShapeError, match="noise"):
            teacher.encode(images, noise, views(50, 60))


@pytest.mark.parametrize(
    ("timestep", "message"), [(1000, r"timestep 1000 is beyond.*0\.\.999"), (None, "needs a timestep")]
)
def test_an_unknown_timestep_is_refused(teacher, timestep, message):
    with pytest.raises(ConfigError, match=message):
        teacher.encode(randn(1, 3, PX, PX), {"forward": randn(1, 1, 3, PX, PX)}, [ViewSpec(draw=0, timestep=timestep)])


@pytest.mark.parametrize(
    ("dtype", "out", "bound"), [("bfloat16", torch.float32, 0.1), ("float16", torch.float16, 0.02)]
)
def test_half_precision_is_close(unet_folder, teacher, dtype, out, bound):
    images, noise = randn(1, 3, PX, PX, seed=1), {"forward": randn(1, 1, 3, PX, PX, seed=2)}
    exact = teacher.encode(images, noise, views(50))
    for name, level in load(unet_folder, dtype=dtype).encode(images, noise, views(50)).items():
        assert level.dtype == out
        assert 0 < relative(level.float(), exact[name]) < bound


# Sampling


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_each_kind_of_prediction_gives_the_noise(unet_folder, prediction):
    """A network that answers exactly, in its own terms, must lead to the noise that was added."""
    teacher = load(unet_folder)
    clean, noise = randn(2, 3, PX, PX, seed=5), randn(2, 3, PX, PX, seed=6)
    kept = float(teacher.schedule[300])
    answers = {"epsilon": noise, "v_prediction": kept**0.5 * noise - (1 - kept) ** 0.5 * clean, "sample": clean}
    teacher.prediction = prediction
    teacher._call = lambda *_: (answers[prediction],)
    torch.testing.assert_close(teacher.predict_noise(teacher.noised(clean, noise, 300), 300), noise, rtol=0, atol=1e-5)


def test_a_sample_depends_on_its_seed_and_index_only(teacher):
    three, one = teacher.sample(3, seed=1, steps=3), teacher.sample(1, seed=1, steps=3)
    assert three.shape == (3, PX, PX, 3)
    assert three.dtype == np.uint8
    assert np.abs(three[:1].astype(int) - one).max() <= 1  # rounding
    assert (three[0] != three[1]).any()
    assert (teacher.sample(1, seed=2, steps=3) != one).any()


# Loading


def test_a_pipeline_folder_and_its_unet_folder_are_one_teacher(ddpm):
    whole, part = load(ddpm), load(ddpm / "unet")
    assert whole.spec == part.spec
    assert [level.name for level in whole.spec.levels] == ["l2", "l3"]


def test_old_attention_names_are_read(broken, teacher):
    renamed = {}
    for name, tensor in load_file(broken / WEIGHTS).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(new, old)
        renamed[name] = tensor
    save_file(renamed, broken / WEIGHTS)
    assert load(broken).spec.weights_blake3 == teacher.spec.weights_blake3


def delete(name):
    return lambda folder: (folder / name).unlink()


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def change(name, **changes):
    return lambda folder: edit_json(folder / name, **changes)


def cut(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def edit_weights(edit):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


DAMAGES = {
    "no config": (delete("config.json"), "config.json"),
    "config is no JSON": (write("config.json", b"\xff{"), "is no UTF-8 text"),
    "config is a list": (write("config.json", b"[]"), "not an object"),
    "another class": (
        change("config.json", _class_name="UNet2DConditionModel"),
        "UNet2DConditionModel, not a UNet2DModel",
    ),
    "an impossible network": (change("config.json", block_out_channels=[7, 7]), "cannot build"),
    "latent input": (change("config.json", in_channels=4), "takes 4 channels"),
    "classes without numbers": (change("config.json", class_embed_type="timestep"), "takes classes as timestep"),
    "no number of a null class": (write("classes.json", b'{"null_class": "none"}'), "null_class is 'none'"),
    "no size": (change("config.json", sample_size=None), "sample_size is None"),
    "no weights": (delete(WEIGHTS), "holds none of"),
    "weights cut": (cut, "not readable as weights"),
    "weights empty": (write(WEIGHTS, b""), "is empty"),
    "tensor missing": (edit_weights(lambda tensors: tensors.pop("conv_in.bias")), "conv_in.bias is missing"),
    "tensor too many": (edit_weights(lambda tensors: tensors.update(extra=torch.zeros(1))), "extra is unexpected"),
    "wrong shape": (
        edit_weights(lambda tensors: tensors.update({"conv_in.bias": torch.zeros(3)})),
        r"conv_in.bias has shape \(3,\)",
    ),
    "not finite": (
        edit_weights(lambda tensors: tensors["conv_in.bias"].fill_(float("nan"))),
        "conv_in.bias holds values that are not finite",
    ),
    "no schedule": (delete("scheduler_config.json"), "noise schedule is unknown"),
    "another process": (
        change("scheduler_config.json", _class_name="KarrasVeScheduler"),
        "KarrasVeScheduler is not variance-preserving",
    ),
    "another target": (change("scheduler_config.json", prediction_type="flow"), "prediction_type is 'flow'"),
    "zero terminal SNR": (change("scheduler_config.json", rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
    "another schedule": (change("scheduler_config.json", beta_schedule="laplace"), "'laplace'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_cannot_be_used_is_one_sentence(broken, damage):
    apply, message = DAMAGES[damage]
    apply(broken)
    with pytest.raises(TeacherError, match=message) as caught:
        load(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("label", "null", "used"), [(None, 2, 2), (0, 2, 0), (1, None, 1)])
def test_a_class_conditional_network_sees_one_class(tmp_path, label, null, used):
    """As the network says with its class given in the call; by default its null class."""
    folder = save_unet(tmp_path, num_class_embeds=3)
    (folder / "classes.json").write_text(json.dumps({"classes": ["cat", "dog"], "null_class": null}))
    teacher = load(folder, options={} if label is None else {"class_label": label})
    assert teacher.spec.options["class_label"] == used
    network, noisy = UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval(), randn(2, 3, PX, PX)
    with torch.no_grad():
        by_class = [network(noisy, 50, torch.full((2,), each)).sample for each in range(3)]
    errors = [float((teacher.predict_noise(noisy, 50) - each).abs().max()) for each in by_class]
    assert errors.pop(used) < 1e-5
    assert min(errors) > 1e-3


@pytest.mark.parametrize(
    ("classes", "label", "message"),
    [
        (3, None, r"give all images one class, 0 to 2, with .*class_label=\.\.\. \(found None\)"),
        (3, 3, "found 3"),
        (None, 0, "not class-cond"),
    ],
)
def test_a_class_that_does_not_fit_the_network_is_refused(tmp_path, classes, label, message):
    folder = save_unet(tmp_path, num_class_embeds=classes)
    with pytest.raises(ConfigError, match=message):
        load(folder, options={} if label is None else {"class_label": label})


def test_a_pickle_is_never_executed(broken):
    (broken / WEIGHTS).unlink()
    path, attack = broken / "diffusion_pytorch_model.bin", Attack(broken / "attacked")
    for content in (pickle.dumps(attack), None):
        path.write_bytes(content) if content else torch.save({"conv_in.bias": attack}, path)
        with pytest.raises(TeacherError, match="not readable as weights"):
            load(broken)
    assert not attack.trap.exists()


def test_a_file_is_refused(unet_folder):
    with pytest.raises(TeacherError, match="is a file"):
        load(unet_folder / WEIGHTS)


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TeacherError, match="no such folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0123abc"])
def test_a_hub_repository_needs_a_commit(revision):
    with pytest.raises(TeacherError, match=r"somebody/teacher: no such folder; .* commit \(40 hex digits\)"):
        load("somebody/teacher", revision=revision)


def test_a_cached_hub_repository_is_read_offline(unet_folder, teacher, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "ab" * 20
    with pytest.raises(TeacherError, match="cannot be had from the hub or its cache"):
        load("somebody/teacher", revision=commit)
    shutil.copytree(unet_folder, tmp_path / "models--somebody--teacher" / "snapshots" / commit)
    assert load("somebody/teacher", revision=commit).spec == teacher.spec


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_cpus_features(unet_folder, teacher):
    images, noise = randn(2, 3, PX, PX, seed=1), randn(2, 1, 3, PX, PX, seed=2)
    config = TeacherConfig(path=str(unet_folder))
    found = load_ddpm_teacher(config, "cuda").encode(images.cuda(), {"forward": noise.cuda()}, views(50))
    for name, wanted in teacher.encode(images, {"forward": noise}, views(50)).items():
        assert relative(found[name].cpu(), wanted) < 1e-4


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"attn_norm_num_groups": True}),
        ("unet/config.json", {"num_class_embeds": {}}),
        ("unet/config.json", {"sample_size": ["x", "x"]}),
        ("scheduler/scheduler_config.json", {"_class_name": {}}),
        ("scheduler/scheduler_config.json", {"beta_end": None}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": -1}),
        ("scheduler/scheduler_config.json", {"trained_betas": "x"}),
    ],
)
def test_settings_of_the_wrong_kind_are_refused_in_a_sentence(ddpm, tmp_path, file, changes):
    folder = tmp_path / "teacher"
    shutil.copytree(ddpm, folder)
    edit_json(folder / file, **changes)
    with pytest.raises(TeacherError):
        load_teacher(TeacherConfig(path=str(folder)))
