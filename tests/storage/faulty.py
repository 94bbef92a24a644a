"""Servers that fail as told: a proxy before the S3 server, and a site of our own. Real sockets, on this machine."""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Literal, NamedTuple, TypeVar

from processes import answering

Kind = Literal["403", "429", "500", "503", "failed", "lost", "cut", "slow", "spoiled"]
P = TypeVar("P", bound="Proxy")
_CODES = {
    "403": "ExpiredToken",
    "429": "TooManyRequests",
    "500": "InternalError",
    "503": "SlowDown",
    "failed": "InternalError",
}


class Seen(NamedTuple):
    """A request that came."""

    method: str
    path: str
    headers: dict[str, str]


class Proxy:
    """What passes requests on, but for the faults that were asked for."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seen: list[Seen] = []
        self._faults: list[list[object]] = []
        self._lock = threading.Lock()

    def fault(self, kind: Kind, method: str, part: str = "", *, times: int = 1) -> None:
        """Let the next ``times`` requests of a method whose path holds ``part`` end so.

        403, 429, 500, 503: the store never hears of it. failed: it does, and the answer is 500. lost: it does, and the
        answer is cut off before its first byte. cut: its answer ends in the middle. slow: its answer dribbles.
        spoiled: a byte of what is sent to it is another.
        """
        self._faults.append([kind, method, part, times])

    def take(self, seen: Seen, _body: bytes) -> Kind | None:
        """Note a request; the fault that it meets."""
        with self._lock:
            self.seen.append(seen)
            for fault in self._faults:
                kind, method, part, times = fault
                if times and method == seen.method and str(part) in seen.path:
                    fault[3] = int(str(times)) - 1
                    return kind  # type: ignore[return-value]
        return None

    def passed(self, seen: Seen, body: bytes, status: int, answer: bytes) -> None:
        """A request was passed on and got this answer; it has not been passed back yet."""


@contextmanager
def proxy(upstream: str, make: Callable[[str], P] = Proxy) -> Iterator[P]:  # type: ignore[assignment]
    """A proxy to ``upstream`` on a free port, of a kind of one's own where ``make`` makes one for a URL."""
    host = upstream.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen = Seen(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
            fault = known.take(seen, body)
            if fault in ("403", "429", "500", "503"):
                self._fail(int(fault), _CODES[fault])
                return
            if fault == "spoiled":
                body = bytes([body[0] ^ 1]) + body[1:]
            connection = http.client.HTTPConnection(host, timeout=30)
            try:
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("expect", "connection")}
                connection.request(self.command, self.path, body=body, headers=headers)
                response = connection.getresponse()
                data = response.read()
            finally:
                connection.close()
            known.passed(seen, body, response.status, data)
            if fault == "failed":
                self._fail(500, _CODES[fault])
                return
            if fault == "lost":
                self.close_connection = True
                return
            kept = {k: v for k, v in response.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
            self._answer(response.status, kept, data, fault)

        def _fail(self, status: int, code: str) -> None:
            said = f"<Error><Code>{code}</Code><Message>as asked</Message></Error>".encode()
            self._answer(status, {"Content-Type": "application/xml"}, said)

        def _answer(self, status: int, headers: dict[str, str], data: bytes, fault: Kind | None = None) -> None:
            self.send_response_only(status)
            head = self.command == "HEAD"
            for name, value in headers.items():
                if head or name.lower() != "content-length":
                    self.send_header(name, value)
            if status != 204 and not head:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if head:
                return
            if fault == "slow":
                for at in range(0, len(data), 1 << 20):
                    time.sleep(0.05)
                    self.wfile.write(data[at : at + (1 << 20)])
                return
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
            self.close_connection = self.close_connection or fault == "cut"

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass  # noqa: N815

    with answering(Handler) as url:
        known = make(url)
        yield known


class Site:
    """A site whose pages are functions of the request's handler."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.pages: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.seen: list[str] = []


def page(
    data: bytes,
    *,
    status: int = 200,
    cut: int = 0,
    say_length: bool = True,
    **headers: str,
) -> Callable[[BaseHTTPRequestHandler], None]:
    """A page that knows no ranges; the first ``cut`` answers end in the middle."""
    left = [cut]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response_only(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if say_length:
            handler.send_header("Content-Length", str(len(data)))
        handler.send_header("Connection", "close")
        handler.end_headers()
        left[0] -= 1
        handler.wfile.write(data[: len(data) // 2] if left[0] >= 0 else data)

    return answer


@contextmanager
def site(tls: ssl.SSLContext | None = None) -> Iterator[Site]:
    """A site on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            known.seen.append(self.path)
            known.pages.get(self.path, page(b"", status=404))(self)

    with answering(Handler, tls) as url:
        known = Site(url)
        yield known
