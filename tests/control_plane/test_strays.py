"""What lies in storage without a job goes while the server runs, and nothing else does."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from pathlib import Path

import pytest
from host_faults import DAY, Clock
from live_server import Server, graph
from runpod_house import eventually

from control_plane.operations.retention import WallClock


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


def _like(server: Server, job: str, number: int, *path: str, value: object = None) -> str:
    """Another finished export, like that of ``job`` but for a value in its manifest; low numbers come first."""
    other = str(uuid.UUID(int=number))
    folder = server.root / "artifacts" / other
    shutil.copytree(server.root / "artifacts" / job, folder)
    if path:
        (file,) = folder.rglob("*.manifest.json")
        manifest = json.loads(file.read_text())
        at = manifest
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = value
        file.write_text(json.dumps(manifest))
    return other


def test_odd_exports_that_nobody_knows_keep_no_other_from_its_record(tmp_path: Path, postgres_url: str) -> None:
    root = tmp_path / "root"
    maker, server = Server(root), Server(root, database_url=postgres_url, stray_seconds=1)
    try:
        job = maker.start().submit(graph())
        assert maker.wait(job)["type"] == "job_completed"
        maker.stop()
        odd = [_like(server, job, 1, "parts", value=[]), _like(server, job, 2, "frames", value=2**63)]
        odd += [_like(server, job, 3 + n, "report", "input", "nodes", value=[-1, 2**53, 2**64][n]) for n in range(3)]
        # The manifest is as it should be, the database does not take it.
        refused = _like(server, job, 9, "report", "backend", value="x" * 30)
        server.start()
        assert server.job(job)["status"] == "completed"
        assert server.client.get(f"/v1/exports/{job}/download").status_code == 200
        late = [_like(server, job, 20, "parts", value=[]), _like(server, job, 21, "frames", value=2**63)]
        good = _like(server, job, 22)
        found = eventually(lambda: answer if (answer := server.client.get(f"/v1/exports/{good}")).is_success else None)
        assert found.json()["status"] == "completed"
        assert [server.client.get(f"/v1/exports/{each}").status_code for each in (*odd, *late, refused)] == [404] * 8
        stored = root / "artifacts"
        assert eventually(lambda: not any(file for each in (*odd, *late) for file in (stored / each).rglob("*.*")))
        assert len(list((stored / refused / "1").iterdir())) == 3  # an export is not lost for its record
        assert server.client.get("/readyz").json()["checks"]["tasks"] == "ok"
        log = server.log.read_text()
        assert all(each in log for each in (*odd, *late, refused))
    finally:
        maker.close()
        server.close()


@pytest.mark.skipif(shutil.which("cc") is None, reason="the clock is set by a library that is compiled here")
def test_a_clock_that_jumps_a_day_ahead_removes_nothing(tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    server = Server(tmp_path / "root", env=clock.env, stray_seconds=1)
    try:
        job = server.start().submit(graph())
        assert server.wait(job)["type"] == "job_completed"
        stray = server.root / "artifacts" / "nobody" / "1" / "x.mv2"
        clock.set(DAY + 60)
        assert eventually(lambda: "the clock jumped" in server.log.read_text())
        stray.parent.mkdir(parents=True)
        stray.write_bytes(b"1")
        time.sleep(2)  # several sweeps
        assert stray.exists()
        clock.set(0)
        assert eventually(lambda: not stray.exists())
        assert server.job(job)["status"] == "completed"
        assert server.client.get(f"/v1/exports/{job}/download").status_code == 200
        assert server.log.read_text().count("the clock jumped") == 1
    finally:
        server.close()


class Clocks:
    """A wall clock that can be set, and one that cannot."""

    def __init__(self) -> None:
        self.wall, self.steady = 1e9, 1e3
        self._clock = WallClock(lambda: self.wall, lambda: self.steady)

    def later(self, seconds: float, *, jump: float = 0) -> bool:
        """Let time pass, set the wall clock by ``jump``; whether it is believed."""
        self.wall += seconds + jump
        self.steady += seconds
        now = self._clock.now()
        assert now in (None, self.wall)
        return now is not None


def test_a_clock_that_keeps_pace_or_goes_back_or_gains_a_minute_is_believed() -> None:
    clocks = Clocks()
    assert clocks.later(0)
    assert clocks.later(30 * DAY)  # also a machine that slept: the steady clock counts it
    assert clocks.later(60, jump=60)
    assert clocks.later(60, jump=60)
    assert clocks.later(60, jump=-DAY)


def test_a_clock_that_jumped_is_believed_once_it_is_back() -> None:
    clocks = Clocks()
    assert not clocks.later(1, jump=61)
    assert not clocks.later(1, jump=DAY)
    assert clocks.later(1, jump=-DAY - 1)
    assert clocks.later(1)


def test_a_clock_that_jumped_is_believed_after_an_hour_at_one_time() -> None:
    clocks = Clocks()
    assert not clocks.later(60, jump=DAY)
    assert not clocks.later(3_599)
    assert not clocks.later(1, jump=61)  # another time: it has to stand as long again
    assert not clocks.later(3_599)
    assert clocks.later(1)
    assert clocks.later(60)
    assert not clocks.later(60, jump=61)
