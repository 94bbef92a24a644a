"""What a graph tells is taken where it is signed, in time and new; everything else is refused, and leaves no trace."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import httpx
import pytest
from clocks import Ahead
from nexus.back_channel import NOW, SECRET, Clock, House, house, node, relationship, seed, served
from sqlalchemy import text

from control_plane.jobs.audit import AuditEntry
from control_plane.nexus.records import Viewer
from control_plane.nexus.tables import node_changes, outbound, relations, webhook_nonces
from control_plane.nexus.webhooks import BODY_SECONDS, MAX_BODIES, MAX_BODY, PER_MINUTE, webhook_routes
from control_plane.operations.auth import OPEN

TRACES = (relations, node_changes, webhook_nonces, outbound)
RELATIONSHIP, NODE = "/webhooks/nexus/relationship", "/webhooks/nexus/node"


def _sealed(
    body: bytes, *, timestamp: str = str(NOW // 1000), nonce: str = "nonce-0001", secret: str = SECRET
) -> dict[str, str]:
    """The headers of a message, as somebody else makes them."""
    made = hmac.new(secret.encode(), timestamp.encode() + b"." + nonce.encode() + b"." + body, hashlib.sha256)
    return {
        "X-Nexus-Timestamp": timestamp,
        "X-Nexus-Nonce": nonce,
        "X-Nexus-Signature": f"sha256={made.hexdigest()}",
    }


class Door(NamedTuple):
    """A server that takes messages, its store, and a client."""

    house: House
    client: httpx.AsyncClient
    clock: Clock
    numbers: list[int]
    notes: list[AuditEntry]

    async def tell(self, path: str, body: dict[str, Any] | bytes, **seal: str) -> httpx.Response:
        """Send a signed message with a nonce of its own."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.numbers.append(0)
        seal = {"nonce": f"nonce-{len(self.numbers):04}", **seal}
        return await self.client.post(path, content=content, headers=_sealed(content, **seal))

    async def traces(self) -> list[int]:
        """How many rows each table has that a message may leave something in."""
        return [await self.house.count(table) for table in TRACES]

    def refused(self, reason: str) -> float:
        return self.house.figure("webhook_refused_total", reason=reason)


@asynccontextmanager
async def _door(url: str, per_minute: int = PER_MINUTE) -> AsyncIterator[Door]:
    clock = Clock()
    async with house(url) as made:
        await seed(made, ["a", "b"])
        notes: list[AuditEntry] = []
        routes = webhook_routes(made.store, SECRET, made.metrics, note=notes.append, clock=clock, per_minute=per_minute)
        async with served(routes) as base, httpx.AsyncClient(base_url=base, trust_env=False, timeout=30) as client:
            yield Door(made, client, clock, [], notes)


class Opened(Protocol):
    """Runs a scenario."""

    def __call__(self, scenario: Callable[[Door], Awaitable[None]], per_minute: int = PER_MINUTE) -> None: ...


@pytest.fixture
def open_door(tmp_path: Path) -> Opened:
    """Run a scenario with a server over an empty database."""

    def run(scenario: Callable[[Door], Awaitable[None]], per_minute: int = PER_MINUTE) -> None:
        async def inside() -> None:
            async with _door(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}", per_minute) as door:
                await scenario(door)

        asyncio.run(inside())

    return run


def _error(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == code
    return error


def test_what_is_told_is_in_the_payload_at_once(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        answer = await door.tell(RELATIONSHIP, relationship())
        assert (answer.status_code, answer.json()) == (200, {"applied": True})
        answer = await door.tell(NODE, node())
        assert (answer.status_code, answer.json()) == (200, {"applied": True})
        found = await door.house.store.graph_payload(range(1, 3), Viewer("red", None))
        assert found[1]["properties"] == node()["properties"]
        assert [one["type"] for one in found[1]["relationships"]] == ["CITES"]
        assert door.house.figure("webhooks_total", route="relationship", outcome="applied") == 1
        assert door.house.figure("webhooks_total", route="node", outcome="applied") == 1
        assert door.house.figure("webhook_seconds_count", route="node") == 1

    open_door(scenario)


def test_what_changes_nothing_says_why(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        await door.tell(RELATIONSHIP, relationship(version=2))
        stale = await door.tell(RELATIONSHIP, relationship(version=1))
        assert (stale.status_code, stale.json()) == (200, {"applied": False, "reason": "stale"})
        own = await door.tell(NODE, node(origin="memvid-export"))
        assert (own.status_code, own.json()) == (200, {"applied": False, "reason": "own"})
        assert door.house.figure("webhooks_total", route="relationship", outcome="stale") == 1
        assert door.house.figure("webhooks_total", route="node", outcome="own") == 1
        assert await door.traces() == [1, 0, 3, 1]

    open_door(scenario)


WRONG_HEADERS = {
    "X-Nexus-Timestamp": ["", "soon", f"-{NOW // 1000}", f"{NOW // 1000}.0", "1" * 13, None],
    "X-Nexus-Nonce": ["", "1234567", "n" * 65, "nonce.0001", "nonce 0001", None],
    "X-Nexus-Signature": ["", "a" * 64, f"sha256={'a' * 63}", f"sha256={'g' * 64}", f"sha1={'a' * 40}", None],
}


def test_headers_of_another_form_are_refused_by_their_name(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        body = json.dumps(relationship()).encode()
        for header, values in WRONG_HEADERS.items():
            for value in values:
                headers = {name: text for name, text in (_sealed(body) | {header: value}).items() if text is not None}
                answer = await door.client.post(RELATIONSHIP, content=body, headers=headers)
                assert _error(answer, 401, "UNAUTHORIZED")["details"]["field"] == header, value
        assert await door.traces() == [0, 0, 0, 0]
        assert door.refused("headers") == 18

    open_door(scenario)


def test_a_forged_message_is_refused_and_leaves_no_trace(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        body = json.dumps(relationship()).encode()
        good = _sealed(body)
        flipped = "0" if good["X-Nexus-Signature"][-1] != "0" else "1"
        forged = [
            (body, _sealed(body, secret="another-secret-of-theirs")),
            (body + b" ", good),
            (body.replace(b"CITES", b"OWNED"), good),
            (body, good | {"X-Nexus-Nonce": "nonce-0002"}),
            (body, good | {"X-Nexus-Timestamp": str(NOW // 1000 + 1)}),
            (body, good | {"X-Nexus-Signature": good["X-Nexus-Signature"][:-1] + flipped}),
            (b"", good),
            (b"{", _sealed(b"", nonce="nonce-0003")),
        ]
        for content, headers in forged:
            answer = await door.client.post(RELATIONSHIP, content=content, headers=headers)
            assert _error(answer, 401, "UNAUTHORIZED")["details"]["field"] == "X-Nexus-Signature"
            assert SECRET not in answer.text
        assert await door.traces() == [0, 0, 0, 0]
        assert door.refused("signature") == len(forged)
        # The nonce of the forged ones is not used, and hex digits may be large.
        large = "sha256=" + good["X-Nexus-Signature"].removeprefix("sha256=").upper()
        answer = await door.client.post(RELATIONSHIP, content=body, headers=good | {"X-Nexus-Signature": large})
        assert answer.json() == {"applied": True}

    open_door(scenario)


def test_a_message_out_of_time_is_refused(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        for seconds in (-301, 301):
            answer = await door.tell(RELATIONSHIP, relationship(), timestamp=str(NOW // 1000 + seconds))
            assert _error(answer, 401, "UNAUTHORIZED")["details"]["field"] == "X-Nexus-Timestamp"
        assert await door.traces() == [0, 0, 0, 0]
        assert door.refused("window") == 2
        for version, seconds in enumerate((-300, 300), 1):
            answer = await door.tell(RELATIONSHIP, relationship(version=version), timestamp=str(NOW // 1000 + seconds))
            assert answer.json() == {"applied": True}

    open_door(scenario)


def test_a_message_counts_once(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        for path, body, status in (
            (RELATIONSHIP, relationship(), 200),
            (NODE, node(document={"collection": "books", "id": "nobody"}), 404),
        ):
            first = await door.tell(path, body, nonce=f"nonce-of-{status}")
            assert first.status_code == status
            before = await door.traces()
            again = await door.tell(path, body, nonce=f"nonce-of-{status}")
            assert _error(again, 401, "UNAUTHORIZED")["details"]["field"] == "X-Nexus-Nonce"
            assert await door.traces() == before
        assert door.refused("replayed") == 2

    open_door(scenario)


def test_a_nonce_is_known_for_as_long_as_its_message_would_be_in_time(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        ahead = str(NOW // 1000 + 300)
        assert (await door.tell(RELATIONSHIP, relationship(), nonce="of-the-future", timestamp=ahead)).json()["applied"]
        door.clock.now = NOW + 600_000
        await door.house.store.sweep(door.clock.now)
        replayed = await door.tell(RELATIONSHIP, relationship(version=2), nonce="of-the-future", timestamp=ahead)
        assert _error(replayed, 401, "UNAUTHORIZED")["details"]["field"] == "X-Nexus-Nonce"

    open_door(scenario)


def _wrong_bodies() -> list[tuple[str, str, dict[str, Any] | bytes]]:
    """Path, the field that is named, and the body."""
    found: list[tuple[str, str, dict[str, Any] | bytes]] = [
        (RELATIONSHIP, "$", b""),
        (RELATIONSHIP, "$", b"{"),
        (RELATIONSHIP, "$", b"[]"),
        (RELATIONSHIP, "$", b"\xff"),
        (RELATIONSHIP, "$", b"[" * 100_000),
        (RELATIONSHIP, "document", relationship(document={"collection": "books", "id": "a"})),
        (NODE, "type", node(type="CITES")),
        (NODE, "x" * 100, node(**{"x" * 500: 1})),
        (NODE, "$", node(**{"x - at `$.q": 1})),
        (NODE, "x", node(**{"x` - at `$.q": 1})),
        (NODE, "document.x", node(document={"collection": "books", "id": "a", "x": 1})),
        (NODE, "document.id", node(document={"collection": "books"})),
        (NODE, "document", node(document="books/a")),
    ]
    for field in ("eventId", "origin", "version", "action", "client", "source", "target", "type"):
        body = relationship()
        del body[field]
        found.append((RELATIONSHIP, field, body))
    name = ["", "n" * 65, "a b", "ä", "a/b", "a\n", None, 1]
    wrong: dict[str, list[Any]] = {
        "eventId": ["", "e" * 129, "a b", "ä", 7],
        "origin": name,
        "client": name,
        "version": [0, -1, 2**53, 1.5, "1", None, True],
        "action": ["insert", "", None],
        "source": [None, [], "a"],
        "type": ["", "cites", "1A", "_A", "A" * 65, "A-B", "A\n", "SIMILAR_TO", "MENTIONS", None],
        "properties": [
            None,
            [],
            {"": 1},
            {"n" * 129: 1},
            {"a\nb": 1},
            {str(n): 1 for n in range(65)},
            {"a": {}},
            {"a": [[]]},
            {"a": [{}]},
            {str(n): ["ä" * 1000] for n in range(64)},
        ],
    }
    found += [
        (RELATIONSHIP, field, relationship(**{field: value})) for field, values in wrong.items() for value in values
    ]
    for value in ("t" * 4097, 2**53, -(2**53), [1] * 65, ["t" * 4097], [2**53], 10**40):
        found.append((NODE, "properties.it", node(properties={"good": 1, "it": value})))
    for collection in ("", "c" * 129, "a/b", "a b", None):
        found.append((RELATIONSHIP, "source.collection", relationship(source={"collection": collection, "id": "a"})))
    for doc_id in ("", "i" * 257, "a\0b", "a\nb", 1):
        found.append((RELATIONSHIP, "target.id", relationship(target={"collection": "books", "id": doc_id})))
    return found


def test_every_wrong_body_is_refused_by_the_name_of_the_field(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        bodies = _wrong_bodies()
        for path, field, body in bodies:
            error = _error(await door.tell(path, body), 400, "INVALID_EXPORT_REQUEST")
            assert error["details"]["field"] == field, (body, error)
            assert error["details"]["allowed"]
            assert error["message"].startswith("The body: must be" if field == "$" else f"{field}: ")
        assert await door.traces() == [0, 0, 0, 0]
        assert door.refused("invalid") == len(bodies)

    open_door(scenario)


def test_whatever_is_within_the_bounds_is_taken(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        values = ["t" * 4096, 2**53 - 1, -(2**53) + 1, 1.5, True, False, None, [], [1, "a", None, 0.5, True] * 12]
        bodies = [
            relationship(eventId="e" * 128, origin="o" * 64, version=2**53 - 1),
            relationship(origin="A.b_c-9", type="A" * 64),
            relationship(type="C_3"),
            relationship(eventId="a:b.c-d_9", type="T", properties={}),
            relationship(type="U", properties={str(n): value for n, value in enumerate(values)} | {"ä" * 128: "\0"}),
            {name: value for name, value in relationship(type="V").items() if name != "properties"},
        ]
        for body in bodies:
            assert (await door.tell(RELATIONSHIP, body)).json() == {"applied": True}, body
        kept = {row["type"]: json.loads(row["properties"]) for row in await door.house.rows(relations)}
        assert kept["U"] == bodies[4]["properties"]
        assert kept["V"] == {}

    open_door(scenario)


def test_documents_that_are_not_there_are_named(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        other = {"collection": "books", "id": "nobody"}
        for path, field, body in (
            (RELATIONSHIP, "source", relationship(source=other)),
            (RELATIONSHIP, "target", relationship(target=other)),
            (NODE, "document", node(document=other)),
            (NODE, "document", node(client="blue")),
        ):
            assert _error(await door.tell(path, body), 404, "DOCUMENT_NOT_FOUND")["details"] == {"field": field}
        assert door.refused("unknown") == 4

    open_door(scenario)


def test_a_document_with_too_many_relationships_is_named(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        row = {"source": 1, "target": 2, "properties": "{}", "origin": "g", "version": 1, "updated_at": 1}
        await door.house.put(relations, [{**row, "type": f"T{n}", "deleted": False} for n in range(10_000)])
        answer = await door.tell(RELATIONSHIP, relationship())
        assert _error(answer, 400, "INVALID_EXPORT_REQUEST")["details"] == {"field": "source", "allowed": 10_000}
        assert door.refused("full") == 1

    open_door(scenario)


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        async def pieces(body: bytes) -> AsyncIterator[bytes]:
            for start in range(0, len(body), 65_536):
                yield body[start : start + 65_536]

        fitting = json.dumps(relationship()).encode().ljust(MAX_BODY)
        assert (await door.tell(RELATIONSHIP, fitting)).json() == {"applied": True}
        large = json.dumps(relationship(version=2)).encode().ljust(MAX_BODY + 1)
        assert _error(await door.tell(RELATIONSHIP, large), 413, "PAYLOAD_TOO_LARGE")["details"]["limit"] == MAX_BODY
        headers = _sealed(large, nonce="nonce-chunked")
        answer = await door.client.post(RELATIONSHIP, content=pieces(large), headers=headers)
        _error(answer, 413, "PAYLOAD_TOO_LARGE")
        assert door.refused("size") == 2
        assert await door.traces() == [1, 0, 1, 1]

    open_door(scenario)


async def _slow(door: Door, number: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A signed message whose last byte does not come."""
    body = json.dumps(node()).encode()
    lines = [f"POST {NODE} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in _sealed(body, nonce=f"nonce-slow-{number}").items()]
    reader, writer = await asyncio.open_connection(door.client.base_url.host, door.client.base_url.port)
    writer.write("\r\n".join([*lines, "", ""]).encode() + body[:-1])
    await writer.drain()
    return reader, writer


def test_bodies_that_do_not_come_take_all_places_for_some_seconds_at_most(tmp_path: Path) -> None:
    loop = Ahead()

    async def inside() -> None:
        async with _door(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}") as door:
            slow = [await _slow(door, number) for number in range(MAX_BODIES)]
            for version in range(1, 1_000):  # until the server has begun with all of them
                answer = await door.tell(NODE, node(version=version))
                if answer.status_code != 200:
                    break
            error = _error(answer, 429, "RATE_LIMITED")
            assert error["message"].startswith("64 messages are on their way")
            assert answer.headers["retry-after"] == "5"
            assert door.refused("busy") == 1
            loop.seconds += BODY_SECONDS + 1
            for reader, writer in slow:
                given_up = await reader.read()
                assert given_up.startswith(b"HTTP/1.1 400 ")
                assert b"10 seconds" in given_up
                writer.close()
                await writer.wait_closed()
            assert door.refused("body") == MAX_BODIES
            assert (await door.tell(NODE, node(version=2_000))).json() == {"applied": True}
            nonces = {row["nonce"] for row in await door.house.rows(webhook_nonces)}
            assert not {nonce for nonce in nonces if "slow" in nonce}

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(inside())


def test_a_sender_that_goes_away_before_its_message_is_whole_leaves_no_trace(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        _, writer = await _slow(door, 0)
        writer.close()
        await writer.wait_closed()
        for _ in range(1_000):
            if door.refused("body"):
                break
            await asyncio.sleep(0.01)
        assert door.refused("body") == 1
        assert await door.traces() == [0, 0, 0, 0]

    open_door(scenario)


def test_messages_that_storm_are_told_to_come_again_and_leave_others_their_room(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        for version in (1, 2):
            assert (await door.tell(NODE, node(version=version))).status_code == 200
        traces = await door.traces()
        late = await door.tell(NODE, node(version=3), nonce="nonce-late")
        assert "about one client: at most 2 at once" in _error(late, 429, "RATE_LIMITED")["message"]
        assert late.headers["retry-after"] == "3"  # twenty a minute
        assert await door.traces() == traces
        assert (await door.tell(NODE, node(client="blue"))).status_code == 404
        full = await door.tell(NODE, node(client="green"))
        assert "about all clients together: at most 4 at once" in _error(full, 429, "RATE_LIMITED")["message"]
        assert door.refused("rate") == 2
        forged = await door.tell(NODE, node(), secret="another")
        assert forged.status_code == 401  # and takes nothing of the rate

    open_door(scenario, per_minute=40)


def test_what_was_changed_and_what_was_refused_is_in_the_audit_log(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        await door.tell(NODE, node(version=2), nonce="nonce-once")
        await door.tell(NODE, node(version=2), nonce="nonce-once")
        await door.tell(NODE, node(version=1))
        await door.tell(RELATIONSHIP, relationship(client="blue"))
        await door.tell(RELATIONSHIP, relationship(), secret="another")
        await door.tell(RELATIONSHIP, b"{}")
        assert [(one.action, one.client, one.outcome, one.address) for one in door.notes] == [
            ("nexus.webhook", "red", "ok", "127.0.0.1"),
            ("nexus.webhook", "red", "UNAUTHORIZED", "127.0.0.1"),
            ("nexus.webhook", "blue", "DOCUMENT_NOT_FOUND", "127.0.0.1"),
            ("key.refused", "", "UNAUTHORIZED", "127.0.0.1"),
        ]

    open_door(scenario)


@pytest.mark.parametrize("secret", [None, ""])
def test_without_a_secret_there_are_no_such_routes(tmp_path: Path, secret: str | None) -> None:
    async def inside() -> None:
        async with house(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}") as made:
            routes = webhook_routes(made.store, secret, made.metrics, note=lambda _: None)
            async with served(routes) as base, httpx.AsyncClient(base_url=base, trust_env=False) as client:
                body = json.dumps(relationship()).encode()
                nowhere = await client.post("/webhooks/nexus/nowhere", content=body)
                for path in (RELATIONSHIP, NODE):
                    answer = await client.post(path, content=body, headers=_sealed(body, secret=""))
                    assert (answer.status_code, answer.json()) == (404, nowhere.json())
                    assert (await client.get(path)).status_code == 404

    asyncio.run(inside())


def test_the_routes_want_no_key_and_the_real_time(tmp_path: Path) -> None:
    async def inside() -> None:
        async with house(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}") as made:
            await seed(made, ["a"])
            routes = webhook_routes(made.store, SECRET, made.metrics, note=lambda _: None)
            assert [route.opt[OPEN] for route in routes] == [True, True]
            async with served(routes) as base, httpx.AsyncClient(base_url=base, trust_env=False) as client:
                body = json.dumps(node()).encode()
                old = await client.post(NODE, content=body, headers=_sealed(body))
                assert _error(old, 401, "UNAUTHORIZED")["details"]["field"] == "X-Nexus-Timestamp"
                timely = _sealed(body, timestamp=str(int(time.time())))
                assert (await client.post(NODE, content=body, headers=timely)).json() == {"applied": True}

    asyncio.run(inside())


def test_a_database_that_is_away_is_told_as_that_and_the_message_may_come_again(open_door: Opened) -> None:
    async def scenario(door: Door) -> None:
        async with door.house.database.write.begin() as connection:
            await connection.execute(text("ALTER TABLE node_changes RENAME TO away"))
        answer = await door.tell(NODE, node(), nonce="nonce-again")
        _error(answer, 503, "QUEUE_UNAVAILABLE")
        async with door.house.database.write.begin() as connection:
            await connection.execute(text("ALTER TABLE away RENAME TO node_changes"))
        assert (await door.tell(NODE, node(), nonce="nonce-again")).json() == {"applied": True}

    open_door(scenario)
