"""Reads what is stored again and compares it with its hashes.

A pass looks at the files of every completed job once: that they are there, of the size and the SHA-256 that the job's
record names, and that the manifest says what the record says. A pass takes half of ``scrub_seconds``, so what was
stored after one began is still read within the whole. Each server makes passes of its own: that two servers read the
same file is accepted, as there is no lease then that a dead one could hold.

What differs is told in the log and in metrics and, but for a sidecar, noted with the job, which then gives its files to
nobody; nothing is deleted. A store that is away says nothing about its files. A later pass that finds all as it should
be takes the note back. A record whose own columns are damaged is written anew from the manifest, where every file still
is what that says.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from common.contract import Manifest
from common.errors import CapsuleUnreadable, ExportError, GateFailed, InvalidRef, ObjectMissing
from common.settings import Settings
from common.storage import Storage
from control_plane.jobs.layout import Layout
from control_plane.jobs.records import JobRecord
from control_plane.jobs.store import JobStore, now_ms
from control_plane.operations.metrics import Metrics
from handler.job import MAX_MANIFEST_BYTES, check_bytes, files_of, published, read_manifest, ref_of, same_manifest

log = structlog.get_logger()

SLOWEST, FASTEST = 4_000_000, 100_000_000
"""Bytes a second: a store ends connections that take nothing for long, and others want to read too."""
AGAIN_SECONDS = 30.0
"""After a database that is away, or a pass of an empty store, at most."""


class Wrong(Exception):
    """A stored file differs; ``file`` is capsule, sidecar, manifest or record."""

    def __init__(self, file: str, what: str) -> None:
        super().__init__(what)
        self.file = file
        self.what = what


class Scrub:
    """A loop of passes."""

    def __init__(self, settings: Settings, store: JobStore, storage: Storage, layout: Layout, metrics: Metrics) -> None:
        self._pass_seconds = settings.scrub_seconds / 2
        self._turn_seconds = self._pass_seconds
        self._store = store
        self._storage = storage
        self._layout = layout
        self._metrics = metrics

    async def run(self) -> None:
        """Scrub until canceled."""
        while True:
            try:
                await self._pass()
            except SQLAlchemyError as error:
                log.error("scrubbing waits for the database", again_in_seconds=AGAIN_SECONDS, exc_info=error)
                await asyncio.sleep(min(AGAIN_SECONDS, self._pass_seconds))

    async def _pass(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        jobs = sorted(await self._store.completed())
        # Servers that are started again and again begin elsewhere each time, so that each file has its turn.
        first = random.randrange(len(jobs)) if jobs else 0  # noqa: S311
        self._turn_seconds = self._pass_seconds / max(1, len(jobs))
        damaged = 0
        for place, job_id in enumerate(jobs[first:] + jobs[:first], 1):
            job = await self._store.get(job_id)
            if job is not None and _has_files(job):
                damaged += not await self._look(job)
            await asyncio.sleep(began + place * self._turn_seconds - loop.time())
        took = loop.time() - began
        if jobs:
            log.info("scrubbed", jobs=len(jobs), damaged=damaged, seconds=round(took, 1))
        if took > 2 * self._pass_seconds:
            log.warning("scrubbing takes longer than it may", seconds=round(took), limit=2 * self._pass_seconds)
        await asyncio.sleep(max(0.05, min(AGAIN_SECONDS, self._pass_seconds) if not jobs else 0))

    async def _look(self, job: JobRecord) -> bool:
        """Whether the files of a job are what they should be, as far as that can be told now."""
        try:
            whole = await self._check(job)
        except Wrong as wrong:
            now = await self._store.get(job.id)
            if now is None or now.attempt != job.attempt or not _has_files(now):
                return True  # they were removed meanwhile
            # Without its sidecar the capsule is whole, and the sidecar is made anew from it by whoever reads it.
            if wrong.file == "sidecar" or await self._store.damaged(job.id, wrong.what):
                self._metrics.damage.labels(wrong.file).inc()
                log.error("stored files are damaged", job_id=job.id, file=wrong.file, what=wrong.what)
            return False
        except ExportError as error:
            log.warning("stored files cannot be read now", job_id=job.id, code=error.code, reason=error.message)
            return True
        if job.damage is not None and await self._store.whole(whole):
            log.info("stored files are whole again", job_id=job.id)
        return True

    async def _check(self, job: JobRecord) -> JobRecord:
        """The job as its record should be. Raises Wrong."""
        if job.manifest is None or job.output is None:
            return await asyncio.to_thread(self._of_storage, job)
        prefix = job.output.artifact_ref.rpartition("/")[0] + "/"
        for name, size, sha256 in files_of(job.manifest):
            file = "sidecar" if name == job.manifest.sidecar_file_name else "capsule"
            await self._compare(file, ref_of(prefix, name), name, size, sha256)
        await asyncio.to_thread(self._compare_manifest, job.output.manifest_ref, job.manifest)
        return job

    async def _compare(self, file: str, ref: str, name: str, size: int, sha256: str) -> None:
        there = await asyncio.to_thread(self._storage.size, ref)
        if there is None:
            raise Wrong(file, f"{name} is missing")
        if there != size:
            raise Wrong(file, f"{name} has {there:,} bytes, {size:,} were published")
        rate = min(FASTEST, max(SLOWEST, size / self._turn_seconds))
        digest = hashlib.sha256()
        pieces = self._storage.read(ref, 0, size)
        loop = asyncio.get_running_loop()
        began, done = loop.time(), 0
        while (piece := await asyncio.to_thread(_next_of, pieces, digest)) > 0:
            done += piece
            self._metrics.scrubbed.inc(piece)
            await asyncio.sleep(began + done / rate - loop.time())
        if digest.hexdigest() != sha256:
            raise Wrong(file, f"{name} is not what was published (SHA-256)")

    def _compare_manifest(self, ref: str, expected: Manifest) -> None:
        size = self._storage.size(ref)
        if size is None:
            raise Wrong("manifest", "the manifest is missing")
        if not 0 < size <= MAX_MANIFEST_BYTES:
            raise Wrong("manifest", f"the manifest has {size:,} bytes")
        try:
            found = read_manifest(self._storage, ref)
        except CapsuleUnreadable as error:
            raise Wrong("manifest", "the manifest cannot be read") from error
        if not same_manifest(found, expected):
            raise Wrong("manifest", "the manifest is not what was published")

    def _of_storage(self, job: JobRecord) -> JobRecord:
        """The job with what lies in storage in the place of damaged columns. Raises Wrong where that is not whole."""
        prefix = self._layout.output_prefix(job.id, job.attempt)
        try:
            found = published(self._storage, prefix, job.id)
            if found is None:
                raise Wrong("record", f"{job.damage or 'its record is damaged'}, and there are no files of it")
            check_bytes(self._storage, prefix, found.manifest, job.payload_sha256)
        except (CapsuleUnreadable, GateFailed, ObjectMissing, InvalidRef) as error:
            raise Wrong("record", f"its record is damaged, and so are its files: {error.message}") from error
        return replace(job, output=found.output, manifest=found.manifest)


def _next_of(pieces: Iterator[bytes], digest: Any) -> int:
    piece = next(pieces, b"")
    digest.update(piece)
    return len(piece)


def _has_files(job: JobRecord) -> bool:
    return job.status == "completed" and (job.expires_at is None or job.expires_at > now_ms())
