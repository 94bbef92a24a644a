"""The object storage port.

A ref is a URL (``file:///…``; ``s3://bucket/key`` for a store that speaks S3); a prefix is a ref that ends in ``/``.
Whoever sees an object sees all of it: nothing half written is ever at its ref.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol


class Stored(NamedTuple):
    """What lies at a ref."""

    ref: str
    size: int
    sha256: str
    """Lower-case hex."""


class Storage(Protocol):
    """Objects by ref. Every method raises StorageFailed when the store cannot be reached or is full."""

    def put(self, source: Path, ref: str, *, sha256: str | None = None) -> Stored:
        """Put a file at ``ref``, replacing what was there; the file itself may be moved away.

        ``sha256`` saves the hashing where the caller knows it.
        """
        ...

    def local(self, ref: str, scratch: Path, *, size: int | None = None, sha256: str | None = None) -> Path:
        """A readable file with the object's bytes, in ``scratch`` where it has to be fetched.

        Raises StorageFailed when it is missing, or is not of the given size (bytes) or SHA-256 (hex).
        """
        ...

    def size(self, ref: str) -> int | None:
        """Bytes at ``ref``, None where nothing is."""
        ...

    def read(self, ref: str, start: int, length: int) -> Iterator[bytes]:
        """``length`` bytes from ``start`` on in pieces of at most 1 MiB; raises StorageFailed where fewer are there."""
        ...

    def names(self, prefix: str) -> list[str]:
        """Refs of all objects under ``prefix``, sorted."""
        ...

    def delete(self, prefix: str) -> int:
        """Remove the object at a ref, or all objects under a prefix; answers how many there were. Idempotent."""
        ...
