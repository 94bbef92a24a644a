"""Graphs on a Runpod endpoint: a slot is one job in flight.

Each attempt has a prefix of its own under the graph's folder, named after what it is made of: a batch that was killed
finds what its jobs have published meanwhile, or joins those that still run.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple, TypeVar
from urllib.parse import quote, unquote

import msgspec

from common.contract import JobInput, Progress, Report, WorkerProgress
from common.embedding.routing import fields_of
from common.errors import CapsuleUnreadable, ExportError, GateFailed
from common.storage import Storage
from control_plane.backends.runpod_api import ENDED, RUNNING, JobStatus, RunpodApi, of_worker, why
from control_plane.batch.slots import Kept, Plan, Work
from control_plane.errors import PlatformUnavailable
from handler import claim
from handler.job import Published, check_bytes, published

FIRST_LOOK_SECONDS = 0.5
"""After a job is handed over; each further look comes half as late again, up to the interval of the settings."""
STORAGE_SECONDS = 10.0
"""A job that is said to run is looked for in storage so often too: the platform may have lost its end."""
MAX_ATTEMPTS = 1_000
MARGIN_SECONDS = 2.0
"""A worker gives up so long before the platform would end it, to say so itself."""
GRACE_SECONDS = 60.0
"""After its time to live and to run, a job of which nothing can be learned is given up."""
AWAY_SECONDS = 300.0
"""A platform that does not answer for so long is given up."""
CANCEL_SECONDS = 5.0
STAGED = ".batch/"
"""Payloads that no worker could read where they come from."""
T = TypeVar("T")
_ATTEMPT = re.compile(r"[0-9a-f]{16}-\d{1,4}/")


class Endpoint(NamedTuple):
    """What all slots share."""

    api: RunpodApi
    storage: Storage
    prefix: str
    """Of the destination."""
    plan: Plan
    execution_timeout_ms: int
    ttl_ms: int
    poll_seconds: float

    @property
    def policy(self) -> dict[str, int]:
        """What the platform is told of each job."""
        return {"executionTimeout": self.execution_timeout_ms, "ttl": self.ttl_ms}

    def clear(self) -> None:
        """Remove the payloads that graphs which failed have left, and batches that were killed."""
        self.storage.delete(self.prefix + STAGED)


class RunpodSlot:
    """Stages a payload, hands over a job, looks until its manifest lies in the destination."""

    def __init__(self, number: int, endpoint: Endpoint) -> None:
        self.label = f"job {number}"
        self.device = "runpod"
        self.strikes = 0
        self._at = endpoint

    async def ready(self) -> None:
        """There is nothing to bring up."""

    async def close(self) -> None:
        """What ran was canceled with its task."""

    async def run(self, work: Work, tell: Callable[[Progress], None]) -> Callable[[], Kept]:
        """Run a graph, or take over what an earlier batch has begun."""
        payload = await asyncio.to_thread(self._stage, work)
        prefix, found = await asyncio.to_thread(self._attempt, work)
        if found is None:
            found = await self._follow(self._input(work, payload, prefix), tell)
        return partial(self._check, work, prefix, found)

    def _input(self, work: Work, payload: str, prefix: str) -> JobInput:
        plan = self._at.plan
        return JobInput(
            job_id=prefix.rstrip("/").rpartition("/")[2],
            payload_ref=payload,
            payload_sha256=work.payload.sha256,
            payload_size=work.payload.size,
            output_prefix=prefix,
            **fields_of(plan.choice),
            options=plan.options,
            source=work.graph.origin,
            created_at=plan.generated_at,
            timeout_seconds=max(1.0, self._at.execution_timeout_ms / 1000 - MARGIN_SECONDS),
        )

    # --- the platform -----------------------------------------------------------------------------------

    async def _follow(self, job: JobInput, tell: Callable[[Progress], None]) -> Published:
        """Hand over a job and look until its attempt has published. Raises what it ended in, PlatformUnavailable."""
        at = self._at
        patience = (at.ttl_ms + 2 * at.execution_timeout_ms) / 1000 + GRACE_SECONDS
        end = asyncio.get_running_loop().time() + patience
        try:
            handed = await self._asked(lambda: at.api.run(msgspec.to_builtins(job), at.policy, None))
            return await self._look(handed.id, job.output_prefix, tell, end)
        except asyncio.CancelledError:
            await asyncio.to_thread(claim.close, at.storage, job.output_prefix, force=True)
            raise

    async def _look(self, runpod_id: str, prefix: str, tell: Callable[[Progress], None], end: float) -> Published:
        """Look until an attempt has published; at ``end``, by the loop's clock, it is given up."""
        at, loop = self._at, asyncio.get_running_loop()
        pause, looked = FIRST_LOOK_SECONDS, loop.time()
        try:
            while True:
                await asyncio.sleep(min(pause, at.poll_seconds))
                pause *= 1.5
                answer = await self._asked(lambda: at.api.status(runpod_id))
                late = loop.time() > end
                if answer is not None and answer.status not in ENDED and not late:
                    if answer.status in RUNNING and (step := _last_step(answer.output)) is not None:
                        tell(step)
                    if loop.time() - looked < STORAGE_SECONDS:
                        continue
                    looked = loop.time()
                    if (found := await asyncio.to_thread(self._found, prefix)) is not None:
                        return found
                    continue
                if late:
                    await at.api.cancel(runpod_id)
                found = await asyncio.to_thread(self._over, prefix, answer, late=late)
                if found is not None:
                    return found
        except asyncio.CancelledError:
            with contextlib.suppress(ExportError, TimeoutError):  # with its claim closed the run stops by itself
                async with asyncio.timeout(CANCEL_SECONDS):
                    await at.api.cancel(runpod_id)
            raise

    async def _asked(self, ask: Callable[[], Awaitable[T]]) -> T:
        """The platform's answer; while it is away it is asked again, for at most ``AWAY_SECONDS``."""
        while True:
            try:
                answer = await ask()
            except PlatformUnavailable:
                if self._at.api.away_seconds > AWAY_SECONDS:
                    self.strikes += 1
                    raise
            else:
                self.strikes = 0
                return answer

    def _over(self, prefix: str, answer: JobStatus | None, *, late: bool) -> Published | None:
        """What an attempt has published of which the platform says that it is over; None while a run of it is alive
        that the platform does not know. Raises what it ended in."""
        storage = self._at.storage
        if (found := self._found(prefix)) is not None:
            return found
        if not claim.close(storage, prefix, force=late):
            return None
        if (found := self._found(prefix)) is not None:  # between the look and the close
            return found
        closed = claim.read(storage, prefix)
        if closed is not None and closed.error is not None and (answer is None or answer.status == "COMPLETED"):
            raise of_worker(closed.error)  # The run that held the claim was another delivery of this attempt.
        raise why(answer)

    def _found(self, prefix: str) -> Published | None:
        """What an attempt has published. Raises GateFailed, after which nobody may publish there."""
        try:
            return published(self._at.storage, prefix, "")
        except CapsuleUnreadable as wrong:
            self._spoil(prefix)
            raise GateFailed(wrong.message) from wrong

    # --- storage ----------------------------------------------------------------------------------------

    def _stage(self, work: Work) -> str:
        """The payload where workers can read it."""
        bucket = self._at.prefix.split("/", 3)[2]
        if work.graph.address.startswith(f"s3://{bucket}/"):
            return work.graph.address
        ref = self._staged(work)
        if self._at.storage.size(ref) != work.payload.size:
            self._at.storage.put(work.payload.path, ref, sha256=work.payload.sha256)
        return ref

    def _staged(self, work: Work) -> str:
        return f"{self._at.prefix}{STAGED}{quote(work.graph.name)}-{work.payload.sha256[:16]}"

    def _attempt(self, work: Work) -> tuple[str, Published | None]:
        """The prefix of the next attempt: the first that is not over; with what it has published already."""
        storage = self._at.storage
        made_of = hashlib.sha256(f"{work.payload.sha256} {self._at.plan.sha256}".encode()).hexdigest()[:16]
        folder = f"{self._at.prefix}{quote(work.graph.name)}/"
        for number in range(1, MAX_ATTEMPTS + 1):
            prefix = f"{folder}{made_of}-{number}/"
            try:
                found = self._found(prefix)
            except GateFailed:
                continue
            if found is not None or claim.state(storage, prefix) in ("free", "held"):
                return prefix, found
            claim.close(storage, prefix)  # its run is dead
        raise ExportError(f"{MAX_ATTEMPTS:,} attempts at this graph have failed; remove what lies under {folder}")

    def _check(self, work: Work, prefix: str, found: Published) -> Kept:
        """Compare every byte with the manifest, then remove what earlier attempts left."""
        storage = self._at.storage
        try:
            check_bytes(storage, prefix, found.manifest, work.payload.sha256)
        except GateFailed:
            self._spoil(prefix)
            raise
        for name in claim.NAMES:
            storage.delete(prefix + name)
        storage.delete(self._staged(work))
        folder = f"{self._at.prefix}{quote(work.graph.name)}/"
        left = {it.ref: it.size for it in storage.found(folder)}
        for ref in left:
            if _ATTEMPT.match(ref.removeprefix(folder)) and not ref.startswith(prefix):
                storage.delete(ref)
        sizes = {unquote(ref.removeprefix(prefix)): size for ref, size in left.items() if ref.startswith(prefix)}
        return Kept(prefix.removeprefix(self._at.prefix), sizes, msgspec.convert(found.output.metrics, Report))

    def _spoil(self, prefix: str) -> None:
        """Remove an attempt that is not what it says; nobody may publish there any more."""
        self._at.storage.delete(prefix)
        claim.close(self._at.storage, prefix, force=True)


def _last_step(told: object) -> Progress | None:
    try:
        return msgspec.convert(told, WorkerProgress).steps[-1]
    except (msgspec.ValidationError, IndexError):
        return None  # a run that has not reported yet
