"""The S3 server that these tests share, a place in it for each, and a proxy in front of it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from services import S3
from storage.faulty import Proxy, proxy


@pytest.fixture
def prefix(s3: S3) -> str:
    """An empty prefix."""
    return f"{s3.url}/{uuid.uuid4()}/"


@pytest.fixture
def between(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy through which this process reaches the S3 server, and signed links lead."""
    with proxy(s3.endpoint) as faulty:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", faulty.url)
        yield faulty
