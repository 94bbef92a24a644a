"""One storage for refs of every scheme that a process may use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from common.contract import Links
from common.errors import InvalidRef
from common.storage.file import FileStorage
from common.storage.port import Found, Storage, StorageConfig, Stored
from common.storage.s3 import S3Storage


def open_storage(config: StorageConfig, links: Mapping[str, Links] | None = None) -> Storage:
    """The storage that ``config`` allows; refs that ``links`` names go over their signed URLs.

    Connects to nothing. Raises InvalidRef for links where ``config`` allows no host.
    """
    schemes: dict[str, Storage] = {"file": FileStorage([Path(root) for root in config.roots])}
    linked: Storage | None = None
    if config.s3 is not None:
        schemes["s3"] = S3Storage(config.s3)
    if config.fetch_hosts:  # httpx takes a while to import
        from common.storage.https import HttpsStorage, Web
        from common.storage.links import LinkStorage

        web = Web(config.fetch_hosts, private=config.fetch_private)
        schemes["https"] = schemes["http"] = HttpsStorage(web)
        linked = LinkStorage(links or {}, web)
    if links:
        if linked is None:
            raise InvalidRef("links are given, and no host is allowed that they may name", field="links")
        schemes["s3"] = linked  # no silent way around a link that is missing
    return _ByScheme(schemes, links or {}, linked)


class _ByScheme:
    """Hands each ref to the storage of its scheme, or to the one over links where it has a link."""

    def __init__(self, schemes: Mapping[str, Storage], links: Mapping[str, Links], linked: Storage | None) -> None:
        self._schemes, self._links, self._linked = schemes, links, linked

    def put(self, source: Path, ref: str, *, sha256: str | None = None) -> Stored:
        return self._of(ref).put(source, ref, sha256=sha256)

    def write(self, ref: str, data: bytes, *, only_new: bool = False) -> bool:
        return self._of(ref).write(ref, data, only_new=only_new)

    def local(
        self, ref: str, scratch: Path, *, size: int | None = None, sha256: str | None = None, limit: int | None = None
    ) -> Path:
        return self._of(ref).local(ref, scratch, size=size, sha256=sha256, limit=limit)

    def size(self, ref: str) -> int | None:
        return self._of(ref).size(ref)

    def read(self, ref: str, start: int, length: int) -> Iterator[bytes]:
        return self._of(ref).read(ref, start, length)

    def found(self, prefix: str, *, uploads: bool = False) -> list[Found]:
        return self._of(prefix).found(prefix, uploads=uploads)

    def delete(self, prefix: str) -> int:
        return self._of(prefix).delete(prefix)

    def link(self, ref: str, method: Literal["GET", "PUT"], seconds: float) -> str:
        return self._of(ref).link(ref, method, seconds)

    def _of(self, ref: str) -> Storage:
        try:
            ref.encode()
        except UnicodeEncodeError as error:  # half a character, which no store and no message can hold
            raise InvalidRef(f"not a ref: {ref[:200]!a}", field="ref") from error
        if self._linked is not None and ref in self._links:
            return self._linked
        scheme = ref.partition("://")[0].lower()
        if scheme not in self._schemes:
            raise InvalidRef(
                f"refs of the scheme {scheme[:20]!r} are not read or written here",
                field="ref",
                allowed=", ".join(f"{known}://" for known in self._schemes if known != "http"),
            )
        return self._schemes[scheme]
