"""Webhooks of the platform: hints that make a server look at once, and that anybody may have sent."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from live_server import graph
from runpod_house import RunpodServer, eventually
from runpod_local import Platform, local_runpod

WORKER = [sys.executable, Path(__file__).with_name("scripted_worker.py")]
NEVER = 600.0
"""Seconds between two looks that nobody asked for: longer than a test may take."""


class House(NamedTuple):
    """A local Runpod whose workers do as told, and a folder that servers share."""

    platform: Platform
    folder: Path

    def server(self, name: str, **settings: Any) -> RunpodServer:
        """A server that looks at its jobs only when it is told to."""
        return RunpodServer(
            self.folder / name,
            self.platform,
            poll=NEVER,
            hooks=True,
            storage_url=(self.folder / "shared").as_uri(),
            **settings,
        )

    def hook(self, job_id: str) -> str:
        """Wait until a job runs, answer the URL of its webhook."""

        def found() -> str | None:
            lines = [json.loads(line) for line in (self.folder / "notes").read_text().splitlines()]
            return next((line["webhook"] for line in lines if line["input"]["job_id"] == job_id), None)

        return str(eventually(found))


def job_that(do: str) -> dict[str, Any]:
    return {**graph(2), "projectName": do}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One for all tests of this module."""
    folder = tmp_path_factory.mktemp("hooks")
    (folder / "notes").touch()
    env = {"NOTES": str(folder / "notes")}
    with local_runpod(workers="1:1", worker_command=WORKER, env=env, idle_seconds=60, webhook_gap_seconds=0.5) as found:
        yield House(found, folder)


@pytest.fixture(scope="module")
def server(house: House) -> Iterator[RunpodServer]:
    """A server whose webhooks come to itself."""
    found = house.server("one")
    try:
        found.start()
        yield found
    finally:
        found.close()


def test_the_end_of_a_job_is_seen_by_its_webhook_without_a_poll(house: House, server: RunpodServer) -> None:
    job = server.submit(job_that("PAYLOAD_MISMATCH"))
    assert server.ended(job)["error"]["code"] == "PAYLOAD_MISMATCH"
    assert server.requests("status") == 1
    assert house.hook(job).startswith(f"{server.url}/v1/hooks/runpod/{job}/")


def test_a_hint_leads_to_one_look_and_what_it_says_counts_for_nothing(house: House, server: RunpodServer) -> None:
    job = server.submit(job_that("hang"))
    hook = house.hook(job)
    before = server.requests("status")
    forged = {"id": server.runpod_id(job), "status": "COMPLETED", "output": {"sha256": "0" * 64}}
    answer = httpx.post(hook, json=forged)
    assert answer.status_code == 200
    eventually(lambda: server.job(job)["status"] == "running")  # that is what the platform says
    assert server.requests("status") == before + 1
    for body in (b"", b"\xff\xfe", b"[" * 1_000, json.dumps({**forged, "status": "FAILED"}).encode()):
        assert httpx.post(hook, content=body).status_code == 200
    server.client.get("/v1/exports")
    assert server.job(job)["status"] == "running"
    server.client.delete(f"/v1/exports/{job}")
    assert httpx.post(hook, json=forged).status_code == 200
    assert server.job(job)["status"] == "canceled"


def test_a_wrong_secret_finds_nothing_and_leads_to_no_look(house: House, server: RunpodServer) -> None:
    job, other = server.submit(job_that("hang")), server.submit(job_that("hang"))
    hook, secret = house.hook(job), house.hook(other).rpartition("/")[2]
    before = server.requests("status")
    assert len(secret) >= 32
    for wrong in (secret, "x", hook.rpartition("/")[2][:-1], hook.rpartition("/")[2] + "%00", "%C3%A9"):
        answer = httpx.post(f"{hook.rpartition('/')[0]}/{wrong}", json={"status": "COMPLETED"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "JOB_NOT_FOUND")
    answer = httpx.post(f"{server.url}/v1/hooks/runpod/unknown/{secret}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "JOB_NOT_FOUND")
    assert server.requests("status") == before
    for each in (job, other):
        server.client.delete(f"/v1/exports/{each}")


def test_the_secret_is_in_no_answer(house: House, server: RunpodServer) -> None:
    job = server.submit(job_that("PAYLOAD_MISMATCH"))
    secret = house.hook(job).rpartition("/")[2]
    server.ended(job)
    paths = ("", f"/{job}", f"/{job}/events", f"/{job}/report")
    assert not any(secret in server.client.get(f"/v1/exports{path}").text for path in paths)
    assert "/v1/hooks" not in server.client.get("/schema/openapi.json").text


def test_a_hint_that_comes_to_another_replica_reaches_the_one_that_drives_the_job(
    house: House, postgres_url: str
) -> None:
    replicas = [house.server(name, database_url=postgres_url) for name in ("left", "right")]
    for replica, other in zip(replicas, reversed(replicas), strict=True):
        replica.env["MEMVID_EXPORT_PUBLIC_URL"] = other.url
    try:
        for replica in replicas:
            replica.start()
        for replica in replicas:
            job = replica.submit(job_that("nothing"))
            ended = replica.ended(job)
            assert (ended["status"], ended["error"]["code"]) == ("failed", "WORKER_LOST")
            assert house.hook(job).rsplit("/v1/", 1)[0] in (replicas[0].url, replicas[1].url)
        assert sum(replica.requests("status") for replica in replicas) == 4  # two jobs of two attempts
    finally:
        for replica in replicas:
            replica.close()
