"""Real servers for tests: an S3 server on this machine, started and ended here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import REPOSITORY, free_port, running

from common.storage import S3Config, StorageConfig

VERSITYGW = REPOSITORY / ".cache" / "bin" / "versitygw"
BUCKET = "exports"


class S3(NamedTuple):
    """An S3 server that is up, with one empty bucket."""

    endpoint: str
    bucket: str
    env: Mapping[str, str]
    """What boto3, and so every process of ours, needs to reach it."""

    @property
    def url(self) -> str:
        """A value for ``MEMVID_EXPORT_STORAGE_URL``."""
        return f"s3://{self.bucket}"

    def config(self, *, links: bool = False) -> StorageConfig:
        """Storage over this server: the bucket, or with ``links`` only its host for signed URLs."""
        s3 = None if links else S3Config(bucket=self.bucket, addressing="path")
        return StorageConfig(roots=[], s3=s3, fetch_hosts=["127.0.0.1"], fetch_private=True)


@contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    """A versitygw over ``folder`` on a free port of this machine."""
    if not VERSITYGW.exists():
        raise FileNotFoundError("versitygw is not installed; run scripts/setup services")
    (folder / BUCKET).mkdir(parents=True)
    endpoint = f"http://127.0.0.1:{free_port()}"
    env = {
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "only-for-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    keys = {"ROOT_ACCESS_KEY": env["AWS_ACCESS_KEY_ID"], "ROOT_SECRET_KEY": env["AWS_SECRET_ACCESS_KEY"]}
    command = [VERSITYGW, "--quiet", "--keep-alive", "--port", endpoint.removeprefix("http://"), "posix", folder]
    log = folder.with_name(folder.name + ".log")
    # Any answer will do: without a signature it refuses.
    with running(command, log, {**os.environ, **keys}, endpoint, well=False):
        yield S3(endpoint, BUCKET, env)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 server for all tests of this process, which finds it in its environment; children get ``s3.env``."""
    with s3_server(tmp_path_factory.mktemp("s3") / "buckets") as server, pytest.MonkeyPatch.context() as environment:
        for name, value in server.env.items():
            environment.setenv(name, value)
        yield server
