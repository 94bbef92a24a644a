"""``/mcp`` with clients that go away, are slow, send too much, or want a connection of another kind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from clocks import Ahead

from control_plane.operations.keys import EVERYBODY
from control_plane.operations.metrics import Metrics
from control_plane.reading.mcp_http import BODY_SECONDS, MAX_REQUEST_BYTES, mcp_route

PING = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ping"}).encode()
HEADERS = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), (b"accept", b"application/json")]


def part(body: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def answered(messages: Sequence[Any], loop: Ahead, *, kind: str = "http", late: float = 0.0) -> list[Any]:
    """What is sent to a client from which these messages come, and then nothing for so long."""
    # No message of these gets as far as a tool.
    route = mcp_route(None, Metrics())  # type: ignore[arg-type]
    coming, sent = iter(messages), []

    async def receive() -> Any:
        if (message := next(coming, None)) is None:
            loop.seconds += late
            await asyncio.Event().wait()
        return message

    async def send(message: Any) -> None:
        sent.append(message)

    async def check() -> None:
        scope = {"type": kind, "method": "POST", "path": "/mcp", "headers": HEADERS, "auth": EVERYBODY}
        async with asyncio.timeout(3_600):
            await route.handler.fn({**scope, "query_string": b""}, receive, send)

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(check())
    return sent


def error(sent: list[Any]) -> tuple[int, str, str]:
    start, body = sent
    told = json.loads(body["body"])["error"]
    return start["status"], told["code"], told["message"]


def test_a_web_socket_is_closed_as_not_allowed() -> None:
    assert answered([{"type": "websocket.connect"}], Ahead(), kind="websocket") == [
        {"type": "websocket.close", "code": 1008, "reason": None}
    ]


@pytest.mark.parametrize("first", [[], [part(PING[:9])]])
def test_nothing_is_said_to_a_client_that_went_away(first: list[Any]) -> None:
    assert answered([*first, {"type": "http.disconnect"}], Ahead()) == []


def test_a_body_that_does_not_come_is_given_up() -> None:
    status, code, message = error(answered([part(PING[:9])], Ahead(), late=BODY_SECONDS))
    assert (status, code) == (400, "INVALID_EXPORT_REQUEST")
    assert "not there after 30 seconds" in message


def test_a_body_of_unknown_length_is_given_up_at_the_bound() -> None:
    pieces = [part(b" " * (MAX_REQUEST_BYTES // 2)) for _ in range(3)]
    status, code, _ = error(answered(pieces, Ahead()))
    assert (status, code) == (413, "PAYLOAD_TOO_LARGE")
