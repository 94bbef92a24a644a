"""An index in memory, and its snapshot in files.

One that things were removed from and added to may answer with a wrong key
(https://github.com/unum-cloud/USearch/issues/445).
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
import usearch
from numpy.typing import NDArray
from usearch.index import BatchMatches, Index

from common.storage.file import fsync_directory
from control_plane.nexus.index import PRINT, Held, Named
from control_plane.nexus.records import Vector

ADDED_AT_ONCE = 64
"""Vectors: about 10 ms, for which a search waits."""
SEARCHED_AT_ONCE = 32
"""Vectors: about as long."""
_EXPANSION = 128
"""Candidates that the index looks through when it adds and when it searches; with fewer it finds less."""
_MEASURED_AGAIN = 1.02
_DIGEST = 32
"""Bytes of BLAKE2b."""


class _Manifest(msgspec.Struct, frozen=True):
    """What the file at a snapshot's path says; the index lies beside it."""

    made_by: str
    """Whose file the index is: another version of the library may read it as something else."""
    dimension: int
    index: str
    """Its file's name."""
    digest: bytes
    ids: bytes
    """int64, little-endian."""
    prints: bytes
    """``prints_of`` their vectors, in the same order."""


class _Turns:
    """A lock that is taken in the order of asking, so that a search waits for one addition and not for all of them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = self._served = 0

    def __enter__(self) -> None:
        with self._changed:
            mine = self._next
            self._next += 1
            self._changed.wait_for(lambda: self._served == mine)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._served += 1
            self._changed.notify_all()


class Nearest:
    """See ``VectorIndex``.

    At 100,000 clustered vectors of 256 dimensions it takes 850 bytes for each, and finds all of the 20 nearest among
    112 candidates; after each vector was replaced three times it still finds 99%.
    """

    def __init__(self, dimension: int) -> None:
        # bfloat16 is as good as float32 for candidates, in half the memory and half the time.
        self._index = Index(
            ndim=dimension, metric="ip", dtype="bf16", expansion_add=_EXPANSION, expansion_search=_EXPANSION
        )
        self.bytes = 0
        """What it takes of memory, or took when it had some hundredths less in it: asking takes the longer the more it
        has."""
        self._measured = 0
        self._turn = _Turns()
        self._changing = threading.Lock()
        self._held: list[Held] = []

    def __len__(self) -> int:
        return len(self._index)

    def add(self, ids: NDArray[np.int64], vectors: Vector) -> NDArray[np.bool_]:
        """Put vectors: it has all of them."""
        with self._changing:
            for start in range(0, len(ids), ADDED_AT_ONCE):
                part = slice(start, start + ADDED_AT_ONCE)
                with self._turn:
                    self._index.remove(ids[part])
                    self._index.add(ids[part], vectors[part])
                    if len(self._index) > self._measured * _MEASURED_AGAIN:
                        self._measure()
        return np.ones(len(ids), np.bool_)

    def _measure(self) -> None:
        self.bytes, self._measured = self._index.memory_usage, len(self._index)

    def remove(self, ids: NDArray[np.int64]) -> None:
        """Let go of those that are there."""
        with self._changing, self._turn:
            self._index.remove(ids)

    def search(self, vectors: Vector, count: int) -> Named:
        """At most ``count`` candidates for each vector."""
        rows, ids, distances = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for start in range(0, len(vectors), SEARCHED_AT_ONCE):
            part = vectors[start : start + SEARCHED_AT_ONCE]
            with self._turn:
                most = min(count, len(self._index))
                found = self._index.search(part, most) if most else None
            if isinstance(found, BatchMatches):
                there = np.arange(most) < np.asarray(found.counts)[:, None]
                rows.append(start + np.nonzero(there)[0])
                ids.append(np.asarray(found.keys)[there].astype(np.int64))
                distances.append(np.asarray(found.distances)[there])
            elif found is not None:  # of one vector
                rows.append(np.full(len(found), start))
                ids.append(np.asarray(found.keys).astype(np.int64))
                distances.append(np.asarray(found.distances))
        return Named(np.concatenate(rows), np.concatenate(ids), 1 - np.concatenate(distances))

    def held(self, ids: NDArray[np.int64]) -> Iterator[Held]:
        """What its snapshot had."""
        while self._held:
            yield self._held.pop()

    def save(self, path: Path, ids: NDArray[np.int64], prints: Sequence[bytes]) -> None:
        """Write a snapshot: the index to a name of its own, then the file at ``path``, which names it.

        Whoever finds the old file at ``path`` finds the old index until the new file is there whole. Nothing may be
        added or removed meanwhile; searches go on. Raises OSError.
        """
        index = path.with_name(f"{path.name}.{secrets.token_hex(8)}.index")
        temporary = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._changing:
                self._write(index)
            manifest = _Manifest(
                made_by=usearch.__version__,
                dimension=self._index.ndim,
                index=index.name,
                digest=_durable(index),
                ids=ids.astype("<i8").tobytes(),
                prints=b"".join(prints),
            )
            body = msgspec.msgpack.encode(manifest)
            temporary.write_bytes(_digest(body) + body)
            _durable(temporary)
            fsync_directory(path.parent)
            temporary.replace(path)
        except OSError:
            index.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)
        for old in path.parent.glob(f"{path.name}.*.index"):
            if old != index:
                old.unlink(missing_ok=True)

    def _write(self, index: Path) -> None:
        try:
            self._index.save(index)
        except RuntimeError as error:
            raise OSError(f"cannot write {index}: {error}") from error
        # The library does not look whether its last bytes got there.
        if index.stat().st_size != self._index.serialized_length:
            raise OSError(f"cannot write {index}: a part of it is missing")

    @staticmethod
    def open(path: Path, dimension: int) -> Nearest | None:
        """Read a snapshot. None where there is none, a damaged one, or one of another dimension or library."""
        with suppress(OSError, msgspec.DecodeError):
            data = path.read_bytes()
            if _digest(data[_DIGEST:]) != data[:_DIGEST]:
                return None
            manifest = msgspec.msgpack.decode(data[_DIGEST:], type=_Manifest)
            index = path.with_name(manifest.index)
            # The library does not survive every damaged file: only what is as it was written is shown to it.
            if (manifest.made_by, manifest.dimension) == (usearch.__version__, dimension) and (
                _digest_of(index) == manifest.digest
            ):
                nearest = Nearest(dimension)
                nearest._index.load(index)
                nearest._measure()
                ids = np.frombuffer(manifest.ids, dtype="<i8").astype(np.int64)
                prints = [manifest.prints[at : at + PRINT] for at in range(0, len(manifest.prints), PRINT)]
                nearest._held.append(Held(ids, prints))
                return nearest
        return None


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _digest_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST)).digest()


def _durable(path: Path) -> bytes:
    """Fsync a file; its digest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _digest_of(path)
