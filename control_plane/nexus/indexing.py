"""Keeps the indexes of spaces in step with their vectors, in the background: in a vector store, or in files.

With a vector store each space has its index there, which holds every vector. Without one, a space above
``EXACT_UP_TO`` documents has an index in memory, of which a snapshot lies in files of this replica, so that it need not
be built anew at each start. Either is asked above that many documents. Until an index has a vector that vector is
looked at by itself: nobody waits for this.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import structlog
from sqlalchemy.exc import SQLAlchemyError

from control_plane.nexus.index import IndexUnavailable, name_of
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.space import Space
from control_plane.nexus.spaces import Spaces
from control_plane.nexus.store import CollectionStore
from control_plane.nexus.vectorizer import Vectorizer

log = structlog.get_logger()

STEP = 1_000
"""Vectors that are brought to the index of one space before the next one's turn."""
LOOK_SECONDS = 1.0
"""Between two looks where nothing lacks."""
ALL_SECONDS = 3_600.0
"""Between two looks at all spaces, those that nobody asks for too."""
SAVE_SECONDS = 300.0
"""Between two snapshots of a space, at least."""
SAVE_MOVES = 1_000
"""Vectors that moved since the last snapshot, at least, or a hundredth of all."""
STOP_SECONDS = 10.0
"""For snapshots when the server stops."""
NOT_SAVED = "INDEX_NOT_SAVED"
"""The code of a snapshot that could not be written."""


@dataclass
class _Saved:
    """The last snapshot of a space."""

    moves: int
    at: float


class Snapshots:
    """Snapshots of the indexes of spaces, in a folder."""

    def __init__(self, folder: Path, metrics: NexusMetrics) -> None:
        self._folder = folder
        self._metrics = metrics
        self._saved: WeakKeyDictionary[Space, _Saved] = WeakKeyDictionary()

    def path(self, space: str) -> Path:
        """Where the snapshot of a space is."""
        return self._folder / name_of(space)

    def restore(self, name: str, space: Space) -> None:
        """Take the index of a space from its snapshot, the first time that this is asked."""
        if space not in self._saved:
            taken = space.restore(self.path(name))
            self._saved[space] = _Saved(space.moved, -SAVE_SECONDS)
            if taken:
                log.info("an index is read from its snapshot", vectors=taken, documents=len(space))

    def save(self, name: str, space: Space, now: float) -> None:
        """Write a snapshot where much has changed since the last one, and that was long ago."""
        saved = self._saved.get(space)
        if saved is None or now - saved.at < SAVE_SECONDS or not space.in_use:
            return
        moves = space.moved
        if moves - saved.moves < max(SAVE_MOVES, len(space) // 100):
            return
        self._saved[space] = _Saved(saved.moves, now)
        try:
            space.save(self.path(name))
        except OSError as error:
            self._metrics.errors.labels(NOT_SAVED).inc()
            log.error("an index cannot be saved; the snapshot of before stays", reason=str(error))
            return
        self._saved[space].moves = moves

    def keep_only(self, spaces: Collection[str]) -> None:
        """Delete the files of all other spaces."""
        kept = {name_of(space) for space in spaces}
        with suppress(OSError):
            for file in self._folder.iterdir():
                if file.name.partition(".")[0] not in kept:
                    file.unlink()


class Indexing:
    """The loop."""

    def __init__(self, store: CollectionStore, spaces: Spaces, snapshots: Snapshots, server: Vectorizer | None) -> None:
        """With a ``server`` only the replica that syncs may run this."""
        self._store = store
        self._spaces = spaces
        self._snapshots = snapshots
        self._server = server
        self._looked_at_all = float("-inf")

    async def run(self) -> None:
        """Bring vectors to indexes until canceled."""
        try:
            while True:
                lacking = 0
                try:
                    if time.monotonic() - self._looked_at_all > ALL_SECONDS:
                        await self._look_at_all()
                        self._looked_at_all = time.monotonic()
                    for name in self._spaces.whole:
                        lacking += await self._step(name)
                except (IndexUnavailable, SQLAlchemyError) as error:
                    log.debug("indexes wait", reason=str(error))
                await asyncio.sleep(0 if lacking else LOOK_SECONDS)
        finally:
            if self._server is not None:
                for space in self._spaces.whole.values():
                    space.leave()  # another replica may change what it has

    async def save(self) -> None:
        """Write snapshots, within a bounded time; what is not whole by then does not count."""
        if self._server is not None:
            return
        several = self._spaces.whole

        def work() -> None:
            for name, space in several.items():
                self._snapshots.save(name, space, float("inf"))

        # No thread of the pool, for which the process would wait.
        saving = threading.Thread(target=work, daemon=True)
        saving.start()
        await asyncio.to_thread(saving.join, STOP_SECONDS)

    async def _look_at_all(self) -> None:
        """Let go of spaces that are gone; with a server, see that it has what it should of all others."""
        names = [name for name, _ in await self._store.spaces()]
        await asyncio.to_thread(self._snapshots.keep_only, names if self._server is None else ())
        if self._server is not None:
            await asyncio.to_thread(self._server.keep_only, names)
            for name in names:
                await self._spaces.space(name)
                while await self._step(name) > 0:
                    pass

    async def _step(self, name: str) -> int:
        """How many vectors the index of a space lacks then, where there is more to be done at once."""
        space = self._spaces.whole.get(name)
        if space is None:
            return 0
        with self._spaces.using(name):
            if self._server is None:
                await asyncio.to_thread(self._snapshots.restore, name, space)
                lacking = await asyncio.to_thread(space.catch_up, STEP)
                if not lacking:
                    await asyncio.to_thread(self._snapshots.save, name, space, time.monotonic())
                return lacking
            try:
                if not space.in_use:
                    space = await self._spaces.space(name)
                    await asyncio.to_thread(space.use, self._server.index(name, int(name.rpartition("/")[2])))
                return await asyncio.to_thread(space.catch_up, STEP)
            except IndexUnavailable as error:
                log.debug("the index of a space waits", reason=error.message)
                return 0
