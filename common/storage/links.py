"""Objects by signed URLs, for a process without credentials for the store."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl

from common.contract import Links
from common.errors import InvalidRef, PayloadTooLarge, StorageFailed
from common.storage.file import PIECE
from common.storage.https import TOTAL_SECONDS, Asked, Linked, Web, found_at
from common.storage.port import Found, Stored
from common.storage.ranges import download, patiently, read_range

MAX_PUT_BYTES = 5 << 30
"""What S3 takes in one request."""


class LinkStorage:
    """The refs that have links, and no others.

    What goes up is checked by the store against the MD5 sent with it: a SHA-256 would have to be known when the link
    is signed. A link that has passed its time answers AccessDenied. Failed requests are tried 5 times.
    """

    def __init__(self, links: Mapping[str, Links], web: Web) -> None:
        self._links, self._web = links, web

    def put(self, source: Path, ref: str, *, sha256: str | None = None) -> Stored:
        """Put a file of at most 5 GiB with one request."""
        url = self._url(ref, "PUT")
        try:
            if (size := source.stat().st_size) > MAX_PUT_BYTES:
                raise PayloadTooLarge(
                    f"{source.name} has {size:,} bytes, a signed URL takes {MAX_PUT_BYTES:,}", limit=MAX_PUT_BYTES
                )
            size, md5, found = _read_through(source)
            if sha256 is not None and found != sha256.lower():
                raise StorageFailed(f"{source.name} changed before it was stored")
            self._send(url, ref, lambda: _pieces(source), size, md5)
        except OSError as error:
            raise StorageFailed(f"cannot read {source.name}: {error.strerror or error}", errno=error.errno) from error
        if self._links[ref].get and self.size(ref) != size:
            raise StorageFailed(f"{ref} is not in the store as it was sent")
        return Stored(ref, size, found)

    def write(self, ref: str, data: bytes, *, only_new: bool = False) -> bool:
        """Put a few bytes."""
        md5 = hashlib.md5(data, usedforsecurity=False).digest()
        return self._send(
            self._url(ref, "PUT"), ref, lambda: [data], len(data), md5, only_new=data if only_new else None
        )

    def local(
        self, ref: str, scratch: Path, *, size: int | None = None, sha256: str | None = None, limit: int | None = None
    ) -> Path:
        """Fetch an object by ranges."""
        return download(self._at(ref), ref, scratch, size=size, sha256=sha256, limit=limit)

    def size(self, ref: str) -> int | None:
        """Bytes at ``ref``, None where nothing is."""
        return next((at.size for at in found_at(self._at(ref), ref)), None)

    def read(self, ref: str, start: int, length: int) -> Iterator[bytes]:
        """Pieces of at most 1 MiB; goes on where it was when a connection breaks."""
        return read_range(self._at(ref), start, length)

    def found(self, prefix: str, *, uploads: bool = False) -> list[Found]:
        """Those objects under ``prefix`` that have a link to read them, one request each."""
        if not prefix.endswith("/"):
            return found_at(self._at(prefix), prefix)
        refs = [ref for ref, link in self._links.items() if ref.startswith(prefix) and link.get]
        return sorted(at for ref in refs for at in found_at(self._at(ref), ref))

    def delete(self, prefix: str) -> int:
        """0: no link removes anything; whoever signed the links does."""
        return 0

    def link(self, ref: str, method: Literal["GET", "PUT"], seconds: float) -> str:
        """The link that was given, whatever time it has left."""
        return self._url(ref, method)

    def _send(
        self,
        url: str,
        ref: str,
        content: Callable[[], Iterable[bytes]],
        size: int,
        md5: bytes,
        *,
        only_new: bytes | None = None,
    ) -> bool:
        headers = {
            "Content-Length": str(size),
            "Content-MD5": base64.b64encode(md5).decode(),
            **_signed_headers(url, ref),
        }
        if only_new is not None:
            headers["If-None-Match"] = "*"
        until = time.monotonic() + TOTAL_SECONDS
        tries = 0

        def attempt() -> int:
            nonlocal tries
            tries += 1
            answer = self._web.ask(Asked("PUT", url, ref, until, headers, content()))
            with closing(answer):
                for _ in answer.body:
                    pass
            return answer.status

        status = patiently(attempt)
        if status == 412 and only_new is not None:
            # The answer to a first try may have got lost: then these bytes, which no other writes, are there.
            return tries > 1 and b"".join(self.read(ref, 0, self.size(ref) or 0)) == only_new
        if status != 200:
            raise StorageFailed(f"{ref}: the store answered {status} to a PUT")
        return True

    def _at(self, ref: str) -> Linked:
        return Linked(self._web, self._url(ref, "GET"), ref)

    def _url(self, ref: str, method: Literal["GET", "PUT"]) -> str:
        link = self._links.get(ref)
        url = link and (link.get if method == "GET" else link.put)
        if not url:
            raise InvalidRef(f"there is no link to {'read' if method == 'GET' else 'write'} {ref[:200]}", field="ref")
        return url


def _signed_headers(url: str, ref: str) -> dict[str, str]:
    """Those that are part of what was signed; see S3Storage.link. Others are none of a link's business."""
    headers = dict(parse_qsl(url.partition("#")[2]))
    for name, value in headers.items():
        if not (name.startswith("x-amz-") and name.isascii() and value.isascii() and (name + value).isprintable()):
            raise InvalidRef(f"the link to write {ref[:200]} asks for a header that is none of S3's", field="links")
    return headers


def _read_through(path: Path) -> tuple[int, bytes, str]:
    """Size, MD5 and SHA-256 (hex) of a file, which is read once."""
    size, md5, sha256 = 0, hashlib.md5(usedforsecurity=False), hashlib.sha256()
    for piece in _pieces(path):
        size += len(piece)
        md5.update(piece)
        sha256.update(piece)
    return size, md5.digest(), sha256.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece
