"""``GET /v1/exports/{jobId}/search`` of a running server, over exports that it made."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import Server, graph, large_graph
from provider_server import KEY, ProviderServer, provider_server

SEMANTIC = {"semanticEnabled": True}
EXAMPLE = Path(__file__).parents[2] / "examples" / "memvid-export.graph.ndjson.gz"


def _done(server: Server, body: dict[str, Any] | bytes, **headers: str) -> str:
    answer = server.post(body, **headers)
    assert answer.status_code == 202, answer.text
    job_id = str(answer.json()["jobId"])
    assert server.wait(job_id)["type"] == "job_completed", server.job(job_id)
    return job_id


def _search(server: Server, job_id: str, q: str, **params: Any) -> dict[str, Any]:
    answer = server.client.get(f"/v1/exports/{job_id}/search", params={"q": q, **params})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def _fails(server: Server, job_id: str, **params: Any) -> tuple[int, dict[str, Any], httpx.Headers]:
    answer = server.client.get(f"/v1/exports/{job_id}/search", params=params)
    return answer.status_code, answer.json().get("error"), answer.headers


@pytest.fixture(scope="module")
def words(server: Server) -> str:
    """An export without vectors."""
    return _done(server, graph(6, name="words"))


@pytest.fixture(scope="module")
def vectors(server: Server) -> str:
    """An export with vectors of the model that comes with the package."""
    return _done(server, graph(6, name="vectors", options=SEMANTIC))


@pytest.fixture(scope="module")
def real(server: Server) -> str:
    """The export of this repository's own graph."""
    return _done(server, EXAMPLE.read_bytes(), content_type="application/x-ndjson")


@pytest.fixture(scope="module")
def raw() -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Nodes by id, and relationships, as they stand in the file of that graph."""
    with gzip.open(EXAMPLE, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    nodes = {line["data"]["id"]: line["data"] for line in lines if line["type"] == "node"}
    return nodes, [line["data"] for line in lines if line["type"] == "relationship"]


def test_a_hit_says_where_it_is_and_why(server: Server, words: str) -> None:
    answer = _search(server, words, "call_2", limit=1)
    assert (answer["query"], answer["mode"], answer["semanticUsed"], answer["warnings"]) == (
        "call_2",
        "hybrid",
        False,
        [],
    )
    (hit,) = answer["hits"]
    assert hit["score"] > 0
    assert hit["why"].startswith("exact name")
    del hit["score"], hit["why"]
    assert hit == {
        "jobId": words,
        "id": "Function:src/words.py:call_2",
        "uri": "mv2://nodes/Function:src/words.py:call_2",
        "kind": "node",
        "label": "Function",
        "name": "call_2",
        "title": "Function: call_2",
        "filePath": "src/words.py",
        "startLine": None,
        "endLine": None,
    }


def test_meaning_is_used_where_there_are_vectors_and_it_is_asked_for(server: Server, vectors: str) -> None:
    for mode, used in (("lexical", False), ("hybrid", True), ("semantic", True)):
        answer = _search(server, vectors, "call something", mode=mode)
        assert (answer["mode"], answer["semanticUsed"]) == (mode, used)
        assert answer["hits"]
        assert any("meaning" in hit["why"] for hit in answer["hits"]) is used


def test_several_exports_are_searched_together(server: Server, words: str, vectors: str) -> None:
    answer = _search(server, vectors, "call_2", also=[words, vectors, words], limit=200)
    assert {hit["jobId"] for hit in answer["hits"]} == {words, vectors}
    assert {hit["jobId"] for hit in answer["hits"][:2]} == {words, vectors}
    scores = [hit["score"] for hit in answer["hits"]]
    assert scores == sorted(scores, reverse=True)
    assert len({(hit["jobId"], hit["id"]) for hit in answer["hits"]}) == len(scores)
    for mode in ("lexical", "hybrid"):
        first = _search(server, vectors, "call_2", also=words, mode=mode)
        assert first == _search(server, vectors, "call_2", also=words, mode=mode)


def test_filters_are_equal_to_what_the_graph_says(
    server: Server, real: str, raw: tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]
) -> None:
    nodes, edges = raw
    of_type = {
        kind: {end for edge in edges if edge["type"] == kind for end in (edge["sourceId"], edge["targetId"])}
        for kind in ("CALLS", "EXTENDS")
    }
    members: dict[str, set[str]] = {}
    for edge in edges:
        if edge["type"] == "MEMBER_OF":
            members.setdefault(edge["targetId"], set()).add(edge["sourceId"])
    community = max(members, key=lambda found: (len(members[found]), found))
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({"label": ["Class", "Enum"]}, {at for at, node in nodes.items() if node["label"] in ("Class", "Enum")}),
        ({"file": "common/frames/"}, {at for at, node in nodes.items() if _path(node).startswith("common/frames/")}),
        ({"community": community}, members[community]),
        ({"type": ["EXTENDS"]}, of_type["EXTENDS"]),
        ({"type": ["EXTENDS", "CALLS"]}, of_type["EXTENDS"] | of_type["CALLS"]),
    ]
    cases.append(
        ({**cases[1][0], "label": "Function", "type": "CALLS"}, cases[1][1] & of_type["CALLS"] & _labelled(nodes))
    )
    for given, expected in cases:
        names = {nodes[at]["properties"]["name"] for at in sorted(expected)[:12]}
        found: set[str] = set()
        for name in sorted(names):
            found |= {hit["id"] for hit in _search(server, real, name, limit=200, **given)["hits"]}
        assert found <= expected, given
        assert {nodes[at]["properties"]["name"] for at in found} >= names, given


def _path(node: dict[str, Any]) -> str:
    return str(node["properties"].get("filePath") or "")


def _labelled(nodes: dict[str, dict[str, Any]]) -> set[str]:
    return {at for at, node in nodes.items() if node["label"] == "Function"}


@pytest.mark.parametrize(
    ("params", "field", "said"),
    [
        ({}, "q", "must be given"),
        ({"q": "x" * 2001}, "q", "2,000"),
        ({"q": "x", "mode": "fuzzy"}, "mode", "lexical, semantic, hybrid"),
        ({"q": "x", "mode": "semantic"}, "mode", "no vectors"),
        ({"q": "x", "limit": 0}, "limit", "1 to 200"),
        ({"q": "x", "limit": 201}, "limit", "1 to 200"),
        ({"q": "x", "limit": "ten"}, "limit", "whole number"),
        ({"q": "x", "label": "function"}, "label", "there are Function"),
        ({"q": "x", "label": ["Function", "'; DROP TABLE labels; --"]}, "label", "there are Function"),
        ({"q": "x", "type": "CALL"}, "type", "there are CALLS"),
        ({"q": "x", "community": "comm_1"}, "community", "there is no community"),
        ({"q": "x", "file": "lib/"}, "file", "no path here begins with 'lib/'"),
        ({"q": "x", "file": "%"}, "file", "no path here begins with '%'"),
        ({"q": "x", "file": "x" * 4097}, "file", "4,096"),
        ({"q": "x", "label": ["x"] * 51}, "label", "50 times"),
        ({"q": "x", "also": ["x"] * 8}, "also", "7 times"),
    ],
)
def test_a_wrong_question_is_told_the_field_and_what_is_allowed(
    server: Server, words: str, params: dict[str, Any], field: str, said: str
) -> None:
    status, error, _ = _fails(server, words, **params)
    assert (status, error["code"], error["details"]["field"]) == (400, "INVALID_EXPORT_REQUEST", field)
    assert said in error["message"]


@pytest.mark.parametrize(
    "query",
    [
        "",
        "   ",
        '"',
        "* OR *",
        "name:x NEAR(a b)",
        "\0",
        "<script>alert(1)</script>",
        "\U0001f600",
        "'; DROP TABLE nodes; --",
    ],
)
def test_hostile_questions_are_only_words(server: Server, vectors: str, query: str) -> None:
    for mode in ("lexical", "semantic", "hybrid"):
        assert _search(server, vectors, query, mode=mode)["query"] == query


def test_hostile_names_come_back_as_they_are(server: Server) -> None:
    name = "<img src=x onerror=alert(1)>\x1b[2J\u202e" + "y" * 500
    body = graph(3, name="hostile")
    body["nodes"][0]["properties"]["name"] = name
    body["nodes"][0]["properties"]["filePath"] = "../../etc/<b>passwd"
    job = _done(server, body)
    (hit,) = _search(server, job, name, limit=1)["hits"]
    shown = name.replace("\x1b", "\ufffd")  # an export keeps no control characters
    assert (hit["name"], hit["filePath"]) == (shown, "../../etc/<b>passwd")
    assert _search(server, job, "passwd", file="../../etc/<b>")["hits"][0]["name"] == shown


def test_only_completed_exports_can_be_searched(start_server: Any) -> None:
    server = start_server(worker_slots=1, retention_seconds=2)
    done = _done(server, graph(3))
    canceled = server.submit(large_graph())
    assert _fails(server, canceled, q="x")[:2][1]["code"] == "ARTIFACT_NOT_READY"
    server.client.delete(f"/v1/exports/{canceled}")
    server.wait(canceled)
    for job, status, code in (("nobody", 404, "JOB_NOT_FOUND"), (canceled, 409, "ARTIFACT_NOT_READY")):
        for found in (_fails(server, job, q="x"), _fails(server, done, q="x", also=job)):
            assert (found[0], found[1]["code"]) == (status, code) or found[1]["code"] == "JOB_EXPIRED"
    while server.job(done)["status"] != "expired":
        time.sleep(0.1)
    status, error, _ = _fails(server, done, q="x")
    assert (status, error["code"]) == (410, "JOB_EXPIRED")


def test_a_missing_index_is_built_anew_and_a_missing_capsule_is_named(start_server: Any) -> None:
    server = start_server(worker_slots=1)
    job = _done(server, graph(5, name="files"))
    (capsule,) = server.root.rglob("*.mv2")
    (sidecar,) = server.root.rglob("*.index.v1.sqlite")
    whole = _search(server, job, "call_3")
    server.stop()
    sidecar.unlink()
    server.start()
    assert _search(server, job, "call_3") == whole
    server.stop()
    capsule.unlink()
    for path in server.root.rglob("*.index.v1.sqlite"):
        path.unlink()
    server.start()
    status, error, _ = _fails(server, job, q="call_3")
    assert (status, error["code"]) == (410, "ARTIFACT_MISSING")


def test_many_questions_at_once_are_all_answered_alike(server: Server, real: str, vectors: str, words: str) -> None:
    asked = [(real, vectors), (vectors, real), (words, real), (real, words)] * 10
    with ThreadPoolExecutor(16) as pool:
        answers = [*pool.map(lambda pair: _search(server, pair[0], "write a capsule", also=pair[1]), asked)]
    for at, answer in enumerate(answers):
        assert answer == answers[at % 4]
    assert answers[0]["hits"][0]["jobId"] == real


def test_search_wants_the_key(server: Server, words: str) -> None:
    assert httpx.get(f"{server.url}/v1/exports/{words}/search", params={"q": "x"}).status_code == 401


@pytest.fixture(scope="module")
def openai() -> Iterator[ProviderServer]:
    with provider_server("openai", dimension=3_072) as found:
        yield found


def test_hybrid_goes_on_without_an_engine_and_says_so_and_semantic_does_not(
    tmp_path: Path, openai: ProviderServer
) -> None:
    root = tmp_path / "root"
    paying = {
        "MEMVID_EMBEDDING_MODE": "external_api",
        "MEMVID_EMBED_PROVIDER": "openai",
        "OPENAI_EMBED_BASE_URL": openai.url,
        "OPENAI_API_KEY": KEY["openai"],
    }
    with closing(Server(root).start()) as server:
        static = _done(server, graph(6, name="static", options=SEMANTIC))
    with closing(Server(root, env=paying).start()) as server:
        paid = _done(server, graph(6, name="paid", options=SEMANTIC))
        both = _search(server, static, "call_2", also=paid, limit=200)
        assert (both["semanticUsed"], both["warnings"]) == (True, [])
        meant = {hit["jobId"] for hit in both["hits"] if "meaning" in hit["why"]}
        assert meant == {static, paid}

        openai.always("expired key")
        one = _search(server, static, "call_2", also=paid, limit=200)
        assert (one["semanticUsed"], one["warnings"]) == (True, ["SEMANTIC_UNAVAILABLE"])
        assert {hit["jobId"] for hit in one["hits"]} == {static, paid}
        assert {hit["jobId"] for hit in one["hits"] if "meaning" in hit["why"]} == {static}
        alone = _search(server, paid, "call_2")
        assert (alone["semanticUsed"], alone["warnings"]) == (False, ["SEMANTIC_UNAVAILABLE"])
        assert alone["hits"] == _search(server, paid, "call_2", mode="lexical")["hits"]
        status, error, headers = _fails(server, paid, q="call_2", mode="semantic")
        assert (status, error["code"]) == (503, "SEMANTIC_UNAVAILABLE")
        assert int(headers["retry-after"]) > 0
        assert KEY["openai"] not in error["message"] + server.log.read_text()
    asked = len(openai.seen)
    with closing(Server(root).start()) as server:
        missing = _search(server, static, "call_2", also=paid)
        assert (missing["semanticUsed"], missing["warnings"]) == (True, ["SEMANTIC_MODEL_MISSING"])
        status, error, _ = _fails(server, paid, q="call_2", mode="semantic")
        assert (status, error["details"]) == (400, {"field": "mode", "allowed": ["lexical", "hybrid"]})
    assert len(openai.seen) == asked


def test_vectors_of_relationships_are_no_hits(tmp_path: Path) -> None:
    profiles = tmp_path / "profiles.toml"
    profiles.write_text('[profiles.everything]\nembed = ["nodes", "relations"]\n')
    with closing(Server(tmp_path / "root", profiles_file=profiles).start()) as server:
        job = _done(server, graph(6, name="everything", options=SEMANTIC | {"profile": "everything"}))
        assert server.client.get(f"/v1/exports/{job}/report").json()["capsule"]["vectors"] == 12
        for mode in ("semantic", "hybrid"):
            for given in ({}, {"label": "Function"}):
                hits = _search(server, job, "call something", mode=mode, **given)["hits"]
                assert {hit["kind"] for hit in hits} == {"node"}
