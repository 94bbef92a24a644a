"""The vector store port: indexes that name, without looking at all of them, vectors that may be the nearest ones.

What an index names are candidates, no more: it may name one that is gone, and it does not find everything. Who asks
compares the vectors, which are those of the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import ExportError, Retry
from control_plane.nexus.records import Vector

PRINT = 8
"""Bytes by which a vector is known again."""


class IndexUnavailable(ExportError):
    """The vector store cannot be reached, is overloaded, or answered what nobody understands; the same may work later,
    and nothing says how much of a change it holds."""

    code = "INDEX_UNAVAILABLE"
    retry = Retry.later


class IndexLost(IndexUnavailable):
    """An index may not have any more what it had: ``held`` says."""

    code = "INDEX_LOST"
    retry = Retry.later


class Held(NamedTuple):
    """Some of what an index has."""

    ids: NDArray[np.int64]
    prints: Sequence[bytes]
    """``prints_of`` their vectors, in the same order."""


class Named(NamedTuple):
    """Candidates."""

    rows: NDArray[np.int64]
    """Of the vectors that were asked for."""
    ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    """Roughly, as the index has them."""

    @staticmethod
    def of(several: Sequence[tuple[int, int, float]]) -> Named:
        """One after the other."""
        rows, ids, scores = zip(*several, strict=True) if several else ((), (), ())
        return Named(np.array(rows, np.int64), np.array(ids, np.int64), np.array(scores, np.float32))


class VectorIndex(Protocol):
    """Vectors of unit length of one space by their ids. Any threads may search, while one changes it.

    An index of a server raises IndexUnavailable.
    """

    @property
    def bytes(self) -> int:
        """What it takes of this process's memory."""
        ...

    def add(self, ids: NDArray[np.int64], vectors: Vector) -> NDArray[np.bool_]:
        """Put vectors, in the place of those that have these ids; which of them it has now. Of the others it may have
        the old ones, the new ones or none."""
        ...

    def remove(self, ids: NDArray[np.int64]) -> None:
        """Let go of those that are there."""
        ...

    def search(self, vectors: Vector, count: int) -> Named:
        """At most ``count`` candidates for each vector."""
        ...

    def held(self, ids: NDArray[np.int64]) -> Iterator[Held]:
        """What it has from before, of these ids at least. It is asked once, before anything else."""
        ...


def prints_of(vectors: Vector) -> list[bytes]:
    """``PRINT`` bytes for each vector, by which it is known again."""
    return [hashlib.blake2b(row.tobytes(), digest_size=PRINT).digest() for row in vectors]


def name_of(space: str) -> str:
    """Letters and digits by which a space is known outside of the database, whatever its name has."""
    return hashlib.sha256(space.encode()).hexdigest()[:40]
