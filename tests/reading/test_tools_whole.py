"""Whole graphs, node by node: the read tools answer what networkx finds in the graph as it was given."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import pytest
from mcp_server import GRAPHS, Exports, raw_graph

from common.embedding.choice import Engines
from common.embedding.engine import OpenEngines
from common.sidecar.build import normalise_name
from common.storage import FileStorage
from control_plane.operations.keys import EVERYBODY
from control_plane.reading.artifacts import Artifacts
from control_plane.reading.library import Library
from control_plane.reading.places import ExportPlaces
from control_plane.reading.reader import Reader
from control_plane.reading.search import PLAIN_LABELS

DEPENDING = {"CALLS", "IMPORTS", "EXTENDS", "IMPLEMENTS", "METHOD_OVERRIDES", "OVERRIDES", "ACCESSES", "USES"}
SMALL = 4_096
LARGE = 16 << 20
EVERY = 5
"""Of litestar every fifth node is asked what its change may break."""

Items = list[dict[str, Any]]


class Whole(NamedTuple):
    """A graph, and readers of its capsule with the usual, the smallest and the largest budget."""

    name: str
    graph: nx.MultiDiGraph
    usual: Reader
    small: Reader
    large: Reader

    async def ask(self, tool: str, reader: Reader | None = None, **arguments: Any) -> dict[str, Any]:
        given = {**arguments, "locator": {"jobId": self.name}}
        body, is_error = await (reader or self.usual).ask(tool, given, EVERYBODY)
        assert not is_error, (tool, arguments, body)
        envelope: dict[str, Any] = json.loads(body)
        return envelope

    async def all(self, tool: str, key: str, reader: Reader | None = None, **arguments: Any) -> Items:
        """All items, page by page to the end."""
        items: Items = []
        cursor: dict[str, Any] = {}
        while True:
            envelope = await self.ask(tool, reader, **arguments, **cursor)
            page, found = envelope["pagination"], envelope["result"][key]
            items += found
            assert page["returned"] == len(found)
            assert page["truncated"] or page["nextCursor"] is None
            if page["nextCursor"] is None:
                return items
            assert found, "a page that goes on has something on it"
            cursor = {"cursor": page["nextCursor"]}


@pytest.fixture(scope="module")
def readers(capsules: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Reader]]:
    """The usual budget, the smallest, the largest."""
    exports = Exports()
    for name, path in capsules.items():
        exports.add(name, path.as_uri())
    with closing(OpenEngines(Engines())) as engines:
        artifacts = Artifacts(FileStorage([]), tmp_path_factory.mktemp("copies"), 1)
        library = Library(artifacts, engines.get, capacity=4)
        places = ExportPlaces(exports, capsules[GRAPHS[0]].parents[1], external=False, note=[].append)
        yield [Reader(places, library, budget=budget) for budget in (65_536, SMALL, LARGE)]
        library.close()
        artifacts.close()


@pytest.fixture(scope="module", params=GRAPHS)
def whole(request: pytest.FixtureRequest, readers: list[Reader], capsules: dict[str, Path], real_graphs: Any) -> Whole:
    if request.param not in capsules:
        pytest.skip("this graph lies beside the repository only")
    nodes, edges = raw_graph(real_graphs[request.param])
    graph = nx.MultiDiGraph()
    graph.add_nodes_from((node["id"], node) for node in nodes)
    # Relationships equal in every field are one.
    for edge in {json.dumps(edge, sort_keys=True): edge for edge in edges}.values():
        graph.add_edge(edge["sourceId"], edge["targetId"], **edge)
    return Whole(request.param, graph, *readers)


def run(check: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Answers come from threads at first, and on the event loop later."""
    asyncio.run(check())


def ids(items: Iterable[dict[str, Any]]) -> list[str]:
    return [item["id"] for item in items]


def busiest(graph: nx.MultiDiGraph, count: int) -> list[str]:
    return sorted(graph, key=lambda node: (-graph.degree(node), node))[:count]


# --- node by node ---


def test_every_node_is_found_by_its_name_before_all_others(whole: Whole) -> None:
    named: dict[str, list[str]] = defaultdict(list)
    plain: dict[str, bool] = {}
    for node, data in whole.graph.nodes(data=True):
        named[data["properties"]["name"]].append(node)
        plain[node] = data["label"] in PLAIN_LABELS

    async def check() -> None:
        for name, nodes in named.items():
            items: Items = []
            cursor: dict[str, Any] = {}
            while sum(item["name"] == name for item in items) < len(nodes):
                asked = {"query": name, "limit": min(200, len(nodes) + 1), **cursor}
                envelope = await whole.ask("symbol_lookup", None, **asked)
                items += envelope["result"]["items"]
                if envelope["pagination"]["nextCursor"] is None:
                    break
                cursor = {"cursor": envelope["pagination"]["nextCursor"]}
            assert [item["id"] for item in items if item["name"] == name] == sorted(
                nodes, key=lambda node: (plain[node], node)
            ), name
            last = max(place for place, item in enumerate(items) if item["name"] == name)
            key = normalise_name(name)
            assert all(normalise_name(item["name"]) == key for item in items[:last]), name

    run(check)


def test_every_node_comes_by_its_id_with_its_degree(whole: Whole) -> None:
    async def check() -> None:
        for node, data in whole.graph.nodes(data=True):
            result = (await whole.ask("node_get", nodeId=node))["result"]
            about, properties = result["node"], data["properties"]
            assert (about["id"], about["label"], about["name"]) == (node, data["label"], properties["name"])
            for key in ("filePath", "startLine", "endLine"):
                assert about[key] == properties.get(key)
            assert (result["degree"]["in"], result["degree"]["out"]) == (
                whole.graph.in_degree(node),
                whole.graph.out_degree(node),
            )
            assert set(properties) - {"content"} <= set(result["metadata"])

    run(check)


def test_callers_and_callees_of_every_node_are_those_of_the_graph(whole: Whole) -> None:
    ends: dict[str, dict[str, dict[str, float]]] = {"callers_of": defaultdict(dict), "callees_of": defaultdict(dict)}
    for source, target, data in whole.graph.edges(data=True):
        if data["type"] == "CALLS":
            for tool, here, there in (("callers_of", target, source), ("callees_of", source, target)):
                known = ends[tool][here]
                known[there] = max(known.get(there, 0), data["confidence"])

    async def check() -> None:
        for tool, known in ends.items():
            for node in whole.graph:
                items = await whole.all(tool, "items", nodeId=node, limit=200)
                assert [(item["id"], item["confidence"]) for item in items] == sorted(known[node].items())

    run(check)


def test_neighbours_of_every_node_are_its_relationships(whole: Whole) -> None:
    async def check() -> None:
        for node in whole.graph:
            expected = Counter(
                [("out", edge["type"], other) for _, other, edge in whole.graph.out_edges(node, data=True)]
                + [("in", edge["type"], other) for other, _, edge in whole.graph.in_edges(node, data=True)]
            )
            items = await whole.all("neighbors_get", "items", nodeId=node, limit=200)
            assert Counter((item["direction"], item["type"], item["node"]["id"]) for item in items) == expected
            assert [item["direction"] for item in items] == sorted((i["direction"] for i in items), reverse=True)

    run(check)


def test_steps_of_every_process_are_those_of_the_graph_in_order(whole: Whole) -> None:
    async def check() -> None:
        for node, data in whole.graph.nodes(data=True):
            if data["label"] != "Process":
                continue
            edges = [edge for _, _, edge in whole.graph.in_edges(node, data=True) if edge["type"] == "STEP_IN_PROCESS"]
            envelope = await whole.ask("process_get", processId=node)
            steps = [(step["step"], step["node"]["id"]) for step in envelope["result"]["steps"]]
            assert steps == sorted((edge["step"], edge["sourceId"]) for edge in edges)
            about = envelope["result"]["process"]
            assert (about["entryPointId"], about["terminalId"]) == (
                data["properties"].get("entryPointId"),
                data["properties"].get("terminalId"),
            )

    run(check)


def test_what_a_change_may_break_is_what_leads_to_the_node(whole: Whole) -> None:
    depending = nx.DiGraph()
    depending.add_nodes_from(whole.graph)
    count: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for source, target, data in whole.graph.edges(data=True):
        if data["type"] in DEPENDING:
            depending.add_edge(target, source)
            count[target] += 1
        if data["type"] == "CALLS":
            calls[source] += 1
            calls[target] += 1
    every = EVERY if len(whole.graph) > 10_000 else 1

    async def check() -> None:
        for node in {*sorted(whole.graph)[::every], *busiest(whole.graph, 50)}:
            away = nx.single_source_shortest_path_length(depending, node, cutoff=3)
            envelope = await whole.ask("impact_analysis", nodeId=node)
            result = envelope["result"]
            assert result["impactedNodeCount"] == len(away) - 1
            assert result["impactedEdgeCount"] == sum(count[at] for at, depth in away.items() if depth < 3)
            expected = sorted((depth, at) for at, depth in away.items() if at != node)
            shown = [(item["depth"], item["id"]) for item in result["impactedNodes"]]
            assert shown == expected[: len(shown)]
            assert (len(shown) == len(expected)) == (envelope["pagination"]["nextCursor"] is None)
            hot = [spot["callsIn"] + spot["callsOut"] for spot in result["hotspots"]]
            assert hot == sorted((calls[at] for _, at in expected if calls[at]), reverse=True)[:10]

    run(check)


def test_traces_of_many_pairs_are_the_simple_paths_of_the_graph(whole: Whole) -> None:
    calls = nx.DiGraph((s, t) for s, t, data in whole.graph.edges(data=True) if data["type"] == "CALLS")
    starts = sorted(calls)[:: max(1, len(calls) // 250)]

    async def check() -> None:
        for start in starts:
            far = nx.single_source_shortest_path_length(calls, start, cutoff=4)
            goal = max((depth, node) for node, depth in far.items())[1]
            expected = {tuple(path) for path in nx.all_simple_paths(calls, start, goal, cutoff=4)} - {(start,)}
            asked = {"fromNodeId": start, "toNodeId": goal, "maxDepth": 4, "limitPaths": 100}
            items = await whole.all("call_trace", "paths", **asked)
            paths = [tuple(ids(item["nodes"])) for item in items]
            assert len(set(paths)) == len(paths)
            assert set(paths) == expected if len(expected) < 100 else set(paths) <= expected
            assert [len(path) for path in paths] == sorted(len(path) for path in paths)

    run(check)


# --- files ---


def test_the_outline_of_every_file_has_its_symbols_by_line(whole: Whole) -> None:
    held: dict[str, set[str]] = defaultdict(set)
    for node, data in whole.graph.nodes(data=True):
        path = data["properties"].get("filePath")
        if path and data["label"] not in ("File", "Folder"):
            held[path].add(node)

    async def check() -> None:
        for path, nodes in held.items():
            symbols = await whole.all("file_outline", "symbols", filePath=path)
            assert set(ids(symbols)) == nodes
            assert len(symbols) == len(nodes)
            lines = [-1 if item["startLine"] is None else item["startLine"] for item in symbols]
            assert lines == sorted(lines)

    run(check)


def test_snippets_begin_with_the_declaration_of_their_symbol(whole: Whole) -> None:
    """A snippet of another symbol is worse than none."""
    kinds = {"Function": r"\b(?:def|function|fn|const|async)\b|=>|\(", "Method": r"\bdef\b|\(", "Class": r"\bclass\b"}
    shown = 0

    async def check() -> None:
        nonlocal shown
        for node, data in whole.graph.nodes(data=True):
            if data["label"] not in kinds or not str(data["properties"].get("filePath")).endswith(".py"):
                continue
            snippet = (await whole.ask("file_snippet", nodeId=node))["result"]["snippet"]
            lines = [line.strip() for line in snippet.splitlines()]
            declared = re.compile(rf"(?:async )?(?:def|class) {re.escape(data['properties']['name'])}\b")
            first = next((at for at, line in enumerate(lines) if re.match(r"(?:async )?(?:def|class)\b", line)), None)
            if not snippet:
                continue
            shown += 1
            assert first is not None, (node, snippet[:300])
            assert declared.match(lines[first]), (node, snippet[:300])

    run(check)
    symbols = sum(data["label"] in kinds for _, data in whole.graph.nodes(data=True))
    assert shown > 0.5 * symbols


# --- page by page ---


def test_pages_joined_are_the_whole_answer_for_every_tool_that_pages(whole: Whole) -> None:
    """In pages of seven items, and in pages of 4,096 bytes: each item once, in the same order."""
    graph = whole.graph
    busy = busiest(graph, 6)
    callees = Counter(target for _, target, data in graph.edges(data=True) if data["type"] == "CALLS")
    called = [node for node, _ in callees.most_common(3)]
    callers = Counter(source for source, _, data in graph.edges(data=True) if data["type"] == "CALLS")
    calling = [node for node, _ in callers.most_common(3)]
    files = Counter(data["properties"].get("filePath") for _, data in graph.nodes(data=True))
    del files[None]
    steps = Counter(target for _, target, data in graph.edges(data=True) if data["type"] == "STEP_IN_PROCESS")
    asked: list[tuple[str, str, dict[str, Any], bool]] = [
        *(("symbol_lookup", "items", {"query": query}, True) for query in ("get", "init", "test", "__init__")),
        *(("text_search", "items", {"query": query}, True) for query in ("request handler", "run")),
        *(("neighbors_get", "items", {"nodeId": node}, True) for node in busy),
        *(("neighbors_get", "items", {"nodeId": node, "relationTypes": ["CALLS", "IMPORTS"]}, True) for node in called),
        *(("callers_of", "items", {"nodeId": node}, True) for node in called),
        *(("callees_of", "items", {"nodeId": node}, True) for node in calling),
        ("process_list", "items", {}, True),
        ("community_list", "items", {}, True),
        *(("impact_analysis", "impactedNodes", {"nodeId": node}, False) for node in called),
        *(("file_outline", "symbols", {"filePath": path}, False) for path, _ in files.most_common(4)),
        *(("process_get", "steps", {"processId": node}, False) for node, _ in steps.most_common(3)),
        *(("call_trace", "paths", {"fromNodeId": node, "maxDepth": 4, "limitPaths": 100}, False) for node in calling),
    ]

    async def check() -> None:
        for tool, key, arguments, limited in asked:
            many = {"limit": 200} if limited else {}
            items = await whole.all(tool, key, whole.large, **arguments, **many)
            assert items, (tool, arguments)
            known = [json.dumps(item) for item in items]
            assert len(set(known)) == len(known), (tool, arguments)
            assert await whole.all(tool, key, whole.small, **arguments, **many) == items, (tool, arguments)
            if limited:
                assert await whole.all(tool, key, **arguments, limit=7) == items, (tool, arguments)

    run(check)


def test_a_source_read_in_pieces_is_the_source(whole: Whole) -> None:
    async def check() -> None:
        for node in sorted(whole.graph)[:: len(whole.graph) // 40]:
            pieces: set[str] = set()
            for reader, chars in ((whole.large, 60_000), (whole.usual, 97), (whole.small, 60_000)):
                found = ""
                cursor: dict[str, Any] = {}
                while True:
                    envelope = await whole.ask("file_snippet", reader, nodeId=node, maxChars=chars, **cursor)
                    found += envelope["result"]["snippet"]
                    if envelope["pagination"]["nextCursor"] is None:
                        break
                    cursor = {"cursor": envelope["pagination"]["nextCursor"]}
                pieces.add(found)
            assert len(pieces) == 1

    run(check)
