"""With the graph's leg a search over collections finds more of what docstrings were taken from."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sqlalchemy import insert

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.embedding.static import StaticEmbedder
from common.frames import frame_id_of
from control_plane.jobs.database import Database
from control_plane.nexus.entities import entities
from control_plane.nexus.finding import DEPTH, SEEDS, Finder, Hit, Leg, Wanted, fused
from control_plane.nexus.records import Collection, NewDocument, Related, Vector, Viewer
from control_plane.nexus.sight import Sight
from control_plane.nexus.spaces import Spaces
from control_plane.nexus.store import CollectionStore
from control_plane.nexus.tables import relations
from scripts.benchmarks.retrieval import BEST, Question, Repository, Scores

EXAMPLE = "memvid-export.graph.ndjson.gz"
AT_ONCE = 1_000


class Shelved(NamedTuple):
    """The nodes of a graph as documents of a collection."""

    finder: Finder
    collection: Collection
    rows: dict[str, int]
    """By ids of nodes."""


class Found(NamedTuple):
    """How well answers were found."""

    without: Scores
    """By vector and words."""
    with_graph: Scores
    told: Scores
    """The same, once a graph told the relationships of the nodes."""


async def _shelved(repository: Repository, database: Database, embedder: StaticEmbedder) -> Shelved:
    store = CollectionStore(database, replica="one")
    collection, _ = await store.put_collection("red", repository.name, "static", embedder.model.dimension)
    frames = [frame for frame in repository.frames(embedder.model.layout) if frame.kind == "node"]
    frames = [frame for frame in frames if frame.embed_text is not None]
    vectors = _units(embedder.embed([frame.embed_text or "" for frame in frames]).vectors)
    rows: dict[str, int] = {}
    for start in range(0, len(frames), AT_ONCE):
        new = [
            NewDocument(frame_id_of(frame.uri), frame.title, frame.text, {}, "", (), vector)
            for frame, vector in zip(frames[start : start + AT_ONCE], vectors[start:], strict=False)
        ]
        rows |= {put.doc_id: put.id for put in await store.write(collection, new, now=1)}
    spaces = Spaces(store, memory_bytes=1 << 30)
    space = await spaces.space(collection.space)
    assert await store.take_lease()
    while some := await store.unrelated(AT_ONCE):
        lists = await asyncio.to_thread(space.relate, [one.id for one in some])
        named = {one.id: entities(f"{one.title}\n{one.text}") for one in some}
        await store.put_related([Related(one.id, one.version, "code", named[one.id]) for one in some], lists)
        assert await store.take_lease()
    return Shelved(Finder(store, Sight(database), spaces), collection, rows)


async def _tell(repository: Repository, database: Database, shelf: Shelved) -> None:
    """Let a graph tell the relationships of the nodes."""
    pairs = {
        (shelf.rows.get(one.source_id, 0), shelf.rows.get(one.target_id, 0), one.type)
        for one in repository.graph.relations
    }
    names = "source", "target", "type"
    rest = {"properties": "{}", "origin": "graph", "version": 1, "deleted": False, "updated_at": 1}
    kept = [{**dict(zip(names, pair, strict=True)), **rest} for pair in sorted(pairs) if all(pair)]
    async with database.write.begin() as connection:
        await connection.execute(insert(relations), kept)


def _units(matrix: Vector) -> Vector:
    exact = matrix.astype(np.float64)
    found: Vector = (exact / np.linalg.norm(exact, axis=1, keepdims=True)).astype(np.float32)
    return found


async def _searched(shelf: Shelved, questions: Sequence[Question], vectors: Vector) -> list[tuple[Wanted, list[Leg]]]:
    """What was looked for, and what each leg but the graph's found."""
    made = []
    for question, vector in zip(questions, vectors, strict=True):
        wanted = Wanted(
            [shelf.collection], Viewer("red", None), None, question.text, {shelf.collection.space: vector}, -1.0, DEPTH
        )
        made.append((wanted, [Leg(name, await leg(wanted)) for name, leg in shelf.finder.legs.items()]))
    return made


async def _with_graph(shelf: Shelved, searched: Sequence[tuple[Wanted, list[Leg]]]) -> list[list[Leg]]:
    found = []
    for wanted, legs in searched:
        seeds = [hit.id for hit in fused(legs)[:SEEDS]]
        found.append([*legs, Leg("graph", await shelf.finder.by_graph(seeds, wanted))])
    return found


def _scores(shelf: Shelved, questions: Sequence[Question], searched: Sequence[Sequence[Leg]]) -> Scores:
    pairs = zip(questions, searched, strict=True)
    return Scores.of([_place(fused(legs)[:BEST], shelf.rows[question.answer]) for question, legs in pairs])


def _place(hits: Sequence[Hit], answer: int) -> int | None:
    rows = [hit.id for hit in hits]
    return rows.index(answer) if answer in rows else None


def found(graph: Path, folder: Path) -> Found:
    """How well the questions of a graph are answered."""
    embedder, repository = StaticEmbedder(), Repository(graph, folder)

    async def inside(database: Database) -> Found:
        await database.migrate()
        try:
            shelf = await _shelved(repository, database, embedder)
            asked = [one for one in repository.questions if one.answer in shelf.rows]
            vectors = _units(embedder.embed([one.text for one in asked], purpose="query").vectors)
            searched = await _searched(shelf, asked, vectors)
            with_graph = await _with_graph(shelf, searched)
            await _tell(repository, database, shelf)
            told = await _with_graph(shelf, searched)
            return Found(*(_scores(shelf, asked, legs) for legs in ([two for _, two in searched], with_graph, told)))
        finally:
            await database.close()

    return asyncio.run(inside(Database(f"sqlite+aiosqlite:///{folder / 'found.sqlite'}")))


def test_the_graph_makes_search_find_no_less_and_mostly_more(real_graphs: dict[str, Path], tmp_path: Path) -> None:
    scores = found(real_graphs[EXAMPLE], tmp_path)
    assert scores.with_graph.recall >= scores.without.recall
    assert scores.with_graph.reciprocal_rank >= scores.without.reciprocal_rank
    assert scores.told.recall > scores.without.recall
    assert scores.told.reciprocal_rank > scores.without.reciprocal_rank
