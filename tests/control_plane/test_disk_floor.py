"""A disk that is nearly full: new exports are refused before anything is written, and what was taken waits for room."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import KEY, Server, graph, large_graph

from common.settings import Settings
from control_plane.errors import QueueUnavailable
from control_plane.operations.disk import Disk
from control_plane.operations.metrics import Metrics

MIB = 1 << 20
FLOOR = 64 * MIB


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 192 MiB."""
    folder = tmp_path_factory.mktemp("disk")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=192m", "tmpfs", folder], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("only root makes a file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def small(disk: Path) -> Iterator[Server]:
    """A server on it, with one slot."""
    server = Server(disk / "root", worker_slots=1, disk_floor_bytes=FLOOR)
    server.log = disk.with_name("server.log")
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def ballast(disk: Path) -> Iterator[Path]:
    """A file that takes the room; without it there is enough."""
    path = disk / "ballast"
    yield path
    path.unlink(missing_ok=True)
    _until_there_is_room(disk)


def _fill(path: Path, *, leave: int) -> None:
    found = os.statvfs(path.parent)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - leave)


def _until_there_is_room(disk: Path) -> None:
    time.sleep(1.1)  # the server looks once a second


def _files(server: Server) -> set[Path]:
    kept = ("jobs.sqlite", "replica-id", ".lock")
    return {path for path in server.root.rglob("*") if path.is_file() and not path.name.startswith(kept)}


def _refused(answer: httpx.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "QUEUE_UNAVAILABLE"), answer.text
    assert answer.headers["retry-after"] == "30"
    assert error["details"]["floorBytes"] == FLOOR
    return dict(error["details"])


def test_below_the_floor_new_exports_are_refused_and_readiness_says_so(small: Server, ballast: Path) -> None:
    job_id = small.submit(graph(name="before"))
    small.wait(job_id)
    _fill(ballast, leave=FLOOR - 4 * MIB)
    time.sleep(1.1)
    before = _files(small)
    details = _refused(small.post(graph(name="full")))
    assert 0 < details["freeBytes"] < FLOOR
    assert _files(small) == before
    ready = small.client.get("/readyz")
    assert ready.status_code == 503
    assert "must stay free" in ready.text
    metrics = small.client.get("/metrics").text
    assert 'memvid_export_refused_total{limit="disk"}' in metrics
    assert 'memvid_export_disk_free_bytes{folder="root"}' in metrics
    # What is there can be read all the same.
    assert small.client.get(f"/v1/exports/{job_id}/download").status_code == 200
    ballast.unlink()
    time.sleep(1.1)
    assert small.client.get("/readyz").status_code == 200
    assert small.wait(small.submit(graph(name="after")))["type"] == "job_completed"


def test_a_body_that_would_pass_the_floor_is_refused_before_it_is_read(small: Server, ballast: Path) -> None:
    _fill(ballast, leave=FLOOR + 8 * MIB)
    time.sleep(1.1)
    before = _files(small)

    head = f"POST /v1/exports HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", small.port), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: {16 * MIB}\r\n\r\n{{".encode())
        answer = ""
        while not answer.endswith("}"):  # head and body come one by one
            more = connection.recv(1 << 16)
            assert more, answer
            answer += more.decode()
    assert answer.startswith("HTTP/1.1 503 ")
    details = json.loads(answer.partition("\r\n\r\n")[2])["error"]["details"]
    assert details["freeBytes"] >= FLOOR
    assert _files(small) == before
    assert small.wait(small.submit(graph(name="little")))["type"] == "job_completed"


def test_a_body_of_unknown_length_is_given_up_at_the_floor_and_nothing_of_it_stays(
    small: Server, ballast: Path
) -> None:
    _fill(ballast, leave=FLOOR + 8 * MIB)
    time.sleep(1.1)

    def body() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * MIB
            time.sleep(0.05)

    with httpx.Client(base_url=small.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        try:
            answer = client.post("/v1/exports", content=body(), headers={"content-type": "application/json"})
        except (httpx.WriteError, httpx.ReadError):  # it may answer and close while we still send
            answer = None
    if answer is not None:
        _refused(answer)
    for _ in range(200):
        if not list((small.root / "staging" / "incoming").iterdir()):
            break
        time.sleep(0.05)
    assert not list((small.root / "staging" / "incoming").iterdir())


def test_a_queued_export_waits_for_room_while_a_running_one_goes_on(small: Server, ballast: Path) -> None:
    running = small.submit(large_graph("running", 12_000))
    queued = small.submit(graph(name="queued"))
    small.wait(running, "job_started")
    _fill(ballast, leave=FLOOR - MIB)
    assert small.wait(running)["type"] == "job_completed"
    time.sleep(2.5)  # longer than between two looks
    assert small.job(queued)["status"] == "queued"
    ballast.unlink()
    assert small.wait(queued)["type"] == "job_completed"


def test_a_floor_above_what_is_free_is_trouble_and_one_below_is_none(tmp_path: Path) -> None:
    def disk(floor: int, **more: str) -> Disk:
        env = {"MEMVID_EXPORT_ROOT": str(tmp_path), "MEMVID_EXPORT_DISK_FLOOR_BYTES": str(floor), **more}
        return Disk(Settings.read(env, dev=True), Metrics())

    storage = tmp_path / "not" / "there" / "yet"
    well = disk(0, MEMVID_EXPORT_STORAGE_URL=storage.as_uri())
    assert well.trouble is None
    assert set(well.free) == {"root", "staging", "storage"}
    well.check(1)
    with pytest.raises(QueueUnavailable) as caught:
        well.check(1 << 60)
    assert caught.value.details["floorBytes"] == 0
    full = disk(1 << 60)
    assert full.trouble is not None
    with pytest.raises(QueueUnavailable):
        full.check()
