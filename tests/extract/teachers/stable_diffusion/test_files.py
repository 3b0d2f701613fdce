"""Stable Diffusion folders: what is read, what changes the digest, and what is said of folders that do not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.diffusion.files import is_unet_path
from dtpipe.extract.teachers.stable_diffusion.files import (
    Component,
    PipelineFiles,
    build,
    find_pipeline,
    is_pipeline_path,
)
from dtpipe.extract.teachers.stable_diffusion.levels import levels_of
from dtpipe.extract.teachers.stable_diffusion.teacher import load_stable_diffusion
from dtpipe.extract.teachers.stable_diffusion.text import embed_prompt, read_embedding
from dtpipe.manifests.errors import ConfigError, DtpipeError, TeacherError
from parts import sd_pipelines as pipelines
from parts.damage import edit_json, edit_tensors

SD_14_UNET = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pipelines.save_pipeline(tmp_path_factory.mktemp("sd1"))


@pytest.fixture
def broken(folder, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folder, tmp_path / "teacher"))


def load(path: Path | str, revision: str | None = None, **options: object) -> Any:
    return load_stable_diffusion(TeacherConfig(path=str(path), revision=revision, options=options))


# What is read


def test_the_layout_of_stable_diffusion_1_4_has_the_papers_strides_for_half_the_image():
    """Parameters and levels of the published config, on a network without values."""
    vae = {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4}
    parts = (Component(Path("unet"), Path("unet/w"), SD_14_UNET), Component(Path("vae"), Path("vae/w"), vae))
    files = PipelineFiles(Path("sd"), *parts, {}, "epsilon")
    unet = build("UNet2DConditionModel", files.unet)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    assert files.image_px == (512, 512)
    assert [
        (level.name, level.stride, level.channels, level.tap) for level in levels_of(unet, files, None).values()
    ] == [
        ("l3", 8, 320, "up_blocks.3.attentions.2"),
        ("l4", 16, 640, "up_blocks.2.attentions.2"),
        ("l5", 32, 1280, "up_blocks.1.attentions.2"),
        ("l6", 64, 1280, "up_blocks.0.resnets.2"),
    ]


def test_a_path_is_taken_only_for_what_it_is(folder, ddpm, tmp_path):
    assert is_pipeline_path(str(folder))
    assert not is_unet_path(str(folder))
    assert not any(
        is_pipeline_path(str(path)) for path in (ddpm, folder / "unet", tmp_path, "CompVis/stable-diffusion-v1-4", "")
    )


def test_tokens_are_padded_as_the_tokenizer_says(folder, tmp_path):
    """By hand from the vocabulary: begin 56, a</w> 27, cat</w> 55, end 57; Stable Diffusion 2 pads with !, 26."""
    seen: list[list[int]] = []

    def note(module: torch.nn.Module, args: tuple[torch.Tensor, ...], _output: object) -> None:
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == 58:
            seen.append(args[0].tolist()[0])

    for name, pad in (("one", "<|endoftext|>"), ("two", "!")):
        pipelines.save_text_encoder(tmp_path / name / "text_encoder")
        pipelines.save_tokenizer(tmp_path / name / "tokenizer", pad)
        handle = torch.nn.modules.module.register_module_forward_hook(note)
        embed_prompt(tmp_path / name, "A cat", pipelines.WIDTH)
        handle.remove()
    assert seen == [[56, 27, 55] + [57] * 9, [56, 27, 55, 57] + [26] * 8]


def test_the_digest_is_of_the_tensors_that_are_used(folder, broken):
    teacher = load(folder)
    edit_tensors(broken / pipelines.VAE, lambda tensors: tensors["decoder.conv_in.weight"].add_(1))
    tensors = load_file(broken / pipelines.UNET)
    (broken / pipelines.UNET).unlink()
    torch.save(dict(reversed(tensors.items())), broken / "unet" / "diffusion_pytorch_model.bin")
    assert load(broken).spec == teacher.spec
    digests = {teacher.spec.weights_blake3}
    for name, key in ((pipelines.VAE, "encoder.conv_in.bias"), (pipelines.TEXT, "text_model.final_layer_norm.bias")):
        edit_tensors(broken / name, lambda tensors, key=key: tensors[key].add_(1))
        digests.add(load(broken).spec.weights_blake3)
    assert len(digests) == 3


def test_a_text_embedding_has_one_row_per_token(tmp_path):
    path = tmp_path / "text.safetensors"
    rows = torch.arange(8.0).reshape(2, 4)
    found = []
    for tensor in (rows, rows[None], rows.half()):
        save_file({"text": tensor}, path)
        found.append(read_embedding(path, 4))
    assert all(torch.equal(each.values, rows[None]) for each in found)
    assert found[0].blake3 != found[2].blake3
    for wrong in (
        {"text": rows.T.contiguous()},
        {"a": rows, "b": rows + 1},
        {"text": torch.zeros(2, 2, 4)},
        {"text": torch.zeros(4)},
    ):
        save_file(wrong, path)
        with pytest.raises(
            TeacherError, match=r"text\.safetensors: holds .*; a text embedding is one tensor of shape \(tokens, 4\)"
        ):
            read_embedding(path, 4)
    save_file({"text": rows / 0}, path)
    with pytest.raises(TeacherError, match="not finite"):
        read_embedding(path, 4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a process's own memory is read from Linux's /proc")
def test_weights_are_in_memory_once_while_they_load(tmp_path):
    """100 MB in float16 become 200 MB in float32, in a process whose memory grows by less than 1.3 times that.

    Pages of the mapped file do not count, since the kernel takes them back when it likes; what is freed goes back.
    """
    save_file(
        {f"{idx}.weight": torch.zeros(1024, 1024, dtype=torch.float16) for idx in range(50)}, tmp_path / "w.safetensors"
    )
    script = tmp_path / "load.py"
    script.write_text(f"""
import threading, torch
from pathlib import Path
from dtpipe.extract.teachers.stable_diffusion.files import assign_weights, open_weights
def own_mib(): return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024
with torch.device("meta"):
    network = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(50)))
path = Path({str(tmp_path / "w.safetensors")!r})
tensors = open_weights(path)
tensors["0.weight"].float().isfinite().all()
before, seen, done = own_mib(), [], threading.Event()
def watch():
    while not done.wait(0.001): seen.append(own_mib())
watcher = threading.Thread(target=watch); watcher.start()
assign_weights(network, tensors, path, "cpu")
seen.append(own_mib()); done.set(); watcher.join()
print(max(seen) - before)
""")
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, env={**os.environ, **at_once}
    )
    assert 150 < float(result.stdout) < 1.3 * 200


# What does not fit


def without(*names: str) -> Callable[[Path], None]:
    return lambda root: [(root / name).unlink() for name in names]  # type: ignore[func-returns-value]


def setting(name: str, **changes: object) -> Callable[[Path], None]:
    return lambda root: edit_json(
        root / name / ("scheduler_config.json" if name == "scheduler" else "config.json"), **changes
    )


def tensor(name: str, key: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key]
        if value is not None:
            tensors[key] = value

    return lambda root: edit_tensors(root / name, change)


def vocabulary(*words: str) -> Callable[[Path], None]:
    content = json.dumps({word: idx for idx, word in enumerate(words)})
    return lambda root: (root / "tokenizer" / "vocab.json").write_text(content) and None


BIAS = "conv_in.bias"


def cut(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-10]) and None


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without("unet/config.json"), r"unet/config\.json: there is no such file"),
        (without("scheduler/scheduler_config.json"), r"scheduler_config\.json: there is no such file"),
        (setting("scheduler", prediction_type="flow"), "prediction_type is 'flow'; epsilon, v_prediction"),
        (without(pipelines.UNET), r"unet: holds none of diffusion_pytorch_model\.safetensors"),
        (without(pipelines.TEXT), r"text_encoder: holds none of model\.safetensors"),
        (without("tokenizer/vocab.json"), r"tokenizer: holds no vocab\.json"),
        (without("tokenizer/merges.txt"), r"tokenizer: holds no merges\.txt"),
        (cut("tokenizer/vocab.json"), "tokenizer: no CLIP tokenizer can be read"),
        (
            vocabulary("c", "a", "t</w>", "ca", "cat</w>"),
            "tokenizer: has 7 tokens, the text encoder 58; use files of one checkpoint",
        ),
        (cut(pipelines.UNET), r"unet/.*: not readable as weights"),
        (cut(pipelines.VAE), r"vae/.*: not readable as weights"),
        (tensor(pipelines.UNET, BIAS, None), r"unet/.*: weights do not fit their network: conv_in\.bias is missing"),
        (tensor(pipelines.UNET, BIAS, torch.zeros(9)), r"conv_in\.bias has shape \(9,\), the network asks for \(8,\)"),
        (tensor(pipelines.UNET, BIAS, torch.full((8,), torch.nan)), r"conv_in\.bias holds values that are not finite"),
        (tensor(pipelines.VAE, "quant_conv.bias", None), r"vae/.*: weights do not fit .*: quant_conv\.bias is missing"),
        (
            setting("unet", _class_name="UNet2DModel"),
            "holds a UNet2DModel, not the UNet2DConditionModel of Stable Diffusion 1 and 2",
        ),
        (setting("unet", in_channels=9), "takes 9 channels and the VAE's latents have 4; inpainting"),
        (
            setting("unet", addition_embed_type="text"),
            "addition_embed_type is 'text', as in no Stable Diffusion 1 or 2",
        ),
        (
            setting("unet", mid_block_type="UNetMidBlock2DSimpleCrossAttn"),
            "blocks of kind UNetMidBlock2DSimpleCrossAttn are not supported",
        ),
        (setting("unet", attention_type="gated"), "attention_type 'gated' is not supported"),
        (setting("unet", sample_size=None), "sample_size is None; write the side"),
        (setting("unet", cross_attention_dim=None), "cross_attention_dim is None; write the width"),
        (setting("unet", norm_num_groups=7), "diffusers cannot build this UNet2DConditionModel"),
        (setting("unet", cross_attention_dim=24), "of width 16, the U-Net takes a clip_text_model of width 24"),
        (setting("vae", shift_factor=0.1), "shift_factor is set, as in no Stable Diffusion 1 or 2"),
        (setting("scheduler", _class_name="FlowMatchScheduler"), "FlowMatchScheduler is not known"),
        (setting("scheduler", rescale_betas_zero_snr=True), "rescale_betas_zero_snr is set"),
    ],
)
def test_a_folder_that_does_not_fit_says_where_and_why(broken, damage, says):
    damage(broken)
    with pytest.raises(TeacherError, match=says):
        load(broken)


@pytest.mark.parametrize(
    ("path", "options", "error", "says"),
    [
        ("nowhere/at/all", {}, TeacherError, "nowhere/at/all: no such folder; give the path"),
        ("CompVis/stable-diffusion-v1-4", {}, TeacherError, "give its commit"),
        (
            None,
            {"prompt": "a a a a a a a a a a a"},
            ConfigError,
            "prompt has 13 tokens, the text encoder takes 12; shorten it",
        ),
        (None, {"prompt": "cat", "text_embedding": "x"}, ConfigError, "prompt and text_embedding are both given"),
        (
            None,
            {"text_embedding": "missing.safetensors"},
            TeacherError,
            r"missing\.safetensors: not readable as weights",
        ),
        (None, {"vae_dtype": "float16"}, ConfigError, r"extract\.teacher\.options\.vae_dtype"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder, path, options, error, says):
    with pytest.raises(error, match=says) as caught:
        load(path or folder, **options)
    assert isinstance(caught.value, DtpipeError)


def test_a_hub_repository_that_is_not_there_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        TeacherError, match=r"cannot be had from the hub or its cache .*; download it and give the folder"
    ):
        find_pipeline("CompVis/stable-diffusion-v1-4", "1" * 40)
