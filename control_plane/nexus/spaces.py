"""The spaces that are in memory: read from rows when they are first asked for, and caught up at every question."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from control_plane.nexus.records import Vector, VectorRow
from control_plane.nexus.space import Space
from control_plane.nexus.store import TOMBSTONE_MS, CollectionStore

PAGE = 5_000
"""Rows that are read at once."""
STALE_SECONDS = TOMBSTONE_MS / 1_000 / 2
"""A space that nobody asked for so long is read anew: rows that tell of deletions may be gone."""


class _Open(NamedTuple):
    space: Space
    catching_up: asyncio.Lock


class Spaces:
    """Spaces by their names (``client/model/dimension``). What memory they take together is bounded, but for one that
    is larger by itself."""

    def __init__(self, store: CollectionStore, *, memory_bytes: int) -> None:
        self._store = store
        self._memory = memory_bytes
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._seen: dict[str, tuple[int, float]] = {}
        """The last version that a space has, and when it was asked for last."""
        self._listed: set[str] = set()
        """Spaces whose lists are in memory."""
        self._used: dict[str, int] = {}

    @property
    def bytes(self) -> int:
        """What the spaces take."""
        return sum(one.space.bytes for one in self._open.values())

    async def space(self, name: str) -> Space:
        """A space with every row that was committed before."""
        opened = self._open.get(name)
        _, asked = self._seen.get(name, (0, 0.0))
        if opened is None or time.monotonic() - asked > STALE_SECONDS:
            self.drop(name)
            opened = self._open[name] = _Open(Space(int(name.rpartition("/")[2])), asyncio.Lock())
        self._open.move_to_end(name)
        async with opened.catching_up:
            await self._catch_up(name, opened.space)
        self._make_room(name)
        return opened.space

    async def listed(self, name: str) -> Space:
        """A space with every row that was committed before, and the lists of those that were compared."""
        space = await self.space(name)
        opened = self._open[name]
        async with opened.catching_up:
            if name not in self._listed:
                after = 0
                while page := await self._store.lists(name, after, PAGE):
                    await asyncio.to_thread(space.load_lists, page)
                    after = page[-1][0]
                self._listed.add(name)
        return space

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Keep a space's memory meanwhile."""
        self._used[name] = self._used.get(name, 0) + 1
        try:
            yield
        finally:
            self._used[name] -= 1
            if not self._used[name]:
                del self._used[name]

    def drop(self, name: str) -> None:
        """Forget a space: the next question reads it from rows."""
        self._open.pop(name, None)
        self._seen.pop(name, None)
        self._listed.discard(name)

    def drop_lists(self) -> None:
        """Forget all spaces with lists: another replica may have changed the rows' since."""
        for name in list(self._listed):
            self.drop(name)

    async def _catch_up(self, name: str, space: Space) -> None:
        version, _ = self._seen.get(name, (0, 0.0))
        while True:
            rows = await self._store.changed_since(name, version, PAGE)
            if rows:
                await asyncio.to_thread(space.put, {row.id: _vector(row) for row in rows})
                version = rows[-1].version
            self._seen[name] = (version, time.monotonic())
            if len(rows) < PAGE:
                return

    def _make_room(self, kept: str) -> None:
        for name in list(self._open):
            if self.bytes <= self._memory:
                return
            if name != kept and name not in self._used:
                self.drop(name)


def _vector(row: VectorRow) -> Vector | None:
    return None if row.deleted else np.frombuffer(row.vector, dtype="<f4")
