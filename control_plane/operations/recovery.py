"""Finished exports that lie in storage while the job store knows nothing of them.

That is so after the job store was put back from a backup, or begun anew: jobs that came after the backup have no
record. What they published was promised to their clients, so it is not removed as a stray: each gets a record again,
``completed``, under its own id, until the retention is over since its manifest was written. Whose it was the storage
does not know: it belongs to the client ``recovered``, which keys of the scope ``admin`` see, and keys of that client.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable

import msgspec
import structlog

from common.contract import Progress
from common.errors import CapsuleUnreadable, ExportError
from common.settings import Settings
from common.storage import Storage
from control_plane.jobs.database import AWAY
from control_plane.jobs.layout import Layout
from control_plane.jobs.records import NewEvent, NewJob
from control_plane.jobs.store import JobStore, now_ms
from handler.job import MANIFEST_ENDING, MAX_ATTEMPT, Published, published

log = structlog.get_logger()

CLIENT = "recovered"


class Recovery:
    """Makes records for finished exports that have none."""

    def __init__(self, settings: Settings, store: JobStore, storage: Storage, layout: Layout) -> None:
        self._retention_seconds = settings.retention_seconds
        self._store = store
        self._storage = storage
        self._layout = layout

    async def all(self) -> dict[str, int]:
        """Look at all that is stored, and answer as ``of`` does. Raises ExportError where it cannot be listed."""
        found = await asyncio.to_thread(self._storage.found, self._layout.artifact_prefix)
        return await self.of(each.ref for each in found)

    async def of(self, refs: Iterable[str]) -> dict[str, int]:
        """Recover the exports whose manifests are among these refs; answers the jobs, with their attempts, that could
        not be looked at or noted: their files are no strays until the retention is over. Raises SQLAlchemyError where
        the database is away."""
        attempts: dict[str, int] = {}
        for ref in refs:
            job_id, attempt = self._place(ref)
            if job_id:
                attempts[job_id] = max(attempt, attempts.get(job_id, 0))
        recovered, left = 0, {}
        for job_id in sorted(await self._store.unknown(attempts)):
            try:
                recovered += await self._recover(job_id, attempts[job_id])
            except AWAY:
                raise
            except Exception as error:  # what one odd export holds keeps no other from its record
                log.error("an export cannot be recovered", job_id=job_id, exc_info=error)
                if await asyncio.to_thread(self._is_kept, self._layout.output_prefix(job_id, attempts[job_id])):
                    left[job_id] = attempts[job_id]
        if recovered:
            log.warning("exports were recovered that the job store did not know", count=recovered, client=CLIENT)
        return left

    def _place(self, ref: str) -> tuple[str, int]:
        """Job id and attempt of a manifest's ref; an empty id for any other."""
        if not (ref.startswith(self._layout.artifact_prefix) and ref.endswith(MANIFEST_ENDING)):
            return "", 0
        job_id, _, rest = ref.removeprefix(self._layout.artifact_prefix).partition("/")
        attempt, _, name = rest.partition("/")
        try:
            known = str(uuid.UUID(job_id)) == job_id and "/" not in name and 1 <= int(attempt) <= MAX_ATTEMPT
        except ValueError:
            known = False
        return (job_id, int(attempt)) if known else ("", 0)

    async def _recover(self, job_id: str, attempt: int) -> bool:
        prefix = self._layout.output_prefix(job_id, attempt)
        found, age = await asyncio.to_thread(self._look, prefix, job_id)
        finished = now_ms() - int(age * 1000)
        expires = finished + self._retention_seconds * 1000
        if found is None or expires <= now_ms():
            return False
        manifest, report = found.manifest, found.manifest.report
        message = f"Recovered from storage: {manifest.frames:,} frames"
        job = NewJob(
            id=job_id,
            backend=report.backend or "legacy_vps",
            weight=report.input.nodes + report.input.relationships,
            session_id=manifest.session_id,
            project_name=manifest.project_name,
            payload_ref=self._layout.payload_ref(job_id),
            payload_sha256=report.input.sha256,
            payload_size=report.input.bytes,
            message=message,
            meta={},
            base_name=manifest.source.base_name,
            client=CLIENT,
        )
        values = {
            "finished_at": finished,
            "expires_at": expires,
            "output": msgspec.json.encode(found.output).decode(),
            "manifest": msgspec.json.encode(manifest).decode(),
            "frames": manifest.frames,
        }
        meta = {"frames": manifest.frames, "vectors": manifest.vectors, "sizeBytes": found.output.size_bytes}
        progress = Progress(stage="download_ready", progress=100, stage_progress=100, message=message, meta=meta)
        made = await self._store.recover(job, attempt, values, NewEvent("job_completed", progress))
        if made:
            log.warning("export recovered", job_id=job_id, attempt=attempt, frames=manifest.frames)
        return made

    def _is_kept(self, prefix: str) -> bool:
        """Whether the retention of what lies there is not over, as far as the storage says."""
        try:
            return any(found.age < self._retention_seconds for found in self._storage.found(prefix))
        except ExportError:
            return True

    def _look(self, prefix: str, job_id: str) -> tuple[Published | None, float]:
        """What lies there, and its age in seconds."""
        ages = [found.age for found in self._storage.found(prefix) if found.ref.endswith(MANIFEST_ENDING)]
        try:
            return published(self._storage, prefix, job_id), min(ages, default=0.0)
        except CapsuleUnreadable as error:
            log.warning("an export is not recovered", job_id=job_id, code=error.code, reason=error.message)
            return None, 0.0
