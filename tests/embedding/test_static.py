"""The static engine against WordLlama's own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.embedding.static import StaticEmbedder
from common.frames.build import frames
from common.graph.canonical import canonical
from common.graph.read import read_graph

ODD = ["", " ", "\n\t", "🙂", "🙂🙂🙂 🏳️", "\0", "\ud7ff", "e\u0301", "日本語のテキスト", "<s> </s> [PAD] <unk>", "a"]
LONG = "x" * 20_000


@pytest.fixture(scope="module")
def texts(real_graphs: dict[str, Path]) -> list[str]:
    """Texts of a real graph as they are embedded, whole frames, and odd ones."""
    graph = canonical(read_graph(real_graphs["memvid-export.graph.ndjson.gz"]))
    made = list(frames(graph, generated_at="2026-01-02T00:00:00.000Z", layout="static-v2"))
    return [
        *(frame.embed_text for frame in made if frame.embed_text is not None),
        *(frame.text for frame in made[::17]),
        *ODD,
        LONG,
    ]


@pytest.fixture(scope="module")
def wordllama() -> Any:
    """WordLlama itself, from the weights in its wheel."""
    import wordllama

    package = Path(wordllama.__file__).parent
    return wordllama.WordLlama.load(config="l2_supercat", dim=256, cache_dir=package, disable_download=True)


def test_vectors_equal_those_of_wordllama(texts: list[str], wordllama: Any) -> None:
    texts = [text for text in texts if text.strip("\0 \n\t")]  # of no token it makes no vector
    ours, tokens, truncated, *_ = StaticEmbedder().embed(texts)
    theirs = np.concatenate([wordllama.embed([text], norm=True) for text in texts])
    assert ours.shape == theirs.shape == (len(texts), 256)
    far = np.abs(ours - theirs).max(axis=1)
    # WordLlama adds in another order: over thousands of tokens its own rounding is what shows.
    assert far[[len(text) < 4_000 for text in texts]].max() < 1e-6
    assert far.max() < 1e-4
    assert tokens > 10 * len(texts)
    assert [texts[place] for place in truncated] == [max(texts, key=len)]


def test_a_vector_depends_on_its_own_text_alone(texts: list[str]) -> None:
    embedder = StaticEmbedder()
    together, tokens, *_ = embedder.embed(texts)
    order = list(range(len(texts)))
    random.Random(5).shuffle(order)
    shuffled, same_tokens, *_ = embedder.embed([texts[place] for place in order])
    assert shuffled.tobytes() == together[order].tobytes()
    assert tokens == same_tokens
    for size in (1, 7, 512):
        parts = [embedder.embed(texts[start : start + size]).vectors for start in range(0, len(texts), size)]
        assert np.concatenate(parts).tobytes() == together.tobytes()


def test_every_text_has_a_vector_of_unit_length(texts: list[str]) -> None:
    vectors = StaticEmbedder().embed(texts).vectors
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    assert np.allclose(np.linalg.norm(vectors.astype(np.float64), axis=1), 1, atol=1e-6)


def test_a_text_without_a_token_points_along_the_first_axis() -> None:
    vectors, tokens, truncated, *_ = StaticEmbedder().embed([""])
    assert vectors[0].tolist() == [1.0] + [0.0] * 255
    assert (tokens, truncated) == (0, [])


def test_no_texts_give_an_empty_matrix() -> None:
    vectors, tokens, truncated, *_ = StaticEmbedder().embed([])
    assert vectors.shape == (0, 256)
    assert (tokens, truncated) == (0, [])


def test_what_is_longer_than_the_maximum_is_named() -> None:
    embedder = StaticEmbedder()
    vectors, tokens, truncated, *_ = embedder.embed(["word " * 5_000, "word"])
    assert truncated == [0]
    assert tokens < 5_000
    assert vectors[0] @ vectors[1] > 0.9
