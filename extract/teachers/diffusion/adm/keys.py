"""Where each tensor of a guided-diffusion checkpoint goes in `AdmNetwork`, which has diffusers' names.

Names differ, a 1x1 Conv1d becomes a Linear, and q, k, v are one tensor there and three
here. How they are cut depends on the attention order: the old one keeps q, k and v of each head together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from dtpipe.extract.teachers.diffusion.adm.layout import AdmLayout, AdmSettings, Shapes
from dtpipe.extract.teachers.files.untrained import torchs_default

if TYPE_CHECKING:
    from torch import Tensor

LABEL_EMBEDDING = "label_emb.weight"
TIME_BIAS = "time_embed.2.bias"
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "qkv": "to_{}", "proj_out": "to_out.0"}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def module_names(layout: AdmLayout) -> dict[str, str]:
    """Published module to ours, all that a layout can have; `to_{}` stands for to_q, to_k and to_v."""
    names = dict(_ENDS)
    for published, ours, parts in _blocks(layout):
        names |= {f"{published}.{part}": f"{ours}.{name}" for part, name in parts.items()}
    return names


def _blocks(layout: AdmLayout) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """(published block, ours, names of its parts)."""
    per_level, num_levels = layout.num_res_blocks + 1, len(layout.widths)
    for level in range(num_levels):
        start = 1 + level * per_level
        for idx in range(layout.num_res_blocks):
            yield f"input_blocks.{start + idx}.0", f"down_blocks.{level}.resnets.{idx}", _RESIDUAL
            if layout.attention[level]:
                yield f"input_blocks.{start + idx}.1", f"down_blocks.{level}.attentions.{idx}", _ATTENTION
        if level < num_levels - 1:
            down = _RESIDUAL if layout.resblock_updown else {"op": "conv"}
            yield f"input_blocks.{start + layout.num_res_blocks}.0", f"down_blocks.{level}.downsamplers.0", down
    yield "middle_block.0", "mid_block.resnets.0", _RESIDUAL
    yield "middle_block.1", "mid_block.attentions.0", _ATTENTION
    yield "middle_block.2", "mid_block.resnets.1", _RESIDUAL
    for stage in range(num_levels):
        attends = layout.attention[num_levels - 1 - stage]
        for idx in range(per_level):
            block = stage * per_level + idx
            yield f"output_blocks.{block}.0", f"up_blocks.{stage}.resnets.{idx}", _RESIDUAL
            if attends:
                yield f"output_blocks.{block}.1", f"up_blocks.{stage}.attentions.{idx}", _ATTENTION
        if stage < num_levels - 1:
            up = _RESIDUAL if layout.resblock_updown else {"conv": "conv"}
            yield (
                f"output_blocks.{stage * per_level + per_level - 1}.{2 if attends else 1}",
                f"up_blocks.{stage}.upsamplers.0",
                up,
            )


def published_shapes(layout: AdmLayout, unet_shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the file must have, from those of the network."""
    shapes = {}
    for published, ours in module_names(layout).items():
        for kind in ("weight", "bias"):
            shape = unet_shapes.get(f"{ours.format('q')}.{kind}")
            if shape is None:  # a residual block of equal widths has no shortcut
                continue
            if ours.endswith("to_{}"):
                shape = (3 * shape[0], *shape[1:])
            shapes[f"{published}.{kind}"] = (
                (*shape, 1) if published.endswith(("qkv", "proj_out")) and kind == "weight" else shape
            )
    if layout.num_classes is not None:
        shapes[LABEL_EMBEDDING] = (layout.num_classes, unet_shapes["time_embedding.linear_2.bias"][0])
    return shapes


def unet_tensors(
    tensors: Mapping[str, Tensor], layout: AdmLayout, settings: AdmSettings, class_label: int | None
) -> Iterator[tuple[str, Tensor]]:
    """(our name, float32 tensor); copies only q, k, v of the old attention order, and what is not float32.

    A constant class is part of the time embedding's last bias, to which the network adds it.
    """
    for published, ours in module_names(layout).items():
        for kind in ("weight", "bias"):
            if (value := tensors.get(f"{published}.{kind}")) is None:
                continue
            value = value.float()
            if class_label is not None and f"{published}.{kind}" == TIME_BIAS:
                value = value + tensors[LABEL_EMBEDDING][class_label].float()
            if published.endswith(("qkv", "proj_out")) and kind == "weight":
                value = value.squeeze(-1)  # (out, in, 1) -> (out, in)
            if ours.endswith("to_{}"):
                decoder = published.startswith("output_blocks")
                for letter, part in zip("qkv", _cut(value, settings, decoder), strict=True):
                    yield f"{ours.format(letter)}.{kind}", part
            else:
                yield f"{ours}.{kind}", value


def initial_adm_weight(name: str, tensor: Tensor, shapes: Shapes) -> None:
    """What a tensor is before training: torch's default, 0 in the last layer of each block and of the network.

    A whole block is then its shortcut, so that an untrained network passes its input on. Source: openai/guided-
    diffusion, guided_diffusion/unet.py (zero_module), nn.Embedding for classes.
    """
    layer = name.rpartition(".")[0]
    if name == LABEL_EMBEDDING:
        tensor.normal_()
    elif layer == "out.2" or layer.endswith((".out_layers.3", ".proj_out")):
        tensor.zero_()
    else:
        torchs_default(name, tensor, shapes)


def _cut(joined: Tensor, settings: AdmSettings, decoder: bool) -> tuple[Tensor, ...]:
    """q, k and v. Shapes: (3C, ...) -> three of (C, ...)."""
    if settings.new_attention_order:
        return joined.chunk(3)
    num_heads = settings.heads(len(joined) // 3, decoder)
    by_head = joined.reshape(num_heads, 3, -1, *joined.shape[1:])  # (heads, 3, head channels, ...)
    return tuple(part.reshape(-1, *joined.shape[1:]) for part in by_head.unbind(1))
