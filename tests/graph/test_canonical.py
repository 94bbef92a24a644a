"""The canonical form: one order, unique ids, maxima."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.contract import ExportOptions
from common.graph import ExportRequest, Graph, canonical, content_digest, read_graph


def node(node_id: str, **properties: Any) -> dict[str, Any]:
    return {"id": node_id, "label": "Function", "properties": {"name": node_id, **properties}}


def relation(source: str, target: str, **more: Any) -> dict[str, Any]:
    kind = more.pop("type", "CALLS")
    ends = {"id": f"{source}>{target}", "sourceId": source, "targetId": target, "type": kind, "confidence": 1}
    return {**ends, **more}


def graph_of(nodes: list[Any], relations: list[Any], **more: Any) -> Graph:
    data = json.dumps({"nodes": nodes, "relationships": relations, **more}).encode()
    return canonical(read_graph(io.BytesIO(data)))


def counts(graph: Graph) -> dict[str, int]:
    return {warning.code: warning.count for warning in graph.warnings}


def shuffled(request: ExportRequest, seed: int) -> ExportRequest:
    chance = random.Random(seed)
    nodes, relations, files = list(request.nodes), list(request.relations), list(request.files.items())
    for items in (nodes, relations, files):
        chance.shuffle(items)  # type: ignore[arg-type]
    return msgspec.structs.replace(request, nodes=nodes, relations=relations, files=dict(files))


def as_json(graph: Graph) -> bytes:
    return msgspec.json.encode([graph.session_id, graph.nodes, graph.relations, graph.totals, graph.left_out])


def test_nodes_and_relations_are_sorted_by_code_point() -> None:
    graph = graph_of([node("b"), node("ä"), node("B"), node("a")], [relation("b", "a"), relation("a", "b")])
    assert [n.id for n in graph.nodes] == ["B", "a", "b", "ä"]
    assert [r.id for r in graph.relations] == ["a>b", "b>a"]


def test_equal_relations_become_one_with_its_occurrences() -> None:
    graph = graph_of([node("a"), node("b")], [relation("a", "b")] * 3)
    assert [(r.id, r.occurrences) for r in graph.relations] == [("a>b", 3)]
    assert counts(graph)["DUPLICATE_RELATION"] == 2
    assert (graph.totals.relationships, graph.totals.exported_relation_frames) == (3, 1)


def test_equal_ids_with_other_content_get_ids_that_do_not_depend_on_the_order() -> None:
    kinds = ["USES", "CALLS", "IMPORTS", "CALLS"]
    relations = [relation("a", "b", type=kind) for kind in kinds]
    one = graph_of([node("a"), node("b"), node("b", x=1)], relations)
    two = graph_of([node("b", x=1), node("b"), node("a")], relations[::-1])
    assert as_json(one) == as_json(two)
    assert {(r.id, r.type, r.occurrences) for r in one.relations} == {
        ("a>b", "CALLS", 2),
        ("a>b#2", "IMPORTS", 1),
        ("a>b#3", "USES", 1),
    }
    assert [n.id for n in one.nodes] == ["a", "b", "b#2"]
    assert counts(one) == {"DUPLICATE_RELATION": 1, "NODE_ID_REUSED": 1, "RELATION_ID_REUSED": 2}


def test_a_new_id_does_not_take_one_that_is_in_use() -> None:
    graph = graph_of([node("f", x=1), node("f", x=2), node("f#2")], [relation("f", "f#2")])
    assert [n.id for n in graph.nodes] == ["f", "f#2", "f#3"]
    assert graph.nodes[1].properties == {"name": "f#2"}


def test_dangling_relations_stay_and_are_counted() -> None:
    graph = graph_of([node("a")], [relation("a", "gone"), relation("gone", "a")])
    assert len(graph.relations) == 2
    assert counts(graph)["DANGLING_RELATION"] == 2


def test_maxima_cut_the_least_connected_first() -> None:
    nodes = [node(name) for name in ("hub", "x", "y", "lonely")]
    relations = [relation("hub", "x"), relation("hub", "y"), relation("x", "y"), relation("hub", "gone")]
    cut = graph_of([*nodes, node("z")], [*relations, relation("z", "hub")], options={"maxNodeFrames": 3})
    assert [n.id for n in cut.nodes] == ["hub", "x", "y"]
    assert "z>hub" not in {r.id for r in cut.relations}
    assert (cut.left_out.nodes, cut.left_out.relationships) == (2, 1)
    assert (cut.totals.nodes, cut.totals.exported_node_frames) == (5, 3)

    few = graph_of(nodes, relations, options={"maxRelationFrames": 2})
    assert [r.id for r in few.relations] == ["hub>x", "hub>y"]
    assert (few.left_out.nodes, few.left_out.relationships) == (0, 2)


def test_the_digest_follows_content_and_options_alone() -> None:
    nodes, relations = [node("a"), node("b")], [relation("a", "b")]
    plain = content_digest(graph_of(nodes, relations))
    assert content_digest(graph_of(nodes[::-1], relations, sessionId="other")) == plain
    others = [
        graph_of([node("a"), node("b", x=1)], relations),
        graph_of(nodes, [relation("a", "b", confidence=0.5)]),
        graph_of(nodes, relations, fileContents={"a.py": ""}),
        graph_of(nodes, relations, options={"maxSnippetChars": 100}),
        graph_of(nodes, relations, projectName="p"),
    ]
    assert len({plain, *map(content_digest, others)}) == 6


def test_a_raw_graph_gets_its_session_from_its_content() -> None:
    one = graph_of([node("a"), node("b")], [relation("a", "b")])
    two = graph_of([node("b"), node("a")], [relation("a", "b")])
    other = graph_of([node("b"), node("c")], [relation("b", "c")])
    assert one.session_id == two.session_id != other.session_id


@pytest.mark.parametrize("maxima", [{}, {"max_node_frames": 150, "max_relation_frames": 90}])
def test_real_graphs_are_the_same_in_any_order(real_graphs: dict[str, Path], maxima: dict[str, int]) -> None:
    for path in real_graphs.values():
        request = read_graph(path)
        request.options = ExportOptions(**maxima)
        graph = canonical(request)
        again = canonical(shuffled(request, seed=7))
        assert as_json(again) == as_json(graph)
        assert content_digest(again) == content_digest(graph)
        assert len({n.id for n in graph.nodes}) == len(graph.nodes)
        assert len({r.id for r in graph.relations}) == len(graph.relations)


def test_the_known_graphs_have_their_known_sizes(real_graphs: dict[str, Path]) -> None:
    for name, sizes in {
        "runpod-python.export.json.gz": (2_448, 4_950),
        "litestar.export.json.gz": (13_698, 29_493),
    }.items():
        if name in real_graphs:
            graph = canonical(read_graph(real_graphs[name]))
            assert (len(graph.nodes), len(graph.relations)) == sizes
