"""A job of the local Runpod, and the messages that it comes from and is answered by."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from handler.local.fleet import Worker

Status = Literal["IN_QUEUE", "IN_PROGRESS", "RUNNING", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]

NOTHING = msgspec.Raw(b"null")


class Refused(Exception):
    """The platform answers with this HTTP status and ``{"error": message}``."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Policy(msgspec.Struct, rename="camel"):
    """Limits of one job in milliseconds."""

    execution_timeout: int | None = None
    ttl: int | None = None
    low_priority: bool = False


class RunRequest(msgspec.Struct, rename="camel"):
    """The body of ``/run`` and ``/runsync``; keys that are not named here are ignored."""

    input: msgspec.Raw
    policy: Policy | None = None
    webhook: str | None = None
    s3_config: msgspec.Raw = NOTHING


class Result(msgspec.Struct, rename="camel"):
    """What a worker posts: a progress update where ``status`` is IN_PROGRESS, else the result."""

    status: str | None = None
    output: msgspec.Raw = NOTHING
    error: Any = None
    stop_pod: bool = False


@dataclass(slots=True, eq=False)
class Job:
    """A job; times are those of the loop."""

    id: str
    request: RunRequest
    execution_ms: int
    retention: float
    size: int
    submitted: float
    status: Status = "IN_QUEUE"
    started: float | None = None
    delay_ms: int | None = None
    spent_ms: int | None = None
    output: msgspec.Raw = field(default_factory=lambda: NOTHING)
    error: Any = None
    worker: str | None = None
    retries: int = 0
    holders: list[Worker] = field(default_factory=list)
    late: msgspec.Raw = field(default_factory=lambda: NOTHING)
    """A progress update that comes after the result."""
    limit: asyncio.TimerHandle | None = None
    """Ends it after its execution timeout."""
    forget: list[asyncio.TimerHandle] = field(default_factory=list)
    """Ends its being known."""
    finished: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ended(self) -> bool:
        """It has a final state."""
        return self.status in ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")

    def view(self) -> dict[str, Any]:
        """The answer of ``/status``."""
        found = {
            "delayTime": self.delay_ms,
            "executionTime": self.spent_ms,
            "output": None if self.output == NOTHING else self.output,
            "error": self.error,
            "workerId": self.worker,
        }
        return {"id": self.id, "status": self.status, **{name: it for name, it in found.items() if it is not None}}
