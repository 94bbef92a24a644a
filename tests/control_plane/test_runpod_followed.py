"""A job on Runpod, handed over and followed while the platform, another server or the database does something odd."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from driving import SECONDS, THERE, Endpoint, Workshop, endpoint, until, workshop
from live_server import graph
from runpod_house import bucket_env
from services import S3
from structlog.testing import capture_logs

from common.contract import JobError, Progress
from control_plane.backends.runpod_queue import RunpodQueue
from control_plane.jobs.records import JobRecord, NewEvent
from control_plane.jobs.store import now_ms
from handler import claim

DAY_MS = 86_400_000
Scenario = Callable[[Workshop, RunpodQueue], Awaitable[None]]


@pytest.fixture
def site() -> Iterator[Endpoint]:
    """An endpoint that has every job in its queue."""
    with endpoint() as made:
        yield made


@asynccontextmanager
async def following(root: Path, site: Endpoint, **env: str) -> AsyncIterator[tuple[Workshop, RunpodQueue]]:
    """A server's backend before that endpoint."""
    async with workshop(root, **{**site.env, **env}) as shop:
        queue = shop.queue()
        await queue.start()
        try:
            yield shop, queue
        finally:
            await queue.stop()


def run(root: Path, site: Endpoint, scenario: Scenario, **env: str) -> None:
    async def inside() -> None:
        async with following(root, site, **env) as (shop, queue):
            await scenario(shop, queue)

    asyncio.run(inside())


async def handed_over(shop: Workshop, queue: RunpodQueue) -> JobRecord:
    """A job that the platform has taken."""
    job = await shop.submit()
    queue.wake()
    await until(lambda: job.id in queue._tracked)
    return await shop.job(job.id)


async def at_work(shop: Workshop, queue: RunpodQueue, site: Endpoint) -> JobRecord:
    """A job that a worker runs."""
    site.says("status", "IN_PROGRESS", delayTime=1)
    job = await handed_over(shop, queue)
    return await shop.until(job.id, "running")


# --- handing over -----------------------------------------------------------------------------------------


def test_a_job_that_the_platform_refuses_fails_with_the_platforms_reason(tmp_path: Path, site: Endpoint) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        site.refuses("run", 400)
        job = await shop.submit()
        queue.wake()
        ended = await shop.until(job.id, "failed")
        assert ended.error is not None
        assert (ended.error.code, ended.error.retryable) == ("BACKEND_REFUSED", False)
        assert "because" in ended.error.message
        assert (site.count("run"), site.count("status")) == (1, 0)

    run(tmp_path, site, scenario)


def test_a_job_that_is_canceled_before_the_platform_has_answered_is_canceled_there_too(
    tmp_path: Path, site: Endpoint
) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        site.hold("run")
        job = await shop.submit()
        queue.wake()
        await until(lambda: site.count("run") == 1)
        await shop.store.move(job.id, "canceled", canceled())
        await queue.cancel(job.id)
        assert site.count("cancel") == 0  # nobody knows yet what the platform calls it
        site.let_go("run")
        await until(lambda: site.count("cancel") == 1)
        await until(lambda: not queue._driven())
        assert site.count("status") == 0
        assert (await shop.job(job.id)).status == "canceled"
        assert shop.files(job.id) == []

    run(tmp_path, site, scenario)


def test_a_job_that_is_canceled_while_the_platform_is_away_is_not_handed_over(tmp_path: Path, site: Endpoint) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        site.hold("run")
        site.refuses("run", 500, once=True)
        job = await shop.submit()
        queue.wake()
        await until(lambda: site.count("run") == 1)
        await shop.store.move(job.id, "canceled", canceled())
        site.let_go("run")
        await until(lambda: not queue._driven())
        other = await handed_over(shop, queue)
        assert [body["input"]["job_id"] for route, body in site.came if route == "run"] == [job.id, other.id]

    run(tmp_path, site, scenario)


def test_a_worker_without_credentials_gets_links_that_read_the_payload_and_write_the_files(
    tmp_path: Path, site: Endpoint, s3: S3
) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        site.hold("status")
        job = await handed_over(shop, queue)
        (given,) = [body["input"] for route, body in site.came if route == "run"]
        links = given["links"]
        async with httpx.AsyncClient() as client:
            payload = await client.get(links[job.payload_ref]["get"])
            assert json.loads(payload.content) == graph(2)
            assert links[job.payload_ref].get("put") is None
            names = {ref.removeprefix(given["output_prefix"]) for ref in links if ref != job.payload_ref}
            endings = (".mv2", ".part001.mv2", ".part016.mv2", ".mv2.index.v1.sqlite", ".mv2.manifest.json")
            assert all(any(name.endswith(ending) for name in names) for ending in endings)
            assert set(claim.NAMES) < names
            for name in names:
                answer = await client.put(links[given["output_prefix"] + name]["put"], content=name.encode())
                assert answer.is_success, answer.text
        written = {each.ref for each in await asyncio.to_thread(shop.storage.found, given["output_prefix"])}
        assert written == {given["output_prefix"] + name for name in names}
        site.let_go("status")

    env = {**bucket_env(s3), "MEMVID_EXPORT_STORAGE_URL": f"{s3.url}/links", "MEMVID_EXPORT_WORKER_LINKS": "true"}
    run(tmp_path, site, scenario, **env)


# --- hints ------------------------------------------------------------------------------------------------


def test_word_that_comes_before_the_platforms_answer_leads_to_a_look_at_once(tmp_path: Path, site: Endpoint) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        site.hold("run")
        job = await shop.submit()
        queue.wake()
        await until(lambda: site.count("run") == 1)
        assert not await queue.hook(job.id, "wrong")
        assert not await queue.hook("unknown", job.secret)
        assert await queue.hook(job.id, job.secret)
        site.let_go("run")
        await until(lambda: site.count("status") == 1)

    run(tmp_path, site, scenario, RUNPOD_POLL_INTERVAL_SECONDS="600")


def test_word_that_comes_during_a_look_leads_to_another_one(tmp_path: Path, site: Endpoint) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        job = await handed_over(shop, queue)
        site.hold("status")
        assert await queue.hook(job.id, job.secret)
        await until(lambda: site.count("status") == 1)
        assert await queue.hook(job.id, job.secret)
        site.let_go("status")
        await until(lambda: site.count("status") == 2)

    run(tmp_path, site, scenario, RUNPOD_POLL_INTERVAL_SECONDS="600")


# --- looking ----------------------------------------------------------------------------------------------


def test_a_platform_that_refuses_to_tell_of_a_job_is_asked_again(tmp_path: Path, site: Endpoint) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        job = await at_work(shop, queue, site)
        site.refuses("status", 400)
        seen = site.count("status")
        await until(lambda: site.count("status") >= seen + 3)
        assert (await shop.job(job.id)).status == "running"
        await asyncio.to_thread(shop.publish, job)
        site.says("status", "COMPLETED", workerId="w")
        assert (await shop.until(job.id, "completed")).attempt == 1

    run(tmp_path, site, scenario)


@pytest.mark.parametrize("code", [400, 500, 200])
def test_a_job_whose_time_is_over_is_lost_whatever_the_platform_says(tmp_path: Path, site: Endpoint, code: int) -> None:
    async def inside() -> None:
        async with workshop(tmp_path, **site.env) as shop:
            job = await shop.submit()
            await shop.store.hand_over()
            await shop.store.submitted(job.id, 1, THERE)
            assert await shop.store.start(job.id, 1, at=now_ms() - DAY_MS)
            site.says("status", "IN_PROGRESS", code=code)
            queue = shop.queue()
            await queue.start()
            try:
                await until(
                    lambda: site.count("run") == 1 and site.count("cancel") == 1
                )  # it may run there all the same
                await until(lambda: job.id in queue._tracked)
            finally:
                await queue.stop()
            assert (await shop.job(job.id)).attempt == 2
            reason = "has not ended the export in its time" if code == 200 else "does not know the job any more"
            assert any(reason in line for line in await shop.told(job.id))

    asyncio.run(inside())


def test_a_job_whose_wait_the_platform_does_not_tell_has_begun_when_it_is_seen_at_work(
    tmp_path: Path, site: Endpoint
) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        before = now_ms()
        site.says("status", "IN_PROGRESS")
        job = await shop.until((await handed_over(shop, queue)).id, "running")
        assert job.started_at is not None
        assert before <= job.started_at <= now_ms()

    run(tmp_path, site, scenario)


def test_an_attempt_that_another_server_has_ended_is_followed_no_more(tmp_path: Path, site: Endpoint) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        job = await at_work(shop, queue, site)
        assert await shop.replica("other").move(job.id, "canceled", canceled(), attempt=1)
        site.says("status", "IN_PROGRESS", output=steps("write_capsule"))
        await until(lambda: job.id not in queue._tracked)
        assert (await shop.told(job.id))[-1] == "Canceled"
        assert site.count("run") == 1

    run(tmp_path, site, scenario)


def test_an_attempt_that_another_server_has_given_up_is_followed_no_more_and_the_next_one_is(
    tmp_path: Path, site: Endpoint
) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        job = await at_work(shop, queue, site)
        again = Progress(stage="queued", progress=0, stage_progress=100, message="Again")
        with capture_logs() as lines:
            assert await shop.replica("other").move(job.id, "queued", NewEvent("stage_progress", again), attempt=1)
            site.says("status", "IN_PROGRESS", output=steps("write_capsule"))
            await shop.until(job.id, "running", 2)
        assert "following a job failed in a way that nobody foresaw" not in said(lines)
        assert site.count("run") == 2

    run(tmp_path, site, scenario)


def test_a_job_that_was_canceled_while_it_waited_is_not_told_to_have_begun(tmp_path: Path, site: Endpoint) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        job = await handed_over(shop, queue)
        assert await shop.replica("other").move(job.id, "canceled", canceled())
        site.says("status", "IN_PROGRESS", delayTime=1)
        await until(lambda: job.id not in queue._tracked)
        assert [event.type for event in await shop.store.events(job.id, 0, 100)] == ["stage_progress", "job_canceled"]

    run(tmp_path, site, scenario)


def test_a_start_that_another_server_told_of_is_told_once_and_steps_go_on_from_there(
    tmp_path: Path, site: Endpoint
) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        job = await handed_over(shop, queue)
        assert await shop.replica("other").start(job.id, 1, at=now_ms())
        site.says("status", "IN_PROGRESS", output=steps("frame_prep", "write_capsule", "download_ready"), delayTime=1)
        await until(lambda: queue._tracked[job.id].job.told >= 2)
        told = await shop.told(job.id)
        assert [line for line in told if line != "Queued"] == [
            "Export started",
            "step of frame_prep",
            "step of write_capsule",
        ]

    run(tmp_path, site, scenario)


def test_a_job_of_which_nothing_is_told_but_its_last_step_waits_for_its_end_with_heartbeats(
    tmp_path: Path, site: Endpoint
) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        job = await at_work(shop, queue, site)
        site.says("status", "IN_PROGRESS", output=steps("download_ready"), delayTime=1)
        async with asyncio.timeout(SECONDS):
            while len(events := await shop.store.events(job.id, 0, 100)) < 3:
                await asyncio.sleep(0.05)
        assert [event.type for event in events] == ["stage_progress", "job_started", "stage_heartbeat"]
        assert (await shop.job(job.id)).status == "running"

    run(tmp_path, site, scenario)


def test_a_job_that_is_canceled_elsewhere_while_a_look_hangs_is_followed_no_more(
    tmp_path: Path, site: Endpoint
) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        job = await at_work(shop, queue, site)
        assert await queue.hook(job.id, job.secret)
        site.hold("status")
        await until(lambda: queue._tracked[job.id].looking)
        assert await shop.replica("other").move(job.id, "canceled", canceled())
        await until(lambda: job.id not in queue._tracked)
        assert (await shop.store.events(job.id, 0, 100))[-1].type == "job_canceled"
        site.let_go("status")

    run(tmp_path, site, scenario)


# --- the next server --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["queued", "running"])
def test_a_job_that_was_taken_and_never_handed_over_is_handed_over_after_a_restart(
    tmp_path: Path, site: Endpoint, status: str
) -> None:
    async def inside() -> None:
        async with workshop(tmp_path, **site.env) as shop:
            job = await shop.submit()
            taken = await (shop.store.hand_over() if status == "queued" else shop.store.claim(max_weight=None))
            assert taken is not None
            assert (taken.id, taken.status) == (job.id, status)
            queue = shop.queue()
            await queue.start()
            try:
                await until(lambda: job.id in queue._tracked)
            finally:
                await queue.stop()
            attempt = 1 if status == "queued" else 2
            assert (await shop.job(job.id)).attempt == attempt
            assert [body["input"]["attempt"] for route, body in site.came if route == "run"] == [attempt]

    asyncio.run(inside())


def test_a_job_that_another_server_has_taken_over_is_left_to_it(tmp_path: Path, site: Endpoint) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        job = await at_work(shop, queue, site)
        await shop.change("UPDATE jobs SET owner = 'other', lease_until = lease_until + ?", DAY_MS)
        await until(lambda: job.id not in queue._tracked)
        assert (await shop.job(job.id)).status == "running"
        assert shop.files(job.id) == [job.payload_ref]

    run(tmp_path, site, scenario)


# --- ends -------------------------------------------------------------------------------------------------


def test_a_result_counts_although_the_platform_has_forgotten_the_job(tmp_path: Path, site: Endpoint) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        job = await at_work(shop, queue, site)
        output = await asyncio.to_thread(shop.publish, job)
        site.refuses("status", 404)
        ended = await shop.until(job.id, "completed")
        assert ended.output is not None
        assert (ended.output.sha256, ended.attempt) == (output.sha256, 1)

    run(tmp_path, site, scenario)


@pytest.mark.parametrize("whose", ["mine", "another capsule's", "nobody's"])
def test_timings_that_a_worker_tells_count_if_they_are_of_this_capsule(
    tmp_path: Path, site: Endpoint, whose: str
) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        job = await at_work(shop, queue, site)
        output = await asyncio.to_thread(shop.publish, job)
        metrics: Any = {**output.metrics, "timings": {**output.metrics["timings"], "upload": 77.0}}
        if whose == "another capsule's":
            metrics["capsule"] = {**metrics["capsule"], "sha256": "0" * 64}
        elif whose == "nobody's":
            metrics = "none"
        site.says("status", "COMPLETED", output={"metrics": metrics}, workerId="w")
        ended = await shop.until(job.id, "completed")
        assert ended.output is not None
        assert (ended.output.metrics["timings"]["upload"] == 77.0) == (whose == "mine")
        assert ended.output.sha256 == output.sha256

    run(tmp_path, site, scenario)


def test_a_capsule_of_another_payload_costs_the_attempt_and_is_not_given_out(tmp_path: Path, site: Endpoint) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        job = await at_work(shop, queue, site)
        other = await shop.submit(graph(3, name="other"))
        await asyncio.to_thread(shop.publish, job, payload_ref=other.payload_ref)
        site.says("status", "COMPLETED", workerId="w")
        await shop.until(job.id, "queued")
        assert (await shop.told(job.id))[-1] == "Waiting to start again: the worker exported another payload"
        await until(lambda: [ref.rpartition("/")[2] for ref in shop.files(job.id)] == [claim.CLAIM_NAME, job.id])

    run(tmp_path, site, scenario)


def test_a_result_that_comes_after_a_cancel_brings_the_job_not_back(tmp_path: Path, site: Endpoint) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        job = await handed_over(shop, queue)
        assert await shop.replica("other").move(job.id, "canceled", canceled())
        await asyncio.to_thread(shop.publish, job)
        site.says("status", "COMPLETED", workerId="w")
        await until(lambda: job.id not in queue._tracked)
        assert (await shop.job(job.id)).status == "canceled"

    run(tmp_path, site, scenario)


def test_a_run_that_is_alive_is_waited_for_although_the_platform_does_not_know_it(
    tmp_path: Path, site: Endpoint
) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        job = await at_work(shop, queue, site)
        prefix = shop.layout.output_prefix(job.id, 1)
        assert claim.take(shop.storage, prefix, "run")
        site.refuses("status", 404)
        seen = site.count("status")
        await until(lambda: site.count("status") >= seen + 3)
        assert (await shop.job(job.id)).status == "running"
        # The run ends, and says why.
        error = JobError(code="INVALID_EXPORT_REQUEST", message="nodes must be a list", retryable=False)
        assert claim.close(shop.storage, prefix, force=True, error=error)
        ended = await shop.until(job.id, "failed")
        assert ended.error is not None
        assert (ended.error.code, ended.error.message) == ("INVALID_EXPORT_REQUEST", "nodes must be a list")
        assert ended.attempt == 1

    run(tmp_path, site, scenario)


def test_a_cancel_that_the_platform_refuses_is_not_repeated_and_the_files_go_all_the_same(
    tmp_path: Path, site: Endpoint
) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        site.refuses("cancel", 422)
        job = await at_work(shop, queue, site)
        await shop.store.move(job.id, "canceled", canceled())
        with capture_logs() as lines:
            await queue.cancel(job.id)
            await until(lambda: any(line["event"] == "a canceled job goes on at Runpod" for line in lines))
        assert shop.files(job.id) == []
        assert site.count("cancel") == 1

    run(tmp_path, site, scenario)


# --- what may be away -------------------------------------------------------------------------------------


def test_a_database_that_is_away_makes_a_job_late_and_no_more(tmp_path: Path, site: Endpoint) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        site.hold("run")
        job = await shop.submit()
        queue.wake()
        await until(lambda: site.count("run") == 1)
        with capture_logs() as lines:
            async with shop.no_database():
                site.let_go("run")
                await until(lambda: {"the database is away", "the queue cannot be read"} <= said(lines))
            await until(lambda: job.id in queue._tracked)
            lines.clear()
            async with shop.no_database():
                site.says("status", "IN_PROGRESS", delayTime=1)
                await until(lambda: "the database is away" in said(lines))
            await shop.until(job.id, "running")
        assert site.count("run") == 1
        await asyncio.to_thread(shop.publish, job, 1)
        site.says("status", "COMPLETED", workerId="w")
        assert (await shop.until(job.id, "completed")).attempt == 1

    run(tmp_path, site, scenario)


def test_a_storage_that_is_away_when_a_job_ends_makes_it_late_and_no_more(tmp_path: Path, site: Endpoint) -> None:
    async def scenario(shop: Workshop, queue: RunpodQueue) -> None:
        job = await at_work(shop, queue, site)
        output = await asyncio.to_thread(shop.publish, job)
        place = tmp_path / "root" / "artifacts"
        place.rename(tmp_path / "away")
        place.symlink_to("/proc/self/fdinfo/none")
        with capture_logs() as lines:
            site.says("status", "COMPLETED", workerId="w")
            await until(lambda: "the storage cannot be read" in said(lines))
        assert (await shop.job(job.id)).status == "running"
        place.unlink()
        (tmp_path / "away").rename(place)
        ended = await shop.until(job.id, "completed")
        assert ended.output is not None
        assert ended.output.sha256 == output.sha256

    run(tmp_path / "root", site, scenario)


def test_a_backend_that_has_not_begun_or_has_ended_says_that_it_follows_no_jobs(tmp_path: Path, site: Endpoint) -> None:
    async def inside() -> None:
        async with workshop(tmp_path, **site.env) as shop:
            queue = shop.queue()
            troubles = [queue.trouble]
            shop.pool.start()
            await until(lambda: shop.pool.ready)
            troubles.append(queue.trouble)
            await queue.start()
            troubles.append(queue.trouble)
            await queue.stop()
            troubles.append(queue.trouble)
        not_followed = "no jobs are followed"
        assert troubles == ["no process that checks payloads is up", not_followed, None, not_followed]

    asyncio.run(inside())


def canceled() -> NewEvent:
    """What is told of a cancel."""
    return NewEvent("job_canceled", Progress(stage="canceled", progress=0, stage_progress=100, message="Canceled"))


def steps(*stages: str) -> dict[str, Any]:
    """A worker's progress, as Runpod passes it on."""
    return {
        "first": 1,
        "steps": [
            {"stage": stage, "progress": 10 * n, "stageProgress": 0, "message": f"step of {stage}"}
            for n, stage in enumerate(stages, start=1)
        ],
    }


def said(lines: list[Any]) -> set[str]:
    """What the log has said so far."""
    return {line["event"] for line in lines}
