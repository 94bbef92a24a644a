"""Static embeddings of WordLlama: a mean of token vectors, on the CPU, from the weights in its wheel."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from common.errors import EmbeddingFailed

_WEIGHTS = "weights/l2_supercat_256.safetensors"
_TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"
_BATCH = 1_024


@lru_cache(maxsize=1)
def _load() -> tuple[NDArray[np.float32], Tokenizer]:
    # WordLlama's own package takes 1.3 s to import and pads every batch to its longest text; its files are all we need.
    spec = importlib.util.find_spec("wordllama")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddingFailed("the package wordllama, which holds the static model, is not installed")
    folder = Path(spec.submodule_search_locations[0])
    (weights,) = load_file(folder / _WEIGHTS).values()
    tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return np.ascontiguousarray(weights, dtype=np.float32), tokenizer


class StaticEmbedder:
    """WordLlama ``l2_supercat`` in 256 dimensions; same vectors as ``WordLlama.embed(norm=True)``, in any batch."""

    provider = "static"
    model = "wordllama-l2-supercat-256"
    dimension = 256
    max_tokens = 4_096
    price_per_million_tokens = 0.0
    layout = "static-v1"

    def embed(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], int, int]:
        """See the port. A text without a single token gets the first axis, as there is no direction to normalise."""
        weights, tokenizer = _load()
        out = np.empty((len(texts), self.dimension), dtype=np.float32)
        tokens = truncated = 0
        for start in range(0, len(texts), _BATCH):
            chunk = list(texts[start : start + _BATCH])
            ids = [encoded.ids for encoded in tokenizer.encode_batch_fast(chunk, add_special_tokens=False)]
            truncated += sum(len(row) > self.max_tokens for row in ids)
            ids = [row[: self.max_tokens] for row in ids]
            tokens += sum(map(len, ids))
            out[start : start + len(chunk)] = _pool(weights, ids)
        return out, tokens, truncated


def _pool(weights: NDArray[np.float32], ids: list[list[int]]) -> NDArray[np.float32]:
    """Unit mean vectors of shape (len(ids), dimension); each row depends on its own tokens alone.

    Text by text, whose token vectors stay in the processor's cache: four times as fast as one sum over all of a batch.
    """
    sums = np.empty((len(ids), weights.shape[1]), dtype=np.float32)
    for row, tokens in zip(sums, ids, strict=True):
        np.add.reduce(weights[tokens], axis=0, out=row)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    directionless = norms[:, 0] == 0
    sums[directionless, 0] = norms[directionless, 0] = 1
    np.divide(sums, norms, out=sums)
    return sums
