"""Faults on request: each does what it says, where it was asked to, as often as it was asked to."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from noted import Notes, Started
from runpod_local import Platform, wait_for


@pytest.fixture(scope="module")
def running(started: Started) -> Iterator[Platform]:
    with started(workers="2:2", execution_ms=5_000) as platform:
        wait_for(platform.health, lambda found: found["workers"]["idle"] == 2)
        yield platform


@pytest.fixture
def platform(running: Platform) -> Iterator[Platform]:
    yield running
    running.clear_faults()


def test_a_lost_result_leaves_the_job_running_until_its_time_limit(platform: Platform, notes: Notes) -> None:
    platform.fault("lost-result")
    lost, kept = platform.run({"do": "echo"}), platform.run({"do": "echo"})
    found = {job: platform.wait(job)["status"] for job in (lost, kept)}
    assert sorted(found.values()) == ["COMPLETED", "TIMED_OUT"]
    assert [len(notes.of(job)) for job in (lost, kept)] == [1, 1]
    assert platform.struck()["lost-result"] == 1


def test_a_forgotten_result_takes_the_job_with_it(platform: Platform, notes: Notes) -> None:
    platform.fault("forgotten-result")
    job = platform.run({"do": "echo"})
    wait_for(lambda: platform.status(job), lambda found: not found)
    assert len(notes.of(job)) == 1


def test_a_job_without_its_output_is_completed(platform: Platform) -> None:
    platform.fault("no-output")
    found = platform.wait(platform.run({"do": "echo"}))
    assert found["status"] == "COMPLETED"
    assert "output" not in found


def test_two_workers_get_a_job_that_is_delivered_twice(platform: Platform, notes: Notes) -> None:
    platform.fault("delivered-twice")
    job = platform.run({"do": "slow", "seconds": 3})
    platform.wait(job, "COMPLETED")
    workers = [worker for worker, _ in notes.wait(job, "started", times=2)]
    assert len(set(workers)) == 2


def test_a_cancelled_job_stops_on_both_workers_that_have_it(platform: Platform, notes: Notes) -> None:
    platform.fault("delivered-twice")
    job = platform.run({"do": "slow", "seconds": 300})
    notes.wait(job, "started", times=2)
    platform.post(f"cancel/{job}")
    notes.wait(job, "stopped", times=2)


def test_a_job_that_is_delivered_again_runs_after_it_has_ended(platform: Platform, notes: Notes) -> None:
    platform.fault("delivered-again")
    job = platform.run({"do": "echo"})
    first = platform.wait(job, "COMPLETED")
    notes.wait(job, "started", times=2)
    assert platform.status(job) == first


def test_late_progress_replaces_the_output(platform: Platform) -> None:
    platform.fault("late-progress")
    found = platform.wait(platform.run({"do": "progress", "steps": 1, "gap": 0.7}))
    assert (found["status"], found["output"]) == ("COMPLETED", {"step": 0})


def test_late_progress_can_come_after_newer_progress(platform: Platform) -> None:
    platform.fault("late-progress", seconds=1.5)
    job = platform.run({"do": "progress", "steps": 2, "gap": 1})
    wait_for(lambda: platform.status(job).get("output"), lambda output: output == {"step": 1})
    wait_for(lambda: platform.status(job).get("output"), lambda output: output == {"step": 0})
    platform.wait(job)


@pytest.mark.parametrize(("fault", "status"), [("http-429", 429), ("http-500", 500)])
def test_a_refused_request_has_done_nothing(platform: Platform, fault: str, status: int) -> None:
    platform.fault(fault, route="run", count=2)
    before = platform.health()["jobs"]
    for _ in range(2):
        assert platform.post("run", {"input": {"do": "echo"}}).status_code == status
    assert platform.health()["jobs"] == before
    job = platform.run({"do": "slow", "seconds": 300})
    for method, path in (("GET", "status"), ("POST", "cancel")):
        platform.fault(fault, route=path)
        url = f"{platform.api_base}/{platform.endpoint}/{path}/{job}"
        assert platform.client.request(method, url).status_code == status
    assert platform.status(job)["status"] != "CANCELLED"
    assert platform.post(f"cancel/{job}").json()["status"] == "CANCELLED"


def test_an_error_after_the_request_was_done(platform: Platform) -> None:
    before = platform.health()["jobs"]["completed"]
    platform.fault("http-500-after")
    assert platform.post("run", {"input": {"do": "echo"}}).status_code == 500
    wait_for(lambda: platform.health()["jobs"]["completed"], lambda count: count == before + 1)


def test_a_connection_cut_after_the_request_was_done(platform: Platform) -> None:
    before = platform.health()["jobs"]["completed"]
    platform.fault("cut-connection")
    with pytest.raises(httpx.TransportError):
        platform.post("run", {"input": {"do": "echo"}})
    wait_for(lambda: platform.health()["jobs"]["completed"], lambda count: count == before + 1)


def test_a_fault_strikes_only_the_job_that_it_names(platform: Platform) -> None:
    first, second = platform.run({"do": "echo"}), platform.run({"do": "echo"})
    platform.fault("http-500", match=second, count=1)
    assert platform.get(f"status/{first}").status_code == 200
    assert platform.get(f"status/{second}").status_code == 500
    assert platform.get(f"status/{second}").status_code == 200


def test_a_slow_status_is_answered_in_the_end(platform: Platform) -> None:
    job = platform.run({"do": "echo"})
    platform.fault("slow-status", seconds=1.5)
    with pytest.raises(httpx.ReadTimeout):
        platform.client.get(f"{platform.api_base}/{platform.endpoint}/status/{job}", timeout=0.5)
    platform.fault("slow-status", seconds=0.1)
    assert platform.status(job)["id"] == job


def test_the_worker_that_runs_a_job_dies(platform: Platform, notes: Notes) -> None:
    job = platform.run({"do": "slow", "seconds": 3})
    (first,) = {worker for worker, _ in notes.wait(job, "started")}
    platform.fault("worker-death", match=job)
    assert platform.wait(job)["status"] == "COMPLETED"
    assert {worker for worker, _ in notes.of(job)} - {first}
    assert platform.struck()["worker-death"] == 1


def test_the_worker_that_takes_a_job_dies(platform: Platform, notes: Notes) -> None:
    platform.fault("worker-death", probability=1, count=2, seconds=0.2)
    found = platform.wait(platform.run({"do": "slow", "seconds": 2}))
    assert (found["status"], found["error"]) == ("FAILED", "job timed out after 1 retries")


def test_a_job_whose_ttl_passed_is_gone_and_stopped(platform: Platform, notes: Notes) -> None:
    job = platform.run({"do": "slow", "seconds": 300})
    notes.wait(job, "started")
    platform.fault("ttl-passed", match=job)
    wait_for(lambda: platform.status(job), lambda found: not found)
    notes.wait(job, "stopped")
    platform.fault("ttl-passed", probability=1, count=1, seconds=0)
    other = platform.run({"do": "slow", "seconds": 300})
    wait_for(lambda: platform.status(other), lambda found: not found)


def test_without_workers_jobs_wait_until_there_are_some_again(platform: Platform) -> None:
    platform.fault("no-workers")
    job = platform.run({"do": "echo"})
    wait_for(platform.health, lambda found: found["workers"]["idle"] + found["workers"]["running"] == 0)
    assert platform.status(job)["status"] == "IN_QUEUE"
    platform.clear_faults()
    assert platform.wait(job)["status"] == "COMPLETED"
    platform.fault("no-workers", seconds=0.5)
    assert platform.wait(platform.run({"do": "echo"}))["status"] == "COMPLETED"
    platform.fault("no-workers", probability=1, count=1, seconds=0.5)
    assert platform.wait(platform.run({"do": "echo"}))["status"] == "COMPLETED"


def test_a_cold_worker_takes_its_first_job_later(started: Started) -> None:
    with started(workers="0:1") as platform:
        platform.fault("cold-start", seconds=1)
        found = platform.wait(platform.run({"do": "echo"}))
        assert found["status"] == "COMPLETED"
        assert found["delayTime"] >= 1_000
        assert platform.struck() == {"cold-start": 1}


def test_faults_by_chance_are_the_same_for_the_same_seed(started: Started) -> None:
    def outcomes() -> list[int]:
        with started(workers="0:0", faults={"http-500": 0.3, "http-429": 0.3}, seed=7) as platform:
            return [platform.get("status/x").status_code for _ in range(30)]

    first = outcomes()
    assert {404, 429, 500} == set(first)
    assert outcomes() == first


@pytest.mark.parametrize(
    "body", [{}, {"fault": "nothing"}, {"fault": "no-output", "count": 0}, {"fault": "no-output", "unknown": 1}]
)
def test_a_fault_that_there_is_not_is_refused(platform: Platform, body: dict[str, object]) -> None:
    answer = platform.client.post(f"{platform.url}/faults", json=body)
    assert (answer.status_code, set(answer.json())) == (400, {"error"})


def test_faults_are_listed_until_they_are_cleared(platform: Platform) -> None:
    platform.fault("no-output", match="x", count=3)
    found = platform.client.get(f"{platform.url}/faults").json()
    assert found["faults"] == [{"fault": "no-output", "count": 3, "match": "x"}]
    platform.clear_faults()
    assert platform.client.get(f"{platform.url}/faults").json()["faults"] == []
