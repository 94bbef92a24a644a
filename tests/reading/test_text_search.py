"""``text_search`` over one capsule and over several: filters, pages, confidence, and what is wrong with a question."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mcp_server import GRAPHS, Exports, McpServer, raw_graph, write_capsule

OWN = GRAPHS[0]
PARTS = ["control_plane", "handler"]
"""Folders of the example that are capsules of their own: so there are several wherever this runs."""


@pytest.fixture(scope="module")
def raw(real_graphs: dict[str, Path]) -> dict[str, tuple[list[Any], list[Any]]]:
    """Nodes and relationships of each graph as they stand in its file."""
    return {name: raw_graph(real_graphs[name]) for name in GRAPHS if name in real_graphs}


@pytest.fixture(scope="module")
def capsules(
    capsules: dict[str, Path], real_graphs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Those of all graphs, and of the parts."""
    lines = [json.loads(line) for line in gzip.decompress(real_graphs[OWN].read_bytes()).splitlines()]
    found = dict(capsules)
    for part in PARTS:
        nodes = {
            line["data"]["id"]
            for line in lines
            if line["type"] == "node" and _path(line["data"]).startswith(f"{part}/")
        }
        kept = [line for line in lines if _ends(line) <= nodes]
        file = tmp_path_factory.mktemp("parts") / f"{part}.graph.ndjson.gz"
        file.write_bytes(gzip.compress("".join(f"{json.dumps(line)}\n" for line in kept).encode()))
        folder = capsules[OWN].parents[1] / part
        folder.mkdir()
        found[part] = write_capsule(file, folder / "graph.mv2", vectors=False)
    return found


def _ends(line: dict[str, Any]) -> set[str]:
    """The nodes that a line of a graph is about."""
    data = line["data"]
    return {data["id"]} if line["type"] == "node" else {data["sourceId"], data["targetId"]}


@pytest.fixture(scope="module")
def mcp_server(capsules: dict[str, Path]) -> Iterator[McpServer]:
    """A server over the capsules; the example of this repository is the newest export."""
    exports = Exports()
    for name in reversed(capsules):
        exports.add(name, capsules[name].as_uri())
    with McpServer(capsules[OWN].parents[1], exports) as server:
        yield server


@pytest.fixture(scope="module")
def names(capsules: dict[str, Path]) -> list[str]:
    """Exports that are there; the first one has vectors."""
    return list(capsules)


def _pages(server: McpServer, **arguments: Any) -> Iterator[dict[str, Any]]:
    cursor = None
    while True:
        answer = server.ask("text_search", **arguments, **({"cursor": cursor} if cursor else {}))
        yield answer
        cursor = answer["pagination"]["nextCursor"]
        if cursor is None:
            return


def _items(server: McpServer, **arguments: Any) -> list[dict[str, Any]]:
    return [item for page in _pages(server, **arguments) for item in page["result"]["items"]]


def _also(names: list[str]) -> list[dict[str, str]]:
    return [{"jobId": name} for name in names[1:]]


def test_several_capsules_answer_one_question_in_one_order(mcp_server: McpServer) -> None:
    items = _items(mcp_server, query="run handler", limit=200, also=_also([OWN, *PARTS]))
    assert {item["capsule"] for item in items} == {OWN, *PARTS}
    assert [item["score"] for item in items] == sorted((item["score"] for item in items), reverse=True)
    assert len({(item["capsule"], item["id"]) for item in items}) == len(items)


def test_a_single_capsule_is_not_named_even_where_it_is_given_twice(mcp_server: McpServer, names: list[str]) -> None:
    alone = mcp_server.ask("text_search", query="run handler", locator={"jobId": names[0]})["result"]
    twice = mcp_server.ask("text_search", query="run handler", also=[{"jobId": names[0]}] * 3)["result"]
    assert alone == twice
    assert all("capsule" not in item for item in alone["items"])


def test_a_capsule_is_named_as_it_was_asked_for(mcp_server: McpServer, capsules: dict[str, Path]) -> None:
    path = str(capsules[OWN].relative_to(capsules[OWN].parents[1]))
    items = _items(mcp_server, query="job", limit=200, locator={"capsulePath": path}, also=[{"jobId": PARTS[0]}])
    assert {item["capsule"] for item in items} == {path, PARTS[0]}


@pytest.mark.parametrize("limit", [7, 64, 200])
@pytest.mark.parametrize("query", ["capsule frames", "why nothing is lost when power fails"])
def test_pages_give_each_item_once(mcp_server: McpServer, names: list[str], query: str, limit: int) -> None:
    for also in ([], _also(names)):
        whole = _items(mcp_server, query=query, limit=200, also=also)
        assert _items(mcp_server, query=query, limit=limit, also=also) == whole
        assert len({(item.get("capsule"), item["id"]) for item in whole}) == len(whole)


def test_a_cursor_belongs_to_its_question_and_to_all_its_capsules(mcp_server: McpServer, names: list[str]) -> None:
    asked: dict[str, Any] = {"query": "job", "limit": 5, "also": _also(names)}
    cursor = mcp_server.ask("text_search", **asked)["pagination"]["nextCursor"]
    assert mcp_server.ask("text_search", **{**asked, "limit": 9}, cursor=cursor)["result"]["items"]
    others: list[dict[str, Any]] = [
        {"query": "jobs"},
        {"also": []},
        {"also": asked["also"][:1]},
        {"labels": ["Class"]},
        {"filePrefix": "common/"},
        {"scope": "symbols"},
    ]
    for change in others:
        error = mcp_server.fail("text_search", **{**asked, **change}, cursor=cursor)
        assert error["code"] == "INVALID_ARGUMENT", change


def test_filters_are_equal_to_what_the_graph_says(
    mcp_server: McpServer, raw: dict[str, tuple[list[Any], list[Any]]]
) -> None:
    for name, (nodes, edges) in raw.items():
        kept = {node["id"]: node for node in nodes}
        members: dict[str, set[str]] = {}
        having: dict[str, set[str]] = {}
        for edge in edges:
            having.setdefault(edge["type"], set()).update((edge["sourceId"], edge["targetId"]))
            if edge["type"] == "MEMBER_OF":
                members.setdefault(edge["targetId"], set()).add(edge["sourceId"])
        community = max(members, key=lambda found: (len(members[found]), found))
        folder = sorted(node["properties"].get("filePath") or "" for node in nodes)[len(nodes) // 2].rpartition("/")[0]
        filters: list[tuple[dict[str, Any], set[str]]] = [
            ({"labels": ["Class", "Function"]}, {i for i, n in kept.items() if n["label"] in ("Class", "Function")}),
            ({"filePrefix": folder}, {i for i, n in kept.items() if _path(n).startswith(folder)}),
            ({"communityId": community}, members[community]),
            ({"relationTypes": ["CALLS"]}, having["CALLS"]),
            ({"relationTypes": ["EXTENDS", "HAS_METHOD"]}, having["EXTENDS"] | having["HAS_METHOD"]),
        ]
        every = {key: value for one, _ in filters[:3] for key, value in one.items()}
        filters.append((every, filters[0][1] & filters[1][1] & filters[2][1]))
        for given, expected in filters:
            # A node of the filter is found by its own name, one outside is not.
            inside = sorted(expected)[:: max(1, len(expected) // 8)]
            outside = sorted(kept.keys() - expected)[:: max(1, len(kept) // 8)]
            asked = [kept[at]["properties"]["name"] for at in [*inside, *outside]]
            locator = {"locator": {"jobId": name}}
            calls = [("text_search", {"query": query, "limit": 50, **locator, **given}) for query in asked]
            for at, answer in zip([*inside, *outside], mcp_server.ask_all(calls), strict=True):
                found = {item["id"] for item in answer["result"]["items"]}
                assert found <= expected, (name, given)
                if at in expected and _rare(kept[at]["properties"]["name"], expected, kept):
                    assert at in found, (name, given, at)


def _path(node: dict[str, Any]) -> str:
    return str(node["properties"].get("filePath") or "")


def _rare(name: str, inside: set[str], kept: dict[str, Any]) -> bool:
    """Fewer nodes of a filter have this name than an answer has items."""
    return sum(1 for at in inside if at in kept and kept[at]["properties"]["name"] == name) < 25


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"labels": ["Clas"]}, "labels: there is no 'Clas' here; there are "),
        ({"relationTypes": ["calls"]}, "relationTypes: there is no 'calls' here; there are "),
        ({"communityId": "comm_none"}, "communityId: there is no community 'comm_none' here"),
        ({"filePrefix": "no/such"}, "filePrefix: no path here begins with 'no/such'"),
        ({"labels": ["Class"], "scope": "files"}, "labels: none of them is of scope files"),
        ({"labels": "Class"}, "labels"),
        ({"also": [{"jobId": OWN}] * 8}, "also"),
        ({"also": [{}, {"path": "x"}]}, "also"),
        ({"filePrefix": ""}, "filePrefix"),
    ],
)
def test_a_wrong_filter_is_told_what_is_wrong(mcp_server: McpServer, arguments: dict[str, Any], said: str) -> None:
    error = mcp_server.fail("text_search", query="frames", **arguments)
    assert error["code"] == "INVALID_ARGUMENT"
    assert error["message"].startswith(said)


def test_a_capsule_that_is_not_there_is_not_left_out_in_silence(mcp_server: McpServer) -> None:
    assert mcp_server.fail("text_search", query="frames", also=[{"jobId": "nobody"}])["code"] == "NOT_FOUND"
    outside = mcp_server.fail("text_search", query="frames", also=[{"capsulePath": "/etc/passwd"}])
    assert outside["code"] == "INVALID_ARGUMENT"


def test_a_filter_of_one_capsule_is_no_mistake_where_several_are_searched(
    mcp_server: McpServer, names: list[str]
) -> None:
    own = _items(mcp_server, query="frames", filePrefix="common/frames/", limit=200)
    both = _items(mcp_server, query="frames", filePrefix="common/frames/", limit=200, also=_also(names))
    assert {item["id"] for item in both} == {item["id"] for item in own}


@pytest.mark.parametrize(
    "hostile", ["'", "%", "'; DROP TABLE nodes; --", "\0", "\ud7ff\uffff", "\U0010ffff", "../" * 9]
)
def test_hostile_filters_are_only_text(mcp_server: McpServer, hostile: str) -> None:
    for given in (
        {"labels": [hostile]},
        {"filePrefix": hostile},
        {"communityId": hostile},
        {"relationTypes": [hostile]},
    ):
        assert mcp_server.fail("text_search", query=hostile, **given)["code"] == "INVALID_ARGUMENT"
    assert mcp_server.ask("text_search", query=hostile)["tool"] == "text_search"


def test_meaning_is_searched_only_where_words_are_not_sure(mcp_server: McpServer, names: list[str]) -> None:
    for also in ([], _also(names)):
        sure = mcp_server.ask("text_search", query="ProgressReporter", also=also)
        assert (sure["result"]["semanticUsed"], sure["confidence"]["tier"]) == (False, "high")
        unsure = mcp_server.ask("text_search", query="why nothing is lost when power fails", also=also)
        assert (unsure["result"]["semanticUsed"], unsure["confidence"]["tier"]) == (True, "low")
        nothing = mcp_server.ask("text_search", query="qqzzxx", labels=["Class"], also=also)
        assert nothing["confidence"]["tier"] == "low"
