"""Running the control plane: ``serve`` returns when the server has stopped."""

from __future__ import annotations

import os
import socket
import sys
import threading

import structlog
import uvicorn
from threadpoolctl import threadpool_limits

from common.settings import Settings
from control_plane.app import create_app
from control_plane.jobs.hub import EventHub
from control_plane.jobs.layout import Layout
from handler.logs import log_as_json

log = structlog.get_logger()

STOP_SECONDS = 10
"""Requests that run at a stop have so long to end; event streams are ended at once."""
LAST_SECONDS = 15
"""So long after it began a stop is over, whatever hangs: a database, say. Jobs are then driven on as after a crash."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, hub: EventHub) -> None:
        super().__init__(config)
        self._hub = hub

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                name = f"[{host}]" if ":" in host else host
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
    config = uvicorn.Config(
        create_app(settings, layout, hub),
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
        lifespan="on",
    )
    _Server(config, hub).run()
