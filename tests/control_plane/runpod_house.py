"""Servers of the runpod_queue backend for tests, and what lies in their bucket."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from live_server import ENDED, Server
from runpod_local import Platform, local_runpod
from services import S3

__all__ = ["Bucket", "RunpodServer", "bucket_env", "eventually", "real_workers"]


class RunpodServer(Server):
    """``memvid-export serve`` before a local Runpod; ``hooks``: the platform is told where to say that a job ended."""

    def __init__(
        self,
        root: Path,
        platform: Platform,
        *,
        poll: float = 0.2,
        hooks: bool = False,
        env: Mapping[str, str] | None = None,
        **settings: object,
    ) -> None:
        super().__init__(root, env=env, backend_mode="runpod_queue", **settings)
        self.env |= {
            "RUNPOD_API_BASE": platform.api_base,
            "RUNPOD_ENDPOINT_ID": platform.endpoint,
            "RUNPOD_API_KEY": platform.key,
            "RUNPOD_POLL_INTERVAL_SECONDS": str(poll),
            **({"MEMVID_EXPORT_PUBLIC_URL": self.url} if hooks else {}),
        }

    def runpod_id(self, job_id: str) -> str:
        """Wait until a job was handed over, answer what the platform calls it."""
        return str(eventually(lambda: self.job(job_id)["metadata"]["runpodJobId"]))

    def ended(self, job_id: str, *, seconds: float = 90) -> dict[str, Any]:
        """Wait until a job has ended, answer it."""
        return dict(eventually(lambda: job if (job := self.job(job_id))["status"] in ENDED else None, seconds=seconds))

    def attempts(self, job_id: str) -> int:
        """How many attempts a job had."""
        return int(self.client.get(f"/v1/exports/{job_id}/report").json()["attempts"])

    def requests(self, route: str) -> int:
        """How many requests it has sent to a route of the platform."""
        lines = self.client.get("/metrics").text.splitlines()
        named = [line for line in lines if line.startswith(f'memvid_export_runpod_requests_total{{route="{route}"')]
        return int(sum(float(line.rpartition(" ")[2]) for line in named))


class Bucket:
    """Objects below a prefix of the bucket, by their key."""

    def __init__(self, s3: S3, prefix: str) -> None:
        self._s3 = s3
        self._prefix = prefix
        self.url = f"{s3.url}/{prefix}"
        self._client = boto3.client(
            "s3",
            endpoint_url=s3.endpoint,
            region_name="us-east-1",
            aws_access_key_id=s3.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=s3.env["AWS_SECRET_ACCESS_KEY"],
            config=Config(s3={"addressing_style": "path"}),
        )

    def keys(self, part: str = "") -> list[str]:
        """Keys below the prefix that hold ``part``."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._s3.bucket, Prefix=self._prefix)
        found = [entry["Key"].removeprefix(self._prefix + "/") for page in pages for entry in page.get("Contents", [])]
        return sorted(key for key in found if part in key)

    def wait_until_gone(self, part: str) -> None:
        """Wait until no key holds ``part``."""
        for _ in range(600):
            if not (left := self.keys(part)):
                return
            time.sleep(0.05)
        raise AssertionError(f"left in the bucket: {left}")

    def read(self, key: str) -> bytes:
        """The bytes of an object."""
        answer = self._client.get_object(Bucket=self._s3.bucket, Key=f"{self._prefix}/{key}")
        with answer["Body"] as body:
            return bytes(body.read())

    def write(self, key: str, data: bytes) -> None:
        """Put an object."""
        self._client.put_object(Bucket=self._s3.bucket, Key=f"{self._prefix}/{key}", Body=data)

    def remove(self, key: str) -> None:
        """Delete an object."""
        self._client.delete_object(Bucket=self._s3.bucket, Key=f"{self._prefix}/{key}")

    def close(self) -> None:
        """Close its connections."""
        self._client.close()


def bucket_env(s3: S3) -> dict[str, str]:
    """What a server or a worker needs to use the bucket."""
    return {**s3.env, "MEMVID_EXPORT_S3_ADDRESSING": "path"}


@contextmanager
def real_workers(s3: S3, root: Path, *, env: Mapping[str, str] | None = None, **config: Any) -> Iterator[Platform]:
    """A local Runpod whose workers are ours, over the whole bucket."""
    given = {
        **bucket_env(s3),
        "MEMVID_EXPORT_ROOT": str(root),
        "MEMVID_EXPORT_STAGING_ROOT": str(root),
        "MEMVID_EXPORT_STORAGE_URL": s3.url,
        "MEMVID_EXPORT_WORKER_MEMORY_BYTES": str(1 << 30),
        **(env or {}),
    }
    with local_runpod(env=given, **{"idle_seconds": 120.0, "ping_seconds": 1, **config}) as platform:
        yield platform


def eventually(look: Callable[[], Any], *, seconds: float = 60) -> Any:
    """Look until what is found is true, answer it; fails with what was last seen."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"not within {seconds:.0f} seconds; last seen: {found}"
        time.sleep(0.05)
    return found
