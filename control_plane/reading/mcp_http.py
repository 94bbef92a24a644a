"""``POST /mcp``: the read tools over streamable HTTP, stateless, with JSON answers.

What is wrong with the request as HTTP (method, content type, size, Host, Origin) is answered like everywhere here, with
``{"error": {code, message}}``. What is wrong with a message is a JSON-RPC error, and so is one message too many: of an
answer with a status of 400 or more a client of this protocol reads a JSON-RPC error and nothing else, so the body that
errors of tools have (``{code: RATE_LIMITED, message, traceId, retryable}``) stands in its ``data``, beside the status
429 and ``Retry-After`` for whatever only knows HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NamedTuple

import msgspec
from litestar import Litestar, asgi
from litestar.datastructures import Headers
from litestar.enums import ScopeType
from litestar.handlers import ASGIRouteHandler
from litestar.status_codes import HTTP_200_OK, HTTP_400_BAD_REQUEST
from litestar.types import HTTPScope, Message, Receive, Scope, Send
from mcp.server.context import ServerRequestContext
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

from common.contract import MALFORMED
from common.errors import ExportError, InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from control_plane.errors import MethodNotAllowed, NotAcceptable, RateLimited, body_of, headers_of, status_of
from control_plane.operations.auth import NEEDS, READ
from control_plane.operations.keys import Caller
from control_plane.operations.limits import TokenBuckets, rate_headers, too_many
from control_plane.operations.metrics import Metrics
from control_plane.operations.origins import Origins
from control_plane.operations.tracing import current
from control_plane.reading import mcp_direct
from control_plane.reading.mcp import mcp_server
from control_plane.reading.reader import Reader, error_body

MAX_REQUEST_BYTES = 1 << 20
BODY_SECONDS = 30.0
"""For the whole body of a message."""
_WRONG_ID = msgspec.json.encode(
    {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "id must be a string or a whole number"}}
)
TOO_MANY = -32029
"""JSON-RPC code of a message over the rate limit; of the range that servers may use, after HTTP's 429."""


class McpRoute(NamedTuple):
    """What an application mounts: the route, and what has to run while it serves."""

    handler: ASGIRouteHandler
    lifespan: Callable[[Litestar], AbstractAsyncContextManager[None]]


def mcp_route(
    reader: Reader, metrics: Metrics, *, origins: Origins | None = None, buckets: TokenBuckets | None = None
) -> McpRoute:
    """The read tools that ``reader`` answers at ``/mcp``; the application's bearer check stands before it.

    Pages of ``origins`` may ask, as often as ``buckets`` allow for one key that has no rate of its own.
    """
    origins = origins or Origins(any_host=False)
    buckets = buckets or TokenBuckets(per_minute=240_000, burst=8_000)
    # Host and Origin are checked here: the package knows lists of names only, and its refusals are plain text.
    manager = StreamableHTTPSessionManager(
        mcp_server(reader, _caller), stateless=True, json_response=True, max_request_body_size=MAX_REQUEST_BYTES
    )

    @asgi("/mcp", copy_scope=True, opt={NEEDS: READ})
    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await send({"type": "websocket.close", "code": 1008, "reason": None})
            return
        caller: Caller = scope["auth"]
        allowance = buckets.take(f"key {caller.key}", time.monotonic(), caller.rate)
        send = _with_headers(send, rate_headers(allowance))
        try:
            _check(scope, origins)
            body = await _body(receive)
        except ExportError as error:
            await _answer(send, status_of(error), msgspec.json.encode(body_of(error)), _refusal_headers(error))
            return
        if body is None:
            return
        if allowance.retry_after_seconds is not None:
            metrics.refused.labels("mcp_requests").inc()
            refusal = too_many(allowance)
            await _answer(send, status_of(refusal), _json_rpc(refusal, body), headers_of(refusal))
            return
        if _has_wrong_id(body):  # the package takes such a request for a notification
            await _answer(send, HTTP_400_BAD_REQUEST, _WRONG_ID, {})
            return
        if (plain := await mcp_direct.answer(reader, scope["headers"], body, scope["auth"])) is not None:
            await _answer(send, HTTP_200_OK, plain, {})
            return
        await manager.handle_request(scope, _replay(body, receive), send)  # type: ignore[arg-type]

    @asynccontextmanager
    async def lifespan(_app: Litestar) -> AsyncIterator[None]:
        async with manager.run():
            yield

    return McpRoute(handler, lifespan)


def _check(scope: HTTPScope, origins: Origins) -> None:
    """Raise what is wrong with a request before its body is looked at."""
    headers = Headers.from_scope(scope)
    origins.check(headers.get("host", ""), headers.get("origin"))
    if scope["method"] != "POST":
        # Stateless: there is no stream to listen to (GET) and no session to end (DELETE).
        raise MethodNotAllowed("Messages come by POST; there is no stream and no session here.")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("A message is application/json.")
    accepted = {kind.partition(";")[0].strip().lower() for kind in headers.get("accept", "").split(",")}
    if accepted.isdisjoint({"application/json", "application/*", "*/*"}):
        raise NotAcceptable("Answers are application/json; Accept must allow it.")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_REQUEST_BYTES:
        raise _too_large()


def _too_large() -> PayloadTooLarge:
    return PayloadTooLarge(f"A message has at most {MAX_REQUEST_BYTES:,} bytes.", limit=MAX_REQUEST_BYTES, field="body")


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None where the client went away. Raises PayloadTooLarge, InvalidRequest for one that takes too
    long."""
    body = bytearray()
    more = True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                body += message["body"]
                if len(body) > MAX_REQUEST_BYTES:
                    raise _too_large()
                more = message.get("more_body", False)
    except TimeoutError as error:
        raise InvalidRequest(f"The body is not there after {BODY_SECONDS:.0f} seconds.", field="body") from error
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body once more."""
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _caller(context: ServerRequestContext[Any]) -> Caller:
    """Who sent a request, as the bearer check said it."""
    assert context.request is not None  # that is so over HTTP
    caller: Caller = context.request.scope["auth"]
    return caller


def _refusal_headers(error: ExportError) -> dict[str, str]:
    return {**headers_of(error), **({"Allow": "POST"} if isinstance(error, MethodNotAllowed) else {})}


def _json_rpc(error: RateLimited, request: bytes) -> bytes:
    try:
        id_ = msgspec.json.decode(request, type=_Request).id
    except MALFORMED:
        id_ = None
    data = msgspec.json.decode(error_body(error, current().trace))
    return msgspec.json.encode(
        {"jsonrpc": "2.0", "id": id_, "error": {"code": TOO_MANY, "message": error.message, "data": data}}
    )


class _Request(msgspec.Struct):
    id: str | int | None = None


class _Message(msgspec.Struct):
    id: str | int | msgspec.UnsetType = msgspec.UNSET


def _has_wrong_id(request: bytes) -> bool:
    try:
        msgspec.json.decode(request, type=_Message)
    except msgspec.ValidationError as error:
        return str(error).endswith("at `$.id`")
    except MALFORMED:
        pass  # the package says what is wrong with it
    return False


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


def _with_headers(send: Send, headers: dict[str, str]) -> Send:
    added = _encoded(headers)

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *added]
        await send(message)

    return sending


async def _answer(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    start = _encoded({"Content-Type": "application/json", "Content-Length": str(len(body)), **headers})
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body, "more_body": False})
