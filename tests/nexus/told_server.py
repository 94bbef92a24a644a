"""A server on this machine that answers what a test tells it, over plain HTTP, and may fail in the middle."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from types import MappingProxyType
from typing import Any, NamedTuple

from processes import answering


class Seen(NamedTuple):
    """A request that came."""

    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""
    raw: bytes

    @property
    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.raw)
        return found

    @property
    def query(self) -> str:
        return str(self.body["query"])


class Answer(NamedTuple):
    """What is answered."""

    status: int
    body: bytes
    kind: str = "application/json"
    headers: Mapping[str, str] = MappingProxyType({})
    length: int | None = None
    """That is told; None: the body's own."""
    over: bool = False
    """The connection is cut after it."""


class ToldServer:
    """A server; ``answer`` says what comes back."""

    def __init__(self, answer: Callable[[Seen], Answer | None]) -> None:
        self.url = ""
        self.seen: list[Seen] = []
        self.answer = answer
        """None: nothing, and the connection is cut."""
        self.over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """It serves."""
        known = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None: ...

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers.get("content-length", 0)))
                seen = Seen(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, raw)
                known.seen.append(seen)
                answer = known.answer(seen)
                if answer is None:
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                length = len(answer.body) if answer.length is None else answer.length
                own = {"Content-Type": answer.kind, "Content-Length": str(length), **answer.headers}
                for name, value in own.items():
                    self.send_header(name, value)
                self.end_headers()
                self.close_connection = answer.over
                self.wfile.write(answer.body)

            do_GET = do_PUT = do_DELETE = do_POST  # noqa: N815

        with answering(Handler) as url:
            self.url = url
            yield
            self.over.set()
