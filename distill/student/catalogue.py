"""At which strides each of timm's models gives levels, for `dtpipe list students`.

Building them all takes minutes, so the answers for one version of timm lie beside this file; models that are not in it
are built when asked for, without memory for their weights. `python -m dtpipe.distill.student.catalogue` writes the file
anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import torch

from dtpipe.distill.student.pyramid import PYRAMID_STRIDES
from dtpipe.distill.student.student import power_of_two

_FILE = "timm_students.json"


def level_strides(name: str) -> tuple[int, ...]:
    """Strides of the levels of one timm model, from the model itself."""
    with torch.device("meta"):
        net: Any = timm.create_model(name, features_only=True)
    return tuple(sorted({power_of_two(reduction) for reduction in net.feature_info.reduction()}))


def students(names: Iterable[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Strides by name, of all of timm's models or of `names`."""
    known = {name: strides for strides, group in _recorded().items() for name in group}
    names = timm.list_models() if names is None else names
    return {name: known.get(name) or level_strides(name) for name in names}


def stride_text(strides: Sequence[int]) -> str:
    """What a student of these strides can serve, for a person to read."""
    listed = ", ".join(map(str, strides))
    if len(strides) == 1:
        return f"stride {listed}; a simple pyramid makes {', '.join(map(str, PYRAMID_STRIDES))}"
    missing = [str(stride) for stride in PYRAMID_STRIDES if stride not in strides]
    return f"strides {listed}" + (f"; not for levels of stride {', '.join(missing)}" if missing else "")


def _recorded() -> dict[tuple[int, ...], list[str]]:
    return {tuple(map(int, strides.split())): names for strides, names in _document()["students"].items()}


def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((files("dtpipe.distill.student") / _FILE).read_text(encoding="utf-8"))
    return document


def _record(path: Path) -> None:
    groups: dict[str, list[str]] = {}
    for name in timm.list_models():
        groups.setdefault(" ".join(map(str, level_strides(name))), []).append(name)
    lines = (f" {json.dumps(strides)}: {json.dumps(names)}" for strides, names in sorted(groups.items()))
    head = f'{{"timm": {json.dumps(timm.__version__)}, "students": {{\n'
    path.write_text(head + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    _record(Path(__file__).parent / _FILE)
