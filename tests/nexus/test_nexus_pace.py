"""A client that writes faster than it may, or than the graph follows, is told to wait; others are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nexus.shelf import Person, shelf

from control_plane.errors import QuotaReached, headers_of
from control_plane.nexus.pace import PENDING_SECONDS, Pace
from control_plane.operations.metrics import Metrics


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def refused(pace: Pace, client: str) -> QuotaReached:
    with pytest.raises(QuotaReached) as found:
        pace.check(client)
    return found.value


def test_documents_of_a_minute_may_come_at_once_and_what_is_beyond_is_waited_for() -> None:
    clock, metrics = Clock(), Metrics()
    pace = Pace(metrics, per_minute=6_000, max_pending=1_000_000, clock=clock)
    for number in range(7):
        pace.check("red")
        pace.count("red", 900)  # the seventh passes the limit: nobody knew before how much it brings
        clock.now += 0.001
        if number == 4:
            assert pace.headers("red")["X-Quota-Documents-Per-Minute"] == "limit=6000, remaining=1500"
    error = refused(pace, "red")
    assert headers_of(error) == {"Retry-After": "4", "X-Quota-Documents-Per-Minute": "limit=6000, remaining=0"}
    assert "6,000 documents a minute" in error.message
    assert pace.headers("red")["X-Quota-Documents-Per-Minute"] == "limit=6000, remaining=0"
    pace.check("blue")
    clock.now += 2.9
    refused(pace, "red")
    clock.now += 0.2
    pace.check("red")
    assert metrics.registry.get_sample_value("memvid_export_refused_total", {"limit": "documents_per_minute"}) == 2


def test_in_an_hour_no_more_is_written_than_the_rate_allows_and_one_request_beyond() -> None:
    clock = Clock()
    pace = Pace(Metrics(), per_minute=1_000, max_pending=10**9, clock=clock)
    written = 0
    for step in range(36_000):
        clock.now = 100 + step / 10
        try:
            pace.check("red")
        except QuotaReached:
            continue
        pace.count("red", 700)
        written += 700
    assert 60_000 <= written <= 61_000 + 700


def test_documents_that_wait_for_the_graph_are_bounded_until_the_next_look() -> None:
    metrics = Metrics()
    pace = Pace(metrics, per_minute=1_000_000, max_pending=1_000)
    pace.check("red")
    pace.count("red", 999)
    assert pace.headers("red")["X-Quota-Pending-Documents"] == "limit=1000, remaining=1"
    pace.check("red")
    pace.count("red", 500)
    error = refused(pace, "red")
    assert "1,000 documents of this client first" in error.message
    told = {"Retry-After": str(PENDING_SECONDS), "X-Quota-Pending-Documents": "limit=1000, remaining=0"}
    assert headers_of(error) == told
    assert pace.headers("red")["X-Quota-Pending-Documents"] == "limit=1000, remaining=0"
    pace.check("blue")
    pace.looked({"red": 1_000, "blue": 1})
    refused(pace, "red")
    pace.looked({"red": 400})
    pace.check("red")
    assert metrics.registry.get_sample_value("memvid_export_refused_total", {"limit": "pending_documents"}) == 2


def documents(first: int, count: int) -> list[dict[str, Any]]:
    return [{"id": f"d{number}", "vector": [1, number]} for number in range(first, first + count)]


def test_over_http_every_change_counts_whichever_way_it_comes(tmp_path: Path) -> None:
    def left(person: Person, method: str, path: str, **more: Any) -> int:
        answer = person.http.request(method, f"/v1/collections/books{path}", **more)
        assert answer.is_success, answer.text
        assert answer.headers["x-quota-pending-documents"].startswith("limit=1000000, remaining=")
        said: str = answer.headers["x-quota-documents-per-minute"]
        assert said.startswith("limit=1000, remaining=")
        return int(said.partition("remaining=")[2])

    env = {"MEMVID_NEXUS_DOCUMENTS_PER_MINUTE": "1000", "MEMVID_NEXUS_MAX_PENDING": "1000000"}
    with shelf(tmp_path, **env) as house:
        red, blue = house.as_("red"), house.as_("blue")
        for person in (red, blue):
            person.make("books", 2)
        # The bucket fills by 17 a second meanwhile.
        begun = left(red, "PUT", "/documents/d0", json={"vector": [1, 1]})
        assert 998 <= begun <= 999
        after = left(red, "POST", "/documents", json={"documents": documents(0, 300)})
        assert 0 <= after - (begun - 300) <= 100
        before, after = after, left(red, "POST", "/deletions", json={"ids": [f"d{n}" for n in range(1, 301)]})
        assert 0 <= after - (before - 300) <= 100
        before, after = after, left(red, "DELETE", "/documents/d0")
        assert -1 <= after - before <= 100
        left(red, "POST", "/documents", json={"documents": documents(0, 1_000)})
        for method, path, body in (
            ("PUT", "/books/documents/late", {"vector": [1, 1]}),
            ("POST", "/books/documents", {"documents": documents(0, 1)}),
            ("POST", "/books/deletions", {"ids": ["d1"]}),
            ("DELETE", "/books/documents/d1", None),
        ):
            error = red.refused(method, path, 429, json=body)
            assert (error["code"], error["details"]["quota"]) == ("RATE_LIMITED", "documents_per_minute")
            assert error["details"]["retryAfterSeconds"] > 1
        assert red.ask("GET", "/books")["documents"] == 1_000
        assert red.found("books", vector=[1, 5], mode="vector", limit=1) == ["d5"]
        blue.write("books", documents(0, 10))
        red.ask("DELETE", "/books", 204)


def test_below_the_floor_of_the_disk_documents_are_not_taken_and_those_that_are_there_can_be_deleted(
    tmp_path: Path,
) -> None:
    with shelf(tmp_path) as house:
        house.as_("red").make("books", 2)
        house.as_("red").write("books", documents(0, 2))
        url = house.database_url
    (tmp_path / "full").mkdir()
    with shelf(tmp_path / "full", url, MEMVID_EXPORT_DISK_FLOOR_BYTES=str(1 << 60)) as house:
        red = house.as_("red")
        for method, path, body in (
            ("PUT", "/books/documents/late", {"vector": [1, 1]}),
            ("POST", "/books/documents", {"documents": documents(5, 2)}),
        ):
            error = red.refused(method, path, 503, json=body)
            assert (error["code"], error["details"]["floorBytes"]) == ("QUEUE_UNAVAILABLE", 1 << 60)
        red.ask("DELETE", "/books/documents/d0", 204)
        assert red.listed("books") == ["d1"]
