"""What a local Runpod runs with."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Milliseconds = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]

WEEK_MS = 7 * 24 * 3_600_000


def _worker_command() -> list[str]:
    return [str(Path(sys.executable).with_name("memvid-export")), "worker"]


def worker_environment(inherited: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """A worker's environment: what this process has, without what is there to reach Runpod, and what is given."""
    return {**{name: value for name, value in inherited.items() if not name.startswith("RUNPOD_")}, **given}


class LocalConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One endpoint. The defaults are the platform's own; tests make its waits shorter."""

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65_535)] = 0
    """0: a free one."""
    endpoint: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "local"
    key: str | None = None
    """Without one, public requests need none."""

    min_workers: Annotated[int, msgspec.Meta(ge=0, le=16)] = 0
    max_workers: Annotated[int, msgspec.Meta(ge=0, le=16)] = 2
    idle_seconds: Seconds = 5.0
    worker_command: list[str] = msgspec.field(default_factory=_worker_command)
    env: dict[str, str] = {}
    """The whole environment of a worker (``worker_environment``); what the platform sets itself comes on top."""
    start_seconds: Seconds = 420.0
    """A worker that has not asked for a job by then is ended and replaced."""
    ping_seconds: Annotated[int, msgspec.Meta(ge=1)] = 5
    """A worker pings so often; one that has missed three in a row is lost."""
    poll_seconds: Seconds = 20.0
    """A worker's request for jobs or stop signals is held so long."""

    faults: dict[str, float] = {}
    """Probability of a fault by its name."""
    seed: int | None = None

    execution_ms: Milliseconds = 600_000
    min_execution_ms: Milliseconds = 5_000
    ttl_ms: Milliseconds = 24 * 3_600_000
    min_ttl_ms: Milliseconds = 10_000
    retention_seconds: Seconds = 1_800.0
    sync_retention_seconds: Seconds = 60.0
    webhook_gap_seconds: Seconds = 10.0

    run_limit: Count = 1_000
    """Requests to the endpoint in any 10 seconds; the same for those below."""
    runsync_limit: Count = 2_000
    status_limit: Count = 2_000
    cancel_limit: Count = 100
    purge_limit: Count = 2

    def __post_init__(self) -> None:
        if self.min_workers > self.max_workers:
            raise ValueError(f"the least number of workers is {self.min_workers}, the most {self.max_workers}")
