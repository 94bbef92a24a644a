"""Documents that hang together, as arrays: those of one space that somebody sees, by where they stand among these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from control_plane.nexus.lists import NOBODY
from control_plane.nexus.records import NEAR, TOP_K, Near

Places = NDArray[np.int64]


class Together(NamedTuple):
    """Documents of several collections that hang together."""

    size: int
    rows: Sequence[int]
    """The first ones."""
    collections: frozenset[int]
    """Of all of them."""


class Groups:
    """Which documents hang together; takes 24 bytes of each, whatever is told of them. For one thread at a time."""

    def __init__(self, rows: Places, collections: Places) -> None:
        """``rows`` in order, at least one, and the collection of each."""
        self.rows = rows
        self._collections = collections
        self._top = np.arange(len(rows))
        """Of each one an earlier one of its group, or itself."""

    def take(self, lists: Sequence[tuple[int, bytes]], threshold: float) -> list[int]:
        """Join rows with those of their packed lists that resemble them so much. Answers rows whose lists are too
        short for all of these: they are full, and some in them are not among the rows."""
        counts = [len(data) // NEAR.itemsize for _, data in lists]
        near = np.frombuffer(b"".join(data for _, data in lists), dtype=NEAR)
        enough = near["score"] >= threshold
        own = self._places(np.repeat(np.array([row for row, _ in lists], dtype=np.int64), counts)[enough])
        other = self._places(near["id"][enough])
        mine = own != NOBODY
        own, other = own[mine], other[mine]
        there = other != NOBODY
        self._join(np.stack([own[there], other[there]]))
        whose, how_many = np.unique(own, return_counts=True)
        short = np.intersect1d(whose[how_many == TOP_K], own[~there])
        found: list[int] = self.rows[short].tolist()
        return found

    def add(self, row: int, near: Sequence[Near]) -> None:
        """Join a row with others of the rows."""
        ends = self._places(np.array([row, *(one.id for one in near)], dtype=np.int64))
        others = ends[1:][ends[1:] != NOBODY]
        self._join(np.stack([np.full(len(others), ends[0]), others]))

    def several(self, most: int, shown: int) -> tuple[list[Together], int]:
        """The largest groups of documents of several collections, of each so many rows; and how many such there are."""
        top = self._tops(np.arange(len(self.rows)))
        order = np.lexsort((self._collections, top))
        tops, collections = top[order], self._collections[order]
        new = np.ones(len(order), np.bool_)
        new[1:] = (tops[1:] != tops[:-1]) | (collections[1:] != collections[:-1])
        found = np.flatnonzero(np.bincount(tops[new]) > 1)
        start, end = (np.searchsorted(tops, found, side) for side in ("left", "right"))
        groups = []
        for at in np.lexsort((found, start - end))[:most]:
            inside = slice(start[at], end[at])
            rows = self.rows[np.sort(order[inside])[:shown]].tolist()
            groups.append(Together(int(end[at] - start[at]), rows, frozenset(np.unique(collections[inside]).tolist())))
        return groups, len(found)

    def _places(self, rows: Places) -> Places:
        at = np.searchsorted(self.rows, rows)
        there = self.rows[np.minimum(at, len(self.rows) - 1)] == rows
        return np.where(there, at, NOBODY)

    def _join(self, ends: Places) -> None:
        """Pairs of places, of shape (2, pairs)."""
        while True:
            tops = self._tops(ends)
            apart = tops[0] != tops[1]
            if not apart.any():
                return
            ends, tops = ends[:, apart], tops[:, apart]
            # The earliest of several; what is lost by that is still apart.
            np.minimum.at(self._top, tops.max(axis=0), tops.min(axis=0))

    def _tops(self, ends: Places) -> Places:
        """The first ones of their groups."""
        while True:
            above = self._top[ends]
            top = self._top[above]
            if np.array_equal(top, above):
                return top
            self._top[ends] = top
