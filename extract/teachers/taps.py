"""Read feature levels inside a network, and stop its forward pass after the last of them.

A tap is a module path, as `named_modules` spells it; a level is the output of that module at its own resolution. In
a decoder the level of a stride is what its last layer gives before the upsampler: the one reading of "blocks 3, 6, 9
and 12" (DreamTeacher, appendix E.1) whose strides are the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dtpipe.extract.teachers.base import TapSpec
from dtpipe.manifests.errors import TeacherError

DEFAULT_STRIDES = (4, 8, 16, 32)
_POOLED = ", average pooled by "  # in the tap of a level that no module gives


class _LastTapReachedError(Exception):
    """Ends a forward pass; never leaves this module."""


@dataclass(frozen=True)
class TapReader:
    """Reads chosen modules of one network: {level name: module path}."""

    network: nn.Module
    taps: Mapping[str, str]

    def read(self, forward: Callable[[], object], stop_early: bool = True) -> dict[str, Tensor]:
        """Run `forward` and return each tap's output, from its first call in the pass.

        Shapes: {level: (B, C, h, w)}.
        Raises: TeacherError when a tap is unknown, not reached, or gives no map.
        """
        modules = {path: module for path, module in self.network.named_modules() if path in self.taps.values()}
        seen: dict[str, Tensor] = {}

        def keep(path: str, output: object) -> None:
            seen.setdefault(path, _as_map(output, path))
            if stop_early and len(seen) == len(modules):
                raise _LastTapReachedError

        _check_known(self.network, self.taps)
        with ExitStack() as hooks:
            for path, module in modules.items():
                hooks.callback(module.register_forward_hook(_hook(path, keep)).remove)
            with suppress(_LastTapReachedError):
                forward()
        if unread := sorted(set(modules) - set(seen)):
            raise TeacherError(
                f"taps {unread} are never run by the network's forward pass; name others in extract.teacher.taps"
            )
        return {name: seen[path] for name, path in self.taps.items()}


def find_levels(
    network: nn.Module,
    forward: Callable[[], object],
    input_px: int,
    layers: Iterable[str],
    strides: Iterable[int] = DEFAULT_STRIDES,
) -> dict[str, TapSpec]:
    """A level for each of `strides`: the last of `layers` that ran at that resolution.

    `forward` runs the network on an input of `input_px` sides; `layers` are module paths of its decoder, without
    upsamplers. A stride that the network does not have is left out.
    """
    order: dict[str, tuple[int, int]] = {}  # in the order they ran: stride, channels

    def note(path: str, output: object) -> None:
        level = _as_map(output, path)
        order[path] = (input_px // level.shape[-1], level.shape[1])

    modules = dict(network.named_modules())
    with ExitStack() as hooks:
        for path in layers:
            hooks.callback(modules[path].register_forward_hook(_hook(path, note)).remove)
        forward()
    last = {
        stride: TapSpec(level_name(stride), stride, channels, path)
        for path, (stride, channels) in order.items()
        if stride in strides
    }
    return {last[stride].name: last[stride] for stride in sorted(last)}


def decoder_layers(unet: Any) -> list[str]:
    """Residual and attention layers of the up blocks of diffusers' U-Nets, without their upsamplers."""
    return [
        f"up_blocks.{block_idx}.{kind}.{idx}"
        for block_idx, block in enumerate(unet.up_blocks)
        for kind in ("resnets", "attentions")
        for idx, _ in enumerate(getattr(block, kind, None) or [])
    ]


def named_levels(
    network: nn.Module, forward: Callable[[], object], input_px: int, taps: Mapping[str, str]
) -> dict[str, TapSpec]:
    """Levels at the module paths that a person named.

    Raises: TeacherError when a path is unknown or its stride is not the one the level's name says.
    """
    levels = {}
    for name, output in TapReader(network, taps).read(forward).items():
        stride = input_px // output.shape[-1]
        if level_name(stride) != name.split(".")[0]:
            raise TeacherError(
                f"tap {taps[name]} has stride {stride}, so it is level {level_name(stride)}, not {name}; rename it"
            )
        levels[name] = TapSpec(name, stride, output.shape[1], taps[name])
    return levels


def pooled_level(deepest: TapSpec, stride: int) -> TapSpec:
    """A level that is made by average pooling another; its tap says so and is no module path."""
    return TapSpec(level_name(stride), stride, deepest.channels, f"{deepest.tap}{_POOLED}{stride // deepest.stride}")


def is_pooled(level: TapSpec) -> bool:
    return _POOLED in level.tap


def add_pooled(levels: dict[str, Tensor], specs: Sequence[TapSpec]) -> dict[str, Tensor]:
    """The levels that modules gave, and the pooled ones of `specs`, made from the deepest of these."""
    pooled = [spec for spec in specs if is_pooled(spec)]
    deepest = [spec for spec in specs if not is_pooled(spec)][-1]
    return levels | {
        spec.name: nn.functional.avg_pool2d(levels[deepest.name], spec.stride // deepest.stride) for spec in pooled
    }


def level_name(stride: int) -> str:
    """l{n} for stride 2^n.

    Raises: TeacherError when the stride is no power of two.
    """
    if stride < 1 or stride & (stride - 1):
        raise TeacherError(
            f"a tap has stride {stride}; levels need a power of two, so name another module in extract.teacher.taps"
        )
    return f"l{stride.bit_length() - 1}"


def _hook(path: str, then: Callable[[str, object], None]) -> Callable[[nn.Module, Any, Any], None]:
    return lambda _module, _args, output: then(path, output)


def _as_map(output: object, path: str) -> Tensor:
    """The feature map in a module's output; some modules wrap it in a tuple."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor) or first.ndim != 4:
        output_type = f"a tensor of shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        raise TeacherError(
            f"tap {path} gives {output_type}, not a map (B, C, H, W); name another module in extract.teacher.taps"
        )
    return first


def _check_known(network: nn.Module, taps: Mapping[str, str]) -> None:
    known = [path for path, _ in network.named_modules() if path]
    for name, path in taps.items():
        if path not in known:
            parent = path.rpartition(".")[0]
            near = [module for module in known if module.rpartition(".")[0] == parent]
            near = near or [module for module in known if "." not in module]
            raise TeacherError(f"tap {name}={path} is no module of the teacher; beside it are {', '.join(near[:12])}")
