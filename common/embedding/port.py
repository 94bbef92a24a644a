"""The embedding port."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Embedder(Protocol):
    """Turns texts into unit vectors; the same text gives the same vector in any batch."""

    provider: str
    model: str
    dimension: int
    max_tokens: int
    price_per_million_tokens: float
    layout: str
    """Name of the text layout that it wants (``frames.embed_text``); part of every cache key."""

    def embed(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], int, int]:
        """Answer ``(vectors, tokens, truncated)``: a float32 matrix of shape (len(texts), dimension) with rows of
        unit length, the tokens read, and how many texts were cut at ``max_tokens``.

        Raises EmbeddingFailed.
        """
        ...
