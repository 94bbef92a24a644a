"""What every answer carries, and who may ask from another origin."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from litestar import HttpMethod
from litestar.config.cors import CORSConfig
from litestar.datastructures import MutableScopeHeaders
from litestar.enums import ScopeType
from litestar.routes import HTTPRoute
from litestar.status_codes import HTTP_204_NO_CONTENT, HTTP_400_BAD_REQUEST
from litestar.types import Message, Scope

from common.errors import InvalidRequest
from control_plane.errors import body_of

SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Of what a page loads without asking (an image, a script); what an allowed origin fetches, CORS decides on.
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


REQUEST_HEADERS = [
    "Authorization",
    "Content-Type",
    "Content-Digest",
    "Content-Disposition",
    "Content-Encoding",
    "Idempotency-Key",
    "If-None-Match",
    "If-Range",
    "Last-Event-ID",
    "Mcp-Method",
    "Mcp-Name",
    "Mcp-Protocol-Version",
    "Mcp-Session-Id",
    "Range",
    "Traceparent",
]
"""Where only some origins are allowed, a page there may send these."""

_REFUSED = msgspec.json.encode(
    body_of(InvalidRequest("This server does not allow such a request from another origin."))
)
_PREFLIGHT_REFUSED = "preflight_refused"


async def preflight_refusals(message: Message, scope: Scope) -> None:
    """Give refused preflights, which the framework answers as plain text, the body of every other error."""
    if scope["type"] != ScopeType.HTTP or scope["method"] != HttpMethod.OPTIONS:
        return
    if message["type"] == "http.response.start" and message["status"] == HTTP_400_BAD_REQUEST:
        headers = MutableScopeHeaders.from_message(message)
        headers["Content-Type"] = "application/json"
        headers["Content-Length"] = str(len(_REFUSED))
        scope["state"][_PREFLIGHT_REFUSED] = True
    elif message["type"] == "http.response.body" and scope["state"].get(_PREFLIGHT_REFUSED):
        message["body"] = _REFUSED


async def allowed_methods(message: Message, scope: Scope) -> None:
    """Name all methods of a path: where several handlers have it, the framework names those of the first two."""
    if scope["type"] != ScopeType.HTTP or scope["method"] != HttpMethod.OPTIONS:
        return
    if message["type"] == "http.response.start" and message["status"] == HTTP_204_NO_CONTENT:
        headers = MutableScopeHeaders.from_message(message)
        for route in scope["litestar_app"].routes:
            if isinstance(route, HTTPRoute) and route.path_format == scope.get("path_template") and "allow" in headers:
                headers["Allow"] = ", ".join(sorted(route.methods))


def security_headers(public_url: str | None) -> Callable[[Message, Scope], Awaitable[None]]:
    """Adds what an answer does not say itself; that browsers are to come by https alone, where the server's public
    address has it."""
    added = dict(SECURITY)
    if public_url is not None and public_url.startswith("https://"):
        added["Strict-Transport-Security"] = "max-age=31536000"

    async def add(message: Message, _scope: Scope) -> None:
        if message["type"] == "http.response.start":
            headers = MutableScopeHeaders.from_message(message)
            for name, value in added.items():
                headers.setdefault(name, value)

    return add


def cors(origins: tuple[str, ...]) -> CORSConfig | None:
    """Other origins may use the API with a key in a header; cookies are never looked at."""
    if not origins:
        return None
    return CORSConfig(
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"],
        allow_headers=["*"] if "*" in origins else REQUEST_HEADERS,
        expose_headers=[
            "Accept-Ranges",
            "Content-Digest",
            "Content-Disposition",
            "Content-Length",
            "Content-Range",
            "ETag",
            "Idempotent-Replayed",
            "Location",
            "Mcp-Session-Id",
            "Repr-Digest",
            "Retry-After",
            "Traceparent",
            "X-Capsule-Part",
            "X-Payload-SHA256",
            "X-Quota-Active-Jobs",
            "X-Quota-Documents-Per-Minute",
            "X-Quota-Jobs-Per-Day",
            "X-Quota-Pending-Documents",
            "X-RateLimit-Limit",
            "X-RateLimit-Remaining",
            "X-RateLimit-Reset",
        ],
        max_age=600,
    )
