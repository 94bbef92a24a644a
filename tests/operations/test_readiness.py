"""``/readyz`` says what is wrong, in bounded time, whatever hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from left_behind import child_pids
from live_server import Server, graph
from processes import COMMAND, free_port, running
from runpod_house import bucket_env, eventually
from services import BUCKET, s3_server
from storage.faulty import Kind, Proxy, Seen, proxy

from control_plane.operations.health import Health

CHECKS = {"database", "root", "storage", "disk", "worker", "tasks"}


class Frozen(Proxy):
    """Passes nothing on while it is frozen, and takes no object while it is read-only."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.thawed = threading.Event()
        self.thawed.set()
        self.read_only = False

    def take(self, seen: Seen, body: bytes) -> Kind | None:
        """Wait until it is thawed."""
        self.thawed.wait()
        super().take(seen, body)
        return "500" if self.read_only and seen.method == "PUT" else None


def wrong(server: Server) -> dict[str, str]:
    """The checks that fail; the answer says the same by its status."""
    answer = server.client.get("/readyz")
    checks = answer.json()["error"]["details"]["checks"] if answer.status_code == 503 else answer.json()["checks"]
    assert set(checks) == CHECKS
    found = {name: said for name, said in checks.items() if said != "ok"}
    assert answer.status_code == (503 if found else 200)
    return found


def test_a_storage_that_hangs_refuses_writes_or_goes_is_named_and_nothing_else_is(tmp_path: Path) -> None:
    folder = tmp_path / "s3"
    with s3_server(folder) as s3, proxy(s3.endpoint, Frozen) as store:
        env = {**bucket_env(s3), "AWS_ENDPOINT_URL_S3": store.url}
        server = Server(tmp_path / "root", env=env, storage_url=s3.url, worker_slots=1)
        try:
            server.start()
            store.thawed.clear()
            assert eventually(lambda: wrong(server)) == {"storage": "does not answer within 5 seconds"}
            assert server.client.get("/healthz").status_code == 200
            assert wrong(server) == {"storage": "does not answer within 5 seconds"}
            store.thawed.set()
            eventually(lambda: not wrong(server))

            store.read_only = True
            assert set(eventually(lambda: wrong(server))) == {"storage"}
            store.read_only = False
            eventually(lambda: not wrong(server))

            (folder / BUCKET).rename(tmp_path / "away")
            assert BUCKET in eventually(lambda: wrong(server))["storage"]
            (tmp_path / "away").rename(folder / BUCKET)
            eventually(lambda: not wrong(server))
            assert not list((folder / BUCKET).rglob("ready-*"))
        finally:
            store.thawed.set()
            server.close()


def test_a_database_that_is_locked_is_named_and_all_is_well_when_it_is_back(tmp_path: Path) -> None:
    server = Server(tmp_path / "root", worker_slots=1)
    try:
        server.start()
        other = sqlite3.connect(tmp_path / "root" / "jobs.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert set(eventually(lambda: wrong(server))) == {"database"}
        shown = server.client.get("/metrics").text
        assert 'memvid_export_trouble{part="database"} 1.0' in shown
        troubled = {line for line in shown.splitlines() if line.startswith("memvid_export_trouble{")}
        assert len(troubled) == len(CHECKS | {"keys"})
        assert sum(line.endswith(" 1.0") for line in troubled) == 1
        other.execute("ROLLBACK")
        other.close()
        eventually(lambda: not wrong(server))
        assert server.wait(server.submit(graph()))["type"] == "job_completed"
    finally:
        server.close()


@contextmanager
def alive(root: Path, **settings: object) -> Iterator[str]:
    """A server that need not be ready, as its URL."""
    port = free_port()
    given = {f"MEMVID_EXPORT_{name.upper()}": str(value) for name, value in settings.items()}
    env = {**os.environ, "MEMVID_EXPORT_ROOT": str(root), "MEMVID_EXPORT_BIND_ADDR": f"127.0.0.1:{port}", **given}
    url = f"http://127.0.0.1:{port}"
    with running([COMMAND, "serve", "--dev"], root.with_name("server.log"), env, f"{url}/healthz"):
        yield url


def checks_of(url: str) -> dict[str, str]:
    answer = httpx.get(f"{url}/readyz", timeout=60)
    assert answer.status_code == 503, answer.text
    return dict(answer.json()["error"]["details"]["checks"])


def test_a_disk_below_its_floor_is_named(tmp_path: Path) -> None:
    with alive(tmp_path / "root", disk_floor_bytes=1 << 60) as url:
        disk = eventually(lambda: {name for name, said in checks_of(url).items() if said != "ok"} == {"disk"})
        assert disk
        assert "must stay free" in checks_of(url)["disk"]
        assert 'memvid_export_trouble{part="disk"} 1.0' in httpx.get(f"{url}/metrics").text


def test_a_server_whose_workers_all_died_is_not_ready(tmp_path: Path) -> None:
    server = Server(tmp_path / "root", worker_slots=1)
    try:
        server.start()
        for child in child_pids(server.pid):
            os.kill(child, signal.SIGKILL)
        # Nobody asks for a worker, so none is started; the first job brings them back.
        assert eventually(lambda: wrong(server)) == {"worker": "no worker is up"}
        assert server.wait(server.submit(graph()))["type"] == "job_completed"
        eventually(lambda: not wrong(server))
    finally:
        server.close()


async def looked(health: Health, times: int) -> list[Any]:
    return list(await asyncio.gather(*(health.look() for _ in range(times))))


def test_many_who_ask_at_once_cost_one_look() -> None:
    looks = []

    async def check() -> str | None:
        looks.append(1)
        await asyncio.sleep(0)
        return None

    async def ask() -> None:
        health = Health({"part": check}, {})
        answers = await looked(health, 100)
        assert all(answer.ok for answer in answers)
        assert len(looks) == 1
        await health.close()

    asyncio.run(ask())


def test_a_check_that_breaks_is_no_server_error() -> None:
    async def check() -> str | None:
        raise ValueError("with words that are nobody's business")

    async def ask() -> None:
        found = await Health({"part": check}, {"canary": lambda: "late"}).look()
        assert not found.ok
        assert found.checks == {"part": "cannot be checked: ValueError"}
        assert found.notes == {"canary": "late"}

    asyncio.run(ask())
