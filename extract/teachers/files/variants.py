"""Which file of a diffusers folder holds the weights: one file or shards with an index, plain or of a variant.

A variant is a second set of weights of one network, with a word in its files' names: `fp16`, `non_ema`. Plain weights
are taken where nothing is asked for, and the only variant where there are no plain ones.
Source of the names: diffusers and transformers, `save_pretrained(.., variant=..)`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import Field

from dtpipe.manifests.errors import TeacherError

NETWORK_STEMS = {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"}
TEXT_STEMS = {"safetensors": "model", "bin": "pytorch_model"}
VARIANT: Any = Field(
    default=None,
    pattern=r"^[\w-]+$",
    description="Which weights of a folder with several (fp16, ..); default: the plain ones, else the only ones.",
)
"""The option of every family that reads diffusers folders; no content of a dataset, since the weights' digest is."""
_SHARD = re.compile(r"-\d{5}-of-\d{5}\b")
_PLAIN = ""


def find_weights(folder: Path, stems: dict[str, str], variant: str | None) -> Path:
    """The file of weights, or the index of their shards; a safetensors one where there are several.

    Raises: TeacherError when there is none, none of the variant, or several variants of which none is chosen.
    """
    found = _weights_by_variant(folder, stems)
    if variant is None and _PLAIN not in found and len(found) > 1:
        raise TeacherError(
            f"{folder}: holds weights of variants {', '.join(sorted(found))}, and none without; "
            f"choose one with -s extract.teacher.options.variant={min(found)}"
        )
    chosen = variant or (_PLAIN if _PLAIN in found else next(iter(found), _PLAIN))
    if chosen in found:
        return found[chosen]
    if variant is None:
        files = [f"{stem}.{kind}" for kind, stem in stems.items()]
        raise TeacherError(
            f"{folder}: holds none of {', '.join(files)}, their variants (.fp16 ..) and indices of shards; "
            f"save the model there as safetensors"
        )
    known = ", ".join(name or "plain weights (leave the option out)" for name in sorted(found)) or "no weights at all"
    raise TeacherError(f"{folder}: has no weights of extract.teacher.options.variant {variant!r}; it has {known}")


def find_part(folder: Path, stems: dict[str, str], variant: str | None) -> Path:
    """As `find_weights`, of a part of a pipeline, which need not have the variant that another part has."""
    return find_weights(folder, stems, variant if variant in _weights_by_variant(folder, stems) else None)


def hub_patterns(variant: str | None, stems: dict[str, str] = NETWORK_STEMS) -> tuple[str, ...]:
    """Shell patterns of the files of a repository that may hold these weights, below any folder's name."""
    word = f".{variant}" if variant else ""
    return tuple(
        pattern
        for kind, stem in stems.items()
        for pattern in (f"{stem}{word}.{kind}", f"{stem}{word}-*.{kind}", f"{stem}*.{kind}.index*.json")
    )


def small_hub_patterns(variant: str | None, folders: tuple[str, ...]) -> list[str]:
    """As `hub_patterns`, in some folders, for networks so small that half-precision weights are fetched on chance."""
    names = dict.fromkeys((*hub_patterns(variant), *hub_patterns(variant or "fp16")))
    return [f"{folder}{name}" for folder in folders for name in names]


def _weights_by_variant(folder: Path, stems: dict[str, str]) -> dict[str, Path]:
    """The best file of each variant: safetensors before torch's, one file before shards."""
    files = sorted(path.name for path in folder.glob("*") if path.is_file() or path.is_symlink())
    found: dict[str, Path] = {}
    for kind, stem in stems.items():
        start, end = re.escape(stem), re.escape(kind)
        one = re.compile(rf"{start}(?:\.(?P<variant>[^.]+))?\.{end}")
        index = re.compile(rf"{start}(?:\.(?P<early>[^.]+))?\.{end}\.index(?:\.(?P<variant>[^.]+))?\.json")
        for pattern in (one, index):
            for match in filter(None, map(pattern.fullmatch, files)):
                words = match.groupdict()
                variant = words["variant"] or words.get("early") or _PLAIN
                if not _SHARD.search(match[0]):
                    found.setdefault(variant, folder / match[0])
    return found
