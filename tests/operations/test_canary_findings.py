"""What a canary finds out at each step, and how a server tells of one whose process does not end well."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import KEY, Server, large_graph
from processes import answering, free_port

from control_plane.operations.canary import Canary, CanaryRun, Step, fly
from control_plane.operations.metrics import Metrics

Answer = tuple[int, dict[str, Any]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("findings") / "root", worker_slots=1).start()
    yield running
    running.close()


def flown(url: str, after: dict[str, Callable[[], None]] | None = None) -> CanaryRun:
    """A canary, with what is done after some of its steps."""

    def tell(step: Step) -> None:
        (after or {}).get(step.name, lambda: None)()

    return fly(url, KEY, "qwrtplkjhgfdszxc", semantic=False, tell=tell)


@contextmanager
def before(server: Server, answers: dict[str, list[Answer]]) -> Iterator[tuple[str, list[str]]]:
    """The URL of what stands before a server and gives these answers first to requests whose path ends so; and the
    paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self._body()
            path = self.path.partition("?")[0]
            asked.append(path)
            for ending, left in answers.items():
                if path.endswith(ending) and left:
                    status, said = left.pop(0)
                    self._say(status, {"Content-Type": "application/json"}, json.dumps(said).encode())
                    return
            own = ("host", "transfer-encoding")
            headers = {name: value for name, value in self.headers.items() if name.lower() not in own}
            headers["Accept-Encoding"] = "identity"
            answer = httpx.request(self.command, server.url + self.path, headers=headers, content=body, timeout=60)
            kept = {name: value for name, value in answer.headers.items() if name not in ("content-length", "date")}
            self._say(answer.status_code, kept, answer.content)

        do_POST = do_DELETE = do_GET  # noqa: N815

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def _say(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                if name.lower() != "transfer-encoding":
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with answering(Handler) as url:
        yield url, asked


def refusal(code: str) -> Answer:
    return 503, {"error": {"code": code, "message": "not now"}}


def test_an_index_that_is_being_opened_is_waited_for(server: Server) -> None:
    with before(server, {"/search": [refusal("INDEX_BUILD_IN_PROGRESS")] * 2}) as (url, asked):
        run = flown(url)
    assert (run.outcome, run.message) == ("ok", "")
    assert sum(path.endswith("/search") for path in asked) == 3


def test_any_other_refusal_of_a_search_ends_it_at_once(server: Server) -> None:
    with before(server, {"/search": [refusal("QUEUE_UNAVAILABLE")]}) as (url, asked):
        run = flown(url)
    assert (run.outcome, run.step) == ("failed", "search"), "only a refused post says that all is well"
    assert sum(path.endswith("/search") for path in asked) == 1


def test_a_search_that_does_not_find_what_was_planted_is_a_defect(server: Server) -> None:
    nothing: Answer = (200, {"query": "q", "mode": "lexical", "semanticUsed": False, "hits": [], "warnings": []})
    with before(server, {"/search": [nothing]}) as (url, _):
        run = flown(url)
    assert (run.outcome, run.step) == ("failed", "search")
    assert run.message == "canary_qwrtplkjhgfdszxc is in the graph and was not found; found: nothing"


def test_a_server_that_answers_something_else_is_a_defect(server: Server) -> None:
    with before(server, {"/search": [(200, {"query": "q", "mode": "lexical", "hits": []})]}) as (url, _):
        run = flown(url)
    assert (run.outcome, run.step) == ("failed", "search")
    assert "answered what is no SearchAnswer: Object missing required field `semanticUsed`" in run.message


def test_a_tool_that_finds_other_things_is_a_defect_and_they_are_named(server: Server) -> None:
    items = {"result": {"items": [{"name": "one"}, {"name": "two"}]}}
    other: Answer = (200, {"jsonrpc": "2.0", "id": 1, "result": {"structuredContent": items, "isError": False}})
    with before(server, {"/mcp": [other]}) as (url, _):
        run = flown(url)
    assert (run.outcome, run.step) == ("failed", "mcp")
    assert run.message.endswith("was not found; found: one, two")


def test_a_capsule_that_is_damaged_after_it_was_fetched_is_found_by_its_checks(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage() -> None:
        (capsule,) = tmp_path.rglob("*.mv2")
        data = bytearray(capsule.read_bytes())
        data[len(data) // 2] ^= 1
        capsule.write_bytes(data)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = flown(server.url, {"download": damage})
    assert (run.outcome, run.step) == ("failed", "verify")
    assert run.message
    assert [step.name for step in run.steps] == ["post", "export", "download"]
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_ends_as_anything_but_completed_is_told_as_what_it_is(server: Server) -> None:
    running = server.submit(large_graph("running"))
    server.wait(running, "job_started")

    def cancel() -> None:
        (waiting,) = server.client.get("/v1/exports", params={"status": "queued"}).json()["jobs"]
        server.client.delete(f"/v1/exports/{waiting['jobId']}")

    run = flown(server.url, {"post": cancel})
    server.client.delete(f"/v1/exports/{running}")
    assert (run.outcome, run.step) == ("failed", "export")
    assert run.message.startswith("the export ended as canceled: ")


# --- the schedule of a server ---------------------------------------------------------------------------


def _figures(metrics: Metrics) -> str:
    return metrics.text(None, streams=0, free={}, troubles={}).decode()


def _scheduled(canary: Canary, enough: Callable[[], bool]) -> None:
    """The schedule until it is enough; then it is canceled."""

    async def inside() -> None:
        task = asyncio.create_task(canary.run())
        async with asyncio.timeout(60):
            while not enough():
                await asyncio.sleep(0.02)
        task.cancel()
        assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)

    asyncio.run(inside())


def test_the_first_address_that_a_server_listens_on_is_asked_and_how_it_went_is_told() -> None:
    metrics, port = Metrics(), free_port()
    canary = Canary(60, metrics, key=KEY, seconds=30)
    assert canary.detail == "none has ended yet"
    canary.listens("::", port)
    canary.listens("127.0.0.1", 9)
    _scheduled(canary, lambda: canary.detail != "none has ended yet")
    assert re.fullmatch(rf"failed \d+ s ago at post: .*http://\[::1\]:{port}.*", canary.detail)
    assert 'memvid_export_canary_runs_total{outcome="failed"} 1.0' in _figures(metrics)
    assert "memvid_export_canary_last_success_timestamp_seconds 0.0" in _figures(metrics)


@pytest.fixture
def starts_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let every Python that is started from now on run this first."""

    def arrange(code: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return arrange


def test_a_process_that_ends_without_an_answer_is_told_with_its_exit_code(starts_with: Callable[[str], None]) -> None:
    starts_with("import os\nos.write(1, b'Segmentation fault\\n')\nos._exit(7)\n")
    canary = Canary(60, metrics := Metrics(), key=KEY, seconds=30)
    canary.listens("127.0.0.1", 9)
    _scheduled(canary, lambda: canary.detail != "none has ended yet")
    assert re.fullmatch(
        r"failed \d+ s ago at process: its process ended with (7|None) and said nothing of use", canary.detail
    )
    assert 'memvid_export_canary_runs_total{outcome="failed"} 1.0' in _figures(metrics)


def test_a_server_that_stops_takes_the_process_of_its_canary_with_it(
    starts_with: Callable[[str], None], tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    starts_with(f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()) + ' ')\ntime.sleep(300)\n")
    canary = Canary(60, metrics := Metrics(), key=KEY, seconds=30)
    canary.listens("127.0.0.1", 9)
    _scheduled(canary, lambda: pid.exists() and pid.read_text().endswith(" "))
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()
    assert canary.detail == "none has ended yet"
    assert 'memvid_export_canary_runs_total{outcome="failed"} 0.0' in _figures(metrics)
