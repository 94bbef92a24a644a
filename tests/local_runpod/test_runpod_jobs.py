"""Jobs of a local Runpod, from the client's side."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import httpx
import pytest
import runpod
from noted import Notes, Started
from runpod.endpoint import AsyncioEndpoint
from runpod.http_client import ClientSession
from runpod_local import Platform, wait_for

Client = Callable[[Platform], AbstractContextManager[runpod.Endpoint]]


@pytest.fixture(scope="module")
def platform(started: Started) -> Iterator[Platform]:
    with started(workers="1:1", min_execution_ms=1, min_ttl_ms=1) as platform:
        yield platform


@pytest.fixture(scope="module")
def idle(started: Started) -> Iterator[Platform]:
    """One without workers: what is submitted stays queued."""
    with started(workers="0:0") as platform:
        yield platform


def test_the_package_submits_waits_and_gets_the_output(platform: Platform, client: Client) -> None:
    with client(platform) as endpoint:
        job = endpoint.run({"do": "echo", "value": {"a": [1, 2.5, "é"]}})
        assert job.output(timeout=60) == {"echo": {"a": [1, 2.5, "é"]}, "env": "from the platform", "s3": None}
        assert job.status() == "COMPLETED"


def test_the_package_runs_and_waits_in_one_request(platform: Platform, client: Client) -> None:
    with client(platform) as endpoint:
        assert endpoint.run_sync({"do": "echo", "value": 1})["echo"] == 1


def test_the_asynchronous_client_of_the_package_works_too(platform: Platform) -> None:
    async def talk() -> tuple[object, dict[str, object]]:
        runpod.endpoint_url_base = platform.api_base
        async with ClientSession() as session:
            endpoint = AsyncioEndpoint(platform.endpoint, session, api_key=platform.key)
            job = await endpoint.run({"do": "echo", "value": 3})
            return await job.output(timeout=60), await endpoint.health()

    output, health = asyncio.run(talk())
    assert output == {"echo": 3, "env": "from the platform", "s3": None}
    assert health["workers"]["running"] == 0  # type: ignore[index]


def test_a_status_says_who_ran_the_job_and_how_long_it_took(platform: Platform, notes: Notes) -> None:
    job = platform.run({"do": "echo"})
    found = platform.wait(job)
    assert list(found) == ["id", "status", "delayTime", "executionTime", "output", "workerId"]
    assert found["workerId"] == notes.of(job)[0][0]
    assert found["delayTime"] >= 0
    assert found["executionTime"] >= 0


def test_s3_config_is_passed_on_to_the_worker(platform: Platform) -> None:
    config = {"accessId": "a", "bucketName": "b"}
    job = platform.run({"do": "echo"}, s3Config=config)
    found = platform.wait(job)
    assert found["output"]["s3"] == config
    assert "s3Config" not in found


def test_progress_shows_as_the_output_of_a_running_job(platform: Platform) -> None:
    job = platform.run({"do": "progress", "steps": 2, "gap": 0.7})
    seen = wait_for(lambda: platform.status(job), lambda found: found.get("output") == {"step": 1})
    assert seen["status"] in ("IN_PROGRESS", "RUNNING")
    assert platform.wait(job)["output"] == {"done": "progress"}


def test_a_job_is_in_progress_when_taken_and_running_when_its_worker_says_so(platform: Platform) -> None:
    job = platform.run({"do": "slow", "seconds": 60})
    platform.wait(job, "IN_PROGRESS")
    platform.wait(job, "RUNNING")
    platform.post(f"cancel/{job}")


def test_an_error_of_the_handler_is_a_failed_job_with_its_text(platform: Platform) -> None:
    found = platform.wait(platform.run({"do": "fail"}))
    assert (found["status"], json.loads(found["error"])) == ("FAILED", {"code": "GATE_FAILED"})
    assert "output" not in found
    raised = platform.wait(platform.run({"do": "raise"}))
    assert json.loads(raised["error"])["error_message"] == "as asked"


def test_an_empty_answer_is_a_completed_job_without_output(platform: Platform) -> None:
    found = platform.wait(platform.run({"do": "nothing"}))
    assert found["status"] == "COMPLETED"
    assert "output" not in found


def test_a_running_job_is_stopped_when_it_is_cancelled(platform: Platform, notes: Notes, client: Client) -> None:
    with client(platform) as endpoint:
        job = endpoint.run({"do": "slow", "seconds": 300})
        notes.wait(job.job_id, "started")
        assert job.cancel() == {"id": job.job_id, "status": "CANCELLED"}
        assert job.status() == "CANCELLED"
    notes.wait(job.job_id, "stopped")
    assert platform.wait(platform.run({"do": "echo", "value": 1}))["output"]["echo"] == 1


def test_a_finished_job_stays_as_it_is_when_it_is_cancelled(platform: Platform) -> None:
    job = platform.run({"do": "echo"})
    platform.wait(job)
    assert platform.post(f"cancel/{job}").json() == {"id": job, "status": "COMPLETED"}
    assert platform.status(job)["status"] == "COMPLETED"


def test_a_job_over_its_time_limit_is_timed_out_and_stopped(platform: Platform, notes: Notes) -> None:
    job = platform.run({"do": "slow", "seconds": 300}, policy={"executionTimeout": 700})
    found = platform.wait(job)
    assert (found["status"], found["error"]) == ("TIMED_OUT", "executionTimeout exceeded")
    notes.wait(job, "stopped")


def test_a_job_is_gone_when_its_ttl_has_passed_even_while_it_runs(platform: Platform, notes: Notes) -> None:
    job = platform.run({"do": "slow", "seconds": 300}, policy={"ttl": 3_000})
    wait_for(lambda: platform.status(job), lambda found: not found)
    assert platform.get(f"status/{job}").json() == {"error": "job not found"}
    if notes.of(job):
        notes.wait(job, "stopped")


def test_a_failed_job_runs_again_when_it_is_retried(platform: Platform, notes: Notes) -> None:
    job = platform.run({"do": "fail"})
    platform.wait(job, "FAILED")
    assert platform.post(f"retry/{job}").json() == {"id": job, "status": "IN_QUEUE"}
    notes.wait(job, "started", times=2)
    assert platform.wait(job)["status"] == "FAILED"


def test_only_a_failed_or_timed_out_job_can_be_retried(platform: Platform) -> None:
    job = platform.run({"do": "echo"})
    platform.wait(job, "COMPLETED")
    refused = platform.post(f"retry/{job}")
    assert refused.status_code == 400
    assert "FAILED and TIMED_OUT" in refused.json()["error"]


def test_a_queued_job_is_cancelled_at_once_and_purging_cancels_the_others(idle: Platform, client: Client) -> None:
    first, *others = [idle.run({"do": "echo"}) for _ in range(3)]
    assert idle.status(first) == {"id": first, "status": "IN_QUEUE"}
    assert idle.post(f"cancel/{first}").json()["status"] == "CANCELLED"
    with client(idle) as endpoint:
        assert endpoint.health()["jobs"] == {"completed": 0, "failed": 0, "inProgress": 0, "inQueue": 2, "retried": 0}
        assert endpoint.purge_queue() == {"removed": 2, "status": "completed"}
        assert endpoint.health()["jobs"]["inQueue"] == 0
    assert [idle.status(job)["status"] for job in others] == ["CANCELLED", "CANCELLED"]


def test_runsync_answers_the_state_when_the_wait_is_over(idle: Platform) -> None:
    found = idle.post("runsync", {"input": {"do": "echo"}}, wait=1_000).json()
    assert found["id"].startswith("sync-")
    assert found["status"] == "IN_QUEUE"
    assert idle.post(f"cancel/{found['id']}").is_success


def test_unknown_jobs_endpoints_and_paths_are_not_found(idle: Platform) -> None:
    for path in (f"{idle.endpoint}/status/x", "other-endpoint/health", f"{idle.endpoint}/nothing"):
        answer = idle.client.get(f"{idle.api_base}/{path}")
        assert (answer.status_code, set(answer.json())) == (404, {"error"})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "bad request"),
        (b"[]", "bad request"),
        (b'{"input": {}, "webhook": "\xff"}', "bad request"),
        (b'{"input": ' + b"[" * 100_000, "bad request"),
        (b'{"inputs": {}}', "input"),
        (b'{"input": null}', "input"),
        (b'{"input": {}, "policy": {"executionTimeout": 4999}}', "executionTimeout"),
        (b'{"input": {}, "policy": {"executionTimeout": 604800001}}', "executionTimeout"),
        (b'{"input": {}, "policy": {"ttl": 9999}}', "ttl"),
        (b'{"input": {}, "policy": {"ttl": "1"}}', "ttl"),
    ],
)
def test_a_request_that_is_wrong_is_refused_with_the_reason(idle: Platform, body: bytes, says: str) -> None:
    answer = idle.client.post(f"{idle.api_base}/{idle.endpoint}/run", content=body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]


def test_without_the_key_nothing_is_answered(idle: Platform) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        for method, path in (("POST", "run"), ("GET", "health"), ("GET", "status/x")):
            answer = httpx.request(method, f"{idle.api_base}/{idle.endpoint}/{path}", headers=headers)
            assert (answer.status_code, answer.json()) == (401, {"error": "unauthorized"})
        assert httpx.get(f"{idle.url}/faults", headers=headers).status_code == 401
    assert httpx.get(f"{idle.api_base}/{idle.endpoint}/health", headers={"Authorization": idle.key}).is_success


def test_a_worker_that_does_not_know_its_token_gets_no_job(idle: Platform) -> None:
    for path in ("job-take/x", "job-take-batch/x?batch_size=2", "job-stop/x", "ping/x"):
        assert idle.client.get(f"{idle.api_base}/{idle.endpoint}/{path}").status_code == 401
    assert idle.post("job-done/x/y", {}).status_code == 401
