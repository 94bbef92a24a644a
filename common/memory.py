"""How much memory this process has used."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory_bytes() -> int:
    """The largest resident size of this process since it began, in bytes.

    Not ``getrusage``'s: that figure is handed down from the process that started this one.
    """
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
