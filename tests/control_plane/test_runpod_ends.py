"""A platform that never says that a job has ended, and a server that hangs at its own end."""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
from contextlib import closing
from pathlib import Path

from live_server import Server, graph, large_graph
from runpod_house import RunpodServer, bucket_env, eventually
from runpod_local import local_runpod
from services import s3_server
from storage.faulty import Kind, Proxy, Seen, proxy

WORKER = [sys.executable, Path(__file__).with_name("scripted_worker.py")]
DAY_MS = 86_400_000


def test_a_job_that_the_platform_says_runs_for_ever_is_lost_and_tried_once_more(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.touch()

    def attempts(what: str) -> list[int]:
        lines = [json.loads(line) for line in notes.read_text().splitlines()]
        return [line["input"]["attempt"] for line in lines if line["what"] == what]

    with local_runpod(workers="1:1", worker_command=WORKER, env={"NOTES": str(notes)}, ping_seconds=1) as platform:
        server = RunpodServer(tmp_path / "root", platform, storage_url=(tmp_path / "shared").as_uri())
        try:
            job = server.start().submit({**graph(2), "projectName": "hang"})
            server.wait(job, "job_started")
            platform_id = server.runpod_id(job)
            server.kill()
            with closing(sqlite3.connect(server.root / "jobs.sqlite")) as database, database:
                database.execute("update jobs set started_at = started_at - ?", (DAY_MS,))
            assert platform.status(platform_id)["status"] in ("IN_PROGRESS", "RUNNING")
            server.start()
            eventually(lambda: attempts("started") == [1, 2])
            eventually(lambda: attempts("stopped") == [1])
            assert server.runpod_id(job) != platform_id
            eventually(lambda: [event["type"] for event in server.events(job)].count("job_started") == 2)
            server.client.delete(f"/v1/exports/{job}")
        finally:
            server.close()


class Frozen(Proxy):
    """Passes nothing on while it is frozen."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.thawed = threading.Event()
        self.thawed.set()

    def take(self, seen: Seen, body: bytes) -> Kind | None:
        """Wait until it is thawed."""
        self.thawed.wait()
        return super().take(seen, body)


def test_a_server_stops_although_its_storage_does_not_answer(tmp_path: Path) -> None:
    with s3_server(tmp_path / "s3") as s3, proxy(s3.endpoint, Frozen) as store:
        env = {**bucket_env(s3), "AWS_ENDPOINT_URL_S3": store.url}
        server = Server(tmp_path / "root", env=env, storage_url=s3.url, worker_slots=1)
        try:
            job = server.start().submit(large_graph("frozen"))
            server.wait(job, "job_started")
            store.thawed.clear()
            server.stop()  # fails after 30 seconds
            store.thawed.set()
            server.start()
            assert server.wait(job)["type"] == "job_completed"
        finally:
            store.thawed.set()
            server.close()
