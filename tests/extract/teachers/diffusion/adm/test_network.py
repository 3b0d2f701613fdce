"""ADM's network against what it must equal: diffusers' where it can, attention by hand, the published files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.diffusion.adm.keys import published_shapes, unet_tensors
from dtpipe.extract.teachers.diffusion.adm.layout import (
    AdmLayout,
    AdmOptions,
    AdmSettings,
    attention_widths,
    complete,
    infer_adm_layout,
)
from dtpipe.extract.teachers.diffusion.adm.network import AdmNetwork, HeadedAttention
from dtpipe.extract.teachers.diffusion.precision import compute_in
from dtpipe.extract.teachers.diffusion.unet import LoadedUNet, make_diffusion_teacher
from dtpipe.extract.teachers.files.published import PublishedTeacher, published_teachers
from parts.paths import FIXTURES
from parts.tensors import randn, random_weights

Shapes = dict[str, tuple[int, ...]]
SETTINGS = AdmSettings(16, False, "linear", (32, 32))
LAYOUTS = {
    "resampling blocks": AdmLayout((32, 32, 64), 2, (False, True, True), 6, True, True, None),
    "resampling convolutions": AdmLayout((32, 64), 1, (True, False), 3, False, False, None),
}


def diffusers_network(layout: AdmLayout, settings: AdmSettings) -> Any:
    """The UNet2DModel that computes the same function, random weights in it."""
    ways = {"Down": layout.attention, "Up": layout.attention[::-1]}
    plain = "Resnet{}sampleBlock2D" if layout.resblock_updown else "{}Block2D"
    types = {way: [f"Attn{way}Block2D" if attends else plain.format(way) for attends in ways[way]] for way in ways}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(
            out_channels=layout.out_channels,
            layers_per_block=layout.num_res_blocks,
            block_out_channels=layout.widths,
            down_block_types=types["Down"],
            up_block_types=types["Up"],
            downsample_type="resnet" if layout.resblock_updown else "conv",
            upsample_type="resnet" if layout.resblock_updown else "conv",
            resnet_time_scale_shift="scale_shift" if layout.scale_shift else "default",
            attention_head_dim=settings.head_channels,
            attn_norm_num_groups=32,
            freq_shift=0,
        ).eval()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_diffusers_can_hold_too_has_its_bits(layout: str, dtype: str, channels_last: bool) -> None:
    """Datasets that were made with diffusers' network keep their digest."""
    theirs, ours = diffusers_network(LAYOUTS[layout], SETTINGS), AdmNetwork(LAYOUTS[layout], SETTINGS).eval()
    ours.load_state_dict(theirs.state_dict())
    images, timesteps = randn(2, 3, 32, 64), torch.tensor([3, 900])
    memory = torch.channels_last if channels_last else torch.contiguous_format
    outputs = []
    for network in (theirs, ours):
        if dtype != "float32":
            compute_in(network, getattr(torch, dtype), "")
        network.to(memory_format=memory)
        with torch.inference_mode():
            outputs.append(network(images.contiguous(memory_format=memory), timesteps, return_dict=False)[0])
    assert torch.equal(*outputs)
    assert outputs[0].std() > 0.1


def attention_by_hand(hidden: np.ndarray, weights: Mapping[str, np.ndarray], num_heads: int, new: bool) -> np.ndarray:
    """Head by head and position by position, in float64, as the published weights have q, k and v."""
    channels, positions = hidden.shape
    groups = hidden.reshape(32, -1)
    normed = ((groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + 1e-5)).reshape(
        hidden.shape
    )
    normed = normed * weights["norm.weight"][:, None] + weights["norm.bias"][:, None]
    joined = weights["qkv.weight"][:, :, 0] @ normed + weights["qkv.bias"][:, None]
    size, seen = channels // num_heads, np.zeros_like(hidden)
    for head in range(num_heads):
        starts = [part * channels + head * size if new else (3 * head + part) * size for part in range(3)]
        q, k, v = (joined[start : start + size] for start in starts)
        for position in range(positions):
            scores = np.array([q[:, position] @ k[:, other] / sqrt(size) for other in range(positions)])
            shares = np.exp(scores - scores.max())
            seen[head * size : (head + 1) * size, position] = v @ (shares / shares.sum())
    return hidden + weights["proj_out.weight"][:, :, 0] @ seen + weights["proj_out.bias"][:, None]


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("block", ["middle_block.1", "output_blocks.0.1"])
def test_attention_is_what_loops_by_hand_give(block: str, new: bool) -> None:
    """Four heads in the encoder, two in the decoder, in both orders; 1e-5 is what float32 rounds."""
    layout = AdmLayout((32, 64), 1, (False, True), 3, True, True, None)
    settings = AdmSettings(None, new, "linear", (32, 32), num_heads=4, num_heads_upsample=2)
    num_heads = settings.heads(64, decoder=block.startswith("output"))
    shapes = {"norm.weight": (64,), "norm.bias": (64,), "qkv.weight": (192, 64, 1), "qkv.bias": (192,)}
    weights = random_weights(shapes | {"proj_out.weight": (64, 64, 1), "proj_out.bias": (64,)})
    weights["qkv.weight"] *= 2  # so that attention is no mean
    published = {f"{block}.{name}": value for name, value in weights.items()}
    ours = HeadedAttention(64, num_heads)
    ours.load_state_dict(
        {name.partition("attentions.0.")[2]: part for name, part in unet_tensors(published, layout, settings, None)}
    )
    hidden = randn(1, 64, 3, 4)
    found = ours(hidden).detach()[0].flatten(1).double().numpy()
    exact = {name: value.double().numpy() for name, value in weights.items()}
    other = 6 - num_heads
    wanted = attention_by_hand(hidden[0].flatten(1).double().numpy(), exact, num_heads, new)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for wrong in ((num_heads, not new), (other, new)):
        assert np.abs(attention_by_hand(hidden[0].flatten(1).double().numpy(), exact, *wrong) - wanted).max() > 0.01


def names_by_hand(options: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a file, by the rules of guided-diffusion's `UNetModel`, in the words of its flags."""
    base, per_level = options["model_channels"], options["num_res_blocks"]
    widths = [int(factor * base) for factor in options["channel_mult"]]
    shapes: Shapes = {"time_embed.0.weight": (4 * base, base), "time_embed.2.weight": (4 * base, 4 * base)}

    def residual(name: str, channels: int, width: int) -> None:
        shapes[f"{name}.in_layers.0.weight"] = (channels,)
        shapes[f"{name}.in_layers.2.weight"] = (width, channels, 3, 3)
        shapes[f"{name}.emb_layers.1.weight"] = ((2 if options["use_scale_shift_norm"] else 1) * width, 4 * base)
        shapes[f"{name}.out_layers.0.weight"] = (width,)
        shapes[f"{name}.out_layers.3.weight"] = (width, width, 3, 3)
        if channels != width:
            shapes[f"{name}.skip_connection.weight"] = (width, channels, 1, 1)

    def attention(name: str, width: int) -> None:
        shapes[f"{name}.norm.weight"] = (width,)
        shapes[f"{name}.qkv.weight"] = (3 * width, width, 1)
        shapes[f"{name}.proj_out.weight"] = (width, width, 1)

    def resample(name: str, kind: str, width: int) -> None:
        if options["resblock_updown"]:
            residual(name, width, width)
        else:
            shapes[f"{name}.{kind}.weight"] = (width, width, 3, 3)

    shapes["input_blocks.0.0.weight"] = (widths[0], 3, 3, 3)
    given, block, channels = [widths[0]], 1, widths[0]
    for level, width in enumerate(widths):
        for _ in range(per_level):
            residual(f"input_blocks.{block}.0", channels, width)
            if 2**level in options["attention_resolutions"]:
                attention(f"input_blocks.{block}.1", width)
            given.append(width)
            block, channels = block + 1, width
        if level < len(widths) - 1:
            resample(f"input_blocks.{block}.0", "op", width)
            given.append(width)
            block += 1
    for layer, make in enumerate((residual, attention, residual)):
        make(f"middle_block.{layer}", *[channels] * (2 if make is residual else 1))
    block = 0
    for level, width in reversed(list(enumerate(widths))):
        for idx in range(per_level + 1):
            residual(f"output_blocks.{block}.0", channels + given.pop(), width)
            attends = 2**level in options["attention_resolutions"]
            if attends:
                attention(f"output_blocks.{block}.1", width)
            if level and idx == per_level:
                resample(f"output_blocks.{block}.{1 + attends}", "conv", width)
            block, channels = block + 1, width
    shapes["out.0.weight"], shapes["out.2.weight"] = (channels,), (options["out_channels"], channels, 3, 3)
    shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    if options.get("num_classes"):
        shapes["label_emb.weight"] = (options["num_classes"], 4 * base)
    return shapes


@pytest.mark.parametrize("case", ["adm256_layout", "plain", "class_cond", "adm128_layout", "half_first"])
def test_the_names_by_hand_are_the_originals(case: str) -> None:
    """Those that the original code gave for small networks; what follows relies on them."""
    about = json.loads(str(np.load(FIXTURES / "adm" / f"{case}.npz")["about"]))
    assert names_by_hand(about["options"]) == {name: tuple(shape) for name, shape in about["shapes"].items()}


FLAGS: dict[int, dict[str, Any]] = {
    64: {"model_channels": 192, "num_res_blocks": 3, "channel_mult": (1, 2, 3, 4)},
    128: {"channel_mult": (1, 1, 2, 3, 4)},
    256: {"channel_mult": (1, 1, 2, 2, 4, 4)},
    512: {"channel_mult": (0.5, 1, 1, 2, 2, 4, 4)},
}
"""By image size: what differs between the flags of the published networks."""
MILLIONS = {"64 px, classes": 296, "128 px, classes": 422, "256 px, classes": 554, "512 px, classes": 559}
"""Parameters by the paper's table of hyperparameters."""
UNCONDITIONAL_256 = (566, 552_814_086)  # tensors and parameters, counted in the original's code
PUBLISHED = {
    f"{entry.image_px[0]} px{', classes' * ('conditional' in entry.name)}": entry
    for entry in published_teachers()
    if entry.kind == "adm"
}
"""One of each network; those of LSUN and FFHQ differ in their weights alone."""
SCHEDULE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "epsilon"}


def published_names(entry: PublishedTeacher) -> Shapes:
    """The file of a published network, as its authors' flags say."""
    px = entry.image_px[0]
    common = {"model_channels": 256, "num_res_blocks": 2, "out_channels": 6, "use_scale_shift_norm": True}
    attention = {"attention_resolutions": [px // side for side in (32, 16, 8)], "resblock_updown": True}
    classes = {"num_classes": 1000} if "conditional" in entry.name else {}
    return names_by_hand({**common, **attention, **classes, **FLAGS[px]})


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_network_is_held(name: str) -> None:
    """Its file's names and shapes, its size by the paper, and the levels that are listed; without values."""
    entry, shapes = PUBLISHED[name], published_names(PUBLISHED[name])
    layout = infer_adm_layout(shapes, name)
    settings = complete(AdmOptions.model_validate(entry.options), layout, name)
    with torch.device("meta"):
        network = AdmNetwork(layout, settings)
    assert (
        published_shapes(layout, {name: tuple(value.shape) for name, value in network.state_dict().items()}) == shapes
    )
    size = sum(map(prod, shapes.values()))
    assert (len(shapes), size) == UNCONDITIONAL_256 if name == "256 px" else round(size / 1e6) == MILLIONS[name]
    loaded = LoadedUNet(network, "", settings.image_px, {"num_train_timesteps": 1000, **SCHEDULE}, {}, name)
    teacher = make_diffusion_teacher("adm", loaded, TeacherConfig(path=name), AdmOptions(), "meta")
    assert {level.name: level.channels for level in teacher.spec.levels} == entry.levels
    assert settings.image_px == entry.image_px


def test_heads_of_the_128_px_network_have_several_sizes() -> None:
    entry = PUBLISHED["128 px, classes"]
    layout = infer_adm_layout(published_names(entry), "")
    settings = complete(AdmOptions.model_validate(entry.options), layout, "")
    sizes = {width: width // settings.heads(width) for width in attention_widths(layout)}
    assert sizes == {512: 128, 768: 192, 1024: 256}
    assert settings.heads(512, decoder=True) == 4
    assert settings.recipe() == {"num_heads": 4, "num_heads_upsample": None, "use_new_attention_order": False}


def test_what_older_recipes_say_of_a_network_has_not_changed() -> None:
    """A new word in it would give every dataset another digest."""
    layout = infer_adm_layout(published_names(PUBLISHED["256 px"]), "")
    assert list(layout.sizes()) == [
        *("widths", "num_res_blocks", "attention", "out_channels", "scale_shift", "resblock_updown", "num_classes")
    ]
    assert complete(AdmOptions(), layout, "").recipe() == {"num_head_channels": 64, "use_new_attention_order": False}
