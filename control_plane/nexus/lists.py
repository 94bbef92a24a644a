"""Scores of pairs, and lists of who is nearest, as arrays; documents go by *slots*, small numbers that a space gives.

Scores are whole numbers of millionths here, so that the same ones are equal. A *place* says where one document stands
in the list of another, the lower the earlier: the higher score first, of equal ones the id that is closer to the
list's own, then the lower id.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from control_plane.nexus.records import Vector

Slots = NDArray[np.int64]
Flags = NDArray[np.bool_]

MILLION = 1_000_000
NOBODY = -1
"""The slot behind the last one of a list."""
UNBOUNDED = int(np.iinfo(np.int64).max)
"""Behind every place."""
MAX_ID = 2**40 - 1
"""Of a document, so that a place has 63 bits: a score's 22, a distance's 40, and which id is the greater."""

_BEST = 2 * MILLION
"""Above every score."""
_SCORE = 41
"""Bits to the right of a place's score."""
_SCANNED_AT_ONCE = 8_192
"""Lists in which somebody is looked for: what that takes stays in the processor's cache."""
_HALF = 1e-4
"""In millionths: sums so near to the middle of two scores are made without any error."""
NOTHING: Slots = np.empty(0, np.int64)


class Pairs(NamedTuple):
    """Documents in pairs, with their scores."""

    rows: Slots
    """The first ones, by whatever numbers the maker says."""
    slots: Slots
    """The second ones."""
    micro: Slots

    def some(self, which: Flags | Slots) -> Pairs:
        """These of them."""
        return Pairs(self.rows[which], self.slots[which], self.micro[which])


NO_PAIRS = Pairs(NOTHING, NOTHING, NOTHING)


class Lists(NamedTuple):
    """Lists of some documents, in arrays shaped (documents, kept), with ``NOBODY`` behind the last one of each."""

    near: NDArray[np.int32]
    micro: NDArray[np.int32]
    horizon: Slots
    """Every document whose place is before this is in the list."""


def joined(pairs: Sequence[Pairs]) -> Pairs:
    """All of them."""
    return Pairs(*(np.concatenate(parts) for parts in zip(NO_PAIRS, *pairs, strict=True)))


def stacked(lists: Sequence[Lists], kept: int) -> Lists:
    """All of them, one below the other."""
    return Lists(*(np.concatenate(parts) for parts in zip(packed(0, NO_PAIRS, NOTHING, kept), *lists, strict=True)))


def places_of(own: Slots, other: Slots, micro: Slots) -> Slots:
    """Where ids ``other`` stand in the lists of ids ``own``."""
    distance = other - own
    found: Slots = ((_BEST - micro) << _SCORE) | (np.abs(distance) << 1) | (distance > 0)
    return found


def scores_at(places: Slots) -> Slots:
    """The score that a place has; below all others where it is ``UNBOUNDED``."""
    return _BEST - (places >> _SCORE)


def ranked(rows: Slots, places: Slots, most: int) -> tuple[Slots, Slots]:
    """The first ``most`` of each row: which they are, by row and place, and their ranks from 0."""
    order = np.lexsort((places, rows))
    ordered = rows[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return order[rank < most], rank[rank < most]


def packed(count: int, pairs: Pairs, places: Slots, kept: int, horizon: Slots | None = None) -> Lists:
    """Lists of documents numbered by the pairs' rows, the first ``kept`` of each.

    ``horizon``: before which the pairs are all that there is; else they are all there is. Who is left out, or may
    have been before, ends the horizon of a full list at its last place.
    """
    near = np.full((count, kept), NOBODY, np.int32)
    micro = np.zeros((count, kept), np.int32)
    horizon = np.full(count, UNBOUNDED, np.int64) if horizon is None else horizon.copy()
    chosen, rank = ranked(pairs.rows, places, kept)
    rows = pairs.rows[chosen]
    near[rows, rank], micro[rows, rank] = pairs.slots[chosen], pairs.micro[chosen]
    last = rank == kept - 1
    horizon[rows[last]] = np.minimum(horizon[rows[last]], places[chosen][last] + 1)
    return Lists(near, micro, horizon)


def holders_of(near: NDArray[np.int32], slots: Slots) -> Slots:
    """Numbers of those lists that some of these slots are in; 5 ms for 100,000 lists."""
    if not len(slots):
        return NOTHING
    wanted = np.zeros(max(len(near), int(slots.max()) + 1) + 1, np.bool_)  # the last one is NOBODY's
    wanted[slots] = True
    parts = range(0, len(near), _SCANNED_AT_ONCE)
    return np.concatenate([at + np.flatnonzero(wanted[near[at : at + _SCANNED_AT_ONCE]].any(axis=1)) for at in parts])


def scores_of(vectors: Vector, rows: Slots, others: Vector) -> Slots:
    """Of rows of ``vectors`` with as many others."""
    sums = np.einsum("ij,ij->i", vectors[rows].astype(np.float64), others.astype(np.float64))
    return rounded(sums, vectors, rows, others, np.arange(len(rows)))


def rounded(
    sums: NDArray[np.float64], left: Vector, rows: Slots, right: Vector | NDArray[np.float64], others: Slots
) -> Slots:
    """Scores by sums over the products of rows of ``left`` and others of ``right``, which may be wrong by 1e-11."""
    scaled = sums * MILLION
    micro = np.rint(scaled)
    for at in np.flatnonzero(np.abs(np.abs(scaled - micro) - 0.5) < _HALF).tolist():
        # The product of two float32 is exact in float64.
        exact = math.fsum((left[rows[at]].astype(np.float64) * right[others[at]]).tolist())
        micro[at] = round(round(exact, 6) * MILLION)
    return micro.astype(np.int64)
