"""The event stream of a job (server-sent events): LF only, a ping every other second, and an end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from litestar.types import Receive, Scope, Send

from control_plane.errors import RateLimited
from control_plane.jobs.database import AWAY
from control_plane.jobs.hub import Channel, EventHub, Line, line_of
from control_plane.jobs.records import TERMINAL, JobRecord
from control_plane.jobs.store import JobStore

PING = b": ping\n\n"
PING_SECONDS = 1.5
"""The contract promises one every 2 s; a busy loop may be late."""
PAGE = 500
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
    """An ASGI answer that sends the lines of a job until they end or the client goes."""

    def __init__(self, store: JobStore, hub: EventHub, job: JobRecord, since: int, *, max_streams: int) -> None:
        if hub.listeners >= max_streams:
            raise RateLimited(f"{max_streams:,} event streams are open; poll the events instead, or try again later.")
        self._lines = with_pings(lines(store, hub, job, since), hub)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        sender = asyncio.create_task(self._send(send))
        watcher = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait([sender, watcher], return_when=asyncio.FIRST_COMPLETED)
        finally:
            watcher.cancel()
            sender.cancel()
            await asyncio.gather(sender, watcher, return_exceptions=True)
            await self._lines.aclose()
        if not sender.cancelled():
            sender.result()

    async def _send(self, send: Send) -> None:
        async for data in self._lines:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
