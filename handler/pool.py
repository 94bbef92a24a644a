"""Warm child processes: one more than is in use, up to a maximum; one that ended is replaced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from common.errors import ExportError
from handler.process import ChildProcess
from handler.protocol import ChildConfig

log = structlog.get_logger()

SPARE = 1
RESTART_SECONDS = 1.0
MAX_RESTART_SECONDS = 30.0


class WorkerPool:
    """``acquire`` gives a child to one user at a time, ``release`` takes it back."""

    def __init__(
        self, config: ChildConfig, size: int, *, started: Callable[[float], None] = lambda _seconds: None
    ) -> None:
        """``started`` is told of each child that comes up, and how many seconds that took."""
        self._started = started
        self._config = config
        self._size = size
        self._idle: list[ChildProcess] = []
        self._all: set[ChildProcess] = set()
        self._changed = asyncio.Condition()
        self._starting: set[asyncio.Task[None]] = set()
        self._coming = 0
        """Children that are being started."""
        self._closed = False

    def start(self) -> None:
        """Begin to start the first child and a spare; more come when they are needed."""
        self._spawn(min(SPARE + 1, self._size))

    async def adopt(self, child: ChildProcess) -> None:
        """Take in a child that was started elsewhere, with the config of this pool."""
        self._all.add(child)
        await self.release(child, reuse=True)
        self._keep_spare()

    @property
    def ready(self) -> bool:
        """At least one child is up."""
        return not self._closed and any(not child.ended for child in self._all)

    async def acquire(self, job_id: str | None = None) -> ChildProcess:
        """An idle child, best the one that has read the payload of ``job_id``; waits for one."""
        async with self._changed:
            while True:
                for child in [child for child in self._idle if child.ended]:
                    self._idle.remove(child)
                    self._drop(child)
                if self._idle:
                    child = min(self._idle, key=lambda idle: _rank(idle, job_id))
                    self._idle.remove(child)
                    self._keep_spare()
                    return child
                self._keep_spare()
                await self._changed.wait()

    async def release(self, child: ChildProcess, *, reuse: bool) -> None:
        """Take a child back; without ``reuse`` it is ended and replaced."""
        if self._closed:
            return
        if reuse and not child.ended:
            async with self._changed:
                self._idle.append(child)
                self._changed.notify_all()
        else:
            await child.close()
            self._drop(child)

    async def close(self) -> None:
        """End all children."""
        self._closed = True
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        await asyncio.gather(*(child.close() for child in self._all))
        self._all.clear()

    def _drop(self, child: ChildProcess) -> None:
        self._all.discard(child)
        self._keep_spare()

    def _keep_spare(self) -> None:
        missing = SPARE - len(self._idle) - self._coming
        self._spawn(min(missing, self._size - len(self._all) - self._coming))

    def _spawn(self, count: int) -> None:
        if count > 0 and not self._closed:
            self._coming += count
            task = asyncio.create_task(self._start(count))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def _start(self, count: int) -> None:
        wait = RESTART_SECONDS
        while count:
            began = time.perf_counter()
            try:
                child = await ChildProcess.start(self._config)
            except (ExportError, OSError) as error:  # The machine may be short of processes, files or memory.
                log.error("a worker does not start", reason=str(error), again_in_seconds=wait)
                await asyncio.sleep(wait)
                wait = min(wait * 2, MAX_RESTART_SECONDS)
                continue
            self._started(time.perf_counter() - began)
            count -= 1
            self._coming -= 1
            self._all.add(child)
            async with self._changed:
                self._idle.append(child)
                self._changed.notify_all()


def _rank(child: ChildProcess, job_id: str | None) -> int:
    """Best the child that has read this job's payload, then one that holds none."""
    if child.kept_job is None:
        return 1
    return 0 if child.kept_job == job_id else 2
