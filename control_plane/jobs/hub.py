"""Tells open event streams of new events, so that nobody has to ask the database again and again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime

import msgspec

from common.contract import Event
from control_plane.jobs.records import TERMINAL_EVENTS

KEPT = 1_024
"""Events of one job held in memory while someone listens; who is further behind reads from the database."""


class Line(msgspec.Struct, frozen=True):
    """One event, encoded once for all streams."""

    seq: int
    data: bytes
    last: bool
    """Nothing follows."""
    at: float
    """When it was committed, or about to be where another replica wrote it; seconds since 1970."""


def line_of(event: Event, at: float | None = None) -> Line:
    """The event in the form of an event stream: LF only, an empty line at the end. ``at``: when it was committed, where
    that is known."""
    data = b"id: %d\nevent: %s\ndata: %s\n\n" % (event.seq, event.type.encode(), msgspec.json.encode(event))
    return Line(event.seq, data, event.type in TERMINAL_EVENTS, at or datetime.fromisoformat(event.ts).timestamp())


class Channel:
    """The newest events of one job, and how far its log in the database reaches."""

    def __init__(self) -> None:
        self.lines: dict[int, Line] = {}
        self.known = 0
        """The highest number that is in the database for sure; streams read there what is not in ``lines``."""
        self.listeners = 0
        self.closed = False
        self._changed = asyncio.Event()

    def add(self, lines: Sequence[Line]) -> None:
        """Append, drop what is too old, wake all listeners."""
        for line in lines:
            self.lines[line.seq] = line
        while len(self.lines) > KEPT:
            del self.lines[min(self.lines)]
        self.known = max(self.known, *(line.seq for line in lines))
        self.wake()

    def reaches(self, seq: int) -> None:
        """The log has events up to ``seq``; wake all listeners if that is news."""
        if seq > self.known:
            self.known = seq
            self.wake()

    def wake(self) -> None:
        """Wake all listeners."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, timeout: float) -> bool:  # noqa: ASYNC109
        """Wait for the next ``wake``; False after ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True


def _unseen(_seconds: float) -> None:
    """Nobody measures."""


class EventHub:
    """Channels of the jobs that someone listens to."""

    def __init__(self) -> None:
        self._channels: dict[str, Channel] = {}
        self.closed = False
        self.listeners = 0
        self.changes = 0
        """Grows with every event that ends a job, and with all that other replicas tell."""
        self.handed: Callable[[float], None] = _unseen
        """Is told how many seconds after its commit each event was handed to a stream that was open by then."""

    def publish(self, job_id: str, events: Sequence[Event]) -> None:
        """Hand committed events to the listeners of a job."""
        self.changes += any(event.type in TERMINAL_EVENTS for event in events)
        if channel := self._channels.get(job_id):
            now = time.time()
            channel.add([line_of(event, now) for event in events])

    def reaches(self, job_id: str, seq: int) -> None:
        """Tell the listeners of a job that its log in the database has events up to ``seq``."""
        self.changes += 1
        if channel := self._channels.get(job_id):
            channel.reaches(seq)

    @property
    def job_ids(self) -> list[str]:
        """The jobs that someone listens to."""
        return list(self._channels)

    @asynccontextmanager
    async def listen(self, job_id: str) -> AsyncIterator[Channel]:
        """The channel of a job, filled from now on."""
        channel = self._channels.setdefault(job_id, Channel())
        channel.closed = self.closed
        channel.listeners += 1
        self.listeners += 1
        try:
            yield channel
        finally:
            self.listeners -= 1
            channel.listeners -= 1
            if not channel.listeners:
                del self._channels[job_id]

    def close(self) -> None:
        """End all streams: the server is stopping."""
        self.closed = True
        for channel in self._channels.values():
            channel.closed = True
            channel.wake()
