"""The embedding port: texts in, unit vectors out, and what that took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

Purpose = Literal["document", "query"]
"""Some models read a question differently from what it is to find."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """What decides a vector beside its text: two engines of equal ``Model`` give the same vectors."""

    provider: str
    name: str
    revision: str
    """Which weights: a hash of the files, a commit, or what the provider calls this version."""
    dimension: int
    precision: str
    """Of the arithmetic: ``float32``, ``bfloat16``, ``float16``, or the number format a provider answers in."""
    layout: str
    """Name of the text layout that it wants (``frames.embed_text``)."""
    max_tokens: int
    """What a text has beyond is cut off."""
    price_per_million_tokens: float = 0.0
    """US dollars."""


class Embedded(NamedTuple):
    """The answer to one call."""

    vectors: NDArray[np.float32]
    """Shape (texts, dimension), rows of unit length, in the order of the texts."""
    tokens: int
    """What the engine read; texts that came from a cache count nothing."""
    truncated: list[int]
    """Which texts were cut at the model's maximum, as far as the engine can tell."""
    batches: int = 1
    """Runs of the model, or requests to the provider that were answered."""
    cache_hits: int = 0
    retries: int = 0


Keep = Callable[[int, NDArray[np.float32], bool], None]
"""Place of a text, its unit vector, and whether the text was cut."""


class Embedder(Protocol):
    """Turns texts into unit vectors; the same text gives the same vector in any batch. Threads may share one."""

    model: Model
    group: int
    """So many texts in one call fill the engine; more are fine."""

    def embed(
        self,
        texts: Sequence[str],
        *,
        purpose: Purpose = "document",
        should_stop: Callable[[], None] = lambda: None,
        keep: Keep | None = None,
    ) -> Embedded:
        """Embed texts. An engine that asks a provider calls ``keep``, from any thread, for each text as it is
        answered: what was paid for can be kept whatever becomes of the rest. One over a cache keeps its documents
        there instead, one that runs here calls it never. ``should_stop`` is called ten times a second while this
        waits for anything slow (on the thread that calls); what it raises ends the call.

        Raises EmbeddingFailed, ProviderRejected, DeviceFailed.
        """
        ...

    def count_tokens(self, texts: Sequence[str]) -> int:
        """How many tokens ``embed`` would read and pay for: exact for models that run here, else rather too many."""
        ...

    def flush(self, should_stop: Callable[[], None] = lambda: None) -> str | None:
        """End an export, failed or not: what is to be kept for others is written. Answers in one line what did not
        work as it should, though every vector is right; None where nothing did."""
        ...

    def close(self) -> None:
        """Let go of memory, threads and connections; nothing is embedded afterwards."""
        ...
