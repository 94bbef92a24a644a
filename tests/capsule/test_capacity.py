"""The plan of parts against what the parts then take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.capsule.capacity import plan
from common.errors import CapacityExceeded
from common.frames.build import frame_count, frames
from common.graph.canonical import canonical
from common.graph.model import Graph
from common.graph.read import read_graph
from tests.capsule.conftest import DAY, vectors_of
from tests.capsule.test_native_writer import write

GRAPHS = ["memvid-export.graph.ndjson.gz", "runpod-python.export.json.gz", "litestar.export.json.gz"]


def graph_of(real_graphs: dict[str, Path], name: str) -> Graph:
    """The canonical form of a real graph."""
    if name not in real_graphs:
        pytest.skip(f"{name} lies only beside this repository")
    return canonical(read_graph(real_graphs[name]))


@pytest.mark.parametrize("name", GRAPHS)
def test_the_estimate_of_a_real_graph_is_near_the_truth(
    real_graphs: dict[str, Path], tmp_path: Path, memvid: Callable[[Path], Any], name: str
) -> None:
    graph = graph_of(real_graphs, name)
    made = list(frames(graph, generated_at=DAY, layout="static-v2"))
    planned = plan(graph, generated_at=DAY, layout="static-v2", dimension=256)
    path = write(tmp_path / "c.mv2", made, vectors_of(made))
    stats = memvid(path).stats()
    payload_end = 4_096 + stats["wal_bytes"] + stats["payload_bytes"]
    indexes = payload_end + stats["time_index_bytes"] + stats["lex_index_bytes"] + stats["vec_index_bytes"]
    toc = path.stat().st_size - indexes
    assert planned.parts == [len(made) - 5]
    assert planned.costs.payload == pytest.approx(payload_end, rel=0.15)
    assert planned.costs.toc == pytest.approx(toc, rel=0.15)
    assert planned.costs.vectors == pytest.approx(stats["vec_index_bytes"], rel=0.15)


@pytest.mark.parametrize("capacity", [150_000, 300_000, 1_000_000])
def test_parts_hold_all_frames_once_and_fewer_where_frames_are_heavy(
    real_graphs: dict[str, Path], capacity: int
) -> None:
    graph = graph_of(real_graphs, GRAPHS[0])
    planned = plan(graph, generated_at=DAY, capacity=capacity)
    assert sum(planned.parts) == frame_count(graph) - 5
    assert min(planned.parts) > 0
    if len(planned.parts) > 3:
        assert planned.parts[0] < planned.parts[-2]  # nodes with snippets come first, relations last


def test_a_smaller_share_makes_more_parts(real_graphs: dict[str, Path]) -> None:
    graph = graph_of(real_graphs, GRAPHS[0])
    counts = [len(plan(graph, generated_at=DAY, capacity=200_000, share=share).parts) for share in (0.9, 0.6, 0.4)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_a_capacity_without_room_for_a_frame_is_refused(real_graphs: dict[str, Path]) -> None:
    graph = graph_of(real_graphs, GRAPHS[0])
    with pytest.raises(CapacityExceeded, match="no room"):
        plan(graph, generated_at=DAY, capacity=70_000)
