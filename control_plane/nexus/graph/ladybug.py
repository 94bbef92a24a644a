"""The graph in a file of this machine, by LadybugDB: nothing to install, nothing to run.

What was measured of version 0.22, and decides what is written here:

- ``MERGE`` of nodes, ``IN`` of a list of keys, and ``UNWIND`` before an edge pattern read a whole table. A match by
  primary key does not, alone or after ``UNWIND``: a change first reads what is there, and then makes, sets and deletes.
- ``COPY`` into a table of edges that has rows ends the process.
- A connection keeps every plan that it made, and a plan keeps memory: each call has a connection of its own.
- What a statement needed of memory is kept for other statements, and for nothing else: none has many rows.
- What changed is kept in memory until a checkpoint, one document of which anything is set with all around it.
- A commit that the disk refused leaves a piece of itself in the log. What is committed after it is not found again, or
  never ends: the file must be opened anew, which cuts the log.
- A log that ends in the middle of a record may end the process that opens it, but not where zeros follow.
- Closing a database that cannot write its log ends the process.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import ladybug

from control_plane.nexus.graph.port import Change, DocumentNode, GraphRefused, GraphUnavailable, Held

BUFFER_POOL = 256 << 20
"""Bytes of memory that the database may use, of pages and of a change that is not written yet."""
LARGEST_FILE = 1 << 36
"""Bytes that the file may grow to; of the address space so much is set aside. A power of 2."""
THREADS = 2
"""Threads of the database, besides those of whoever calls."""
STATEMENT_ROWS, STATEMENT_CHARACTERS = 2_000, 2 << 20
"""Of one statement, where it has more than one row."""
LOG_BYTES = 16 << 20
"""A checkpoint comes before the next change once the log is larger."""
LOG_PADDING = 64 << 20
"""Zeros that a log gets before it is read, which take no room."""
CHANGE_BYTES, NEW_BYTES, OLD_BYTES, EDGE_BYTES, CHARACTER_BYTES = 20 << 10, 2 << 10, 84 << 10, 1 << 10, 4
"""Memory that is kept for a change until a checkpoint, at most: for itself, for a node that it makes, for one that it
sets or removes, for an edge, and for a character of a text."""
ROOM = 1 << 20
"""Bytes."""
READ_AT_ONCE = 100
"""Documents that are read in one transaction; a checkpoint waits until there is none."""

_Row = TypeVar("_Row")
_Run = Callable[..., list[list[Any]]]
"""Run a statement with its parameters, and answer its rows."""

_TABLES = {
    "Document": "NODE TABLE {}(id INT64 PRIMARY KEY, vector_id STRING, client STRING, collection STRING, title STRING, "
    "domain STRING, doc_type STRING, created_at INT64, version INT64)",
    "Entity": "NODE TABLE {}(id STRING PRIMARY KEY)",
    "SIMILAR_TO": "REL TABLE {}(FROM Document TO Document, score DOUBLE)",
    "MENTIONS": "REL TABLE {}(FROM Document TO Entity)",
}
_LOG, _FROZEN_LOG = ".wal", ".wal.checkpoint"
_BESIDE = (_LOG, _FROZEN_LOG, ".shadow", ".tmp", ".checkpoint.intent.lock", ".checkpoint.apply.lock")
"""What the database writes beside its file."""
_PROPERTIES = DocumentNode._fields[1:]
_READ_DOCUMENTS = (
    f"UNWIND $ids AS i MATCH (d:Document {{id: i}}) RETURN d.id, {', '.join(f'd.{p}' for p in _PROPERTIES)}"
)
_MAKE_DOCUMENTS = (
    f"UNWIND $rows AS r CREATE (:Document {{id: r.id, {', '.join(f'{p}: r.{p}' for p in _PROPERTIES)}}}) "
    "RETURN count(*)"
)
_SET_DOCUMENTS = "UNWIND $rows AS r MATCH (d:Document {{id: r.id}}) SET {} RETURN count(*)"
_MAKE_BARE = "UNWIND $rows AS i CREATE (:Document {id: i}) RETURN count(*)"
_MAKE_ENTITIES = "UNWIND $rows AS i CREATE (:Entity {id: i}) RETURN count(*)"
_READ_ENTITIES = "UNWIND $ids AS i MATCH (e:Entity {id: i}) RETURN e.id"
_MAKE_SIMILAR = (
    "UNWIND $rows AS r MATCH (a:Document {id: r.a}) WITH a, r MATCH (b:Document {id: r.b}) "
    "CREATE (a)-[:SIMILAR_TO {score: r.score}]->(b) RETURN count(*)"
)
_MAKE_MENTIONS = (
    "UNWIND $rows AS r MATCH (d:Document {id: r.document}) WITH d, r MATCH (e:Entity {id: r.entity}) "
    "CREATE (d)-[:MENTIONS]->(e) RETURN count(*)"
)
_READ_SIMILAR = "MATCH (a:Document {id: $id})-[s:SIMILAR_TO]-(b:Document) RETURN b.id, s.score, offset(id(s))"
_READ_MENTIONS = "MATCH (d:Document {id: $id})-[m:MENTIONS]->(e:Entity) RETURN e.id, offset(id(m))"
_END_SIMILAR_ABOVE = "MATCH (a:Document {id: $id})-[s:SIMILAR_TO]->(b:Document) WHERE offset(id(s)) IN $edges DELETE s"
_END_SIMILAR_BELOW = "MATCH (a:Document {id: $id})<-[s:SIMILAR_TO]-(b:Document) WHERE offset(id(s)) IN $edges DELETE s"
_END_MENTIONS = "MATCH (d:Document {id: $id})-[m:MENTIONS]->(e:Entity) WHERE offset(id(m)) IN $edges DELETE m"
_END_DOCUMENT = "MATCH (d:Document {id: $id}) DETACH DELETE d"
_END_ENTITY = "MATCH (e:Entity {id: $id}) DETACH DELETE e"


_MEMORY_FULL = "The buffer pool is full"


class _MemoryFull(GraphUnavailable):
    """The database has all the memory that it may use, and needs more."""


class _Outcome(NamedTuple):
    """What is to be once a change is made: what it takes away is in nothing that it makes."""

    documents: dict[int, DocumentNode]
    there: set[int]
    """Documents, those that are bare too."""
    entities: set[str]
    similar: dict[tuple[int, int], float]
    mentions: dict[int, set[str]]
    dissimilar: set[tuple[int, int]]
    unmentioned: dict[int, set[str]]
    removed: set[int]
    forgotten: set[str]

    def memory(self, held: Mapping[int, DocumentNode | None]) -> int:
        """Bytes, at most, that it takes where these documents are there."""
        old = sum(i in held and held[i] != node for i, node in self.documents.items()) + len(self.removed)
        new = len(self.there) + len(self.entities)
        edges = len(self.similar) + len(self.dissimilar) + _size(self.mentions) + _size(self.unmentioned)
        characters = sum(map(_characters, self.documents.values())) + sum(map(len, self.entities))
        return CHANGE_BYTES + new * NEW_BYTES + old * OLD_BYTES + edges * EDGE_BYTES + characters * CHARACTER_BYTES

    @classmethod
    def of(cls, change: Change) -> _Outcome:
        removed, forgotten = set(change.removed), set(change.forgotten)
        dissimilar = {(a, b) for a, b in change.dissimilar}
        unmentioned = set(change.unmentioned)
        documents = {node.id: node for node in change.documents}
        ends = {end for pair in change.similar for end in (pair.a, pair.b)}
        mentions, gone = defaultdict[int, set[str]](set), defaultdict[int, set[str]](set)
        for mention in change.mentions:
            if mention not in unmentioned and mention.document not in removed and mention.entity not in forgotten:
                mentions[mention.document].add(mention.entity)
        for document, entity in unmentioned:
            if document not in removed and entity not in forgotten:
                gone[document].add(entity)
        return cls(
            {i: node for i, node in documents.items() if i not in removed},
            (documents.keys() | ends | {mention.document for mention in change.mentions}) - removed,
            {mention.entity for mention in change.mentions} - forgotten,
            {
                (a, b): score
                for a, b, score in change.similar
                if (a, b) not in dissimilar and a not in removed and b not in removed
            },
            mentions,
            {(a, b) for a, b in dissimilar if a not in removed and b not in removed},
            gone,
            removed,
            forgotten,
        )


class LadybugGraph:
    """A graph store in one file, for one process at a time. What a call does it does whole or not at all, whatever ends
    the process."""

    def __init__(
        self, path: Path, *, buffer_pool: int = BUFFER_POOL, largest_file: int = LARGEST_FILE, threads: int = THREADS
    ) -> None:
        """``prepare`` opens the file, and makes it where there is none. It is this store's own, with a log and a lock
        beside it, whose names begin with its name."""
        self._path = path.absolute()
        self._buffer_pool = buffer_pool
        self._largest_file = largest_file
        self._threads = threads
        self._database: ladybug.Database | None = None
        self._lock: int | None = None
        self._users = 0
        self._changed = threading.Condition()
        self._writing = threading.RLock()
        self._has_tables = False
        self._doubtful = False
        """A commit or a checkpoint ended in an error."""
        self._unsaved = 0
        """Bytes of memory, at most, that is kept for changes since the last checkpoint."""

    def prepare(self) -> None:
        """Open the file and make its tables. Raises GraphUnavailable where another process has it open, or it cannot
        be written; GraphRefused where it is no database of this version, or damaged: then ``clear`` makes a new one."""
        with self._writing:
            self._own()
            with self._transaction():
                pass

    def apply(self, change: Change) -> None:
        """Make a change in one transaction. Raises GraphRefused also for one that is too large for the memory."""
        outcome = _Outcome.of(change)
        with self._writing:
            try:
                self._apply(outcome)
            except _MemoryFull:
                self._begin_anew()  # what statements took of it comes back only so
                self._settle()
                try:
                    self._apply(outcome)
                except _MemoryFull as error:
                    raise GraphRefused(f"The change is too large: {error}") from error

    def _apply(self, outcome: _Outcome) -> None:
        with self._transaction() as run:
            ends = {end for pair in outcome.dissimilar for end in pair}
            held = _documents(run, outcome.there | outcome.removed | ends | outcome.unmentioned.keys())
            known = _entities(run, outcome.entities | outcome.forgotten)
            memory = outcome.memory(held)
            if memory > self._buffer_pool // 4:
                raise GraphRefused(
                    f"The change is too large: it takes {memory >> 20:,} MiB of memory, and a quarter of "
                    f"{self._buffer_pool >> 20:,} MiB is allowed"
                )
            self._unsaved += memory
            _make_nodes(run, outcome, held, known)
            _make_similar(run, outcome, held.keys())
            _make_mentions(run, outcome, held.keys())
            for document in sorted(outcome.removed & held.keys()):
                run(_END_DOCUMENT, id=document)
            for entity in sorted(outcome.forgotten & known):
                run(_END_ENTITY, id=entity)

    def read(self, ids: Sequence[int]) -> dict[int, Held]:
        """What the graph holds of these documents, each as it is at one moment. An edge is there for both ends, so
        that nothing is lopsided."""
        answer: dict[int, Held] = {}
        with self._session() as run:
            wanted = sorted(set(ids))
            for start in range(0, len(wanted), READ_AT_ONCE):
                run("BEGIN TRANSACTION READ ONLY")
                for i, node in _documents(run, wanted[start : start + READ_AT_ONCE]).items():
                    similar = {other: score for other, score, _ in run(_READ_SIMILAR, id=i)}
                    answer[i] = Held(node, similar, frozenset(entity for entity, _ in run(_READ_MENTIONS, id=i)))
                run("COMMIT")
        return answer

    def documents(self, after: int, limit: int) -> list[int]:
        """Ids of document nodes above ``after``, in order, bare ones too."""
        query = "MATCH (d:Document) WHERE d.id > $after RETURN d.id ORDER BY d.id LIMIT $limit"
        with self._session() as run:
            return [i for (i,) in run(query, after=after, limit=limit)]

    def entities(self, after: str, limit: int) -> list[str]:
        """Keys of entities above ``after``, in order of their code points."""
        query = "MATCH (e:Entity) WHERE e.id > $after RETURN e.id ORDER BY e.id LIMIT $limit"
        with self._session() as run:
            return [entity for (entity,) in run(query, after=after, limit=limit)]

    def clear(self) -> None:
        """Begin anew with an empty file, in place of one that is damaged too."""
        with self._writing:
            self._own()
            self._end()
            self._remove()
            self.prepare()

    def probe(self) -> str:
        """What answers, with its version."""
        with self._session() as run:
            ((version,),) = run("CALL db_version() RETURN *")
            return f"LadybugDB {version}"

    def close(self) -> None:
        """Wait for calls that are under way, and let go of the file; what comes after is refused until ``prepare``."""
        with self._writing:
            self._end()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _own(self) -> None:
        """Be the only one that uses the file; the database's own lock does not keep one process from opening it
        twice."""
        if self._lock is not None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise GraphUnavailable(f"The graph's file {self._path} cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise GraphUnavailable(f"The graph's file {self._path} is in use by another server") from error
        self._lock = lock

    def _open(self) -> None:
        new = self._bytes("") == 0
        try:
            for log in (_LOG, _FROZEN_LOG):
                if (size := self._bytes(log)) > 0:
                    os.truncate(f"{self._path}{log}", size + LOG_PADDING)
            self._database = ladybug.Database(
                self._path,
                buffer_pool_size=self._buffer_pool,
                max_num_threads=self._threads,
                max_db_size=self._largest_file,
                auto_checkpoint=False,  # ``_settle`` does
                # The end of a log that was not written to its end was promised to nobody.
                throw_on_wal_replay_failure=False,
            )
        except OSError as error:
            raise GraphUnavailable(f"The graph's file {self._path} cannot be opened: {error.strerror}") from error
        except RuntimeError as error:
            if new:
                self._remove()  # what was begun of it
            if str(error).startswith(("IO exception", "Buffer manager exception")):
                raise GraphUnavailable(f"The graph's file {self._path} cannot be opened: {error}") from error
            raise GraphRefused(
                f"The graph's file {self._path} is damaged, or of another version than {ladybug.version}; "
                f"a rebuild makes a new one: {error}"
            ) from error
        self._has_tables, self._doubtful = False, False
        self._unsaved = self._buffer_pool  # nobody knows what the log brought

    def _remove(self) -> None:
        try:
            # The log first: without it the file is as it was at some time, and the other way round it is nothing.
            for suffix in (*_BESIDE, ""):
                Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        except OSError as error:
            raise GraphUnavailable(f"The graph's file {self._path} cannot be removed: {error.strerror}") from error

    def _end(self, *, save: bool = True) -> None:
        """Close the database when nobody uses it any more; with a checkpoint before, if asked. One that is not to write
        any more stays as it is, in memory, until the process ends."""
        with self._changed:
            database, self._database = self._database, None
            while self._users:
                self._changed.wait()
        if database is None:
            return
        try:
            if self._doubtful:
                raise RuntimeError("it is not to write any more")
            with ladybug.Connection(database) as connection:
                _run(connection, "CHECKPOINT" if save else "CALL force_checkpoint_on_close = false", {})
        except RuntimeError:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(database))
        else:
            database.close()

    def _has_room(self) -> bool:
        """Whether the disk takes more than what may be left to write of a log."""
        try:
            with tempfile.TemporaryFile(dir=self._path.parent, buffering=0) as file:
                written = file.write(bytes(ROOM))
                os.fsync(file.fileno())
                return written == ROOM
        except OSError:
            return False

    @contextmanager
    def _session(self) -> Iterator[_Run]:
        """A connection for some statements; an open transaction ends with it, and is undone."""
        with self._changed:
            if self._database is None:
                raise GraphUnavailable(f"The graph's file {self._path} is not open")
            self._users += 1
            database = self._database
        try:
            with ladybug.Connection(database) as connection:
                yield lambda statement, **parameters: _run(connection, statement, parameters)
        except RuntimeError as error:
            if "Unable to cast Python instance" in str(error):
                raise GraphRefused(f"The graph cannot hold a text or a number of this change: {error}") from error
            if _MEMORY_FULL in str(error):
                raise _MemoryFull(f"The graph's memory of {self._buffer_pool >> 20:,} MiB is full") from error
            raise GraphUnavailable(f"The graph's file {self._path}: {error}") from error
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextmanager
    def _transaction(self) -> Iterator[_Run]:
        """For the one that writes."""
        self._settle()
        with self._session() as run:
            run("BEGIN TRANSACTION")
            if not self._has_tables:
                for name, columns in _TABLES.items():
                    run(f"CREATE {columns.format(f'IF NOT EXISTS {name}')}")
            yield run
            self._doubtful = True
            run("COMMIT")
            self._doubtful, self._has_tables = False, True

    def _settle(self) -> None:
        """Make good what went wrong the last time, and give back memory and log that changes hold."""
        if self._doubtful:
            if not self._has_room():
                raise GraphUnavailable(f"The disk of the graph's file {self._path} is full, or cannot be written")
            self._begin_anew()
        elif self._database is None and self._lock is not None:
            self._open()
        if self._unsaved > self._buffer_pool // 2 or self._bytes(_LOG) > LOG_BYTES:
            self._doubtful = True
            with self._session() as run:
                run("CHECKPOINT")
            self._doubtful, self._unsaved = False, 0

    def _bytes(self, suffix: str) -> int:
        """Of the file, or of what lies beside it; 0 where it is not there."""
        try:
            return Path(f"{self._path}{suffix}").stat().st_size
        except FileNotFoundError:
            return 0

    def _begin_anew(self) -> None:
        """Open the file again, without a checkpoint: its log has all that was promised."""
        self._end(save=False)
        self._open()


def _run(connection: ladybug.Connection, statement: str, parameters: dict[str, Any]) -> list[list[Any]]:
    result = connection.execute(statement, parameters)
    assert isinstance(result, ladybug.QueryResult)  # one statement
    with result:
        return cast("list[list[Any]]", result.get_all())  # dicts only where they were asked for


def _characters(row: object) -> int:
    """In the texts of a row of a statement."""
    texts = row.values() if isinstance(row, dict) else row if isinstance(row, tuple) else (row,)
    return sum(len(text) for text in texts if isinstance(text, str))


def _size(lists: Mapping[int, Set[str]]) -> int:
    return sum(map(len, lists.values()))


def _parts(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    part, characters = list[_Row](), 0
    for row in rows:
        more = _characters(row)
        if part and (len(part) == STATEMENT_ROWS or characters + more > STATEMENT_CHARACTERS):
            yield part
            part, characters = [], 0
        part.append(row)
        characters += more
    if part:
        yield part


def _make(run: _Run, statement: str, rows: Sequence[object]) -> None:
    """Let a statement make or set so many rows; raises GraphUnavailable where it says that it did not."""
    for some in _parts(rows):
        ((made,),) = run(statement, rows=some)
        if made != len(some):
            raise GraphUnavailable(f"The graph took {made:,} of {len(some):,} rows: {statement}")


def _documents(run: _Run, ids: Collection[int]) -> dict[int, DocumentNode | None]:
    """Those that are there; None: bare."""
    rows = [row for some in _parts(sorted(ids)) for row in run(_READ_DOCUMENTS, ids=some)]
    return {row[0]: None if row[-1] is None else DocumentNode(*row) for row in rows}


def _entities(run: _Run, keys: Collection[str]) -> set[str]:
    """Those that are there."""
    return {key for some in _parts(sorted(keys)) for (key,) in run(_READ_ENTITIES, ids=some)}


def _make_nodes(run: _Run, outcome: _Outcome, held: dict[int, DocumentNode | None], known: Set[str]) -> None:
    new, set_ = list[dict[str, Any]](), defaultdict[tuple[str, ...], list[dict[str, Any]]](list)
    for i, node in sorted(outcome.documents.items()):
        row = node._asdict()
        if i not in held:
            new.append(row)
        elif held[i] != node:
            before = {} if (was := held[i]) is None else was._asdict()
            set_[tuple(name for name in _PROPERTIES if name not in before or before[name] != row[name])].append(row)
    _make(run, _MAKE_DOCUMENTS, new)
    for names, rows in set_.items():
        _make(run, _SET_DOCUMENTS.format(", ".join(f"d.{name} = r.{name}" for name in names)), rows)
    _make(run, _MAKE_BARE, sorted(outcome.there - outcome.documents.keys() - held.keys()))
    _make(run, _MAKE_ENTITIES, sorted(outcome.entities - known))


def _make_similar(run: _Run, outcome: _Outcome, held: Set[int]) -> None:
    """``held`` were there before: among them there may be pairs already."""
    missing = dict(outcome.similar)
    for end, others in _by_end({pair for pair in missing.keys() | outcome.dissimilar if held >= set(pair)}).items():
        above, below = list[int](), list[int]()
        for other, score, edge in run(_READ_SIMILAR, id=end):
            if other not in others:
                continue
            pair = (min(end, other), max(end, other))
            if missing.get(pair) == score:
                del missing[pair]
            else:
                (above if other > end else below).append(edge)
        if above:
            run(_END_SIMILAR_ABOVE, id=end, edges=above)
        if below:
            run(_END_SIMILAR_BELOW, id=end, edges=below)
    _make(run, _MAKE_SIMILAR, [{"a": a, "b": b, "score": score} for (a, b), score in sorted(missing.items())])


def _by_end(pairs: Set[tuple[int, int]]) -> dict[int, set[int]]:
    """Few documents at which all these pairs are found, each with its others: a change is mostly about some documents
    and what is around them."""
    count = Counter(end for pair in pairs for end in pair)
    found = defaultdict[int, set[int]](set)
    for a, b in sorted(pairs):
        end, other = (a, b) if count[a] >= count[b] else (b, a)
        found[end].add(other)
    return found


def _make_mentions(run: _Run, outcome: _Outcome, held: Set[int]) -> None:
    missing = []
    for document in sorted(outcome.mentions.keys() | outcome.unmentioned.keys()):
        there = dict[str, int](run(_READ_MENTIONS, id=document) if document in held else ())
        if gone := [there[entity] for entity in outcome.unmentioned.get(document, set()) & there.keys()]:
            run(_END_MENTIONS, id=document, edges=gone)
        wanted = sorted(outcome.mentions.get(document, set()) - there.keys())
        missing += [{"document": document, "entity": entity} for entity in wanted]
    _make(run, _MAKE_MENTIONS, missing)
