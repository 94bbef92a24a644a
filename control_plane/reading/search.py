"""Search over one capsule: by words, by meaning, or both; the command line, HTTP and MCP all come here.

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

from common.contract import Wire
from common.embedding.port import Embedder
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


class Hit(Wire):
    """One result; ``score`` compares hits of one answer only, ``why`` says in words what matched."""

    id: str
    uri: str
    kind: str
    title: str
    score: float
    why: str


class Vectors:
    """The vectors of a capsule, over all its parts: row ``i`` belongs to the frame at ``positions[i]``."""

    def __init__(self, positions: NDArray[np.int64], matrix: NDArray[np.float32], embedder: Embedder) -> None:
        self.positions = positions
        self.matrix = matrix
        self.embedder = embedder

    def nearest(
        self,
        query: str,
        depth: int,
        allowed: NDArray[np.int64] | None,
        should_stop: Callable[[], None] = lambda: None,
    ) -> list[tuple[int, float]]:
        """(position, cosine) of the nearest frames, best first, equal ones by position.

        Raises what ``embed`` does, and what ``should_stop`` raises while it waits for that.
        """
        if not len(self.positions):
            return []
        vectors = self.embedder.embed([query], purpose="query", should_stop=should_stop).vectors
        # Rounded, so that the last bits of a sum, which depend on the machine, decide no order.
        scores = np.round(self.matrix @ vectors[0], 5)
        if allowed is not None:
            scores = np.where(np.isin(self.positions, allowed), scores, -np.inf)
        order = np.lexsort((self.positions, -scores))[:depth]
        return [(int(self.positions[i]), float(scores[i])) for i in order if np.isfinite(scores[i])]


def query_words(query: str) -> list[str]:
    """The distinct words of a query, identifiers split, stop words dropped unless nothing else is left."""
    words = list(dict.fromkeys(split_identifier(query[:MAX_QUERY_CHARS]).split()))
    return ([word for word in words if word not in STOP_WORDS] or words)[:MAX_QUERY_WORDS]


def search(
    sidecar: Sidecar,
    query: str,
    *,
    mode: Mode = "hybrid",
    limit: int = 10,
    scope: Scope = Scope(),  # noqa: B008 - immutable
    vectors: Vectors | None = None,
    should_stop: Callable[[], None] = lambda: None,
) -> list[Hit]:
    """The nodes that fit a query, by score, equal ones by id.

    ``query`` is text of any kind, never query syntax; an empty one finds nothing. ``hybrid`` uses ``vectors`` where
    there are any; ``semantic`` needs them. Raises InvalidRequest, and what ``Vectors.nearest`` does.
    """
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidRequest(f"limit: a number from 1 to {MAX_LIMIT} is needed", field="limit")
    if mode == "semantic" and vectors is None:
        raise InvalidRequest("mode: this capsule holds no vectors; export with semantic search enabled", field="mode")
    query = query[:MAX_QUERY_CHARS].encode(errors="replace").decode()  # lone surrogates are no text to SQLite
    words = query_words(query)
    if not query.strip():
        return []
    depth = max(limit, DEPTH)
    # A name of punctuation alone (``_``, ``$``, ``==``) has no words: it is found as an exact name only.
    lexical = [] if mode == "semantic" or not words else sidecar.match(words, limit=depth, scope=scope)
    semantic: list[tuple[int, float]] = []
    if mode != "lexical" and vectors is not None and words:
        allowed = None if scope == Scope() else np.array(sidecar.kept(scope), dtype=np.int64)
        semantic = vectors.nearest(split_identifier(query), depth, allowed, should_stop)
    scores = _fused(lexical, semantic, depth)
    found = _Found({node.position: node for node in sidecar.nodes(scores)}, scores, {})
    if not scope.labels:
        for position, node in found.nodes.items():
            if node.label in PLAIN_LABELS:
                scores[position] *= PLAIN_SHARE
    if mode != "semantic":
        _prefer_exact(sidecar, query, scope, found)
    matched, cosines = {position for position, _ in lexical}, dict(semantic)
    best = sorted(found.nodes, key=lambda position: (-round(scores[position], 6), position))[:limit]
    hits = []
    for position in best:
        node = found.nodes[position]
        why = list(found.reasons.get(position, ()))
        if position in matched:
            why.append(_matched_words(node, words))
        if position in cosines:
            why.append(f"meaning {cosines[position]:.2f}")
        score = round(scores[position], 6)
        hits.append(Hit(id=node.id, uri=node.uri, kind=node.kind, title=node.title, score=score, why="; ".join(why)))
    return hits


def rank_all(
    sidecar: Sidecar,
    queries: Iterable[tuple[str, str]],
    *,
    mode: Mode,
    limit: int = 100,
    vectors: Vectors | None = None,
) -> Iterator[dict[str, object]]:
    """Answer (query id, text) pairs with ``{"query_id", "ranked": [ids]}``, for evaluation. Raises as ``search``."""
    for query_id, text in queries:
        hits = search(sidecar, text, mode=mode, limit=limit, vectors=vectors)
        yield {"query_id": query_id, "ranked": [hit.id for hit in hits]}


class _Found(NamedTuple):
    nodes: dict[int, Node]
    scores: dict[int, float]
    reasons: dict[int, list[str]]


def _fused(lexical: list[tuple[int, float]], semantic: list[tuple[int, float]], depth: int) -> dict[int, float]:
    """The weighted sum of both scores, each from 0 to 1 at its best; a cosine counts from the last candidate's on."""
    share = LEXICAL_SHARE if semantic else 1.0
    top = lexical[0][1] if lexical else 1.0
    scores = {position: share * max(0.0, score / top) for position, score in lexical}
    share = 1.0 - LEXICAL_SHARE if lexical else 1.0
    floor = semantic[-1][1] if len(semantic) == depth else 0.0
    span = semantic[0][1] - floor if semantic else 0.0
    for position, score in semantic:
        scaled = max(0.0, (score - floor) / span) if span > 0 else 1.0
        scores[position] = scores.get(position, 0.0) + share * scaled
    return scores


def _prefer_exact(sidecar: Sidecar, query: str, scope: Scope, found: _Found) -> None:
    """Put nodes whose whole name is the query before all others."""
    for node in sidecar.nodes(sidecar.named(query)):
        if scope.labels and node.label not in scope.labels:
            continue
        if scope.file_prefix is not None and not (node.file_path or "").startswith(scope.file_prefix):
            continue
        same = node.name == query.strip()
        found.nodes[node.position] = node
        found.scores[node.position] = found.scores.get(node.position, 0.0) + (2.0 if same else 1.0)
        found.reasons[node.position] = ["exact name" if same else "the same name written differently"]


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
