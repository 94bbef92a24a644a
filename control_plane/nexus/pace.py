"""How fast a client may change documents: each one is work for the sync, however many a request brings."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from control_plane.errors import QUOTA_HEADERS, QuotaReached
from control_plane.operations.limits import TokenBuckets
from control_plane.operations.metrics import Metrics

PENDING_SECONDS = 5
"""When to come again where the sync has to go on first: it is known anew by then how far it is."""


class Pace:
    """Two limits of a client on this server: documents that it changes in a minute, and documents that the graph does
    not have yet. For one thread.

    Both are looked at before a request is read, and what it brought is counted after it: so a request may pass them
    by its own documents, and the next one waits.
    """

    def __init__(
        self, metrics: Metrics, *, per_minute: int, max_pending: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``per_minute`` may come at once; ``clock`` tells seconds."""
        self._metrics = metrics
        self._per_minute = per_minute
        self._max_pending = max_pending
        self._clock = clock
        self._changes = TokenBuckets(per_minute=per_minute, burst=per_minute)
        self._pending: Mapping[str, int] = {}
        self._since: Counter[str] = Counter()

    def check(self, client: str) -> None:
        """Count the first document of a request. Raises QuotaReached where the client has to wait."""
        if self._waiting(client) >= self._max_pending:
            raise self._refusal(
                "pending_documents",
                self._max_pending,
                f"The graph has to be told of {self._max_pending:,} documents of this client first, which is as many "
                "as may wait.",
                PENDING_SECONDS,
            )
        allowance = self._changes.take(client, self._clock())
        if allowance.retry_after_seconds is not None:
            raise self._refusal(
                "documents_per_minute",
                self._per_minute,
                f"This client may write or delete {self._per_minute:,} documents a minute, and so many it did.",
                allowance.retry_after_seconds,
            )

    def count(self, client: str, documents: int) -> None:
        """Count the documents that a request changed which ``check`` let through."""
        self._changes.owe(client, self._clock(), documents - 1)
        self._since[client] += documents

    def looked(self, pending: Mapping[str, int]) -> None:
        """So many documents of each client wait by now."""
        self._pending = pending
        self._since.clear()

    def headers(self, client: str) -> dict[str, str]:
        """What a client may still do."""
        left = {
            "documents_per_minute": (self._per_minute, self._changes.left(client, self._clock())),
            "pending_documents": (self._max_pending, self._max_pending - self._waiting(client)),
        }
        return {
            QUOTA_HEADERS[quota]: f"limit={limit}, remaining={max(0, count)}" for quota, (limit, count) in left.items()
        }

    def _waiting(self, client: str) -> int:
        return self._pending.get(client, 0) + self._since[client]

    def _refusal(self, quota: str, limit: int, message: str, seconds: int) -> QuotaReached:
        self._metrics.refused.labels(quota).inc()
        return QuotaReached(message, quota=quota, limit=limit, retryAfterSeconds=seconds)
