"""Every error that dtpipe raises on purpose, with the exit code of the command that meets it.

    DtpipeError                  1
    ├── ConfigError              2  a flag, a setting or their combination
    │   ├── PlanChangedError        the output holds a dataset, run or teacher of other settings
    │   ├── LockHeldError           another live writer owns the output
    │   └── ShapeError              two arrays or modules that must fit do not
    ├── InputError               3  an input is missing or cannot be read
    │   ├── TeacherError            a teacher's checkpoint
    │   ├── UnreachableError        a source that was waited for until its deadline
    │   └── BadImage                one sample; counted, named and skipped
    ├── DamagedDataError         4  stored bytes are not those that were written
    │   ├── ManifestError           a manifest, plan, entry or index
    │   ├── MissingObjectError      an object of a dataset is not there
    │   └── ProblemsFoundError      `dtpipe verify` printed what is wrong
    ├── IncompleteError          5  work is left; run the same command again
    ├── MissingPackageError      6  an optional package is not installed
    ├── ErrorBudgetError         7  more failed than the error budget allows
    ├── StoreError               8  the store is full, unwritable or breaks its promises
    ├── DivergedError            9  a loss or its gradient is not finite
    ├── ExportError             10  an export does not compute what the student computes
    ├── DeviceMemoryError       11  a batch does not fit the memory of its device
    ├── DemoStepError            *  that of the demo's command that failed
    └── StoppedError             *  130 or 143: a signal asked for a stop, and the run stopped cleanly

A message has three parts: what is wrong with the value seen, where, what to do next. The command line prints one line
for these and a traceback only for other exceptions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from dtpipe.manifests.words import count_of

_NO_ROOM = ("out of memory", "can't allocate memory")  # of CUDA and MPS, and of the CPU


class DtpipeError(Exception):
    """Base of all deliberate errors; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(DtpipeError):
    """A flag, a config value or their combination cannot be used."""

    exit_code = 2


class PlanChangedError(ConfigError):
    """The output holds a dataset, run or teacher of other settings."""


class LockHeldError(ConfigError):
    """Another live writer owns the output, or took it over."""


class ShapeError(ConfigError):
    """Two arrays or modules that must fit do not."""


class InputError(DtpipeError):
    """An input is missing or cannot be read."""

    exit_code = 3


class TeacherError(InputError):
    """A teacher checkpoint is missing, of another kind, or cannot be represented."""


class UnreachableError(InputError):
    """A source did not give its bytes until its deadline, and was asked again all the while."""


class BadImage(InputError):  # noqa: N818  it says what the sample is
    """One sample cannot be used; `reason` is one line and goes into the index."""

    def __init__(self, reason: str) -> None:
        self.reason = _one_line(reason)
        super().__init__(self.reason)


class DamagedDataError(DtpipeError):
    """Stored bytes are not those that were written."""

    exit_code = 4


class ManifestError(DamagedDataError):
    """A manifest, plan, entry or index is unreadable or contradicts what lies beside it."""


class MissingObjectError(DamagedDataError):
    """An object that should be in the dataset is not there."""


class ProblemsFoundError(DamagedDataError):
    """Something is wrong with a dataset; the problems were printed."""


class IncompleteError(DtpipeError):
    """Work is left; the same command, run again, goes on."""

    exit_code = 5


class MissingPackageError(DtpipeError):
    """An optional package is needed and not installed."""

    exit_code = 6


class ErrorBudgetError(DtpipeError):
    """More samples or shards failed than the error budget allows."""

    exit_code = 7


class StoreError(DtpipeError):
    """The store is full, unwritable or does not keep its promises."""

    exit_code = 8


class DivergedError(DtpipeError):
    """A loss or its gradient is not finite; the weights are as before the step."""

    exit_code = 9


class ExportError(DtpipeError):
    """An export, loaded again, does not compute what the student computes; nothing was left behind."""

    exit_code = 10


class DeviceMemoryError(DtpipeError):
    """A batch does not fit the memory of its device; what was written before stays."""

    exit_code = 11


class DemoStepError(DtpipeError):
    """A command of the demo failed; its own message came before, and its exit code is this one's."""


class StoppedError(DtpipeError):
    """A signal asked the run to stop and it did so cleanly."""

    exit_code = 143


def _one_line(reason: str) -> str:
    """No addresses, line breaks or novels, so that the reason is the same on every run."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", reason)
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return text[:200] or "unknown"


@contextmanager
def saying_what_to_lower(what: str, device: str, num_images: int, remedy: str) -> Iterator[None]:
    """In this block `what` goes through a network on a device, so many images at once; `remedy`: what to do.

    Raises: DeviceMemoryError where there is no room for them.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as err:
        text = str(err)
        if not isinstance(err, MemoryError) and not any(words in text for words in _NO_ROOM):
            raise
        reason = text.splitlines()[0] if text else type(err).__name__
        raise DeviceMemoryError(
            f"{what}: {device} has no memory for {count_of(num_images, 'image')} at once ({reason}); {remedy}"
        ) from err
