"""The lines of metrics.jsonl as TensorBoard scalars, for those who watch runs there; metrics.jsonl stays the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dtpipe.manifests.errors import MissingPackageError, StoreError

_FOLDER = "tensorboard"
NOT_CURVES = ("step", "num_steps", "num_epochs")


class ScalarWriter:
    """Writes events of one part of a run; a resumed run adds a file, and its first step hides what was after it."""

    def __init__(self, run: Path, first_step: int) -> None:
        """Raises: MissingPackageError without the package tensorboard; StoreError when nothing can be written."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as err:
            raise MissingPackageError(
                "the setting `tensorboard` needs the package; run `pip install 'dtpipe[tensorboard]'`, or leave it out"
            ) from err
        self._folder = run / _FOLDER
        with self._writing():
            self._writer = SummaryWriter(str(self._folder), purge_step=first_step)

    def add(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl. Raises: StoreError when it cannot be written."""
        with self._writing():
            for name, value in record.items():
                if name not in NOT_CURVES and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, record["step"])
            self._writer.flush()

    def close(self) -> None:
        """Close the file; what does not find room any more was said by `add`."""
        with suppress(OSError):
            self._writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            raise StoreError(
                f"{self._folder} cannot be written: {err}; free or change the disk, or leave `tensorboard` out"
            ) from err
