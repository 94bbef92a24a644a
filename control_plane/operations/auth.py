"""The bearer key: looked at before anything of the body is read."""

from __future__ import annotations

import hmac
from typing import Any

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.enums import ScopeType
from litestar.middleware import ASGIMiddleware
from litestar.types import ASGIApp, Receive, Scope, Send

from control_plane.errors import Unauthorized
from control_plane.operations.keys import EVERYBODY, Caller

OPEN = "open"
"""The ``opt`` of a route that wants no key."""


class BearerAuth(ASGIMiddleware):
    """Refuses every request without the key, but to routes that say they are open."""

    scopes = (ScopeType.HTTP,)
    exclude_opt_key = OPEN
    exclude_path_pattern = ("^/schema",)

    def __init__(self, key: str | None) -> None:
        self._key = None if key is None else key.encode()

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        """Compare in constant time, then go on; ``scope["auth"]`` is the Caller."""
        if self._key is not None:
            header = ASGIConnection(scope, receive, send).headers.get("authorization", "")
            scheme, _, given = header.partition(" ")
            if not (scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._key)):
                raise Unauthorized("This route wants the header Authorization: Bearer <key>.")
        scope["auth"] = EVERYBODY
        await next_app(scope, receive, send)


def caller_of(request: Request[Any, Any, Any]) -> Caller:
    """Whoever sent a request to a route that wants a key."""
    caller: Caller = request.scope["auth"]
    return caller
