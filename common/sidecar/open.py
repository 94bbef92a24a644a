"""Reads a sidecar: every answer comes from an index, none from a scan of the graph."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, Self, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.errors import CapsuleUnreadable
from common.frames.build import frame_uri
from common.sidecar.build import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    USER_VERSION,
    derived_id,
    node_key,
    normalise_name,
    schema,
)
from common.sidecar.words import best_rows, scores
from common.text import stem

_T = TypeVar("_T")
Direction = Literal["in", "out", "both"]

_TABLES = {
    "parts": "part",
    "documents": "id",
    "labels": "id",
    "types": "id",
    "files": "id",
    "nodes": "id",
    "missing": "id",
    "symbols": "name, node",
    "evidence": "id",
    "edges": "id",
    "processes": "id",
    "process_steps": "process, step, node",
    "communities": "id",
    "members": "community, node",
    "hotspots": "rank",
    "words": "word",
}
_OR_MISSING = " AND NOT EXISTS (SELECT 1 FROM missing WHERE id = {})"
_SCHEMA = "SELECT type, name, sql FROM sqlite_master ORDER BY type, name"
_TYPES = {"INTEGER": "integer", "TEXT": "text", "BLOB": "blob", "REAL": "real"}
_REFERENCES: dict[str, tuple[tuple[str, str, str], ...]] = {
    table: tuple(
        (name, other, _OR_MISSING.format(f"{table}.{name}") if other == "nodes" else "") for name, other in columns
    )
    for table, columns in {
        "files": (("node", "nodes"),),
        "nodes": (("label", "labels"), ("file", "files")),
        "symbols": (("node", "nodes"),),
        "edges": (("source", "nodes"), ("target", "nodes"), ("type", "types"), ("evidence", "evidence")),
        "processes": (("id", "nodes"), ("entry", "nodes"), ("terminal", "nodes")),
        "process_steps": (("process", "nodes"), ("node", "nodes")),
        "communities": (("id", "nodes"),),
        "members": (("community", "nodes"), ("node", "nodes")),
        "hotspots": (("node", "nodes"),),
    }.items()
}
"""Columns that name a row of another table; those of nodes may name one of ``missing``."""
_KIND_FOLDERS = {"missing": "nodes", "node": "nodes", "community": "communities", "process": "processes"}
_MAX_VARIABLES = 500
_DIGEST_ROWS = 10_000
_MAX_NAMED = 10_000
_MAX_MASKS = 8
"""Scopes of which it is known what is inside: a byte a node."""
_encode = msgspec.msgpack.Encoder().encode
_LAST = "\U0010ffff"
"""Sorts after every character of a name or path."""
_NODE = """
SELECT nodes.id, nodes.node_id, labels.kind, labels.name, nodes.name, files.path, nodes.start_line, nodes.end_line
FROM nodes JOIN labels ON labels.id = nodes.label LEFT JOIN files ON files.id = nodes.file
"""
_EDGE = """
SELECT edges.id, edges.edge_id, edges.source, edges.target, types.name, evidence.confidence, evidence.reason, edges.step
FROM edges JOIN types ON types.id = edges.type JOIN evidence ON evidence.id = edges.evidence
"""


class Node(NamedTuple):
    """A node; ``position`` is that of its frame in the capsule, over all parts, and orders nodes by their id."""

    position: int
    id: str
    kind: str
    """``node``, ``community`` or ``process``; ``missing`` for one that a relationship names and the graph lacks: it
    has a negative position, no frame, and its id as its name."""
    label: str
    name: str
    file_path: str | None
    start_line: int | None
    """As the graph gives it."""
    end_line: int | None

    @property
    def uri(self) -> str:
        """The frame's uri in the capsule."""
        return frame_uri(f"mv2://{_KIND_FOLDERS[self.kind]}/", self.id)

    @property
    def title(self) -> str:
        """The frame's title in the capsule."""
        return f"{self.label}: {self.name}"


class Edge(NamedTuple):
    """A relationship; ``source`` and ``target`` are positions of nodes."""

    position: int
    id: str | None
    """None where it is ``<source id>_<TYPE>_<target id>``."""
    source: int
    target: int
    type: str
    confidence: float
    reason: str | None
    step: int | None

    def written_out(self, source: Node, target: Node) -> str:
        """The id, where its ends are these."""
        return self.id or derived_id(source.id, self.type, target.id)


class Scope(NamedTuple):
    """Which nodes a search looks at; all by default."""

    labels: tuple[str, ...] = ()
    """Nodes of any of these labels."""
    file_prefix: str | None = None
    """Nodes whose path starts so."""
    community: str | None = None
    """Members of the community of this id."""
    types: tuple[str, ...] = ()
    """Nodes with a relationship of any of these types, in or out."""


class Process(NamedTuple):
    """An execution flow; ``entry`` and ``terminal`` are positions of nodes."""

    position: int
    process_type: str | None
    step_count: int
    entry: int | None
    terminal: int | None


class Community(NamedTuple):
    """A cluster of nodes; ``members`` counts those that the graph names, ``symbol_count`` is the graph's own figure."""

    position: int
    cohesion: float | None
    symbol_count: int | None
    members: int


class Hotspot(NamedTuple):
    """How many calls a node receives and makes."""

    position: int
    calls_in: int
    calls_out: int


class Sidecar:
    """An open sidecar, for one thread at a time; the file is never written and must not change while it is open."""

    def __init__(self, db: sqlite3.Connection, path: Path, meta: dict[str, str]) -> None:
        self._db = db
        self.path = path
        self.capsule_sha256 = meta["capsule_sha256"]
        """SHA-256 of the capsule that this sidecar belongs to."""
        self.manifest: str | None = meta.get("manifest")
        """The metadata of the capsule's manifest frame, as JSON."""
        self._parts: list[tuple[int, int, int]] = db.execute("SELECT * FROM parts ORDER BY part").fetchall()
        self._types: dict[str, int] = {name: number for number, name in db.execute("SELECT id, name FROM types")}
        self._counts: dict[str, int] | None = None  # all rows are counted once; the file does not change
        self._nodes: tuple[int, int] | None = None
        self._masks: dict[Scope, NDArray[np.bool_]] = {}

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the sidecar at ``path``. Raises CapsuleUnreadable where it is missing, damaged or of another version."""
        if not path.is_file():
            raise CapsuleUnreadable(f"There is no sidecar {path.name}")
        try:
            uri = f"{path.resolve().as_uri()}?immutable=1"
            db = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None, cached_statements=256)
        except sqlite3.Error as error:
            raise CapsuleUnreadable(f"Cannot open the sidecar {path.name}: {error}") from error
        try:
            marks = (db.execute("PRAGMA application_id").fetchone()[0], db.execute("PRAGMA user_version").fetchone()[0])
            if marks != (APPLICATION_ID, USER_VERSION):
                raise CapsuleUnreadable(f"{path.name} is not a sidecar of version {USER_VERSION}")
            meta = dict(db.execute("SELECT key, value FROM meta"))
            if meta.get("schema_version") != SCHEMA_VERSION or "capsule_sha256" not in meta:
                raise CapsuleUnreadable(f"{path.name} is not a sidecar of schema {SCHEMA_VERSION}")
            return cls(db, path, meta)
        except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite's messages quote what is in the file
            db.close()
            raise CapsuleUnreadable(f"The sidecar {path.name} is damaged: {error}") from error
        except CapsuleUnreadable:
            db.close()
            raise

    def check(self) -> None:
        """Look at every row: for a file of which nobody knows the hash. Raises CapsuleUnreadable where tables, types,
        references or positions are not as they are built: queries rely on that."""
        try:
            wrong = self._wrong()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            wrong = str(error)
        if wrong is not None:
            raise CapsuleUnreadable(f"The sidecar {self.path.name} is damaged: {wrong}")

    def _wrong(self) -> str | None:
        """What is not as it is built, if anything."""
        found = self._db.execute(_SCHEMA).fetchall()
        with closing(sqlite3.connect(":memory:")) as built:
            built.executescript(schema())
            if found != built.execute(_SCHEMA).fetchall():
                return "it has other tables"
        state = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if state != "ok":
            return str(state)[:200]
        first = 0
        for part, (number, begin, frames) in enumerate(self._parts):
            if (number, begin) != (part, first) or type(frames) is not int or frames < 0:
                return "its parts do not follow each other"
            first += frames
        for table in ("meta", *_TABLES):
            columns = self._db.execute(f"PRAGMA table_info({table})").fetchall()
            tests = [f"typeof({name}) NOT IN ('{_TYPES[kind]}', 'null')" for _, name, kind, *_ in columns]
            tests += [
                f"({name} NOT NULL AND NOT EXISTS (SELECT 1 FROM {other} WHERE id = {table}.{name}){others})"  # noqa: S608
                for name, other, others in _REFERENCES.get(table, ())
            ]
            if table in ("documents", "nodes", "edges"):
                tests.append(f"id NOT BETWEEN 0 AND {first - 1}")
            elif table == "labels":
                tests.append("kind NOT IN ('node', 'community', 'process')")
            if self._db.execute(f"SELECT 1 FROM {table} WHERE {' OR '.join(tests)} LIMIT 1").fetchone():  # noqa: S608
                return f"a row of {table} is malformed"
        return None

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._db.close()

    def locate(self, position: int) -> tuple[int, int]:
        """The part and the frame id inside it of a position."""
        for part, first, frames in self._parts:
            if first <= position < first + frames:
                return part, position - first
        raise CapsuleUnreadable(f"No part of the capsule holds frame {position}")

    def position(self, part: int, frame_id: int) -> int:
        """The position of a part's frame: the inverse of ``locate``. Raises CapsuleUnreadable."""
        if not 0 <= part < len(self._parts):
            raise CapsuleUnreadable(f"The sidecar {self.path.name} knows no part {part}")
        return self._parts[part][1] + frame_id

    def counts(self) -> dict[str, int]:
        """How many frames, nodes, edges, files, processes and communities there are."""
        if self._counts is None:
            counts = {"frames": sum(frames for _, _, frames in self._parts)}
            for table in ("nodes", "edges", "processes", "communities"):
                counts[table] = self._count(f"SELECT count(*) FROM {table}")  # noqa: S608 - a constant
            counts["files"] = self._count("SELECT count(node) FROM files")
            self._counts = counts
        return dict(self._counts)

    def document(self, uri: str) -> int | None:
        """The position of the frame of the manifest or of a page of the guide."""
        return _first(iter(self._column("SELECT id FROM documents WHERE uri = ?", _storable(uri))))

    def labels(self) -> list[str]:
        """The labels of nodes, in order."""
        return [name for (name,) in self._db.execute("SELECT DISTINCT name FROM labels ORDER BY name")]

    def types(self) -> list[str]:
        """The types of relationships, in order."""
        return sorted(self._types)

    def is_community(self, node_id: str) -> bool:
        """Whether there is a community of that id."""
        row = self._db.execute(
            "SELECT 1 FROM nodes JOIN communities ON communities.id = nodes.id WHERE nodes.key = ? AND node_id = ?",
            (node_key(_storable(node_id)), _storable(node_id)),
        )
        return row.fetchone() is not None

    def has_path(self, prefix: str) -> bool:
        """Whether any node's path starts so."""
        prefix = _storable(prefix)
        rows = self._db.execute("SELECT 1 FROM files WHERE path >= ? AND path < ? LIMIT 1", (prefix, prefix + _LAST))
        return rows.fetchone() is not None

    def stop_when(self, should_stop: Callable[[], bool] | None) -> None:
        """Ask ``should_stop`` now and then while a query runs; one that it ends raises sqlite3.OperationalError."""
        self._db.set_progress_handler(should_stop, 100_000)

    # --- nodes ---

    def node(self, node_id: str) -> Node | None:
        """The node of that id."""
        row = self._db.execute(_NODE + "WHERE nodes.key = ? AND nodes.node_id = ?", (node_key(node_id), node_id))
        return _first(map(Node._make, row))

    def nodes(self, positions: Iterable[int]) -> list[Node]:
        """The nodes at these positions, missing ones too, in their order; positions of other frames are left out."""
        wanted = list(positions)
        found: dict[int, Node] = {}
        for start in range(0, len(wanted), _MAX_VARIABLES):
            some = wanted[start : start + _MAX_VARIABLES]
            rows = self._db.execute(f"{_NODE} WHERE nodes.id IN ({_marks(some)})", some)
            found.update((row[0], Node._make(row)) for row in rows)
            if min(some) < 0:
                absent = self._db.execute(f"SELECT id, node_id FROM missing WHERE id IN ({_marks(some)})", some)  # noqa: S608
                found.update((at, Node(at, name, "missing", "Missing", name, None, None, None)) for at, name in absent)
        return [found[position] for position in wanted if position in found]

    def named(self, name: str, *, limit: int = 100, scope: Scope = Scope()) -> list[int]:  # noqa: B008
        """Positions of nodes of that name, however it is written (see ``normalise_name``), in order; the first
        ``_MAX_NAMED`` of them are looked at for a scope."""
        key = normalise_name(name)
        if not key:
            return []
        query = "SELECT node FROM symbols WHERE name = ? ORDER BY node LIMIT ?"
        if scope == Scope():
            return self._column(query, key, limit)
        found = np.array(self._column(query, key, _MAX_NAMED), dtype=np.int64)
        return [*map(int, found[self.inside(scope)[found]][:limit])]

    def spelled(self, name: str) -> list[tuple[int, str, str]]:
        """(position, name, label) of all nodes of that name, however it is written, in order."""
        key = normalise_name(name)
        if not key:
            return []
        return self._db.execute(
            "SELECT nodes.id, nodes.name, labels.name FROM symbols JOIN nodes ON nodes.id = symbols.node"
            " JOIN labels ON labels.id = nodes.label WHERE symbols.name = ? ORDER BY symbols.node",
            (_storable(key),),
        ).fetchall()

    def beginning(self, name: str, *, limit: int) -> list[tuple[int, int, str]]:
        """(position, characters of the name, label) of nodes whose name starts so: the shortest ``limit`` of the first
        1,000 in the order of the alphabet, in no certain order."""
        key = _storable(normalise_name(name))
        if not key:
            return []
        return self._db.execute(
            "SELECT nodes.id, length(nodes.name), labels.name FROM"
            " (SELECT node FROM (SELECT name, node FROM symbols WHERE name > ? AND name < ? ORDER BY name, node"
            " LIMIT 1000) ORDER BY length(name), node LIMIT ?) AS some"
            " JOIN nodes ON nodes.id = some.node JOIN labels ON labels.id = nodes.label",
            (key, key + _LAST, limit),
        ).fetchall()

    def labels_at(self, positions: Sequence[int]) -> dict[int, str]:
        """The labels of the nodes at these positions, at most 500."""
        query = "SELECT nodes.id, labels.name FROM nodes JOIN labels ON labels.id = nodes.label WHERE nodes.id IN"
        return dict(self._db.execute(f"{query} ({_marks(positions)})", positions).fetchall())

    def in_file(self, path: str) -> list[Node]:
        """The nodes of a file by line, then by id; empty for an unknown path."""
        condition = "WHERE nodes.file = (SELECT id FROM files WHERE path = ?) ORDER BY nodes.start_line, nodes.id"
        rows = self._db.execute(f"{_NODE} {condition}", (path,))
        return list(map(Node._make, rows))

    def match(self, words: Sequence[str], *, limit: int, scope: Scope = Scope()) -> list[tuple[int, float]]:  # noqa: B008
        """Nodes that hold any of the words, as (position, BM25F score), best first, equal ones by id.

        ``words`` are plain words (as ``split_identifier`` gives them); other forms of them count as well.
        """
        found = self.word_scores(words, scope=scope)
        rows = best_rows(found, limit)
        return list(zip(rows.tolist(), found[rows].tolist(), strict=True))

    def word_scores(self, words: Sequence[str], *, scope: Scope = Scope()) -> NDArray[np.float32]:  # noqa: B008
        """The BM25F score of every position up to the last node's; 0 where there is none of the words, or no scope."""
        stems = [_storable(word) for word in dict.fromkeys(map(stem, words))][:_MAX_VARIABLES]
        rows = self._db.execute(
            f"SELECT word, nodes, postings FROM words WHERE word IN ({_marks(stems)}) ORDER BY word",  # noqa: S608
            stems,
        )
        with _packed_well():
            found = scores(rows, *self._extent())
        if scope != Scope():
            found[~self.inside(scope)] = 0
        return found

    def inside(self, scope: Scope) -> NDArray[np.bool_]:
        """For every position up to the last node's whether the scope has it."""
        mask = self._masks.get(scope)
        if mask is None:
            mask = np.ones(self._extent()[1], dtype=np.bool_)
            with _packed_well():
                for positions in self._filters(scope):
                    one = np.zeros(len(mask), dtype=np.bool_)
                    one[positions] = True
                    mask &= one
            if len(self._masks) >= _MAX_MASKS:
                self._masks.clear()
            self._masks[scope] = mask
        return mask

    def _filters(self, scope: Scope) -> Iterator[NDArray[np.uint32]]:
        """The positions that each filter of a scope lets pass."""
        for table, names in (("labels", scope.labels), ("types", scope.types)):
            if names:
                yield self._packed(f"SELECT nodes FROM {table} WHERE name IN ({_marks(names)})", *names)  # noqa: S608
        if scope.file_prefix is not None:
            prefix = scope.file_prefix
            yield self._packed("SELECT nodes FROM files WHERE path >= ? AND path < ?", prefix, prefix + _LAST)
        if scope.community is not None:
            node_id = _storable(scope.community)
            query = (
                "SELECT members.node FROM nodes JOIN members ON members.community = nodes.id"
                " WHERE nodes.key = ? AND nodes.node_id = ? AND members.node >= 0"  # some may be missing
            )
            yield np.array(self._column(query, node_key(node_id), node_id), dtype=np.uint32)

    def _packed(self, query: str, *parameters: str) -> NDArray[np.uint32]:
        rows = self._db.execute(query, [_storable(text) for text in parameters])
        return np.frombuffer(b"".join(blob for (blob,) in rows), dtype="<u4")

    def _extent(self) -> tuple[int, int]:
        """How many nodes there are, and the position after the last one."""
        if self._nodes is None:
            self._nodes = self._db.execute("SELECT count(*), ifnull(max(id), -1) + 1 FROM nodes").fetchone()
        return self._nodes

    def of_nodes(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which positions of frames are those of nodes, not of relationships: nodes come first."""
        return positions < self._extent()[1]

    # --- edges ---

    def edge(self, edge_id: str) -> Edge | None:
        """The relationship of that id."""
        rows = self._db.execute(_EDGE + "WHERE edges.edge_id = ?", (edge_id,))
        found = _first(map(Edge._make, rows))
        if found is not None:
            return found
        for type_name, number in self._types.items():
            joint = derived_id("", type_name, "")
            at = edge_id.find(joint)
            while at >= 0:
                source, target = self._end(edge_id[:at]), self._end(edge_id[at + len(joint) :])
                if source is not None and target is not None:
                    rows = self._db.execute(
                        _EDGE + "WHERE edges.source = ? AND edges.type = ? AND edges.target = ? AND edge_id IS NULL",
                        (source, number, target),
                    )
                    found = _first(map(Edge._make, rows))
                    if found is not None:
                        return found
                at = edge_id.find(joint, at + 1)
        return None

    def edges(
        self, position: int, direction: Direction, types: Sequence[str] = (), *, limit: int = -1, offset: int = 0
    ) -> list[tuple[Direction, Edge]]:
        """The relationships of a node, ``out`` before ``in``, each in order of type, other end and own id.

        A relationship from a node to itself comes once for each direction.
        """
        chosen = [self._types[name] for name in types if name in self._types]
        if types and not chosen:
            return []
        condition = f" AND type IN ({_marks(chosen)})" if chosen else ""
        found: list[tuple[Direction, Edge]] = []
        sides: tuple[tuple[Direction, str, str], ...] = (("out", "source", "target"), ("in", "target", "source"))
        for side, here, there in sides:
            if direction not in (side, "both"):
                continue
            # An index has this order, so no more rows than these are looked at.
            query = f"{_EDGE} WHERE {here} = ?{condition} ORDER BY edges.type, {there}, edges.id LIMIT ? OFFSET ?"
            rows = self._db.execute(query, (position, *chosen, limit, offset)).fetchall()
            found += [(side, Edge._make(row)) for row in rows]
            if limit >= 0:
                limit -= len(rows)
                if limit == 0:
                    break
            if offset and direction == "both" and side == "out":
                there_are = self._count(f"SELECT count(*) FROM edges WHERE {here} = ?{condition}", position, *chosen)  # noqa: S608
                offset = max(0, offset - there_are)
        return found

    def joined(
        self, position: int, direction: Literal["in", "out"], type_name: str, *, limit: int, offset: int
    ) -> list[tuple[Node, float]]:
        """The distinct other ends of a node's relationships of a type, in order, with the highest confidence."""
        number = self._types.get(type_name)
        if number is None:
            return []
        here, there = ("target", "source") if direction == "in" else ("source", "target")
        rows = self._db.execute(
            f"SELECT {there}, max(evidence.confidence) FROM edges JOIN evidence ON evidence.id = edges.evidence"  # noqa: S608
            f" WHERE {here} = ? AND type = ? GROUP BY {there} ORDER BY {there} LIMIT ? OFFSET ?",
            (position, number, limit, offset),
        )
        surest: dict[int, float] = dict(rows.fetchall())
        return [(node, surest[node.position]) for node in self.nodes(surest)]

    def incoming(self, positions: Sequence[int], types: Sequence[str]) -> list[tuple[int, int]]:
        """(source, target) of every relationship of these types that leads to one of the nodes, in order."""
        chosen = [self._types[name] for name in types if name in self._types]
        found: list[tuple[int, int]] = []
        for start in range(0, len(positions), _MAX_VARIABLES):
            some = positions[start : start + _MAX_VARIABLES]
            condition = f"target IN ({_marks(some)}) AND type IN ({_marks(chosen)})"
            found += self._db.execute(f"SELECT source, target FROM edges WHERE {condition}", (*some, *chosen))  # noqa: S608
        return sorted(found)

    def linked(self, position: int, types: Sequence[str], *, at_most: int) -> list[int]:
        """Positions of the nodes with a relationship of these types to or from the node; in a direction with more than
        ``at_most`` relationships, none.
        """
        chosen = [self._types[name] for name in types if name in self._types]
        found: dict[int, None] = {}
        for here, there in (("source", "target"), ("target", "source")):
            ends = self._column(
                f"SELECT {there} FROM edges WHERE {here} = ? AND type IN ({_marks(chosen)}) LIMIT ?",  # noqa: S608
                position,
                *chosen,
                at_most + 1,
            )
            if len(ends) <= at_most:
                found.update(dict.fromkeys(sorted(ends)))
        return list(found)

    def degree(self, position: int) -> tuple[int, int]:
        """How many relationships come in and go out."""
        return (
            self._count("SELECT count(*) FROM edges WHERE target = ?", position),
            self._count("SELECT count(*) FROM edges WHERE source = ?", position),
        )

    def sources(self, position: int, type_name: str) -> list[int]:
        """Positions of the distinct nodes with a relationship of that type to the node, in order."""
        return self._ends(
            "SELECT DISTINCT source FROM edges WHERE target = ? AND type = ? ORDER BY 1", position, type_name
        )

    def targets(self, position: int, type_name: str) -> list[int]:
        """Positions of the distinct nodes to which the node has a relationship of that type, in order."""
        return self._ends(
            "SELECT DISTINCT target FROM edges WHERE source = ? AND type = ? ORDER BY 1", position, type_name
        )

    # --- summaries ---

    def processes(self, *, limit: int = -1, offset: int = 0) -> list[Process]:
        """Processes, longest first, then by id."""
        rows = self._db.execute(
            "SELECT id, process_type, step_count, entry, terminal FROM processes"
            " ORDER BY step_count DESC, id LIMIT ? OFFSET ?",
            (limit, offset),
        )
        return list(map(Process._make, rows))

    def process(self, position: int) -> Process | None:
        """The process at a position."""
        rows = self._db.execute(
            "SELECT id, process_type, step_count, entry, terminal FROM processes WHERE id = ?", (position,)
        )
        return _first(map(Process._make, rows))

    def steps(self, process: int) -> list[tuple[int, int]]:
        """(step, position) of a process, in order of the steps."""
        return self._db.execute(
            "SELECT step, node FROM process_steps WHERE process = ? ORDER BY step, node", (process,)
        ).fetchall()

    def communities(self, *, limit: int = -1, offset: int = 0) -> list[Community]:
        """Communities, largest first, then by id."""
        rows = self._db.execute(
            "SELECT id, cohesion, symbol_count, members FROM communities ORDER BY members DESC, id LIMIT ? OFFSET ?",
            (limit, offset),
        )
        return list(map(Community._make, rows))

    def members(self, community: int) -> list[int]:
        """Positions of a community's members, in order."""
        return self._column("SELECT node FROM members WHERE community = ? ORDER BY node", community)

    def hotspots(self, *, limit: int) -> list[Hotspot]:
        """The nodes with the most calls in and out together, busiest first."""
        rows = self._db.execute("SELECT node, calls_in, calls_out FROM hotspots ORDER BY rank LIMIT ?", (limit,))
        return list(map(Hotspot._make, rows))

    def calls(self, positions: Sequence[int]) -> list[Hotspot]:
        """Calls in and out of those nodes that take part in any, busiest first."""
        found: list[tuple[int, int, int, int]] = []
        for start in range(0, len(positions), _MAX_VARIABLES):
            some = positions[start : start + _MAX_VARIABLES]
            found += self._db.execute(
                f"SELECT rank, node, calls_in, calls_out FROM hotspots WHERE node IN ({_marks(some)})",  # noqa: S608
                some,
            )
        return [Hotspot._make(row[1:]) for row in sorted(found)]

    def content_digest(self) -> str:
        """SHA-256 over every table in order, without the hash of the capsule: equal for equal frames."""
        digest = hashlib.sha256()
        for piece in self._content():
            digest.update(piece)
        return digest.hexdigest()

    def _content(self) -> Iterator[bytes]:
        yield _encode([SCHEMA_VERSION, self.manifest])
        for table, order in _TABLES.items():
            yield from self._rows(table, f"SELECT * FROM {table} ORDER BY {order}")  # noqa: S608 - constants

    def _rows(self, table: str, query: str) -> Iterator[bytes]:
        yield _encode(table)
        with closing(self._db.execute(query)) as rows:
            while some := rows.fetchmany(_DIGEST_ROWS):
                yield _encode(some)

    def _end(self, node_id: str) -> int | None:
        key = node_key(node_id)
        rows = self._column(
            "SELECT id FROM nodes WHERE key = ? AND node_id = ? UNION ALL SELECT id FROM missing WHERE node_id = ?",
            key,
            node_id,
            node_id,
        )
        return rows[0] if rows else None

    def _ends(self, query: str, position: int, type_name: str) -> list[int]:
        number = self._types.get(type_name)
        return [] if number is None else self._column(query, position, number)

    def _column(self, query: str, *parameters: object) -> list[int]:
        return [row[0] for row in self._db.execute(query, parameters)]

    def _count(self, query: str, *parameters: object) -> int:
        count: int = self._db.execute(query, parameters).fetchone()[0]
        return count


@contextmanager
def _packed_well() -> Iterator[None]:
    """Make of arrays that were packed otherwise what SQLite makes of a damaged page."""
    try:
        yield
    except (TypeError, ValueError, IndexError) as error:
        raise sqlite3.DatabaseError(f"positions of nodes are malformed: {error}") from error


def _storable(text: str) -> str:
    """A text that SQLite takes: a lone surrogate, which no stored text has, becomes ``?``."""
    return text.encode("utf-8", "replace").decode()


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))


def _first(values: Iterator[_T]) -> _T | None:
    return next(values, None)
