"""What a sweep removes and what it spares: exports, payloads, records and strays, whatever fails meanwhile."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import structlog
from live_server import new_job
from operations.storehouse import Storehouse, exported, storehouse

from common.contract import Progress
from common.errors import StorageFailed
from common.graph.model import GraphLimits
from common.storage import FileStorage
from control_plane.backends.legacy_vps import LegacyVps
from control_plane.backends.port import Means
from control_plane.jobs.audit import AuditEntry, AuditQuery
from control_plane.jobs.records import NewEvent
from control_plane.jobs.store import SWEPT, now_ms
from control_plane.operations.disk import Disk
from control_plane.operations.profiles import Profiles
from control_plane.operations.recovery import CLIENT
from control_plane.operations.retention import Retention
from handler.pool import WorkerPool
from handler.protocol import ChildConfig

__all__ = ["exported"]

HOUR_MS = 3_600_000
Ask = Callable[[Callable[[Storehouse], Awaitable[None]]], None]


@pytest.fixture
def ask(tmp_path: Path, exported: Path) -> Ask:
    """Run a scenario on an empty storehouse: an hour of retention, two of history, a minute for strays."""

    def run(scenario: Callable[[Storehouse], Awaitable[None]]) -> None:
        async def inside() -> None:
            times = {"retention_seconds": 3_600, "history_seconds": 7_200, "stray_seconds": 60}
            async with storehouse(tmp_path / "root", exported, **times) as house:
                await scenario(house)

        asyncio.run(inside())

    return run


def retention(house: Storehouse) -> Retention:
    """Over a backend that has no work."""
    means = Means(house.settings, house.store, house.storage, house.layout, house.metrics)
    config = ChildConfig(
        parent_pid=os.getpid(),
        storage=house.layout.storage(house.settings),
        scratch=str(house.layout.scratch),
        writer=None,
        memory_limit=4 << 30,
        limits=GraphLimits(),
    )
    backend = LegacyVps(
        means,
        pool=WorkerPool(config, 1),
        profiles=Profiles.load(None, house.settings),
        disk=Disk(house.settings, house.metrics),
    )
    return Retention(house.settings, house.store, house.storage, house.layout, backend)


def payload(house: Storehouse, job_id: str, *, age: float = 0.0) -> Path:
    """A staged payload."""
    path = house.layout.payloads / job_id
    path.write_bytes(b"{}")
    os.utime(path, (time.time() - age,) * 2)
    return path


async def queued(house: Storehouse, *, since: int = 0) -> str:
    """A job that waits since so many milliseconds."""
    job, _ = await house.store.create(new_job())
    await house.put(job.id, created_at=now_ms() - since, updated_at=now_ms() - since)
    return job.id


async def failed(house: Storehouse) -> str:
    """A job that ended just now."""
    job_id = await queued(house)
    event = NewEvent("job_failed", Progress(stage="failed", progress=0, stage_progress=0, message="it failed"))
    assert await house.store.move(job_id, "failed", event) is not None
    return job_id


def test_an_export_past_its_time_loses_its_files_once_nobody_reads_them_and_keeps_its_log(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        (past, gone), (read, held), (young, kept) = [await house.finished() for _ in range(3)]
        for job_id in (past, read):
            await house.put(job_id, expires_at=now_ms() - 1)
        await house.store.hold([read], 60)
        sweeps = retention(house)
        await sweeps.sweep()
        assert [(await house.job(it)).status for it in (past, read, young)] == ["expired", "completed", "completed"]
        assert [folder.exists() for folder in (gone, held, kept)] == [False, True, True]
        assert (await house.job(past)).message == "The files were removed after their time"
        assert [event.type for event in await house.store.events(past, 0, 10)] == ["job_completed"]
        await house.put(read, read_until=0)
        await sweeps.sweep()
        assert ((await house.job(read)).status, held.exists()) == ("expired", False)

    ask(scenario)


def test_more_than_one_look_finds_are_all_expired_and_later_forgotten_in_one_sweep(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        job_id, _ = await house.finished()
        await house.put(job_id, expires_at=now_ms() - 1)
        await house.many_like(job_id, SWEPT)
        sweeps = retention(house)
        await sweeps.sweep()
        assert await house.store.counts() == {"expired": SWEPT + 1}
        long_ago = now_ms() - 3 * HOUR_MS
        await house.change(f"UPDATE jobs SET finished_at = {long_ago}, updated_at = {long_ago}")
        await sweeps.sweep()
        assert await house.store.counts() == {}

    ask(scenario)


def test_an_export_that_nobody_took_leaves_the_queue_with_an_event_and_without_its_payload(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        late, waiting = await queued(house, since=HOUR_MS + 1), await queued(house, since=HOUR_MS - 60_000)
        payloads = [payload(house, job_id) for job_id in (late, waiting)]
        await retention(house).sweep()
        assert [(await house.job(job_id)).status for job_id in (late, waiting)] == ["expired", "queued"]
        assert [path.exists() for path in payloads] == [False, True]
        last = (await house.store.events(late, 0, 10))[-1]
        assert (last.type, last.stage) == ("job_expired", "expired")
        assert "removed from the queue" in last.message

    ask(scenario)


def test_a_failed_export_loses_its_payload_after_its_time_and_its_record_after_that_of_history(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        past, kept = await failed(house), await failed(house)
        await house.put(past, expires_at=now_ms() - 1)
        await house.put(kept, expires_at=now_ms() + HOUR_MS)
        payloads = [payload(house, job_id) for job_id in (past, kept)]
        sweeps = retention(house)
        await sweeps.sweep()
        assert [path.exists() for path in payloads] == [False, True]
        assert await house.store.kept_payloads() == {kept}
        assert (await house.job(past)).status == "failed"
        for job_id in (past, kept):
            await house.put(job_id, finished_at=now_ms() - 3 * HOUR_MS, updated_at=now_ms() - 3 * HOUR_MS)
        await sweeps.sweep()
        assert await house.store.get(past) is None
        assert (await house.job(kept)).status == "failed"

    ask(scenario)


def test_old_entries_of_the_audit_log_and_damaged_records_are_seen_to(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        entry = AuditEntry("red", "red", "127.0.0.1", "export.read", "ok", None, "")
        await house.store.write_audit([(now_ms() - 3 * HOUR_MS, entry), (now_ms(), entry._replace(key="new"))])
        damaged = await queued(house)
        await house.put(damaged, status="qeued")
        with structlog.testing.capture_logs() as lines:
            await retention(house).sweep()
        rows = await house.store.audit_page(AuditQuery(None, None, None, None), 10)
        assert [row.key for row in rows] == ["new"]
        assert [line["count"] for line in lines if line["event"] == "records of jobs were damaged"] == [1]
        assert await house.store.counts() == {"failed": 1}

    ask(scenario)


def test_strays_go_and_what_a_job_speaks_for_or_is_recovered_stays(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        _, known = await house.finished()
        house.age(known, 120)
        waiting = await queued(house)
        spoken, stray = (payload(house, job_id, age=120) for job_id in (waiting, "nobody"))
        young = payload(house, "somebody", age=30)
        unknown = house.stored(age=120)
        other = house.layout.artifacts / "nobody" / "1" / "x.mv2"
        other.parent.mkdir(parents=True)
        other.write_bytes(b"1")
        house.age(other.parent, 120)
        sweeps = retention(house)
        with structlog.testing.capture_logs() as lines:
            await sweeps.sweep()
        assert [path.exists() for path in (stray, other)] == [False, False]
        assert all(path.exists() for path in (spoken, young, known, unknown))
        assert [line["count"] for line in lines if line["event"] == "strays removed"] == [2]
        job = await house.job(unknown.parent.name)
        assert (job.status, job.client) == ("completed", CLIENT)
        late = payload(house, "late", age=120)
        await sweeps.sweep()
        assert late.exists(), "the whole storage is not listed at every sweep"

    ask(scenario)


class Kept(FileStorage):
    """Deletes nothing while it is read-only."""

    read_only = True

    def delete(self, prefix: str) -> int:
        if self.read_only:
            raise StorageFailed("the store takes no deletes")
        return super().delete(prefix)


def test_what_cannot_be_removed_keeps_nothing_else_and_is_removed_later_as_a_stray(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        job_id, folder = await house.finished()
        await house.put(job_id, expires_at=now_ms() - 1)
        past = await failed(house)
        await house.put(past, expires_at=now_ms() - 1)
        left = payload(house, past)
        house.storage = storage = Kept([house.layout.artifacts, house.layout.payloads])
        with structlog.testing.capture_logs() as lines:
            await retention(house).sweep()
        assert {line["ref"] for line in lines if line["event"] == "a stray stays"} == {
            house.layout.job_prefix(job_id),
            house.layout.payload_ref(past),
        }
        assert ((await house.job(job_id)).status, await house.store.kept_payloads()) == ("expired", set())
        assert folder.exists()
        assert left.exists()

        storage.read_only = False
        house.age(folder, 120)
        os.utime(left, (time.time() - 120,) * 2)
        await retention(house).sweep()
        assert not any(folder.iterdir())
        assert not left.exists()

    ask(scenario)


def test_a_sweep_that_fails_is_told_and_the_next_one_does_its_work(tmp_path: Path, exported: Path) -> None:
    async def scenario() -> None:
        async with storehouse(tmp_path / "root", exported, retention_seconds=1) as house:
            job_id, folder = await house.finished()
            await house.change("ALTER TABLE jobs RENAME TO elsewhere")
            with structlog.testing.capture_logs() as lines:
                task = asyncio.create_task(retention(house).run())
                async with asyncio.timeout(60):
                    while not any(line["event"] == "retention failed" for line in lines):
                        await asyncio.sleep(0.01)
                    await house.change("ALTER TABLE elsewhere RENAME TO jobs")
                    while folder.exists():
                        await asyncio.sleep(0.01)
                task.cancel()
                assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)
            assert (await house.job(job_id)).status == "expired"

    asyncio.run(scenario())
