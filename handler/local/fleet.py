"""The worker processes of an endpoint: started where there is work, ended when there is none."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from handler.local.config import LocalConfig
from handler.local.faults import Faults

if TYPE_CHECKING:
    from handler.local.job import Job

log = structlog.get_logger()

GUARD = (sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py")))
STOP_SECONDS = 8.0
"""From asking a worker to end to ending it."""
CLOSE_SECONDS = 0.5
"""The same when the whole platform stops."""
MISSED_PINGS = 3
TICK = 0.01
"""A timer may fire a little before its time; what waits for a time is woken so long after it."""
MAX_WAIT_SECONDS = 30.0
"""The longest wait before a worker is started again that did not start."""


class Worker:
    """One worker process and what it holds."""

    def __init__(self, number: int) -> None:
        self.id = f"local{number}-{secrets.token_hex(4)}"
        self.token = secrets.token_urlsafe(24)
        self.process: asyncio.subprocess.Process | None = None
        self.jobs: dict[str, Job] = {}
        self.stops: list[str] = []
        """Jobs that it is to stop, not yet told."""
        self.ready = False
        """It has asked for a job."""
        self.asking = False
        """It waits for a job."""
        self.takes_from = 0.0
        """Gets no job before this time of the loop."""
        self.stopping = False
        self.changed = asyncio.Event()
        """Wakes its requests that wait (``wake``)."""
        self.idle: asyncio.TimerHandle | None = None
        self.watch: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        """Let its requests that wait look again."""
        self.changed.set()
        self.changed.clear()

    def signal(self, number: signal.Signals, *, group: bool) -> None:
        """To the process or to its whole group; nothing where it has ended."""
        if self.process is not None and (group or self.process.returncode is None):
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(self.process.pid, number)

    def forget_timers(self) -> None:
        """No timer fires any more."""
        for timer in (self.idle, self.watch):
            if timer is not None:
                timer.cancel()


class Fleet:
    """``scale`` after every change; ``demand`` says how many workers have work, ``gone`` is told of each that ended."""

    def __init__(
        self, config: LocalConfig, faults: Faults, *, demand: Callable[[], int], gone: Callable[[Worker], None]
    ) -> None:
        self._config = config
        self._faults = faults
        self._demand = demand
        self._gone = gone
        self._number = 0
        self._closed = False
        self._guard: asyncio.subprocess.Process | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures = 0
        """Workers in a row that ended before they asked for a job."""
        self._not_before = 0.0
        self._paused_until = 0.0
        self._url = ""
        self.workers: dict[str, Worker] = {}

    @property
    def paused(self) -> bool:
        """The endpoint may have no workers now."""
        return self._faults.standing("no-workers") or self._loop.time() < self._paused_until

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def pause(self, seconds: float) -> None:
        """No workers for so long."""
        self._paused_until = max(self._paused_until, self._loop.time() + seconds)
        self._loop.call_later(seconds + TICK, self.scale)
        self.scale()

    def scale(self) -> None:
        """Start what is missing, and wake all that wait for a job."""
        if self._closed:
            return
        live = [worker for worker in self.workers.values() if not worker.stopping]
        for worker in live:
            worker.wake()
        if self.paused:
            for worker in live:
                if not worker.jobs:
                    self.stop(worker)
        elif self._loop.time() >= self._not_before:
            wanted = min(max(self._demand(), self._config.min_workers), self._config.max_workers)
            for _ in range(wanted - len(live)):
                self._start()

    def asked(self, worker: Worker) -> None:
        """A worker asks for a job: it is up."""
        if not worker.ready:
            worker.ready = True
            self._failures = 0
            self._watch(worker, self._config.ping_seconds * MISSED_PINGS)
            if fault := self._faults.strike("cold-start"):
                seconds = 5.0 if fault.seconds is None else fault.seconds
                worker.takes_from = self._loop.time() + seconds
                self._loop.call_later(seconds + TICK, worker.wake)
            self.rest(worker)

    def pinged(self, worker: Worker) -> None:
        """A worker has pinged."""
        if worker.ready:
            self._watch(worker, self._config.ping_seconds * MISSED_PINGS)

    def work(self, worker: Worker) -> None:
        """A worker has got a job."""
        if worker.idle is not None:
            worker.idle.cancel()

    def rest(self, worker: Worker) -> None:
        """A worker holds no job: it ends after a while, unless it is one of the least."""
        if not worker.jobs and not worker.stopping:
            self.work(worker)
            worker.idle = self._loop.call_later(self._config.idle_seconds, self._rested, worker)

    def stop(self, worker: Worker) -> None:
        """Ask a worker to end, and end it after ``STOP_SECONDS``."""
        if worker.stopping:
            return
        worker.stopping = True
        worker.forget_timers()
        worker.signal(signal.SIGTERM, group=False)
        worker.wake()
        self._loop.call_later(STOP_SECONDS, self.kill, worker)

    def kill(self, worker: Worker) -> None:
        """SIGKILL for a worker and all that it started."""
        worker.signal(signal.SIGKILL, group=True)

    async def open(self, url: str) -> None:
        """Start the first workers; they find the endpoint at ``url``: ``http://127.0.0.1:PORT/v2/ENDPOINT``."""
        self._url = url
        self._guard = await asyncio.create_subprocess_exec(
            *GUARD, "watch", stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        self.scale()

    async def close(self) -> None:
        """End all workers."""
        self._closed = True
        for worker in list(self.workers.values()):
            self.stop(worker)
            self._loop.call_later(CLOSE_SECONDS, self.kill, worker)
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._guard is not None:
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            await self._guard.wait()

    def _rested(self, worker: Worker) -> None:
        live = sum(not other.stopping for other in self.workers.values())
        # One of the least stays, unless it hangs in a job that it was told to stop.
        if not worker.jobs and (live > self._config.min_workers or not worker.asking):
            self.stop(worker)

    def _watch(self, worker: Worker, seconds: float) -> None:
        if worker.watch is not None:
            worker.watch.cancel()
        if not worker.stopping:
            worker.watch = self._loop.call_later(seconds, self._silent, worker)

    def _silent(self, worker: Worker) -> None:
        log.error("a worker was lost", worker=worker.id, reason="no ping" if worker.ready else "did not start")
        worker.stopping = True
        self.kill(worker)

    def _start(self) -> None:
        self._number += 1
        worker = Worker(self._number)
        self.workers[worker.id] = worker
        self._watch(worker, self._config.start_seconds)
        task = asyncio.create_task(self._run(worker))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, worker: Worker) -> None:
        """A worker's process from its start to its end."""
        try:
            process = await asyncio.create_subprocess_exec(
                *GUARD,
                "start",
                str(os.getpid()),
                *self._config.worker_command,
                env=self._environment(worker),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # Standard output is the platform's own.
                start_new_session=True,
            )
            worker.process = process
            self._tell_guard(f"+{process.pid}")
            if worker.stopping:
                self.kill(worker)
            code = await process.wait()
            self.kill(worker)  # What it started.
            self._tell_guard(f"-{process.pid}")
        finally:
            worker.process = None
            del self.workers[worker.id]
        asked_to = worker.stopping
        worker.stopping = True
        worker.forget_timers()
        worker.wake()
        if not asked_to:
            log.warning("a worker ended", worker=worker.id, code=code, jobs=list(worker.jobs))
            if not worker.ready:
                self._failures += 1
                wait = min(2.0 ** (self._failures - 1) / 2, MAX_WAIT_SECONDS)
                self._not_before = self._loop.time() + wait
                self._loop.call_later(wait + TICK, self.scale)
        self._gone(worker)
        self.scale()

    def _tell_guard(self, line: str) -> None:
        assert self._guard is not None
        assert self._guard.stdin is not None
        self._guard.stdin.write(line.encode() + b"\n")

    def _environment(self, worker: Worker) -> dict[str, str]:
        config = self._config
        query = f"gpu=local&token={worker.token}"
        direct = ",".join(filter(None, [config.env.get("NO_PROXY", ""), "127.0.0.1"]))
        return {
            "RUNPOD_LOG_LEVEL": "INFO",  # The package's own level also prints what jobs answer.
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            **config.env,
            "NO_PROXY": direct,
            "RUNPOD_ENDPOINT_ID": config.endpoint,
            "RUNPOD_POD_ID": worker.id,
            "RUNPOD_AI_API_KEY": worker.token,
            "RUNPOD_PING_INTERVAL": str(config.ping_seconds * 1_000),
            "RUNPOD_WEBHOOK_GET_JOB": f"{self._url}/job-take/$ID?{query}",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{self._url}/job-done/$RUNPOD_POD_ID/$ID?{query}",
            "RUNPOD_WEBHOOK_PING": f"{self._url}/ping/$RUNPOD_POD_ID?{query}",
        }
