"""What lies in storage without a job goes while the server runs, and nothing else does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from live_server import Server, graph


@pytest.mark.parametrize("place", ["", "root", "linked", "env=prod/our data"])
def test_strays_go_and_what_jobs_speak_for_stays_however_the_storage_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    url = f"file://{tmp_path}/{place}" if place not in ("", "root") else ""
    root = tmp_path / "linked" / "root" if place == "root" else tmp_path / "root"
    artifacts = (tmp_path / place if url else root) / "artifacts"
    server = Server(root, storage_url=url, stray_seconds=1)
    try:
        server.start()
        job = server.submit(graph())
        assert server.wait(job)["type"] == "job_completed"
        stray = artifacts / "nobody" / "1" / "x.mv2"
        stray.parent.mkdir(parents=True)
        stray.write_bytes(b"1")
        for _ in range(600):
            if not stray.exists():
                break
            time.sleep(0.05)
        assert not stray.exists()
        assert server.client.get(f"/v1/exports/{job}/download").status_code == 200
        assert "retention failed" not in server.log.read_text()
    finally:
        server.close()
