"""How many requests run at once, how long to wait before another try, and how long a text is."""

from __future__ import annotations

import math
import random
import string
import threading
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from common.errors import PROVIDER, PROVIDER_USELESS

POLL_SECONDS = 0.05
"""Between looks at whether to stop."""
FIRST_REQUESTS, MOST_REQUESTS = 4, 32
"""At once: at first, and ever."""
LONGEST_WAIT = PROVIDER.longest_wait
"""Seconds; a server that asks for more (OpenAI does when a day's allowance is spent) is asked again after these."""
_SLOWER = 3.0
"""So many times the best seconds per token seen is a queue on the other side."""
_LATENCIES = 8
"""Answers that one look at latency takes in."""
_LETTERS = string.ascii_letters.encode()


class Patience(NamedTuple):
    """How long to keep trying: the defaults suit an export; whoever waits for a search result wants less."""

    tries: int = PROVIDER.most
    """Of one request that fails for now."""
    useless_answers: int = PROVIDER_USELESS.most
    """Of status 200 without the vectors that were asked for."""
    first_wait: float = PROVIDER.first_wait
    """Seconds before the second try; twice as long before each further one, shortened by up to half at random."""
    total: float = 600.0
    """Seconds of one request with all its tries and waits."""

    def wait(self, tries: int) -> float:
        """Seconds to wait after so many tries."""
        # The exponent is bounded: a server may be asked often, and 2 ** 1024 is no float.
        most = min(LONGEST_WAIT, self.first_wait * 2.0 ** min(tries - 1, 16))
        return random.uniform(0.5, 1.0) * most  # noqa: S311  spreads clients, hides nothing


class Pace:
    """Lets a number of requests run that grows by one with every answer, and is halved when the server cannot keep up:
    at 429, 503 or a timeout, or when a token takes three times as long as it did at best. Threads share one."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = min(FIRST_REQUESTS, most)
        self._running = 0
        self._halvings = 0
        self._held_until = 0.0
        self._largest = 1
        self._recent: list[float] = []
        self._best = math.inf
        self._changed = threading.Condition()

    def enter(self, check: Callable[[], None]) -> int:
        """Wait for a place; ``check`` is called twenty times a second, and what it raises ends the wait."""
        with self._changed:
            while True:
                check()
                held = self._held_until - time.monotonic()
                if held <= 0 and self._running < self.limit:
                    self._running += 1
                    return self._halvings
                self._changed.wait(min(held, POLL_SECONDS) if held > 0 else POLL_SECONDS)

    def leave(self) -> None:
        """Give the place back."""
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def answered(self, entered: int, seconds: float, tokens: int) -> None:
        """A request that was let in at ``entered`` was answered."""
        with self._changed:
            if self._running >= self.limit - 1:  # else the limit was not what held it back
                self.limit = min(self.most, self.limit + 1)
            self._largest = max(self._largest, tokens)
            if tokens * 2 < self._largest:  # a small request's time is not the tokens'
                return
            self._recent.append(seconds / tokens)
            if len(self._recent) < _LATENCIES:
                return
            mean = sum(self._recent) / len(self._recent)
            self._recent.clear()
            if mean > _SLOWER * self._best:
                self._halve(entered)
                self._best = mean  # what is normal may have changed: no second halving for the same
            self._best = min(self._best, mean)

    def overloaded(self, entered: int, hold: float = 0.0) -> None:
        """A request that was let in at ``entered`` met an overloaded server; none starts for ``hold`` seconds."""
        with self._changed:
            self._halve(entered)
            self._held_until = max(self._held_until, time.monotonic() + hold)

    def _halve(self, entered: int) -> None:
        if entered == self._halvings:  # else others of the same moment have halved it already
            self.limit = max(1, self.limit // 2)
            self._halvings += 1


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait, at most 60: ``retry-after-ms``, or ``retry-after`` in seconds or as a date,
    which is held against the answer's own."""
    for name, per_second in (("retry-after-ms", 1_000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / per_second
        except ValueError:
            continue
        if math.isfinite(seconds):
            return min(max(seconds, 0.0), LONGEST_WAIT)
    try:
        until, now = (parsedate_to_datetime(headers.get(name, "")) for name in ("retry-after", "date"))
        return min(max((until - now).total_seconds(), 0.0), LONGEST_WAIT)
    except (ValueError, TypeError):  # no dates, or one without a time zone
        return None


def estimated_tokens(text: str) -> int:
    """Rather too many tokens of one text: a third of its letters, and every other byte but spaces.

    Measured on three graphs (20,000 texts of each layout, 12,000 whole frames) against two tokenizers, Llama 2's and
    BERT's, for each text the larger count: 1.15 to 1.27 times all tokens. Too low for 5 to 14 of 100 texts, short ones,
    by 1.67 times at most. The vocabularies of newer models are larger, which makes for fewer tokens.
    """
    data = text.encode(errors="replace")
    other = len(data.translate(None, _LETTERS))
    return -(-(len(data) - other) // 3) + other - data.count(b" ") + 2


def cut_to(text: str, tokens: int) -> str:
    """The longest beginning of a text that is estimated at no more than so many tokens."""
    short, long = 0, len(text)
    while short < long:
        middle = (short + long + 1) // 2
        if estimated_tokens(text[:middle]) <= tokens:
            short = middle
        else:
            long = middle - 1
    return text[:short]
