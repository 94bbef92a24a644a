"""Backpressure: a queue that is too deep or too old turns new jobs away, and says when to come again."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NoReturn, Protocol

from control_plane.errors import RETRY_AFTER_SECONDS, QueueFull
from control_plane.operations.profiles import Profile

RATE_SECONDS = 600.0
"""How far back runs are measured."""
MAX_RETRY_SECONDS = 600


class QueueFigures(Protocol):
    """What is measured of the jobs of a profile; ``control_plane.jobs.store.JobStore`` has it."""

    async def queued(self, profile: str | None) -> tuple[int, float]:
        """How many jobs wait (None: of all profiles), and for how many seconds the oldest has (0 where none does)."""
        ...

    async def pace(self, profile: str | None, seconds: float) -> tuple[int, float | None]:
        """How many jobs run, and for how many seconds those ran on average that a worker brought to an end in the last
        so many seconds; None where none did."""
        ...


class Admission:
    """Decides whether a job may queue. The answer holds for now: several requests at once may pass the depth by as
    many; the store holds the capacity of the queue strictly."""

    def __init__(self, queue: QueueFigures, profiles: Iterable[Profile], *, capacity: int) -> None:
        self._queue = queue
        self._profiles = profiles
        self._capacity = capacity

    async def check_any(self) -> None:
        """Raise QueueFull while the queue is full, or no profile takes a job: asked before the body, which names
        the profile, is read."""
        depth, _ = await self._queue.queued(None)
        if depth >= self._capacity:
            message = f"The queue is full ({depth:,} jobs are waiting)."
            await self._refuse(message, None, depth - self._capacity + 1, depth=depth, limit=self._capacity)
        refused: QueueFull | None = None
        for profile in self._profiles:
            try:
                await self.check(profile)
            except QueueFull as error:
                refused = refused or error
            else:
                return
        if refused is not None:
            raise refused

    async def check(self, profile: Profile) -> None:
        """Raise QueueFull while too many jobs of the profile wait, or one waits for too long; its details have
        the figure, the limit, and ``retryAfterSeconds``, which ``Retry-After`` repeats."""
        depth, age = await self._queue.queued(profile.name)
        if depth >= profile.queue_depth:
            too_many = depth - profile.queue_depth + 1
            message = f"{depth:,} jobs of profile {profile.name} are waiting, {profile.queue_depth:,} may."
            await self._refuse(message, profile.name, too_many, depth=depth, limit=profile.queue_depth)
        if depth and age > profile.queue_age_seconds:
            message = (
                f"The oldest job of profile {profile.name} has waited for {age:,.0f} seconds, "
                f"{profile.queue_age_seconds:,.0f} are allowed."
            )
            # So many have waited too long, if they came evenly; each that ends lets the oldest one go on.
            too_old = math.ceil(depth * (1 - profile.queue_age_seconds / age))
            await self._refuse(
                message, profile.name, too_old, ageSeconds=round(age, 1), limit=profile.queue_age_seconds
            )

    async def _refuse(self, message: str, profile: str | None, must_end: int, **figures: float) -> NoReturn:
        running, took = await self._queue.pace(profile, RATE_SECONDS)
        seconds = retry_after(must_end, running, took)
        raise QueueFull(
            f"{message} Try again in {seconds:,} seconds.",
            **({} if profile is None else {"profile": profile}),
            **figures,
            retryAfterSeconds=seconds,
        )


def retry_after(must_end: int, running: int, took: float | None) -> int:
    """Seconds until ``must_end`` jobs have ended, of which ``running`` (at least one) run at a time and each takes
    ``took`` seconds: 1 to ``MAX_RETRY_SECONDS``, and the usual ones where nothing was measured."""
    if took is None:
        return RETRY_AFTER_SECONDS
    return min(MAX_RETRY_SECONDS, max(1, math.ceil(must_end * took / max(1, running))))
