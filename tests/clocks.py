"""Time that passes when a test says so."""

from __future__ import annotations

import asyncio


class Ahead(asyncio.SelectorEventLoop):
    """A loop whose clock can be put on; give it to ``asyncio.Runner`` as its loop."""

    seconds = 0.0

    def time(self) -> float:
        """Seconds, with those that it was put on by."""
        return super().time() + self.seconds
