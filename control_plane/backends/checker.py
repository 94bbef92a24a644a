"""Reads staged payloads in child processes before a request is answered."""

from __future__ import annotations

import asyncio

import structlog

from common.contract import Source
from common.errors import Canceled, OutOfMemory, PayloadTooLarge, WorkerLost
from control_plane.errors import QueueFull, QueueUnavailable
from control_plane.operations.metrics import Metrics
from control_plane.operations.tracing import current
from handler.pool import WorkerPool
from handler.process import ChildProcess
from handler.protocol import Check, Checked

log = structlog.get_logger()

CHECKERS = 2
"""Payloads checked at once: a large and a small one."""
CHECK_SECONDS = 120.0
LARGE_PAYLOAD = 4 << 20
"""Bytes as staged: larger payloads are checked one after the other, beside the small ones."""
TURN_SECONDS = 60.0
"""A request waits so long for its turn to be checked, and so long for a worker; then it is answered with 503."""


class PayloadChecker:
    """Says what is in a payload, or what is wrong with it."""

    def __init__(self, pool: WorkerPool, metrics: Metrics) -> None:
        self._pool = pool
        self._metrics = metrics
        self._turns = {False: asyncio.Semaphore(1), True: asyncio.Semaphore(1)}

    async def check(self, job_id: str, payload_ref: str, size: int, source: Source | None) -> Checked:
        """Let a child read a staged payload; it keeps what it read for the job of that id. ``source`` stands in for
        what the payload does not say."""
        command = Check(job_id=job_id, payload_ref=payload_ref, source=source, trace=current().traceparent)
        turn = self._turns[size > LARGE_PAYLOAD]
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await turn.acquire()
        except TimeoutError as error:
            raise QueueFull("Too many payloads wait to be checked. Try again later.") from error
        try:
            return await self._check_in_child(command)
        except WorkerLost:
            return await self._check_in_child(command)
        finally:
            turn.release()

    async def _check_in_child(self, command: Check) -> Checked:
        try:
            async with asyncio.timeout(TURN_SECONDS):
                child = await self._pool.acquire()
        except TimeoutError as error:
            raise QueueUnavailable("No worker is up to check the payload. Try again later.") from error
        with self._metrics.check.time():
            try:
                return await self._check(child, command)
            finally:
                await asyncio.shield(self._pool.release(child, reuse=child.usable))

    async def _check(self, child: ChildProcess, command: Check) -> Checked:
        child.kept_job = None
        too_slow = PayloadTooLarge(f"the payload could not be read within {CHECK_SECONDS:.0f} seconds", field="$")
        timer = asyncio.get_running_loop().call_later(CHECK_SECONDS, child.kill, too_slow)
        try:
            await child.send(command)
            message = await child.receive()
        except OutOfMemory as error:
            raise PayloadTooLarge("the payload needs more memory than a worker may use", field="$") from error
        except WorkerLost as error:
            log.warning("a check was lost", job_id=command.job_id, reason=error.message)
            raise
        except asyncio.CancelledError:
            child.kill(Canceled("nobody waits for the answer"))
            raise
        finally:
            timer.cancel()
        if not isinstance(message, Checked):
            raise WorkerLost("the worker answered something else than what it was asked")
        child.kept_job = command.job_id
        return message
