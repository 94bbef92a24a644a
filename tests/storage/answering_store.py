"""A server whose every answer is a function of the test's own, for what no real store can be made to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from processes import answering
from storage.faulty import Seen

Answer = Callable[[BaseHTTPRequestHandler, Seen], None]


class Store:
    """What came; the answers are the test's."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seen: list[Seen] = []


@contextmanager
def store(answer: Answer) -> Iterator[Store]:
    """A server on a free port. Bodies are read and dropped."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen = Seen(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
            known.seen.append(seen)
            answer(self, seen)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer  # noqa: N815

    with answering(Handler) as url:
        known = Store(url)
        yield known


def say(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    """A whole answer."""
    handler.send_response_only(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
