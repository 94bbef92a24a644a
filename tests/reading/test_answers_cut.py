"""Answers that are longer than their budget, and walks that have too far to go: cut, said to be, and never wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing
from itertools import permutations
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.capsule.gate import Gate
from common.embedding.choice import Engines
from common.embedding.engine import OpenEngines
from common.sidecar.open import Sidecar
from common.storage import FileStorage
from control_plane.operations.keys import EVERYBODY
from control_plane.reading.artifacts import Artifacts
from control_plane.reading.library import Library, OpenCapsule
from control_plane.reading.mcp_stdio import CapsuleFiles
from control_plane.reading.reader import Reader
from control_plane.reading.tools import MAX_IMPACTED, REGISTRY, Answer, Page
from tests.sidecar.test_sidecar import build, node, relation
from tests.test_pipeline import request_of, run

BUDGET = 4_096
SOURCE = "\n".join(f'    print("line {i} → \\t é 😀")' for i in range(400))
CALLERS = 60
CHAIN = 8


@pytest.fixture(scope="module")
def capsule(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class with large properties, a long name, a long source, and many who call it."""
    large = {
        "name": "Large",
        "filePath": "src/large.py",
        "content": SOURCE,
        "description": "d" * 3_000,
        "notes": "n" * 2_500,
        "parts": [f"part {i}" for i in range(200)],
        "owner": "somebody",
    }
    callers = [
        {"id": f"Function:{'far/' * 20}{i}", "label": "Function", "properties": {"name": f"caller_{i}"}}
        for i in range(CALLERS)
    ]
    long = {"id": "long", "label": "Function", "properties": {"name": "long" * 1_200}}
    edges = [
        {"id": f"e{i}", "sourceId": caller["id"], "targetId": "large", "type": "CALLS"}
        for i, caller in enumerate(callers)
    ]
    chain = [
        {"id": f"chain{i}", "label": "Function", "properties": {"name": f"{i}{'_far' * 200}"}} for i in range(CHAIN)
    ]
    steps = [
        {"id": f"c{i}", "sourceId": f"chain{i}", "targetId": f"chain{i + 1}", "type": "CALLS"} for i in range(CHAIN - 1)
    ]
    request = request_of(
        {
            "nodes": [{"id": "large", "label": "Class", "properties": large}, long, *callers, *chain],
            "relationships": [*edges, *steps],
            "options": {"maxSnippetChars": 20_000},
        }
    )
    with Gate() as gate:
        return run(request, tmp_path_factory.mktemp("cut"), gate).capsule_paths[0]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    folder = tmp_path_factory.mktemp("copies")
    with closing(OpenEngines(Engines())) as engines, closing(Artifacts(FileStorage([]), folder, 1)) as artifacts:
        opened = Library(artifacts, engines.get, capacity=1)
        yield opened
        opened.close()


class Asked:
    """A reader with a small budget beside one that has enough."""

    def __init__(self, capsule: Path, library: Library) -> None:
        files = CapsuleFiles([capsule])
        self._readers = {True: Reader(files, library, budget=BUDGET), False: Reader(files, library, budget=16 << 20)}

    def __call__(self, tool: str, *, small: bool = True, **arguments: Any) -> dict[str, Any]:
        body, _ = asyncio.run(self._readers[small].ask(tool, arguments, EVERYBODY))
        assert not small or len(body) <= BUDGET
        answer: dict[str, Any] = json.loads(body)
        return answer


@pytest.fixture
def asked(capsule: Path, library: Library) -> Asked:
    return Asked(capsule, library)


# --- the budget -----------------------------------------------------------------------------------


def test_of_too_many_properties_the_largest_are_left_out(asked: Asked) -> None:
    whole = asked("node_get", small=False, nodeId="large")["result"]["metadata"]
    answer = asked("node_get", nodeId="large")
    kept = answer["result"]["metadata"]
    assert answer["confidence"]["warnings"] == ["RESULT_TRUNCATED"]
    assert answer["pagination"] == {"nextCursor": None, "truncated": True, "returned": 1}
    assert kept == {key: whole[key] for key in kept}
    assert kept["owner"] == "somebody"
    sizes = {key: len(json.dumps(value)) for key, value in whole.items()}
    assert max(sizes[key] for key in kept) <= min(size for key, size in sizes.items() if key not in kept)


def test_a_text_is_cut_where_it_fits_and_goes_on_there(asked: Asked) -> None:
    whole = asked("file_snippet", small=False, nodeId="large", maxChars=20_000)["result"]["snippet"]
    assert len(whole) > BUDGET
    pieces: list[str] = []
    cursor: dict[str, Any] = {}
    while True:
        answer = asked("file_snippet", nodeId="large", maxChars=20_000, **cursor)
        pieces.append(answer["result"]["snippet"])
        assert answer["pagination"]["returned"] == len(pieces[-1]) > 0
        if answer["pagination"]["nextCursor"] is None:
            break
        assert answer["pagination"]["truncated"]
        cursor = {"cursor": answer["pagination"]["nextCursor"]}
    assert "".join(pieces) == whole
    assert len(pieces) > 2


def test_one_item_that_alone_is_too_long_comes_shortened(asked: Asked) -> None:
    answer = asked("symbol_lookup", query="long")
    assert answer["confidence"]["warnings"] == ["RESULT_TRUNCATED", "ITEM_SHORTENED"]
    [item] = answer["result"]["items"]
    assert item["name"] == f"{('long' * 50)[:200]}...[truncated]"
    assert (item["id"], item["label"]) == ("long", "Function")
    assert answer["pagination"]["returned"] == 1


def test_one_path_that_alone_is_too_long_keeps_all_its_nodes(asked: Asked) -> None:
    answer = asked("call_trace", fromNodeId="chain0", maxDepth=10)
    assert answer["confidence"]["warnings"] == ["RESULT_TRUNCATED", "ITEM_SHORTENED"]
    [path] = answer["result"]["paths"]
    assert [item["id"] for item in path["nodes"]] == [f"chain{i}" for i in range(CHAIN)]
    assert {len(item["name"]) for item in path["nodes"]} == {200 + len("...[truncated]")}


def test_a_question_that_cannot_be_said_again_within_the_budget_is_an_error(asked: Asked) -> None:
    error = asked("query_explain", task="\x01" * 1_900)  # each takes six bytes
    assert (error["code"], error["retryable"]) == ("RESULT_TRUNCATED", True)
    assert f"{BUDGET:,} bytes" in error["message"]


def test_what_stands_beside_a_list_leaves_room_for_the_list(asked: Asked) -> None:
    whole = asked("impact_analysis", small=False, nodeId="large")["result"]
    assert (whole["impactedNodeCount"], len(whole["hotspots"])) == (CALLERS, 10)
    found: list[Any] = []
    cursor: dict[str, Any] = {}
    while True:
        answer = asked("impact_analysis", nodeId="large", **cursor)
        assert 0 < len(answer["result"]["hotspots"]) < 10
        assert answer["result"]["hotspots"] == whole["hotspots"][: len(answer["result"]["hotspots"])]
        found += answer["result"]["impactedNodes"]
        if answer["pagination"]["nextCursor"] is None:
            break
        cursor = {"cursor": answer["pagination"]["nextCursor"]}
    assert found == whole["impactedNodes"]


def test_a_node_is_looked_up_by_its_id(asked: Asked) -> None:
    [first, *_] = asked("symbol_lookup", small=False, query=f"Function:{'far/' * 20}7")["result"]["items"]
    assert (first["name"], first["score"]) == ("caller_7", 1.0)


# --- walks ----------------------------------------------------------------------------------------


def walk(sidecar: Sidecar, tool: str, **arguments: Any) -> Answer:
    """The answer of a tool that asks nothing but the sidecar."""
    kind, answer = REGISTRY[tool]
    given = msgspec.convert(arguments, kind)
    return answer(OpenCapsule(None, sidecar), given, Page(0))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def everybody_calls_everybody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    names = [f"f{i}" for i in range(9)]
    calls = [relation(one, "CALLS", other) for one, other in permutations(names, 2)]
    path = build(tmp_path_factory.mktemp("walks") / "x.sqlite", [*map(node, [*names, "alone"]), *calls])
    with closing(Sidecar.open(path)) as sidecar:
        yield sidecar


def test_paths_are_found_up_to_the_limit_shortest_first(everybody_calls_everybody: Sidecar) -> None:
    answer = walk(everybody_calls_everybody, "call_trace", fromNodeId="f0", toNodeId="f1", limitPaths=9)
    assert [path["length"] for path in answer.result["paths"]] == [1, *[2] * 7, 3]
    assert answer.warnings == ["TRACE_LIMITED"]
    whole = walk(everybody_calls_everybody, "call_trace", fromNodeId="f0", toNodeId="f1", maxDepth=2, limitPaths=9)
    assert ([path["length"] for path in whole.result["paths"]], whole.warnings) == ([1, *[2] * 7], [])


def test_a_trace_without_a_goal_ends_at_the_limit(everybody_calls_everybody: Sidecar) -> None:
    answer = walk(everybody_calls_everybody, "call_trace", fromNodeId="f0", maxDepth=2, limitPaths=5)
    assert [path["length"] for path in answer.result["paths"]] == [2] * 5
    assert answer.warnings == ["TRACE_LIMITED"]
    alone = walk(everybody_calls_everybody, "call_trace", fromNodeId="alone", limitPaths=5)
    assert (alone.result["paths"], alone.warnings) == ([], [])


def test_a_walk_that_leads_nowhere_ends_after_its_steps_and_says_so(tmp_path: Path) -> None:
    # Of twenty who call each other all lead to the goal, but only through the node that the walk begins at.
    names = [f"f{i}" for i in range(20)]
    calls = [relation(one, "CALLS", other) for one, other in permutations([*names, "start"], 2)]
    path = build(
        tmp_path / "x.sqlite", [*map(node, [*names, "start", "goal"]), *calls, relation("start", "CALLS", "goal")]
    )
    with closing(Sidecar.open(path)) as sidecar:
        short = walk(sidecar, "call_trace", fromNodeId="start", toNodeId="goal", maxDepth=4)
        long = walk(sidecar, "call_trace", fromNodeId="start", toNodeId="goal", maxDepth=10)
    assert (short.warnings, long.warnings) == ([], ["TRACE_LIMITED"])
    for answer in (short, long):
        assert [[item["id"] for item in found["nodes"]] for found in answer.result["paths"]] == [["start", "goal"]]


def test_of_more_dependents_than_are_told_the_nearest_are(tmp_path: Path) -> None:
    near = [f"near_{i}" for i in range(5)]
    far = [f"far_{i}" for i in range(MAX_IMPACTED)]
    calls = [relation(name, "CALLS", "root") for name in near] + [relation(name, "CALLS", near[0]) for name in far]
    path = build(tmp_path / "x.sqlite", [*map(node, ["root", *near, *far]), *calls])
    with closing(Sidecar.open(path)) as sidecar:
        answer = walk(sidecar, "impact_analysis", nodeId="root", maxDepth=5)
    assert answer.warnings == ["IMPACT_LIMITED"]
    assert answer.result["impactedNodeCount"] == MAX_IMPACTED - 1
    shown = answer.result["impactedNodes"]
    assert [item["depth"] for item in shown] == [1] * 5 + [2] * (len(shown) - 5)
