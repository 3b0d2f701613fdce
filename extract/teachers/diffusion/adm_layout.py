"""What an ADM checkpoint is, as far as its tensors' shapes tell, and the settings that they do not tell.

A guided-diffusion file is a bare state_dict. Widths, blocks, attention levels, scale-shift norms, kind of up- and
downsampling, learned variances and classes show in its shapes; heads, attention order, noise schedule and image size
do not, and a wrong one gives wrong features without any error. So these have defaults for the published 256 px layout
only, and must be given for any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from dtpipe.extract.teachers.diffusion.unet import PixelOptions
from dtpipe.manifests.errors import ConfigError, TeacherError
from dtpipe.manifests.schema import Size, height_width

Shapes = Mapping[str, tuple[int, ...]]
NORM_GROUPS = 32  # of every group norm


class AdmOptions(PixelOptions):
    """Flags that the network was trained with, by their names in guided-diffusion, and how images are encoded."""

    num_head_channels: int | None = Field(default=None, ge=1, description="Channels per attention head.")
    num_heads: int | None = Field(
        default=None, ge=1, description="In place of num_head_channels: heads per attention layer."
    )
    use_new_attention_order: bool | None = Field(
        default=None, description="True where q, k, v are split before the heads."
    )
    noise_schedule: Literal["linear", "cosine"] | None = Field(default=None, description="Schedule of betas.")
    diffusion_steps: int = Field(default=1000, ge=1, description="Timesteps that the network was trained with.")
    predict_xstart: bool = Field(
        default=False, description="True where the network predicts the image in place of the noise."
    )
    image_px: Size | None = Field(default=None, description="Side, or height and width, it was trained at, in px.")
    class_label: int | None = Field(
        default=None, ge=0, description="For a class-conditional network: the class that all images get."
    )


@dataclass(frozen=True)
class AdmLayout:
    """The part of a network that shapes tell; levels run from the finest to the coarsest."""

    widths: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[bool, ...]
    out_channels: int
    scale_shift: bool
    resblock_updown: bool
    num_classes: int | None


@dataclass(frozen=True)
class AdmSettings:
    """The part that shapes do not tell, complete."""

    head_channels: int
    new_attention_order: bool
    noise_schedule: str
    image_px: tuple[int, int]


ADM_256 = {"num_head_channels": 64, "use_new_attention_order": False, "noise_schedule": "linear", "image_px": 256}
"""How the published files of the 256 px layout were trained: ImageNet, LSUN and FFHQ."""


def infer_adm_layout(shapes: Shapes, where: str) -> AdmLayout:
    """The layout of a state_dict.

    Raises: TeacherError for other networks of guided-diffusion, and for widths that UNet2DModel cannot have.
    """
    per_level, num_levels = _decoder_blocks(shapes, where)
    firsts = [f"input_blocks.{1 + level * per_level}" for level in range(num_levels)]
    widths = tuple(_shape(shapes, f"{first}.0.in_layers.2.weight", where)[0] for first in firsts)
    _check_ends(shapes, widths, where)
    return AdmLayout(
        widths=widths,
        num_res_blocks=per_level - 1,
        attention=tuple(f"{first}.1.qkv.weight" in shapes for first in firsts),
        out_channels=_shape(shapes, "out.2.weight", where)[0],
        scale_shift=_shape(shapes, "middle_block.0.emb_layers.1.weight", where)[0] == 2 * widths[-1],
        resblock_updown=f"input_blocks.{per_level}.0.in_layers.2.weight" in shapes,
        num_classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
    )


def _decoder_blocks(shapes: Shapes, where: str) -> tuple[int, int]:
    """Blocks per level, and levels: an upsampler, the last layer of its block, ends each level but the finest."""
    layers: dict[int, int] = {}  # block -> its last layer
    for name in shapes:
        part, block, layer = (*name.split("."), "", "")[:3]
        if part == "output_blocks" and block.isdigit() and layer.isdigit():
            layers[int(block)] = max(layers.get(int(block), 0), int(layer))
    if not layers:
        raise TeacherError(
            f"{where}: has no output_blocks, so it is no UNet (a classifier of guided-diffusion has none); "
            f"give a diffusion model"
        )
    ends = [
        block
        for block, last in sorted(layers.items())
        if f"output_blocks.{block}.{last}.conv.weight" in shapes
        or (last and f"output_blocks.{block}.{last}.in_layers.2.weight" in shapes)
    ]
    per_level = ends[0] + 1 if ends else len(layers)
    num_levels = len(ends) + 1
    if (
        per_level < 2
        or ends != [per_level * (level + 1) - 1 for level in range(num_levels - 1)]
        or len(layers) != per_level * num_levels
    ):
        raise TeacherError(
            f"{where}: {len(layers)} output_blocks with upsamplers in {ends} are not a UNet of guided-diffusion"
        )
    return per_level, num_levels


def _check_ends(shapes: Shapes, widths: tuple[int, ...], where: str) -> None:
    """Refuse what the network's first and last layers show to be another model."""
    base = _shape(shapes, "time_embed.0.weight", where)[1]
    inputs, outputs = _shape(shapes, "input_blocks.0.0.weight", where)[1], _shape(shapes, "out.2.weight", where)[0]
    if inputs != 3:
        raise TeacherError(
            f"{where}: the network takes {inputs} channels (an upsampler takes 6); "
            f"kind adm needs one that takes RGB images"
        )
    if outputs not in (3, 6):
        raise TeacherError(
            f"{where}: the network gives {outputs} channels; kind adm needs noise (3), or noise and variances (6)"
        )
    if widths[0] != base:
        raise TeacherError(
            f"{where}: the first level has {widths[0]} channels and num_channels is {base}; diffusers' UNet2DModel "
            f"needs a channel_mult that starts with 1, so the 512 px model cannot be used"
        )
    if odd := [width for width in widths if width % NORM_GROUPS]:
        raise TeacherError(
            f"{where}: a level has {odd[0]} channels, no multiple of the {NORM_GROUPS} groups of ADM's norms; "
            f"use another checkpoint"
        )


def complete(options: AdmOptions, layout: AdmLayout, where: str) -> AdmSettings:
    """The settings that shapes do not tell: as given, or the published ones for the 256 px layout.

    Raises: ConfigError when one is missing or does not fit; TeacherError for heads that UNet2DModel cannot have.
    """
    settings = {name: getattr(options, name) for name in ADM_256 if getattr(options, name) is not None}
    if options.num_heads is not None:
        settings["num_head_channels"] = _head_channels(options, layout, where)
    if _is_adm_256(layout):
        settings = ADM_256 | settings
    if missing := [
        name if name != "num_head_channels" else "num_head_channels or num_heads"
        for name in ADM_256
        if name not in settings
    ]:
        raise ConfigError(
            f"{where}: the file does not say its {', '.join(missing)}; "
            f"set them under extract.teacher.options as the network was trained"
        )
    heads, px = settings["num_head_channels"], settings["image_px"]
    if odd := [width for width in attention_widths(layout) if width % heads]:
        raise ConfigError(
            f"extract.teacher.options.num_head_channels is {heads}, and {where} has attention over {odd[0]} channels"
        )
    return AdmSettings(heads, settings["use_new_attention_order"], settings["noise_schedule"], height_width(px))


def attention_widths(layout: AdmLayout) -> set[int]:
    """Channels at which there is attention; the middle block always has it."""
    return {width for width, attends in zip(layout.widths, layout.attention, strict=True) if attends} | {
        layout.widths[-1]
    }


def unet_arguments(layout: AdmLayout, settings: AdmSettings) -> dict[str, Any]:
    """Arguments of the diffusers UNet2DModel that computes the same function."""
    stage = "Resnet{}sampleBlock2D" if layout.resblock_updown else "{}Block2D"

    def blocks(way: str) -> list[str]:
        return [f"Attn{way}Block2D" if attends else stage.format(way) for attends in layout.attention]

    sampling = "resnet" if layout.resblock_updown else "conv"
    return {
        "in_channels": 3,
        "out_channels": layout.out_channels,
        "layers_per_block": layout.num_res_blocks,
        "block_out_channels": layout.widths,
        "down_block_types": tuple(blocks("Down")),
        "up_block_types": tuple(reversed(blocks("Up"))),
        "downsample_type": sampling,
        "upsample_type": sampling,
        "resnet_time_scale_shift": "scale_shift" if layout.scale_shift else "default",
        "attention_head_dim": settings.head_channels,
        "norm_num_groups": NORM_GROUPS,
        "attn_norm_num_groups": NORM_GROUPS,  # else the middle block's attention has no norm where scale_shift is on
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "time_embedding_type": "positional",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "center_input_sample": False,
    }


def scheduler_config(options: AdmOptions, settings: AdmSettings) -> dict[str, Any]:
    """The noise schedule as a diffusers scheduler config; linear betas are scaled to the number of steps.

    Source: guided-diffusion's `get_named_beta_schedule`.
    """
    scale = 1000 / options.diffusion_steps
    return {
        "num_train_timesteps": options.diffusion_steps,
        "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[settings.noise_schedule],
        "beta_start": scale * 1e-4,
        "beta_end": scale * 0.02,
        "prediction_type": "sample" if options.predict_xstart else "epsilon",
    }


def _head_channels(options: AdmOptions, layout: AdmLayout, where: str) -> int:
    """Channels per head that `num_heads` means, where it means one number."""
    if options.num_head_channels is not None:
        raise ConfigError("extract.teacher.options has both num_heads and num_head_channels; give one")
    widths, heads = attention_widths(layout), options.num_heads or 1
    if len(widths) > 1:
        raise TeacherError(
            f"{where}: num_heads {heads} at attention levels of {sorted(widths)} channels means heads of different "
            f"sizes, which diffusers' UNet2DModel cannot have; the 128 px model cannot be used"
        )
    (width,) = widths
    if width % heads:
        raise ConfigError(
            f"extract.teacher.options.num_heads is {heads}, and {where} has attention over {width} channels"
        )
    return width // heads


def _is_adm_256(layout: AdmLayout) -> bool:
    widths, attention = (256, 256, 512, 512, 1024, 1024), (False, False, False, True, True, True)
    return (layout.widths, layout.attention, layout.num_res_blocks) == (widths, attention, 2)


def _shape(shapes: Shapes, name: str, where: str) -> tuple[int, ...]:
    if len(shapes.get(name, ())) < 2:
        raise TeacherError(
            f"{where}: {name} is missing or no matrix, so it is no UNet of guided-diffusion; give another file"
        )
    return shapes[name]
