"""What is around a document is answered from before as long as nothing changed, and never a moment longer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from nexus.rows import url
from nexus.synced import DIMENSION, Synced, around, play
from prometheus_client import CollectorRegistry

from common.errors import InvalidRequest
from control_plane.errors import CollectionNotFound, DocumentNotFound
from control_plane.jobs.database import Database
from control_plane.jobs.store import now_ms
from control_plane.nexus.backstore import BackStore, DocumentRef, NodeChange, RelationshipChange
from control_plane.nexus.context import Contexts, DocumentContext, Sought
from control_plane.nexus.finding import Finder
from control_plane.nexus.kept import KEPT_SECONDS, Kept
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.records import NewDocument
from control_plane.nexus.sight import Sight
from control_plane.nexus.spaces import Spaces
from control_plane.nexus.store import CollectionStore
from control_plane.operations.keys import Caller

__all__ = ["url"]

RED, GUEST = (Caller(name, "red", frozenset({"read"})) for name in ("red", "guest"))


class Replica:
    """A server that answers."""

    def __init__(self, database: Database) -> None:
        self.registry = CollectorRegistry()
        metrics = NexusMetrics(self.registry)
        self.store, sight = CollectionStore(database), Sight(database)
        self.events = BackStore(database, metrics, sends=False)
        finder = Finder(self.store, sight, Spaces(self.store, memory_bytes=1 << 28))
        self.contexts = Contexts(self.store, sight, finder, self.events, metrics=metrics)

    @property
    def made(self) -> int:
        """Answers that were made."""
        return int(self.registry.get_sample_value("vectorizer_nexus_context_cache_total", {"outcome": "miss"}) or 0)

    async def ask(self, caller: Caller = RED, sought: Sought = Sought()) -> tuple[DocumentContext, bool]:  # noqa: B008
        """What is around the document that all tests ask for, and whether it was known."""
        before = self.made
        answer = await self.contexts.around(caller, "books", "asked", sought)
        return answer, self.made == before


def document(doc_id: str, place: np.ndarray, words: str = "", **more: object) -> NewDocument:
    fields: dict[str, object] = {"payload": {}, "doc_type": "", "permissions": (), **more}
    return NewDocument(doc_id=doc_id, title=doc_id, text=words, vector=place, **fields)  # type: ignore[arg-type]


def test_every_kind_of_change_is_in_the_next_answer_of_every_replica(url: str, tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        rng = np.random.default_rng(3)
        centre = around(rng, np.zeros(DIMENSION), 1)
        books, laws = await parts.collection("books"), await parts.collection("laws")
        start = [document(name, around(rng, centre, 0.05), "has some_name") for name in ("asked", "other", "third")]
        await parts.store.write(books, start, now=now_ms())
        far = Database(url)
        one, two = Replica(parts.database), Replica(far)

        async def settle() -> None:
            async with parts.running():
                await parts.settled()

        async def take(change: NodeChange | RelationshipChange, nonce: str) -> None:
            await one.events.take(change, nonce=nonce, now=now_ms())

        told = {"event_id": "e", "origin": "graph", "version": 1, "action": "upsert", "client": "red"}
        asked, other = DocumentRef("books", "asked"), DocumentRef("books", "fourth")
        node = msgspec.convert({**told, "properties": {"owner": "Ada"}}, dict)
        changes: list[tuple[Callable[[], Awaitable[object]], Callable[[DocumentContext], object]]] = [
            (settle, lambda now: (len(now.related), now.domain, [line.documents for line in now.entities])),
            (
                lambda: parts.store.write(books, [document("fourth", centre, "some_name")], now=now_ms()),
                lambda _: "nothing is compared yet",
            ),
            (settle, lambda now: [line.id for line in now.related]),
            (
                lambda: parts.store.write(books, [document("other", start[1].vector, permissions=["x"])], now=now_ms()),
                lambda now: [line.id for line in now.related],
            ),
            (lambda: parts.store.delete(books, ["third"], now=now_ms()), lambda now: [one.id for one in now.related]),
            (lambda: take(NodeChange(document=asked, **node), "node"), lambda now: now.graph["properties"]),
            (
                lambda: take(RelationshipChange(source=asked, target=other, type="CITES", **told), "relationship"),  # type: ignore[arg-type]
                lambda now: len(now.graph["relationships"]),
            ),
            (lambda: parts.store.write(laws, [document("law", centre)], now=now_ms()), lambda _: "still as it was"),
            (settle, lambda now: sorted(line.collection for line in now.related)),
            (lambda: parts.store.drop_collection(laws), lambda now: sorted(line.collection for line in now.related)),
        ]
        for replica in (one, two):
            await replica.ask(GUEST)
        for number, (change, shown) in enumerate(changes):
            before = shown((await one.ask(GUEST))[0])
            await change()
            for replica in (one, two):
                answer, known = await replica.ask(GUEST)
                assert not known, number
                again, known = await replica.ask(GUEST)
                assert known
                assert again == answer
                assert isinstance(before, str) or shown(answer) != before, number
        await parts.store.delete(books, ["asked"], now=now_ms())
        for replica in (one, two):
            with pytest.raises(DocumentNotFound):
                await replica.ask(GUEST)
        await parts.store.drop_collection(books)
        for replica in (one, two):
            with pytest.raises(CollectionNotFound):
                await replica.ask(GUEST)
        await far.close()

    play(url, tmp_path, story)


def test_an_answer_is_kept_for_its_question_and_for_who_asked(tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        rng = np.random.default_rng(4)
        centre = around(rng, np.zeros(DIMENSION), 1)
        books, contracts = await parts.collection("books"), await parts.collection("contracts")
        seen = [document(name, around(rng, centre, 0.05)) for name in ("asked", "near")]
        secret = document("secret", centre, permissions=["red"])
        await parts.store.write(books, [*seen, secret], now=now_ms())
        opposite = [document(name, around(rng, -centre, 0.1)) for name in ("one", "two", "three")]
        await parts.store.write(contracts, [*opposite, secret], now=now_ms())
        async with parts.running():
            await parts.settled()
        replica = Replica(parts.database)
        answers = {
            (caller.key, sought): await replica.ask(caller, sought)
            for caller in (RED, GUEST)
            for sought in (Sought(), Sought(1), Sought(elsewhere=True), Sought(domain="legal"), Sought(domain="none"))
        }
        assert not any(known for _, known in answers.values())
        for (key, sought), (answer, _) in answers.items():
            assert await replica.ask(RED if key == "red" else GUEST, sought) == (answer, True)
        found = {key: [line.id for line in answer.related] for key, (answer, _) in answers.items()}
        assert found["red", Sought()][:2] == ["secret", "secret"]
        assert found["guest", Sought()] == ["near"]
        assert found["guest", Sought(elsewhere=True)] == []
        # Documents of a domain are listed however near they are, in one order.
        assert found["red", Sought(domain="legal")][0] == "secret"
        assert sorted(found["guest", Sought(domain="legal")]) == ["one", "three", "two"]
        legal = answers["guest", Sought(domain="legal")][0].related
        assert all(line.domain == "legal" and line.score < 0 for line in legal)
        assert [line.score for line in legal] == sorted((line.score for line in legal), reverse=True)
        assert found["red", Sought(domain="none")] == []
        # What another client does changes no answer of this one.
        blue = await parts.collection("books", client="blue")
        await parts.store.write(blue, [document("asked", centre)], now=now_ms())
        assert (await replica.ask())[1]
        for domain in ("", "x" * 65, "a\0"):
            with pytest.raises(InvalidRequest, match=r"^domain: must be 1 to 64 printable characters$"):
                await replica.ask(RED, Sought(domain=domain))

    play(f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite'}", tmp_path, story)


class Said(msgspec.Struct):
    """An answer."""

    text: str


class Asked:
    """Answers with a clock of their own."""

    def __init__(self, **bounds: int) -> None:
        self.now = 0.0
        self.kept = Kept(Said, NexusMetrics(CollectorRegistry()), clock=lambda: self.now, **bounds)

    def __call__(self, key: str, said: str, change: int = 1) -> str:
        """What the answer says; this, where it is made now."""

        async def say() -> Said:
            return Said(said)

        return asyncio.run(self.kept.get(key, change, say)).text


def test_an_answer_is_kept_for_an_hour_or_until_a_change() -> None:
    asked = Asked()
    assert asked("a", "first") == "first"
    asked.now = KEPT_SECONDS - 1
    assert asked("a", "second") == "first"
    asked.now = KEPT_SECONDS
    assert asked("a", "second") == "second"
    assert asked("a", "third", change=2) == "third"
    assert asked("a", "fourth", change=2) == "third"


def test_answers_that_were_not_asked_for_make_room() -> None:
    asked = Asked(most=2)
    for key in ("a", "b", "a", "c"):
        asked(key, f"first {key}")
    assert asked("a", "") == "first a"
    assert asked("b", "again") == "again"
    assert asked("c", "again") == "again"
    asked = Asked(most_bytes=60)
    assert asked("a", "x" * 100) == "x" * 100  # larger than all that may be kept
    assert asked("a", "x" * 20) == "x" * 20
    assert asked("b", "y" * 30) == "y" * 30
    assert asked("a", "z" * 20) == "z" * 20
    assert asked("a", "") == "z" * 20
