"""No images at all: N numbered samples that a teacher makes itself (`dtpipe extract --num-samples N`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dtpipe.extract.sources.base import SourceItem
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.schema import SYNTHESIZED


class SynthesizedSource:
    """Samples z/000000000 .. in this order; each key is its own URI, and nothing can be read."""

    kind = SYNTHESIZED

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def list(self) -> Sequence[SourceItem]:
        """All samples."""
        return [SourceItem(key, key) for key in (f"z/{idx:09d}" for idx in range(self.num_samples))]

    def ignored(self) -> Mapping[str, int]:
        """Nothing."""
        return {}

    def read(self, uri: str) -> bytes:
        """Raises: InputError, always."""
        raise InputError(f"{uri} is made by the teacher and has no file; `dtpipe inspect` writes it as PNG")
