"""Search over capsules: by words, by meaning, or both; the command line, HTTP and MCP all come here.

A node's score is that of its words (BM25F, see ``common.sidecar.words``) as a share of the best one's, plus what it is
nearer to the question in meaning than nodes are on average, counted in standard deviations of all cosines: that has
the same scale for every model and capsule size. Callers, callees, containers and members of the best hits then get a
share of their scores. ``scripts/bench retrieval`` measures it; ``docs/decisions.md`` has what else was tried.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.embedding.port import Embedder, Model
from common.errors import InvalidRequest
from common.sidecar.open import Node, Scope, Sidecar
from common.sidecar.words import best_rows
from common.text import split_identifier, stem

Mode = Literal["lexical", "semantic", "hybrid"]

MAX_LIMIT = 1000
MAX_QUERY_CHARS = 2000
MAX_QUERY_WORDS = 48
DEPTH = 200
"""Candidates of each retriever before they are fused."""
MEANING_WEIGHT = 0.15
"""What one standard deviation of cosine counts; the best match of words counts 1."""
EXACT_NAME, SAME_NAME = 3.0, 1.5
"""What it counts that a whole name is the query, or is it written differently."""
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
_PLAIN = Scope(labels=tuple(sorted(PLAIN_LABELS)))

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
    are any; ``semantic`` needs them in every capsule. Raises InvalidRequest, what ``Embedder.embed`` does, and
    sqlite3.DatabaseError for a damaged sidecar.
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
    by_word = _by_word(capsules, words, scope) if words and mode != "semantic" else {}
    by_meaning = _by_meaning(capsules, query, scope, should_stop) if words and mode != "lexical" else {}
    found = _fused(by_word, by_meaning, max(limit, DEPTH))
    if not scope.labels:
        _put_symbols_first(capsules, found)
    linked = _link(capsules, scope, found) if by_word else {}
    named = {} if mode == "semantic" else _prefer_exact(capsules, query, scope, found)
    best = sorted(found, key=lambda place: (-found[place], place))[:limit]
    nodes = _nodes(capsules, [*best, *linked.values()])
    hits = []
    for place in best:
        node = nodes[place]
        number, position = place
        why = [named[place]] if place in named else []
        if number in by_word and by_word[number][position] > 0:
            why.append(_matched_words(node, words))
        cosine = by_meaning[number].cosine(position) if number in by_meaning else None
        if cosine is not None:
            why.append(f"meaning {cosine:.2f}")
        if place in linked:
            why.append(f"next to {nodes[linked[place]].name}")
        hits.append(Hit(capsules[number].name, node, found[place], "; ".join(why)))
    return hits


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


class _Meaning(NamedTuple):
    """How near the nodes of a capsule are to a question; ``positions[i]`` belongs to ``scores[i]``."""

    positions: NDArray[np.int64]
    """In order."""
    scores: NDArray[np.float32]
    """Standard deviations above the mean; 0 for what is below it or not looked for."""
    cosines: NDArray[np.float32]

    def cosine(self, position: int) -> float | None:
        """The cosine of a node that it counts for."""
        row = int(np.searchsorted(self.positions, position))
        near = row < len(self.positions) and self.positions[row] == position and self.scores[row] > 0
        return float(self.cosines[row]) if near else None


def _by_word(capsules: Sequence[Searched], words: list[str], scope: Scope) -> dict[int, NDArray[np.float32]]:
    """BM25F by position, for each capsule: their statistics differ little where they hold code."""
    return {number: capsule.sidecar.word_scores(words, scope=scope) for number, capsule in enumerate(capsules)}


def _by_meaning(
    capsules: Sequence[Searched], query: str, scope: Scope, should_stop: Callable[[], None]
) -> dict[int, _Meaning]:
    """For each capsule with vectors; mean and deviation are of all that the same model embedded."""
    questions: dict[Model, NDArray[np.float32]] = {}
    cosines: dict[Model, dict[int, NDArray[np.float32]]] = {}
    for number, (_, _, vectors) in enumerate(capsules):
        if vectors is None or not len(vectors.positions):
            continue
        model = vectors.embedder.model
        if model not in questions:
            text = split_identifier(query)
            questions[model] = vectors.embedder.embed([text], purpose="query", should_stop=should_stop).vectors[0]
        cosines.setdefault(model, {})[number] = vectors.cosines(questions[model])
    found = {}
    for by_capsule in cosines.values():
        everything = np.concatenate([*by_capsule.values()])
        mean, deviation = everything.mean(dtype=np.float64), everything.std(dtype=np.float64)
        for number, own in by_capsule.items():
            _, sidecar, vectors = capsules[number]
            assert vectors is not None
            # One vector, or equal ones: all are as near.
            scores = (own - np.float32(mean)) / np.float32(deviation) if deviation > 1e-6 else np.ones_like(own)
            # Rounded for the same reason as the cosines.
            scores = np.round(np.maximum(scores, 0), 4)
            if scope != Scope():
                scores[~sidecar.inside(scope)[vectors.positions]] = 0
            found[number] = _Meaning(vectors.positions, scores, own)
    return found


def _fused(by_word: dict[int, NDArray[np.float32]], by_meaning: dict[int, _Meaning], depth: int) -> dict[Place, float]:
    """The best candidates of both with the weighted sum of both scores, 1 for the best."""
    top = max((float(scores.max(initial=0)) for scores in by_word.values()), default=0.0) or 1.0
    found: dict[Place, float] = {}
    for number in sorted({*by_word, *by_meaning}):
        words, meaning = by_word.get(number), by_meaning.get(number)
        chosen = [best_rows(words, depth)] if words is not None else []
        if meaning is not None:
            chosen.append(meaning.positions[best_rows(meaning.scores, depth)])
        positions = np.unique(np.concatenate(chosen))
        total = np.zeros(len(positions))
        if words is not None:
            total += words[positions] / top
        if meaning is not None:
            rows = np.minimum(np.searchsorted(meaning.positions, positions), len(meaning.positions) - 1)
            total += MEANING_WEIGHT * np.where(meaning.positions[rows] == positions, meaning.scores[rows], 0)
        found.update(((number, at), score) for at, score in zip(positions.tolist(), total.tolist(), strict=True))
    most = max(found.values(), default=1.0)
    return {place: round(score / most, 6) for place, score in found.items()}


def _put_symbols_first(capsules: Sequence[Searched], found: dict[Place, float]) -> None:
    plain = [capsule.sidecar.inside(_PLAIN) for capsule in capsules]
    for (number, position), score in found.items():
        if plain[number][position]:
            found[number, position] = round(PLAIN_SHARE * score, 6)


def _link(capsules: Sequence[Searched], scope: Scope, found: dict[Place, float]) -> dict[Place, Place]:
    """Give the neighbours of the best hits a share of their scores, each the most that any hit gives; answers which."""
    hits = sorted(found, key=lambda place: (-found[place], place))[:LINKING_HITS]
    linked: dict[Place, Place] = {}
    for hit in hits:
        number, position = hit
        for near in capsules[number].sidecar.linked(position, LINKS, at_most=MAX_LINKS):
            if near >= 0 and near != position:
                linked.setdefault((number, near), hit)  # the first hit is the best one
    new = [place for place in linked if place not in found]
    for number, (_, sidecar, _) in enumerate(capsules):
        positions = [at for capsule, at in new if capsule == number]
        plain = None if scope.labels else sidecar.inside(_PLAIN)
        inside = None if scope == Scope() else sidecar.inside(scope)
        for at in positions:
            if (plain is not None and plain[at]) or (inside is not None and not inside[at]):
                del linked[number, at]
    shares = {place: round(LINKED_SHARE * found[hit], 6) for place, hit in linked.items()}
    for place, share in shares.items():
        found[place] = round(found.get(place, 0.0) + share, 6)
    return linked


def _prefer_exact(
    capsules: Sequence[Searched], query: str, scope: Scope, found: dict[Place, float]
) -> dict[Place, str]:
    """Put nodes whose whole name is the query before all others; answers what makes them so."""
    named = {}
    for number, (_, sidecar, _) in enumerate(capsules):
        for node in sidecar.nodes(sidecar.named(query, scope=scope)):
            same = node.name == query.strip()
            place = number, node.position
            found[place] = round(found.get(place, 0.0) + (EXACT_NAME if same else SAME_NAME), 6)
            named[place] = "exact name" if same else "the same name written differently"
    return named


def _nodes(capsules: Sequence[Searched], places: Iterable[Place]) -> dict[Place, Node]:
    by_capsule: dict[int, list[int]] = {}
    for number, position in dict.fromkeys(places):
        by_capsule.setdefault(number, []).append(position)
    found = {
        (number, node.position): node
        for number, positions in by_capsule.items()
        for node in capsules[number].sidecar.nodes(positions)
    }
    if len(found) < sum(map(len, by_capsule.values())):
        raise sqlite3.DatabaseError("words or edges name positions that no node has")
    return found


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
