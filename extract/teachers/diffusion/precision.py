"""Half precision for a UNet2DModel or ADM's own network, with float32 wherever guided-diffusion keeps it.

Half: the convolutions and attention projections inside the blocks. Float32: group norms, the timestep embedding and
its projections, the attention's softmax (inside torch's scaled_dot_product_attention, which accumulates in float32)
and the output head.

Differs: guided-diffusion also runs the very first convolution in half; here it runs in float32 and its result is
rounded, because UNet2DModel rounds the timestep embedding to the dtype of its first weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dtpipe.manifests.errors import TeacherError

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCKS = frozenset(
    {"DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"}
)
TIME_NORMS = frozenset({"default", "scale_shift"})


def compute_in(unet: Any, dtype: torch.dtype, where: str) -> None:
    """Turn a float32 network, in place, into one that computes in `dtype`; it still takes and gives float32 images.

    Raises: TeacherError for a UNet2DModel with kinds of blocks that the rule was not checked for.
    """
    if unknown := _unknown_kinds(getattr(unet, "config", None)):
        raise TeacherError(
            f"{where}: blocks of kind {', '.join(sorted(unknown))} run in float32 only; leave out extract.teacher.dtype"
        )
    unet.conv_in.register_forward_hook(result_in(dtype))
    unet.conv_norm_out.register_forward_pre_hook(input_in_float32)
    for part in (unet.down_blocks, unet.mid_block, unet.up_blocks):
        for name, module in part.named_modules() if part is not None else ():
            _convert(name, module, dtype)


def _unknown_kinds(config: Any) -> set[str]:
    """Of a UNet2DModel's config; a network of ours has none."""
    if config is None:
        return set()
    return {*config.down_block_types, *config.up_block_types} - BLOCKS | {config.resnet_time_scale_shift} - TIME_NORMS


def _convert(name: str, module: nn.Module, dtype: torch.dtype) -> None:
    from torch import nn

    if isinstance(module, nn.GroupNorm):
        module.register_forward_pre_hook(input_in_float32)
        module.register_forward_hook(result_in(dtype))
    elif name.endswith("time_emb_proj"):
        module.register_forward_hook(result_in(dtype))
    elif isinstance(module, (nn.Conv2d, nn.Linear)):
        module.to(dtype)


def input_in_float32(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: the module sees float32."""
    return (args[0].float(), *args[1:])


def result_in(dtype: torch.dtype) -> Any:
    """A forward hook: what the module gives is rounded to `dtype`."""
    return lambda _module, _args, result: result.to(dtype)
