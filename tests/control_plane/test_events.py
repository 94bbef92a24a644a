"""Events reach every client once and in order, however it listens."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live_server import ENDED, Server, graph, large_graph
from postgres import Postgres


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(
    request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The server that most tests share, and one like it over PostgreSQL."""
    if request.param == "sqlite":
        yield server
        return
    postgres: Postgres = request.getfixturevalue("postgres_server")
    root = tmp_path_factory.mktemp("postgres") / "root"
    running = Server(root, worker_slots=1, database_url=postgres.new_database())
    try:
        yield running.start()
    finally:
        running.close()


def test_the_stream_knows_line_feeds_only_and_pings(server: Server) -> None:
    job_id = server.submit(graph(name="lf"))
    with server.client.stream("GET", f"/v1/exports/{job_id}/events/stream") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        raw = b"".join(answer.iter_bytes())
    assert b"\r" not in raw
    assert raw.endswith(b"\n\n")
    assert raw.startswith(b": ping\n\n")
    first = raw.split(b"\n\n")[1].split(b"\n")
    assert [line.split(b":")[0] for line in first] == [b"id", b"event", b"data"]


def test_a_stream_ends_after_the_terminal_event_and_a_late_one_at_once(server: Server) -> None:
    job_id = server.submit(graph(name="late"))
    live = list(server.stream(job_id))
    assert live[-1]["type"] == "job_completed"
    assert list(server.stream(job_id)) == live
    assert list(server.stream(job_id, since=live[-1]["seq"])) == []
    assert list(server.stream(job_id, since=10_000)) == []


def test_a_stream_goes_on_after_the_last_event_that_was_seen(server: Server) -> None:
    job_id = server.submit(graph(name="resume"))
    whole = list(server.stream(job_id))
    assert list(server.stream(job_id, since=3)) == whole[3:]
    assert list(server.stream(job_id, since=0, last_event_id="4")) == whole[4:]
    for absent in ("", "abc", "-1", "4.5"):
        assert list(server.stream(job_id, since=3, last_event_id=absent)) == whole[3:]
    assert list(server.stream(job_id, since=3, last_event_id="9" * 30)) == []


def test_events_come_in_pages(server: Server) -> None:
    job_id = server.submit(graph(name="pages"))
    server.wait(job_id)
    url = f"/v1/exports/{job_id}/events"
    since, found = 0, []
    while True:
        page = server.client.get(url, params={"sinceSeq": since, "limit": 3}).json()
        assert page["jobId"] == job_id
        assert len(page["events"]) <= 3
        assert page["statusSnapshot"]["status"] == "completed"
        if not page["events"]:
            break
        found += page["events"]
        assert page["nextSeq"] == page["events"][-1]["seq"] + 1
        since = page["nextSeq"] - 1
    assert found == list(server.stream(job_id))
    assert page["nextSeq"] == since + 1
    for beyond in (2**63 - 1, 2**63, 10**40, "9" * 4500):
        empty = server.client.get(url, params={"sinceSeq": beyond})
        assert (empty.status_code, empty.json()["events"], empty.json()["nextSeq"]) == (200, [], since + 1)
    assert server.client.get(url, params={"sinceSeq": "", "limit": 2}).json()["events"] == found[:2]
    assert len(server.client.get(url, params={"limit": 0}).json()["events"]) == 1
    assert server.client.get(url, params={"limit": 99_999}).status_code == 200
    for wrong in ({"limit": "many"}, {"sinceSeq": "-1"}, {"sinceSeq": "x"}):
        answer = server.client.get(url, params=wrong)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "INVALID_EXPORT_REQUEST"
        assert "`" not in answer.json()["error"]["message"]
        assert next(iter(wrong)) in answer.json()["error"]["message"] + str(answer.json()["error"]["details"])


@pytest.mark.parametrize("seed", range(3))
def test_a_client_that_loses_its_stream_and_falls_back_to_polling_sees_each_event_once(
    server: Server, real_graphs: dict[str, Path], seed: int
) -> None:
    chance = random.Random(seed)
    path = real_graphs.get("runpod-python.export.json.gz")
    job_id = server.submit(path.read_bytes() if path else large_graph(f"drop{seed}", 8_000))
    seen: list[int] = []
    ended = False
    while not ended:
        since = seen[-1] if seen else 0
        if chance.random() < 0.5:
            left = chance.randint(0, 6)
            for event in server.stream(job_id, since):
                seen.append(event["seq"])
                ended = event["type"] == "job_completed"
                left -= 1
                if left < 0:
                    break
        else:
            answer = server.client.get(
                f"/v1/exports/{job_id}/events", params={"sinceSeq": since, "limit": chance.randint(1, 5)}
            ).json()
            seen += [event["seq"] for event in answer["events"]]
            caught_up = answer["nextSeq"] > answer["statusSnapshot"]["lastEventSeq"]
            ended = answer["statusSnapshot"]["status"] in ENDED and caught_up
    assert seen == list(range(1, len(seen) + 1))
    assert seen == [event["seq"] for event in server.events(job_id)]


def test_many_streams_of_one_job_get_the_same(server: Server) -> None:
    job_id = server.submit(graph(300, name="many"))
    results: list[list[int]] = [[] for _ in range(20)]

    def follow(into: list[int]) -> None:
        with httpx.Client(base_url=server.url, headers=server.client.headers, timeout=60) as client:
            into += [int(line[4:]) for line in _lines(client, job_id) if line.startswith("id: ")]

    threads = [threading.Thread(target=follow, args=(into,)) for into in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [event["seq"] for event in server.events(job_id)]
    assert all(result == expected for result in results)


def _lines(client: httpx.Client, job_id: str) -> list[str]:
    with client.stream("GET", f"/v1/exports/{job_id}/events/stream") as answer:
        return "".join(answer.iter_text()).split("\n")


def test_more_streams_than_allowed_are_refused(start_server: object) -> None:
    server = start_server(max_streams=1, worker_slots=1)  # type: ignore[operator]
    slow = server.submit(large_graph("streams"))
    with server.client.stream("GET", f"/v1/exports/{slow}/events/stream") as first:
        pieces = first.iter_bytes()
        assert next(pieces).startswith(b": ping")
        with httpx.Client(base_url=server.url, headers=server.client.headers) as other:
            refused = other.get(f"/v1/exports/{slow}/events/stream")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "RATE_LIMITED"
        assert int(refused.headers["retry-after"]) > 0
    server.client.delete(f"/v1/exports/{slow}")
