"""Runs on this machine: what an earlier server left, a child that never comes, and a database that fails them."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from driving import Workshop, run, until
from live_server import graph
from structlog.testing import capture_logs

from common.contract import Progress
from control_plane.backends.checker import PayloadChecker
from control_plane.jobs.records import JobRecord, NewEvent
from handler.process import ChildProcess
from handler.protocol import Checked

CANCELED = NewEvent("job_canceled", Progress(stage="canceled", progress=0, stage_progress=100, message="Canceled"))


# --- what an earlier server left ----------------------------------------------------------------------------


@pytest.mark.parametrize("handed_over", [False, True])
def test_a_result_that_an_earlier_server_did_not_record_is_taken_up(tmp_path: Path, handed_over: bool) -> None:
    async def scenario(shop: Workshop) -> None:
        await shop.submit()
        job = await (shop.store.hand_over() if handed_over else shop.store.claim(max_weight=None))
        assert job is not None
        output = await asyncio.to_thread(shop.publish, job)
        backend = shop.legacy()
        await backend.start()
        ended = await shop.until(job.id, "completed")
        await backend.stop()
        assert ended.output is not None
        assert (ended.attempt, ended.output.sha256) == (1, output.sha256)
        assert [event.type for event in await shop.store.events(job.id, 0, 10)].count("job_started") == 1

    run(tmp_path, scenario)


@pytest.mark.parametrize(("left", "reason"), [(None, "the server stopped"), (b"{\x00", "the manifest is damaged")])
def test_a_run_that_left_no_result_costs_its_attempt(tmp_path: Path, left: bytes | None, reason: str) -> None:
    async def scenario(shop: Workshop) -> None:
        await shop.submit()
        job = await shop.store.claim(max_weight=None)
        assert job is not None
        prefix = shop.layout.output_prefix(job.id, 1)
        if left is not None:
            await asyncio.to_thread(shop.storage.write, f"{prefix}x.manifest.json", left)
        backend = shop.legacy()
        await backend.start()
        await until(lambda: not shop.storage.found(prefix))
        again = await shop.until(job.id, "running", 2)  # for which no child comes
        assert any(reason in line for line in await shop.told(job.id))
        assert again.lost + again.retries == 1
        await backend.stop()

    run(tmp_path, scenario)


# --- a child that does not come -----------------------------------------------------------------------------


def test_a_server_that_stops_puts_back_a_job_that_waits_for_a_child_and_counts_no_attempt_as_lost(
    tmp_path: Path,
) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await shop.submit()
        backend = shop.legacy()
        assert backend.trouble == "no jobs are taken"
        await backend.start()
        await shop.until(job.id, "running")
        assert backend.trouble == "no worker is up"
        await backend.stop()
        assert backend.trouble == "no jobs are taken"
        put_back = await shop.job(job.id)
        assert (put_back.status, put_back.lost, put_back.owner) == ("queued", 0, None)
        assert (await shop.told(job.id))[-1] == "Waiting to start again: the server is stopping"

    run(tmp_path, scenario)


def test_a_job_that_is_canceled_while_it_waits_for_a_child_gives_its_place_to_the_next(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        first, second = await shop.submit(), await shop.submit()
        backend = shop.legacy()
        await backend.start()
        await shop.until(first.id, "running")
        assert (await shop.job(second.id)).status == "queued"
        assert await shop.store.move(first.id, "canceled", CANCELED)
        await backend.cancel(first.id)
        assert shop.files(first.id) == []
        await shop.until(second.id, "running")
        assert (await shop.job(first.id)).status == "canceled"
        await backend.stop()

    run(tmp_path, scenario, MEMVID_EXPORT_WORKER_SLOTS="1")


# --- a database that fails ----------------------------------------------------------------------------------


def test_a_queue_that_cannot_be_read_for_a_while_makes_jobs_late_and_no_more(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        shop.pool.start()
        backend = shop.legacy()
        await backend.start()
        job = await shop.submit()
        with capture_logs() as lines:
            async with shop.no_database():
                backend.wake()
                await until(lambda: any(line["event"] == "the queue cannot be read" for line in lines))
        assert (await shop.until(job.id, "completed")).attempt == 1
        await backend.stop()

    run(tmp_path, scenario)


def test_a_run_that_fails_in_a_way_that_nobody_foresaw_ends_its_job_and_the_next_one_runs(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await shop.submit()
        # A log that goes on where the job knows of no events: none can be added.
        columns = "job_id, seq, ts, type, stage, progress, stage_progress, message, meta"
        values = "id, 3, created_at, 'stage_progress', 'transform', 0, 0, 'Alien', '{}'"
        await shop.change(f"INSERT INTO events ({columns}) SELECT {values} FROM jobs")
        shop.pool.start()
        backend = shop.legacy()
        with capture_logs() as lines:
            await backend.start()
            await until(lambda: any(line["event"] == "a run failed in a way that nobody foresaw" for line in lines))
            await shop.change("DELETE FROM events WHERE message = 'Alien'")
            ended = await shop.until(job.id, "failed")
        assert ended.error is not None
        assert (ended.error.code, ended.error.message) == (
            "INTERNAL",
            "the server failed at this export (IntegrityError)",
        )
        assert (await shop.until((await shop.submit()).id, "completed")).attempt == 1
        await backend.stop()

    run(tmp_path, scenario)


# --- checks before a job ------------------------------------------------------------------------------------


async def _begun(shop: Workshop, checker: PayloadChecker, job: JobRecord, child: ChildProcess) -> asyncio.Task[Checked]:
    """A check of a job's payload by a child that stands still."""
    os.kill(child.pid, signal.SIGSTOP)
    await shop.pool.release(child, reuse=True)
    check = asyncio.create_task(checker.check(job.id, job.payload_ref, job.payload_size, None))
    await until(lambda: child not in shop.pool._idle)
    return check


def test_a_check_whose_child_dies_is_made_by_another_one(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await shop.submit(graph(5))
        shop.pool.start()
        first, second = await shop.pool.acquire(), await shop.pool.acquire()
        checker = PayloadChecker(shop.pool, shop.metrics)
        check = await _begun(shop, checker, job, first)
        os.kill(first.pid, signal.SIGKILL)
        await shop.pool.release(second, reuse=True)
        checked = await check
        assert (checked.nodes, checked.relationships) == (5, 5)
        assert first.ended
        assert second.kept_job == job.id

    run(tmp_path, scenario)


def test_a_check_that_nobody_waits_for_any_more_ends_its_child(tmp_path: Path) -> None:
    async def scenario(shop: Workshop) -> None:
        job = await shop.submit()
        shop.pool.start()
        child, other = await shop.pool.acquire(), await shop.pool.acquire()
        checker = PayloadChecker(shop.pool, shop.metrics)
        check = await _begun(shop, checker, job, child)
        await asyncio.sleep(0)
        check.cancel()
        with pytest.raises(asyncio.CancelledError):
            await check
        assert not child.usable
        await shop.pool.release(other, reuse=True)
        checked = await checker.check(job.id, job.payload_ref, job.payload_size, None)
        assert checked.nodes == 2

    run(tmp_path, scenario)
