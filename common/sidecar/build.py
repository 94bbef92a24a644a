"""Builds the sidecar from frames, beside a capsule writer."""

from __future__ import annotations

import os
import re
import sqlite3
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import msgspec
import numpy as np

from common.contract import MALFORMED
from common.errors import CapsuleUnreadable, StorageFailed
from common.frames.build import CONTAINMENT
from common.frames.model import Frame
from common.sidecar.words import WordIndex
from common.text import split_identifier

SCHEMA_VERSION = "gitnexus.index.v1"
APPLICATION_ID = 0x4D563249
"""``MV2I``: marks an SQLite file as a sidecar."""
USER_VERSION = 2

_SCHEMA = Path(__file__).with_name("schema.sql")
_INDEXES = Path(__file__).with_name("indexes.sql")


def schema() -> str:
    """The SQL of all tables and indexes."""
    return _SCHEMA.read_text("utf-8") + _INDEXES.read_text("utf-8")


_BULK = f"""
PRAGMA page_size = 4096;
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA temp_store = MEMORY;
PRAGMA cache_size = -65536;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {USER_VERSION};
"""
"""No journal: a build that breaks off is thrown away, never repaired."""

_FLUSH_FRAMES = 2000
_MANIFEST = "mv2://meta/manifest"

MAX_NEIGHBOURS = 24
"""Neighbour names of a kind indexed of one node."""
MAX_SIGNATURE_CHARS = 300
MAX_KEYWORDS = 20

_T = TypeVar("_T")
_SNIPPET = "\nsnippet:\n"
_METADATA = "\nmetadata="
_DECLARATION = re.compile(r"[ \t]*(?:@|#|//|/\*|\*)")
"""Lines before a declaration: decorators and comments."""


class _NodeMetadata(msgspec.Struct, rename="camel"):
    """What the sidecar takes from a node; a graph may give any type, so each value is checked where it is used."""

    id: str
    label: str
    name: str
    file_path: Any = None
    start_line: Any = None
    end_line: Any = None
    process_type: Any = None
    entry_point_id: Any = None
    terminal_id: Any = None
    cohesion: Any = None
    symbol_count: Any = None
    keywords: Any = None
    description: Any = None


class _RelationMetadata(msgspec.Struct, rename="camel"):
    id: str
    source_id: str
    target_id: str
    type: str
    confidence: float = 1.0
    reason: str | None = None
    step: int | None = None


def normalise_name(name: str) -> str:
    """The key of the symbol table: the words of a name joined, so that ways to write it meet; never empty for a name.

    ``getUserById``, ``get_user_by_id`` and ``GET_USER_BY_ID`` give ``getuserbyid``; ``__`` gives ``__``.
    """
    return split_identifier(name).replace(" ", "") or name.lower()


def derived_id(source_id: str, type_: str, target_id: str) -> str:
    """The id that GitNexus gives most relationships; such a one is not written down."""
    return f"{source_id}_{type_}_{target_id}"


def node_key(node_id: str) -> int:
    """The indexed key of a node's id: its CRC-32; a reader compares the id too."""
    return crc32(node_id.encode())


def snippet_of(text: str) -> str:
    """The snippet in a node frame's text, without the line end that closes it; empty where there is none."""
    start = text.find(_SNIPPET)
    end = text.rfind(_METADATA)
    return "" if start < 0 else text[start + len(_SNIPPET) : end if end > start else len(text)]


class SidecarBuilder:
    """Writes one sidecar; calls come from one thread at a time.

    SQLite leaves the interpreter free while it works, so a builder in a thread of its own costs the capsule writer
    little. Equal frames and an equal capsule hash give equal bytes, however the frames are cut into batches.
    """

    def __init__(self, path: Path) -> None:
        """Create the file at ``path``; a file that is there is replaced. Raises StorageFailed."""
        self.path = path
        path.unlink(missing_ok=True)
        self._labels: _Numbers[tuple[str, str]] = _Numbers()
        self._types: _Numbers[str] = _Numbers()
        self._files: _Numbers[str] = _Numbers()
        self._file_nodes: dict[str, int] = {}
        self._labelled: dict[int, array[int]] = defaultdict(_positions)
        self._in_files: dict[int, array[int]] = defaultdict(_positions)
        self._joined: dict[int, array[int]] = defaultdict(_positions)
        self._evidence: _Numbers[tuple[float, str | None]] = _Numbers()
        self._nodes: dict[str, int] = {}
        self._documents: list[tuple[int, str, str]] = []
        self._node_rows: list[tuple[object, ...]] = []
        self._symbol_rows: list[tuple[str, int]] = []
        self._edge_rows: list[tuple[object, ...]] = []
        self._missing: _Numbers[str] = _Numbers()
        self._index = WordIndex()
        self._names: dict[int, tuple[int, ...]] = {}
        self._processes: dict[int, tuple[str | None, str | None, str | None]] = {}
        self._communities: dict[int, tuple[float | None, int | None]] = {}
        self._steps: list[tuple[int, int, int]] = []
        self._members: list[tuple[int, int]] = []
        self._calls: list[tuple[int, int]] = []
        self._contained: list[tuple[int, int]] = []
        self._meta: dict[str, str] = {}
        self._parts: dict[int, list[int]] = {}
        self._position = 0
        self._completed = False
        try:
            # The thread that builds may be another than the one that opens; only one of them works at a time.
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                self._db.executescript(_BULK + _SCHEMA.read_text("utf-8"))
                self._db.execute("BEGIN")
            except sqlite3.Error:
                self.abort()
                raise
        except sqlite3.Error as error:
            raise StorageFailed(f"Cannot start the sidecar {path.name}: {error}") from error

    def add(self, frames: Sequence[Frame], first_frame_id: int, part: int) -> None:
        """Add frames that follow those of the last call; ``first_frame_id`` is the first one's id inside ``part``.

        Node frames come before the relation frames that join them. Raises StorageFailed, CapsuleUnreadable.
        """
        known = self._parts.setdefault(part, [self._position, 0])
        if known[1] != first_frame_id:
            raise ValueError(f"part {part} goes on at frame {known[1]}, not at {first_frame_id}")
        known[1] += len(frames)
        try:
            for position, frame in enumerate(frames, self._position):
                if frame.kind == "relation":
                    self._relation(position, frame)
                elif frame.kind == "meta":
                    self._documents.append((position, frame.uri, frame.title))
                    if frame.uri == _MANIFEST:
                        self._meta["manifest"] = frame.metadata
                else:
                    self._node(position, frame)
                # At fixed places, not at the end of a batch: where a row lies in the file depends on when it comes.
                if position % _FLUSH_FRAMES == _FLUSH_FRAMES - 1:
                    self._flush()
        except MALFORMED as error:
            raise CapsuleUnreadable(f"Frame {position} has no readable metadata: {error}") from error
        self._position += len(frames)

    def complete(self) -> None:
        """Say that all frames are in: full text, summaries and indexes are built now, while the capsule is sealed.

        Idempotent; ``finish`` calls it where nobody has. Raises StorageFailed.
        """
        if self._completed:
            return
        self._completed = True
        self._flush()
        self._insert("parts", [(part, first, frames) for part, (first, frames) in sorted(self._parts.items())])
        self._insert("labels", [(n, *label, _packed(self._labelled[n])) for label, n in self._labels.items()])
        self._insert("types", [(n, name, _packed(self._joined[n])) for name, n in self._types.items()])
        self._insert(
            "files",
            [(n, path, self._file_nodes.get(path), _packed(self._in_files[n])) for path, n in self._files.items()],
        )
        self._insert("missing", [(-number, node_id) for node_id, number in reversed(self._missing.items())])
        self._insert("evidence", [(number, *evidence) for evidence, number in self._evidence.items()])
        self._insert("process_steps", sorted(set(self._steps)))
        self._insert("members", sorted(set(self._members)))
        self._insert_processes()
        self._insert_communities()
        self._insert_hotspots()
        self._insert_words()
        self._execute_script(_INDEXES.read_text("utf-8"))

    def finish(self, capsule_sha256: str) -> None:
        """Seal and fsync the file, which then belongs to the capsule of that hash. Raises StorageFailed."""
        self.complete()
        self._meta["schema_version"] = SCHEMA_VERSION
        self._meta["capsule_sha256"] = capsule_sha256
        self._insert("meta", sorted(self._meta.items()))
        try:
            self._db.execute("COMMIT")
            self._db.close()
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except (sqlite3.Error, OSError) as error:
            raise StorageFailed(f"Cannot finish the sidecar {self.path.name}: {error}") from error

    def abort(self) -> None:
        """Remove the file. Idempotent; also right after ``finish``."""
        self._db.close()
        self.path.unlink(missing_ok=True)

    def _node(self, position: int, frame: Frame) -> None:
        node = _decode_node(frame.metadata)
        self._nodes[node.id] = position
        path = node.file_path if type(node.file_path) is str else ""
        label = self._labels[node.label, frame.kind]
        self._labelled[label].append(position)
        file = self._files[path] if path else None
        if file is not None:
            self._in_files[file].append(position)
        self._node_rows.append(
            (
                position,
                node_key(node.id),
                node.id,
                node.name,
                label,
                file,
                _integer(node.start_line),
                _integer(node.end_line),
            )
        )
        name = split_identifier(node.name)
        self._symbol_rows.append((name.replace(" ", "") or node.name.lower(), position))
        if node.label == "File" and path:
            self._file_nodes.setdefault(path, position)
        if frame.kind == "process":
            self._processes[position] = (_text(node.process_type), _text(node.entry_point_id), _text(node.terminal_id))
        elif frame.kind == "community":
            cohesion = float(node.cohesion) if type(node.cohesion) in (int, float) else None
            self._communities[position] = (cohesion, _integer(node.symbol_count))
        body = snippet_of(frame.text)
        self._names[position] = self._index.split(node.name)
        self._index.add(position, "name", self._names[position])
        self._index.add_text(position, "path", path)
        if node.start_line is not None:
            self._index.add_text(position, "signature", _signature(body))
        if node.keywords or node.description:
            body = f"{_told(node)}\n{body}"
        self._index.add_text(position, "body", body)

    def _relation(self, position: int, frame: Frame) -> None:
        relation = _decode_relation(frame.metadata)
        source = self._end(relation.source_id)
        target = self._end(relation.target_id)
        kind = relation.type
        derived = relation.id == derived_id(relation.source_id, kind, relation.target_id)
        evidence = self._evidence[relation.confidence, relation.reason]
        number = self._types[kind]
        self._joined[number].extend(end for end in (source, target) if end >= 0)
        self._edge_rows.append(
            (
                position,
                source,
                target,
                number,
                evidence,
                relation.step or None,
                None if derived else relation.id,
            )
        )
        if kind == "CALLS":
            self._calls.append((source, target))
        elif kind == "MEMBER_OF" and target in self._communities:
            self._members.append((target, source))
        elif kind == "STEP_IN_PROCESS" and target in self._processes:
            self._steps.append((target, relation.step or 0, source))
        elif kind in CONTAINMENT:
            self._contained.append((source, target))

    def _flush(self) -> None:
        for table, rows in (
            ("documents", self._documents),
            ("nodes", self._node_rows),
            ("symbols", self._symbol_rows),
            ("edges", self._edge_rows),
        ):
            self._insert(table, rows)
            rows.clear()

    def _end(self, node_id: str) -> int:
        position = self._nodes.get(node_id)
        return -self._missing[node_id] if position is None else position

    def _insert_processes(self) -> None:
        steps: dict[int, int] = defaultdict(int)
        for process, _, _ in set(self._steps):
            steps[process] += 1
        self._insert(
            "processes",
            [
                (process, process_type, steps[process], self._nodes.get(entry or ""), self._nodes.get(terminal or ""))
                for process, (process_type, entry, terminal) in sorted(self._processes.items())
            ],
        )

    def _insert_communities(self) -> None:
        members: dict[int, int] = defaultdict(int)
        for community, _ in set(self._members):
            members[community] += 1
        self._insert(
            "communities",
            [
                (community, cohesion, symbol_count, members[community])
                for community, (cohesion, symbol_count) in sorted(self._communities.items())
            ],
        )

    def _insert_hotspots(self) -> None:
        calls: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for source, target in self._calls:
            calls[source][1] += 1
            calls[target][0] += 1
        busiest = sorted(calls.items(), key=lambda item: (-item[1][0] - item[1][1], -item[1][0], item[0]))
        self._insert("hotspots", [(rank, node, *counts) for rank, (node, counts) in enumerate(busiest, 1)])

    def _insert_words(self) -> None:
        """Build the full text; a node is found by the names of what it belongs to, calls and is called by, too."""
        names = self._names
        files = set(self._file_nodes.values())  # their names stand in the path
        joins: dict[str, Iterable[tuple[int, int]]] = {
            "container": ((child, parent) for parent, child in self._contained if parent not in files),
            "callers": ((callee, caller) for caller, callee in self._calls),
            "callees": self._calls,
            "processes": ((node, process) for process, _, node in sorted(self._steps)),
        }
        for field, pairs in joins.items():
            found: dict[int, dict[tuple[int, ...], None]] = defaultdict(dict)
            for node, neighbour in pairs:
                near = found[node]
                if len(near) < MAX_NEIGHBOURS and node in names and neighbour in names:
                    near[names[neighbour]] = None
            for node, near in sorted(found.items()):
                self._index.add(node, field, chain.from_iterable(near))
        names.clear()
        self._insert("words", list(self._index.rows()))

    def _insert(self, table: str, rows: Sequence[Sequence[object]]) -> None:
        if not rows:
            return
        try:
            marks = ",".join("?" * len(rows[0]))
            self._db.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)  # noqa: S608 - table is a constant
        except sqlite3.Error as error:
            raise StorageFailed(f"Cannot write the sidecar {self.path.name}: {error}") from error

    def _execute_script(self, script: str) -> None:
        try:
            for statement in script.split(";"):
                self._db.execute(statement)
        except sqlite3.Error as error:
            raise StorageFailed(f"Cannot write the sidecar {self.path.name}: {error}") from error


_decode_node = msgspec.json.Decoder(_NodeMetadata).decode
_decode_relation = msgspec.json.Decoder(_RelationMetadata).decode


def _integer(value: object) -> int | None:
    return value if type(value) is int and abs(value) < 1 << 63 else None


def _text(value: object) -> str | None:
    return value if type(value) is str else None


def _told(node: _NodeMetadata) -> str:
    """What the graph says about a node in words: its description and keywords."""
    keywords = node.keywords if type(node.keywords) is list else []
    words = [word for word in (node.description, *keywords[:MAX_KEYWORDS]) if type(word) is str]
    return "\n".join(words)


def _signature(body: str) -> str:
    """The first lines of a symbol up to the end of its declaration: a line that ends it by ``:``, ``{`` or ``;``."""
    taken: list[str] = []
    size = 0
    for line in islice(body.split("\n"), 12):
        if not taken and (not line.strip() or _DECLARATION.match(line)):
            continue
        taken.append(line)
        size += len(line)
        if size >= MAX_SIGNATURE_CHARS or line.rstrip().endswith((":", "{", ";")):
            break
    return " ".join(taken)[:MAX_SIGNATURE_CHARS]


def _positions() -> array[int]:
    return array("I")


def _packed(positions: array[int]) -> bytes:
    """Distinct positions in order, each as four bytes, little-endian."""
    return np.unique(np.asarray(positions)).astype("<u4").tobytes()


class _Numbers(dict[_T, int]):
    """Numbers values from 1 in the order in which they come."""

    def __missing__(self, value: _T) -> int:
        number = self[value] = len(self) + 1
        return number
