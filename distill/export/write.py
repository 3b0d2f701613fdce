"""The trained backbone as others load it, in safetensors, without dtpipe.

An export is loaded again into a clean model of the other library and compared with the student on random images
before success is reported. Either way the model takes images normalised with the `mean` and `std` in config.json.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dtpipe.distill.export.base import Reloaded
from dtpipe.distill.export.registry import EXPORTS
from dtpipe.distill.student.load import NAMES_KEY, STUDENT_KEY, WEIGHTS, is_export, load_student
from dtpipe.distill.student.student import (
    Student,
    model_options,
    normalisation,
    spec_to_dict,
    student_name,
    untagged,
)
from dtpipe.manifests.errors import ConfigError, ExportError, StoreError
from dtpipe.manifests.records.tensors import DIGEST_KEY, UNSEALED, seal_tensors
from dtpipe.manifests.store.outputs import refuse_other_folder
from dtpipe.manifests.store.publish import whole_file, write_whole

CONFIG = "config.json"
TOLERANCE = 1e-5  # of a level's largest value: the same operations in float32, perhaps by another kernel


@dataclass(frozen=True)
class ExportResult:
    """Where the export lies and how to load it."""

    path: Path
    layout: str
    num_parameters: int
    max_difference: float
    """Largest absolute difference between the student's levels and the reloaded export's on random images."""
    untrained: tuple[str, ...]
    """Parameters of the full timm model that the student does not have, at their initial values."""
    snippet: str
    """Python that loads it."""
    finetune: str
    """Python that loads it with a new classifier of five classes."""


def export_student(checkpoint: str | Path, out: str | Path, layout: str = "timm", ema: bool = True) -> ExportResult:
    """Write the student of a run or checkpoint into folder `out` as model.safetensors and config.json.

    Raises: InputError on a checkpoint that cannot be used; ConfigError when there is no such layout or it has no place
    for the student, or `out` holds something else; ExportError when the reloaded export differs; StoreError when the
    folder cannot be written.
    """
    out = Path(out)
    if not is_export(out):
        refuse_other_folder(out, "dtpipe export", (CONFIG,))
    if layout not in EXPORTS:
        raise ConfigError(f"export.layout is {layout!r}; choose one of {', '.join(EXPORTS)}")
    library, student = EXPORTS[layout], load_student(checkpoint, ema)
    library.check(student)
    weights, untrained = full_weights(student)
    renamed = {name: library.rename(name, weight, student) for name, weight in weights.items()}
    names = {theirs: name for name, (theirs, _) in renamed.items() if theirs != name}
    path = out / WEIGHTS
    try:
        with whole_file(path, f".{os.getpid()}.{WEIGHTS}") as temporary:  # timm and load_file go by the suffix
            save_file(dict(renamed.values()), temporary, metadata=_metadata(student, layout, names))
            seal_tensors(temporary)
            difference = compare(student, library.reload(temporary, student))
            config = _input_config(student) if names else _hub_config(student)
            write_whole(path.parent / CONFIG, json.dumps(config, indent=2) + "\n")
    except (OSError, SafetensorError) as err:  # safetensors raises the latter on a full disk
        raise StoreError(f"{out} cannot be written: {err}; make room or choose another --out") from err
    count, code = sum(tensor.numel() for tensor in weights.values()), library.snippet(path, student)
    return ExportResult(path, layout, count, difference, untrained, code, library.finetune(path, student))


def full_weights(student: Student) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """State dict of timm's full model without classifier, with the student's weights; the names it has no weights for.

    Raises: ExportError when a weight of the student has no place in the full model.
    """
    full = _full_model(student)
    trained = student.net.state_dict()
    weights, untrained = {}, []
    for name, initial in full.state_dict().items():
        alias = student_name(name, trained)
        if alias is None:
            untrained.append(name)
        weights[name] = (initial if alias is None else trained.pop(alias)).detach().cpu().clone().contiguous()
    if trained:
        raise ExportError(
            f"{student.spec.name}: weights {sorted(trained)[:3]} have no place in timm's full model; "
            "export is not possible"
        )
    return weights, tuple(untrained)


def compare(student: Student, reloaded: Reloaded) -> float:
    """Largest absolute difference of any level between a student and a reloaded model, on random images.

    Each level is compared with the stage of its shape that is closest to it.

    Raises: ExportError naming the stride of a level beyond the tolerance.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *student.spec.image_px, generator=generator) * 2 - 1
    with torch.inference_mode():
        levels, stages = student(images), reloaded(student.normalise(images))
    largest = 0.0
    for stride, level in zip(student.strides, levels, strict=True):
        difference = min(
            (float((level - stage).abs().max()) for stage in stages if stage.shape == level.shape), default=math.inf
        )
        if not difference <= TOLERANCE * level.abs().max().item():
            raise ExportError(
                f"{student.spec.name}: the reloaded export differs from the student by {difference:g} "
                f"at stride {stride}; nothing was exported"
            )
        largest = max(largest, difference)
    return largest


def _full_model(student: Student) -> nn.Module:
    model: nn.Module = timm.create_model(student.spec.name, num_classes=0, **model_options(student.spec))
    return model.eval()


def _metadata(student: Student, layout: str, names: Mapping[str, str]) -> dict[str, str]:
    own = {STUDENT_KEY: json.dumps(spec_to_dict(student.spec)), NAMES_KEY: json.dumps(names)}
    return {"format": "pt", "layout": layout, **own, DIGEST_KEY: UNSEALED}


def _input_config(student: Student) -> dict[str, Any]:
    """Which images the model takes."""
    mean, std = normalisation(student.spec.name)
    return {"input_size": (3, *student.spec.image_px), "mean": mean, "std": std}


def _hub_config(student: Student) -> dict[str, Any]:
    """config.json as `local-dir:`, timm's hub and transformers read it.

    `classifier` and `first_conv` name the layers that they leave out or convert for another number of classes or of
    channels.
    """
    full: Any = _full_model(student)
    ours = {**_input_config(student), "num_classes": 0, "pool_size": None}
    kept = ("fixed_input_size", "interpolation", "crop_pct", "crop_mode", "first_conv", "classifier")
    return {
        "architecture": untagged(student.spec.name),
        "num_classes": 0,
        "num_features": full.num_features,
        "model_args": model_options(student.spec),
        "pretrained_cfg": {name: full.pretrained_cfg[name] for name in kept if name in full.pretrained_cfg} | ours,
    }
