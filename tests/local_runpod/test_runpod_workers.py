"""The worker processes of a local Runpod: how many there are, and what becomes of their jobs when they end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from left_behind import child_pids
from noted import WORKER, Notes, Started
from processes import COMMAND
from runpod_local import Platform, local_runpod, wait_for

from handler.local import LocalConfig, LocalRunpod, worker_environment


def workers(platform: Platform) -> int:
    """How many there are, starting ones too."""
    found = platform.health()["workers"]
    return int(found["idle"] + found["initializing"] + found["running"])


def group_of(platform: Platform) -> set[int]:
    """The processes whose environment names this platform's endpoint."""
    found = set()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"RUNPOD_ENDPOINT_ID={platform.endpoint}\0".encode() in environment.read_bytes():
                found.add(int(environment.parent.name))
        except OSError:
            continue
    return found


def test_workers_come_with_work_up_to_the_most_and_go_when_they_are_idle(started: Started) -> None:
    with started(workers="0:2", idle_seconds=1) as platform:
        assert workers(platform) == 0
        jobs = [platform.run({"do": "slow", "seconds": 1}) for _ in range(4)]
        wait_for(platform.health, lambda found: found["workers"]["running"] == 2)
        assert workers(platform) == 2
        ran_by = {platform.wait(job, "COMPLETED")["workerId"] for job in jobs}
        assert len(ran_by) == 2
        wait_for(lambda: workers(platform), lambda count: count == 0)


def test_the_least_number_of_workers_stays(started: Started) -> None:
    with started(workers="1:2", idle_seconds=0) as platform:
        wait_for(platform.health, lambda found: found["workers"]["idle"] == 1)
        jobs = [platform.run({"do": "slow", "seconds": 1}) for _ in range(2)]
        for job in jobs:
            platform.wait(job, "COMPLETED")
        wait_for(lambda: workers(platform), lambda count: count == 1)
        wait_for(platform.health, lambda found: found["workers"]["unhealthy"] == 0)
        assert workers(platform) == 1


def test_a_job_of_low_priority_starts_no_worker(started: Started) -> None:
    with started(workers="0:1") as platform:
        low = platform.run({"do": "echo"}, policy={"lowPriority": True})
        assert workers(platform) == 0
        platform.wait(platform.run({"do": "echo"}), "COMPLETED")
        platform.wait(low, "COMPLETED")


def test_a_worker_of_more_at_once_takes_jobs_in_batches(started: Started, notes: Notes) -> None:
    with started(workers="1:1", env={"CONCURRENCY": "3"}) as platform:
        wait_for(platform.health, lambda found: found["workers"]["idle"] == 1)
        jobs = [platform.run({"do": "slow", "seconds": 300}) for _ in range(3)]
        for job in jobs:
            notes.wait(job, "started")
        assert platform.health()["jobs"]["inProgress"] == 3
        platform.post(f"cancel/{jobs[1]}")
        notes.wait(jobs[1], "stopped")
        assert [what for job in (jobs[0], jobs[2]) for _, what in notes.of(job)] == ["started", "started"]


def test_a_job_whose_worker_dies_is_queued_again(started: Started, notes: Notes, tmp_path: Path) -> None:
    with started(workers="0:1") as platform:
        job = platform.run({"do": "crash once", "mark": str(tmp_path / "mark")})
        assert platform.wait(job)["status"] == "COMPLETED"
        first, second = [worker for worker, _ in notes.of(job)]
        assert first != second
        assert platform.health()["jobs"]["retried"] == 1


def test_a_job_whose_worker_dies_twice_has_failed(started: Started, notes: Notes) -> None:
    with started(workers="0:1") as platform:
        job = platform.run({"do": "crash"})
        found = platform.wait(job)
        assert (found["status"], found["error"]) == ("FAILED", "job timed out after 1 retries")
        assert len(notes.of(job)) == 2
        assert platform.post(f"retry/{job}").json()["status"] == "IN_QUEUE"
        assert platform.wait(job)["status"] == "FAILED"
        assert len(notes.of(job)) == 4


def test_a_worker_that_pings_no_more_is_lost(started: Started, notes: Notes) -> None:
    with started(workers="0:1", ping_seconds=1) as platform:
        job = platform.run({"do": "mute", "seconds": 300})
        notes.wait(job, "started", times=2)
        assert "no ping" in platform.log
        platform.post(f"cancel/{job}")


def test_a_worker_whose_handler_blocks_still_pings_and_keeps_its_job(started: Started, notes: Notes) -> None:
    with started(workers="0:1", ping_seconds=1) as platform:
        job = platform.run({"do": "deaf", "seconds": 5})
        assert platform.wait(job)["status"] == "COMPLETED"
        assert len(notes.of(job)) == 1


def test_a_worker_that_does_not_stop_a_cancelled_job_is_replaced(started: Started, notes: Notes) -> None:
    with started(workers="1:1", idle_seconds=1) as platform:
        deaf = platform.run({"do": "deaf", "seconds": 300})
        notes.wait(deaf, "started")
        platform.post(f"cancel/{deaf}")
        after = platform.wait(platform.run({"do": "echo"}))
        assert after["status"] == "COMPLETED"
        assert after["workerId"] != notes.of(deaf)[0][0]


def test_a_worker_that_asks_for_a_refresh_is_replaced(started: Started) -> None:
    with started(workers="1:1") as platform:
        first = platform.wait(platform.run({"do": "refresh"}))
        assert (first["status"], first["output"]) == ("COMPLETED", {"done": True})
        second = platform.wait(platform.run({"do": "echo"}))
        assert second["workerId"] != first["workerId"]


def test_a_command_that_is_no_worker_is_tried_again_and_jobs_wait() -> None:
    with local_runpod(workers="0:1", worker_command=["no-such-command"]) as platform:
        job = platform.run({"do": "echo"})
        wait_for(lambda: platform.log, lambda log: log.count("a worker ended") >= 2)
        assert platform.status(job)["status"] == "IN_QUEUE"


def test_a_worker_that_never_asks_for_a_job_is_ended() -> None:
    with local_runpod(workers="1:1", worker_command=["sleep", "300"], start_seconds=0.2) as platform:
        wait_for(lambda: platform.log, lambda log: log.count("did not start") >= 2)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_platform(started: Started, notes: Notes, how: signal.Signals) -> None:
    with started(workers="2:2", endpoint=f"ends-by-{how.name}") as platform:
        busy = platform.run({"do": "slow", "seconds": 300})
        notes.wait(busy, "started")
        wait_for(platform.health, lambda found: found["workers"]["idle"] == 1)
        assert len(group_of(platform)) >= 4, "two workers, each with a process that pings"
        platform.process.send_signal(how)
        code = platform.process.wait(timeout=30)
        assert code == (0 if how is signal.SIGTERM else -signal.SIGKILL)
        wait_for(lambda: group_of(platform), lambda left: not left)
        with pytest.raises(httpx.TransportError):
            platform.health()


def test_a_worker_gets_nothing_that_is_there_to_reach_runpod(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "the key of an account")
    with started(workers="1:1", endpoint="clean") as platform:
        wait_for(platform.health, lambda found: found["workers"]["idle"] == 1)
        for process in group_of(platform):
            assert b"the key of an account" not in Path(f"/proc/{process}/environ").read_bytes()


def test_the_command_line_starts_one(tmp_path: Path) -> None:
    script = Path(__file__).with_name("worker.py")
    arguments = ["--bind", "127.0.0.1:0", "--endpoint", "mine", "--workers", "0:1", "--env", "GIVEN=by an option"]
    arguments += ["--env", f"NOTES={tmp_path / 'notes'}", "--worker-command", f"{sys.executable} {script}"]
    env = {**os.environ, "RUNPOD_API_KEY": "k"}
    process = subprocess.Popen([COMMAND, "local-runpod", *arguments], env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert line.startswith("local Runpod listens on http://127.0.0.1:")
        url = f"{line.split()[-1]}/v2/mine/runsync"
        assert httpx.post(url, json={"input": {"do": "echo"}}).status_code == 401
        answer = httpx.post(url, json={"input": {"do": "echo"}}, headers={"Authorization": "Bearer k"}, timeout=60)
        assert answer.json()["output"]["env"] == "by an option"
        process.terminate()
        process.communicate(timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workers", "3:1"], "the least number of workers is 3"),
        (["--workers", "3"], "MIN:MAX"),
        (["--bind", "8600"], "HOST:PORT"),
        (["--bind", "192.0.2.1:0"], "cannot be listened on"),
        (["--fault", "nothing=0.5"], "no such fault"),
        (["--fault", "no-output=1.5"], "no such fault"),
        (["--env", "NAME"], "NAME=VALUE"),
        (["--worker-command", "'half"], "--worker-command"),
        (["--worker-command", ""], "--worker-command"),
        (["--endpoint", "a/b"], "$.endpoint"),
    ],
)
def test_wrong_options_are_told_in_one_line(arguments: list[str], says: str) -> None:
    done = subprocess.run(
        [COMMAND, "local-runpod", *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert says in done.stderr


def test_one_can_run_inside_another_program(notes: Notes) -> None:
    env = worker_environment(os.environ, {"NOTES": str(notes.path)})
    config = LocalConfig(worker_command=[str(word) for word in WORKER], env=env, max_workers=1)

    async def run() -> dict[str, object]:
        platform = LocalRunpod(config)
        await platform.start()
        try:
            async with httpx.AsyncClient(timeout=60) as client:
                answer = await client.post(f"{platform.api_base}/local/runsync", json={"input": {"do": "echo"}})
        finally:
            await platform.stop()
        return dict(answer.json())

    before = set(child_pids())
    assert asyncio.run(run())["status"] == "COMPLETED"
    assert set(child_pids()) <= before
