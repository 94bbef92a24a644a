"""The event stream of a job (server-sent events): LF only, a ping every other second, and an end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from litestar.types import Receive, Scope, Send

from control_plane.errors import RateLimited
from control_plane.jobs.hub import EventHub, line_of
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
    """Events above ``since`` as they come, each once and in order, until the terminal one or the server's stop."""
    loop = asyncio.get_running_loop()
    async with hub.listen(job.id) as channel:
        position, behind = min(since, job.last_seq), True
        yield PING
        pinged = loop.time()
        while not channel.closed:
            if behind:
                page = [line_of(event) for event in await store.events(job.id, position, PAGE)]
                behind = len(page) == PAGE
            else:
                page = []
                while (line := channel.lines.get(position + len(page) + 1)) is not None:
                    page.append(line)
                behind = not page and any(seq > position for seq in channel.lines)
            if page:
                position = page[-1].seq
                yield b"".join(line.data for line in page)
                if page[-1].last:
                    return
            elif not behind:
                if job.status in TERMINAL and position >= job.last_seq:
                    return
                await channel.changed(max(0.0, pinged + PING_SECONDS - loop.time()))
            if loop.time() >= pinged + PING_SECONDS:
                yield PING
                pinged = loop.time()


class EventStream:
    """An ASGI answer that sends the lines of a job until they end or the client goes."""

    def __init__(self, store: JobStore, hub: EventHub, job: JobRecord, since: int, *, max_streams: int) -> None:
        if hub.listeners >= max_streams:
            raise RateLimited(f"{max_streams:,} event streams are open; poll the events instead, or try again later.")
        self._lines = lines(store, hub, job, since)

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
