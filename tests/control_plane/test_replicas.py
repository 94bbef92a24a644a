"""Servers that share a PostgreSQL and a bucket: any of them answers, and one that dies is not missed."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import Server, graph, large_graph
from postgres import Postgres
from runpod_house import Bucket, RunpodServer, bucket_env, eventually, real_workers
from runpod_local import Platform
from services import S3, s3_server

Pair = tuple[Server, Server]


@pytest.fixture(scope="module")
def bucket_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 server."""
    with s3_server(tmp_path_factory.mktemp("replicas") / "s3") as found:
        yield found


@pytest.fixture(scope="module")
def platform(bucket_server: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A local Runpod with our workers."""
    with real_workers(bucket_server, tmp_path_factory.mktemp("workers") / "root", workers="2:2") as found:
        yield found


@pytest.fixture(params=["runpod_queue", "legacy_vps"])
def pair(
    request: pytest.FixtureRequest, bucket_server: S3, platform: Platform, postgres_url: str, tmp_path: Path
) -> Iterator[Pair]:
    """Two servers with the same database and the same bucket."""
    shared: dict[str, Any] = {
        "env": bucket_env(bucket_server),
        "database_url": postgres_url,
        "storage_url": f"{bucket_server.url}/{tmp_path.name}",
    }
    if request.param == "runpod_queue":
        found: Pair = (
            RunpodServer(tmp_path / "first", platform, **shared),
            RunpodServer(tmp_path / "second", platform, **shared),
        )
    else:
        found = (
            Server(tmp_path / "first", worker_slots=1, **shared),
            Server(tmp_path / "second", worker_slots=1, **shared),
        )
    try:
        yield found[0].start(), found[1].start()
    finally:
        for each in found:
            each.close()


def collected(server: Server, job_id: str) -> tuple[threading.Thread, list[dict[str, Any]]]:
    """Follow a job's stream in the background."""
    events: list[dict[str, Any]] = []

    def follow() -> None:
        events.extend(server.stream(job_id))

    thread = threading.Thread(target=follow)
    thread.start()
    return thread, events


def test_any_replica_answers_for_a_job_that_another_one_took(pair: Pair) -> None:
    first, second = pair
    job = first.submit(large_graph("answered", 3_000))
    streams = [collected(server, job) for server in pair]
    for thread, _ in streams:
        thread.join()
    told = [events for _, events in streams]
    assert told[0] == told[1] == second.events(job)
    assert [event["seq"] for event in told[0]] == list(range(1, len(told[0]) + 1))
    assert told[0][-1]["type"] == "job_completed"
    stages = {event["stage"] for event in told[0]}
    assert {"frame_prep", "write_capsule", "build_sidecar", "finalize"} <= stages
    assert first.job(job) == second.job(job)
    for route in ("report", "manifest", "sidecar", "download"):
        answers = [server.client.get(f"/v1/exports/{job}/{route}") for server in pair]
        assert answers[0].content == answers[1].content
    assert hashlib.sha256(answers[1].content).hexdigest() == second.job(job)["artifact"]["sha256"]
    again = second.post(graph(2), idempotency_key="shared")
    assert first.post(graph(2), idempotency_key="shared").json()["jobId"] == again.json()["jobId"]


def test_a_job_is_canceled_through_a_replica_that_does_not_drive_it(
    pair: Pair, bucket_server: S3, tmp_path: Path
) -> None:
    bucket = Bucket(bucket_server, tmp_path.name)
    for through in pair:
        job = pair[0].submit(large_graph("canceled"))
        pair[0].wait(job, "job_started")
        assert through.client.delete(f"/v1/exports/{job}").json()["status"] == "canceled"
        for server in pair:
            assert server.job(job)["status"] == "canceled"
            assert server.events(job)[-1]["type"] == "job_canceled"
        bucket.wait_until_gone(job)
    after = pair[1].submit(graph(3, name="after"))
    assert pair[0].wait(after)["type"] == "job_completed"
    bucket.close()


def test_the_jobs_of_a_replica_that_is_killed_are_driven_on_by_another_one(pair: Pair) -> None:
    first, second = pair
    jobs = [server.submit(large_graph(f"orphan-{n}", 6_000)) for n in range(2) for server in pair]
    streams = [collected(second, job) for job in jobs]
    first.wait(jobs[0], "job_started")
    first.kill()
    for thread, events in streams:
        thread.join()
        assert events[-1]["type"] == "job_completed"
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        assert [event["progress"] for event in events] == sorted(event["progress"] for event in events)
    for job in jobs:
        artifact = second.job(job)["artifact"]
        assert hashlib.sha256(second.client.get(artifact["downloadUrl"]).content).hexdigest() == artifact["sha256"]
        attempts = second.client.get(f"/v1/exports/{job}/report").json()["attempts"]
        assert attempts == 1 or (attempts == 2 and not isinstance(first, RunpodServer))
    first.start()
    assert {job: first.job(job)["status"] for job in jobs} == dict.fromkeys(jobs, "completed")


def test_a_database_that_goes_away_for_a_while_makes_jobs_late_and_no_more(
    bucket_server: S3, platform: Platform, tmp_path: Path
) -> None:
    database = Postgres(durable=True).start()
    server = RunpodServer(
        tmp_path / "root",
        platform,
        env=bucket_env(bucket_server),
        database_url=database.new_database(),
        storage_url=f"{bucket_server.url}/{tmp_path.name}",
    )
    try:
        server.start()
        job = server.submit(large_graph("late", 3_000))
        there = server.runpod_id(job)
        database.crash()
        assert platform.wait(there)["status"] == "COMPLETED"
        database.start()
        eventually(lambda: server.client.get(f"/v1/exports/{job}").is_success)
        assert server.ended(job)["status"] == "completed"
        events = server.events(job)
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        assert server.attempts(job) == 1
    finally:
        server.close()
        database.close()
