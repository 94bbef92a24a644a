"""What a client may do at most: heads, bodies, streams and downloads that are too long, too many, or too slow."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import zstandard
from live_server import KEY, Server, graph, new_job

from common.contract import Progress
from common.storage import StorageConfig, open_storage
from control_plane.errors import RateLimited
from control_plane.exports.downloads import Artifact, Download, Downloads, Patience
from control_plane.exports.stream import EventStream
from control_plane.jobs.database import Database
from control_plane.jobs.holds import Holds
from control_plane.jobs.hub import EventHub
from control_plane.jobs.records import JobRecord, NewEvent
from control_plane.jobs.store import JobStore, now_ms
from control_plane.operations.keys import EVERYBODY
from control_plane.operations.metrics import Metrics
from control_plane.operations.shares import Shares
from control_plane.server import MAX_HEAD_BYTES, MAX_HEADERS, BoundedHttp

MIB = 1 << 20


def _raw(port: int, *parts: bytes) -> bytes:
    """All that the server answers until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        answer = b""
        try:
            for part in parts:
                connection.sendall(part)
            while piece := connection.recv(1 << 16):
                answer += piece
        except (ConnectionResetError, BrokenPipeError):
            pass
        return answer


HEAD = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        [HEAD, b"X-Long: " + b"a" * MAX_HEAD_BYTES, b"\r\n\r\n"],
        [HEAD, b"".join(b"X-%d: 1\r\n" % n for n in range(MAX_HEADERS + 1)), b"\r\n"],
        [b"GET /healthz?" + b"q" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: a\r\n\r\n"],
        # Without an end: the rest would never come.
        [HEAD, *[b"X-Long: " if n == 0 else b"a" * 10_000 for n in range(40)]],
        [b"G" * 300_000],
    ],
    ids=["one long field", "many fields", "a long query", "a field without an end", "no request at all"],
)
def test_a_head_without_measure_ends_its_connection(server: Server, parts: list[bytes]) -> None:
    answer = _raw(server.port, *parts)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
    assert server.client.get("/healthz").status_code == 200


def test_a_long_head_is_answered_as_any_other_error(server: Server) -> None:
    answer = _raw(server.port, HEAD, b"".join(b"X-%d: 1\r\n" % n for n in range(MAX_HEADERS + 1)), b"\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert json.loads(body)["error"]["code"] == "INVALID_EXPORT_REQUEST"


def test_trailers_without_end_end_their_connection(server: Server) -> None:
    head = f"POST /v1/exports HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    trailers = [b"X-%d: %b\r\n" % (n, b"a" * 1_000) for n in range(200)]
    answer = _raw(server.port, head.encode() + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n", *trailers)
    assert not answer.startswith(b"HTTP/1.1 2")
    assert server.client.get("/healthz").status_code == 200


class _Hasty(BoundedHttp):
    head_seconds = 0.3


async def _hello(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    if scope["path"] == "/slow":  # longer than a connection may be without a request
        for letter in (b"h", b"e", b"l", b"l"):
            await asyncio.sleep(0.5)
            await send({"type": "http.response.body", "body": letter, "more_body": True})
        await send({"type": "http.response.body", "body": b"o"})
        return
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture
def hasty() -> Iterator[int]:
    """The port of a server that gives a head 0.3 s, and 1 s more after an answer; it reads no body."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        config = uvicorn.Config(_hello, http=_Hasty, lifespan="off", log_config=None, timeout_keep_alive=1)
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join()


@pytest.mark.parametrize("first", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: a\r\n"])
def test_a_head_that_does_not_come_ends_its_connection(hasty: int, first: bytes) -> None:
    assert _raw(hasty, first) == b""


def test_a_head_in_time_may_be_followed_by_others_on_the_same_connection(hasty: int) -> None:
    with socket.create_connection(("127.0.0.1", hasty), timeout=10) as connection:
        for _ in range(3):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert connection.recv(4096).endswith(b"hello")
            time.sleep(0.4)


AFTER = {
    "an empty line": (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\r\n"),
    "a body": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 500000000\r\n\r\n", b"a"),
    "chunks": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
}


@pytest.mark.parametrize("times", [1, 1_000])
@pytest.mark.parametrize("what", AFTER)
def test_what_comes_after_an_answer_and_is_no_request_holds_no_connection(hasty: int, what: str, times: int) -> None:
    first, later = AFTER[what]
    with socket.create_connection(("127.0.0.1", hasty), timeout=10) as connection:
        connection.sendall(first)
        assert connection.recv(4096).endswith(b"hello")
        try:
            for _ in range(times):
                connection.sendall(later)
                time.sleep(0.01)
            assert connection.recv(4096) == b""
        except (ConnectionResetError, BrokenPipeError):
            pass
        else:
            assert times == 1  # else it was not cut while it sent


def test_answers_that_take_long_come_whole_on_a_connection_in_use(hasty: int) -> None:
    request = b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n"
    with socket.create_connection(("127.0.0.1", hasty), timeout=10) as connection:
        connection.sendall(request % b"/" + b"\r\n")
        assert connection.recv(4096).endswith(b"hello")
        connection.sendall(request % b"/slow" + request % b"/slow" + request % b"/")  # the last two wait their turn
        answer = b""
        while answer.count(b"HTTP/1.1 200") < 3 or not answer.endswith(b"hello"):
            piece = connection.recv(4096)
            assert piece, answer
            answer += piece
        assert answer.count(b"\r\n\r\nhello") == 3


# --- bodies -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bombs() -> dict[str, bytes]:
    """Bodies that are small and say much."""
    zeros = gzip.compress(b" " * (64 * MIB), 9)
    return {
        "gzip": zeros,
        "gzip in gzip": gzip.compress(zeros, 9),
        "many gzip members": gzip.compress(b"") * 120_000,
        "members of a bomb": gzip.compress(b" " * MIB, 9) * 60,
        "zstd": zstandard.compress(b" " * (64 * MIB), 19),
        "many zstd frames": zstandard.compress(b"") * 120_000,
        "frames of a bomb": zstandard.compress(b" " * MIB, 19) * 400,
    }


@pytest.mark.parametrize(
    "name",
    ["frames of a bomb", "gzip", "gzip in gzip", "many gzip members", "many zstd frames", "members of a bomb", "zstd"],
)
def test_a_bomb_is_refused_and_the_server_goes_on(server: Server, bombs: dict[str, bytes], name: str) -> None:
    encoding = "zstd" if "zstd" in name or "frames" in name else "gzip"
    answer = server.post(bombs[name], content_encoding=encoding)
    code = answer.json()["error"]["code"]
    assert (answer.status_code, code) in {(413, "PAYLOAD_TOO_LARGE"), (400, "INVALID_EXPORT_REQUEST")}, answer.text
    assert not list((server.root / "staging" / "incoming").iterdir())


@pytest.mark.parametrize(
    "body",
    [
        b'{"nodes":' + b"[" * 200_000,
        b'{"nodes":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        json.dumps(graph(2)).encode().replace(b'"name": "call_0"', b'"name": "call_0", "x": ' + b"[" * 70 + b"]" * 70),
        json.dumps(graph(2)).encode().replace(b"call_0", b"c" * 10_000),
    ],
    ids=["open brackets", "nested lists", "nested objects", "a deep property", "a long name"],
)
def test_json_without_measure_is_refused(server: Server, body: bytes) -> None:
    answer = server.post(body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "INVALID_EXPORT_REQUEST"), answer.text[:500]


# --- streams and downloads that nobody reads ---------------------------------------------------------------


@asynccontextmanager
async def _store(root: Path) -> AsyncIterator[tuple[JobStore, EventHub]]:
    database, hub = Database(f"sqlite+aiosqlite:///{root / 'jobs.sqlite'}"), EventHub()
    await database.migrate()
    try:
        yield JobStore(database, hub, queue_capacity=10), hub
    finally:
        await database.close()


async def _finished(store: JobStore) -> JobRecord:
    await store.create(new_job())
    job = await store.claim(max_weight=None)
    assert job is not None
    done = NewEvent("job_completed", Progress(stage="download_ready", progress=100, stage_progress=100, message="Done"))
    moved = await store.move(job.id, "completed", done, values={"expires_at": now_ms() + 86_400_000})
    assert moved is not None
    return moved


def _artifact(root: Path) -> Artifact:
    data = b"0123456789abcdef" * (MIB // 4)
    path = root / "files" / "capsule.mv2"
    path.parent.mkdir()
    path.write_bytes(data)
    return Artifact(
        "capsule", path.as_uri(), path.name, "application/octet-stream", len(data), hashlib.sha256(data).hexdigest()
    )


class _Client:
    """The server's side of a connection to a client that reads ``takes`` messages, and goes after them if it
    ``leaves``."""

    def __init__(self, takes: int, *, leaves: bool = False) -> None:
        self._takes = takes
        self._leaves = leaves
        self._done = asyncio.Event()
        self.got: list[Any] = []
        self.scope: Any = {"type": "http", "method": "GET", "auth": EVERYBODY}

    async def receive(self) -> Any:
        if not self._leaves:
            await asyncio.Event().wait()
        await self._done.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if len(self.got) >= self._takes:
            self._done.set()
            await asyncio.Event().wait()
        self.got.append(message)


@pytest.mark.parametrize(
    ("patience", "leaves"), [(Patience(600, 0.3), False), (Patience(0.3, 600), False), (Patience(600, 600), True)]
)
def test_a_download_that_nobody_reads_gives_its_place_back(tmp_path: Path, patience: Patience, leaves: bool) -> None:
    async def inside() -> None:
        async with _store(tmp_path) as (store, _):
            metrics = Metrics()
            shares = Shares("downloads", 1, metrics, several=False)
            storage = open_storage(StorageConfig(roots=[str(tmp_path / "files")]))
            downloads = Downloads(storage, store, holds=Holds(store), metrics=metrics, shares=shares, patience=patience)
            job, artifact = await _finished(store), _artifact(tmp_path)
            reader = _Client(2, leaves=leaves)
            running = asyncio.create_task(
                Download(downloads, job, artifact, {})(reader.scope, reader.receive, reader.send)
            )
            while len(reader.got) < 2:
                await asyncio.sleep(0.01)
            if not leaves:
                refused = _Client(10)
                with pytest.raises(RateLimited):
                    await Download(downloads, job, artifact, {})(refused.scope, refused.receive, refused.send)
                assert refused.got == []
            async with asyncio.timeout(20):
                await running
            assert shares.taken == 0
            assert len(reader.got) == 2
            whole = _Client(100)
            await Download(downloads, job, artifact, {})(whole.scope, whole.receive, whole.send)
            got = b"".join(message.get("body", b"") for message in whole.got)
            assert hashlib.sha256(got).hexdigest() == artifact.sha256

    asyncio.run(inside())


@pytest.mark.parametrize("patience", [Patience(600, 0.3), Patience(0, 600)])
def test_an_event_stream_that_nobody_reads_or_that_lasts_too_long_ends(tmp_path: Path, patience: Patience) -> None:
    async def inside() -> None:
        async with _store(tmp_path) as (store, hub):
            shares = Shares("streams", 1, Metrics(), several=False)
            job, _ = await store.create(new_job())
            endless = patience.total == 0
            reader = _Client(100 if endless else 1)
            stream = EventStream(store, hub, job, 0, shares=shares, patience=patience)
            async with asyncio.timeout(20):
                await stream(reader.scope, reader.receive, reader.send)
            assert shares.taken == 0
            assert hub.listeners == 0
            # One that is over ends in order, so that the client asks again; one that nobody reads is cut.
            assert reader.got[-1].get("more_body", True) is not endless

    asyncio.run(inside())


def test_more_streams_and_downloads_than_there_may_be_are_told_to_come_again(start_server: Any) -> None:
    server: Server = start_server(max_streams=2, max_downloads=1, worker_slots=1)
    job_id = server.submit(graph(name="first"))
    server.wait(job_id)
    waiting = server.submit(graph(20_000, name="second", lines=3))
    with ExitStack() as open_streams:
        for _ in range(2):
            answer = open_streams.enter_context(server.client.stream("GET", f"/v1/exports/{waiting}/events/stream"))
            assert answer.status_code == 200
        refused = server.client.get(f"/v1/exports/{waiting}/events/stream")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "RATE_LIMITED")
        assert int(refused.headers["retry-after"]) > 0
        server.client.delete(f"/v1/exports/{waiting}")
    assert 'memvid_export_refused_total{limit="streams"} 1.0' in server.client.get("/metrics").text
    for _ in range(200):
        again = server.client.get(f"/v1/exports/{job_id}/events/stream")
        if again.status_code == 200:
            break
        time.sleep(0.05)
    assert again.text.endswith("\n\n")
