"""Reading an object over a network: range by range, in a bounded window, across broken connections."""

from __future__ import annotations

import hashlib
import os
import random
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from common.errors import STORE, StorageFailed
from common.storage.file import PIECE, check_sha256, check_size

PART = 8 << 20
WINDOW = 10
"""Parts under way at once, each with a piece of at most 1 MiB in memory."""
_Answer = TypeVar("_Answer")


class Broken(StorageFailed):
    """A connection that failed, or a server that had no time: worth another try at once."""


class Opened(NamedTuple):
    """An answer whose body has not been read."""

    size: int | None
    """Of the whole object; None where the server does not say."""
    tag: str | None
    """What changes when the object does; None where nothing tells."""
    start: int
    """Where the body begins."""
    ranged: bool
    """False where the server knows no ranges: the body is the whole object then."""
    age: float
    """Seconds since it was written, by the server's clock."""
    body: Iterator[bytes]
    """Raises Broken where it ends early."""
    close: Callable[[], None]


def age_of(written: str | datetime | None, now: str | None) -> float:
    """Seconds from when an object was written to the ``Date`` of the answer that says so; 0 where one is missing or is
    no time."""
    if not written or not now:
        return 0.0
    try:
        since = parsedate_to_datetime(written) if isinstance(written, str) else written
        # A date "-0000" has no time zone, and is one of UTC.
        return max(0.0, parsedate_to_datetime(now).timestamp() - since.timestamp())
    except (ValueError, OverflowError):
        return 0.0


class Source(Protocol):
    """An object that can be read from any byte on."""

    @property
    def name(self) -> str:
        """What messages call it; holds no secrets."""
        ...

    def open(self, start: int, stop: int | None, tag: str | None) -> Opened:
        """Ask for bytes ``start`` to ``stop`` of the object that has this tag. Raises Broken where another try may
        help, other ExportErrors where not."""
        ...


def patiently(do: Callable[[], _Answer]) -> _Answer:
    """What ``do`` answers, asked again while it raises Broken, with growing pauses."""
    for tries in range(1, STORE.most):
        try:
            return do()
        except Broken:
            _pause(tries)
    return do()


def read_range(source: Source, start: int, length: int) -> Iterator[bytes]:
    """``length`` bytes from ``start`` on, in pieces of at most 1 MiB. Raises StorageFailed where fewer are there."""
    if length <= 0:
        return
    with closing(Stream(source, start, start + length)) as stream:
        if stream.size is not None and stream.size < start + length:
            raise StorageFailed(f"{source.name} is shorter than it should be")
        for piece in stream:
            for at in range(0, len(piece), PIECE):
                yield piece[at : at + PIECE]
        if stream.at < start + length:
            raise StorageFailed(f"{source.name} is shorter than it should be")


def download(
    source: Source, ref: str, folder: Path, *, size: int | None, sha256: str | None, limit: int | None
) -> Path:
    """The object as a file in ``folder``, whole and checked or not there; see ``Storage.local`` for what is checked."""
    name = re.sub(r"[^A-Za-z0-9.%_-]", "_", source.name.rpartition("/")[2])[-80:]
    target = folder / f"{hashlib.sha256(ref.encode()).hexdigest()[:16]}-{name}"
    temporary = folder / f".tmp-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = patiently(lambda: _to_file(source, temporary, size=size, limit=limit))
        if sha256 is not None:
            check_sha256(source.name, found, sha256)
        return temporary.replace(target)
    except OSError as error:
        raise StorageFailed(f"cannot keep {source.name}: {error.strerror or error}", errno=error.errno) from error
    finally:
        with suppress(OSError):  # there may be no such folder
            temporary.unlink(missing_ok=True)


class Stream:
    """Bytes ``start`` to ``stop`` of an object; goes on where it was when a connection breaks."""

    def __init__(self, source: Source, start: int, stop: int | None, tag: str | None = None) -> None:
        self._source, self.stop, self.at = source, stop, start
        self._tries, self._mark = 1, start
        self._opened = opened = self._open(tag)
        self.size, self.tag, self.ranged, self.age = opened.size, opened.tag, opened.ranged, opened.age

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                for piece in self._opened.body:
                    wanted = piece if self.stop is None else piece[: self.stop - self.at]
                    self.at += len(wanted)
                    yield wanted
                    if len(wanted) < len(piece) or (self.at == self.stop and not self.ranged):
                        return
                if self.size is None or self.at in (self.stop, self.size):
                    return
                raise Broken(f"{self._source.name} ended early")
            except Broken as error:
                self.close()
                if self.tag is None:  # nothing tells whether what comes next is of the same object
                    raise
                self._again(error)
                self._opened = self._open(self.tag)

    def close(self) -> None:
        """End the connection, or give it back where all was read."""
        self._opened.close()

    def _open(self, tag: str | None) -> Opened:
        while True:
            try:
                opened = self._source.open(self.at, self.stop, tag)
            except Broken as error:
                self._again(error)
                continue
            if opened.start != self.at:
                opened.close()
                raise StorageFailed(f"{self._source.name}: its server cannot answer from byte {self.at:,} on")
            return opened

    def _again(self, error: Broken) -> None:
        if self.at - self._mark >= PIECE:
            self._tries, self._mark = 1, self.at
        if self._tries >= STORE.most:
            raise StorageFailed(f"{error.message}; tried {STORE.most} times", **error.details) from error
        _pause(self._tries)
        self._tries += 1


def _to_file(source: Source, path: Path, *, size: int | None, limit: int | None) -> str:
    """Write the object to a file; its SHA-256 (hex)."""
    digest, at = hashlib.sha256(), 0
    with path.open("w+b", buffering=0) as file, closing(Stream(source, 0, PART)) as first:
        if first.size is not None:
            check_size(source.name, first.size, size, limit)
        for piece in _rest(source, first, file.fileno(), digest):
            _write(file.fileno(), piece, at)
            digest.update(piece)
            at += len(piece)
            if limit is not None:
                check_size(source.name, at, None, limit)
        found = os.fstat(file.fileno()).st_size
    check_size(source.name, found, size, limit)
    return digest.hexdigest()


def _rest(source: Source, first: Stream, handle: int, digest: hashlib._Hash) -> Iterator[bytes]:
    """What comes in order, to be written and hashed; what lies beyond the first part comes in parallel parts, which are
    written and hashed here."""
    if not first.ranged or first.size is None:
        first.stop = None
        yield from first
        return
    if first.tag is None:  # parts could be of different objects
        first.close()
        with closing(Stream(source, 0, None)) as whole:
            yield from whole
        return
    tag, total, abandoned = first.tag, first.size, threading.Event()
    starts = iter(range(PART, total, PART))
    under_way: deque[Future[tuple[int, int]]] = deque()

    def write_part(start: int, stop: int) -> tuple[int, int]:
        with closing(Stream(source, start, stop, tag)) as stream:
            for piece in stream:
                if abandoned.is_set():
                    break
                _write(handle, piece, stream.at - len(piece))
        return start, stop

    def ahead() -> None:
        while len(under_way) < WINDOW and (start := next(starts, None)) is not None:
            under_way.append(pool.submit(write_part, start, min(start + PART, total)))

    with ThreadPoolExecutor(WINDOW, thread_name_prefix="download") as pool:
        try:
            ahead()
            yield from first
            buffer = memoryview(bytearray(PIECE))
            while under_way:
                start, stop = under_way.popleft().result()
                ahead()
                while start < stop:  # from the page cache: cheaper than to keep parts in memory
                    count = os.preadv(handle, [buffer[: stop - start]], start)
                    if not count:
                        raise StorageFailed(f"the file of {source.name} was cut off by another")
                    digest.update(buffer[:count])
                    start += count
        finally:
            abandoned.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _write(handle: int, data: bytes, at: int) -> None:
    rest = memoryview(data)
    while rest:
        count = os.pwrite(handle, rest, at)
        rest, at = rest[count:], at + count


def _pause(tries: int) -> None:
    time.sleep(random.uniform(0.5, 1.0) * STORE.wait(tries))  # noqa: S311  spreads clients, hides nothing
