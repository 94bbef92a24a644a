"""What a key may do, and whose exports are there for it, over every route of a real server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from keyring import Keyed, keyed
from live_server import graph

READ, EXPORT, BOTH, ADMIN = {"red-read"}, {"red-export"}, {"red-read", "red-export"}, set[str]()
ALLOWED = {
    "createExport": EXPORT,
    "cancelExport": EXPORT,
    "retryExport": EXPORT,
    "listExports": BOTH,
    "getExport": BOTH,
    "listEvents": BOTH,
    "streamEvents": BOTH,
    "getReport": BOTH,
    "getCapsule": READ,
    "headCapsule": READ,
    "getSidecar": READ,
    "headSidecar": READ,
    "getManifest": READ,
    "headManifest": READ,
    "searchExport": READ,
    "mcp": READ,
    "putCollection": EXPORT,
    "deleteCollection": EXPORT,
    "putDocument": EXPORT,
    "putDocuments": EXPORT,
    "deleteDocument": EXPORT,
    "deleteDocuments": EXPORT,
    "listCollections": READ,
    "getCollection": READ,
    "listDocuments": READ,
    "getDocument": READ,
    "searchCollection": READ,
    "getContext": READ,
    "listDuplicates": READ,
    "getStats": ADMIN,
    "listAudit": ADMIN,
    "metrics": ADMIN,
    "getNexus": ADMIN,
    "enableNexus": ADMIN,
    "disableNexus": ADMIN,
    "triggerNexus": ADMIN,
    "verifyNexus": ADMIN,
    "rebuildNexus": ADMIN,
    "listNexusFailures": ADMIN,
    "listNexusEvents": ADMIN,
    "retryNexusEvents": ADMIN,
}
"""Who of those with one scope may ask; ``admin`` may everywhere. A new route needs its line here."""
OPEN = {"health", "ready"}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    with keyed(tmp_path_factory.mktemp("scopes"), metrics_need_key=True) as found:
        yield found


@pytest.fixture(scope="module")
def routes(house: Keyed) -> dict[str, tuple[str, str]]:
    """Method and path of each operation in the OpenAPI document."""
    document = httpx.get(f"{house.server.url}/schema/openapi.json").json()
    return {
        operation["operationId"]: (method.upper(), path)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


@pytest.fixture(scope="module")
def red_job(house: Keyed) -> str:
    """A finished export of the client red."""
    job_id = house.submit("red", graph(name="secret"))
    house.finish("red", job_id)
    return job_id


def _ask(client: httpx.Client, method: str, path: str, **more: Any) -> httpx.Response:
    params = {"q": "call_1"} if path.endswith("/search") else {}
    if path == "/mcp":
        call = {"name": "symbol_lookup", "arguments": {"query": "call_1"}}
        more = {"json": {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}}
        more["headers"] = {"accept": "application/json"}
    return client.request(method, path, params=params, **more)


def test_each_route_has_a_decision_and_keeps_it_for_each_scope(
    house: Keyed, routes: dict[str, tuple[str, str]]
) -> None:
    assert set(routes) == {*ALLOWED, *OPEN}
    for name in ("red-read", "red-export", "operator"):
        with house.as_(name) as client:
            for operation, (method, path) in routes.items():
                answer = _ask(client, method, path.replace("{job_id}", str(uuid.uuid4())))
                may = operation in OPEN or name == "operator" or name in ALLOWED[operation]
                assert (answer.status_code == 403) is not may, (name, operation, answer.text)
                if not may and method != "HEAD":
                    error = answer.json()["error"]
                    assert error["code"] == "FORBIDDEN"
                    assert error["details"]["scopes"]
                    assert all(scope in error["message"] for scope in [name, *error["details"]["scopes"]])


def test_no_route_but_the_open_ones_answers_without_a_key(house: Keyed, routes: dict[str, tuple[str, str]]) -> None:
    with httpx.Client(base_url=house.server.url) as nobody:
        for operation, (method, path) in routes.items():
            answer = _ask(nobody, method, path.replace("{job_id}", str(uuid.uuid4())))
            assert (answer.status_code == 401) is (operation not in OPEN), operation


def test_an_export_of_another_client_is_not_there_on_any_route(
    house: Keyed, routes: dict[str, tuple[str, str]], red_job: str
) -> None:
    unknown = str(uuid.uuid4())
    of_a_job = {operation: route for operation, route in routes.items() if "{job_id}" in route[1]}
    assert len(of_a_job) >= 12
    with house.as_("blue") as blue:
        for operation, (method, path) in of_a_job.items():
            theirs, nobodys = (_ask(blue, method, path.replace("{job_id}", job)) for job in (red_job, unknown))
            assert theirs.status_code == nobodys.status_code == 404, operation
            assert theirs.content == nobodys.content, operation
            changing = {"traceparent", "date", "x-ratelimit-remaining", "x-ratelimit-reset"}
            kept = [{k: v for k, v in answer.headers.items() if k not in changing} for answer in (theirs, nobodys)]
            assert kept[0] == kept[1], operation
            if method != "HEAD":
                assert theirs.json()["error"]["code"] == "JOB_NOT_FOUND"
        assert blue.get("/v1/exports").json()["jobs"] == []
    with house.as_("red") as red:
        assert [job["jobId"] for job in red.get("/v1/exports").json()["jobs"]] == [red_job]
        assert red.get(f"/v1/exports/{red_job}").json()["status"] == "completed"


def _tool(client: httpx.Client, **arguments: Any) -> dict[str, Any]:
    call = {"name": "symbol_lookup", "arguments": {"query": "call_1", **arguments}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
    answer = client.post("/mcp", json=body, headers={"accept": "application/json"})
    return dict(answer.json()["result"])


def _resource(client: httpx.Client, uri: str) -> dict[str, Any]:
    body = {"jsonrpc": "2.0", "id": 1, "method": "resources/read", "params": {"uri": uri}}
    return dict(client.post("/mcp", json=body, headers={"accept": "application/json"}).json())


def test_read_tools_and_searches_reach_no_export_of_another_client(house: Keyed, red_job: str) -> None:
    blue_job = house.submit("blue", graph(name="other"))
    house.finish("blue", blue_job)
    unknown = str(uuid.uuid4())
    with house.as_("red") as red, house.as_("blue") as blue:
        for client, own, other in ((red, red_job, blue_job), (blue, blue_job, red_job)):
            for _ in range(2):  # what was found for one client is remembered, and not for another
                assert not _tool(client, locator={"jobId": own})["isError"]
                newest = _tool(client)
                items = newest["structuredContent"]["result"]["items"]
                assert {item["filePath"] for item in items} == {f"src/{'secret' if own == red_job else 'other'}.py"}
                for wanted in (other, unknown):
                    refused = _tool(client, locator={"jobId": wanted})
                    assert refused["isError"]
                    assert refused["structuredContent"]["code"] == "NOT_FOUND"
            assert "error" not in _resource(client, f"mv2://exports/{own}/meta/manifest")
            theirs, nobodys = (_resource(client, f"mv2://exports/{job}/meta/manifest") for job in (other, unknown))
            assert theirs["error"]["data"].pop("traceId") != nobodys["error"]["data"].pop("traceId")
            assert theirs == nobodys
            both = [
                client.get(f"/v1/exports/{own}/search", params={"q": "call_1", "also": job}) for job in (other, unknown)
            ]
            assert {answer.status_code for answer in both} == {404}
            assert both[0].content == both[1].content
        with house.as_("operator") as operator:
            assert {job["jobId"] for job in operator.get("/v1/exports").json()["jobs"]} >= {red_job, blue_job}
            assert not _tool(operator, locator={"jobId": red_job})["isError"]
            assert operator.get(f"/v1/exports/{blue_job}/download").status_code == 200


def test_only_admin_names_capsules_by_their_path(house: Keyed, red_job: str) -> None:
    [capsule] = (house.server.root / "artifacts" / red_job).rglob("*.mv2")
    for path in (str(capsule), str(capsule.relative_to(house.server.root))):
        with house.as_("red") as red, house.as_("operator") as operator:
            refused = _tool(red, locator={"capsulePath": path})["structuredContent"]
            assert refused["code"] == "INVALID_ARGUMENT"
            assert "admin" in refused["message"]
            assert not _tool(operator, locator={"capsulePath": path})["isError"]
            uri = f"mv2://capsules/{path.replace('/', '%2F')}/meta/manifest"
            assert "admin" in _resource(red, uri)["error"]["message"]


def test_idempotency_keys_are_those_of_a_client(house: Keyed) -> None:
    body = graph(name="twice")
    with house.as_("red") as red, house.as_("blue") as blue:
        first, again, other = (
            client.post("/v1/exports", json=body, headers={"idempotency-key": "the-same"})
            for client in (red, red, blue)
        )
    assert first.json()["jobId"] == again.json()["jobId"] != other.json()["jobId"]
    assert (again.headers.get("idempotent-replayed"), other.headers.get("idempotent-replayed")) == ("true", None)


def test_another_client_cannot_cancel(house: Keyed) -> None:
    job_id = house.submit("red", graph(name="mine"))
    with house.as_("blue") as blue, house.as_("red-read") as reader, house.as_("red") as red:
        assert blue.delete(f"/v1/exports/{job_id}").status_code == 404
        assert reader.delete(f"/v1/exports/{job_id}").status_code == 403
        house.finish("red", job_id)
        assert red.delete(f"/v1/exports/{job_id}").json()["status"] == "completed"
