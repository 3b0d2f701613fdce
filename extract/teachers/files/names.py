"""Which tensors a checkpoint names, without loading it: cheap, and nothing in the file is run.

Names are those of the network. What training wraps around it (DataParallel, torch.compile, FSDP, Lightning) puts a
word in front of all names, or into them; `plain_names` takes it away again.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path

_HEAD_BYTES = 1 << 22  # enough for the names of a checkpoint's tensors
TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
LEADING = ("module", "model", "ema_model", "_forward_module")
"""Words that wrappers put in front of all names; a network may have them too."""
ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Words that wrappers of parts leave inside names; no network has them."""
_WRAPPED = rb"(?:(?:" + "|".join(LEADING + ANYWHERE).encode() + rb")\.)*"


def plain_names(names: Iterable[str], network: Collection[str] = ()) -> dict[str, str]:
    """Each stored name to the network's own. `network` has names that are to be kept, where they are known."""
    plain = {name: ".".join(word for word in name.split(".") if word not in ANYWHERE) for name in names}
    while plain and not any(name in network for name in plain.values()):
        leading = {name.partition(".")[0] for name in plain.values()}
        if len(leading) > 1 or not leading <= set(LEADING) or not all("." in name for name in plain.values()):
            break
        plain = {stored: name.partition(".")[2] for stored, name in plain.items()}
    return plain


def names_tensors(path: Path, names: Iterable[str]) -> bool:
    """True for a torch or safetensors file that holds a tensor of each name; False for all else, even damaged files."""
    try:
        if not path.is_file():
            return False
        if path.suffix == ".safetensors":
            return set(names) <= set(plain_names(_safetensors_names(path)).values())
        head = _pickle_head(path) if path.suffix in TORCH_ENDINGS else b""
    except Exception:  # a damaged archive raises many types, a strange file name others
        return False
    return all(_has_name(head, name) for name in names)


def _safetensors_names(path: Path) -> set[str]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        content = json.loads(file.read(min(size, _HEAD_BYTES)))
    return set(content) - {"__metadata__"} if isinstance(content, dict) else set()


def _has_name(head: bytes, name: str) -> bool:
    """Whether a pickle holds a whole string that is the name, or the name behind words of wrappers."""
    ends = re.finditer(_WRAPPED + re.escape(name.encode()), head)
    return any(mark in head for stored in {match[0].decode() for match in ends} for mark in pickled_name(stored))


def _pickle_head(path: Path) -> bytes:
    """The beginning of the pickled part: all names and none of the weights, in files of torch 1.6 and later."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as whole:
            return whole.read(_HEAD_BYTES)
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if not pickles:
            return b""
        with archive.open(pickles[0]) as part:
            return part.read(_HEAD_BYTES)


def pickled_name(name: str) -> tuple[bytes, ...]:
    """A whole string as pickle protocols 2 and 4 write it: with its length, so that a longer name does not match."""
    text, size = name.encode(), len(name)
    long = b"X" + size.to_bytes(4, "little") + text
    return (long, b"\x8c" + size.to_bytes(1, "little") + text) if size < 256 else (long,)
