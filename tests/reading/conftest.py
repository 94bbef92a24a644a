"""Capsules of real graphs, and a server that reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mcp_server import GRAPHS, Exports, McpServer, write_capsule


@pytest.fixture(scope="session")
def capsules(real_graphs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A capsule for each real graph that is there, by the graph's file name."""
    root = tmp_path_factory.mktemp("exports")
    found = {}
    for name in GRAPHS:
        if name in real_graphs:
            folder = root / name.partition(".")[0]
            folder.mkdir()
            found[name] = write_capsule(real_graphs[name], folder / "graph.mv2", vectors=name == GRAPHS[0])
    return found


@pytest.fixture(scope="session")
def mcp_server(capsules: dict[str, Path]) -> Iterator[McpServer]:
    """A server over the capsules of the real graphs; the example of this repository is the newest export."""
    exports = Exports()
    for name in reversed(GRAPHS):
        if name in capsules:
            exports.add(name, capsules[name].as_uri())
    with McpServer(capsules[GRAPHS[0]].parents[1], exports) as server:
        yield server
