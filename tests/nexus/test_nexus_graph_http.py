"""The adapter of Nexus against a server that speaks as Nexus does, and fails as servers and proxies do."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
from nexus.graph_conformance import GraphConformance, GraphInMemory, holds, some_change, told
from nexus.synced import DIMENSION, Tricky, synced
from nexus.told_server import Answer, Seen, ToldServer
from processes import answering, free_port

from common.errors import InvalidRequest
from control_plane.nexus.graph.nexus import MAX_BODY_BYTES, ROWS, NexusGraph
from control_plane.nexus.graph.port import Change, DocumentNode, GraphRefused, GraphUnavailable, Mention, Similar
from control_plane.nexus.wire import MAX_ANSWER_BYTES

DOCUMENT = DocumentNode(1, "v1", "c", "books", "Title", "general", "page", 1_700_000_000_000, 1)
OVERLOADED = {
    "error": "server overloaded",
    "retry_after_ms": 10_000,
    "reason": "server overloaded: waited 5001 ms, queue_timeout 5000 ms",
}


def rows(*found: list[Any], columns: int = 1) -> Answer:
    """As Nexus answers."""
    names = [f"c{i}" for i in range(columns)]
    return Answer(200, json.dumps({"columns": names, "rows": found, "execution_time_ms": 0}).encode())


def error(message: str) -> Answer:
    """As Nexus answers what failed."""
    return Answer(200, json.dumps({"columns": [], "rows": [], "execution_time_ms": 1, "error": message}).encode())


class Node:
    """One that was made; it stays, whatever becomes of its labels."""

    def __init__(self, label: str, properties: dict[str, Any]) -> None:
        self.labels = {label}
        self.properties = properties
        self.out: list[Edge] = []
        """The newest first."""


class Edge(NamedTuple):
    kind: str
    end: Node
    properties: dict[str, Any]


class Nexus:
    """A graph in memory that knows the statements of the adapter, and no others."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.indexes: set[str] = set()
        self.half = False
        """Half of what a request asks for is done, and a node more is begun."""

    def usual(self, seen: Seen) -> Answer:
        """What a server that is well answers."""
        if seen.path.endswith("/health"):
            return Answer(200, b'{"status":"Healthy","version":"2.5.0","uptime_seconds":1}')
        rows_ = seen.body["parameters"].get("rows", [])
        if self.half:
            rows_, begun = rows_[: len(rows_) // 2], rows_[len(rows_) // 2 :][:1]
            if found := re.match(r".+ MERGE \(n:(\w+) ", seen.query):
                self._merge([{"ref": row["ref"]} for row in begun], found[1])
        return rows(*(row for one in seen.query.split(" UNION ALL ") for row in self._ask(one, rows_)))

    def _ask(self, query: str, given: list[Any]) -> list[list[Any]]:
        for pattern, act in self._statements.items():
            if found := re.fullmatch(pattern, query):
                return list(act(self, given, *found.groups()) or ())
        raise AssertionError(f"not a statement of the adapter: {query}")

    def _find(self, label: str, name: str | None = None, value: Any = None) -> list[Node]:
        return [n for n in self.nodes if label in n.labels and (name is None or n.properties.get(name) == value)]

    def _index(self, _: list[Any], name: str) -> None:
        self.indexes.add(name)

    def _merge(self, given: list[Any], label: str) -> None:
        for row in given:
            found = self._find(label, "ref", row["ref"])
            if not found:
                found = [Node(label, {})]
                self.nodes += found
            for one in found:
                one.properties |= row

    def _unlabel(self, given: list[Any], label: str) -> None:
        for ref in given:
            for one in self._find(label, "ref", ref):
                one.labels.discard(label)

    def _unlabel_all(self, _: list[Any], label: str) -> None:
        for one in self._find(label):
            one.labels.discard(label)

    def _change(self, given: list[Any], end: str, kind: str, names: str) -> None:
        for row in given:
            (a,), (b,) = self._find("Document", "ref", row["a"]), self._find(end, "ref", row["b"])
            if not (found := [one for one in a.out if one.kind == kind and one.end is b]):
                found = [Edge(kind, b, {})]
                a.out[:0] = found
            found[0].properties.update(
                {name.strip().partition(":")[0]: row[name.split(".")[1]] for name in names.split(",")}
            )

    def _create(self, _: list[Any], matched: str, made: str) -> list[list[Any]]:
        nodes: dict[str, Node] = {}
        for name, label, key, value in re.findall(r"\((n\d+):(\w+) \{(\w+): ([^}]+)\}\)", matched):
            found = self._find(label, key, json.loads(value))
            if not found:
                return []
            (nodes[name],) = found
        several = re.findall(r"\((n\d+)\)-\[:(\w+) (\{[^}]+\})\]->\((n\d+)\)", made)
        for a, kind, properties, b in several[: len(several) // 2] if self.half else several:
            told = json.loads(re.sub(r"(\w+): ", r'"\1": ', properties))
            nodes[a].out.insert(0, Edge(kind, nodes[b], told))
        return [[1]]

    def _read(self, _: list[Any], label: str, name: str | None, value: str | None, returned: str) -> list[list[Any]]:
        columns = [one.partition(" AS ")[0].removeprefix("n.") for one in returned.split(", ")]
        found = self._find(label, name, value and json.loads(value))
        return [[one.properties.get(column) for column in columns] for one in found]

    def _hop(self, _: list[Any], id_: str, kind: str, key: str) -> Iterator[list[Any]]:
        for one in self._find("Document", "id", int(id_)):
            ends = {id(edge.end): edge for edge in reversed(one.out) if edge.kind == kind}
            for edge in ends.values():
                told = edge.properties
                end = edge.end
                yield [kind, int(id_), end.properties.get(key), told["live"], told.get("score"), sorted(end.labels)]

    def _one(self, _: list[Any]) -> list[list[Any]]:
        return [[1]]

    _statements: ClassVar[dict[str, Callable[..., Any]]] = {
        r"CREATE INDEX \w+ IF NOT EXISTS FOR \(n:(\w+)\) ON \(n\.\w+\)": _index,
        r"UNWIND \$rows AS row MERGE \(n:(\w+) \{ref: row\.ref\}\) SET n \+= row": _merge,
        r"UNWIND \$rows AS row MATCH \(n:(\w+) \{ref: row\}\) REMOVE n:\1": _unlabel,
        r"MATCH \(n:(\w+)\) REMOVE n:\1": _unlabel_all,
        r"UNWIND \$rows AS row MATCH \(a:Document \{ref: row\.a\}\), \(b:(\w+) \{ref: row\.b\}\) "
        r"MERGE \(a\)-\[r:(\w+) \{([^}]+)\}\]->\(b\) ON MATCH SET .+": _change,
        r"MATCH (\(n.+\)) CREATE (.+) RETURN 1 AS one": _create,
        r"MATCH \(n:(\w+)(?: \{(\w+): ([^}]+)\})?\) RETURN ((?:n\.\w+ AS \w+(?:, )?)+)": _read,
        r"MATCH \(n:Document \{id: (\d+)\}\)-\[r:(\w+)\*1\.\.1\]->\(m\) RETURN type\(r\) AS kind, n\.id AS id, "
        r"m\.(\w+) AS end, r\.live AS live, r\.score AS score, labels\(m\) AS labels": _hop,
        r"RETURN 1 AS one": _one,
    }


class Wire(ToldServer):
    """A server that speaks as Nexus does."""

    def __init__(self) -> None:
        self.nexus = Nexus()
        super().__init__(self.nexus.usual)

    def sent(self, beginning: str) -> list[dict[str, Any]]:
        """Bodies of statements."""
        return [one.body for one in self.seen if one.method == "POST" and one.query.startswith(beginning)]


@pytest.fixture
def wire() -> Iterator[Wire]:
    known = Wire()
    with known.running():
        yield known


@contextmanager
def opened(url: str, key: str | None = None, seconds: float = 10.0) -> Iterator[NexusGraph]:
    graph = NexusGraph(url, key, seconds=seconds)
    try:
        yield graph
    finally:
        graph.close()


@pytest.fixture
def graph(wire: Wire) -> Iterator[NexusGraph]:
    with opened(wire.url) as graph:
        yield graph


class TestAdapter(GraphConformance):
    """All that the adapter itself does, where the server does as it is told."""

    large = (300, 2_000)

    @pytest.fixture
    def graph(self, wire: Wire) -> Iterator[NexusGraph]:
        with opened(wire.url) as graph:
            graph.prepare()
            yield graph

    @pytest.fixture
    def reopen(self, wire: Wire) -> Iterator[Callable[[], NexusGraph]]:
        graphs: list[NexusGraph] = []

        def reopen() -> NexusGraph:
            graphs.append(NexusGraph(wire.url))
            return graphs[-1]

        yield reopen
        for graph in graphs:
            graph.close()


@pytest.mark.parametrize("done", ["nothing", "half", "all"])
def test_a_change_that_fails_anywhere_is_made_good_when_it_is_made_again(
    wire: Wire, graph: NexusGraph, done: str
) -> None:
    """Each request of it is cut off once, whatever the server has done of what it asked for."""
    chance, memory = random.Random(4), GraphInMemory()
    for _ in range(4):
        change = some_change(chance, memory)
        memory.apply(change)
        met: set[bytes] = set()

        def once(seen: Seen, met: set[bytes] = met) -> Answer | None:
            if seen.raw in met:
                return wire.nexus.usual(seen)
            met.add(seen.raw)
            if done != "nothing":
                wire.nexus.half = done == "half"
                wire.nexus.usual(seen)
                wire.nexus.half = False
            return None

        wire.answer = once
        failures = 0
        while True:
            try:
                graph.apply(change)
                break
            except GraphUnavailable:
                failures += 1
        assert failures > 5
        wire.answer = wire.nexus.usual
        holds(graph, memory)


# --- the address -----------------------------------------------------------------------------------------------------


def test_a_path_and_a_key_go_with_every_request(wire: Wire) -> None:
    with opened(f"{wire.url}/graphs/nexus/", "nx_0123") as graph:
        assert graph.probe() == "Nexus 2.5.0"
        graph.prepare()
        assert graph.read([1]) == {}
    assert {one.path for one in wire.seen} == {"/graphs/nexus/health", "/graphs/nexus/cypher"}
    assert {one.headers["x-api-key"] for one in wire.seen} == {"nx_0123"}
    assert "authorization" not in wire.seen[0].headers


def test_without_a_key_none_is_sent(wire: Wire, graph: NexusGraph) -> None:
    graph.probe()
    assert all("x-api-key" not in one.headers for one in wire.seen)


def test_the_environment_plays_no_part(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with opened(wire.url) as graph:
        assert graph.probe() == "Nexus 2.5.0"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nexus",
        "ftp://nexus",
        "http://",
        "http://a:b@nexus",
        "http://nexus/?a=b",
        "http://nexus/#a",
        "http://[",
        "http://a b/",
        "http://nexus:port",
        "http://nexus\n",
        7 * "é",
    ],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="url: an http") as refused:
        NexusGraph(url)
    assert refused.value.details["field"] == "url"


@pytest.mark.parametrize("key", ["", "a b", "a\n", "é"])
def test_a_key_that_no_header_holds_is_refused(key: str) -> None:
    with pytest.raises(InvalidRequest, match="key: printable ASCII"):
        NexusGraph("http://nexus", key)


def test_nothing_is_left_once_it_is_closed(wire: Wire) -> None:
    with opened(wire.url) as graph:
        graph.read(range(1_000))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nexus-reader")]


# --- what answers instead --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer(503, json.dumps(OVERLOADED).encode(), headers={"retry-after": "10"}), "503.*overloaded.*again in 10 s"),
        (Answer(429, b'{"error":"Rate limit exceeded"}', headers={"Retry-After": "3"}), "429.*again in 3 s"),
        (Answer(500, b""), "answers 500"),
        (Answer(401, b'{"error":"Invalid API key"}'), "answers 401: .*Invalid API key"),
        (Answer(404, b""), "answers 404"),
        (Answer(400, b"<html>400 The plain HTTP request was sent to HTTPS port</html>", "text/html"), "HTTPS port"),
        (Answer(502, b"<html>" + b"Bad Gateway " * 1_000, "text/html"), "answers 502: <html>Bad Gateway"),
        (Answer(413, b"<html>Request Entity Too Large</html>", "text/html"), "answers 413"),
        (Answer(200, b"<html>It works!</html>", "text/html"), "not an answer of Nexus"),
        (Answer(200, b"\xff\xfe"), "not an answer of Nexus"),
        (Answer(200, b""), "not an answer of Nexus"),
        (Answer(200, b"[]"), "not an answer of Nexus"),
        (Answer(200, b'{"status": "ok"}'), "not an answer of Nexus"),
        (Answer(200, b'{"rows": [{"id": 1}]}'), "not an answer of Nexus"),
        (Answer(200, b'{"rows": [[1]], "columns": ["n"]'), "not an answer of Nexus"),
        (rows([1]), "rows that were not asked for"),
        (rows(["1"] * 10), "rows that were not asked for"),
        (error("Execution error: Storage error: Property data extends beyond file"), "Property data extends"),
        (error("Parse error: Cypher syntax error: Expected ')'"), "Parse error"),
        (error("x" * 10_000), "x{300}$"),
    ],
)  # fmt: skip
def test_what_is_no_good_answer_may_be_one_later(wire: Wire, graph: NexusGraph, answer: Answer, says: str) -> None:
    wire.answer = lambda _: answer
    with pytest.raises(GraphUnavailable, match=says) as told:
        graph.read([1])
    assert len(told.value.message) < 500


def test_a_redirect_is_not_followed(wire: Wire, graph: NexusGraph) -> None:
    wire.answer = lambda _: Answer(307, b"", headers={"Location": f"{wire.url}/elsewhere"})
    with pytest.raises(GraphUnavailable, match="answers 307"):
        graph.probe()
    assert [one.path for one in wire.seen] == ["/health"]


@pytest.mark.parametrize(
    "answer",
    [
        None,
        Answer(200, b'{"columns": [], "ro', length=4_000, over=True),
        Answer(200, b'5\r\n{"row', headers={"Transfer-Encoding": "chunked"}, over=True),
        Answer(200, b"", headers={"Content-Length": "many"}, over=True),
    ],
    ids=["nothing", "a part", "a part of a chunk", "no HTTP"],
)
def test_a_connection_that_is_cut_says_nothing(wire: Wire, graph: NexusGraph, answer: Answer | None) -> None:
    wire.answer = lambda _: answer
    with pytest.raises(GraphUnavailable):
        graph.apply(Change([DOCUMENT]))


def test_nobody_there(wire: Wire) -> None:
    with opened(f"http://127.0.0.1:{free_port()}") as graph, pytest.raises(GraphUnavailable, match="ConnectError"):
        graph.probe()


def test_an_answer_that_does_not_come_is_not_waited_for(wire: Wire) -> None:
    def silent(_: Seen) -> None:
        wire.over.wait(60)

    wire.answer = silent
    with opened(wire.url, seconds=0.2) as graph, pytest.raises(GraphUnavailable, match=r"not answered within 0\.2 s"):
        graph.probe()
    wire.over.set()


def test_an_answer_that_comes_byte_by_byte_is_not_waited_for() -> None:
    over = threading.Event()

    class Dribbling(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            while not over.wait(0.02):
                self.wfile.write(b" ")

    with answering(Dribbling) as url, opened(url, seconds=0.3) as graph:
        with pytest.raises(GraphUnavailable, match=r"not answered whole within 0\.3 s"):
            graph.probe()
        over.set()


def test_an_answer_without_end_is_left(wire: Wire, graph: NexusGraph) -> None:
    wire.answer = lambda _: Answer(200, b'{"rows": [' + b" " * (MAX_ANSWER_BYTES + 1), over=True)
    with pytest.raises(GraphUnavailable, match="answers more than"):
        graph.read([1])


def test_after_a_failure_the_next_request_is_as_good_as_any(wire: Wire, graph: NexusGraph) -> None:
    wire.answer = lambda _: None
    with pytest.raises(GraphUnavailable):
        graph.probe()
    wire.answer = wire.nexus.usual
    assert graph.probe() == "Nexus 2.5.0"


def test_what_is_not_nexus_has_no_version(wire: Wire, graph: NexusGraph) -> None:
    wire.answer = lambda _: Answer(200, b'{"status":"Healthy"}')
    with pytest.raises(GraphUnavailable, match="not an answer of Nexus"):
        graph.probe()


# --- what is not as it was written -----------------------------------------------------------------------------------

ODD = ["", '{"text": 1', "[" * 100_000, "[1]", '["a", "b", "c", "d", "e", 7]', '"}) DETACH DELETE n //', 7, ["a"], None]


def test_what_is_not_as_it_was_written_is_another_and_right_once_it_is_told_again(
    wire: Wire, graph: NexusGraph
) -> None:
    short, long = DOCUMENT, DOCUMENT._replace(id=2, title="long " * 200)
    change = Change([short, long], [Similar(1, 2, 0.8)], [Mention(1, "name:A")])
    memory = told(graph, [change])
    (text,) = wire.nexus._find("DocumentText")
    nodes = {one: wire.nexus._find("Document", "id", one.id)[0] for one in (short, long)}
    similar, mention = sorted(nodes[short].out, key=lambda edge: edge.kind, reverse=True)
    places = [(short, nodes[short].properties, name) for name in ("title", "version", "whole")]
    places += [(long, nodes[long].properties, "whole"), (long, text.properties, "text")]
    for document, properties, name in places:
        for odd in ODD:
            if properties[name] or odd:
                properties[name] = odd
                assert graph.read([document.id])[document.id].node != document, (name, odd)
                graph.apply(change)
                holds(graph, memory)
    for properties, name in [(similar.properties, "score"), (similar.properties, "live"), (mention.properties, "live")]:
        for odd in ODD:
            properties[name] = odd
            held = graph.read([1])[1]
            assert (held.lopsided == {2}) != (held.mentions == set()), (name, odd)
            graph.apply(change)
            holds(graph, memory)


def test_what_nobody_wrote_is_nobody(wire: Wire, graph: NexusGraph) -> None:
    memory = told(graph, [Change([DOCUMENT, DOCUMENT._replace(id=2)], [Similar(1, 2, 0.8)], [Mention(1, "name:A")])])
    strangers = [
        Node("Document", {"id": "x", "shelf": 0}),
        Node("Entity", {"key": 7, "shelf": wire.nexus._find("EntityShelf")[0].properties["shelf"]}),
        Node("DocumentShelf", {"shelf": "x"}),
        Node("EntityShelf", {"shelf": [7]}),
    ]
    wire.nexus.nodes += strangers
    (one,) = wire.nexus._find("Document", "id", 1)
    one.out[:0] = [
        Edge(kind, end, {"live": True}) for kind, end in zip(("SIMILAR_TO", "MENTIONS"), strangers, strict=False)
    ]
    holds(graph, memory)
    graph.clear()
    assert (graph.read([1, 2]), graph.documents(0, 9), graph.entities("", 9)) == ({}, [], [])


def test_a_text_that_is_not_what_was_written_is_found_and_repaired_by_the_next_look(
    wire: Wire, graph: NexusGraph, tmp_path: Path
) -> None:
    async def story() -> None:
        async with synced(f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite'}", Tricky(graph)) as parts:
            code, long = await parts.collection(), "a" * 250
            await parts.write(code, **{long: np.eye(DIMENSION, dtype=np.float32)[0]})
            async with parts.running():
                await parts.settled()
                (text,) = wire.nexus._find("DocumentText")
                text.properties["text"] = text.properties["text"][:-9]
                report = await parts.verify()
                assert (report.different, report.repaired, report.error) == ({"document": 1}, 1, None)
                await parts.settled()
                parts.check()
                assert (await parts.verify()).different == {}

    asyncio.run(story())


# --- what is never taken ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        error("Execution error: Constraint violation: ERR_CONSTRAINT_VIOLATED: kind=PROPERTY_TYPE"),
        error("Type mismatch: expected STRING, got INTEGER"),
        Answer(400, b"Failed to parse the request body as JSON: EOF while parsing", "text/plain"),
        Answer(422, b"Failed to deserialize the JSON body into the target type: missing field", "text/plain"),
        Answer(413, b"Failed to buffer the request body: length limit exceeded", "text/plain"),
    ],
)
def test_what_would_not_be_taken_the_next_time_is_refused(wire: Wire, graph: NexusGraph, answer: Answer) -> None:
    wire.answer = lambda seen: answer if seen.query.startswith("UNWIND") else wire.nexus.usual(seen)
    with pytest.raises(GraphRefused):
        graph.apply(Change([DOCUMENT]))


@pytest.mark.parametrize("score", [-0.5, 1.000001, 0.00009, 0.1234567, 0.1 + 0.2, float("nan"), float("inf")])
def test_a_score_of_unknown_size_is_refused(wire: Wire, graph: NexusGraph, score: float) -> None:
    with pytest.raises(GraphRefused, match="six decimals"):
        graph.apply(Change(similar=[Similar(1, 2, score)]))
    assert wire.seen == []


@pytest.mark.parametrize(
    "change",
    [
        Change([DOCUMENT._replace(title="\ud800")]),
        Change(mentions=[Mention(1, "name:\udfff")]),
        Change(forgotten=["name:\udfff"]),
    ],
)
def test_half_of_a_surrogate_pair_is_refused(graph: NexusGraph, change: Change) -> None:
    with pytest.raises(GraphRefused, match="surrogate"):
        graph.apply(change)


def test_edges_whose_ends_are_not_found_are_not_made(wire: Wire, graph: NexusGraph) -> None:
    wire.answer = lambda seen: wire.nexus.usual(seen) if " CREATE " not in seen.query else rows()
    with pytest.raises(GraphUnavailable, match="does not find nodes that it took"):
        graph.apply(Change(similar=[Similar(1, 2, 0.8)]))


def test_edges_that_are_not_shown_are_made_once_more_and_then_told(wire: Wire, graph: NexusGraph) -> None:
    wire.answer = lambda seen: rows() if "*1..1" in seen.query else wire.nexus.usual(seen)
    with pytest.raises(GraphUnavailable, match="does not show 1 edges that it took"):
        graph.apply(Change([DOCUMENT], mentions=[Mention(1, "name:A")]))
    assert sum(" CREATE " in one.query for one in wire.seen) == 2


def test_edges_that_vanish_when_another_is_made_are_made_again(wire: Wire, graph: NexusGraph) -> None:
    """As a server does that a crash has left with a part of a node's edges."""
    nodes = [DOCUMENT._replace(id=i) for i in range(1, 5)]
    changes = [
        Change(nodes, [Similar(1, 2, 0.8), Similar(1, 3, 0.8)], [Mention(1, "name:A")]),
        Change(nodes[:1], [Similar(1, 4, 0.8)]),
    ]
    memory = told(graph, changes[:1])
    met: list[Seen] = []

    def forgetting(seen: Seen) -> Answer:
        answer = wire.nexus.usual(seen)
        if " CREATE " in seen.query:
            if not met:
                (one,) = (node for node in wire.nexus.nodes if node.properties.get("id") == 1)
                del one.out[1:]
            met.append(seen)
        return answer

    wire.answer = forgetting
    graph.apply(changes[1])
    memory.apply(changes[1])
    assert len(met) == 2
    holds(graph, memory)


# --- the size of what is sent ----------------------------------------------------------------------------------------


def test_requests_are_bound_in_rows_and_in_bytes(wire: Wire, graph: NexusGraph) -> None:
    documents = [DOCUMENT._replace(id=i, title=f"{i}" * (10_000 if i < 100 else 1)) for i in range(1, 700)]
    graph.apply(Change(documents))
    assert max(len(one.raw) for one in wire.seen) < MAX_BODY_BYTES + 1_000
    for label, count in (("Document", 699), ("DocumentText", 99)):
        batches = [body["parameters"]["rows"] for body in wire.sent(f"UNWIND $rows AS row MERGE (n:{label} ")]
        assert max(map(len, batches)) <= ROWS
        refs = [row["ref"] for batch in batches for row in batch]
        assert len(refs) == len(set(refs)) == count


def test_a_text_larger_than_a_request_goes_alone(wire: Wire, graph: NexusGraph) -> None:
    long = [DOCUMENT._replace(id=i, title=f"{i}" * MAX_BODY_BYTES) for i in (1, 2)]
    graph.apply(Change([*long, DOCUMENT._replace(id=3, title="y" * 1_000)]))
    batches = [body["parameters"]["rows"] for body in wire.sent("UNWIND $rows AS row MERGE (n:DocumentText ")]
    assert [len(batch) for batch in batches] == [1, 1, 1]


def test_what_is_too_much_at_once_is_sent_by_halves(wire: Wire, graph: NexusGraph) -> None:
    taken: list[str] = []

    def small(seen: Seen) -> Answer:
        if len(seen.raw) > 9_000:
            return Answer(413, b"<html>413 Request Entity Too Large</html>", "text/html")
        if "MERGE (n:Document " in seen.query:
            taken.extend(row["ref"] for row in seen.body["parameters"]["rows"])
        return wire.nexus.usual(seen)

    wire.answer = small
    graph.apply(Change([DOCUMENT._replace(id=i) for i in range(1, 101)]))
    assert len(taken) == len(set(taken)) == 100


def test_no_text_is_ever_a_part_of_a_statement(wire: Wire, graph: NexusGraph) -> None:
    """All of them are data, apart from it; a statement has names, numbers, hex digits and spaces of its own."""
    evil = '"}) DETACH DELETE n //'
    change = Change(
        [DocumentNode(1, *([evil * 50] * 6), 1, 1)],
        [Similar(2, 3, 0.8)],
        [Mention(2, evil)],
        [(3, 4)],
        [Mention(3, evil)],
        [5],
        [evil],
    )
    graph.apply(change)
    assert graph.read([1])[1].node == change.documents[0]
    graph.entities(evil, 5)
    graph.clear()
    for one in wire.seen:
        assert "DETACH" not in one.query
        assert all(re.fullmatch(r'"(?:[0-9a-f]*| *)"', text) for text in re.findall(r'"[^"]*"', one.query))
