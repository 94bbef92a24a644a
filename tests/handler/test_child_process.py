"""A child process by itself, with nobody who ends it: when and how it ends, and what it says first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from small_job import config_of, payload
from worker_process import gone, group

from common.contract import JobInput
from common.embedding.choice import Choice
from handler.child import NICE
from handler.protocol import Check, Checked, ChildConfig, Command, Failed, Message, Ready, Run


class Process:
    """The child, and what it is told and says."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def tell(self, said: Command | ChildConfig) -> None:
        """One line to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(said) + b"\n")
        self.process.stdin.flush()

    def hear(self) -> Message | None:
        """The next message; None when it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return msgspec.json.decode(line, type=Message) if line else None


@contextmanager
def _child(config: ChildConfig) -> Iterator[Process]:
    with subprocess.Popen(
        [sys.executable, "-m", "handler.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            child = Process(process)
            child.tell(config)
            yield child
        finally:
            process.kill()


def test_a_child_without_its_engine_says_why_and_ends_by_itself(tmp_path: Path) -> None:
    choice = Choice(mode="local_cpu", provider="torch", model="nowhere-to-be-found")
    models = frozenset([choice.model])
    with _child(config_of(tmp_path, choice=choice, models=models, preload=True)) as child:
        failed = child.hear()
        assert isinstance(failed, Failed)
        assert failed.error.code == "INVALID_EXPORT_REQUEST"
        assert "nowhere-to-be-found" in failed.error.message
        assert child.hear() is None
        assert child.process.wait(timeout=60) == 0


def test_a_child_that_failed_as_nobody_foresaw_logs_it_as_json_and_ends_by_itself(tmp_path: Path) -> None:
    job = JobInput(job_id="job-7", payload_ref=payload(tmp_path), output_prefix=(tmp_path / "out").as_uri() + "/")
    config = msgspec.structs.replace(config_of(tmp_path), scratch=f"{tmp_path}/a\x00b")
    with _child(config) as child:
        assert isinstance(child.hear(), Ready)
        child.tell(Run(job=job, generated_at="2026-11-21T10:00:00.000Z"))
        failed = child.hear()
        assert isinstance(failed, Failed)
        assert (failed.error.code, failed.error.details) == ("INTERNAL", {})
        assert child.hear() is None
        assert child.process.wait(timeout=60) == 0
        assert child.process.stderr is not None
        (line,) = child.process.stderr
        told = msgspec.json.decode(line)
        assert (told["event"], told["level"], told["job_id"]) == ("the command failed", "error", "job-7")
        assert "null byte" in told["exception"]


def test_a_child_that_nobody_can_tell_anything_ends_with_all_that_it_started(tmp_path: Path) -> None:
    with _child(config_of(tmp_path)) as child:
        assert isinstance(child.hear(), Ready)
        assert os.getpriority(os.PRIO_PROCESS, child.process.pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
        child.tell(Check(job_id="job", payload_ref=payload(tmp_path)))
        assert isinstance(child.hear(), Checked)
        members = group(child.process.pid)
        assert len(members) >= 2
        assert child.process.stdin is not None
        child.process.stdin.close()
        assert child.process.wait(timeout=60) == -signal.SIGKILL
        assert gone(members)


@pytest.mark.parametrize("own", [True, False])
def test_a_child_serves_the_process_alone_that_started_it(tmp_path: Path, own: bool) -> None:
    config = msgspec.structs.replace(config_of(tmp_path), parent_pid=os.getpid() if own else 1)
    with _child(config) as child:
        assert isinstance(child.hear(), Ready if own else type(None))
        if not own:
            assert child.process.wait(timeout=60) == 1
            assert child.process.stderr is not None
            assert child.process.stderr.read() == b""
