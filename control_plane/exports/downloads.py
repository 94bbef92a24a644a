"""Files of a finished job over HTTP: ranges, validators, digests."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote

from litestar import HttpMethod
from litestar.types import Receive, Scope, Send

from common.storage import Storage
from control_plane.errors import ArtifactMissing, RangeNotSatisfiable

_RANGE = re.compile(r"bytes=\s*([0-9]*)-([0-9]*)\s*$", re.IGNORECASE)
_MAX_DIGITS = 18
"""A longer number lies behind the end of any file; its value does not matter."""


class Artifact(NamedTuple):
    """A file that can be downloaded."""

    ref: str
    file_name: str
    media_type: str
    size: int
    sha256: str


class Download:
    """An ASGI answer with a file or a part of it; made by ``prepare``."""

    def __init__(self, storage: Storage, artifact: Artifact, status: int, headers: dict[str, str], span: range) -> None:
        self._storage = storage
        self._artifact = artifact
        self._status = status
        self._headers = headers
        self._span = span

    @classmethod
    async def prepare(
        cls, storage: Storage, artifact: Artifact, headers: Mapping[str, str], extra: dict[str, str]
    ) -> Download:
        """Look at the request's conditions. Raises ArtifactMissing, RangeNotSatisfiable."""
        if await asyncio.to_thread(storage.size, artifact.ref) != artifact.size:
            raise ArtifactMissing("The file of this export is not where it should be.")
        etag = f'"{artifact.sha256}"'
        digest = "sha-256=:" + base64.b64encode(bytes.fromhex(artifact.sha256)).decode() + ":"
        common = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache", **extra}
        if _matches(headers.get("if-none-match"), etag):
            return cls(storage, artifact, 304, common, range(0))
        common |= {
            "Content-Type": artifact.media_type,
            "Content-Disposition": content_disposition(artifact.file_name),
            "Repr-Digest": digest,
        }
        span = None
        if headers.get("if-range", etag) == etag:
            span = _span(headers.get("range"), artifact.size)
        if span is None:
            common |= {"Content-Length": str(artifact.size), "Content-Digest": digest}
            return cls(storage, artifact, 200, common, range(artifact.size))
        common |= {
            "Content-Length": str(len(span)),
            "Content-Range": f"bytes {span.start}-{span.stop - 1}/{artifact.size}",
        }
        return cls(storage, artifact, 206, common, span)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; to HEAD without the body."""
        headers = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in self._headers.items()]
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        if scope.get("method") != HttpMethod.HEAD and self._span:
            pieces = self._storage.read(self._artifact.ref, self._span.start, len(self._span))
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def content_disposition(file_name: str) -> str:
    """``attachment`` with a plain name for old clients and the true one for the rest (RFC 6266, RFC 8187)."""
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\%' else "_" for c in file_name)
    value = f'attachment; filename="{plain}"'
    return value if plain == file_name else f"{value}; filename*=UTF-8''{quote(file_name, safe='')}"


def _matches(header: str | None, etag: str) -> bool:
    if header is None:
        return False
    given = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in given or etag in given


def _span(header: str | None, size: int) -> range | None:
    """The asked bytes; None where the whole file is the answer (no range, several, or one that makes no sense)."""
    match = _RANGE.match(header) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - _number(last)), size
    else:
        start, stop = _number(first), min(size, _number(last) + 1) if last else size
        if last and _number(last) < start:
            return None
    if start >= stop:
        raise RangeNotSatisfiable(f"The file has {size:,} bytes.", size=size)
    return range(start, stop)


def _number(digits: str) -> int:
    return int(digits) if len(digits) <= _MAX_DIGITS else 10**_MAX_DIGITS
