"""Storage over a folder of this machine, or of a volume that several share."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from common.errors import StorageFailed
from common.storage.port import Stored

PIECE = 1 << 20


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_directory(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class FileStorage:
    """Objects as files under the given roots; a ref outside all of them is refused."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = [root.resolve() for root in roots]

    def put(self, source: Path, ref: str, *, sha256: str | None = None) -> Stored:
        """Move ``source`` to ``ref`` (copy it from another file system): fsync, rename, fsync of the folder."""
        target = self._path(ref)
        with _failing_as(f"cannot store {target.name}"):
            stored = Stored(ref, source.stat().st_size, sha256 or sha256_of(source))
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                _fsync_file(source)
                source.replace(target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                self._copy(source, target)
            fsync_directory(target.parent)
        return stored

    def local(self, ref: str, scratch: Path, *, size: int | None = None, sha256: str | None = None) -> Path:
        """The file itself: nothing is copied."""
        path = self._path(ref)
        with _failing_as(f"cannot read {path.name}"):
            found = path.stat().st_size
            if size is not None and found != size:
                raise StorageFailed(f"{path.name} has {found:,} bytes, {size:,} were announced", field="payload_size")
            if sha256 is not None and sha256_of(path) != sha256.lower():
                raise StorageFailed(f"{path.name} is not what was announced (SHA-256)", field="payload_sha256")
        return path

    def size(self, ref: str) -> int | None:
        """Bytes at ``ref``, None where nothing is."""
        path = self._path(ref)
        with _failing_as(f"cannot read {path.name}"):
            return path.stat().st_size if path.is_file() else None

    def read(self, ref: str, start: int, length: int) -> Iterator[bytes]:
        """Pieces of at most 1 MiB; a file that is deleted meanwhile is still read to its end."""
        path = self._path(ref)
        with _failing_as(f"cannot read {path.name}"), path.open("rb") as file:
            file.seek(start)
            while length > 0:
                piece = file.read(min(PIECE, length))
                if not piece:
                    raise StorageFailed(f"{path.name} is shorter than it should be")
                length -= len(piece)
                yield piece

    def names(self, prefix: str) -> list[str]:
        """Refs of all files under ``prefix``; temporary files of a writer at work are not among them."""
        folder = self._path(prefix)
        with _failing_as(f"cannot list {folder.name}"):
            return sorted(
                path.as_uri() for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".tmp-")
            )

    def delete(self, prefix: str) -> int:
        """Remove a file, or a folder with all in it."""
        path = self._path(prefix)
        with _failing_as(f"cannot delete {path.name}"):
            if not prefix.endswith("/"):
                existed = path.is_file()
                path.unlink(missing_ok=True)
                return int(existed)
            if not path.is_dir():
                return 0
            count = sum(1 for found in path.rglob("*") if found.is_file())
            shutil.rmtree(path)
            return count

    def _copy(self, source: Path, target: Path) -> None:
        temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
        try:
            shutil.copyfile(source, temporary)
            _fsync_file(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def _path(self, ref: str) -> Path:
        parts = urlsplit(ref)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            raise StorageFailed(f"not a file:// ref: {parts.scheme}://…", field="ref")
        path = Path(os.path.normpath(unquote(parts.path)))
        resolved = path.parent.resolve() / path.name
        if not any(resolved.is_relative_to(root) and resolved != root for root in self._roots):
            raise StorageFailed("a file:// ref outside the storage root", field="ref")
        return resolved


def _fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _failing_as(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageFailed(f"{what}: {error.strerror or error}", errno=error.errno) from error
