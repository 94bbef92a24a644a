"""Runs of a worker without a platform: which reason counts, what is left, and what a second delivery hears."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from played_child import played
from small_job import GRAPH, config_of, payload
from structlog.testing import capture_logs
from worker_run import run_here

from common.contract import JobError, JobInput, JobOutput, WorkerProgress
from common.errors import Canceled, DeadlineExceeded, WorkerLost, WriterFailed
from common.storage import FileStorage
from handler import claim
from handler.pool import WorkerPool
from handler.protocol import job_error
from handler.worker import MAX_STEPS, JobRun, Worker

DONE = """
say(type="ready")
for line in sys.stdin:
    job = json.loads(line)["job"]
    refs = {name: job["output_prefix"] + name for name in ("artifact_ref", "sidecar_ref", "manifest_ref")}
    step = {"stage": "transform", "progress": 1, "stageProgress": 1}
    for number in range(STEPS):
        say(type="progress", progress={**step, "message": str(number)})
    say(type="done", output={**refs, "sha256": "0" * 64, "size_bytes": 1, "metrics": METRICS})
"""


class Place:
    """One attempt of a job below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.storage = FileStorage([root])
        self.folder = root / "out" / "1"
        self.prefix = self.folder.as_uri() + "/"
        self.claim = self.folder / claim.CLAIM_NAME

    def input(self, **changes: Any) -> dict[str, Any]:
        """The job's input."""
        return {"job_id": "job", "payload_ref": payload(self.root), "output_prefix": self.prefix, **changes}

    def state(self) -> claim.State:
        """Of the attempt."""
        return claim.state(self.storage, self.prefix)

    def names(self) -> set[str]:
        """What lies there beside the claim."""
        return {found.ref.rpartition("/")[2] for found in self.storage.found(self.prefix)} - set(claim.NAMES)

    def break_claim(self) -> None:
        """Let the storage fail where the claim lies."""
        self.claim.unlink()
        self.claim.symlink_to(self.claim)

    def publish(self) -> JobOutput:
        """Export the job here as an earlier run would have."""
        return run_here(JobInput(**self.input()), self.storage, self.root / "earlier")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def _with_worker(place: Place, scenario: Callable[[Worker], Awaitable[None]], *, size: int = 0) -> None:
    """Without ``size`` there is no process that a job could run in, ever: all jobs wait for one."""

    async def inside() -> None:
        config = config_of(place.root)
        worker = Worker(config.storage, Path(config.scratch), WorkerPool(config, size))
        try:
            async with asyncio.timeout(60):
                await scenario(worker)
        finally:
            await worker.close()

    asyncio.run(inside())


def _run_of(data: Any) -> JobRun:
    return JobRun(data, lambda _: None)


async def _held(place: Place, worker: Worker, run: JobRun) -> asyncio.Task[dict[str, Any]]:
    """A run that holds its attempt and waits for a process."""
    with capture_logs() as logs:
        running = asyncio.create_task(worker.run(run))
        while "export started" not in [line["event"] for line in logs]:
            await asyncio.sleep(0.01)
    assert place.state() == "held"
    return running


def _error(answer: dict[str, Any]) -> JobError:
    assert set(answer) <= {"error", "refresh_worker"}, answer
    return msgspec.json.decode(answer["error"], type=JobError)


def test_the_first_reason_to_stop_counts_and_the_attempt_is_closed_with_it(place: Place) -> None:
    async def scenario(worker: Worker) -> None:
        run = _run_of(place.input())
        running = await _held(place, worker, run)
        run.stop(Canceled("the client wants it no more"))
        run.stop(DeadlineExceeded("too long"))
        answer = await running
        assert (_error(answer).code, _error(answer).message) == ("CANCELED", "the client wants it no more")
        assert "refresh_worker" not in answer
        assert (await worker.run(_run_of(place.input()))) == answer

    _with_worker(place, scenario)
    assert (place.state(), place.names()) == ("closed", set())


def test_a_run_that_is_stopped_before_it_begins_runs_nothing(place: Place) -> None:
    async def scenario(worker: Worker) -> None:
        run = _run_of(place.input())
        run.stop(Canceled("the client wants it no more"))
        assert _error(await worker.run(run)).code == "CANCELED"

    _with_worker(place, scenario)
    assert (place.state(), place.names()) == ("closed", set())


def test_a_worker_that_stops_gives_all_its_jobs_back_and_those_that_still_come(tmp_path: Path) -> None:
    first, second = Place(tmp_path / "first"), Place(tmp_path / "second")
    for one in (first, second):
        one.root.mkdir()

    async def scenario(worker: Worker) -> None:
        running = await _held(first, worker, _run_of(first.input()))
        worker.stop(WorkerLost("the worker is stopping"))
        late = await worker.run(_run_of(second.input()))
        for answer in (await running, late):
            assert (_error(answer).code, _error(answer).retryable) == ("WORKER_LOST", True)
            assert "refresh_worker" not in answer, "it ends anyway"

    _with_worker(Place(tmp_path), scenario)
    assert [one.state() for one in (first, second)] == ["closed", "closed"]


def test_a_run_past_its_time_says_how_long_it_had_though_it_never_got_a_process(place: Place) -> None:
    async def scenario(worker: Worker) -> None:
        error = _error(await worker.run(_run_of(place.input(timeout_seconds=0.1))))
        assert (error.code, error.retryable, error.details) == ("DEADLINE_EXCEEDED", True, {"limit": 0.1})

    _with_worker(place, scenario)
    assert place.state() == "closed"


def test_a_claim_that_cannot_be_renewed_for_a_while_ends_nothing_and_one_that_is_closed_does(place: Place) -> None:
    async def scenario(worker: Worker) -> None:
        running = await _held(place, worker, _run_of(place.input()))
        held = place.claim.read_bytes()
        place.break_claim()
        with capture_logs() as logs:
            while "the claim could not be renewed" not in [line["event"] for line in logs]:
                await asyncio.sleep(0.05)
        assert not running.done()
        place.claim.unlink()
        place.claim.write_bytes(held)
        assert claim.close(place.storage, place.prefix, force=True)
        error = _error(await running)
        assert (error.code, error.message) == ("CANCELED", "the attempt was closed while it ran")

    _with_worker(place, scenario)
    assert (place.state(), place.names()) == ("closed", set())


def test_a_run_whose_traces_cannot_be_removed_still_says_why_it_ended(place: Place) -> None:
    async def scenario(worker: Worker) -> None:
        run = _run_of(place.input())
        running = await _held(place, worker, run)
        place.break_claim()
        with capture_logs() as logs:
            run.stop(DeadlineExceeded("too long"))
            assert _error(await running).code == "DEADLINE_EXCEEDED"
        said = [line["event"] for line in logs]
        assert said == ["what a run stored could not be removed"] * 3 + ["export failed"]

    _with_worker(place, scenario)


def test_a_stop_that_comes_after_the_last_file_was_published_changes_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    earlier = Place(tmp_path / "earlier-attempt")
    earlier.root.mkdir()
    published = earlier.publish()

    async def scenario(worker: Worker) -> None:
        run = _run_of(place.input())
        running = await _held(place, worker, run)
        shutil.copytree(earlier.folder, place.folder, dirs_exist_ok=True)
        run.stop(Canceled("the client wants it no more"))
        output = msgspec.convert(await running, JobOutput)
        assert (output.sha256, output.size_bytes) == (published.sha256, published.size_bytes)
        assert output.artifact_ref.startswith(place.prefix)
        assert output.metrics["jobId"] == "job"

    _with_worker(place, scenario)
    assert len(place.names()) == 3


def test_an_attempt_that_was_removed_with_its_job_while_it_ran_stays_removed(place: Place) -> None:
    async def scenario(worker: Worker) -> None:
        run = _run_of(place.input())
        running = await _held(place, worker, run)
        place.storage.delete(place.prefix)
        run.stop(Canceled("the client wants it no more"))
        assert _error(await running).code == "CANCELED"

    _with_worker(place, scenario)
    assert list(place.storage.found(place.prefix)) == []


def test_a_prefix_where_others_have_objects_is_refused_and_left_as_it_is(place: Place) -> None:
    place.storage.write(f"{place.prefix}another-job/x.mv2", b"1")

    async def scenario(worker: Worker) -> None:
        error = _error(await worker.run(_run_of(place.input())))
        assert (error.code, error.details["field"], error.retryable) == (
            "INVALID_EXPORT_REQUEST",
            "output_prefix",
            False,
        )

    _with_worker(place, scenario)
    left = [found.ref.removeprefix(place.prefix) for found in place.storage.found(place.prefix)]
    assert left == ["another-job/x.mv2"]


def test_a_second_delivery_hears_what_became_of_the_first(tmp_path: Path) -> None:
    places = {name: Place(tmp_path / name) for name in ("running", "published", "dead", "closed", "failed")}
    for one in places.values():
        one.root.mkdir()
        assert claim.take(one.storage, one.prefix, "an earlier run")
    published = places["published"].publish()
    past = time.time() - claim.STALE_SECONDS - 1
    os.utime(places["dead"].claim, (past, past))
    reasons = {"closed": None, "failed": job_error(WriterFailed("the disk was full"))}
    for name, reason in reasons.items():
        assert claim.close(places[name].storage, places[name].prefix, force=True, error=reason)

    async def scenario(worker: Worker) -> None:
        answers = {name: await worker.run(_run_of(one.input())) for name, one in places.items()}
        assert answers["running"] == {"taken": True}
        again = msgspec.convert(answers["published"], JobOutput)
        assert (again.sha256, again.manifest_ref) == (published.sha256, published.manifest_ref)
        lost, closed, failed = (_error(answers[name]) for name in ("dead", "closed", "failed"))
        assert (lost.code, lost.retryable) == ("WORKER_LOST", True)
        assert (closed.code, closed.message) == ("CANCELED", "the attempt was closed before it could run")
        assert failed == reasons["failed"]
        assert not [name for name, answer in answers.items() if "refresh_worker" in answer]

    _with_worker(Place(tmp_path), scenario)
    assert places["running"].state() == "held"


def test_of_very_many_steps_the_last_are_kept_and_numbered(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = 3
    part = DONE.replace("STEPS", str(MAX_STEPS + extra)).replace("METRICS", '{"timings": {}}')
    played(place.root / "played", monkeypatch, part)
    told: list[WorkerProgress] = []

    async def scenario(worker: Worker) -> None:
        worker.cold_start = 1.5
        runs = [JobRun(place.input(output_prefix=f"{place.prefix}{number}/"), told.append) for number in range(2)]
        first, second = [msgspec.convert(await worker.run(run), JobOutput) for run in runs]
        assert first.progress is not None
        assert (first.progress.first, len(first.progress.steps)) == (1 + extra, MAX_STEPS)
        assert [step.message for step in first.progress.steps[:: MAX_STEPS - 1]] == ["3", "2002"]
        assert [output.metrics["timings"]["coldStart"] for output in (first, second)] == [1.5, 0]
        before = len(told)
        await asyncio.sleep(1.2)
        assert len(told) == before, "nothing is told after the end"

    _with_worker(place, scenario, size=1)
    assert len(told) <= 4, "once a second of a job at most"


@pytest.mark.parametrize(
    ("part", "code", "refresh"),
    [
        ('say(type="ready"); sys.stdin.readline(); os._exit(3)', "WORKER_LOST", True),
        (DONE.replace("STEPS", "0").replace("METRICS", "{}"), "INTERNAL", True),
    ],
    ids=["ends", "answers otherwise than a child of this version"],
)
def test_a_process_that_is_not_as_it_should_be_fails_the_job_and_asks_for_a_fresh_worker(
    place: Place, monkeypatch: pytest.MonkeyPatch, part: str, code: str, refresh: bool
) -> None:
    played(place.root / "played", monkeypatch, part)

    async def scenario(worker: Worker) -> None:
        answer = await worker.run(_run_of(place.input()))
        assert (_error(answer).code, answer.get("refresh_worker", False)) == (code, refresh)

    _with_worker(place, scenario, size=1)
    assert place.names() == set()


@pytest.mark.parametrize("data", [None, [], "job", 7, {}, {**GRAPH}])
def test_what_is_no_job_is_refused_before_anything_is_written(place: Place, data: Any) -> None:
    async def scenario(worker: Worker) -> None:
        answer = await worker.run(_run_of(data))
        assert (_error(answer).code, "refresh_worker" in answer) == ("INVALID_EXPORT_REQUEST", False)

    before = sorted(place.root.iterdir())
    _with_worker(place, scenario)
    assert sorted(place.root.iterdir()) == before
