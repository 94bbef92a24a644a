"""Frames: what a capsule holds of a graph."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.embedding.choice import What
from common.errors import InvalidRequest
from common.frames import LAYOUTS, Frame, frame_count, frame_id_of, frame_uri, frames
from common.frames.embed_text import NEIGHBOURS
from common.graph import Graph, canonical, read_graph

AT = "2026-11-21T12:00:00.000Z"
SOURCE = 'def f(a):\n    """Adds one."""\n    return g(a) + 1\n\n\ndef g(a):\n    return a\n'
NODES: list[dict[str, Any]] = [
    {"id": "File:src/a.py", "label": "File", "properties": {"name": "a.py", "filePath": "src/a.py"}},
    {
        "id": "Function:src/a.py:f#1",
        "label": "Function",
        "properties": {
            "name": "f",
            "filePath": "src/a.py",
            "startLine": 0,
            "endLine": 2,
            "language": "python",
            "keywords": ["addOne"],
            "id": "inner",
        },
    },
    {
        "id": "Function:src/a.py:g",
        "label": "Function",
        "properties": {"name": "g", "filePath": "src/a.py", "startLine": 5, "endLine": 6},
    },
    {"id": "comm_1", "label": "Community", "properties": {"name": "Adders", "symbolCount": 2}},
    {"id": "proc_1", "label": "Process", "properties": {"name": "F → G", "communities": ["'comm_1'"]}},
]
CALL = {
    "id": "f_CALLS_g",
    "sourceId": "Function:src/a.py:f#1",
    "targetId": "Function:src/a.py:g",
    "type": "CALLS",
    "confidence": 0.85,
    "reason": "local-call",
    "step": 0,
}


def graph_of(**changes: Any) -> Graph:
    body = {
        "sessionId": "s-1",
        "projectName": "demo",
        "source": {"type": "github", "baseName": "demo"},
        "nodes": NODES,
        "relationships": [CALL],
        "fileContents": {"src/a.py": SOURCE},
        **changes,
    }
    return canonical(read_graph(io.BytesIO(json.dumps(body).encode())))


def by_uri(graph: Graph, layout: str | None = "static-v2") -> dict[str, Frame]:
    return {frame.uri: frame for frame in frames(graph, generated_at=AT, layout=layout)}


def test_a_node_frame_holds_identity_snippet_and_metadata() -> None:
    frame = by_uri(graph_of())["mv2://nodes/Function:src/a.py:f#1"]
    assert (frame.title, frame.track, frame.kind) == ("Function: f", "nodes/Function", "node")
    assert frame.tags == ["source=gitnexus", "nodeLabel=Function", "sessionId=s-1"]
    assert frame.text == (
        "Node Function\nid=Function:src/a.py:f#1\nname=f\nfilePath=src/a.py\n\nsnippet:\n"
        'def f(a):\n    """Adds one."""\n    return g(a) + 1\n'
        f"metadata={frame.metadata}"
    )
    assert json.loads(frame.metadata) == {
        "id": "Function:src/a.py:f#1",
        "label": "Function",
        "name": "f",
        "filePath": "src/a.py",
        "startLine": 0,
        "endLine": 2,
        "language": "python",
        "keywords": ["addOne"],
        "properties.id": "inner",
    }
    assert list(json.loads(frame.metadata)) == sorted(json.loads(frame.metadata))


def test_files_communities_and_processes_have_their_own_places() -> None:
    found = by_uri(graph_of())
    assert found["mv2://nodes/File:src/a.py"].track == "files"
    assert found["mv2://nodes/File:src/a.py"].kind == "node"
    assert found["mv2://communities/comm_1"].track == "communities"
    assert found["mv2://communities/comm_1"].kind == "community"
    assert found["mv2://processes/proc_1"].track == "processes"
    assert found["mv2://processes/proc_1"].kind == "process"
    assert json.loads(found["mv2://processes/proc_1"].metadata)["communities"] == ["comm_1"]
    assert f"snippet:\n{SOURCE.rstrip()}\nmetadata=" in found["mv2://nodes/File:src/a.py"].text
    assert "snippet:" not in found["mv2://communities/comm_1"].text


def test_a_relation_frame_names_both_ends() -> None:
    frame = by_uri(graph_of(relationships=[CALL, CALL, {**CALL, "id": "other", "weight": 2, "type": "USES"}]))[
        "mv2://relations/f_CALLS_g"
    ]
    assert (frame.title, frame.track, frame.kind) == ("f CALLS g", "relations/CALLS", "relation")
    assert frame.tags == ["source=gitnexus", "relationType=CALLS", "sessionId=s-1"]
    assert frame.text == (
        "Relationship CALLS\nsource=f (Function)\ntarget=g (Function)\nconfidence=0.850\nreason=local-call\n"
        f"metadata={frame.metadata}"
    )
    assert frame.embed_text is None
    assert json.loads(frame.metadata) == {
        "id": "f_CALLS_g",
        "type": "CALLS",
        "sourceId": "Function:src/a.py:f#1",
        "targetId": "Function:src/a.py:g",
        "confidence": 0.85,
        "reason": "local-call",
        "occurrences": 2,
    }
    assert json.loads(frame.extra) == {"occurrences": 2}


def test_unknown_keys_of_a_relation_stay_in_its_metadata() -> None:
    odd = {**CALL, "weight": 2, "confidence": 0.5, "occurrences": "often", "step": 3, "reason": None}
    frame = by_uri(graph_of(relationships=[odd]))["mv2://relations/f_CALLS_g"]
    metadata = json.loads(frame.metadata)
    assert (metadata["weight"], metadata["step"], metadata["properties.occurrences"]) == (2, 3, "often")
    assert json.loads(frame.extra) == {"weight": 2, "step": 3, "properties.occurrences": "often"}
    assert "\nreason=\n" in frame.text


def test_a_dangling_relation_shows_the_id_of_the_missing_node() -> None:
    frame = by_uri(graph_of(relationships=[{**CALL, "targetId": "gone"}]))["mv2://relations/f_CALLS_g"]
    assert frame.title == "f CALLS gone"
    assert "target=gone (Unknown)" in frame.text
    assert json.loads(frame.metadata)["targetId"] == "gone"


def test_the_manifest_frame_states_what_is_in_the_capsule() -> None:
    frame = by_uri(graph_of())["mv2://meta/manifest"]
    assert (frame.track, frame.kind, frame.tags) == ("meta", "meta", ["kind=manifest"])
    manifest = json.loads(frame.metadata)
    assert manifest["generatedAt"] == AT
    assert manifest["mv2SchemaVersion"] == "gitnexus.mv2.schema.v1"
    assert manifest["exportSchemaVersion"] == "gitnexus.export.schema.v1"
    assert manifest["aiBibleVersion"] == "gitnexus.ai-bible.v1"
    assert manifest["source"]["baseName"] == "demo"
    assert manifest["options"]["maxSnippetChars"] == 1_400
    assert manifest["capsuleCapabilities"] == {
        "strictJsonToolResponses": True,
        "cursorPagination": True,
        "semanticFallbackOnly": True,
        "defaultResponseBudgetBytes": 65_536,
        "supportsLegacyCapsules": True,
        "toolCount": 16,
        "toolSetVersion": "gitnexus.tools.v1",
    }
    assert manifest["totals"] == {
        "nodes": 5,
        "relationships": 1,
        "exportedNodeFrames": 5,
        "exportedRelationFrames": 1,
        "fileCount": 1,
    }
    assert manifest["nodeLabels"] == {"Community": 1, "File": 1, "Function": 2, "Process": 1}
    assert manifest["relationshipTypes"] == {"CALLS": 1}
    assert frame.text.endswith(f"\nmetadata={frame.metadata}")


def test_the_agent_guide_names_every_tool() -> None:
    found = by_uri(graph_of())
    guide = [uri for uri in found if uri.startswith("mv2://meta/ai-bible/")]
    assert [uri.removeprefix("mv2://meta/ai-bible/") for uri in guide] == [
        "manifest",
        "tool-matrix",
        "retrieval-ladder",
        "playbooks/core",
    ]
    matrix = found["mv2://meta/ai-bible/tool-matrix"]
    tools = json.loads(matrix.metadata)["tools"]
    assert len(tools) == len(set(tools)) == 16
    assert all(f"{tool}(" in matrix.text for tool in tools)
    assert all(found[uri].tags == ["kind=ai-bible"] and found[uri].track == "meta" for uri in guide)


def test_order_is_meta_then_nodes_then_relations() -> None:
    graph = graph_of(nodes=NODES[::-1])
    kinds = [frame.kind for frame in frames(graph, generated_at=AT, layout=None)]
    assert kinds == ["meta"] * 5 + ["node"] * 3 + ["community", "process", "relation"]
    assert frame_count(graph) == len(kinds)


def test_texts_for_vectors_come_from_name_path_and_signature() -> None:
    found = by_uri(graph_of())
    assert found["mv2://nodes/Function:src/a.py:f#1"].embed_text == "f f src a py def f a add one"
    assert found["mv2://communities/comm_1"].embed_text == "adders adders"
    assert all((frame.embed_text is None) == (frame.kind in ("meta", "relation")) for frame in found.values())
    assert all(frame.embed_text is None for frame in by_uri(graph_of(), layout=None).values())


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        frames(graph_of(), generated_at=AT, layout="nope")
    assert caught.value.details["allowed"] == sorted(LAYOUTS)


@pytest.mark.parametrize(
    "node_id",
    [
        "Function:src/a b/c.py:f#1",
        "Route:GET /v2/{id}?x=1&y=%2F",
        "%41 %25 %zz %%41 %2%41",
        "line\nfeed\ttab\x00\x7f\x85\u2028",
        "Äpfel/数据/😀",
        " space ",
        "../..",
    ],
)
def test_a_uri_gives_its_id_back(node_id: str) -> None:
    uri = frame_uri("mv2://nodes/", node_id)
    assert frame_id_of(uri) == node_id
    assert not any(ord(character) < 0x20 for character in uri)


def test_ordinary_ids_stand_in_a_uri_as_they_are() -> None:
    node_id = "Method:src/api/user.service.ts:UserService.getUserById#2 @12:4 100%"
    assert frame_uri("mv2://nodes/", node_id) == f"mv2://nodes/{node_id}"


def test_a_name_over_several_lines_stays_on_one() -> None:
    nodes = [{**NODES[2], "properties": {**NODES[2]["properties"], "name": "two\nlines", "startLine": None}}]
    frame = by_uri(graph_of(nodes=nodes))["mv2://nodes/Function:src/a.py:g"]
    assert frame.title == "Function: two lines"
    assert "\nname=two lines\n" in frame.text
    assert json.loads(frame.metadata)["name"] == "two\nlines"


def test_the_text_of_a_frame_is_bounded() -> None:
    huge = {f"note{i:02d}": "x" * 50_000 for i in range(40)}
    many = {**NODES[1], "properties": {**NODES[1]["properties"], **huge, "content": "def f(): pass\n" * 100_000}}
    noisy = {**CALL, "reason": "y" * 100_000, "extra": ["z" * 1_000] * 1_000}
    graph = graph_of(nodes=[many, NODES[2]], relationships=[noisy])
    found = by_uri(graph)
    assert all(len(frame.text) < 80_000 for frame in found.values())
    assert json.loads(found["mv2://nodes/Function:src/a.py:f#1"].metadata)["name"] == "f"
    assert "...[truncated]\nmetadata=" in found["mv2://nodes/Function:src/a.py:f#1"].text
    cut = [warning for warning in graph.warnings if warning.code == "PROPERTY_CUT"]
    assert len(cut) == 1
    assert cut[0].count > 40


def test_frames_made_twice_are_equal_and_warn_once() -> None:
    lost = {**NODES[2], "properties": {**NODES[2]["properties"], "name": "gone"}}
    graph = graph_of(nodes=[NODES[0], lost])
    first = list(frames(graph, generated_at=AT, layout="static-v2"))
    second = list(frames(graph, generated_at=AT, layout="static-v2"))
    assert first == second
    assert [(w.code, w.count) for w in graph.warnings if w.code == "SNIPPET_NOT_FOUND"] == [("SNIPPET_NOT_FOUND", 1)]


def test_real_graphs_become_unique_well_formed_frames(real_graphs: dict[str, Path]) -> None:
    for path in real_graphs.values():
        graph = canonical(read_graph(path))
        made = list(frames(graph, generated_at=AT, layout="static-v2"))
        assert len(made) == frame_count(graph)
        assert len({frame.uri for frame in made}) == len(made)
        kinds = Counter(frame.kind for frame in made)
        assert kinds["relation"] == len(graph.relations)
        for frame in made:
            assert frame.text.endswith(f"\nmetadata={frame.metadata}")
            metadata = msgspec.json.decode(frame.metadata)
            if frame.kind != "meta":
                assert frame_id_of(frame.uri) == metadata["id"]


def test_frames_do_not_depend_on_the_order_of_the_input(real_graphs: dict[str, Path]) -> None:
    for path in real_graphs.values():
        request = read_graph(path)
        turned = msgspec.structs.replace(
            request,
            nodes=request.nodes[::-1],
            relations=request.relations[::-1],
            files=dict(reversed(request.files.items())),
        )
        given, again = canonical(request), canonical(turned)
        assert list(frames(again, generated_at=AT, layout="static-v2")) == list(
            frames(given, generated_at=AT, layout="static-v2")
        )
        assert {(w.code, w.count) for w in again.warnings} == {(w.code, w.count) for w in given.warnings}


def test_what_is_not_asked_for_has_no_text_to_embed() -> None:
    def embedded(*what: What) -> set[str]:
        made = frames(graph_of(), generated_at=AT, layout="static-v2", what=what)
        return {frame.uri.split("/")[2] + ":" + frame.track for frame in made if frame.embed_text is not None}

    assert embedded("nodes") == {"nodes:nodes/Function"}
    assert embedded("files") == {"nodes:files"}
    assert embedded("communities", "processes") == {"communities:communities", "processes:processes"}
    assert embedded("relations") == {"relations:relations/CALLS"}
    assert embedded() == set()


def test_a_relationship_is_embedded_by_what_it_joins_and_how() -> None:
    made = frames(graph_of(), generated_at=AT, layout="static-v2", what=["relations"])
    assert [frame.embed_text for frame in made if frame.embed_text] == ["f calls g local-call"]


def test_the_text_for_transformers_has_the_neighbours_and_the_first_lines_too() -> None:
    text = by_uri(graph_of(), "code-v1")["mv2://nodes/Function:src/a.py:f#1"].embed_text
    assert text is not None
    assert text.startswith("f src a py def f(a): add one g ")
    assert "return g(a) + 1" in text
    static = by_uri(graph_of(), "static-v2")["mv2://nodes/Function:src/a.py:f#1"].embed_text
    assert static == "f f src a py def f a add one"


def test_a_text_names_a_bounded_number_of_neighbours_whatever_the_order_of_the_input() -> None:
    many = [
        {"id": f"n{i}", "label": "Function", "properties": {"name": f"callee{i}", "filePath": "src/b.py"}}
        for i in range(40)
    ]
    calls = [
        {"id": f"r{i:02}", "sourceId": "Function:src/a.py:f#1", "targetId": f"n{i}", "type": "CALLS"} for i in range(40)
    ]
    texts = {
        by_uri(graph_of(nodes=[*NODES, *many], relationships=order), "code-v1")[
            "mv2://nodes/Function:src/a.py:f#1"
        ].embed_text
        for order in (calls, calls[::-1])
    }
    assert len(texts) == 1
    assert str(texts.pop()).count("callee") == NEIGHBOURS


def test_one_percent_of_nodes_renamed_leaves_95_percent_of_the_texts(real_graphs: dict[str, Path]) -> None:
    def texts(*, renamed: bool) -> list[str]:
        request = read_graph(real_graphs["memvid-export.graph.ndjson.gz"])
        for node in request.nodes[50::100] if renamed else ():
            node.properties["name"] += "_renamed"
        made = frames(canonical(request), generated_at=AT, layout="code-v1")
        return [frame.embed_text for frame in made if frame.embed_text is not None]

    before, after = set(texts(renamed=False)), texts(renamed=True)
    changed = sum(text not in before for text in after)
    assert len(after) // 100 <= changed <= len(after) // 20
