"""What the worker of these tests notes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from runpod_local import Platform, wait_for

WORKER = [sys.executable, Path(__file__).with_name("worker.py")]
Started = Callable[..., AbstractContextManager[Platform]]


class Notes:
    """What workers noted: lines ``worker id``, ``started`` or ``stopped``, ``job id``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def of(self, job_id: str) -> list[tuple[str, str]]:
        """``(worker, what)`` of one job, in order."""
        lines = [line.split(" ") for line in self.path.read_text().splitlines()]
        return [(worker, what) for worker, what, job in lines if job == job_id]

    def wait(self, job_id: str, what: str, times: int = 1) -> list[tuple[str, str]]:
        """Until a job's workers have noted this so often."""
        found = wait_for(lambda: self.of(job_id), lambda notes: sum(said == what for _, said in notes) >= times)
        return list(found)
