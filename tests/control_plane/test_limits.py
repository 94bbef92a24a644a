"""Cancel, deadline, memory, sizes, retention: a job never takes more than it may, nor stands in another's way."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from left_behind import child_pids
from live_server import Server, graph, large_graph


def _gapless(events: list[dict[str, Any]], last: str) -> None:
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["progress"] for event in events] == sorted(event["progress"] for event in events)
    assert [
        event["type"] for event in events if event["type"].startswith("job_") and event["type"] != "job_started"
    ] == [last]
    assert events[-1]["type"] == last


def _workers(server: Server) -> set[int]:
    """All processes below the server."""
    found: set[int] = set()
    waiting = [server.pid]
    while waiting:
        pid = waiting.pop()
        children = child_pids(pid)
        found.update(children)
        waiting += children
    return found


def test_a_queued_job_can_be_canceled(start_server: Any) -> None:
    server = start_server(worker_slots=1)
    running = server.submit(large_graph("first"))
    server.wait(running, "job_started")
    queued = server.submit(graph(name="second"))
    canceled = server.client.delete(f"/v1/exports/{queued}")
    assert canceled.status_code == 200
    assert canceled.json()["status"] == "canceled"
    assert server.client.delete(f"/v1/exports/{queued}").json()["status"] == "canceled"
    _gapless(server.events(queued), "job_canceled")
    assert [event["type"] for event in server.events(queued)] == ["stage_progress", "job_canceled"]
    refused = server.client.get(f"/v1/exports/{queued}/download")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "ARTIFACT_NOT_READY")
    assert not (server.root / "staging" / "payloads" / queued).exists()
    server.client.delete(f"/v1/exports/{running}")


def test_a_running_job_can_be_canceled_and_leaves_nothing(start_server: Any) -> None:
    server = start_server(worker_slots=1)
    running = server.submit(large_graph("running"))
    server.wait(running, "job_started")
    answer = server.client.delete(f"/v1/exports/{running}").json()
    assert (answer["status"], answer["currentStage"], answer["artifact"]) == ("canceled", "canceled", None)
    # DELETE answers when the worker is gone: nothing of the job is left, now or later.
    assert not (server.root / "artifacts" / running).exists()
    assert not list((server.root / "scratch").iterdir())
    assert server.wait(server.submit(graph(name="next")))["type"] == "job_completed"
    _gapless(server.events(running), "job_canceled")
    report = server.client.get(f"/v1/exports/{running}/report").json()
    assert (report["status"], report["attempts"]) == ("canceled", 1)


def test_a_finished_job_answers_a_cancel_with_its_state(server: Server) -> None:
    job_id = server.submit(graph(name="finished"))
    server.wait(job_id)
    assert server.client.delete(f"/v1/exports/{job_id}").json()["status"] == "completed"
    assert server.client.get(f"/v1/exports/{job_id}/download").status_code == 200


def test_a_job_past_its_deadline_fails_and_says_so(start_server: Any) -> None:
    server = start_server(deadline_seconds=0.3, worker_slots=1)
    job_id = server.submit(large_graph("late"))
    event = server.wait(job_id)
    assert event["type"] == "job_failed"
    error = server.job(job_id)["error"]
    assert (error["code"], error["retryable"]) == ("DEADLINE_EXCEEDED", True)
    assert "0.3 seconds" in error["message"]
    _gapless(server.events(job_id), "job_failed")
    assert not list((server.root / "scratch").iterdir())


def test_a_job_that_wants_too_much_memory_fails_and_the_server_goes_on(start_server: Any) -> None:
    server = start_server(worker_memory_bytes=256 << 20, worker_slots=1)
    job_id = server.submit(large_graph("hungry", 50_000))
    assert server.wait(job_id)["type"] == "job_failed"
    error = server.job(job_id)["error"]
    assert (error["code"], error["retryable"]) == ("OUT_OF_MEMORY", False)
    _gapless(server.events(job_id), "job_failed")
    refused = server.post(large_graph("starving", 120_000))
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")
    assert server.wait(server.submit(graph(2, name="small")))["type"] == "job_completed"


def test_a_small_job_does_not_wait_behind_large_ones(start_server: Any) -> None:
    server = start_server(worker_slots=2, small_job_frames=1_000)
    large = [server.submit(large_graph(f"large{n}", 40_000)) for n in range(2)]
    server.wait(large[0], "job_started")
    small = server.submit(graph(3, name="small"))
    assert server.wait(small)["type"] == "job_completed"
    assert [server.job(job_id)["status"] for job_id in large] == ["running", "queued"]
    for job_id in reversed(large):
        server.client.delete(f"/v1/exports/{job_id}")


def test_files_expire_and_the_record_stays_for_a_while(start_server: Any) -> None:
    server = start_server(retention_seconds=1, history_seconds=2)
    job_id = server.submit(graph(name="old"))
    server.wait(job_id)
    events = server.events(job_id)
    for _ in range(400):
        if server.job(job_id)["status"] == "expired":
            break
        server.client.get("/healthz")
    else:
        pytest.fail("the job did not expire")
    for kind in ("download", "sidecar", "manifest"):
        gone = server.client.get(f"/v1/exports/{job_id}/{kind}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "JOB_EXPIRED")
    job = server.job(job_id)
    assert (job["currentStage"], job["artifact"], job["progress"]) == ("expired", None, 100)
    assert server.events(job_id) == events
    assert list(server.stream(job_id)) == events
    assert server.client.get(f"/v1/exports/{job_id}/report").json()["status"] == "expired"
    assert not (server.root / "artifacts" / job_id).exists()


def test_a_heartbeat_comes_while_nothing_else_is_said(start_server: Any) -> None:
    server = start_server(worker_slots=1)
    job_id = server.submit(large_graph("beats"))
    server.wait(job_id, "job_started")
    workers = _workers(server)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    beat = server.wait(job_id, "stage_heartbeat")
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    assert beat["type"] == "stage_heartbeat"
    assert beat["message"].startswith("Still at work after")
    assert server.wait(job_id)["type"] == "job_completed"
    _gapless(server.events(job_id), "job_completed")


def test_workers_die_with_a_server_that_is_killed(start_server: Any) -> None:
    server = start_server(worker_slots=1)
    job_id = server.submit(large_graph("orphans"))
    server.wait(job_id, "job_started")
    workers = _workers(server)
    assert workers
    server.kill()
    for pid in workers:
        _wait_until_gone(pid)
    with sqlite3.connect(f"file:{server.root}/jobs.sqlite?mode=ro", uri=True) as database:
        assert database.execute("select status from jobs").fetchone() == ("running",)
    database.close()


def _wait_until_gone(pid: int) -> None:
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.025)
    pytest.fail(f"process {pid} outlives its server")
