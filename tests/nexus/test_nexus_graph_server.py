"""The graph in a real Nexus server, and what that server does wrong.

Each ``test_trap_…`` says what Nexus 2.5.0 does. One that fails says that a server does better, or worse in another way:
then the adapter's shapes are to be looked at.
"""

from __future__ import annotations

import collections
import json
import random
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from nexus.graph_conformance import TEXTS, GraphConformance, GraphInMemory, holds, node, some_change, told
from nexus.nexus_server import KEY, NexusServer, needs_nexus, needs_own_nexus, nexus_server

from control_plane.nexus.graph.nexus import EDGE_BYTES, NODE_BYTES, NexusGraph
from control_plane.nexus.graph.port import Change, GraphUnavailable, Held, Mention, Similar

pytestmark = needs_nexus
BEGUN_BYTES = len('{"ref":""}') + 32
EDGES = "UNWIND $rows AS row MATCH (a:D {id: row.a}), (b:D {id: row.b}) MERGE (a)-[r:T]->(b) "
SCANNED = 10_001
"""Edges, the oldest of all, that a hop looks through where the newest one of a node is not there."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NexusServer]:
    with nexus_server(tmp_path / "nexus") as server:
        yield server


@pytest.fixture
def graph(server: NexusServer) -> Iterator[NexusGraph]:
    graph = NexusGraph(server.url, KEY)
    graph.prepare()
    yield graph
    graph.close()


class TestNexus(GraphConformance):
    large = (600, 3_000)

    @pytest.fixture
    def reopen(self, server: NexusServer, graph: NexusGraph) -> Callable[[], NexusGraph]:
        """The server starts again, ended in order and killed by turns."""
        turns = iter(range(1_000))

        def reopen() -> NexusGraph:
            server.restart(kill=next(turns) % 2 == 1)
            return graph

        return reopen


# --- what keeps the graph right on this server -----------------------------------------------------------------------


class Entry(NamedTuple):
    """Properties in the file of the server."""

    owner: int
    is_edge: bool
    properties: dict[str, Any]
    size: int


def entries(server: NexusServer) -> list[Entry]:
    """All that a start of the server finds in its file of properties, in its order."""
    data = (server.data / "properties.store").read_bytes()
    found, at = [], 1
    while any(data[at : at + 13]):
        owner, is_edge, size = struct.unpack_from("<QBI", data, at)
        found.append(Entry(owner, bool(is_edge), json.loads(data[at + 13 : at + 13 + size]), size))
        at += 13 + size
    assert not any(data[at:])
    return found


@needs_own_nexus
def test_nothing_ever_becomes_shorter(server: NexusServer, graph: NexusGraph) -> None:
    """A node begins with one size, is filled with one size, an edge has one size; and the file reads whole."""
    chance, memory = random.Random(5), GraphInMemory()
    for _ in range(40):
        change = some_change(chance, memory)
        graph.apply(change)
        memory.apply(change)
    server.stop()
    sizes: dict[str, set[int]] = collections.defaultdict(set)
    last: dict[tuple[bool, int], int] = {}
    for entry in entries(server):
        assert entry.size >= last.get((entry.is_edge, entry.owner), 0)
        last[entry.is_edge, entry.owner] = entry.size
        kind = "begun" if entry.properties.keys() == {"ref"} else "filled" if "title" in entry.properties else "other"
        sizes["edge" if entry.is_edge else kind].add(entry.size)
    assert sizes["edge"] == {EDGE_BYTES}
    assert sizes["begun"] == {BEGUN_BYTES}
    assert sizes["filled"] == {NODE_BYTES}


@needs_own_nexus
def test_every_score_is_held_as_it_is_with_one_size(server: NexusServer, graph: NexusGraph) -> None:
    """Of all sizes of its digits; one that is made, and one that is changed."""
    scores = [0.0, -0.0, 1, 1.0, 0.5, 0.75, 0.9, 0.99, 0.999, 0.999999, 0.0001, 0.000123, 0.012345, 0.1, 0.750001, 0.3]
    for turn in (scores, scores[::-1]):
        graph.apply(Change(similar=[Similar(1, i, score) for i, score in enumerate(turn, 2)]))
        server.restart()
        assert graph.read([1])[1].similar == dict(enumerate(turn, 2))
    server.stop()
    assert {entry.size for entry in entries(server) if entry.is_edge} == {EDGE_BYTES}


def test_texts_that_have_no_room_are_whole_again_when_read(graph: NexusGraph, server: NexusServer) -> None:
    long = node(1, 'é"\\\x01\U0001f600' * 400, vector_id="v" * 256, collection="c" * 128, doc_type="\x01" * 64)
    graph.apply(Change([long]))
    assert graph.read([1])[1].node == long
    shown = server.query("MATCH (d:Document {id: 1}) RETURN d.title, d.client")[0]
    assert long.title.startswith(shown[0])
    assert shown[0]
    assert shown[1] == long.client


def test_texts_of_which_nothing_is_there_make_a_bare_node(graph: NexusGraph, server: NexusServer) -> None:
    graph.apply(Change([node(1, "x" * 1_000), node(2, "x" * 1_000), node(3)]))
    server.query("MATCH (t:DocumentText) REMOVE t:DocumentText")
    assert [one.node for one in graph.read([1, 2, 3]).values()] == [None, None, node(3)]
    graph.apply(Change([node(1, "x" * 1_000)]))
    assert graph.read([1])[1].node == node(1, "x" * 1_000)


def test_pairs_of_one_direction_or_of_two_scores_are_told_and_made_good(graph: NexusGraph, server: NexusServer) -> None:
    graph.apply(Change([node(i) for i in range(1, 6)], [Similar(1, i, 0.8) for i in range(2, 6)]))
    for a, b, name, value in ((2, 1, "live", "false"), (1, 3, "live", "false"), (4, 1, "score", "0.9")):
        server.query(
            f"MATCH (a:Document {{id: {a}}}), (b:Document {{id: {b}}}) MERGE (a)-[r:SIMILAR_TO]->(b) "
            f"ON MATCH SET r.{name} = {value}"
        )
    held = graph.read([1, 2, 3, 4, 5])
    assert {id_: (dict(one.similar), set(one.lopsided)) for id_, one in held.items()} == {
        1: ({5: 0.8}, {2, 3, 4}),
        2: ({}, {1}),
        3: ({}, {1}),
        4: ({}, {1}),
        5: ({1: 0.8}, set()),
    }
    assert graph.read([1])[1].lopsided == {2, 3, 4}
    graph.apply(Change(similar=[Similar(1, i, 0.8) for i in range(2, 5)]))
    assert graph.read([1, 2, 3, 4, 5]) == {
        1: Held(node(1), dict.fromkeys(range(2, 6), 0.8), frozenset()),
        **{i: Held(node(i), {1: 0.8}, frozenset()) for i in range(2, 6)},
    }


def test_relations_of_others_beside_ours_hide_none_of_ours(graph: NexusGraph, server: NexusServer) -> None:
    graph.apply(Change([node(1), node(2)], [Similar(1, 2, 0.8)], [Mention(1, "name:A")]))
    server.query("MATCH (a:Document {id: 1}), (b:Document {id: 2}) CREATE (a)-[:CITES {since: 1}]->(b)")
    server.query("CREATE (:Person {id: 1, key: 'name:A'})")
    server.query(
        "MATCH (a:Document {id: 1}), (p:Person {id: 1}) CREATE (a)-[:SIMILAR_TO {live: true, score: 0.9}]->(p)"
    )
    memory = told(graph, [Change([node(1), node(2)], [Similar(1, 2, 0.8)], [Mention(1, "name:A")])])
    holds(graph, memory)


@needs_own_nexus
def test_a_server_without_its_lists_of_neighbours_holds_the_same(server: NexusServer, graph: NexusGraph) -> None:
    """They are read for each request that writes, and for nothing else; folders in their place keep it from that."""
    server.stop()
    for name in ("adjacency.outgoing.store", "adjacency.incoming.store"):
        (server.data / name).unlink()
        (server.data / name).mkdir()
    server.start()
    chance, memory = random.Random(8), GraphInMemory()
    for turn in range(20):
        change = some_change(chance, memory)
        graph.apply(change)
        memory.apply(change)
        if turn % 10 == 9:
            server.restart(kill=turn == 9)
            holds(graph, memory)


@needs_own_nexus
def test_a_server_killed_at_any_moment_is_told_again_and_holds_all(server: NexusServer, graph: NexusGraph) -> None:
    """Once it has answered a change it holds it; one without an answer is made again."""
    chance, memory = random.Random(11), GraphInMemory()
    for _ in range(8):
        ids = chance.sample(range(1, 60), 20)
        change = Change(
            [node(i, chance.choice(TEXTS)[:400], version=chance.randrange(1_000)) for i in ids],
            [Similar(*sorted(chance.sample(ids, 2)), round(chance.uniform(0.75, 1), 6)) for _ in range(60)],
            [Mention(i, f"name:{i % 7}") for i in ids],
            sorted(chance.sample(sorted(memory.pairs), min(len(memory.pairs), 10))),
            removed=chance.sample(range(1, 60), 2),
        )
        memory.apply(change)
        killer = threading.Timer(chance.uniform(0, 0.15), server.kill)
        killer.start()
        try:
            graph.apply(change)
        except GraphUnavailable:
            pass
        finally:
            killer.join()
        server.start()
        graph.apply(change)
    holds(graph, memory, also=range(60))
    server.restart()
    holds(graph, memory, also=range(60))


@needs_own_nexus
@pytest.mark.parametrize("filled", [0, SCANNED + 1], ids=["few edges", "many edges"])
def test_edges_that_a_crash_has_hidden_come_back(server: NexusServer, graph: NexusGraph, filled: int) -> None:
    """The server notes that a node's newest edge is another one before it writes that edge."""
    if filled:
        hundred = [Similar(a, b, 0.8) for a in range(1_000, 1_101) for b in range(a + 1, 1_101)]
        graph.apply(Change(similar=hundred[: filled // 2]))
    change = Change([node(i) for i in range(1, 6)], [Similar(1, i, 0.8) for i in range(2, 6)], [Mention(1, "name:A")])
    memory = told(graph, [change])
    server.stop()
    (own,) = {entry.owner for entry in entries(server) if entry.properties.get("id") == 1}
    unwritten = max(entry.owner for entry in entries(server) if entry.is_edge) + 1
    records = bytearray((server.data / "nodes.store").read_bytes())
    struct.pack_into("<Q", records, own * 32 + 8, unwritten + 1)
    (server.data / "nodes.store").write_bytes(records)
    server.start()
    graph.apply(Change([node(900)], [Similar(900, 901, 0.8)]))  # takes the record that was not written
    if filled:
        assert graph.read([1, 2])[1].similar == {}
        assert graph.read([1, 2])[2].lopsided == {1}
    graph.apply(change)
    assert graph.read(range(1, 6)) == memory.held()
    changed = Change([node(1)], [Similar(1, 2, 0.9)], [], [(1, 3)], [Mention(1, "name:A")])
    for again in (changed, change, Change(removed=[2]), change):
        server.restart()
        graph.apply(again)
        memory.apply(again)
        assert graph.read(range(1, 6)) == memory.held()


# --- what the server does wrong --------------------------------------------------------------------------------------


@pytest.fixture
def ten(server: NexusServer) -> NexusServer:
    """Ten nodes, by an index of their ids; and four edges from the first of them."""
    server.query("MATCH (d:D) REMOVE d:D")
    server.query("CREATE INDEX d_id IF NOT EXISTS FOR (d:D) ON (d.id)")
    server.query(
        "UNWIND $rows AS row MERGE (d:D {id: row.id}) SET d += row", rows=[{"id": i, "t": "x"} for i in range(10)]
    )
    server.query(EDGES + "ON CREATE SET r.s = row.s", rows=[{"a": 0, "b": i, "s": i} for i in (1, 2, 3, 4)])
    return server


def hop(server: NexusServer, id_: int) -> list[tuple[Any, ...]]:
    rows = server.query(f"MATCH (a:D {{id: {id_}}})-[r:T*1..1]->(b) RETURN b.id, r.s")
    return sorted(tuple(row) for row in rows)


@needs_own_nexus
@pytest.mark.parametrize(
    ("text", "lost"), [("", True), ("y", False), ("longer", False)], ids=["shorter", "equal", "longer"]
)
def test_trap_properties_that_become_shorter_lose_what_follows_once_it_starts_again(
    ten: NexusServer, text: str, lost: bool
) -> None:
    ten.query("UNWIND $rows AS row MATCH (d:D {id: row.id}) SET d += row", rows=[{"id": 5, "t": text}])
    assert ten.query("MATCH (d:D {id: 5}) RETURN d.t") == [[text]]
    ten.restart()
    known = [row[0] for row in ten.query("MATCH (d:D) RETURN d.id")]
    scores = [score for _, score in hop(ten, 0)]
    assert (None in scores) == lost
    assert (sorted(known, key=str) != list(range(10)) or scores != [1, 2, 3, 4]) == lost


def test_trap_set_after_merge_of_edges_gives_all_the_last_value(ten: NexusServer) -> None:
    rows = [{"a": 5, "b": i, "s": i} for i in (6, 7, 8)]
    ten.query(EDGES + "SET r.s = row.s", rows=rows)
    assert hop(ten, 5) == [(6, 8), (7, 8), (8, 8)]
    ten.query(EDGES + "ON CREATE SET r.s = row.s ON MATCH SET r.s = row.s", rows=rows)
    assert hop(ten, 5) == [(6, 6), (7, 7), (8, 8)]


def test_trap_merge_of_an_edge_without_a_name_makes_none(ten: NexusServer) -> None:
    ten.query(EDGES.replace("[r:T]", "[:T]"), rows=[{"a": 5, "b": 6}])
    assert hop(ten, 5) == []


def test_trap_a_missing_end_stops_a_batch_half_way_or_is_passed_over(ten: NexusServer) -> None:
    rows = [{"a": 5, "b": 6, "s": 1}, {"a": 5, "b": 99, "s": 2}, {"a": 5, "b": 7, "s": 3}]
    with pytest.raises(RuntimeError, match="Unknown variable 'r'"):
        ten.query(EDGES + "ON CREATE SET r.s = row.s ON MATCH SET r.s = row.s", rows=rows)
    assert hop(ten, 5) == [(6, 1)]
    ten.query(EDGES + "ON CREATE SET r.s = row.s", rows=rows)
    assert hop(ten, 5) == [(6, 1), (7, 3)]


def test_trap_an_edge_cannot_be_deleted(ten: NexusServer) -> None:
    for pattern in ("(a:D {id: 0})-[r:T]->(b:D {id: 1})", "(a:D {id: 0})-[r:T*1..1]->(b)", "(a:D)-[r:T]->(b:D)"):
        assert ten.query(f"MATCH {pattern} DELETE r") == [[0]]
    assert hop(ten, 0) == [(1, 1), (2, 2), (3, 3), (4, 4)]


def make_edges(server: NexusServer, count: int) -> None:
    """Edges between others."""
    ids = range(1_000, 1_101)
    server.query("UNWIND $rows AS row MERGE (d:D {id: row})", rows=list(ids))
    for a in ids[: count // 100]:
        matched = " MATCH ".join(f"(n{b}:D {{id: {b}}})" for b in ids)
        made = ", ".join(f"(n{a})-[:T {{s: 1}}]->(n{b})" for b in ids if a != b)
        server.query(f"MATCH {matched} CREATE {made} RETURN 1")


@needs_own_nexus
def test_trap_a_deleted_node_hides_edges_of_those_that_led_to_it(ten: NexusServer) -> None:
    """Where its edge was their newest, and the others are not among the first that the server ever made."""
    make_edges(ten, SCANNED)
    for end in (6, 7, 8):
        ten.query(f"MATCH (a:D {{id: 5}}), (b:D {{id: {end}}}) CREATE (a)-[:T {{s: 1}}]->(b)")
    assert hop(ten, 5) == [(6, 1), (7, 1), (8, 1)]
    ten.query("MATCH (d:D {id: 8}) DETACH DELETE d")
    assert hop(ten, 5) == []


def test_trap_incoming_hops_see_only_the_first_edges_that_were_ever_made(ten: NexusServer) -> None:
    make_edges(ten, SCANNED)
    for start in (6, 7, 8):
        ten.query(f"MATCH (a:D {{id: {start}}}), (b:D {{id: 5}}) CREATE (a)-[:T {{s: 1}}]->(b)")
    assert [hop(ten, start) for start in (6, 7, 8)] == [[(5, 1)], [(5, 1)], [(5, 1)]]
    assert ten.query("MATCH (a:D {id: 5})<-[r:T*1..1]-(b) RETURN b.id") == []
    assert ten.query("MATCH (a:D {id: 5})-[r:T*1..1]-(b) RETURN b.id") == []


def test_trap_a_negative_number_in_a_pattern_is_lost(ten: NexusServer) -> None:
    ten.query("MATCH (a:D {id: 5}), (b:D {id: 6}) CREATE (a)-[:T {s: -1}]->(b)")
    assert hop(ten, 5) == [(6, None)]


def test_trap_a_plain_hop_from_an_indexed_literal_is_one_row_of_nothing(ten: NexusServer) -> None:
    assert ten.query("MATCH (a:D {id: 0})-[r:T]->(b) RETURN b.id, r.s") == [[None, None]]
    assert hop(ten, 0) == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_trap_conditions_on_what_a_hop_finds_are_passed_over(ten: NexusServer) -> None:
    for end in ("(b:D {id: 1})", "(b:Nothing)", "(b) WHERE r.s = 1", "(b) WHERE b.id = 1", "(b) WHERE b:Nothing"):
        found = ten.query(f"MATCH (a:D {{id: 0}})-[r:T*1..1]->{end} RETURN b.id")
        assert sorted(row[0] for row in found) == [1, 2, 3, 4]


def test_trap_a_property_of_a_map_is_the_whole_map(ten: NexusServer) -> None:
    ten.query("UNWIND $rows AS row MATCH (d:D {id: row.id}) SET d.t = row.more.t", rows=[{"id": 5, "more": {"t": 1}}])
    assert ten.query("MATCH (d:D {id: 5}) RETURN d.t") == [[{"t": 1}]]


@pytest.mark.parametrize("value", ["toUpper(row.t)", "[1, 2]", "CASE WHEN true THEN 1 ELSE 2 END"])
def test_trap_little_can_be_set_in_a_batch(ten: NexusServer, value: str) -> None:
    with pytest.raises(RuntimeError, match="Unsupported expression type in SET"):
        ten.query(f"UNWIND $rows AS row MATCH (d:D {{id: row.id}}) SET d.z = {value}", rows=[{"id": 5, "t": "a"}])


def test_trap_a_plain_hop_for_many_ids_answers_for_the_first(ten: NexusServer) -> None:
    ten.query(EDGES + "ON CREATE SET r.s = row.s", rows=[{"a": 5, "b": 6, "s": 1}])
    found = ten.query("UNWIND $ids AS i MATCH (a:D {id: i})-[r:T]->(b) RETURN i, b.id", ids=[5, 0])
    assert found == [[5, 6]]


def test_trap_a_failed_statement_is_answered_with_200(ten: NexusServer) -> None:
    with pytest.raises(RuntimeError, match="Parse error: Cypher syntax error"):
        ten.query("MATCH (a:D RETURN a")


@needs_own_nexus
def test_trap_only_the_server_of_2_5_0_is_known(graph: NexusGraph) -> None:
    assert graph.probe() == "Nexus 2.5.0"
