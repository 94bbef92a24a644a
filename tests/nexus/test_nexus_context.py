"""What is around a document, and what is there twice: whoever asks is told of what it sees, and of nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from nexus.rows import url
from nexus.synced import DIMENSION, Synced, around, play
from prometheus_client import CollectorRegistry

from common.errors import InvalidRequest
from control_plane.errors import CollectionNotFound, DocumentNotFound, RateLimited, TimedOut
from control_plane.jobs.store import now_ms
from control_plane.nexus import context, sight
from control_plane.nexus.backstore import BackStore, DocumentRef, NodeChange
from control_plane.nexus.context import Contexts, Sought
from control_plane.nexus.finding import Finder
from control_plane.nexus.groups import Groups, Together
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.records import TOP_K, Near, NewDocument, Viewer, pack_near
from control_plane.nexus.sight import Scope, Sight
from control_plane.nexus.store import CollectionStore
from control_plane.operations.keys import Caller

__all__ = ["url"]

RED = Caller("red", "red", frozenset({"read"}))
GUEST = Caller("guest", "red", frozenset({"read"}))
BLUE = Caller("blue", "blue", frozenset({"read"}))

Story = Callable[[Synced, Contexts], Awaitable[None]]


def told(url: str, folder: Path, story: Story) -> None:
    """A story over three repositories whose code is compared, and their graph."""

    async def inside(parts: Synced) -> None:
        rng = np.random.default_rng(6)
        centre = around(rng, np.zeros(DIMENSION), 1)
        other = np.asarray(-centre, dtype=np.float32)
        texts = {"ours": "parse_graph reads src/a.py", "theirs": "parse_graph", "third": ""}
        for name in ("ours", "theirs", "third"):
            collection = await parts.collection(name, "code")
            new = [
                NewDocument("copy", f"Copy of {name}", texts[name], {}, "", (), centre),
                NewDocument("near", "Near", "", {}, "", (), around(rng, centre, 0.05)),
                NewDocument("alone", "Alone", "", {}, "", (), other if name == "ours" else around(rng, centre * 0, 1)),
                NewDocument("secret", "Secret", "parse_graph", {}, "", ["red"], centre),
            ]
            await parts.store.write(collection, new, now=now_ms())
        blue = await parts.collection("ours", "code", client="blue")
        await parts.store.write(blue, [NewDocument("copy", "Blue", "parse_graph", {}, "", (), centre)], now=now_ms())
        async with parts.running():
            await parts.settled()
        await story(parts, contexts_of(parts))

    play(url, folder, inside)


def contexts_of(parts: Synced, store: CollectionStore | None = None) -> Contexts:
    """What answers, from another store where one is given."""
    store, sight, metrics = store or parts.store, Sight(parts.database), NexusMetrics(CollectorRegistry())
    finder = Finder(store, sight, parts.engine.spaces)
    return Contexts(store, sight, finder, BackStore(parts.database, metrics, sends=False), metrics=metrics)


def test_a_document_is_shown_with_what_is_around_it(url: str, tmp_path: Path) -> None:
    async def story(parts: Synced, contexts: Contexts) -> None:
        answer = await contexts.around(RED, "ours", "copy", Sought(20))
        assert (answer.id, answer.domain) == ("copy", "general")
        assert [(one.kind, one.name, one.documents) for one in answer.entities] == [
            ("identifier", "parse_graph", 5),
            ("path", "src/a.py", 1),
        ]
        found = {(one.collection, one.id): one.score for one in answer.related}
        assert {at for at, score in found.items() if score == 1} == {
            ("ours", "secret"), ("theirs", "copy"), ("theirs", "secret"), ("third", "copy"), ("third", "secret"),
        }  # fmt: skip
        assert {at for at, score in found.items() if score < 1} == {
            (name, "near") for name in ("ours", "theirs", "third")
        }
        assert [one.score for one in answer.related] == sorted((one.score for one in answer.related), reverse=True)
        short = await contexts.around(RED, "ours", "copy", Sought(2))
        assert short.related == answer.related[:2]

    told(url, tmp_path, story)


def test_what_a_key_may_not_see_is_in_no_answer_and_no_count(url: str, tmp_path: Path) -> None:
    async def story(parts: Synced, contexts: Contexts) -> None:
        answer = await contexts.around(GUEST, "ours", "copy", Sought(20))
        assert [(one.name, one.documents) for one in answer.entities] == [("parse_graph", 2), ("src/a.py", 1)]
        assert {(one.collection, one.id) for one in answer.related} == {
            ("theirs", "copy"), ("third", "copy"), ("ours", "near"), ("theirs", "near"), ("third", "near"),
        }  # fmt: skip
        groups = await contexts.duplicates(GUEST, 0.999999)
        assert [[(one.collection, one.id) for one in group.documents] for group in groups.groups] == [
            [("ours", "copy"), ("theirs", "copy"), ("third", "copy")]
        ]
        with pytest.raises(DocumentNotFound):
            await contexts.around(GUEST, "ours", "secret")
        assert (await contexts.duplicates(BLUE, 0.8)).groups == []
        assert (await contexts.around(BLUE, "ours", "copy", Sought(20, elsewhere=True))).related == []

    told(url, tmp_path, story)


def test_what_other_repositories_have_of_the_same_is_found(url: str, tmp_path: Path) -> None:
    async def story(parts: Synced, contexts: Contexts) -> None:
        answer = await contexts.around(RED, "ours", "copy", Sought(3, elsewhere=True))
        assert {one.collection for one in answer.related} <= {"theirs", "third"}
        assert [one.score for one in answer.related] == [1, 1, 1]
        assert (await contexts.around(RED, "ours", "alone", Sought(3, elsewhere=True))).related == []
        groups = await contexts.duplicates(RED, 0.999999)
        assert (groups.total, groups.groups[0].size, groups.groups[0].collections) == (
            1,
            6,
            ["ours", "theirs", "third"],
        )
        assert (await contexts.duplicates(RED, 0.9)).groups[0].size == 9

    told(url, tmp_path, story)


def test_what_the_graph_told_of_a_document_is_shown_with_it(tmp_path: Path) -> None:
    async def story(parts: Synced, contexts: Contexts) -> None:
        assert (await contexts.around(RED, "ours", "copy")).graph == {
            "properties": {},
            "relationships": [],
        }
        events = BackStore(parts.database, NexusMetrics(CollectorRegistry()), sends=False)
        change = NodeChange(
            event_id="1",
            origin="graph",
            version=1,
            action="upsert",
            client="red",
            document=DocumentRef("ours", "copy"),
            properties={"owner": "Ada"},
        )
        assert (await events.take(change, nonce="n" * 8, now=now_ms())).applied
        graph = (await contexts.around(RED, "ours", "copy")).graph
        assert graph["properties"] == {"owner": "Ada"}

    told(f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite'}", tmp_path, story)


def test_questions_that_make_no_sense_are_refused_by_their_field(tmp_path: Path) -> None:
    async def story(_: Synced, contexts: Contexts) -> None:
        for limit in (0, 21):
            with pytest.raises(InvalidRequest, match=r"^limit: must be 1 to 20$"):
                await contexts.around(RED, "ours", "copy", Sought(limit))
        for threshold in (0.74, 1.01, float("nan")):
            with pytest.raises(InvalidRequest, match=r"^threshold: must be 0.75 to 1$"):
                await contexts.duplicates(RED, threshold)
        with pytest.raises(CollectionNotFound):
            await contexts.around(RED, "nothing", "copy")
        with pytest.raises(DocumentNotFound):
            await contexts.around(RED, "ours", "x" * 10_000)

    told(f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite'}", tmp_path, story)


def test_what_a_key_does_not_see_hides_no_duplicates_from_it(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sight, "PAGE", 7)
    monkeypatch.setattr(context, "PAGE", 7)

    async def story(parts: Synced) -> None:
        rng = np.random.default_rng(8)
        centre = around(rng, np.zeros(DIMENSION), 1)
        names = "ours", "theirs", "third"
        ours, theirs, third = [await parts.collection(name) for name in names]
        await parts.write(ours, copy=centre, alone=-centre)
        secret = [NewDocument(f"s{n}", "", "", {}, "", ["red"], centre) for n in range(TOP_K + 5)]
        await parts.store.write(ours, secret, now=now_ms())
        await parts.write(theirs, copy=centre)
        await parts.store.write(third, secret[:1], now=now_ms())
        async with parts.running():
            await parts.settled()
        contexts = contexts_of(parts)
        shown = await contexts.duplicates(GUEST, 0.95)
        assert [(one.size, one.collections) for one in shown.groups] == [(2, ["ours", "theirs"])]
        assert [(one.collection, one.id) for one in shown.groups[0].documents] == [("ours", "copy"), ("theirs", "copy")]
        shown = await contexts.duplicates(RED, 0.95)
        assert [(one.size, one.collections) for one in shown.groups] == [(TOP_K + 8, sorted(names))]
        monkeypatch.setattr(context, "MAX_ANEW", 0)
        assert (await contexts.duplicates(GUEST, 0.95)).groups == []
        await parts.collection("empty", client="blue")
        assert (await contexts.duplicates(BLUE, 0.95)).total == 0

    play(url, tmp_path, story)


class Waiting(CollectionStore):
    """Reads lists once it is let go on."""

    def __init__(self, parts: Synced) -> None:
        super().__init__(parts.database)
        self.asked, self.go_on = asyncio.Event(), asyncio.Event()

    async def lists(self, space: str, after: int, limit: int) -> list[tuple[int, bytes]]:
        self.asked.set()
        await self.go_on.wait()
        return await super().lists(space, after, limit)


def test_one_report_of_duplicates_is_made_at_a_time_and_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(parts: Synced, _: Contexts) -> None:
        store = Waiting(parts)
        contexts = contexts_of(parts, store)
        first = asyncio.create_task(contexts.duplicates(RED, 0.95))
        await store.asked.wait()
        patient = asyncio.create_task(contexts.duplicates(GUEST, 0.95))
        await asyncio.sleep(0)  # it waits with its own patience
        monkeypatch.setattr(context, "TURN_SECONDS", 0.01)
        with pytest.raises(RateLimited, match="Another report"):
            await contexts.duplicates(BLUE, 0.95)
        store.go_on.set()
        assert ((await first).total, (await patient).total) == (1, 1)
        store.go_on.clear()
        monkeypatch.setattr(context, "REPORT_SECONDS", 0.01)
        with pytest.raises(TimedOut):
            await contexts.duplicates(RED, 0.95)
        monkeypatch.undo()
        store.go_on.set()
        assert (await contexts.duplicates(RED, 0.95)).total == 1

    told(f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite'}", tmp_path, story)


def test_of_a_name_that_many_documents_have_few_are_looked_at(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(parts: Synced, contexts: Contexts) -> None:
        seen = Sight(parts.database)
        collection = await parts.store.collection("red", "ours")
        red, guest = Viewer("red", None), Viewer("red", "guest")
        [own] = await parts.store.get(collection, ["copy"], red)
        scope = Scope([collection.id], guest)
        for bound, counts, groups in ((5, [5, 1], [1, 2]), (4, [4, 1], [1])):  # five of the client name it
            monkeypatch.setattr(sight, "LOOKED_AT", bound)
            assert [count for _, count in await seen.entities(own.id, red)] == counts
            assert sorted(len(group) for group in await seen.naming([own.id], scope, 10)) == groups
            assert len(await seen.entities(own.id, guest)) == 2
        assert (await contexts.around(BLUE, "ours", "copy")).entities[0].documents == 1

    told(url, tmp_path, story)


def test_lists_that_hidden_documents_fill_are_told_of() -> None:
    groups = Groups(np.array([1, 2, 3]), np.array([1, 1, 2]))
    near = [Near(row, 1.0) for row in range(2, TOP_K + 2)]
    full, short = pack_near(near), pack_near(near[1:])
    all_seen, far = pack_near(near[:1] * TOP_K), pack_near([*near[1:], Near(50, 0.94)])
    assert groups.take([(1, full), (9, full)], 0.95) == [1]
    assert groups.take([(1, short), (2, all_seen), (3, far)], 0.95) == []
    groups.add(3, [Near(99, 1.0)])
    assert groups.several(1, 2) == ([Together(3, [1, 2], frozenset({1, 2}))], 1)


def test_groups_are_those_of_a_plain_computation() -> None:
    rng = np.random.default_rng(9)
    for count, edges in ((1, 0), (40, 30), (400, 300), (3_000, 2_999)):
        rows = np.sort(rng.choice(5 * count, count, replace=False)) + 1
        inside = rng.integers(0, 3, count)
        pairs = rng.integers(0, count, (edges, 2)) if count < 3_000 else np.stack([np.arange(edges)] * 2, axis=1)
        pairs[:, 1] += count >= 3_000  # a chain
        lists: dict[int, list[Near]] = {int(row): [Near(5 * count + 9, 1.0), Near(int(rows[0]), 0.8)] for row in rows}
        together = {int(row): {int(row)} for row in rows}
        for one, other in rows[pairs].tolist():
            lists[one].append(Near(other, 0.95))
            if together[one] is not together[other]:
                together[one] |= together[other]
                for row in together[other]:
                    together[row] = together[one]
        groups = Groups(rows, inside)
        packed = [(0, pack_near([Near(int(rows[0]), 1.0)])), *((row, pack_near(near)) for row, near in lists.items())]
        for start in range(0, len(packed), 1_000):
            assert groups.take(packed[start : start + 1_000], 0.9) == []
        where = dict(zip(rows.tolist(), inside.tolist(), strict=True))
        expected = [
            Together(len(group), sorted(group)[:5], frozenset(where[row] for row in group))
            for group in {id(group): group for group in together.values()}.values()
            if len({where[row] for row in group}) > 1
        ]
        expected.sort(key=lambda one: (-one.size, one.rows[0]))
        assert groups.several(10, 5) == (expected[:10], len(expected))
