"""What the command line shows: bars on a terminal, quiet lines in a pipe, on request nothing but JSON on stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from common.contract import Progress, Report


class Show:
    """Standard error has the progress, standard output the result."""

    def __init__(self, *, json: bool) -> None:
        self.json = json
        self._console = Console(stderr=True)
        self._bars: Bars | None = None

    def __enter__(self) -> Show:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> Bars | None:
        """The bars, None in a pipe."""
        if self._bars is None and self._console.is_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
            self._bars = Bars(*columns, TimeElapsedColumn(), console=self._console, redirect_stdout=False)
            self._bars.start()
        return self._bars

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def stages(self, name: str) -> Callable[[Progress], None]:
        """A sink for the progress of one export; in a pipe it prints a line for each stage."""
        if bars := self._start():
            task = bars.add_task(f"{name}: starting", total=100)

            def move(progress: Progress) -> None:
                bars.update(task, completed=progress.progress, description=f"{name}: {progress.message}")

            return move
        stage = ""

        def tell(progress: Progress) -> None:
            nonlocal stage
            if progress.stage != stage:
                stage = progress.stage
                self.note(f"{name}: {progress.progress:3d}% {progress.message}")

        return tell

    def amount(self, what: str, unit: str = "bytes") -> Callable[[int, int], None]:
        """A sink for what is done, as ``(done, total)``; a pipe gets one line at the end."""
        if bars := self._start():
            task = bars.add_task(what, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        def tell(done: int, total: int) -> None:
            if done >= total:
                self.note(f"{what}: {total:,} {unit}")

        return tell

    def note(self, text: str) -> None:
        """One line about what is going on."""
        if self._bars is None:
            print(text.translate(_CONTROLS), file=sys.stderr, flush=True)
        else:
            self._bars.console.print(text.translate(_CONTROLS), markup=False, highlight=False, soft_wrap=True)

    def result(self, *lines: str) -> None:
        """Lines for people; dropped where JSON was asked for."""
        if not self.json:
            for line in lines:
                self._out(line)

    def data(self, value: object) -> None:
        """One line of JSON, where JSON was asked for."""
        if self.json:
            self._out(msgspec.json.encode(value).decode())

    def report(self, report: Report, *paths: tuple[str, Path]) -> None:
        """The end of an export: the report as JSON, or what a person wants to know of it."""
        self.data(report)
        capsule = report.capsule
        vectors = f", {capsule.vectors:,} vectors" if capsule.vectors else ""
        parts = f" in {capsule.parts} parts" if capsule.parts > 1 else ""
        left = report.left_out
        self.result(
            f"{capsule.frames:,} frames{vectors}, {capsule.size_bytes / 1e6:.1f} MB{parts}, "
            f"{report.timings.total:.2f} s, writer {report.writer}",
            *(f"  {name:<9}{os.fsencode(path).decode(errors='replace')}" for name, path in paths),
            *(f"  warning  {w.code} x {w.count:,}: {w.example}" for w in report.warnings),
        )
        if left.nodes or left.relationships:
            self.result(f"  left out {left.nodes:,} nodes and {left.relationships:,} relationships, by the maximum")

    def _out(self, line: str) -> None:
        self._stop()  # a finished bar stays above the result
        print(line.translate(_CONTROLS), flush=True)


_CONTROLS = dict.fromkeys((*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)), "\ufffd")
"""Names in a graph are other people's text: no escape sequence of theirs reaches a terminal."""
