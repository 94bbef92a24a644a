"""Connections to embedding APIs that hang, and answers that are none: each ends in its time, with what it was."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from provider_server import KEY
from storage.answering_store import Answer, Store, say, store
from storage.faulty import Seen

from common.embedding.choice import Choice, Engines
from common.embedding.port import Embedder
from common.embedding.providers import Patience, open_provider
from common.errors import EmbeddingFailed, ProviderRejected

ONCE = Patience(tries=1, useless_answers=1, first_wait=0.001)
MODEL = {"openai": "text-embedding-3-small", "voyage": "voyage-3.5", "ollama": "all-minilm"}


class Opens:
    """Opens engines and servers for one test, and closes them."""

    def __init__(self) -> None:
        self._open = ExitStack()

    def engine(self, provider: Any, url: str, **engines: Any) -> Embedder:
        choice = Choice(mode="external_api", provider=provider, model=MODEL[provider])
        made = open_provider(choice, Engines(keys=KEY, urls={provider: url}, **engines), layout=None, patience=ONCE)
        return self._open.enter_context(closing(made))

    def server(self, answer: Answer) -> Store:
        return self._open.enter_context(store(answer))

    def close(self) -> None:
        self._open.close()


@pytest.fixture
def opens() -> Iterator[Opens]:
    with closing(Opens()) as opened:
        yield opened


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A socket that accepts nobody, whose connections take a few kilobytes."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        yield server


def test_a_server_that_takes_no_connection_is_told_from_one_that_does_not_answer(
    listening: socket.socket, opens: Opens
) -> None:
    host, port = listening.getsockname()
    waiting = [socket.socket() for _ in range(4)]
    for one in waiting:  # what fills the queue of those that nobody accepts
        one.setblocking(False)
        one.connect_ex((host, port))
    engine = opens.engine("openai", f"http://{host}:{port}/v1", request_timeout_seconds=0.3)
    with pytest.raises(EmbeddingFailed, match=rf"no connection to {host}:{port} within 0.3 s"):
        engine.embed(["a"])
    for one in waiting:
        one.close()


def test_a_server_that_reads_nothing_of_a_large_request_ends_it_in_its_time(
    listening: socket.socket, opens: Opens
) -> None:
    host, port = listening.getsockname()
    engine = opens.engine("voyage", f"http://{host}:{port}/v1", request_timeout_seconds=0.5)
    # Voyage cuts texts itself, and so is sent 1.5 MB of each.
    with pytest.raises(EmbeddingFailed, match=rf"no whole answer from {host}:{port} within 0.5 s"):
        engine.embed([f"{number}" + "x" * 2_000_000 for number in range(8)])


def test_an_answer_without_an_end_is_read_no_further_than_any_answer_could_be(opens: Opens) -> None:
    def answer(handler: BaseHTTPRequestHandler, seen: Seen) -> None:
        handler.close_connection = True
        handler.send_response_only(200)
        handler.end_headers()
        for _ in range(1_000):
            handler.wfile.write(b" " * 65_536)

    engine = opens.engine("openai", opens.server(answer).url)
    with pytest.raises(ProviderRejected, match=r"openai answered more than [\d,]+ bytes, more than the vectors could"):
        engine.embed(["a"])


@pytest.mark.parametrize("sent", [20, 200_000])
def test_a_refusal_counts_by_its_status_although_it_breaks_off_or_has_no_end(sent: int, opens: Opens) -> None:
    def answer(handler: BaseHTTPRequestHandler, seen: Seen) -> None:
        handler.close_connection = True
        handler.send_response_only(403)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        handler.wfile.write(b"not in your country " * (sent // 20))

    engine = opens.engine("openai", opens.server(answer).url)
    with pytest.raises(ProviderRejected, match="openai answered 403: not in your country") as refused:
        engine.embed(["a"])
    assert (refused.value.details["status"], refused.value.details["tries"]) == (403, 1)


@pytest.mark.parametrize(
    "said",
    [b'{"object":"list","data":null}', b"[]", b'{"data":[{"embedding":{"0":1}}]}', b"[" * 100_000, b'{"data":[NaN]}'],
)
def test_json_that_is_no_answer_of_the_api_is_a_failure_that_says_so(said: bytes, opens: Opens) -> None:
    engine = opens.engine("openai", opens.server(lambda handler, seen: say(handler, 200, said)).url)
    with pytest.raises(EmbeddingFailed, match="openai failed 1 times, at last so: an answer that is not the API's: "):
        engine.embed(["a"])


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda handler, seen: say(handler, 502, b"<h1>Bad gateway</h1>"), "status 502: Bad gateway$"),
        (lambda handler, seen: say(handler, 200, b"{}"), "an answer that is not the API's: "),
        (lambda handler, seen: say(handler, 200, b" " * (5 << 20)), "5,242,880 bytes$"),
    ],
)
def test_an_ollama_that_does_not_list_its_models_opens_no_engine(answer: Answer, says: str, opens: Opens) -> None:
    server = opens.server(answer)
    with pytest.raises(EmbeddingFailed, match=f"^ollama does not say which models it has: {says}") as failed:
        opens.engine("ollama", server.url)
    assert failed.value.retryable
    assert [seen.path for seen in server.seen] == ["/api/tags"]
