"""The graph's leg of a search is what a plain computation says, and is of what the viewer sees alone; searches keep to
domains; figures of a collection are exact."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from nexus.brute_force import score
from nexus.rows import url
from nexus.synced import DIMENSION, Synced, around, play
from prometheus_client import CollectorRegistry
from sqlalchemy import text

from control_plane.jobs.store import now_ms
from control_plane.nexus.backstore import BackStore, DocumentRef, RelationshipChange
from control_plane.nexus.entities import entities
from control_plane.nexus.finding import RARE, RELATED, RESEMBLING, SEEDS, SHARE, Finder, Hit, Wanted
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.records import Collection, NewDocument, Vector, Viewer
from control_plane.nexus.sight import Counts, Sight
from control_plane.nexus.store import EVERYTHING

__all__ = ["url"]

RED, GUEST, NOBODY = Viewer("red", None), Viewer("red", "guest"), Viewer("red", "nobody")
HIDDEN = ["red"]


class Library:
    """Two collections of one client, whose documents hang together in all ways, and some of which a guest does not see;
    and one of somebody else that names the same things."""

    def __init__(self, parts: Synced) -> None:
        self.parts = parts
        self.sight = Sight(parts.database)
        self.finder = Finder(parts.store, self.sight, parts.engine.spaces)
        self.collections: list[Collection] = []
        self.given: dict[int, NewDocument] = {}
        """By rows."""
        self.inside: dict[int, int] = {}
        """The collection of each row."""
        self.pairs: set[tuple[int, int]] = set()
        """That a graph told."""

    async def fill(self) -> None:
        rng = np.random.default_rng(11)
        centres = [around(rng, np.zeros(DIMENSION), 1) for _ in range(3)]
        for number, (name, client) in enumerate([("contracts", "red"), ("code", "red"), ("code", "blue")]):
            collection = await self.parts.collection(name, client=client)
            new = []
            for at in range(48):
                named = [f"rare_{at % 16}", *(["common_word"] if at % 2 else []), *(["some_name"] if at < 14 else [])]
                vector = around(rng, centres[at % 3 if at < 12 else 0], 0.12)
                hidden = HIDDEN if at % 3 == 1 or at >= 30 else []
                kind = "note" if at % 5 else "page"
                said = f"Here is {' and '.join(named)}."
                new.append(NewDocument(f"{name}-{at}", f"About {at}", said, {}, kind, hidden, vector))
            written = await self.parts.store.write(collection, new, now=now_ms())
            if client == "red":
                self.collections.append(collection)
                self.given |= {put.id: one for put, one in zip(written, new, strict=True)}
                self.inside |= {put.id: number for put in written}
        await self._relate()
        async with self.parts.running():
            await self.parts.settled()

    async def _relate(self) -> None:
        rows = sorted(self.given)
        # One with few, one with as many as count, a hub, and one that is a hub for whom sees everything.
        ends = {0: 3, 1: RELATED, 2: RELATED + 1, 3: RELATED + 20}
        events = BackStore(self.parts.database, NexusMetrics(CollectorRegistry()), sends=False)
        for at, many in ends.items():
            for step in range(1, many + 1):
                pair = rows[at], rows[(at + step) % len(rows)]
                ways = [("CITES", pair), ("KNOWS", pair), ("CITES", pair[::-1])] if step == 1 else [("CITES", pair)]
                for kind, (source, target) in ways:
                    change = RelationshipChange(
                        event_id="e", origin="graph", version=1, action="upsert", client="red", type=kind,
                        source=self._ref(source), target=self._ref(target),
                    )  # fmt: skip
                    await events.take(change, nonce=f"{at}-{step}-{kind}-{source}", now=now_ms())
                self.pairs.add(pair)

    def _ref(self, row: int) -> DocumentRef:
        return DocumentRef(self.collections[self.inside[row]].name, self.given[row].doc_id)

    def seen(self, viewer: Viewer) -> list[int]:
        """Rows that a viewer sees."""
        return [
            row
            for row, one in sorted(self.given.items())
            if viewer.key is None or not one.permissions or viewer.key in one.permissions
        ]

    def wanted(self, viewer: Viewer, collections: Sequence[Collection] | None = None, **more: object) -> Wanted:
        """A search for nothing in particular, which ``more`` changes."""
        plain = Wanted(self.collections if collections is None else collections, viewer, None, None, {}, -1.0, 200)
        return plain._replace(**more)  # type: ignore[arg-type]

    def graph(self, seeds: Sequence[int], wanted: Wanted) -> list[tuple[int, float]]:
        """The leg, in the plainest way: every other document that the viewer sees is looked at for each seed."""
        seen = self.seen(wanted.viewer)
        vectors: Mapping[int, Vector] = {row: self.given[row].vector for row in seen}
        named = {row: entities(f"{self.given[row].title}\n{self.given[row].text}") for row in seen}
        times: dict[str, int] = defaultdict(int)
        for names in named.values():
            for name in names:
                times[name] += 1
        found: dict[int, float] = defaultdict(float)
        for place, seed in enumerate(seeds, 1):
            found[seed] += 1 / place
            near = [(-score(vectors[seed], vectors[row]), abs(row - seed), row) for row in seen if row != seed]
            for cosine, _, row in sorted(one for one in near if one[0] <= -0.75)[:RESEMBLING]:
                found[row] += SHARE * -cosine / place
            for name in named[seed]:
                if 1 < times[name] <= RARE:
                    for row in seen:
                        if row != seed and name in named[row]:
                            found[row] += SHARE / (times[name] - 1) / place
            told = {b if a == seed else a for a, b in self.pairs if seed in (a, b)} & set(seen)
            if len(told) <= RELATED:
                for row in told:
                    found[row] += SHARE / place
        among = {one.id for one in wanted.collections}
        inside = [
            (row, round(value, 6))
            for row, value in found.items()
            if self.collections[self.inside[row]].id in among
            and wanted.doc_type in (None, self.given[row].doc_type)
            and (not wanted.domains or ("legal", "engineering")[self.inside[row]] in wanted.domains)
        ]
        return sorted(inside, key=lambda one: (-one[1], one[0]))


def test_the_leg_of_the_graph_is_what_a_plain_computation_says(url: str, tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        library = Library(parts)
        await library.fill()
        contracts, code = library.collections
        asked = 0
        for viewer in (RED, GUEST, NOBODY):
            rows = library.seen(viewer)
            wanted = [
                library.wanted(viewer),
                library.wanted(viewer, [contracts]),
                library.wanted(viewer, doc_type="page"),
                library.wanted(viewer, domains=["engineering", "nothing"]),
            ]
            for start in range(0, len(rows), 7):
                seeds = [rows[(start + 5 * step) % len(rows)] for step in range(SEEDS)]
                for one in wanted:
                    expected = library.graph(seeds, one)
                    assert await library.finder.by_graph(seeds, one) == expected
                    asked += len(expected) > 5
        assert asked > 60
        # A row that everybody resembles most of all has lost its whole list to those that a guest does not see.
        full = [row for row, near in (await parts.store.near_of(library.seen(GUEST))).items() if len(near) == 20]
        few = [
            row
            for row in full
            if len(set(library.seen(GUEST)) & {one.id for one in (await parts.store.near_of([row]))[row]}) < RESEMBLING
        ]
        assert few
        assert await library.finder.by_graph([], library.wanted(RED)) == []
        assert code.name == "code"

    play(url, tmp_path, story)


def test_what_a_key_does_not_see_changes_nothing_of_its_answers(url: str, tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        library = Library(parts)
        await library.fill()
        words = "rare_3 rare_5" if parts.database.postgres else None  # SQLite weighs words by all texts there are
        asked = library.wanted(GUEST, query=words)
        rows = library.seen(GUEST)
        space = library.collections[0].space

        async def answers() -> list[object]:
            found: list[object] = []
            for row in rows[::4]:
                vectors = {space: library.given[row].vector}
                hits = await library.finder.find(asked._replace(vectors=vectors), ["vector", "lexical"], limit=50)
                heard = await library.finder.find(
                    asked._replace(vectors=vectors), ["vector", "lexical"], limit=9, per_domain=2
                )
                found += [hits, heard]
            found.append(await library.finder.nearest(rows, GUEST, 20))
            found += [await library.sight.counts(one.id, GUEST) for one in library.collections]
            return found

        before = await answers()
        assert any(isinstance(hits, list) and any("graph" in hit.ranks for hit in hits) for hits in before)
        for number, collection in enumerate(library.collections):
            gone = [
                one.doc_id for row, one in library.given.items() if library.inside[row] == number and one.permissions
            ]
            assert await parts.store.delete(collection, gone, now=now_ms()) == len(gone) > 20
        async with parts.running():
            await parts.settled()
        assert await answers() == before

    play(url, tmp_path, story)


def test_domains_are_kept_to_and_each_is_heard(url: str, tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        library = Library(parts)
        await library.fill()
        contracts, code = library.collections
        seed = sorted(library.given)[0]
        asked = library.wanted(RED, vectors={contracts.space: library.given[seed].vector}, query="About")

        def of(hits: Sequence[Hit]) -> list[int]:
            return [library.inside[hit.id] for hit in hits]

        for legs in (["vector"], ["lexical"], ["vector", "lexical"]):
            legal = await library.finder.find(asked._replace(domains=["legal"]), legs, limit=20)
            assert of(legal) == [0] * 20
            assert await library.finder.find(asked._replace(domains=["nothing"]), legs, limit=20) == []
            # The legs begin with fewer rows than it takes until the other domain is heard.
            both = await library.finder.find(asked._replace(depth=2), legs, limit=6, per_domain=3)
            assert sorted(of(both)) == [0, 0, 0, 1, 1, 1]
            assert [hit.score for hit in both] == sorted((hit.score for hit in both), reverse=True)
            alone = await library.finder.find(asked._replace(collections=[code]), legs, limit=9, per_domain=4)
            assert of(alone) == [1] * 4
        # However many others fit better.
        pages = [row for row, one in library.given.items() if one.doc_type == "page" and library.inside[row] == 1]
        words = asked._replace(doc_type="page", domains=["engineering", "nothing"])
        found = await library.finder.by_words(words)
        assert sorted(row for row, _ in found) == sorted(pages)
        assert await library.finder.by_words(words._replace(depth=3)) == found[:3]

    play(url, tmp_path, story)


def test_figures_of_a_collection_are_those_of_what_a_key_sees(url: str, tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        library = Library(parts)
        await library.fill()
        contracts, _ = library.collections
        assert await parts.store.take_lease()
        all_rows = [row for row in library.given if library.inside[row] == 0]
        open_, hidden = (
            [row for row in all_rows if bool(library.given[row].permissions) is some] for some in (False, True)
        )
        await parts.store.distrust([open_[0], open_[1], hidden[0], hidden[1], hidden[2]])
        async with parts.database.write.begin() as connection:
            failed = text(f"UPDATE documents SET attempts = 4 WHERE id IN ({open_[0]}, {hidden[0]})")
            await connection.execute(failed)
        uncompared = library.given[open_[2]]
        await parts.store.write(contracts, [uncompared], now=now_ms())
        seen = Counts(len(all_rows), 4, 2)
        assert await library.sight.counts(contracts.id, RED) == seen
        assert await library.sight.counts(contracts.id, EVERYTHING) == seen
        assert await library.sight.counts(contracts.id, Viewer("red", "red")) == seen
        assert await library.sight.counts(contracts.id, GUEST) == Counts(len(open_), 2, 1)
        assert await library.sight.counts(contracts.id, Viewer("blue", None)) == Counts(0, 0, 0)
        await parts.store.drop_collection(contracts)
        assert await library.sight.counts(contracts.id, RED) == Counts(0, 0, 0)

    play(url, tmp_path, story)
