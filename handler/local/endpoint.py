"""One endpoint of the local Runpod: its jobs, their states and time limits, and who works on them."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import msgspec

from handler.local.config import WEEK_MS, LocalConfig
from handler.local.faults import Fault, Faults
from handler.local.fleet import Fleet, Worker
from handler.local.job import NOTHING, Job, Policy, Refused, Result, RunRequest, Status

T = TypeVar("T")

RETRIES = 1
"""A job whose worker is lost is queued again so often."""
MAX_JOBS = 20_000
"""Jobs that are known, finished ones too; the oldest finished ones are forgotten first."""
MAX_HELD = 256 << 20
"""Bytes of inputs and outputs that are held; finished jobs are forgotten first, then submissions are refused."""
LEAST_QUEUE = 50
QUEUE_PER_WORKER = 500


class _Delivery(NamedTuple):
    """A place in the queue."""

    job: Job
    again: bool = False
    """A second delivery, by a fault: the job's state does not change."""


class Endpoint:
    """Everything happens in one event loop; what waits for a change is woken by it."""

    def __init__(self, config: LocalConfig, faults: Faults, *, announce: Callable[[Job], None]) -> None:
        """``announce`` is told of every job that has ended and wants a webhook called."""
        self._config = config
        self._faults = faults
        self._announce = announce
        self.fleet = Fleet(config, faults, demand=self._demand, gone=self._gone)
        self._jobs: dict[str, Job] = {}
        self._queue: deque[_Delivery] = deque()
        self._held = 0
        self._counts: Counter[str] = Counter()

    # --- what clients ask ---------------------------------------------------------------------------

    def submit(self, request: RunRequest, size: int, *, sync: bool) -> Job:
        """Queue a job. Raises Refused."""
        config = self._config
        policy = request.policy or Policy()
        execution = config.execution_ms if policy.execution_timeout is None else policy.execution_timeout
        ttl = config.ttl_ms if policy.ttl is None else policy.ttl
        if request.input == NOTHING:
            raise Refused(400, "input is required")
        if not config.min_execution_ms <= execution <= WEEK_MS:
            raise Refused(400, f"policy.executionTimeout must be from {config.min_execution_ms} to {WEEK_MS}")
        if not config.min_ttl_ms <= ttl <= WEEK_MS:
            raise Refused(400, f"policy.ttl must be from {config.min_ttl_ms} to {WEEK_MS}")
        if len(self._queue) >= max(LEAST_QUEUE, QUEUE_PER_WORKER * config.max_workers):
            raise Refused(429, "the endpoint's queue is full")
        self._make_room(size)
        job = Job(
            id=f"{'sync-' if sync else ''}{uuid.uuid4()}-u1",
            request=request,
            execution_ms=execution,
            retention=config.sync_retention_seconds if sync else config.retention_seconds,
            size=size,
            submitted=self._now(),
        )
        self._jobs[job.id] = job
        self._held += size
        self._queue.append(_Delivery(job))
        job.forget.append(self._later(ttl / 1_000, self._drop, job))
        if fault := self._faults.strike("ttl-passed", job=job.id):
            seconds = self._faults.within(2.0) if fault.seconds is None else fault.seconds
            job.forget.append(self._later(seconds, self._drop, job))
        if fault := self._faults.strike("no-workers", job=job.id):
            self.fleet.pause(5.0 if fault.seconds is None else fault.seconds)
        self.fleet.scale()
        return job

    def job(self, job_id: str) -> Job:
        """Raises Refused (404) for one that is not known, or not any more."""
        try:
            return self._jobs[job_id]
        except KeyError:
            raise Refused(404, "job not found") from None

    async def wait(self, job: Job, seconds: float) -> None:
        """Until a job has ended, ``seconds`` at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await job.finished.wait()

    def cancel(self, job_id: str) -> Job:
        """Cancel a job; one that has ended stays as it is. Raises Refused."""
        job = self.job(job_id)
        if not job.ended:
            self._end(job, "CANCELLED")
        return job

    def retry(self, job_id: str) -> Job:
        """Queue a failed job again. Raises Refused."""
        job = self.job(job_id)
        if job.status not in ("FAILED", "TIMED_OUT"):
            raise Refused(400, f"only FAILED and TIMED_OUT jobs can be retried; this one is {job.status}")
        *_, retention = job.forget
        retention.cancel()
        job.finished = asyncio.Event()
        job.error = None
        job.retries = 0
        self._requeue(job)
        return job

    def purge(self) -> int:
        """Cancel all jobs that are queued; answers how many."""
        queued = [job for job, again in self._queue if not again]
        for job in queued:
            self._end(job, "CANCELLED")
        return len(queued)

    def health(self) -> dict[str, Any]:
        """The answer of ``/health``."""
        workers = self.fleet.workers.values()
        live = [worker for worker in workers if not worker.stopping]
        idle = sum(worker.ready and not worker.jobs for worker in live)
        return {
            "jobs": {
                "completed": self._counts["COMPLETED"],
                "failed": self._counts["FAILED"],
                "inProgress": sum(job.status in ("IN_PROGRESS", "RUNNING") for job in self._jobs.values()),
                "inQueue": sum(not again for _, again in self._queue),
                "retried": self._counts["retried"],
            },
            "workers": {
                "idle": idle,
                "initializing": sum(not worker.ready for worker in live),
                "ready": idle,
                "running": sum(bool(worker.jobs) for worker in live),
                "throttled": 0,
                "unhealthy": sum(worker.stopping for worker in workers),
            },
        }

    # --- what workers ask ---------------------------------------------------------------------------

    async def take(self, worker: Worker, most: int) -> list[dict[str, Any]]:
        """Up to ``most`` jobs as ``{id, input, …}``; none where there are none for a while."""
        self.fleet.asked(worker)
        worker.asking = True
        try:
            async with asyncio.timeout(self._config.poll_seconds):
                while not worker.stopping:
                    if deliveries := self._hand_out(worker, most):
                        return [self._message(delivery.job) for delivery in deliveries]
                    await worker.changed.wait()
        except TimeoutError:
            return []
        finally:
            worker.asking = False
        await asyncio.sleep(0.1)  # A worker that is to end asks on until it does.
        return []

    async def stops(self, worker: Worker) -> list[str]:
        """The jobs that a worker is to stop; none where there are none for a while."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.poll_seconds):
                while not worker.stopping and not worker.stops:
                    await worker.changed.wait()
        if worker.stopping:
            await asyncio.sleep(0.1)
        stops, worker.stops = worker.stops, []
        return stops

    def ping(self, worker: Worker, job_ids: list[str]) -> None:
        """A worker is alive and works on these jobs."""
        self.fleet.pinged(worker)
        for job_id in job_ids:
            job = worker.jobs.get(job_id)
            if job is not None and job.status == "IN_PROGRESS":
                job.status = "RUNNING"

    def done(self, worker: Worker, job_id: str, result: Result) -> None:
        """A progress update or a result. The first result counts; what comes later is ignored. Raises Refused."""
        if result.status == "IN_PROGRESS":
            self._progress(self.job(job_id), result.output)
            return
        job = self._jobs.get(job_id)
        self._let_go(worker, job_id)
        if result.stop_pod:
            self.fleet.stop(worker)
        if job is None:
            raise Refused(404, "job not found")
        if job.ended or self._faults.strike("lost-result", job=job_id):
            return
        if self._faults.strike("forgotten-result", job=job_id):
            self._drop(job)
        elif result.error is not None:
            self._end(job, "FAILED", result.output, result.error)
        else:
            no_output = self._faults.strike("no-output", job=job_id)
            self._end(job, "COMPLETED", NOTHING if no_output else result.output)
        if self._faults.strike("delivered-again", job=job_id):
            self._queue.append(_Delivery(job, again=True))
            self.fleet.scale()

    # --- faults -------------------------------------------------------------------------------------

    def fault(self, fault: Fault) -> None:
        """Add a fault; those that can strike at once do."""
        self._faults.add(fault)
        if fault.probability is None:
            if fault.fault == "no-workers" and fault.seconds is not None:
                self._later(fault.seconds, self._faults.remove, fault)
                self._later(fault.seconds, self.fleet.scale)
            elif fault.fault == "ttl-passed":
                jobs = [job for job in self._jobs.values() if fault.match == job.id or not (fault.match or job.ended)]
                self._at_once(fault, self._faults.one_of(jobs), self._drop)
            elif fault.fault == "worker-death":
                workers = [w for w in self.fleet.workers.values() if fault.match is None or fault.match in w.jobs]
                self._at_once(fault, self._faults.one_of(workers), self.fleet.kill)
        self.fleet.scale()

    def _at_once(self, fault: Fault, thing: T | None, strike: Callable[[T], None]) -> None:
        if thing is not None:
            self._faults.struck(fault)
            self._later(fault.seconds or 0.0, strike, thing)

    # --- inside -------------------------------------------------------------------------------------

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _later(self, seconds: float, call: Callable[..., None], *arguments: object) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, call, *arguments)

    def _demand(self) -> int:
        queued = sum(
            again or not (job.request.policy and job.request.policy.low_priority) for job, again in self._queue
        )
        return queued + sum(bool(worker.jobs) and not worker.stopping for worker in self.fleet.workers.values())

    def _hand_out(self, worker: Worker, most: int) -> list[_Delivery]:
        if not self._queue or self.fleet.paused or self._now() < worker.takes_from:
            return []
        taken: list[_Delivery] = []
        for delivery in list(self._queue):
            job = delivery.job
            if job.id in worker.jobs:
                continue
            if len(taken) == most:
                break
            taken.append(delivery)
            self._queue.remove(delivery)
            worker.jobs[job.id] = job
            job.holders.append(worker)
            if delivery.again:
                self._later(job.execution_ms / 1_000, self._stop, worker, job)
                continue
            now = self._now()
            job.status, job.worker, job.started = "IN_PROGRESS", worker.id, now
            job.delay_ms = round((now - job.submitted) * 1_000)
            job.limit = self._later(job.execution_ms / 1_000, self._time_out, job)
            if self._faults.strike("delivered-twice", job=job.id):
                self._queue.append(_Delivery(job, again=True))
            if fault := self._faults.strike("worker-death", job=job.id):
                chance = 0.0 if fault.probability is None else self._faults.within(2.0)
                self._later(chance if fault.seconds is None else fault.seconds, self.fleet.kill, worker)
        if taken:
            self.fleet.work(worker)
            self.fleet.scale()
        return taken

    def _message(self, job: Job) -> dict[str, Any]:
        message: dict[str, Any] = {"id": job.id, "input": job.request.input}
        if job.request.webhook is not None:
            message["webhook"] = job.request.webhook
        if job.request.s3_config != NOTHING:
            message["s3Config"] = job.request.s3_config
        return message

    def _progress(self, job: Job, output: msgspec.Raw) -> None:
        if job.ended:
            return
        fault = self._faults.strike("late-progress", job=job.id)
        if fault is None:
            self._show(job, output)
        elif fault.seconds is None:
            job.late = output
        else:
            self._later(fault.seconds, self._show, job, output)

    def _show(self, job: Job, output: msgspec.Raw) -> None:
        """What ``/status`` shows as the job's output from now on."""
        more = len(bytes(output)) - len(bytes(job.output))
        job.output = output
        job.size += more
        if job.id in self._jobs:
            self._held += more

    def _time_out(self, job: Job) -> None:
        self._end(job, "TIMED_OUT", error="executionTimeout exceeded")

    def _end(self, job: Job, status: Status, output: msgspec.Raw = NOTHING, error: object = None) -> None:
        """The job's final state; those that still work on it are told to stop."""
        if job.limit is not None:
            job.limit.cancel()
        if job.started is not None:
            job.spent_ms = round((self._now() - job.started) * 1_000)
        job.status, job.error = status, error
        self._show(job, job.late if job.late != NOTHING and status == "COMPLETED" else output)
        self._counts[status] += 1
        self._unqueue(job, again=False)
        if status in ("CANCELLED", "TIMED_OUT"):
            for worker in list(job.holders):
                self._stop(worker, job)
        job.forget.append(self._later(job.retention, self._drop, job))
        job.finished.set()
        if job.request.webhook is not None:
            self._announce(job)
        self.fleet.scale()

    def _stop(self, worker: Worker, job: Job) -> None:
        """Tell a worker to stop a job that it may still hold."""
        if self._let_go(worker, job.id):
            worker.stops.append(job.id)
            worker.wake()

    def _let_go(self, worker: Worker, job_id: str) -> bool:
        job = worker.jobs.pop(job_id, None)
        if job is None:
            return False
        job.holders.remove(worker)
        self.fleet.rest(worker)
        return True

    def _gone(self, worker: Worker) -> None:
        """A worker has ended: what it held is queued again, once."""
        for job in list(worker.jobs.values()):
            job.holders.remove(worker)
            if job.ended or job.holders or job.status == "IN_QUEUE":
                continue
            if job.retries < RETRIES:
                job.retries += 1
                self._counts["retried"] += 1
                self._requeue(job, first=True)
            else:
                self._end(job, "FAILED", error=f"job timed out after {RETRIES} retries")
        worker.jobs.clear()

    def _requeue(self, job: Job, *, first: bool = False) -> None:
        if job.limit is not None:
            job.limit.cancel()
        self._show(job, NOTHING)
        job.status, job.worker, job.late = "IN_QUEUE", None, NOTHING
        job.started = job.delay_ms = job.spent_ms = None
        (self._queue.appendleft if first else self._queue.append)(_Delivery(job))
        self.fleet.scale()

    def _unqueue(self, job: Job, *, again: bool) -> None:
        if any(delivery.job is job for delivery in self._queue):
            kept = [one for one in self._queue if one.job is not job or (one.again and not again)]
            self._queue = deque(kept)

    def _drop(self, job: Job) -> None:
        """Forget a job, whatever its state: its status is 404 from now on."""
        if self._jobs.pop(job.id, None) is None:
            return
        self._held -= job.size
        for timer in [*job.forget, *([job.limit] if job.limit else [])]:
            timer.cancel()
        self._unqueue(job, again=True)
        if not job.ended:
            for worker in list(job.holders):
                self._stop(worker, job)
            job.status = "TIMED_OUT"
            job.finished.set()
            self.fleet.scale()

    def _make_room(self, size: int) -> None:
        if len(self._jobs) < MAX_JOBS and self._held + size <= MAX_HELD:
            return
        for job in [job for job in self._jobs.values() if job.ended]:
            self._drop(job)
            if len(self._jobs) < MAX_JOBS and self._held + size <= MAX_HELD:
                return
        raise Refused(429, "the endpoint holds too much already")
