"""What every answer carries, and who may ask from another origin."""

from __future__ import annotations

from litestar.config.cors import CORSConfig
from litestar.datastructures import MutableScopeHeaders
from litestar.types import Message, Scope

SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


async def security_headers(message: Message, _scope: Scope) -> None:
    """Add what the answer does not say itself."""
    if message["type"] == "http.response.start":
        headers = MutableScopeHeaders.from_message(message)
        for name, value in SECURITY.items():
            headers.setdefault(name, value)


def cors(origins: tuple[str, ...]) -> CORSConfig | None:
    """Other origins may use the API with a key in a header; cookies are never looked at."""
    if not origins:
        return None
    return CORSConfig(
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "DELETE", "HEAD", "OPTIONS"],
        allow_headers=[
            "Authorization",
            "Content-Type",
            "Content-Encoding",
            "Idempotency-Key",
            "If-None-Match",
            "If-Range",
            "Last-Event-ID",
            "Mcp-Protocol-Version",
            "Mcp-Session-Id",
            "Range",
        ],
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
            "X-Capsule-Part",
            "X-RateLimit-Limit",
            "X-RateLimit-Remaining",
            "X-RateLimit-Reset",
        ],
        max_age=600,
    )
