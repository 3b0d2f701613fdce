"""Standard streams that are closed, or whose reader has gone: commands go on without them.

One rule: what is lost on stderr (progress, notes) stops nothing; a result that stdout cannot take is an error, unless
its reader has left, as in `dtpipe list | head`.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

from dtpipe.manifests.errors import StoreError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_STDIN, _STDOUT, _STDERR = range(3)
_NOBODY_READS = (errno.EPIPE, errno.EIO)  # the latter: of a terminal that was closed


def keep_streams() -> None:
    """Let this process, and those that it starts, write to streams that are closed or will be; streams that somebody
    replaced are left alone.
    """
    for descriptor in (_STDIN, _STDOUT, _STDERR):
        if not _is_open(descriptor):  # else the next file to be opened would get its number, and what is printed
            _send_nowhere(descriptor)
    if sys.stdin is None:
        sys.stdin = open(_STDIN, closefd=False)  # noqa: SIM115  as long as the process lives
    if sys.stdout is sys.__stdout__:
        sys.stdout = _writer(_STDOUT, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _writer(_STDERR, sys.stderr)


class _Stream(io.FileIO):
    """A standard stream that is sent nowhere once it cannot be written."""

    def write(self, data: Buffer, /) -> int:
        """Bytes written: all of them where they are given up."""
        try:
            return super().write(data) or 0
        except OSError as err:
            _send_nowhere(self.fileno())
            if self.fileno() == _STDOUT and err.errno not in _NOBODY_READS:
                raise StoreError(f"standard output cannot be written: {err.strerror}; send it elsewhere") from err
            return memoryview(data).nbytes


def _writer(descriptor: int, before: TextIO | None) -> TextIO:
    if before is not None:
        before.flush()
    raw = _Stream(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before is not None else "utf-8",
        errors="backslashreplace",  # what the terminal has no letter for
        line_buffering=descriptor == _STDERR or raw.isatty(),
    )


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _send_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
