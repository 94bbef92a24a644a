"""The short way for a plain message gives, byte for byte, what the protocol's own package gives."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp_server import GRAPHS, KEY, Exports, McpServer
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS

from common.embedding.choice import Engines
from common.embedding.engine import OpenEngines
from common.storage import FileStorage
from control_plane.operations.keys import EVERYBODY
from control_plane.operations.limits import TokenBuckets
from control_plane.reading import mcp_direct
from control_plane.reading.artifacts import Artifacts
from control_plane.reading.library import Library
from control_plane.reading.mcp import mcp_server as protocol
from control_plane.reading.places import ExportPlaces
from control_plane.reading.reader import Reader

NODE = "Class:common/progress.py:ProgressReporter"
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("symbol_lookup", {"query": "report"}),
    ("symbol_lookup", {"query": 'é "\\ \u2028 \u0007 😀'}),
    ("node_get", {"nodeId": NODE}),
    ("node_get", {"nodeId": "nowhere"}),
    ("node_get", {}),
    ("neighbors_get", {"nodeId": NODE, "direction": "in", "relationTypes": ["CALLS"], "limit": 3}),
    ("edge_get", {"edgeId": "no_CALLS_thing"}),
    ("text_search", {"query": "progress of an export"}),
    ("call_trace", {"fromNodeId": NODE}),
    ("callers_of", {"nodeId": NODE, "limit": 1.5}),
    ("callers_of", {"nodeId": NODE, "limit": 1e400}),
    ("callees_of", {"nodeId": NODE, "limit": 10**30}),
    ("process_list", {"limit": 2}),
    ("process_get", {"processId": NODE}),
    ("impact_analysis", {"nodeId": NODE}),
    ("file_outline", {"filePath": "common/progress.py"}),
    ("file_snippet", {"nodeId": NODE}),
    ("community_list", {}),
    ("manifest_get", {"locator": None}),
    ("query_explain", {"task": "what breaks"}),
    ("no_such_tool", {"a": [1, {"b": None}]}),
]
PLAIN = 20
"""Of these calls at least so many go the short way."""


def messages() -> list[bytes]:
    def call(name: Any, arguments: Any, id_: Any = 1, **more: Any) -> bytes:
        params = {"name": name, "arguments": arguments, **more}
        return json.dumps({"jsonrpc": "2.0", "id": id_, "method": "tools/call", "params": params}).encode()

    name, arguments = CALLS[2]
    odd = [call(name, arguments, id_) for id_ in ("a", "é\n\u0000", "", 0, -1, 2**53, 2**70, 1.0, 1.5, None, [1], True)]
    odd += [call(name, arguments, _meta={"progressToken": 7}), call(None, arguments), call(name, []), call(name, None)]
    odd += [
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "manifest_get"}}).encode(),
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call"}).encode(),
        json.dumps({"jsonrpc": "2.0", "method": "tools/call", "params": {"name": name}}).encode(),
        json.dumps({"jsonrpc": "1.0", "id": 1, "method": "tools/call", "params": {"name": name}}).encode(),
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ping", "more": 1}).encode(),
        b"",
        b"[]",
        b"{",
        b'\xff{"jsonrpc":"2.0"}',
        call(name, arguments)[:-1] + b',"id":2}',
        call(name, arguments).replace(b"Class", b"\\ud800"),
        call(name, arguments).replace(b"Class", b"Cl\x01ass"),
        call(name, arguments).replace(b"Class", b"Cl\xffass"),
        b"  \n" + call(name, arguments) + b"\n ",
        *(call(name, "deep").replace(b'"deep"', b"[" * depth + b"]" * depth) for depth in (300, 100_000)),
        *(call(name, {"nodeId": "deep"}).replace(b'"deep"', b"[" * depth + b"]" * depth) for depth in (300, 100_000)),
    ]
    return [call(tool, given) for tool, given in CALLS] + odd


Answer = tuple[int, list[tuple[bytes, bytes]], bytes]


async def package(manager: StreamableHTTPSessionManager, headers: list[tuple[bytes, bytes]], body: bytes) -> Answer:
    """What the package answers to a message."""
    sent: list[Any] = []
    given = False

    async def receive() -> Any:
        nonlocal given
        if given:
            await asyncio.sleep(60)
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/mcp", "headers": headers, "query_string": b""}
    await manager.handle_request(scope, receive, send)
    start, *bodies = sent
    return start["status"], sorted(start["headers"]), b"".join(message.get("body", b"") for message in bodies)


def settled(body: bytes) -> bytes:
    """Without what differs from answer to answer: the trace id and the time."""
    return re.sub(rb'(\\*"timingMs\\*":)\d+', rb"\1 0", re.sub(rb'(\\*"traceId\\*":\\*")[0-9a-f]{32}', rb"\1", body))


@pytest.mark.parametrize("version", [None, *HANDSHAKE_PROTOCOL_VERSIONS])
def test_a_plain_message_is_answered_as_the_package_answers_it(
    capsules: dict[str, Path], tmp_path: Path, version: str | None
) -> None:
    exports = Exports()
    exports.add("only", capsules[GRAPHS[0]].as_uri())
    engines = OpenEngines(Engines())
    artifacts = Artifacts(FileStorage([]), tmp_path / "copies", 1)
    library = Library(artifacts, engines.get, capacity=1)
    reader = Reader(ExportPlaces(exports, tmp_path, external=False, note=[].append), library, budget=65_536)
    manager = StreamableHTTPSessionManager(
        protocol(reader, lambda _context: EVERYBODY), stateless=True, json_response=True
    )
    headers = [(b"accept", b"application/json, text/event-stream"), (b"content-type", b"application/json")]
    headers += [(b"mcp-protocol-version", version.encode())] if version else []

    async def check() -> None:
        plain = 0
        async with manager.run():
            for message in messages():
                found = await mcp_direct.answer(reader, headers, message, EVERYBODY)
                if found is None:
                    continue
                plain += 1
                status, given, body = await package(manager, headers, message)
                assert (status, settled(found)) == (200, settled(body)), message
                about = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
                assert given == about
        assert plain >= PLAIN

    asyncio.run(check())
    library.close()
    artifacts.close()
    engines.close()


@pytest.mark.parametrize("version", [b"2026-07-28", b"1999-01-01"])
def test_protocols_without_a_handshake_are_left_to_the_package(version: bytes) -> None:
    async def check() -> None:
        headers = [(b"mcp-protocol-version", version)]
        message = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"manifest_get"}}'
        assert await mcp_direct.answer(None, headers, message, EVERYBODY) is None  # type: ignore[arg-type]

    asyncio.run(check())


@pytest.mark.parametrize("burst", [1, 100])
def test_a_message_nested_deeply_is_refused_as_a_message(tmp_path: Path, burst: int) -> None:
    deep = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    headers = {"Authorization": f"Bearer {KEY}", "Accept": "application/json", "Content-Type": "application/json"}
    with McpServer(tmp_path, Exports(), buckets=TokenBuckets(per_minute=1, burst=burst)) as server:
        answers = [httpx.post(server.url, content=deep, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [400, 429 if burst == 1 else 400]
    assert all(answer.json()["error"]["code"] in (-32700, -32029) for answer in answers)


def test_both_ways_say_how_many_questions_are_left(mcp_server: McpServer) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Accept": "application/json", "Content-Type": "application/json"}
    given = {"name": "manifest_get", "arguments": {}}
    for params in (given, {**given, "_meta": {"progressToken": 1}}):
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        answer = httpx.post(mcp_server.url, json=message, headers=headers)
        assert answer.status_code == 200
        assert {"x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"} <= set(answer.headers)
