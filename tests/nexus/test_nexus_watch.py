"""How far the graph is behind is known within seconds: for figures, and for who writes too fast."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from nexus.rows import url
from nexus.synced import DIMENSION, WAIT_SECONDS, Synced, around, play
from sqlalchemy import text

from control_plane.errors import QuotaReached
from control_plane.jobs.store import now_ms
from control_plane.nexus.backstore import BackStore, OwnEvent, Unsent
from control_plane.nexus.graph.port import Change, GraphUnavailable
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.overview import LookReport
from control_plane.nexus.pace import Pace
from control_plane.nexus.records import MAX_ATTEMPTS, Backlog
from control_plane.nexus.watch import Watch
from control_plane.operations.metrics import Metrics

__all__ = ["url"]

SAME = around(np.random.default_rng(1), np.zeros(DIMENSION), 1)


class Watched:
    """A watch, and what it tells."""

    def __init__(self, parts: Synced) -> None:
        self.metrics = Metrics()
        figures = NexusMetrics(self.metrics.registry)
        self.events = BackStore(parts.database, figures, sends=True)
        self.pace = Pace(self.metrics, per_minute=1_000, max_pending=3)
        self.watch = Watch(parts.store, self.events, parts.engine, self.pace, figures)

    def told(self, name: str, **labels: str) -> float:
        found = self.metrics.registry.get_sample_value(f"vectorizer_nexus_{name}", labels)
        assert found is not None
        return found

    def waits(self, client: str) -> bool:
        try:
            self.pace.check(client)
        except QuotaReached:
            return True
        return False


async def until(right: Callable[[], bool]) -> None:
    """Wait for something that comes soon."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not right():
            await asyncio.sleep(0.01)


def test_what_waits_is_told_and_keeps_its_writer_from_going_on(url: str, tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        found, begun = Watched(parts), now_ms()
        one, two = await parts.collection("one"), await parts.collection("two")
        rows = await parts.write(one, a=SAME, b=SAME)
        await parts.write(two, c=SAME)
        await parts.write(await parts.collection("one", client="blue"), a=SAME)
        await found.watch.look()
        assert (found.told("queue_depth"), found.told("given_up"), found.told("trouble")) == (4, 0, 0)
        assert 0 <= found.told("oldest_pending_seconds") <= (now_ms() - begun) / 1_000
        assert (found.waits("red"), found.waits("blue")) == (True, False)
        behind = await parts.store.backlogs()
        assert {client: (of.pending, of.written) for client, of in behind.items()} == {"red": (3, 3), "blue": (1, 1)}
        async with parts.running():
            await parts.settled()
        await found.watch.look()
        assert (found.told("queue_depth"), found.told("oldest_pending_seconds"), found.waits("red")) == (0, 0, False)
        assert await parts.store.backlogs() == {}
        # What is told anew is no fault of its writer.
        await parts.store.distrust_all()
        await found.watch.look()
        assert (found.told("queue_depth"), found.waits("red")) == (4, False)
        # What was given up does not wait.
        assert await parts.store.take_lease()
        for _ in range(MAX_ATTEMPTS):
            await parts.store.put_failed([rows["a"]], "no", 0)
        await found.watch.look()
        assert (found.told("queue_depth"), found.told("given_up")) == (3, 1)
        red = (await parts.store.backlogs())["red"]
        assert red == Backlog(pending=2, failed=1, pending_since=red.pending_since, written=0)
        assert begun <= (red.pending_since or 0) <= now_ms()

    play(url, tmp_path, story)


def test_what_a_look_found_and_what_was_not_sent_are_told_by_every_replica(url: str, tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        found = Watched(parts)
        await found.watch.look()
        assert [found.told("differences"), *(found.told("events", state=s) for s in ("waiting", "dead"))] == [0, 0, 0]
        report = LookReport(kind="verify", started_at=7, different={"pair": 2, "document": 1})
        await parts.store.put_verified(7, msgspec.json.encode(report).decode())
        await found.events.announce([OwnEvent("document.synced", "red", version, {}) for version in range(3)], now_ms())
        [lost] = await found.events.due(now_ms(), 1)
        await found.events.settle([], [Unsent(lost.id, 8, "nobody is there", None)])
        await found.watch.look()
        assert [found.told("differences"), *(found.told("events", state=s) for s in ("waiting", "dead"))] == [3, 2, 1]

    play(url, tmp_path, story)


def test_a_graph_that_is_away_is_told_by_the_replica_that_syncs(tmp_path: Path) -> None:
    async def story(parts: Synced) -> None:
        def away(_: Change) -> None:
            raise GraphUnavailable("nobody answers")

        found, parts.graph.before = Watched(parts), away
        await parts.write(await parts.collection(), a=SAME)
        async with parts.running():
            await until(lambda: parts.engine.trouble is not None)
            await found.watch.look()
            assert found.told("trouble") == 1
            parts.graph.before = lambda _: None
            await parts.settled()
            await found.watch.look()
            assert (found.told("trouble"), found.told("queue_depth")) == (0, 0)

    play(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}", tmp_path, story)


def test_figures_that_nobody_knows_are_no_numbers(tmp_path: Path) -> None:
    names = ("queue_depth", "oldest_pending_seconds", "given_up", "differences")

    async def story(parts: Synced) -> None:
        found = Watched(parts)

        async def call(statement: str) -> None:
            async with parts.database.write.begin() as connection:
                await connection.execute(text(statement))

        await parts.write(await parts.collection(), a=SAME)
        await call("ALTER TABLE outbound RENAME TO away")
        watching = asyncio.create_task(found.watch.run())
        await until(lambda: all(math.isnan(found.told(name)) for name in names))
        assert math.isnan(found.told("events", state="dead"))
        await call("ALTER TABLE away RENAME TO outbound")
        await until(lambda: not any(math.isnan(found.told(name)) for name in names))
        assert (found.told("queue_depth"), found.told("events", state="dead")) == (1, 0)
        watching.cancel()

    play(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}", tmp_path, story)
