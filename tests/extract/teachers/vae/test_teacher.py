"""Autoencoder teachers against diffusers' own forward passes, float64 formulas and arrays of the original taesd."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DModel, VQModel
from PIL import Image
from safetensors.torch import load_file, save_file

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.noise import draw_noise
from dtpipe.extract.run import run_extraction
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.extract.teachers.vae.teacher import VaeTeacher, is_autoencoder_path, load_vae_teacher
from dtpipe.manifests.errors import ConfigError, ShapeError, TeacherError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import ViewSpec
from parts import paths
from parts.extractions import MakeConfig
from parts.paths import SHARED
from parts.stored import recomputed, stored_level
from parts.tensors import hooked, relative

FIXTURES = paths.FIXTURES / "vae"
WEIGHTS = "diffusion_pytorch_model.safetensors"
ONE_VIEW = [ViewSpec(draw=0, timestep=None)]
F8 = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
    "sample_size": 32,
}
F16 = {
    "block_out_channels": (8, 8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 4,
    "num_vq_embeddings": 16,
    "latent_channels": 8,
}
KL_TAPS = {"l2": "decoder.up_blocks.1.resnets.1", "l3": "decoder.up_blocks.0.resnets.1"}
CASES = {
    "kl": (AutoencoderKL, F8, KL_TAPS),
    "kl_without_quant_conv": (
        AutoencoderKL,
        F8 | {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
        KL_TAPS,
    ),
    "vq_f16": (
        VQModel,
        F16,
        {
            "l2": "decoder.up_blocks.2.resnets.1",
            "l3": "decoder.up_blocks.1.resnets.1",
            "l4": "decoder.up_blocks.0.attentions.1",
        },
    ),
    "tiny": (AutoencoderTiny, {"latent_channels": 4}, {"l2": "decoder.layers.9", "l3": "decoder.layers.4"}),
}


def save(folder: Path, case: str = "kl", **changes: object) -> Path:
    """An autoencoder with random weights in a folder of its own; norms that do something."""
    network_class, settings, _ = CASES[case]
    torch.manual_seed(0)
    network = network_class(**settings | changes)
    for name, weight in network.named_parameters():
        if "norm" in name or "embedding" in name:
            torch.nn.init.normal_(weight, 0.5, 0.5)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("kl"))


def load(path: Path | str, **changes: object) -> VaeTeacher:
    return load_vae_teacher(TeacherConfig.model_validate({"path": str(path), **changes}))


def pictures(num: int = 2, height: int = 32, width: int = 64) -> torch.Tensor:
    rng = np.random.Generator(np.random.Philox(5))
    return torch.from_numpy(rng.random((num, 3, height, width), np.float32) * 2 - 1)


@pytest.mark.parametrize("case", CASES)
def test_levels_are_those_of_the_whole_forward_pass_of_diffusers(case: str, tmp_path: Path) -> None:
    network_class, _, taps = CASES[case]
    teacher = load(save(tmp_path, case))
    images = pictures()
    network = network_class.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    tiny = (
        network_class is AutoencoderTiny
    )  # its forward() rounds latents to bytes, as if stored: encode and decode do not
    wanted = hooked(network, taps, lambda: network.decode(network.encode(images).latents) if tiny else network(images))
    found = teacher.encode(images, {}, ONE_VIEW)
    assert {level.name: level.tap for level in teacher.spec.levels} == taps
    assert set(found) == set(wanted)
    for level in teacher.spec.levels:
        assert found[level.name].shape == (2, 1, level.channels, 32 // level.stride, 64 // level.stride)
        assert relative(found[level.name][:, 0], wanted[level.name]) < 1e-6


def test_a_sampled_latent_is_mean_plus_deviation_times_noise(kl_folder: Path) -> None:
    teacher = load(kl_folder, options={"latent": "sampled"})
    assert teacher.spec.noise_shapes == {"vae": (1, -1, -1)}
    images, draws = pictures(), torch.from_numpy(draw_noise(0, "key", 0, "vae", (2, 3, 1, 32, 64)))
    views = [
        ViewSpec(draw=0, timestep=None),
        ViewSpec(draw=4, timestep=None),
        ViewSpec(draw=4, timestep=None, flip=True),
    ]
    found = teacher.encode(images, {"vae": draws}, views)
    network = AutoencoderKL.from_pretrained(kl_folder, low_cpu_mem_usage=False).eval().double()
    for idx, view in enumerate(views):
        shown = (images.flip(-1) if view.flip else images).double()
        mean, logvar = (
            network.encode(shown).latent_dist.parameters.detach().numpy().reshape(2, 2, 4, 4, 8).swapaxes(0, 1)
        )
        noise = np.empty_like(mean)
        for channel, row, column in np.ndindex(4, 4, 8):
            noise[:, channel, row, column] = draws[:, idx, 0, row * 8 + channel // 8, column * 8 + channel % 8]
        latent = torch.from_numpy(mean + np.exp(0.5 * np.clip(logvar, -30, 20)) * noise)
        wanted = hooked(network, KL_TAPS, lambda latent=latent: network.decode(latent))
        assert max(relative(found[name][:, idx], wanted[name]) for name in wanted) < 1e-5
    assert relative(found["l3"][:, 0], found["l3"][:, 1]) > 1e-2


def test_noise_is_asked_for_in_as_many_channels_as_cells_need(tmp_path: Path) -> None:
    f2 = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    teacher = load(
        save(tmp_path, latent_channels=9, **f2),
        options={"latent": "sampled"},
        taps={"l0": "decoder.conv_out", "l1": "decoder.conv_in"},
    )
    assert teacher.spec.noise_shapes == {"vae": (3, -1, -1)}
    draws = torch.from_numpy(draw_noise(0, "key", 0, "vae", (1, 1, 3, 32, 32)))
    assert teacher.encode(pictures(1, 32, 32), {"vae": draws}, ONE_VIEW)["l1"].shape == (1, 1, 8, 16, 16)


def test_a_flipped_view_sees_the_flipped_image_and_draws_of_a_mean_are_equal(kl_folder: Path) -> None:
    teacher, images = load(kl_folder), pictures()
    views = [
        ViewSpec(draw=0, timestep=None),
        ViewSpec(draw=0, timestep=None, flip=True),
        ViewSpec(draw=1, timestep=None),
    ]
    found = teacher.encode(images, {}, views)
    flipped = teacher.encode(images.flip(-1), {}, ONE_VIEW)
    assert torch.equal(found["l2"][:, 1], flipped["l2"][:, 0])
    assert torch.equal(found["l2"][:, 0], found["l2"][:, 2])
    assert relative(found["l2"][:, 1], found["l2"][:, 0].flip(-1)) > 1e-2


def test_features_do_not_depend_on_the_batch_and_padding_is_finite(kl_folder: Path) -> None:
    teacher, images = load(kl_folder, options={"latent": "sampled"}), pictures(3)
    draws = torch.from_numpy(draw_noise(0, "key", 0, "vae", (3, 1, 1, 32, 64)))
    images[2], draws[2] = 0, 0
    together, alone = (
        teacher.encode(images, {"vae": draws}, ONE_VIEW),
        teacher.encode(images[1:2], {"vae": draws[1:2]}, ONE_VIEW),
    )
    assert all(relative(together[name][1:2], alone[name]) < 1e-5 for name in alone)
    assert all(bool(level.isfinite().all()) for level in together.values())


def test_missing_levels_are_said_and_left_out_or_pooled(kl_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert [level.name for level in load(kl_folder).spec.levels] == ["l2", "l3"]
    assert "no level l4, l5" in caplog.text
    caplog.clear()
    teacher = load(kl_folder, options={"pool_missing": True})
    assert caplog.text == ""
    assert [(level.name, level.stride, level.channels) for level in teacher.spec.levels] == [
        ("l2", 4, 16),
        ("l3", 8, 16),
        ("l4", 16, 16),
        ("l5", 32, 16),
    ]
    assert teacher.spec.levels[-1].tap == "decoder.up_blocks.0.resnets.1, average pooled by 4"
    assert teacher.spec.options["pool_missing"] is True
    found = teacher.encode(pictures(), {}, ONE_VIEW)
    deepest = found["l3"].double().numpy()
    assert relative(found["l4"], deepest.reshape(2, 1, 16, 2, 2, 4, 2).mean((4, 6))) < 1e-6
    assert relative(found["l5"], deepest.reshape(2, 1, 16, 1, 4, 2, 4).mean((4, 6))) < 1e-6


def test_taps_can_be_named_in_the_encoder_too(kl_folder: Path) -> None:
    taps = {"l1": "encoder.down_blocks.0", "l3": "decoder.conv_in"}
    teacher = load(kl_folder, taps=taps)
    network, images = AutoencoderKL.from_pretrained(kl_folder, low_cpu_mem_usage=False).eval(), pictures()
    wanted = hooked(network, taps, lambda: network(images))
    found = teacher.encode(images, {}, ONE_VIEW)
    assert all(relative(found[name][:, 0], wanted[name]) < 1e-6 for name in taps)
    with pytest.raises(TeacherError, match="has stride 8, so it is level l3, not l4"):
        load(kl_folder, taps={"l4": "decoder.conv_in"})


def test_the_pass_ends_after_the_last_tap(kl_folder: Path) -> None:
    teacher, ran = load(kl_folder), []
    teacher.network.get_submodule("decoder.up_blocks.2").register_forward_hook(lambda *_: ran.append("up_blocks.2"))
    teacher.encode(pictures(), {}, ONE_VIEW)
    assert ran == []


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 3e-3), ("bfloat16", 3e-2)])
def test_low_precision_is_near_and_comes_back_storable(kl_folder: Path, dtype: str, limit: float) -> None:
    images = pictures()
    exact, rounded = (
        load(kl_folder).encode(images, {}, ONE_VIEW),
        load(kl_folder, dtype=dtype).encode(images, {}, ONE_VIEW),
    )
    for name, level in rounded.items():
        assert level.dtype in (torch.float16, torch.float32)
        assert 0 < relative(level, exact[name]) < limit


def test_attention_weights_under_their_old_names_are_the_same_teacher(kl_folder: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(kl_folder, tmp_path / "old"))
    names = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    tensors = load_file(old / WEIGHTS)
    for new_name, old_name in names.items():
        tensors = {name.replace(new_name, old_name): tensor for name, tensor in tensors.items()}
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, old / WEIGHTS)
    assert load(old).spec == load(kl_folder).spec


def test_a_part_of_a_pipeline_is_found_when_asked_for(kl_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(kl_folder, tmp_path / "vae")
    (tmp_path / "unet").mkdir()
    assert not is_autoencoder_path(str(tmp_path))
    assert load(tmp_path).spec == load(kl_folder).spec


def taesd_folder(folder: Path, variant: str) -> Path:
    """Files of taesd with the weights that the fixtures' README describes."""
    shapes = json.loads((FIXTURES / "shapes.json").read_text())
    for part in ("encoder", "decoder"):
        tensors = {}
        for name, shape in shapes[f"{variant}_{part}"].items():
            noise = torch.from_numpy(draw_noise(0, f"{part}.{name}", 0, "z", tuple(shape)))
            vector = noise * 0.1 + float(name.endswith("weight"))
            tensors[name] = vector if len(shape) == 1 else noise * float(np.prod(shape[1:])) ** -0.5
        torch.save(tensors, folder / f"{variant}_{part}.pth")
    return folder


@pytest.mark.parametrize(("variant", "levels"), [("taesd", "l2 l3"), ("taef2", "l2 l3"), ("taesana", "l2 l3 l4 l5")])
def test_taesd_files_give_the_features_of_the_original(variant: str, levels: str, tmp_path: Path) -> None:
    wanted = np.load(FIXTURES / f"{variant}.npz")
    teacher = load(taesd_folder(tmp_path, variant))
    images = torch.from_numpy(wanted["image01"]) * 2 - 1
    found = teacher.encode(images, {}, ONE_VIEW)
    assert " ".join(found) == levels
    assert max(relative(level[:, 0], wanted[name]) for name, level in found.items()) < 1e-5
    with torch.inference_mode():
        latent = teacher.latent(images)
        decoded = teacher.network.decode(latent).sample
    assert relative(latent, wanted["latent"]) < 1e-5
    assert relative((decoded + 1) / 2, wanted["decoded01"]) < 1e-5


def test_taesd_files_are_found_by_folder_and_by_either_file(tmp_path: Path) -> None:
    taesd_folder(tmp_path, "taesd")
    found = [
        load_teacher(TeacherConfig(path=str(tmp_path / name))).spec
        for name in ("", "taesd_encoder.pth", "taesd_decoder.pth")
    ]
    assert found[0] == found[1] == found[2]
    assert (found[0].kind, found[0].options["network"], found[0].image_px) == ("vae", "TAESD", (256, 256))
    for part in ("encoder", "decoder"):
        shutil.copy(tmp_path / f"taesd_{part}.pth", tmp_path / f"taesd3_{part}.pth")
    with pytest.raises(TeacherError, match="holds 2 autoencoders; give the file of one"):
        load(tmp_path)
    (tmp_path / "taesd_decoder.pth").unlink()
    assert not is_autoencoder_path(str(tmp_path / "taesd_encoder.pth"))
    with pytest.raises(TeacherError, match="is a file, but no taesd one"):
        load(tmp_path / "taesd_encoder.pth")
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "taesd3_decoder.pth")
    with pytest.raises(TeacherError, match=r"not a decoder in the layout of taesd\.py"):
        load(tmp_path)


def test_only_autoencoders_are_recognised(kl_folder: Path, tmp_path: Path) -> None:
    assert is_autoencoder_path(str(kl_folder))
    UNet2DModel(
        8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    ).save_config(tmp_path)
    for path in (tmp_path, tmp_path / "config.json", tmp_path / "none", "owner/name", "\0", "x" * 5000):
        assert not is_autoencoder_path(str(path))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit_config(folder, _class_name="AutoencoderDC"), "holds a AutoencoderDC; kind vae reads"),
        (lambda folder: edit_config(folder, in_channels=4), "does not take and give RGB"),
        (lambda folder: edit_config(folder, norm_num_groups=5), "diffusers cannot build this AutoencoderKL"),
        (lambda folder: edit_config(folder, latent_channels=3), "weights do not fit their network"),
        (
            lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50]),
            "not readable as weights",
        ),
        (lambda folder: (folder / WEIGHTS).unlink(), "holds none of"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: there is no such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_a_sentence(
    damage: Callable[[Path], object], message: str, kl_folder: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(kl_folder, tmp_path / "broken"))
    damage(broken)
    with pytest.raises(TeacherError, match=message):
        load(broken)


def test_a_hub_id_needs_its_commit() -> None:
    with pytest.raises(TeacherError, match="40 hex digits"):
        load("stabilityai/sd-vae-ft-mse", revision="main")


def test_options_and_inputs_that_do_not_fit_are_refused(kl_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="AutoencoderTiny has one latent per image"):
        load(save(tmp_path, "tiny"), options={"latent": "sampled"})
    with pytest.raises(ConfigError, match=r"options\.latent"):
        load(kl_folder, options={"latent": "mode"})
    teacher = load(kl_folder, options={"latent": "sampled"})
    with pytest.raises(ShapeError, match="multiples of 8"):
        teacher.encode(pictures(2, 36, 32), {}, ONE_VIEW)
    with pytest.raises(ShapeError, match=r"noise\['vae'\] is None"):
        teacher.encode(pictures(), {}, ONE_VIEW)


def test_an_extracted_dataset_holds_the_features_of_its_draws(
    kl_folder: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        teacher={"path": str(kl_folder), "options": {"latent": "sampled", "pool_missing": True}},
        noise={"draws": 2, "flips": True},
        shard={"samples": 3, "dtype": "float32"},
    )
    result = run_extraction(config)
    dataset = FeatureDataset.open(result.url)
    assert [(level.name, level.height) for level in dataset.levels] == [("l2", 8), ("l3", 4), ("l4", 2), ("l5", 1)]
    for name, level in recomputed(dataset, load_teacher(config.teacher), range(8)).items():
        np.testing.assert_allclose(stored_level(dataset, name, range(8)), level, 1e-4, 1e-5)
    other = run_extraction(make_config(**config.model_dump() | {"out": str(tmp_path / "other"), "decode_threads": 3}))
    assert other.digest == result.digest


def test_several_draws_of_a_latent_without_noise_are_refused(
    kl_folder: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    """They would be equal, and stored twice."""
    config = make_config(teacher={"path": str(kl_folder)}, noise={"draws": 2})
    with pytest.raises(
        ConfigError, match=r"extract\.noise\.draws is 2, and this teacher's encoding has no noise; leave it out"
    ):
        run_extraction(config)
    assert not (tmp_path / "features").exists()


@pytest.mark.skipif(not (SHARED / "weights" / "taef2").is_dir(), reason="no ../shared/weights/taef2")
@pytest.mark.skipif(not (SHARED / "data" / "flowers5_128").is_dir(), reason="no ../shared/data/flowers5_128")
def test_real_weights_reconstruct_photographs() -> None:
    teacher = load_teacher(TeacherConfig(path=str(SHARED / "weights" / "taef2")))
    assert isinstance(teacher, VaeTeacher)
    files = [
        sorted(folder.iterdir())[0]
        for folder in sorted((SHARED / "data" / "flowers5_128").iterdir())
        if folder.is_dir()
    ]
    images = torch.from_numpy(
        np.stack([np.asarray(Image.open(file).convert("RGB").crop((0, 0, 128, 128))) for file in files])
    )
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        decoded = teacher.network.decode(teacher.latent(pixels)).sample.clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (decoded - pixels).square().mean((1, 2, 3)))

    assert len(psnr) == 5
    assert psnr.min() > 20
