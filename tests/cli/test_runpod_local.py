"""``serve --dev --runpod-local``: everything of Runpod on one machine, started and ended with one command."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from processes import COMMAND, EXAMPLE, command, free_port


def _descendants(pid: int) -> set[int]:
    found: set[int] = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (thread / "children").read_text().split()):
            found |= {child} | _descendants(child)
    return found


def _gone(pids: set[int]) -> bool:
    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    for _ in range(300):
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_one_command_runs_exports_on_a_local_runpod_and_takes_it_along_in_the_end(
    tmp_path: Path, number: signal.Signals
) -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MEMVID_", "RUNPOD_"))}
    env["MEMVID_EXPORT_BIND_ADDR"] = f"127.0.0.1:{port}"
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [COMMAND, "serve", "--dev", "--runpod-local"], env=env, cwd=tmp_path, stdout=output, stderr=output
        )
    try:
        for _ in range(1_200):
            try:
                if server.poll() is not None or httpx.get(f"{url}/readyz", timeout=5).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.05)
        assert server.poll() is None, log.read_text(errors="replace")
        done = command("submit", EXAMPLE, "--url", url, "--wait", "--out", tmp_path / "out", "--json")
        assert done.returncode == 0, done.stderr.decode() + log.read_text(errors="replace")
        job = httpx.get(f"{url}/v1/exports").json()["jobs"][0]
        assert (job["status"], job["metadata"]["backend"]) == ("completed", "runpod_queue")
        assert job["metadata"]["runpodJobId"]
        assert len(list((tmp_path / "out").iterdir())) == 3
        below = _descendants(server.pid)
    finally:
        server.send_signal(number)
        try:
            server.wait(30)
        finally:
            server.kill()
            server.wait()
    assert _gone(below)


def test_runpod_local_is_for_development(tmp_path: Path) -> None:
    done = command("serve", "--runpod-local", cwd=tmp_path)
    assert done.returncode == 2
    assert b"--dev" in done.stderr
