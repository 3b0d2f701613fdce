"""What a file is that should be part of a checkpoint and cannot be read: said so that one knows what to do.

Most are no damage: a Git LFS pointer of a clone without `git lfs pull`, the login page that a browser was sent, the
error that a server answered with.
"""

from __future__ import annotations

import pickletools
import re
from collections import deque
from pathlib import Path

from dtpipe.manifests.errors import TeacherError

_HEAD_BYTES = 1 << 12
_TEXT_BYTES = 1 << 16  # longer files are no error messages
_ARCHIVES = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}
_FETCH = "download the file itself"


def unreadable_file(
    path: Path, err: Exception, kind: str, advice: str = "download or export the teacher again"
) -> TeacherError:
    """The error to raise for a file that is not readable as what it should be: what it is instead, if that shows."""
    if (disguise := disguise_of(path)) is not None:
        return TeacherError(f"{path}: {disguise}")
    return TeacherError(f"{path}: not readable as {kind} ({why_unreadable(err)}); {advice}")


def no_file(path: Path, origin: str) -> TeacherError:
    """The error to raise where a file should be; `origin` is whose checkpoints it should be one of."""
    if path.is_dir():
        return TeacherError(f"{path}: is a folder; give the path of the {origin} checkpoint's file in it")
    if (disguise := disguise_of(path)) is not None:
        return TeacherError(f"{path}: {disguise}")
    return TeacherError(f"{path}: no such file; `dtpipe list teachers` says where {origin} checkpoints can be had")


def why_unreadable(err: Exception) -> str:
    """What a library says of a file that it could not read, in a few words."""
    text = str(err).strip() or type(err).__name__
    if isinstance(err, (FileNotFoundError, NotADirectoryError)):
        return "there is no such file"
    if text.startswith("Weights only load failed"):  # torch goes on about how to run what is in the file
        return "it holds other things than tensors, none of which was run"
    if "TorchScript" in text:
        return "it is a TorchScript program, not its weights; save the state_dict() of its module"
    if isinstance(err, EOFError) or text.startswith("PytorchStreamReader failed"):  # torch's zip archive
        return "it is cut off or damaged"
    return text.splitlines()[0][:160]


def disguise_of(path: Path, text: bool = False) -> str | None:
    """What a file is in place of what its name says, and what to do; None where it may be damaged, or all right.

    `text`: it should be a text, so that being one says nothing; what else is wrong with it is for its reader to say.
    """
    try:
        if path.is_symlink() and not path.exists():
            return None if text else f"is a link to {path.readlink()}, which is not there; {_FETCH}"
        if not path.is_file():
            return None
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_TEXT_BYTES if size <= _TEXT_BYTES else _HEAD_BYTES)
    except (OSError, ValueError):  # ValueError: no path can be so
        return None
    if not size:
        return None if text else f"is empty; {_FETCH}"
    packer = next((name for magic, name in _ARCHIVES.items() if head.startswith(magic)), None)
    if packer or head[257:262] == b"ustar":
        return f"is a {packer or 'tar'} archive; unpack it, and give the file in it"
    whole = size == len(head)
    return _page_or_pointer(head, whole) or (
        f"is a text ({_short(head.decode())!r}), not the file itself; {_FETCH}"
        if whole and not text and _is_text(head)
        else None
    )


def _page_or_pointer(head: bytes, whole: bool) -> str | None:
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if text.startswith("version https://git-lfs.github.com/spec/"):
        size = re.search(r"^size (\d{1,18})$", text, re.MULTILINE)
        told = f" to a file of {int(size[1]):,} bytes" if size else ""
        return f"is a Git LFS pointer{told}, not the file itself; run `git lfs pull` in its repository, or {_FETCH}"
    if re.match(r"(\.git/annex/|/annex/objects/|\.\./.*\.git/annex/)", text):
        return f"is a git-annex pointer, not the file itself; run `git annex get` in its repository, or {_FETCH}"
    if re.match(r"<!doctype html|<html|<head", text, re.IGNORECASE):
        title = re.search(r"<title[^>]*>([^<]*)", text, re.IGNORECASE)
        told = f" ({_short(title[1])!r})" if title and title[1].strip() else ""
        return (
            f"is a web page{told}, not the file itself, as a login or an error gives; log in or give a token, "
            f"and {_FETCH}"
        )
    if text.startswith("<?xml") or (whole and text.startswith("<Error>")):
        code = re.search(r"<Code>([^<]*)</Code>", text)
        return f"is an answer of a server in XML{f' ({_short(code[1])})' if code else ''}, not the file; {_FETCH}"
    return None


def _is_text(data: bytes) -> bool:
    """True for an error message or a JSON document; not for a pickle of protocol 0, which is printable too."""
    try:
        text = data.decode("utf-8")
        if not all(character.isprintable() or character in "\t\r\n" for character in text):
            return False
        deque(pickletools.genops(data), maxlen=0)
    except UnicodeDecodeError:
        return False
    except ValueError:
        return True
    return False


def _short(text: str) -> str:
    return " ".join(text.split())[:80]
