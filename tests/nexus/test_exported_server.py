"""Exports of two repositories become collections of one server, which says what code they share."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from live_server import Server, graph

WAIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own backend."""
    with closing(Server(tmp_path_factory.mktemp("exported") / "root")) as found:
        yield found.start()


def repository(name: str, *shared: str, collection: object = None, semantic: bool = True) -> dict[str, Any]:
    """A repository with code of its own, and functions that others have too."""
    request = graph(3, name=name)
    for function in shared:
        properties = {"name": function, "filePath": "lib/dates.py", "content": f"def {function}(text, zone):\n    ..."}
        node = {"id": f"Function:lib/dates.py:{function}", "label": "Function", "properties": properties}
        request["nodes"].append(node)
    request["options"] = {"semanticEnabled": semantic, "collection": collection}
    return request


def imported(server: Server, job_id: str) -> dict[str, Any]:
    """The job, once its collection has ended."""
    assert server.wait(job_id)["type"] == "job_completed"
    end = time.monotonic() + WAIT_SECONDS
    while (job := server.job(job_id))["collection"]["status"] in ("pending", "importing"):
        assert time.monotonic() < end
        time.sleep(0.05)
    return job


def test_two_repositories_that_share_code(server: Server) -> None:
    shared = ("parse_date_of_invoice", "format_zone_offset")
    ids = [server.submit(repository(name, *shared, collection=name)) for name in ("billing", "payroll")]
    for job_id, name in zip(ids, ("billing", "payroll"), strict=True):
        job = imported(server, job_id)
        assert job["collection"] == {"name": name, "status": "done", "documents": 5, "error": None}
        assert server.events(job_id)[-1]["type"] == "job_completed"
    document = f"Function:lib/dates.py:{shared[0]}"

    def around() -> dict[str, Any]:
        asked = {"id": document, "elsewhere": True}
        answer = server.client.get("/v1/collections/billing/context", params=asked)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    end = time.monotonic() + WAIT_SECONDS
    while not (related := around()["related"]):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert (related[0]["collection"], related[0]["id"]) == ("payroll", document)
    assert related[0]["score"] == pytest.approx(1, abs=1e-5)
    text = ""
    while not all(f"Function:lib/dates.py:{name}" in text for name in shared):  # once they were compared
        assert time.monotonic() < end
        text = json.dumps(server.client.get("/v1/duplicates", params={"threshold": 0.95}).json())
    assert "call_0" not in text
    found = server.client.post("/v1/collections/payroll/search", json={"query": "parse date of invoice"}).json()
    assert found["hits"][0]["id"] == document
    assert found["hits"][0]["payload"]["jobId"] == ids[1]


def test_the_address_names_a_collection_for_a_graph_that_names_none(server: Server) -> None:
    data, key = json.dumps(repository("plain", semantic=False)), {"Idempotency-Key": "one"}

    def post(collection: str) -> Any:
        headers = {"content-type": "application/json", **key}
        return server.client.post("/v1/exports", params={"collection": collection}, content=data, headers=headers)

    first = post("texts")
    assert first.status_code == 202, first.text
    assert imported(server, first.json()["jobId"])["collection"]["documents"] == 3
    assert post("texts").json()["jobId"] == first.json()["jobId"]
    refused = post("others")
    assert (refused.status_code, refused.json()["error"]["details"]) == (400, {"field": "Idempotency-Key"})
    refused = post("..")
    assert (refused.status_code, refused.json()["error"]["details"]["field"]) == (400, "collection")


@pytest.mark.parametrize("name", ["a/b", "", "...", "x" * 129, 7, ["a"]])
def test_a_name_that_is_none_is_refused(server: Server, name: object) -> None:
    answer = server.post(repository("wrong", collection=name))
    assert answer.status_code == 400
    assert answer.json()["error"]["details"]["field"] == "options.collection"


def test_an_export_without_a_collection_says_nothing_of_one(server: Server) -> None:
    job_id = server.submit(repository("alone"))
    server.wait(job_id)
    assert "collection" not in server.job(job_id)
