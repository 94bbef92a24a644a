"""Does search find the right symbol? Queries are docstrings, and no docstring is in what is searched.

``scripts/bench retrieval`` takes the graphs that are here, ``--graph FILE`` (repeatable) others.
"""

from __future__ import annotations

import math
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.embedding.port import Embedder
from common.frames.build import frames
from common.frames.model import Frame
from common.frames.snippets import Snippets
from common.graph.canonical import canonical
from common.graph.model import Graph, Node, WarningCounter
from common.graph.read import read_graph
from common.sidecar.build import SidecarBuilder
from common.sidecar.open import Scope, Sidecar
from common.text import split_identifier
from control_plane.reading.search import Mode, Searched, Vectors, search

SYMBOLS = ("Function", "Method", "Class")
MIN_WORDS = 3
BEST = 10
"""Figures are of the first ten results."""
_DAY = "2026-01-02T00:00:00.000Z"
_NOT_LIBRARY = re.compile(r"(?:^|/)(?:tests?|testing|docs?|docs_src|examples?|tools|scripts|benchmarks?)/|(?:^|/)test_")

_DECLARED = re.compile(r"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)", re.M)
_OPENED = re.compile(r"[rRuU]?(\"\"\"|'''|\"|')")
_BLANK = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n)*[ \t]*")
_MARK = re.compile(r"\"\"\"|'''|[\"'#()\[\]{}:\n]")
_JOINT = re.compile(r"^\.\.\.[ \t]*\n", re.M)
_TRIPLE = re.compile(r"\"\"\"|'''")
_QUOTED = re.compile(r"(\"\"\"|''').*?(?:\1|$)", re.S)
_SENTENCE = re.compile(r"(?<=[.!?])\s")


class Question(NamedTuple):
    """A docstring's first sentence, and the id of the symbol that it stood in."""

    text: str
    answer: str
    library: bool
    """The symbol is no part of tests, docs, examples or tools."""


class Scores(NamedTuple):
    """Means over questions."""

    ndcg: float
    recall: float
    reciprocal_rank: float

    @classmethod
    def of(cls, ranks: Sequence[int | None]) -> Scores:
        """From the answers' places, counted from 0; None where an answer is not among the first ten."""
        found = [rank for rank in ranks if rank is not None]
        count = max(1, len(ranks))
        return cls(
            sum(1 / math.log2(rank + 2) for rank in found) / count,
            len(found) / count,
            sum(1 / (rank + 1) for rank in found) / count,
        )


class Docstring(NamedTuple):
    """Where a docstring stands in a text: its quotes, and what they hold."""

    name: str
    declared: int
    opened: int
    start: int
    end: int
    closed: int


def docstrings(text: str) -> Iterator[Docstring]:
    """The docstrings of Python functions and classes in a text, which may be cut anywhere."""
    for declared in _DECLARED.finditer(text):
        body = _body(text, declared.end())
        if body is None:
            continue
        opened = _OPENED.match(text, _BLANK.match(text, body).end())  # type: ignore[union-attr]
        if opened:
            end = _string_end(text, opened.end(), opened[1])
            joint = _JOINT.search(text, opened.end())
            if end is None or (joint and joint.start() < end):  # the rest was cut away
                end = joint.start() if joint else len(text)
                yield Docstring(declared[1], declared.start(), opened.start(), opened.end(), end, end)
            else:
                closed = end + len(opened[1])
                yield Docstring(declared[1], declared.start(), opened.start(), opened.end(), end, closed)


def _body(text: str, at: int) -> int | None:
    """Where the body of a declaration starts: after the colon that no bracket holds."""
    depth = 0
    while mark := _MARK.search(text, at):
        sign, at = mark[0], mark.end()
        if sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
        elif sign == ":":
            if depth == 0:
                return at
        elif sign == "\n":
            if depth == 0:
                return None
        elif sign == "#":
            at = text.find("\n", at)
            if at < 0:
                return None
        else:
            end = _string_end(text, at, sign)
            if end is None:
                return None
            at = end + len(sign)
    return None


def _string_end(text: str, at: int, quotes: str) -> int | None:
    """Where the quotes that close a string stand."""
    while True:
        end = text.find(quotes, at)
        if end < 0:
            return None
        escape = text.find("\\", at, end)
        if escape < 0:
            return end
        at = escape + 2


def without_docstrings(text: str) -> str:
    """The text with spaces in place of its docstrings, so that every line keeps its number.

    A module's docstring goes too, and what a compacted text holds of a docstring that starts above it.
    """
    pieces, done = [], 0
    places = [(found.opened, found.closed) for found in docstrings(text)]
    start = _OPENED.match(text, _BLANK.match(text).end())  # type: ignore[union-attr]
    if start:
        end = _string_end(text, start.end(), start[1])
        places.insert(0, (start.start(), len(text) if end is None else end + len(start[1])))
    for opened, closed in places:
        if opened >= done:
            pieces += [text[done:opened], _blank(text[opened:closed])]
            done = closed
    text = "".join([*pieces, text[done:]])
    parts = _JOINT.split(text)
    return "...\n".join([parts[0], *map(_without_tail, parts[1:])])


def _without_tail(part: str) -> str:
    """A part of a compacted text without the end of a string that was opened before it."""
    quotes = list(_TRIPLE.finditer(part))
    if len(quotes) % 2 == 0:
        return part
    first = quotes[0]
    if not part[: first.start()].strip():  # it opens one that was cut
        return _blank(part)
    return _blank(part[: first.end()]) + part[first.end() :]


def _blanked(found: re.Match[str]) -> str:
    return _blank(found[0])


def _blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def questions_of(graph: Graph) -> list[Question]:
    """Questions that have one answer: sentences of at least ``MIN_WORDS`` words that one symbol alone starts with."""
    snippets = Snippets(graph, WarningCounter())
    found = []
    for node in graph.nodes:
        if node.label not in SYMBOLS:
            continue
        sentence = _first_sentence(node, snippets.of(node)[0])
        if len(sentence.split()) >= MIN_WORDS:
            found.append((sentence, node))
    times = Counter(sentence for sentence, _ in found)
    return [
        Question(sentence, node.id, not _NOT_LIBRARY.search(node.properties.get("filePath") or ""))
        for sentence, node in found
        if times[sentence] == 1
    ]


def _first_sentence(node: Node, snippet: str) -> str:
    declared = _DECLARED.search(snippet)
    first = next(docstrings(snippet), None)
    if declared is None or first is None or first.declared != declared.start():
        return ""
    if first.name != node.name.rpartition(".")[2]:
        return ""
    return _SENTENCE.split(" ".join(snippet[first.start : first.end].split()), maxsplit=1)[0]


def strip(graph: Graph) -> None:
    """Take every docstring out of a graph; lines keep their numbers."""
    for path, text in graph.files.items():
        if path.endswith((".py", ".pyi")):
            graph.files[path] = without_docstrings(text)
    for node in graph.nodes:
        content = node.properties.get("content")
        if content and (node.properties.get("filePath") or "").endswith((".py", ".pyi")):
            # GitNexus puts spaces in place of line ends, and then nothing says where a declaration starts.
            flat = "\n" not in content
            node.properties["content"] = _QUOTED.sub(_blanked, content) if flat else without_docstrings(content)
        node.properties.pop("description", None)


class Repository:
    """One graph, ready to be searched without its docstrings."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.name = path.name.split(".")[0]
        self.graph = canonical(read_graph(path))
        self.questions = questions_of(self.graph)
        strip(self.graph)
        self._folder = folder

    def frames(self, layout: str) -> list[Frame]:
        """The frames of an export with vectors of that text layout."""
        return list(frames(self.graph, generated_at=_DAY, layout=layout))

    @contextmanager
    def opened(self, embedder: Embedder) -> Iterator[Searched]:
        """The graph as an export leaves it: sidecar and vectors, built as they are built there."""
        everything = self.frames(embedder.model.layout)
        path = self._folder / f"{self.name}.sqlite"
        builder = SidecarBuilder(path)
        builder.add(everything, 0, 0)
        builder.finish("0" * 64)
        embedded = [(at, frame.embed_text) for at, frame in enumerate(everything) if frame.embed_text is not None]
        matrix = embedder.embed([text for _, text in embedded]).vectors
        with closing(Sidecar.open(path)) as sidecar:
            yield Searched(self.name, sidecar, Vectors(np.array([at for at, _ in embedded]), matrix, embedder))


def ranks_by_search(
    searched: Searched,
    questions: Sequence[Question],
    mode: Mode,
    scope: Scope = Scope(),  # noqa: B008 - immutable
) -> list[int | None]:
    """Places of the answers among the first ten hits of ``search``."""
    return [
        _rank(question, [hit.node.id for hit in search([searched], question.text, mode=mode, limit=BEST, scope=scope)])
        for question in questions
    ]


def ranks_by_plain_bm25(repository: Repository, questions: Sequence[Question]) -> list[int | None]:
    """The peer: FTS5 with one column that holds names, paths and signatures of all symbols, split into words."""
    snippets = Snippets(repository.graph, WarningCounter())
    ids, texts = [], []
    for node in repository.graph.nodes:
        if node.label in SYMBOLS:
            ids.append(node.id)
            parts = (node.name, node.properties.get("filePath") or "", snippets.of(node)[1])
            texts.append(" ".join(split_identifier(part) for part in parts))
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE VIRTUAL TABLE plain USING fts5(text, tokenize='porter unicode61')")
        database.executemany("INSERT INTO plain(rowid, text) VALUES (?, ?)", enumerate(texts))
        ranks = []
        for question in questions:
            query = " OR ".join(f'"{word}"' for word in split_identifier(question.text).split())
            best = database.execute(
                "SELECT rowid FROM plain WHERE plain MATCH ? ORDER BY rank, rowid LIMIT 10", (query,)
            )
            ranks.append(_rank(question, [ids[row] for (row,) in best]))
    return ranks


def ranks_by_vectors(searched: Searched, questions: Sequence[Question]) -> list[int | None]:
    """The peer: the nearest vectors of symbols to the question as it stands, and nothing else."""
    vectors = searched.vectors
    assert vectors is not None
    nodes = {node.position: node for node in searched.sidecar.nodes(vectors.positions.tolist())}
    rows = [row for row, at in enumerate(vectors.positions.tolist()) if nodes[at].label in SYMBOLS]
    ids = [nodes[int(vectors.positions[row])].id for row in rows]
    matrix = vectors.matrix[rows]
    asked = vectors.embedder.embed([question.text for question in questions], purpose="query").vectors
    ranks = []
    for question, vector in zip(questions, asked, strict=True):
        best = np.argsort(-(matrix @ vector), kind="stable")[:BEST]
        ranks.append(_rank(question, [ids[row] for row in best]))
    return ranks


def _rank(question: Question, ids: list[str]) -> int | None:
    return ids.index(question.answer) if question.answer in ids else None


class Measured(NamedTuple):
    """One system on one repository."""

    system: str
    questions: int
    everything: Scores
    library: Scores
    """Of the questions whose answers are no tests, docs, examples or tools."""


def evaluate(
    path: Path, folder: Path, embedders: dict[str, Embedder], *, most: int | None = None
) -> Iterator[Measured]:
    """Each system on one graph; ``embedders`` by the name that the figures have; ``most`` takes so many questions.

    The peers rank symbols only; search ranks all that a capsule holds, as it does for its users.
    """
    repository = Repository(path, folder)
    questions = repository.questions
    if most is not None:
        questions = questions[:: max(1, len(questions) // most)][:most]

    def measured(system: str, ranks: list[int | None]) -> Measured:
        library = [rank for rank, question in zip(ranks, questions, strict=True) if question.library]
        return Measured(system, len(ranks), Scores.of(ranks), Scores.of(library))

    yield measured("plain BM25", ranks_by_plain_bm25(repository, questions))
    for number, (name, embedder) in enumerate(embedders.items()):
        with repository.opened(embedder) as searched:
            if number == 0:
                yield measured("lexical", ranks_by_search(searched, questions, "lexical"))
            yield measured(f"{name} alone", ranks_by_vectors(searched, questions))
            yield measured(f"semantic, {name}", ranks_by_search(searched, questions, "semantic"))
            yield measured(f"hybrid, {name}", ranks_by_search(searched, questions, "hybrid"))
