"""Files of a local store that are kept open, so that reading a few bytes of one costs no look-up of its path.

One rule: a file stays open as long as somebody holds its `OpenFile`, also when it is no longer kept here.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MOST = 128  # kept open


class OpenFile:
    """A descriptor to read from, closed when nobody holds this. What replaces the file later is not seen by it."""

    def __init__(self, path: Path) -> None:
        """Raises: OSError."""
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe in its place must not hang

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from `offset`, fewer where the file ends. Raises: OSError."""
        parts: list[bytes] = []
        while size > 0 and (part := os.pread(self.descriptor, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.descriptor)


class ProcessLock:
    """A lock of one process's threads, for `with`. A process that was forked while it was held finds it free."""

    def __init__(self) -> None:
        self._lock = os.getpid(), threading.Lock()

    def __reduce__(self) -> tuple[type[ProcessLock], tuple[()]]:
        return ProcessLock, ()

    def __enter__(self) -> None:
        if self._lock[0] != os.getpid():  # whoever held it does not live in this process
            self._lock = os.getpid(), threading.Lock()
        self._lock[1].acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock[1].release()


class OpenFiles:
    """The files that were used last, by number; for many threads, picklable without the files."""

    def __init__(self) -> None:
        self._files: OrderedDict[int, OpenFile] = OrderedDict()
        self._changing = ProcessLock()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()

    def get(self, number: int, open_it: Callable[[], OpenFile | None]) -> OpenFile | None:
        """The file of a number; None where `open_it` gives none. Raises: what `open_it` raises."""
        with self._changing:
            file = self._files.get(number)
            if file is not None:
                self._files.move_to_end(number)
                return file
        file = open_it()
        if file is None:
            return None
        with self._changing:
            self._files[number] = file
            if len(self._files) > _MOST:
                self._files.popitem(last=False)
        return file

    def forget(self, number: int) -> OpenFile | None:
        """Open it anew when it is asked for again. Returns what was open."""
        with self._changing:
            return self._files.pop(number, None)
