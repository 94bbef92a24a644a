"""A made-up graph through real servers: it comes through, or it says where it ended."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import KEY, Server, graph, large_graph
from processes import COMMAND, answering, command
from runpod_house import RunpodServer
from runpod_local import local_runpod

from control_plane.operations.canary import CanaryRun, Step, fly

STEPS = ["post", "export", "download", "verify", "search", "mcp"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("canary") / "root", worker_slots=1, queue_capacity=1).start()
    yield running
    running.close()


def canary(url: str, *more: object, key: str = KEY) -> tuple[int, dict[str, Any]]:
    """Exit code and the first line of JSON."""
    done = command("canary", "--url", url, "--json", *more, env={"MEMVID_EXPORT_API_KEY": key})
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[0])


def flown(server: Server, after: str, do: Callable[[str], None]) -> CanaryRun:
    """A canary during which something happens to the server after a step; it is told the job's id."""

    def tell(step: Step) -> None:
        if step.name == "post":
            ids.append(step.detail.split()[-1])
        if step.name == after:
            do(ids[0])

    ids: list[str] = []
    return fly(server.url, KEY, "qwrtplkjhgfdszxc", semantic=False, tell=tell)


@pytest.mark.parametrize("semantic", [False, True])
def test_it_comes_through_every_step_of_a_good_server(server: Server, tmp_path: Path, semantic: bool) -> None:
    env = {"MEMVID_EXPORT_API_KEY": KEY, "TMPDIR": str(tmp_path)}
    done = command("canary", "--url", server.url, "--json", *(["--semantic"] if semantic else []), env=env)
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    assert run["outcome"] == "ok"
    assert [step["name"] for step in run["steps"]] == STEPS
    assert server.job(run["jobId"])["status"] == "completed"
    vectors = server.client.get(f"/v1/exports/{run['jobId']}/report").json()["capsule"]["vectors"]
    assert (vectors > 0) == semantic
    assert list(tmp_path.iterdir()) == []  # nothing of it stays behind


def test_a_wrong_key_ends_it_at_the_first_step(server: Server) -> None:
    code, run = canary(server.url, key="wrong")
    assert (code, run["outcome"], run["step"], run["jobId"]) == (3, "failed", "post", None)


def test_a_server_that_is_gone_ends_it_at_the_first_step() -> None:
    code, run = canary("http://127.0.0.1:9")
    assert (code, run["outcome"], run["step"]) == (3, "failed", "post")


def test_a_full_queue_is_a_refusal_and_no_defect(server: Server) -> None:
    running = server.submit(large_graph("running", 80_000))
    server.wait(running, "job_started")
    waiting = server.submit(graph(name="waiting"))
    code, run = canary(server.url)
    for job in (waiting, running):
        server.client.delete(f"/v1/exports/{job}")
    assert (code, run["outcome"], run["step"]) == (3, "refused", "post")
    assert "queue is full" in run["message"]


def test_a_capsule_that_was_damaged_is_found_when_it_is_fetched(server: Server) -> None:
    def damage(job_id: str) -> None:
        (capsule,) = (server.root / "artifacts" / job_id).rglob("*.mv2")
        data = bytearray(capsule.read_bytes())
        data[len(data) // 2] ^= 1
        capsule.write_bytes(data)

    run = flown(server, "export", damage)
    assert (run.outcome, run.step) == ("failed", "download")


def test_storage_that_went_away_is_found(server: Server) -> None:
    run = flown(server, "export", lambda job_id: shutil.rmtree(server.root / "artifacts" / job_id))
    assert (run.outcome, run.step) == ("failed", "download")
    assert [step.name for step in run.steps] == ["post", "export"]


def test_without_a_worker_it_ends_in_its_time_and_takes_its_export_back(tmp_path: Path) -> None:
    with local_runpod(workers="0:0") as platform:
        server = RunpodServer(tmp_path / "root", platform)
        try:
            server.start()
            code, run = canary(server.url, "--timeout", 10)
            assert (code, run["outcome"], run["step"]) == (3, "timeout", "export")
            assert server.job(run["jobId"])["status"] == "canceled"
        finally:
            server.close()


class Silent(BaseHTTPRequestHandler):
    """Never answers a POST while the test runs."""

    def do_POST(self) -> None:
        time.sleep(6)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Quiet."""


def test_a_server_that_hangs_ends_it_in_its_time() -> None:
    with answering(Silent) as url:
        code, run = canary(url, "--timeout", 2)
    assert (code, run["outcome"], run["step"]) == (3, "timeout", "post")


def test_a_server_finds_itself_and_tells_how_its_canaries_go(tmp_path: Path) -> None:
    log, digest = tmp_path / "log", hashlib.sha256(b"key-of-ann").hexdigest()
    env = {name: value for name, value in os.environ.items() if not name.startswith("MEMVID_")}
    env |= {
        "MEMVID_EXPORT_API_KEY": KEY,
        "MEMVID_EXPORT_BIND_ADDR": "0.0.0.0:0",
        "MEMVID_EXPORT_ROOT": str(tmp_path / "root"),
        "MEMVID_EXPORT_CANARY_SECONDS": "1",
        "MEMVID_EXPORT_KEYS": f'[[keys]]\nname = "ann"\nsha256 = "{digest}"\nscopes = ["read"]\n',
    }
    with log.open("wb") as output:
        process = subprocess.Popen([COMMAND, "serve"], env=env, stdout=output, stderr=output)
    try:
        port = _seen(lambda: re.search(r"listens on http://0\.0\.0\.0:(\d+)", log.read_text()))[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {KEY}"}) as client:
            note = _seen(lambda: _note(client, r"ok \d+ s ago, took [0-9.]+ s"))[0]
            assert "canary" not in client.get("/readyz").json()["checks"], note
            figures = client.get("/metrics").text
            assert float(_seen(lambda: re.search(r'canary_runs_total\{outcome="ok"\} (\S+)', figures))[1]) >= 1
            assert re.search(r"canary_last_success_timestamp_seconds [1-9]", figures)
            job = client.get("/v1/exports", params={"status": "completed"}).json()["jobs"][-1]
            assert job["metadata"]["client"] == "canary"
            kept = datetime.fromisoformat(job["artifact"]["expiresAt"]) - datetime.fromisoformat(job["updatedAt"])
            assert kept.total_seconds() == pytest.approx(600, abs=1)
            text = log.read_text()
            assert "mvx_" not in text  # its key is nowhere
            ann = {"Authorization": "Bearer key-of-ann"}
            assert client.get("/v1/exports", headers=ann).json()["jobs"] == []  # it is there for admins alone
            assert client.get(f"/v1/exports/{job['jobId']}", headers=ann).status_code == 404
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_server_short_of_file_handles_for_a_canary_sends_the_next_one(tmp_path: Path) -> None:
    server = Server(tmp_path / "root", worker_slots=1, canary_seconds=1)
    try:
        server.start()
        _seen(lambda: "canary came through" in server.log.read_text())
        used = {int(path.name) for path in Path(f"/proc/{server.pid}/fd").iterdir()}
        free = min(set(range(len(used) + 1)) - used)
        soft, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (free, hard))
        told = _seen(lambda: re.search(r".*it did not start.*canary did not come through.*", server.log.read_text()))
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert re.search(r"step\W+process", told[0])
        _seen(lambda: "canary came through" in server.log.read_text()[told.end() :])
        _seen(lambda: _note(server.client, r"ok \d+ s ago, took [0-9.]+ s"))
        assert server.client.get("/readyz").json()["checks"]["tasks"] == "ok"
    finally:
        server.close()


def _note(client: httpx.Client, wanted: str) -> re.Match[str] | None:
    try:
        body = client.get("/readyz").json()
    except httpx.TransportError:
        return None
    notes = body["notes"] if "notes" in body else body["error"]["details"]["notes"]
    return re.fullmatch(wanted, notes["canary"])


def _seen(look: Callable[[], Any]) -> Any:
    end = time.monotonic() + 120
    while not (found := look()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found
