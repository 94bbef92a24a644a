"""What a local Runpod bounds: messages, queue, requests in a time, how long it remembers; and its webhooks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from noted import Started
from processes import answering
from runpod_local import Platform, wait_for

MIB = 1 << 20


@pytest.fixture(scope="module")
def platform(started: Started) -> Iterator[Platform]:
    with started(workers="1:1", webhook_gap_seconds=0.1, execution_ms=5_000) as platform:
        yield platform


class Hook:
    """A server that webhooks call: ``answers`` are its statuses, then 200; ``bodies`` what came."""

    def __init__(self, url: str, answers: list[int]) -> None:
        self.url = url
        self.answers = answers
        self.bodies: list[dict[str, Any]] = []


@contextmanager
def hook(*answers: int) -> Iterator[Hook]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(found.answers.pop(0) if found.answers else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with answering(Handler) as url:
        found = Hook(f"{url}/hook", list(answers))
        yield found


def test_a_webhook_gets_the_status_of_the_finished_job(platform: Platform) -> None:
    with hook() as called:
        job = platform.run({"do": "echo", "value": 7}, webhook=called.url)
        wait_for(lambda: called.bodies, bool)
        assert called.bodies == [platform.status(job)]
        assert called.bodies[0]["output"]["echo"] == 7


def test_a_webhook_is_told_of_failed_and_cancelled_jobs_too(platform: Platform) -> None:
    with hook() as called:
        failed = platform.run({"do": "fail"}, webhook=called.url)
        platform.wait(failed)
        slow = platform.run({"do": "slow", "seconds": 300}, webhook=called.url)
        platform.post(f"cancel/{slow}")
        wait_for(lambda: called.bodies, lambda bodies: len(bodies) == 2)
        assert {body["id"]: body["status"] for body in called.bodies} == {failed: "FAILED", slow: "CANCELLED"}


def test_a_webhook_is_tried_three_times_and_no_more(platform: Platform) -> None:
    with hook(500, 302) as called:
        platform.run({"do": "echo"}, webhook=called.url)
        wait_for(lambda: called.bodies, lambda bodies: len(bodies) == 3)
        refused = platform.run({"do": "echo"}, webhook=called.url)
        called.answers = [500, 500, 500, 200]
        wait_for(lambda: platform.log, lambda log: "webhook was not called" in log and refused in log)
        assert [body["id"] for body in called.bodies].count(refused) == 3


def test_a_message_over_10_mb_is_refused_and_one_of_20_for_runsync(platform: Platform) -> None:
    for path, limit in (("run", 10), ("runsync", 20)):
        refused = platform.post(path, {"input": {"do": "echo", "value": "x" * (limit * MIB)}})
        assert refused.status_code == 400
        assert refused.json() == {"error": f"exceeded max body size of {limit}MiB"}
    allowed = platform.run({"do": "echo", "value": "x" * (9 * MIB)})
    assert len(platform.wait(allowed)["output"]["echo"]) == 9 * MIB


def test_a_result_over_20_mb_is_not_taken(platform: Platform) -> None:
    job = platform.run({"do": "text", "size": 21 * MIB})
    assert platform.wait(job)["status"] == "TIMED_OUT"
    assert "Failed to return job results. | 400" in platform.log


@pytest.mark.parametrize(
    ("limit", "method", "path"),
    [
        ("run_limit", "POST", "run"),
        ("runsync_limit", "POST", "runsync"),
        ("status_limit", "GET", "status/x"),
        ("cancel_limit", "POST", "cancel/x"),
        ("purge_limit", "POST", "purge-queue"),
    ],
)
def test_more_requests_than_the_limit_are_refused_until_later(
    started: Started, limit: str, method: str, path: str
) -> None:
    with started(workers="0:0", **{limit: 3}) as platform:
        url = f"{platform.api_base}/{platform.endpoint}/{path}"
        answers = [platform.client.request(method, url, params={"wait": "bad"}).status_code for _ in range(4)]
        assert 429 not in answers[:3]
        assert answers[3] == 429
        assert platform.get("health").status_code == 200


def test_a_full_queue_refuses_jobs(started: Started) -> None:
    with started(workers="0:0") as platform:
        for _ in range(50):
            platform.run({"do": "echo"})
        refused = platform.post("run", {"input": {"do": "echo"}})
        assert (refused.status_code, refused.json()) == (429, {"error": "the endpoint's queue is full"})
        platform.post("purge-queue")
        platform.run({"do": "echo"})


def test_a_platform_that_holds_too_much_refuses_jobs(started: Started) -> None:
    with started(workers="0:0") as platform:
        body = {"input": {"value": "x" * (10 * MIB - 100)}}
        answers = [platform.post("run", body) for _ in range(26)]
        assert [answer.status_code for answer in answers] == [200] * 25 + [429]
        platform.post("purge-queue")
        assert platform.post("run", body).status_code == 200


def test_a_result_is_forgotten_after_the_retention(started: Started) -> None:
    with started(workers="1:1", retention_seconds=1, sync_retention_seconds=1) as platform:
        job = platform.run({"do": "echo"})
        platform.wait(job)
        wait_for(lambda: platform.status(job), lambda found: not found)
        assert platform.post(f"retry/{job}").status_code == 404
        sync = platform.post("runsync", {"input": {"do": "echo"}}).json()
        assert sync["status"] == "COMPLETED"
        wait_for(lambda: platform.status(sync["id"]), lambda found: not found)
