"""The engine over a real database and a real graph: whatever happens, both say the same afterwards."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from nexus.brute_force import lists
from nexus.rows import url
from nexus.synced import DIMENSION, Synced, around, meanwhile, play, synced, tricky

from control_plane.nexus.graph.port import Change, DocumentNode, GraphRefused, GraphUnavailable, Mention, Similar
from control_plane.nexus.records import MAX_ATTEMPTS, Collection, Near, Related
from control_plane.nexus.store import EVERYTHING

__all__ = ["url"]


async def _live(parts: Synced, collections: list[Collection], seed: int, steps: int) -> None:
    """Write, change and delete documents as it comes."""
    rng, chance = np.random.default_rng(seed), random.Random(seed)
    centres = [around(rng, np.zeros(DIMENSION), 1) for _ in range(4)]
    texts = ["", "see src/a.py", "parse_graph and src/a.py", "https://example.com/x by Ada Lovelace"]
    names = [[f"d{number}" for number in range(30)] for _ in collections]
    for _ in range(steps):
        which = chance.randrange(len(collections))
        some = chance.sample(names[which], chance.randint(1, 6))
        if chance.random() < 0.3:
            await parts.delete(collections[which], *some)
        else:
            same = around(rng, chance.choice(centres), 0.1)
            await parts.write(
                collections[which],
                **{
                    name: (
                        same if chance.random() < 0.2 else around(rng, chance.choice(centres), 0.12),
                        chance.choice(texts),
                    )
                    for name in some
                },
            )
        await asyncio.sleep(chance.random() / 100)


def test_the_graph_is_what_brute_force_says_after_writes_changes_and_deletions(url: str, tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        both = [await parts.collection("one", "m"), await parts.collection("two", "m")]
        async with parts.running():
            await _live(parts, both, seed=1, steps=60)
            await parts.settled()
            parts.check()
            report = await parts.verify()
            assert (report.different, report.repaired, report.documents >= len(parts.vectors)) == ({}, 0, True)
            await parts.delete(both[0], *[f"d{number}" for number in range(30)])
            await parts.settled()
            parts.check()
        assert len(parts.vectors) > 10

    play(url, tmp_path, story)


def test_documents_of_other_clients_and_models_resemble_nothing_here(url: str, tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        same = around(np.random.default_rng(1), np.zeros(DIMENSION), 1)
        mine = await parts.write(await parts.collection("code", "m"), a=same, b=same)
        await parts.write(await parts.collection("code", "m", client="blue"), a=same)
        await parts.write(await parts.collection("other", "another model"), a=same)
        async with parts.running():
            await parts.settled()
        held = parts.held()
        assert {row for row, one in held.items() if one.similar} == set(mine.values())
        assert len(held) == 4

    play(url, tmp_path, story)


@pytest.mark.parametrize("half", ["nothing", "documents", "all"])
def test_a_change_whose_end_nobody_heard_is_made_good(url: str, tmp_path: Path, half: str) -> None:
    """The graph fails time and again, having taken nothing, a half, or all of what it was told."""

    async def story(parts: Synced) -> None:
        chance = random.Random(5)

        def fail(change: Change) -> None:
            if chance.random() < 0.5:
                if half != "nothing":
                    parts.graph.graph.apply(change if half == "all" else Change(change.documents, change.similar[::2]))
                raise GraphUnavailable("it is gone")

        parts.graph.before = fail
        both = [await parts.collection("one", "m"), await parts.collection("two", "m")]
        async with parts.running():
            await _live(parts, both, seed=2, steps=25)
            parts.graph.before = lambda _: None
            await parts.settled()
        parts.check()

    play(url, tmp_path, story)


def test_an_engine_that_ends_anywhere_goes_on_from_the_rows(url: str, tmp_path: Path) -> None:
    """As after kill -9: a new engine with empty memory, again and again, in the middle of whatever it does."""

    async def whole() -> None:
        rng = random.Random(7)
        vectors, texts = {}, {}
        with tricky(tmp_path) as graph:
            for turn in range(8):
                async with synced(url, graph, replica="same") as parts:
                    parts.vectors, parts.texts = vectors, texts
                    both = [await parts.collection("one", "m"), await parts.collection("two", "m")]
                    task = asyncio.create_task(parts.engine.run())
                    await _live(parts, both, seed=10 + turn, steps=5)
                    await asyncio.sleep(rng.random() / 5)
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    with graph.idle:
                        pass
            async with synced(url, graph, replica="same") as parts:
                parts.vectors, parts.texts = vectors, texts
                async with parts.running():
                    await parts.settled()
                parts.check()

    asyncio.run(whole())


def test_lists_that_somebody_reads_before_a_step_wrote_its_own_are_not_gone_on_with(tmp_path: Path) -> None:
    """The lead goes in the middle of a step and comes back, and a comparison with the graph reads the lists between."""

    async def story(parts: Synced) -> None:
        rng = np.random.default_rng(11)
        centre = around(rng, np.zeros(DIMENSION), 1)
        code = await parts.collection()
        put, steps = parts.store.put_related, 0

        async def slow(done: Sequence[Related], new: Mapping[int, Sequence[Near]]) -> None:
            nonlocal steps
            steps += 1
            if steps % 2:
                parts.engine._let_go()
                await parts.engine.spaces.listed(code.space)
            await put(done, new)

        parts.store.put_related = slow  # type: ignore[method-assign]
        async with parts.running():
            for turn in range(4):
                await parts.write(code, **{f"d{turn}-{one}": around(rng, centre, 0.1) for one in range(15)})
                await parts.settled()
        near = await parts.store.near_of(list(parts.vectors))
        assert near == lists(parts.vectors)
        assert steps >= 4

    url = f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}"
    play(url, tmp_path, story)


def test_what_the_graph_refuses_is_given_up_and_tried_again_when_somebody_says_so(url: str, tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        rng = np.random.default_rng(3)
        centre = around(rng, np.zeros(DIMENSION), 1)
        code = await parts.collection()
        rows = await parts.write(code, **{f"d{number}": around(rng, centre, 0.05) for number in range(12)})
        bad = rows["d7"]

        def refuse(change: Change) -> None:
            if any(node.id == bad for node in change.documents):
                raise GraphRefused("it is too strange")

        parts.graph.before = refuse
        async with parts.running():
            async with asyncio.timeout(30):
                while not await parts.store.failures(None, 10):
                    await asyncio.sleep(0.02)
            [failure] = await parts.store.failures(None, 10)
            assert (failure.doc_id, failure.attempts, failure.error) == ("d7", MAX_ATTEMPTS, "it is too strange")
            [document] = await parts.store.get(code, ["d7"], EVERYTHING)
            assert document.status == "failed"
            await parts.settled()  # all others are there
            assert {row for row, one in parts.held().items() if one.node is not None} == set(rows.values()) - {bad}
            assert 'status="failed"' in _metrics(parts)
            parts.graph.before = lambda _: None
            assert await parts.store.retry_failed(None) == 1
            parts.engine.project_soon()
            await parts.settled()
            parts.check()

    play(url, tmp_path, story)


def _metrics(parts: Synced) -> str:
    from prometheus_client import generate_latest

    return generate_latest(parts.registry).decode()


def test_a_graph_that_is_away_keeps_nobody_waiting_and_is_told_when_it_is_back(tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        def away(_: Change) -> None:
            raise GraphUnavailable("no route to it")

        parts.graph.before = away
        code = await parts.collection()
        async with parts.running():
            vector = around(np.random.default_rng(1), np.zeros(DIMENSION), 1)
            await parts.write(code, a=vector, b=vector)
            async with asyncio.timeout(30):
                while parts.engine.trouble is None:
                    await asyncio.sleep(0.01)
            assert "no route to it" in parts.engine.trouble
            assert parts.held() == {}
            [document] = await parts.store.get(code, ["a"], EVERYTHING)
            assert (document.status, document.attempts) == ("pending", 0)
            parts.graph.before = lambda _: None
            await parts.settled()
            parts.check()
            assert parts.engine.trouble is None

    play(f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite'}", tmp_path, story)


def test_of_two_replicas_one_syncs_and_the_other_goes_on_where_it_ended(url: str, tmp_path: Path) -> None:
    async def whole() -> None:
        with tricky(tmp_path) as graph:
            async with synced(url, graph, replica="one") as one, synced(url, graph, replica="two") as two:
                two.vectors, two.texts = one.vectors, one.texts
                both = [await one.collection("one", "m"), await one.collection("two", "m")]
                first = asyncio.create_task(one.engine.run())
                await one.engine.leading()
                async with two.running():
                    await _live(one, both, seed=21, steps=10)
                    await one.settled()
                    assert (one.engine.status.leads, two.engine.status.leads) == (True, False)
                    await _live(one, both, seed=22, steps=5)
                    first.cancel()
                    await asyncio.gather(first, return_exceptions=True)
                    await _live(two, both, seed=23, steps=10)
                    await two.settled()
                    assert two.engine.status.leads
                    two.check()

    asyncio.run(whole())


def test_what_is_turned_off_leaves_the_graph_as_it_is_until_it_is_turned_on(tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        code = await parts.collection()
        vector = around(np.random.default_rng(1), np.zeros(DIMENSION), 1)
        await parts.store.set_enabled(False)
        async with parts.running():
            await parts.write(code, a=vector)
            async with asyncio.timeout(30):
                while parts.engine.status.enabled:
                    await asyncio.sleep(0.01)
            assert not parts.engine.status.leads
            assert [one.pending for one in await parts.store.counts()] == [1]
            await parts.store.set_enabled(True)
            await parts.settled()
            parts.check()

    play(f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite'}", tmp_path, story)


def test_work_that_only_the_leader_does_ends_with_its_lease(tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            begun.set()
            try:
                await asyncio.sleep(3_600)
            finally:
                ended.set()

        async with asyncio.timeout(30), parts.running():
            task = asyncio.create_task(parts.engine.while_leading(work))
            await begun.wait()
            assert not ended.is_set()
            await parts.store.set_enabled(False)
            await ended.wait()
            begun.clear()
            await parts.store.set_enabled(True)
            await begun.wait()
            task.cancel()

    play(f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite'}", tmp_path, story)


@pytest.mark.parametrize("deleted", [True, False])
def test_what_comes_again_before_the_graph_has_lost_all_of_it_is_there_whole(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, deleted: bool
) -> None:
    """A document whose end the graph has heard of, but not that it is in the lists of others no more; and a name that
    one has lost, and another is to lose."""
    rng = np.random.default_rng(3)
    centre = around(rng, np.zeros(DIMENSION), 1)

    async def story(parts: Synced) -> None:
        async def step(project: int) -> None:
            while await parts.engine._relate():
                pass
            monkeypatch.setattr("control_plane.nexus.engine.PROJECTED", project)
            while await parts.engine._project() and project > 1:
                pass

        assert await parts.store.take_lease()
        code = await parts.collection()
        near = {f"d{number:02}": (around(rng, centre, 0.1), "see src/a.py") for number in range(24)}
        await parts.write(code, **near)
        await step(500)
        for again in ("d00", "d23"):
            if deleted:
                await parts.delete(code, *near)
            else:
                await parts.write(code, **{name: (vector, "nothing") for name, (vector, _) in near.items()})
            await step(1)
            await parts.write(code, **{again: near[again]})
            await step(500)
            parts.check()
            await parts.write(code, **near)
            await step(500)
            parts.check()

    play(url, tmp_path, story)


def test_everybody_is_told_of_what_the_graph_has(tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        code = await parts.collection()
        async with parts.running():
            await parts.write(code, a=around(np.random.default_rng(1), np.zeros(DIMENSION), 1))
            await parts.settled()
            await parts.delete(code, "a")
            await parts.settled()
        assert [(row.doc_id, row.deleted) for row in parts.told] == [("a", False), ("a", True)]
        assert 'vectorizer_nexus_sync_total{collection="code",status="synced"} 2.0' in _metrics(parts)

    play(f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite'}", tmp_path, story)


def test_outside_is_told_once_of_each_change_and_not_of_lists_that_change_by_it(url: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    centre = around(rng, np.zeros(DIMENSION), 1)

    async def story(parts: Synced) -> None:
        code = await parts.collection()
        async with parts.running():
            for name in ("a", "b", "a"):
                await parts.write(code, **{name: around(rng, centre, 0.1)})
                await parts.settled()
            assert await parts.store.distrust_all() == 2
            parts.engine.project_soon()
            await parts.settled()
        parts.check()
        versions = [row.version for row in parts.told]
        assert [row.doc_id for row in parts.told] == ["a", "b", "a"]
        assert versions == sorted(versions)

    play(url, tmp_path, story)


# --- a graph that somebody changed ------------------------------------------------------------------------------------


def _node(row: int, version: int = 1) -> DocumentNode:
    return DocumentNode(row, "x", "red", "code", "X", "general", "", 1, version)


TAMPERED: dict[str, tuple[Callable[[dict[str, int]], Change], set[str]]] = {
    "a document gone": (lambda at: Change(removed=[at["a"]]), {"document", "pair", "mention"}),
    "a document too many": (lambda at: Change(documents=[_node(99_999)]), {"document"}),
    "another document": (lambda at: Change(documents=[_node(at["a"], 77)]), {"document"}),
    "a pair gone": (lambda at: Change(dissimilar=[(at["a"], at["b"])]), {"pair"}),
    "a pair too many": (lambda at: Change(similar=[Similar(at["a"], at["far"], 0.9)]), {"pair"}),
    "another score": (lambda at: Change(similar=[Similar(at["a"], at["b"], 0.111111)]), {"pair"}),
    "a mention gone": (lambda at: Change(unmentioned=[Mention(at["a"], "path:src/a.py")]), {"mention"}),
    "a mention too many": (lambda at: Change(mentions=[Mention(at["b"], "url:https://x.y")]), {"mention", "entity"}),
    "an entity gone": (lambda at: Change(forgotten=["path:src/a.py"]), {"mention"}),
    "a pair with a stranger": (lambda at: Change(similar=[Similar(at["a"], 99_999, 0.9)]), {"pair", "document"}),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_difference_is_found_told_and_repaired(tmp_path: Path, what: str) -> None:
    change, kinds = TAMPERED[what]

    async def story(parts: Synced) -> None:
        rng = np.random.default_rng(9)
        centre = around(rng, np.zeros(DIMENSION), 1)
        at = await parts.write(
            await parts.collection(),
            a=(around(rng, centre, 0.02), "see src/a.py"),
            b=around(rng, centre, 0.02),
            c=around(rng, centre, 0.02),
            far=np.asarray(-centre, dtype=np.float32),
        )
        async with parts.running():
            await parts.settled()
            parts.check()
            parts.graph.graph.apply(change(at))
            report = await parts.verify()
            assert report.different.keys() == kinds
            assert report.repaired > 0
            assert report.examples
            await parts.settled()
            parts.check()
            assert (await parts.verify()).different == {}
        assert (await parts.store.state()).report is not None

    play(f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite'}", tmp_path, story)


def test_a_rebuilt_graph_is_the_same_again(url: str, tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        both = [await parts.collection("one", "m"), await parts.collection("two", "m")]
        async with parts.running():
            await _live(parts, both, seed=31, steps=15)
            await parts.settled()
            parts.graph.graph.apply(Change(documents=[_node(99_999)], forgotten=["path:src/a.py"]))
            report = await parts.verifier.look("rebuild")
            assert report.repaired >= len(parts.vectors)
            await parts.settled()
            parts.check()

    play(url, tmp_path, story)


def test_a_graph_that_lost_everything_is_noticed_and_told_anew(tmp_path: Path) -> None:
    """As where somebody put an empty server in the place of the one that was told."""

    async def whole() -> None:
        place = f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite'}"
        (tmp_path / "first").mkdir()
        (tmp_path / "second").mkdir()
        vectors, texts = {}, {}
        for folder in ("first", "second"):
            with tricky(tmp_path / folder) as graph:
                async with synced(place, graph) as parts:
                    parts.vectors, parts.texts = vectors, texts
                    code = await parts.collection()
                    async with parts.running():
                        if folder == "first":
                            await _live(parts, [code], seed=41, steps=10)
                        else:
                            await parts.write(code, new=around(np.random.default_rng(4), np.zeros(DIMENSION), 1))
                        await parts.settled()
                        parts.check()

    asyncio.run(whole())


def test_looks_are_had_after_the_start_and_when_they_are_asked_for(tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        code = await parts.collection()
        async with asyncio.timeout(30), parts.running():
            await parts.write(code, a=around(np.random.default_rng(1), np.zeros(DIMENSION), 1))
            await parts.settled()
            looking = asyncio.create_task(parts.verifier.run())
            while (await parts.store.state()).report is None:
                await asyncio.sleep(0.05)
            first = (await parts.store.state()).verified_at
            assert await parts.store.ask("rebuild")
            assert not await parts.store.ask("verify")
            while '"rebuild"' not in str((await parts.store.state()).report):
                await asyncio.sleep(0.05)
            state = await parts.store.state()
            assert (state.asked, state.progress) == (None, None)
            assert first is not None
            assert (state.verified_at or 0) >= first
            await parts.settled()
            parts.check()
            looking.cancel()

    play(f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite'}", tmp_path, story)


def test_a_look_at_a_graph_that_does_not_answer_says_so(tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        code = await parts.collection()
        async with parts.running():
            await parts.write(code, a=around(np.random.default_rng(1), np.zeros(DIMENSION), 1))
            await parts.settled()

        def gone(_: object) -> dict[int, object]:
            raise GraphUnavailable("it is being restarted")

        parts.graph.read = gone  # type: ignore[method-assign,assignment]
        assert await parts.store.take_lease()
        report = await parts.verify()
        assert report.error == "it is being restarted"
        assert '"error":"it is being restarted"' in str((await parts.store.state()).report)

    play(f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite'}", tmp_path, story)


def test_what_nobody_foresaw_is_told_and_ends_neither_the_sync_nor_the_looks(tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        def odd(_: object) -> dict[int, object]:
            raise TypeError("nobody foresaw this")

        async def reported(said: str) -> None:
            await parts.store.ask("verify")
            while said not in str((await parts.store.state()).report):
                await asyncio.sleep(0.05)

        code = await parts.collection()
        parts.graph.before = odd
        async with asyncio.timeout(60), parts.running():
            await parts.write(code, a=around(np.random.default_rng(1), np.zeros(DIMENSION), 1))
            while parts.engine.trouble is None:
                await asyncio.sleep(0.01)
            assert "TypeError" in parts.engine.trouble
            parts.graph.before = lambda _: None
            await parts.settled()
            parts.check()
            assert parts.engine.trouble is None
            assert parts.registry.get_sample_value("vectorizer_nexus_errors_total", {"code": "INTERNAL"})
            read, verified = parts.graph.read, parts.store.put_verified
            told = asyncio.Event()

            async def unheard(*_: object) -> None:
                told.set()
                raise TypeError("nor this")

            async with meanwhile(parts.verifier.run()):
                parts.graph.read = odd  # type: ignore[method-assign,assignment]
                await reported("TypeError")
                parts.graph.read = read  # type: ignore[method-assign]
                parts.store.put_verified = unheard  # type: ignore[method-assign]
                await parts.store.ask("verify")
                await told.wait()
                parts.store.put_verified = verified  # type: ignore[method-assign]
                await reported('"error":null')
        assert not parts.engine.status.leads

    play(f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite'}", tmp_path, story)


def test_a_graph_that_is_made_empty_is_empty_before_another_replica_may_lead(tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        begun, released = asyncio.Event(), threading.Event()
        early: list[bool] = []
        loop, clear, release = asyncio.get_running_loop(), parts.graph.clear, parts.store.release_lease

        def slow() -> None:
            loop.call_soon_threadsafe(begun.set)
            early.append(released.wait(0.5))
            clear()

        async def releasing() -> None:
            released.set()
            await release()

        await parts.write(await parts.collection(), a=around(np.random.default_rng(1), np.zeros(DIMENSION), 1))
        async with parts.running():
            await parts.settled()
            await parts.verify()
            assert await parts.store.ask("rebuild")
        parts.graph.clear = slow  # type: ignore[method-assign]
        parts.store.release_lease = releasing  # type: ignore[method-assign]
        both = [asyncio.create_task(parts.engine.run()), asyncio.create_task(parts.verifier.run())]
        async with asyncio.timeout(30):
            await begun.wait()
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        assert (early, released.is_set(), parts.held()) == ([False], True, {})

    play(f"sqlite+aiosqlite:///{tmp_path / 'x.sqlite'}", tmp_path, story)
