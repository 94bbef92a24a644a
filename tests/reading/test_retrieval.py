"""Search finds the symbol that a docstring was taken from, better than plain BM25 or vectors alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from common.embedding.static import StaticEmbedder
from common.graph.canonical import canonical
from common.graph.model import Graph
from common.graph.read import read_graph

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.benchmarks.retrieval import Scores, docstrings, evaluate, questions_of, strip, without_docstrings

EXAMPLE = "memvid-export.graph.ndjson.gz"
RUNPOD = "runpod-python.graph.json.gz"
TEXT = '''"""A module."""
class Users:
    """People that sign in."""

    def find(self, key: str = ")'\\"") -> dict[str, int]:  # a comment: with a colon
        r"""Find one.

        By its key.
        """
        return {"""not""": 1}

    async def save(
        self,
        user,  # who
    ):
        'Keep one.'

    def plain(self): return "text"
'''


def found(path: Path, folder: Path) -> dict[str, Scores]:
    return {one.system: one.everything for one in evaluate(path, folder, {"static": StaticEmbedder()}, most=200)}


def test_hybrid_search_beats_plain_bm25_and_static_vectors_alone(real_graphs: dict[str, Path], tmp_path: Path) -> None:
    scores = found(real_graphs[EXAMPLE], tmp_path)
    best = scores["hybrid, static"]
    for peer in ("plain BM25", "static alone"):
        assert best.ndcg > scores[peer].ndcg + 0.05
        assert best.recall > scores[peer].recall
        assert best.reciprocal_rank > scores[peer].reciprocal_rank
    assert scores["lexical"].ndcg > scores["plain BM25"].ndcg + 0.1


def test_hybrid_search_reaches_its_goal_on_a_real_repository(real_graphs: dict[str, Path], tmp_path: Path) -> None:
    if RUNPOD not in real_graphs:
        pytest.skip("the graph of runpod-python does not lie beside the repository")
    scores = found(real_graphs[RUNPOD], tmp_path)
    assert scores["hybrid, static"].ndcg > 0.76
    assert scores["hybrid, static"].recall > 0.9
    for peer in ("plain BM25", "static alone", "lexical", "semantic, static"):
        assert scores["hybrid, static"].ndcg > scores[peer].ndcg + 0.04


def test_docstrings_are_found_whatever_stands_around_them() -> None:
    assert [(one.name, TEXT[one.start : one.end].split(maxsplit=1)[0]) for one in docstrings(TEXT)] == [
        ("Users", "People"),
        ("find", "Find"),
        ("save", "Keep"),
    ]


def test_a_text_without_its_docstrings_keeps_its_code_and_its_lines() -> None:
    bare = without_docstrings(TEXT)
    assert not any(word in bare for word in ("module", "People", "Find", "By its key", "Keep"))
    assert [line for line in bare.split("\n") if line.strip()] == [
        line
        for line in TEXT.split("\n")
        if line.strip() and not any(word in line for word in ('"""A m', "People", "Find", "By its", '     """', "Keep"))
    ]
    assert len(bare) == len(TEXT)


def test_what_a_compacted_text_has_left_of_a_docstring_is_taken_out_too() -> None:
    bare = without_docstrings('end of one."""\nx = 1\n...\nrest of it.\n"""\ny = 2\ndef f():\n    """Cut\n...\nz = 3\n')
    assert [line.strip() for line in bare.split("\n") if line.strip()][1:] == [
        "x = 1",
        "...",
        "y = 2",
        "def f():",
        "...",
        "z = 3",
    ]


def test_no_question_is_in_what_is_searched(real_graphs: dict[str, Path]) -> None:
    graph: Graph = canonical(read_graph(real_graphs[EXAMPLE]))
    questions = questions_of(graph)
    assert len(questions) > 500
    strip(graph)
    texts = [*graph.files.values(), *(str(node.properties.get("content") or "") for node in graph.nodes)]
    everything = " ".join(" ".join(text.split()) for text in texts)
    left = [question.text for question in questions if len(question.text) > 40 and question.text in everything]
    assert left == []
