"""Finished exports that no record knows of: which get one again, what it says, and which stay for another look."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import structlog
from operations.storehouse import Storehouse, exported, storehouse
from sqlalchemy.exc import OperationalError

from common.errors import StorageFailed
from common.storage import FileStorage, Found
from control_plane.operations.recovery import CLIENT, Recovery
from handler.job import MAX_ATTEMPT

__all__ = ["exported"]

HOUR = 3_600
Ask = Callable[[Callable[[Storehouse], Awaitable[None]]], None]


@pytest.fixture
def ask(tmp_path: Path, exported: Path) -> Ask:
    """Run a scenario on an empty storehouse whose exports are kept for an hour."""

    def run(scenario: Callable[[Storehouse], Awaitable[None]]) -> None:
        async def inside() -> None:
            async with storehouse(tmp_path / "root", exported, retention_seconds=HOUR) as house:
                await scenario(house)

        asyncio.run(inside())

    return run


def recovery(house: Storehouse) -> Recovery:
    return Recovery(house.settings, house.store, house.storage, house.layout)


def test_a_record_is_made_again_from_what_lies_there_and_lasts_as_long_as_it_would_have(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        folder = house.stored(attempt=2, age=HOUR / 2)
        job_id = folder.parent.name
        assert await recovery(house).all() == {}
        job = await house.job(job_id)
        manifest = json.loads(next(folder.glob("*.manifest.json")).read_text())
        assert (job.status, job.stage, job.progress, job.attempt, job.client) == (
            *("completed", "download_ready", 100, 2),
            CLIENT,
        )
        assert (job.session_id, job.project_name, job.base_name) == ("session-stored", "stored", "stored")
        assert (job.frames, job.payload_sha256) == (manifest["frames"], manifest["report"]["input"]["sha256"])
        assert job.output is not None
        assert job.output.artifact_ref == next(folder.glob("*.mv2")).as_uri()
        assert job.finished_at is not None
        assert job.expires_at == job.finished_at + HOUR * 1_000
        assert job.finished_at == pytest.approx(next(folder.glob("*.manifest.json")).stat().st_mtime * 1_000, abs=500)
        (event,) = await house.store.events(job_id, 0, 10)
        assert (event.seq, event.type, event.meta["frames"]) == (1, "job_completed", manifest["frames"])

    ask(scenario)


def test_of_several_attempts_the_last_one_counts(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        job_id = house.stored(attempt=1).parent.name
        house.stored(job_id, attempt=3)
        house.stored(job_id, attempt=2)
        await recovery(house).all()
        assert (await house.job(job_id)).attempt == 3

    ask(scenario)


def test_two_that_look_at_once_make_one_record(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        job_ids = {house.stored().parent.name for _ in range(3)}
        with structlog.testing.capture_logs() as lines:
            assert await asyncio.gather(*(recovery(house).all() for _ in range(3))) == [{}, {}, {}]
        assert await house.store.counts() == {"completed": 3}
        assert sorted(line["job_id"] for line in lines if line["event"] == "export recovered") == sorted(job_ids)
        for job_id in job_ids:
            assert len(await house.store.events(job_id, 0, 10)) == 1

    ask(scenario)


def test_what_is_past_its_time_is_not_promised_again(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        house.stored(age=HOUR + 60)
        assert await recovery(house).all() == {}  # a stray, then
        assert await house.store.counts() == {}

    ask(scenario)


@pytest.mark.parametrize(
    "below",
    [
        "one/1/x.manifest.json",
        "{ID}/1/x.manifest.json",
        "{id}/0/x.manifest.json",
        f"{{id}}/{MAX_ATTEMPT + 1}/x.manifest.json",
        "{id}/first/x.manifest.json",
        "{id}/1/deeper/x.manifest.json",
        "{id}/1/x.mv2",
        "{id}",
        "../elsewhere/{id}/1/x.manifest.json",
    ],
)
def test_what_is_no_manifest_of_an_attempt_is_no_export(ask: Ask, below: str) -> None:
    async def scenario(house: Storehouse) -> None:
        job_id = str(uuid.uuid4())
        ref = house.layout.artifact_prefix + below.format(id=job_id, ID=job_id.upper())
        assert await recovery(house).of([ref, f"file:///other/{job_id}/1/x.manifest.json"]) == {}
        assert await house.store.counts() == {}

    ask(scenario)


def test_a_manifest_that_cannot_be_read_is_told_and_its_files_are_strays(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        folder, whole = house.stored(), house.stored()
        next(folder.glob("*.manifest.json")).write_bytes(b"{\x00")
        with structlog.testing.capture_logs() as lines:
            assert await recovery(house).all() == {}
        (told,) = (line for line in lines if line["event"] == "an export is not recovered")
        assert (told["job_id"], told["code"]) == (folder.parent.name, "CAPSULE_UNREADABLE")
        assert await house.store.get(folder.parent.name) is None
        assert (await house.job(whole.parent.name)).status == "completed"

    ask(scenario)


class Away(FileStorage):
    """Fails for some exports when it is asked to list or to read."""

    listing: frozenset[str] = frozenset()
    reading: frozenset[str] = frozenset()

    def found(self, prefix: str, *, uploads: bool = False) -> list[Found]:
        _fail(prefix, self.listing)
        return super().found(prefix, uploads=uploads)

    def size(self, ref: str) -> int | None:
        _fail(ref, self.reading)
        return super().size(ref)


def _fail(ref: str, job_ids: frozenset[str]) -> None:
    if any(job_id in ref for job_id in job_ids):
        raise StorageFailed("the store does not answer")


def test_an_export_that_cannot_be_read_keeps_its_files_for_its_time_and_no_other_from_its_record(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        fresh, old, whole = (
            house.stored(attempt=attempt, age=age).parent.name for attempt, age in ((4, 0), (1, HOUR + 60), (1, 60))
        )
        house.storage = away = Away([house.layout.artifacts])
        away.reading = frozenset({fresh, old})
        assert await recovery(house).all() == {fresh: 4}
        assert (await house.job(whole)).status == "completed"
        assert await house.store.counts() == {"completed": 1}
        away.reading = frozenset()
        assert await recovery(house).all() == {}
        assert (await house.job(fresh)).attempt == 4
        assert await house.store.get(old) is None

    ask(scenario)


def test_what_cannot_be_listed_now_is_spared_however_old_it_is(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        folder = house.stored(attempt=2, age=HOUR + 60)
        job_id = folder.parent.name
        house.storage = away = Away([house.layout.artifacts])
        away.listing = frozenset({job_id})
        assert await recovery(house).of([next(folder.glob("*.manifest.json")).as_uri()]) == {job_id: 2}
        assert await house.store.counts() == {}

    ask(scenario)


def test_a_database_that_goes_away_ends_the_look_with_its_own_error(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        house.stored()
        await house.change("ALTER TABLE events RENAME TO elsewhere")
        with pytest.raises(OperationalError):
            await recovery(house).all()
        await house.change("ALTER TABLE elsewhere RENAME TO events")
        assert await house.store.counts() == {}
        assert await recovery(house).all() == {}
        assert await house.store.counts() == {"completed": 1}

    ask(scenario)
