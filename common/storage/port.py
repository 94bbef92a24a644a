"""The object storage port.

A ref is a URL (``file:///…``; ``s3://bucket/key`` for a store that speaks S3; ``https://…`` to read from); a prefix is
a ref that ends in ``/``. Whoever sees an object sees all of it: nothing half written is ever at its ref.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import msgspec


class S3Config(msgspec.Struct, kw_only=True, frozen=True):
    """How a store that speaks S3 is reached. Credentials, region and endpoint come from where boto3 looks for them
    (``AWS_ACCESS_KEY_ID``, ``AWS_DEFAULT_REGION``, ``AWS_ENDPOINT_URL_S3``, …)."""

    bucket: str
    """Refs of another bucket are refused."""
    addressing: Literal["auto", "path", "virtual"] = "auto"
    encryption: str | None = None
    """Server-side encryption: ``AES256``, ``aws:kms`` or ``aws:kms:<key id>``."""


class StorageConfig(msgspec.Struct, kw_only=True, frozen=True):
    """What a process may read and write; can be handed to another one as JSON, holds no secrets."""

    roots: list[str]
    """Folders for ``file://`` refs, absolute."""
    s3: S3Config | None = None
    fetch_hosts: list[str] = []
    """Hosts that ``https://`` refs and links may name, exactly, or as ``*.example.com``."""
    fetch_private: bool = False
    """Also addresses that are not public, and plain ``http://``."""


class Stored(NamedTuple):
    """What was put at a ref."""

    ref: str
    size: int
    sha256: str
    """Lower-case hex."""


class Found(NamedTuple):
    """What lies at a ref."""

    ref: str
    size: int
    age: float
    """Seconds since it was written, by the store's own clock."""
    tag: str = ""
    """What changes when the object does; empty where nothing tells."""


@runtime_checkable
class Storage(Protocol):
    """Objects by ref.

    Every method raises StorageFailed where trying again may help (the store is away, overloaded or full), InvalidRef
    for a ref that is not allowed here, AccessDenied where the store refuses, ObjectMissing where there is nothing to
    read.
    """

    def put(self, source: Path, ref: str, *, sha256: str | None = None) -> Stored:
        """Put a file at ``ref``, replacing what was there; the file itself may be moved away.

        ``sha256`` saves the hashing where the caller knows it.
        """
        ...

    def write(self, ref: str, data: bytes, *, only_new: bool = False) -> bool:
        """Put a few bytes at ``ref``; with ``only_new`` only if nothing is there: of several writers at once exactly
        one then gets True."""
        ...

    def local(
        self, ref: str, scratch: Path, *, size: int | None = None, sha256: str | None = None, limit: int | None = None
    ) -> Path:
        """A readable file with the object's bytes, in the folder ``scratch`` where it has to be fetched.

        Raises PayloadMismatch when it is not of the given size (bytes) or SHA-256 (hex), PayloadTooLarge when it has
        more than ``limit`` bytes; both as soon as that is known.
        """
        ...

    def size(self, ref: str) -> int | None:
        """Bytes at ``ref``, None where nothing is."""
        ...

    def read(self, ref: str, start: int, length: int) -> Iterator[bytes]:
        """``length`` bytes from ``start`` on in pieces of at most 1 MiB; raises StorageFailed where fewer are there."""
        ...

    def found(self, prefix: str, *, uploads: bool = False) -> list[Found]:
        """All objects under ``prefix``, or the one at a ref, sorted by ref; refs begin with the prefix as it is given,
        however it is written. With ``uploads`` also what is only half put under the prefix, with a size of 0."""
        ...

    def delete(self, prefix: str) -> int:
        """Remove the object at a ref, or all objects and unfinished uploads under a prefix; answers how many objects
        there were. Idempotent."""
        ...

    def link(self, ref: str, method: Literal["GET", "PUT"], seconds: float) -> str:
        """A signed URL with which anyone may read or write the object for so long (at most 7 days). A PUT sends the
        headers that its fragment names, where it has one. Raises InvalidRef where the store has no links."""
        ...
