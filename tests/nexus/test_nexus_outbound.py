"""What changed is told outside: in order, signed, again where that may help, and never silently not."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
from clocks import Ahead
from nexus.back_channel import NOW, SECRET, Clock, House, Receiver, house, receiver, relationship, say, seed
from nexus.told_server import Seen
from processes import free_port
from sqlalchemy import text
from structlog.testing import capture_logs

from control_plane.nexus.backstore import OutboundCounts, OwnEvent, RelationshipChange
from control_plane.nexus.outbound import AGAIN_SECONDS, BATCH, MAX_ANSWER, TIMEOUT_SECONDS, Outbound
from control_plane.nexus.tables import outbound


class Post(NamedTuple):
    """A sender, its store, and who is told."""

    house: House
    sender: Outbound
    receiver: Receiver
    clock: Clock

    async def announce(self, count: int) -> None:
        """Write events of versions 1, 2, …"""
        await self.house.store.announce([OwnEvent("k", "red", n + 1, {}) for n in range(count)], NOW)

    @property
    def versions(self) -> list[int]:
        """Of the events that came."""
        return [one.body["version"] for one in self.receiver.arrived]

    async def left(self) -> list[tuple[int, float, bool]]:
        """Attempts, seconds until the next one, and whether it was given up, of each event that is left."""
        rows = await self.house.rows(outbound)
        return [(row["attempts"], max(0.0, (row["next_at"] - self.clock.now) / 1000), row["dead"]) for row in rows]

    def outcomes(self, outcome: str) -> float:
        return self.house.figure("outbound_total", outcome=outcome)


@asynccontextmanager
async def _post(url: str, *, to: str | None = None) -> AsyncIterator[Post]:
    clock = Clock()
    with receiver() as known:
        async with house(url) as made, httpx.AsyncClient(trust_env=False, follow_redirects=True) as client:
            sender = Outbound(made.store, to or f"{known.url}/events", SECRET, made.metrics, client, clock=clock)
            yield Post(made, sender, known, clock)


@asynccontextmanager
async def _sending(sender: Outbound) -> AsyncIterator[None]:
    """A sender that runs, and has ended afterwards."""
    task = asyncio.create_task(sender.run())
    try:
        yield
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.fixture
def file_url(tmp_path: Path) -> str:
    """An empty database in a file."""
    return f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, file_url: str) -> str:
    """An empty database of either kind."""
    return file_url if request.param == "sqlite" else str(request.getfixturevalue("postgres_url"))


def _run(url: str, scenario: Callable[[Post], Awaitable[None]], *, to: str | None = None) -> None:
    async def inside() -> None:
        async with _post(url, to=to) as post:
            await scenario(post)

    asyncio.run(inside())


def test_events_are_sent_in_order_and_gone_once_they_were_taken(url: str) -> None:
    async def scenario(post: Post) -> None:
        await post.announce(BATCH + 2)
        assert await post.sender.deliver() == BATCH
        assert await post.sender.deliver() == 2
        assert await post.sender.deliver() == 0
        assert post.versions == list(range(1, BATCH + 3))
        assert await post.left() == []
        assert post.outcomes("sent") == BATCH + 2

    _run(url, scenario)


def test_an_event_is_signed_as_webhooks_are(file_url: str) -> None:
    async def scenario(post: Post) -> None:
        await post.announce(2)
        await post.sender.deliver()
        seen = set()
        for one in post.receiver.arrived:
            timestamp, nonce = one.headers["x-nexus-timestamp"], one.headers["x-nexus-nonce"]
            message = f"{timestamp}.{nonce}.".encode() + one.raw
            made = hmac.new(SECRET.encode(), message, hashlib.sha256).hexdigest()
            assert one.headers["x-nexus-signature"] == f"sha256={made}"
            assert timestamp == str(NOW // 1000)
            assert re.fullmatch("[A-Za-z0-9_-]{8,64}", nonce)
            assert one.headers["content-type"] == "application/json"
            seen.add(nonce)
        assert len(seen) == 2

    _run(file_url, scenario)


def test_a_change_that_a_graph_made_is_sent_at_once_with_its_origin(file_url: str) -> None:
    async def scenario(post: Post) -> None:
        await seed(post.house, ["a", "b"])
        async with _sending(post.sender):
            for version in (1, 2):
                change = relationship(version=version)
                taken = msgspec.convert(change, RelationshipChange)
                await post.house.store.take(taken, nonce=f"nonce-{version}", now=NOW)
                await post.receiver.wait(1)
                del change["action"]
                assert post.receiver.arrived[-1].body == {**change, "kind": "relationship.upsert"}

    _run(file_url, scenario)


def test_what_another_replica_wrote_is_found(url: str) -> None:
    async def scenario(post: Post) -> None:
        async with _sending(post.sender), house(url) as other:
            await other.store.announce([OwnEvent("k", "red", 1, {})], NOW)
            await post.receiver.wait(1)
        assert post.versions == [1]

    _run(url, scenario)


def test_what_concerns_one_event_and_may_pass_keeps_no_other_one(file_url: str) -> None:
    statuses = [500, 501, 599, 408, 425]

    async def scenario(post: Post) -> None:
        await post.announce(len(statuses) + 1)
        post.receiver.status(*statuses)
        assert await post.sender.deliver() == len(statuses) + 1
        assert await post.left() == [(1, 1, False)] * len(statuses)
        assert [row["error"] for row in await post.house.rows(outbound)] == [f"answered {one}" for one in statuses]

    _run(file_url, scenario)


def test_an_event_that_may_pass_later_is_tried_eight_times_and_then_kept(url: str) -> None:
    async def scenario(post: Post) -> None:
        await post.announce(2)
        for attempts, pause in enumerate((1, 2, 4, 8, 16, 32, 60), 1):
            post.receiver.status(500)
            assert await post.sender.deliver() == (2 if attempts == 1 else 1)  # the other one does not wait for it
            assert await post.left() == [(attempts, pause, False)]
            post.clock.now += 1_000 * pause - 1
            assert await post.sender.deliver() == 0
            post.clock.now += 1
        post.receiver.status(500)
        assert await post.sender.deliver() == 1
        assert await post.left() == [(8, 0, True)]
        post.clock.now += 10**9
        assert await post.sender.deliver() == 0
        assert post.versions == [1, 2] + [1] * 7
        assert len({one.headers["x-nexus-nonce"] for one in post.receiver.arrived}) == 9
        assert len({one.headers["x-nexus-timestamp"] for one in post.receiver.arrived}) == 8
        [dead] = await post.house.store.dead_letters(0, 10)
        assert dead.error == "answered 500"
        assert (post.outcomes("retried"), post.outcomes("dead"), post.outcomes("sent")) == (7, 1, 1)
        assert await post.house.store.retry_dead() == 1
        assert await post.sender.deliver() == 1
        assert await post.left() == []

    _run(url, scenario)


def test_an_event_that_is_refused_is_given_up_at_once(file_url: str) -> None:
    statuses = [400, 401, 403, 404, 409, 410, 413, 422, 301, 302, 307, 308, 304]

    async def scenario(post: Post) -> None:
        await post.announce(len(statuses) + 1)
        post.receiver.status(*statuses, location=f"{post.receiver.url}/elsewhere", retry_after="5")
        assert await post.sender.deliver() == len(statuses) + 1
        assert post.versions == list(range(1, len(statuses) + 2))  # each once, and nobody went elsewhere
        dead = await post.house.store.dead_letters(0, 100)
        assert [(one.error, one.attempts) for one in dead] == [(f"answered {status}", 1) for status in statuses]
        assert (post.outcomes("dead"), post.outcomes("sent")) == (len(statuses), 1)

    _run(file_url, scenario)


def test_every_success_takes_an_event(file_url: str) -> None:
    async def scenario(post: Post) -> None:
        await post.announce(4)
        post.receiver.status(200, 201, 202, 204)
        assert await post.sender.deliver() == 4
        assert await post.left() == []

    _run(file_url, scenario)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_nothing_is_sent_to_a_receiver_that_is_overloaded(file_url: str, status: int) -> None:
    async def scenario(post: Post) -> None:
        await post.announce(3)
        post.receiver.status(status, status)
        assert await post.sender.deliver() == 1
        assert await post.left() == [(1, 1, False), (0, 0, False), (0, 0, False)]
        post.clock.now += 999
        assert await post.sender.deliver() == 0
        post.clock.now += 1
        assert await post.sender.deliver() == 1
        assert await post.left() == [(2, 2, False), (0, 0, False), (0, 0, False)]
        post.clock.now += 2_000
        assert await post.sender.deliver() == 3
        assert post.versions == [1, 1, 1, 2, 3]

    _run(file_url, scenario)


ASKED: list[tuple[str | int, int]] = [
    ("7", 7),
    ("0", 1),
    ("100000", 3_600),
    ("9" * 5_000, 3_600),
    (20, 20),
    (-20, 1),
    (10**7, 3_600),
    ("soon", 1),
    ("-5", 1),
    ("Fri, 99 Jan 99999 00:00:00 GMT", 1),
]
"""What a receiver asks for, a number being a date so many seconds ahead; and the seconds that are waited then."""


def test_the_time_that_a_receiver_asks_for_is_kept(file_url: str) -> None:
    async def scenario(post: Post) -> None:
        for asked, pause in ASKED:
            wish = asked if isinstance(asked, str) else formatdate(post.clock.now / 1000 + asked, usegmt=True)
            await post.announce(1)
            post.receiver.status(503, retry_after=wish)
            assert await post.sender.deliver() == 1
            assert await post.left() == [(1, pause, False)], asked
            await post.announce(1)
            post.clock.now += 1_000 * pause - 1
            assert await post.sender.deliver() == 0
            post.clock.now += 1
            assert await post.sender.deliver() == 2

    _run(file_url, scenario)


def test_a_clock_that_goes_back_silences_nothing(file_url: str) -> None:
    async def scenario(post: Post) -> None:
        await post.announce(1)
        post.receiver.status(429, retry_after="3600")
        assert await post.sender.deliver() == 1
        post.clock.now -= 1
        assert await post.sender.deliver() == 1
        assert await post.left() == []

    _run(file_url, scenario)


def _hangs_up(handler: BaseHTTPRequestHandler, _: Seen) -> None:
    handler.close_connection = True


def _speaks_another_language(handler: BaseHTTPRequestHandler, _: Seen) -> None:
    handler.wfile.write(b"220 mail.example ESMTP\\r\\n")
    handler.close_connection = True


def _is_cut(handler: BaseHTTPRequestHandler, _: Seen) -> None:
    handler.send_response_only(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.close_connection = True


@pytest.mark.parametrize("answer", [_hangs_up, _speaks_another_language, _is_cut])
def test_without_an_answer_an_event_is_sent_again(file_url: str, answer: Any) -> None:
    async def scenario(post: Post) -> None:
        await post.announce(2)
        post.receiver.answers.append(answer)
        assert await post.sender.deliver() == 1
        assert await post.left() == [(1, 1, False), (0, 0, False)]
        assert "no answer" in (await post.house.rows(outbound))[0]["error"]
        post.clock.now += 1_000
        assert await post.sender.deliver() == 2
        assert post.versions == [1, 1, 2]

    _run(file_url, scenario)


def test_nobody_listens(file_url: str) -> None:
    async def scenario(post: Post) -> None:
        await post.announce(1)
        assert await post.sender.deliver() == 1
        assert await post.left() == [(1, 1, False)]
        assert (await post.house.rows(outbound))[0]["error"] == "no answer: ConnectError"

    _run(file_url, scenario, to=f"http://127.0.0.1:{free_port()}/events")


@pytest.mark.parametrize("begun", [False, True])
def test_an_answer_that_does_not_come_is_not_waited_for(file_url: str, begun: bool) -> None:
    loop = Ahead()

    async def inside() -> None:
        async with _post(file_url) as post:
            came, ended = asyncio.Event(), threading.Event()

            def dribbles(handler: BaseHTTPRequestHandler, _: Seen) -> None:
                if begun:
                    handler.send_response_only(200)
                    handler.send_header("Content-Length", "100")
                    handler.end_headers()
                    handler.wfile.write(b"x")
                loop.call_soon_threadsafe(came.set)
                ended.wait(30)
                handler.close_connection = True

            await post.announce(2)
            post.receiver.answers.append(dribbles)
            try:
                delivery = asyncio.create_task(post.sender.deliver())
                await came.wait()
                loop.seconds += TIMEOUT_SECONDS + 1
                assert await delivery == 1
            finally:
                ended.set()
            assert await post.left() == [(1, 1, False), (0, 0, False)]

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(inside())


def test_an_answer_without_end_is_not_read_to_its_end(file_url: str) -> None:
    async def scenario(post: Post) -> None:
        await post.announce(2)
        post.receiver.answers.append(lambda handler, _: say(handler, 200, b"x" * (MAX_ANSWER * 100)))
        assert await post.sender.deliver() == 2
        assert await post.left() == []

    _run(file_url, scenario)


def test_the_secret_and_the_address_are_in_no_log_and_no_error(file_url: str) -> None:
    async def scenario(post: Post) -> None:
        await post.announce(3)
        post.receiver.status(500, 400)
        with capture_logs() as logs:
            await post.sender.deliver()
        assert [(entry["log_level"], entry["given_up"]) for entry in logs] == [("warning", False), ("error", True)]
        said = f"{logs} {await post.house.rows(outbound)} {vars(post.sender)['_signer']}"
        assert SECRET not in said
        assert "hidden-in-the-address" not in said

    async def inside() -> None:
        async with _post(file_url) as post, httpx.AsyncClient(trust_env=False) as client:
            address = f"{post.receiver.url}/hidden-in-the-address"
            made = post.house
            sender = Outbound(made.store, address, SECRET, made.metrics, client, clock=post.clock)
            await scenario(post._replace(sender=sender))

    asyncio.run(inside())


def test_a_database_that_is_away_is_waited_for(file_url: str) -> None:
    loop = Ahead()

    async def inside() -> None:
        async with _post(file_url) as post:
            await post.announce(1)
            async with post.house.database.write.begin() as connection:
                await connection.execute(text("ALTER TABLE outbound RENAME TO away"))
            with capture_logs() as logs:
                async with _sending(post.sender):
                    while not logs:
                        await asyncio.sleep(0)
                    assert logs[0]["event"] == "events wait for the database"
                    async with post.house.database.write.begin() as connection:
                        await connection.execute(text("ALTER TABLE away RENAME TO outbound"))
                    loop.seconds += AGAIN_SECONDS
                    await post.receiver.wait(1)
            assert post.versions == [1]

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(inside())


def test_events_of_a_sender_that_was_ended_are_sent_by_the_next(url: str) -> None:
    async def scenario(post: Post) -> None:
        await post.announce(BATCH * 3)
        begun, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def waits(handler: BaseHTTPRequestHandler, _: Seen) -> None:
            loop.call_soon_threadsafe(begun.set)
            go_on.wait(30)
            say(handler, 204)

        def takes(handler: BaseHTTPRequestHandler, _: Seen) -> None:
            say(handler, 204)

        post.receiver.answers += [takes] * (BATCH + 3) + [waits]
        async with _sending(post.sender):
            await begun.wait()
        go_on.set()
        assert await post.house.store.outbound_counts() == OutboundCounts(2 * BATCH, 0)
        while await post.sender.deliver():
            pass
        assert set(post.versions) == set(range(1, 3 * BATCH + 1))
        assert len(post.versions) == 3 * BATCH + 4  # those of the batch that was cut came twice
        assert await post.left() == []

    _run(url, scenario)
