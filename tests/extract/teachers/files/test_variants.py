"""Which file of weights is taken from a diffusers folder; names are those that diffusers writes itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from safetensors.torch import load_file

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.files.variants import (
    NETWORK_STEMS,
    TEXT_STEMS,
    find_part,
    find_weights,
    hub_patterns,
    small_hub_patterns,
)
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import ConfigError, TeacherError
from parts import sd_pipelines
from parts.teachers import write_ddpm

NAME = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ddpm(tmp_path_factory.mktemp("ddpm"), channels=(8, 8, 8))


@pytest.fixture
def folder(ddpm: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ddpm, tmp_path / "teacher"))


def digest(folder: Path, **options: object) -> str:
    return load_teacher(TeacherConfig(path=str(folder), options=options)).spec.weights_blake3


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_what_diffusers_saves_as_a_variant_is_read(safe: bool, sharded: bool, folder: Path) -> None:
    plain = digest(folder)
    unet = UNet2DModel.from_pretrained(folder / "unet")
    for parameter in unet.parameters():
        parameter.data.mul_(2)
    shard = {"max_shard_size": "30KB"} if sharded else {}
    unet.save_pretrained(folder / "unet", variant="fp16", safe_serialization=safe, **shard)
    assert bool(list((folder / "unet").glob("*.index*.json"))) == sharded
    assert digest(folder) == plain  # asked for nothing
    doubled = digest(folder, variant="fp16")
    assert doubled != plain
    (folder / "unet" / f"{NAME}.safetensors").unlink()
    assert digest(folder) == doubled  # the only weights there are
    (folder / "unet" / f"{NAME}.non_ema.bin").write_bytes(b"")
    with pytest.raises(TeacherError, match=r"holds weights of variants fp16, non_ema, .*options\.variant=fp16"):
        digest(folder)
    assert digest(folder, variant="fp16") == doubled


def test_a_variant_is_no_content_of_a_dataset(folder: Path) -> None:
    shutil.copy(folder / "unet" / f"{NAME}.safetensors", folder / "unet" / f"{NAME}.fp16.safetensors")
    specs = [
        load_teacher(TeacherConfig(path=str(folder), options=options)).spec for options in ({}, {"variant": "fp16"})
    ]
    assert specs[0] == specs[1]


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(folder: Path) -> None:
    with pytest.raises(
        TeacherError, match=r"no weights of extract\.teacher\.options\.variant 'fp32'; it has plain wei"
    ):
        digest(folder, variant="fp32")
    with pytest.raises(ConfigError, match=r"extract\.teacher\.options\.variant"):
        digest(folder, variant="../fp16")
    (folder / "unet" / f"{NAME}.safetensors").unlink()
    with pytest.raises(TeacherError, match=rf"holds none of {NAME}\.safetensors, {NAME}\.bin"):
        digest(folder)


def test_plain_weights_come_before_variants_and_safetensors_before_torch_files(tmp_path: Path) -> None:
    order = [f"{NAME}.safetensors", f"{NAME}.safetensors.index.json", f"{NAME}.bin", f"{NAME}.bin.index.json"]
    others = [f"{NAME}.fp16.safetensors", f"{NAME}.safetensors.index.fp16.json", f"{NAME}.fp16.bin"]
    shards = [f"{NAME}-00001-of-00002.safetensors", f"{NAME}.fp16-00001-of-00002.safetensors"]
    for name in [*order, *others, *shards]:
        (tmp_path / name).touch()
    for name in order:
        assert find_weights(tmp_path, NETWORK_STEMS, None).name == name
        (tmp_path / name).unlink()
    for name in others:
        assert find_weights(tmp_path, NETWORK_STEMS, None).name == name
        (tmp_path / name).unlink()
    with pytest.raises(TeacherError, match="holds none of"):
        find_weights(tmp_path, NETWORK_STEMS, None)


def test_text_encoders_have_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.fp16.bin").touch()
    assert find_weights(tmp_path, TEXT_STEMS, None).name == "pytorch_model.fp16.bin"
    (tmp_path / "model.safetensors").touch()
    assert find_part(tmp_path, TEXT_STEMS, "non_ema").name == "model.safetensors"
    assert find_part(tmp_path, TEXT_STEMS, "fp16").name == "pytorch_model.fp16.bin"


def test_patterns_for_the_hub_match_one_variant(tmp_path: Path) -> None:
    names = [f"{NAME}{end}" for end in (".safetensors", ".fp16.safetensors", "-00001-of-00002.safetensors", ".bin")]

    def matched(variant: str | None) -> list[str]:
        return [name for name in names if any(Path(name).match(pattern) for pattern in hub_patterns(variant))]

    assert matched(None) == [names[0], *names[2:]]
    assert matched("fp16") == [names[1]]
    small = small_hub_patterns(None, ("", "unet/"))
    assert all(any(Path("unet", name).match(pattern) for pattern in small) for name in names)


def test_parts_of_a_stable_diffusion_may_differ_in_their_variants(tmp_path: Path) -> None:
    """The U-Net as .fp16.bin alone, the VAE in shards, the text encoder as .fp16.safetensors."""
    root = sd_pipelines.save_pipeline(tmp_path / "sd")
    whole = digest(root)
    torch.save(load_file(root / sd_pipelines.UNET), root / "unet" / f"{NAME}.fp16.bin")
    (root / sd_pipelines.UNET).unlink()
    (root / sd_pipelines.TEXT).replace(root / "text_encoder" / "model.fp16.safetensors")
    assert digest(root) == whole == digest(root, variant="fp16")
    vae = AutoencoderKL.from_pretrained(root / "vae")
    (root / sd_pipelines.VAE).unlink()
    vae.save_pretrained(root / "vae", max_shard_size="8KB")
    assert len(list((root / "vae").glob("*-of-*"))) > 1
    assert digest(root) == whole
