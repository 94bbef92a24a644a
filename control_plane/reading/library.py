"""Open capsules for the read tools: a bounded pool, each with a sidecar that belongs to it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from common.capsule.reader import CapsuleReader, properties
from common.contract import Manifest
from common.embedding.choice import Choice
from common.embedding.port import Embedder
from common.errors import CapsuleUnreadable, EmbeddingFailed, StorageFailed
from common.frames.model import Frame
from common.sidecar.open import Sidecar
from common.sidecar.rebuild import rebuild
from common.storage.file import sha256_of
from control_plane.errors import IndexBuildInProgress, TimedOut
from control_plane.jobs.records import JobRecord
from control_plane.reading.artifacts import Artifacts, Held
from control_plane.reading.inspect import Files, belongs, current_sidecar, vectors
from control_plane.reading.search import Vectors

PATIENCE = 2.0
"""Seconds that a question waits for files that are on their way, for an index that is being built, or for others."""
VECTORS_SECONDS = 10.0
"""That a question waits for vectors, and for the model that made them; words answer it where they come later."""
CONNECTIONS = 6
"""To one sidecar at most; each keeps up to 2 MB of it in memory."""
FRESH_SECONDS = 1.0
"""For so long after a look at its files a capsule is taken for the same."""


class OpenCapsule:
    """A capsule with a connection to its sidecar, for one thread at a time."""

    def __init__(self, opened: _Opened, sidecar: Sidecar) -> None:
        self.sidecar = sidecar
        self._opened = opened
        self._deadline = float("inf")
        self._waits = True

    @property
    def vectors(self) -> Vectors | None:
        """The capsule's vectors, None where it has none. Raises InvalidRequest for a model that is not here,
        EmbeddingFailed while it takes longer than ``VECTORS_SECONDS`` to open, and what ``Held.wait`` raises."""
        return self._opened.vectors()

    def frame(self, position: int) -> Frame:
        """The frame at a position. Raises CapsuleUnreadable, and what ``Held.wait`` raises."""
        part, frame_id = self.sidecar.locate(position)
        return self._opened.reader(part, wait=self._waits).frames(frame_id, 1)[0]

    def metadata(self, position: int) -> dict[str, Any]:
        """All properties of the frame at a position. Raises CapsuleUnreadable."""
        return properties(self.frame(position))

    def allow(self, seconds: float, *, waits: bool = True) -> None:
        """Give what follows this long; then queries end and ``check`` raises TimedOut. Who does not ``waits`` gets it
        from ``frame`` too where files have to be opened first."""
        self._deadline = time.monotonic() + seconds
        self._waits = waits
        self.sidecar.stop_when(lambda: time.monotonic() > self._deadline)

    def check(self) -> None:
        """Raise TimedOut when the time is over."""
        if time.monotonic() > self._deadline:
            raise TimedOut("The answer took too long; ask for less, or for a smaller depth.")


class _Opened:
    """What the connections to one capsule share; closed with the last of them."""

    def __init__(
        self,
        held: Held,
        engine: Callable[[Choice], Embedder],
        background: ThreadPoolExecutor,
        rebuilding: threading.Lock,
    ) -> None:
        """Open the sidecar, after rebuilding it where it is missing, damaged or of other bytes, one at a time. Raises
        CapsuleUnreadable, StorageFailed, TimedOut."""
        self._held = held
        self._engine = engine
        self._background = background
        self._files = files = Files(held.path, whole=held.whole)
        self._readers: dict[int, CapsuleReader] = {}
        self._reading = threading.Lock()
        self._vectors: Future[Vectors | None] | None = None
        self._vectors_lock = threading.Lock()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        _check_published(files, held.published)
        path = files.sidecar_path
        sidecar = current_sidecar(files, held.published or files.manifest)
        if sidecar is None:
            held.wait(None)
            with rebuilding:  # takes a lot of memory
                path = self._rebuilt(path)
            sidecar = Sidecar.open(path)
        self.sidecar_path = path
        self._free = [OpenCapsule(self, sidecar)]
        self._count = 1
        self._closed = False
        self._changed = threading.Condition()

    def _rebuilt(self, path: Path) -> Path:
        """Where a new sidecar lies: at ``path``, or in a folder of its own where it may not lie there."""
        folder = tempfile.TemporaryDirectory(prefix="memvid-export-")
        own = Path(folder.name) / path.name
        try:
            rebuild(self._files.parts, own)
            beside = os.access(path.parent, os.W_OK) and belongs(own, self._files.manifest)
            if beside:
                _put(own, path)
        except BaseException:
            folder.cleanup()
            raise
        if beside:
            folder.cleanup()
            return path
        self._folder = folder
        return own

    def take(self) -> OpenCapsule:
        """A connection that nobody uses. Raises TimedOut, CapsuleUnreadable."""
        with self._changed:
            if (
                not self._free
                and self._count == CONNECTIONS
                and not self._changed.wait_for(lambda: self._free, PATIENCE)
            ):
                raise TimedOut("This capsule is busy with other questions; try again.")
            if self._free:
                return self._free.pop()
            self._count += 1
        try:
            return OpenCapsule(self, Sidecar.open(self.sidecar_path))
        except BaseException:
            with self._changed:
                self._count -= 1
                self._close_if_done()
            raise

    def take_free(self) -> OpenCapsule | None:
        """A connection that nobody uses, if there is one just now."""
        with self._changed:
            return self._free.pop() if self._free else None

    def give_back(self, capsule: OpenCapsule) -> None:
        """The end of one use."""
        with self._changed:
            self._free.append(capsule)
            self._changed.notify()
            self._close_if_done()

    def close(self) -> None:
        """Close every file as soon as nobody uses any. Idempotent."""
        with self._changed:
            self._closed = True
            self._close_if_done()

    def _close_if_done(self) -> None:
        if not self._closed:
            return
        for capsule in self._free:
            capsule.sidecar.close()
        self._count -= len(self._free)
        self._free.clear()
        if self._count:
            return
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        if self._folder:
            self._folder.cleanup()

    def reader(self, part: int, *, wait: bool) -> CapsuleReader:
        """The open file of a part. Raises CapsuleUnreadable and what ``Held.wait`` does; TimedOut where it has to be
        opened and nobody is to ``wait`` for that."""
        reader = self._readers.get(part)
        if reader is not None:
            return reader
        if not wait:
            raise TimedOut("A file of this capsule has to be opened first.")
        self._held.wait(PATIENCE)
        with self._reading:
            if part not in self._readers:
                _check_part(self._files.parts[part], part, self._held.published)
                self._readers[part] = CapsuleReader(self._files.parts[part])
            return self._readers[part]

    def vectors(self) -> Vectors | None:
        """See ``OpenCapsule.vectors``; read once, for the first who asks, while others wait."""
        with self._vectors_lock:
            if self._vectors is None:
                self._held.hold()  # they are read to the end though the question that needs them has given up
                self._vectors = self._background.submit(self._read_vectors)
            reading = self._vectors
        wait([reading], VECTORS_SECONDS)
        if not reading.done():
            raise EmbeddingFailed(
                "The vectors of this capsule, or their model, are being opened; ask again in a moment."
            )
        try:
            return reading.result()
        except BaseException:
            with self._vectors_lock:  # the next question tries again
                if self._vectors is reading:
                    self._vectors = None
            raise

    def _read_vectors(self) -> Vectors | None:
        try:
            self._held.wait(PATIENCE)
            with closing(Sidecar.open(self.sidecar_path)) as sidecar:
                return vectors(self._files, sidecar, self._engine)
        finally:
            self._held.release()


def _check_published(files: Files, published: Manifest | None) -> None:
    """Raise CapsuleUnreadable where the files of a job are others than it has published."""
    if published is None:
        return
    found = files.manifest
    if found is None or (found.parts, found.sidecar_sha256) != (published.parts, published.sidecar_sha256):
        raise CapsuleUnreadable("The manifest of this export is not the one that was published")
    for path, part in zip(files.parts, published.parts, strict=True):
        if path.stat().st_size != part.size_bytes:
            raise CapsuleUnreadable(f"{path.name} is not what was published (size)")


def _check_part(path: Path, part: int, published: Manifest | None) -> None:
    """Raise CapsuleUnreadable where a part of a job's capsule is not what was published; reads all of it."""
    if published is None:
        return
    if sha256_of(path) != published.parts[part].sha256:
        raise CapsuleUnreadable(f"{path.name} is not what was published (SHA-256)")


def _put(sidecar: Path, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        shutil.copyfile(sidecar, temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageFailed(f"Cannot write the sidecar {path.name}: {error.strerror}") from error


class _Entry:
    def __init__(self, opening: Future[_Opened]) -> None:
        self.opening = opening
        self.users = 0
        self.damaged = False
        self.seen = 0.0
        """When its files were last found to be the same."""


@contextmanager
def _noting(entry: _Entry) -> Iterator[None]:
    """Remember that the sidecar turned out to be damaged; a query that was ended says nothing about it."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        entry.damaged = entry.damaged or not was_ended(error)
        raise


def was_ended(error: sqlite3.DatabaseError) -> bool:
    """Whether a query was ended because its time was over; all else that a sidecar raises means that it is damaged."""
    return isinstance(error, sqlite3.OperationalError) and "interrupted" in str(error)


class Library:
    """Keeps the ``capacity`` capsules that were read last open; safe for many threads."""

    def __init__(self, artifacts: Artifacts, engine: Callable[[Choice], Embedder], *, capacity: int) -> None:
        """Files of exports that lie elsewhere come through ``artifacts``, engines for questions through ``engine``."""
        self._artifacts = artifacts
        self._engine = engine
        self._capacity = capacity
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[object, ...], _Entry] = OrderedDict()
        self._at_hand: dict[str, _Entry] = {}
        # So many that a capsule whose index is there never waits for one whose index is built or fetched.
        self._opener = ThreadPoolExecutor(max(4, capacity), "capsule-opener")
        self._rebuilding = threading.Lock()
        artifacts.before_removal(self._forget)

    @contextmanager
    def lease(self, place: Path | JobRecord) -> Iterator[OpenCapsule]:
        """The open capsule of a file, or of a completed export, for one user at a time.

        Raises IndexBuildInProgress, CapsuleUnreadable, StorageFailed, TimedOut.
        """
        with self._artifacts.held(place, PATIENCE) as held, self._leased(held, _name(place)) as capsule:
            yield capsule

    @contextmanager
    def at_hand(self, place: Path | JobRecord) -> Iterator[OpenCapsule | None]:
        """As ``lease``, without waiting for anything and without a look at any file; None where that cannot be: the
        capsule is not open, was not leased within the last second, or all its connections are in use.

        A connection that it gives may be used on the event loop, where no question may take long.
        """
        with self._lock:
            entry = self._at_hand.get(_name(place))
            if entry is None or entry.damaged or time.monotonic() > entry.seen + FRESH_SECONDS:
                entry = None
            else:
                entry.users += 1
        if entry is None:
            yield None
            return
        opened = entry.opening.result()  # which is there, as the entry was seen
        capsule = opened.take_free()
        try:
            with _noting(entry):
                yield capsule
        finally:
            if capsule is not None:
                opened.give_back(capsule)
            with self._lock:
                entry.users -= 1

    @contextmanager
    def lease_all(self, places: Mapping[str, Path | JobRecord]) -> Iterator[list[tuple[str, OpenCapsule]]]:
        """Open capsules with the names that they are given, in that order; one that has two comes once, by its first.

        All are leased in the order of their paths, so that no two users wait for each other. Raises as ``lease``.
        """
        named: dict[Path, str] = {}
        for name, place in places.items():
            named.setdefault(self._artifacts.path(place), name)
        with ExitStack() as leases:
            opened = {name: leases.enter_context(self.lease(places[name])) for _, name in sorted(named.items())}
            yield [(name, opened[name]) for name in named.values()]

    @contextmanager
    def _leased(self, held: Held, name: str) -> Iterator[OpenCapsule]:
        try:
            stat = held.mark.stat()
        except OSError as error:
            raise CapsuleUnreadable(f"There is no capsule {held.path.name}") from error
        key = (str(held.path), stat.st_ino, stat.st_size, stat.st_mtime_ns, *_mark_of_sidecar(held))
        entry = self._entry(key, held)
        try:
            opened = self._opened(key, entry)
            try:
                capsule = opened.take()
            except CapsuleUnreadable as error:
                entry.damaged = True
                raise IndexBuildInProgress("The index of this capsule is built anew; ask again.") from error
            with self._lock:
                entry.seen = time.monotonic()
                self._at_hand[name] = entry
            try:
                with _noting(entry):
                    yield capsule
            finally:
                opened.give_back(capsule)
        finally:
            with self._lock:
                entry.users -= 1
                self._shrink()

    def discard(self, place: Path | JobRecord) -> None:
        """Remove the sidecar of a capsule where it turned out to be damaged: the next reader rebuilds it."""
        path = self._artifacts.path(place)
        with self._lock:
            damaged = [key for key, entry in self._entries.items() if key[0] == str(path) and entry.damaged]
            for key in damaged:
                entry = self._entries.pop(key)
                entry.opening.result().sidecar_path.unlink(missing_ok=True)
                self._retire(entry)

    def _forget(self, path: Path) -> None:
        """Close a capsule whose files are about to be removed."""
        with self._lock:
            for key, entry in list(self._entries.items()):
                if key[0] == str(path) and entry.users == 0:
                    self._retire(self._entries.pop(key))

    def close(self) -> None:
        """Close every capsule; nothing may be leased any more."""
        self._opener.shutdown(cancel_futures=True)
        with self._lock:
            while self._entries:
                self._retire(self._entries.popitem()[1])

    def _entry(self, key: tuple[object, ...], held: Held) -> _Entry:
        def open_capsule() -> _Opened:
            try:
                return _Opened(held, self._engine, self._opener, self._rebuilding)
            finally:
                held.release()

        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.damaged:
                self._retire(self._entries.pop(key))
                entry = None
            if entry is None:
                self._retire_removed()
                held.hold()  # the opener goes on when the question that needs it has given up
                entry = self._entries[key] = _Entry(self._opener.submit(open_capsule))
            self._entries.move_to_end(key)
            entry.users += 1
            return entry

    def _opened(self, key: tuple[object, ...], entry: _Entry) -> _Opened:
        try:
            return entry.opening.result(PATIENCE)
        except FutureTimeout as error:
            raise IndexBuildInProgress("The index of this capsule is being built; ask again in a moment.") from error
        except BaseException:  # the next question tries again
            with self._lock:
                if self._entries.get(key) is entry:  # another may have begun again meanwhile
                    del self._entries[key]
            raise

    def _shrink(self) -> None:
        for key, entry in list(self._entries.items()):
            if len(self._entries) <= self._capacity:
                return
            if entry.users == 0:
                self._retire(self._entries.pop(key))

    def _retire_removed(self) -> None:
        """Close capsules whose files were removed, with an export that expired, say: open files keep their space."""
        for key, entry in list(self._entries.items()):
            opened = entry.opening.done() and not entry.opening.exception() and entry.opening.result()
            if entry.users == 0 and opened and not opened.sidecar_path.exists():
                self._retire(self._entries.pop(key))

    def _retire(self, entry: _Entry) -> None:
        """Close what an entry holds once nobody uses it; one that is still being opened closes itself."""
        for name in [name for name, known in self._at_hand.items() if known is entry]:
            del self._at_hand[name]
        entry.opening.add_done_callback(
            lambda done: None if done.cancelled() or done.exception() else done.result().close()
        )


def _mark_of_sidecar(held: Held) -> tuple[int, ...]:
    """Other numbers as soon as the sidecar of a job was changed in place."""
    if held.published is None:
        return ()
    try:
        stat = held.path.with_name(held.published.sidecar_file_name).stat()
    except OSError:
        return ()  # it is rebuilt
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _name(place: Path | JobRecord) -> str:
    return str(place) if isinstance(place, Path) else place.id
