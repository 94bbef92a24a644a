"""A worker's process: how many jobs it takes, and what it does with what lies where it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from left_behind import child_pids
from processes import COMMAND, command
from small_job import payload
from structlog.testing import capture_logs
from worker_process import gone, group

from handler.worker import GPU_JOB_BYTES, concurrency

PROCESSORS = len(os.sched_getaffinity(0))


def _driver(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let ``nvidia-smi`` be this script."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found' >&2; exit 6", "kill -9 $$"])
def test_a_gpu_that_does_not_answer_is_told_and_jobs_run_as_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    without = concurrency(1 << 20)
    _driver(tmp_path, monkeypatch, script)
    with capture_logs() as logs:
        assert concurrency(1 << 20) == without
    assert [(line["event"], line["log_level"]) for line in logs] == [("the GPU does not answer", "warning")]


def test_gpus_run_as_many_jobs_as_their_memory_holds_each_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    almost = (GPU_JOB_BYTES >> 20) - 1
    _driver(tmp_path, monkeypatch, f"printf '{almost}\\n{almost}\\n'")
    assert concurrency(1 << 20) == 1, "two halves of a GPU are no whole one"
    _driver(tmp_path, monkeypatch, f"printf '{almost + 1}\\n{almost + 1}\\n'")
    assert concurrency(1 << 20) == min(2, PROCESSORS)


def test_a_job_that_needs_more_memory_than_there_is_runs_alone() -> None:
    assert concurrency(1 << 60) == 1


def _settings(root: Path) -> dict[str, str]:
    return {"MEMVID_EXPORT_ROOT": str(root), "MEMVID_EXPORT_STAGING_ROOT": str(root)}


def test_a_worker_removes_the_folders_of_dead_ones_and_not_the_one_that_another_is_making(tmp_path: Path) -> None:
    workers = tmp_path / "workers"
    for name in (".0a0b", "dead"):
        (workers / name / "job-1").mkdir(parents=True)
    given = {"job_id": "job", "payload_ref": payload(tmp_path), "output_prefix": (tmp_path / "out").as_uri() + "/"}
    test_input = tmp_path / "test_input.json"
    test_input.write_text(json.dumps({"input": given}))
    ended = command("worker", "--test-input", test_input, env=_settings(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in workers.iterdir()] == [".0a0b"]
    assert (workers / ".0a0b" / "job-1").is_dir()
    assert len(list((tmp_path / "out").glob("*.mv2"))) == 1


def test_a_worker_that_is_ended_while_it_starts_leaves_no_folder_and_no_process(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MEMVID_", "RUNPOD_"))}
    workers = tmp_path / "workers"
    arguments = [sys.executable, str(COMMAND), "worker"]
    with subprocess.Popen(
        arguments, env={**env, **_settings(tmp_path)}, stderr=subprocess.DEVNULL, start_new_session=True
    ) as worker:
        try:
            children: list[int] = []
            for _ in range(3_000):
                if workers.is_dir() and any(not path.name.startswith(".") for path in workers.iterdir()):
                    children = child_pids(worker.pid)
                if children or worker.poll() is not None:
                    break
                time.sleep(0.01)
            assert children, "a child starts while the worker does"
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(timeout=30) == 0
        finally:
            worker.kill()
    assert list(workers.iterdir()) == []
    assert gone(children)
    assert group(worker.pid) == []
