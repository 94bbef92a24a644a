"""The event stream of a job (server-sent events): LF only, a ping every other second, and an end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from litestar.types import Receive, Scope, Send

from control_plane.exports.downloads import Patience, finish, sent
from control_plane.jobs.database import AWAY
from control_plane.jobs.hub import Channel, EventHub, Line, line_of
from control_plane.jobs.records import TERMINAL, JobRecord
from control_plane.jobs.store import JobStore
from control_plane.operations.shares import Shares

PING = b": ping\n\n"
PING_SECONDS = 1.5
"""The contract promises one every 2 s; a busy loop may be late."""
PAGE = 500
PATIENCE = Patience(total=6 * 3_600.0, piece=60.0)
"""A client that has not read what was sent before by then is cut off: 500 events of a few KB each at most."""
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def lines(store: JobStore, hub: EventHub, job: JobRecord, since: int) -> AsyncGenerator[bytes, None]:
    """Events above ``since`` as they come, each once and in order, until the terminal one or the server's stop.

    They come from memory where this replica wrote them, else from the database; one that is away for a while makes the
    stream late and no more.
    """
    async with hub.listen(job.id) as channel:
        opened = time.time()
        position, behind = min(since, job.last_seq), True
        while not channel.closed:
            page = _in_memory(channel, position)
            if not page and (behind or channel.known > position):
                try:
                    page = [line_of(event) for event in await store.events(job.id, position, PAGE)]
                    behind = len(page) == PAGE
                except AWAY:  # the notifier says so in the log, once for all streams
                    behind = True
            if page:
                position = page[-1].seq
                now = time.time()
                for line in page:
                    if line.at >= opened:  # what is older was waited for by nobody here
                        hub.handed(now - line.at)
                yield b"".join(line.data for line in page)
                if page[-1].last:
                    return
            elif job.status in TERMINAL and position >= job.last_seq:
                return
            else:
                await channel.changed(PING_SECONDS)


def _in_memory(channel: Channel, position: int) -> list[Line]:
    page: list[Line] = []
    while (line := channel.lines.get(position + len(page) + 1)) is not None:
        page.append(line)
    return page


async def with_pings(source: AsyncGenerator[bytes, None], hub: EventHub) -> AsyncGenerator[bytes, None]:
    """What ``source`` gives, and pings between, however long it is silent."""
    loop = asyncio.get_running_loop()
    yield PING
    pinged = loop.time()
    awaited = asyncio.ensure_future(anext(source, None))
    try:
        while True:
            await asyncio.wait([awaited], timeout=max(0.0, pinged + PING_SECONDS - loop.time()))
            if awaited.done():
                if (data := awaited.result()) is None:
                    return
                yield data
                awaited = asyncio.ensure_future(anext(source, None))
            if loop.time() >= pinged + PING_SECONDS:
                if hub.closed:
                    return
                yield PING
                pinged = loop.time()
    finally:
        awaited.cancel()
        await asyncio.gather(awaited, return_exceptions=True)
        await source.aclose()


class EventStream:
    """An ASGI answer that sends the lines of a job until they end, the client goes or reads nothing, or the time of
    one stream is over: then the client asks again with ``Last-Event-ID``."""

    def __init__(
        self,
        store: JobStore,
        hub: EventHub,
        job: JobRecord,
        since: int,
        *,
        shares: Shares,
        patience: Patience = PATIENCE,
    ) -> None:
        self._store = store
        self._hub = hub
        self._job = job
        self._since = since
        self._shares = shares
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises RateLimited before anything is sent."""
        with self._shares.place(scope["auth"].client):
            events = with_pings(lines(self._store, self._hub, self._job, self._since), self._hub)
            sending = asyncio.create_task(_send(events, send, self._patience))
            try:
                await finish(sending, receive, None, "event stream", job_id=self._job.id)
            finally:
                await events.aclose()


async def _send(events: AsyncGenerator[bytes, None], send: Send, patience: Patience) -> None:
    ends = asyncio.get_running_loop().time() + patience.total
    await sent(send, {"type": "http.response.start", "status": 200, "headers": HEADERS}, patience.piece)
    async for data in events:
        await sent(send, {"type": "http.response.body", "body": data, "more_body": True}, patience.piece)
        if asyncio.get_running_loop().time() >= ends:
            break
    await sent(send, {"type": "http.response.body", "body": b"", "more_body": False}, patience.piece)
