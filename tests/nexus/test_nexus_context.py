"""What is around a document, and what is there twice: whoever asks is told of what it sees, and of nothing else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from nexus.rows import url
from nexus.synced import DIMENSION, Synced, around, play
from prometheus_client import CollectorRegistry

from common.errors import InvalidRequest
from control_plane.errors import CollectionNotFound, DocumentNotFound
from control_plane.jobs.store import now_ms
from control_plane.nexus.backstore import BackStore, DocumentRef, NodeChange
from control_plane.nexus.context import Contexts, Sought
from control_plane.nexus.finding import Finder
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.records import NewDocument
from control_plane.nexus.sight import Sight
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
        sight = Sight(parts.database)
        metrics = NexusMetrics(CollectorRegistry())
        events = BackStore(parts.database, metrics, sends=False)
        finder = Finder(parts.store, sight, parts.engine.spaces)
        await story(parts, Contexts(parts.database, parts.store, sight, finder, events, metrics=metrics))

    play(url, folder, inside)


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
