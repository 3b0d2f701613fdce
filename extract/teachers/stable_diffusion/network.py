"""How Stable Diffusion's networks are run: attention to one constant text, and half precision.

Both change a network that diffusers built and give the features of its plain forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dtpipe.extract.teachers.diffusion.precision import input_in_float32, result_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class ConstantText:
    """An attention processor whose keys and values follow from one text, and so are computed once."""

    key: Tensor  # (1, heads, T, D)
    value: Tensor

    def __call__(self, attention: Any, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Attention of every position to the text. Shapes: (B, P, C) -> the same."""
        from torch.nn.functional import scaled_dot_product_attention

        batch = len(hidden_states)
        query = _by_head(attention.to_q(hidden_states), attention.heads)  # (B, heads, P, D)
        seen = scaled_dot_product_attention(
            query, self.key.expand(batch, -1, -1, -1), self.value.expand(batch, -1, -1, -1)
        )
        result: Tensor = attention.to_out[0](seen.transpose(1, 2).flatten(2))
        return result


def set_text(unet: nn.Module, text: Tensor) -> None:
    """Make every cross-attention attend to `text`, (1, T, D) float32; no `encoder_hidden_states` are needed then."""
    from diffusers.models.attention_processor import Attention
    from torch.nn.functional import linear

    for module in unet.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            weights = (module.to_k.weight, module.to_v.weight)
            key, value = (_by_head(linear(text, weight.float()), module.heads).to(weight.dtype) for weight in weights)
            module.set_processor(ConstantText(key, value))


def lower_precision(network: nn.Module, dtype: torch.dtype) -> None:
    """Turn a network without values into one that computes in `dtype`, inputs and first convolution in float32.

    Float32 stay: norms, the timestep embedding and its projections. torch's scaled_dot_product_attention accumulates
    scores and softmax in float32 by itself, as `upcast_attention` of Stable Diffusion 2.1 asks for.
    """
    from torch import nn

    for name, module in network.named_modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.register_forward_pre_hook(input_in_float32)
            module.register_forward_hook(result_in(dtype))
        elif name.endswith(("conv_in", "time_emb_proj")):
            module.register_forward_hook(result_in(dtype))
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and not name.startswith("time_embedding."):
            module.to(dtype)


def _by_head(states: Tensor, heads: int) -> Tensor:
    """Shapes: (B, P, heads * D) -> (B, heads, P, D)."""
    return states.reshape(*states.shape[:-1], heads, -1).transpose(1, 2)
