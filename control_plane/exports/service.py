"""What clients can ask about jobs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import msgspec

from common.contract import EventPage, Job, JobPage, Manifest, Progress, Report, Status
from common.errors import InvalidRequest
from control_plane.backends.port import Backend
from control_plane.cursors import cursor_of, parse_cursor
from control_plane.errors import ArtifactMissing, JobNotFound
from control_plane.exports.downloads import Artifact, Download, Downloads
from control_plane.exports.stream import EventStream
from control_plane.exports.views import job_view, report_view
from control_plane.jobs.audit import AuditEntry
from control_plane.jobs.holds import manifest_of, ref_beside
from control_plane.jobs.hub import EventHub
from control_plane.jobs.records import JobRecord, NewEvent
from control_plane.jobs.store import JobStore
from control_plane.operations.keys import Caller
from control_plane.operations.shares import Shares

MAX_EVENTS = 2_000
MAX_PAGE = 200
_CURSOR = re.compile(r"([0-9]{1,15}):([0-9a-f-]{36})")


class ExportService:
    """Reads jobs, cancels them, hands out their files."""

    def __init__(
        self,
        store: JobStore,
        hub: EventHub,
        backend: Backend,
        *,
        downloads: Downloads,
        streams: Shares,
        note: Callable[[AuditEntry], None],
    ) -> None:
        """``note`` gets what belongs into the audit log."""
        self._store = store
        self._hub = hub
        self._backend = backend
        self._downloads = downloads
        self._streams = streams
        self._note = note

    async def record(self, caller: Caller, job_id: str) -> JobRecord:
        """One job. Raises JobNotFound, for a job of another client too: nothing tells the two apart."""
        return self._seen(caller, job_id, await self._store.get(job_id))

    def _seen(self, caller: Caller, job_id: str, job: JobRecord | None) -> JobRecord:
        if job is None or not caller.sees(job.client):
            raise JobNotFound("There is no export of this id.")
        if job.client != caller.client:
            self._note(caller.did("export.read", job_id))
        return job

    async def job(self, caller: Caller, job_id: str) -> Job:
        """One job as clients see it. Raises JobNotFound."""
        return await self._view(await self.record(caller, job_id))

    async def _view(self, job: JobRecord) -> Job:
        return job_view(job, (await self._retried_by([job])).get(job.id))

    async def _retried_by(self, jobs: Sequence[JobRecord]) -> dict[str, str]:
        return await self._store.retried_by([job.id for job in jobs if job.status == "failed"])

    async def list(self, caller: Caller, status: Status | None, cursor: str | None, limit: int) -> JobPage:
        """The jobs that a caller sees, newest first."""
        limit = min(max(limit, 1), MAX_PAGE)
        before = parse_cursor(cursor, _CURSOR) if cursor else None
        jobs = await self._store.page(status=status, before=before, limit=limit + 1, client=caller.only)
        following = cursor_of(jobs[limit - 1].created_at, jobs[limit - 1].id) if len(jobs) > limit else None
        retried = await self._retried_by(jobs)
        return JobPage(jobs=[job_view(job, retried.get(job.id)) for job in jobs[:limit]], next_cursor=following)

    async def events(self, caller: Caller, job_id: str, since: int, limit: int) -> EventPage:
        """Events above ``since``; ``nextSeq`` is the number of the first event that is not in this page."""
        events, found = await self._store.log(job_id, since, min(max(limit, 1), MAX_EVENTS))
        job = self._seen(caller, job_id, found)
        next_seq = events[-1].seq + 1 if events else min(since, job.last_seq) + 1
        return EventPage(job_id=job_id, events=events, next_seq=next_seq, status_snapshot=await self._view(job))

    async def stream(self, caller: Caller, job_id: str, since: int) -> EventStream:
        """The event stream of a job. Raises JobNotFound."""
        job = await self.record(caller, job_id)
        return EventStream(self._store, self._hub, job, since, shares=self._streams)

    async def cancel(self, caller: Caller, job_id: str) -> Job:
        """Cancel a job that has not ended; one that has answers as it is."""
        await self.record(caller, job_id)
        progress = Progress(stage="canceled", progress=0, stage_progress=100, message="Export canceled")
        moved = await self._store.move(
            job_id, "canceled", NewEvent("job_canceled", progress), entry=caller.did("export.cancel", job_id)
        )
        if moved is not None:
            await self._backend.cancel(job_id)
        return await self.job(caller, job_id)

    async def report(self, caller: Caller, job_id: str) -> Report:
        """The report of a job."""
        # What was counted before the 202 stands in the first event.
        first, found = await self._store.log(job_id, 0, 1)
        job = self._seen(caller, job_id, found)
        if job.status == "completed" and job.output is None:
            what = job.damage or "its record is damaged"
            raise ArtifactMissing(f"There is no report of this export: {what}.", damage=what)
        try:
            return report_view(job, first[0].meta if first else {})
        except msgspec.ValidationError as error:
            what = "its record is damaged"
            raise ArtifactMissing(f"There is no report of this export: {what}.", damage=what) from error

    async def download(self, caller: Caller, job_id: str, part: int, headers: Mapping[str, str]) -> Download:
        """A part of the capsule."""
        job, manifest = await self.finished(caller, job_id)
        if not 1 <= part <= len(manifest.parts):
            raise InvalidRequest(f"part must be 1 to {len(manifest.parts)}.", field="part", allowed=len(manifest.parts))
        found = manifest.parts[part - 1]
        artifact = Artifact(
            "capsule",
            ref_beside(job, found.file_name),
            found.file_name,
            "application/octet-stream",
            found.size_bytes,
            found.sha256,
        )
        return Download(self._downloads, job, artifact, headers, {"X-Capsule-Part": f"{part}/{len(manifest.parts)}"})

    async def sidecar(self, caller: Caller, job_id: str, headers: Mapping[str, str]) -> Download:
        """The SQLite index."""
        job, manifest = await self.finished(caller, job_id)
        name = manifest.sidecar_file_name
        artifact = Artifact(
            "sidecar",
            ref_beside(job, name),
            name,
            "application/vnd.sqlite3",
            manifest.sidecar_size_bytes,
            manifest.sidecar_sha256,
        )
        return Download(self._downloads, job, artifact, headers)

    async def manifest(self, caller: Caller, job_id: str, headers: Mapping[str, str]) -> Download:
        """The manifest, byte by byte as it was published."""
        job, manifest = await self.finished(caller, job_id)
        assert job.output is not None
        name = f"{manifest.parts[0].file_name}.manifest.json"
        artifact = Artifact("manifest", job.output.manifest_ref, name, "application/json", 0, "")
        return Download(self._downloads, job, artifact, headers)

    async def finished(self, caller: Caller, job_id: str) -> tuple[JobRecord, Manifest]:
        """A job whose files are there. Raises JobNotFound, JobExpired, ArtifactNotReady, ArtifactMissing."""
        job = await self.record(caller, job_id)
        return job, manifest_of(job)
