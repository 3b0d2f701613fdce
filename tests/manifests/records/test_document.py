"""Documents that several processes write at the same moment, as evaluations that share a table do at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtpipe.manifests.records.document import read_document, write_document


def test_another_that_writes_it_meanwhile_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other begins and ends where the first has written its bytes and not yet named them."""
    path, others = tmp_path / "table.json", ["second"]

    def meanwhile(_name: str) -> None:
        if others:
            write_document(path, {"by": others.pop()}, "")
            assert read_document(path, "") == {"by": "second"}

    monkeypatch.setattr("dtpipe.manifests.store.publish.fault_point", meanwhile)
    write_document(path, {"by": "first"}, "")
    assert read_document(path, "") == {"by": "first"}
    assert list(tmp_path.iterdir()) == [path]
