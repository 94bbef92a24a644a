"""The port of a batch: a slot runs one graph at a time, wherever that is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from common.contract import Progress, Report
from common.embedding.choice import Choice
from control_plane.batch.journal import Record
from control_plane.batch.sources import Graph, Payload


class Plan(NamedTuple):
    """What every graph of a batch is to become."""

    options: dict[str, Any]
    """In place of the payload's own."""
    choice: Choice
    generated_at: str
    """ISO 8601 in UTC; one for all, so that all capsules of a batch have the same day."""
    sha256: str
    """Of all that decides a capsule beside its payload and the day."""


@dataclass(eq=False, slots=True)
class Work:
    """A graph on its way through a batch."""

    graph: Graph
    payload: Payload
    before: Record | None
    """How it ended the last time."""
    began: float = 0.0
    """When it was first run, in the loop's time."""
    attempts: int = 0
    avoid: Slot | None = None
    """Where its last attempt met a broken device."""


class Kept(NamedTuple):
    """What lies in the destination now."""

    folder: str
    """As in a record."""
    files: dict[str, int]
    """Names and bytes."""
    report: Report


class Slot(Protocol):
    """A place where one graph at a time is run."""

    label: str
    device: str
    strikes: int
    """How often in a row this place, not the graph, was at fault."""

    async def ready(self) -> None:
        """Bring it up, or up again. Raises WorkerLost."""
        ...

    async def run(self, work: Work, tell: Callable[[Progress], None]) -> Callable[[], Kept]:
        """Run a graph. Answers what is left to do, once, in a thread, while the next graph may run already: to put the
        files where they belong, or to check them there. Both raise ExportError."""
        ...

    async def close(self) -> None:
        """End what runs."""
        ...
