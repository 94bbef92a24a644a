"""The server as compose runs it: a root that nobody can write, and no capability; /data and /tmp alone are written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from processes import COMMAND, EXAMPLE, free_port

PREPARE = """
set -eu
mount --bind "$1" /mnt
mount -t tmpfs -o size=256m tmpfs /tmp
while read -r _ place kind _; do
    case "$place" in /mnt | /tmp | /proc* | /sys* | /dev*) continue ;; esac
    mount -o remount,bind,ro "$place" 2>/dev/null || true
done < /proc/self/mounts
shift
for place in /etc /opt /root /usr /var /home; do
    if touch "$place/.written" 2>/dev/null; then echo "$place can be written"; exit 9; fi
done
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""
"""In a mount namespace of its own: the first argument becomes /mnt, then the rest is run."""


def _may_mount() -> bool:
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        return False
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _may_mount(), reason="file systems are mounted read-only by root alone")
def test_an_export_needs_its_root_and_tmp_and_nothing_else_to_write_to(tmp_path: Path) -> None:
    port = free_port()
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MEMVID_", "PYTHON", "XDG_", "COVERAGE_"))
    }
    env |= {
        "MEMVID_EXPORT_API_KEY": "key",
        "MEMVID_EXPORT_BIND_ADDR": f"127.0.0.1:{port}",
        "MEMVID_EXPORT_ROOT": "/mnt/exports",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/nonexistent",
    }
    data = tmp_path / "data"
    data.mkdir()
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", PREPARE, "sh", data]
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen([*command, sys.executable, COMMAND, "serve"], env=env, stdout=output, stderr=output)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"authorization": "Bearer key"}) as client:
            _until_it_answers(client, server, log)
            status = Path(f"/proc/{server.pid}/status").read_text()
            assert "CapEff:\t0000000000000000" in status
            assert "CapBnd:\t0000000000000000" in status
            assert "NoNewPrivs:\t1" in status
            kinds = {"content-type": "application/x-ndjson", "content-encoding": "gzip"}
            created = client.post("/v1/exports", content=EXAMPLE.read_bytes(), headers=kinds, timeout=60)
            assert created.status_code == 202, created.text
            job = f"/v1/exports/{created.json()['jobId']}"
            with client.stream("GET", f"{job}/events/stream", timeout=200) as stream:
                ends = [line for line in stream.iter_lines() if line.startswith("event: job_")]
            assert ends[-1] == "event: job_completed", client.get(job).text
            assert len(client.get(f"{job}/download").content) == client.get(job).json()["artifact"]["sizeBytes"]
            assert client.get(f"{job}/search", params={"q": "capsule"}).json()["hits"]
        server.terminate()
        assert server.wait(timeout=60) == 0
    finally:
        server.kill()
        server.wait()
    assert (data / "exports").is_dir()


def _until_it_answers(client: httpx.Client, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1_200):
        assert server.poll() is None, log.read_text()
        try:
            if client.get("/readyz").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(log.read_text())
