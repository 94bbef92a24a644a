"""The read tools answer as the graph does, within their budget, and say clearly what is wrong."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import networkx as nx
import pytest
from mcp_server import GRAPHS, KEY, Exports, McpServer, raw_graph
from provider_server import provider_server

from common.capsule.gate import Gate
from common.embedding.choice import Choice, Engines
from common.embedding.engine import OpenEngines
from common.frames.guide import TOOLS
from common.graph.read import read_graph
from common.pipeline import export
from common.sidecar.open import Sidecar

DEPENDING = {"CALLS", "IMPORTS", "EXTENDS", "METHOD_OVERRIDES", "ACCESSES"}
EXAMPLE = GRAPHS[0]


class Asked(NamedTuple):
    """A server, a capsule on it, and the graph that the capsule was made from."""

    server: McpServer
    name: str
    graph: nx.MultiDiGraph

    def ask(self, calls: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
        locator = {"jobId": self.name}
        return self.server.ask_all([(tool, {**arguments, "locator": locator}) for tool, arguments in calls])

    def sample(self) -> list[str]:
        """The busiest nodes, and some of all."""
        ordered = sorted(self.graph, key=lambda node: (-self.graph.degree(node), node))
        return sorted({*ordered[:8], *ordered[:: max(1, len(ordered) // 40)]})


@pytest.fixture(scope="module", params=GRAPHS)
def asked(request: pytest.FixtureRequest, mcp_server: McpServer, capsules: dict[str, Path], real_graphs: Any) -> Asked:
    if request.param not in capsules:
        pytest.skip("this graph lies beside the repository only")
    nodes, edges = raw_graph(real_graphs[request.param])
    graph = nx.MultiDiGraph()
    graph.add_nodes_from((node["id"], node) for node in nodes)
    # Relationships equal in every field are one.
    for edge in {json.dumps(edge, sort_keys=True): edge for edge in edges}.values():
        graph.add_edge(edge["sourceId"], edge["targetId"], **edge)
    return Asked(mcp_server, request.param, graph)


def ids(items: list[dict[str, Any]]) -> list[str]:
    return [item["id"] for item in items]


def ends(graph: nx.MultiDiGraph, node: str, kind: str, direction: str) -> list[str]:
    found = graph.in_edges(node, data=True) if direction == "in" else graph.out_edges(node, data=True)
    return sorted({source if direction == "in" else target for source, target, data in found if data["type"] == kind})


# --- against the graph ------------------------------------------------------------------------------


def test_callers_and_callees_are_those_of_the_graph(asked: Asked) -> None:
    sample = asked.sample()
    for tool, direction in (("callers_of", "in"), ("callees_of", "out")):
        answers = asked.ask([(tool, {"nodeId": node, "limit": 200}) for node in sample])
        for node, answer in zip(sample, answers, strict=True):
            expected = ends(asked.graph, node, "CALLS", direction)
            found = answer["result"]["items"]
            assert ids(found) == expected[: len(found)]
            assert len(found) == len(expected) or answer["pagination"]["nextCursor"]


def test_neighbours_are_the_relationships_of_the_graph(asked: Asked) -> None:
    sample = [node for node in asked.sample() if asked.graph.degree(node) <= 100]
    answers = asked.ask([("neighbors_get", {"nodeId": node, "limit": 200}) for node in sample])
    for node, answer in zip(sample, answers, strict=True):
        expected = Counter(
            [("out", data["type"], target) for _, target, data in asked.graph.out_edges(node, data=True)]
            + [("in", data["type"], source) for source, _, data in asked.graph.in_edges(node, data=True)]
        )
        items = answer["result"]["items"]
        assert Counter((item["direction"], item["type"], item["node"]["id"]) for item in items) == expected


def test_neighbours_can_be_chosen_by_direction_and_type(asked: Asked) -> None:
    sample = asked.sample()
    given = {"direction": "in", "relationTypes": ["CALLS", "IMPORTS"], "limit": 200}
    for node, answer in zip(
        sample, asked.ask([("neighbors_get", {"nodeId": n, **given}) for n in sample]), strict=True
    ):
        edges = [data for _, _, data in asked.graph.in_edges(node, data=True) if data["type"] in ("CALLS", "IMPORTS")]
        items = answer["result"]["items"]
        assert len(items) == len(edges) or answer["pagination"]["nextCursor"]
        known = {edge["id"] for edge in edges}
        assert all(item["edgeId"] in known or item["edgeId"].rpartition("#")[0] in known for item in items)


def test_process_steps_are_those_of_the_graph_in_order(asked: Asked) -> None:
    processes = [node for node, data in asked.graph.nodes(data=True) if data["label"] == "Process"]
    for process, answer in zip(
        processes[:60], asked.ask([("process_get", {"processId": process}) for process in processes[:60]]), strict=True
    ):
        edges = asked.graph.in_edges(process, data=True)
        expected = sorted((data["step"], source) for source, _, data in edges if data["type"] == "STEP_IN_PROCESS")
        assert [(step["step"], step["node"]["id"]) for step in answer["result"]["steps"]] == expected
        assert answer["result"]["process"]["stepCount"] == len(expected)


def test_impact_is_what_leads_to_a_node_over_dependencies(asked: Asked) -> None:
    depending = nx.DiGraph()
    depending.add_nodes_from(asked.graph)
    depending.add_edges_from((s, t) for s, t, data in asked.graph.edges(data=True) if data["type"] in DEPENDING)
    sample = asked.sample()
    answers = asked.ask([("impact_analysis", {"nodeId": node, "maxDepth": 3}) for node in sample])
    for node, answer in zip(sample, answers, strict=True):
        away = nx.single_source_shortest_path_length(depending.reverse(copy=False), node, cutoff=3)
        expected = sorted((depth, other) for other, depth in away.items() if other != node)
        result = answer["result"]
        assert result["impactedNodeCount"] == len(expected)
        found = [(item["depth"], item["id"]) for item in result["impactedNodes"]]
        assert found == expected[: len(found)]
        sources = {other for other, depth in away.items() if depth < 3}
        edges = asked.graph.in_edges(sources, data=True)
        assert result["impactedEdgeCount"] == sum(data["type"] in DEPENDING for _, _, data in edges)


def test_call_traces_are_the_simple_paths_of_the_graph_shortest_first(asked: Asked) -> None:
    calls = nx.DiGraph((s, t) for s, t, data in asked.graph.edges(data=True) if data["type"] == "CALLS")
    pairs = []
    for source in sorted(calls)[:: max(1, len(calls) // 30)]:
        far = nx.single_source_shortest_path_length(calls, source, cutoff=4)
        pairs += [(source, max((depth, node) for node, depth in far.items())[1])] if len(far) > 1 else []
    given = {"maxDepth": 4, "limitPaths": 100}
    answers = asked.ask([("call_trace", {"fromNodeId": s, "toNodeId": t, **given}) for s, t in pairs])
    assert pairs
    for (source, target), answer in zip(pairs, answers, strict=True):
        expected = {tuple(path) for path in nx.all_simple_paths(calls, source, target, cutoff=4)}
        paths = [tuple(ids(path["nodes"])) for path in answer["result"]["paths"]]
        assert len(set(paths)) == len(paths)
        assert set(paths) == expected if len(expected) < 100 else set(paths) <= expected
        assert [len(path) for path in paths] == sorted(len(path) for path in paths)


def test_a_trace_without_a_goal_goes_as_far_as_it_may(asked: Asked) -> None:
    calls = {(s, t) for s, t, data in asked.graph.edges(data=True) if data["type"] == "CALLS"}
    callers = {source for source, _ in calls}
    start = sorted(callers)[0]
    (answer,) = asked.ask([("call_trace", {"fromNodeId": start, "maxDepth": 3, "limitPaths": 50})])
    paths = [ids(path["nodes"]) for path in answer["result"]["paths"]]
    assert paths
    for path in paths:
        assert path[0] == start
        assert set(pairwise(path)) <= calls
        assert len(path) == 4 or {target for source, target in calls if source == path[-1]} <= set(path)


def test_an_outline_has_every_symbol_of_the_file(asked: Asked) -> None:
    by_file: dict[str, set[str]] = defaultdict(set)
    for node, data in asked.graph.nodes(data=True):
        path = data["properties"].get("filePath")
        if path and data["label"] not in ("File", "Folder"):
            by_file[path].add(node)
    some = sorted(path for path, nodes in by_file.items() if len(nodes) <= 100)[::7]
    for path, answer in zip(some, asked.ask([("file_outline", {"filePath": path}) for path in some]), strict=True):
        result = answer["result"]
        assert set(ids(result["symbols"])) == by_file[path]
        assert result["symbolCount"] == len(by_file[path])


def test_every_page_of_a_list_joined_is_the_list(asked: Asked) -> None:
    communities = sorted(node for node, data in asked.graph.nodes(data=True) if data["label"] == "Community")
    found: list[str] = []
    cursor = None
    while True:
        arguments = {"limit": 40, **({"cursor": cursor} if cursor else {})}
        (answer,) = asked.ask([("community_list", arguments)])
        found += ids(answer["result"]["items"])
        page = answer["pagination"]
        assert page["returned"] == len(answer["result"]["items"])
        assert page["truncated"] == (page["nextCursor"] is not None)
        cursor = page["nextCursor"]
        if cursor is None:
            break
    assert sorted(found) == communities


def test_a_node_comes_with_its_degree_and_all_its_properties(asked: Asked) -> None:
    sample = asked.sample()
    for node, answer in zip(sample, asked.ask([("node_get", {"nodeId": node}) for node in sample]), strict=True):
        result = answer["result"]
        assert (result["degree"]["in"], result["degree"]["out"]) == (
            asked.graph.in_degree(node),
            asked.graph.out_degree(node),
        )
        properties = asked.graph.nodes[node]["properties"]
        assert result["metadata"]["name"] == properties["name"]
        assert set(properties) - {"content"} <= set(result["metadata"])


def test_a_relationship_comes_with_its_ends(asked: Asked) -> None:
    edges = [data for _, _, data in asked.graph.edges(data=True)]
    some = edges[:: len(edges) // 40]
    for edge, answer in zip(some, asked.ask([("edge_get", {"edgeId": edge["id"]}) for edge in some]), strict=True):
        result = answer["result"]
        assert (result["source"]["id"], result["target"]["id"]) == (edge["sourceId"], edge["targetId"])
        assert result["edge"]["type"] == edge["type"]


# --- one by one -------------------------------------------------------------------------------------


def test_the_server_names_sixteen_tools_that_only_read(mcp_server: McpServer) -> None:
    tools = mcp_server.tools()
    assert [tool.name for tool in tools] == [tool.name for tool in TOOLS]
    assert len(tools) == 16
    assert all(tool.annotations.read_only_hint and tool.input_schema["type"] == "object" for tool in tools)


def test_every_tool_answers_in_the_envelope_and_no_more(mcp_server: McpServer) -> None:
    name, path = "Class:common/progress.py:ProgressReporter", "common/progress.py"
    process = mcp_server.ask("process_list", limit=1)["result"]["items"][0]["id"]
    edge = mcp_server.ask("neighbors_get", nodeId=name, limit=1)["result"]["items"][0]["edgeId"]
    calls: dict[str, tuple[dict[str, Any], set[str]]] = {
        "symbol_lookup": ({"query": "report"}, {"query", "items"}),
        "node_get": ({"nodeId": name}, {"node", "degree", "metadata"}),
        "neighbors_get": ({"nodeId": name}, {"nodeId", "direction", "items"}),
        "edge_get": ({"edgeId": edge}, {"edge", "source", "target", "metadata"}),
        "text_search": ({"query": "progress"}, {"query", "scope", "items", "semanticUsed"}),
        "call_trace": ({"fromNodeId": name}, {"fromNodeId", "toNodeId", "maxDepth", "paths", "pathCount"}),
        "callers_of": ({"nodeId": name}, {"nodeId", "items"}),
        "callees_of": ({"nodeId": name}, {"nodeId", "items"}),
        "process_list": ({}, {"items"}),
        "process_get": ({"processId": process}, {"process", "steps"}),
        "impact_analysis": (
            {"nodeId": name},
            {"rootNodeId", "maxDepth", "impactedNodeCount", "impactedEdgeCount", "impactedNodes", "hotspots"},
        ),
        "file_outline": ({"filePath": path}, {"filePath", "symbols", "symbolCount"}),
        "file_snippet": ({"filePath": path}, {"node", "snippet", "maxChars"}),
        "community_list": ({}, {"items"}),
        "manifest_get": ({}, {"schemaVersion", "indexSchemaVersion", "manifest", "capsuleCapabilities", "counts"}),
        "query_explain": (
            {"task": "what breaks when I change it", "query": "report"},
            {"task", "query", "retrievalLadder", "rankingSignals", "recommendedToolSequence"},
        ),
    }
    assert set(calls) == {tool.name for tool in TOOLS}
    answers = mcp_server.ask_all([(tool, arguments) for tool, (arguments, _) in calls.items()])
    for (tool, (_, keys)), answer in zip(calls.items(), answers, strict=True):
        assert set(answer) == {
            "schemaVersion",
            "traceId",
            "tool",
            "confidence",
            "result",
            "pagination",
            "timingMs",
        }
        assert (answer["schemaVersion"], answer["tool"]) == ("gitnexus.mcp.v1", tool)
        assert len(answer["traceId"]) >= 8
        assert set(answer["result"]) == keys
        confidence = answer["confidence"]
        assert set(confidence) == {"score", "tier", "factors", "warnings"}
        expected = "high" if confidence["score"] >= 0.85 else "medium" if confidence["score"] >= 0.6 else "low"
        assert confidence["tier"] == expected
        assert set(answer["pagination"]) == {"nextCursor", "truncated", "returned"}


def test_the_text_of_an_answer_is_its_structured_content(mcp_server: McpServer) -> None:
    (answer,) = mcp_server.call_all([("manifest_get", {})])
    assert json.loads(answer.content[0].text) == answer.structured_content


@pytest.mark.parametrize("query", ["ProgressReporter", "progress_reporter", "ProgressReporter.report"])
def test_a_name_is_looked_up_in_any_style(mcp_server: McpServer, query: str) -> None:
    answer = mcp_server.ask("symbol_lookup", query=query)
    assert answer["result"]["items"][0]["name"] in ("ProgressReporter", "report")
    assert answer["confidence"]["tier"] == "high"


def test_lookups_are_sorted_by_score_then_id(mcp_server: McpServer) -> None:
    for tool in ("symbol_lookup", "text_search"):
        items = mcp_server.ask(tool, query="frame writer", limit=100)["result"]["items"]
        assert len(items) > 10
        assert [(-item["score"], item["id"]) for item in items] == sorted((-i["score"], i["id"]) for i in items)


def test_meaning_is_used_only_where_words_find_little(mcp_server: McpServer) -> None:
    sure = mcp_server.ask("text_search", query="ProgressReporter")
    unsure = mcp_server.ask("text_search", query="shrink numbers so that humans comprehend them quickly")
    assert (sure["result"]["semanticUsed"], sure["confidence"]["tier"]) == (False, "high")
    assert (unsure["result"]["semanticUsed"], unsure["confidence"]["tier"]) == (True, "low")


def test_a_provider_that_keeps_a_question_waiting_leaves_it_to_the_words(
    real_graphs: dict[str, Path], tmp_path: Path
) -> None:
    choice = Choice(mode="external_api", provider="ollama", model="all-minilm")
    with provider_server("ollama", 384) as ollama:
        engines = Engines(urls={"ollama": ollama.url})
        with Gate() as gate, closing(OpenEngines(engines)) as opened:
            export(
                read_graph(real_graphs[EXAMPLE]),
                out_dir=tmp_path,
                gate=gate,
                generated_at="2026-01-02T03:04:05.000Z",
                embedder=opened.get(choice),
                choice=choice,
                on_progress=lambda _: None,
                should_stop=lambda: None,
            )
        (capsule,) = tmp_path.glob("*.mv2")
        asked = {"query": "shrink numbers so that humans comprehend", "locator": {"capsulePath": capsule.name}}
        with McpServer(tmp_path, Exports(), engines=engines) as server:
            before = server.ask("text_search", **asked)
            ollama.fault("slow")
            meanwhile = server.ask("text_search", **asked)
            after = server.ask("text_search", **asked)
    assert [answer["result"]["semanticUsed"] for answer in (before, meanwhile, after)] == [True, False, True]
    assert meanwhile["confidence"]["warnings"] == ["SEMANTIC_UNAVAILABLE"]
    assert meanwhile["result"]["items"]
    assert before["result"] == after["result"]


def test_a_scope_keeps_what_it_names(mcp_server: McpServer) -> None:
    for scope, labels in (("files", {"File", "Folder"}), ("processes", {"Process"}), ("communities", {"Community"})):
        items = mcp_server.ask("text_search", query="frames capsule read", scope=scope)["result"]["items"]
        assert items
        assert {item["label"] for item in items} <= labels


def test_a_snippet_can_be_read_in_pieces(mcp_server: McpServer) -> None:
    node = "Class:common/progress.py:ProgressReporter"
    whole = mcp_server.ask("file_snippet", nodeId=node, maxChars=60_000)["result"]["snippet"]
    assert whole.startswith("class ProgressReporter")
    pieces, cursor = [], None
    while True:
        answer = mcp_server.ask("file_snippet", nodeId=node, maxChars=100, **({"cursor": cursor} if cursor else {}))
        pieces.append(answer["result"]["snippet"])
        cursor = answer["pagination"]["nextCursor"]
        if cursor is None:
            break
    assert "".join(pieces) == whole
    assert len(pieces) > 2


def test_the_manifest_counts_what_the_capsule_holds(mcp_server: McpServer) -> None:
    result = mcp_server.ask("manifest_get")["result"]
    totals = result["manifest"]["totals"]
    assert result["counts"]["nodes"] == totals["exportedNodeFrames"]
    assert result["counts"]["edges"] == totals["exportedRelationFrames"]
    assert result["schemaVersion"] == "gitnexus.mv2.schema.v1"
    assert result["capsuleCapabilities"]["toolCount"] == 16


# --- budget -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tight(capsules: dict[str, Path]) -> Iterator[McpServer]:
    """A server that answers with 4,000 bytes at most."""
    exports = Exports()
    exports.add("only", capsules[EXAMPLE].as_uri())
    with McpServer(capsules[EXAMPLE].parents[1], exports, response_budget_bytes=4000) as server:
        yield server


def test_an_answer_over_the_budget_is_cut_at_an_item_and_goes_on_there(mcp_server: McpServer, tight: McpServer) -> None:
    path = "common/contract.py"
    whole = mcp_server.ask("file_outline", filePath=path)
    assert not whole["pagination"]["truncated"]
    found, cursor, answers = [], None, 0
    while True:
        (answer,) = tight.call_all([("file_outline", {"filePath": path, **({"cursor": cursor} if cursor else {})})])
        assert len(answer.content[0].text.encode()) <= 4000
        envelope = answer.structured_content
        found += envelope["result"]["symbols"]
        answers += 1
        cursor = envelope["pagination"]["nextCursor"]
        assert envelope["pagination"]["truncated"] == (cursor is not None)
        assert ("RESULT_TRUNCATED" in envelope["confidence"]["warnings"]) == (cursor is not None)
        if cursor is None:
            break
    assert answers > 2
    assert found == whole["result"]["symbols"]


def test_every_tool_keeps_to_the_budget(tight: McpServer) -> None:
    name = "Class:common/contract.py:Wire"
    calls: list[tuple[str, dict[str, Any]]] = [
        ("symbol_lookup", {"query": "report", "limit": 200}),
        ("neighbors_get", {"nodeId": name, "limit": 200}),
        ("text_search", {"query": "capsule", "limit": 200}),
        ("impact_analysis", {"nodeId": name, "maxDepth": 5}),
        ("file_snippet", {"filePath": "common/contract.py", "maxChars": 60_000}),
        ("process_list", {"limit": 200}),
        ("manifest_get", {}),
        ("query_explain", {"task": "x" * 2000, "query": "y" * 2000}),
    ]
    for (tool, _), answer in zip(calls, tight.call_all(calls), strict=True):
        assert len(answer.content[0].text.encode()) <= 4000, tool
        # A task that is longer than the budget cannot be said again; everything else can be cut.
        assert answer.is_error == (tool == "query_explain")
        if answer.is_error:
            assert answer.structured_content["code"] == "RESULT_TRUNCATED"
            assert answer.structured_content["retryable"]


# --- what is wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "arguments", "code"),
    [
        ("node_get", {"nodeId": "nowhere"}, "NOT_FOUND"),
        ("edge_get", {"edgeId": "a_CALLS_b"}, "NOT_FOUND"),
        ("process_get", {"processId": "Class:common/progress.py:ProgressReporter"}, "NOT_FOUND"),
        ("file_outline", {"filePath": "nowhere.py"}, "NOT_FOUND"),
        ("file_snippet", {"filePath": "nowhere.py"}, "NOT_FOUND"),
        ("file_snippet", {}, "INVALID_ARGUMENT"),
        ("node_get", {}, "INVALID_ARGUMENT"),
        ("node_get", {"nodeId": 7}, "INVALID_ARGUMENT"),
        ("node_get", {"nodeId": "a", "other": 1}, "INVALID_ARGUMENT"),
        ("symbol_lookup", {"query": "a", "limit": 0}, "INVALID_ARGUMENT"),
        ("symbol_lookup", {"query": "a", "cursor": "!"}, "INVALID_ARGUMENT"),
        ("symbol_lookup", {"query": "a", "cursor": "MA"}, "INVALID_ARGUMENT"),
        ("text_search", {"query": "a", "scope": "moon"}, "INVALID_ARGUMENT"),
        ("call_trace", {"fromNodeId": "a", "maxDepth": 99}, "INVALID_ARGUMENT"),
        ("no_such_tool", {}, "INVALID_ARGUMENT"),
        ("manifest_get", {"locator": {"jobId": "nobody"}}, "NOT_FOUND"),
        ("manifest_get", {"locator": {"jobId": "a", "capsulePath": "b"}}, "INVALID_ARGUMENT"),
        ("manifest_get", {"locator": {"capsulePath": "/etc/passwd"}}, "INVALID_ARGUMENT"),
        ("manifest_get", {"locator": {"capsulePath": "../../x.mv2"}}, "INVALID_ARGUMENT"),
        ("manifest_get", {"locator": {"capsulePath": "none.mv2"}}, "NOT_FOUND"),
        ("manifest_get", {"locator": {"capsulePath": "a\0b.mv2"}}, "INVALID_ARGUMENT"),
    ],
)
def test_a_wrong_question_is_told_what_is_wrong(
    mcp_server: McpServer, tool: str, arguments: dict[str, Any], code: str
) -> None:
    error = mcp_server.fail(tool, **arguments)
    assert set(error) == {"code", "message", "traceId", "retryable"}
    assert (error["code"], error["retryable"]) == (code, False)
    assert len(error["traceId"]) >= 8


def test_a_cursor_of_another_question_is_refused(mcp_server: McpServer) -> None:
    cursor = mcp_server.ask("symbol_lookup", query="frame", limit=1)["pagination"]["nextCursor"]
    assert mcp_server.ask("symbol_lookup", query="frame", limit=5, cursor=cursor)["result"]["items"]
    assert mcp_server.fail("symbol_lookup", query="writer", limit=1, cursor=cursor)["code"] == "INVALID_ARGUMENT"


@pytest.mark.parametrize("text", ['" OR 1=1 --', "\ud800", "\0", "a" * 2000, "*", "NEAR(", ""])
def test_hostile_texts_are_only_texts(mcp_server: McpServer, text: str) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
    headers = {"Authorization": f"Bearer {KEY}", "Accept": "application/json, text/event-stream"}
    for tool, key in (("symbol_lookup", "query"), ("text_search", "query"), ("node_get", "nodeId")):
        params = {"name": tool, "arguments": {key: text}}
        # ASCII JSON: a lone surrogate is an escape on the wire.
        answer = httpx.post(
            mcp_server.url,
            content=json.dumps({**body, "params": params}),
            headers={**headers, "Content-Type": "application/json"},
        )
        assert answer.status_code in (200, 400)
        if answer.status_code == 200 and "result" in answer.json():
            result = answer.json()["result"]
            expected = {"NOT_FOUND", "INVALID_ARGUMENT"} if tool == "node_get" else set()
            assert not result.get("isError") or result["structuredContent"]["code"] in expected


def test_the_key_is_wanted_and_only_post_is_answered(mcp_server: McpServer) -> None:
    assert httpx.post(mcp_server.url, json={}).status_code == 401
    answer = httpx.get(mcp_server.url, headers={"Authorization": f"Bearer {KEY}", "Accept": "text/event-stream"})
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


# --- capsules and sidecars --------------------------------------------------------------------------


@pytest.fixture
def copied(capsules: dict[str, Path], tmp_path: Path) -> Iterator[tuple[McpServer, Path, Path]]:
    """A server over a copy of the example's capsule, the copy, and its sidecar."""
    capsule = Path(shutil.copy(capsules[EXAMPLE], tmp_path / "copy.mv2"))
    sidecar = Path(shutil.copy(f"{capsules[EXAMPLE]}.index.v1.sqlite", f"{capsule}.index.v1.sqlite"))
    exports = Exports()
    exports.add("copy", capsule.as_uri())
    with McpServer(tmp_path, exports, cache_capacity=1) as server:
        yield server, capsule, sidecar


def digest(sidecar: Path) -> str:
    with closing(Sidecar.open(sidecar)) as opened:
        return opened.content_digest()


def patiently(server: McpServer, tool: str, **arguments: Any) -> dict[str, Any]:
    """The answer, after the index that the first questions may wait for."""
    for _ in range(100):
        (answer,) = server.call_all([(tool, arguments)])
        if not answer.is_error:
            break
        assert answer.structured_content["code"] == "INDEX_BUILD_IN_PROGRESS"
        assert answer.structured_content["retryable"]
    return answer.structured_content


@pytest.mark.parametrize("harm", ["missing", "damaged", "stale"])
def test_a_sidecar_that_is_missing_or_stale_is_rebuilt(copied: tuple[McpServer, Path, Path], harm: str) -> None:
    server, _, sidecar = copied
    before = digest(sidecar)
    if harm == "missing":
        sidecar.unlink()
    elif harm == "damaged":
        sidecar.write_bytes(b"no index")
    else:
        with closing(sqlite3.connect(sidecar)) as db:
            db.execute("UPDATE meta SET value = 'of another capsule' WHERE key = 'capsule_sha256'")
            db.execute("DELETE FROM nodes")
            db.commit()
    assert patiently(server, "symbol_lookup", query="ProgressReporter")["result"]["items"][0]["name"]
    assert digest(sidecar) == before


def test_a_sidecar_found_damaged_while_it_is_read_is_rebuilt(copied: tuple[McpServer, Path, Path]) -> None:
    server, _, sidecar = copied
    before = digest(sidecar)
    content = sidecar.read_bytes()
    sidecar.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    for query in ("ProgressReporter", "frames", "writer"):
        patiently(server, "symbol_lookup", query=query)
    assert patiently(server, "text_search", query="writer")["result"]["items"]
    assert digest(sidecar) == before


def test_a_capsule_is_read_by_its_path_under_the_root(copied: tuple[McpServer, Path, Path]) -> None:
    server, capsule, _ = copied
    for path in (str(capsule), "copy.mv2"):
        assert server.ask("manifest_get", locator={"capsulePath": path})["result"]["manifest"]["totals"]


def test_a_file_that_is_no_capsule_is_incompatible(copied: tuple[McpServer, Path, Path]) -> None:
    server, capsule, _ = copied
    capsule.with_name("other.mv2").write_bytes(b"not a capsule" * 100)
    error = server.fail("manifest_get", locator={"capsulePath": "other.mv2"})
    assert (error["code"], error["retryable"]) == ("CAPSULE_INCOMPATIBLE", False)


def test_more_capsules_than_are_kept_open_are_read_in_turn(copied: tuple[McpServer, Path, Path]) -> None:
    server, capsule, _ = copied
    for name in ("one.mv2", "two.mv2"):
        shutil.copy(capsule, capsule.with_name(name))
    for _ in range(2):
        for name in ("one.mv2", "copy.mv2", "two.mv2"):
            assert patiently(server, "manifest_get", locator={"capsulePath": name})["result"]["counts"]["nodes"]


def test_without_an_export_the_answer_says_so(tmp_path: Path) -> None:
    with McpServer(tmp_path, Exports()) as server:
        assert server.fail("manifest_get")["code"] == "NOT_FOUND"
