"""The sidecar answers as the graph does, and comes out the same however it is built."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from common.capsule.native import NativeWriter
from common.errors import CapsuleUnreadable
from common.frames import Frame, frames
from common.graph.canonical import canonical
from common.graph.model import Graph
from common.graph.read import read_graph
from common.sidecar.build import SidecarBuilder, normalise_name
from common.sidecar.open import Scope, Sidecar
from common.sidecar.rebuild import capsule_sha256, rebuild

GENERATED_AT = "2026-01-02T03:04:05.000Z"
SHA = "ab" * 32


def build(path: Path, all_frames: Sequence[Frame], *, batch: int = 1000, sha256: str = SHA) -> Path:
    builder = SidecarBuilder(path)
    for start in range(0, len(all_frames), batch):
        builder.add(all_frames[start : start + batch], start, 0)
    builder.finish(sha256)
    return path


def node(node_id: str, label: str = "Function", snippet: str = "", **properties: object) -> Frame:
    name = str(properties.setdefault("name", node_id))
    metadata = json.dumps({"id": node_id, "label": label, **properties})
    kind = {"Community": "community", "Process": "process"}.get(label, "node")
    text = f"Node {label}\nid={node_id}\nname={name}\nfilePath=\n"
    text += f"\nsnippet:\n{snippet}\n" if snippet else ""
    return Frame(f"mv2://nodes/{node_id}", f"{label}: {name}", "t", kind, [], f"{text}metadata={metadata}", metadata)


def relation(source: str, kind: str, target: str, **properties: object) -> Frame:
    relation_id = f"{source}_{kind}_{target}"
    given = {"id": relation_id, "sourceId": source, "targetId": target, "type": kind, "confidence": 1.0, **properties}
    metadata = json.dumps(given)
    return Frame(f"mv2://relations/{given['id']}", "", "t", "relation", [], f"metadata={metadata}", metadata)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Sidecar]:
    given = [
        node("comm_1", "Community", name="Users", cohesion=0.5, symbolCount=7),
        node("f1", name="getUserById", filePath="app/users.py", startLine=3, endLine=4, snippet="def getUserById(x):"),
        node("f2", name="save_user", filePath="app/users.py", startLine=1, snippet="def save_user(u):\n    return db"),
        node("file", "File", name="users.py", filePath="app/users.py"),
        node("p1", "Process", name="Load → Save", processType="intra", stepCount=2, entryPointId="f1", terminalId="f2"),
        relation("f1", "CALLS", "f2", confidence=0.85, reason="local-call"),
        relation("f1", "CALLS", "gone"),
        relation("f1", "MEMBER_OF", "comm_1"),
        relation("f1", "STEP_IN_PROCESS", "p1", step=1),
        relation("f2", "STEP_IN_PROCESS", "p1", step=2),
        relation("f2", "CALLS", "f1", id="f2_CALLS_f1#2"),
    ]
    with closing(Sidecar.open(build(tmp_path / "small.sqlite", given))) as sidecar:
        yield sidecar


def ids(sidecar: Sidecar, positions: Sequence[int]) -> list[str]:
    return [node.id for node in sidecar.nodes(positions)]


def test_a_part_of_an_identifier_finds_it(small: Sidecar) -> None:
    assert "f1" in ids(small, [position for position, _ in small.match(["user"], limit=5)])


def test_a_name_is_found_however_it_is_written(small: Sidecar) -> None:
    assert [ids(small, small.named(name)) for name in ("getUserById", "get_user_by_id", "GETUSERBYID")] == [["f1"]] * 3
    assert ids(small, [position for position, _, _ in small.beginning("get_us", limit=5)]) == ["f1"]


def test_names_without_letters_or_digits_have_a_key() -> None:
    assert normalise_name("__") == "__"


def test_full_text_finds_what_a_body_says(small: Sidecar) -> None:
    assert ids(small, [position for position, _ in small.match(["db"], limit=5)]) == ["f2"]


def test_filters_keep_labels_and_paths(small: Sidecar) -> None:
    def found(scope: Scope) -> list[str]:
        return sorted(ids(small, [position for position, _ in small.match(["user", "users"], limit=9, scope=scope)]))

    assert found(Scope(labels=("File",))) == ["file"]
    assert found(Scope(file_prefix="app/")) == ["f1", "f2", "file"]
    assert found(Scope(file_prefix="lib/")) == []


def test_a_query_is_never_syntax(small: Sidecar) -> None:
    for word in ('"', "user OR", "name:user", "user*", "NEAR(a b)", "^user", "\0", "\ud800", "''; DROP TABLE nodes"):
        assert isinstance(small.match([word], limit=5), list)


def test_a_relation_to_a_node_that_is_not_there_is_kept_and_said_to_be_missing(small: Sidecar) -> None:
    caller = small.node("f1")
    assert caller
    (missing,) = [found for found in small.nodes(small.targets(caller.position, "CALLS")) if found.kind == "missing"]
    assert missing.id == "gone"
    assert small.node("gone") is None
    edge = small.edge("f1_CALLS_gone")
    assert edge
    assert edge.written_out(caller, missing) == "f1_CALLS_gone"


def test_a_relation_is_found_by_its_id_with_its_evidence(small: Sidecar) -> None:
    plain, numbered = small.edge("f1_CALLS_f2"), small.edge("f2_CALLS_f1#2")
    assert plain
    assert numbered
    assert (plain.type, plain.confidence, plain.reason) == ("CALLS", 0.85, "local-call")
    assert numbered.written_out(*small.nodes([numbered.source, numbered.target])) == "f2_CALLS_f1#2"
    assert small.edge("f2_CALLS_f1") is None
    assert small.edge("nonsense") is None


def test_a_process_has_its_steps_in_order_and_its_ends(small: Sidecar) -> None:
    (process,) = small.processes()
    assert [(step, *ids(small, [at])) for step, at in small.steps(process.position)] == [(1, "f1"), (2, "f2")]
    assert (process.process_type, process.step_count) == ("intra", 2)
    assert ids(small, [process.entry or 0, process.terminal or 0]) == ["f1", "f2"]


def test_a_community_has_its_members(small: Sidecar) -> None:
    (community,) = small.communities()
    assert (community.cohesion, community.symbol_count, community.members) == (0.5, 7, 1)
    assert ids(small, small.members(community.position)) == ["f1"]


def test_a_file_lists_its_nodes_by_line(small: Sidecar) -> None:
    assert [found.id for found in small.in_file("app/users.py")] == ["file", "f2", "f1"]
    assert small.in_file("nowhere.py") == []


def test_hotspots_come_busiest_first(small: Sidecar) -> None:
    first = small.hotspots(limit=1)[0]
    assert (ids(small, [first.position]), first.calls_in, first.calls_out) == (["f1"], 1, 2)


def test_properties_of_odd_types_do_no_harm(tmp_path: Path) -> None:
    odd = node("a", "Community", name="a", filePath=3, startLine="x", cohesion="high", symbolCount=2**70, keywords={})
    with closing(Sidecar.open(build(tmp_path / "odd.sqlite", [odd]))) as sidecar:
        found = sidecar.node("a")
        assert found
        assert (found.file_path, found.start_line) == (None, None)


def test_a_position_leads_to_the_frame_of_its_part(tmp_path: Path) -> None:
    builder = SidecarBuilder(tmp_path / "parts.sqlite")
    builder.add([node("a"), node("b")], 0, 0)
    builder.add([node("c")], 0, 1)
    builder.add([node("d")], 1, 1)
    builder.finish(SHA)
    with closing(Sidecar.open(tmp_path / "parts.sqlite")) as sidecar:
        last = sidecar.node("d")
        assert last
        assert sidecar.locate(last.position) == (1, 1)
        assert sidecar.position(1, 1) == last.position
        with pytest.raises(CapsuleUnreadable):
            sidecar.locate(4)


def test_frames_without_readable_metadata_are_refused(tmp_path: Path) -> None:
    builder = SidecarBuilder(tmp_path / "x.sqlite")
    with pytest.raises(CapsuleUnreadable, match="Frame 0"):
        builder.add([node("a")._replace(metadata="{")], 0, 0)
    builder.abort()
    builder.abort()
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_sidecar_are_refused(tmp_path: Path) -> None:
    foreign, damaged = tmp_path / "foreign.sqlite", tmp_path / "damaged.sqlite"
    with closing(sqlite3.connect(foreign)) as db:
        db.execute("CREATE TABLE meta (key, value)")
    damaged.write_bytes(b"not a database, but long enough to be read as one" * 100)
    for path in (foreign, damaged, tmp_path / "missing.sqlite"):
        with pytest.raises(CapsuleUnreadable):
            Sidecar.open(path)


# --- real graphs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["memvid-export.graph.ndjson.gz", "runpod-python.export.json.gz"])
def graph(request: pytest.FixtureRequest, real_graphs: dict[str, Path]) -> Graph:
    if request.param not in real_graphs:
        pytest.skip("this graph lies beside the repository only")
    return canonical(read_graph(real_graphs[request.param]))


@pytest.fixture(scope="module")
def graph_frames(graph: Graph) -> list[Frame]:
    return list(frames(graph, generated_at=GENERATED_AT, layout=None))


@pytest.fixture(scope="module")
def sidecar(graph_frames: list[Frame], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    path = build(tmp_path_factory.mktemp("sidecar") / "real.sqlite", graph_frames)
    with closing(Sidecar.open(path)) as opened:
        yield opened


def test_every_node_and_relation_is_found_by_its_id(graph: Graph, sidecar: Sidecar) -> None:
    for given in graph.nodes:
        found = sidecar.node(given.id)
        assert found
        assert (found.label, found.name, found.file_path) == (
            given.label,
            given.name,
            given.properties.get("filePath") or None,
        )
    for relation_ in graph.relations:
        edge = sidecar.edge(relation_.id)
        assert edge
        source, target = sidecar.nodes((edge.source, edge.target))
        assert (source.id, edge.type, target.id) == (relation_.source_id, relation_.type, relation_.target_id)
        assert (edge.confidence, edge.reason) == (relation_.confidence, relation_.reason)


def test_uris_and_titles_are_those_of_the_frames(sidecar: Sidecar, graph_frames: list[Frame]) -> None:
    by_position = {at: frame for at, frame in enumerate(graph_frames) if frame.kind in ("node", "community", "process")}
    for found in sidecar.nodes(by_position):
        frame = by_position[found.position]
        assert (found.uri, found.kind) == (frame.uri, frame.kind)


def test_every_symbol_is_found_by_its_name_and_by_its_words(graph: Graph, sidecar: Sidecar) -> None:
    for given in graph.nodes:
        at = sidecar.node(given.id)
        assert at
        assert at.position in sidecar.named(given.name, limit=5000)


def test_calls_and_neighbours_are_those_of_the_graph(graph: Graph, sidecar: Sidecar) -> None:
    callers, callees = defaultdict(set), defaultdict(set)
    degree: Counter[tuple[str, str]] = Counter()
    for relation_ in graph.relations:
        degree[relation_.source_id, "out"] += 1
        degree[relation_.target_id, "in"] += 1
        if relation_.type == "CALLS":
            callers[relation_.target_id].add(relation_.source_id)
            callees[relation_.source_id].add(relation_.target_id)
    for given in graph.nodes:
        at = sidecar.node(given.id)
        assert at
        assert ids(sidecar, sidecar.sources(at.position, "CALLS")) == sorted(callers[given.id])
        assert ids(sidecar, sidecar.targets(at.position, "CALLS")) == sorted(callees[given.id])
        assert sidecar.degree(at.position) == (degree[given.id, "in"], degree[given.id, "out"])
        assert len(sidecar.edges(at.position, "both")) == sum(sidecar.degree(at.position))


def test_process_steps_and_members_are_those_of_the_graph(graph: Graph, sidecar: Sidecar) -> None:
    steps, members = defaultdict(set), defaultdict(set)
    for relation_ in graph.relations:
        if relation_.type == "STEP_IN_PROCESS":
            steps[relation_.target_id].add((relation_.step, relation_.source_id))
        elif relation_.type == "MEMBER_OF":
            members[relation_.target_id].add(relation_.source_id)
    processes, communities = sidecar.processes(), sidecar.communities()
    assert len(processes) == sum(given.label == "Process" for given in graph.nodes)
    assert len(communities) == sum(given.label == "Community" for given in graph.nodes)
    for process in processes:
        (process_id,) = ids(sidecar, [process.position])
        found = [(step, *ids(sidecar, [at])) for step, at in sidecar.steps(process.position)]
        assert found == sorted(steps[process_id])
    for community in communities:
        (community_id,) = ids(sidecar, [community.position])
        assert ids(sidecar, sidecar.members(community.position)) == sorted(members[community_id])


def test_the_same_frames_give_the_same_bytes_however_they_are_cut(graph_frames: list[Frame], tmp_path: Path) -> None:
    one = build(tmp_path / "one.sqlite", graph_frames, batch=len(graph_frames))
    other = build(tmp_path / "other.sqlite", graph_frames, batch=37)
    assert one.read_bytes() == other.read_bytes()


def test_the_content_digest_tells_other_content_but_not_another_capsule(
    graph_frames: list[Frame], sidecar: Sidecar, tmp_path: Path
) -> None:
    moved = build(tmp_path / "moved.sqlite", graph_frames, sha256="cd" * 32)
    fewer = build(tmp_path / "fewer.sqlite", graph_frames[:-1])
    with closing(Sidecar.open(moved)) as one, closing(Sidecar.open(fewer)) as two:
        assert one.content_digest() == sidecar.content_digest()
        assert two.content_digest() != sidecar.content_digest()


def test_a_sidecar_rebuilt_from_the_capsule_alone_is_equal(graph_frames: list[Frame], tmp_path: Path) -> None:
    half = len(graph_frames) // 2
    capsules = [tmp_path / "a.mv2", tmp_path / "b.mv2"]
    builder = SidecarBuilder(tmp_path / "beside.sqlite")
    for part, (path, some) in enumerate(zip(capsules, (graph_frames[:half], graph_frames[half:]), strict=True)):
        writer = NativeWriter().open(path, timestamp=1, model=None, dimension=None, expected_frames=len(some))
        for start in range(0, len(some), 500):
            writer.add(some[start : start + 500], None)
            builder.add(some[start : start + 500], start, part)
        writer.finish()
    builder.finish(capsule_sha256(capsules))

    rebuild(capsules, tmp_path / "rebuilt.sqlite")

    assert (tmp_path / "rebuilt.sqlite").read_bytes() == (tmp_path / "beside.sqlite").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mv2", "b.mv2", "beside.sqlite", "rebuilt.sqlite"]


def test_a_rebuild_from_a_file_that_is_no_capsule_leaves_nothing_behind(tmp_path: Path) -> None:
    foreign = tmp_path / "x.mv2"
    foreign.write_bytes(b"nothing of the kind" * 1000)
    with pytest.raises(CapsuleUnreadable):
        rebuild([foreign], tmp_path / "x.sqlite")
    assert list(tmp_path.iterdir()) == [foreign]
