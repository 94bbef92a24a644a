"""What was given up is kept, listed, and started again as a new export of the same payload."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import KEY, Server, graph, large_graph
from runpod_house import Bucket, RunpodServer, bucket_env, eventually, real_workers
from services import s3_server

CEILING = "[profiles.thrifty]\nmax_tokens = {}\n"


def costly(name: str) -> dict[str, Any]:
    """A graph that passes the ceiling of tokens, by texts that no cache has."""
    body = graph(5, name=name)
    body["options"] |= {"semanticEnabled": True, "profile": "thrifty", "collection": name}
    return body


class Thrifty:
    """A server on which such graphs fail until its ceiling is mended, which takes a restart."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.profiles = folder / "profiles.toml"
        self.profiles.write_text(CEILING.format(3))
        self.server = Server(folder / "root", profiles_file=self.profiles, worker_slots=1, **settings)
        self.server.start()

    def mended(self) -> Server:
        self.server.stop()
        self.profiles.write_text(CEILING.format(1_000_000))
        return self.server.start()

    def failed(self, name: str) -> str:
        job_id = self.server.submit(costly(name))
        assert self.server.wait(job_id)["type"] == "job_failed"
        return job_id

    def payload(self, job_id: str) -> Path:
        return self.server.root / "staging" / "payloads" / job_id


def retry(server: Server, job_id: str, key: str = KEY) -> httpx.Response:
    return server.client.post(f"/v1/exports/{job_id}/retry", headers={"Authorization": f"Bearer {key}"})


def dead_letters(server: Server) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("memvid_export_dead_letters ")).split()[1])


@pytest.fixture(scope="module")
def thrifty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Thrifty]:
    house = Thrifty(tmp_path_factory.mktemp("thrifty"), stray_seconds=1)
    yield house
    house.server.close()


def test_a_failed_export_is_started_again_after_what_was_wrong_is_mended(tmp_path: Path) -> None:
    house = Thrifty(tmp_path, stray_seconds=1)
    server = house.server
    try:
        job_id = house.failed("mended")
        before = server.job(job_id)
        events = server.events(job_id)
        assert before["metadata"]["retryUntil"] > before["updatedAt"]
        assert (before["metadata"]["attempts"], before["metadata"]["retriedBy"]) == (1, None)
        assert hashlib.sha256(house.payload(job_id).read_bytes()).hexdigest() == before["metadata"]["payloadSha256"]
        assert not (server.root / "artifacts" / job_id).exists()
        assert [job["jobId"] for job in server.client.get("/v1/exports?status=failed").json()["jobs"]] == [job_id]
        assert dead_letters(server) == 1

        house.mended()  # a restart, which removes what no job speaks for, and so does each sweep
        stray = house.payload("00000000-0000-4000-8000-000000000000")
        stray.write_bytes(b"nobody's")
        eventually(lambda: not stray.exists())
        answer = retry(server, job_id)
        assert answer.status_code == 202, answer.text
        new_id = answer.json()["jobId"]
        assert answer.headers["location"] == f"/v1/exports/{new_id}"
        assert new_id != job_id
        assert server.wait(new_id)["type"] == "job_completed"
        new, old = server.job(new_id), server.job(job_id)
        assert (new["metadata"]["retryOf"], old["metadata"]["retriedBy"]) == (job_id, new_id)
        assert new["metadata"]["payloadSha256"] == old["metadata"]["payloadSha256"]
        assert new["artifact"]["fileName"].startswith("mended-")
        eventually(lambda: server.job(job_id)["collection"]["status"] == "failed")
        eventually(lambda: server.job(new_id)["collection"]["status"] == "done")
        assert server.job(new_id)["collection"] | {"status": ""} == {
            "name": "mended",
            "status": "",
            "documents": 5,
            "error": None,
        }
        report = server.client.get(f"/v1/exports/{new_id}/report").json()
        assert report["profile"] == "thrifty" or report["capsule"]["vectors"] == 5

        # Nothing followed the end of the failed one, and its payload is the new one's.
        assert server.events(job_id) == events
        assert (old["status"], old["metadata"]["retryUntil"]) == ("failed", None)
        assert not house.payload(job_id).exists()
        assert dead_letters(server) == 0
        again = retry(server, job_id)
        assert (again.status_code, again.json()["jobId"]) == (202, new_id)
        assert again.headers["idempotent-replayed"] == "true"
        audit = server.client.get("/v1/audit", params={"action": "export.retry"}).json()
        assert [(entry["jobId"], entry["outcome"]) for entry in audit["entries"]] == [(new_id, "ok")]
    finally:
        server.close()


def test_of_many_retries_at_once_one_makes_a_job(thrifty: Thrifty) -> None:
    job_id = thrifty.failed("at-once")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: retry(thrifty.server, job_id), range(8)))
    assert {answer.status_code for answer in answers} == {202}, [answer.text for answer in answers]
    (new_id,) = {answer.json()["jobId"] for answer in answers}
    assert thrifty.server.wait(new_id)["type"] == "job_failed"  # nothing was mended
    assert thrifty.payload(new_id).exists()
    eventually(lambda: not list((thrifty.server.root / "staging" / "incoming").iterdir()))
    # And that one can be started again in its turn.
    third = retry(thrifty.server, new_id)
    assert (third.status_code, third.json()["jobId"] not in (job_id, new_id)) == (202, True)
    thrifty.server.wait(third.json()["jobId"])


def test_only_what_failed_is_started_again(thrifty: Thrifty) -> None:
    server = thrifty.server
    done = server.submit(graph(name="done"))
    server.wait(done)
    answer = retry(server, done)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "JOB_NOT_FAILED")
    for missing in ("00000000-0000-4000-8000-000000000000", "nonsense"):
        answer = retry(server, missing)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "JOB_NOT_FOUND")
    assert server.job(done)["metadata"]["retryUntil"] is None


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_a_payload_that_is_damaged_or_gone_starts_nothing(thrifty: Thrifty, how: str) -> None:
    server = thrifty.server
    job_id = thrifty.failed(f"payload-{how}")
    if how == "gone":
        thrifty.payload(job_id).unlink()
    else:
        data = bytearray(thrifty.payload(job_id).read_bytes())
        data[len(data) // 2] ^= 1
        thrifty.payload(job_id).write_bytes(data)
    for _ in range(2):
        answer = retry(server, job_id)
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "PAYLOAD_GONE")
    assert server.job(job_id)["metadata"]["retryUntil"] is None
    assert len(server.client.get("/v1/exports", params={"limit": 1}).json()["jobs"]) == 1
    assert server.client.get("/v1/exports", params={"limit": 1}).json()["jobs"][0]["jobId"] == job_id


def test_the_payload_goes_after_the_retention_and_the_export_stays_failed(tmp_path: Path) -> None:
    house = Thrifty(tmp_path, retention_seconds=2)
    try:
        job_id = house.failed("late")
        events = house.server.events(job_id)
        eventually(lambda: not house.payload(job_id).exists())
        answer = retry(house.server, job_id)
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "PAYLOAD_GONE")
        job = house.server.job(job_id)
        assert (job["status"], job["error"]["code"]) == ("failed", "EMBEDDING_REFUSED")
        assert house.server.events(job_id) == events
        download = house.server.client.get(f"/v1/exports/{job_id}/download")
        assert (download.status_code, download.json()["error"]["code"]) == (409, "ARTIFACT_NOT_READY")
    finally:
        house.server.close()


def test_a_record_is_not_forgotten_before_its_payload(tmp_path: Path) -> None:
    house = Thrifty(tmp_path, history_seconds=1, stray_seconds=1)
    try:
        job_id = house.failed("remembered")
        other = house.server.submit(graph(20_000, name="canceled", lines=12))
        house.server.client.delete(f"/v1/exports/{other}")
        eventually(lambda: house.server.client.get(f"/v1/exports/{other}").status_code == 404)
        assert house.server.job(job_id)["metadata"]["retryUntil"] is not None
        assert house.payload(job_id).exists()
    finally:
        house.server.close()


def test_a_full_queue_refuses_and_the_payload_stays(tmp_path: Path) -> None:
    house = Thrifty(tmp_path, queue_capacity=1)
    server = house.server
    try:
        job_id = house.failed("no-room")
        running = server.submit(large_graph("running"))
        server.wait(running, "job_started")
        waiting = server.submit(graph(name="waiting"))
        answer = retry(server, job_id)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "QUEUE_UNAVAILABLE")
        assert answer.headers["retry-after"]
        assert server.job(job_id)["metadata"]["retryUntil"] is not None
        assert [
            path.name for path in house.payload(job_id).parent.iterdir() if path.name not in (running, waiting)
        ] == [job_id]
        for other in (waiting, running):
            server.client.delete(f"/v1/exports/{other}")
        assert retry(server, job_id).status_code == 202
    finally:
        server.close()


def test_a_job_of_another_client_is_not_there_to_be_started_again(tmp_path: Path) -> None:
    def entry(name: str) -> str:
        digest = hashlib.sha256(f"key-of-{name}".encode()).hexdigest()
        return f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\nscopes = ["export"]\n'

    (tmp_path / "keys.toml").write_text(entry("ann") + entry("bob"))
    house = Thrifty(tmp_path, keys_file=tmp_path / "keys.toml")
    server = house.server
    try:
        mine = {"authorization": "Bearer key-of-ann"}
        job_id = server.post(costly("anns"), **mine).json()["jobId"]
        eventually(lambda: server.job(job_id)["status"] == "failed")
        answer = retry(server, job_id, "key-of-bob")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "JOB_NOT_FOUND")
        # An admin starts it again for its client.
        new_id = retry(server, job_id).json()["jobId"]
        assert server.client.get(f"/v1/exports/{new_id}", headers=mine).json()["metadata"]["client"] == "ann"
        assert retry(server, job_id, "key-of-ann").json()["jobId"] == new_id
    finally:
        server.close()


def test_on_runpod_and_in_a_bucket_it_is_the_same(tmp_path: Path) -> None:
    profiles = tmp_path / "profiles.toml"
    profiles.write_text(CEILING.format(3))
    with s3_server(tmp_path / "s3") as s3, real_workers(s3, tmp_path / "worker", workers="0:1") as platform:
        settings = {"storage_url": f"{s3.url}/here", "stray_seconds": 1, "profiles_file": profiles}
        server = RunpodServer(tmp_path / "root", platform, env=bucket_env(s3), **settings)
        bucket = Bucket(s3, "here")
        try:
            server.start()
            job_id = server.submit(costly("bucket"))
            assert server.ended(job_id)["error"]["code"] == "EMBEDDING_REFUSED"
            time.sleep(2.5)  # sweeps look for what is older than a second, and the store tells whole seconds
            assert bucket.keys("payloads/") == [f"payloads/{job_id}"]
            payload = bucket.read(f"payloads/{job_id}")
            server.stop()
            profiles.write_text(CEILING.format(1_000_000))
            server.start()
            new_id = retry(server, job_id).json()["jobId"]
            assert bucket.keys("payloads/") == [f"payloads/{new_id}"]
            assert bucket.read(f"payloads/{new_id}") == payload
            assert server.ended(new_id)["status"] == "completed"
            assert server.job(job_id)["metadata"]["retriedBy"] == new_id
            bucket.wait_until_gone("payloads/")
        finally:
            bucket.close()
            server.close()
