"""Read tools over graphs of odd shapes: names without words, and long lists that have no limit of their own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mcp_server import Exports, write_capsule

from common.embedding.choice import Engines
from common.embedding.engine import OpenEngines
from common.sidecar.words import FIELDS
from common.storage import FileStorage
from control_plane.operations.keys import EVERYBODY
from control_plane.reading.artifacts import Artifacts
from control_plane.reading.library import Library
from control_plane.reading.places import ExportPlaces
from control_plane.reading.reader import Reader
from control_plane.reading.search import MAX_LIMIT

STEPS = MAX_LIMIT + 200
NAMES = ["Ⓐ", "==", "_", "🦀🦀", "关于数据", "مرحبا"]

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """Asks a tool over a graph of a long process, all of it in one file, and of odd names."""
    steps = [f"step {number:04d}" for number in range(STEPS)]
    nodes = [{"id": "flow", "label": "Process", "properties": {"name": "flow"}}]
    nodes += [
        {"id": step, "label": "Function", "properties": {"name": step, "filePath": "a.py", "startLine": line}}
        for line, step in enumerate(steps, 1)
    ]
    nodes += [{"id": f"of {name}", "label": "Function", "properties": {"name": name}} for name in NAMES]
    relationships = [
        {"id": f"r{at}", "sourceId": step, "targetId": "flow", "type": "STEP_IN_PROCESS", "confidence": 1, "step": at}
        for at, step in enumerate(steps, 1)
    ]
    graph = tmp_path / "graph.json"
    graph.write_text(json.dumps({"nodes": nodes, "relationships": relationships}))
    write_capsule(graph, tmp_path / "odd.mv2", vectors=False)
    with closing(OpenEngines(Engines())) as engines:
        artifacts = Artifacts(FileStorage([]), tmp_path / "copies", 1)
        library = Library(artifacts, engines.get, capacity=1)
        reader = Reader(ExportPlaces(Exports(), tmp_path, external=False, note=[].append), library, budget=10_000_000)

        def answer(tool: str, **arguments: Any) -> dict[str, Any]:
            found: dict[str, Any] = json.loads(
                asyncio.run(reader.ask(tool, {**arguments, "locator": {"capsulePath": "odd.mv2"}}, EVERYBODY)).body
            )
            return found

        yield answer
        library.close()
        artifacts.close()


@pytest.mark.parametrize("query", [*NAMES, "ⓐ"])
def test_a_name_that_has_no_words_is_found_by_words_too(ask: Ask, query: str) -> None:
    for tool in ("symbol_lookup", "text_search"):
        answer = ask(tool, query=query)
        wanted = query.replace("ⓐ", "Ⓐ")
        assert answer["result"]["items"][0]["name"] == wanted
        assert answer["confidence"]["tier"] == "high"


@pytest.mark.parametrize(
    ("tool", "given", "items"),
    [("process_get", {"processId": "flow"}, "steps"), ("file_outline", {"filePath": "a.py"}, "symbols")],
)
def test_a_long_list_without_a_limit_comes_in_pages_each_item_once(
    ask: Ask, tool: str, given: dict[str, str], items: str
) -> None:
    found, cursor, pages = [], None, 0
    while pages == 0 or cursor:
        answer = ask(tool, **given, **({"cursor": cursor} if cursor else {}))
        found += [item.get("node", item)["id"] for item in answer["result"][items]]
        cursor = answer["pagination"]["nextCursor"]
        assert answer["pagination"]["truncated"] == (cursor is not None)
        pages += 1
    assert pages == 2
    assert found == [f"step {number:04d}" for number in range(STEPS)]


def test_query_explain_tells_the_weights_that_search_uses(ask: Ask) -> None:
    signals = {
        signal["signal"]: signal["weight"] for signal in ask("query_explain", task="t")["result"]["rankingSignals"]
    }
    assert {f"words of the {field}": weight for field, weight in FIELDS.items()}.items() <= signals.items()
    [hit] = ask("text_search", query="Ⓐ")["result"]["items"]
    assert hit["score"] == signals["exact name"]
