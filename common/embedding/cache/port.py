"""The cache port: records by key, for one or many processes; and what a record is."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from common.embedding.port import Model

KEY_BYTES = 32
TAIL_BYTES = 8
"""Flags and a CRC-32, four bytes each, little-endian."""
_FORMAT = "memvid-export vector 1"


class Space(NamedTuple):
    """All vectors that one model makes of one layout for one purpose: none of another space is ever an answer."""

    name: str
    """SHA-256 of what decides a vector beside its text, lower-case hex."""
    record_bytes: int

    def keys(self, texts: Sequence[str]) -> list[bytes]:
        """SHA-256 of this space and each text."""
        sha256, space = hashlib.sha256, bytes.fromhex(self.name)
        return [sha256(space + text.encode("utf-8", "surrogatepass")).digest() for text in texts]


def space_of(model: Model) -> Space:
    """The space of a model's vectors of documents; its price decides none of them, its maximum of tokens those of long
    texts."""
    decides = [
        _FORMAT,
        model.provider,
        model.name,
        model.revision,
        model.dimension,
        model.precision,
        model.layout,
        model.max_tokens,
        "document",
    ]
    name = hashlib.sha256(msgspec.json.encode(decides)).hexdigest()
    return Space(name, KEY_BYTES + 4 * model.dimension + TAIL_BYTES)


def seal(key: bytes, vector: bytes, flags: int) -> bytes:
    """A record: key, float32 values, flags, checksum of all that."""
    body = b"".join((key, vector, flags.to_bytes(4, "little")))
    return body + zlib.crc32(body).to_bytes(4, "little")


def is_whole(record: bytes) -> bool:
    """Whether a record is as it was sealed."""
    return zlib.crc32(record[:-4]) == int.from_bytes(record[-4:], "little")


class VectorCache(Protocol):
    """Keeps records, which begin with their 32 bytes of key; may forget any of them at any time.

    Threads may share one, and processes what is behind it. Every method but ``close`` raises StorageFailed,
    AccessDenied, InvalidRef or InvalidSettings where it cannot do its work; the cache can be asked again later.
    """

    def has(self, space: Space, keys: Sequence[bytes]) -> set[bytes]:
        """Which keys have a record; cheaper than to read them."""
        ...

    def get(self, space: Space, keys: Sequence[bytes]) -> list[bytes]:
        """The records that there are, one for a key, in any order; to be checked: they may have been spoiled."""
        ...

    def put(self, space: Space, records: Sequence[bytes]) -> None:
        """Keep records, in place of those with the same key."""
        ...

    def flush(self) -> None:
        """Let others see what was put; call it when an export ends, however it does, or sooner."""
        ...

    def close(self) -> None:
        """Let go of files and threads; what was not flushed may be lost."""
        ...
