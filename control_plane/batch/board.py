"""What a batch shows: a live table on a terminal, a line for each graph that ran in a pipe, a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.contract import Progress
from control_plane.batch.journal import Record
from control_plane.batch.sources import Graph

SHOWN = 50
"""Lines of the table at the end; failed graphs come first."""


@dataclass(slots=True)
class _Row:
    device: str
    graph: Graph
    stage: str = "starting"
    percent: int = 0


class Board:
    """Everything goes to standard error; the table at the end goes where it is asked to."""

    def __init__(self, graphs: Sequence[Graph]) -> None:
        self._console = Console(stderr=True)
        self._live = Live(self, console=self._console, refresh_per_second=4) if self._console.is_terminal else None
        self._rows: dict[str, _Row] = {}
        self._graphs = len(graphs)
        self._left = sum(_weight(graph) for graph in graphs)
        self._ran = 0
        """Weight of the graphs that were run, and not skipped."""
        self._counts = {"completed": 0, "failed": 0, "skipped": 0}
        self._frames = self._tokens = 0
        self._began = time.monotonic()

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def running(self, label: str, device: str, graph: Graph) -> Iterator[Callable[[Progress], None]]:
        """A row for as long as a slot runs a graph; gives what takes its progress."""
        row = self._rows[label] = _Row(device, graph)

        def tell(progress: Progress) -> None:
            row.stage, row.percent = progress.stage, progress.progress

        try:
            yield tell
        finally:
            del self._rows[label]

    def ended(self, graph: Graph, record: Record) -> None:
        """Count a graph that has ended."""
        self._left -= _weight(graph)
        self._counts[record.status] += 1
        if record.status == "skipped":
            return
        self._ran += _weight(graph)
        if record.error is not None:
            self.note(f"{record.name}: failed: {record.error.message}")
            return
        self._frames += record.frames
        self._tokens += record.tokens
        if self._live is None:
            self.note(f"{record.name}: completed, {record.frames:,} frames, {record.seconds:.1f} s, {record.device}")

    def note(self, text: str) -> None:
        """One line about what is going on."""
        if self._live is None:
            print(_clean(text), file=sys.stderr, flush=True)
        else:
            self._live.console.print(_clean(text), markup=False, highlight=False, soft_wrap=True)

    def __rich__(self) -> RenderableType:
        """The table as it is now."""
        table = Table(box=None, pad_edge=False)
        for name in ("worker", "device", "graph", "stage"):
            table.add_column(name, no_wrap=True)
        table.add_column("%", justify="right")
        rows = sorted(self._rows.items())
        for label, row in rows:
            table.add_row(label, row.device, Text(row.graph.name), row.stage, str(row.percent))
        seconds = max(time.monotonic() - self._began, 1e-3)
        done = self._ran + sum(_weight(row.graph) * row.percent / 100 for _, row in rows)
        left = self._left + self._ran - done
        counts = ", ".join(f"{count:,} {name}" for name, count in self._counts.items())
        totals = (
            f"{sum(self._counts.values()):,} of {self._graphs:,} graphs: {counts}; "
            f"{self._frames / seconds:,.0f} frames/s, {self._tokens / seconds:,.0f} tokens/s"
        )
        if done:
            totals += f"; {_clock(left * seconds / done)} left"
        return Group(table, Text(totals))


def table_of(records: Sequence[Record]) -> list[str]:
    """Lines that show how graphs ended."""
    shown = sorted(records, key=lambda record: (record.status != "failed", record.status == "skipped", record.name))
    width = max([len("graph"), *(len(record.name) for record in shown[:SHOWN])])
    names = f"{'frames':>10} {'vectors':>10} {'tokens':>12} {'cached':>10} {'seconds':>8}"
    lines = [f"{'graph':<{width}}  {'status':<9} {names}"]
    for it in shown[:SHOWN]:
        figures = f"{it.frames:>10,} {it.vectors:>10,} {it.tokens:>12,} {it.cache_hits:>10,} {it.seconds:>8.1f}"
        why = it.device if it.error is None else f"{it.error.code}: {it.error.message}"
        lines.append(_clean(f"{it.name:<{width}}  {it.status:<9} {figures}  {why}"))
    if len(shown) > SHOWN:
        lines.append(f"and {len(shown) - SHOWN:,} more; --json has all of them")
    return [line.rstrip() for line in lines]


def _weight(graph: Graph) -> int:
    return graph.weight + 1  # a source may not know


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}"


def _clean(text: str) -> str:
    """Names in a graph are other people's text: no escape sequence of theirs reaches a terminal."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in text)
