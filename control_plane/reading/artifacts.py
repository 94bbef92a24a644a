"""Files of completed exports for the read tools: in place, or fetched from the object store they lie in."""

from __future__ import annotations

import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import ClassVar, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec

from common.contract import Manifest
from common.errors import AccessDenied, CapsuleUnreadable, InvalidRef, ObjectMissing, PayloadMismatch, StorageFailed
from common.storage import Storage
from control_plane.errors import IndexBuildInProgress, TimedOut
from control_plane.jobs.records import JobRecord
from handler.job import ref_of

FETCHES = 2
"""Exports fetched at once; others wait their turn."""


class _File(NamedTuple):
    name: str
    size: int
    sha256: str


class _Copy:
    """The copy of one export: the sidecar and the manifest first, the capsule's parts when one is asked for."""

    def __init__(self, folder: Path, job: JobRecord) -> None:
        assert job.output is not None
        assert job.manifest is not None
        self.folder = folder
        self.job = job
        self.prefix = job.output.artifact_ref.rpartition("/")[0] + "/"
        self.manifest = manifest = job.manifest
        self.path = folder / manifest.parts[0].file_name
        self.sidecar = [_File(manifest.sidecar_file_name, manifest.sidecar_size_bytes, manifest.sidecar_sha256)]
        self.parts = [_File(part.file_name, part.size_bytes, part.sha256) for part in manifest.parts]
        self.users = 0
        self.size = 0
        """Bytes, of what is there and what is on its way."""
        self.fetching: dict[str, Future[None]] = {}
        """``sidecar`` and ``parts``; a fetch that failed is not among them."""


class Held:
    """A capsule's files, which stay where they are while they are held; these need no holding."""

    whole: ClassVar[bool] = True
    """Whether the parts of the capsule are there without being waited for."""

    def __init__(self, path: Path, published: Manifest | None = None) -> None:
        self.path = path
        """The first part of the capsule, with its manifest and sidecar beside it."""
        self.published = published
        """What the job's record says of them; None for a file that is no job's, and for files that were compared."""
        self.mark = path
        """A file that is there; another one as soon as the capsule is another one."""

    def wait(self, patience: float | None) -> None:
        """Have all parts of the capsule there; they are fetched by the first who asks. Raises IndexBuildInProgress
        after ``patience`` seconds (None: as long as it takes), CapsuleUnreadable, StorageFailed, TimedOut."""

    def hold(self) -> None:
        """Hold them once more, for another thread."""

    def release(self) -> None:
        """The end of one hold."""


class _HeldCopy(Held):
    whole: ClassVar[bool] = False

    def __init__(self, artifacts: Artifacts, copy: _Copy) -> None:
        super().__init__(copy.path)
        self.mark = copy.path.with_name(f"{copy.path.name}.manifest.json")
        self._artifacts = artifacts
        self._copy = copy

    def wait(self, patience: float | None) -> None:
        self._artifacts.fetched(self._copy, "parts", patience)

    def hold(self) -> None:
        self._artifacts.count(self._copy, 1)

    def release(self) -> None:
        self._artifacts.release(self._copy)


class Artifacts:
    """Finds the files of capsules: those on this machine in place, those in an object store as copies.

    Safe for many threads. Of the copies, which are bounded, those least recently used go first; none goes while it is
    held. They do not outlive the process: what lies in the folder at the start is removed.
    """

    def __init__(
        self,
        storage: Storage,
        folder: Path,
        capacity_bytes: int,
        *,
        reading: Callable[[JobRecord], AbstractContextManager[object]] = nullcontext,
        room: Callable[[int], None] = lambda _size: None,
    ) -> None:
        """``folder`` is for the copies alone, which together have at most ``capacity_bytes``; ``reading`` keeps the
        files of an export in the store for as long as its context lasts, ``room`` raises where the disk has none for so
        many bytes."""
        self._storage = storage
        self._reading = reading
        self._room = room
        self._folder = folder
        self._capacity = capacity_bytes
        self._copies: OrderedDict[str, _Copy] = OrderedDict()
        self._lock = threading.Lock()
        self._users = threading.Lock()  # taken last of all locks, and alone in what it guards
        self._fetcher = ThreadPoolExecutor(FETCHES, "artifact-fetcher")
        self._forget: Callable[[Path], None] = lambda _path: None
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)

    def before_removal(self, forget: Callable[[Path], None]) -> None:
        """Have ``forget`` called with the path of a capsule whose copy nobody holds and that is about to go."""
        self._forget = forget

    def path(self, place: Path | JobRecord) -> Path:
        """Where the first part of a capsule, or of a completed export, lies once it has been fetched."""
        if path := _in_place(place):
            return path
        assert isinstance(place, JobRecord)
        return self._new_copy(place).path

    @contextmanager
    def held(self, place: Path | JobRecord, patience: float) -> Iterator[Held]:
        """The files of a capsule, or of a completed export, for as long as the context lasts.

        Fetched ones are checked against the manifest; whoever waits for them for more than ``patience`` seconds gets
        IndexBuildInProgress. Raises CapsuleUnreadable, StorageFailed and TimedOut too.
        """
        if path := _in_place(place):
            yield Held(path, place.manifest if isinstance(place, JobRecord) else None)
            return
        assert isinstance(place, JobRecord)
        with self._lock:
            copy = self._copies.get(place.id)
            if copy is None:
                copy = self._copies[place.id] = self._new_copy(place)
            self._copies.move_to_end(place.id)
            self.count(copy, 1)
        try:
            self.fetched(copy, "sidecar", patience)
            yield _HeldCopy(self, copy)
        finally:
            self.release(copy)

    def close(self) -> None:
        """Start no fetch any more; one that runs goes on to its end."""
        self._fetcher.shutdown(wait=False, cancel_futures=True)

    def count(self, copy: _Copy, change: int) -> None:
        """One more or one fewer who uses a copy."""
        with self._users:
            copy.users += change

    def release(self, copy: _Copy) -> None:
        """One fewer who uses a copy; one that could not be fetched is forgotten with its last user."""
        with self._lock:
            self.count(copy, -1)
            if not copy.users and not copy.fetching:
                self._copies.pop(copy.folder.name, None)

    def fetched(self, copy: _Copy, what: str, patience: float | None) -> None:
        """Wait until files of a copy that the caller holds are there."""
        with self._lock:
            fetching = copy.fetching.get(what)
            if fetching is None:
                files = copy.sidecar if what == "sidecar" else copy.parts
                size = sum(file.size for file in files)
                self._make_room(copy, size)
                self._room(size)
                copy.size += size
                self.count(copy, 1)
                fetching = copy.fetching[what] = self._fetcher.submit(self._fetch, copy, what, files)
        try:
            fetching.result(patience)
        except FutureTimeout as error:
            raise IndexBuildInProgress("The files of this export are being fetched; ask again in a moment.") from error

    def _new_copy(self, job: JobRecord) -> _Copy:
        return _Copy(self._folder / job.id, job)

    def _make_room(self, copy: _Copy, size: int) -> None:
        if copy.size + size > self._capacity:
            raise CapsuleUnreadable(
                f"This export has {copy.size + size:,} bytes; at most {self._capacity:,} are fetched for reading."
            )
        for job_id, other in list(self._copies.items()):
            if sum(kept.size for kept in self._copies.values()) + size <= self._capacity:
                return
            with self._users:
                used = other.users > 0  # nobody begins to hold it without our lock
            if not used:
                del self._copies[job_id]
                self._forget(other.path)
                shutil.rmtree(other.folder)
        if sum(kept.size for kept in self._copies.values()) + size > self._capacity:
            raise TimedOut("Too many exports are read at once; ask again in a moment.")

    def _fetch(self, copy: _Copy, what: str, files: list[_File]) -> None:
        temporary = copy.folder.with_name(f".{copy.folder.name}.{what}")
        try:
            temporary.mkdir()
            with self._reading(copy.job):
                for file in files:
                    ref = ref_of(copy.prefix, file.name)
                    fetched = self._storage.local(ref, temporary, size=file.size, sha256=file.sha256)
                    fetched.rename(temporary / file.name)
            if what == "sidecar":
                (temporary / f"{copy.path.name}.manifest.json").write_bytes(msgspec.json.encode(copy.manifest))
                temporary.rename(copy.folder)
            else:
                for file in files:
                    (temporary / file.name).rename(copy.folder / file.name)
                temporary.rmdir()
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)  # before another may begin
            with self._lock:
                copy.size -= sum(file.size for file in files)
                del copy.fetching[what]
            if isinstance(error, ObjectMissing | PayloadMismatch | InvalidRef):
                text = f"The files of this export are not what they should be: {error.message}"
                raise CapsuleUnreadable(text) from error
            if isinstance(error, AccessDenied):
                raise StorageFailed(f"The files of this export cannot be fetched: {error.message}") from error
            if isinstance(error, OSError):
                raise StorageFailed(f"The files of this export cannot be kept: {error.strerror}") from error
            raise
        finally:
            self.release(copy)


def _in_place(place: Path | JobRecord) -> Path | None:
    if isinstance(place, Path):
        return place
    assert place.output is not None
    ref = urlsplit(place.output.artifact_ref)
    return Path(unquote(ref.path)) if ref.scheme == "file" else None
