"""How many jobs a client has, against how many it may have."""

from __future__ import annotations

import math

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.errors import QuotaReached
from control_plane.jobs.records import Quota
from control_plane.jobs.tables import jobs

DAY_MS = 86_400_000
ACTIVE_SECONDS = 30
"""When to come again where one of the client's jobs has to end first: nobody knows when it does."""


async def quota_used(connection: AsyncConnection, client: str, quota: Quota, now: int) -> Quota:
    """How many jobs of a client count against each quota that there is."""
    mine = select(func.count()).where(jobs.c.client == client)
    active = made = None
    if quota.active_jobs is not None:
        active = await connection.scalar(mine.where(jobs.c.status.in_(["queued", "running"])))
    if quota.jobs_per_day is not None:
        made = await connection.scalar(mine.where(jobs.c.created_at > now - DAY_MS))
    return Quota(active, made)


async def check_quota(connection: AsyncConnection, client: str, quota: Quota, *, now: int, made: int) -> None:
    """Raise QuotaReached where a client has no place for a job; ``made`` are those of the count that it is about."""
    used = await quota_used(connection, client, quota, now)
    if quota.active_jobs is not None and (used.active_jobs or 0) - made >= quota.active_jobs:
        raise QuotaReached(
            f"{quota.active_jobs:,} exports of this client may wait or run at once, and so many do.",
            quota="active_jobs",
            limit=quota.active_jobs,
            retryAfterSeconds=ACTIVE_SECONDS,
        )
    if quota.jobs_per_day is not None and (used.jobs_per_day or 0) - made >= quota.jobs_per_day:
        # There is a place again once the oldest of those that fill the quota is a day old.
        filling = (
            select(jobs.c.created_at)
            .where(jobs.c.client == client, jobs.c.created_at > now - DAY_MS)
            .order_by(jobs.c.created_at.desc())
            .offset(quota.jobs_per_day + made - 1)
            .limit(1)
        )
        oldest = await connection.scalar(filling)
        wait = DAY_MS if oldest is None else oldest + DAY_MS - now
        raise QuotaReached(
            f"{quota.jobs_per_day:,} exports of this client may be made in 24 hours, and so many were.",
            quota="jobs_per_day",
            limit=quota.jobs_per_day,
            retryAfterSeconds=max(1, math.ceil(wait / 1000)),
        )
