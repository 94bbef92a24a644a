"""Around every request: its place in a trace, one line in the log, its figures."""

from __future__ import annotations

import re
import time

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from control_plane.operations.metrics import Metrics
from control_plane.operations.tracing import REQUEST, Mark, Span, Tracing, new_mark

log = structlog.get_logger()

UNMATCHED = "unmatched"
"""The route of paths that no route has, and of refused or preflight requests: what clients make up is no label."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNLOGGED = frozenset({"/healthz", "/metrics"})
"""Asked for every few seconds by programs."""
NO_ANSWER = 499
"""The status in log and figures where the client went before there was an answer."""
_JOB = re.compile(r"/v1/(?:exports|hooks/runpod)/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:/|$)")


class Requests:
    """The ASGI application that stands around all routes, and around what refuses a request before there is one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; the answer has its place in the trace as ``traceparent``."""
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        caller, mark = _marks(scope)
        started, began = time.perf_counter(), time.time_ns()
        status, sent = NO_ANSWER, 0
        header = (b"traceparent", mark.traceparent.encode())

        async def sending(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        structlog.contextvars.clear_contextvars()  # a connection that is kept may bring those of the request before
        structlog.contextvars.bind_contextvars(trace=mark.trace)
        if job := _JOB.match(scope["path"]):
            structlog.contextvars.bind_contextvars(job_id=job[1])
        REQUEST.set(mark)
        try:
            await self._app(scope, receive, sending)
        except Exception:
            status = 500
            raise
        finally:
            self._ended(scope, mark, caller, status=status, sent=sent, began=began, started=started)

    def _ended(
        self, scope: HTTPScope, mark: Mark, caller: Mark | None, *, status: int, sent: int, began: int, started: float
    ) -> None:
        seconds = time.perf_counter() - started
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = route_of(scope)
        self._metrics.http.labels(route, method, f"{status // 100}xx").observe(seconds)
        self._metrics.http_bytes.labels(route).inc(sent)
        if route in UNLOGGED:
            return
        who = scope.get("auth")
        log.info(
            "request",
            method=method,
            route=route,
            status=status,
            ms=round(seconds * 1000, 1),
            bytes=sent,
            key=who.key if who else None,
            client=who.client if who else None,
        )
        if self._tracing.on:
            attributes: dict[str, str | int | float | bool] = {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
            }
            if job_id := structlog.contextvars.get_contextvars().get("job_id"):
                attributes["memvid.job_id"] = job_id
            self._tracing.end(
                [
                    Span(
                        f"{method} {route}",
                        mark,
                        caller.span if caller else None,
                        began,
                        began + int(seconds * 1e9),
                        attributes,
                        error=str(status) if status >= 500 else None,
                        server=True,
                    )
                ]
            )


def route_of(scope: Scope) -> str:
    """The template of a request's route, such as ``/v1/exports/{job_id}``: never what a client wrote."""
    template: str | None = scope.get("path_template")
    return UNMATCHED if template is None else re.sub(r":\w+}", "}", template)


def _marks(scope: HTTPScope) -> tuple[Mark | None, Mark]:
    """The span of whoever asks, where it is told in a valid way; and that of the answer."""
    told = [value for name, value in scope["headers"] if name == b"traceparent"]
    caller = Mark.of(told[0].decode("latin-1")) if len(told) == 1 else None
    return caller, caller.below() if caller else new_mark()
