"""How often one client may ask: a token bucket for each."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

from control_plane.errors import RateLimited

MAX_CLIENTS = 10_000
"""Buckets kept, about 1 MB; beyond, the one not asked for longest goes, and its client starts with a full one."""


class Allowance(NamedTuple):
    """What a client may still do."""

    limit: int
    """Requests that a full bucket holds."""
    remaining: int
    """Requests that it holds now."""
    reset_seconds: int
    """Until it is full again."""
    retry_after_seconds: int | None
    """Until the next request is answered; None where this one is."""


class Rate(NamedTuple):
    """A key's own: a bucket holds ``burst`` requests, and gets ``per_minute`` more in a minute. None: the usual, which
    for ``burst`` is one minute's requests where ``per_minute`` is given."""

    per_minute: int | None = None
    burst: int | None = None


USUAL = Rate()
MAX_BURST = 1_000_000


class TokenBuckets:
    """A bucket for each client, filled steadily; for one thread.

    Of a bucket only the moment is kept at which it is full again, so one that is full needs nothing kept.
    """

    def __init__(self, *, per_minute: int, burst: int, clients: int = MAX_CLIENTS) -> None:
        """The rate of clients that have none of their own."""
        self._per_minute = per_minute
        self._burst = burst
        self._clients = clients
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def empty(self, client: str, now: float) -> bool:
        """Whether ``take`` would refuse."""
        seconds = 60 / self._per_minute
        return max(self._full_at.get(client, now), now) + seconds - now > self._burst * seconds + 1e-9 * now

    def take(self, client: str, now: float, own: Rate = USUAL) -> Allowance:
        """One request of a client at a time, in seconds of any steady clock; a refused one takes nothing."""
        per_minute = own.per_minute or self._per_minute
        burst = own.burst or (min(per_minute, MAX_BURST) if own.per_minute else self._burst)
        seconds = 60 / per_minute
        full_at = max(self._full_at.get(client, now), now)
        after = full_at + seconds
        missing = after - now - burst * seconds
        refused = missing > 1e-9 * after  # what adding floats has rounded is no request
        if not refused:
            full_at = after
            self._put(client, full_at)
        held = burst - (full_at - now) / seconds
        return Allowance(
            burst,
            0 if refused else max(0, math.floor(held + 1e-6)),
            math.ceil(full_at - now),
            max(1, math.ceil(missing)) if refused else None,
        )

    def owe(self, client: str, now: float, count: int) -> None:
        """Take more after a request was answered, of a client without a rate of its own; what the bucket does not
        hold, its next requests wait for."""
        self._put(client, max(self._full_at.get(client, now), now) + count * 60 / self._per_minute)

    def left(self, client: str, now: float) -> int:
        """What the bucket of a client holds that has no rate of its own; below 0 where it owes something."""
        owed = max(self._full_at.get(client, now) - now, 0.0)
        return math.floor(self._burst - owed * self._per_minute / 60 + 1e-6)

    def _put(self, client: str, full_at: float) -> None:
        self._full_at[client] = full_at
        self._full_at.move_to_end(client)
        if len(self._full_at) > self._clients:
            self._full_at.popitem(last=False)


def rate_headers(allowance: Allowance) -> dict[str, str]:
    """What a client may still do."""
    return {
        "X-RateLimit-Limit": str(allowance.limit),
        "X-RateLimit-Remaining": str(allowance.remaining),
        "X-RateLimit-Reset": str(allowance.reset_seconds),
    }


def too_many(allowance: Allowance) -> RateLimited:
    """The refusal of a request that found its bucket empty."""
    return RateLimited(
        f"Too many requests: at most {allowance.limit:,} at once, and then steadily; try again later.",
        retryAfterSeconds=allowance.retry_after_seconds,
    )
