"""How many of something may run at once, in all and for one client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import ExportError
from control_plane.errors import RateLimited
from control_plane.operations.metrics import Metrics


class Shares:
    """Places for uploads, downloads or event streams; for one thread.

    Where there are several clients, each may have half of the places that the others leave it, and one in any case. So
    whoever comes next finds room, be the others as busy as they may, and nobody who has a place loses it. Where there
    is only one client, it may have all.
    """

    def __init__(
        self, what: str, total: int, metrics: Metrics, *, several: bool, full: type[ExportError] = RateLimited
    ) -> None:
        """``what`` names the things in messages and in the metric of refusals; ``full`` is raised where no place is
        left at all."""
        self._what = what
        self._total = total
        self._metrics = metrics
        self._several = several
        self._full = full
        self._taken: Counter[str] = Counter()

    @property
    def taken(self) -> int:
        """Places that are taken now."""
        return self._taken.total()

    def of(self, client: str) -> int:
        """Places that a client may have, as things are now."""
        if not self._several:
            return self._total
        return max(1, (self._total - self.taken + self._taken[client]) // 2)

    @contextmanager
    def place(self, client: str) -> Iterator[None]:
        """Take a place for as long as the context lasts. Raises RateLimited where the client has its share, and
        ``full`` where all places are taken."""
        if self.taken >= self._total:
            self._metrics.refused.labels(self._what).inc()
            raise self._full(f"{self._total:,} {self._what} run at once. Try again later.", limit=self._total)
        if self._taken[client] >= (share := self.of(client)):
            self._metrics.refused.labels(f"client_{self._what}").inc()
            message = f"This client has its share of {self._what} ({share:,} of {self._total:,}). Try again later."
            raise RateLimited(message, limit=share)
        self._taken[client] += 1
        try:
            yield
        finally:
            self._taken[client] -= 1
            if not self._taken[client]:
                del self._taken[client]
