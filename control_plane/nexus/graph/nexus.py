"""The graph in a Nexus server, over ``POST /cypher``.

Nexus 2.5.0 answers wrongly, or damages its own files, for much that it takes without a word. Only these shapes are
used, and ``tests/nexus/test_nexus_graph_server.py`` says of a server's version whether they hold:

- A node or an edge whose properties become shorter JSON makes the server misread all that was written after it, once it
  has started again. So a filled document node is always NODE_BYTES of JSON, an edge of any type EDGE_BYTES (``pad``
  fills them up), and everything else is never changed. A crash can also leave properties for which there is no node
  yet, and the next node made gets them: every node begins as ``{"ref": 32 hex digits}``, whatever it is.
- Edges cannot be deleted: one that is no more has ``live: false``. Nodes are not deleted either, as that breaks the
  reading of edges of others: one that is no more has lost its label.
- Only outgoing hops are right: each SIMILAR_TO is there in both directions.
- Only a literal in a pattern uses an index. All literals are numbers and hex digits, so no text is ever quoted.
- A missing end stops a batch half-way: nodes come before edges.
- A MERGE of a new edge costs a sync of the disk, so only those that are there are merged: what is there is read first.
- A crash while an edge is made can hide the others of its node for good: they are made again where they are missed.
- There is no seek of a range: nodes stand on shelves of neighbouring ids or keys, which are listed instead.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from common.contract import MALFORMED
from control_plane.nexus.graph.port import (
    Change,
    DocumentNode,
    GraphRefused,
    GraphUnavailable,
    Held,
)
from control_plane.nexus.wire import Wire

SECONDS = 30.0
"""For one request and its answer."""
CLEAR_SECONDS = 600.0
"""For what is left without a shelf when all is cleared, which is one request."""
MAX_BODY_BYTES = 512 << 10
"""Of rows in one request, where they are more than one; nginx takes 1 MiB, Nexus 16."""
ROWS = 500
"""In one request that writes, for the time of which all others wait."""
UNLABELLED = 100
"""Nodes that lose their label in one request: each costs a sync of the disk."""
READS = 50
"""Documents or hops that one request reads."""
READERS = 4
"""Requests that read at once."""
NODES, EDGES = 80, 1_000
"""Between which one request makes edges, and how many: its time grows by the square of the nodes, but each request that
writes also opens files of the server anew, which takes the longer the more edges they have."""
NODE_BYTES, EDGE_BYTES = 512, 48
"""JSON of the properties of a filled document node, and of an edge. Graphs have them: they may grow, never shrink."""
CUT_BYTES = 32
"""JSON of each text but the title in a node that has no room for them whole."""
SHELF_IDS = 1_024
"""On one shelf. Graphs have it, and the next one: neither changes."""
SHELF_CHARACTERS = 13
"""Of a key: ``identifier:ab``, ``url:https://a``."""

_Kind = Literal["SIMILAR_TO", "MENTIONS"]
_ENDS: dict[_Kind, str] = {"SIMILAR_TO": "Document", "MENTIONS": "Entity"}
"""What an edge leads to, by its type."""
_KEYS = {"Document": "id", "Entity": "key"}
_TYPES: dict[str, type[Any]] = {"Document": int, "Entity": str}
"""Of keys, and of shelves."""
_INDEXES = (
    ("Document", "ref"), ("Document", "id"), ("Document", "shelf"), ("Entity", "ref"), ("Entity", "shelf"),
    ("DocumentShelf", "ref"), ("EntityShelf", "ref"), ("DocumentText", "ref"),
)  # fmt: skip
_LABELS = ("Document", "Entity", "DocumentText", "DocumentShelf", "EntityShelf")
_FIELDS = ("vector_id", "client", "collection", "title", "domain", "doc_type")
"""Texts of a document node."""
_CONTENT = ("Constraint violation:", "Invalid input:", "Type mismatch:")
"""Errors that the same rows meet again."""

_NO_SCORE = 2.0
"""Of a pair whose score cannot be read: no pair is to have it."""
_REF = re.compile(r"[0-9a-f]{32}")

_Row = dict[str, Any]
_T = TypeVar("_T")


class _TooLarge(GraphUnavailable):
    """The body of a request is larger than what the server, or something before it, takes."""


class _Answer(msgspec.Struct):
    """Of ``POST /cypher``."""

    rows: list[list[Any]]
    error: str | None = None


class _Health(msgspec.Struct):
    """Of ``GET /health``."""

    version: str


class _Found(NamedTuple):
    """A document node as it is read; of what ``Any`` is, nobody knows whether it is as it was written."""

    id: int
    vector_id: Any
    client: Any
    collection: Any
    title: Any
    domain: Any
    doc_type: Any
    created_at: Any
    version: Any
    whole: Any


class _Hop(NamedTuple):
    """An edge as it is read, and where it ends."""

    kind: _Kind
    id: int
    end: Any
    live: Any
    score: Any
    labels: list[str]


class _Text(NamedTuple):
    ref: str
    text: Any


class _Standing(NamedTuple):
    ref: str
    shelf: Any


class _Value(NamedTuple):
    value: Any


_Edge = tuple[_Kind, int, Any]
"""Its type, the document where it starts, and the id or the key where it ends."""
_Marks = dict[_Edge, float | None]
"""Of edges: the score, 1 of a mention; None: it is there no more."""


class NexusGraph:
    """A graph in a Nexus server; see ``GraphStore``.

    The server is one of its own: a node that somebody deletes, or what others leave half-made at a crash, may hide or
    damage what is here. Folders ``adjacency.outgoing.store`` and ``adjacency.incoming.store`` in its data directory,
    made before it starts for the first time, keep it from files that nothing uses and that make each write slower the
    more edges there are.
    """

    def __init__(self, url: str, key: str | None = None, *, seconds: float = SECONDS) -> None:
        """``url`` may have a path, under which Nexus answers; ``key`` is sent as ``X-API-Key``; ``seconds`` bounds one
        request. Raises InvalidRequest."""
        self._wire = Wire(url, key, GraphUnavailable)
        self._host = self._wire.host
        self._seconds = seconds
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="nexus-reader")

    def prepare(self) -> None:
        """Make the indexes."""
        for label, name in _INDEXES:
            self._ask(f"CREATE INDEX {label.lower()}_{name} IF NOT EXISTS FOR (n:{label}) ON (n.{name})")

    def apply(self, change: Change) -> None:
        """Make a change, and see that its documents show it."""
        try:
            self._write(change)
        except UnicodeEncodeError as error:
            raise GraphRefused("a text has half of a surrogate pair, which no JSON holds") from error

    def read(self, ids: Sequence[int]) -> dict[int, Held]:
        """Documents, and their pairs as both ends have them."""
        nodes = self._nodes(ids)
        found = self._out((kind, id_) for id_ in nodes for kind in _ENDS)
        ends = {end for kind, _, end in found if kind == "SIMILAR_TO"}
        found |= self._out(("SIMILAR_TO", id_) for id_ in ends - nodes.keys())
        similar: dict[int, dict[int, float]] = {id_: {} for id_ in nodes}
        mentions: dict[int, set[str]] = {id_: set() for id_ in nodes}
        lopsided: dict[int, set[int]] = {id_: set() for id_ in nodes}
        for (kind, source, end), mark in found.items():
            if mark is None:
                continue
            if kind == "MENTIONS":
                mentions[source].add(end)
            elif found.get(_half((kind, source, end))) == mark:
                similar.get(source, {})[end] = mark
            else:
                lopsided.get(source, set()).add(end)
                lopsided.get(end, set()).add(source)
        return {
            id_: Held(node, similar[id_], frozenset(mentions[id_]), frozenset(lopsided[id_]))
            for id_, node in nodes.items()
        }

    def documents(self, after: int, limit: int) -> list[int]:
        """Ids of document nodes, in order."""
        return list(itertools.islice(self._on_shelves("Document", "id", after, _shelf_of_id(after + 1)), limit))

    def entities(self, after: str, limit: int) -> list[str]:
        """Keys of entities, in order."""
        return list(itertools.islice(self._on_shelves("Entity", "key", after, _shelf_of_key(after)), limit))

    def clear(self) -> None:
        """Take the labels from all nodes. What they take of the disk is free only with the server's data directory."""
        self.prepare()
        for label in ("Document", "Entity"):
            for shelf in self._shelves(label):
                self._unlabel(label, (row.value for row in self._rows(_shelf(label, shelf, "ref"), _Value)))
        for label in _LABELS:
            self._ask(f"MATCH (n:{label}) REMOVE n:{label}", seconds=CLEAR_SECONDS)

    def probe(self) -> str:
        """``Nexus`` and its version."""
        version = self._answer("GET", "/health", None, self._seconds, _Health).version
        self._ask("RETURN 1 AS one")
        return f"Nexus {version}"

    def close(self) -> None:
        """Close all connections."""
        self._readers.shutdown()
        self._wire.close()

    # --- changes -----------------------------------------------------------------------------------------------------

    def _write(self, change: Change) -> None:
        """In few requests: each that writes costs the server some milliseconds, whatever it writes."""
        own = {node.id for node in change.documents}
        marks = _marks(change, own)
        rows = [_row(node) for node in change.documents]
        ends = {end for a, b, _ in change.similar for end in (a, b)} | {one.document for one in change.mentions}
        bare = [_bare(id_) for id_ in sorted(ends - own)]
        entities = [_entity(key) for key in dict.fromkeys(one.entity for one in change.mentions)]
        self._add("DocumentShelf", (_on(row) for row in (*(row for row, _ in rows), *bare)))
        self._add("EntityShelf", (_on(row) for row in entities))
        self._merge("DocumentText", {text["ref"]: text for _, text in rows if text is not None}.values())
        self._merge("Document", (row for row, _ in rows))
        self._add("Document", bare)
        self._add("Entity", entities)
        self._edges(marks, own)
        self._remove(change.removed)
        self._unlabel("Entity", (_ref("Entity", key) for key in change.forgotten))

    def _remove(self, ids: Sequence[int]) -> None:
        """Documents lose their edges and their label."""
        found = self._out((kind, id_) for id_ in ids for kind in _ENDS)
        live = [edge for edge, mark in found.items() if mark is not None]
        self._edges(dict.fromkeys((*live, *(_half(edge) for edge in live if edge[0] == "SIMILAR_TO"))), set(ids))
        self._unlabel("Document", (_ref("Document", id_) for id_ in ids))

    def _edges(self, wanted: _Marks, own: Set[int] = frozenset()) -> None:
        """Make edges that are not there, and change those that are there with another mark.

        The other half of a pair is not asked for where a document of ``own`` has one half, or is to have it: the halves
        of such an end are written before the others, so a crash leaves none that is alone at its other end. What may be
        there already is merged.

        A crash of the server while it makes an edge can leave it without sight of the others that start at the same
        node, or with sight of a part of them until the next one is made there. So those that start at documents of
        ``own`` are looked at once more, and what is not seen is made again; of two that are equal the newer is seen.
        """
        seen = self._out((kind, source) for source in {edge[1] for edge in wanted} & own for kind in _ENDS)
        far = {edge for edge in wanted if edge[1] not in own}
        there = {edge for edge in far if _half(edge) in seen}
        asked = {edge for edge in far - there if edge[2] not in own or wanted[edge] is None}
        seen |= self._out({edge[:2] for edge in asked})
        changed = {edge: mark for edge, mark in wanted.items() if edge in there or seen.get(edge, mark) != mark}
        new = wanted.keys() - there - seen.keys()
        made: _Marks = {edge: mark for edge, mark in wanted.items() if edge in new and mark is not None}
        for kind in _ENDS:
            self._change(kind, {edge: mark for edge, mark in changed.items() if edge[0] == kind})
        self._create(made)
        written = {source for _, source, _ in (*changed, *made)} & own
        expected = {edge: mark for edge, mark in (seen | wanted).items() if edge[1] in written}
        if hidden := self._hidden(expected):
            self._create(hidden)
            if hidden := self._hidden(expected):
                raise GraphUnavailable(f"{self._host} does not show {len(hidden):,} edges that it took")

    def _hidden(self, expected: _Marks) -> _Marks:
        shown = self._out({(kind, source) for kind, source, _ in expected})
        return {edge: mark for edge, mark in expected.items() if shown.get(edge) != mark}

    def _change(self, kind: _Kind, edges: _Marks) -> None:
        """Edges of one type, of which all, but for crashes, are there."""
        names = ("live", "pad", "score") if kind == "SIMILAR_TO" else ("live", "pad")
        made = ", ".join(f"{name}: row.{name}" for name in names)
        changed = ", ".join(f"r.{name} = row.{name}" for name in names)
        statement = (
            f"UNWIND $rows AS row MATCH (a:Document {{ref: row.a}}), (b:{_ENDS[kind]} {{ref: row.b}}) "
            f"MERGE (a)-[r:{kind} {{{made}}}]->(b) ON MATCH SET {changed}"
        )
        rows = (
            {"a": _ref("Document", source), "b": _ref(_ENDS[kind], end), **_properties(kind, mark)}
            for (_, source, end), mark in edges.items()
        )
        self._send(statement, rows)

    def _create(self, edges: _Marks) -> None:
        """Make edges between nodes that are there. A MERGE of them costs the server a sync of its disk for each."""
        nodes: dict[str, str] = {}
        made: list[str] = []
        for (kind, source, end), mark in edges.items():
            if len(nodes) >= NODES or len(made) >= EDGES:
                self._made(nodes, made)
                nodes, made = {}, []
            a = nodes.setdefault(_pattern("Document", source), f"n{len(nodes)}")
            b = nodes.setdefault(_pattern(_ENDS[kind], end), f"n{len(nodes)}")
            properties = ", ".join(f"{name}: {json.dumps(value)}" for name, value in _properties(kind, mark).items())
            made.append(f"({a})-[:{kind} {{{properties}}}]->({b})")
        self._made(nodes, made)

    def _made(self, nodes: Mapping[str, str], made: Sequence[str]) -> None:
        matched = " MATCH ".join(f"({name}{pattern})" for pattern, name in nodes.items())
        if made and len(self._ask(f"MATCH {matched} CREATE {', '.join(made)} RETURN 1 AS one")) != 1:
            raise GraphUnavailable(f"{self._host} does not find nodes that it took")

    def _merge(self, label: str, rows: Iterable[_Row]) -> None:
        self._send(f"UNWIND $rows AS row MERGE (n:{label} {{ref: row.ref}}) SET n += row", rows)

    def _add(self, label: str, rows: Iterable[_Row]) -> None:
        """Nodes that stand on a shelf, or are one; those that are there stay as they are."""
        several = {row["ref"]: row for row in rows}
        statements = (f'MATCH (n:{label} {{ref: "{ref}"}}) RETURN n.ref AS ref, n.shelf AS shelf' for ref in several)
        # A crash can leave one that has only begun.
        there = {ref for ref, shelf in self._union(statements, _Standing) if shelf is not None}
        self._merge(label, (row for ref, row in several.items() if ref not in there))

    def _unlabel(self, label: str, refs: Iterable[str]) -> None:
        self._send(f"UNWIND $rows AS row MATCH (n:{label} {{ref: row}}) REMOVE n:{label}", refs, UNLABELLED)

    # --- reads -------------------------------------------------------------------------------------------------------

    def _nodes(self, ids: Iterable[int]) -> dict[int, DocumentNode | None]:
        """Documents that are there; None: bare."""
        returned = ", ".join(f"n.{name} AS {name}" for name in _Found._fields)
        statements = (f"MATCH (n:Document {{id: {id_}}}) RETURN {returned}" for id_ in dict.fromkeys(ids))
        found = list(self._union(statements, _Found))
        refs = {one.whole for one in found if isinstance(one.whole, str) and _REF.fullmatch(one.whole)}
        statements = (f'MATCH (n:DocumentText {{ref: "{ref}"}}) RETURN n.ref AS ref, n.text AS text' for ref in refs)
        texts = {ref: text for ref, text in self._union(statements, _Text) if isinstance(text, str)}
        return {one.id: _node(one, texts) for one in found}

    def _out(self, starts: Iterable[tuple[_Kind, int]]) -> _Marks:
        """Edges of a type that go out from a document, to ends that are there."""
        statements = (
            f"MATCH (n:Document {{id: {id_}}})-[r:{kind}*1..1]->(m) RETURN type(r) AS kind, n.id AS id, "
            f"m.{_KEYS[_ENDS[kind]]} AS end, r.live AS live, r.score AS score, labels(m) AS labels"
            for kind, id_ in starts
        )
        return {
            (hop.kind, hop.id, hop.end): _mark(hop)
            for hop in self._union(statements, _Hop)
            if type(hop.end) is _TYPES[_ENDS[hop.kind]] and _ENDS[hop.kind] in hop.labels
        }

    def _on_shelves(self, label: str, name: str, after: Any, first: Any) -> Iterator[Any]:
        """Ids or keys above ``after``, in order."""
        for shelf in sorted(one for one in self._shelves(label) if one >= first):
            found = [row.value for row in self._rows(_shelf(label, shelf, name), _Value)]
            yield from sorted(one for one in found if type(one) is _TYPES[label] and one > after)

    def _shelves(self, label: str) -> list[Any]:
        found = self._rows(f"MATCH (n:{label}Shelf) RETURN n.shelf AS shelf", _Value)
        return [row.value for row in found if type(row.value) is _TYPES[label]]

    # --- requests ----------------------------------------------------------------------------------------------------

    def _union(self, statements: Iterable[str], kind: type[_T]) -> Iterator[_T]:
        """Rows of many small statements, in few requests, of which some go at once."""
        several = (" UNION ALL ".join(some) for some in _batches(statements, READS))
        for rows in self._readers.map(lambda statement: self._rows(statement, kind), several):
            yield from rows

    def _rows(self, statement: str, kind: type[_T]) -> list[_T]:
        try:
            return msgspec.convert(self._ask(statement), list[kind])  # type: ignore[valid-type]
        except msgspec.ValidationError as error:
            raise GraphUnavailable(f"{self._host} answers rows that were not asked for: {error}") from error

    def _send(self, statement: str, rows: Iterable[Any], most: int = ROWS) -> None:
        """A statement over rows, a batch of them at a time."""
        for some in _batches(rows, most, MAX_BODY_BYTES):
            self._fit(statement, some)

    def _fit(self, statement: str, rows: Sequence[Any]) -> None:
        """A statement over rows, or over each half of them where together they are too many bytes."""
        try:
            self._ask(statement, rows)
        except _TooLarge as error:
            if len(rows) == 1:
                raise GraphRefused(f"a document is too large: {error.message}") from error
            self._fit(statement, rows[: len(rows) // 2])
            self._fit(statement, rows[len(rows) // 2 :])

    def _ask(self, statement: str, rows: Sequence[Any] = (), *, seconds: float | None = None) -> list[list[Any]]:
        """Rows of an answer."""
        body = {"query": statement, "parameters": {"rows": rows} if rows else {}}
        answer = self._answer("POST", "/cypher", body, seconds or self._seconds, _Answer)
        if answer.error is not None:
            refused = any(one in answer.error for one in _CONTENT)
            raise (GraphRefused if refused else GraphUnavailable)(f"{self._host}: {answer.error[:300]}")
        return answer.rows

    def _answer(self, method: str, path: str, body: _Row | None, seconds: float, kind: type[_T]) -> _T:
        status, headers, read = self._wire.ask(method, path, None if body is None else _json(body), seconds)
        shown = f"{self._host} answers {status}: {read[:200].decode(errors='replace')}"
        if status == 413:
            raise _TooLarge(shown)
        if status in (400, 422) and read.startswith(b"Failed to "):
            raise GraphRefused(shown)
        if status != 200:
            wait = headers.get("retry-after")
            raise GraphUnavailable(f"{shown} (to be asked again in {wait[:20]} s)" if wait else shown)
        try:
            return msgspec.json.decode(read, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise GraphUnavailable(f"not an answer of Nexus ({error}): {shown}") from error


# --- rows ------------------------------------------------------------------------------------------------------------


def _row(node: DocumentNode) -> tuple[_Row, _Row | None]:
    """The properties of a document node; with those of the node that has its texts, where it has no room for them."""
    texts = {name: getattr(node, name) for name in _FIELDS}
    row = _bare(node.id) | texts | {"created_at": node.created_at, "version": node.version, "whole": "", "pad": ""}
    if _size(row) <= NODE_BYTES:
        return _padded(row, NODE_BYTES), None
    text = _json(list(texts.values())).decode()
    row |= {name: _cut(value, CUT_BYTES) for name, value in texts.items()}
    row |= {"title": "", "whole": _ref("DocumentText", text)}
    row |= {"title": _cut(node.title, NODE_BYTES + 2 - _size(row))}
    return _padded(row, NODE_BYTES), {"ref": row["whole"], "text": text}


def _node(found: _Found, texts: Mapping[str, str]) -> DocumentNode | None:
    """A document node of its properties; None where they are not all there, or not what was written."""
    fields = [getattr(found, name) for name in _FIELDS]
    try:
        if found.whole:
            fields = msgspec.json.decode(texts.get(str(found.whole), ""), type=list[Any])
        return msgspec.convert((found.id, *fields, found.created_at, found.version), DocumentNode)
    except MALFORMED:
        return None


def _mark(hop: _Hop) -> float | None:
    if hop.live is not True:
        return None
    if hop.kind == "MENTIONS":
        return 1.0
    return float(hop.score) if type(hop.score) in (int, float) else _NO_SCORE


def _bare(id_: int) -> _Row:
    return {"ref": _ref("Document", id_), "id": id_, "shelf": _shelf_of_id(id_)}


def _entity(key: str) -> _Row:
    return {"ref": _ref("Entity", key), "key": key, "shelf": _shelf_of_key(key)}


def _marks(change: Change, own: Set[int]) -> _Marks:
    """Both edges of each pair, first the one that starts at ``own``, and those of mentions."""
    marks: _Marks = {}
    for a, b, score in change.similar:
        # Of smaller and of longer ones it is not known how many digits the server writes; it takes no negative ones.
        if not (score == 0 or 0.0001 <= score <= 1) or round(score, 6) != score:
            raise GraphRefused(f"a score is 0 or from 0.0001 to 1, with six decimals, not {score!r}")
        one, other = (a, b) if a in own else (b, a)
        marks["SIMILAR_TO", one, other] = marks["SIMILAR_TO", other, one] = abs(float(score))
    for document, key in change.mentions:
        marks["MENTIONS", document, key] = 1.0
    for a, b in change.dissimilar:
        marks["SIMILAR_TO", a, b] = marks["SIMILAR_TO", b, a] = None
    for document, key in change.unmentioned:
        marks["MENTIONS", document, key] = None
    return marks


def _half(edge: _Edge) -> _Edge:
    """The other one of a pair."""
    kind, source, end = edge
    return kind, end, source


def _on(row: _Row) -> _Row:
    """The shelf of a node."""
    return {"ref": _ref("shelf", row["shelf"]), "shelf": row["shelf"]}


def _properties(kind: _Kind, mark: float | None) -> _Row:
    score = {"score": mark or 0.0} if kind == "SIMILAR_TO" else {}
    return _padded({"live": mark is not None, **score}, EDGE_BYTES)


def _pattern(label: str, end: object) -> str:
    """Of one node, by what has an index."""
    return f":{label} {{id: {end}}}" if label == "Document" else f':{label} {{ref: "{_ref(label, end)}"}}'


def _ref(label: str, of: object) -> str:
    """What a node is found by when it is written: of one length for all of them."""
    return hashlib.sha256(f"{label}\0{of}".encode()).hexdigest()[:32]


def _shelf_of_id(id_: int) -> int:
    return id_ // SHELF_IDS


def _shelf_of_key(key: str) -> str:
    """The beginning of a key in hex digits, which have the order of its code points."""
    return key[:SHELF_CHARACTERS].encode().hex()


def _shelf(label: str, shelf: int | str, name: str) -> str:
    return f"MATCH (n:{label} {{shelf: {json.dumps(shelf)}}}) RETURN n.{name} AS {name}"


def _json(value: object) -> bytes:
    """As Nexus keeps it, so that sizes can be told."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _size(value: object) -> int:
    return len(_json(value))


def _padded(properties: _Row, size: int) -> _Row:
    """Properties that are so many bytes of JSON; without their padding they are no more."""
    empty = properties | {"pad": ""}
    return empty | {"pad": " " * (size - _size(empty))}


def _cut(text: str, size: int) -> str:
    """The beginning of a text, at most so many bytes of JSON with its quotes."""
    cut = text[:size]
    while _size(cut) > size:
        cut = cut[:-1]
    return cut


def _batches(items: Iterable[_T], most: int, size: int = sys.maxsize) -> Iterator[list[_T]]:
    """Items by at most so many, and so many bytes of JSON where it is more than one."""
    some: list[_T] = []
    held = 0
    for item in items:
        own = _size(item)
        if some and (len(some) == most or held + own > size):
            yield some
            some, held = [], 0
        some.append(item)
        held += own
    if some:
        yield some
