"""What every answer carries: headers that keep pages apart, and those that let an allowed page read it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from keyring import TEAMS, Keyed, entry, keyed
from live_server import graph
from processes import COMMAND, free_port, running

ORIGIN = "https://client.example"
ALWAYS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "strict-transport-security": "max-age=31536000",
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    keys = TEAMS + entry("spent", "read", requests_per_minute=1, burst=1)
    with keyed(
        tmp_path_factory.mktemp("cors"), keys, cors_origins=ORIGIN, public_url="https://exports.example"
    ) as found:
        yield found


def test_every_answer_has_the_headers_that_keep_pages_apart(house: Keyed) -> None:
    job_id = house.submit("red", graph(name="headers"))
    house.finish("red", job_id)
    with house.as_("red") as red, httpx.Client(base_url=house.server.url) as nobody:
        answers = [
            red.get("/v1/exports"),
            red.get(f"/v1/exports/{job_id}/events/stream"),
            red.get(f"/v1/exports/{job_id}/download"),
            red.get("/v1/exports/none"),
            red.get("/v1/stats"),
            red.get("/no/such/route"),
            red.put("/v1/exports"),
            red.post("/v1/exports", content=b"{"),
            red.post("/mcp", json={}),
            red.get("/mcp"),
            *(nobody.get(path) for path in ("/", "/dashboard/api.js", "/dashboard/none", "/healthz", "/v1/exports")),
            nobody.get("/metrics"),
            nobody.get("/schema/openapi.json"),
            *(
                nobody.options("/v1/exports", headers={"origin": origin, "access-control-request-method": "POST"})
                for origin in (ORIGIN, "https://other.example")
            ),
        ]
    for answer in answers:
        found = {name: answer.headers.get(name) for name in ALWAYS}
        assert found == ALWAYS, (answer.request.method, answer.url.path, answer.status_code)
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "camera=()" in answer.headers["permissions-policy"]
        assert "server" not in answer.headers


def test_a_page_of_an_allowed_origin_reads_refusals_and_limits(house: Keyed) -> None:
    page = {"origin": ORIGIN}
    with (
        house.as_("red-read") as reader,
        house.as_("spent") as spent,
        httpx.Client(base_url=house.server.url) as nobody,
    ):
        spent.get("/v1/exports", headers=page)
        answers = {
            401: nobody.get("/v1/exports", headers=page),
            403: reader.post("/v1/exports", headers=page, json=graph()),
            404: reader.get("/v1/exports/none", headers=page),
            429: spent.get("/v1/exports", headers=page),
        }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
        assert {"retry-after", "traceparent", "x-ratelimit-reset", "x-quota-active-jobs"} <= exposed
        assert "access-control-allow-credentials" not in answer.headers


def test_an_allowed_page_may_send_its_trace_and_others_nothing(house: Keyed) -> None:
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, traceparent, idempotency-key",
    }
    allowed = httpx.options(f"{house.server.url}/v1/exports", headers={"origin": ORIGIN, **asked})
    assert allowed.status_code == 204
    assert "traceparent" in allowed.headers["access-control-allow-headers"].lower()
    other = httpx.options(f"{house.server.url}/v1/exports", headers={"origin": "https://other.example", **asked})
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers
    with house.as_("red") as red:
        answer = red.get("/v1/exports", headers={"origin": "https://other.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_a_server_without_a_key_answers_no_page_of_another_name(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    env = {**os.environ, "MEMVID_EXPORT_ROOT": str(tmp_path / "root"), "MEMVID_EXPORT_BIND_ADDR": url[7:]}
    with (
        running([COMMAND, "serve", "--dev"], tmp_path / "server.log", env, f"{url}/readyz"),
        httpx.Client(base_url=url) as client,
    ):
        assert client.get("/v1/exports").status_code == 200
        assert client.get("/v1/exports", headers={"origin": url}).status_code == 200
        for path in ("/v1/exports", "/v1/stats", "/v1/exports/none/download"):
            rebound = client.get(path, headers={"host": "evil.example", "origin": "http://evil.example"})
            assert (rebound.status_code, rebound.json()["error"]["code"]) == (421, "HOST_REFUSED")
        other = client.post("/v1/exports", json=graph(), headers={"origin": "http://evil.example"})
        assert (other.status_code, other.json()["error"]["code"]) == (403, "ORIGIN_REFUSED")
        assert client.get("/v1/exports").json()["jobs"] == []


def test_plain_http_is_not_told_to_become_https(start_server_keyed: Keyed) -> None:
    assert "strict-transport-security" not in httpx.get(f"{start_server_keyed.server.url}/healthz").headers


@pytest.fixture
def start_server_keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    with keyed(tmp_path_factory.mktemp("plain"), public_url="http://exports.example") as found:
        yield found
