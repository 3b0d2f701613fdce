"""One thing that is wrong with a dataset, and who can put it right.

One rule: a problem says in `mend` what repair does about it, so that repair needs no logic of its own about what is
damaged.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Literal

from dtpipe.manifests.errors import DamagedDataError, DtpipeError, StoreError

Mend = Literal["extract", "merge", "rewrite", "source", "fit", "nobody"]
"""extract: the shard is written again. merge: the next merge writes the file. rewrite: repair writes it from the plan
or the manifest. source: the next extract restores it if the source still lists the same. fit: the next extract fits
again, and keeps what comes out if it is the very same. nobody: restore a copy."""

UNREADABLE = (DamagedDataError, StoreError)
_LOST = (errno.EIO, errno.ELOOP)  # the bytes are gone; any other trouble with a store may pass, and nothing is redone


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    name: str
    """Object name inside the dataset."""
    what: str
    mend: Mend
    shard: int | None = None


def reason(err: Exception) -> str:
    """An error's text without its advice: the caller knows better what comes next."""
    return str(err).split("; ")[0]


def problem_of(name: str, err: DtpipeError, mend: Mend, shard: int | None = None) -> Problem:
    """A file that could not be read. What a store says of itself is mended by nobody: it may be well tomorrow."""
    if isinstance(err, StoreError) and getattr(err.__cause__, "errno", None) not in _LOST:
        mend = "nobody"
    return Problem(name, reason(err), mend, shard)
