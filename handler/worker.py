"""The Runpod worker: takes jobs from the platform through the runpod package and runs them in child processes.

Jobs run on an event loop in a thread of its own, so that children start while the runpod package is still being
imported, and nothing of ours is ever in the way of the package's loop, which takes jobs and hears of cancels.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog

from common.contract import JobInput, JobOutput, Links, Progress, WorkerProgress
from common.errors import (
    RULES,
    AccessDenied,
    Canceled,
    DeadlineExceeded,
    ExportError,
    InvalidRef,
    InvalidRequest,
    InvalidSettings,
    WorkerLost,
)
from common.graph.model import GraphLimits
from common.settings import GIB, WorkerSettings
from common.storage import Storage, StorageConfig, open_storage
from handler import claim
from handler.child import die_with_parent
from handler.job import decode_input, published
from handler.logs import job_context, log_as_json, reason_of
from handler.pool import WorkerPool
from handler.process import ChildProcess
from handler.protocol import ChildConfig, Done, Reported, Run, export_error, job_error

log = structlog.get_logger()
T = TypeVar("T")

TELL_SECONDS = 1.0
"""Progress is sent at most so often."""
MAX_STEPS = 2_000
"""Steps of one run that are kept; the pipeline reports at most 101 of each of its stages."""
SETTLE_SECONDS = 0.2
"""A result comes so long after the last progress, which goes another way and could overtake it."""
CHILD_SECONDS = 60.0
"""A job waits so long for a child process."""
WITHDRAW_TRIES = 3
WITHDRAW_PAUSE = 0.3
DRAIN_SECONDS = 5.0
"""From the platform's SIGTERM on, answers that are under way have so long."""
GPU_JOB_BYTES = 16 * GIB

Tell = Callable[[WorkerProgress], None]


class Worker:
    """Runs jobs in children; all methods are to be called on one event loop."""

    def __init__(self, storage: StorageConfig, scratch: Path, pool: WorkerPool) -> None:
        self._config = storage
        self._storage = open_storage(storage)
        self._scratch = scratch
        self._pool = pool
        self._running: dict[JobRun, asyncio.Task[dict[str, Any]]] = {}
        self._closing: WorkerLost | None = None
        self.cold_start = 0.0
        """Seconds that the first job is told of; 0 from then on."""

    async def run(self, run: JobRun) -> dict[str, Any]:
        """Run a job to its end; answers what Runpod gets: a JobOutput, ``{"taken": true}`` or ``{"error": …}``."""
        if self._closing is not None:
            run.stop(self._closing)
        work = run.answer(self._open, self._pool, self._scratch, self._take_cold_start)
        self._running[run] = asyncio.create_task(work)
        try:
            return await self._running[run]
        finally:
            del self._running[run]

    def _open(self, links: Mapping[str, Links]) -> Storage:
        return open_storage(self._config, links) if links else self._storage

    def stop(self, reason: WorkerLost) -> None:
        """End all runs, and those that come from now on."""
        self._closing = reason
        for run in self._running:
            run.stop(reason)

    async def close(self) -> None:
        """End all runs and children."""
        self.stop(WorkerLost("the worker stopped"))
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        await self._pool.close()

    def _take_cold_start(self) -> float:
        seconds, self.cold_start = self.cold_start, 0.0
        return seconds


class JobRun:
    """One delivery of a job: claims the attempt, runs it, and leaves either all of its artifacts or nothing."""

    def __init__(self, data: Any, tell: Tell) -> None:
        self._data = data
        self._steps = _Steps(tell)
        self._id = secrets.token_hex(8)
        self._reason: ExportError | None = None
        self._child: ChildProcess | None = None
        self._work: asyncio.Task[JobOutput] | None = None

    def stop(self, reason: ExportError) -> None:
        """End the run, its child and what it stored; the answer is then ``reason``. The first reason counts."""
        if self._reason is not None:
            return
        self._reason = reason
        if self._child is not None:
            self._child.kill(reason)
        elif self._work is not None:
            self._work.cancel()

    async def answer(
        self,
        opened: Callable[[Mapping[str, Links]], Storage],
        pool: WorkerPool,
        scratch: Path,
        cold_start: Callable[[], float],
    ) -> dict[str, Any]:
        """Run it, see ``Worker.run``."""
        deadline: asyncio.TimerHandle | None = None
        try:
            job = decode_input(self._data)
            structlog.contextvars.bind_contextvars(**job_context(job.job_id, job.trace))
            if (limit := job.timeout_seconds) is not None:
                too_long = DeadlineExceeded(
                    f"the export took longer than the {limit:g} seconds that it may", limit=limit
                )
                deadline = asyncio.get_running_loop().call_later(limit, self.stop, too_long)
            storage = await asyncio.to_thread(opened, job.links)
            if not await asyncio.to_thread(_take, storage, job, self._id):
                return await asyncio.to_thread(_late_answer, storage, job)
            log.info("export started", job_id=job.job_id, attempt=job.attempt)
            seconds = cold_start()
            output = await self._claimed(job, storage, pool, scratch)
            output.metrics["timings"]["coldStart"] = round(seconds, 3)
            output.progress = self._steps.all()
            return dict(msgspec.to_builtins(output))
        except ExportError as error:
            return self._failure(error)
        except Exception:
            log.exception("a run failed in a way that nobody foresaw")
            return self._failure(ExportError("the worker failed in a way that nobody foresaw; its log has the story"))
        finally:
            self._steps.end()
            if deadline is not None:
                deadline.cancel()

    async def _claimed(self, job: JobInput, storage: Storage, pool: WorkerPool, scratch: Path) -> JobOutput:
        over = asyncio.Event()
        renewing = asyncio.create_task(self._renew(storage, job.output_prefix, over))
        self._work = asyncio.create_task(self._export(job, pool))
        if self._reason is not None:
            self._work.cancel()
        try:
            return await self._work
        except asyncio.CancelledError:
            if self._reason is None:
                raise
            failed: Exception = self._reason
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing may stay behind; it is raised again below
            failed = error
        finally:
            over.set()
            await asyncio.wait([renewing], timeout=1)  # a renewal that comes later would leave an object behind
        told = failed if isinstance(failed, ExportError) else ExportError("the worker failed")
        done = await self._withdraw(job, storage, scratch, told)
        if done is None:
            raise failed
        return done

    async def _export(self, job: JobInput, pool: WorkerPool) -> JobOutput:
        try:
            async with asyncio.timeout(CHILD_SECONDS):
                child = self._child = await pool.acquire()
        except TimeoutError as error:
            raise WorkerLost("no process of this worker is up to run the export") from error
        try:
            now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            await child.send(Run(job=job, generated_at=job.created_at or now, run=self._id))
            while not isinstance(message := await child.receive(), Done):
                if isinstance(message, Reported) and message.progress.stage != "download_ready":
                    self._steps.add(message.progress)
            return message.output
        finally:
            self._child = None  # it is another job's from now on
            await asyncio.shield(pool.release(child, reuse=child.lean and child.usable))

    async def _renew(self, storage: Storage, prefix: str, over: asyncio.Event) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), claim.RENEW_SECONDS)
            if over.is_set():
                return
            try:
                held = await asyncio.to_thread(claim.renew, storage, prefix, self._id)
            except ExportError as error:
                log.warning("the claim could not be renewed", prefix=prefix, code=error.code, reason=error.message)
                continue
            if not held:
                self.stop(Canceled("the attempt was closed while it ran"))
                return

    async def _withdraw(self, job: JobInput, storage: Storage, scratch: Path, error: ExportError) -> JobOutput | None:
        """Leave nothing behind, and the claim closed; answers the output if the attempt was published after all."""
        own = scratch / f"{job.job_id}-{job.attempt}"
        await asyncio.to_thread(shutil.rmtree, own, ignore_errors=True)
        for last in (False,) * (WITHDRAW_TRIES - 1) + (True,):
            try:
                return await asyncio.to_thread(_withdraw, storage, job, error)
            except ExportError as problem:
                log.warning("what a run stored could not be removed", job_id=job.job_id, reason=problem.message)
                if not last:
                    await asyncio.sleep(WITHDRAW_PAUSE)
        return None

    def _failure(self, error: ExportError) -> dict[str, Any]:
        answer: dict[str, Any] = {"error": msgspec.json.encode(job_error(error)).decode()}
        # The platform is asked for a fresh worker, unless we ended the run ourselves.
        refresh = RULES[error.retry].fresh and self._reason is None and self._work is not None
        if refresh:
            answer["refresh_worker"] = True
        log.warning("export failed", code=error.code, reason=reason_of(error), refresh=refresh)
        return answer


class _Steps:
    """The steps of a run, told at most once in ``TELL_SECONDS``, and never after the end."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._first = 1
        self._steps: list[Progress] = []
        self._next = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, step: Progress) -> None:
        """Keep a step, and tell of it now or soon."""
        self._steps.append(step)
        if len(self._steps) > MAX_STEPS:
            del self._steps[0]
            self._first += 1
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(loop.time(), self._next), self._send)

    def all(self) -> WorkerProgress:
        """All that is kept."""
        return WorkerProgress(first=self._first, steps=self._steps)

    def end(self) -> None:
        """Tell nothing any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _send(self) -> None:
        self._timer = None
        self._next = asyncio.get_running_loop().time() + TELL_SECONDS
        self._tell(self.all())


def _take(storage: Storage, job: JobInput, run: str) -> bool:
    prefix = job.output_prefix
    try:
        if not claim.take(storage, prefix, run):
            return False
        # All under the prefix goes when the run fails: it must not be a place of others. Links remove nothing.
        if not job.links and any(found.ref.removeprefix(prefix) not in claim.NAMES for found in storage.found(prefix)):
            storage.delete(prefix + claim.CLAIM_NAME)
            raise InvalidRequest("output_prefix must be of this attempt alone; other objects lie under it")
    except (InvalidRef, InvalidRequest, AccessDenied) as error:
        error.details["field"] = "output_prefix"
        raise
    return True


def _late_answer(storage: Storage, job: JobInput) -> dict[str, Any]:
    """What a run answers that found the attempt claimed. Raises the error that the first one ended in."""
    found = published(storage, job.output_prefix, job.job_id)
    if found is not None:
        return dict(msgspec.to_builtins(found.output))
    if claim.state(storage, job.output_prefix) == "held":
        return {"taken": True}
    holder = claim.read(storage, job.output_prefix)
    if holder is not None and holder.closed:
        raise export_error(holder.error) if holder.error else Canceled("the attempt was closed before it could run")
    raise WorkerLost("an earlier run of this attempt ended without an answer")


def _withdraw(storage: Storage, job: JobInput, error: ExportError) -> JobOutput | None:
    """See ``JobRun._withdraw``. What was published stays: who looks into the storage may have seen it already."""
    prefix = job.output_prefix
    there = claim.read(storage, prefix) is not None  # else all was removed together with the job
    if there:
        claim.close(storage, prefix, force=True, error=job_error(error))
    if (found := published(storage, prefix, job.job_id)) is not None:
        return found.output
    storage.delete(prefix)
    if there:
        claim.close(storage, prefix, force=True, error=job_error(error))
    return None


# --- the process ------------------------------------------------------------------------------------


def start(settings: WorkerSettings, test_input: str | None = None) -> None:
    """Run the worker until the platform ends it. ``test_input``: a job as JSON text that is run instead, and only it.

    Raises WorkerLost where no child process comes up; exits as the runpod package does after a test input.
    """
    log_as_json()
    # The package forks a process that pings; it must not tell the platform of a worker that is gone.
    os.register_at_fork(after_in_child=die_with_parent)
    with _own_folder(settings.root / "workers") as scratch, _Loop() as loop:
        signal.signal(signal.SIGTERM, _ending(scratch))
        storage = settings.storage(settings.root, settings.staging_root)
        config = ChildConfig(
            parent_pid=os.getpid(),
            storage=storage,
            scratch=str(scratch),
            writer=settings.writer,
            memory_limit=settings.worker_memory_bytes,
            stage_seconds=settings.stage_seconds,
            limits=GraphLimits(max_payload_bytes=settings.max_payload_bytes),
            choice=settings.choice(),
            models=settings.allowed_models(),
            engines=settings.engines(),
            preload=True,
        )
        first = loop.begin(ChildProcess.start(config))
        import runpod  # takes two seconds, in which the child starts

        size = concurrency(settings.worker_memory_bytes)
        child = first.result()
        worker = loop.run(_worker(config, size, child))
        try:
            log.info("worker ready", concurrency=size, seconds=round(_process_seconds(), 3))
            platform = _Platform(runpod, loop, worker, size)
            # The package reads the command line itself. Its own level is DEBUG, where it prints every message whole.
            test = ["--test_input", test_input] if test_input is not None else []
            sys.argv[1:] = ["--rp_log_level", "INFO", *test]
            with contextlib.suppress(asyncio.CancelledError):  # that is how we end its loop
                runpod.serverless.start({"handler": platform.handler, "concurrency_modifier": platform.modifier})
        finally:
            loop.run(worker.close())


def _ending(scratch: Path) -> Callable[..., None]:
    """What SIGTERM does until jobs are taken. It raises nothing: what comes in some callbacks would be swallowed."""
    pid = os.getpid()

    def end(*_: object) -> None:
        if os.getpid() == pid:  # else it is a process that was forked
            shutil.rmtree(scratch, ignore_errors=True)
        os._exit(0)  # the kernel ends the children

    return end


async def _worker(config: ChildConfig, size: int, child: ChildProcess) -> Worker:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4 + 2 * size, thread_name_prefix="storage"))
    pool = WorkerPool(config, size)
    await pool.adopt(child)
    return Worker(config.storage, Path(config.scratch), pool)


class _Platform:
    """What the runpod package calls, on its loop."""

    def __init__(self, runpod: Any, loop: _Loop, worker: Worker, size: int) -> None:
        self._local = runpod.serverless.modules.worker_state.IS_LOCAL_TEST
        self._runpod = runpod
        self._loop = loop
        self._worker = worker
        self._size = size
        self._started = False

    async def handler(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run a job; a cancel ends it before it is passed on."""
        self._start()

        told = 0.0

        def tell(progress: WorkerProgress) -> None:
            nonlocal told
            told = time.monotonic()
            self._runpod.serverless.progress_update(job, msgspec.to_builtins(progress))

        def keep_to_itself(_: WorkerProgress) -> None:
            """There is no platform to tell."""

        run = JobRun(job.get("input"), keep_to_itself if self._local else tell)
        answer = asyncio.wrap_future(self._loop.begin(self._worker.run(run)))
        try:
            result = await asyncio.shield(answer)
            await asyncio.sleep(told + SETTLE_SECONDS - time.monotonic())
            return result
        except asyncio.CancelledError:
            self._loop.call(run.stop, Canceled("the platform stopped the job"))
            await asyncio.wait([answer])
            raise

    def modifier(self, _current: int) -> int:
        """How many jobs at once; the package asks right before it takes jobs."""
        if not self._started:
            self._start()
            loop, taking = asyncio.get_running_loop(), asyncio.current_task()
            for number in (int(signal.SIGTERM), int(signal.SIGINT)):
                theirs = signal.getsignal(number)
                loop.add_signal_handler(number, self._stop, theirs, number, taking)
        return self._size

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._worker.cold_start = _process_seconds()

    def _stop(self, theirs: Any, number: int, taking: asyncio.Task[Any] | None) -> None:
        log.info("worker stopping", signal=number)
        theirs(number, None)  # the package takes no more jobs
        self._loop.call(self._worker.stop, WorkerLost("the worker is stopping"))
        self._draining = asyncio.create_task(self._drain(taking))

    async def _drain(self, taking: asyncio.Task[Any] | None) -> None:
        from runpod.serverless.modules.worker_state import JobsProgress

        # Its loop would end only when its long poll for a job does, 90 seconds later.
        for _ in range(int(DRAIN_SECONDS / 0.1)):
            if not JobsProgress().get_job_count():
                break
            await asyncio.sleep(0.1)
        if taking is not None:
            taking.cancel()


class _Loop:
    """An event loop in a thread of its own, from ``with`` to its end."""

    def __enter__(self) -> _Loop:
        self._loop = asyncio.new_event_loop()
        # The kernel ends children when the thread that started them ends: this one lives as long as the process.
        self._thread = threading.Thread(target=self._loop.run_forever, name="jobs", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin it there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it there and wait for it."""
        return self.begin(work).result()

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call it there soon."""
        self._loop.call_soon_threadsafe(function, *arguments)


@contextlib.contextmanager
def _own_folder(parent: Path) -> Iterator[Path]:
    """A scratch folder of this process alone, removed at its end; those of processes that were killed go first."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        name = "MEMVID_EXPORT_ROOT"
        raise InvalidSettings(f"{name} must be a folder that can be written: {error}", field=name) from error
    for left in parent.iterdir():
        if left.name.startswith("."):
            continue
        with contextlib.suppress(OSError):  # in use, gone, or none of ours
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)
    folder = parent / secrets.token_hex(8)
    unlocked = folder.with_name(f".{folder.name}")
    unlocked.mkdir()
    handle = os.open(unlocked, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        unlocked.rename(folder)  # only now others look at it
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def concurrency(job_bytes: int) -> int:
    """How many jobs of ``job_bytes`` of memory this machine runs at once: by memory, processors and GPU; at least 1."""
    processors = len(os.sched_getaffinity(0))
    if (quota := _cgroup_processors()) is not None:
        processors = min(processors, max(1, round(quota)))
    counts = [processors, _memory_bytes() // job_bytes]
    gpus = _gpu_bytes()
    if gpus:
        counts.append(sum(gpu // GPU_JOB_BYTES for gpu in gpus))
    return max(1, min(counts))


def _memory_bytes() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError):
            if (text := Path(limit).read_text(encoding="ascii").strip()).isdigit():
                found.append(int(text))
    return min(found)


def _cgroup_processors() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return int(quota) / int(period) if quota.isdigit() else None


def _gpu_bytes() -> list[int]:
    """The memory of each GPU."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        told = subprocess.run(
            [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            timeout=10,
            check=True,
            text=True,
        )
    except (subprocess.SubprocessError, OSError) as error:
        log.warning("the GPU does not answer", reason=str(error))
        return []
    return [int(line) << 20 for line in told.stdout.split() if line.isdigit()]


def _process_seconds() -> float:
    """Since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
