"""Search finds what is meant, in the same order every time, whatever the query holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from common.embedding.static import StaticEmbedder
from common.errors import InvalidRequest
from common.frames import STATIC_V2, frames
from common.graph.canonical import canonical
from common.graph.read import read_graph
from common.sidecar.build import SidecarBuilder
from common.sidecar.open import Scope, Sidecar
from control_plane.reading.search import MAX_LIMIT, Hit, Mode, Searched, Vectors, query_words, rank_all, search

MODES: tuple[Mode, ...] = ("lexical", "semantic", "hybrid")


class Opened(NamedTuple):
    sidecar: Sidecar
    vectors: Vectors

    def search(self, query: str, mode: Mode = "hybrid", limit: int = 10, scope: Scope | None = None) -> list[Hit]:
        return search(self.all, query, mode=mode, limit=limit, scope=scope or Scope())

    @property
    def all(self) -> list[Searched]:
        return [Searched("example", self.sidecar, self.vectors)]


@pytest.fixture(scope="module")
def opened(real_graphs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    graph = canonical(read_graph(real_graphs["memvid-export.graph.ndjson.gz"]))
    all_frames = list(frames(graph, generated_at="2026-01-02T03:04:05.000Z", layout=STATIC_V2))
    path = tmp_path_factory.mktemp("search") / "example.sqlite"
    builder = SidecarBuilder(path)
    builder.add(all_frames, 0, 0)
    builder.finish("ab" * 32)
    embedded = [(at, frame.embed_text) for at, frame in enumerate(all_frames) if frame.embed_text is not None]
    embedder = StaticEmbedder()
    matrix = embedder.embed([text for _, text in embedded]).vectors
    with closing(Sidecar.open(path)) as sidecar:
        yield Opened(sidecar, Vectors(np.array([at for at, _ in embedded]), matrix, embedder))


@pytest.mark.parametrize("mode", ["lexical", "hybrid"])
def test_an_exact_name_comes_first(opened: Opened, mode: Mode) -> None:
    first = opened.search("ProgressReporter", mode)[0]
    assert first.node.title == "Class: ProgressReporter"
    assert first.why.startswith("exact name")
    assert first.node.uri == f"mv2://nodes/{first.node.id}"


@pytest.mark.parametrize("mode", MODES)
def test_words_find_the_symbol_that_they_describe(opened: Opened, mode: Mode) -> None:
    titles = [hit.node.title for hit in opened.search("report progress of a stage", mode)]
    assert any("ProgressReporter" in title or "report" in title for title in titles)


def test_a_name_in_another_style_is_found_first(opened: Opened) -> None:
    first = opened.search("progress_reporter")[0]
    assert first.node.title == "Class: ProgressReporter"
    assert first.why.startswith("the same name written differently")


@pytest.mark.parametrize("mode", MODES)
def test_scores_fall_and_equal_ones_are_ordered_by_id(opened: Opened, mode: Mode) -> None:
    hits = opened.search("capsule writer frames", mode, limit=200)
    assert len(hits) > 20
    assert [(-hit.score, hit.node.id) for hit in hits] == sorted((-hit.score, hit.node.id) for hit in hits)
    assert hits == opened.search("capsule writer frames", mode, limit=200)
    assert len({hit.node.id for hit in hits}) == len(hits)


@pytest.mark.parametrize("mode", MODES)
def test_a_smaller_limit_gives_the_beginning_of_the_same_answer(opened: Opened, mode: Mode) -> None:
    assert opened.search("sidecar", mode, limit=100)[:7] == opened.search("sidecar", mode, limit=7)


@pytest.mark.parametrize("mode", MODES)
def test_filters_keep_labels_and_paths(opened: Opened, mode: Mode) -> None:
    hits = opened.search("frames of a capsule", mode, scope=Scope(labels=("Class",), file_prefix="common/"))
    assert hits
    assert {hit.node.title.partition(":")[0] for hit in hits} == {"Class"}
    assert all(":common/" in hit.node.id for hit in hits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "query",
    [
        '"',
        "* OR *",
        "name:frame",
        "NEAR(a b, 3)",
        "frame AND",
        "(",
        "\0",
        "\ud800\udfff",
        "'; DROP --",
        "ｆｒａｍｅ",
        "x" * 99_999,
    ],
)
def test_hostile_queries_are_only_words(opened: Opened, mode: Mode, query: str) -> None:
    assert len(opened.search(query, mode)) <= 10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("query", ["", "   ", "!?*", "\n\t"])
def test_a_query_without_words_finds_nothing(opened: Opened, mode: Mode, query: str) -> None:
    assert opened.search(query, mode) == []


def test_stop_words_are_dropped_unless_there_is_nothing_else() -> None:
    assert query_words("how does the writer open a file") == ["writer", "open", "file"]
    assert query_words("to be or not to be") == ["to", "be", "or", "not"]
    assert query_words("getUserById") == ["get", "user", "id"]


def test_semantic_search_needs_vectors_and_hybrid_does_without(opened: Opened) -> None:
    with pytest.raises(InvalidRequest, match="no vectors"):
        search([Searched("example", opened.sidecar)], "writer", mode="semantic")
    assert search([Searched("example", opened.sidecar)], "writer", mode="hybrid") != []


@pytest.mark.parametrize("limit", [0, -1, MAX_LIMIT + 1])
def test_a_limit_out_of_range_is_refused(opened: Opened, limit: int) -> None:
    with pytest.raises(InvalidRequest, match="limit"):
        opened.search("writer", limit=limit)


def test_the_callers_of_what_fits_are_found_too(opened: Opened) -> None:
    hits = search(opened.all, "normalise_name", mode="lexical", limit=100)
    node = opened.sidecar.node(hits[0].node.id)
    assert node
    assert node.name == "normalise_name"
    callers = {caller.id for caller in opened.sidecar.nodes(opened.sidecar.sources(node.position, "CALLS"))}
    assert callers
    assert callers <= {hit.node.id for hit in hits}


def test_a_batch_ranks_as_single_queries_do(opened: Opened) -> None:
    queries = [("q1", "open the sidecar"), ("q2", ""), ("q3", "ProgressReporter")]
    ranked = list(rank_all(opened.all, queries, mode="hybrid", limit=20))
    assert ranked == [
        {"query_id": query_id, "ranked": [hit.node.id for hit in opened.search(text, limit=20)]}
        for query_id, text in queries
    ]
