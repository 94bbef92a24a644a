"""Running the control plane: ``serve`` returns when the server has stopped."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
import threading

import msgspec
import structlog
import uvicorn
from threadpoolctl import threadpool_limits
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common.errors import InvalidRequest
from common.settings import Settings
from control_plane.app import create_app
from control_plane.errors import body_of
from control_plane.jobs.hub import EventHub
from control_plane.jobs.layout import Layout
from control_plane.operations.canary import Canary
from handler.logs import log_as_json

log = structlog.get_logger()

STOP_SECONDS = 10
"""Requests that run at a stop have so long to end; event streams are ended at once."""
LAST_SECONDS = 15
"""So long after it began a stop is over, whatever hangs: a database, say. Jobs are then driven on as after a crash."""


MAX_HEAD_BYTES = 64 << 10
"""Of a request: its target and its header fields."""
MAX_HEADERS = 100
HEAD_SECONDS = 30.0
PEER_SECONDS = 120
_REFUSED_BODY = msgspec.json.encode(
    body_of(InvalidRequest(f"A request may have {MAX_HEADERS} header fields, and {MAX_HEAD_BYTES:,} bytes of them."))
)
_HEAD_REFUSED = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(_REFUSED_BODY), _REFUSED_BODY)
)


class BoundedHttp(HttpToolsProtocol):
    """One connection, which nobody can hold open or fill without a request.

    The parser of uvicorn bounds neither the head of a request nor the time for it. A head of more than
    ``MAX_HEAD_BYTES`` or ``MAX_HEADERS`` fields (the trailers of a body count too), or one that is not whole after
    ``HEAD_SECONDS``, ends the connection; so does whatever else comes after an answer and is no next request.
    """

    head_seconds = HEAD_SECONDS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unread = self._head = 0
        self._refused = False
        self._late = self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unread += len(data)  # what makes a whole field, a head, or some of a body sets it back
        super().data_received(data)
        if self._unread > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse()

    def on_message_begin(self) -> None:
        self._head = 0
        self._late.cancel()
        self._late = self._expect_head()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._head += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head += len(name) + len(value)
        if self._head > MAX_HEAD_BYTES or len(self.headers) >= MAX_HEADERS:
            self._refuse()
        else:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unread = 0
        self._late.cancel()
        if self._head > MAX_HEAD_BYTES:
            self._refuse()
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        if not self._refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            # An empty line, or the rest of a body that was answered already, ends the time that an idle connection has
            # and begins no request.
            self._late.cancel()
            self._late = self._expect_head(self.timeout_keep_alive)

    def _expect_head(self, idle: float = 0.0) -> asyncio.TimerHandle:
        return self.loop.call_later(idle + self.head_seconds, self._too_late)

    def _too_late(self) -> None:
        self._refused = True
        self.transport.close()

    def _refuse(self) -> None:
        if self._refused:
            return
        self._refused = True
        if self.cycle is None or self.cycle.response_complete:  # else an answer is under way
            self.transport.write(_HEAD_REFUSED)
        self.transport.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, hub: EventHub, canary: Canary | None) -> None:
        super().__init__(config)
        self._hub = hub
        self._canary = canary

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What the program itself consists of is looked at no more: of its 200,000 objects none is ever garbage, and
        # looking at all of them held up every request for 0.2 to 0.5 s, several times a minute.
        gc.collect()
        gc.freeze()
        for server in self.servers:
            for listening in server.sockets:
                # Connections take this on: the kernel ends one whose peer has taken nothing for so long, be it gone or
                # not reading. Closing it would wait for the peer.
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PEER_SECONDS * 1000)
                host, port = listening.getsockname()[:2]
                name = f"[{host}]" if ":" in host else host
                if self._canary is not None:
                    self._canary.listens(host, port)
                print(f"memvid-export listens on http://{name}:{port}", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        last = threading.Timer(LAST_SECONDS, _end)
        last.daemon = True
        last.start()
        self._hub.close()
        await super().shutdown(sockets)


def _end() -> None:
    log.error("the server could not stop in order", seconds=LAST_SECONDS)
    os._exit(1)  # its children end with it


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; jobs that run then go back to the queue.

    Raises InvalidSettings where the export root cannot be used.
    """
    log_as_json()
    # Questions by meaning come from several threads already: with two cores, a BLAS thread for each core under each of
    # them made searches 3 times slower.
    threadpool_limits(1, user_api="blas")
    layout = Layout(settings)
    layout.prepare()
    hub = EventHub()
    app = create_app(settings, layout, hub)
    config = uvicorn.Config(
        app,
        http=BoundedHttp,
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_config=None,  # what it says goes into our log
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
        lifespan="on",
    )
    _Server(config, hub, app.state.canary).run()
