"""Where images come from; a new kind of source is one file here and one line in `base.py`."""

from __future__ import annotations

from dtpipe.extract.sources.base import Source, SourceItem, SourceKind, open_source, register_source, source_kinds

__all__ = ["Source", "SourceItem", "SourceKind", "open_source", "register_source", "source_kinds"]
