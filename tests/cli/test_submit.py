"""``submit`` against the real server, and through a line that breaks at bad moments."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from processes import EXAMPLE, command, free_port, serving

from common.contract import Event
from control_plane.client import ExportClient

KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("submit") / "exports", key=KEY) as url:
        yield url


def submit(url: str, graph: Path, *more: object, key: str = KEY) -> tuple[int, bytes, bytes]:
    done = command("submit", graph, "--url", url, *more, env={"MEMVID_EXPORT_API_KEY": key})
    return done.returncode, done.stdout, done.stderr


def check_files(out: Path, report: dict[str, dict[str, object]]) -> None:
    capsule = out / str(report["capsule"]["fileName"])
    manifest = json.loads(capsule.with_name(f"{capsule.name}.manifest.json").read_text())
    for path, expected in (
        (capsule, manifest["parts"][0]["sha256"]),
        (capsule.with_name(manifest["sidecarFileName"]), manifest["sidecarSha256"]),
    ):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == expected
    assert len(list(out.iterdir())) == 3


def test_a_graph_goes_out_and_the_capsule_its_sidecar_and_its_manifest_come_back(server: str, tmp_path: Path) -> None:
    code, stdout, stderr = submit(server, EXAMPLE, "--wait", "--out", tmp_path, "--json")
    assert code == 0, stderr
    check_files(tmp_path, json.loads(stdout))
    assert b"Fetching" in stderr


def test_without_waiting_it_answers_the_job(server: str, tmp_path: Path) -> None:
    code, stdout, stderr = submit(server, EXAMPLE, "--json")
    assert code == 0, stderr
    job = json.loads(stdout)
    assert job["status"] in ("queued", "running")
    answer = httpx.get(f"{server}/v1/exports/{job['jobId']}", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.json()["jobId"] == job["jobId"]


def test_the_nodes_come_into_the_collection_that_is_named(server: str, tmp_path: Path) -> None:
    nodes = [{"id": name, "label": "Function", "properties": {"name": name}} for name in ("parse", "build")]
    call = {"id": "e", "sourceId": "parse", "targetId": "build", "type": "CALLS"}
    graph = tmp_path / "graph.json"
    graph.write_text(json.dumps({"nodes": nodes, "relationships": [call], "options": {"collection": "other"}}))
    headers = {"Authorization": f"Bearer {KEY}"}
    to = ("--collection", "code", "--wait", "--out", tmp_path / "out")
    code, _, stderr = submit(server, graph, *to)
    assert code == 0, stderr
    assert b"Collection code: 2 documents" in stderr
    assert httpx.get(f"{server}/v1/collections/code", headers=headers).json()["documents"] == 2
    assert httpx.get(f"{server}/v1/collections/other", headers=headers).status_code == 404
    httpx.put(f"{server}/v1/collections/full", headers=headers, json={"dimension": 2}).raise_for_status()
    code, _, stderr = submit(server, graph, "--collection", "full", "--wait", "--out", tmp_path / "again")
    assert code == 3
    assert b"of the model full with 2 numbers" in stderr


def test_a_plain_file_is_sent_compressed(server: str, tmp_path: Path) -> None:
    plain = tmp_path / "graph.ndjson"
    plain.write_bytes(gzip.decompress(EXAMPLE.read_bytes()))
    with breaking(server, {}) as line:
        code, _, stderr = submit(line.url, plain)
    assert code == 0, stderr
    post = next(seen for seen in line.seen if seen.startswith("POST"))
    assert post.endswith(" gzip")


def test_the_key_can_come_from_a_file(server: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    done = command("submit", EXAMPLE, "--url", server, env={"MEMVID_EXPORT_API_KEY_FILE": str(tmp_path / "key")})
    assert done.returncode == 0, done.stderr


def test_a_file_that_holds_no_text_is_no_key(server: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\xff\xfe")
    done = command("submit", EXAMPLE, "--url", server, env={"MEMVID_EXPORT_API_KEY_FILE": str(tmp_path / "key")})
    assert done.returncode == 2
    assert b"MEMVID_EXPORT_API_KEY_FILE cannot be read" in done.stderr


@pytest.mark.parametrize(("key", "words"), [("wrong", b"MEMVID_EXPORT_API_KEY"), (KEY, b"nodes")])
def test_what_the_server_refuses_ends_with_2(server: str, key: str, words: bytes, tmp_path: Path) -> None:
    wrong = tmp_path / "empty.json"
    wrong.write_text('{"nodes": [], "relationships": []}')
    code, _, stderr = submit(server, wrong, key=key)
    assert code == 2
    assert words in stderr


def test_a_server_that_is_away_ends_with_3_and_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    code, _, stderr = submit(url, EXAMPLE)
    assert code == 3
    assert url.encode() in stderr
    assert b"Traceback" not in stderr


@pytest.mark.parametrize(
    "cuts",
    [
        pytest.param({"/download": [10_000, 50_000, 0]}, id="download-cut-three-times"),
        pytest.param({"/sidecar": [1], "/manifest": [1]}, id="sidecar-and-manifest-cut"),
        pytest.param({"/events/stream": [0, 200, 500]}, id="event-stream-cut"),
        pytest.param({"/events/stream": [0] * 1000}, id="no-event-stream-at-all"),
        pytest.param({"POST": [0, 0]}, id="answer-to-the-submission-lost"),
    ],
)
def test_a_line_that_breaks_costs_only_time(cuts: dict[str, list[int]], server: str, tmp_path: Path) -> None:
    with breaking(server, cuts) as line:
        code, stdout, stderr = submit(line.url, EXAMPLE, "--wait", "--out", tmp_path, "--json")
    assert code == 0, stderr
    check_files(tmp_path, json.loads(stdout))
    assert line.broken > 0


def test_a_submission_that_is_repeated_starts_one_job(server: str, tmp_path: Path) -> None:
    with breaking(server, {"POST": [0, 0]}) as line:
        code, stdout, stderr = submit(line.url, EXAMPLE, "--json")
        assert code == 0, stderr
        posts = [seen for seen in line.seen if seen.startswith("POST")]
    keys = {seen.split()[2] for seen in posts}
    assert (len(posts), len(keys)) == (3, 1)
    listed = httpx.get(f"{server}/v1/exports?limit=2", headers={"Authorization": f"Bearer {KEY}"}).json()["jobs"]
    assert [job["jobId"] for job in listed].count(json.loads(stdout)["jobId"]) == 1


def test_every_event_comes_once_and_in_order_however_often_the_stream_breaks(server: str) -> None:
    with breaking(server, {"/events/stream": [100, 700, 0, 1500, 40]}) as line, ExportClient(line.url, KEY) as client:
        job = client.submit(EXAMPLE, lambda _done, _total: None)
        events: list[Event] = list(client.events(job.job_id))
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert events[-1].type == "job_completed"


class Line:
    """What went over a breaking line."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seen: list[str] = []
        self.broken = 0


@contextmanager
def breaking(server: str, cuts: dict[str, list[int]]) -> Iterator[Line]:
    """A way to ``server`` that breaks off: ``cuts`` lists, for a method or the end of a path, after how many bytes of
    the body the first, second, … answer is cut; later ones are whole."""
    left = {name: list(sizes) for name, sizes in cuts.items()}
    guard = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            path = self.path.split("?")[0]
            body = b"".join(self._chunks())
            kept = {
                k: v for k, v in self.headers.items() if k.lower() not in ("host", "transfer-encoding", "connection")
            }
            with guard:
                marks = [self.headers.get(name) for name in ("Idempotency-Key", "Content-Encoding")]
                line.seen.append(f"{self.command} {path} {marks[0]} {marks[1]}")
                cut = next((sizes.pop(0) for name, sizes in left.items() if self._is(name, path) and sizes), None)
                line.broken += cut is not None
            self.close_connection = True
            with httpx.stream(self.command, server + self.path, headers=kept, content=body, timeout=60) as answer:
                if cut == 0:
                    answer.read()
                    return
                self.send_response_only(answer.status_code)
                for name, value in answer.headers.items():
                    if name.lower() not in ("transfer-encoding", "connection", "date"):
                        self.send_header(name, value)
                length = "content-length" in answer.headers
                if not length:
                    self.send_header("Transfer-Encoding", "chunked")
                self.send_header("Connection", "close")
                self.end_headers()
                if self.command == "HEAD":
                    return
                sent = 0
                for piece in answer.iter_raw():
                    part = piece if cut is None else piece[: cut - sent]
                    self.wfile.write(part if length else b"%x\r\n%b\r\n" % (len(part), part))
                    self.wfile.flush()
                    sent += len(part)
                    if cut is not None and sent >= cut:
                        return
                if not length:
                    self.wfile.write(b"0\r\n\r\n")

        do_GET = do_POST = do_HEAD = do_DELETE = _pass_on  # noqa: N815

        def _is(self, name: str, path: str) -> bool:
            return name == self.command or path.endswith(name)

        def _chunks(self) -> Iterator[bytes]:
            if "Content-Length" in self.headers:
                yield self.rfile.read(int(self.headers["Content-Length"]))
            elif self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        line = Line(f"http://127.0.0.1:{proxy.server_port}")
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            yield line
        finally:
            proxy.shutdown()
            thread.join()
