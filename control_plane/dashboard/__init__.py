"""The web page at ``/``: static files, served with a strict content policy."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from litestar import Request, Response, get
from litestar.handlers import HTTPRouteHandler

from control_plane.errors import NotFound
from control_plane.operations.auth import OPEN

_FILES = Path(__file__).parent / "static"
# The framework adds the charset to text.
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_TYPES = {path.name: _KINDS[path.suffix] for path in _FILES.iterdir()}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def dashboard_routes() -> list[HTTPRouteHandler]:
    """The routes of the dashboard: ``/`` and its files under ``/dashboard/``. They hold nothing secret and want no
    key; the page asks for the key and sends it with each request to ``/v1``."""
    return [_page, _file]


@get("/", include_in_schema=False, opt={OPEN: True}, sync_to_thread=False)
def _page(request: Request[Any, Any, Any]) -> Response[bytes]:
    return _answer("index.html", request)


@get("/dashboard/{name:str}", include_in_schema=False, opt={OPEN: True}, sync_to_thread=False)
def _file(name: str, request: Request[Any, Any, Any]) -> Response[bytes]:
    return _answer(name, request)


def _answer(name: str, request: Request[Any, Any, Any]) -> Response[bytes]:
    if name not in _TYPES:
        raise NotFound("There is no such route.")
    content = (_FILES / name).read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    if request.headers.get("if-none-match") == etag:
        return Response(b"", status_code=304, headers={**_HEADERS, "ETag": etag})
    return Response(content, media_type=_TYPES[name], headers={**_HEADERS, "ETag": etag})
