"""How attempts end is counted by their stage and told as spans to a collector; what cannot be told is said."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
from live_server import new_job
from operations.collector import Collector, collector
from operations.storehouse import Storehouse, storehouse

from common.contract import JobError, Progress, Stage
from control_plane.jobs.records import JobRecord, NewEvent, NewJob
from control_plane.operations.tracing import Tracing, new_mark
from control_plane.operations.watch import WAITING, JobWatch

Scenario = Callable[[Storehouse, JobWatch], Awaitable[None]]
Ask = Callable[[Scenario], Collector]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Run a scenario on a store that is watched, with a collector; answers what that heard."""

    def run(scenario: Scenario) -> Collector:
        async def inside() -> None:
            async with storehouse(tmp_path / "root") as house:
                tracing = Tracing(told.url, replica="watched")
                watch = JobWatch(house.store, house.metrics, tracing)
                house.store.watch = watch.saw
                await scenario(house, watch)
                await watch.close()
                await asyncio.to_thread(tracing.close)

        with collector() as told:
            asyncio.run(inside())
        return told

    return run


def event(kind: str, stage: Stage) -> NewEvent:
    return NewEvent(kind, Progress(stage=stage, progress=0, stage_progress=0, message=stage))  # type: ignore[arg-type]


def traced() -> NewJob:
    """A job of a request that is sampled."""
    return dataclasses.replace(new_job(), trace=new_mark().traceparent)


async def begun(house: Storehouse, *stages: Stage) -> JobRecord:
    """A job of a traced request whose first attempt runs and has reached these stages."""
    await house.store.create(traced())
    running = await house.store.claim(max_weight=None)
    assert running is not None
    for stage in stages:
        assert await house.store.advance(running.id, 1, [event("stage_progress", stage)])
    return running


COUNT = "memvid_export_failed_attempts_total"
FAILED = {"error": msgspec.json.encode(JobError(code="WORKER_LOST", message="gone", retryable=True)).decode()}


def of(lines: list[Any], event: str) -> list[str]:
    """The jobs that the log names so."""
    return [line["job_id"] for line in lines if line["event"] == event]


def test_a_failed_attempt_is_counted_by_its_last_stage_and_has_its_code_there_alone(ask: Ask) -> None:
    async def scenario(house: Storehouse, watch: JobWatch) -> None:
        job = await begun(house, "write_capsule")
        assert await house.store.move(job.id, "failed", event("job_failed", "failed"), values=FAILED) is not None
        await watch.close()
        assert house.metric('memvid_export_failed_attempts_total{stage="write_capsule"}') == 1
        assert house.metric(COUNT) == 1

    told = ask(scenario)
    assert {span.name: span.failed for span in told.spans} == {
        "queue": False,
        "transform": False,
        "write_capsule": True,
        "attempt": True,
        "export": True,
    }
    (whole,) = told.named("export")
    assert (whole.attributes["memvid.code"], whole.attributes["memvid.status"]) == ("WORKER_LOST", "failed")


def test_an_attempt_that_goes_back_to_the_queue_is_told_before_the_export_has_an_end(ask: Ask) -> None:
    async def scenario(house: Storehouse, watch: JobWatch) -> None:
        job = await begun(house)
        assert await house.store.move(job.id, "queued", event("stage_progress", "queued")) is not None
        await watch.close()
        assert house.metric('memvid_export_failed_attempts_total{stage="transform"}') == 1

    told = ask(scenario)
    assert [span.name for span in told.spans if span.failed] == ["attempt", "transform"]
    assert told.named("export") == []


def test_an_export_that_ends_in_the_queue_has_no_attempt(ask: Ask) -> None:
    async def scenario(house: Storehouse, watch: JobWatch) -> None:
        job = traced()
        await house.store.create(job)
        assert await house.store.move(job.id, "failed", event("job_failed", "failed"), values=FAILED) is not None
        await watch.close()
        assert house.metric('memvid_export_failed_attempts_total{stage="queued"}') == 1

    told = ask(scenario)
    assert sorted(span.name for span in told.spans) == ["export", "queue"]
    (queue,) = told.named("queue")
    assert queue.start <= queue.end == told.named("export")[0].end


def test_an_export_that_is_canceled_has_failed_in_no_stage(ask: Ask) -> None:
    async def scenario(house: Storehouse, watch: JobWatch) -> None:
        job = await begun(house, "write_capsule")
        assert await house.store.move(job.id, "canceled", event("job_canceled", "canceled")) is not None
        await watch.close()
        assert house.metric(COUNT) == 0

    told = ask(scenario)
    assert not any(span.failed for span in told.spans)
    assert told.named("export")[0].attributes["memvid.status"] == "canceled"


@pytest.mark.parametrize("listens", [True, False], ids=["unsampled", "no collector"])
def test_what_nobody_wants_to_trace_is_counted_and_has_no_spans(tmp_path: Path, listens: bool) -> None:
    async def scenario(url: str) -> None:
        async with storehouse(tmp_path / "root") as house:
            tracing = Tracing(url if listens else None, replica="watched")
            watch = JobWatch(house.store, house.metrics, tracing)
            house.store.watch = watch.saw
            for to in ("failed", "canceled"):
                job = new_job() if listens else traced()
                await house.store.create(job)
                assert await house.store.move(job.id, to, event(f"job_{to}", to)) is not None
            await watch.close()
            assert house.metric(COUNT) == 1
            await asyncio.to_thread(tracing.close)

    with collector() as told:
        asyncio.run(scenario(told.url))
    assert told.spans == []


def test_an_export_that_is_forgotten_at_once_is_not_told_of(ask: Ask) -> None:
    async def scenario(house: Storehouse, watch: JobWatch) -> None:
        job = await begun(house)
        moved = await house.store.move(job.id, "failed", event("job_failed", "failed"), values=FAILED)
        assert moved is not None
        house.change_at_once("DELETE FROM events")
        await watch.close()
        assert house.metric(COUNT) == 0

    assert ask(scenario).spans == []


def test_a_database_that_is_away_is_said_and_the_export_has_ended_all_the_same(ask: Ask) -> None:
    async def scenario(house: Storehouse, watch: JobWatch) -> None:
        job = await begun(house)
        with structlog.testing.capture_logs() as lines:
            moved = await house.store.move(job.id, "failed", event("job_failed", "failed"), values=FAILED)
            house.change_at_once("ALTER TABLE events RENAME TO elsewhere")
            await watch.close()
        assert moved is not None
        assert moved.status == "failed"
        assert of(lines, "how a job ended cannot be told") == [job.id]
        assert house.metric(COUNT) == 0

    assert ask(scenario).spans == []


def test_more_ends_than_can_wait_are_named_and_not_told(ask: Ask) -> None:
    async def scenario(house: Storehouse, watch: JobWatch) -> None:
        job = await begun(house)
        moved = await house.store.move(job.id, "failed", event("job_failed", "failed"), values=FAILED)
        assert moved is not None
        (last,) = (it for it in await house.store.events(job.id, 0, 10) if it.type == "job_failed")
        with structlog.testing.capture_logs() as lines:
            for _ in range(WAITING + 1):  # the end that the store itself has told of may wait still
                watch.saw(moved, last)
            async with asyncio.timeout(60):
                while house.metric(COUNT) + len(of(lines, "how a job ended cannot be told")) < WAITING:
                    await watch.close()
        assert set(of(lines, "more jobs end than can be told of")) == {job.id}
        assert house.metric(COUNT) > 0

    ask(scenario)
