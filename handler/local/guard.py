"""What keeps worker processes from outliving the local Runpod, however it ends. Run as a script of its own, without
site packages, because it starts once for each worker:

- ``guard.py start PARENT COMMAND…`` becomes COMMAND, which the kernel ends when the process PARENT does;
- ``guard.py watch`` reads process groups from its standard input (``+GROUP``, ``-GROUP``) and ends those that are left
  when the input ends: the processes that a worker started itself, such as the one that pings, get no signal from the
  kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def _start(parent: int, command: list[str]) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the local Runpod has ended")
    try:
        os.execvp(command[0], command)  # noqa: S606 - the command that the local Runpod was given
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


def _watch() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    groups = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line.startswith("+"):
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] == "start":
        _start(int(sys.argv[2]), sys.argv[3:])
    else:
        _watch()
