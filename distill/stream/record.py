"""What a run trains on, by content, in data.json of its folder: a resumed run must see the same, wherever it lies now.

It also says which shards of an unfinished dataset belong to the run, so that those committed since do not change it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtpipe.manifests.differences import differences, refuse_differences
from dtpipe.manifests.errors import InputError

DATA_FILE = "data.json"


def read_record(run: Path) -> dict[str, Any] | None:
    """The record of a run folder; None where there is none yet.

    Raises: InputError when it cannot be read.
    """
    file = run / DATA_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        raise InputError(
            f"{file}: what the run trains on cannot be read: {err}; restore the file, or choose another --out"
        ) from err
    if not isinstance(record, dict):
        raise InputError(f"{file}: not a record of what a run trains on; restore the file, or choose another --out")
    return record


def recorded_shards(record: Mapping[str, Any] | None, dataset_idx: int) -> list[int] | None:
    """The shards of a dataset that a run began with; None for all of them, or for a run that begins now."""
    datasets = (record or {}).get("datasets", [])
    return datasets[dataset_idx].get("shards") if dataset_idx < len(datasets) else None


def refuse_other_data(run: Path, record: Mapping[str, Any], partly: bool = False) -> None:
    """See that a run in a folder, if there is one, is trained on the same data; `partly`: as far as `record` says something.

    Raises: PlanChangedError naming what differs.
    """
    stored = read_record(run)
    if stored is None:
        return
    stored = {name: value for name, value in stored.items() if name in record or not partly}
    holder = f"{run} holds a run that was trained on other data"
    refuse_differences(holder, differences(stored, record), "give that data, or choose another --out")
