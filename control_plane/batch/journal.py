"""What a batch has done so far: ``batch.jsonl`` in its destination, one line for each graph that has ended.

The file is written whole, and so is always whole. Another machine can go on where one broke down: of graphs that ended
since the last write it finds the output again (Runpod), or makes it again (here).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from typing import Literal

import msgspec

from common.contract import MALFORMED, ErrorInfo, Wire
from common.errors import InvalidRequest
from common.storage import Storage

JOURNAL_NAME = "batch.jsonl"
MAX_JOURNAL_BYTES = 256 << 20
WRITE_SECONDS = 1.0
"""Between two writes: with one for each graph, 100,000 graphs would write 100,000 times 50 MB."""


class Record(Wire, kw_only=True):
    """How a graph ended."""

    name: str
    source: str
    status: Literal["completed", "failed", "skipped"]
    payload_sha256: str = ""
    """Empty where the graph could not be fetched."""
    options_sha256: str = ""
    """Of all that decides the capsule beside the payload."""
    folder: str = ""
    """Below the destination, quoted as in a ref, with a slash at its end."""
    files: dict[str, int] = msgspec.field(default_factory=dict)
    """Names and bytes of what lies in it."""
    left: list[str] = msgspec.field(default_factory=list)
    """Of earlier exports, below the destination: what could not be removed."""
    frames: int = 0
    vectors: int = 0
    texts: int = 0
    tokens: int = 0
    cache_hits: int = 0
    cost_estimate: float = 0.0
    """US dollars."""
    seconds: float = 0.0
    attempts: int = 0
    device: str = ""
    ended_at: str = ""
    error: ErrorInfo | None = None


class Journal:
    """The records of a destination by name."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        """Reads what is there. Raises InvalidRequest for a file that is no journal."""
        self._storage = storage
        self._ref = prefix + JOURNAL_NAME
        self._records: dict[str, Record] = {}
        self._one = threading.Lock()
        self._changes = self._written = 0
        size = storage.size(self._ref) or 0
        if size > MAX_JOURNAL_BYTES:
            raise InvalidRequest(f"--out: its {JOURNAL_NAME} has more than {MAX_JOURNAL_BYTES:,} bytes", field="--out")
        for number, line in enumerate(b"".join(storage.read(self._ref, 0, size)).splitlines() if size else [], 1):
            try:
                record = msgspec.json.decode(line, type=Record)
            except MALFORMED as error:
                message = f"--out: its {JOURNAL_NAME} is not that of a batch, line {number}: {error}"
                raise InvalidRequest(message, field="--out") from error
            self._records[record.name] = record

    def get(self, name: str) -> Record | None:
        """What is known of a graph."""
        return self._records.get(name)

    def add(self, record: Record) -> None:
        """Take a record; it is durable after the next write."""
        self._records[record.name] = record
        self._changes += 1

    async def keep(self, over: asyncio.Event) -> None:
        """Write what was added, every ``WRITE_SECONDS``, until ``over``. Raises StorageFailed."""
        while not over.is_set():
            await self.write()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), WRITE_SECONDS)

    async def write(self) -> None:
        """Make durable what was added until now. Raises StorageFailed."""
        if self._written == self._changes:
            return
        now, records = self._changes, list(self._records.values())
        await asyncio.to_thread(self._put, records)
        self._written = now

    def _put(self, records: Sequence[Record]) -> None:
        with self._one:  # one whose task was cancelled is still under way in its thread
            self._storage.write(self._ref, b"".join(msgspec.json.encode(kept) + b"\n" for kept in records))
