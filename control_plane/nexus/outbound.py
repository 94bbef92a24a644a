"""Tells one URL what changed, by signed requests (see ``signing``).

An event is a change as it came, with ``kind`` in place of ``action``: ``{"kind": "relationship.upsert", "eventId",
"origin", "version", "client", "source", "target", "type", "properties"}``, and ``document`` in place of the ends and
the type where the kind is ``node.…``. ``origin`` and ``version`` are those of the change: who receives an event of its
own origin, or of a version that it knows, skips it, and so no change goes round in circles. Events are sent in the
order in which they were written, but one that is tried again comes later, and one whose answer was lost comes twice:
the version says what holds.

Any 2xx takes an event. What may pass (no answer, 408, 425, 429, 5xx) is tried again after pauses; where that concerns
the receiver as a whole (no answer, 429, 502, 503, 504, or it names a time), nothing is sent meanwhile. Everything else,
redirects too, gives the event up at once; it is kept, and sent again when somebody says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import NamedTuple

import httpx
import structlog
from sqlalchemy.exc import SQLAlchemyError

from control_plane.jobs.store import now_ms
from control_plane.nexus.backstore import LONGEST_WAIT_MS, BackStore, Unsent, Waiting
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.signing import Signer

log = structlog.get_logger()

MAX_TRIES = 8
"""The first one counts; then an event is given up."""
LONGEST_PAUSE = 60.0
"""Seconds between two tries; the first pause takes one, each further one twice as long."""
TIMEOUT_SECONDS = 10.0
"""Of a request, with its answer."""
MAX_ANSWER = 64 << 10
"""Bytes of an answer that are read, so that its connection can be used again."""
BATCH = 20
"""Events whose sending is noted together: so many are sent again after a process that ends."""
LOOK_SECONDS = 0.25
"""Between two looks for events where this process wrote none: others write too."""
AGAIN_SECONDS = 5.0
"""After a database that is away."""
_LONGEST_ASKED = LONGEST_WAIT_MS / 1_000
"""Seconds that the receiver may ask for."""
_LATER = frozenset({408, 425, 429})
_EVERYBODY = frozenset({429, 502, 503, 504})
"""Concern the receiver, not the event."""


class _Verdict(NamedTuple):
    """What came of one request."""

    error: str | None = None
    """None: the event was taken."""
    again: bool = False
    everybody: bool = False
    """The receiver takes no other event either."""
    asked: float = 0.0
    """Seconds that the receiver asks for."""


class Outbound:
    """Sends events; of several servers that share a database, one is to do so."""

    def __init__(
        self,
        store: BackStore,
        url: str,
        secret: str,
        metrics: NexusMetrics,
        client: httpx.AsyncClient,
        *,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        """``clock`` tells milliseconds since 1970."""
        self._store = store
        self._url = httpx.URL(url)
        self._signer = Signer(secret)
        self._metrics = metrics
        self._client = client
        self._clock = clock
        self._silent_until = 0

    async def run(self) -> None:
        """Send until canceled."""
        while True:
            self._store.written.clear()
            try:
                tried = await self.deliver()
            except SQLAlchemyError as error:
                log.error("events wait for the database", again_in_seconds=AGAIN_SECONDS, exc_info=error)
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            if tried:
                continue
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._store.written.wait()
            except TimeoutError:  # another look, then
                pass

    async def deliver(self) -> int:
        """Send some of what is due; answers how many events were tried."""
        now = self._clock()
        if now < self._silent_until <= now + LONGEST_WAIT_MS:
            return 0
        sent: list[int] = []
        failed: list[Unsent] = []
        for event in await self._store.due(now, BATCH):
            verdict = await self._send(event)
            if verdict.error is None:
                sent.append(event.id)
                self._metrics.outbound.labels("sent").inc()
                continue
            failed.append(self._unsent(event, verdict))
            if verdict.everybody:
                break
        if sent or failed:
            await self._store.settle(sent, failed)
        return len(sent) + len(failed)

    def _unsent(self, event: Waiting, verdict: _Verdict) -> Unsent:
        attempts = event.attempts + 1
        pause = max(min(2.0 ** (attempts - 1), LONGEST_PAUSE), verdict.asked)
        until = self._clock() + int(1_000 * pause)
        if verdict.everybody:
            self._silent_until = until
        given_up = not verdict.again or attempts >= MAX_TRIES
        self._metrics.outbound.labels("dead" if given_up else "retried").inc()
        tell = log.error if given_up else log.warning
        tell("an event was not taken", event_id=event.id, attempts=attempts, given_up=given_up, reason=verdict.error)
        return Unsent(event.id, attempts, str(verdict.error), None if given_up else until)

    async def _send(self, event: Waiting) -> _Verdict:
        body = event.body.encode()
        now = self._clock()
        headers = {"Content-Type": "application/json", **self._signer.headers(body, now)}
        try:
            async with (
                asyncio.timeout(TIMEOUT_SECONDS),  # that of the client holds for each piece, and they may come for ever
                self._client.stream(
                    "POST", self._url, content=body, headers=headers, follow_redirects=False, timeout=TIMEOUT_SECONDS
                ) as answer,
            ):
                await _read(answer)
        except (httpx.HTTPError, TimeoutError) as error:
            return _Verdict(f"no answer: {type(error).__name__}", again=True, everybody=True)
        status = answer.status_code
        if answer.is_success:
            return _Verdict()
        asked = _asked(answer.headers.get("retry-after", ""), now)
        again = status in _LATER or status >= 500
        everybody = again and (status in _EVERYBODY or asked > 0)
        return _Verdict(f"answered {status}", again=again, everybody=everybody, asked=asked if again else 0.0)


async def _read(answer: httpx.Response) -> None:
    size = 0
    async for piece in answer.aiter_raw():
        size += len(piece)
        if size > MAX_ANSWER:
            return


def _asked(text: str, now: int) -> float:
    """The seconds that ``Retry-After`` asks for, as a number or as a date; 0 where it does not."""
    if text.isascii() and text.isdecimal():
        return min(float(text), _LONGEST_ASKED)
    try:
        seconds = parsedate_to_datetime(text).timestamp() - now / 1_000
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, min(seconds, _LONGEST_ASKED))
