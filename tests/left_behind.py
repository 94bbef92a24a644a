"""What a test must not leave behind: processes, threads, files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def child_pids() -> list[int]:
    """Running and dead children of this process."""
    tasks = Path("/proc/self/task").iterdir()
    return sorted(int(pid) for task in tasks for pid in (task / "children").read_text().split())


@contextmanager
def nothing_left() -> Iterator[None]:
    """No child (zombies are children too) and no thread more than before."""
    children, threads = child_pids(), set(threading.enumerate())
    yield
    assert child_pids() == children
    assert set(threading.enumerate()) <= threads
