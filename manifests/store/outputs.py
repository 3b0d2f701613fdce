"""Whether a command may write where `--out` says: a place that is free, or what the same command left there before.

One rule: nothing is written, and no lock taken, before a place was looked at.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from dtpipe.manifests.errors import ConfigError

_SHOWN = 3  # names in a message
_LOGS = (".log", ".out", ".err")  # which batch systems and `tee` put into a folder before its first command
_MARKS = (  # what a folder is by the names in it, the first that fits
    ("a feature dataset", ({"plan.json", "manifest.json"}, {"listing.parquet", "commits", "shards.parquet"})),
    ("a run", ({"config.yaml"}, {"last.pt", ".lock"})),
    ("an export", ({"export.yaml"}, {"model.safetensors"})),
    ("a predictor", ({"predictor.json"},)),
    ("predictions", ({"predictions.json"},)),
    ("a teacher", ({"model_index.json"},)),
)
_END_BYTES = 1 << 16


def refuse_no_folder(out: Path) -> None:
    """See that a place is a folder, or can become one, outside of feature datasets. Raises: ConfigError."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder as --out")
    if out.is_symlink() and not out.exists():
        raise ConfigError(f"{out} is a link to {out.readlink()}, which is not there; choose another --out")
    for above in out.absolute().parents:
        if above.exists() and not above.is_dir():
            raise ConfigError(f"{out} lies below {above}, which is a file; choose another --out")
        if _names(above) and content_of(above) == "a feature dataset":
            raise ConfigError(f"{out} lies in {above}, a feature dataset; choose another --out")


def refuse_other_folder(out: Path, maker: str, leftovers: Collection[str] = ()) -> None:
    """As `refuse_no_folder`, and see that it holds nothing yet but hidden files, logs, and `leftovers` of a command
    that was stopped as it began; `maker` is what did not write the rest. Raises: ConfigError.
    """
    refuse_no_folder(out)
    names = sorted(_names(out) - set(leftovers))
    others = [name for name in names if not name.startswith(".") and not name.endswith(_LOGS)]
    if others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        content = content_of(out) or f"what {maker} did not write"
        raise ConfigError(
            f"{out} holds {content} ({', '.join(others[:_SHOWN])}{more}); choose an empty or new folder for --out"
        )


def refuse_other_file(path: Path, mark: bytes, maker: str, flag: str = "--out") -> None:
    """See that a file can be written at `path`, where nothing lies or a file of `maker`, which `mark` tells.

    Raises: ConfigError.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a file as {flag}")
    for above in path.absolute().parents:
        if above.exists() and not above.is_dir():
            raise ConfigError(f"{path} lies below {above}, which is a file; choose another {flag}")
    if not path.exists():
        return
    if path.stat().st_size and mark not in _ends(path):
        raise ConfigError(f"{path} is there, and {maker} did not write it; choose another {flag}, or move it away")


def content_of(folder: Path) -> str | None:
    """What a folder holds, in words, where its names tell."""
    names = _names(folder)
    return next((content for content, marks in _MARKS if all(mark & names for mark in marks)), None)


def _ends(path: Path) -> bytes:
    """The first and the last bytes of a file."""
    with path.open("rb") as file:
        head = file.read(_END_BYTES)
        file.seek(max(0, path.stat().st_size - _END_BYTES))
        return head + file.read(_END_BYTES)


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError:  # not there, or not ours to list: who writes says so
        return set()
