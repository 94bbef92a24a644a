"""Upload and download by our storage against plain boto3, in turn, on an S3 server of this machine."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the server that the tests start

from services import s3_server  # noqa: E402

from common.storage import S3Config, StorageConfig, open_storage  # noqa: E402

HASHED = "put, hashed first"


def transfer_rates(folder: Path, megabytes: int, rounds: int) -> dict[str, list[float]]:
    """MB/s of each round: ``put`` and ``local`` of ours, sizes and SHA-256 checked, and ``upload_file`` and
    ``download_file`` of boto3, in turn."""
    import boto3

    source, scratch = folder / "source", folder / "scratch"
    folder.mkdir()
    source.write_bytes(os.urandom(megabytes * 1_000_000))
    with s3_server(folder / "s3") as server:
        os.environ.update(server.env)
        storage = open_storage(StorageConfig(roots=[], s3=S3Config(bucket=server.bucket, addressing="path")))
        plain = boto3.client("s3")
        ours, theirs = f"{server.url}/ours", folder / "theirs"
        stored = storage.put(source, ours)

        def put(sha256: str | None) -> None:
            storage.put(source, ours, sha256=sha256)

        def local() -> None:
            storage.local(ours, scratch, size=stored.size, sha256=stored.sha256).unlink()

        uses: dict[str, Callable[[], Any]] = {
            "put": lambda: put(stored.sha256),
            HASHED: lambda: put(None),
            "upload_file": lambda: plain.upload_file(str(source), server.bucket, "theirs"),
            "local": local,
            "download_file": lambda: plain.download_file(server.bucket, "theirs", str(theirs)),
        }
        for use in uses.values():  # both clients are connected then
            use()
        found: dict[str, list[float]] = {name: [] for name in uses}
        for _ in range(rounds):
            for name, use in uses.items():
                started = time.perf_counter()
                use()
                found[name].append(megabytes / (time.perf_counter() - started))
        plain.close()
    return found


def ratio(found: dict[str, list[float]], ours: str, theirs: str) -> float:
    """Median of ours over theirs, round by round."""
    return statistics.median(a / b for a, b in zip(found[ours], found[theirs], strict=True))
