"""The job store: guarded changes, numbers without gaps, one end."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from live_server import new_job
from sqlalchemy import inspect, select

from common.contract import Event, Progress, Stage
from common.errors import InvalidRequest
from control_plane.errors import QueueUnavailable
from control_plane.exports.stream import lines
from control_plane.jobs.database import Database, db_now
from control_plane.jobs.hub import EventHub
from control_plane.jobs.records import TERMINAL_EVENTS, JobRecord, NewEvent
from control_plane.jobs.store import JobStore
from control_plane.jobs.tables import metadata
from control_plane.jobs.transitions import ALLOWED


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}"
    return str(request.getfixturevalue("postgres_url"))


@asynccontextmanager
async def _store(url: str, capacity: int = 100) -> AsyncIterator[JobStore]:
    database = Database(url)
    await database.migrate()
    try:
        yield JobStore(database, EventHub(), queue_capacity=capacity)
    finally:
        await database.close()


def _run(url: str, scenario: Callable[[JobStore], Awaitable[None]], capacity: int = 100) -> None:
    async def inside() -> None:
        async with _store(url, capacity) as store:
            await scenario(store)

    asyncio.run(inside())


def _step(progress: int, stage: Stage = "write_capsule") -> NewEvent:
    return NewEvent("stage_progress", Progress(stage=stage, progress=progress, stage_progress=0, message=f"{progress}"))


def _check(job: JobRecord, events: list[Event]) -> None:
    assert [event.seq for event in events] == list(range(1, job.last_seq + 1))
    figures = [event.progress for event in events]
    assert figures == sorted(figures)
    assert job.progress == figures[-1]
    ends = [event.seq for event in events if event.type in TERMINAL_EVENTS]
    assert ends in ([], [job.last_seq])


def test_migrations_make_the_tables_that_the_code_uses(url: str) -> None:
    async def inside() -> None:
        database = Database(url)
        await database.migrate()
        await database.migrate()
        async with database.read.connect() as connection:
            found = await connection.run_sync(
                lambda sync: {
                    table: {column["name"]: str(column["type"]) for column in inspect(sync).get_columns(table)}
                    for table in metadata.tables
                }
            )
            indexes = await connection.run_sync(
                lambda sync: {index["name"] for table in metadata.tables for index in inspect(sync).get_indexes(table)}
            )
        await database.close()
        for name, table in metadata.tables.items():
            wanted = {column.name: column.type.compile(database.read.dialect) for column in table.columns}
            assert found[name] == wanted
        assert {index.name for table in metadata.tables.values() for index in table.indexes} <= indexes

    asyncio.run(inside())


@pytest.mark.parametrize("seed", range(3))
def test_whoever_writes_at_once_the_log_has_no_gap_and_one_end(url: str, seed: int) -> None:
    chance = random.Random(seed)

    async def scenario(store: JobStore) -> None:
        record, _ = await store.create(new_job())
        job = await store.claim(max_weight=None)
        assert job is not None
        assert job.id == record.id

        async def progress() -> None:
            for _ in range(10):
                batch = [_step(chance.randint(0, 99)) for _ in range(chance.randint(1, 4))]
                await store.advance(job.id, job.attempt, batch)

        async def end(to: str) -> bool:
            await asyncio.sleep(chance.random() / 50)
            event = NewEvent(f"job_{to}", Progress(stage="failed", progress=0, stage_progress=0, message=to))  # type: ignore[arg-type]
            return await store.move(job.id, to, event, attempt=job.attempt) is not None  # type: ignore[arg-type]

        ends = await asyncio.gather(progress(), progress(), end("completed"), end("canceled"), end("failed"))
        assert ends.count(True) == 1
        after = await store.get(job.id)
        assert after is not None
        _check(after, await store.events(job.id, 0, 1_000))
        assert not await store.advance(job.id, job.attempt, [_step(50)])

    _run(url, scenario)


def test_of_fifty_writers_at_once_each_is_heard_once_and_one_ends_the_job(url: str) -> None:
    async def scenario(store: JobStore) -> None:
        await store.create(new_job())
        job = await store.claim(max_weight=None)
        assert job is not None
        end = NewEvent("job_failed", Progress(stage="failed", progress=0, stage_progress=0, message="failed"))
        told = await asyncio.gather(
            *(store.advance(job.id, job.attempt, [_step(n), _step(n)]) for n in range(40)),
            *(store.move(job.id, "failed", end, attempt=job.attempt) for _ in range(10)),
        )
        assert sum(moved is not None for moved in told[40:]) == 1
        after = await store.get(job.id)
        assert after is not None
        assert after.last_seq == 2 + 2 * told[:40].count(True) + 1
        _check(after, await store.events(job.id, 0, 1_000))

    _run(url, scenario)


def test_steps_that_two_replicas_have_read_are_told_once(url: str) -> None:
    async def scenario(store: JobStore) -> None:
        await store.create(new_job())
        job = await store.claim(max_weight=None)
        assert job is not None
        steps = [_step(10), _step(20)]
        told = await asyncio.gather(*(store.advance(job.id, 1, steps, told=(0, 2)) for _ in range(10)))
        assert told.count(True) == 1
        assert await store.advance(job.id, 1, [_step(30)], told=(2, 3))
        assert [event.progress for event in await store.events(job.id, 2, 100)] == [10, 20, 30]

    _run(url, scenario)


def test_names_hold_any_character_but_that_of_which_a_database_knows_nothing(url: str) -> None:
    async def scenario(store: JobStore) -> None:
        names = "a\x00b", "\u2028 ' \" % :x \\ \U0001f600"
        jobs = [(await store.create(dataclasses.replace(new_job(), project_name=name)))[0] for name in names]
        assert [job.project_name for job in jobs][1] == names[1]
        assert jobs[0].project_name in ("a\x00b", "a\ufffdb")
        for text in ("\x00", "a\x00", "' OR 1=1 --"):
            assert await store.get(text) is None
            assert await store.find_key("default", text, "0" * 64) is None

    _run(url, scenario)


def test_the_databases_clock_counts_milliseconds_of_now(url: str) -> None:
    async def inside() -> None:
        database = Database(url)
        before = time.time_ns() // 1_000_000
        async with database.read.connect() as connection:
            now = await connection.scalar(select(db_now()))
        await database.close()
        assert now is not None
        # Both run on this machine's clock; SQLite's has a resolution of a millisecond.
        assert before - 1 <= now <= time.time_ns() // 1_000_000 + 1

    asyncio.run(inside())


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_gives_each_event_once_and_in_order_whatever_it_was_told(url: str, seed: int) -> None:
    chance = random.Random(seed)

    async def scenario(store: JobStore) -> None:
        await store.create(new_job())
        job = await store.claim(max_weight=None)
        assert job is not None
        hub = EventHub()
        seen: list[bytes] = []

        async def follow() -> None:
            async for data in lines(store, hub, job, 0):
                seen.extend(re.findall(rb"^id: (\d+)$", data, re.MULTILINE))

        async def write() -> None:
            for _ in range(40):
                await store.advance(job.id, 1, [_step(50)] * chance.randint(1, 3))
                last = (await store.get(job.id) or job).last_seq
                if chance.random() < 0.4:
                    hub.reaches(job.id, last)
                elif chance.random() < 0.6:  # own events, some of them lost, late or twice
                    events = await store.events(job.id, last - chance.randint(1, 3), 10)
                    hub.publish(job.id, chance.sample(events, chance.randint(1, len(events))))
                await asyncio.sleep(0)
            end = NewEvent("job_failed", Progress(stage="failed", progress=0, stage_progress=0, message="failed"))
            after = await store.move(job.id, "failed", end)
            assert after is not None
            hub.reaches(job.id, after.last_seq)

        await asyncio.gather(follow(), write())
        after = await store.get(job.id)
        assert after is not None
        assert [int(number) for number in seen] == list(range(1, after.last_seq + 1))

    _run(url, scenario)


def test_what_may_follow_what_is_held_by_the_database(url: str) -> None:
    paths: dict[str, list[str]] = {
        "queued": [],
        "running": ["running"],
        "completed": ["running", "completed"],
        "failed": ["failed"],
        "canceled": ["canceled"],
        "expired": ["running", "completed", "expired"],
    }

    async def scenario(store: JobStore) -> None:
        event = NewEvent("stage_progress", Progress(stage="queued", progress=0, stage_progress=0, message="x"))
        for source, targets in ALLOWED.items():
            for target in ALLOWED:
                job, _ = await store.create(new_job())
                for step in paths[source]:
                    assert await store.move(job.id, step, event) is not None  # type: ignore[arg-type]
                if source == target == "queued":  # One that nobody drives is there already.
                    assert await store.hand_over() is not None
                moved = await store.move(job.id, target, event)
                assert (moved is not None) == (target in targets), (source, target)

    _run(url, scenario)


def test_progress_of_a_second_attempt_never_shows_less_than_the_first_reached(url: str) -> None:
    async def scenario(store: JobStore) -> None:
        await store.create(new_job())
        first = await store.claim(max_weight=None)
        assert first is not None
        assert await store.advance(first.id, 1, [_step(30), _step(70)])
        assert await store.move(first.id, "queued", _step(0, "queued"), attempt=1, values={"lost": 1}) is not None
        second = await store.claim(max_weight=None)
        assert second is not None
        assert (second.attempt, second.lost) == (2, 1)
        assert not await store.advance(first.id, 1, [_step(80)])
        assert await store.advance(first.id, 2, [_step(5), _step(40), _step(75)])
        events = await store.events(first.id, 0, 100)
        after = await store.get(first.id)
        assert after is not None
        _check(after, events)
        assert [event.progress for event in events][-3:] == [70, 70, 75]

    _run(url, scenario)


def test_each_job_is_claimed_once_the_oldest_first_and_by_its_size(url: str) -> None:
    async def scenario(store: JobStore) -> None:
        large = (await store.create(new_job(weight=1_000)))[0].id
        small = [(await store.create(new_job(weight=10)))[0].id for _ in range(5)]
        first = await store.claim(max_weight=100)
        assert first is not None
        assert first.id == small[0]
        claimed = await asyncio.gather(*(store.claim(max_weight=None) for _ in range(8)))
        ids = [job.id for job in claimed if job is not None]
        assert sorted(ids) == sorted([large, *small[1:]])
        assert ids[0] == large

    _run(url, scenario)


def test_the_queue_takes_no_more_than_its_capacity_even_in_parallel(url: str) -> None:
    async def scenario(store: JobStore) -> None:
        results = await asyncio.gather(*(store.create(new_job()) for _ in range(10)), return_exceptions=True)
        assert sum(isinstance(result, QueueUnavailable) for result in results) == 7
        assert await store.counts() == {"queued": 3}
        assert (await store.queued(None))[0] == 3

    _run(url, scenario, capacity=3)


def test_a_key_stands_for_one_body(url: str) -> None:
    async def scenario(store: JobStore) -> None:
        results = await asyncio.gather(*(store.create(new_job(), "key") for _ in range(6)))
        assert len({job.id for job, _ in results}) == 1
        assert sum(new for _, new in results) == 1
        with pytest.raises(InvalidRequest):
            await store.create(new_job(sha256="1" * 64), "key")
        assert await store.counts() == {"queued": 1}

    _run(url, scenario)


def test_old_records_are_forgotten_with_all_that_belongs_to_them(url: str) -> None:
    async def scenario(store: JobStore) -> None:
        job, _ = await store.create(new_job(), "key")
        waiting, _ = await store.create(new_job())
        await store.move(job.id, "canceled", NewEvent("job_canceled", _step(0, "canceled").progress))
        assert await store.forget(0) == 0
        assert await store.forget(2**62) == 1
        assert await store.get(job.id) is None
        assert await store.events(job.id, 0, 10) == []
        assert await store.find_key("default", "key", "0" * 64) is None
        assert await store.get(waiting.id) is not None

    _run(url, scenario)
