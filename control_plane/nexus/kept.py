"""Answers that are kept for as long as nothing changed that they were made of.

Whoever asks brings the number of the last change, read from the database that all replicas share before the answer is
made: an answer is given again only where that is still the number. So none is ever older than a change that was
committed before the question.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

import msgspec

from control_plane.nexus.metrics import NexusMetrics

KEPT_SECONDS = 3_600.0
MAX_KEPT = 10_000
"""Answers."""
MAX_KEPT_BYTES = 32 << 20
"""Of all of them as JSON."""

T = TypeVar("T")


class _Answer(NamedTuple):
    change: int
    made_at: float
    body: bytes


class Kept(Generic[T]):
    """Answers of one type, those that were asked for last."""

    def __init__(
        self,
        kind: type[T],
        metrics: NexusMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        most: int = MAX_KEPT,
        most_bytes: int = MAX_KEPT_BYTES,
    ) -> None:
        self._kind = kind
        self._most, self._most_bytes = most, most_bytes
        self._metrics = metrics
        self._clock = clock
        self._answers: OrderedDict[Hashable, _Answer] = OrderedDict()
        self._bytes = 0

    async def get(self, key: Hashable, change: int, make: Callable[[], Awaitable[T]]) -> T:
        """The answer to a question, which ``key`` is all of, after this change."""
        kept = self._answers.get(key)
        if kept is not None and kept.change == change and self._clock() - kept.made_at < KEPT_SECONDS:
            self._answers.move_to_end(key)
            self._metrics.context_cache.labels("hit").inc()
            return msgspec.json.decode(kept.body, type=self._kind)
        self._metrics.context_cache.labels("miss").inc()
        made_at = self._clock()
        answer = await make()
        self._put(key, _Answer(change, made_at, msgspec.json.encode(answer)))
        return answer

    def _put(self, key: Hashable, answer: _Answer) -> None:
        before = self._answers.pop(key, None)
        if before is not None:
            self._bytes -= len(before.body)
        self._answers[key] = answer
        self._bytes += len(answer.body)
        while len(self._answers) > self._most or self._bytes > self._most_bytes:
            _, oldest = self._answers.popitem(last=False)
            self._bytes -= len(oldest.body)
