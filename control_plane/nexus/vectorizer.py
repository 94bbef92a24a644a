"""Indexes in a Vectorizer server, a collection for each space.

Vectorizer 3.5.0 answers wrongly, late or not at all on many of its routes. Only these are used, and
``tests/nexus/test_nexus_vectorizer_server.py`` says of a server's version whether they behave so:

- ``POST /insert_vectors`` is the one write that has happened when it is answered, and that is answered by item. To a
  collection that is not there it makes one of 512 dimensions without a word.
- A vector that was brought is not in the graph of neighbours before the next search, which then waits for a thousand of
  them. So each write ends with a search of its own.
- One that was deleted or replaced keeps its place in that graph until the server starts again: a search finds so many
  fewer. So a collection of which more is dead than alive is made anew.
- ``/qdrant/…/points/search/batch`` is the one search that has neither a cache, which may answer with what was before
  the last write, nor a bound of 100, nor all vectors in its answer.
- ``PUT /qdrant/collections/…`` makes a collection; ``POST /collections`` takes only the dimension of its own embedder.
- The graph of neighbours does not reach every vector, however many are asked for: of 4,000 clustered vectors of 256
  dimensions 80% of the questions find all of the 20 nearest, with twice the links 94%, and 65% once each vector was
  replaced twice.
- Listing points sends their vectors, and copies the collection for each page. So what is held is asked for by ids, and
  a collection that has others besides is made anew.
- A key that asked more often than it may is answered with 401, as one that nobody knows.
- What was written since the last save, which comes each some minutes, is lost when the server is killed, and nothing
  tells of it: after each search and each write the server is asked how long it runs and how much it has.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn, TypeVar

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from control_plane.nexus.index import Held, IndexLost, IndexUnavailable, Named, name_of, prints_of
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.records import Vector
from control_plane.nexus.wire import Wire

log = structlog.get_logger()

SECONDS = 30.0
"""For one request and its answer."""
SEARCH_SECONDS = 3.0
"""For a search, for which somebody waits."""
PAUSE_SECONDS = 5.0
"""For which a server that has failed is not asked, or longer where it says so."""
LONGEST_PAUSE_SECONDS = 60.0
PREFIX = "memvid-"
"""Of the names of collections: all that begin so are ours."""
BODY_BYTES = 512 << 10
"""Of vectors in one request, about; nginx takes 1 MiB."""
NUMBER_BYTES = 10
"""Of a vector's number, about."""
SEARCHED_AT_ONCE = 16
"""Vectors in one request."""
IDS_AT_ONCE = 1_000
"""In one request."""
LINKS, EFFORT = 32, 200
"""Neighbours of a vector in the graph, and how many are looked at to find them; 16 and 100 where nobody says. Twice as
many of either find little more, and take twice as long to bring."""
WORN = 10_000
"""Dead vectors at least for which a collection is made anew."""

_T = TypeVar("_T")


class _Collection(msgspec.Struct):
    """Of ``GET /collections/{name}``."""

    dimension: int
    metric: str
    vector_count: int


class _Named(msgspec.Struct):
    name: str


class _Collections(msgspec.Struct):
    """Of ``GET /collections``."""

    collections: list[_Named]


class _Status(msgspec.Struct):
    """Of ``GET /status``."""

    uptime_seconds: int


class _Item(msgspec.Struct):
    index: int
    status: str
    vector_ids: list[str] = []
    error: str = ""


class _Inserted(msgspec.Struct):
    """Of ``POST /insert_vectors``."""

    results: list[_Item]


class _Deleted(msgspec.Struct):
    """Of ``POST /batch_delete``."""

    deleted: int


class _Point(msgspec.Struct):
    id: int | str
    payload: dict[str, Any] | None = None
    score: float = 0.0


class _Points(msgspec.Struct):
    """Of ``POST /qdrant/collections/{name}/points``, and of one search."""

    result: list[_Point]


class _Searches(msgspec.Struct):
    """Of ``POST /qdrant/collections/{name}/points/search/batch``."""

    result: list[_Points]


class _Count(msgspec.Struct):
    count: int


class _Counted(msgspec.Struct):
    """Of ``POST /qdrant/collections/{name}/points/count``."""

    result: _Count


class Vectorizer:
    """A Vectorizer server, of which the collections whose names begin with ``PREFIX`` are ours alone."""

    def __init__(
        self,
        url: str,
        key: str | None,
        metrics: NexusMetrics,
        *,
        seconds: float = SECONDS,
        pause: float = PAUSE_SECONDS,
    ) -> None:
        """See ``Wire``; ``seconds`` bounds one request. Raises InvalidRequest."""
        self._wire = Wire(url, key, IndexUnavailable)
        self._metrics = metrics
        self._seconds = seconds
        self._pause = pause
        self._lock = threading.Lock()
        self._trouble: str | None = None
        self._closed_until = 0.0
        self._life = 0
        self._began = float("inf")
        """When the server has started at the latest."""

    def index(self, space: str, dimension: int) -> VectorizerIndex:
        """The collection of a space."""
        return VectorizerIndex(self, PREFIX + name_of(space), dimension)

    def keep_only(self, spaces: Collection[str]) -> None:
        """Delete the collections of all other spaces."""
        kept = {PREFIX + name_of(space) for space in spaces}
        for one in self.ask("GET", "/collections", None, _Collections).collections:
            if one.name.startswith(PREFIX) and one.name not in kept:
                self.ask("DELETE", f"/collections/{one.name}", None, object)

    def life(self) -> int:
        """Another number each time that the server was started anew."""
        before = time.monotonic()
        try:
            up = self.ask("GET", "/status", None, _Status, seconds=SEARCH_SECONDS, expected=False).uptime_seconds
        except IndexLost as error:
            self.fail(error.message)
        with self._lock:
            # It tells whole seconds.
            if before - up - 1 > self._began:
                self._life += 1
            self._began = time.monotonic() - up
            return self._life

    def ask(
        self,
        method: str,
        path: str,
        body: object,
        kind: type[_T],
        *,
        seconds: float | None = None,
        expected: bool = True,
    ) -> _T:
        """An answer. Raises IndexLost where what is asked of is not there, ``expected`` or not."""
        with self._lock:
            wait, trouble = self._closed_until - time.monotonic(), self._trouble
        if wait > 0:
            raise IndexUnavailable(f"not asked for {wait:.0f} s: {trouble}", refused=True)
        content = None if body is None else msgspec.json.encode(body)
        try:
            status, headers, read = self._wire.ask(method, path, content, min(self._seconds, seconds or self._seconds))
        except IndexUnavailable as error:
            self.fail(error.message)
        shown = f"{self._wire.host} answers {status}: {read[:200].decode(errors='replace')}"
        if status == 404:
            if expected:
                self.lose(shown)
            raise IndexLost(shown)
        if status != 200:
            self.fail(shown, headers.get("retry-after", ""), refused=status in (401, 403, 429))
        try:
            answer = msgspec.json.decode(read, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.fail(f"not an answer of Vectorizer ({error}): {shown}")
        with self._lock:
            well, self._trouble = self._trouble is None, None
        if not well:
            log.info("the vector store answers again", host=self._wire.host)
        return answer

    def fail(self, message: str, retry_after: str = "", *, refused: bool = False) -> NoReturn:
        """Nobody asks for some seconds; ``refused``: what was asked for did not happen."""
        seconds = min(float(retry_after), LONGEST_PAUSE_SECONDS) if retry_after.isdecimal() else 0
        with self._lock:
            first, self._trouble = self._trouble is None, message
            self._closed_until = time.monotonic() + max(self._pause, seconds)
        self._metrics.errors.labels(IndexUnavailable.code).inc()
        if first:
            log.warning("the vector store does not serve: all vectors are looked at", reason=message)
        raise IndexUnavailable(message, refused=refused)

    def lose(self, message: str) -> NoReturn:
        """A collection is not what it was."""
        self._metrics.errors.labels(IndexLost.code).inc()
        log.warning("a collection of the vector store is looked through anew", reason=message)
        raise IndexLost(message)

    def close(self) -> None:
        """Close all connections."""
        self._wire.close()


class VectorizerIndex:
    """See ``VectorIndex``; a write that failed, a server that was started anew and a collection that others changed
    raise IndexLost."""

    bytes = 0
    """The server's memory is not ours."""

    def __init__(self, server: Vectorizer, name: str, dimension: int) -> None:
        self._server = server
        self._name = name
        self._dimension = dimension
        self._life = self._count = self._dead = 0
        self._writes = 0
        """That were begun, and that have ended."""

    def held(self, ids: NDArray[np.int64]) -> Iterator[Held]:
        """Which of these it has."""
        self._life = self._server.life()
        try:
            there = self._server.ask("GET", f"/collections/{self._name}", None, _Collection, expected=False)
        except IndexLost:
            self._make()
            return
        if (there.dimension, there.metric.lower()) != (self._dimension, "cosine"):
            self._drop(f"{self._name} has {there.dimension} dimensions and compares by {there.metric}")
        self._count = 0
        for start in range(0, len(ids), IDS_AT_ONCE):
            points = self._points(ids[start : start + IDS_AT_ONCE])
            self._count += len(points.ids)
            yield points
        if self._count != there.vector_count:
            self._drop(f"{self._name} has {there.vector_count:,} vectors, of which {self._count:,} are known")

    def add(self, ids: NDArray[np.int64], vectors: Vector) -> NDArray[np.bool_]:
        """Put vectors; none of these ids may be there."""
        taken = np.zeros(len(ids), np.bool_)
        most = max(1, BODY_BYTES // (NUMBER_BYTES * self._dimension))
        for start in range(0, len(ids), most):
            part = slice(start, start + most)
            self._write(self._insert, ids[part], vectors[part], taken[part])
        return taken

    def remove(self, ids: NDArray[np.int64]) -> None:
        """Let go of those that are there."""
        for start in range(0, len(ids), IDS_AT_ONCE):
            self._write(self._delete, ids[start : start + IDS_AT_ONCE])
        if self._dead > max(WORN, self._count):
            self._drop(f"{self._name} has {self._dead:,} dead vectors beside {self._count:,}")

    def search(self, vectors: Vector, count: int) -> Named:
        """At most ``count`` candidates for each vector."""
        found: list[tuple[int, int, float]] = []
        writes = self._writes
        for start in range(0, len(vectors), SEARCHED_AT_ONCE):
            several = self._search(vectors[start : start + SEARCHED_AT_ONCE], count, SEARCH_SECONDS)
            for row, points in enumerate(several, start):
                found += [(row, one, point.score) for point in points.result if (one := _id(point)) is not None]
        if len(vectors):
            self._look(writes)
        return Named.of(found)

    def _make(self) -> None:
        """A collection with nothing in it."""
        path = f"/qdrant/collections/{self._name}"
        try:
            body = {
                "vectors": {"size": self._dimension, "distance": "Cosine"},
                "hnsw_config": {"m": LINKS, "ef_construct": EFFORT, "full_scan_threshold": 10_000},
            }
            self._server.ask("PUT", path, body, object, expected=False)
        except IndexLost as error:
            self._server.fail(error.message)
        self._count = self._dead = 0

    def _drop(self, why: str) -> NoReturn:
        """It is to be made anew."""
        self._server.ask("DELETE", f"/collections/{self._name}", None, object)
        self._server.lose(why)

    def _write(self, act: Callable[..., None], *arguments: Any) -> None:
        """Change the collection, and see that nobody else did."""
        self._writes += 1
        try:
            act(*arguments)
        except IndexLost:
            raise
        except IndexUnavailable as error:
            if error.details.get("refused"):
                raise
            raise IndexLost(error.message) from error  # it may have happened
        finally:
            self._writes += 1
        self._look(self._writes)

    def _insert(self, ids: NDArray[np.int64], vectors: Vector, taken: NDArray[np.bool_]) -> None:
        several = zip(ids.tolist(), _numbers(vectors), prints_of(vectors), strict=True)
        told = [{"id": str(one), "embedding": row, "payload": {"print": own.hex()}} for one, row, own in several]
        body = {"collection": self._name, "vectors": told}
        items = self._server.ask("POST", "/insert_vectors", body, _Inserted).results
        for item in items:
            if 0 <= item.index < len(ids) and item.vector_ids == [str(ids[item.index])] and item.status == "ok":
                taken[item.index] = True
        if not taken.any():
            self._server.fail(f"{self._name} takes no vector: {items[0].error[:200] if items else 'nothing is said'}")
        self._count += int(taken.sum())
        self._search(vectors[:1], 1, SECONDS)

    def _delete(self, ids: NDArray[np.int64]) -> None:
        body = {"collection": self._name, "ids": [str(one) for one in ids.tolist()]}
        gone = self._server.ask("POST", "/batch_delete", body, _Deleted).deleted
        self._count -= gone
        self._dead += gone
        if still := len(self._points(ids).ids):
            self._server.fail(f"{self._name} still has {still:,} vectors that it was to delete")

    def _search(self, vectors: Vector, count: int, seconds: float) -> list[_Points]:
        asked = [
            {"vector": row, "limit": count, "with_payload": False, "with_vector": False} for row in _numbers(vectors)
        ]
        path = f"/qdrant/collections/{self._name}/points/search/batch"
        found = self._server.ask("POST", path, {"searches": asked}, _Searches, seconds=seconds).result
        if len(found) != len(vectors):
            self._server.fail(f"{self._name} answers {len(found)} of {len(vectors)} questions")
        return found

    def _points(self, ids: NDArray[np.int64]) -> Held:
        """Those of these that are there."""
        asked = ids.tolist()
        path = f"/qdrant/collections/{self._name}/points"
        found = self._server.ask("POST", path, {"ids": asked, "with_payload": True, "with_vector": False}, _Points)
        prints = {_id(point): _print(point) for point in found.result}
        there = [one for one in asked if one in prints]
        return Held(np.array(there, np.int64), [prints[one] for one in there])

    def _look(self, writes: int) -> None:
        """See that the collection is what it was, after so many writes."""
        if self._server.life() != self._life:
            self._server.lose(f"the server of {self._name} was started anew")
        path = f"/qdrant/collections/{self._name}/points/count"
        count = self._server.ask("POST", path, {}, _Counted, seconds=SEARCH_SECONDS).result.count
        # While one is written the number is neither the one nor the other.
        if writes % 2 == 0 and writes == self._writes and count != self._count:
            self._server.lose(f"{self._name} has {count:,} vectors, not {self._count:,}")


def _numbers(vectors: Vector) -> list[list[float]]:
    """In few digits: an index keeps them roughly."""
    numbers: list[list[float]] = np.round(vectors.astype(np.float64), 6).tolist()
    return numbers


def _id(point: _Point) -> int | None:
    one = point.id
    if isinstance(one, str):
        return int(one) if one.isdecimal() and len(one) < 19 else None
    return one if 0 <= one < 1 << 63 else None


def _print(point: _Point) -> bytes:
    found = (point.payload or {}).get("print")
    try:
        return bytes.fromhex(found) if isinstance(found, str) else b""
    except ValueError:
        return b""
