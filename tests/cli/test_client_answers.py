"""What the clients make of answers that are not what they hoped for: each script is what a peer or a proxy said."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from processes import free_port

from common.contract import (
    ErrorBody,
    ErrorInfo,
    Event,
    EventPage,
    ExportOptions,
    Job,
    JobCreated,
    JobMetadata,
    JobPage,
    Manifest,
    ManifestPart,
    Report,
    Source,
    Stage,
    Status,
    Versions,
)
from common.errors import ExportError, InvalidRequest, PayloadTooLarge, StorageFailed, UnsupportedMediaType
from control_plane.client import ExportClient, GitNexus, GitNexusRepo

AT = "2026-01-02T10:11:12.345Z"
CAPSULE, SIDECAR = b"c" * 600_000, b"s" * 10
CHUNK = 1 << 18
"""What has come is written in pieces of this size."""


class Said(NamedTuple):
    """One answer; ``cut``: the connection ends after so many bytes of its body."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 - read only
    cut: int | None = None


class Peer:
    """A server that answers each path with what its script says, the last of it again and again."""

    def __init__(self, script: dict[str, list[Said]]) -> None:
        self.script = script
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.url = ""

    def answer(self, method: str, path: str) -> Said:
        said = self.script[f"{method} {path.partition('?')[0]}"]
        return said.pop(0) if len(said) > 1 else said[0]


@contextmanager
def peer(script: dict[str, list[Said]]) -> Iterator[Peer]:
    """Serve a script on this machine."""
    told = Peer(script)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            data = b""
            if self.headers.get("Content-Length"):
                data = self.rfile.read(int(self.headers["Content-Length"]))
            elif self.headers.get("Transfer-Encoding"):
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            told.asked.append((f"{self.command} {self.path}", dict(self.headers), data))
            said = told.answer(self.command, self.path)
            self.send_response(said.status)
            for name, value in said.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(said.body)))
            self.end_headers()
            self.wfile.write(said.body[: said.cut])
            if said.cut is not None:
                self.close_connection = True

        do_POST = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ok(body: object, **headers: str) -> Said:
    data = msgspec.json.encode(body)
    return Said(200, data, {"Content-Digest": digest(data), **headers})


def digest(data: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


def refused(status: int, code: str, **details: Any) -> Said:
    return Said(status, msgspec.json.encode(ErrorBody(error=ErrorInfo(code=code, message="no", details=details))))


def job(status: Status = "completed", job_id: str = "j") -> Job:
    return Job(
        job_id=job_id,
        status=status,
        progress=0,
        current_stage="queued",
        stage_progress=0,
        elapsed_ms=0,
        last_event_seq=1,
        message="",
        created_at=AT,
        updated_at=AT,
        artifact=None,
        error=None,
        metadata=METADATA,
    )


METADATA = JobMetadata(project_name="p", client="default", backend="legacy_vps", payload_sha256="0" * 64)
CREATED = JobCreated(
    job_id="j",
    status="queued",
    progress=0,
    current_stage="queued",
    stage_progress=0,
    message="",
    created_at=AT,
)


def event(seq: int, kind: Any = "stage_progress", stage: Stage = "transform") -> Event:
    return Event(
        seq=seq,
        ts=AT,
        job_id="j",
        type=kind,
        stage=stage,
        progress=0,
        stage_progress=0,
        emoji="",
        message=str(seq),
        meta={},
    )


def manifest(**changes: Any) -> Manifest:
    part = ManifestPart(
        file_name="c.mv2", size_bytes=len(CAPSULE), sha256=hashlib.sha256(CAPSULE).hexdigest(), frames=7, vectors=0
    )
    whole = Manifest(
        generated_at=AT,
        session_id="s",
        project_name="p",
        source=Source(),
        options=ExportOptions(),
        content_digest="",
        capsule_sha256=part.sha256,
        parts=[part],
        frames=7,
        node_frames=1,
        sidecar_file_name="c.mv2.index.v1.sqlite",
        sidecar_size_bytes=len(SIDECAR),
        relation_frames=1,
        sidecar_sha256=hashlib.sha256(SIDECAR).hexdigest(),
        vectors=0,
        dimension=None,
        embedding_model=None,
        embedding_layout=None,
        writer="native",
        readers="memvid",
        versions=Versions(),
        report=Report(),
    )
    return msgspec.structs.replace(whole, **changes)


def files(**more: list[Said]) -> dict[str, list[Said]]:
    """A server that has an export's files; ``manifest``, ``download``, ``sidecar`` answer otherwise."""
    at = "GET /v1/exports/j"
    return {
        f"{at}/manifest": more.get("manifest", [ok(manifest())]),
        f"{at}/download": more.get("download", [Said(200, CAPSULE, {"Content-Digest": digest(CAPSULE)})]),
        f"{at}/sidecar": more.get("sidecar", [Said(200, SIDECAR, {"Content-Digest": digest(SIDECAR)})]),
    }


def fetch(there: Peer, out: Path) -> list[str]:
    with ExportClient(there.url, None, tries=2) as client:
        return [path.name for path in client.fetch("j", out, lambda _name: lambda _got, _size: None)]


# --- one request --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (Said(500, b"<html>no</html>"), StorageFailed, "answered 500 Internal Server Error"),
        (Said(404, b"{}"), StorageFailed, "answered 404"),
        (refused(401, "UNAUTHORIZED"), InvalidRequest, "set MEMVID_EXPORT_API_KEY"),
        (refused(413, "PAYLOAD_TOO_LARGE", limit=5), PayloadTooLarge, "no (PAYLOAD_TOO_LARGE)"),
        (refused(415, "UNSUPPORTED_MEDIA_TYPE"), UnsupportedMediaType, "UNSUPPORTED_MEDIA_TYPE"),
        (refused(409, "JOB_CANCELED"), ExportError, "no ("),
        (refused(404, "NOT_FOUND"), InvalidRequest, "no (NOT_FOUND)"),
        (refused(418, "A_NEW_CODE"), InvalidRequest, "no (A_NEW_CODE)"),
        (refused(500, "INTERNAL"), StorageFailed, "no (INTERNAL)"),
        (refused(503, "QUEUE_UNAVAILABLE"), StorageFailed, "no (QUEUE_UNAVAILABLE)"),
        (refused(429, "RATE_LIMITED"), StorageFailed, "no (RATE_LIMITED)"),
    ],
)
def test_a_refusal_is_told_in_the_servers_words_as_what_it_is(said: Said, kind: type[ExportError], words: str) -> None:
    with peer({"GET /v1/exports/j": [said]}) as there, ExportClient(there.url, "k", tries=2) as client:
        with pytest.raises(kind) as caught:
            client.job("j")
        assert words in caught.value.message
        assert len(there.asked) == (2 if said.status in (429, 503) else 1)
        assert there.asked[0][1]["Authorization"] == "Bearer k"


def test_what_may_pass_is_asked_again_and_then_answered() -> None:
    later = [Said(429, b"", {"Retry-After": "0"}), Said(502), Said(503, b"", {"Retry-After": "soon"}), ok(job())]
    with peer({"GET /v1/exports/j": later}) as there, ExportClient(there.url, None) as client:
        assert client.job("j").status == "completed"
        assert len(there.asked) == 4
        assert "Authorization" not in there.asked[0][1]


def test_a_job_is_canceled_and_done_again_by_its_id() -> None:
    script = {
        "DELETE /v1/exports/j": [ok(job("canceled"))],
        "POST /v1/exports/j/retry": [ok(CREATED)],
        "GET /v1/exports/j/report": [ok(Report(attempts=2))],
    }
    with peer(script) as there, ExportClient(there.url, None) as client:
        assert client.cancel("j").status == "canceled"
        assert client.retry("j").job_id == "j"
        assert client.report("j").attempts == 2


def test_failed_jobs_come_from_all_pages() -> None:
    pages = [
        ok(JobPage(jobs=[job("failed", "a"), job("failed", "b")], next_cursor="next")),
        ok(JobPage(jobs=[job("failed", "c")], next_cursor=None)),
    ]
    with peer({"GET /v1/exports": pages}) as there, ExportClient(there.url, None) as client:
        assert [found.job_id for found in client.failed()] == ["a", "b", "c"]
        first, second = (asked[0] for asked in there.asked)
    assert "status=failed" in first
    assert "cursor" not in first
    assert "cursor=next" in second


# --- a submission -------------------------------------------------------------------------------------------


def test_a_graph_goes_out_whole_with_its_hash_and_its_name(tmp_path: Path) -> None:
    graph = tmp_path / "my graph.ndjson"
    graph.write_bytes(b'{"type":"node"}\n' * 20_000)
    sent: list[tuple[int, int]] = []
    with peer({"POST /v1/exports": [Said(503), ok(CREATED)]}) as there, ExportClient(there.url, None) as client:
        assert client.submit(graph, lambda got, total: sent.append((got, total))).job_id == "j"
        (_, first, _), (_, second, body) = there.asked
    assert gzip.decompress(body) == graph.read_bytes()
    assert first["Idempotency-Key"] == second["Idempotency-Key"]
    assert second["Content-Digest"] == digest(body)
    assert (second["Content-Type"], second["Content-Encoding"]) == ("application/x-ndjson", "gzip")
    assert second["Content-Disposition"] == "attachment; filename*=UTF-8''my%20graph.ndjson"
    assert sent[-1] == (graph.stat().st_size, graph.stat().st_size)


@pytest.mark.parametrize(("head", "encoding"), [(b"\x28\xb5\x2f\xfdrest", "zstd"), (b"\x1f\x8brest", "gzip")])
def test_a_compressed_file_goes_out_as_it_is(tmp_path: Path, head: bytes, encoding: str) -> None:
    graph = tmp_path / "graph.json"
    graph.write_bytes(head)
    with peer({"POST /v1/exports": [ok(CREATED)]}) as there, ExportClient(there.url, None) as client:
        client.submit(graph, lambda _got, _total: None)
        ((_, headers, body),) = there.asked
    assert (body, headers["Content-Encoding"], headers["Content-Type"]) == (head, encoding, "application/json")


def test_a_server_that_got_other_bytes_is_not_believed(tmp_path: Path) -> None:
    graph = tmp_path / "graph.json"
    graph.write_bytes(b"{}")
    said = ok(CREATED, **{"X-Payload-SHA256": "0" * 64})
    with (
        peer({"POST /v1/exports": [said]}) as there,
        ExportClient(there.url, None) as client,
        pytest.raises(StorageFailed, match="got other bytes than were sent"),
    ):
        client.submit(graph, lambda _got, _total: None)


# --- files ----------------------------------------------------------------------------------------------------


def test_files_come_whole_with_the_manifest_last(tmp_path: Path) -> None:
    with peer(files()) as there:
        assert fetch(there, tmp_path) == ["c.mv2", "c.mv2.index.v1.sqlite", "c.mv2.manifest.json"]
    assert (tmp_path / "c.mv2").read_bytes() == CAPSULE
    assert msgspec.json.decode((tmp_path / "c.mv2.manifest.json").read_bytes(), type=Manifest) == manifest()


def test_a_download_that_is_cut_goes_on_where_it_stopped(tmp_path: Path) -> None:
    tag = {"Content-Digest": digest(CAPSULE), "ETag": '"v1"'}
    parts = [Said(200, CAPSULE, tag, cut=CHUNK + 400), Said(206, CAPSULE[CHUNK:], tag)]
    with peer(files(download=parts)) as there:
        fetch(there, tmp_path)
        again = next(headers for line, headers, _ in there.asked if "Range" in headers and "download" in line)
    assert (again["Range"], again["If-Range"]) == (f"bytes={CHUNK}-", '"v1"')
    assert (tmp_path / "c.mv2").read_bytes() == CAPSULE


def test_a_download_that_is_refused_for_now_is_asked_for_again(tmp_path: Path) -> None:
    tag = {"Content-Digest": digest(CAPSULE), "ETag": '"v1"'}
    later = [Said(status, b"later", {"Retry-After": "0"}) for status in (429, 503)]
    parts = [*later, Said(200, CAPSULE, tag, cut=CHUNK + 400), *later, Said(206, CAPSULE[CHUNK:], tag)]
    with peer(files(download=parts, sidecar=[*later, files()["GET /v1/exports/j/sidecar"][0]])) as there:
        with ExportClient(there.url, None, tries=3) as client:
            client.fetch("j", tmp_path, lambda _name: lambda _got, _size: None)
        ranges = [headers.get("Range") for line, headers, _ in there.asked if "download" in line]
    assert ranges == [None, None, None, *[f"bytes={CHUNK}-"] * 3]
    assert (tmp_path / "c.mv2").read_bytes() == CAPSULE
    assert (tmp_path / "c.mv2.index.v1.sqlite").read_bytes() == SIDECAR


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ({"manifest": [Said(200, b"{}", {"Content-Digest": digest(b"other")})]}, "manifest is not what the server"),
        ({"manifest": [Said(200, msgspec.json.encode(manifest()))]}, "Content-Digest differs or is missing"),
        ({"manifest": [ok(manifest(sidecar_file_name="../c"))]}, "no plain file name"),
        ({"manifest": [ok(manifest(sidecar_file_name=".c"))]}, "no plain file name"),
        ({"download": [Said(200, CAPSULE, {"Content-Digest": digest(SIDECAR)})]}, "c.mv2 is not what the server"),
        ({"sidecar": [Said(200, b"t" * 10, {"Content-Digest": digest(SIDECAR)})]}, "its SHA-256 differs"),
        (
            {
                "download": [
                    Said(200, CAPSULE, {"Content-Digest": digest(CAPSULE)}, cut=CHUNK + 400),
                    Said(200, CAPSULE, {"Content-Digest": digest(CAPSULE)}),
                ]
            },
            "changed on the server while it was fetched",
        ),
        ({"download": [refused(500, "INTERNAL")]}, "no (INTERNAL)"),
        ({"download": [refused(429, "RATE_LIMITED")]}, "no (RATE_LIMITED)"),
        ({"download": [Said(200, CAPSULE, {"Content-Digest": digest(CAPSULE)}, cut=0)]}, "No export server answers"),
    ],
)
def test_files_that_are_not_what_was_announced_are_not_kept(
    script: dict[str, list[Said]], words: str, tmp_path: Path
) -> None:
    with peer(files(**script)) as there, pytest.raises(StorageFailed) as caught:
        fetch(there, tmp_path)
    assert words in caught.value.message
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or "manifest" in path.name]


# --- events ---------------------------------------------------------------------------------------------------


def page(*events: Event, status: Status = "running") -> Said:
    return ok(EventPage(job_id="j", events=list(events), next_seq=9, status_snapshot=job(status)))


def stream(*events: Event) -> Said:
    lines = [b": ping\n\n", *(b"id: 1\ndata: " + msgspec.json.encode(event) + b"\n\n" for event in events)]
    return Said(200, b"".join(lines), {"Content-Type": "text/event-stream"})


@pytest.mark.parametrize(
    "streams",
    [[Said(503)], [stream(event(1))], [stream(event(1), event(1))], [Said(200, b"data: {\n\n")], [stream()]],
)
def test_events_that_no_stream_tells_come_from_the_pages(streams: list[Said]) -> None:
    end = event(3, "job_completed", "download_ready")
    script = {
        "GET /v1/exports/j/events/stream": streams,
        "GET /v1/exports/j/events": [page(event(1), event(2)), page(), page(event(2), end)],
    }
    with peer(script) as there, ExportClient(there.url, None) as client:
        assert [told.seq for told in client.events("j")] == [1, 2, 3]


def test_a_job_that_ended_without_its_last_event_is_an_error() -> None:
    script = {"GET /v1/exports/j/events/stream": [Said(404)], "GET /v1/exports/j/events": [page(status="completed")]}
    with (
        peer(script) as there,
        ExportClient(there.url, None) as client,
        pytest.raises(StorageFailed, match="last event is missing"),
    ):
        list(client.events("j"))


# --- tools and search -----------------------------------------------------------------------------------------


def test_a_tool_answers_its_envelope_or_its_error() -> None:
    good: dict[str, Any] = {"result": {"structuredContent": {"hits": []}}}
    bad = {"result": {"isError": True, "structuredContent": {"code": "NOT_FOUND", "message": "no such node"}}}
    with (
        peer({"POST /mcp": [ok(good), ok(bad), ok({"error": {}}), Said(200, b"<html>")]}) as there,
        ExportClient(there.url, None) as client,
    ):
        assert client.ask("gm.search", {"q": "x"}) == {"hits": []}
        sent = json.loads(there.asked[0][2])
        assert (sent["method"], sent["params"]) == ("tools/call", {"name": "gm.search", "arguments": {"q": "x"}})
        with pytest.raises(StorageFailed, match="no such node") as caught:
            client.ask("gm.search", {})
        assert caught.value.details == {"answered": "NOT_FOUND"}
        for _ in range(2):
            with pytest.raises(StorageFailed, match="not answered like a tool"):
                client.ask("gm.search", {})


# --- GitNexus -------------------------------------------------------------------------------------------------

REPOS = [
    {"name": "a", "path": "/repos/a", "branch": "main", "stats": {"nodes": 3, "edges": 4, "files": "?"}},
    {"name": "a", "path": "/other/a", "stats": {"nodes": "many"}},
    {"name": "b"},
]


def test_a_repository_is_chosen_by_what_only_it_has() -> None:
    with peer({"GET /api/repos": [ok(REPOS)]}) as there, GitNexus(there.url) as gitnexus:
        assert [repo.size for repo in gitnexus.repositories()] == [7, 0, 0]
        by_path = gitnexus.find("/repos/a")
        source = gitnexus.source(by_path)
        assert (source.type, source.base_name, source.branch) == ("gitnexus", "a", "main")
        with pytest.raises(InvalidRequest, match="choose with --repo: /other/a, /repos/a"):
            gitnexus.find("a")
        with pytest.raises(InvalidRequest, match="choose with --repo: a, a, b"):
            gitnexus.find(None)
        with pytest.raises(InvalidRequest, match="has no repository 'c'"):
            gitnexus.find("c")


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (Said(200, b"<html>"), StorageFailed, "does not answer like a GitNexus server"),
        (Said(500, b'{"error": "database is locked"}'), StorageFailed, "answered 500: database is locked"),
        (Said(502, b"<html>"), StorageFailed, "answered 502: Bad Gateway"),
        (Said(404, b"[]"), InvalidRequest, "answered 404: Not Found"),
    ],
)
def test_what_gitnexus_refuses_is_told(said: Said, kind: type[ExportError], words: str) -> None:
    script = {"GET /api/repos": [ok(REPOS), said], "GET /api/graph": [said]}
    with peer(script) as there, GitNexus(there.url) as gitnexus:
        repo = gitnexus.find("b")
        with pytest.raises(kind) as caught:
            gitnexus.repositories()
        assert words in caught.value.message
        if said.status != 200:
            with pytest.raises(kind) as caught, gitnexus.graph(repo):
                pass
            assert words in caught.value.message


def test_a_graph_whose_stream_is_cut_says_how_far_it_came() -> None:
    script = {"GET /api/repos": [ok(REPOS)], "GET /api/graph": [Said(200, b"x" * 4 * CHUNK, cut=2 * CHUNK + 5)]}
    with peer(script) as there, GitNexus(there.url) as gitnexus:
        repo = gitnexus.find("b")
        with pytest.raises(StorageFailed, match="cut its answer after 524,288 bytes"), gitnexus.graph(repo) as graph:
            graph.read()


def test_a_gitnexus_that_is_away_is_named() -> None:
    with GitNexus(f"http://127.0.0.1:{free_port()}/") as gone:
        with pytest.raises(StorageFailed, match="No GitNexus server answers"):
            gone.repositories()
        with pytest.raises(StorageFailed, match="stopped answering"), gone.graph(GitNexusRepo(name="b")):
            pass
