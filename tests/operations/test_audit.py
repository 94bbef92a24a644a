"""Who did what stands in the audit log: with the change itself, or a moment later, and a flood in few entries."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from keyring import Keyed, keyed
from live_server import graph


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    with keyed(tmp_path_factory.mktemp("audit")) as found:
        yield found


def _entries(house: Keyed, **wanted: Any) -> list[dict[str, Any]]:
    with house.as_("operator") as operator:
        answer = operator.get("/v1/audit", params={"limit": 500, **wanted})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["entries"])


def _until(found: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    for _ in range(400):
        if entries := found():
            return entries
        time.sleep(0.05)
    pytest.fail("it is not in the audit log")


def test_what_changes_an_export_is_written_with_it(house: Keyed) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    with house.as_("red") as red:
        red.headers["traceparent"] = f"00-{trace}-b7ad6b7169203331-01"
        job_id = red.post("/v1/exports", json=graph(20_000, name="audited", lines=8)).json()["jobId"]
        [made] = [entry for entry in _entries(house, action="export.create") if entry["jobId"] == job_id]
        assert red.delete(f"/v1/exports/{job_id}").json()["status"] == "canceled"
        assert red.delete(f"/v1/exports/{job_id}").json()["status"] == "canceled"
    [canceled] = [entry for entry in _entries(house, action="export.cancel") if entry["jobId"] == job_id]
    for entry in (made, canceled):
        assert (entry["key"], entry["client"], entry["address"]) == ("red", "red", "127.0.0.1")
        assert (entry["outcome"], entry["count"], entry["traceId"]) == ("ok", 1, trace)


def test_what_is_read_and_what_is_refused_is_written_soon(house: Keyed) -> None:
    job_id = house.submit("red", graph(name="read"))
    house.finish("red", job_id)
    with house.as_("red") as red, house.as_("red-export") as exporter, house.as_("blue") as blue:
        for kind in ("download", "sidecar", "manifest"):
            assert red.get(f"/v1/exports/{job_id}/{kind}").status_code == 200
            assert red.head(f"/v1/exports/{job_id}/{kind}").status_code == 200
        assert exporter.get(f"/v1/exports/{job_id}/download").status_code == 403
        assert blue.get(f"/v1/exports/{job_id}/download").status_code == 404
        assert red.post("/v1/exports", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    with house.as_("operator") as operator:
        assert operator.get(f"/v1/exports/{job_id}").status_code == 200

    def of(action: str, client: str) -> list[dict[str, Any]]:
        return _until(lambda: _entries(house, action=action, client=client))

    for kind in ("download", "sidecar", "manifest"):
        entry = next(entry for entry in of(f"export.{kind}", "red") if entry["jobId"] == job_id)
        assert (entry["key"], entry["outcome"]) == ("red", "ok")
    [forbidden] = of("access.forbidden", "red")
    assert (forbidden["key"], forbidden["outcome"]) == ("red-export", "FORBIDDEN export.download")
    [missed] = of("export.download", "blue")
    assert (missed["outcome"], missed["jobId"]) == ("JOB_NOT_FOUND", job_id)
    [looked] = of("export.read", "operator")
    assert looked["jobId"] == job_id
    failed = _until(lambda: [e for e in _entries(house, action="export.create") if e["outcome"] != "ok"])
    assert failed[0]["outcome"] == "INVALID_EXPORT_REQUEST"


def test_the_log_is_read_in_pages_and_by_those_who_may(house: Keyed) -> None:
    with house.as_("operator") as operator, house.as_("red") as red:
        for n in range(5):
            red.post("/v1/exports", json=graph(name=f"page{n}"))
        whole = operator.get("/v1/audit", params={"action": "export.create", "limit": 500}).json()["entries"]
        pages: list[dict[str, Any]] = []
        cursor: dict[str, str] = {}
        while True:
            page = operator.get("/v1/audit", params={"action": "export.create", "limit": 2, **cursor}).json()
            pages += page["entries"]
            if page["nextCursor"] is None:
                break
            cursor = {"cursor": page["nextCursor"]}
        assert pages == whole
        assert [entry["at"] for entry in whole] == sorted((entry["at"] for entry in whole), reverse=True)
        since = whole[2]["at"]
        newer = operator.get("/v1/audit", params={"action": "export.create", "since": since}).json()["entries"]
        assert newer == [entry for entry in whole if entry["at"] >= since]
        assert operator.get("/v1/audit", params={"client": "nobody"}).json() == {"entries": [], "nextCursor": None}
        for wrong in (
            {"since": "yesterday"},
            {"cursor": "x"},
            {"cursor": "OTk5OTk5OTk5OTk5OTk5OTk5OjE"},
            {"limit": "x"},
        ):
            refused = operator.get("/v1/audit", params=wrong)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "INVALID_EXPORT_REQUEST")
        assert red.get("/v1/audit").status_code == 403


def test_a_flood_of_wrong_keys_is_a_few_entries_with_their_count(tmp_path: Path) -> None:
    with keyed(tmp_path) as house:
        with httpx.Client(base_url=house.server.url) as guesser:
            for n in range(200):
                guesser.get("/v1/exports", headers={"authorization": f"Bearer guess-{n}"})
        house.server.stop()  # what is counted is written at the end
        house.server.start()
        found = _entries(house, action="key.refused")
        assert 1 <= len(found) <= 8
        assert sum(entry["count"] for entry in found) == 200
        assert {entry["outcome"] for entry in found} <= {"UNAUTHORIZED", "RATE_LIMITED"}
        assert {(entry["key"], entry["client"], entry["address"]) for entry in found} == {(None, None, "127.0.0.1")}
        logged = [json.loads(line) for line in house.server.log.read_text().splitlines() if '"audit"' in line]
        assert len([line for line in logged if line["action"] == "key.refused"]) == len(found)
        assert "guess-" not in house.server.log.read_text()


def test_ids_that_a_client_makes_up_leave_the_log_to_others(tmp_path: Path) -> None:
    with keyed(tmp_path) as house:
        job_id = house.submit("red", graph(name="mine"))
        house.finish("red", job_id)
        with house.as_("blue") as blue, house.as_("red") as red:
            for n in range(25):  # too long to be ids: they are none, and take no place of those
                assert blue.get(f"/v1/exports/{'x' * 40}{n}/download").status_code == 404
            for n in range(60):
                assert blue.get(f"/v1/exports/none-{n}/download").status_code == 404
            assert red.get(f"/v1/exports/{job_id}/download").status_code == 200
        house.server.stop()  # what is counted is written at the end
        house.server.start()
        missed = _entries(house, action="export.download", client="blue")
        assert {entry["outcome"] for entry in missed} == {"JOB_NOT_FOUND"}
        assert sum(entry["count"] for entry in missed) == 85
        assert {entry["jobId"] for entry in missed} == {None, *(f"none-{n}" for n in range(20))}
        [read] = _entries(house, action="export.download", client="red")
        assert (read["outcome"], read["jobId"]) == ("ok", job_id)


def test_whose_code_was_searched_is_noted_over_http_and_over_mcp(house: Keyed) -> None:
    job_id = house.submit("red", graph(name="searched"))
    house.finish("red", job_id)
    call = {"name": "text_search", "arguments": {"query": "call", "locator": {"jobId": job_id}}}
    with house.as_("red-read") as reader, house.as_("operator") as operator:
        assert reader.get(f"/v1/exports/{job_id}/search", params={"q": "call"}).status_code == 200
        headers = {"accept": "application/json, text/event-stream"}
        said = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
        assert operator.post("/mcp", json=said, headers=headers).json()["result"]["isError"] is False

    def of(key: str) -> list[dict[str, Any]]:
        found = _until(lambda: _entries(house, action="export.search"))
        return [entry for entry in found if entry["jobId"] == job_id and entry["key"] == key]

    for key in ("red-read", "operator"):
        [entry] = _until(lambda key=key: of(key))  # type: ignore[misc]
        assert (entry["outcome"], entry["address"]) == ("ok", "127.0.0.1")


def test_an_address_that_a_proxy_wraps_is_told_as_it_is(house: Keyed) -> None:
    forwarded = {"authorization": "Bearer nobody", "x-forwarded-for": "::ffff:192.0.2.7"}
    assert httpx.get(f"{house.server.url}/v1/exports", headers=forwarded).status_code == 401
    refused = _until(lambda: [e for e in _entries(house, action="key.refused") if e["address"] != "127.0.0.1"])
    assert [entry["address"] for entry in refused] == ["192.0.2.7"]


def test_keys_that_were_read_again_are_noted(tmp_path: Path) -> None:
    with keyed(tmp_path) as house:
        house.file.write_text(house.file.read_text() + "\n")
        [entry] = _until(lambda: _entries(house, action="keys.reload"))
        assert (entry["outcome"], entry["key"]) == ("ok", None)


def test_old_entries_go_with_the_history(tmp_path: Path) -> None:
    with keyed(tmp_path, retention_seconds=1, history_seconds=2) as house:
        with house.as_("nobody") as nobody:
            assert nobody.get("/v1/exports").status_code == 401
        _until(lambda: _entries(house, action="key.refused"))
        _until(lambda: [] if _entries(house, action="key.refused") else [{}])
