"""What keeps worker processes from outliving the local Runpod, as it runs: a program of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from worker_process import gone, group

PROGRAM = (sys.executable, "-m", "handler.local.guard")


def _sleeper() -> subprocess.Popen[bytes]:
    """A process that leads a group of two."""
    return subprocess.Popen(["sh", "-c", "sleep 300 & wait"], start_new_session=True)


def _until(process: subprocess.Popen[bytes], count: int) -> list[int]:
    for _ in range(200):
        if len(found := group(process.pid)) == count:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{process.pid} is a group of {group(process.pid)}")


def _ignored(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = (int(line.split()[1], 16) for line in status if line.startswith("SigIgn:"))
    return bool(mask >> (number - 1) & 1)


def test_groups_that_are_left_are_ended_with_all_that_is_in_them_and_no_others() -> None:
    left, taken_back, ended = _sleeper(), _sleeper(), _sleeper()
    try:
        members = {process: _until(process, 2) for process in (left, taken_back, ended)}
        with subprocess.Popen([*PROGRAM, "watch"], stdin=subprocess.PIPE) as watch:
            assert watch.stdin is not None
            for line in (f"+{left.pid}", f"+{taken_back.pid}", f"+{ended.pid}", f"-{taken_back.pid}"):
                watch.stdin.write(line.encode() + b"\n")
            watch.stdin.flush()
            while not _ignored(watch.pid, signal.SIGINT):
                time.sleep(0.01)
            watch.send_signal(signal.SIGINT)  # a terminal sends it to all that run there
            os.killpg(ended.pid, signal.SIGKILL)
            ended.wait()
            assert _until(left, 2) == members[left]
        assert watch.returncode == 0
        assert left.wait(timeout=10) == -signal.SIGKILL
        assert gone(members[left])
        assert _until(taken_back, 2) == members[taken_back]
    finally:
        for process in (left, taken_back, ended):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_a_worker_takes_the_place_of_the_program_that_starts_it() -> None:
    script = "import os, sys; print(os.getpid(), os.environ['GIVEN'], *sys.argv[1:])"
    arguments = [*PROGRAM, "start", str(os.getpid()), sys.executable, "-c", script, "one", "two words"]
    env = {**os.environ, "GIVEN": "from the platform"}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=env) as worker:
        said, _ = worker.communicate(timeout=30)
    assert said.decode().split(" ", 1) == [str(worker.pid), "from the platform one two words\n"]
    assert worker.returncode == 0


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    script = (
        "import os, subprocess, sys, time\n"
        "start = [*sys.argv[1:], 'start', str(os.getpid()), 'sleep', '300']\n"
        "worker = subprocess.Popen(start, start_new_session=True)\n"
        "while open(f'/proc/{worker.pid}/comm').read().strip() != 'sleep': time.sleep(0.01)\n"
        "print(worker.pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, *PROGRAM], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert group(worker) == [worker]
        parent.kill()
    assert gone([worker])


@pytest.mark.parametrize(
    ("parent", "command", "says"),
    [
        (1, ["sh", "-c", "echo started"], "the local Runpod has ended\n"),
        (None, ["no-such-command"], "no-such-command: No such file or directory\n"),
        (None, ["/"], "/: Permission denied\n"),
    ],
)
def test_a_worker_that_cannot_be_started_is_told_in_one_line(parent: int | None, command: list[str], says: str) -> None:
    arguments = [*PROGRAM, "start", str(os.getpid() if parent is None else parent), *command]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", says)
