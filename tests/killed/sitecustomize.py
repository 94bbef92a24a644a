"""Keeps what coverage.py has counted in the processes that end by SIGKILL, as workers and capsule readers do.

``scripts/coverage`` puts this folder on the path of all processes that the tests start; nothing else does.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading

SECONDS = 0.2
"""Between two looks; without anything new nothing is written."""


def keep() -> None:
    """Save again and again, in a thread that ends with the process, and before a child says anything to its parent,
    which may end it for what it said."""
    import coverage

    running = coverage.Coverage.current()
    collector = running._collector if running is not None else None
    if collector is None:
        return
    lock, ended, write = threading.RLock(), threading.Event(), os.write
    looked: dict[str, set[int]] = {}

    def forget() -> None:
        # Its own way forgets all, also what other threads have counted while it was writing.
        for name, arcs in looked.items():
            collector.data[name].difference_update(arcs)

    def save() -> None:
        with lock:
            looked.clear()
            looked.update({name: arcs.copy() for name, arcs in collector.data.copy().items()})
            running.save()

    def saved_write(handle: int, data: bytes) -> int:
        save()
        return write(handle, data)

    def save_on() -> None:
        while not ended.wait(SECONDS):
            save()

    def end() -> None:
        # A thread that still writes while the interpreter ends makes some processes end by SIGSEGV.
        ended.set()
        saving.join()

    collector._clear_data = forget
    if "handler.child" in sys.orig_argv:
        os.write = saved_write
    saving = threading.Thread(target=save_on, name="coverage", daemon=True)
    saving.start()
    atexit.register(end)


if any(argument.startswith(("handler.", "common.")) or argument == "worker" for argument in sys.orig_argv):
    keep()
