"""Static embeddings of WordLlama: a mean of token vectors, on the CPU, from the weights in its wheel."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from common.embedding.port import Embedded, Keep, Model, Purpose
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

    model = Model(
        provider="static",
        name="wordllama-l2-supercat-256",
        revision="0.4.0",
        dimension=256,
        precision="float32",
        layout="static-v2",
        max_tokens=4_096,
    )
    group = _BATCH

    def embed(
        self,
        texts: Sequence[str],
        *,
        purpose: Purpose = "document",
        should_stop: Callable[[], None] = lambda: None,
        keep: Keep | None = None,
    ) -> Embedded:
        """See the port. A text without a single token gets the first axis, as there is no direction to normalise."""
        weights, _ = _load()
        out = np.empty((len(texts), self.model.dimension), dtype=np.float32)
        tokens, truncated = 0, []
        for start in range(0, len(texts), _BATCH):
            should_stop()
            ids = _ids(texts[start : start + _BATCH])
            truncated += [start + row for row, found in enumerate(ids) if len(found) > self.model.max_tokens]
            ids = [row[: self.model.max_tokens] for row in ids]
            tokens += sum(map(len, ids))
            out[start : start + len(ids)] = _pool(weights, ids)
        return Embedded(out, tokens, truncated, batches=-(-len(texts) // _BATCH))

    def count_tokens(self, texts: Sequence[str]) -> int:
        """See the port."""
        return sum(min(len(row), self.model.max_tokens) for row in _ids(texts))

    def flush(self, should_stop: Callable[[], None] = lambda: None) -> str | None:
        """Nothing is kept for others."""
        return None

    def close(self) -> None:
        """Nothing: the weights stay for the next one."""


def _ids(texts: Sequence[str]) -> list[list[int]]:
    _, tokenizer = _load()
    return [encoded.ids for encoded in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


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
