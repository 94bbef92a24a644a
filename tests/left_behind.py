"""What a test must not leave behind: processes, threads, files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def child_pids() -> list[int]:
    """Running and dead children of this process."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # the thread ended meanwhile
            found += map(int, (task / "children").read_text().split())
    return sorted(found)


@contextmanager
def nothing_left() -> Iterator[None]:
    """No child (zombies are children too) and no thread more than before."""
    children, threads = set(child_pids()), set(threading.enumerate())
    yield
    assert set(child_pids()) <= children
    assert set(threading.enumerate()) <= threads
