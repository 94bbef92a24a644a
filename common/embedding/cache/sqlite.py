"""The vector cache of one machine: a file of SQLite that several processes share."""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from common.embedding.cache.port import KEY_BYTES, Space
from common.errors import StorageFailed

APPLICATION_ID = 0x6D76_7663
USER_VERSION = 1
_PAGE = 16_384
"""Holds 10 vectors of 384 values; smaller pages leave more of each empty."""
_SHARE = 0.95
"""Of the bound is for pages in use; SQLite's own bookkeeping takes some of the rest."""
_EPOCHS = 16
"""A vector's last use is known to a 16th of what the cache holds: most reads write nothing."""
_EVICTION = 64
"""A 64th of the cache goes at once, so that looking for the oldest is rare."""
_ROWS = 1_000
"""Values of one query."""
_PUT_ROWS = 4_096
"""Records of one transaction."""
_BUSY_SECONDS = 10.0
_LOG_BYTES = 32 << 20
_MAX_USED = 100_000
_VACUUM_PAGES = 1_024
_SCHEMA = (
    "CREATE TABLE vectors (prefix INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, place INTEGER NOT NULL)",
    "CREATE TABLE records (place INTEGER PRIMARY KEY, record BLOB NOT NULL)",
    "CREATE TABLE clock (written INTEGER NOT NULL)",
    "INSERT INTO clock VALUES (0)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {USER_VERSION}",
)
"""The index is apart from the vectors, which are appended: what random keys make dirty is small."""
_T = TypeVar("_T")


class SqliteCache:
    """Vectors in a file of at most ``max_bytes``, least recently used ones first out; beside it lies SQLite's log,
    some 32 MiB between exports.

    What was put is there after a crash of the process, or none of it. A damaged file is renamed to ``….damaged`` (one
    is kept) and a new one begun. Time is what was written: no clock is read. Not for a network file system.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Touches nothing before it is used."""
        self._path, self._max_bytes = path, max_bytes
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._used: set[int] = set()

    def has(self, space: Space, keys: Sequence[bytes]) -> set[bytes]:
        """See the port."""
        by_prefix = {_prefix(key): key for key in keys}

        def work(database: sqlite3.Connection) -> set[bytes]:
            query = "SELECT prefix FROM vectors WHERE prefix IN ({})"
            return {by_prefix[prefix] for (prefix,) in _asked(database, query, list(by_prefix))}

        return self._do(work)

    def get(self, space: Space, keys: Sequence[bytes]) -> list[bytes]:
        """See the port; some 300,000 records a second."""

        def work(database: sqlite3.Connection) -> list[bytes]:
            query = "SELECT prefix, epoch, record FROM vectors JOIN records USING (place) WHERE prefix IN ({})"
            now = self._epoch(database)
            records = []
            for prefix, epoch, record in _asked(database, query, [_prefix(key) for key in keys]):
                records.append(record)
                if epoch < now and len(self._used) < _MAX_USED:
                    self._used.add(prefix)
            return records

        wanted = set(keys)
        return [record for record in self._do(work) if record[:KEY_BYTES] in wanted]

    def put(self, space: Space, records: Sequence[bytes]) -> None:
        """See the port; some 80,000 records a second, at most 4,096 to a transaction."""

        def work(database: sqlite3.Connection) -> None:
            some = max(1, min(_PUT_ROWS, self._max_bytes // _EVICTION // space.record_bytes))
            for start in range(0, len(records), some):
                batch = records[start : start + some]
                with _transaction(database):
                    self._touch(database)
                    self._make_room(database, space, len(batch))
                    self._insert(database, batch)
            if _pages(database, "page_count") * _PAGE > self._max_bytes:  # the bound was higher before
                # A row without columns comes for each page: execute() would stop at the first.
                database.executescript(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})")

        self._do(work)

    def flush(self) -> None:
        """See the port. The file is opened anew for the next export: it may be another one then."""

        def work(database: sqlite3.Connection) -> None:
            with _transaction(database):
                self._touch(database)

        try:
            if self._used:
                self._do(work)
        finally:
            self.close()

    def close(self) -> None:
        """See the port."""
        with self._lock:
            self._used.clear()
            self._disconnect()

    # --- inside a transaction -------------------------------------------------------------------------

    def _epoch(self, database: sqlite3.Connection) -> int:
        (written,) = database.execute("SELECT coalesce(max(written), 0) FROM clock").fetchone()
        return int(written) * _EPOCHS // self._max_bytes

    def _touch(self, database: sqlite3.Connection) -> None:
        now = self._epoch(database)
        database.executemany("UPDATE vectors SET epoch = ? WHERE prefix = ?", [(now, used) for used in self._used])
        self._used.clear()

    def _make_room(self, database: sqlite3.Connection, space: Space, count: int) -> None:
        """Evict where ``count`` more records would pass the bound; twice as many, or a 64th of the cache."""
        in_use = (_pages(database, "page_count") - _pages(database, "freelist_count")) * _PAGE
        if in_use + count * space.record_bytes <= self._max_bytes * _SHARE:
            return
        evicted = max(2 * count, self._max_bytes // _EVICTION // space.record_bytes)
        oldest = database.execute("SELECT prefix, place FROM vectors ORDER BY epoch, place LIMIT ?", (evicted,))
        rows = oldest.fetchall()
        database.executemany("DELETE FROM vectors WHERE prefix = ?", [(prefix,) for prefix, _ in rows])
        database.executemany("DELETE FROM records WHERE place = ?", [(place,) for _, place in rows])

    def _insert(self, database: sqlite3.Connection, records: Sequence[bytes]) -> None:
        prefixes = [_prefix(record) for record in records]
        replaced = list(_asked(database, "SELECT place FROM vectors WHERE prefix IN ({})", prefixes))
        database.executemany("DELETE FROM records WHERE place = ?", replaced)
        (last,) = database.execute("SELECT coalesce(max(place), 0) FROM records").fetchone()
        places = range(last + 1, last + 1 + len(records))
        now = self._epoch(database)
        rows = [(prefix, now, place) for prefix, place in zip(prefixes, places, strict=True)]
        database.executemany("INSERT INTO records VALUES (?, ?)", zip(places, records, strict=True))
        database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)
        database.execute("UPDATE clock SET written = written + ?", (sum(map(len, records)),))

    # --- the file ---------------------------------------------------------------------------------------

    def _do(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Work on the database, one thread at a time. Raises StorageFailed."""
        with self._lock:
            try:
                try:
                    if self._database is None:
                        self._database = self._connected()
                    return work(self._database)
                except sqlite3.DatabaseError as error:
                    raise StorageFailed(self._explained(error)) from error
            except OSError as error:
                raise StorageFailed(f"{self._path.name}: {error.strerror or error}", errno=error.errno) from error

    def _connected(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            database = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                self._file = _identity(self._path)
                self._prepare(database)
            except BaseException:
                database.close()
                raise
        return database

    def _prepare(self, database: sqlite3.Connection) -> None:
        (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        for pragma in (
            f"page_size = {_PAGE}",
            f"max_page_count = {self._max_bytes // _PAGE}",
            "auto_vacuum = INCREMENTAL",
            "synchronous = NORMAL",  # a machine that fails loses what came last, and nothing else
            f"journal_size_limit = {_LOG_BYTES}",
        ):
            database.execute(f"PRAGMA {pragma}").fetchall()
        if tables == 0:
            database.execute("PRAGMA journal_mode = WAL").fetchall()
            with _transaction(database):
                for statement in _SCHEMA:
                    database.execute(statement)
        (application,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if (application, version) != (APPLICATION_ID, USER_VERSION):
            raise StorageFailed(f"{self._path.name} is a database of something else; it is left as it is")

    def _explained(self, error: sqlite3.DatabaseError) -> str:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return f"{self._path.name}: {error}"
        self._disconnect()
        with self._alone():
            if _identity(self._path) == self._file:  # else another process was faster
                for suffix in ("-wal", "-shm", ""):  # the log first: no new database may find it
                    with contextlib.suppress(FileNotFoundError):
                        Path(f"{self._path}{suffix}").replace(f"{self._path}.damaged{suffix}")
        return f"{self._path.name} was damaged ({error}): it is {self._path.name}.damaged now, and a new one is begun"

    def _disconnect(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process opens the file, or sets it aside, meanwhile."""
        with Path(f"{self._path}.lock").open("wb") as file:
            until = time.monotonic() + _BUSY_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.01)
            yield


def _prefix(key: bytes) -> int:
    return int.from_bytes(key[:8], "big", signed=True)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _pages(database: sqlite3.Connection, what: str) -> int:
    (count,) = database.execute(f"PRAGMA {what}").fetchone()
    return int(count)


def _asked(database: sqlite3.Connection, query: str, values: Sequence[int]) -> Iterator[Any]:
    """The rows of a query for many values, a thousand at a time."""
    for start in range(0, len(values), _ROWS):
        some = values[start : start + _ROWS]
        yield from database.execute(query.format(",".join("?" * len(some))), some)


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
