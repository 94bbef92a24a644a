"""Search over capsules: by words, by meaning, or both; the command line, HTTP and MCP all come here.

Measured on 800 and 1,209 docstring queries of two repositories (NDCG@10, docstrings left out of what is indexed):
words alone .676 / .404, static vectors alone .655 / .438, reciprocal rank fusion (k = 60) .709 / .464, the weighted
sum of scores used here .758 / .501. The graph takes part by the sidecar's column of neighbour names, through which the
callers, callees and container of what fits are found too; re-ranking by the scores of neighbours lost .01 to .03.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.embedding.port import Embedder, Model
from common.errors import InvalidRequest
from common.sidecar.open import Node, Scope, Sidecar
from common.text import split_identifier

Mode = Literal["lexical", "semantic", "hybrid"]

MAX_LIMIT = 1000
MAX_QUERY_CHARS = 2000
MAX_QUERY_WORDS = 48
DEPTH = 200
"""Candidates of each retriever before they are fused."""
LEXICAL_SHARE = 0.55
PLAIN_SHARE = 0.6
"""What is no symbol counts this much, unless labels are asked for: a file or folder repeats the words of all it holds
(.711 / .445 without)."""
PLAIN_LABELS = frozenset(
    {"File", "Folder", "Section", "Community", "Process", "Variable", "Const", "Property", "Route", "Import"}
)

# fmt: off
STOP_WORDS = frozenset({
    "a", "about", "all", "also", "an", "and", "any", "are", "as", "at", "be", "been", "but", "by", "can", "could",
    "did", "do", "does", "each", "for", "from", "had", "has", "have", "how", "i", "if", "in", "into", "is", "it", "its",
    "may", "might", "must", "not", "of", "on", "only", "or", "our", "shall", "should", "so", "some", "such", "than",
    "that", "the", "their", "them", "then", "there", "these", "they", "this", "those", "to", "use", "used", "using",
    "was", "we", "were", "what", "when", "where", "whether", "which", "while", "who", "why", "will", "with", "would",
    "you", "your",
})
# fmt: on


class Hit(NamedTuple):
    """One result; ``score`` compares hits of one answer only, ``why`` says in words what matched."""

    capsule: str
    """The name of the capsule it is in."""
    node: Node
    score: float
    why: str


class Vectors:
    """The vectors of a capsule, over all its parts: row ``i`` belongs to the frame at ``positions[i]``."""

    def __init__(self, positions: NDArray[np.int64], matrix: NDArray[np.float32], embedder: Embedder) -> None:
        self.positions = positions
        self.matrix = matrix
        self.embedder = embedder

    def nearest(
        self, question: NDArray[np.float32], depth: int, allowed: NDArray[np.int64] | None
    ) -> list[tuple[int, float]]:
        """(position, cosine) of the frames nearest to a question's vector, best first, equal ones by position."""
        # Rounded, so that the last bits of a sum, which depend on the machine, decide no order.
        scores = np.round(self.matrix @ question, 5)
        if allowed is not None:
            scores = np.where(np.isin(self.positions, allowed), scores, -np.inf)
        order = np.lexsort((self.positions, -scores))[:depth]
        return [(int(self.positions[i]), float(scores[i])) for i in order if np.isfinite(scores[i])]


class Searched(NamedTuple):
    """A capsule that is searched."""

    name: str
    """Tells the hits of several capsules apart."""
    sidecar: Sidecar
    vectors: Vectors | None = None


def query_words(query: str) -> list[str]:
    """The distinct words of a query, identifiers split, stop words dropped unless nothing else is left."""
    words = list(dict.fromkeys(split_identifier(query[:MAX_QUERY_CHARS]).split()))
    return ([word for word in words if word not in STOP_WORDS] or words)[:MAX_QUERY_WORDS]


def search(
    capsules: Sequence[Searched],
    query: str,
    *,
    mode: Mode = "hybrid",
    limit: int = 10,
    scope: Scope = Scope(),  # noqa: B008 - immutable
    should_stop: Callable[[], None] = lambda: None,
) -> list[Hit]:
    """The nodes of the capsules that fit a query, by score; equal ones by capsule, as these come, then by id.

    ``query`` is text of any kind, never query syntax; an empty one finds nothing. ``hybrid`` uses vectors where there
    are any; ``semantic`` needs them in every capsule. Raises InvalidRequest, and what ``Embedder.embed`` does.
    """
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidRequest(f"limit: a number from 1 to {MAX_LIMIT} is needed", field="limit")
    if mode == "semantic" and any(capsule.vectors is None for capsule in capsules):
        raise InvalidRequest("mode: this capsule holds no vectors; export with semantic search enabled", field="mode")
    query = query[:MAX_QUERY_CHARS].encode(errors="replace").decode()  # lone surrogates are no text to SQLite
    words = query_words(query)
    if not query.strip():
        return []
    depth = max(limit, DEPTH)
    # A name of punctuation alone (``_``, ``$``, ``==``) has no words: it is found as an exact name only.
    lexical = [] if mode == "semantic" or not words else _lexical(capsules, words, depth, scope)
    semantic = [] if mode == "lexical" or not words else _semantic(capsules, query, depth, scope, should_stop)
    scores = _fused(lexical, semantic, depth)
    found = _Found(_nodes(capsules, scores), scores, {})
    if not scope.labels:
        for place, node in found.nodes.items():
            if node.label in PLAIN_LABELS:
                scores[place] *= PLAIN_SHARE
    if mode != "semantic":
        _prefer_exact(capsules, query, scope, found)
    matched = {place for place, _ in lexical}
    cosines = {place: cosine for ranked in semantic for place, cosine in ranked}
    best = sorted(found.nodes, key=lambda place: (-round(scores[place], 6), place))[:limit]
    hits = []
    for place in best:
        node = found.nodes[place]
        why = list(found.reasons.get(place, ()))
        if place in matched:
            why.append(_matched_words(node, words))
        if place in cosines:
            why.append(f"meaning {cosines[place]:.2f}")
        hits.append(Hit(capsules[place[0]].name, node, round(scores[place], 6), "; ".join(why)))
    return hits


def rank_all(
    capsules: Sequence[Searched], queries: Iterable[tuple[str, str]], *, mode: Mode, limit: int = 100
) -> Iterator[dict[str, object]]:
    """Answer (query id, text) pairs with ``{"query_id", "ranked": [ids]}``, for evaluation. Raises as ``search``."""
    for query_id, text in queries:
        hits = search(capsules, text, mode=mode, limit=limit)
        yield {"query_id": query_id, "ranked": [hit.node.id for hit in hits]}


Place = tuple[int, int]
"""Which capsule, and the node's position in it."""


class _Found(NamedTuple):
    nodes: dict[Place, Node]
    scores: dict[Place, float]
    reasons: dict[Place, list[str]]


def _nodes(capsules: Sequence[Searched], places: Iterable[Place]) -> dict[Place, Node]:
    by_capsule: dict[int, list[int]] = {}
    for number, position in places:
        by_capsule.setdefault(number, []).append(position)
    return {
        (number, node.position): node
        for number, positions in by_capsule.items()
        for node in capsules[number].sidecar.nodes(positions)
    }


def _best(ranked: Iterable[tuple[Place, float]], depth: int) -> list[tuple[Place, float]]:
    return sorted(ranked, key=lambda item: (-item[1], item[0]))[:depth]


def _lexical(capsules: Sequence[Searched], words: list[str], depth: int, scope: Scope) -> list[tuple[Place, float]]:
    """BM25 of all capsules in one order: their statistics differ little where they hold code."""
    return _best(
        (
            ((number, position), score)
            for number, capsule in enumerate(capsules)
            for position, score in capsule.sidecar.match(words, limit=depth, scope=scope)
        ),
        depth,
    )


def _semantic(
    capsules: Sequence[Searched], query: str, depth: int, scope: Scope, should_stop: Callable[[], None]
) -> list[list[tuple[Place, float]]]:
    """The nearest nodes, one order for each model: cosines of different models do not compare."""
    questions: dict[Model, NDArray[np.float32]] = {}
    ranked: dict[Model, list[tuple[Place, float]]] = {}
    for number, (_, sidecar, vectors) in enumerate(capsules):
        if vectors is None or not len(vectors.positions):
            continue
        model = vectors.embedder.model
        if model not in questions:
            text = split_identifier(query)
            questions[model] = vectors.embedder.embed([text], purpose="query", should_stop=should_stop).vectors[0]
        allowed = None if scope == Scope() else np.array(sidecar.kept(scope), dtype=np.int64)
        nearest = vectors.nearest(questions[model], depth, allowed)
        ranked.setdefault(model, []).extend(((number, position), cosine) for position, cosine in nearest)
    return [_best(found, depth) for found in ranked.values()]


def _fused(
    lexical: list[tuple[Place, float]], semantic: list[list[tuple[Place, float]]], depth: int
) -> dict[Place, float]:
    """The weighted sum of both scores, each from 0 to 1 at its best; a cosine counts from the last candidate's on."""
    share = LEXICAL_SHARE if any(semantic) else 1.0
    top = lexical[0][1] if lexical else 1.0
    scores = {place: share * max(0.0, score / top) for place, score in lexical}
    share = 1.0 - LEXICAL_SHARE if lexical else 1.0
    for ranked in semantic:
        floor = ranked[-1][1] if len(ranked) == depth else 0.0
        span = ranked[0][1] - floor if ranked else 0.0
        for place, score in ranked:
            scaled = max(0.0, (score - floor) / span) if span > 0 else 1.0
            scores[place] = scores.get(place, 0.0) + share * scaled
    return scores


def _prefer_exact(capsules: Sequence[Searched], query: str, scope: Scope, found: _Found) -> None:
    """Put nodes whose whole name is the query before all others."""
    for number, (_, sidecar, _) in enumerate(capsules):
        for node in sidecar.within(sidecar.nodes(sidecar.named(query)), scope):
            same = node.name == query.strip()
            place = number, node.position
            found.nodes[place] = node
            found.scores[place] = found.scores.get(place, 0.0) + (2.0 if same else 1.0)
            found.reasons[place] = ["exact name" if same else "the same name written differently"]


def _matched_words(node: Node, words: Sequence[str]) -> str:
    said = []
    left = list(words)
    for place, text in (("name", node.name), ("path", node.file_path or "")):
        held = split_identifier(text).split()
        here = [word for word in left if word in held]
        if here:
            said.append(f"{place} has {', '.join(here)}")
            left = [word for word in left if word not in here]
    return "; ".join(said) or "its text or a neighbour has words of the query"
