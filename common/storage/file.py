"""Storage over a folder of this machine, or of a volume that several share."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote

from common.errors import (
    AccessDenied,
    ExportError,
    InvalidRef,
    ObjectMissing,
    PayloadMismatch,
    PayloadTooLarge,
    StorageFailed,
)
from common.storage.port import Found, Stored

PIECE = 1 << 20
TEMPORARY = ".tmp-"
_GONE = (FileNotFoundError, NotADirectoryError)
"""What is raised for a file or folder that went away since it was listed."""
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""Of a folder that may be read, but in which no file can be made."""


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
        with _failing_as(f"cannot store {target.name}", absent=StorageFailed):
            stored = Stored(ref, source.stat().st_size, sha256 or sha256_of(source))
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.utime(source)  # its age counts from now on, not from when its last byte was written
                _fsync_file(source)
                source.replace(target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                self._copy(source, target)
            fsync_directory(target.parent)
        return stored

    def write(self, ref: str, data: bytes, *, only_new: bool = False) -> bool:
        """Put a few bytes at ``ref``: temporary file, then a rename, or a hard link where it has to be the first."""
        target = self._path(ref)
        with _failing_as(f"cannot store {target.name}", absent=StorageFailed):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _temporary(target) as temporary:
                temporary.write_bytes(data)
                _fsync_file(temporary)
                if not only_new:
                    temporary.replace(target)
                else:
                    try:
                        target.hardlink_to(temporary)
                    except FileExistsError:
                        return False
            fsync_directory(target.parent)
        return True

    def local(
        self, ref: str, scratch: Path, *, size: int | None = None, sha256: str | None = None, limit: int | None = None
    ) -> Path:
        """The file itself: nothing is copied."""
        path = self._path(ref)
        with _failing_as(f"cannot read {path.name}"):
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ObjectMissing(f"nothing lies at {path.name}")
            check_size(path.name, status.st_size, size, limit)
            if sha256 is not None:
                check_sha256(path.name, sha256_of(path), sha256)
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

    def found(self, prefix: str, *, uploads: bool = False) -> list[Found]:
        """The files under ``prefix``; temporary files of a writer at work are not among them."""
        whole = prefix.endswith("/")
        path = self._path(prefix, root=whole)
        above = len(os.fspath(path).rstrip("/")) + 1
        found = []
        with _failing_as(f"cannot list {path.name}"):
            for file in _files_below(path) if whole else [path]:
                if file.name.startswith(TEMPORARY):
                    continue
                with contextlib.suppress(*_GONE):
                    status = file.stat()
                    if stat.S_ISREG(status.st_mode):
                        below = quote(os.fsencode(os.fspath(file)[above:])) if whole else ""
                        found.append((prefix + below, status.st_size, status.st_mtime))
            now = self._now(path, max(written for *_, written in found)) if found else 0.0
        return sorted(Found(ref, size, max(0.0, now - written)) for ref, size, written in found)

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
            count = sum(1 for _ in _files_below(path))
            shutil.rmtree(path)
            return count

    def link(self, ref: str, method: Literal["GET", "PUT"], seconds: float) -> str:
        """Files have no links."""
        raise InvalidRef("a file:// ref has no signed URL", field="ref", allowed="s3://")

    def _now(self, path: Path, newest: float) -> float:
        """The clock of the file system: those of the machines that share a volume may differ. Where nothing can be
        written it stood still at the ``newest`` file."""
        root = next(root for root in self._roots if path.is_relative_to(root))
        try:
            with tempfile.TemporaryFile(dir=root) as file:
                return os.fstat(file.fileno()).st_mtime
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            return newest

    def _copy(self, source: Path, target: Path) -> None:
        with _temporary(target) as temporary:
            shutil.copyfile(source, temporary)
            _fsync_file(temporary)
            temporary.replace(target)

    def _path(self, ref: str, *, root: bool = False) -> Path:
        """The path that a ref names; with ``root`` it may be a root itself."""
        scheme, _, rest = ref.partition("://")
        host, slash, encoded = rest.partition("/")
        if scheme.lower() != "file" or host not in ("", "localhost"):
            raise InvalidRef(f"not a file:// ref of this machine: {ref[:200]!a}", field="ref", allowed="file:///")
        if any(sign in "?#" or ord(sign) < 32 for sign in encoded):
            raise InvalidRef(f"not a file:// ref, which would quote that: {ref[:200]!a}", field="ref")
        try:
            text = unquote(slash + encoded, errors="strict")
            text.encode()
        except UnicodeError as error:
            raise InvalidRef("a file:// ref that is not UTF-8", field="ref") from error
        if "\0" in text:
            raise InvalidRef("a file:// ref with a NUL in it", field="ref")
        path = Path(os.path.normpath(text))
        with _failing_as(f"cannot find {path.name}"):
            # Not Path.resolve, for which links that lead in a circle are a RuntimeError; opened they are an OSError.
            resolved = Path(os.path.realpath(path)) if root else Path(os.path.realpath(path.parent)) / path.name
        if not any(resolved.is_relative_to(known) and (root or resolved != known) for known in self._roots):
            raise InvalidRef("a file:// ref outside the storage root", field="ref")
        return resolved


def _files_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What is no folder below a folder, at any depth; links to folders are not followed. What goes away meanwhile is
    left out."""
    folders = [os.fspath(folder)]
    while folders:
        below = folders.pop()
        cannot = _failing_as(f"cannot list {below.rpartition('/')[2]}")
        with cannot, contextlib.suppress(*_GONE), os.scandir(below) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    yield entry


def _fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def check_size(name: str, found: int, announced: int | None, limit: int | None) -> None:
    """Raise PayloadMismatch for another size than was announced, PayloadTooLarge for more bytes than are wanted."""
    if announced is not None and found != announced:
        raise PayloadMismatch(f"{name} has {found:,} bytes, {announced:,} were announced", field="payload_size")
    if limit is not None and found > limit:
        raise PayloadTooLarge(f"{name} has {found:,} bytes, at most {limit:,} are read", field="payload", limit=limit)


def check_sha256(name: str, found: str, announced: str) -> None:
    """Raise PayloadMismatch for another SHA-256 (hex) than was announced."""
    if found != announced.lower():
        raise PayloadMismatch(f"{name} is not what was announced (SHA-256)", field="payload_sha256")


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A name beside ``target`` for what is not whole yet; nothing is left there."""
    path = target.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(6)}")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _failing_as(what: str, *, absent: type[ExportError] = ObjectMissing) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise absent(f"{what}: {error.strerror}", errno=error.errno) from error
    except PermissionError as error:
        raise AccessDenied(f"{what}: {error.strerror}", errno=error.errno) from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise InvalidRef(f"{what}: {error.strerror}", field="ref", errno=error.errno) from error
        raise StorageFailed(f"{what}: {error.strerror or error}", errno=error.errno) from error
