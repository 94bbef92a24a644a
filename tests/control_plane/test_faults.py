"""A short form of the campaign of ``scripts/faults``."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from faults import SERVER_KILLED, SERVER_STOPPED, WORKER_KILLED, run
from live_server import Server, graph, large_graph


@pytest.mark.parametrize("faults", [[SERVER_KILLED] * 5, [SERVER_STOPPED] * 2, [WORKER_KILLED] * 2])
def test_faults_at_random_moments_break_no_promise(tmp_path: Path, faults: list[str]) -> None:
    outcomes = run(tmp_path / "root", faults, seed=7)
    assert [what for outcome in outcomes for what in outcome.broken] == []


def test_a_stopped_server_puts_its_running_job_back_and_the_next_one_ends_it(start_server: Any) -> None:
    server = start_server(worker_slots=1, max_attempts=1)
    running = server.submit(large_graph("goes-on", 8_000))
    server.wait(running, "job_started")
    waiting = server.submit(graph(name="waits"))
    server.stop()
    server.start()
    for job_id in (running, waiting):
        assert server.wait(job_id)["type"] == "job_completed"
    assert server.client.get(f"/v1/exports/{running}/report").json()["attempts"] == 2
    kinds = [event["type"] for event in server.events(running)]
    assert kinds.count("job_started") == 2


def test_a_job_whose_attempts_are_all_lost_fails_with_an_error_that_says_try_again(start_server: Any) -> None:
    server = start_server(worker_slots=1, max_attempts=2)
    job_id = server.submit(large_graph("poison"))
    for _ in range(2):
        server.wait(job_id, "job_started")
        for event in server.stream(job_id, since=server.job(job_id)["lastEventSeq"]):
            if event["type"] == "stage_progress" and event["stage"] != "queued":
                break
        server.kill()
        server.start()
    assert server.wait(job_id)["type"] == "job_failed"
    error = server.job(job_id)["error"]
    assert (error["code"], error["retryable"]) == ("WORKER_LOST", True)


def test_a_result_that_was_published_but_not_recorded_is_taken_up(start_server: Any) -> None:
    server = start_server(worker_slots=1)
    job_id = server.submit(graph(name="published"))
    server.wait(job_id)
    before = server.client.get(f"/v1/exports/{job_id}/download").content
    server.kill()
    # As if the server had died between the worker's answer and its own commit.
    with sqlite3.connect(server.root / "jobs.sqlite") as database:
        last = database.execute("select max(seq) from events where job_id = ?", (job_id,)).fetchone()[0]
        database.execute("delete from events where job_id = ? and seq = ?", (job_id, last))
        database.execute(
            "update jobs set status = 'running', stage = 'finalize', progress = 96, last_seq = ?, output = null,"
            " manifest = null, finished_at = null, expires_at = null where id = ?",
            (last - 1, job_id),
        )
    database.close()
    server.start()
    assert server.wait(job_id)["type"] == "job_completed"
    assert [event["type"] for event in server.events(job_id)].count("job_started") == 1
    assert server.client.get(f"/v1/exports/{job_id}/download").content == before


def test_a_job_that_waits_for_its_next_attempt_is_run_by_a_server_that_nobody_asks_anything(start_server: Any) -> None:
    server = start_server(worker_slots=1)
    before = server.submit(large_graph("before"))
    server.wait(before, "job_started")
    job_id = server.submit(graph(name="waits"))
    server.kill()
    with closing(sqlite3.connect(server.root / "jobs.sqlite")) as database, database:
        database.execute("update jobs set status = 'canceled' where id = ?", (before,))
        soon = int(time.time() * 1000) + 3_000
        database.execute("update jobs set available_at = ? where id = ? and status = 'queued'", (soon, job_id))
        assert database.execute("select changes()").fetchone() == (1,)
    server.start()
    assert server.wait(job_id)["type"] == "job_completed"


def test_a_damaged_manifest_of_an_attempt_whose_server_was_killed_costs_that_attempt(start_server: Any) -> None:
    server = start_server(worker_slots=1)
    job_id = server.submit(large_graph("damaged", 8_000))
    server.wait(job_id, "job_started")
    server.kill()
    folder = server.root / "artifacts" / job_id / "1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "damaged.mv2.manifest.json").write_bytes(b"{\x00")
    server.start()
    assert server.wait(job_id)["type"] == "job_completed"
    waits = [event["message"] for event in server.events(job_id) if event["stage"] == "queued"]
    assert "the manifest is damaged" in waits[-1]
    assert server.client.get(f"/v1/exports/{job_id}/report").json()["attempts"] == 2


def test_one_root_takes_one_server(start_server: Any, tmp_path: Path) -> None:
    server = start_server(worker_slots=1)
    second = Server(server.root, worker_slots=1)
    with pytest.raises(RuntimeError, match="MEMVID_EXPORT_ROOT must be used by one server at a time"):
        second.start()
    second.close()
