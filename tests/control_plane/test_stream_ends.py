"""How event streams end when the server stops, and what is told of a job whose record is damaged."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from live_server import new_job
from test_hostile_requests import _Client, _finished, _store

from common.contract import Event, JobOutput
from control_plane.errors import ArtifactMissing
from control_plane.exports.service import ExportService
from control_plane.exports.stream import PING, PING_SECONDS, EventStream
from control_plane.jobs.database import Database
from control_plane.jobs.store import JobStore
from control_plane.operations.keys import EVERYBODY
from control_plane.operations.metrics import Metrics
from control_plane.operations.shares import Shares


class Away(JobStore):
    """A store that does not answer who asks it for events."""

    async def events(self, job_id: str, since: int, limit: int) -> list[Event]:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize("answers", [True, False])
def test_a_stream_ends_in_order_when_the_server_stops(tmp_path: Path, answers: bool) -> None:
    async def check() -> None:
        async with _store(tmp_path) as (store, hub), _database(tmp_path) as database:
            job, _ = await store.create(new_job())
            asked = store if answers else Away(database, hub, queue_capacity=1)
            shares = Shares("streams", 1, Metrics(), several=False)
            client = _Client(100)
            stream = EventStream(asked, hub, job, 0, shares=shares)
            running = asyncio.create_task(stream(client.scope, client.receive, client.send))
            while len(client.got) < (3 if answers else 2):  # its start, a ping, and the first event
                await asyncio.sleep(0.01)
            hub.close()
            async with asyncio.timeout(20 * PING_SECONDS):
                await running
            start, ping, *events, end = client.got
            assert (start["status"], ping["body"]) == (200, PING)
            assert [b"event: stage_progress" in event["body"] for event in events] == [True] * answers
            assert (end["body"], end["more_body"]) == (b"", False)
            assert (hub.listeners, shares.taken) == (0, 0)

    asyncio.run(check())


@asynccontextmanager
async def _database(root: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite+aiosqlite:///{root / 'jobs.sqlite'}")
    try:
        yield database
    finally:
        await database.close()


@pytest.mark.parametrize("metrics", [None, {"status": 7}, {"capsule": []}])
def test_a_report_that_cannot_be_read_is_missing_and_not_an_error_of_ours(
    tmp_path: Path, metrics: dict[str, Any] | None
) -> None:
    async def check() -> None:
        async with _store(tmp_path) as (store, hub):
            job = await _finished(store)
            if metrics is not None:
                output = JobOutput(
                    artifact_ref="", sidecar_ref="", manifest_ref="", sha256="", size_bytes=1, metrics=metrics
                )
                with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as rows, rows:
                    rows.execute("UPDATE jobs SET output = ?", (msgspec.json.encode(output).decode(),))
            service = ExportService(store, hub, None, downloads=None, streams=None, note=[].append)  # type: ignore[arg-type]
            with pytest.raises(ArtifactMissing, match="no report of this export: its record is damaged") as missing:
                await service.report(EVERYBODY, job.id)
            assert missing.value.details["damage"] == "its record is damaged"

    asyncio.run(check())
