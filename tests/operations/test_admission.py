"""A queue that is too deep or too old turns jobs away, with the time at which it is worth trying again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from control_plane.errors import RETRY_AFTER_SECONDS, QueueUnavailable, RateLimited, headers_of
from control_plane.exports.admission import MAX_RETRY_SECONDS, Admission, retry_after
from control_plane.operations.profiles import Profile

TEN: dict[str, Any] = {"running": 2, "took": 20.0}


class Queue:
    """Figures of one profile's queue, in memory; every other profile has an empty one."""

    def __init__(self, *, depth: int = 0, age: float = 0.0, running: int = 0, took: float | None = None) -> None:
        self._figures = (depth, age)
        self._pace = (running, took)

    async def queued(self, profile: str | None) -> tuple[int, float]:
        return self._figures if profile in ("bulk", None) else (0, 0.0)

    async def pace(self, profile: str | None, seconds: float) -> tuple[int, float | None]:
        assert seconds == 600
        return self._pace if profile in ("bulk", None) else (0, None)


def profile(name: str = "bulk") -> Profile:
    return Profile(name=name, execution_timeout_ms=60_000, ttl_ms=600_000, queue_depth=10, queue_age_seconds=120)


def admission(queue: Queue, *names: str, capacity: int = 1_000) -> Admission:
    return Admission(queue, [profile(name) for name in names or ("bulk",)], capacity=capacity)


def refusal(queue: Queue) -> QueueUnavailable:
    with pytest.raises(QueueUnavailable) as caught:
        asyncio.run(admission(queue).check(profile()))
    return caught.value


@pytest.mark.parametrize(("depth", "age"), [(0, 0), (9, 0), (9, 120.0)])
def test_a_queue_at_its_limits_still_takes_a_job(depth: int, age: float) -> None:
    asyncio.run(admission(Queue(depth=depth, age=age)).check(profile()))


def test_a_full_queue_of_one_profile_leaves_the_others_open() -> None:
    queue = Queue(depth=10)
    refusal(queue)
    asyncio.run(admission(queue).check(profile("interactive")))


@pytest.mark.parametrize(
    ("figures", "details"),
    [
        # Two at a time, 20 s each: one ends in 10 s; one, then eleven must end before there is room.
        ({"depth": 10, **TEN}, {"depth": 10, "limit": 10, "retryAfterSeconds": 10}),
        ({"depth": 20, **TEN}, {"depth": 20, "limit": 10, "retryAfterSeconds": 110}),
        # The older half of eight jobs has waited too long: four must end.
        ({"depth": 8, "age": 240.0, **TEN}, {"ageSeconds": 240.0, "limit": 120, "retryAfterSeconds": 40}),
        ({"depth": 1, "age": 121.0, **TEN}, {"ageSeconds": 121.0, "limit": 120, "retryAfterSeconds": 10}),
    ],
)
def test_a_refusal_says_what_is_full_and_when_there_will_be_room(
    figures: dict[str, Any], details: dict[str, Any]
) -> None:
    error = refusal(Queue(**figures))
    assert error.details == {"profile": "bulk", **details}
    assert headers_of(error) == {"Retry-After": str(details["retryAfterSeconds"])}


@pytest.mark.parametrize(
    ("must_end", "running", "took", "seconds"),
    [
        (1, 0, None, RETRY_AFTER_SECONDS),
        (500, 3, None, RETRY_AFTER_SECONDS),
        (1, 2, 0.1, 1),
        (7, 3, 2.0, 5),
        (7, 0, 2.0, 14),
        (1, 1, 601.0, MAX_RETRY_SECONDS),
        (10_000, 3, 1.0, MAX_RETRY_SECONDS),
    ],
)
def test_the_time_stays_between_a_second_and_ten_minutes(
    must_end: int, running: int, took: float | None, seconds: int
) -> None:
    assert retry_after(must_end, running, took) == seconds


def test_errors_that_name_no_time_keep_the_usual_one() -> None:
    assert headers_of(RateLimited("Too many streams.")) == {"Retry-After": "5"}


def test_a_body_is_not_read_while_no_profile_takes_a_job() -> None:
    queue = Queue(depth=10, running=2, took=20.0)
    asyncio.run(admission(queue, "bulk", "interactive").check_any())
    with pytest.raises(QueueUnavailable) as caught:
        asyncio.run(admission(queue).check_any())
    assert caught.value.details == {"profile": "bulk", "depth": 10, "limit": 10, "retryAfterSeconds": 10}


def test_a_body_is_not_read_while_the_queue_of_all_profiles_is_full() -> None:
    with pytest.raises(QueueUnavailable) as caught:
        asyncio.run(admission(Queue(depth=9, running=2, took=20.0), "bulk", "interactive", capacity=8).check_any())
    assert caught.value.details == {"depth": 9, "limit": 8, "retryAfterSeconds": 20}
