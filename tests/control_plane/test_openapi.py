"""The OpenAPI document says what a live server answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from live_server import Server, graph


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    return dict(httpx.get(f"{server.url}/schema/openapi.json").raise_for_status().json())


def _operation(document: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    for template, item in document["paths"].items():
        parts, given = template.split("/"), path.split("/")
        if len(parts) == len(given) and all(p.startswith("{") or p == g for p, g in zip(parts, given, strict=True)):
            return dict(item[method.lower()])
    raise AssertionError(f"{method} {path} is not in the document")


def _check(document: dict[str, Any], answer: httpx.Response) -> None:
    request = answer.request
    operation = _operation(document, request.method, request.url.path)
    said = operation["responses"].get(str(answer.status_code))
    assert said, f"{request.method} {request.url.path} answered {answer.status_code}, which is not in the document"
    kind = answer.headers.get("content-type", "").split(";")[0]
    if request.method == "HEAD" or answer.status_code == 304:
        return
    assert kind in said["content"], (request.url.path, answer.status_code, kind, list(said["content"]))
    if kind == "application/json" and not request.url.path.endswith("/manifest"):
        schema = {**said["content"][kind]["schema"], "components": document["components"]}
        errors = [error.message for error in Draft202012Validator(schema).iter_errors(answer.json())]
        assert errors == [], (request.url.path, answer.status_code, errors)


def test_every_route_of_the_contract_is_in_the_document(document: dict[str, Any]) -> None:
    found = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    job = "/v1/exports/{job_id}"
    files = {(method, f"{job}/{kind}") for method in ("GET", "HEAD") for kind in ("download", "sidecar", "manifest")}
    assert {
        ("POST", "/v1/exports"),
        ("GET", "/v1/exports"),
        ("GET", job),
        ("DELETE", job),
        ("GET", f"{job}/events"),
        ("GET", f"{job}/events/stream"),
        ("GET", f"{job}/report"),
        ("GET", f"{job}/search"),
        ("GET", "/v1/stats"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
        ("POST", "/mcp"),
        *files,
    } <= found
    names = [item[method]["operationId"] for item in document["paths"].values() for method in item]
    assert len(names) == len(set(names))
    body = document["paths"]["/v1/exports"]["post"]["requestBody"]["content"]
    assert {"application/json", "application/x-ndjson"} <= set(body)


def test_the_document_says_which_routes_want_the_key(document: dict[str, Any], start_server: Any) -> None:
    paths = document["paths"]
    assert document["security"] == [{"key": []}]
    for path, item in paths.items():
        for operation in item.values():
            is_open = path in ("/healthz", "/readyz", "/metrics")
            assert operation.get("security") == ([] if is_open else None), path
            assert ("401" in operation["responses"]) is not is_open, path
    guarded = start_server(metrics_need_key=True)
    metrics = httpx.get(f"{guarded.url}/schema/openapi.json").json()["paths"]["/metrics"]["get"]
    assert "security" not in metrics
    assert "401" in metrics["responses"]


def test_what_may_fail_on_our_side_is_in_the_document(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for operation in item.values():
            assert path == "/healthz" or "INTERNAL" in operation["responses"]["500"]["description"], path
    for path, method in (("/v1/exports", "post"), ("/v1/exports/{job_id}/download", "get")):
        assert "STORAGE_FAILED" in document["paths"][path][method]["responses"]["503"]["description"]


def test_a_graph_with_edges_is_as_good_as_one_with_relationships(server: Server, document: dict[str, Any]) -> None:
    given = graph(name="edges")
    edges = {name: value for name, value in given.items() if name != "relationships"}
    schema = document["paths"]["/v1/exports"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = Draft202012Validator(schema)
    for body, good in ((given, True), (edges | {"edges": given["relationships"]}, True), (edges, False)):
        assert validator.is_valid(body) is good
        assert (server.post(body).status_code == 202) is good


def test_live_answers_are_as_the_document_says(server: Server, document: dict[str, Any]) -> None:
    created = server.post(graph(name="openapi"))
    job = f"/v1/exports/{created.json()['jobId']}"
    server.wait(created.json()["jobId"])
    client = server.client
    etag = client.head(f"{job}/download").headers["etag"]
    answers = [
        created,
        client.get(job),
        client.delete(job),
        client.get("/v1/exports"),
        client.get("/v1/exports", params={"status": "wrong"}),
        client.get(f"{job}/events"),
        client.get(f"{job}/events", params={"sinceSeq": "x"}),
        client.get(f"{job}/events/stream"),
        client.get(f"{job}/report"),
        client.get(f"{job}/search", params={"q": "call_1"}),
        client.get(f"{job}/search"),
        client.get(f"{job}/search", params={"q": "call_1", "label": "Nope"}),
        client.get("/v1/stats"),
        client.get("/v1/stats", params={"hours": 0}),
        client.get("/healthz"),
        client.get("/readyz"),
        client.get("/metrics"),
        server.post(b"{"),
        server.post(graph(), content_type="text/plain"),
    ]
    for kind in ("download", "sidecar", "manifest"):
        answers += [
            client.get(f"{job}/{kind}"),
            client.head(f"{job}/{kind}"),
            client.get(f"{job}/{kind}", headers={"range": "bytes=0-3"}),
            client.get(f"{job}/{kind}", headers={"range": "bytes=999999999-"}),
        ]
    answers.append(client.get(f"{job}/download", headers={"if-none-match": etag}))
    answers += [
        client.get(f"/v1/exports/none{rest}") for rest in ("", "/events", "/download", "/report", "/search?q=x")
    ]
    answers += [httpx.get(f"{server.url}{path}") for path in ("/v1/exports", job, f"{job}/events", f"{job}/download")]
    answers.append(httpx.post(f"{server.url}/v1/exports"))
    accept = {"accept": "application/json"}
    for message in ({"id": 1, "method": "tools/list"}, {"id": "a", "method": "nope"}, {"wrong": 1}):
        answers.append(client.post("/mcp", json={"jsonrpc": "2.0", **message}, headers=accept))
    answers.append(httpx.post(f"{server.url}/mcp", json={}, headers=accept))
    for answer in answers:
        _check(document, answer)
