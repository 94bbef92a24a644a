"""Keeps what coverage.py has counted in the processes that end by SIGKILL, as workers and capsule readers do.

``scripts/coverage`` puts this folder on the path of all processes that the tests start; nothing else does.
"""

from __future__ import annotations

import sys
import threading
import time

SECONDS = 0.2
"""Between two looks; without anything new nothing is written."""


def keep() -> None:
    """Save again and again, in a thread that ends with the process."""
    import coverage

    running = coverage.Coverage.current()

    def save() -> None:
        while running is not None:
            time.sleep(SECONDS)
            running.save()

    threading.Thread(target=save, name="coverage", daemon=True).start()


if any(argument.startswith(("handler.", "common.")) for argument in sys.orig_argv):
    keep()
