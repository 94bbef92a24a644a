"""What the store answers: each of its questions is asked where one row more or less would change the answer."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
from live_server import new_job
from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from common.contract import (
    Event,
    ExportOptions,
    JobOutput,
    Manifest,
    ManifestPart,
    Progress,
    Report,
    Source,
    Stage,
    Status,
    Versions,
)
from common.errors import InvalidRequest
from control_plane.errors import QueueUnavailable, QuotaReached
from control_plane.jobs.audit import AuditEntry, AuditQuery
from control_plane.jobs.database import Database, db_now
from control_plane.jobs.hub import EventHub
from control_plane.jobs.records import JobRecord, NewEvent, NewJob, Quota, iso
from control_plane.jobs.store import (
    ADOPTED,
    AUDIT_BATCH,
    LEASE_MS,
    LONGEST_PAUSE_MS,
    Activity,
    JobStore,
    StageSpan,
    now_ms,
)
from control_plane.jobs.tables import events, jobs

HOUR = 3_600_000
START = 1_790_000_000_000


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}"
    return str(request.getfixturevalue("postgres_url"))


class Desk:
    """Two replicas on one database, whose rows can be put into any state."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.first, self.second = (
            JobStore(database, EventHub(), queue_capacity=1_000, replica=name) for name in ("first", "second")
        )

    async def new(self, job: NewJob | None = None, **columns: Any) -> str:
        """The id of a job that is queued, with these columns changed."""
        record, _ = await self.first.create(job or new_job())
        await self.set(record.id, **columns)
        return record.id

    async def many(self, count: int, **columns: Any) -> set[str]:
        """So many jobs like a first one."""
        like = await self.new(**columns)
        ids = {like, *(str(uuid.uuid4()) for _ in range(count - 1))}
        async with self._database.write.begin() as connection:
            row = (await connection.execute(select(jobs).where(jobs.c.id == like))).one()
            rows = [{**row._mapping, "id": job_id} for job_id in ids - {like}]
            if rows:
                await connection.execute(insert(jobs), rows)
        return ids

    async def set(self, job_id: str, **columns: Any) -> None:
        if columns:
            async with self._database.write.begin() as connection:
                await connection.execute(update(jobs).where(jobs.c.id == job_id).values(**columns))

    async def clock(self) -> int:
        """Milliseconds, by the database."""
        async with self._database.read.connect() as connection:
            return int(await connection.scalar(select(db_now())) or 0)

    async def forget(self, job_id: str) -> None:
        """Lose the job's events."""
        async with self._database.write.begin() as connection:
            await connection.execute(delete(events).where(events.c.job_id == job_id))

    async def rewind(self, job_id: str, **stamps: int) -> None:
        """Give the job's events these times, in order."""
        async with self._database.write.begin() as connection:
            for seq, ts in enumerate(stamps.values(), start=1):
                await connection.execute(
                    update(events).where(events.c.job_id == job_id, events.c.seq == seq).values(ts=ts)
                )

    async def job(self, job_id: str) -> JobRecord:
        found = await self.first.get(job_id)
        assert found is not None
        return found


@pytest.fixture
def ask(url: str) -> Callable[[Callable[[Desk], Awaitable[None]]], None]:
    """Run a scenario on an empty database."""

    def run(scenario: Callable[[Desk], Awaitable[None]]) -> None:
        async def inside() -> None:
            database = Database(url)
            await database.migrate()
            try:
                await scenario(Desk(database))
            finally:
                await database.close()

        asyncio.run(inside())

    return run


Ask = Callable[[Callable[[Desk], Awaitable[None]]], None]


def told(kind: str = "stage_progress", stage: Stage = "write_capsule", progress: int = 0) -> NewEvent:
    """Something to tell."""
    return NewEvent(kind, Progress(stage=stage, progress=progress, stage_progress=0, message=stage))  # type: ignore[arg-type]


# --- a job comes ------------------------------------------------------------------------------------


def test_a_new_job_is_what_was_given_and_nothing_has_happened_to_it(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        given = dataclasses.replace(
            new_job(weight=7), profile="p", base_name="b", client="c", trace="t", message="Queued", meta={"nodes": 3}
        )
        before = now_ms()
        record, new = await desk.first.create(given)
        assert new
        for field in dataclasses.fields(NewJob):
            if field.name not in ("message", "meta"):
                assert getattr(record, field.name) == getattr(given, field.name), field.name
        assert before <= record.created_at == record.updated_at <= now_ms()
        assert abs(record.created_at - time.time() * 1_000) < 60_000
        zero = ("progress", "stage_progress", "attempt", "lost", "available_at", "retries", "timeouts", "told")
        assert [getattr(record, name) for name in (*zero, "read_until")] == [0] * 9
        assert (record.status, record.stage, record.last_seq) == ("queued", "queued", 1)
        assert len(record.secret) >= 43
        assert await desk.first.events(record.id, 0, 10) == [
            Event(
                seq=1,
                ts=iso(record.created_at),
                job_id=record.id,
                type="stage_progress",
                stage="queued",
                progress=0,
                stage_progress=0,
                emoji="🕒",
                message="Queued",
                meta={"nodes": 3},
            )
        ]

    ask(scenario)


def test_a_key_is_one_clients_and_stands_for_one_job(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        mine, theirs = (dataclasses.replace(new_job(), client=name) for name in ("me", "them"))
        made = {(await desk.first.create(job, key))[0].id for job, key in ((mine, "k"), (theirs, "k"))}
        assert made == {mine.id, theirs.id}
        other, new = await desk.first.create(dataclasses.replace(new_job(), client="me"), "another")
        assert new
        for client, key, job in (("me", "k", mine.id), ("them", "k", theirs.id), ("me", "another", other.id)):
            found = await desk.first.find_key(client, key, "0" * 64)
            assert found is not None
            assert found.id == job
        assert await desk.first.find_key("nobody", "k", "0" * 64) is None
        assert await desk.first.find_key("me", "l", "0" * 64) is None
        for sha256 in ("1" * 64, ""):
            with pytest.raises(InvalidRequest, match="another body"):
                await desk.first.find_key("me", "k", sha256)

    ask(scenario)


def test_a_job_that_is_there_already_is_no_job_of_a_key(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        job = new_job()
        await desk.first.create(job)
        for key in (None, "key"):
            with pytest.raises(IntegrityError):
                await desk.first.create(job, key)
        assert await desk.first.counts() == {"queued": 1}

    ask(scenario)


def test_the_queue_is_full_when_it_holds_its_capacity_and_running_jobs_do_not_count(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        desk.first.capacity = 2
        await desk.first.create(new_job())
        assert await desk.first.claim(max_weight=None) is not None
        for _ in range(2):
            await desk.first.create(new_job())
        with pytest.raises(QueueUnavailable, match=r"2 jobs are waiting"):
            await desk.first.create(new_job())
        assert await desk.first.counts() == {"queued": 2, "running": 1}

    ask(scenario)


# --- a job is taken -----------------------------------------------------------------------------------


def test_who_takes_a_job_owns_it_for_a_lease_and_begins_its_next_attempt(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        job_id = await desk.new(attempt=2, told=5, runpod_id="old", submitted_at=1)
        before, wall = await desk.clock(), now_ms()
        job = await desk.second.claim(max_weight=None)
        assert job is not None
        assert (job.id, job.status, job.attempt, job.owner, job.told) == (job_id, "running", 3, "second", 0)
        assert (job.runpod_id, job.submitted_at) == (None, None)
        assert job.lease_until is not None
        assert before + LEASE_MS <= job.lease_until <= await desk.clock() + LEASE_MS
        assert job.started_at is not None
        assert wall <= job.started_at <= now_ms()
        (_, event) = await desk.first.events(job_id, 0, 10)
        assert (event.type, event.stage, event.message, event.meta) == (
            *("job_started", "transform", "Export started again (attempt 3)"),
            {"attempt": 3},
        )
        assert (event.progress, event.stage_progress) == (0, 0)

    ask(scenario)


def test_a_job_that_is_handed_over_stays_queued_with_its_owner_and_without_an_event(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        job_id = await desk.new()
        job = await desk.first.hand_over()
        assert job is not None
        assert (job.id, job.status, job.attempt, job.owner, job.started_at) == (job_id, "queued", 1, "first", None)
        assert job.last_seq == 1
        assert await desk.second.hand_over() is None
        assert await desk.second.claim(max_weight=None) is None

    ask(scenario)


def test_the_queue_gives_the_oldest_that_is_due_small_enough_and_nobodys(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        now = await desk.clock()
        await desk.new(created_at=1, available_at=now + LONGEST_PAUSE_MS // 2)
        await desk.new(created_at=2, owner="first")
        await desk.new(created_at=3, status="running", owner="first")
        heavy = await desk.new(created_at=4, weight=101, available_at=now)
        at_most = await desk.new(created_at=5, weight=100)
        tied = sorted([await desk.new(created_at=6), await desk.new(created_at=6)])
        set_back = await desk.new(created_at=7, available_at=now + 2 * LONGEST_PAUSE_MS)  # the clock went back
        assert [job and job.id for job in [await desk.first.claim(max_weight=100) for _ in range(5)]] == [
            at_most,
            *tied,
            set_back,
            None,
        ]
        last = await desk.first.claim(max_weight=None)
        assert last is not None
        assert last.id == heavy

    ask(scenario)


def test_a_platforms_name_and_start_count_for_the_attempt_that_is_queued(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        job_id = await desk.new()
        assert await desk.first.hand_over() is not None
        assert await desk.first.submitted(job_id, 2, "late") is None
        before = now_ms()
        job = await desk.first.submitted(job_id, 1, "name")
        assert job is not None
        assert (job.runpod_id, job.status, job.last_seq) == ("name", "queued", 1)
        assert job.submitted_at is not None
        assert before <= job.submitted_at <= now_ms()
        assert await desk.first.start(job_id, 2, at=0) is None
        job = await desk.first.start(job_id, 1, at=now_ms() + HOUR)
        assert job is not None
        assert job.status == "running"
        assert job.started_at is not None
        assert job.started_at <= now_ms()
        assert await desk.first.start(job_id, 1, at=0) is None
        assert await desk.first.submitted(job_id, 1, "later") is None
        assert (await desk.job(job_id)).runpod_id == "name"
        early = await desk.new()
        assert await desk.first.hand_over() is not None
        job = await desk.first.start(early, 1, at=1_000)
        assert job is not None
        assert job.started_at == 1_000

    ask(scenario)


# --- leases -------------------------------------------------------------------------------------------


def test_a_replica_renews_what_it_owns_and_drives_and_nothing_else(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        mine = await desk.new(status="running", owner="first", lease_until=1)
        handed = await desk.new(owner="first", lease_until=1)
        undriven = await desk.new(status="running", owner="first", lease_until=1)
        others = [await desk.new(status="running", owner=owner, lease_until=1) for owner in ("a", "second")]
        over = await desk.new(status="failed", owner="first", lease_until=1)
        before = await desk.clock()
        assert await desk.first.renew({mine, handed, *others, over}) == {mine, handed}
        for job_id in (mine, handed):
            until = (await desk.job(job_id)).lease_until
            assert until is not None
            assert before + LEASE_MS <= until <= await desk.clock() + LEASE_MS
        assert [(await desk.job(job_id)).lease_until for job_id in (undriven, *others, over)] == [1] * 4

    ask(scenario)


def test_a_replica_takes_over_what_has_lapsed_or_is_nobodys(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        now = await desk.clock()
        held = {"status": "running", "lease_until": now + HOUR}
        lapsed = await desk.new(status="running", owner="second", lease_until=now - 1, created_at=2)
        handed = await desk.new(owner="second", lease_until=now - 1, created_at=1)
        nobodys = await desk.new(status="running", owner=None, created_at=3)
        theirs = {await desk.new(**held, owner=owner) for owner in ("a", "second")}
        waiting = await desk.new()
        over = await desk.new(status="canceled", owner="second", lease_until=1)
        mine = await desk.new(**held, owner="first", created_at=4)
        taken = await desk.first.adopt()
        assert {job.id for job in taken} == {handed, lapsed, nobodys}
        assert {(job.owner, job.lease_until is not None and job.lease_until >= now + LEASE_MS) for job in taken} == {
            ("first", True)
        }
        assert await desk.first.adopt() == []
        assert {job.id for job in await desk.first.adopt(own=True)} == {handed, lapsed, nobodys, mine}
        assert {(await desk.job(job_id)).owner for job_id in theirs} == {"a", "second"}
        assert (await desk.job(waiting)).owner is None
        assert (await desk.job(over)).owner == "second"

    ask(scenario)


def test_a_replica_takes_over_so_many_at_a_time(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        left = await desk.many(ADOPTED + 1, status="running", owner="second", lease_until=1)
        taken = [len(await desk.first.adopt()) for _ in range(3)]
        assert taken == [ADOPTED, 1, 0]
        assert set(await desk.first.in_flight()) == left

    ask(scenario)


def test_what_a_replica_lets_go_others_have_at_once(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        held = {"status": "running", "lease_until": await desk.clock() + HOUR}
        mine = await desk.new(**held, owner="first")
        others = [await desk.new(**held, owner=owner) for owner in ("a", "z")]
        over = await desk.new(status="completed", owner="first", lease_until=5)
        await desk.first.release()
        assert [job.id for job in await desk.second.adopt()] == [mine]
        assert [(await desk.job(job_id)).owner for job_id in others] == ["a", "z"]
        assert (await desk.job(over)).lease_until == 5

    ask(scenario)


# --- questions ----------------------------------------------------------------------------------------


def test_pages_go_from_the_newest_to_the_oldest_and_leave_none_out(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        times = [3, 3, 1, 2, 3, 2]
        made = [(when, await desk.new(created_at=when)) for when in times]
        order = [job_id for _, job_id in sorted(made, reverse=True)]
        seen: list[str] = []
        before: tuple[int, str] | None = None
        while page := await desk.first.page(status=None, before=before, limit=4):
            seen += [job.id for job in page]
            before = (page[-1].created_at, page[-1].id)
        assert seen == order
        assert [job.id for job in await desk.first.page(status=None, before=None, limit=2)] == order[:2]

    ask(scenario)


def test_pages_are_of_a_status_and_of_a_client(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        ids: dict[tuple[str, str], str] = {}
        for client in ("a", "m", "z"):
            for status in ("queued", "running", "failed"):
                ids[client, status] = await desk.new(client=client, status=status)

        async def found(status: Status | None, client: str | None) -> set[str]:
            return {job.id for job in await desk.first.page(status=status, before=None, limit=99, client=client)}

        assert await found(None, None) == set(ids.values())
        assert await found("queued", "m") == {ids["m", "queued"]}
        assert await found(None, "m") == {job_id for (client, _), job_id in ids.items() if client == "m"}
        assert await found("queued", None) == {job_id for (_, status), job_id in ids.items() if status == "queued"}

    ask(scenario)


def test_events_are_those_of_the_job_after_a_number_in_order(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        ids = sorted([await desk.new() for _ in range(3)])
        for _ in ids:
            job = await desk.first.claim(max_weight=None)
            assert job is not None
            assert await desk.first.advance(job.id, 1, [told(progress=n) for n in (10, 20, 30)])
        for job_id in ids:
            found = await desk.first.events(job_id, 2, 2)
            assert [(event.job_id, event.seq, event.progress) for event in found] == [(job_id, 3, 10), (job_id, 4, 20)]
            assert await desk.first.events(job_id, 5, 2) == []

    ask(scenario)


def test_what_a_status_holds_is_counted_by_profile_and_time(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        assert await desk.first.queued(None) == (0, 0.0)
        assert (await desk.first.running(), await desk.first.pace(None, 60)) == (0, (0, None))
        now = now_ms()
        await desk.new(profile="m", created_at=now - 20_000)
        await desk.new(profile="m", created_at=now - 10_000)
        await desk.new(profile="z", created_at=now - 90_000)
        await desk.new(profile="a", created_at=now + HOUR)
        await desk.new(profile="m", status="running", created_at=1)
        await desk.new(profile="a", status="running", created_at=1)
        for profile, status, ago, took in (
            *(("m", "completed", 50, 2), ("m", "failed", 50, 4), ("z", "failed", 50, 9), ("a", "completed", 50, 1)),
            *(("m", "completed", 70, 9), ("m", "canceled", 1, 50), ("m", "expired", 1, 50)),
            ("m", "completed", 50, -30),  # its clock jumped
        ):
            ended = now - ago * 1_000
            await desk.new(profile=profile, status=status, finished_at=ended, started_at=ended - took * 1_000)
        await desk.new(profile="m", status="failed", finished_at=now)  # it never started
        count, seconds = await desk.first.queued("m")
        assert count == 2
        assert 20 <= seconds < 80
        count, seconds = await desk.first.queued(None)
        assert count == 4
        assert 90 <= seconds < 150
        assert await desk.first.queued("a") == (1, 0.0)
        long = await desk.new(profile="long", created_at=now - 100_000_000)
        count, seconds = await desk.first.queued("long")
        assert count == 1
        assert 100_000 <= seconds < 100_090
        await desk.set(long, status="canceled")
        assert await desk.first.running() == 2
        assert await desk.first.pace("m", 60) == (1, 3.0)
        assert await desk.first.pace("m", 3_600) == (1, 5.0)
        assert await desk.first.pace(None, 60) == (2, 4.0)
        for ago in (9_995, 10_005):
            ended = now_ms() - ago * 1_000
            await desk.new(profile="old", status="failed", finished_at=ended, started_at=ended - ago)
        assert await desk.first.pace("old", 10_000) == (0, 9.995)
        assert await desk.first.counts() == {
            "queued": 4,
            "running": 2,
            "completed": 4,
            "failed": 5,
            "canceled": 2,
            "expired": 1,
        }

    ask(scenario)


def test_what_waits_and_what_was_given_up_is_told_together(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        now = now_ms()
        await desk.new(created_at=now - 30_000)
        await desk.new(status="failed", expires_at=now + HOUR)
        await desk.new(status="failed", expires_at=now - 1)
        await desk.new(status="failed")
        for status in ("completed", "running"):
            await desk.new(status=status, expires_at=now + HOUR)
        waiting = await desk.first.waiting()
        assert waiting.counts == {"queued": 1, "failed": 3, "completed": 1, "running": 1}
        assert 30 <= waiting.oldest_seconds < 90
        assert waiting.dead_letters == 1

    ask(scenario)


def test_jobs_are_known_by_the_attempt_that_made_or_makes_their_files(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        made = {
            status: await desk.new(status=status, attempt=attempt)
            for attempt, status in enumerate(["queued", "running", "completed", "failed", "canceled", "expired"])
        }
        assert await desk.first.in_flight() == {made["queued"]: 0, made["running"]: 1}
        assert await desk.first.completed() == {made["completed"]: 2}

    ask(scenario)


def test_activity_counts_each_moment_in_one_span(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        last = START + HOUR - 1
        for created in (START - 1, START, last, START + HOUR):
            await desk.new(created_at=created)
        old = {"created_at": 1}
        for status, finished, frames in (
            *(("completed", START, 5), ("completed", last, 6), ("expired", START, 7), ("completed", START + HOUR, 100)),
            *(("expired", START, None), ("failed", START, None), ("canceled", START, None), ("canceled", last, None)),
        ):
            await desk.new(**old, status=status, finished_at=finished, frames=frames)
        assert await desk.first.activity([START - HOUR, START, START + HOUR, START + 2 * HOUR], HOUR) == [
            Activity(START - HOUR, 1, 0, 0, 0),
            Activity(START, 2, 3, 2, 18),
            Activity(START + HOUR, 1, 1, 0, 100),
            Activity(START + 2 * HOUR, 0, 0, 0, 0),
        ]

    ask(scenario)


def test_failures_are_counted_by_span_and_code(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        for finished, code in (
            *((START - 1, "A"), (START, "A"), (START + HOUR - 1, "A"), (START + HOUR - 1, "B")),
            *((START + HOUR, "A"), (START + 2 * HOUR + 5, None)),
        ):
            await desk.new(status="failed", finished_at=finished, error_code=code)
        await desk.new(status="completed", finished_at=START, error_code="A")
        assert sorted(await desk.first.failures(START, HOUR)) == [
            *((0, "A", 2), (0, "B", 1), (1, "A", 1)),
            (2, "INTERNAL", 1),
        ]

    ask(scenario)


def test_the_stages_of_an_attempt_begin_with_the_wait_for_it(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        job_id, other = await desk.new(), await desk.new()
        assert await desk.first.claim(max_weight=None) is not None
        assert await desk.first.advance(job_id, 1, [told(stage="transform")])
        again = told(stage="queued")
        assert await desk.first.move(job_id, "queued", again, attempt=1, values={"available_at": 0}) is not None
        assert await desk.first.claim(max_weight=None) is not None
        assert await desk.first.advance(job_id, 2, [told(), told(), told(stage="finalize")])
        # queued, started, transform, queued, started (transform), write, write, finalize
        await desk.rewind(job_id, a=10, b=20, c=30, d=40, e=50, f=60, g=70, h=80)
        second = [
            *(StageSpan("queued", 40), StageSpan("transform", 50)),
            *(StageSpan("write_capsule", 60), StageSpan("finalize", 80)),
        ]
        assert await desk.first.stages(job_id, before=9) == second
        assert await desk.first.stages(job_id, before=8) == second[:3]
        assert await desk.first.stages(job_id, before=4) == [StageSpan("queued", 10), StageSpan("transform", 20)]
        assert [span.stage for span in await desk.first.stages(other, before=9)] == ["queued"]

    ask(scenario)


def test_a_log_comes_with_its_job_and_without_one_where_there_is_none(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        job_id = await desk.new()
        found, job = await desk.first.log(job_id, 0, 10)
        assert job == await desk.job(job_id)
        assert [event.seq for event in found] == [1]
        assert await desk.first.log(str(uuid.uuid4()), 0, 10) == ([], None)

    ask(scenario)


# --- stored files ---------------------------------------------------------------------------------------


OUTPUT = JobOutput(
    artifact_ref="file:///c.mv2",
    sidecar_ref="file:///c.mv2.index.v1.sqlite",
    manifest_ref="file:///c.mv2.manifest.json",
    sha256="1" * 64,
    size_bytes=5,
    metrics={},
)
MANIFEST = Manifest(
    generated_at=iso(START),
    session_id="s",
    project_name="p",
    source=Source(type="local", base_name="b", display_name="b"),
    options=ExportOptions(),
    content_digest="2" * 64,
    capsule_sha256="1" * 64,
    parts=[ManifestPart(file_name="c.mv2", size_bytes=5, sha256="1" * 64, frames=7, vectors=0)],
    sidecar_file_name="c.mv2.index.v1.sqlite",
    sidecar_size_bytes=1,
    sidecar_sha256="3" * 64,
    frames=7,
    node_frames=1,
    relation_frames=1,
    vectors=0,
    dimension=None,
    embedding_model=None,
    embedding_layout=None,
    writer="native",
    readers="memvid",
    versions=Versions(),
    report=Report(profile="default"),
)
DONE: dict[str, Any] = {
    "status": "completed",
    "attempt": 1,
    "output": msgspec.json.encode(OUTPUT).decode(),
    "manifest": msgspec.json.encode(MANIFEST).decode(),
}


def test_a_write_that_is_canceled_at_any_moment_keeps_nobody_waiting(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        job_id = await desk.new(backend="runpod_queue")
        await desk.first.hand_over()
        for moment in range(40):
            task = asyncio.create_task(desk.first.renew({job_id}))
            for _ in range(moment % 20):
                await asyncio.sleep(0)
            await asyncio.sleep(max(0, moment - 20) * 0.0002)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            async with asyncio.timeout(5):
                await desk.first.release()
                assert [job.id for job in await desk.first.adopt(own=True)] == [job_id]

    ask(scenario)


def test_files_that_are_read_are_held_and_never_for_shorter_than_before(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        job_id, other, waiting = (
            await desk.new(status="completed"),
            await desk.new(status="completed"),
            await desk.new(),
        )
        before = await desk.clock()
        assert await desk.first.hold([job_id, waiting, str(uuid.uuid4())], 60) == {job_id}
        until = (await desk.job(job_id)).read_until
        assert before + 60_000 <= until <= await desk.clock() + 60_000
        assert await desk.first.hold([job_id], 1) == {job_id}
        assert (await desk.job(job_id)).read_until == until
        assert await desk.first.hold([job_id], 90) == {job_id}
        assert (await desk.job(job_id)).read_until > until
        assert [(await desk.job(left)).read_until for left in (other, waiting)] == [0, 0]

    ask(scenario)


def test_damage_is_noted_once_and_only_of_files_that_there_are(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        ids = sorted(await desk.many(3, status="completed"))
        changes = desk.first.changes
        assert await desk.first.damaged(ids[1], "a byte has changed")
        assert not await desk.first.damaged(ids[1], "and another")
        assert desk.first.changes == changes + 1
        assert [(await desk.job(job_id)).damage for job_id in ids] == [None, "a byte has changed", None]
        for status in ("queued", "failed", "expired", "canceled"):
            assert not await desk.first.damaged(await desk.new(status=status), "x")
        assert desk.first.changes == changes + 1

    ask(scenario)


def test_files_that_are_whole_again_are_given_out_again(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        ids = sorted(await desk.many(3, **DONE))
        for job_id in ids:
            await desk.set(job_id, damage="torn")
        job = await desk.job(ids[1])
        changes = desk.first.changes
        assert not await desk.first.whole(dataclasses.replace(job, attempt=0))
        assert not await desk.first.whole(dataclasses.replace(job, attempt=2))
        assert desk.first.changes == changes
        await desk.set(ids[1], output='{"more": ' + "[" * 100_000)
        assert (await desk.job(ids[1])).output is None
        await desk.set(ids[1], output="{", stage="nowhere")
        assert (await desk.job(ids[1])).output is None
        assert await desk.first.whole(job)
        assert desk.first.changes == changes + 1
        mended = await desk.job(ids[1])
        assert (mended.damage, mended.output, mended.manifest) == (None, job.output, job.manifest)
        assert mended.stage == "download_ready"
        assert [(await desk.job(left)).damage for left in (ids[0], ids[2])] == ["torn", "torn"]
        await desk.set(ids[1], status="expired")
        assert not await desk.first.whole(job)

    ask(scenario)


def test_a_row_whose_status_and_log_are_lost_gets_a_log_of_its_end(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        (job_id,) = await desk.many(1, status="running")
        await desk.forget(job_id)
        await desk.set(job_id, status="sleeping")
        assert await desk.first.end_damaged() == 1
        assert (await desk.job(job_id)).last_seq == 1
        assert [(event.seq, event.type) for event in await desk.first.events(job_id, 0, 10)] == [(1, "job_failed")]

    ask(scenario)


def test_a_row_whose_status_is_none_ends_as_failed_with_an_event(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        ids = sorted(await desk.many(3))
        job = await desk.first.claim(max_weight=None)
        assert job is not None
        assert await desk.first.advance(job.id, 1, [told(progress=40)])
        await desk.set(job.id, status="sleeping", last_seq=-5)
        seen: list[tuple[str, str]] = []
        desk.first.watch = lambda job, event: seen.append((job.status, event.type))
        before = now_ms()
        assert await desk.first.end_damaged() == 1
        assert await desk.first.end_damaged() == 0
        assert seen == [("failed", "job_failed")]
        ended = await desk.job(job.id)
        assert (ended.status, ended.stage, ended.stage_progress, ended.last_seq) == ("failed", "failed", 100, 4)
        assert (ended.owner, ended.lease_until, ended.damage) == (None, None, None)
        assert ended.error is not None
        assert (ended.error.code, ended.error_code, ended.error.retryable) == ("INTERNAL", "INTERNAL", False)
        assert ended.finished_at is not None
        assert before <= ended.finished_at == ended.updated_at <= now_ms()
        last = (await desk.first.events(job.id, 0, 10))[-1]
        assert (last.seq, last.type, last.stage, last.progress, last.stage_progress) == (
            *(4, "job_failed", "failed"),
            *(40, 100),
        )
        assert last.meta == {"code": "INTERNAL", "retryable": False}
        assert {(await desk.job(left)).status for left in ids if left != job.id} == {"queued"}

    ask(scenario)


def test_rows_that_are_damaged_end_so_many_at_a_time(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.many(3, status="?")
        assert [await desk.first.end_damaged(limit=2) for _ in range(3)] == [2, 1, 0]
        await desk.many(101, status="?")
        assert [await desk.first.end_damaged() for _ in range(3)] == [100, 1, 0]

    ask(scenario)


def test_ids_that_no_job_has_are_told_however_many_are_asked(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        known = await desk.many(1_100)
        strange = {str(uuid.uuid4()) for _ in range(1_100)}
        assert await desk.first.unknown(known | strange) == strange
        assert await desk.first.unknown(known) == set()
        assert await desk.first.unknown([]) == set()

    ask(scenario)


def test_a_job_is_recovered_from_its_files_once(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        job = new_job()
        changes = desk.first.changes
        values = {"finished_at": START, "expires_at": START + HOUR, "started_at": None, "frames": 7}
        ready = NewEvent(
            "job_completed", Progress(stage="download_ready", progress=100, stage_progress=99, message="Found again")
        )
        assert await desk.first.recover(job, 4, values, ready)
        assert not await desk.first.recover(job, 5, values, ready)
        assert desk.first.changes == changes + 1
        found = await desk.job(job.id)
        assert (found.status, found.stage, found.progress, found.stage_progress) == (
            *("completed", "download_ready"),
            *(100, 99),
        )
        assert (found.attempt, found.frames, found.created_at, found.finished_at) == (4, 7, START, START)
        (event,) = await desk.first.events(job.id, 0, 10)
        assert (event.seq, event.type, event.progress, event.ts) == (1, "job_completed", 100, iso(START))

    ask(scenario)


# --- what is old ------------------------------------------------------------------------------------------


def test_what_is_past_its_time_is_told_unless_somebody_reads_it(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        now = await desk.clock()
        past = await desk.new(status="completed", expires_at=1_000)
        was_read = await desk.new(status="completed", expires_at=999, read_until=now - 1)
        await desk.new(status="completed", expires_at=1_001)
        await desk.new(status="completed", expires_at=999, read_until=now + HOUR)
        for status in ("failed", "canceled", "running", "expired"):
            await desk.new(status=status, expires_at=1, created_at=1)
        queued = await desk.new(created_at=499, updated_at=500)
        await desk.new(created_at=499, updated_at=501)
        found = await desk.first.expired(1_000, queued_before=500)
        assert {job.id for job in found} == {past, was_read, queued}

    ask(scenario)


def test_old_work_is_done_a_hundred_at_a_time(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        await desk.many(101, status="completed", expires_at=1, finished_at=1)
        assert len(await desk.first.expired(2, queued_before=0)) == 100
        for job in await desk.first.page(status=None, before=None, limit=200):
            await desk.set(job.id, status="expired", updated_at=1)
        assert [await desk.first.forget(1) for _ in range(3)] == [100, 1, 0]

    ask(scenario)


def test_what_has_expired_is_as_it_was_told_and_not_read(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        now = await desk.clock()
        job_id = await desk.new(status="completed", finished_at=5)
        job = await desk.job(job_id)
        await desk.set(job_id, read_until=now + HOUR)
        assert await desk.first.expire(job, None, {}) is None
        await desk.set(job_id, read_until=now - 1)
        assert await desk.first.expire(dataclasses.replace(job, status="queued"), None, {}) is None
        gone = await desk.first.expire(job, None, {"frames": 3})
        assert gone is not None
        assert (gone.status, gone.frames, gone.finished_at, gone.last_seq) == ("expired", 3, 5, 1)
        waiting = await desk.job(await desk.new())
        # It was taken, and came back to the queue since: it has all its time again.
        moved = dataclasses.replace(waiting, attempt=waiting.attempt - 1)
        assert await desk.first.expire(moved, told("job_expired", "expired"), {}) is None
        gone = await desk.first.expire(waiting, told("job_expired", "expired"), {})
        assert gone is not None
        assert gone.finished_at is not None
        assert gone.last_seq == 2

    ask(scenario)


def test_records_are_forgotten_from_a_time_on_and_completed_ones_never(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        kept = {
            *[await desk.new(status=status, finished_at=1) for status in ("completed", "running", "queued")],
            *[await desk.new(status=status, finished_at=1_001) for status in ("failed", "canceled", "expired")],
            # It ended long ago and lost its files just now: who comes late is told so.
            await desk.new(status="expired", finished_at=1, updated_at=1_001),
        }
        for status, finished in (("failed", 1_000), ("canceled", 1_000), ("expired", 999)):
            await desk.new(status=status, finished_at=finished, updated_at=finished)
        assert await desk.first.forget(1_000) == 3
        left = await desk.first.page(status=None, before=None, limit=99)
        assert {job.id for job in left} == kept
        for job in left:
            assert len(await desk.first.events(job.id, 0, 9)) == 1

    ask(scenario)


# --- who is told ------------------------------------------------------------------------------------------


def test_whoever_watches_is_told_of_each_change_that_has_an_event(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        seen: list[tuple[str, str]] = []
        desk.first.watch = lambda job, event: seen.append((job.status, event.type))
        job_id = await desk.new()
        assert await desk.first.hand_over() is not None
        assert await desk.first.submitted(job_id, 1, "name") is not None
        assert await desk.first.start(job_id, 1, at=0) is not None
        assert await desk.first.move(job_id, "canceled", told("job_canceled", "canceled")) is not None
        assert await desk.first.move(job_id, "failed", told("job_failed", "failed")) is None
        assert seen == [("running", "job_started"), ("canceled", "job_canceled")]

    ask(scenario)


def test_who_changed_a_job_stands_in_the_audit_log_and_in_the_log_once(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        job_id = await desk.new()
        entry = AuditEntry("k", "m", "127.0.0.1", "export.cancel", "ok", job_id, "t")
        with structlog.testing.capture_logs() as lines:
            for _ in range(2):
                await desk.first.move(job_id, "canceled", told("job_canceled", "canceled"), entry=entry)
                assert len(await desk.first.audit_page(AuditQuery(None, None, None, None), 9)) == 1
        assert [(line["event"], line["action"], line["job_id"]) for line in lines] == [
            ("audit", "export.cancel", job_id),
        ]
        rows = await desk.first.audit_page(AuditQuery(None, None, None, None), 9)
        assert [(row.action, row.job_id) for row in rows] == [("export.cancel", job_id)]

    ask(scenario)


def test_an_end_has_its_time_and_a_way_back_to_the_queue_has_no_driver(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        job_id = await desk.new(runpod_id="name")
        job = await desk.first.claim(max_weight=None)
        assert job is not None
        assert await desk.first.advance(job_id, 1, [told(progress=50), told(progress=20)])
        assert not await desk.first.advance(job_id, 0, [told()])
        assert not await desk.first.advance(job_id, 2, [told()])
        moved = await desk.first.move(job_id, "queued", told(stage="queued"), attempt=2)
        assert moved is None
        moved = await desk.first.move(job_id, "queued", told(stage="queued"), sources=frozenset({"queued"}))
        assert moved is None
        moved = await desk.first.move(job_id, "queued", told(stage="queued"), attempt=1, values={"retries": 1})
        assert moved is not None
        assert (moved.status, moved.owner, moved.lease_until, moved.runpod_id, moved.retries) == (
            *("queued", None, None),
            *(None, 1),
        )
        assert (moved.progress, moved.stage, moved.message, moved.finished_at) == (50, "queued", "queued", None)
        before = now_ms()
        assert await desk.first.claim(max_weight=None) is not None
        ended = await desk.first.move(job_id, "failed", told("job_failed", "failed", 10), values={"error_code": "A"})
        assert ended is not None
        assert ended.finished_at is not None
        assert before <= ended.finished_at == ended.updated_at <= now_ms()
        found = await desk.first.events(job_id, 0, 99)
        assert [event.seq for event in found] == list(range(1, ended.last_seq + 1))
        assert [event.progress for event in found] == [0, 0, 50, 50, 50, 50, 50]
        assert ended.progress == 50

    ask(scenario)


def test_an_event_of_the_log_says_all_that_was_told(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        job_id = await desk.new()
        assert await desk.first.claim(max_weight=None) is not None
        step = Progress(stage="finalize", progress=93, stage_progress=41, message="Nearly", meta={"probes": 12})
        before = now_ms()
        assert await desk.first.advance(job_id, 1, [NewEvent("stage_progress", step)])
        job = await desk.job(job_id)
        assert (job.stage, job.progress, job.stage_progress, job.message) == ("finalize", 93, 41, "Nearly")
        assert before <= job.updated_at <= now_ms()
        event = (await desk.first.events(job_id, 2, 1))[0]
        assert event == Event(
            seq=3,
            ts=iso(job.updated_at),
            job_id=job_id,
            type="stage_progress",
            stage="finalize",
            progress=93,
            stage_progress=41,
            emoji=event.emoji,
            message="Nearly",
            meta={"probes": 12},
        )
        assert event.emoji

    ask(scenario)


def test_steps_that_the_log_has_are_not_told_again(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        job_id = await desk.new()
        assert await desk.first.claim(max_weight=None) is not None
        assert await desk.first.advance(job_id, 1, [told(progress=10)], told=(0, 3))
        for wrong in ((0, 3), (2, 4), (4, 5)):
            assert not await desk.second.advance(job_id, 1, [told(progress=99)], told=wrong)
        job = await desk.job(job_id)
        assert (job.told, job.progress, job.last_seq) == (3, 10, 3)
        assert await desk.second.advance(job_id, 1, [told(progress=20)], told=(3, 4))

    ask(scenario)


# --- dead letters ---------------------------------------------------------------------------------------


def test_a_failed_job_keeps_its_payload_until_it_is_let_go(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        kept = {when: await desk.new(status="failed", finished_at=1, expires_at=when) for when in (10, 20, 30)}
        bare = await desk.new(status="failed", finished_at=1, updated_at=1)
        done = await desk.new(status="completed", finished_at=1, expires_at=10)
        assert await desk.first.kept_payloads() == set(kept.values())
        assert await desk.first.forget(99) == 1
        assert await desk.first.get(bare) is None
        assert await desk.first.let_go(job_id=done) == []
        assert await desk.first.let_go(before=9) == []
        assert await desk.first.let_go(before=10) == [kept[10]]
        assert await desk.first.let_go(job_id=kept[30]) == [kept[30]]
        assert await desk.first.let_go(job_id=kept[30]) == []
        assert await desk.first.kept_payloads() == {kept[20]}
        assert (await desk.job(done)).expires_at == 10
        assert await desk.first.forget(99) == 0  # their history begins now
        assert await desk.first.forget(await desk.clock()) == 2
        await desk.many(101, status="failed", expires_at=1)
        assert [len(await desk.first.let_go(before=1)) for _ in range(3)] == [100, 1, 0]
        assert await desk.first.kept_payloads() == {kept[20]}

    ask(scenario)


def test_a_failed_job_is_done_again_once_and_its_payload_goes_along(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        ids = sorted([await desk.new(status="failed", finished_at=1, expires_at=10) for _ in range(3)])
        again = dataclasses.replace(new_job(), retry_of=ids[1])
        assert await desk.first.retry_of(ids[1]) is None
        record, new = await desk.first.create(again)
        assert (new, record.retry_of) == (True, ids[1])
        same, new = await desk.second.create(dataclasses.replace(new_job(), retry_of=ids[1]))
        assert (new, same.id) == (False, record.id)
        assert await desk.first.kept_payloads() == {ids[0], ids[2]}
        found = await desk.first.retry_of(ids[1])
        assert found is not None
        assert found.id == record.id
        assert [await desk.first.retry_of(other) for other in (ids[0], ids[2])] == [None, None]
        assert await desk.first.retried_by(ids) == {ids[1]: record.id}
        assert await desk.first.retried_by([ids[0]]) == {}
        assert await desk.first.retried_by([]) == {}

    ask(scenario)


# --- quotas and the audit log -----------------------------------------------------------------------------


def test_a_client_has_no_more_jobs_than_its_quota_and_others_do_not_count(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        now = now_ms()
        day = 24 * HOUR
        mine = {"client": "m"}
        for client in ("a", "z"):
            await desk.many(5, client=client)
        for status in ("queued", "running"):
            await desk.new(**mine, status=status, created_at=now - day - 60_000)
        for status in ("completed", "failed", "canceled"):
            await desk.new(**mine, status=status, created_at=now - day + HOUR)
        assert await desk.first.quota_used("m", Quota()) == Quota()
        assert await desk.first.quota_used("m", Quota(9, None)) == Quota(2, None)
        assert await desk.first.quota_used("m", Quota(None, 9)) == Quota(None, 3)
        assert await desk.first.quota_used("n", Quota(9, 9)) == Quota(0, 0)
        for enough in (Quota(), Quota(3, 4), Quota(3, None), Quota(None, 4)):
            await desk.first.check_quota("m", enough)
        with pytest.raises(QuotaReached, match="2 exports of this client may wait or run at once"):
            await desk.first.check_quota("m", Quota(2, None))
        with pytest.raises(QuotaReached, match="3 exports of this client may be made in 24 hours") as full:
            await desk.first.check_quota("m", Quota(9, 3))
        assert 3_500 < full.value.details["retryAfterSeconds"] <= 3_600

        def next_one() -> NewJob:
            return dataclasses.replace(new_job(), client="m")

        for quota in (Quota(2, None), Quota(None, 3)):
            with pytest.raises(QuotaReached):
                await desk.first.create(next_one(), quota=quota)
        assert (await desk.first.create(next_one(), quota=Quota(3, 4)))[1]
        assert await desk.first.quota_used("m", Quota(9, 9)) == Quota(3, 4)

    ask(scenario)


def test_what_is_written_into_the_audit_log_is_read_newest_first_and_forgotten_in_time(ask: Ask) -> None:
    def entry(client: str, action: Any = "export.create") -> AuditEntry:
        return AuditEntry("k", client, "127.0.0.1", action, "ok", None, "t")

    async def scenario(desk: Desk) -> None:
        job = new_job()
        await desk.first.create(job, entry=entry("m")._replace(job_id=job.id))
        await desk.first.write_audit([(10, entry("a")), (20, entry("m", "export.cancel")), (20, entry("z"))])
        everything = AuditQuery(None, None, None, None)
        rows = await desk.first.audit_page(everything, 9)
        assert [row.client for row in rows] == ["m", "z", "m", "a"]
        assert rows[0].job_id == job.id
        assert len(await desk.first.audit_page(everything, 2)) == 2
        found = await desk.first.audit_page(everything._replace(client="m", action="export.cancel"), 9)
        assert [row.ts for row in found] == [20]
        older = await desk.first.audit_page(everything._replace(before=(20, rows[1].id)), 9)
        assert [row.client for row in older] == ["m", "a"]
        assert len(await desk.first.audit_page(everything._replace(since=20), 9)) == 3
        await desk.first.forget_audit(10)
        assert len(await desk.first.audit_page(everything, 9)) == 4
        await desk.first.forget_audit(20)
        assert [row.client for row in await desk.first.audit_page(everything, 9)] == ["m", "z", "m"]
        await desk.first.write_audit([(1, entry("m"))] * (AUDIT_BATCH + 1))
        await desk.first.forget_audit(21)
        assert [row.client for row in await desk.first.audit_page(everything, 9)] == ["m"]

    ask(scenario)


def test_a_database_that_can_be_written_says_so_and_loses_nothing(ask: Ask) -> None:
    async def scenario(desk: Desk) -> None:
        job, _ = await desk.first.create(new_job(), "key")
        await desk.first.check_writable()
        found = await desk.first.find_key("default", "key", "0" * 64)
        assert found is not None
        assert found.id == job.id

    ask(scenario)
