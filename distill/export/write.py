"""The trained backbone as others load it, without dtpipe.

An export is loaded again into a clean model of the other library and compared with the student on random images
before anything takes its place. The model takes images normalised with the `mean` and `std` in config.json.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dtpipe.distill.export.base import ExportFormat, Reloaded
from dtpipe.distill.export.registry import EXPORTS
from dtpipe.distill.export.timm import full_model
from dtpipe.distill.student.load import EXPORT_RECORD, NAMES_KEY, STUDENT_KEY, export_layout, load_student
from dtpipe.distill.student.student import Student, spec_to_dict, student_name
from dtpipe.manifests.errors import ConfigError, ExportError, StoreError
from dtpipe.manifests.records.document import write_document
from dtpipe.manifests.records.files import FILES, file_digests
from dtpipe.manifests.records.tensors import DIGEST_KEY, UNSEALED, seal_tensors
from dtpipe.manifests.store.outputs import refuse_other_folder
from dtpipe.manifests.store.publish import whole_files


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
    """What loads it."""
    finetune: str
    """What loads it with a new classifier or head of five classes; empty for a format that is not trained."""


def export_student(checkpoint: str | Path, out: str | Path, layout: str = "timm", ema: bool = True) -> ExportResult:
    """Write the student of a run or checkpoint into folder `out`: its weights, config.json and a sealed student.json.

    Raises: InputError on a checkpoint that cannot be used; ConfigError when there is no such layout or it has no place
    for the student, or `out` holds something else; ExportError when the reloaded export differs; StoreError when the
    folder cannot be written; MissingPackageError when a format needs one.
    """
    out = Path(out)
    if layout not in EXPORTS:
        raise ConfigError(f"export.layout is {layout!r}; choose one of {', '.join(EXPORTS)}")
    _refuse_other(out, layout)
    library, student = EXPORTS[layout], load_student(checkpoint, ema)
    library.check(student)
    weights, untrained = full_weights(student)
    renamed = {name: entry for name in weights if (entry := library.rename(name, weights[name], student)) is not None}
    names = {theirs: name for name, (theirs, _) in renamed.items() if theirs != name}
    try:
        with whole_files(out, f".{os.getpid()}.export") as folder:
            path = folder / library.file
            _write_weights(path, dict(renamed.values()), student, library, names)
            reloaded = library.reload(path, student)
            sizes = library.sizes(path, student)
            difference = max(compare(student, reloaded, library.tolerance, size) for size in sizes)
            _write_documents(folder, student, library)
    except (OSError, SafetensorError) as err:  # safetensors raises the latter on a full disk
        raise StoreError(f"{out} cannot be written: {err}; make room or choose another --out") from err
    path = out / library.file
    return ExportResult(
        path,
        layout,
        num_parameters=sum(tensor.numel() for _, tensor in renamed.values()),
        max_difference=difference,
        untrained=tuple(name for name in untrained if name in renamed),
        snippet=library.snippet(path, student),
        finetune=library.finetune(path, student),
    )


def full_weights(student: Student) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """State dict of timm's full model without classifier, with the student's weights; the names it has no weights for.

    Raises: ExportError when a weight of the student has no place in the full model.
    """
    trained = student.net.state_dict()
    weights, untrained = {}, []
    for name, initial in full_model(student).state_dict().items():
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


def compare(student: Student, reloaded: Reloaded, tolerance: float = 1e-5, size: Sequence[int] | None = None) -> float:
    """Largest absolute difference of any level between a student and a reloaded model, on random images.

    Each level is compared with the stage of its shape that is closest to it. `size` is batch, height and width;
    `tolerance` a share of the level's largest value.

    Raises: ExportError naming the stride of a level beyond the tolerance.
    """
    batch, height, width = size or (2, *student.spec.image_px)
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        levels, stages = student(images), reloaded(student.normalise(images))
    largest = 0.0
    for stride, level in zip(student.strides, levels, strict=True):
        difference = min(
            (float((level - stage).abs().max()) for stage in stages if stage.shape == level.shape), default=math.inf
        )
        if not difference <= tolerance * level.abs().max().item():
            raise ExportError(
                f"{student.spec.name}: the reloaded export differs from the student by {difference:g} "
                f"at stride {stride}; nothing was exported, please report it; layout timm may do"
            )
        largest = max(largest, difference)
    return largest


def _refuse_other(out: Path, layout: str) -> None:
    """See that a folder is free, or holds an export in the same layout. Raises: ConfigError."""
    there = export_layout(out)
    if there is None:
        refuse_other_folder(out, "dtpipe export", (EXPORTS[layout].file, "config.json"))
    elif there != layout:
        raise ConfigError(f"{out} holds an export in layout {there}; choose another --out")


def _write_weights(
    path: Path, weights: Mapping[str, Tensor], student: Student, library: ExportFormat, names: Mapping[str, str]
) -> None:
    if library.write is not None:
        library.write(path, weights, student)
        return
    own = {STUDENT_KEY: json.dumps(spec_to_dict(student.spec)), NAMES_KEY: json.dumps(names)}
    metadata = {"format": "pt", "layout": library.name, **own, DIGEST_KEY: UNSEALED}
    save_file(dict(weights), path, metadata=metadata)
    seal_tensors(path)


def _write_documents(folder: Path, student: Student, library: ExportFormat) -> None:
    """What lies beside the weights; last the record of all files."""
    for name, content in library.documents(student).items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    record = {"layout": library.name, "student": spec_to_dict(student.spec), FILES: file_digests(folder)}
    write_document(folder / EXPORT_RECORD, record, "make room or choose another --out")
