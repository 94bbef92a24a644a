"""What the control plane adds to a job on Runpod: until the platform has it, and from its result to the client."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "control_plane")]  # servers that the tests start

import sqlalchemy  # noqa: E402
from live_server import graph  # noqa: E402
from postgres import Postgres  # noqa: E402
from processes import COMMAND  # noqa: E402
from runpod_house import RunpodServer, bucket_env  # noqa: E402
from runpod_local import local_runpod  # noqa: E402
from services import s3_server  # noqa: E402

WORKER = [sys.executable, ROOT / "scripts" / "benchmarks" / "instant_worker.py"]


class Overhead(NamedTuple):
    """Seconds of each job, and requests."""

    submitted: list[float]
    """From sending the request until the platform's answer is in the database."""
    ready: list[float]
    """From the worker's result until the client's event stream says ``job_completed``."""
    polls: float
    """Looks at the platform per job."""


class Place(NamedTuple):
    """Where jobs and files lie."""

    database: str
    storage: str
    env: dict[str, str]


@contextmanager
def files(folder: Path) -> Iterator[Place]:
    """SQLite and files."""
    folder.mkdir()
    yield Place(f"sqlite+aiosqlite:///{folder / 'jobs.sqlite'}", (folder / "shared").as_uri(), {})


@contextmanager
def servers(folder: Path) -> Iterator[Place]:
    """PostgreSQL, which waits for its disk, and an S3 server."""
    folder.mkdir()
    with s3_server(folder / "s3") as s3:
        postgres = Postgres(durable=True)
        try:
            yield Place(postgres.start().new_database(), f"{s3.url}/bench", bucket_env(s3))
        finally:
            postgres.close()


def overhead(folder: Path, place: Place, *, jobs: int, hooks: bool, poll: float) -> Overhead:
    """Run tiny jobs one after the other."""
    folder.mkdir()
    body = json.dumps(graph(3)).encode()
    (folder / "graph.json").write_bytes(body)
    export = [sys.executable, COMMAND, "export", folder / "graph.json", "--out", folder / "made"]
    subprocess.run(export, check=True, capture_output=True)
    done = folder / "done"
    done.touch()
    env = {
        **place.env,
        "MEMVID_EXPORT_STORAGE_URL": place.storage,
        "FILES": str(folder / "made"),
        "DONE": str(done),
    }
    with local_runpod(workers="1:1", worker_command=WORKER, env=env, idle_seconds=600) as platform:
        server = RunpodServer(
            folder / "root",
            platform,
            poll=poll,
            hooks=hooks,
            env=place.env,
            database_url=place.database,
            storage_url=place.storage,
        )
        try:
            server.start()
            for _ in range(3):  # all connections are made then
                _run(server, body)
            polls = server.requests("status")
            times = {job: (sent, ready) for job, sent, ready in (_run(server, body) for _ in range(jobs))}
            polls = server.requests("status") - polls
        finally:
            server.close()
    results = {job: float(at) for job, at in (line.split() for line in done.read_text().splitlines())}
    submitted = _submitted(place.database)
    shutil.rmtree(folder)
    return Overhead(
        [submitted[job] - sent for job, (sent, _) in times.items()],
        [ready - results[job] for job, (_, ready) in times.items()],
        polls / jobs,
    )


def _run(server: RunpodServer, body: bytes) -> tuple[str, float, float]:
    """One job: its id, when it was sent, when the client knew that it is ready."""
    sent = time.time()
    job = server.submit(body)
    types = [event["type"] for event in server.stream(job)]
    ready = time.time()
    if types[-1] != "job_completed":
        raise SystemExit(f"a job ended with {types[-1]}:\n{server.job(job)}")
    return job, sent, ready


def _submitted(database: str) -> dict[str, float]:
    """When each job was handed over."""
    engine = sqlalchemy.create_engine(database.replace("+aiosqlite", ""))
    with engine.connect() as connection:
        rows = connection.execute(sqlalchemy.text("SELECT id, submitted_at FROM jobs")).all()
    engine.dispose()
    return {row.id: row.submitted_at / 1000 for row in rows}


def cold_start(folder: Path) -> float:
    """Seconds from a job in the queue of an endpoint without workers until a worker has taken it."""
    payload = folder / "shared" / "payloads" / "job"
    payload.parent.mkdir(parents=True)
    payload.write_text(json.dumps(graph(3)))
    storage = (folder / "shared").as_uri()
    env = {"MEMVID_EXPORT_ROOT": str(folder / "worker"), "MEMVID_EXPORT_STORAGE_URL": storage}
    job = {"job_id": "job", "payload_ref": payload.as_uri(), "output_prefix": f"{storage}/artifacts/job/1/"}
    with local_runpod(workers="0:1", env=env) as platform:
        sent = time.perf_counter()
        runpod_id = platform.run(job)
        while platform.status(runpod_id)["status"] == "IN_QUEUE":
            time.sleep(0.02)
        taken = time.perf_counter() - sent
        platform.wait(runpod_id, "COMPLETED")
    shutil.rmtree(folder)
    return taken
