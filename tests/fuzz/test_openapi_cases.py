"""A real server answers as its OpenAPI document says, whatever it is sent: the short form of ``scripts/fuzz api``."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from api import exports_there, run
from processes import answering


def test_no_answer_is_outside_the_document(tmp_path: Path) -> None:
    with exports_there(tmp_path / "root") as (server, ids):
        found = run(server, ids, tmp_path, cases=100, seed=1, phases="coverage,fuzzing")
        log = server.log.read_text()
    assert found.failures == [], found.said[-2_000:]
    assert sum(sum(counts.values()) for counts in found.statuses.values()) > 300
    assert {"200", "202", "400", "401", "404", "409"} <= {
        status for counts in found.statuses.values() for status in counts
    }
    assert '"level":"error"' not in log


class Cutting(BaseHTTPRequestHandler):
    """Gives out a document, and cuts every connection to what stands in it."""

    def do_GET(self) -> None:
        """One of the two."""
        if self.path != "/schema/openapi.json":
            self.connection.close()
            return
        query: dict[str, Any] = {"name": "q", "in": "query", "schema": {"type": "string"}}
        cut = {"get": {"operationId": "cut", "parameters": [query], "responses": {"200": {"description": "never"}}}}
        document = {"openapi": "3.1.0", "info": {"title": "cut", "version": "1"}, "paths": {"/cut": cut}}
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_server_that_cuts_its_connections_is_a_finding(tmp_path: Path) -> None:
    with answering(Cutting) as url:
        found = run(cast("Any", SimpleNamespace(url=url)), ["a"], tmp_path, cases=5, seed=1, phases="fuzzing")
    assert set(found.statuses["GET /cut"]) == {"no answer"}
    assert [failure.partition("\n")[0] for failure in found.failures] == [
        "GET /cut: GET: no answer: the connection was cut, or nothing came in time"
    ]
