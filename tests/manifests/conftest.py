"""Empty datasets on each kind of store, S3 by moto's server, and what the toy writer writes undisturbed."""

from __future__ import annotations

import itertools
from pathlib import Path

import hypothesis
import pytest

from parts import toy
from parts.s3 import s3_endpoint, s3_url  # noqa: F401  fixtures

hypothesis.settings.register_profile("dtpipe", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("dtpipe")

_buckets = itertools.count()


@pytest.fixture(params=["local", "memory", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty dataset URL on each kind of store."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    return (
        str(tmp_path / "features")
        if request.param == "local"
        else f"memory://{tmp_path.name}-{next(_buckets)}/features"
    )


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, bytes]]:
    """The digest and the merged files of a toy dataset that nothing disturbed."""
    root = tmp_path_factory.mktemp("unbroken")
    manifest, written = toy.extract(root)
    assert written == [0, 1, 2, 3]
    return manifest.digest, toy.content_of(root)
