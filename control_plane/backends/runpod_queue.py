"""Runs jobs on a Runpod endpoint, and follows them until their manifest lies in storage.

What the platform says is a hint; an attempt has succeeded when its manifest is there and every file has the size and
SHA-256 that it names. An attempt is over for good once its claim is closed (``handler.claim``): only then another one
is begun, so two attempts never publish.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from common.contract import JobInput, JobOutput, Links, Progress, Report, Source, WorkerProgress
from common.embedding.routing import fields_of
from common.errors import (
    CapsuleUnreadable,
    ExportError,
    GateFailed,
    StorageFailed,
    WorkerLost,
)
from common.graph.names import capsule_file_name
from control_plane.backends.endings import Endings, heartbeat
from control_plane.backends.leases import Leases
from control_plane.backends.port import Means
from control_plane.backends.runpod_api import ENDED, RUNNING, JobStatus, RunpodApi, RunpodRefused, of_worker, why
from control_plane.errors import PlatformUnavailable
from control_plane.jobs.records import JobRecord, NewEvent, iso
from control_plane.jobs.store import now_ms
from control_plane.operations.profiles import Profiles
from handler import claim
from handler.job import Published, check_bytes, published, ref_of
from handler.logs import job_context
from handler.pool import WorkerPool

log = structlog.get_logger()

HEARTBEAT_SECONDS = 2.0
TICK_SECONDS = 0.2
"""Who was looked at is planned anew so often."""
LOOKS = 32
"""Looks at jobs that run at once."""
SUBMISSIONS = 16
"""Jobs that are handed over at once."""
QUEUE_SECONDS = 1.0
"""The queue is looked into so often even if nobody says that there is a job."""
BATCH = 100
"""Steps written in one transaction at most."""
MARGIN_SECONDS = 2.0
"""A worker gives up so long before the platform would end it, to say so itself."""
GRACE_MS = 60_000
"""After its time to live and to run, a job of which nothing can be learned is given up."""
AWAY_SECONDS = 30.0
STOPPED_SECONDS = 5.0
"""A run has ended so long after it was canceled."""
LINKED_PARTS = 16
"""Parts of a capsule that a worker without credentials gets links for: 2.7 million frames."""


@dataclass(eq=False, slots=True)
class _Tracked:
    """A job that was handed over."""

    job: JobRecord
    due: float
    """The next look, in the loop's time."""
    heard: float
    """The last event, in the loop's time."""
    began: float
    last: Progress
    looking: bool = False


class RunpodQueue:
    """Hands over, looks, settles. Any replica can; each job is driven by the one that holds its lease."""

    name = "runpod_queue"

    def __init__(
        self,
        means: Means,
        *,
        pool: WorkerPool,
        profiles: Profiles,
    ) -> None:
        settings = means.settings
        assert settings.runpod_endpoint_id is not None
        assert settings.runpod_api_key is not None
        self._settings, self._store, self._storage, self._layout, self._metrics = means
        self._pool = pool
        self._profiles = profiles
        self._api = RunpodApi(
            settings.runpod_api_base,
            settings.runpod_endpoint_id,
            settings.runpod_api_key.get_secret_value(),
            means.metrics,
        )
        self._endings = Endings(means, backend=self.name)
        self._leases = Leases(means.store, driven=self._driven, adopted=self._adopt, lost=self._forget)
        self._tracked: dict[str, _Tracked] = {}
        self._submitting: set[str] = set()
        self._hinted: set[str] = set()
        """Jobs of which there was a hint while they were handed over."""
        self._queue_changed = asyncio.Event()
        self._looks_changed = asyncio.Event()
        self._looks = asyncio.Semaphore(LOOKS)
        self._loops: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what this replica drove before, then hand over what is queued."""
        self._leases.start()
        self._loops = [asyncio.create_task(self._hand_over()), asyncio.create_task(self._follow())]
        self.wake()

    async def stop(self) -> None:
        """Follow no more; the jobs go on, and another replica follows them."""
        for task in (*self._loops, *self._tasks):
            task.cancel()
        await asyncio.gather(*self._loops, *self._tasks, return_exceptions=True)
        await self._leases.stop()
        await self._api.close()

    @property
    def trouble(self) -> str | None:
        """Payloads cannot be checked, or the platform does not answer."""
        if not self._pool.ready:
            return "no process that checks payloads is up"
        if not self._loops or any(loop.done() for loop in self._loops) or not self._leases.alive:
            return "no jobs are followed"
        return self._api.reason if self._api.away_seconds >= AWAY_SECONDS else None

    def wake(self, job_id: str | None = None) -> None:
        """There is a new job in the queue, or something may be new about a job."""
        if job_id is None:
            self._queue_changed.set()
        elif (tracked := self._tracked.get(job_id)) is not None:
            tracked.due = 0.0
            self._looks_changed.set()
        elif job_id in self._submitting:  # It was quicker than the platform's answer.
            self._hinted.add(job_id)

    async def hook(self, job_id: str, secret: str) -> bool:
        """The platform says that something is new about a job; False if the secret is not that job's."""
        job = await self._store.get(job_id)
        if job is None or not secrets.compare_digest(job.secret.encode(), secret.encode()):
            return False
        if job_id in self._driven():
            self.wake(job_id)
        else:
            await self._store.hint(job_id)
        return True

    async def cancel(self, job_id: str) -> None:
        """Stop the run of a job that is canceled in the store, and remove payload and artifacts."""
        self._tracked.pop(job_id, None)
        job = await self._store.get(job_id)
        if job is not None and job.runpod_id is not None:
            self._spawn(self._stop_there(job_id, job.runpod_id))
        # With its claim gone a run that the platform does not reach stops by itself.
        await self._endings.remove_files(job_id)

    async def _stop_there(self, job_id: str, runpod_id: str) -> None:
        await self._cancel_there(job_id, runpod_id)
        await asyncio.sleep(STOPPED_SECONDS)
        await self._endings.remove_files(job_id)  # A run that is stopped closes its claim once more.

    async def _cancel_there(self, job_id: str, runpod_id: str) -> None:
        for _ in range(10):
            try:
                await self._api.cancel(runpod_id)
            except PlatformUnavailable:
                continue  # The route itself pauses.
            except RunpodRefused as error:
                log.warning("a canceled job goes on at Runpod", job_id=job_id, reason=error.message)
            return

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("following a job failed in a way that nobody foresaw", exc_info=error)

    # --- leases -------------------------------------------------------------------------------------

    def _driven(self) -> set[str]:
        return {*self._tracked, *self._submitting}

    async def _adopt(self, job: JobRecord) -> None:
        if job.runpod_id is not None:
            self._track(job)
            self.wake(job.id)  # Nobody has looked at it for a while.
        elif job.status == "queued":  # Perhaps it was handed over: a run that comes second finds the claim taken.
            self._submitting.add(job.id)
            self._spawn(self._submit(job))
        else:
            await self._requeue(job, WorkerLost("the server stopped while the export was running"))

    def _forget(self, job_id: str) -> None:
        self._tracked.pop(job_id, None)

    # --- handing over -------------------------------------------------------------------------------

    async def _hand_over(self) -> None:
        while True:
            try:
                async with asyncio.timeout(QUEUE_SECONDS):
                    await self._queue_changed.wait()
            except TimeoutError:
                pass  # Another replica's job, or one whose pause is over.
            self._queue_changed.clear()
            try:
                while len(self._submitting) < SUBMISSIONS and (job := await self._store.hand_over()) is not None:
                    self._submitting.add(job.id)
                    self._spawn(self._submit(job))
            except SQLAlchemyError as error:
                log.error("the queue cannot be read", again_in_seconds=QUEUE_SECONDS, exc_info=error)
                await asyncio.sleep(QUEUE_SECONDS)

    async def _submit(self, job: JobRecord) -> None:
        structlog.contextvars.bind_contextvars(**job_context(job.id, job.trace))
        try:
            profile = self._profiles.of_job(job.profile)
            timeout_ms = profile.execution_timeout_ms * (2 if job.timeouts else 1)
            policy = {"executionTimeout": timeout_ms, "ttl": profile.ttl_ms}
            while True:
                try:
                    body = msgspec.to_builtins(await asyncio.to_thread(self._input, job, timeout_ms, profile.ttl_ms))
                    answer = await self._api.run(body, policy, self._webhook(job))
                    break
                except (PlatformUnavailable, StorageFailed) as error:
                    log.warning("a job cannot be handed over yet", job_id=job.id, reason=error.message)
                    if not await self._still(job):
                        return
            recorded = await self._kept(self._store.submitted, job.id, job.attempt, answer.id)
            if recorded is None:
                await self._cancel_there(job.id, answer.id)
            else:
                self._track(recorded)
        except ExportError as error:
            await self._requeue(job, error)
        finally:
            self._submitting.discard(job.id)
            if job.id in self._hinted:
                self._hinted.discard(job.id)
                self.wake(job.id)
            self._queue_changed.set()

    async def _still(self, job: JobRecord) -> bool:
        """Whether this replica is still to hand over this attempt."""
        now = await self._kept(self._store.get, job.id)
        return now is not None and (now.status, now.attempt, now.owner) == ("queued", job.attempt, self._store.replica)

    def _webhook(self, job: JobRecord) -> str | None:
        url = self._settings.public_url
        return f"{url.rstrip('/')}/v1/hooks/runpod/{job.id}/{job.secret}" if url else None

    def _input(self, job: JobRecord, timeout_ms: int, ttl_ms: int) -> JobInput:
        prefix = self._layout.output_prefix(job.id, job.attempt)
        created = iso(job.created_at)
        links = {}
        if self._settings.worker_links:
            seconds = (timeout_ms + ttl_ms) / 1000
            name = capsule_file_name(job.base_name, created)
            parts = [name, *(f"{name[:-4]}.part{number:03}.mv2" for number in range(1, LINKED_PARTS + 1))]
            files = [*parts, f"{name}.index.v1.sqlite", f"{name}.manifest.json", *claim.NAMES]
            for ref in [job.payload_ref, *(ref_of(prefix, file) for file in files)]:
                get = self._storage.link(ref, "GET", seconds)
                put = None if ref == job.payload_ref else self._storage.link(ref, "PUT", seconds)
                links[ref] = Links(get=get, put=put)
        return JobInput(
            job_id=job.id,
            payload_ref=job.payload_ref,
            payload_sha256=job.payload_sha256,
            payload_size=job.payload_size,
            output_prefix=prefix,
            attempt=job.attempt,
            created_at=created,
            trace=job.trace or None,
            timeout_seconds=max(1.0, timeout_ms / 1000 - MARGIN_SECONDS),
            links=links,
            source=Source(base_name=job.base_name) if job.base_name else None,
            **fields_of(self._profiles.of_job(job.profile).embedding),
        )

    # --- following ----------------------------------------------------------------------------------

    def _track(self, job: JobRecord) -> None:
        now = asyncio.get_running_loop().time()
        last = Progress(stage="transform", progress=0, stage_progress=0, message=job.message)
        self._tracked[job.id] = _Tracked(job, now + self._interval(), now, now, last)
        self._looks_changed.set()

    def _interval(self) -> float:
        return self._settings.runpod_poll_seconds * random.uniform(0.8, 1.2)  # noqa: S311

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            now, soonest = loop.time(), TICK_SECONDS if self._tracked else HEARTBEAT_SECONDS
            for tracked in list(self._tracked.values()):
                if tracked.job.status == "running" and now - tracked.heard >= HEARTBEAT_SECONDS:
                    tracked.heard = now
                    self._spawn(self._attend(tracked, self._beat(tracked)))
                if not tracked.looking and tracked.due <= now:
                    tracked.looking = True
                    tracked.due = now + self._interval()
                    self._spawn(self._attend(tracked, self._look(tracked)))
                if not tracked.looking:
                    soonest = min(soonest, tracked.due - now)
            self._looks_changed.clear()
            try:
                async with asyncio.timeout(max(soonest, 0.01)):
                    await self._looks_changed.wait()
            except TimeoutError:
                pass  # Something is due.

    async def _attend(self, tracked: _Tracked, work: Coroutine[Any, Any, None]) -> None:
        structlog.contextvars.bind_contextvars(**job_context(tracked.job.id, tracked.job.trace))
        try:
            await work
        except SQLAlchemyError as error:
            log.error("the database is away", job_id=tracked.job.id, exc_info=error)
        except ExportError as error:
            log.warning("the storage cannot be read", job_id=tracked.job.id, code=error.code, reason=error.message)

    async def _beat(self, tracked: _Tracked) -> None:
        event = heartbeat(tracked.last, tracked.heard - tracked.began)
        if not await self._store.advance(tracked.job.id, tracked.job.attempt, [event]):
            await self._refresh(tracked)

    async def _look(self, tracked: _Tracked) -> None:
        try:
            async with self._looks:
                await self._see(tracked)
        finally:
            tracked.looking = False
            if not tracked.due:  # Word came while we looked.
                self._looks_changed.set()

    async def _see(self, tracked: _Tracked) -> None:
        job = tracked.job
        assert job.runpod_id is not None
        try:
            answer = await self._api.status(job.runpod_id)
        except (PlatformUnavailable, RunpodRefused) as error:
            if self._past(job):
                await self._over(tracked, None)
            elif isinstance(error, RunpodRefused):
                log.error("Runpod refuses to tell of a job", job_id=job.id, reason=error.message)
            return
        if answer is None or answer.status in ENDED:
            await self._over(tracked, answer)
        elif self._past(job):  # What it says now it would say for ever.
            await self._over(tracked, None, WorkerLost("Runpod has not ended the export in its time"))
        elif answer.status in RUNNING and await self._started(tracked, answer):
            await self._tell(tracked, answer.output)

    def _past(self, job: JobRecord) -> bool:
        """Whether the platform should have ended the attempt long ago: by its time to run, or to live and to run."""
        profile = self._profiles.of_job(job.profile)
        since = job.started_at if job.status == "running" else None
        if since is None:
            since = (job.submitted_at or job.created_at) + profile.ttl_ms
        return now_ms() > since + 2 * profile.execution_timeout_ms + GRACE_MS

    async def _started(self, tracked: _Tracked, answer: JobStatus | None) -> bool:
        """Tell that the run has begun, once; False if the attempt is over."""
        if tracked.job.status != "queued":
            return True
        at = now_ms()
        if answer is not None and answer.delay_time is not None and tracked.job.submitted_at is not None:
            at = tracked.job.submitted_at + answer.delay_time
        job = await self._store.start(tracked.job.id, tracked.job.attempt, at=at)
        if job is None:
            return await self._refresh(tracked)
        tracked.job = job
        tracked.heard = tracked.began = asyncio.get_running_loop().time()
        self._metrics.queue_delay.observe(((job.started_at or at) - job.created_at) / 1000)
        return True

    async def _tell(self, tracked: _Tracked, told: object) -> None:
        """Append the steps that are new; updates come late, twice, and out of order."""
        try:
            progress = msgspec.convert(told, WorkerProgress)
        except msgspec.ValidationError:
            return  # A run that has not reported yet, or that refused to start.
        fresh = progress.steps[max(0, tracked.job.told + 1 - progress.first) :]
        while fresh:
            batch, fresh = fresh[:BATCH], fresh[BATCH:]
            before = tracked.job.told
            after = progress.first + len(progress.steps) - len(fresh) - 1
            events = [NewEvent("stage_progress", each) for each in batch if each.stage != "download_ready"]
            if not events:
                return
            if not await self._store.advance(tracked.job.id, tracked.job.attempt, events, told=(before, after)):
                await self._refresh(tracked)
                return
            tracked.job = replace(tracked.job, told=after)
            tracked.last, tracked.heard = events[-1].progress, asyncio.get_running_loop().time()

    async def _refresh(self, tracked: _Tracked) -> bool:
        """See what became of a job that somebody else has changed; False if this attempt is over."""
        now = await self._store.get(tracked.job.id)
        if (
            now is None
            or (now.attempt, now.runpod_id) != (tracked.job.attempt, tracked.job.runpod_id)
            or now.status not in ("queued", "running")
        ):
            self._untrack(tracked)
            return False
        tracked.job = now
        return True

    # --- ends ---------------------------------------------------------------------------------------

    async def _over(self, tracked: _Tracked, answer: JobStatus | None, error: ExportError | None = None) -> None:
        """The platform has nothing more to say: what lies in storage decides."""
        job = tracked.job
        error = error or why(answer)
        prefix = self._layout.output_prefix(job.id, job.attempt)
        try:
            if await self._completed(tracked, answer):
                return
            if not await asyncio.to_thread(claim.close, self._storage, prefix):
                log.info("a run is alive that the platform does not know", job_id=job.id, attempt=job.attempt)
                return
            if await self._completed(
                tracked, answer
            ):  # Published between the look and the close; now none is any more.
                return
        except (CapsuleUnreadable, GateFailed) as wrong:
            error = GateFailed(wrong.message)
            await asyncio.to_thread(claim.close, self._storage, prefix, force=True)
        if answer is None and job.runpod_id is not None:
            self._spawn(self._cancel_there(job.id, job.runpod_id))
        closed = await asyncio.to_thread(claim.read, self._storage, prefix)
        if closed is not None and closed.error is not None and (answer is None or answer.status == "COMPLETED"):
            error = of_worker(closed.error)  # The run that held the claim was another delivery of this attempt.
        ran = answer is not None and answer.worker_id is not None
        if not ran or await self._started(tracked, answer):  # A run that failed at once was never seen at work.
            await self._requeue(tracked.job, error)
            self._untrack(tracked)

    def _untrack(self, tracked: _Tracked) -> None:
        """Follow an attempt no more; the next one may be followed already."""
        if self._tracked.get(tracked.job.id) is tracked:
            del self._tracked[tracked.job.id]

    async def _completed(self, tracked: _Tracked, answer: JobStatus | None) -> bool:
        """Complete the job if the attempt has published; CapsuleUnreadable and GateFailed say that it is not whole."""
        found = await asyncio.to_thread(self._published, tracked.job)
        if found is None:
            return False
        output, manifest = found
        if await self._started(tracked, answer):
            if answer is not None and isinstance(answer.output, dict):
                await self._tell(tracked, answer.output.get("progress"))
                output = _with_timings(output, answer.output)
            await self._endings.complete(tracked.job, output, manifest)
            self._untrack(tracked)
        return True

    async def _requeue(self, job: JobRecord, error: ExportError) -> None:
        pause = await self._endings.failed(job, error)
        if pause is not None:
            asyncio.get_running_loop().call_later(pause, self.wake)

    def _published(self, job: JobRecord) -> Published | None:
        """What the attempt published, every byte compared with its manifest. Raises GateFailed where they differ."""
        prefix = self._layout.output_prefix(job.id, job.attempt)
        found = published(self._storage, prefix, job.id)
        if found is None:
            return None
        check_bytes(self._storage, prefix, found.manifest, job.payload_sha256)
        return found

    async def _kept(self, ask: Any, *arguments: object) -> Any:
        """Ask the store until it answers."""
        while True:
            try:
                return await ask(*arguments)
            except SQLAlchemyError as error:
                log.error("the database is away", again_in_seconds=QUEUE_SECONDS, exc_info=error)
                await asyncio.sleep(QUEUE_SECONDS)


def _with_timings(published: JobOutput, answered: dict[str, Any]) -> JobOutput:
    """What was published, with the timings that the worker tells: the manifest is written before they are all known."""
    try:
        told = msgspec.convert(answered.get("metrics"), Report)
    except msgspec.ValidationError:
        return published
    known = msgspec.convert(published.metrics, Report)
    if told.capsule.sha256 != known.capsule.sha256:
        return published
    known.timings, known.peak_memory_bytes = told.timings, told.peak_memory_bytes
    return msgspec.structs.replace(published, metrics=msgspec.to_builtins(known))
