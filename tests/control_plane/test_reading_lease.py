"""What somebody reads is not removed under them, and is removed soon after, whatever happened to the reader."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from live_server import Server, large_graph, new_job

from common.contract import Progress
from control_plane.errors import JobExpired
from control_plane.jobs.database import Database
from control_plane.jobs.holds import Holds
from control_plane.jobs.hub import EventHub
from control_plane.jobs.records import JobRecord, NewEvent
from control_plane.jobs.store import JobStore, now_ms

HOUR_MS = 3_600_000


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}"
    return str(request.getfixturevalue("postgres_url"))


@asynccontextmanager
async def _replica(url: str, name: str) -> AsyncIterator[JobStore]:
    database = Database(url)
    await database.migrate()
    try:
        yield JobStore(database, EventHub(), queue_capacity=100, replica=name)
    finally:
        await database.close()


def _with_two(url: str, scenario: Callable[[JobStore, JobStore], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with _replica(url, "first") as first, _replica(url, "second") as second:
            await scenario(first, second)

    asyncio.run(inside())


async def _completed(store: JobStore, *, expires_at: int) -> JobRecord:
    new = await store.create(new_job())
    job = await store.claim(max_weight=None)
    assert job is not None
    assert job.id == new[0].id
    done = NewEvent("job_completed", Progress(stage="download_ready", progress=100, stage_progress=100, message="Done"))
    moved = await store.move(job.id, "completed", done, values={"expires_at": expires_at})
    assert moved is not None
    return moved


async def _past(store: JobStore) -> list[str]:
    return [job.id for job in await store.expired(now_ms(), queued_before=0)]


def test_a_job_that_one_replica_reads_is_not_expired_by_another(url: str) -> None:
    async def scenario(reader: JobStore, sweeper: JobStore) -> None:
        job = await _completed(reader, expires_at=now_ms() + 200)
        async with Holds(reader).reading([job]):
            await asyncio.sleep(0.3)
            assert await _past(sweeper) == []
            # Even a sweeper that had seen it before the reader came does not get it.
            assert await sweeper.expire(job, None, {"stage": "expired"}) is None
            again = await sweeper.get(job.id)
            assert again is not None
            assert again.status == "completed"

    _with_two(url, scenario)


def test_a_reader_that_lives_keeps_its_hold_and_one_that_was_killed_loses_it(url: str) -> None:
    async def scenario(reader: JobStore, sweeper: JobStore) -> None:
        job = await _completed(reader, expires_at=now_ms() + 100)
        holds = Holds(reader, hold_seconds=1.5, renew_seconds=0.2)
        renewing = asyncio.create_task(holds.run())
        async with holds.reading([job]):
            for _ in range(10):
                await asyncio.sleep(0.2)
                assert await _past(sweeper) == []
            renewing.cancel()  # as a replica that was killed: it says nothing any more
            for _ in range(100):
                if await _past(sweeper):
                    break
                await asyncio.sleep(0.1)
            assert await _past(sweeper) == [job.id]
        moved = await sweeper.expire(job, None, {"stage": "expired"})
        assert moved is not None
        assert moved.status == "expired"

    _with_two(url, scenario)


def test_who_comes_when_the_files_are_gone_is_told(url: str) -> None:
    async def scenario(reader: JobStore, sweeper: JobStore) -> None:
        job = await _completed(reader, expires_at=now_ms())
        assert await sweeper.expire(job, None, {"stage": "expired"}) is not None
        with pytest.raises(JobExpired):
            async with Holds(reader).reading([job]):
                pytest.fail("there was nothing to read")
        assert await reader.hold([job.id], 30) == set()

    _with_two(url, scenario)


def test_a_reader_with_time_enough_writes_nothing(url: str) -> None:
    async def scenario(reader: JobStore, sweeper: JobStore) -> None:
        job = await _completed(reader, expires_at=now_ms() + 2 * HOUR_MS)
        async with Holds(reader).reading([job]):
            now = await sweeper.get(job.id)
            assert now is not None
            assert now.read_until == 0

    _with_two(url, scenario)


def test_a_later_hold_of_another_replica_is_not_cut_short(url: str) -> None:
    async def scenario(first: JobStore, second: JobStore) -> None:
        job = await _completed(first, expires_at=now_ms())
        assert await first.hold([job.id], 600) == {job.id}
        long = await first.get(job.id)
        assert await second.hold([job.id], 1) == {job.id}
        assert await second.get(job.id) == long

    _with_two(url, scenario)


def test_a_thread_that_fetches_pieces_holds_what_it_fetches(url: str) -> None:
    async def scenario(reader: JobStore, sweeper: JobStore) -> None:
        job = await _completed(reader, expires_at=now_ms() + 1_000)
        holds = Holds(reader, renew_seconds=600)
        renewing = asyncio.create_task(holds.run())
        await asyncio.sleep(0)

        def fetch() -> None:
            with holds.fetching(job):
                time.sleep(1.5)

        fetching = asyncio.create_task(asyncio.to_thread(fetch))
        await asyncio.sleep(1.2)
        assert await _past(sweeper) == []
        await fetching
        renewing.cancel()

    _with_two(url, scenario)


def test_a_slow_download_gets_all_of_a_capsule_whose_time_ends_meanwhile(start_server: Any) -> None:
    server: Server = start_server(retention_seconds=4, worker_slots=1)
    job_id = server.submit(large_graph("slow", 12_000))
    server.wait(job_id)
    url = f"/v1/exports/{job_id}/download"
    got = hashlib.sha256()
    with server.client.stream("GET", url) as answer:
        assert answer.status_code == 200
        pieces = answer.iter_raw(1 << 16)
        got.update(next(pieces))
        for _ in range(400):
            refused = server.client.get(url)
            if refused.status_code == 410:
                break
            time.sleep(0.05)
        assert refused.json()["error"]["code"] == "JOB_EXPIRED"  # nobody new gets it
        time.sleep(1.5)  # three sweeps
        assert server.job(job_id)["status"] == "completed"
        assert list((server.root / "artifacts" / job_id).rglob("*.mv2"))
        for piece in pieces:
            got.update(piece)
        assert answer.headers["etag"] == f'"{got.hexdigest()}"'
