"""Storage that answers late: what a server clears up meanwhile keeps nothing and nobody from work."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from left_behind import child_pids
from live_server import Server, large_graph
from runpod_house import bucket_env, eventually
from services import s3_server
from storage.faulty import Kind, Proxy, Seen, proxy

from control_plane.backends.leases import RENEW_SECONDS


class Held(Proxy):
    """Keeps requests for listings that hold a word waiting until they are let go."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.word = ""
        self.waits = threading.Event()
        self.free = threading.Event()

    def hold(self, word: str) -> None:
        """From now on."""
        self.waits.clear()
        self.free.clear()
        self.word = word

    def take(self, seen: Seen, body: bytes) -> Kind | None:
        """Wait if it is held."""
        if self.word and seen.method == "GET" and "prefix=" in seen.path and self.word in seen.path:
            self.waits.set()
            self.free.wait()
        return super().take(seen, body)

    def let_go(self) -> None:
        """All that wait, and hold no more."""
        self.word = ""
        self.free.set()


House = tuple[Server, Held]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A server of two slots for jobs of any size, and what stands between it and its bucket."""
    folder = tmp_path_factory.mktemp("slow")
    with s3_server(folder / "s3") as s3, proxy(s3.endpoint, Held) as store:
        env = {**bucket_env(s3), "AWS_ENDPOINT_URL_S3": store.url}
        server = Server(folder / "root", env=env, storage_url=s3.url, worker_slots=2, small_job_frames=1_000_000)
        try:
            yield server.start(), store
        finally:
            store.let_go()
            server.close()


def _workers(server: Server) -> dict[int, int]:
    """Processes of the server's workers, and the processor time that each has used."""
    found = {}
    for pid in child_pids(server.pid):
        if b"handler.child" in Path(f"/proc/{pid}/cmdline").read_bytes():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[pid] = int(fields[11]) + int(fields[12])
    return found


def _both_run(server: Server) -> bool:
    """Whether two jobs run at once."""
    jobs = [server.submit(large_graph(name)) for name in ("one", "two")]
    server.wait(jobs[1], "job_started")
    states = [server.job(job)["status"] for job in jobs]
    for job in jobs:
        server.client.delete(f"/v1/exports/{job}")
    return states == ["running", "running"]


def test_a_job_whose_last_attempt_is_still_cleared_up_runs_again_and_both_slots_come_back(house: House) -> None:
    server, store = house
    job = server.submit(large_graph("again", 8_000))
    server.wait(job, "job_started")
    before = _workers(server)
    busy = eventually(lambda: [pid for pid, used in _workers(server).items() if used > before.get(pid, 0) + 20])
    store.hold(f"{job}%2F1%2F")
    os.kill(busy[0], signal.SIGKILL)
    assert store.waits.wait(60)
    eventually(lambda: [event["type"] for event in server.events(job)].count("job_started") == 2)
    store.let_go()
    assert server.wait(job)["type"] == "job_completed"
    assert server.client.get(f"/v1/exports/{job}/report").json()["attempts"] == 2
    assert _both_run(server)


def test_a_worker_is_kept_while_its_last_job_is_cleared_up(house: House) -> None:
    server, store = house
    job = server.submit(large_graph("cleared", 4_000))
    store.hold(f"payloads%2F{job}")
    assert server.wait(job)["type"] == "job_completed"
    assert store.waits.wait(60)
    workers = set(_workers(server))
    time.sleep(3 * RENEW_SECONDS)  # Leases are renewed, and it is seen that this job has none any more.
    assert workers <= set(_workers(server))
    store.let_go()
