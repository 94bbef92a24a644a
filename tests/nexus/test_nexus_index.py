"""The index in memory, and the adapter of Vectorizer over a server that does as it is told, do what a space needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from nexus.index_conformance import DIMENSION, IndexConformance
from nexus.vectorizer_twin import Twin
from prometheus_client import CollectorRegistry

from control_plane.nexus.index import VectorIndex, name_of
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.nearest import Nearest
from control_plane.nexus.space import Space
from control_plane.nexus.vectorizer import Vectorizer


class InFiles:
    """Snapshots of an index in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self) -> VectorIndex:
        return Nearest.open(self._path, DIMENSION) or Nearest(DIMENSION)

    def close(self, space: Space) -> None:
        space.save(self._path)


class OnServer:
    """A server that outlives the process."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._opened: list[Vectorizer] = []

    def open(self) -> VectorIndex:
        server = Vectorizer(self._url, None, NexusMetrics(CollectorRegistry()))
        self._opened.append(server)
        return server.index("client/model/32", DIMENSION)

    def close(self, space: Space) -> None: ...

    def end(self) -> None:
        """Close all connections."""
        for server in self._opened:
            server.close()


class TestInMemory(IndexConformance):
    """All that the index in memory does."""

    @pytest.fixture
    def shelf(self, tmp_path: Path) -> InFiles:
        return InFiles(tmp_path / "snapshot")


class TestAdapter(IndexConformance):
    """All that the adapter itself does, where the server does as it is told."""

    @pytest.fixture
    def shelf(self) -> Iterator[OnServer]:
        twin = Twin()
        with twin.running():
            shelf = OnServer(twin.url)
            yield shelf
            shelf.end()


def test_spaces_have_names_of_their_own_whatever_theirs_has() -> None:
    names = ["a/b/3", "a/b/4", "a//b/3", "A/b/3", "../x/3", "a\0/b/3", "ä/b/3", "x" * 1_000 + "/3", "a/b/3 "]
    found = [name_of(name) for name in names]
    assert len(set(found)) == len(names)
    assert all(one.isascii() and one.isalnum() and len(one) == 40 for one in found)
