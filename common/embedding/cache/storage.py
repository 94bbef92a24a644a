"""The vector cache that workers share: segments in object storage."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.embedding.cache.port import KEY_BYTES, Space, is_whole
from common.errors import ObjectMissing, StorageFailed
from common.storage import Storage

MAX_KEYS = 4_000_000
"""That are looked up, those of the newest segments: 48 MB of memory."""
SEGMENT_BYTES = 64 << 20
"""Of one segment, and of what is put but not yet written; an upload under way holds as much again."""
LOCAL_BYTES = 1 << 30
"""Of what was read and is kept in temporary files."""
MERGE_FROM = 8
"""So many segments below a quarter of the full size become one."""
TOUCH_SECONDS = 86_400.0
"""A segment's last use is written down at most once a day; an upload without an end for so long is removed."""
_BLOCK = 1 << 20
_MOST_AHEAD = 16
_THREADS = 8
_DATA = "vectors.1"
_USED = "used"
_MAGIC = b"mvvectors1\0\0"
_HEAD = len(_MAGIC) + 4
_PREFIX = np.dtype("<u8")


class StorageCache:
    """Vectors under a prefix, in immutable segments of up to 64 MiB, least recently used ones first out.

    A segment has the keys' first 8 bytes, with a checksum, and the records in the order in which they were put: an
    export that asks again in the same order reads them in long runs. The first ``get`` of an export lists the prefix
    and reads the key tables of segments that it does not know yet, with one request each; rows come by ranges of 1 to
    16 MiB, which are kept in temporary files. What was put is written when it fills a segment, and by ``flush``, which
    also evicts, merges small segments and notes which ones were used. Names are unique and nothing is written twice:
    writers cannot spoil each other's work, and what another one has removed is not found. Several at once may pass
    ``max_bytes`` by what they add, until the next flush.
    """

    def __init__(self, storage: Storage, prefix: str, max_bytes: int, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Asks for nothing before it is used."""
        self._storage, self._prefix, self._max_bytes = storage, prefix, max_bytes
        self._segment_bytes = min(segment_bytes, max_bytes // 16)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="segments")
        self._listed: list[_Stored] | None = None
        self._tables: dict[str, list[_Segment]] = {}
        self._segments: dict[str, _Segment] = {}
        self._pending: dict[Space, dict[bytes, bytes]] = {}
        self._upload: Future[None] | None = None
        self._added = False
        self._damaged = 0

    def has(self, space: Space, keys: Sequence[bytes]) -> set[bytes]:
        """See the port."""
        with self._lock:
            pending = self._pending.get(space, {})
            found = {key for key in keys if key in pending}
            prefixes = _prefixes(keys)
            for segment in self._known(space):
                found.update(keys[at] for at in np.flatnonzero(segment.rows(prefixes) >= 0).tolist())
            return found

    def get(self, space: Space, keys: Sequence[bytes]) -> list[bytes]:
        """See the port."""
        with self._lock, _failing():
            pending = self._pending.get(space, {})
            records = [pending[key] for key in keys if key in pending]
            wanted = [key for key in keys if key not in pending]
            for _ in range(2):
                found, vanished = self._read(space, wanted)
                records += found
                if not vanished:
                    break
                # Another one merged or evicted it: what it merged is in a new segment.
                self._listed = None
                known = {record[:KEY_BYTES] for record in found}
                wanted = [key for key in wanted if key not in known]
            self._drop_copies()
            return records

    def put(self, space: Space, records: Sequence[bytes]) -> None:
        """See the port; waits while a full segment goes up and another one is full."""
        with self._lock:
            pending = self._pending.setdefault(space, {})
            for record in records:
                pending[record[:KEY_BYTES]] = record
                if len(pending) * space.record_bytes >= self._segment_bytes:
                    full, self._pending[space] = pending, {}
                    pending = self._pending[space]
                    self._uploaded()
                    self._upload = self._pool.submit(self._write, space, full)
                    self._added = True

    def flush(self) -> None:
        """See the port."""
        with self._lock:
            pending = {space: records for space, records in self._pending.items() if records}
            added, self._added, self._pending = self._added or bool(pending), False, {}
            damaged, self._damaged = self._damaged, 0
            try:
                self._uploaded()
                self._touch()
                if added:
                    incoming = sum(len(records) * space.record_bytes for space, records in pending.items())
                    left = self._evict(self._list(uploads=True), incoming)
                    for space, records in pending.items():
                        self._write_merged(space, records, [stored for stored in left if stored.space == space.name])
            finally:
                self._listed = None
            if damaged:
                raise StorageFailed(f"{damaged} segments under {self._prefix} were damaged and are removed")

    def close(self) -> None:
        """See the port; waits for an upload under way."""
        self._pool.shutdown()
        for segment in self._segments.values():
            segment.drop()

    # --- reading ----------------------------------------------------------------------------------------

    def _list(self, *, uploads: bool = False) -> list[_Stored]:
        """All segments, newest first."""
        data: dict[str, tuple[int, float]] = {}
        used: dict[str, float] = {}
        for found in self._storage.found(self._prefix, uploads=uploads):
            folder, _, name = found.ref.rpartition("/")
            if name == _DATA:
                data[f"{folder}/"] = found.size, found.age
            elif name == _USED:
                used[f"{folder}/"] = found.age
        listed = []
        for folder, (size, age) in data.items():
            space = folder.removeprefix(self._prefix).partition("/")[0]
            listed.append(_Stored(folder, space, size, age, min(age, used.get(folder, age))))
        return sorted(listed, key=lambda stored: stored.age)

    def _known(self, space: Space) -> list[_Segment]:
        """The segments of a space, newest first, up to ``MAX_KEYS``."""
        if self._listed is None:
            self._listed = self._list()
            self._tables = {}
            for gone in self._segments.keys() - {stored.folder for stored in self._listed}:
                self._segments.pop(gone).drop()
        if space.name not in self._tables:
            wanted = [stored for stored in self._listed if stored.space == space.name]
            keys = accumulate(stored.size // space.record_bytes for stored in wanted)
            wanted = [stored for stored, so_far in zip(wanted, keys, strict=True) if so_far <= MAX_KEYS]
            new = [stored for stored in wanted if stored.folder not in self._segments]
            for segment in self._pool.map(lambda stored: self._loaded(stored, space), new):
                if segment is not None:
                    self._segments[segment.folder] = segment
            known = [(stored, self._segments.get(stored.folder)) for stored in wanted]
            for stored, segment in known:
                if segment is not None:
                    segment.idle = stored.idle
            self._tables[space.name] = [segment for _, segment in known if segment is not None]
        return self._tables[space.name]

    def _loaded(self, stored: _Stored, space: Space) -> _Segment | None:
        """A segment with its key table; None for one that is gone or useless, which is removed."""
        rows, rest = divmod(stored.size - _HEAD, space.record_bytes + _PREFIX.itemsize)
        if rows > 0 and rest == 0:
            try:
                start = b"".join(self._storage.read(stored.folder + _DATA, 0, _HEAD + rows * _PREFIX.itemsize))
            except ObjectMissing:
                return None
            table = start[_HEAD:]
            if start[:_HEAD] == _head(table):
                return _Segment(self._storage, stored, space.record_bytes, np.frombuffer(table, dtype=_PREFIX))
        self._damaged += 1
        self._storage.delete(stored.folder)
        return None

    def _read(self, space: Space, keys: Sequence[bytes]) -> tuple[list[bytes], bool]:
        """The records of keys, and whether a segment that has some of them vanished."""
        records: list[bytes] = []
        left, vanished = _prefixes(keys), False
        for segment in self._known(space):
            rows = segment.rows(left)
            there = rows >= 0
            if there.any():
                try:
                    records += segment.read(rows[there], self._pool)
                except ObjectMissing:
                    vanished = True
                    continue
                segment.used = True
                self._segments[segment.folder] = self._segments.pop(segment.folder)  # the last one used comes last
                left = left[~there]
        return records, vanished

    def _drop_copies(self) -> None:
        kept = sum(segment.copied for segment in self._segments.values())
        for segment in self._segments.values():
            if kept <= LOCAL_BYTES:
                break
            kept -= segment.copied
            segment.drop()

    # --- writing ----------------------------------------------------------------------------------------

    def _uploaded(self) -> None:
        """Wait for the upload under way; raises what it did."""
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def _write(self, space: Space, records: Mapping[bytes, bytes]) -> None:
        table = _prefixes(list(records)).tobytes()
        with _failing(), tempfile.TemporaryDirectory(prefix="memvid-export-vectors-") as folder:
            path = Path(folder) / _DATA
            with path.open("wb") as file:
                file.write(_head(table))
                file.write(table)
                file.writelines(records.values())
            self._storage.put(path, f"{self._prefix}{space.name}/{secrets.token_hex(16)}/{_DATA}")

    def _write_merged(self, space: Space, records: dict[bytes, bytes], stored: list[_Stored]) -> None:
        """Write one segment, with the small ones in it where there are many."""
        small = sorted((one for one in stored if one.size < self._segment_bytes // 4), key=lambda one: one.size)
        sizes = accumulate((one.size for one in small), initial=len(records) * space.record_bytes)
        fitting = sum(size <= self._segment_bytes for size in sizes) - 1
        if fitting < MERGE_FROM:
            self._write(space, records)
            return
        merged = sorted(small[:fitting], key=lambda one: -one.age)  # the newest of several records counts
        everything: dict[bytes, bytes] = {}
        for found in self._pool.map(lambda one: self._records(one, space), merged):
            everything.update(found)
        self._write(space, everything | records)
        for one in merged:
            self._storage.delete(one.folder)

    def _records(self, stored: _Stored, space: Space) -> dict[bytes, bytes]:
        """What is whole of a segment; nothing of one that is gone."""
        try:
            data = b"".join(self._storage.read(stored.folder + _DATA, 0, stored.size))
        except ObjectMissing:
            return {}
        rows = (stored.size - _HEAD) // (space.record_bytes + _PREFIX.itemsize)
        first = _HEAD + rows * _PREFIX.itemsize
        records = [data[at : at + space.record_bytes] for at in range(first, stored.size, space.record_bytes)]
        return {record[:KEY_BYTES]: record for record in records if is_whole(record)}

    def _touch(self) -> None:
        """Note the last use of what this export used, where what is noted is a day old."""
        for segment in self._segments.values():
            if segment.used and segment.idle > TOUCH_SECONDS:
                self._storage.write(segment.folder + _USED, b"")
                segment.idle = 0.0
            segment.used = False

    def _evict(self, listed: list[_Stored], incoming: int) -> list[_Stored]:
        """Remove what was not used for longest until ``incoming`` bytes fit; answers what stays."""
        listed = sorted(listed, key=lambda stored: stored.idle)
        total = incoming + sum(stored.size for stored in listed)
        stay = []
        for at in range(len(listed) - 1, -1, -1):
            stored = listed[at]
            unfinished = stored.size == 0
            if total > self._max_bytes if not unfinished else stored.age > TOUCH_SECONDS:
                self._storage.delete(stored.folder)
                total -= stored.size
            elif not unfinished:
                stay.append(stored)
        return stay


class _Stored(NamedTuple):
    """A segment as it is listed."""

    folder: str
    """A prefix of its own."""
    space: str
    size: int
    """0 for an upload without an end."""
    age: float
    idle: float
    """Seconds since its last use, as far as it is written down."""


class _Segment:
    """A segment whose key table is known, and a local copy of what was read of it."""

    def __init__(self, storage: Storage, stored: _Stored, record_bytes: int, prefixes: NDArray[np.uint64]) -> None:
        self.folder, self.idle, self.used, self.copied = stored.folder, stored.idle, False, 0
        self._storage, self._size, self._record_bytes = storage, stored.size, record_bytes
        self._order = np.argsort(prefixes).astype(np.int32)
        self._sorted = prefixes[self._order]
        self._first = _HEAD + len(prefixes) * _PREFIX.itemsize
        self._there = np.zeros(-(-stored.size // _BLOCK), dtype=bool)
        self._copy: IO[bytes] | None = None

    def rows(self, prefixes: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Where the records of keys are; -1 for those that it has not."""
        at = np.searchsorted(self._sorted, prefixes)
        at[at == len(self._sorted)] = 0
        return np.where(self._sorted[at] == prefixes, self._order[at], np.int32(-1))

    def read(self, rows: NDArray[np.int32], pool: Executor) -> list[bytes]:
        """The records of rows. Raises ObjectMissing where the segment is gone, and what the storage raises."""
        starts = self._first + rows.astype(np.int64) * self._record_bytes
        blocks = np.unique(np.concatenate((starts // _BLOCK, (starts + self._record_bytes - 1) // _BLOCK)))
        if self._copy is None:
            self._copy = tempfile.TemporaryFile(prefix="memvid-export-vectors-")  # noqa: SIM115  closed by drop()
        copy = self._copy.fileno()
        for first, after in pool.map(lambda run: self._fetch(copy, *run), self._runs(blocks[~self._there[blocks]])):
            self._there[first:after] = True
            self.copied += (after - first) * _BLOCK
        return [os.pread(copy, self._record_bytes, start) for start in starts.tolist()]

    def drop(self) -> None:
        """Forget the local copy."""
        if self._copy is not None:
            self._copy.close()
        self._copy, self.copied = None, 0
        self._there[:] = False

    def _runs(self, absent: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Blocks to fetch, of at most 16 in a row: as many ahead as there are just before."""
        runs: list[tuple[int, int]] = []
        for block in absent.tolist():
            if runs and block < runs[-1][1]:
                continue
            before = self._there[max(0, block - _MOST_AHEAD) : block][::-1]
            ahead = self._there[block : block + max(1, int(np.cumprod(before).sum()))]
            length = int(np.cumprod(~ahead).sum())
            if runs and block == runs[-1][1] and block + length - runs[-1][0] <= _MOST_AHEAD:
                runs[-1] = runs[-1][0], block + length
            else:
                runs.append((block, block + length))
        return runs

    def _fetch(self, copy: int, first: int, after: int) -> tuple[int, int]:
        at, end = first * _BLOCK, min(after * _BLOCK, self._size)
        for piece in self._storage.read(self.folder + _DATA, at, end - at):
            at += os.pwrite(copy, piece, at)
        return first, after


def _head(table: bytes) -> bytes:
    return _MAGIC + zlib.crc32(table).to_bytes(4, "little")


def _prefixes(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(key[: _PREFIX.itemsize] for key in keys), dtype=_PREFIX)


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageFailed(f"temporary files: {error.strerror or error}", errno=error.errno) from error
