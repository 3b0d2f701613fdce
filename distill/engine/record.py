"""What a run trains on, by content, in data.json of its folder: a resumed run must see the same, wherever it lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtpipe.manifests.differences import differences, refuse_differences
from dtpipe.manifests.records.document import read_document, write_document

DATA_FILE = "data.json"


def write_record(run: Path, record: Mapping[str, Any]) -> None:
    """Keep what a run trains on. Raises: StoreError when it cannot be written."""
    write_document(run / DATA_FILE, record, "free or change the disk and run again")


def read_record(run: Path) -> dict[str, Any] | None:
    """The record of a run folder; None where there is none yet.

    Raises: DamagedDataError when its bytes were changed; InputError when it may not be read.
    """
    try:
        return read_document(run / DATA_FILE, "restore the file, or choose another --out")
    except FileNotFoundError:
        return None


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
