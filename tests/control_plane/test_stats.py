"""Charts of the last hours are counted from the jobs, on either database."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from alembic import command
from alembic.config import Config
from live_server import Server, graph, large_graph, new_job
from sqlalchemy import Connection, MetaData, Table, insert

import control_plane.jobs as jobs_package
from common.contract import Status
from control_plane.jobs.database import Database
from control_plane.jobs.hub import EventHub
from control_plane.jobs.store import JobStore
from control_plane.jobs.tables import jobs

HOUR = 3_600_000
START = 1_790_000_000_000 // HOUR * HOUR
MIGRATIONS = Path(jobs_package.__file__).with_name("migrations")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}"
    return str(request.getfixturevalue("postgres_url"))


def _run(url: str, scenario: Callable[[Database, JobStore], Awaitable[None]]) -> None:
    async def inside() -> None:
        database = Database(url)
        await database.migrate()
        try:
            await scenario(database, JobStore(database, EventHub(), queue_capacity=1000))
        finally:
            await database.close()

    asyncio.run(inside())


def _stats(server: Server, **params: object) -> dict[str, Any]:
    answer = server.client.get("/v1/stats", params={name: str(value) for name, value in params.items()})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def _sum(stats: dict[str, Any]) -> dict[str, int]:
    names = ("submitted", "completed", "failed", "canceled", "frames")
    return {name: sum(bucket[name] for bucket in stats["buckets"]) for name in names}


def test_each_job_is_counted_by_how_it_ended(start_server: Any) -> None:
    server = start_server(worker_slots=1, queue_capacity=7)
    assert _sum(_stats(server)) == {"submitted": 0, "completed": 0, "failed": 0, "canceled": 0, "frames": 0}
    done = server.submit(graph(3, name="done"))
    server.wait(done)
    running = server.submit(large_graph())
    waiting = server.submit(graph(3, name="waiting"))
    busy = _stats(server)["queue"]
    assert (busy["queued"] + busy["running"], busy["capacity"]) == (2, 7)
    assert busy["oldestSeconds"] >= 0
    for job_id in (waiting, running):
        server.client.delete(f"/v1/exports/{job_id}")
        server.wait(job_id)
    manifest = server.client.get(f"/v1/exports/{done}/manifest").json()
    stats = _stats(server)
    assert _sum(stats) == {"submitted": 3, "completed": 1, "failed": 0, "canceled": 2, "frames": manifest["frames"]}
    assert (stats["queue"]["queued"], stats["queue"]["running"], stats["failures"]) == (0, 0, [])


def test_failures_are_counted_by_their_code(start_server: Any) -> None:
    server = start_server(worker_slots=1, worker_memory_bytes=256 << 20)
    failed = server.submit(large_graph("hungry", 50_000))
    assert server.wait(failed)["type"] == "job_failed"
    code = server.job(failed)["error"]["code"]
    stats = _stats(server, hours=1)
    assert stats["failures"] == [{"code": code, "count": 1}]
    assert _sum(stats)["failed"] == 1


def test_an_export_whose_files_have_expired_was_completed_all_the_same(start_server: Any) -> None:
    server = start_server(worker_slots=1, retention_seconds=1)
    job_id = server.submit(graph(3))
    server.wait(job_id)
    while server.job(job_id)["status"] != "expired":
        time.sleep(0.1)
    counted = _sum(_stats(server))
    assert (counted["completed"], counted["frames"] > 3) == (1, True)


@pytest.mark.parametrize("hours", [1, 2, 5, 23, 24, 25, 47, 71, 95, 100, 143, 168])
def test_buckets_are_equal_and_none_is_left_out(server: Server, hours: int) -> None:
    stats = _stats(server, hours=hours)
    step, starts = stats["bucketSeconds"], [_seconds(bucket["start"]) for bucket in stats["buckets"]]
    assert 24 <= len(starts) <= 48
    assert {after - before for before, after in pairwise(starts)} == {step}
    assert all(start % step == 0 for start in starts)
    now = _seconds(stats["at"])
    assert starts[-1] <= now < starts[-1] + step
    assert len(starts) * step >= hours * 3600


@pytest.mark.parametrize("hours", ["0", "-1", "169", "x", "1.5", "99999999999999999999"])
def test_a_wrong_span_is_told_what_is_allowed(server: Server, hours: str) -> None:
    answer = server.client.get("/v1/stats", params={"hours": hours})
    assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, "hours")


def test_stats_want_the_key(server: Server) -> None:
    assert httpx.get(f"{server.url}/v1/stats").status_code == 401


def test_counts_are_those_of_the_rows(url: str) -> None:
    chance = random.Random(5)
    starts = range(START, START + 30 * HOUR, HOUR)
    rows = [_row(chance) for _ in range(600)]

    async def scenario(database: Database, store: JobStore) -> None:
        async with database.write.begin() as connection:
            await connection.execute(insert(jobs), rows)
        submitted = Counter(row["created_at"] // HOUR for row in rows)
        ended: Counter[tuple[int, str]] = Counter()
        frames: Counter[int] = Counter()
        for row in rows:
            if row["finished_at"] is not None:
                kind = "completed" if row["frames"] is not None else row["status"]
                ended[row["finished_at"] // HOUR, kind] += 1
                frames[row["finished_at"] // HOUR] += row["frames"] or 0
        found = await store.activity(starts, HOUR)
        assert [span.start for span in found] == list(starts)
        for span in found:
            hour = span.start // HOUR
            expected = submitted[hour], ended[hour, "completed"], ended[hour, "canceled"], frames[hour]
            assert (span.submitted, span.completed, span.canceled, span.frames) == expected
        failed = Counter(
            ((row["finished_at"] - START) // HOUR, row["error_code"] or "INTERNAL")
            for row in rows
            if row["status"] == "failed" and row["finished_at"] >= START
        )
        assert {(span, code): count for span, code, count in await store.failures(START, HOUR)} == dict(failed)
        assert await store.running() == sum(row["status"] == "running" for row in rows)

    _run(url, scenario)


def _row(chance: random.Random) -> dict[str, Any]:
    kinds: list[Status] = ["queued", "running", "completed", "failed", "canceled", "expired"]
    status = chance.choice(kinds)
    came = START + chance.randrange(-5 * HOUR, 29 * HOUR)
    over = None if status in ("queued", "running") else came + chance.randrange(2 * HOUR)
    made = status == "completed" or (status == "expired" and chance.random() < 0.5)
    code = chance.choice(["WRITER_FAILED", "OUT_OF_MEMORY", None])
    job = new_job()
    return {
        "id": job.id,
        "backend": job.backend,
        "status": status,
        "stage": "queued",
        "progress": 0,
        "stage_progress": 0,
        "message": "",
        "last_seq": 1,
        "attempt": 1,
        "lost": 0,
        "weight": 1,
        "session_id": "",
        "project_name": "",
        "payload_ref": "",
        "payload_sha256": "",
        "payload_size": 1,
        "created_at": came,
        "updated_at": came,
        "finished_at": over,
        "profile": "default",
        "base_name": "",
        "available_at": 0,
        "retries": 0,
        "timeouts": 0,
        "told": 0,
        "secret": "",
        "frames": chance.randrange(100_000) if made else None,
        "error_code": code if status == "failed" else None,
    }


def test_jobs_from_before_are_counted_after_the_migration(url: str) -> None:
    chance = random.Random(6)
    ended = (
        {"status": "completed", "manifest": '{"frames": 7542, "parts": []}'},
        {"status": "failed", "error": '{"code": "WRITER_FAILED", "message": "x", "retryable": true}'},
    )

    def as_the_revision_before_left_it(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        before = Table("jobs", MetaData(), autoload_with=connection)
        for values in ended:
            row = _row(chance) | {"finished_at": START} | values
            connection.execute(insert(before).values({name: row[name] for name in row if name in before.columns}))

    async def scenario() -> None:
        database = Database(url)
        try:
            async with database.write.begin() as connection:
                await connection.run_sync(as_the_revision_before_left_it)
            await database.migrate()
            store = JobStore(database, EventHub(), queue_capacity=1000)
            (span,) = await store.activity([START], HOUR)
            assert (span.completed, span.frames) == (1, 7542)
            assert await store.failures(START, HOUR) == [(0, "WRITER_FAILED", 1)]
        finally:
            await database.close()

    asyncio.run(scenario())


def _seconds(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()
