"""Search over capsules: by words, by meaning, or both; the command line, HTTP and MCP all come here.

A node's score is that of its words (BM25F, see ``common.sidecar.words``) as a share of the best one's, plus what it is
nearer to the question in meaning than nodes are on average, counted in standard deviations of all cosines: that has
the same scale for every model and capsule size. Callers, callees, containers and members of the best hits then get a
share of their scores. ``scripts/bench retrieval`` measures it; ``docs/decisions.md`` has what else was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.embedding.port import Embedder, Model
from common.errors import InvalidRequest
from common.sidecar.open import Node, Scope, Sidecar
from common.sidecar.words import best
from common.text import split_identifier, stem

Mode = Literal["lexical", "semantic", "hybrid"]

MAX_LIMIT = 1000
MAX_QUERY_CHARS = 2000
MAX_QUERY_WORDS = 48
DEPTH = 200
"""Candidates of each retriever before they are fused."""
MEANING_WEIGHT = 0.15
"""What one standard deviation of cosine counts; the best match of words counts 1."""
LINKED_SHARE = 0.1
"""What a neighbour gets of a hit's score."""
LINKING_HITS = 10
"""So many hits share their scores."""
LINKS = ("CALLS", "HAS_METHOD", "HAS_PROPERTY", "DEFINES")
"""The relationships along which they do."""
MAX_LINKS = 50
"""Neighbours of one hit that get a share, in each direction: where there are more, none does."""
PLAIN_SHARE = 0.6
"""What is no symbol counts this much, unless labels are asked for: a file repeats the words of all it holds."""
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

    def cosines(self, question: NDArray[np.float32]) -> NDArray[np.float32]:
        """The cosine of each row to a question's vector."""
        # Rounded, so that the last bits of a sum, which depend on the machine, decide no order.
        return np.round(self.matrix @ question, 5)


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
    # A name of punctuation alone (``_``, ``$``, ``==``) has no words: it is found as an exact name only.
    lexical = [] if mode == "semantic" or not words else _lexical(capsules, words, scope)
    semantic = [] if mode == "lexical" or not words else _semantic(capsules, words, scope, should_stop)
    found = _fused(lexical, semantic, max(limit, DEPTH))
    nodes = _nodes(capsules, found)
    if not scope.labels:
        for place, node in nodes.items():
            if node.label in PLAIN_LABELS:
                found[place].score *= PLAIN_SHARE
    if lexical:
        _link(capsules, scope, found, nodes)
        nodes = _nodes(capsules, found, nodes)
    if mode != "semantic":
        _prefer_exact(capsules, query, scope, found, nodes)
    best = sorted(nodes, key=lambda place: (-round(found[place].score, 6), place))[:limit]
    return [
        Hit(capsules[place[0]].name, nodes[place], round(found[place].score, 6), found[place].why(nodes[place], words))
        for place in best
    ]


def rank_all(
    capsules: Sequence[Searched],
    queries: Iterable[tuple[str | int, str]],
    *,
    mode: Mode,
    limit: int = 100,
    scope: Scope = Scope(),  # noqa: B008 - immutable
) -> Iterator[dict[str, object]]:
    """Answer (query id, text) pairs with ``{"query_id", "ranked": [ids]}``, for evaluation; an id that several
    capsules have comes once. Raises as ``search``."""
    for query_id, text in queries:
        hits = search(capsules, text, mode=mode, limit=limit, scope=scope)
        yield {"query_id": query_id, "ranked": list(dict.fromkeys(hit.node.id for hit in hits))}


Place = tuple[int, int]
"""Which capsule, and the node's position in it."""


class _Found:
    """How well a node fits, and why."""

    __slots__ = ("cosine", "linked", "name", "score", "words")

    def __init__(self) -> None:
        self.score = 0.0
        self.words = False
        """It holds some of the query's."""
        self.cosine: float | None = None
        self.linked = ""
        """Name of the hit whose neighbour it is."""
        self.name = ""
        """What makes it the one that was named."""

    def why(self, node: Node, words: Sequence[str]) -> str:
        said = [self.name] if self.name else []
        if self.words:
            said.append(_matched_words(node, words))
        if self.cosine is not None:
            said.append(f"meaning {self.cosine:.2f}")
        if self.linked:
            said.append(f"next to {self.linked}")
        return "; ".join(said)


class _Ranked(NamedTuple):
    """Scores of a capsule's nodes, 0 for what does not count; ``positions[i]`` belongs to ``scores[i]``."""

    capsule: int
    positions: NDArray[np.int64] | None
    """In order; None: every position from 0."""
    scores: NDArray[np.float32]
    cosines: NDArray[np.float32] | None = None

    def row(self, position: int) -> int | None:
        """Where a position's score stands."""
        if self.positions is None:
            return position if position < len(self.scores) else None
        row = int(np.searchsorted(self.positions, position))
        return row if row < len(self.positions) and self.positions[row] == position else None


def _nodes(
    capsules: Sequence[Searched], places: Iterable[Place], known: dict[Place, Node] | None = None
) -> dict[Place, Node]:
    found = dict(known or {})
    by_capsule: dict[int, list[int]] = {}
    for number, position in places:
        if (number, position) not in found:
            by_capsule.setdefault(number, []).append(position)
    for number, positions in by_capsule.items():
        found.update(((number, node.position), node) for node in capsules[number].sidecar.nodes(positions))
    return found


def _lexical(capsules: Sequence[Searched], words: list[str], scope: Scope) -> list[_Ranked]:
    """BM25F of all capsules: their statistics differ little where they hold code."""
    return [
        _Ranked(number, None, capsule.sidecar.word_scores(words, scope=scope))
        for number, capsule in enumerate(capsules)
    ]


def _semantic(
    capsules: Sequence[Searched], words: list[str], scope: Scope, should_stop: Callable[[], None]
) -> list[_Ranked]:
    """How much nearer to the question than the average of all that the same model embedded, in standard deviations."""
    questions: dict[Model, NDArray[np.float32]] = {}
    cosines: dict[Model, list[tuple[int, NDArray[np.float32]]]] = {}
    for number, (_, _, vectors) in enumerate(capsules):
        if vectors is None or not len(vectors.positions):
            continue
        model = vectors.embedder.model
        if model not in questions:
            text = " ".join(words)
            questions[model] = vectors.embedder.embed([text], purpose="query", should_stop=should_stop).vectors[0]
        cosines.setdefault(model, []).append((number, vectors.cosines(questions[model])))
    ranked = []
    for found in cosines.values():
        everything = np.concatenate([own for _, own in found]) if len(found) > 1 else found[0][1]
        mean, deviation = everything.mean(dtype=np.float64), everything.std(dtype=np.float64)
        for number, own in found:
            _, sidecar, vectors = capsules[number]
            assert vectors is not None
            # One vector, or equal ones: all are as near.
            scores = (own - mean) / deviation if deviation > 1e-6 else np.ones_like(own)
            np.maximum(scores, 0, out=scores)
            if scope != Scope():
                scores[~np.isin(vectors.positions, np.array(sidecar.kept(scope), dtype=np.int64))] = 0
            ranked.append(_Ranked(number, vectors.positions, np.round(scores, 4), own))
    return ranked


def _fused(lexical: Sequence[_Ranked], semantic: Sequence[_Ranked], depth: int) -> dict[Place, _Found]:
    """The best candidates of both, with the weighted sum of both scores, at most 1."""
    found: dict[Place, _Found] = {}
    for place in (*_best(lexical, depth), *_best(semantic, depth)):
        found.setdefault(place, _Found())
    top = max((float(ranked.scores.max(initial=0)) for ranked in lexical), default=0.0)
    for ranked in lexical:
        for place, row in _rows(found, ranked):
            share = float(ranked.scores[row]) / top if top else 0.0
            found[place].score += share
            found[place].words = share > 0
    for ranked in semantic:
        assert ranked.cosines is not None
        for place, row in _rows(found, ranked):
            found[place].score += MEANING_WEIGHT * float(ranked.scores[row])
            if ranked.scores[row] > 0:
                found[place].cosine = float(ranked.cosines[row])
    most = max((one.score for one in found.values()), default=0.0)
    for one in found.values():
        one.score /= most
    return found


def _rows(found: dict[Place, _Found], ranked: _Ranked) -> Iterator[tuple[Place, int]]:
    for place in found:
        row = ranked.row(place[1]) if place[0] == ranked.capsule else None
        if row is not None:
            yield place, row


def _best(all_ranked: Sequence[_Ranked], depth: int) -> list[Place]:
    """The places of the highest scores above 0."""
    chosen: list[tuple[float, Place]] = []
    for ranked in all_ranked:
        for row, score in best(ranked.scores, depth):
            at = row if ranked.positions is None else int(ranked.positions[row])
            chosen.append((-score, (ranked.capsule, at)))
    return [place for _, place in sorted(chosen)[:depth]]


def _link(capsules: Sequence[Searched], scope: Scope, found: dict[Place, _Found], nodes: dict[Place, Node]) -> None:
    """Give the neighbours of the best hits a share of their scores: each the most that any of its neighbours gives."""
    hits = sorted(found, key=lambda place: (-round(found[place].score, 6), place))[:LINKING_HITS]
    shares: dict[Place, tuple[float, Place]] = {}
    for hit in hits:
        number, position = hit
        share = LINKED_SHARE * found[hit].score
        for near in capsules[number].sidecar.linked(position, LINKS, at_most=MAX_LINKS):
            place = number, near
            if near >= 0 and place != hit and share > shares.get(place, (0.0, hit))[0]:
                shares[place] = share, hit
    new = [place for place in shares if place not in found]
    inside = {
        (number, node.position)
        for number, (_, sidecar, _) in enumerate(capsules)
        for node in sidecar.within(sidecar.nodes([at for capsule, at in new if capsule == number]), scope)
        if scope.labels or node.label not in PLAIN_LABELS
    }
    for place, (share, hit) in shares.items():
        if place in found or place in inside:
            one = found.setdefault(place, _Found())
            one.score += share
            one.linked = nodes[hit].name


def _prefer_exact(
    capsules: Sequence[Searched], query: str, scope: Scope, found: dict[Place, _Found], nodes: dict[Place, Node]
) -> None:
    """Put nodes whose whole name is the query before all others."""
    for number, (_, sidecar, _) in enumerate(capsules):
        for node in sidecar.within(sidecar.nodes(sidecar.named(query)), scope):
            same = node.name == query.strip()
            place = number, node.position
            nodes[place] = node
            one = found.setdefault(place, _Found())
            one.score += 3.0 if same else 1.5
            one.name = "exact name" if same else "the same name written differently"


def _matched_words(node: Node, words: Sequence[str]) -> str:
    said = []
    left = list(words)
    for place, text in (("name", node.name), ("path", node.file_path or "")):
        held = set(map(stem, split_identifier(text).split()))
        here = [word for word in left if stem(word) in held]
        if here:
            said.append(f"{place} has {', '.join(here)}")
            left = [word for word in left if word not in here]
    return "; ".join(said) or "its text or a neighbour has words of the query"
