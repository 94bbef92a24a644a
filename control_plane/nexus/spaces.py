"""The spaces that are in memory: read from rows when they are first asked for, and caught up at every question."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from control_plane.nexus.records import Vector, VectorRow
from control_plane.nexus.space import Space
from control_plane.nexus.store import TOMBSTONE_MS, CollectionStore

PAGE = 5_000
"""Rows that are read at once."""
STALE_SECONDS = TOMBSTONE_MS / 1_000 / 2
"""A space that nobody asked for so long is read anew: rows that tell of deletions may be gone."""


@dataclass
class _Open:
    """A space and what it has of the rows. One that was dropped goes on for who has it, and nobody else gets it."""

    space: Space
    version: int = 0
    """The last one that it has."""
    asked: float = 0.0
    """When it was asked for last, by ``time.monotonic``."""
    whole: bool = False
    """All rows were read."""
    listed: bool = False
    """It has the lists."""
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)


class Listed(NamedTuple):
    """A space with its lists."""

    space: Space
    version: int
    """Of each row it has the last change up to this one, at least."""


class Spaces:
    """Spaces by their names (``client/model/dimension``). What memory they take together is bounded, but for one that
    is larger by itself."""

    def __init__(self, store: CollectionStore, *, memory_bytes: int, mirrored: bool = False) -> None:
        """``mirrored``: see ``Space``."""
        self._store = store
        self._mirrored = mirrored
        self._memory = memory_bytes
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._used: dict[str, int] = {}

    @property
    def bytes(self) -> int:
        """What the spaces take."""
        return sum(one.space.bytes for one in self._open.values())

    @property
    def whole(self) -> dict[str, Space]:
        """Those that are in memory with all their rows."""
        return {name: one.space for name, one in self._open.items() if one.whole}

    async def space(self, name: str) -> Space:
        """A space with every row that was committed before."""
        return (await self._opened(name)).space

    async def listed(self, name: str) -> Listed:
        """A space with every row that was committed before, and the lists of those that were compared."""
        opened = await self._opened(name)
        async with opened.reading:
            after = 0
            while not opened.listed:
                page = await self._store.lists(name, after, PAGE)
                await asyncio.to_thread(opened.space.load_lists, page)
                opened.listed = not page
                after = page[-1][0] if page else after
            return Listed(opened.space, opened.version)

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

    def drop(self, name: str, *, unless: Space | None = None) -> None:
        """Forget a space, if it is not this one: the next question reads it from rows."""
        if name in self._open and self._open[name].space is not unless:
            del self._open[name]

    def drop_lists(self) -> None:
        """Forget all spaces with lists: another replica may have changed the rows' since."""
        for name in [name for name, one in self._open.items() if one.listed]:
            self.drop(name)

    async def _opened(self, name: str) -> _Open:
        opened = self._open.get(name)
        if opened is None or time.monotonic() - opened.asked > STALE_SECONDS:
            space = Space(int(name.rpartition("/")[2]), mirrored=self._mirrored)
            opened = self._open[name] = _Open(space, asked=time.monotonic())
        self._open.move_to_end(name)
        async with opened.reading:
            await self._catch_up(name, opened)
        self._make_room(name)
        return opened

    async def _catch_up(self, name: str, opened: _Open) -> None:
        while True:
            rows = await self._store.changed_since(name, opened.version, PAGE)
            if rows:
                await asyncio.to_thread(opened.space.put, {row.id: _vector(row) for row in rows})
                opened.version = rows[-1].version
            opened.asked = time.monotonic()
            if len(rows) < PAGE:
                opened.whole = True
                return

    def _make_room(self, kept: str) -> None:
        for name in list(self._open):
            if self.bytes <= self._memory:
                return
            if name != kept and name not in self._used:
                self.drop(name)


def _vector(row: VectorRow) -> Vector | None:
    return None if row.deleted else np.frombuffer(row.vector, dtype="<f4")
