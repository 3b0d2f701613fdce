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

from dtpipe.extract.teachers.base import architecture
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
    num_heads_upsample: int | None = Field(
        default=None, ge=1, description="Beside num_heads: heads per attention layer of the decoder, where others."
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
    num_channels: int | None = None
    """What widths are multiples of, where the first level's is another; a quarter of the time embedding."""

    def sizes(self) -> dict[str, Any]:
        """The layout as the recipe holds it, plain JSON."""
        sizes = architecture(self)
        return sizes if self.num_channels else {name: size for name, size in sizes.items() if name != "num_channels"}


@dataclass(frozen=True)
class AdmSettings:
    """The part that shapes do not tell, complete."""

    head_channels: int | None
    """Channels per attention head; None where heads are of several sizes, and their number is given."""
    new_attention_order: bool
    noise_schedule: str
    image_px: tuple[int, int]
    num_heads: int | None = None
    num_heads_upsample: int | None = None
    """Of the decoder; None for the same number."""

    def heads(self, width: int, decoder: bool = False) -> int:
        """Heads of an attention layer over `width` channels."""
        if self.head_channels is not None:
            return width // self.head_channels
        number = self.num_heads_upsample if decoder and self.num_heads_upsample else self.num_heads
        assert number is not None
        return number

    def recipe(self) -> dict[str, Any]:
        """What of the attention is content of a dataset."""
        numbers = {"num_heads": self.num_heads, "num_heads_upsample": self.num_heads_upsample}
        heads = numbers if self.head_channels is None else {"num_head_channels": self.head_channels}
        return {**heads, "use_new_attention_order": self.new_attention_order}


ADM_256 = {"num_head_channels": 64, "use_new_attention_order": False, "noise_schedule": "linear", "image_px": 256}
"""How the published files of the 256 px layout were trained: ImageNet, LSUN and FFHQ."""


def infer_adm_layout(shapes: Shapes, where: str) -> AdmLayout:
    """The layout of a state_dict. Raises: TeacherError for other networks of guided-diffusion."""
    per_level, num_levels = _decoder_blocks(shapes, where)
    firsts = [f"input_blocks.{1 + level * per_level}" for level in range(num_levels)]
    widths = tuple(_shape(shapes, f"{first}.0.in_layers.2.weight", where)[0] for first in firsts)
    num_channels = _shape(shapes, "time_embed.0.weight", where)[1]
    _check_ends(shapes, widths, where)
    return AdmLayout(
        widths=widths,
        num_res_blocks=per_level - 1,
        attention=tuple(f"{first}.1.qkv.weight" in shapes for first in firsts),
        out_channels=_shape(shapes, "out.2.weight", where)[0],
        scale_shift=_shape(shapes, "middle_block.0.emb_layers.1.weight", where)[0] == 2 * widths[-1],
        resblock_updown=f"input_blocks.{per_level}.0.in_layers.2.weight" in shapes,
        num_classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        num_channels=None if num_channels == widths[0] else num_channels,
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
    if odd := [width for width in widths if width % NORM_GROUPS]:
        raise TeacherError(
            f"{where}: a level has {odd[0]} channels, no multiple of the {NORM_GROUPS} groups of ADM's norms; "
            f"use another checkpoint"
        )


def complete(options: AdmOptions, layout: AdmLayout, where: str) -> AdmSettings:
    """The settings that shapes do not tell: as given, or the published ones for the 256 px layout.

    Raises: ConfigError when one is missing or does not fit.
    """
    _check_heads(options, layout, where)
    settings = {name: getattr(options, name) for name in ADM_256 if getattr(options, name) is not None}
    if options.num_heads is not None:
        settings["num_head_channels"] = _head_channels(options, layout)
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
    return AdmSettings(
        settings["num_head_channels"],
        settings["use_new_attention_order"],
        settings["noise_schedule"],
        height_width(settings["image_px"]),
        options.num_heads,
        options.num_heads_upsample,
    )


def attention_widths(layout: AdmLayout) -> set[int]:
    """Channels at which there is attention; the middle block always has it."""
    return {width for width, attends in zip(layout.widths, layout.attention, strict=True) if attends} | {
        layout.widths[-1]
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


def _check_heads(options: AdmOptions, layout: AdmLayout, where: str) -> None:
    if options.num_head_channels is not None and options.num_heads is not None:
        raise ConfigError("extract.teacher.options has both num_heads and num_head_channels; give one")
    if options.num_heads_upsample is not None and options.num_heads is None:
        raise ConfigError(
            "extract.teacher.options has num_heads_upsample without num_heads; give both, or neither where the network "
            "was trained with num_head_channels"
        )
    for name in ("num_head_channels", "num_heads", "num_heads_upsample"):
        parts = getattr(options, name)
        if odd := [width for width in sorted(attention_widths(layout)) if parts and width % parts]:
            raise ConfigError(
                f"extract.teacher.options.{name} is {parts}, and {where} has attention over {odd[0]} channels"
            )


def _head_channels(options: AdmOptions, layout: AdmLayout) -> int | None:
    """Channels per head that a number of heads means; None where it means several."""
    sizes = {
        width // heads
        for width in attention_widths(layout)
        for heads in (options.num_heads, options.num_heads_upsample)
        if heads
    }
    return sizes.pop() if len(sizes) == 1 else None


def _is_adm_256(layout: AdmLayout) -> bool:
    widths, attention = (256, 256, 512, 512, 1024, 1024), (False, False, False, True, True, True)
    return (layout.widths, layout.attention, layout.num_res_blocks) == (widths, attention, 2)


def _shape(shapes: Shapes, name: str, where: str) -> tuple[int, ...]:
    if len(shapes.get(name, ())) < 2:
        raise TeacherError(
            f"{where}: {name} is missing or no matrix, so it is no UNet of guided-diffusion; give another file"
        )
    return shapes[name]
