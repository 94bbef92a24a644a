"""Who drives a job: never nobody for long, and nobody for a job that waits in the queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from live_server import new_job
from sqlalchemy.exc import IntegrityError

from common.contract import Progress
from common.errors import StorageFailed
from control_plane.backends.leases import Leases
from control_plane.jobs.database import Database
from control_plane.jobs.hub import EventHub
from control_plane.jobs.records import JobRecord, NewEvent
from control_plane.jobs.store import JobStore


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}"
    return str(request.getfixturevalue("postgres_url"))


@asynccontextmanager
async def replicas(url: str) -> AsyncIterator[tuple[JobStore, JobStore]]:
    """Two replicas that share a database."""
    database = Database(url)
    await database.migrate()
    try:
        yield tuple(  # type: ignore[misc]
            JobStore(database, EventHub(), queue_capacity=100, replica=replica) for replica in ("first", "second")
        )
    finally:
        await database.close()


def back_in_the_queue() -> NewEvent:
    """What is told of an attempt that failed."""
    return NewEvent("stage_progress", Progress(stage="queued", progress=0, stage_progress=100, message="Again"))


@pytest.mark.parametrize("troubled", [False, True])
def test_a_job_that_was_taken_without_word_of_it_is_driven_all_the_same(url: str, troubled: bool) -> None:
    async def inside() -> None:
        driven: list[str] = []
        failures = [StorageFailed("the bucket is away")] if troubled else []

        async def adopted(job: JobRecord) -> None:
            if failures:
                raise failures.pop()
            driven.append(job.id)

        async with replicas(url) as (store, _):
            leases = Leases(store, driven=lambda: set(driven), adopted=adopted, lost=driven.remove)
            leases.start()
            job, _new = await store.create(new_job(backend="runpod_queue"))
            # The database has committed, and its answer is lost on the way.
            assert await store.hand_over() is not None
            async with asyncio.timeout(20):
                while not driven:
                    await asyncio.sleep(0.05)
            await leases.stop()
            assert driven == [job.id]

    asyncio.run(inside())


def test_a_replica_starts_although_a_job_that_it_drove_cannot_be_taken_up_yet(url: str) -> None:
    async def inside() -> None:
        driven: list[str] = []
        failures = [StorageFailed("the bucket is away")]

        async def adopted(job: JobRecord) -> None:
            if failures:
                raise failures.pop()
            driven.append(job.id)

        async with replicas(url) as (store, _):
            jobs = {(await store.create(new_job(backend="runpod_queue")))[0].id for _n in range(3)}
            for _n in jobs:
                await store.hand_over()
            leases = Leases(store, driven=lambda: set(driven), adopted=adopted, lost=driven.remove)
            leases.start()
            async with asyncio.timeout(20):
                while set(driven) != jobs:
                    await asyncio.sleep(0.05)
            await leases.stop()
            assert len(driven) == 3

    asyncio.run(inside())


def test_a_replica_is_up_while_a_storage_that_hangs_keeps_it_from_what_it_drove(url: str) -> None:
    async def inside() -> None:
        over, taken = asyncio.Event(), list[str]()

        async def adopted(job: JobRecord) -> None:
            taken.append(job.id)
            await over.wait()

        async with replicas(url) as (store, _):
            job, _new = await store.create(new_job())
            assert await store.claim(max_weight=None) is not None
            leases = Leases(store, driven=set, adopted=adopted, lost=taken.remove)
            leases.start()
            async with asyncio.timeout(20):
                while not taken:
                    await asyncio.sleep(0.05)
            assert leases.alive
            assert taken == [job.id]
            over.set()
            await leases.stop()
            assert not leases.alive

    asyncio.run(inside())


def test_a_replica_keeps_what_it_runs_while_it_takes_up_another_ones_job_slowly(url: str) -> None:
    async def inside() -> None:
        async with replicas(url) as (first, second):
            await first.create(new_job())
            running = await first.claim(max_weight=None)
            assert running is not None
            begun, over, taken = asyncio.Event(), asyncio.Event(), list[str]()

            async def adopted_slowly(_job: JobRecord) -> None:
                begun.set()
                await over.wait()

            async def adopted(job: JobRecord) -> None:
                taken.append(job.id)

            slow = Leases(first, driven=lambda: {running.id}, adopted=adopted_slowly, lost=taken.append)
            slow.start()
            left, _new = await second.create(new_job())
            await second.claim(max_weight=None)
            await second.release()
            await begun.wait()
            quick = Leases(second, driven=lambda: set(taken), adopted=adopted, lost=taken.remove)
            quick.start()
            async with asyncio.timeout(30):
                while left.id not in taken:
                    await asyncio.sleep(0.05)
            over.set()
            await quick.stop()
            await slow.stop()
            assert taken == [left.id]

    asyncio.run(inside())


def test_an_attempt_that_two_replicas_saw_fail_goes_back_to_the_queue_once(url: str) -> None:
    async def inside() -> None:
        async with replicas(url) as (first, second):
            job, _ = await first.create(new_job(backend="runpod_queue"))
            assert await first.hand_over() is not None
            assert await first.start(job.id, 1, at=0) is not None
            moves = [await store.move(job.id, "queued", back_in_the_queue(), attempt=1) for store in (first, second)]
            assert [move is not None for move in moves] == [True, False]
            assert [event.message for event in await first.events(job.id, 0, 100)] == [
                "Queued",
                "Export started",
                "Again",
            ]

    asyncio.run(inside())


def test_an_error_of_the_database_does_not_tell_the_secret_of_a_webhook(url: str) -> None:
    async def inside() -> None:
        async with replicas(url) as (store, _):
            given = new_job(backend="runpod_queue")
            job, _new = await store.create(given)
            with pytest.raises(IntegrityError) as told:
                await store.create(given)
            assert "INSERT INTO jobs" in str(told.value)
            assert job.payload_sha256 not in str(told.value).partition("INSERT INTO jobs")[2]

    asyncio.run(inside())
