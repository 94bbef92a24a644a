"""A file of documents on its way to a collection of a server: broken off at any moment, it goes on where the server had
said that it has what came before.

A line is a document as ``POST /v1/collections/{collection}/documents`` takes it. Lines go in batches, each of which the
server writes as a whole or not at all, and one after the other, so that of two lines with the same id the later one
holds. Beside the file lies the state: how many of its bytes are acknowledged, and their hash.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Raw

from common.contract import MALFORMED, Wire
from common.errors import ExportError, InvalidRequest, Retry, StorageFailed
from common.graph.model import GraphLimits
from common.graph.payload import Payload
from common.storage.file import fsync_directory
from control_plane.client import ExportClient
from control_plane.nexus.incoming import batch_of
from control_plane.nexus.messages import CollectionView, SyncCounts

MAX_LINE_BYTES = 15 << 20
"""A server takes 16 MiB in a request."""
BATCH_BYTES = 8 << 20
"""Of a request; a line that is longer goes alone."""
MAX_WRONG = 10_000
"""Lines that may be wrong, whatever was asked for: all of them are in the state and in the report."""
STATE_SUFFIX = ".nexus-batch.json"
_ENDLESS = 1 << 60
_FILE = GraphLimits(max_payload_bytes=_ENDLESS, max_text_bytes=_ENDLESS, max_ratio=_ENDLESS, max_members=_ENDLESS)
"""A line is all that is held of a file."""
_PLACE = re.compile(r"documents\[([0-9]+)\]\.?(.*)", re.DOTALL)


class NexusFailed(ExportError):
    """The graph is not what the rows say, or of a file some lines were not taken."""

    code = "NEXUS_FAILED"
    retry = Retry.never


class WrongLine(Wire):
    """A line that is no document."""

    line: int
    """The first one is 1."""
    field: str
    """Where it is wrong; ``$``: as a whole."""
    message: str

    def __str__(self) -> str:
        """For people."""
        return (
            f"line {self.line:,}, {self.message}"
            if self.field == "$"
            else (f"line {self.line:,}, {self.field}: {self.message}")
        )


class State(Wire):
    """How far a file is."""

    url: str
    collection: str
    bytes: int = 0
    """Of the file, after decompression, that are done with."""
    sha256: str = hashlib.sha256().hexdigest()
    """Of these bytes, hex."""
    lines: int = 0
    sent: int = 0
    """Documents that the server has written; the same one twice counts twice."""
    created: int = 0
    """Of these, so many were not there before."""
    wrong: list[WrongLine] = msgspec.field(default_factory=list)
    seconds: float = 0.0


class BatchReport(Wire):
    """What became of a file; all figures are of all runs that it took, the pauses between them left out."""

    file: str
    collection: str
    lines: int
    resumed_after: int
    """Lines that earlier runs were done with."""
    sent: int
    created: int
    updated: int
    failed: list[WrongLine]
    seconds: float
    documents_per_second: float
    sync: SyncCounts | None = None
    """Of the collection, once that was waited for."""
    error: str | None = None
    """Why it ended before its end."""


class StateFile:
    """The state beside a file; each write is whole and durable."""

    def __init__(self, file: Path) -> None:
        self._path = file.with_name(file.name + STATE_SUFFIX)

    def read(self, begun: State) -> State:
        """What was kept; ``begun`` where nothing was. Raises InvalidRequest where it is of something else."""
        try:
            state = msgspec.json.decode(self._path.read_bytes(), type=State)
        except FileNotFoundError:
            return begun
        except OSError as error:
            raise InvalidRequest(f"{self._path} cannot be read: {error.strerror}", field="FILE") from error
        except MALFORMED as error:
            raise self._other(f"it is no state of a batch ({error})") from error
        if not state.lines:
            return begun
        if (state.url, state.collection) != (begun.url, begun.collection):
            raise self._other(f"it is of collection {state.collection} at {state.url}")
        return state

    def check(self, lines: Lines, state: State) -> None:
        """Go on behind what was acknowledged. Raises InvalidRequest where that is not what the file begins with."""
        if not lines.skip(state.bytes) or lines.sha256 != state.sha256:
            raise self._other(f"the {state.lines:,} lines that were sent are not those that the file begins with")
        lines.number = state.lines

    def write(self, state: State) -> None:
        """Keep a state."""
        write_whole(self._path, msgspec.json.encode(state))

    def remove(self) -> None:
        """Forget the state."""
        with suppress(FileNotFoundError):
            self._path.unlink()

    def _other(self, why: str) -> InvalidRequest:
        return InvalidRequest(f"{self._path}: {why}; --restart forgets it", field="FILE")


class Lines:
    """The lines of a file, plain or as gzip or zstd, and what was read of it so far."""

    def __init__(self, stream: BinaryIO) -> None:
        self._pieces: Iterator[bytes] = Payload(stream, _FILE).chunks()
        self._sha256 = hashlib.sha256()
        self.number = 0
        """Of lines that are done with."""
        self.bytes = 0
        """Of these, as ``sha256``."""

    @property
    def sha256(self) -> str:
        """Hex."""
        return self._sha256.hexdigest()

    def skip(self, count: int) -> bool:
        """Read so many bytes away. False where there are not so many, or where a line goes on behind them."""
        last = b"\n"
        while left := count - self.bytes:
            piece = next(self._pieces, b"")
            if not piece:
                return False
            self._pieces = chain([piece[left:]] if piece[left:] else [], self._pieces)
            self._done(piece[:left])
            last = piece[:left][-1:]
        following = next(self._pieces, b"")
        self._pieces = chain([following] if following else [], self._pieces)
        return last == b"\n" or not following

    def __iter__(self) -> Iterator[bytes | None]:
        """Each line without its end, None for one that is too long; it is done with once the next one is asked for.
        Raises InvalidRequest for a damaged file, StorageFailed."""
        held, cut = b"", False
        for piece in self._pieces:
            *whole, rest = (held + piece).split(b"\n")
            for line in whole:
                yield None if cut or len(line) > MAX_LINE_BYTES else line
                self._done(line + b"\n")
                self.number += 1
                cut = False
            held = rest
            if len(held) > MAX_LINE_BYTES:
                self._done(held)
                held, cut = b"", True
        if held or cut:
            yield None if cut else held
            self._done(held)
            self.number += 1

    def _done(self, data: bytes) -> None:
        self.bytes += len(data)
        self._sha256.update(data)


class Sending:
    """A file that is sent."""

    def __init__(
        self,
        stream: BinaryIO,
        kept: StateFile | None,
        url: str,
        collection: str,
        moved: Callable[[int, int], None],
    ) -> None:
        """``kept`` None: nothing is to go on with; ``moved`` hears how many bytes of the file were read, and of how
        many. Raises InvalidRequest where the state is of something else, StorageFailed where it cannot be kept."""
        self._stream = stream
        self._size = os.fstat(stream.fileno()).st_size
        self._moved = moved
        self._kept = kept
        self._lines = Lines(stream)
        self._state = State(url=url.rstrip("/"), collection=collection)
        if kept is not None:
            self._state = kept.read(self._state)
            kept.check(self._lines, self._state)
            kept.write(self._state)
        self.resumed_after = self._state.lines
        """Lines that earlier runs were done with."""
        self._batch: list[tuple[int, bytes]] = []
        self._ids: set[str] = set()
        self._bytes = 0
        self._wrong: list[WrongLine] = []
        """Lines that are wrong beside those of the state."""
        self._since = time.monotonic()

    def run(self, client: ExportClient, collection: CollectionView, *, size: int, max_wrong: int) -> None:
        """Send every line, ``size`` documents at once at most. Raises NexusFailed where more than ``max_wrong`` lines
        are wrong, and what the server and the file say; what is acknowledged then is in the state."""
        self._since = time.monotonic()
        for line in self._lines:
            number = self._lines.number + 1
            if line is None:
                self._refuse(number, "$", f"has more than {MAX_LINE_BYTES:,} bytes", max_wrong)
            elif line.strip():
                try:
                    doc_id = _id_of(line, collection.dimension)
                except InvalidRequest as error:
                    self._refuse(number, *_wrong(error), max_wrong)
                    continue
                full = len(self._batch) >= size or self._bytes + len(line) > BATCH_BYTES
                if self._batch and (full or doc_id in self._ids):
                    self._flush(client, collection.name, max_wrong)
                self._batch.append((number, line))
                self._ids.add(doc_id)
                self._bytes += len(line)
        self._flush(client, collection.name, max_wrong)
        if self._size:
            self._moved(self._size, self._size)

    def report(self, file: str, sync: SyncCounts | None, error: ExportError | None) -> BatchReport:
        """What became of it so far."""
        state = self._state
        return BatchReport(
            file=file,
            collection=state.collection,
            lines=state.lines,
            resumed_after=self.resumed_after,
            sent=state.sent,
            created=state.created,
            updated=state.sent - state.created,
            failed=self._all_wrong(),
            seconds=state.seconds,
            documents_per_second=round(state.sent / state.seconds, 1) if state.seconds else 0.0,
            sync=sync,
            error=None if error is None else error.message,
        )

    def _all_wrong(self) -> list[WrongLine]:
        return sorted([*self._state.wrong, *self._wrong], key=lambda one: one.line)

    def _flush(self, client: ExportClient, collection: str, max_wrong: int) -> None:
        """Send what waits, and take down that everything until here is done with."""
        created = 0
        while self._batch:
            try:
                written = client.write_documents(collection, [line for _, line in self._batch])
            except InvalidRequest as error:
                place = _PLACE.match(str(error.details.get("field")))
                if place is None or int(place[1]) >= len(self._batch):
                    raise
                number, _ = self._batch.pop(int(place[1]))
                self._refuse(number, *_wrong(error), max_wrong)
                continue
            created = sum(one.created for one in written.documents)
            break
        now = time.monotonic()
        self._state = State(
            url=self._state.url,
            collection=self._state.collection,
            bytes=self._lines.bytes,
            sha256=self._lines.sha256,
            lines=self._lines.number,
            sent=self._state.sent + len(self._batch),
            created=self._state.created + created,
            wrong=self._all_wrong(),
            seconds=round(self._state.seconds + now - self._since, 3),
        )
        self._since = now
        self._batch, self._ids, self._bytes, self._wrong = [], set(), 0, []
        if self._kept is not None:
            self._kept.write(self._state)
        if (read := self._read()) < self._size:
            self._moved(read, self._size)

    def _read(self) -> int:
        """Bytes of the file; of what is no file, none are known."""
        return self._stream.tell() if self._size else 0

    def _refuse(self, number: int, field: str, message: str, max_wrong: int) -> None:
        self._wrong.append(WrongLine(line=number, field=field, message=message))
        if len(self._state.wrong) + len(self._wrong) > max_wrong:
            raise NexusFailed(f"More lines are wrong than the {max_wrong:,} that may be: {self._wrong[-1]}")


def write_whole(path: Path, data: bytes) -> None:
    """Put bytes into a file, which is there as a whole or as it was. Raises StorageFailed."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageFailed(f"{path} cannot be written: {error.strerror or error}") from error


def _id_of(line: bytes, dimension: int) -> str:
    """The id of a document that the server will take. Raises InvalidRequest as it would."""
    try:
        msgspec.json.decode(line.decode(), type=Raw)  # one value and no more
    except MALFORMED as error:
        raise InvalidRequest(f"is no JSON: {error}", field="$") from None
    return batch_of(b'{"documents":[%b]}' % line, dimension)[0].doc_id


def _wrong(error: InvalidRequest) -> tuple[str, str]:
    """Where a document is wrong, and how."""
    place = _PLACE.match(str(error.details.get("field")))
    field = place[2] if place else ""
    said = error.message.partition(f" ({error.details.get('answered')})")[0]
    if place and said.startswith(place[0]):
        said = said.removeprefix(place[0]).removeprefix(": ")
    return field or "$", said
