"""What a test must not leave behind: processes, threads, files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def child_pids(of: int | str = "self") -> list[int]:
    """Running and dead children of a process, of all its threads; none of a process that has gone."""
    found: list[int] = []
    for children in Path(f"/proc/{of}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread ended meanwhile
            found += map(int, children.read_text().split())
    return sorted(found)


@contextmanager
def nothing_left() -> Iterator[None]:
    """No child (zombies are children too) and no thread more than before."""
    children, threads = set(child_pids()), set(threading.enumerate())
    yield
    assert set(child_pids()) <= children
    assert set(threading.enumerate()) <= threads
