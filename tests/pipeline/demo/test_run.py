"""The demo on one's own folder scores classes only where a score says something."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dtpipe.extract.sources.registry import open_source
from dtpipe.pipeline.cli.console import Console
from dtpipe.pipeline.demo.run import has_classes
from parts.images import write_images


@pytest.mark.parametrize(
    ("classes", "below", "probe", "said"),
    [
        (("cat", "dog"), "", True, ""),
        (("cat", "dog"), "cat", False, ""),  # no labels at all
        (("cat",), "", False, r"\nno class probe: .* one class, 'cat'.*\n"),
        (("train", "val"), "", False, r"\nno class probe: .*: train, val are parts of a data set.*\n"),
    ],
)
def test_a_class_probe_that_would_say_nothing_is_left_out_with_the_reason(
    classes: tuple[str, ...], below: str, probe: bool, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(write_images(tmp_path / "photos", 4, classes=classes) / below)
    assert has_classes(url, open_source(url).list(), Console()) == probe
    assert re.fullmatch(said, capsys.readouterr().out)
