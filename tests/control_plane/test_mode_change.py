"""A server that is started again with the other backend brings the jobs of the first one to their end."""

from __future__ import annotations

from pathlib import Path

from live_server import graph, large_graph
from runpod_house import RunpodServer, eventually
from runpod_local import local_runpod


def test_jobs_of_one_backend_are_ended_by_the_other(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    env = {"MEMVID_EXPORT_ROOT": str(tmp_path / "worker"), "MEMVID_EXPORT_STORAGE_URL": shared.as_uri()}
    with local_runpod(workers="1:1", env=env, idle_seconds=120.0) as platform:
        server = RunpodServer(tmp_path / "root", platform, poll=60, storage_url=shared.as_uri(), worker_slots=1)
        try:
            published = server.start().submit(graph(name="published"))
            eventually(lambda: list(shared.rglob(f"{published}/1/*.manifest.json")))
            assert server.job(published)["status"] == "queued"  # it has not heard of it yet
            server.kill()
            server.env["MEMVID_EXPORT_BACKEND_MODE"] = "legacy_vps"
            server.start()
            assert server.wait(published)["type"] == "job_completed"
            assert [event["type"] for event in server.events(published)].count("job_started") == 1
            assert server.client.get(f"/v1/exports/{published}/report").json()["attempts"] == 1

            running = server.submit(large_graph("running"))
            server.wait(running, "job_started")
            waiting = server.submit(graph(name="waiting"))
            server.kill()
            server.env["MEMVID_EXPORT_BACKEND_MODE"] = "runpod_queue"
            server.env["RUNPOD_POLL_INTERVAL_SECONDS"] = "0.2"
            server.start()
            for job, attempts in ((running, 2), (waiting, 1)):
                assert server.wait(job)["type"] == "job_completed"
                assert server.attempts(job) == attempts
                assert server.job(job)["metadata"]["backend"] == "runpod_queue"
        finally:
            server.close()
