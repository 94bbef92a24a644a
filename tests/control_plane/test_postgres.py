"""What only PostgreSQL shows: replicas that share a database, and a database that goes away and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from live_server import Server, graph, large_graph, new_job
from postgres import Postgres
from runpod_house import eventually
from sqlalchemy import func, select, text
from sqlalchemy.exc import OperationalError, ProgrammingError, SQLAlchemyError

from common.contract import Progress
from control_plane.exports.stream import PING, lines, with_pings
from control_plane.jobs.database import AWAY, POSTGRES_WRITERS, Database
from control_plane.jobs.hub import EventHub
from control_plane.jobs.notify import Notifier, announce, announce_wake
from control_plane.jobs.records import JobRecord, NewEvent
from control_plane.jobs.store import JobStore
from control_plane.jobs.tables import jobs


@dataclass
class Replica:
    """What one server has of the shared database."""

    database: Database
    hub: EventHub
    store: JobStore
    wakes: asyncio.Queue[str | None]

    async def heard(self, job_id: str) -> list[str]:
        """Wait until this replica is told to look at a job; answers at which others it was told to look before."""
        before: list[str] = []
        while (told := await self.wakes.get()) != job_id:
            if told is not None:
                before.append(told)
        return before

    async def wake_others(self, job_id: str | None = None) -> None:
        async with self.database.write.begin() as connection:
            announce_wake(connection, job_id)

    async def follow(self, job: JobRecord) -> bytes:
        """The whole event stream of a job."""
        return b"".join([data async for data in lines(self.store, self.hub, job, 0)])


@asynccontextmanager
async def replica(url: str, name: str) -> AsyncIterator[Replica]:
    """A replica that listens."""
    database, hub = Database(url), EventHub()
    await database.migrate()
    wakes: asyncio.Queue[str | None] = asyncio.Queue()
    notifier = Notifier(database, hub, wakes.put_nowait)
    await notifier.start()
    await notifier.listening.wait()
    try:
        yield Replica(database, hub, JobStore(database, hub, queue_capacity=100, replica=name), wakes)
    finally:
        await notifier.stop()
        await database.close()


@asynccontextmanager
async def pair(url: str) -> AsyncIterator[tuple[Replica, Replica]]:
    """Two replicas that share a database."""
    async with replica(url, "first") as first, replica(url, "second") as second:
        yield first, second


@pytest.fixture
def own_server() -> Iterator[Postgres]:
    """A server that waits for the disk, and that a test may stop."""
    server = Postgres(durable=True)
    try:
        yield server.start()
    finally:
        server.close()


def _step(progress: int) -> NewEvent:
    return NewEvent("stage_progress", Progress(stage="frame_prep", progress=progress, stage_progress=0, message="m"))


def _failed() -> NewEvent:
    return NewEvent("job_failed", Progress(stage="failed", progress=0, stage_progress=0, message="failed"))


async def _queued(store: JobStore) -> str:
    return (await store.create(new_job()))[0].id


async def _running(store: JobStore) -> JobRecord:
    await _queued(store)
    job = await store.claim(max_weight=None)
    assert job is not None
    return job


async def _numbers(replica: Replica, job: JobRecord) -> list[int]:
    told = (await replica.follow(job)).decode()
    return [int(line[4:]) for line in told.split("\n") if line.startswith("id: ")]


def test_replicas_that_start_at_once_on_an_empty_database_all_find_the_tables(postgres_url: str) -> None:
    async def inside() -> None:
        replicas = [Database(postgres_url) for _ in range(4)]
        await asyncio.gather(*(replica.migrate() for replica in replicas))
        for replica in replicas:
            async with replica.read.connect() as connection:
                assert await connection.scalar(select(func.count()).select_from(jobs)) == 0
            await replica.close()

    asyncio.run(inside())


def test_a_stream_of_one_replica_gives_all_that_another_one_writes_in_order(postgres_url: str) -> None:
    async def inside() -> None:
        async with pair(postgres_url) as (writer, reader):
            job = await _running(writer.store)
            streams = [asyncio.create_task(_numbers(at, job)) for at in (reader, reader, writer)]
            for progress in range(60):
                assert await writer.store.advance(job.id, 1, [_step(progress)] * (1 + progress % 3))
            end = await writer.store.move(job.id, "failed", _failed())
            assert end is not None
            for stream in streams:
                assert await stream == list(range(1, end.last_seq + 1))

    asyncio.run(inside())


def test_two_replicas_that_write_to_one_job_at_once_make_one_log_with_one_end(postgres_url: str) -> None:
    async def inside() -> None:
        async with pair(postgres_url) as both:
            job = await _running(both[0].store)
            streams = [asyncio.create_task(_numbers(at, job)) for at in both]
            told = await asyncio.gather(
                *(at.store.advance(job.id, 1, [_step(n)]) for n in range(20) for at in both),
                *(at.store.move(job.id, "failed", _failed(), attempt=1) for _ in range(5) for at in both),
            )
            assert sum(moved is not None for moved in told[40:]) == 1
            after = await both[1].store.get(job.id)
            assert after is not None
            assert after.last_seq == 2 + told[:40].count(True) + 1
            for stream in streams:
                assert await stream == list(range(1, after.last_seq + 1))

    asyncio.run(inside())


def test_a_job_is_claimed_by_one_of_many_replicas(postgres_url: str) -> None:
    async def inside() -> None:
        async with pair(postgres_url) as both:
            ids = [await _queued(both[0].store) for _ in range(12)]
            claimed: list[str] = []

            async def claim(store: JobStore) -> None:
                while (job := await store.claim(max_weight=None)) is not None:
                    assert job.attempt == 1
                    claimed.append(job.id)

            await asyncio.gather(*(claim(at.store) for at in both for _ in range(4)))
            assert sorted(claimed) == sorted(ids)

    asyncio.run(inside())


def test_word_comes_with_the_commit_to_the_others_and_to_nobody_after_a_rollback(postgres_url: str) -> None:
    async def inside() -> None:
        async with (
            pair(postgres_url) as (first, second),
            first.hub.listen("some-job") as own,
            second.hub.listen("some-job") as other,
        ):
            async with first.database.write.connect() as connection:
                announce(connection, "some-job", 9)
                announce_wake(connection, "never")
                await connection.rollback()
            async with first.database.write.begin() as connection:
                announce(connection, "some-job", 7)
                announce_wake(connection, "hint")
            assert await second.heard("hint") == []
            assert other.known == 7
            await second.wake_others("back")
            assert await first.heard("back") == []
            assert own.known == 0

    asyncio.run(inside())


def test_a_replica_whose_connections_were_cut_hears_again_and_its_streams_miss_nothing(
    postgres_url: str, postgres_server: Postgres
) -> None:
    async def inside() -> None:
        async with pair(postgres_url) as (writer, reader):
            job = await _running(writer.store)
            stream = asyncio.create_task(_numbers(reader, job))
            for progress in range(20):
                if progress % 10 == 5:
                    await asyncio.to_thread(postgres_server.cut, postgres_url)
                    await writer.store.advance(job.id, 1, [_step(progress)])
                await writer.store.advance(job.id, 1, [_step(progress)])
            hears = asyncio.create_task(reader.heard("word"))
            while not hears.done():
                await writer.wake_others("word")
                await asyncio.wait([hears], timeout=0.1)
            end = await writer.store.move(job.id, "failed", _failed())
            assert end is not None
            assert await stream == list(range(1, end.last_seq + 1))

    asyncio.run(inside())


def test_a_connection_that_is_cut_inside_a_transaction_says_so_and_leaves_its_place_in_the_pool(
    postgres_url: str, postgres_server: Postgres
) -> None:
    async def inside() -> None:
        database = Database(postgres_url)

        async def cut() -> None:
            async with database.write.begin() as connection:
                await connection.execute(text("SELECT 1"))
                await asyncio.to_thread(postgres_server.cut, postgres_url)
                await connection.execute(text("SELECT 2"))

        for _ in range(POSTGRES_WRITERS + 1):
            with pytest.raises(OperationalError):
                await cut()
        async with database.write.begin() as connection:
            assert await connection.scalar(text("SELECT 3")) == 3
        await database.close()

    asyncio.run(inside())


def test_a_statement_that_is_cancelled_raises_nothing_else(postgres_url: str) -> None:
    async def inside() -> None:
        database = Database(postgres_url)

        async def sleep() -> None:
            async with database.write.begin() as connection:
                await connection.execute(text("SELECT pg_sleep(60)"))

        sleeps = asyncio.create_task(sleep())
        await asyncio.sleep(0.5)
        sleeps.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeps
        await database.close()

    asyncio.run(inside())


def test_a_stream_pings_while_the_database_does_not_answer(postgres_url: str) -> None:
    async def inside() -> None:
        async with pair(postgres_url) as (writer, reader):
            job = await _running(writer.store)
            source = with_pings(lines(reader.store, reader.hub, job, 0), reader.hub)
            assert await anext(source) == PING
            assert b"job_started" in await anext(source)
            async with writer.database.write.begin() as connection:
                await connection.execute(text("LOCK TABLE events IN ACCESS EXCLUSIVE MODE"))
                reader.hub.reaches(job.id, 3)
                assert [await anext(source) for _ in range(3)] == [PING] * 3
            await writer.store.advance(job.id, 1, [_step(10)])
            await writer.store.move(job.id, "failed", _failed())
            rest = b"".join([data async for data in source]).replace(PING, b"")
            assert [line for line in rest.split(b"\n") if line.startswith(b"id:")] == [b"id: 3", b"id: 4"]

    asyncio.run(inside())


def test_what_waits_too_long_is_told_apart_from_a_mistake(postgres_url: str) -> None:
    async def inside() -> None:
        database = Database(f"{postgres_url}?options=-c%20statement_timeout%3D100ms%20-c%20lock_timeout%3D100ms")
        await database.migrate()
        with pytest.raises(AWAY):
            async with database.read.connect() as connection:
                await connection.execute(text("SELECT pg_sleep(60)"))
        async with database.write.begin() as connection:
            await connection.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
            with pytest.raises(AWAY):
                async with database.write.begin() as other:
                    await other.execute(select(jobs))
        with pytest.raises(ProgrammingError):
            async with database.read.connect() as connection:
                await connection.execute(text("SELECT nothing FROM nowhere"))
        await database.close()
        idle = Database(f"{postgres_url}?options=-c%20idle_in_transaction_session_timeout%3D100ms")
        async with idle.read.connect() as connection:
            await connection.execute(text("SELECT 1"))
            await asyncio.sleep(1)
            with pytest.raises(AWAY):
                await connection.execute(text("SELECT 2"))
        await idle.close()

    asyncio.run(inside())


@pytest.mark.parametrize("end", ["stop", "crash"])
def test_a_stream_goes_on_after_the_database_went_away_and_what_was_promised_is_there(
    own_server: Postgres, end: str
) -> None:
    url = own_server.new_database()

    async def inside() -> None:
        async with pair(url) as (writer, reader):
            job = await _running(writer.store)
            streams = [asyncio.create_task(_numbers(at, job)) for at in (reader, writer)]
            assert await writer.store.advance(job.id, 1, [_step(10), _step(20)])
            await asyncio.to_thread(own_server.stop if end == "stop" else own_server.crash)
            with pytest.raises(SQLAlchemyError):
                await writer.store.advance(job.id, 1, [_step(30)])
            with pytest.raises(SQLAlchemyError):
                await reader.store.get(job.id)
            assert not any(stream.done() for stream in streams)
            await asyncio.to_thread(own_server.start)
            found = await reader.store.get(job.id)
            assert found is not None
            assert found.last_seq == 4
            assert await writer.store.advance(job.id, 1, [_step(40)])
            assert await writer.store.move(job.id, "failed", _failed()) is not None
            for stream in streams:
                assert await stream == [1, 2, 3, 4, 5, 6]

    asyncio.run(inside())


def test_any_server_answers_for_a_job_that_another_one_took(tmp_path: Path, postgres_url: str) -> None:
    shared = (tmp_path / "shared").as_uri()
    servers = [
        Server(tmp_path / name, database_url=postgres_url, storage_url=shared, worker_slots=1) for name in ("a", "b")
    ]
    try:
        for server in servers:
            server.start()
        for first, second in (servers, servers[::-1]):
            job_id = first.submit(graph(200, name="shared"))
            events = list(second.stream(job_id))
            assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
            assert events[-1]["type"] == "job_completed"
            assert list(first.stream(job_id)) == events
            assert first.job(job_id) == second.job(job_id)
            capsules = [server.client.get(f"/v1/exports/{job_id}/download") for server in (first, second)]
            assert [answer.status_code for answer in capsules] == [200, 200]
            assert capsules[0].content == capsules[1].content
            key = {"idempotency_key": f"key of {first.port}"}
            answers = [server.post(graph(name="once"), **key).json()["jobId"] for server in (first, second)]
            assert answers[0] == answers[1]
    finally:
        for server in servers:
            server.close()


def test_a_server_outlives_an_outage_of_its_database_and_says_so(tmp_path: Path, own_server: Postgres) -> None:
    server = Server(tmp_path / "root", database_url=own_server.new_database(), worker_slots=1)
    try:
        job_id = server.start().submit(large_graph("outage"))
        frames = server.frames(job_id)
        assert any("job_started" in frame for frame in frames)
        own_server.stop()
        unready = eventually(lambda: None if (found := server.client.get("/readyz")).is_success else found)
        assert (unready.status_code, unready.json()["error"]["code"]) == (503, "QUEUE_UNAVAILABLE")
        assert unready.json()["error"]["details"]["checks"]["database"] != "ok"
        assert server.client.get("/healthz").status_code == 200
        assert server.client.get(f"/v1/exports/{job_id}").status_code >= 500
        for _ in range(3):
            assert next(frame for frame in frames if frame == ": ping")
        own_server.start()
        list(frames)
        events = server.events(job_id)
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        assert events[-1]["type"] == "job_completed"
        assert own_server.password not in server.log.read_text()
    finally:
        server.close()


def test_a_database_that_takes_no_writes_for_a_while_costs_no_job(
    tmp_path: Path, postgres_server: Postgres, postgres_url: str
) -> None:
    server = Server(tmp_path / "root", database_url=postgres_url, worker_slots=1)
    read_only = f"ALTER DATABASE {postgres_url.rpartition('/')[2]} SET default_transaction_read_only"
    try:
        job_id = server.start().submit(large_graph("outage"))
        assert server.wait(job_id, "job_started")["type"] == "job_started"
        postgres_server.execute(f"{read_only} = on")
        postgres_server.cut(postgres_url)
        refused = server.post(graph())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "QUEUE_UNAVAILABLE")
        assert "retry-after" in refused.headers
        assert eventually(lambda: "events are late" in server.log.read_text())
        assert server.job(job_id)["status"] == "running"
        # Connections that are open stay as they are, like those to a server that is no longer the one to write to.
        postgres_server.execute(f"{read_only} = off")
        assert server.wait(job_id)["type"] == "job_completed"
        numbers = [event["seq"] for event in server.events(job_id)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert server.wait(server.submit(graph()))["type"] == "job_completed"
    finally:
        server.close()
