"""Lists, pairs and searches computed the slow and plain way: every pair by itself, in float64, then sorted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from control_plane.nexus.records import THRESHOLD, TOP_K, Near, Vector


def score(a: Vector, b: Vector) -> float:
    """Of two documents: their cosine, to six decimals."""
    return round(float(np.dot(a.astype(np.float64), b.astype(np.float64))), 6)


def scores(vectors: Mapping[int, Vector]) -> dict[int, dict[int, float]]:
    """Of each document with each, itself too."""
    if not vectors:
        return {}
    matrix = np.stack(list(vectors.values())).astype(np.float64)
    return {
        one: {other: round(value, 6) for other, value in zip(vectors, row, strict=True)}
        for one, row in zip(vectors, (matrix @ matrix.T).tolist(), strict=True)
    }


def lists(vectors: Mapping[int, Vector], top_k: int = TOP_K, threshold: float = THRESHOLD) -> dict[int, list[Near]]:
    """The list of each document."""
    found = {}
    for own, row in scores(vectors).items():
        enough = [Near(other, value) for other, value in row.items() if other != own and value >= threshold]
        found[own] = sorted(enough, key=lambda near: (-near.score, abs(near.id - own), near.id))[:top_k]
    return found


def pairs(
    vectors: Mapping[int, Vector], top_k: int = TOP_K, threshold: float = THRESHOLD
) -> dict[tuple[int, int], float]:
    """Documents, the smaller id first, of which one has the other in its list, with their score."""
    found = lists(vectors, top_k, threshold)
    return {(min(own, near.id), max(own, near.id)): near.score for own, row in found.items() for near in row}


def reverse(vectors: Mapping[int, Vector], top_k: int = TOP_K, threshold: float = THRESHOLD) -> dict[int, list[Near]]:
    """Who has each document in its list."""
    found: dict[int, list[Near]] = {one: [] for one in vectors}
    for own, row in lists(vectors, top_k, threshold).items():
        for near in row:
            found[near.id].append(Near(own, near.score))
    return {one: sorted(row, key=lambda near: (-near.score, near.id)) for one, row in found.items()}


def search(
    vectors: Mapping[int, Vector],
    question: Vector,
    limit: int,
    *,
    allowed: Iterable[int] | None = None,
    threshold: float = -1.0,
) -> list[Near]:
    """The documents nearest to a vector."""
    within = vectors.keys() if allowed is None else vectors.keys() & set(allowed)
    found = [Near(one, score(vectors[one], question)) for one in within]
    enough = [near for near in found if near.score >= threshold]
    return sorted(enough, key=lambda near: (-near.score, near.id))[:limit]
