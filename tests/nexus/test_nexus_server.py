"""Collections on a whole server: what is written is in the graph, and what the graph tells is in the payload."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from live_server import Server
from processes import answering

from control_plane.jobs.store import now_ms
from control_plane.nexus.graph.ladybug import LadybugGraph
from control_plane.nexus.signing import Signer

SECRET = "a secret of both sides"
WAIT_SECONDS = 60.0
SAYINGS = {
    "cat": "A cat sleeps on the warm roof.",
    "kitten": "A cat sleeps on the warm roof today.",
    "invoice": "The invoice of parse_graph is due, see src/a.py and src/b.py.",
}


def until(right: Callable[[], bool]) -> None:
    """Wait for something that comes soon."""
    end = time.monotonic() + WAIT_SECONDS
    while not right():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def events() -> list[dict[str, Any]]:
    """What the server told outside."""
    return []


@pytest.fixture
def server(tmp_path: Path, events: list[dict[str, Any]]) -> Iterator[Server]:
    """A server that tells a listener what changes."""

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            events.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nobody reads it."""

    with answering(Listener) as url:
        env = {"MEMVID_NEXUS_WEBHOOK_SECRET": SECRET, "MEMVID_NEXUS_OUTBOUND_URL": f"{url}/events"}
        with closing(Server(tmp_path / "root", env=env)) as found:
            yield found.start()


def settle(server: Server) -> None:
    """Wait until the graph has all."""

    def right() -> bool:
        sync = server.client.get("/v1/collections/notes").raise_for_status().json()["sync"]
        return bool(sync["pending"] == sync["failed"] == 0)

    until(right)


def look(server: Server, kind: str) -> dict[str, Any]:
    """Have a look, and answer its report."""
    before = server.client.get("/v1/nexus").json()["last"]
    until(lambda: server.client.post(f"/v1/nexus/{kind}").status_code == 202)

    def ended() -> bool:
        overview = server.client.get("/v1/nexus").json()
        return (
            overview["progress"] is None and overview["last"] not in (None, before) and overview["last"]["kind"] == kind
        )

    until(ended)
    return dict(server.client.get("/v1/nexus").json()["last"])


def test_what_is_written_is_in_the_graph_and_stays_so_over_kills(server: Server, tmp_path: Path) -> None:
    server.client.put("/v1/collections/notes", json={}).raise_for_status()
    for name, text in SAYINGS.items():
        server.client.put(f"/v1/collections/notes/documents/{name}", json={"text": text}).raise_for_status()
    server.kill()
    server.start()
    settle(server)
    context = server.client.get("/v1/collections/notes/context", params={"id": "cat"}).raise_for_status().json()
    assert [one["id"] for one in context["related"]] == ["kitten"]
    score = context["related"][0]["score"]
    assert server.client.get("/v1/collections/notes/documents/invoice").json()["domain"] == "financial"
    report = look(server, "verify")
    assert (report["different"], report["documents"], report["pairs"], report["mentions"]) == ({}, 3, 1, 3)
    server.client.delete("/v1/collections/notes/documents/kitten").raise_for_status()
    settle(server)
    assert look(server, "rebuild")["error"] is None
    settle(server)
    metrics = server.client.get("/metrics").text
    assert 'vectorizer_nexus_sync_total{collection="notes",status="synced"}' in metrics
    server.client.put("/v1/collections/notes/documents/again", json={"text": SAYINGS["kitten"]}).raise_for_status()
    settle(server)
    assert server.stop() == 0
    with closing(LadybugGraph(tmp_path / "root" / "graph.ladybug")) as graph:
        graph.prepare()
        held = {one.node.vector_id: one for one in graph.read(graph.documents(0, 100)).values() if one.node}
        assert held.keys() == {"cat", "invoice", "again"}
        assert list(held["cat"].similar.values()) == [score]
        assert held["invoice"].mentions == {"identifier:parse_graph", "path:src/a.py", "path:src/b.py"}


def test_what_the_graph_tells_is_in_the_payload_and_everybody_hears_of_it(
    server: Server, events: list[dict[str, Any]]
) -> None:
    server.client.put("/v1/collections/notes", json={"dimension": 2}).raise_for_status()
    for name in ("a", "b"):
        body = {"vector": [1, 0], "payload": {"mine": 1}}
        server.client.put(f"/v1/collections/notes/documents/{name}", json=body).raise_for_status()

    def tell(**change: Any) -> Any:
        told = {"eventId": "e1", "origin": "graph", "action": "upsert", "client": "default", **change}
        body = json.dumps(told).encode()
        headers = {"content-type": "application/json", **Signer(SECRET).headers(body, now_ms())}
        path = "node" if "document" in change else "relationship"
        return server.client.post(f"/webhooks/nexus/{path}", content=body, headers=headers).raise_for_status().json()

    ends = {"source": {"collection": "notes", "id": "a"}, "target": {"collection": "notes", "id": "b"}}
    assert tell(version=2, type="CITES", properties={"page": 4}, **ends) == {"applied": True}
    assert tell(version=1, type="CITES", properties={"page": 5}, **ends) == {"applied": False, "reason": "stale"}
    assert tell(version=1, document=ends["source"], properties={"owner": "Ada"}) == {"applied": True}
    found = server.client.get("/v1/collections/notes/documents/a").json()["payload"]
    assert found["mine"] == 1
    assert found["graph"]["properties"] == {"owner": "Ada"}
    [cites] = found["graph"]["relationships"]
    assert (cites["type"], cites["id"], cites["direction"], cites["properties"]) == ("CITES", "b", "out", {"page": 4})
    listed = server.client.get("/v1/collections/notes/documents").json()["documents"]
    assert [one["payload"]["graph"]["relationships"][0]["direction"] for one in listed] == ["out", "in"]
    until(lambda: {e["document"]["id"] for e in events if e["kind"] == "document.synced"} == {"a", "b"})
    until(lambda: any(event["origin"] == "graph" for event in events))


def test_a_server_without_collections_has_no_graph(tmp_path: Path) -> None:
    with closing(Server(tmp_path / "root")) as server:
        server.start()
        until(lambda: bool(server.client.get("/v1/nexus").json()["leads"]))
        look(server, "verify")
        assert server.client.post("/webhooks/nexus/node", content=b"{}").status_code == 404
        assert server.stop() == 0
    assert not list((tmp_path / "root").glob("graph*"))
