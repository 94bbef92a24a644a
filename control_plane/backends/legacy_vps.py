"""Runs jobs in child processes of this machine."""

from __future__ import annotations

import asyncio
import os
import shutil
from typing import Any, NamedTuple

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from common.contract import JobInput, JobOutput, Progress, Report, Stage, Status
from common.errors import (
    Canceled,
    DeadlineExceeded,
    ExportError,
    OutOfMemory,
    PayloadTooLarge,
    WorkerLost,
)
from common.graph.model import GraphLimits
from common.settings import Settings
from common.storage import Storage
from control_plane.errors import QueueUnavailable
from control_plane.jobs.layout import Layout
from control_plane.jobs.records import JobRecord, NewEvent, iso
from control_plane.jobs.store import JobStore, now_ms
from control_plane.operations.metrics import Metrics
from handler.job import published, read_manifest
from handler.pool import WorkerPool
from handler.process import ChildProcess
from handler.protocol import Check, Checked, ChildConfig, Done, Message, Reported, Run, job_error

log = structlog.get_logger()

HEARTBEAT_SECONDS = 2.0
CHECK_SECONDS = 120.0
LARGE_PAYLOAD = 4 << 20
"""Bytes as staged: larger payloads are checked one after the other, beside the small ones."""
TURN_SECONDS = 60.0
"""A request waits so long for its turn to be checked, and so long for a worker; then it is answered with 503."""
BATCH = 100
"""Events written in one transaction at most."""
CHECKERS = 2
SETTLE_SECONDS = 1.0


class _Slot(NamedTuple):
    """A place for one running job; ``max_weight`` None takes jobs of any size."""

    number: int
    max_weight: int | None


class _Steps(NamedTuple):
    """What a child said since the last time."""

    events: list[NewEvent]
    output: JobOutput | None
    error: ExportError | None


class LegacyVps:
    """Slots, children and the store. Of two slots or more, the first is kept for small jobs."""

    name = "legacy_vps"

    def __init__(self, settings: Settings, store: JobStore, storage: Storage, layout: Layout, metrics: Metrics) -> None:
        self._settings = settings
        self._store = store
        self._storage = storage
        self._layout = layout
        self._metrics = metrics
        config = ChildConfig(
            parent_pid=os.getpid(),
            storage_roots=[str(layout.artifacts), str(layout.payloads)],
            scratch=str(layout.scratch),
            writer=settings.writer,
            memory_limit=settings.worker_memory_bytes,
            limits=GraphLimits(max_payload_bytes=settings.max_payload_bytes),
        )
        self._pool = WorkerPool(config, settings.worker_slots + CHECKERS)
        small = settings.small_job_frames if settings.worker_slots > 1 else None
        self._free = [_Slot(n, small if n == 0 else None) for n in range(settings.worker_slots)]
        self._wake = asyncio.Event()
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._children: dict[str, ChildProcess] = {}
        self._checking = {False: asyncio.Semaphore(1), True: asyncio.Semaphore(1)}
        self._scheduler: asyncio.Task[None] | None = None
        self._stopping = False

    # --- life ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the children, settle what an earlier server left, take jobs."""
        self._pool.start()
        for job in await self._store.in_state("running"):
            prefix = self._layout.output_prefix(job.id, job.attempt)
            output = await asyncio.to_thread(published, self._storage, prefix, job.id)
            if output is not None:
                await self._complete(job, output)
            else:
                await self._lost(job, WorkerLost("the server stopped while the export was running"))
        waiting = await self._store.ids_in_state("queued")
        completed = await self._store.ids_in_state("completed")
        removed = await asyncio.to_thread(self._layout.sweep, waiting=waiting, completed=completed)
        log.info("backend started", queued=len(waiting), completed=len(completed), stray_files_removed=removed)
        self._scheduler = asyncio.create_task(self._schedule())
        self.wake()

    async def stop(self) -> None:
        """End all children; jobs that run go back to the queue and do not count as lost."""
        self._stopping = True
        if self._scheduler is not None:
            self._scheduler.cancel()
            await asyncio.gather(self._scheduler, return_exceptions=True)
        for child in self._children.values():
            child.kill(WorkerLost("the server is stopping"))
        waiting = [run for job_id, run in self._runs.items() if job_id not in self._children]
        for run in waiting:
            run.cancel()
        await asyncio.gather(*self._runs.values(), return_exceptions=True)
        await self._pool.close()

    @property
    def ready(self) -> bool:
        """A child is up and jobs are taken."""
        return self._pool.ready and self._scheduler is not None and not self._scheduler.done()

    def wake(self) -> None:
        """Look into the queue."""
        self._wake.set()

    # --- checking a payload -------------------------------------------------------------------------

    async def check(self, job_id: str, payload_ref: str, size: int) -> Checked:
        """Let a child read a staged payload; it keeps what it read for the job of that id."""
        turn = self._checking[size > LARGE_PAYLOAD]
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await turn.acquire()
        except TimeoutError as error:
            raise QueueUnavailable("Too many payloads wait to be checked. Try again later.") from error
        try:
            return await self._check_in_child(job_id, payload_ref)
        except WorkerLost:
            return await self._check_in_child(job_id, payload_ref)
        finally:
            turn.release()

    async def _check_in_child(self, job_id: str, payload_ref: str) -> Checked:
        try:
            async with asyncio.timeout(TURN_SECONDS):
                child = await self._pool.acquire()
        except TimeoutError as error:
            raise QueueUnavailable("No worker is up to check the payload. Try again later.") from error
        with self._metrics.check.time():
            try:
                return await self._check(child, job_id, payload_ref)
            finally:
                await asyncio.shield(self._pool.release(child, reuse=child.usable))

    async def _check(self, child: ChildProcess, job_id: str, payload_ref: str) -> Checked:
        child.kept_job = None
        too_slow = PayloadTooLarge(f"the payload could not be read within {CHECK_SECONDS:.0f} seconds", field="$")
        timer = asyncio.get_running_loop().call_later(CHECK_SECONDS, child.kill, too_slow)
        try:
            await child.send(Check(job_id=job_id, payload_ref=payload_ref))
            message = await child.receive()
        except OutOfMemory as error:
            raise PayloadTooLarge("the payload needs more memory than a worker may use", field="$") from error
        except WorkerLost as error:
            log.warning("a check was lost", job_id=job_id, reason=error.message)
            raise
        except asyncio.CancelledError:
            child.kill(Canceled("nobody waits for the answer"))
            raise
        finally:
            timer.cancel()
        if not isinstance(message, Checked):
            raise WorkerLost("the worker answered something else than what it was asked")
        child.kept_job = job_id
        return message

    # --- running jobs -------------------------------------------------------------------------------

    async def cancel(self, job_id: str) -> None:
        """End the run of a job that is canceled in the store, and remove payload and artifacts."""
        if (run := self._runs.get(job_id)) is not None:
            if (child := self._children.get(job_id)) is not None:
                child.kill(Canceled("the export was canceled"))
            else:
                run.cancel()
            await asyncio.wait([run])
        await self._remove_files(job_id, artifacts=True)

    async def _schedule(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._fill()
            except SQLAlchemyError as error:
                log.error("the queue cannot be read", again_in_seconds=SETTLE_SECONDS, exc_info=error)
                asyncio.get_running_loop().call_later(SETTLE_SECONDS, self.wake)

    async def _fill(self) -> None:
        for slot in list(self._free):
            if (job := await self._store.claim(max_weight=slot.max_weight)) is not None:
                self._free.remove(slot)
                self._metrics.queue_delay.observe((job.updated_at - job.created_at) / 1000)
                self._runs[job.id] = asyncio.create_task(self._run(job, slot))

    async def _run(self, job: JobRecord, slot: _Slot) -> None:
        try:
            child = await self._pool.acquire(job.id)
            self._children[job.id] = child
            try:
                await self._complete(job, await self._drive(child, job))
            except ExportError as error:
                await self._failed(job, error)
            except Exception as error:
                log.exception("a run failed in a way that nobody foresaw", job_id=job.id)
                child.kill(WorkerLost("the run failed"))
                await self._failed(job, ExportError(f"the server failed at this export ({type(error).__name__})"))
            finally:
                del self._children[job.id]
                lean = child.memory() < self._settings.worker_memory_bytes // 2
                await self._pool.release(child, reuse=lean and child.usable)
        except asyncio.CancelledError:
            if self._stopping:
                await self._failed(job, WorkerLost("the server is stopping"))
            raise
        finally:
            del self._runs[job.id]
            shutil.rmtree(self._layout.scratch / f"{job.id}-{job.attempt}", ignore_errors=True)
            self._free.append(slot)
            self._free.sort()
            self.wake()

    async def _drive(self, child: ChildProcess, job: JobRecord) -> JobOutput:
        loop = asyncio.get_running_loop()
        limit = self._settings.deadline_seconds
        too_long = DeadlineExceeded(f"the export took longer than the {limit:g} seconds that it may", limit=limit)
        deadline = loop.call_later(limit, child.kill, too_long)
        started = loop.time()
        last = Progress(stage="transform", progress=0, stage_progress=0, message=job.message)
        child.kept_job = None
        try:
            await child.send(Run(job=self._input(job), generated_at=iso(job.created_at)))
            while True:
                steps = await _steps(child)
                if not steps.events and steps.output is None and steps.error is None:
                    steps.events.append(_heartbeat(last, loop.time() - started))
                if steps.events:
                    last = next((e.progress for e in reversed(steps.events) if e.type == "stage_progress"), last)
                    if not await self._store.advance(job.id, job.attempt, steps.events):
                        child.kill(Canceled("the export is over"))
                if steps.error is not None:
                    raise steps.error
                if steps.output is not None:
                    return steps.output
        finally:
            deadline.cancel()

    def _input(self, job: JobRecord) -> JobInput:
        return JobInput(
            job_id=job.id,
            payload_ref=job.payload_ref,
            payload_sha256=job.payload_sha256,
            payload_size=job.payload_size,
            output_prefix=self._layout.output_prefix(job.id, job.attempt),
            embedding_mode=self._settings.embedding_mode,
            attempt=job.attempt,
            created_at=iso(job.created_at),
        )

    # --- ends ---------------------------------------------------------------------------------------

    async def _complete(self, job: JobRecord, output: JobOutput) -> None:
        manifest = await asyncio.to_thread(read_manifest, self._storage, output.manifest_ref)
        now = now_ms()
        report = msgspec.convert(output.metrics, Report)
        report.backend, report.attempts = self.name, job.attempt
        report.timings.queue = ((job.started_at or now) - job.created_at) / 1000
        output.metrics = msgspec.to_builtins(report)
        megabytes = output.size_bytes / 1_000_000
        message = f"Your capsule is ready: {manifest.frames:,} frames, {megabytes:,.1f} MB"
        meta = {"frames": manifest.frames, "vectors": manifest.vectors, "sizeBytes": output.size_bytes}
        moved = await self._settle(
            job,
            "completed",
            NewEvent("job_completed", _step("download_ready", 100, message, meta)),
            output=msgspec.json.encode(output).decode(),
            manifest=msgspec.json.encode(manifest).decode(),
            expires_at=now + self._settings.retention_seconds * 1000,
        )
        await self._remove_files(job.id, artifacts=not moved)
        if moved:
            self._metrics.duration.observe((now - job.created_at) / 1000)
            self._metrics.write.observe(report.timings.write)
            self._metrics.embed.observe(report.timings.embed)

    async def _failed(self, job: JobRecord, error: ExportError) -> None:
        if isinstance(error, Canceled):
            return
        if isinstance(error, WorkerLost):
            await self._lost(job, error)
            return
        log.warning("export failed", job_id=job.id, code=error.code, reason=error.message)
        await self._end(job, error)

    async def _lost(self, job: JobRecord, error: WorkerLost) -> None:
        lost = job.lost if self._stopping else job.lost + 1
        if lost > job.lost:
            self._metrics.lost.inc()
            log.warning("attempt lost", job_id=job.id, attempt=job.attempt, reason=error.message)
        if lost >= self._settings.max_attempts:
            await self._end(job, WorkerLost(f"{error.message}; given up after {lost} lost attempts", attempts=lost))
            return
        message = f"Waiting to start again: {error.message}"
        event = NewEvent("stage_progress", _step("queued", 0, message, {"attempt": job.attempt}))
        await self._settle(job, "queued", event, lost=lost)
        await asyncio.to_thread(self._storage.delete, self._layout.output_prefix(job.id, job.attempt))

    async def _end(self, job: JobRecord, error: ExportError) -> None:
        told = job_error(error)
        meta = {"code": told.code, "retryable": told.retryable}
        event = NewEvent("job_failed", _step("failed", 0, told.message, meta))
        await self._settle(job, "failed", event, error=msgspec.json.encode(told).decode())
        await self._remove_files(job.id, artifacts=True)

    async def _settle(self, job: JobRecord, to: Status, event: NewEvent, **values: Any) -> bool:
        """Record how an attempt ended; a database that fails for a while does not make a job forgotten."""
        while True:
            try:
                moved = await self._store.move(job.id, to, event, attempt=job.attempt, values=values)
            except SQLAlchemyError as error:
                log.error("the end of a job cannot be recorded", job_id=job.id, status=to, exc_info=error)
                await asyncio.sleep(SETTLE_SECONDS)
                continue
            if moved is not None and to != "queued":
                self._metrics.ended.labels(to, "" if moved.error is None else moved.error.code).inc()
            return moved is not None

    async def _remove_files(self, job_id: str, *, artifacts: bool) -> None:
        await asyncio.to_thread(self._storage.delete, self._layout.payload_ref(job_id))
        if artifacts:
            await asyncio.to_thread(self._storage.delete, self._layout.job_prefix(job_id))


async def _steps(child: ChildProcess) -> _Steps:
    """Wait for what the child says next, and take what else it has said by then; nothing within two seconds is []."""
    events: list[NewEvent] = []
    try:
        async with asyncio.timeout(HEARTBEAT_SECONDS):
            message: Message | None = await child.receive()
        while message is not None:
            if isinstance(message, Done):
                return _Steps(events, message.output, None)
            if isinstance(message, Reported) and message.progress.stage != "download_ready":
                events.append(NewEvent("stage_progress", message.progress))
            message = child.receive_now() if len(events) < BATCH else None
    except TimeoutError:
        return _Steps(events, None, None)
    except ExportError as error:
        return _Steps(events, None, error)
    return _Steps(events, None, None)


def _step(stage: Stage, progress: int, message: str, meta: dict[str, Any]) -> Progress:
    """``progress`` counts only where it is above what was reached."""
    return Progress(stage=stage, progress=progress, stage_progress=100, message=message, meta=meta)


def _heartbeat(last: Progress, seconds: float) -> NewEvent:
    message = f"Still at work after {seconds:.0f} s: {last.message}"
    progress = Progress(
        stage=last.stage,
        progress=last.progress,
        stage_progress=last.stage_progress,
        message=message,
        meta={"elapsedSeconds": round(seconds)},
    )
    return NewEvent("stage_heartbeat", progress)
