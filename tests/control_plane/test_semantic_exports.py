"""Vectors over HTTP: profiles lead to engines, what was embedded is not embedded again, and ceilings hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import Server, graph
from provider_server import KEY, ProviderServer, provider_server
from runpod_house import eventually
from test_read_tools import ask

SEMANTIC = {"semanticEnabled": True}


def report_of(server: Server, job_id: str) -> dict[str, Any]:
    """The report of an export that ended well."""
    end = server.wait(job_id)
    assert end["type"] == "job_completed", end
    answer = server.client.get(f"/v1/exports/{job_id}/report")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that embeds by itself."""
    server = Server(tmp_path_factory.mktemp("here") / "root")
    try:
        yield server.start()
    finally:
        server.close()


def test_the_profile_quality_embeds_by_a_transformer_and_a_repeat_embeds_nothing(here: Server) -> None:
    body = graph(30, name="quality", options=SEMANTIC | {"profile": "quality"})
    job = here.submit(body)
    report = report_of(here, job)
    assert (report["embedding"]["provider"], report["embedding"]["model"]) == ("torch", "all-MiniLM-L6-v2")
    assert report["embedding"]["revision"].startswith("sha256:")
    assert (report["capsule"]["vectors"], report["capsule"]["dimension"]) == (30, 384)
    assert report["embedding"]["tokens"] > 300
    assert report["embedding"]["cacheHits"] == 0
    again = report_of(here, here.submit(body))
    assert (again["embedding"]["cacheHits"], again["embedding"]["tokens"]) == (30, 0)
    assert again["capsule"]["sha256"] == report["capsule"]["sha256"]

    def asked() -> dict[str, Any]:
        return ask(here, "text_search", query="work out something with the seventh thing", locator={"jobId": job})

    found = eventually(lambda: (answer := asked())["result"]["semanticUsed"] and answer)  # once the model is open
    assert found["confidence"]["warnings"] == []


def test_a_change_of_one_node_embeds_that_node_and_no_other(here: Server) -> None:
    body = graph(100, name="changed", options=SEMANTIC)
    assert report_of(here, here.submit(body))["embedding"]["cacheHits"] == 0
    body["nodes"][7]["properties"]["name"] = "renamed"
    again = report_of(here, here.submit(body))["embedding"]
    assert (again["texts"], again["cacheHits"]) == (100, 99)


def test_a_profile_that_there_is_not_is_refused_at_once(here: Server) -> None:
    answer = here.post(graph(3, name="none", options=SEMANTIC | {"profile": "telepathy"}))
    assert answer.status_code == 400
    assert answer.json()["error"]["details"]["field"] == "options.profile"


@pytest.fixture
def openai() -> Iterator[ProviderServer]:
    with provider_server("openai", dimension=3_072) as found:
        yield found


@pytest.fixture
def paying(tmp_path: Path, openai: ProviderServer) -> Iterator[Server]:
    """A server that embeds by OpenAI's API."""
    server = Server(
        tmp_path / "root",
        env={
            "MEMVID_EMBEDDING_MODE": "external_api",
            "MEMVID_EMBED_PROVIDER": "openai",
            "MEMVID_EMBED_MAX_USD": "0.001",
            "OPENAI_EMBED_BASE_URL": openai.url,
            "OPENAI_API_KEY": KEY["openai"],
        },
    )
    try:
        yield server.start()
    finally:
        server.close()


def test_what_a_provider_was_paid_stands_in_the_report_and_its_key_nowhere(
    paying: Server, openai: ProviderServer
) -> None:
    job = paying.submit(graph(40, name="paid", options=SEMANTIC))
    report = report_of(paying, job)
    assert report["embedding"]["model"] == "text-embedding-3-large"
    assert report["embedding"]["tokens"] == openai.paid > 0
    assert report["embedding"]["costEstimate"] == pytest.approx(openai.paid * 0.13 / 1e6, abs=1e-6)
    assert report["capsule"]["dimension"] == 3_072
    told = [paying.log.read_text(), *(paying.client.get(path).text for path in (f"/v1/exports/{job}", "/metrics"))]
    assert not any(KEY["openai"] in text for text in told)
    requests = len(openai.seen)
    assert report_of(paying, paying.submit(graph(40, name="paid", options=SEMANTIC)))["embedding"]["costEstimate"] == 0
    assert len(openai.seen) == requests


def test_an_export_above_the_ceiling_fails_with_its_estimate_and_asks_nothing_of_the_provider(
    paying: Server, openai: ProviderServer
) -> None:
    job = paying.submit(graph(2_000, name="dear", options=SEMANTIC))
    assert paying.wait(job)["type"] == "job_failed"
    error = paying.job(job)["error"]
    assert (error["code"], error["retryable"]) == ("EMBEDDING_REFUSED", False)
    assert "at most 0.0010 US dollars are allowed" in error["message"]
    assert openai.seen == []


def test_an_expired_key_fails_the_export_at_once_and_says_whose(paying: Server, openai: ProviderServer) -> None:
    openai.always("expired key")
    job = paying.submit(graph(10, name="expired", options=SEMANTIC))
    assert paying.wait(job)["type"] == "job_failed"
    error = paying.job(job)["error"]
    assert (error["code"], error["retryable"]) == ("PROVIDER_REJECTED", False)
    assert "openai" in error["message"].lower()
    assert KEY["openai"] not in error["message"]
    assert len(openai.seen) == 1
