"""How attempts end, whatever backend ran them: completed, failed for good, or back in the queue for another one."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from common.contract import JobOutput, Manifest, Progress, Report, Stage, Status
from common.errors import ONCE, RULES, Canceled, CapsuleUnreadable, ExportError, ObjectMissing, Retry
from control_plane.backends.port import Means
from control_plane.jobs.database import db_now
from control_plane.jobs.records import CANARY_CLIENT, JobRecord, NewEvent
from control_plane.jobs.store import LEASE_MS, now_ms, started
from handler.claim import NAMES
from handler.job import published
from handler.logs import reason_of
from handler.protocol import job_error

log = structlog.get_logger()

CANARY_KEPT_SECONDS = 600
"""What a server's own canaries make is removed after so long."""
SETTLE_SECONDS = 1.0
"""Between two tries to record an end."""

_COLUMNS = {Retry.lost: "lost", Retry.timeout: "timeouts", Retry.transient: "retries", Retry.later: "retries"}
"""What counts the attempts of a job that ended so."""


class Endings:
    """Records ends and clears up behind them."""

    def __init__(self, means: Means, *, backend: str) -> None:
        self._settings, self._store, self._storage, self._layout, self._metrics = means
        self._backend = backend
        self.stopping = False
        """The server stops: what the database cannot take now is settled by whoever drives the job next."""

    async def complete(self, job: JobRecord, output: JobOutput, manifest: Manifest) -> bool:
        """The attempt has published its files; False if the job has ended otherwise."""
        now = now_ms()
        report = msgspec.convert(output.metrics, Report)
        report.backend, report.attempts = self._backend, job.attempt
        report.timings.queue = ((job.started_at or now) - job.created_at) / 1000
        if not report.timings.total:  # Found in storage, without word from the worker.
            report.timings.total = (now - (job.started_at or now)) / 1000
        output = msgspec.structs.replace(output, metrics=msgspec.to_builtins(report), progress=None)
        megabytes = output.size_bytes / 1_000_000
        message = f"Your capsule is ready: {manifest.frames:,} frames, {megabytes:,.1f} MB"
        meta = {"frames": manifest.frames, "vectors": manifest.vectors, "sizeBytes": output.size_bytes}
        moved = await self._settle(
            job,
            "completed",
            NewEvent("job_completed", step("download_ready", 100, message, meta)),
            backend=self._backend,
            output=msgspec.json.encode(output).decode(),
            manifest=msgspec.json.encode(manifest).decode(),
            frames=manifest.frames,
            expires_at=self._expires(job, now),
        )
        if not moved:
            await self._now_gone(job, "completed")
            return False
        self._metrics.completed(report, self._backend, (now - job.created_at) / 1000)
        await self._remove(
            self._layout.payload_ref(job.id),
            *(self._layout.output_prefix(job.id, attempt) for attempt in range(1, job.attempt)),
            *(self._layout.output_prefix(job.id, job.attempt) + name for name in NAMES),
        )
        return True

    async def failed(self, job: JobRecord, error: ExportError, *, counted: bool = True) -> float | None:
        """The attempt ended in an error: the job goes back to the queue where another attempt may help.

        Answers the seconds until the next attempt, None if there is none. ``counted`` False: it was not the job's
        fault nor the worker's, such as a stop of the server.
        """
        if isinstance(error, Canceled):
            return None
        if isinstance(error, ObjectMissing):
            try:
                if await self._published_before(job):
                    return None
                if await asyncio.to_thread(self._storage.size, job.payload_ref) is None:
                    error = ObjectMissing("The payload of this export is not in storage any more; send it again.")
            except ExportError as away:
                error = away
        rule = RULES[error.retry]
        tries = rule.runpod if self._backend == "runpod_queue" else rule.here
        column = _COLUMNS.get(error.retry)
        used: int = getattr(job, column) if column else 0
        if tries == ONCE or column is None or (counted and used + 1 >= (tries.most or self._settings.max_attempts)):
            if tries != ONCE:
                attempts = "attempt" if used == 0 else "attempts"
                error = type(error)(f"{error.message}; given up after {used + 1} {attempts}", **error.details)
            log.warning("export failed", job_id=job.id, code=error.code, reason=reason_of(error))
            await self._end(job, error)
            return None
        delay = tries.wait(used + 1) * random.uniform(0.75, 1.25)  # noqa: S311
        if counted:
            self._metrics.retries.labels(column).inc()
            log.warning("attempt failed", job_id=job.id, attempt=job.attempt, kind=column, reason=reason_of(error))
        else:
            delay = 0.0
        message = f"Waiting to start again: {error.message}"
        event = NewEvent("stage_progress", step("queued", 0, message, {"attempt": job.attempt}))
        values = {column: used + counted, "available_at": db_now() + int(delay * 1000)}
        if not await self._settle(job, "queued", event, **values):
            await self._now_gone(job, "queued")
            return None
        await asyncio.to_thread(self._clear_attempt, job)
        return delay

    async def _published_before(self, job: JobRecord) -> bool:
        """Complete a job whose payload is gone with what an attempt has published that the job store, put back from a
        backup, does not know of; False if there is nothing. Raises ExportError."""
        prefix = self._layout.job_prefix(job.id)
        refs = [found.ref for found in await asyncio.to_thread(self._storage.found, prefix)]
        names = {ref.removeprefix(prefix).partition("/")[0] for ref in refs}
        for attempt in sorted((int(name) for name in names if name.isdecimal()), reverse=True):
            of_attempt = self._layout.output_prefix(job.id, attempt)
            try:
                found = await asyncio.to_thread(published, self._storage, of_attempt, job.id)
            except CapsuleUnreadable:
                continue  # It is of no use to anybody, and what is missing is still the payload.
            if found is None or found.manifest.report.input.sha256 != job.payload_sha256:
                continue
            log.warning("an attempt had published that nobody knew of", job_id=job.id, attempt=attempt)
            run = await self._as_attempt(job, attempt)
            return run is not None and await self.complete(run, found.output, found.manifest)
        return False

    async def _as_attempt(self, job: JobRecord, attempt: int) -> JobRecord | None:
        """The job as running that attempt; None if it is another one's by now."""
        now = await self._store.get(job.id)
        if now is None or now.attempt != job.attempt or (now.status == "running" and now.attempt == attempt):
            return now
        if now.status == "running":
            event = NewEvent("stage_progress", step("queued", 0, "Its capsule lies in storage already", {}))
            await self._store.move(job.id, "queued", event, attempt=job.attempt)
        values = {"attempt": attempt, "owner": self._store.replica, "lease_until": db_now() + LEASE_MS}
        return await self._store.move(
            job.id,
            "running",
            started(attempt),
            attempt=job.attempt,
            sources=frozenset({"queued"}),
            values={**values, "started_at": now_ms()},
        )

    async def _end(self, job: JobRecord, error: ExportError) -> None:
        told = job_error(error)
        meta = {"code": told.code, "retryable": told.retryable}
        event = NewEvent("job_failed", step("failed", 0, told.message, meta))
        error_text = msgspec.json.encode(told).decode()
        # Whatever it failed of, its payload is kept: a setting may be mended, and somebody may want to look at it.
        expires_at: int | None = self._expires(job, now_ms())
        if job.client == CANARY_CLIENT or (isinstance(error, ObjectMissing) and not await self._has_payload(job)):
            expires_at = None
        values = {"error": error_text, "error_code": told.code, "expires_at": expires_at}
        if await self._settle(job, "failed", event, **values):
            await self._remove(
                self._layout.job_prefix(job.id), *([] if expires_at else [self._layout.payload_ref(job.id)])
            )
        else:
            await self._now_gone(job, "failed")

    def _expires(self, job: JobRecord, now: int) -> int:
        """When what it leaves is removed. The server's own canaries take no room for long."""
        seconds = self._settings.retention_seconds
        return now + (min(CANARY_KEPT_SECONDS, seconds) if job.client == CANARY_CLIENT else seconds) * 1000

    async def _has_payload(self, job: JobRecord) -> bool:
        try:
            return await asyncio.to_thread(self._storage.size, job.payload_ref) is not None
        except ExportError:
            return True  # as far as anybody knows

    async def remove_files(self, job_id: str) -> None:
        """Remove payload and artifacts of a job."""
        await self._remove(self._layout.payload_ref(job_id), self._layout.job_prefix(job_id))

    async def _now_gone(self, job: JobRecord, to: Status) -> None:
        """The job ended otherwise while this attempt did; what that attempt published is nobody's."""
        log.info("an attempt ended too late", job_id=job.id, attempt=job.attempt, as_status=to)
        now = await self._store.get(job.id)
        if now is None or now.attempt != job.attempt or now.status not in ("completed", "queued", "running"):
            await self._remove(self._layout.output_prefix(job.id, job.attempt))

    async def _settle(self, job: JobRecord, to: Status, event: NewEvent, **values: Any) -> bool:
        """Record how an attempt ended; a database that fails for a while does not make a job forgotten."""
        while True:
            try:
                moved = await self._store.move(job.id, to, event, attempt=job.attempt, values=values)
            except SQLAlchemyError as error:
                log.error("the end of a job cannot be recorded", job_id=job.id, status=to, exc_info=error)
                if self.stopping:
                    raise
                await asyncio.sleep(SETTLE_SECONDS)
                continue
            if moved is not None and to != "queued":
                self._metrics.ended.labels(to, "" if moved.error is None else moved.error.code).inc()
            return moved is not None

    async def _remove(self, *refs: str) -> None:
        """What cannot be removed now is swept later."""
        for ref in refs:
            try:
                await asyncio.to_thread(self._storage.delete, ref)
            except ExportError as error:
                log.warning("files stay until the next sweep", ref=ref, reason=error.message)

    def _clear_attempt(self, job: JobRecord) -> None:
        """All but the claim, which keeps a late run of this attempt from starting."""
        prefix = self._layout.output_prefix(job.id, job.attempt)
        try:
            left = [found.ref for found in self._storage.found(prefix)]
            files = [ref for ref in left if ref.removeprefix(prefix) not in NAMES]
            for ref in files if len(files) < len(left) else [prefix]:
                self._storage.delete(ref)
        except ExportError as error:
            log.warning("files stay until the next sweep", ref=prefix, reason=error.message)


def step(stage: Stage, progress: int, message: str, meta: dict[str, Any]) -> Progress:
    """``progress`` counts only where it is above what was reached."""
    return Progress(stage=stage, progress=progress, stage_progress=100, message=message, meta=meta)


def heartbeat(last: Progress, seconds: float) -> NewEvent:
    """Nothing new is known, but the export goes on."""
    progress = Progress(
        stage=last.stage,
        progress=last.progress,
        stage_progress=last.stage_progress,
        message=f"Still at work after {seconds:.0f} s: {last.message}",
        meta={"elapsedSeconds": round(seconds)},
    )
    return NewEvent("stage_heartbeat", progress)
