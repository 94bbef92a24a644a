"""Runpod's REST API for endpoints over real HTTP, as its openapi.json says, with faults on request."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "rp-test-key"
ENDPOINT = "jpnw0v75y3qoql"
SETTINGS = {"name", "workersMin", "workersMax", "idleTimeout", "scalerType", "scalerValue", "executionTimeoutMs"}


class RunpodRest:
    """One endpoint; use as a context manager. ``requests`` has what came, ``faults`` what is answered first:
    ``(status, headers, body)``, or None for a connection that breaks."""

    def __init__(self, **endpoint: Any) -> None:
        self.endpoint: dict[str, Any] = {
            "allowedCudaVersions": ["12.9"],
            "computeType": "GPU",
            "createdAt": "2024-07-12T19:14:40.144Z",
            "dataCenterIds": ["EU-RO-1"],
            "env": {"ENV_VAR": "value"},
            "executionTimeoutMs": 600_000,
            "gpuCount": 1,
            "gpuTypeIds": ["NVIDIA GeForce RTX 4090"],
            "id": ENDPOINT,
            "idleTimeout": 5,
            "name": "my endpoint",
            "networkVolumeId": None,
            "scalerType": "QUEUE_DELAY",
            "scalerValue": 4,
            "templateId": "30zmvf89kd",
            "userId": "user_2PyTJrLzeuwfZilRZ7JhCQDuSqo",
            "version": 0,
            "workersMax": 3,
            "workersMin": 0,
            **endpoint,
        }
        self.faults: list[tuple[int, dict[str, str], str] | None] = []
        self.requests: list[tuple[str, dict[str, Any] | None]] = []
        self.deaf = False
        """Takes changes and does nothing."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.base = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> RunpodRest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def changes(self) -> list[dict[str, Any] | None]:
        """The bodies of all changes."""
        return [body for method, body in self.requests if method == "PATCH"]

    def answer(self, method: str, path: str, key: str, body: dict[str, Any] | None) -> tuple[int, dict[str, str], str]:
        """What Runpod says."""
        if key != f"Bearer {KEY}":
            return 401, {}, ""
        if path != f"/v1/endpoints/{self.endpoint['id']}":
            return 404, {}, json.dumps({"error": "endpoint not found"})
        if method == "PATCH" and not self.deaf:
            assert body is not None
            new = {**self.endpoint, **body}
            if set(body) - SETTINGS or new["workersMin"] > new["workersMax"]:
                return 400, {}, json.dumps({"error": "invalid input"})
            if new["workersMax"] > 30:
                return (
                    400,
                    {},
                    json.dumps({"error": "Max workers across all endpoints must not exceed\nyour quota (30)"}),
                )
            self.endpoint = {**new, "version": self.endpoint["version"] + 1}
        return 200, {}, json.dumps(self.endpoint)


def _handler(rest: RunpodRest) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            length = int(self.headers.get("Content-Length", "0"))
            body = json.loads(self.rfile.read(length)) if length else None
            rest.requests.append((self.command, body))
            if rest.faults:
                fault = rest.faults.pop(0)
                if fault is None:
                    self.close_connection = True
                    return
                status, headers, text = fault
            else:
                key = self.headers.get("Authorization", "")
                status, headers, text = rest.answer(self.command, self.path, key, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_PATCH = _any  # noqa: N815 - names of the library

        def log_message(self, *_: object) -> None:
            pass

    return Handler
