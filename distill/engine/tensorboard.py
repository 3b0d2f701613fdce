"""The lines of metrics.jsonl as TensorBoard scalars, for those who watch runs there; metrics.jsonl stays the record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtpipe.manifests.errors import MissingPackageError

_FOLDER = "tensorboard"
NOT_CURVES = ("step", "num_steps", "num_epochs")


class ScalarWriter:
    """Writes events of one part of a run; a resumed run adds a file, and its first step hides what was after it."""

    def __init__(self, run: Path, first_step: int) -> None:
        """Raises: MissingPackageError without the package tensorboard."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as err:
            raise MissingPackageError(
                "the setting `tensorboard` needs the package; run `pip install 'dtpipe[tensorboard]'`, or leave it out"
            ) from err
        self._writer = SummaryWriter(str(run / _FOLDER), purge_step=first_step)

    def add(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        for name, value in record.items():
            if name not in NOT_CURVES and isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
