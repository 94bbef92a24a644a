"""Finished exports become collections: one document for each node frame, read from the stored capsule.

A collection holds what the newest export that names it holds, and what clients wrote: a document that a client wrote
is neither changed nor deleted here. The hash of what an export wrote stands in the document's row, so a document that
another export has just so keeps its version, and an import that ended at any point begins anew and finds most of its
work done. One is made at a time, by the replica that keeps the graph in step.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
import tempfile
from array import array
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray
from sqlalchemy.exc import SQLAlchemyError

from common.capsule.reader import CapsuleReader, properties
from common.contract import Manifest, ManifestPart
from common.errors import (
    AccessDenied,
    ExportError,
    InvalidRef,
    InvalidRequest,
    ObjectMissing,
    PayloadMismatch,
    Retry,
    StorageFailed,
)
from common.frames.model import Frame
from common.storage import Storage
from control_plane.errors import ArtifactMissing, DocumentNotFound, QueueUnavailable
from control_plane.jobs.database import AWAY
from control_plane.jobs.holds import manifest_of, ref_beside
from control_plane.jobs.records import JobRecord
from control_plane.jobs.store import now_ms
from control_plane.nexus import records
from control_plane.nexus.imports import TRIES, Imports
from control_plane.nexus.incoming import MAX_ID, MAX_TITLE, Incoming
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.records import Vector
from control_plane.nexus.store import STEP, CollectionStore, LeaseLost
from control_plane.nexus.texts import Texts
from handler.protocol import job_error

log = structlog.get_logger()

BATCH = 200
"""Documents of one transaction."""
LOOK_SECONDS = 1.0
"""Between two looks where nothing is due."""
MAX_VALUE = 1_000
"""Characters of a text in a payload."""
_NODES = frozenset({"node", "community", "process"})
_NO_TYPE = re.compile(r"[^A-Za-z0-9._-]+")
_HASHED = 32
"""Hex digits that stand for what is left out of an id."""


class Superseded(ExportError):
    """A newer export is in the collection already."""

    code = "SUPERSEDED"
    retry = Retry.never


class Brought(NamedTuple):
    """The document of a frame."""

    incoming: Incoming
    digest: str
    """Of all but the job: equal where nothing is to be written."""


class Importer:
    """Makes collections of exports."""

    def __init__(
        self,
        imports: Imports,
        store: CollectionStore,
        storage: Storage,
        folder: Path,
        *,
        reading: Callable[[Collection[JobRecord]], AbstractAsyncContextManager[None]],
        room: Callable[[int], None],
        texts: Texts,
        wake: Callable[[], None],
        metrics: NexusMetrics,
    ) -> None:
        """``folder`` is for files that have to be fetched, one at a time: ``room`` raises where the disk has none for
        so many bytes. ``reading`` keeps the files of jobs in the storage; ``wake`` hears that documents were
        written."""
        self._imports = imports
        self._store = store
        self._storage = storage
        self._folder = folder
        self._reading = reading
        self._room = room
        self._texts = texts
        self._wake = wake
        self._metrics = metrics
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed

    async def run(self) -> None:
        """Import what is due until canceled."""
        while True:
            try:
                if await self.step():
                    continue
            except LeaseLost:
                log.info("another replica brings exports into collections")
            except SQLAlchemyError as error:
                log.error("imports wait for the database", exc_info=error)
            await asyncio.sleep(LOOK_SECONDS)

    async def step(self) -> bool:
        """Import the export that is due first; whether there was one. Raises LeaseLost, SQLAlchemyError."""
        job = await self._imports.due()
        if job is None:
            return False
        attempt = await self._imports.begin(job)
        try:
            if attempt > TRIES.most:
                raise ExportError(f"The server ended {TRIES.most} times in the middle of it.")
            count = await self._import(job)
        except LeaseLost:
            raise
        except AWAY as error:
            log.error("an import waits for the database", job_id=job.id, exc_info=error)
            await self._failed(job, attempt, QueueUnavailable("The database does not answer now."))
        except ExportError as error:
            await self._failed(job, attempt, error)
        except Exception as error:  # one odd capsule, and no export would become a collection any more
            log.error("an import failed", job_id=job.id, exc_info=error)
            await self._failed(job, attempt, ExportError("Something went wrong on our side; the log has it."))
        else:
            await self._imports.done(job)
            self._metrics.imports.labels("done").inc()
            log.info("an export is a collection", job_id=job.id, collection=job.collection, documents=count)
        return True

    async def _failed(self, job: JobRecord, attempt: int, error: ExportError) -> None:
        told = job_error(error)
        again = error.retryable and attempt < TRIES.most
        if again:
            await self._imports.again(job, told, TRIES.wait(attempt))
        else:
            await self._imports.failed(job, told)
        self._metrics.imports.labels("retried" if again else "failed").inc()
        log.warning("an export is no collection", job_id=job.id, attempt=attempt, again=again, code=error.code)

    async def _import(self, job: JobRecord) -> int:
        """Answers how many documents the collection has of the export."""
        assert job.collection is not None
        if newer := await self._imports.newer(job):
            raise Superseded(f"The newer export {newer} is in this collection already.", jobId=newer)
        manifest = manifest_of(job)
        async with self._reading([job]):
            model, dimension = await self._model(manifest)
            collection, _ = await self._store.put_collection(job.client, job.collection, model, dimension)
            kept = array("Q")
            async with aclosing(self._documents(job, manifest)) as batches:
                async for batch in batches:
                    await self._write(collection, batch)
                    kept.extend(_mark(one.incoming.doc_id) for one in batch)
                    await self._imports.brought(job, len(kept))
            await self._delete_others(collection, kept)
        return len(kept)

    async def _model(self, manifest: Manifest) -> tuple[str, int]:
        """Whose vectors the documents get, and their dimension."""
        if manifest.vectors:
            if not (manifest.dimension and manifest.embedding_model):
                raise ArtifactMissing("The manifest of this export does not say whose vectors it has.")
            name = filter(None, (manifest.embedding_provider, manifest.embedding_model))
            return "/".join(name), manifest.dimension
        try:
            return await asyncio.to_thread(self._texts.model)
        except InvalidRequest as error:
            message = f"options.semanticEnabled: must be true, as texts are not embedded here: {error.__cause__}"
            raise InvalidRequest(message, field="options.semanticEnabled") from error

    # --- documents ---------------------------------------------------------------------------------------------------

    async def _documents(self, job: JobRecord, manifest: Manifest) -> AsyncGenerator[list[Brought]]:
        """Those of all node frames; of an export with vectors those that have one."""
        for part in manifest.parts:
            folder = await asyncio.to_thread(self._made)
            try:
                path = await asyncio.to_thread(self._fetched, job, part, folder)
                opened = await asyncio.to_thread(_Part, path, job, semantic=manifest.vectors > 0)
                with opened.reader:
                    for start in range(0, opened.reader.frame_count, BATCH):
                        batch, more = await asyncio.to_thread(opened.documents, start)
                        if batch:
                            yield batch
                        if not more:
                            return
            finally:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _made(self) -> Path:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(dir=self._folder))
        except OSError as error:
            raise StorageFailed(f"There is no room for files of exports: {error.strerror}") from error

    def _fetched(self, job: JobRecord, part: ManifestPart, folder: Path) -> Path:
        """A file with a part of the capsule, its hash compared. Raises QueueUnavailable, StorageFailed,
        ArtifactMissing."""
        ref = ref_beside(job, part.file_name)
        if not ref.startswith("file:"):
            self._room(part.size_bytes)
        try:
            return self._storage.local(ref, folder, size=part.size_bytes, sha256=part.sha256)
        except (ObjectMissing, PayloadMismatch, InvalidRef) as error:
            raise ArtifactMissing(f"The files of this export are not what they should be: {error.message}") from error
        except AccessDenied as error:
            raise StorageFailed(f"The files of this export cannot be fetched: {error.message}") from error
        except OSError as error:
            raise StorageFailed(f"The files of this export cannot be kept: {error.strerror}") from error

    async def _write(self, collection: records.Collection, batch: Sequence[Brought]) -> None:
        """Write what is not there as it is, but for what clients wrote."""
        wanted = {one.incoming.doc_id: one for one in batch}
        while True:
            there = await self._store.exported(collection, list(wanted))
            changed = [one for doc_id, one in wanted.items() if there.get(doc_id) not in ("", one.digest)]
            if not changed:
                return
            new = await asyncio.to_thread(self._texts.complete, collection, [one.incoming for one in changed])
            new = [one._replace(exported=of.digest) for one, of in zip(new, changed, strict=True)]
            try:
                await self._store.write(collection, new, now=now_ms(), leading=True)
            except DocumentNotFound:  # a client wrote one of them just now
                continue
            self._wake()
            return

    async def _delete_others(self, collection: records.Collection, kept: array[int]) -> None:
        """Delete what earlier exports wrote and this one has not."""
        marks = np.array(kept, dtype=np.uint64)
        after = 0
        while page := await self._store.exported_after(collection, after, STEP):
            after = page[-1][0]
            ours = np.isin(np.array([_mark(doc_id) for _, doc_id in page], dtype=np.uint64), marks)
            gone = [doc_id for (_, doc_id), stays in zip(page, ours, strict=True) if not stays]
            if gone:
                await self._store.delete(collection, gone, now=now_ms(), exported=True)
                self._wake()


class _Part:
    """A part of a capsule that is read."""

    def __init__(self, path: Path, job: JobRecord, *, semantic: bool) -> None:
        """Raises CapsuleUnreadable."""
        self.reader = CapsuleReader(path)
        self._job = job
        self._rows: dict[int, int] | None = None
        self._matrix: NDArray[np.float32] | None = None
        if semantic:
            found = self.reader.vectors()
            self._rows = {} if found is None else {int(at): row for row, at in enumerate(found[0])}
            self._matrix = None if found is None else found[1]

    def documents(self, start: int) -> tuple[list[Brought], bool]:
        """Those of ``BATCH`` frames from one on, and whether there may be more after these: relations come last."""
        found = []
        frames = self.reader.frames(start, BATCH)
        for number, frame in enumerate(frames, start):
            if frame.kind not in _NODES or (self._rows is not None and number not in self._rows):
                continue
            vector = None
            if self._rows is not None and self._matrix is not None:
                vector = self._matrix[self._rows[number]]
            found.append(document_of(frame, self._job, vector))
        return found, not frames or frames[-1].kind != "relation"


def document_of(frame: Frame, job: JobRecord, vector: Vector | None) -> Brought:
    """The document of a node's frame."""
    known = properties(frame)
    node_id, label, name = (_cut(known.get(key)) or "" for key in ("id", "label", "name"))
    whole_id = known.get("id")
    doc_id = doc_id_of(whole_id if isinstance(whole_id, str) else frame.uri)
    path = _cut(known.get("filePath"))
    _, _, snippet = frame.text[: frame.text.rfind("\n") + 1].partition("\n\nsnippet:\n")
    title = frame.title[:MAX_TITLE]
    text = "\n".join([name or title, path or "", "", snippet]).rstrip()
    lines = {key: known[key] for key in ("startLine", "endLine") if isinstance(known.get(key), int)}
    payload: dict[str, Any] = {"label": label, "name": name, "project": _cut(job.project_name)}
    payload |= ({} if path is None else {"path": path}) | lines | ({} if doc_id == node_id else {"nodeId": node_id})
    doc_type = _NO_TYPE.sub("_", label)[:64]
    said = msgspec.json.encode([title, text, payload, doc_type])
    digest = hashlib.sha256(said + (b"" if vector is None else vector.tobytes())).hexdigest()
    given = Incoming("", doc_id, title, text, {**payload, "jobId": job.id}, doc_type, (), vector)
    return Brought(given, digest)


def doc_id_of(node_id: str) -> str:
    """The id of a node's document: the node's, or where that is none for a document, as much of it with a hash."""
    if 1 <= len(node_id) <= MAX_ID and node_id.isprintable() and node_id.strip("./"):
        return node_id
    seen = "".join(letter if letter.isprintable() else "_" for letter in node_id[: MAX_ID - _HASHED - 1])
    return f"{seen}~{hashlib.sha256(node_id.encode()).hexdigest()[:_HASHED]}"


def _mark(doc_id: str) -> int:
    """64 bits that stand for an id."""
    return int.from_bytes(hashlib.blake2b(doc_id.encode(), digest_size=8).digest())


def _cut(value: object) -> str | None:
    return value[:MAX_VALUE] if isinstance(value, str) else None
