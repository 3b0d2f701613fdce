"""Opening the client of a URL."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("url", "package", "advice"),
    [
        ("s3a://bucket/x", "s3fs", "`pip install 'dtpipe[s3]'` brings it"),
        ("gs://bucket/x", "gcsfs", "`pip install 'dtpipe[gcs]'` brings it"),
        ("https://host/x", "aiohttp", "`pip install 'dtpipe[http]'` brings it"),
        ("sftp://host/x", "paramiko", "install that package"),
    ],
)
def test_a_protocol_without_its_package_says_which_to_install(url, package, advice):
    """In a process of its own: file systems that were imported once stay."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from dtpipe.manifests.errors import MissingPackageError\n"
        "from dtpipe.manifests.store.client import Client\n"
        f"try:\n    Client({url!r})\nexcept MissingPackageError as err:\n    print(err)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith(f"; {advice}") and done.stdout.startswith(f"{url}: "), done.stderr
