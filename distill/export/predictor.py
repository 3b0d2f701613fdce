"""A tuned network that predicts on its own: backbone, head, classes and settings in one folder, without a pickle.

`predictor.json`, sealed, says how the network is built; `model.safetensors`, sealed too, has its weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dtpipe.distill.downstream.tuned.base import TaskNetwork, TunedTask
from dtpipe.distill.downstream.tuned.config import HeadConfig, TuneConfig
from dtpipe.distill.downstream.tuned.heads.distilled import decoder_in, take_decoder
from dtpipe.distill.downstream.tuned.load import TunedModel, load_tuned
from dtpipe.distill.downstream.tuned.network import classes_from_dict, classes_to_dict, resolve
from dtpipe.distill.downstream.tuned.registry import find_tuned
from dtpipe.distill.downstream.tuned.scoring import image_tensor
from dtpipe.distill.downstream.tuned.trainer import TUNED_KIND
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.student.load import WEIGHTS, student_state
from dtpipe.distill.student.student import build_student, spec_from_dict, spec_to_dict
from dtpipe.manifests.errors import (
    ConfigError,
    DamagedDataError,
    ExportError,
    InputError,
    StoreError,
    saying_what_to_lower,
)
from dtpipe.manifests.labels import ClassTable, Pixels
from dtpipe.manifests.records.document import read_document, write_document
from dtpipe.manifests.records.files import FILES, file_digest
from dtpipe.manifests.records.tensors import DIGEST_KEY, UNSEALED, check_tensors, seal_tensors
from dtpipe.manifests.store.outputs import refuse_other_folder
from dtpipe.manifests.store.publish import whole_files

PREDICTOR_RECORD = "predictor.json"
"""Beside the weights: task, student, classes, settings, and the digest of the weights."""
_VERSION = 1
_REMEDY = "export the predictor again"


@dataclass(frozen=True)
class Predictor:
    """A network, its task and what its class numbers mean."""

    task: TunedTask[Any]
    network: nn.Module
    """A `TaskNetwork` in eval mode."""
    classes: ClassTable
    config: TuneConfig
    """As it was trained; `head` and `inference` decide what is predicted."""
    digest: str
    """blake3 of the weights' file."""

    def predict(self, images: Sequence[Pixels]) -> list[Any]:
        """One prediction of the task's kind per image, at its size: a record of `tuned/predictions.py`.

        Shapes: images (H, W, 3) uint8 each, RGB, of any sizes.
        Raises: DeviceMemoryError.
        """
        device = next(self.network.parameters()).device
        smaller = "run the same command again with a smaller --batch-size, or --device cpu"
        with saying_what_to_lower("predicting", str(device), len(images), smaller), torch.inference_mode():
            tensors = [image_tensor(image).to(device) for image in images]
            return list(cast(TaskNetwork, self.network).predict(tensors))


def export_predictor(cell: str | Path, out: str | Path, ema: bool = True) -> Predictor:
    """Write the predictor of a tuned training into a folder, and load it again.

    `cell` is the training's folder or checkpoint, or those of a distillation of soft labels, whose decoder is the head.
    Nothing is written unless the loaded network has the same weights and
    predicts the same of random images.

    Raises: InputError, DamagedDataError on a checkpoint that cannot be used; ConfigError when `out` holds something
    else; ExportError when the loaded predictor differs; StoreError when the folder cannot be written.
    """
    out = Path(out)
    if not (out / PREDICTOR_RECORD).is_file():
        refuse_other_folder(out, "dtpipe export --head", (WEIGHTS,))
    model = _distilled(cell, ema) or load_tuned(cell, ema)
    try:
        with whole_files(out, f".{os.getpid()}.predictor") as folder:
            write_predictor(model, folder)
            _compare(model, load_predictor(folder))
    except (OSError, SafetensorError) as err:
        raise StoreError(f"{out} cannot be written: {err}; make room or choose another --out") from err
    return load_predictor(out)


def _distilled(run: str | Path, ema: bool) -> TunedModel | None:
    """The student of a distillation with its decoder of soft labels, as `segment` or `finetune` takes them; None for
    another folder.

    Raises: InputError when there is no decoder.
    """
    path = Path(run) / "last.pt" if Path(run).is_dir() else Path(run)
    state = load_checkpoint(path, TUNED_KIND, "distill")
    if state["kind"] != "distill":
        return None
    decoder = decoder_in(state, ema)
    if decoder is None:
        raise InputError(
            f"{path}: the run has no decoder of soft labels, so no head to export; distil with soft labels joined, or "
            "give the folder of a tuned training"
        )
    task = find_tuned("segment" if decoder.of_maps else "finetune")
    student = build_student(spec_from_dict(state["student_spec"]))
    student.load_state_dict(student_state(state, ema))
    head = HeadConfig(aux_weight=0.0, **decoder.head_settings)
    config = resolve(task, student, TuneConfig(steps=max(1, int(state["step"])), head=head))
    classes = ClassTable(decoder.classes)
    network = task.build(student, classes, config)
    take_decoder(network, decoder, classes)
    return TunedModel(task, network.eval(), classes, config)


def write_predictor(model: TunedModel, folder: Path) -> None:
    """The files of a predictor. Raises: OSError, SafetensorError."""
    student = cast(TaskNetwork, model.network).student
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.network.state_dict().items()}
    path = folder / WEIGHTS
    save_file(weights, path, metadata={"format": "pt", DIGEST_KEY: UNSEALED})
    seal_tensors(path)
    record = {
        "version": _VERSION,
        "task": model.task.name,
        "student": spec_to_dict(student.spec),
        "classes": classes_to_dict(model.classes),
        "tune": model.config.model_dump(mode="json", exclude={"run"}),
        FILES: {WEIGHTS: file_digest(path)},
    }
    write_document(folder / PREDICTOR_RECORD, record, "make room or choose another --out")


def load_predictor(folder: str | Path, device: torch.device | str = "cpu") -> Predictor:
    """The predictor in a folder, ready to predict.

    Raises: InputError when there is none; DamagedDataError when its bytes were changed or it cannot be built.
    """
    folder = Path(folder)
    record = _read_record(folder)
    path = folder / WEIGHTS
    try:
        check_tensors(path, _REMEDY)
        digest, weights = file_digest(path), load_file(path)
    except (OSError, SafetensorError) as err:
        raise DamagedDataError(f"{path}: cannot be read ({err}); {_REMEDY}") from err
    try:
        if digest != record[FILES][WEIGHTS]:
            raise DamagedDataError(f"{path}: is not the file that {PREDICTOR_RECORD} names; {_REMEDY}")
        task, classes = find_tuned(record["task"]), classes_from_dict(record["classes"])
        config = TuneConfig.model_validate(record["tune"])
        network = task.build(build_student(spec_from_dict(record["student"])), classes, config)
        network.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError, ConfigError) as err:
        raise DamagedDataError(
            f"{folder / PREDICTOR_RECORD}: no predictor can be built of it ({err}); {_REMEDY}"
        ) from err
    return Predictor(task, network.to(device).eval(), classes, config, digest)


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = read_document(folder / PREDICTOR_RECORD, _REMEDY)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise InputError(
            f"{folder}: holds no predictor; `dtpipe export RUN/eval/TASK/CELL --head --out DIR` writes one"
        ) from err
    if record.get("version") != _VERSION:
        raise InputError(f"{folder}: is a predictor of version {record.get('version')!r}; this dtpipe reads {_VERSION}")
    return record


def _compare(model: TunedModel, predictor: Predictor) -> None:
    """Raises: ExportError when weights or predictions differ."""
    own, loaded = model.network.state_dict(), predictor.network.state_dict()
    different = [name for name, tensor in own.items() if not torch.equal(tensor, loaded[name])]
    student = cast(TaskNetwork, model.network).student
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(0, 256, (*student.spec.image_px, 3), generator=generator, dtype=torch.uint8).numpy()
        for _ in range(2)
    ]
    source = Predictor(model.task, model.network, model.classes, model.config, predictor.digest)
    for first, second in zip(source.predict(images), predictor.predict(images), strict=True):
        if dict(model.task.save(first, model.classes)) != dict(model.task.save(second, model.classes)):
            different.append("its predictions")
    if different:
        raise ExportError(
            f"{model.task.name}: the loaded predictor differs in {different[0]}; nothing was exported, please report it"
        )
