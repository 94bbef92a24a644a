"""Open capsules for the read tools: a bounded pool, each with a sidecar that belongs to it."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from common.capsule.reader import CapsuleReader
from common.embedding.choice import Choice
from common.embedding.port import Embedder
from common.errors import CapsuleUnreadable
from common.frames.model import Frame
from common.sidecar.open import Sidecar
from common.sidecar.rebuild import capsule_sha256, rebuild
from control_plane.errors import IndexBuildInProgress, TimedOut
from control_plane.jobs.records import JobRecord
from control_plane.reading.artifacts import Artifacts, Held
from control_plane.reading.inspect import Files, vectors
from control_plane.reading.search import Vectors

PATIENCE = 2.0
"""Seconds that a question waits for files that are on their way, or for an index that is being built."""


class OpenCapsule:
    """A capsule with its sidecar, for one thread at a time."""

    def __init__(self, held: Held, engine: Callable[[Choice], Embedder]) -> None:
        """Open the sidecar, after rebuilding it where it is missing, damaged or of other bytes. Raises
        CapsuleUnreadable, StorageFailed, TimedOut."""
        self._held = held
        self._engine = engine
        self._files = files = Files(held.path, whole=held.whole)
        self._readers: dict[int, CapsuleReader] = {}
        self._vectors: Vectors | None = None
        self._vectors_read = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._deadline = float("inf")
        path, expected = files.sidecar_path, _expected(files)
        sidecar = _current(path, expected)
        if sidecar is None:
            if not os.access(path.parent, os.W_OK):
                self._folder = tempfile.TemporaryDirectory(prefix="memvid-export-")
                path = Path(self._folder.name) / path.name
            held.wait(None)
            rebuild(files.parts, path)
            sidecar = Sidecar.open(path)
        self.sidecar = sidecar

    @property
    def vectors(self) -> Vectors | None:
        """The capsule's vectors, None where it has none. Raises InvalidRequest for a model that is not here; and what
        ``Held.wait`` raises."""
        if not self._vectors_read:
            self._held.wait(PATIENCE)
            self._vectors = vectors(self._files, self.sidecar, self._engine)
            self._vectors_read = True
        return self._vectors

    def frame(self, position: int) -> Frame:
        """The frame at a position. Raises CapsuleUnreadable, and what ``Held.wait`` raises."""
        part, frame_id = self.sidecar.locate(position)
        if part not in self._readers:
            self._held.wait(PATIENCE)
            self._readers[part] = CapsuleReader(self._files.parts[part])
        return self._readers[part].frames(frame_id, 1)[0]

    def metadata(self, position: int) -> dict[str, Any]:
        """All properties of the frame at a position. Raises CapsuleUnreadable."""
        return msgspec.json.decode(self.frame(position).metadata, type=dict[str, Any])

    def allow(self, seconds: float) -> None:
        """Give what follows this long; then queries end and ``check`` raises TimedOut."""
        self._deadline = time.monotonic() + seconds
        self.sidecar.stop_when(lambda: time.monotonic() > self._deadline)

    def check(self) -> None:
        """Raise TimedOut when the time is over."""
        if time.monotonic() > self._deadline:
            raise TimedOut("The answer took too long; ask for less, or for a smaller depth.")

    def close(self) -> None:
        """Close every file. Idempotent."""
        self.sidecar.close()
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        if self._folder:
            self._folder.cleanup()


def _expected(files: Files) -> str:
    manifest = files.manifest
    sizes = [path.stat().st_size if path.is_file() else None for path in files.parts]
    if manifest and all(size in (None, part.size_bytes) for part, size in zip(manifest.parts, sizes, strict=True)):
        return manifest.capsule_sha256  # a part that is not here yet was not changed here either
    return capsule_sha256(files.parts)


def _current(path: Path, expected: str) -> Sidecar | None:
    try:
        sidecar = Sidecar.open(path)
    except CapsuleUnreadable:
        return None  # missing, damaged or of another version: it is rebuilt
    if sidecar.capsule_sha256 == expected:
        return sidecar
    sidecar.close()
    return None


class _Entry:
    def __init__(self, opening: Future[OpenCapsule]) -> None:
        self.opening = opening
        self.lock = threading.Lock()
        self.users = 0


class Library:
    """Keeps the ``capacity`` capsules that were read last open; safe for many threads."""

    def __init__(self, artifacts: Artifacts, engine: Callable[[Choice], Embedder], *, capacity: int) -> None:
        """Files of exports that lie elsewhere come through ``artifacts``, engines for questions through ``engine``."""
        self._artifacts = artifacts
        self._engine = engine
        self._capacity = capacity
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[object, ...], _Entry] = OrderedDict()
        self._opener = ThreadPoolExecutor(1, "capsule-opener")
        artifacts.before_removal(self._forget)

    @contextmanager
    def lease(self, place: Path | JobRecord) -> Iterator[OpenCapsule]:
        """The open capsule of a file, or of a completed export, for one user at a time.

        Raises IndexBuildInProgress, CapsuleUnreadable, StorageFailed, TimedOut.
        """
        with self._artifacts.held(place, PATIENCE) as held, self._leased(held) as capsule:
            yield capsule

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
    def _leased(self, held: Held) -> Iterator[OpenCapsule]:
        try:
            stat = held.mark.stat()
        except OSError as error:
            raise CapsuleUnreadable(f"There is no capsule {held.path.name}") from error
        key = (str(held.path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        entry = self._entry(key, held)
        try:
            capsule = self._opened(key, entry)
            if not entry.lock.acquire(timeout=PATIENCE):
                raise TimedOut("This capsule is busy with other questions; try again.")
            try:
                yield capsule
            finally:
                entry.lock.release()
        finally:
            with self._lock:
                entry.users -= 1
                self._shrink()

    def discard(self, place: Path | JobRecord) -> None:
        """Remove the sidecar of a capsule, which turned out to be damaged: the next reader rebuilds it."""
        path = self._artifacts.path(place)
        with self._lock:
            entries = [self._entries.pop(key) for key in list(self._entries) if key[0] == str(path)]
        for entry in entries:
            if entry.opening.done() and not entry.opening.exception():
                with entry.lock:
                    entry.opening.result().sidecar.path.unlink(missing_ok=True)
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
        def open_capsule() -> OpenCapsule:
            try:
                return OpenCapsule(held, self._engine)
            finally:
                held.release()

        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                held.hold()  # the opener goes on when the question that needs it has given up
                entry = self._entries[key] = _Entry(self._opener.submit(open_capsule))
            self._entries.move_to_end(key)
            entry.users += 1
            return entry

    def _opened(self, key: tuple[object, ...], entry: _Entry) -> OpenCapsule:
        try:
            return entry.opening.result(PATIENCE)
        except FutureTimeout as error:
            raise IndexBuildInProgress("The index of this capsule is being built; ask again in a moment.") from error
        except BaseException:  # the next question tries again
            with self._lock:
                self._entries.pop(key, None)
            raise

    def _shrink(self) -> None:
        for key, entry in list(self._entries.items()):
            if len(self._entries) <= self._capacity:
                return
            if entry.users == 0:
                self._retire(self._entries.pop(key))

    def _retire(self, entry: _Entry) -> None:
        """Close what an entry holds; one that is still being opened closes itself."""
        entry.opening.add_done_callback(
            lambda done: None if done.cancelled() or done.exception() else done.result().close()
        )
