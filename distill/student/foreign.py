"""Weights of other projects for a student: whose names they have is found out, and all or nothing is loaded.

A file may hold several networks (a student and its teacher, a query and a key encoder), each under words of a wrapper,
in the names of timm, torchvision, the official ConvNeXt, mmpretrain or detectron2. The one that fits best is taken.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
from torch import Tensor

from dtpipe.distill.student.student import Student, StudentSpec, build_student, model_options, student_name
from dtpipe.manifests.errors import InputError

Tensors = Mapping[str, Tensor]
_MOST_DEPTH = 3  # of dictionaries inside one another
_SHOWN = 3
_COUNTER = "num_batches_tracked"  # of batch norms; used in no forward pass of frozen statistics
_PREFERRED = ("teacher", "ema", "encoder_q", "base_encoder", "student")
"""Words in the place of a network of which a file has two, the first preferred: DINO itself scores its teacher."""

_Table = Sequence[tuple[str, str]]
_DETECTRON2: _Table = (
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.conv1\.", "conv1."),
    (r"^res2\.", "layer1."),
    (r"^res3\.", "layer2."),
    (r"^res4\.", "layer3."),
    (r"^res5\.", "layer4."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
)
_TORCHVISION_CONVNEXT: _Table = (
    (r"^features\.0\.", "stem."),
    *((rf"^features\.{2 * stage}\.", f"stages.{stage}.downsample.") for stage in (1, 2, 3)),
    *((rf"^features\.{2 * stage + 1}\.(\d+)\.", rf"stages.{stage}.blocks.\1.") for stage in range(4)),
    (r"\.block\.0\.", ".conv_dw."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".mlp.fc1."),
    (r"\.block\.5\.", ".mlp.fc2."),
    (r"\.layer_scale$", ".gamma"),
    (r"^classifier\.0\.", "head.norm."),
    (r"^classifier\.2\.", "head.fc."),
)
_TORCHVISION_VIT: _Table = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)
_MMPRETRAIN_CONVNEXT: _Table = ((r"\.depthwise_conv\.", ".dwconv."), (r"\.pointwise_conv(\d)\.", r".pwconv\1."))
_LAYOUTS: Mapping[str, tuple[str, _Table]] = {
    "timm": ("", ()),
    "detectron2": ("stem.conv1.weight", _DETECTRON2),
    "torchvision": ("features.0.0.weight", _TORCHVISION_CONVNEXT),
    "torchvision's ViT": ("conv_proj.weight", _TORCHVISION_VIT),
    "ConvNeXt's own": ("downsample_layers.0.0.weight", ()),  # timm renames it
    "mmpretrain": ("downsample_layers.0.0.weight", _MMPRETRAIN_CONVNEXT),
}
"""Layout to the name by which a network in it is found, and what its names become; timm's own is found by its model."""


@dataclass(frozen=True)
class ForeignWeights:
    """A student with the weights of a file, and a sentence that says what was taken from where."""

    student: Student
    said: str


@dataclass(frozen=True)
class _Reading:
    """One way to read a file: which network in it, in which names."""

    place: str
    layout: str
    fitting: dict[str, Tensor]
    """By the student's names, of the student's shapes."""
    odd_shapes: tuple[str, ...]
    unused: tuple[str, ...]
    """Names in the file that the student has no place for."""


def load_foreign(spec: StudentSpec, content: Mapping[str, Any], where: str) -> ForeignWeights:
    """The student of a spec with the weights that a file's content holds, in eval mode.

    `content` is what was read: tensors by name, in dictionaries. Every tensor of the student must be there, in its
    shape; what the file has beside them, such as a classifier, is left out and counted.

    Raises: InputError saying how much of the student was found, and what is missing; ConfigError as `build_student`.
    """
    student = build_student(spec)
    own = student.net.state_dict()
    full: Any = timm.create_model(spec.name, num_classes=0, **model_options(spec))
    readings = list(_readings(content, own, full))
    if not readings:
        raise InputError(f"{where}: holds no tensors by name; give a state_dict of {spec.name}, or another file")
    best = max(readings, key=lambda reading: (len(reading.fitting), _preference(reading.place)))
    missing = [name for name in own if name not in best.fitting and not name.endswith(_COUNTER)]
    if missing or best.odd_shapes:
        raise InputError(_unfit(where, spec.name, best, missing, own))
    student.net.load_state_dict({**own, **best.fitting})
    return ForeignWeights(student.eval(), _sentence(where, spec.name, best))


def _readings(content: Mapping[str, Any], own: Tensors, full: Any) -> Iterator[_Reading]:
    first = next(iter(full.state_dict()))
    for place, tensors in _state_dicts(content):
        for layout, (mark, table) in _LAYOUTS.items():
            for prefix in _prefixes(tensors, mark or first):
                inside = {
                    name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
                }
                renamed = {_renamed(name, table): value for name, value in inside.items()}
                for values in (renamed, _filtered(renamed, full)):
                    yield _reading(f"{place}{prefix}", layout, values, own)


def _state_dicts(content: Mapping[str, Any], place: str = "", depth: int = 0) -> Iterator[tuple[str, Tensors]]:
    """Dictionaries of tensors by name, with the keys that lead to them."""
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    if tensors := {name: value for name, value in named.items() if isinstance(value, Tensor)}:
        yield place, tensors
    for name, value in named.items():
        if isinstance(value, Mapping) and depth < _MOST_DEPTH:
            yield from _state_dicts(value, f"{place}{name}: ", depth + 1)


def _prefixes(tensors: Tensors, mark: str) -> list[str]:
    """What stands before a name that marks a network."""
    return [name[: -len(mark)] for name in tensors if name == mark or name.endswith(f".{mark}")]


def _renamed(name: str, table: _Table) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def _filtered(tensors: Tensors, full: Any) -> Tensors:
    """What timm makes of published weights of the model: other names, and embeddings of another size."""
    convert: Callable[..., Any] | None = getattr(sys.modules[type(full).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        return dict(convert(dict(tensors), full))
    except Exception:  # it raises what it likes at weights of another model
        return tensors


def _reading(place: str, layout: str, tensors: Tensors, own: Tensors) -> _Reading:
    fitting, odd, unused = {}, [], []
    for name, tensor in tensors.items():
        alias = student_name(name, own)
        if alias is None:
            unused.append(name)
        elif _squeezed(tensor) != _squeezed(own[alias]):
            odd.append(f"{name} is {tuple(tensor.shape)} and not {tuple(own[alias].shape)}")
        else:
            fitting[alias] = tensor.reshape(own[alias].shape).to(own[alias].dtype)
    return _Reading(place, layout, fitting, tuple(odd), tuple(unused))


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    """A shape without its ones, which the libraries set differently: a scale (C, 1, 1), a counter (1,)."""
    return tuple(size for size in tensor.shape if size != 1)


def _preference(place: str) -> int:
    """Higher for the network to prefer where two fit alike."""
    return -next((idx for idx, word in enumerate(_PREFERRED) if word in place), len(_PREFERRED))


def _sentence(where: str, model: str, reading: _Reading) -> str:
    inside = f" under {reading.place.strip(': ').rstrip('.')!r}" if reading.place else ""
    left = f"; left out {len(reading.unused)} more, {reading.unused[0]} for one" if reading.unused else ""
    return f"{where}: {len(reading.fitting)} tensors of {model}{inside}, in names of {reading.layout}{left}"


def _unfit(where: str, model: str, reading: _Reading, missing: Sequence[str], own: Tensors) -> str:
    problems = [f"{len(missing)} are missing, {', '.join(missing[:_SHOWN])}" if missing else ""]
    if reading.odd_shapes:
        problems.append(f"{len(reading.odd_shapes)} have other shapes: {'; '.join(reading.odd_shapes[:_SHOWN])}")
    inside = f" under {reading.place.strip(': ').rstrip('.')!r}" if reading.place else ""
    return (
        f"{where}: weights{inside} in names of {reading.layout} fit {len(reading.fitting)} of the {len(own)} tensors "
        f"of {model} ({'; '.join(filter(None, problems))}); nothing was loaded; give the timm model that they are of, "
        "as NAME@FILE"
    )
