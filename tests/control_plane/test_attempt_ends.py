"""How an attempt ends whose job is somebody else's by then, whose payload is gone, or whose end nobody takes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from driving import Workshop, run, until
from live_server import graph
from sqlalchemy.exc import SQLAlchemyError
from structlog.testing import capture_logs

from common.contract import Progress
from common.errors import Canceled, GateFailed, ObjectMissing, WorkerLost
from control_plane.jobs.records import CANARY_CLIENT, JobRecord, NewEvent
from handler import claim
from handler.job import published

GONE = ObjectMissing("the payload is not there")
CANCELED = NewEvent("job_canceled", Progress(stage="canceled", progress=0, stage_progress=100, message="Canceled"))


async def at_work(shop: Workshop) -> JobRecord:
    """A job that runs."""
    await shop.submit()
    job = await shop.store.claim(max_weight=None)
    assert job is not None
    return job


async def complete(shop: Workshop, job: JobRecord, **metrics: Any) -> bool:
    """Record what an attempt has published; ``metrics`` stand in place of what it tells."""
    prefix = shop.layout.output_prefix(job.id, job.attempt)
    found = await asyncio.to_thread(published, shop.storage, prefix, job.id)
    assert found is not None
    output = msgspec.structs.replace(found.output, metrics={**found.output.metrics, **metrics})
    return await shop.endings.complete(job, output, found.manifest)


def test_a_result_of_which_no_worker_has_told_says_how_long_it_took(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await at_work(shop)
        await asyncio.to_thread(shop.publish, job)
        assert await complete(shop, job, timings={"total": 0.0})
        ended = await shop.job(job.id)
        assert ended.output is not None
        assert ended.output.metrics["timings"]["total"] > 0
        assert await shop.store.events(job.id, ended.last_seq, 10) == []
        assert not any(ref.endswith(job.id) for ref in shop.files(job.id))  # its payload is of no use any more

    run(tmp_path, scenario)


def test_a_result_that_comes_after_a_cancel_is_removed(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await at_work(shop)
        await asyncio.to_thread(shop.publish, job)
        assert await shop.store.move(job.id, "canceled", CANCELED)
        assert not await complete(shop, job)
        assert (await shop.job(job.id)).status == "canceled"
        assert shop.files(job.id) == [job.payload_ref]

    run(tmp_path, scenario)


def test_a_result_that_another_server_has_recorded_stays(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await at_work(shop)
        await asyncio.to_thread(shop.publish, job)
        assert await complete(shop, job)
        files = shop.files(job.id)
        assert not await complete(shop, job)
        assert shop.files(job.id) == files
        assert len(files) == 3
        assert (await shop.job(job.id)).status == "completed"

    run(tmp_path, scenario)


@pytest.mark.parametrize("error", [WorkerLost("gone"), GateFailed("torn"), Canceled("over"), GONE])
def test_a_failure_that_comes_after_a_cancel_changes_nothing(tmp_path: Path, error: Exception) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await at_work(shop)
        shop.storage.delete(job.payload_ref)
        assert await shop.store.move(job.id, "canceled", CANCELED)
        assert await shop.endings.failed(job, error) is None  # type: ignore[arg-type]
        ended = await shop.job(job.id)
        assert (ended.status, ended.error) == ("canceled", None)
        assert (await shop.told(job.id))[-1] == "Canceled"

    run(tmp_path, scenario)


@pytest.mark.parametrize("attempt", [1, 2, 7])
def test_a_job_whose_payload_is_gone_is_completed_with_what_an_attempt_has_published(
    tmp_path: Path, attempt: int
) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await at_work(shop)
        output = await asyncio.to_thread(shop.publish, job, attempt)
        shop.storage.delete(job.payload_ref)
        assert await shop.endings.failed(job, GONE) is None
        ended = await shop.job(job.id)
        assert (ended.status, ended.attempt) == ("completed", attempt)
        assert ended.output is not None
        assert ended.output.sha256 == output.sha256

    run(tmp_path, scenario)


def test_of_what_attempts_have_published_only_a_whole_capsule_of_the_same_payload_counts(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await at_work(shop)
        other = await shop.submit(graph(3, name="other"))
        await asyncio.to_thread(shop.publish, job, 3, payload_ref=other.payload_ref)
        shop.storage.write(f"{shop.layout.output_prefix(job.id, 2)}x.manifest.json", b"{\x00")
        shop.storage.write(f"{shop.layout.output_prefix(job.id, 4)}half.mv2", b"half")
        shop.storage.write(f"{shop.layout.job_prefix(job.id)}none/x.manifest.json", b"{}")
        shop.storage.delete(job.payload_ref)
        assert await shop.endings.failed(job, GONE) is None
        ended = await shop.job(job.id)
        assert ended.error is not None
        assert (ended.status, ended.error.code) == ("failed", "OBJECT_MISSING")
        assert "send it again" in ended.error.message
        assert ended.expires_at is None  # there is nothing that could be tried again
        assert shop.files(job.id) == []

    run(tmp_path, scenario)


def test_another_object_that_is_missing_keeps_the_payload_for_another_try(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await at_work(shop)
        assert await shop.endings.failed(job, ObjectMissing("a model is not there")) is None
        ended = await shop.job(job.id)
        assert ended.error is not None
        assert ended.error.message == "a model is not there"
        assert ended.expires_at is not None
        assert shop.files(job.id) == [job.payload_ref]

    run(tmp_path, scenario)


def test_a_failed_canary_keeps_nothing(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await at_work(shop)
        await shop.change("UPDATE jobs SET client = ?", CANARY_CLIENT)
        assert await shop.endings.failed(await shop.job(job.id), GateFailed("torn"), counted=True) is not None
        canary = await shop.store.claim(max_weight=None)
        assert canary is None  # it waits for its next attempt
        for attempt in (2, 3):
            await shop.change("UPDATE jobs SET available_at = 0")
            canary = await shop.store.claim(max_weight=None)
            assert canary is not None
            assert canary.attempt == attempt
            await shop.endings.failed(canary, GateFailed("torn"))
        ended = await shop.job(job.id)
        assert ended.error is not None
        assert (ended.status, ended.error.message) == ("failed", "torn; given up after 3 attempts")
        assert shop.files(job.id) == []

    run(tmp_path, scenario)


def test_the_next_attempt_finds_nothing_of_the_last_one_but_its_claim(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await at_work(shop)
        prefix = shop.layout.output_prefix(job.id, 1)
        assert claim.take(shop.storage, prefix, "run")
        shop.storage.write(f"{prefix}half.mv2", b"half")
        assert await shop.endings.failed(job, WorkerLost("gone"), counted=False) == 0
        assert shop.files(job.id) == [prefix + claim.CLAIM_NAME, job.payload_ref]
        again = await shop.job(job.id)
        assert (again.status, again.lost) == ("queued", 0)

    run(tmp_path, scenario)


def test_files_that_cannot_be_removed_now_do_not_keep_a_job_from_its_end(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        first, second = await at_work(shop), await at_work(shop)
        artifacts = shop.layout.artifacts
        artifacts.rmdir()
        artifacts.symlink_to(tmp_path.parent)  # a storage that was moved without its settings
        with capture_logs() as lines:
            assert await shop.endings.failed(first, WorkerLost("gone")) is not None
            assert await shop.endings.failed(second, WorkerLost("gone"), counted=False) is not None
            await shop.endings.remove_files(second.id)
        assert {line["ref"] for line in lines if line["event"] == "files stay until the next sweep"} == {
            *(shop.layout.output_prefix(job.id, 1) for job in (first, second)),
            shop.layout.job_prefix(second.id),
        }
        assert [(await shop.job(job.id)).status for job in (first, second)] == ["queued", "queued"]

    run(tmp_path / "root", scenario)


def test_a_payload_of_which_the_storage_does_not_tell_is_tried_again(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await at_work(shop)
        artifacts = shop.layout.artifacts
        artifacts.rmdir()
        artifacts.symlink_to(tmp_path.parent)
        await shop.endings.failed(job, GONE)
        ended = await shop.job(job.id)
        assert (ended.error is None) or "send it again" not in ended.error.message
        assert shop.storage.size(job.payload_ref) is not None

    run(tmp_path / "root", scenario)


@pytest.mark.parametrize("stopping", [False, True])
def test_an_end_that_the_database_does_not_take_is_told_again_until_the_server_stops(
    tmp_path: Path, stopping: bool
) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await at_work(shop)
        shop.endings.stopping = stopping
        with capture_logs() as lines:
            async with shop.no_database():
                ending = asyncio.create_task(shop.endings.failed(job, WorkerLost("gone")))
                await until(lambda: any(line["event"] == "the end of a job cannot be recorded" for line in lines))
        if stopping:
            with pytest.raises(SQLAlchemyError):
                await ending
            assert (await shop.job(job.id)).status == "running"
        else:
            assert await ending is not None
            assert (await shop.job(job.id)).status == "queued"

    run(tmp_path, scenario)
