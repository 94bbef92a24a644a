"""What a batch has done so far: ``batch.jsonl`` in its destination, one line for each graph that has ended.

The file is written whole after each graph, and so is always whole. Another machine can go on where one broke down.
"""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec

from common.contract import MALFORMED, ErrorInfo, Wire
from common.errors import InvalidRequest
from common.storage import Storage

JOURNAL_NAME = "batch.jsonl"
MAX_JOURNAL_BYTES = 256 << 20


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
        self._lock = asyncio.Lock()
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

    async def add(self, record: Record) -> None:
        """Keep a record; it is durable when this returns. Graphs that end meanwhile share the next write."""
        self._records[record.name] = record
        self._changes += 1
        wanted = self._changes
        async with self._lock:
            if self._written >= wanted:
                return
            now = self._changes
            data = b"".join(msgspec.json.encode(kept) + b"\n" for kept in self._records.values())
            await asyncio.to_thread(self._storage.write, self._ref, data)
            self._written = now
