"""The audit log under a flood, and while the database is away: what it drops, it counts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from operations.storehouse import Storehouse, storehouse
from sqlalchemy import Row

from control_plane.errors import JobNotFound
from control_plane.jobs.audit import AuditEntry, AuditQuery
from control_plane.operations.audit import MAX_ADDRESSES, MAX_KNOWN, MAX_MISSED, MAX_WAITING, AuditLog

DROPPED = "memvid_export_audit_dropped_total"
READ = AuditEntry("red", "red", "127.0.0.1", "export.read", "ok", None, "")
Ask = Callable[[Callable[[Storehouse, AuditLog], Awaitable[None]]], None]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Run a scenario on an empty store and its audit log."""

    def run(scenario: Callable[[Storehouse, AuditLog], Awaitable[None]]) -> None:
        async def inside() -> None:
            async with storehouse(tmp_path / "root") as house:
                await scenario(house, AuditLog(house.store, house.metrics))

        asyncio.run(inside())

    return run


async def rows(house: Storehouse) -> list[Row[Any]]:
    """All that was written, the oldest first."""
    return (await house.store.audit_page(AuditQuery(None, None, None, None), 100_000))[::-1]


def test_the_same_again_is_one_entry_and_its_count_whatever_trace_it_belongs_to(ask: Ask) -> None:
    async def scenario(house: Storehouse, audit: AuditLog) -> None:
        for number in range(5):
            audit.note(READ._replace(trace=str(number)))
        audit.note(READ._replace(key="blue"))
        await audit.stop()
        assert [(row.key, row.outcome, row.trace) for row in await rows(house)] == [
            ("red", "ok", "0"),
            ("blue", "ok", ""),
            ("red", "ok x4", "0"),
        ]

    ask(scenario)


def test_wrong_keys_from_ever_new_addresses_are_counted_together(ask: Ask) -> None:
    async def scenario(house: Storehouse, audit: AuditLog) -> None:
        guess = AuditEntry("", "", "", "key.refused", "UNAUTHORIZED", None, "")
        for number in range(MAX_ADDRESSES + 50):
            audit.note(guess._replace(address=f"192.0.2.{number}"))
        audit.note(guess._replace(address="192.0.2.0"))
        await audit.stop()
        found = Counter(row.address for row in await rows(house))
        assert len(found) == MAX_ADDRESSES + 1
        assert [row.outcome for row in await rows(house) if row.address == "other addresses"] == [
            "UNAUTHORIZED",
            "UNAUTHORIZED x49",
        ]
        assert [row.outcome for row in await rows(house) if row.address == "192.0.2.0"] == [
            "UNAUTHORIZED",
            "UNAUTHORIZED x1",
        ]

    ask(scenario)


def test_after_a_minute_is_over_new_addresses_and_ids_are_told_by_name_again(ask: Ask) -> None:
    async def scenario(house: Storehouse, audit: AuditLog) -> None:
        guess = AuditEntry("", "", "", "key.refused", "UNAUTHORIZED", None, "")
        miss = AuditEntry("red", "red", "127.0.0.1", "export.download", JobNotFound.code, "", "")
        for minute in range(2):
            for number in range(MAX_ADDRESSES + 1):
                audit.note(guess._replace(address=f"{minute}.{number}"))
            for number in range(MAX_MISSED + 1):
                audit.note(miss._replace(job_id=f"{minute}-{number}"))
            await audit.stop()
        found = await rows(house)
        for minute in range(2):
            assert sum(row.address.startswith(f"{minute}.") for row in found) == MAX_ADDRESSES
            assert sum((row.job_id or "").startswith(f"{minute}-") for row in found) == MAX_MISSED
        assert sum(row.address == "other addresses" for row in found) == 2
        assert sum(row.action == "export.download" and row.job_id is None for row in found) == 2

    ask(scenario)


def test_more_than_can_be_known_are_dropped_and_counted_and_said(ask: Ask) -> None:
    async def scenario(house: Storehouse, audit: AuditLog) -> None:
        with structlog.testing.capture_logs() as lines:
            for number in range(MAX_KNOWN + 3):
                audit.note(READ._replace(key=str(number)))
            await audit.stop()
        assert len(await rows(house)) == MAX_KNOWN
        assert house.metric(DROPPED) == 3
        (line,) = (line for line in lines if line["event"] == "entries of the audit log were dropped")
        assert line["count"] == 3

    ask(scenario)


def test_while_the_database_is_away_entries_wait_and_what_does_not_fit_is_dropped(ask: Ask) -> None:
    async def scenario(house: Storehouse, audit: AuditLog) -> None:
        await house.change("ALTER TABLE audit RENAME TO elsewhere")
        with structlog.testing.capture_logs() as lines:
            for number in range(MAX_WAITING):
                audit.note(READ._replace(key=str(number)))
            await audit.stop()
            audit.note(READ._replace(key="too late"))
            await audit.stop()
        waits = [line for line in lines if line["event"] == "the audit log waits for the database"]
        assert [line["waiting"] for line in waits] == [MAX_WAITING], "it is said once"
        assert house.metric(DROPPED) == 1

        await house.change("ALTER TABLE elsewhere RENAME TO audit")
        audit.note(READ._replace(key="after"))
        await audit.stop()
        keys = [row.key for row in await rows(house)]
        assert keys == [str(number) for number in range(MAX_WAITING)]

    ask(scenario)


def test_what_was_noted_is_written_while_the_server_runs(ask: Ask) -> None:
    async def scenario(house: Storehouse, audit: AuditLog) -> None:
        audit.reloaded("ok")
        task = asyncio.create_task(audit.run())
        async with asyncio.timeout(60):
            while not (found := await rows(house)):
                await asyncio.sleep(0.02)
        task.cancel()
        assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)
        assert [(row.action, row.outcome, row.key) for row in found] == [("keys.reload", "ok", "")]

    ask(scenario)
