"""Questions to capsules: a few at once, each for a bounded time."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import anyio
import structlog

from control_plane.errors import IndexBuildInProgress, TimedOut
from control_plane.jobs.records import JobRecord
from control_plane.reading.library import Library, OpenCapsule, was_ended

THREADS = 4
"""Questions answered at once; others wait their turn."""
SECONDS = 20.0
"""How long an answer may take, and how long a question waits for its turn."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = structlog.get_logger()


class Questions:
    """Runs questions in a few threads of its own."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._threads = anyio.CapacityLimiter(THREADS)

    async def ask(self, question: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """What ``question`` answers in a thread. Raises TimedOut where none gets free in time."""
        with anyio.move_on_after(SECONDS):  # while it waits for a thread; one that runs ends by its own clock
            return await anyio.to_thread.run_sync(question, *arguments, limiter=self._threads)
        raise TimedOut("Too many questions are asked at once; try again.")

    @contextmanager
    def opened(self, places: Mapping[str, Path | JobRecord]) -> Iterator[list[tuple[str, OpenCapsule]]]:
        """Open capsules with the names that they are given, for one question, which may take ``SECONDS``.

        Raises IndexBuildInProgress, CapsuleUnreadable, StorageFailed, TimedOut.
        """
        try:
            with self._library.lease_all(places) as capsules:
                for _, capsule in capsules:
                    capsule.allow(SECONDS)
                yield capsules
        except sqlite3.DatabaseError as error:
            if was_ended(error):
                raise TimedOut("The answer took too long; ask for less.") from error
            # A sidecar that turns out to be damaged is built anew for the next question.
            log.warning("damaged sidecar", capsules=list(places), exc_info=error)
            for place in places.values():
                self._library.discard(place)
            raise IndexBuildInProgress("The index of this capsule is damaged and is built anew; ask again.") from error
