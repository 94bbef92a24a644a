"""Rows of the job store that are damaged hide no others, and a long log is held in memory by its newest events."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from driving import Workshop, run

from common.contract import Progress
from control_plane.jobs.hub import KEPT, EventHub
from control_plane.jobs.records import NewEvent
from control_plane.jobs.store import JobStore


@pytest.mark.parametrize(
    ("column", "value", "read"),
    [
        ("told", "many", 0),
        ("attempt", b"\x00", 0),
        ("started_at", "today", None),
        ("finished_at", -1, None),
        ("created_at", 1 << 60, 253_402_300_799_999),
        ("status", "asleep", "failed"),
        ("stage", "asleep", "queued"),
        ("error", "{", None),
        ("output", b"\xff", None),
        ("manifest", "[]", None),
    ],
)
def test_a_row_that_is_damaged_is_listed_with_what_can_be_read_of_it(
    tmp_path: Path, column: str, value: object, read: object
) -> None:
    async def scenario(shop: Workshop) -> None:
        whole, damaged = await shop.submit(), await shop.submit()
        await shop.change(f"UPDATE jobs SET {column} = ? WHERE id = ?", value, damaged.id)
        found = {job.id: job for job in await shop.store.page(status=None, before=None, limit=10)}
        assert found[whole.id].damage is None
        assert getattr(found[damaged.id], column) == read
        assert found[damaged.id].damage == f"its record is damaged ({column})"
        assert found[damaged.id].payload_ref == damaged.payload_ref
        if column == "status":
            error = found[damaged.id].error
            assert error is not None
            assert (error.code, error.retryable) == ("INTERNAL", False)

    run(tmp_path, scenario)


@pytest.mark.parametrize("meta", ["{", "[]", b"\xff\xfe"])
def test_an_event_whose_details_are_damaged_says_so_and_keeps_its_place(tmp_path: Path, meta: object) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await shop.submit()
        assert await shop.store.claim(max_weight=None)
        await shop.change("UPDATE events SET meta = ? WHERE seq = 1", meta)
        first, second = await shop.store.events(job.id, 0, 10)
        assert (first.seq, first.message, first.meta) == (1, "Queued", {"damaged": True})
        assert "damaged" not in second.meta

    run(tmp_path, scenario)


def test_a_job_whose_log_has_ended_gets_that_end_back_where_its_status_is_damaged(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await shop.submit()
        canceled = Progress(stage="canceled", progress=0, stage_progress=100, message="Canceled")
        assert await shop.store.move(job.id, "canceled", NewEvent("job_canceled", canceled))
        await shop.change("UPDATE jobs SET status = 'asleep', last_seq = 77")
        assert await shop.store.end_damaged() == 1
        ended = await shop.job(job.id)
        assert (ended.status, ended.last_seq, ended.error) == ("canceled", 2, None)
        assert await shop.told(job.id) == ["Queued", "Canceled"]

    run(tmp_path, scenario)


def test_of_a_long_log_the_newest_events_are_held_in_memory_and_all_of_them_in_the_store(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        hub = EventHub()
        store = JobStore(shop.database, hub, queue_capacity=10)
        job = await shop.submit()
        running = await store.claim(max_weight=None)
        assert running is not None
        count = (KEPT // 100 + 2) * 100
        async with hub.listen(job.id) as channel:
            for start in range(0, count, 100):
                batch = [
                    Progress(stage="transform", progress=1, stage_progress=0, message=f"{start}") for _ in range(100)
                ]
                assert await store.advance(job.id, 1, [NewEvent("stage_progress", each) for each in batch])
            assert sorted(channel.lines) == list(range(count + 3 - KEPT, count + 3))
        ended = Progress(stage="canceled", progress=0, stage_progress=100, message="Canceled")
        assert await store.move(job.id, "canceled", NewEvent("job_canceled", ended))
        assert [event.seq for event in await store.events(job.id, 0, 5_000)] == list(range(1, count + 4))

    run(tmp_path, scenario)


def test_whoever_listens_when_the_server_stops_is_woken_and_told() -> None:
    async def inside() -> None:
        hub = EventHub()
        async with hub.listen("job") as channel:
            waiting = asyncio.create_task(channel.changed(30))
            await asyncio.sleep(0)
            hub.close()
            assert await waiting
            assert channel.closed
        async with hub.listen("late") as channel:
            assert channel.closed
        assert (hub.job_ids, hub.listeners) == ([], 0)

    asyncio.run(inside())
