"""An S3 server for labelled images on object storage."""

from __future__ import annotations

from parts.s3 import s3_endpoint, s3_url  # noqa: F401  fixtures
