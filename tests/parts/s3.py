"""An S3 server in this process, and an empty folder in a new bucket of it: fixtures for a conftest to import."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

_buckets = itertools.count()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 server that lives as long as the tests."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty folder in a new bucket; environment variables lead clients and subprocesses there."""
    import botocore.session
    import s3fs

    settings = {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"dtpipe-{next(_buckets)}"
    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket=bucket)
    client.close()
    yield f"s3://{bucket}/features"
    s3fs.S3FileSystem.clear_instance_cache()
