"""An interpreter in a folder: `interpreter.json`, sealed, `model.safetensors` and `train_images.blake3`; no pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dtpipe.distill.labels.interpreter import FeatureInterpreter, InterpreterLevel, InterpreterSpec
from dtpipe.distill.student.load import WEIGHTS
from dtpipe.manifests.canonical import blake3_hex, canonical_json
from dtpipe.manifests.documents import why_not_read
from dtpipe.manifests.errors import DamagedDataError, DtpipeError, InputError, StoreError
from dtpipe.manifests.labels import ClassTable
from dtpipe.manifests.records.document import write_document
from dtpipe.manifests.records.files import FILES, check_files, file_digests
from dtpipe.manifests.records.image_digests import TRAIN_IMAGES, Digests, pack_digests
from dtpipe.manifests.store.publish import whole_files

INTERPRETER_RECORD = "interpreter.json"
_VERSION = 1
_REMEDY = "train the interpreter again"


@dataclass(frozen=True)
class LoadedInterpreter:
    """An interpreter in eval mode, and what its folder says of it."""

    network: FeatureInterpreter
    digest: str
    """blake3 of what decides its logits: the spec and the weights."""
    record: Mapping[str, Any]
    """Beside the spec: the teacher and timesteps it was trained on, its scores, the digests of the labelled images."""


def save_interpreter(
    network: FeatureInterpreter, record: Mapping[str, Any], folder: Path, images: Digests | None = None
) -> None:
    """Write an interpreter whole. `record`: plain values, what it was trained on and how it scored; `images`: those
    that had labels.

    Raises: StoreError when the folder cannot be written.
    """
    try:
        with whole_files(folder, f".{os.getpid()}.interpreter") as partial:
            weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
            save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
            if images is not None:
                (partial / TRAIN_IMAGES).write_bytes(pack_digests(images))
            files = file_digests(partial)
            document = {"version": _VERSION, "spec": spec_record(network.spec), **record, FILES: files}
            write_document(partial / INTERPRETER_RECORD, document, "make room or choose another --out")
    except (OSError, SafetensorError) as err:
        raise StoreError(f"{folder} cannot be written: {err}; make room or choose another --out") from err


def load_interpreter(folder: str | Path, device: torch.device | str = "cpu") -> LoadedInterpreter:
    """The interpreter in a folder, in eval mode.

    Raises: InputError when there is none; DamagedDataError when its bytes were changed.
    """
    folder = Path(folder)
    if not (folder / INTERPRETER_RECORD).is_file():
        raise InputError(
            f"{folder}: holds no interpreter (no {INTERPRETER_RECORD}); `dtpipe interpret FEATURES --labels "
            "LABELLED --out HEAD` trains one"
        )
    record = check_files(folder, INTERPRETER_RECORD, _REMEDY)
    path = folder / WEIGHTS
    try:
        spec = _spec_of(record["spec"])
        network = FeatureInterpreter(spec)
        network.load_state_dict(load_file(path, device="cpu"))
        digest = blake3_hex(canonical_json({"spec": record["spec"], "weights": record[FILES][WEIGHTS]}))
    except OSError as err:
        raise InputError(f"{path}: {why_not_read(path, err)}; {_REMEDY}") from err
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError, DtpipeError) as err:
        raise DamagedDataError(f"{folder}: is no interpreter that can be built ({err}); {_REMEDY}") from err
    own = {name: value for name, value in record.items() if name not in {"version", "spec", FILES}}
    return LoadedInterpreter(network.to(device).eval(), digest, own)


def spec_record(spec: InterpreterSpec) -> dict[str, Any]:
    """Plain values of a spec."""
    names = list(spec.classes.names)
    return {**asdict(spec), "levels": [asdict(level) for level in spec.levels], "classes": names}


def _spec_of(values: Mapping[str, Any]) -> InterpreterSpec:
    levels = tuple(InterpreterLevel(**level) for level in values["levels"])
    return InterpreterSpec(**{**values, "levels": levels, "classes": ClassTable(tuple(values["classes"]))})
