"""What the last hours were like, for charts."""

from __future__ import annotations

from typing import Annotated

from litestar import Controller, get
from litestar.params import Parameter

from common.contract import FailureCount, QueueStats, Stats, StatsBucket
from common.errors import InvalidRequest
from control_plane.jobs.records import iso
from control_plane.jobs.store import JobStore, now_ms
from control_plane.operations.openapi import error_specs

MAX_HOURS = 168
BUCKETS = 24
"""At the least; at most twice as many."""
_STEPS = (21_600, 14_400, 7_200, 3_600, 1_800, 900, 600, 300, 120)
"""Seconds of a bucket; each is at most twice the next, but for the shortest."""


class StatsController(Controller):
    """Figures for people; ``/metrics`` has those for programs."""

    tags = ("operations",)

    @get(
        "/v1/stats",
        operation_id="getStats",
        summary="The queue, and the jobs of the last hours",
        responses=error_specs("UNAUTHORIZED", "INVALID_EXPORT_REQUEST", "QUEUE_UNAVAILABLE", "INTERNAL"),
    )
    async def stats(
        self,
        store: JobStore,
        hours: Annotated[int, Parameter(description=f"1 to {MAX_HOURS}")] = 24,
    ) -> Stats:
        """24 to 48 equal buckets, the last of which is not over yet."""
        if not 1 <= hours <= MAX_HOURS:
            raise InvalidRequest(f"hours must be 1 to {MAX_HOURS}.", field="hours", allowed=[1, MAX_HOURS])
        now = now_ms()
        step = next(step for step in _STEPS if hours * 3600 >= BUCKETS * step) * 1000
        end = now // step + 1
        first = end - -(-hours * 3_600_000 // step)
        buckets = {number: StatsBucket(start=iso(number * step)) for number in range(first, end)}
        for number, count in await store.submissions(step, first * step):
            if number in buckets:
                buckets[number].submitted = count
        failures: dict[str, int] = {}
        for number, status, code, count, frames in await store.endings(step, first * step):
            bucket = buckets.get(number)
            if bucket is None:
                continue
            if status == "failed":
                bucket.failed += count
                failures[code or "INTERNAL"] = failures.get(code or "INTERNAL", 0) + count
            elif status == "canceled":
                bucket.canceled += count
            elif frames is not None:  # an export that has expired since was completed
                bucket.completed += count
                bucket.frames += frames
        waiting, oldest = await store.queued(None)
        return Stats(
            at=iso(now),
            queue=QueueStats(
                queued=waiting, running=await store.running(), capacity=store.capacity, oldest_seconds=round(oldest, 3)
            ),
            bucket_seconds=step // 1000,
            buckets=list(buckets.values()),
            failures=[
                FailureCount(code=code, count=count)
                for code, count in sorted(failures.items(), key=lambda item: (-item[1], item[0]))
            ],
        )
