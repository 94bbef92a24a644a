"""What the last hours were like, for charts."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from litestar import Controller, get
from litestar.params import Parameter

from common.contract import FailureCount, QueueStats, Stats, StatsBucket
from common.errors import InvalidRequest
from control_plane.jobs.records import iso
from control_plane.jobs.store import JobStore, now_ms
from control_plane.operations.auth import ADMIN, NEEDS
from control_plane.operations.openapi import REFUSALS, error_specs

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
        opt={NEEDS: ADMIN},
        operation_id="getStats",
        summary="The queue, and the jobs of the last hours",
        responses=error_specs(*REFUSALS, "INVALID_EXPORT_REQUEST", "QUEUE_UNAVAILABLE", "INTERNAL"),
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
        end = (now // step + 1) * step
        first = end - -(-hours * 3_600_000 // step) * step
        buckets = [
            StatsBucket(
                start=iso(span.start),
                submitted=span.submitted,
                completed=span.completed,
                canceled=span.canceled,
                frames=span.frames,
            )
            for span in await store.activity(range(first, end, step), step)
        ]
        codes: Counter[str] = Counter()
        for number, code, count in await store.failures(first, step):
            if number < len(buckets):  # one that failed while we count is in the next answer
                buckets[number].failed += count
                codes[code] += count
        waiting, oldest = await store.queued(None)
        return Stats(
            at=iso(now),
            queue=QueueStats(
                queued=waiting, running=await store.running(), capacity=store.capacity, oldest_seconds=round(oldest, 3)
            ),
            bucket_seconds=step // 1000,
            buckets=buckets,
            failures=[
                FailureCount(code=code, count=count)
                for code, count in sorted(codes.items(), key=lambda item: (-item[1], item[0]))
            ],
        )
