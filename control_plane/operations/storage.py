"""The storage port, counting what it raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from common.errors import ExportError
from common.storage import Found, Storage, Stored
from control_plane.operations.metrics import Metrics


class CountedStorage:
    """A storage whose errors are in the figures, by operation and code; what children meet is in their jobs' codes."""

    def __init__(self, storage: Storage, metrics: Metrics) -> None:
        self._storage = storage
        self._metrics = metrics

    @contextmanager
    def _counted(self, operation: str) -> Iterator[None]:
        try:
            yield
        except ExportError as error:
            self._metrics.storage_errors.labels(operation, error.code).inc()
            raise

    def put(self, source: Path, ref: str, *, sha256: str | None = None) -> Stored:
        """See ``Storage``."""
        with self._counted("put"):
            return self._storage.put(source, ref, sha256=sha256)

    def write(self, ref: str, data: bytes, *, only_new: bool = False) -> bool:
        """See ``Storage``."""
        with self._counted("write"):
            return self._storage.write(ref, data, only_new=only_new)

    def local(
        self, ref: str, scratch: Path, *, size: int | None = None, sha256: str | None = None, limit: int | None = None
    ) -> Path:
        """See ``Storage``."""
        with self._counted("local"):
            return self._storage.local(ref, scratch, size=size, sha256=sha256, limit=limit)

    def size(self, ref: str) -> int | None:
        """See ``Storage``."""
        with self._counted("size"):
            return self._storage.size(ref)

    def read(self, ref: str, start: int, length: int) -> Iterator[bytes]:
        """See ``Storage``."""
        with self._counted("read"):
            yield from self._storage.read(ref, start, length)

    def found(self, prefix: str, *, uploads: bool = False) -> list[Found]:
        """See ``Storage``."""
        with self._counted("found"):
            return self._storage.found(prefix, uploads=uploads)

    def delete(self, prefix: str) -> int:
        """See ``Storage``."""
        with self._counted("delete"):
            return self._storage.delete(prefix)

    def link(self, ref: str, method: Literal["GET", "PUT"], seconds: float) -> str:
        """See ``Storage``."""
        with self._counted("link"):
            return self._storage.link(ref, method, seconds)
