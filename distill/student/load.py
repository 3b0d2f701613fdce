"""The trained student from what holds one: a run folder, a checkpoint, or an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.student.student import Student, StudentSpec, build_student, spec_from_dict, student_name
from dtpipe.manifests.documents import Refusal, parse_json, why_not_read
from dtpipe.manifests.errors import DamagedDataError, InputError
from dtpipe.manifests.records.document import read_document
from dtpipe.manifests.records.tensors import check_tensors
from dtpipe.manifests.write.plan import PLAN_FILE

WEIGHTS = "model.safetensors"
"""An export's weights inside its folder."""
STUDENT_KEY = "dtpipe_student"
"""Where an export's metadata has the student's spec, as JSON."""
EXPORT_RECORD = "student.json"
"""An export's record inside its folder: its layout, student, and the digests of its files."""
NAMES_KEY = "dtpipe_names"
"""Where it has timm's names of weights that the file names otherwise, as JSON."""
_BACKBONE = "student."  # of names in a tuned network


def load_student(path: str | Path, ema: bool = True) -> Student:
    """The trained student from a run folder, a checkpoint (`last.pt`) or an export, on the CPU and in eval mode.

    With `ema`, a checkpoint that holds an average gives that. Of a tuned training it is the backbone without its head.

    Raises: InputError when the path holds none of these; DamagedDataError when it cannot be read.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _from_export(path)
    if (path / WEIGHTS).is_file():
        return _from_export(path / WEIGHTS)
    if (layout := export_layout(path)) is not None:
        raise InputError(
            f"{path}: holds an export in layout {layout}, which dtpipe does not read back; "
            "give the run folder, its last.pt, or an export in layout timm"
        )
    if (path / PLAN_FILE).is_file():
        raise InputError(f"{path}: is a feature dataset, not a student; `dtpipe distill {path} --out RUN` makes one")
    return _from_checkpoint(path / "last.pt" if path.is_dir() else path, ema)


def export_layout(path: Path) -> str | None:
    """The layout of an export's file, or of the export in a folder, whatever else is in it; None where there is none.

    Raises: DamagedDataError for a record that was changed.
    """
    if (path / EXPORT_RECORD).is_file():
        return str(read_document(path / EXPORT_RECORD, "export again into another --out").get("layout"))
    try:
        with safe_open(path / WEIGHTS if path.is_dir() else path, framework="pt") as file:
            metadata = file.metadata() or {}
            return metadata.get("layout", "timm") if STUDENT_KEY in metadata else None
    except (SafetensorError, OSError):
        return None


def student_state(state: Mapping[str, Any], ema: bool) -> Mapping[str, Any]:
    """Weights of the student in a checkpoint: the average where there is one and `ema` asks for it."""
    average, own = state["ema"] if ema else None, "network" if _is_tuned(state) else "student"
    weights = average if average is not None else state[own]
    if not _is_tuned(state):
        return dict(weights)
    return {name.removeprefix(_BACKBONE): value for name, value in weights.items() if name.startswith(_BACKBONE)}


def _is_tuned(state: Mapping[str, Any]) -> bool:
    return bool(state["kind"] == "eval")


def _from_checkpoint(path: Path, ema: bool) -> Student:
    state = load_checkpoint(path, "distill", "eval")
    student = build_student(spec_from_dict(state["student_spec"]))
    student.load_state_dict(student_state(state, ema))
    return student.eval()


def _from_export(path: Path) -> Student:
    try:
        check_tensors(path, "export again")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        weights = load_file(path)
    except FileNotFoundError as err:
        raise InputError(f"{path}: {why_not_read(path, err)}; give a run folder, its last.pt or an export") from err
    except (SafetensorError, OSError) as err:
        raise DamagedDataError(f"{path}: the export cannot be read: {err}; export again") from err
    if STUDENT_KEY not in metadata:
        raise InputError(f"{path}: holds no student of dtpipe; give a run folder, its last.pt or an export")
    student = build_student(_spec_of(metadata[STUDENT_KEY], path))
    own, names = student.net.state_dict(), _timm_names(metadata.get(NAMES_KEY, "{}"), path)
    named = {student_name(names.get(name, name), own): tensor for name, tensor in weights.items()}
    try:
        state = {alias: tensor.view_as(own[alias]) for alias, tensor in named.items() if alias is not None}
        student.net.load_state_dict(state)
    except RuntimeError as err:
        raise DamagedDataError(f"{path}: its weights are not those of {student.spec.name}; export again") from err
    return student.eval()


def _spec_of(text: str, path: Path) -> StudentSpec:
    """The student's spec from an export's metadata. Raises: DamagedDataError."""
    refusal = Refusal(DamagedDataError, "export again")
    where = f"{path}: its metadata {STUDENT_KEY}"
    values = parse_json(text, where, refusal)
    try:
        return spec_from_dict(values)
    except (KeyError, TypeError, ValueError) as err:
        raise refusal.of(where, f"is no description of a student ({err})") from err


def _timm_names(text: str, path: Path) -> dict[str, str]:
    """timm's names by those of the file. Raises: DamagedDataError."""
    refusal = Refusal(DamagedDataError, "export again")
    where = f"{path}: its metadata {NAMES_KEY}"
    names = parse_json(text, where, refusal)
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise refusal.of(where, "is no table of names")
    return names
