"""Exports on Runpod workers, over a bucket: the same for a client as on this machine, and whole whatever happens."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from live_server import Server, graph, large_graph
from processes import COMMAND, EXAMPLE
from runpod_house import Bucket, RunpodServer, bucket_env, eventually, real_workers
from runpod_local import Platform, wait_for
from services import S3, s3_server
from storage.faulty import Proxy, proxy

OWN = {
    "jobId",
    "runpodJobId",
    "traceId",
    "createdAt",
    "updatedAt",
    "expiresAt",
    "downloadUrl",
    "sidecarUrl",
    "manifestUrl",
}
"""Different for every job."""
MEASURED = {"timings", "peakMemoryBytes", "elapsedMs", "lastEventSeq"}
"""Heartbeats are events too."""
PLACES = {"backend", "artifactRef", "payloadRef"}
OF_THE_TIME = {"sha256", "generatedAt", "capsuleSha256", "sidecarSha256"}
"""A capsule tells when it was made."""


class House(NamedTuple):
    """A bucket, a local Runpod with our workers, which reach the bucket through a proxy, and a server before it."""

    s3: S3
    road: Proxy
    platform: Platform
    server: RunpodServer
    bucket: Bucket

    def files(self, job_id: str, *parts: str) -> list[str]:
        """Keys of a job."""
        return [key for key in self.bucket.keys(job_id) if all(part in key for part in parts)]

    def wait_for_three_files(self, job_id: str) -> None:
        """Until nothing is left of a completed job but its capsule, sidecar and manifest."""
        wait_for(lambda: self.files(job_id), lambda found: len(found) == 3)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One for all tests of this module."""
    folder = tmp_path_factory.mktemp("queue")
    with (
        s3_server(folder / "s3") as s3,
        proxy(s3.endpoint) as road,
        real_workers(s3, folder / "workers", workers="2:2", env={"AWS_ENDPOINT_URL_S3": road.url}) as platform,
    ):
        bucket = Bucket(s3, "queue")
        server = RunpodServer(folder / "root", platform, env=bucket_env(s3), storage_url=bucket.url, stray_seconds=3600)
        try:
            server.start()
            yield House(s3, road, platform, server, bucket)
        finally:
            server.close()
            bucket.close()


@pytest.fixture(autouse=True)
def _calm(house: House) -> Iterator[None]:
    yield
    house.platform.clear_faults()


def semantic() -> dict[str, Any]:
    body = graph(40, name="semantic", lines=4)
    body["options"]["semanticEnabled"] = True
    return body


def shape(value: Any, without: frozenset[str]) -> Any:
    """A JSON value with only the types of the values under these keys."""
    if isinstance(value, dict):
        return {k: _types(v) if k in without else shape(v, without) for k, v in value.items()}
    return [shape(each, without) for each in value] if isinstance(value, list) else value


def _types(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _types(each) for key, each in value.items()}
    return "a number" if isinstance(value, int | float) else type(value).__name__


def exported(server: Server, body: dict[str, Any] | bytes, tmp_path: Path) -> dict[str, Any]:
    """All that a client gets of one export."""
    kind = "application/json" if isinstance(body, dict) else "application/x-ndjson"
    answer = server.post(body, content_type=kind)
    assert answer.status_code == 202, answer.text
    job_id = answer.json()["jobId"]
    told = list(server.stream(job_id))
    assert told[-1]["type"] == "job_completed", server.job(job_id)
    assert told == server.events(job_id)
    assert [event["seq"] for event in told] == list(range(1, len(told) + 1))
    get = server.client.get
    job = server.job(job_id)
    capsule, sidecar = get(job["artifact"]["downloadUrl"]), get(job["artifact"]["sidecarUrl"])
    path = tmp_path / server.root.name / job["artifact"]["fileName"]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(capsule.content)
    path.with_name(f"{path.name}.index.v1.sqlite").write_bytes(sidecar.content)
    checked = subprocess.run([sys.executable, COMMAND, "verify", path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    manifest = get(job["artifact"]["manifestUrl"]).json()
    assert hashlib.sha256(capsule.content).hexdigest() == job["artifact"]["sha256"] == manifest["capsuleSha256"]
    assert hashlib.sha256(sidecar.content).hexdigest() == manifest["sidecarSha256"]
    part = get(job["artifact"]["downloadUrl"], headers={"range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, capsule.content[100:200])
    query = {"query": "call_1 storage", "limit": 5, "locator": {"jobId": job_id}}
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "text_search", "arguments": query}}
    accept = {"accept": "application/json, text/event-stream"}
    found = json.loads(get_text(server.client.post("/mcp", json=call, headers=accept)))
    names = ("content-type", "content-disposition", "accept-ranges", "x-capsule-part")
    return {
        "created": answer.json(),
        "events": [{**event, "seq": 0, "ts": "", "jobId": ""} for event in told if event["type"] != "stage_heartbeat"],
        "job": job,
        "report": get(f"/v1/exports/{job_id}/report").json(),
        "manifest": manifest,
        "headers": [{name: each.headers.get(name) for name in names} for each in (capsule, sidecar, part)],
        "hits": found["result"]["items"],
        "envelope": sorted(found),
    }


def get_text(answer: Any) -> str:
    """The text of a tool's answer, as JSON or as an event stream."""
    assert answer.status_code == 200, answer.text
    lines = [line[5:] for line in answer.text.splitlines() if line.startswith("data:")]
    result = json.loads(lines[-1] if lines else answer.text)["result"]
    assert not result.get("isError"), result
    return str(result["content"][0]["text"])


@pytest.mark.parametrize("name", ["tiny", "the example", "with vectors"])
def test_a_client_gets_the_same_of_an_export_whichever_backend_ran_it(
    house: House, server: Server, tmp_path: Path, name: str
) -> None:
    body: dict[str, Any] | bytes = {
        "tiny": lambda: graph(5, name="tiny"),
        "the example": EXAMPLE.read_bytes,
        "with vectors": semantic,
    }[name]()
    here, there = exported(server, body, tmp_path), exported(house.server, body, tmp_path)

    assert here["report"]["capsule"]["contentDigest"] == there["report"]["capsule"]["contentDigest"]
    steps = [[(event["type"], event["stage"]) for event in each["events"]] for each in (here, there)]
    assert steps[0] == steps[1]
    assert here["events"] == there["events"]
    assert [each["job"]["metadata"].pop("runpodJobId") is None for each in (here, there)] == [True, False]
    loose = frozenset(OWN | MEASURED | PLACES | OF_THE_TIME)
    for what in ("created", "job", "report", "manifest"):
        assert shape(here[what], loose) == shape(there[what], loose)
    assert (here["report"]["backend"], there["report"]["backend"]) == ("legacy_vps", "runpod_queue")
    assert here["report"]["input"] == there["report"]["input"]
    assert here["headers"] == there["headers"]
    assert here["hits"] == there["hits"] != []
    assert here["envelope"] == there["envelope"]


def test_a_finished_job_has_its_three_files_in_the_bucket_and_nothing_else(house: House) -> None:
    job = house.server.submit(graph(5, name="three"))
    assert house.server.wait(job)["type"] == "job_completed"
    house.wait_for_three_files(job)
    names = [key.rpartition("/")[2] for key in house.files(job)]
    capsule = house.server.job(job)["artifact"]["fileName"]
    assert names == [capsule, f"{capsule}.index.v1.sqlite", f"{capsule}.manifest.json"]
    assert all(key.startswith(f"artifacts/{job}/1/") for key in house.files(job))


# --- errors ---------------------------------------------------------------------------------------------


def test_a_payload_that_changes_after_it_was_accepted_fails_the_job_at_once(house: House) -> None:
    house.platform.fault("no-workers", match="nobody")
    job = house.server.submit(graph(5, name="swapped"))
    there = house.server.runpod_id(job)
    payload = house.bucket.read(f"payloads/{job}")
    house.bucket.write(f"payloads/{job}", payload.replace(b"call_1", b"call_9"))
    house.platform.clear_faults()
    ended = house.server.ended(job)
    assert (ended["status"], ended["error"]["code"], ended["error"]["retryable"]) == (
        "failed",
        "PAYLOAD_MISMATCH",
        False,
    )
    assert house.server.attempts(job) == 1
    assert house.platform.status(there)["status"] == "FAILED"
    eventually(lambda: house.files(job) == [f"payloads/{job}"])
    assert house.server.client.get(f"/v1/exports/{job}/download").status_code == 409


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("payload_ref", "s3://another-bucket/payload", "INVALID_REF"),
        ("payload_ref", "https://10.0.0.1/payload", "INVALID_REF"),
        ("payload_ref", "file:///etc/passwd", "INVALID_REF"),
        ("payload_ref", "s3://exports/queue/missing", "OBJECT_MISSING"),
        ("payload_sha256", "0" * 64, "PAYLOAD_MISMATCH"),
        ("payload_size", 1, "PAYLOAD_MISMATCH"),
        ("output_prefix", "s3://another-bucket/out/", "INVALID_REF"),
        ("schema_version", "gitnexus.export.schema.v9", "INVALID_EXPORT_REQUEST"),
        ("embedding_model", "unknown", "INVALID_EXPORT_REQUEST"),
        ("options", {"unknown": 1}, "INVALID_EXPORT_REQUEST"),
    ],
)
def test_an_input_that_cannot_be_run_fails_with_a_code_and_the_field_and_no_retry(
    house: House, field: str, value: object, code: str
) -> None:
    payload = json.dumps(graph(2, name="direct")).encode()
    house.bucket.write("direct", payload)
    given: dict[str, object] = {
        "job_id": "direct",
        "payload_ref": f"{house.bucket.url}/direct",
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
        "payload_size": len(payload),
        "output_prefix": f"{house.bucket.url}/out-{field}-{code}/1/",
        field: value,
    }
    ended = house.platform.wait(house.platform.run(given))
    assert ended["status"] == "FAILED"
    error = json.loads(ended["error"])
    assert (error["code"], error["retryable"]) == (code, False)
    assert error["details"]["field"].startswith(field) or code == "PAYLOAD_MISMATCH"


def test_a_store_that_fails_for_a_while_costs_an_attempt_and_not_the_job(house: House) -> None:
    house.road.fault("503", "PUT", ".mv2", times=6)
    job = house.server.submit(graph(5, name="stormy"))
    ended = house.server.ended(job)
    assert ended["status"] == "completed", ended["error"]
    report = house.server.client.get(f"/v1/exports/{job}/report").json()
    assert report["attempts"] > 1
    house.wait_for_three_files(job)
    assert all(key.startswith(f"artifacts/{job}/{report['attempts']}/") for key in house.files(job))
    started = [event for event in house.server.events(job) if event["type"] == "job_started"]
    assert len(started) == report["attempts"]


# --- what the platform loses ------------------------------------------------------------------------------


def test_a_result_without_output_is_made_good_by_the_manifest(house: House) -> None:
    house.platform.fault("no-output")
    job = house.server.submit(graph(5, name="no-output"))
    assert house.server.wait(job)["type"] == "job_completed"
    assert "output" not in house.platform.status(house.server.runpod_id(job))
    assert house.server.attempts(job) == 1
    assert house.server.client.get(f"/v1/exports/{job}/download").status_code == 200


def test_a_job_that_the_platform_forgot_with_its_result_is_complete_by_its_manifest(house: House) -> None:
    house.platform.fault("forgotten-result")
    job = house.server.submit(graph(5, name="forgotten"))
    assert house.server.wait(job)["type"] == "job_completed"
    assert house.platform.status(house.server.runpod_id(job)) == {}
    assert house.server.attempts(job) == 1
    steps = [event["stage"] for event in house.server.events(job)]
    assert steps[-1] == "download_ready"


def test_progress_that_comes_after_the_result_changes_nothing(house: House) -> None:
    house.platform.fault("late-progress", count=1)
    job = house.server.submit(graph(800, name="late", lines=4))
    events = list(house.server.stream(job))
    assert events[-1]["type"] == "job_completed"
    assert [event["progress"] for event in events] == sorted(event["progress"] for event in events)
    assert house.server.attempts(job) == 1


def test_a_worker_that_dies_at_work_costs_an_attempt_and_not_the_job(house: House) -> None:
    job = house.server.submit(large_graph("dies", 8_000))
    house.server.wait(job, "job_started")
    house.platform.fault("worker-death", match=house.server.runpod_id(job))
    ended = house.server.ended(job)
    assert ended["status"] == "completed", ended["error"]
    house.wait_for_three_files(job)
    assert len({key.rsplit("/", 1)[0] for key in house.files(job)}) == 1
    assert [event["type"] for event in house.server.events(job)].count("job_completed") == 1


# --- once -------------------------------------------------------------------------------------------------


def test_a_job_that_is_delivered_to_two_workers_is_run_by_one(house: House) -> None:
    eventually(lambda: house.platform.health()["workers"]["idle"] == 2)
    before = house.platform.struck().get("delivered-twice", 0)
    house.platform.fault("delivered-twice")
    job = house.server.submit(large_graph("twice", 3_000))
    ended = house.server.ended(job)
    assert ended["status"] == "completed", ended["error"]
    assert house.platform.struck()["delivered-twice"] == before + 1
    assert house.server.attempts(job) == 1
    house.wait_for_three_files(job)
    assert [event["type"] for event in house.server.events(job)].count("job_started") == 1


def test_a_job_that_is_delivered_again_after_its_end_keeps_its_files(house: House) -> None:
    house.platform.fault("delivered-again")
    job = house.server.submit(graph(5, name="again"))
    assert house.server.wait(job)["type"] == "job_completed"
    eventually(lambda: house.platform.health()["workers"]["running"] == 0)
    artifact = house.server.job(job)["artifact"]
    house.wait_for_three_files(job)
    capsule = house.server.client.get(artifact["downloadUrl"]).content
    assert hashlib.sha256(capsule).hexdigest() == artifact["sha256"]


def test_a_capsule_that_differs_from_its_manifest_is_not_a_success(house: House) -> None:
    house.platform.fault("http-500", route="status", probability=1)
    job = house.server.submit(graph(5, name="flipped"))
    manifest = eventually(lambda: house.files(job, ".manifest.json"))[0]
    capsule = manifest.removesuffix(".manifest.json")
    data = bytearray(house.bucket.read(capsule))
    data[len(data) // 2] ^= 1
    house.bucket.write(capsule, bytes(data))
    house.platform.clear_faults()
    ended = house.server.ended(job)
    assert ended["status"] == "completed", ended["error"]
    assert house.server.attempts(job) == 2
    assert any("SHA-256" in event["message"] for event in house.server.events(job))
    content = house.server.client.get(ended["artifact"]["downloadUrl"]).content
    assert hashlib.sha256(content).hexdigest() == ended["artifact"]["sha256"]
    house.wait_for_three_files(job)
    assert all(key.startswith(f"artifacts/{job}/2/") for key in house.files(job))


# --- cancel -----------------------------------------------------------------------------------------------


def test_a_cancel_ends_the_run_removes_all_files_and_frees_the_worker(house: House) -> None:
    job = house.server.submit(large_graph("canceled"))
    house.server.wait(job, "job_started")
    there = house.server.runpod_id(job)
    assert house.server.client.delete(f"/v1/exports/{job}").json()["status"] == "canceled"
    assert house.platform.wait(there)["status"] == "CANCELLED"
    eventually(lambda: house.platform.health()["workers"]["running"] == 0)
    house.bucket.wait_until_gone(job)
    assert house.server.events(job)[-1]["type"] == "job_canceled"
    after = house.server.submit(graph(5, name="after"))
    assert house.server.wait(after)["type"] == "job_completed"
    eventually(lambda: house.files(job) == [])  # the run closed its claim once more as it was stopped
    assert house.server.job(job)["status"] == "canceled"


# --- restarts ---------------------------------------------------------------------------------------------


def restart(server: Server) -> None:
    server.kill()
    server.start()


def test_a_server_killed_before_its_job_reached_the_platform_hands_it_over_after_its_restart(house: House) -> None:
    house.platform.fault("http-500", route="run", probability=1)
    job = house.server.submit(graph(5, name="before"))
    eventually(lambda: house.server.requests("run") and house.server.attempts(job) == 1)
    house.server.kill()
    house.platform.clear_faults()
    house.server.start()
    assert house.server.ended(job)["status"] == "completed"
    assert house.server.attempts(job) == 1
    house.wait_for_three_files(job)


def test_a_server_killed_before_it_heard_that_its_job_was_taken_hands_it_over_again_and_gets_one_result(
    house: House,
) -> None:
    struck = house.platform.struck().get("http-500-after", 0)
    house.platform.fault("http-500-after", route="run")
    job = house.server.submit(graph(5, name="unheard"))
    eventually(lambda: house.platform.struck().get("http-500-after", 0) > struck)
    house.server.kill()  # at once: a server that dies as it completes a job leaves the claim to the sweep
    manifest = eventually(lambda: house.files(job, ".manifest.json"))
    house.server.start()
    assert house.server.ended(job)["status"] == "completed"
    house.wait_for_three_files(job)
    assert house.files(job, ".manifest.json") == manifest
    assert [event["type"] for event in house.server.events(job)].count("job_completed") == 1


def test_a_server_killed_while_its_job_runs_follows_it_after_its_restart(house: House) -> None:
    job = house.server.submit(large_graph("followed", 8_000))
    house.server.wait(job, "job_started")
    there = house.server.runpod_id(job)
    restart(house.server)
    ended = house.server.ended(job)
    assert (ended["status"], ended["metadata"]["runpodJobId"]) == ("completed", there)
    assert house.server.attempts(job) == 1
    events = house.server.events(job)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["type"] for event in events].count("job_started") == 1


def test_a_result_that_comes_while_no_server_is_up_is_found_after_its_restart(house: House) -> None:
    job = house.server.submit(large_graph("alone", 3_000))
    there = house.server.runpod_id(job)
    house.server.kill()
    assert house.platform.wait(there)["status"] == "COMPLETED"
    house.server.start()
    assert house.server.ended(job)["status"] == "completed"
    assert house.server.attempts(job) == 1
    stages = list(dict.fromkeys(event["stage"] for event in house.server.events(job)))
    assert stages == [
        "queued",
        "transform",
        "frame_prep",
        "write_capsule",
        "build_sidecar",
        "finalize",
        "download_ready",
    ]


def test_a_server_that_is_stopped_leaves_its_job_to_the_platform(house: House) -> None:
    job = house.server.submit(large_graph("left", 3_000))
    house.server.wait(job, "job_started")
    assert house.server.stop() == 0
    house.server.start()
    assert house.server.ended(job)["status"] == "completed"
    assert house.server.attempts(job) == 1


def test_nothing_lies_in_the_bucket_that_no_job_speaks_for(house: House) -> None:
    def ids(status: str) -> set[str]:
        page = house.server.client.get("/v1/exports", params={"status": status, "limit": 200}).json()
        return {job["jobId"] for job in page["jobs"]}

    wanted, kept = ids("completed"), {f"payloads/{job}" for job in ids("failed")}

    def strays() -> list[str]:
        keys = [key for key in house.bucket.keys("/") if key.startswith(("payloads/", "artifacts/"))]
        keys = [key for key in keys if key not in kept]
        return [key for key in keys if key.split("/")[1] not in wanted or key.endswith(("claim.json", "renewed.json"))]

    eventually(lambda: not strays(), seconds=15)
