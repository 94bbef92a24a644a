"""``POST /mcp``: the read tools over streamable HTTP, stateless, with JSON answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple

from litestar import Litestar, asgi
from litestar.enums import ScopeType
from litestar.handlers import ASGIRouteHandler
from litestar.types import Receive, Scope, Send
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

from control_plane.reading.mcp import mcp_server
from control_plane.reading.reader import Reader

MAX_REQUEST_BYTES = 1 << 20


class McpRoute(NamedTuple):
    """What an application mounts: the route, and what has to run while it serves."""

    handler: ASGIRouteHandler
    lifespan: Callable[[Litestar], AbstractAsyncContextManager[None]]


def mcp_route(reader: Reader) -> McpRoute:
    """The read tools that ``reader`` answers at ``/mcp``; the application's bearer check stands before it."""
    server = mcp_server(reader)
    manager = StreamableHTTPSessionManager(
        server, stateless=True, json_response=True, max_request_body_size=MAX_REQUEST_BYTES
    )

    @asgi("/mcp", copy_scope=True)
    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await send({"type": "websocket.close", "code": 1008, "reason": None})
            return
        if scope["method"] != "POST":
            # Stateless: there is no stream to listen to (GET) and no session to end (DELETE).
            await send({"type": "http.response.start", "status": 405, "headers": [(b"allow", b"POST")]})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        await manager.handle_request(scope, receive, send)  # type: ignore[arg-type]

    @asynccontextmanager
    async def lifespan(_app: Litestar) -> AsyncIterator[None]:
        async with manager.run():
            yield

    return McpRoute(handler, lifespan)
