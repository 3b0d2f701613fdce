"""What a run trains on, by content, in data.json of its folder: a resumed run must see the same, wherever it lies."""

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


def refuse_other_data(run: Path, record: Mapping[str, Any], partly: bool = False) -> None:
    """See that a run in a folder, if there is one, is trained on the same data; `partly`: as far as `record` goes.

    Raises: PlanChangedError naming what differs.
    """
    stored = read_record(run)
    if stored is not None:
        known = {name: value for name, value in stored.items() if name in record or not partly}
        refuse_other(f"{run} holds a run that was", known, record)


def refuse_other(subject: str, stored: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """See that two records of data are equal; `subject` begins the sentence on what has the stored one.

    Raises: PlanChangedError naming what differs.
    """
    holder = f"{subject} trained on other data"
    refuse_differences(holder, differences(stored, record), "give that data, or choose another --out")
