"""Runs jobs in child processes of this machine."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass, field
from typing import NamedTuple

import structlog
from sqlalchemy.exc import SQLAlchemyError

from common.contract import JobInput, JobOutput, Progress, Source
from common.embedding.routing import fields_of
from common.errors import Canceled, CapsuleUnreadable, DeadlineExceeded, ExportError, GateFailed, WorkerLost
from control_plane.backends.endings import Endings, heartbeat
from control_plane.backends.leases import Leases
from control_plane.backends.port import Means
from control_plane.jobs.database import AWAY
from control_plane.jobs.records import JobRecord, NewEvent, iso
from control_plane.jobs.store import now_ms
from control_plane.operations.disk import Disk
from control_plane.operations.profiles import Profiles
from handler.job import published, read_manifest
from handler.logs import job_context
from handler.pool import WorkerPool
from handler.process import ChildProcess
from handler.protocol import Done, Message, Reported, Run

log = structlog.get_logger()

HEARTBEAT_SECONDS = 2.0
BATCH = 100
"""Events written in one transaction at most."""
SETTLE_SECONDS = 1.0
QUEUE_SECONDS = 1.0
"""The queue is looked into so often even if nobody says that there is a job."""


class _Slot(NamedTuple):
    """A place for one running job; ``max_weight`` None takes jobs of any size."""

    number: int
    max_weight: int | None


@dataclass(eq=False, slots=True)
class _Run:
    """An attempt of a job until its slot is free again; the next attempt may have begun by then."""

    job: JobRecord
    slot: _Slot
    task: asyncio.Task[None] = field(init=False)
    waits: bool = False
    """For a child."""
    child: ChildProcess | None = None
    """At work for the job."""

    def end(self, reason: ExportError) -> None:
        """Begin nothing more. An end that is being recorded is not disturbed."""
        if self.child is not None:
            self.child.kill(reason)
        elif self.waits:
            self.task.cancel()


class _Steps(NamedTuple):
    """What a child said since the last time."""

    events: list[NewEvent]
    output: JobOutput | None
    error: ExportError | None


class LegacyVps:
    """Slots, children and the store. Of two slots or more, the first is kept for small jobs."""

    name = "legacy_vps"

    def __init__(
        self,
        means: Means,
        *,
        pool: WorkerPool,
        profiles: Profiles,
        disk: Disk,
    ) -> None:
        self._settings, self._store, self._storage, self._layout, self._metrics = means
        self._disk = disk
        self._pool = pool
        self._profiles = profiles
        self._endings = Endings(means, backend=self.name)
        self._leases = Leases(means.store, driven=self._driven, adopted=self._resume, lost=self._give_up)
        small = means.settings.small_job_frames if means.settings.worker_slots > 1 else None
        self._free = [_Slot(n, small if n == 0 else None) for n in range(means.settings.worker_slots)]
        self._wake = asyncio.Event()
        self._runs: set[_Run] = set()
        self._scheduler: asyncio.Task[None] | None = None
        self._stopping = False
        self._waits = False
        """For room on the disk."""

    # --- life ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Settle what an earlier server left, then take jobs."""
        self._leases.start()
        self._scheduler = asyncio.create_task(self._schedule())
        self.wake()

    async def _resume(self, job: JobRecord) -> None:
        """A job whose server is gone, and with it the child that ran it."""
        prefix = self._layout.output_prefix(job.id, job.attempt)
        try:
            found = await asyncio.to_thread(published, self._storage, prefix, job.id)
        except CapsuleUnreadable as wrong:
            await self._over(job, GateFailed(wrong.message))
            return
        if found is None:
            await self._over(job, WorkerLost("the server stopped while the export was running"))
            return
        if job.status == "queued":  # Handed to a platform, which nobody has asked since.
            await self._store.start(job.id, job.attempt, at=now_ms())
        await self._endings.complete(job, found.output, found.manifest)

    def _driven(self) -> set[str]:
        return {run.job.id for run in self._runs}

    def _runs_of(self, job_id: str) -> list[_Run]:
        return [run for run in self._runs if run.job.id == job_id]

    def _give_up(self, job_id: str) -> None:
        for run in self._runs_of(job_id):
            run.end(Canceled("another server drives this export now"))

    async def stop(self) -> None:
        """End all runs; their jobs go back to the queue and do not count as lost."""
        self._stopping = self._endings.stopping = True
        if self._scheduler is not None:
            self._scheduler.cancel()
            await asyncio.gather(self._scheduler, return_exceptions=True)
        for run in self._runs:
            run.end(WorkerLost("the server is stopping"))
        await asyncio.gather(*(run.task for run in self._runs), return_exceptions=True)
        await self._leases.stop()

    @property
    def trouble(self) -> str | None:
        """No child is up, or no jobs are taken."""
        if self._scheduler is None or self._scheduler.done() or not self._leases.alive:
            return "no jobs are taken"
        return None if self._pool.ready else "no worker is up"

    def wake(self, job_id: str | None = None) -> None:
        """Look into the queue; a running job speaks for itself."""
        self._wake.set()

    # --- running jobs -------------------------------------------------------------------------------

    async def cancel(self, job_id: str) -> None:
        """End the run of a job that is canceled in the store, and remove payload and artifacts."""
        runs = self._runs_of(job_id)
        for run in runs:
            run.end(Canceled("the export was canceled"))
        if runs:
            await asyncio.wait([run.task for run in runs])
        await self._endings.remove_files(job_id)

    async def _schedule(self) -> None:
        while True:
            try:
                async with asyncio.timeout(QUEUE_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass  # A job whose pause is over, or of which nobody could tell, or there may be room on the disk.
            self._wake.clear()
            try:
                await self._fill()
            except SQLAlchemyError as error:
                log.error("the queue cannot be read", again_in_seconds=QUEUE_SECONDS, exc_info=error)
                await asyncio.sleep(QUEUE_SECONDS)
                self.wake()

    async def _fill(self) -> None:
        if self._free and (trouble := await asyncio.to_thread(lambda: self._disk.trouble)) is not None:
            if not self._waits:
                log.warning("no export is started", reason=trouble, again_in_seconds=QUEUE_SECONDS)
            self._waits = True
            return
        self._waits = False
        for slot in list(self._free):
            if (job := await self._store.claim(max_weight=slot.max_weight)) is not None:
                self._free.remove(slot)
                self._metrics.queue_delay.observe((job.updated_at - job.created_at) / 1000)
                run = _Run(job, slot)
                run.task = asyncio.create_task(self._run(run))
                self._runs.add(run)
            elif slot.max_weight is None:
                return  # Nor is there one for the slots after it.

    async def _run(self, run: _Run) -> None:
        job = run.job
        structlog.contextvars.bind_contextvars(**job_context(job.id, job.trace))
        try:
            run.waits = True
            child = await self._pool.acquire(job.id)
            run.waits, run.child = False, child
            try:
                try:
                    output = await self._drive(child, job)
                finally:
                    run.child = None
                manifest = await asyncio.to_thread(read_manifest, self._storage, output.manifest_ref)
                await self._endings.complete(job, output, manifest)
            except ExportError as error:
                await self._over(job, error)
            except Exception as error:
                log.exception("a run failed in a way that nobody foresaw", job_id=job.id)
                child.kill(WorkerLost("the run failed"))
                await self._over(job, ExportError(f"the server failed at this export ({type(error).__name__})"))
            finally:
                lean = child.memory() < self._settings.worker_memory_bytes // 2
                await asyncio.shield(self._pool.release(child, reuse=lean and child.usable))
        except asyncio.CancelledError:
            if self._stopping:
                await self._over(job, WorkerLost("the server is stopping"))
            raise
        finally:
            self._runs.discard(run)
            shutil.rmtree(self._layout.scratch / f"{job.id}-{job.attempt}", ignore_errors=True)
            self._free.append(run.slot)
            self._free.sort()
            self.wake()

    async def _over(self, job: JobRecord, error: ExportError) -> None:
        pause = await self._endings.failed(job, error, counted=not self._stopping)
        if pause is not None and not self._stopping:
            asyncio.get_running_loop().call_later(pause, self.wake)

    async def _drive(self, child: ChildProcess, job: JobRecord) -> JobOutput:
        loop = asyncio.get_running_loop()
        limit = self._settings.deadline_seconds
        too_long = DeadlineExceeded(f"the export took longer than the {limit:g} seconds that it may", limit=limit)
        deadline = loop.call_later(limit, child.kill, too_long)
        started = loop.time()
        last = Progress(stage="transform", progress=0, stage_progress=0, message=job.message)
        child.kept_job, told = None, 0
        try:
            await child.send(Run(job=self._input(job), generated_at=iso(job.created_at)))
            while True:
                steps = await _steps(child)
                if not steps.events and steps.output is None and steps.error is None:
                    steps.events.append(heartbeat(last, loop.time() - started))
                if steps.events:
                    last = next((e.progress for e in reversed(steps.events) if e.type == "stage_progress"), last)
                    if not await self._tell(job, told, steps.events):
                        child.kill(Canceled("the export is over"))
                    told += len(steps.events)
                if steps.error is not None:
                    raise steps.error
                if steps.output is not None:
                    return steps.output
        finally:
            deadline.cancel()

    async def _tell(self, job: JobRecord, told: int, events: list[NewEvent]) -> bool:
        """Append events to the log; a database that is away makes them late. False if the attempt is over."""
        while True:
            try:
                if await self._store.advance(job.id, job.attempt, events, told=(told, told + len(events))):
                    return True
                now = await self._store.get(job.id)
            except AWAY as error:
                if self._stopping:
                    raise WorkerLost("the server is stopping") from error
                log.warning("events are late", job_id=job.id, again_in_seconds=SETTLE_SECONDS, error=str(error))
                await asyncio.sleep(SETTLE_SECONDS)
            else:  # A commit counts whose answer was lost.
                same = now is not None and now.attempt == job.attempt and now.status == "running"
                return same and now is not None and now.told == told + len(events)

    def _input(self, job: JobRecord) -> JobInput:
        return JobInput(
            job_id=job.id,
            payload_ref=job.payload_ref,
            payload_sha256=job.payload_sha256,
            payload_size=job.payload_size,
            output_prefix=self._layout.output_prefix(job.id, job.attempt),
            attempt=job.attempt,
            created_at=iso(job.created_at),
            trace=job.trace or None,
            source=Source(base_name=job.base_name) if job.base_name else None,
            **fields_of(self._profiles.of_job(job.profile).embedding),
        )


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
