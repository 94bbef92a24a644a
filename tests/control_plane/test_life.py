"""The whole life of an export over HTTP."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import zstandard
from live_server import Server, graph, large_graph
from runpod_house import eventually

STAGES = ["queued", "transform", "frame_prep", "write_capsule", "build_sidecar", "finalize", "download_ready"]


def test_an_export_goes_from_post_to_files_that_fit_together(server: Server, tmp_path: Path) -> None:
    created = server.post(graph(5, name="life"))
    assert created.status_code == 202
    body = created.json()
    assert set(body) == {"jobId", "status", "progress", "currentStage", "stageProgress", "message", "createdAt"}
    assert (body["status"], body["progress"]) == ("queued", 0)
    job_id = body["jobId"]

    events = list(server.stream(job_id))
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["progress"] for event in events] == sorted(event["progress"] for event in events)
    assert events[-1]["type"] == "job_completed"
    assert events[-1]["progress"] == 100
    seen = list(dict.fromkeys(event["stage"] for event in events))
    assert seen == [stage for stage in STAGES if stage in seen]
    assert {"queued", "transform", "write_capsule", "finalize", "download_ready"} <= set(seen)
    assert all(event["emoji"] and event["message"] and event["jobId"] == job_id for event in events)

    job = server.job(job_id)
    assert (job["status"], job["progress"], job["currentStage"]) == ("completed", 100, "download_ready")
    assert job["lastEventSeq"] == len(events)
    assert job["error"] is None
    assert job["metadata"]["backend"] == "legacy_vps"
    artifact = job["artifact"]
    assert artifact["fileName"] == f"life-gitnexus-mem_capsule-{job['createdAt'][:10]}.mv2"

    capsule = server.client.get(artifact["downloadUrl"]).content
    assert len(capsule) == artifact["sizeBytes"]
    assert hashlib.sha256(capsule).hexdigest() == artifact["sha256"]
    manifest = server.client.get(artifact["manifestUrl"]).json()
    assert manifest["parts"][0]["sha256"] == artifact["sha256"]
    sidecar = server.client.get(artifact["sidecarUrl"]).content
    assert hashlib.sha256(sidecar).hexdigest() == manifest["sidecarSha256"]
    (tmp_path / "sidecar.sqlite").write_bytes(sidecar)
    with sqlite3.connect(tmp_path / "sidecar.sqlite") as database:
        assert database.execute("pragma quick_check").fetchone() == ("ok",)
    database.close()

    report = server.client.get(f"/v1/exports/{job_id}/report").json()
    assert report["jobId"] == job_id
    assert (report["status"], report["backend"], report["attempts"]) == ("completed", "legacy_vps", 1)
    assert (report["input"]["nodes"], report["input"]["relationships"]) == (5, 5)
    assert report["capsule"]["sha256"] == artifact["sha256"]
    assert report["timings"]["total"] > 0


def test_real_graphs_go_through_without_an_edit(server: Server, real_graphs: dict[str, Path]) -> None:
    for name, path in real_graphs.items():
        if "litestar" in name:
            continue
        kind = "application/x-ndjson" if "ndjson" in name else "application/json"
        answer = server.post(path.read_bytes(), content_type=kind)
        assert answer.status_code == 202, (name, answer.text)
        job_id = answer.json()["jobId"]
        assert server.wait(job_id)["type"] == "job_completed", (name, server.job(job_id)["error"])
        report = server.client.get(f"/v1/exports/{job_id}/report").json()
        assert report["input"]["bytes"] == path.stat().st_size
        assert report["input"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_report_of_an_export_that_has_not_run_shows_what_came_in(start_server: Any) -> None:
    server = start_server(worker_slots=1)
    running = server.submit(large_graph("before"))
    server.wait(running, "job_started")
    job_id = server.submit(graph(5, name="waiting", fileContents={"src/a.py": "a = 1"}))
    queued = server.client.get(f"/v1/exports/{job_id}/report").json()
    server.client.delete(f"/v1/exports/{job_id}")
    canceled = server.client.get(f"/v1/exports/{job_id}/report").json()
    server.client.delete(f"/v1/exports/{running}")
    assert (queued["status"], canceled["status"]) == ("queued", "canceled")
    for report in (queued, canceled):
        counts = {name: report["input"][name] for name in ("nodes", "relationships", "files")}
        assert counts == {"nodes": 5, "relationships": 5, "files": 1}


def _write(server: Server, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(server.root / "jobs.sqlite", timeout=30)) as database, database:
        database.execute(statement, values)


@pytest.mark.parametrize("moment", [-(10**15), 1 << 60, "noon"])
def test_an_event_whose_time_is_damaged_hides_no_other(server: Server, moment: object) -> None:
    job_id = server.submit(graph(name="timeless"))
    server.wait(job_id)
    whole = server.events(job_id)
    _write(server, "UPDATE events SET ts = ? WHERE job_id = ? AND seq = 1", moment, job_id)
    damaged = [{**whole[0], "ts": "1970-01-01T00:00:00.000Z"}, *whole[1:]]
    assert server.events(job_id) == damaged
    assert list(server.stream(job_id)) == damaged
    assert server.client.get(f"/v1/exports/{job_id}/report").status_code == 200


def test_a_report_that_is_damaged_is_said_to_be(server: Server) -> None:
    job_id = server.submit(graph(name="unreported"))
    server.wait(job_id)
    _write(server, "UPDATE jobs SET output = json_set(output, '$.metrics.status', 'maybe') WHERE id = ?", job_id)
    answer = server.client.get(f"/v1/exports/{job_id}/report")
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "ARTIFACT_MISSING")
    assert server.client.get(f"/v1/exports/{job_id}/download").status_code == 200


def test_a_semantic_export_has_vectors(server: Server) -> None:
    job_id = server.submit(graph(4, name="semantic", options={"semanticEnabled": True}))
    assert server.wait(job_id)["type"] == "job_completed"
    report = server.client.get(f"/v1/exports/{job_id}/report").json()
    assert (report["capsule"]["vectors"], report["capsule"]["dimension"]) == (4, 256)
    assert (report["embedding"]["provider"], report["embedding"]["texts"]) == ("static", 4)


def test_all_files_of_a_payload_are_gone_when_the_job_has_ended(server: Server) -> None:
    job_id = server.submit(graph(name="clean"))
    server.wait(job_id)
    # Files are removed after the terminal event is out: the next job's end comes later.
    server.wait(server.submit(graph(name="clean-too")))
    assert not (server.root / "staging" / "payloads" / job_id).exists()
    assert not list((server.root / "scratch").iterdir())


def test_jobs_are_listed_by_pages_and_by_status(server: Server) -> None:
    ids = [server.submit(graph(name=f"list{n}")) for n in range(3)]
    for job_id in ids:
        server.wait(job_id)
    found: list[str] = []
    cursor = None
    while True:
        page = server.client.get("/v1/exports", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        assert len(page["jobs"]) <= 2
        found += [job["jobId"] for job in page["jobs"]]
        cursor = page["nextCursor"]
        if cursor is None:
            break
    assert len(found) == len(set(found))
    assert [job_id for job_id in found if job_id in ids] == ids[::-1]
    done = server.client.get("/v1/exports", params={"status": "completed", "limit": 200}).json()["jobs"]
    assert {job["status"] for job in done} == {"completed"}
    assert set(ids) <= {job["jobId"] for job in done}


def test_operations_tell_the_truth(server: Server) -> None:
    server.wait(server.submit(graph(name="ops")))
    assert server.client.get("/healthz").json()["ok"] is True
    ready = server.client.get("/readyz").json()
    parts = ("database", "root", "storage", "disk", "worker", "tasks")
    assert ready == {"ok": True, "checks": dict.fromkeys(parts, "ok"), "notes": {"keys": "ok"}}
    figures = server.client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in figures.splitlines() if not line.startswith("#"))
    assert float(lines['memvid_export_jobs{status="completed"}']) >= 1
    assert float(lines["memvid_export_queue_depth"]) == 0
    assert float(lines["memvid_export_queue_delay_seconds_count"]) >= 1


def test_not_ready_is_said_while_the_root_cannot_be_written(server: Server) -> None:
    scratch = server.root / "scratch"
    moved = scratch.rename(server.root / "scratch-away")
    try:
        answer = eventually(lambda: None if (found := server.client.get("/readyz")).is_success else found)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "QUEUE_UNAVAILABLE"
        assert answer.json()["error"]["details"]["checks"]["root"].startswith("cannot be written")
        assert server.client.get("/healthz").status_code == 200
    finally:
        moved.rename(scratch)


@pytest.mark.parametrize("encoding", ["identity", "zstd"])
def test_bodies_may_be_plain_or_zstd(server: Server, encoding: str) -> None:
    data = json.dumps(graph(name=encoding)).encode()
    body = zstandard.compress(data) if encoding == "zstd" else data
    answer = server.post(body, content_encoding=encoding)
    assert answer.status_code == 202, answer.text
    assert server.wait(answer.json()["jobId"])["type"] == "job_completed"
