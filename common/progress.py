"""The stage table: where each stage lies on the bar from 0 to 100, and how it looks to people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.contract import Progress, Stage

MARKS: dict[Stage, tuple[int, int]] = {
    "queued": (0, 0),
    "transform": (5, 20),
    "frame_prep": (20, 45),
    "write_capsule": (60, 79),
    "build_sidecar": (79, 90),
    "finalize": (90, 96),
    "download_ready": (100, 100),
}
"""First and last mark of each stage, as today's service shows them."""

EMOJI: dict[Stage, str] = {
    "queued": "🕒",
    "transform": "🧭",
    "frame_prep": "🧩",
    "write_capsule": "📦",
    "build_sidecar": "🗂️",
    "finalize": "🔍",
    "download_ready": "✅",
    "failed": "❌",
    "canceled": "🛑",
    "expired": "⌛",
}

_ORDER: list[Stage] = list(MARKS)


class ProgressReporter:
    """Turns shares of stages into figures that never fall, and passes on only those that moved by a whole percent.

    ``sink`` is called in the thread that reports; stages only move forward (a report of an earlier stage is dropped).
    """

    def __init__(self, sink: Callable[[Progress], None]) -> None:
        self._sink = sink
        self._last: tuple[int, int, int] = (-1, -1, -1)

    def report(self, stage: Stage, share: float, message: str, **meta: Any) -> None:
        """Report that ``share`` (0 to 1) of ``stage`` is done."""
        low, high = MARKS[stage]
        share = min(1.0, max(0.0, share))
        now = (_ORDER.index(stage), low + int((high - low) * share), int(100 * share))
        if now[0] < self._last[0] or (now[0] == self._last[0] and now[2] <= self._last[2]):
            return
        self._last = now
        self._sink(Progress(stage=stage, progress=now[1], stage_progress=now[2], message=message, meta=meta))
