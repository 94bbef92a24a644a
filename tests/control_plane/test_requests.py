"""What the server refuses, and how it says so."""

from __future__ import annotations

import base64
import json
import socket
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import KEY, Server, graph, large_graph
from runpod_house import eventually


def _error(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    assert {"code", "message"} <= set(body["error"]) <= {"code", "message", "details"}
    assert body["error"]["message"]
    return dict(body["error"])


def test_every_route_but_the_open_ones_wants_the_key(server: Server) -> None:
    job_id = server.submit(graph(name="auth"))
    with httpx.Client(base_url=server.url) as anonymous:
        job = f"/v1/exports/{job_id}"
        paths = ["/v1/exports", job, f"{job}/events", f"{job}/events/stream", f"{job}/download", f"{job}/sidecar"]
        for path in [*paths, f"{job}/manifest", f"{job}/report"]:
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": KEY},
                {"authorization": "Basic x"},
            ):
                answer = anonymous.get(path, headers=headers)
                assert answer.status_code == 401, path
                assert _error(answer)["code"] == "UNAUTHORIZED"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert anonymous.delete(job).status_code == 401
        for path in ("/healthz", "/readyz", "/metrics", "/schema/openapi.json"):
            assert anonymous.get(path).status_code == 200
    server.wait(job_id)


def test_the_key_is_looked_at_before_the_body(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.settimeout(30)
        raw.sendall(
            b"POST /v1/exports HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 400000000\r\n\r\n{"
        )
        assert raw.recv(64).startswith(b"HTTP/1.1 401")


def test_metrics_stand_behind_the_key_where_a_setting_says_so(start_server: Any) -> None:
    server = start_server(metrics_need_key=True)
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    assert server.client.get("/metrics").status_code == 200


def test_unknown_routes_jobs_and_methods_answer_in_the_same_shape(server: Server) -> None:
    assert _error(server.client.get("/nowhere"))["code"] == "NOT_FOUND"
    answer = server.client.put("/v1/exports")
    assert (answer.status_code, _error(answer)["code"]) == (405, "METHOD_NOT_ALLOWED")
    for path in ("", "/events", "/events/stream", "/download", "/sidecar", "/manifest", "/report"):
        answer = server.client.get(f"/v1/exports/no-such-job{path}")
        assert (answer.status_code, _error(answer)["code"]) == (404, "JOB_NOT_FOUND")
    answer = server.client.delete("/v1/exports/no-such-job")
    assert (answer.status_code, _error(answer)["code"]) == (404, "JOB_NOT_FOUND")
    for params in ({"status": "lost"}, {"cursor": "%%%"}, {"cursor": "bm9wZQ"}, {"limit": "x"}):
        answer = server.client.get("/v1/exports", params=params)
        assert (answer.status_code, _error(answer)["code"]) == (400, "INVALID_EXPORT_REQUEST")


@pytest.mark.parametrize("text", ["99999999999999999999999999:abc", "-5:", "1:", "1_0:a", "5", f"{'9' * 4500}:a"])
def test_a_forged_cursor_is_refused(server: Server, text: str) -> None:
    cursor = base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
    answer = server.client.get("/v1/exports", params={"cursor": cursor})
    assert (answer.status_code, _error(answer)["code"]) == (400, "INVALID_EXPORT_REQUEST")
    assert _error(answer)["details"]["field"] == "cursor"


REFUSED = Path(__file__).parents[1] / "fixtures" / "graphs" / "refused"


@pytest.mark.parametrize("name", [path.name for path in sorted(REFUSED.iterdir())])
def test_a_bad_body_gets_a_clear_answer_that_names_the_place(server: Server, name: str) -> None:
    data = (REFUSED / name).read_bytes()
    encoding = {".gz": "gzip", ".zst": "zstd"}.get(Path(name).suffix, "identity")
    answer = server.post(data, content_encoding=encoding)
    status, code = (413, "PAYLOAD_TOO_LARGE") if name.startswith("bomb") else (400, "INVALID_EXPORT_REQUEST")
    error = _error(answer)
    assert (answer.status_code, error["code"]) == (status, code), error
    assert error["details"]["field"]
    assert not list((server.root / "staging" / "incoming").iterdir())
    assert not list((server.root / "staging" / "payloads").iterdir())


@pytest.mark.parametrize("body", [b"", b"[]", b"\x1f\x8b" + b"noise" * 20, b"\x00" * 100])
def test_what_is_no_graph_at_all_is_refused(server: Server, body: bytes) -> None:
    answer = server.post(body)
    assert (answer.status_code, _error(answer)["code"]) == (400, "INVALID_EXPORT_REQUEST")
    assert _error(answer)["details"]["field"]


def test_repairable_graphs_are_exported_with_counted_warnings(server: Server, fixtures: Path) -> None:
    accepted = sorted((fixtures / "graphs" / "accepted").iterdir())
    assert accepted
    for path in accepted:
        kind = "application/x-ndjson" if ".ndjson" in path.name else "application/json"
        encoding = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix, "identity")
        answer = server.post(path.read_bytes(), content_type=kind, content_encoding=encoding)
        assert answer.status_code == 202, (path.name, answer.text)
        job_id = answer.json()["jobId"]
        assert server.wait(job_id)["type"] == "job_completed", (path.name, server.job(job_id)["error"])


def test_a_path_in_the_base_name_leaves_no_folder(server: Server) -> None:
    body = graph(name="path") | {"source": {"type": "local", "baseName": "../../etc/passwd\n", "displayName": "x"}}
    job_id = server.submit(body)
    assert server.wait(job_id)["type"] == "job_completed"
    name = server.job(job_id)["artifact"]["fileName"]
    assert "/" not in name
    assert "\n" not in name
    assert [path.name for path in (server.root / "artifacts" / job_id / "1").glob("*.mv2")] == [name]


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (None, "graph"),
        ("attachment; filename=shop.graph.json", "shop"),
        ("attachment; filename*=UTF-8''%C3%BCber%20uns.json.gz", "über uns"),
        ('attachment; filename="../../etc/passwd"', "passwd"),
        ('attachment; filename="C:\\\\work\\\\shop.json"', "shop"),
    ],
)
def test_a_graph_that_names_no_source_is_named_by_its_file(server: Server, header: str | None, name: str) -> None:
    raw = {key: value for key, value in graph().items() if key in ("nodes", "relationships")}
    headers = {"content-disposition": header} if header else {}
    created = server.client.post("/v1/exports", json=raw, headers=headers)
    assert created.status_code == 202, created.text
    job_id = created.json()["jobId"]
    server.wait(job_id)
    assert server.job(job_id)["artifact"]["fileName"].startswith(f"{name}-gitnexus-mem_capsule-")


def test_what_a_graph_says_itself_counts_more_than_its_file_s_name(server: Server) -> None:
    headers = {"content-disposition": "attachment; filename=other.json"}
    created = server.client.post("/v1/exports", json=graph(name="own"), headers=headers)
    job_id = created.json()["jobId"]
    server.wait(job_id)
    assert server.job(job_id)["artifact"]["fileName"].startswith("own-gitnexus-")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content_type": "text/plain"}, 415),
        ({"content_type": "multipart/form-data; boundary=x"}, 415),
        ({"content_encoding": "br"}, 415),
        ({"content_encoding": "gzip"}, 400),
        ({"content_encoding": "zstd"}, 400),
        ({"idempotency_key": ""}, 400),
        ({"idempotency_key": "k" * 256}, 400),
        ({"content_disposition": "attachment"}, 400),
        ({"content_disposition": f"attachment; filename={'n' * 256}"}, 400),
        ({"content_type": "application/json; charset=utf-8"}, 202),
        ({"content_type": "application/octet-stream"}, 202),
    ],
)
def test_headers_of_a_request_are_checked(server: Server, headers: dict[str, str], status: int) -> None:
    answer = server.post(graph(name="headers"), **headers)
    assert answer.status_code == status
    if status != 202:
        code = {415: "UNSUPPORTED_MEDIA_TYPE", 400: "INVALID_EXPORT_REQUEST"}[status]
        assert _error(answer)["code"] == code
        assert "field" in _error(answer)["details"]


@pytest.mark.parametrize(
    "parameters",
    [
        "filename*=UTF-8''a; filename*0=b",
        "filename*=idna''abc%ff",
        f"filename*{'1' * 5_000}*=x",
        "filename*=utf-7''+2AA-",
        "filename*=unicode_escape''%5cud800",
        "filename*=undefined''a",
        "filename*=%00''a",
        f'filename=a; more="{";" * 5_000}"',
    ],
    ids=[
        "two of them",
        "not its encoding",
        "a part too far",
        "half a character",
        "escaped half",
        "none",
        "no name",
        "long",
    ],
)
def test_a_file_name_that_is_none_is_refused(server: Server, parameters: str) -> None:
    answer = server.post(graph(name="headers"), content_disposition=f"attachment; {parameters}")
    assert answer.status_code == 400, answer.text
    assert _error(answer)["details"]["field"] == "Content-Disposition"


def test_what_went_wrong_first_is_told_where_the_database_goes_meanwhile(start_server: Any) -> None:
    server: Server = start_server()
    incoming = server.root / "staging" / "incoming"

    def renamed(name: str, to: str) -> None:
        with closing(sqlite3.connect(server.root / "jobs.sqlite", timeout=30)) as database, database:
            database.execute(f"ALTER TABLE {name} RENAME TO {to}")

    def body() -> Iterator[bytes]:
        yield b"{"
        eventually(lambda: list(incoming.iterdir()))  # the request was let in
        renamed("jobs", "away")
        yield b"}"

    headers = {
        "content-type": "application/json",
        "content-digest": f"sha-256=:{base64.b64encode(bytes(32)).decode()}:",
    }
    answer = server.client.post("/v1/exports", content=body(), headers=headers)
    renamed("away", "jobs")
    assert answer.status_code == 400, answer.text
    assert _error(answer)["details"]["field"] == "Content-Digest"
    assert list(incoming.iterdir()) == []
    assert server.wait(server.submit(graph()))["type"] == "job_completed"


def test_nothing_stays_of_an_upload_that_is_cut_off(start_server: Any) -> None:
    server: Server = start_server()
    incoming = server.root / "staging" / "incoming"
    head = f"POST /v1/exports HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(head.encode() + b"Content-Length: 50000000\r\n\r\n" + b" " * 10_000_000)
        eventually(lambda: [path for path in incoming.iterdir() if path.stat().st_size])
    eventually(lambda: not list(incoming.iterdir()))


def test_a_body_over_the_limit_is_refused_announced_or_not(start_server: Any) -> None:
    server = start_server(max_payload_bytes=2_000_000)
    big = json.dumps(graph(20_000, name="big")).encode()
    assert len(big) > 2_000_000

    def chunks() -> Any:
        for start in range(0, len(big), 65_536):
            yield big[start : start + 65_536]

    for content in (big, chunks()):
        answer = server.client.post("/v1/exports", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert _error(answer)["code"] == "PAYLOAD_TOO_LARGE"
        assert _error(answer)["details"]["limit"] == 2_000_000


def test_a_retry_with_the_same_key_gets_the_first_job(server: Server) -> None:
    body = json.dumps(graph(name="retry")).encode()
    first = server.post(body, idempotency_key="retry-1")
    again = server.post(body, idempotency_key="retry-1")
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["jobId"] == again.json()["jobId"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    other = server.post(graph(name="another"), idempotency_key="retry-1")
    assert other.status_code == 400
    assert _error(other)["details"]["field"] == "Idempotency-Key"
    server.wait(first.json()["jobId"])
    assert server.post(body, idempotency_key="retry-1").json()["status"] == "completed"


def test_parallel_retries_make_one_job(server: Server) -> None:
    body = json.dumps(graph(50, name="parallel")).encode()

    def post(_: int) -> httpx.Response:
        with httpx.Client(base_url=server.url, headers=server.client.headers, timeout=60) as client:
            headers = {"content-type": "application/json", "idempotency-key": "parallel-1"}
            return client.post("/v1/exports", content=body, headers=headers)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, range(16)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["jobId"] for answer in answers}) == 1
    server.wait(answers[0].json()["jobId"])
    page = server.client.get("/v1/exports", params={"limit": 200}).json()
    assert sum(job["message"].startswith("Queued") for job in page["jobs"]) == 0


def test_a_full_queue_says_when_to_come_again(start_server: Any) -> None:
    server = start_server(queue_capacity=1, worker_slots=1)
    running = server.submit(large_graph("occupies"))
    server.wait(running, "job_started")
    queued = server.submit(graph(name="waits"))
    refused = server.post(graph(name="refused"))
    assert refused.status_code == 503
    assert _error(refused)["code"] == "QUEUE_UNAVAILABLE"
    assert int(refused.headers["retry-after"]) > 0
    server.client.delete(f"/v1/exports/{running}")
    assert server.wait(queued)["type"] == "job_completed"
    assert server.post(graph(name="again")).status_code == 202


def test_other_origins_may_ask_where_a_setting_says_so(start_server: Any) -> None:
    server = start_server(cors_origins="https://web.example")
    preflight = {"origin": "https://web.example", "access-control-request-method": "POST"}
    preflight["access-control-request-headers"] = "authorization,content-type,idempotency-key"
    answer = httpx.options(f"{server.url}/v1/exports", headers=preflight)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == "https://web.example"
    assert "access-control-allow-credentials" not in answer.headers
    refused = httpx.options(f"{server.url}/v1/exports", headers=preflight | {"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in refused.headers
    assert (refused.status_code, _error(refused)["code"]) == (400, "INVALID_EXPORT_REQUEST")
    assert refused.headers["content-type"] == "application/json"
    other = preflight | {"access-control-request-headers": "x-request-id"}
    assert _error(httpx.options(f"{server.url}/v1/exports", headers=other))["code"] == "INVALID_EXPORT_REQUEST"
    for path, status in (("/v1/exports", 200), ("/v1/exports/none", 404)):
        answer = server.client.get(path, headers={"origin": "https://web.example"})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://web.example"
    denied = httpx.get(f"{server.url}/v1/exports", headers={"origin": "https://web.example"})
    assert denied.status_code == 401
    assert denied.headers["access-control-allow-origin"] == "https://web.example"


def test_where_every_origin_may_ask_it_may_send_any_header(start_server: Any) -> None:
    server = start_server(cors_origins="*")
    preflight = {"origin": "https://web.example", "access-control-request-method": "POST"}
    preflight["access-control-request-headers"] = "authorization,x-request-id"
    answer = httpx.options(f"{server.url}/v1/exports", headers=preflight)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == "*"
    allowed = answer.headers["access-control-allow-headers"].lower().split(", ")
    assert {"authorization", "x-request-id"} <= set(allowed)


def test_a_text_names_its_charset_once(server: Server) -> None:
    for path in ("/", "/dashboard/dashboard.js", "/dashboard/dashboard.css", "/metrics"):
        assert server.client.get(path).headers["content-type"].count("charset=utf-8") == 1


def test_every_answer_carries_security_headers(server: Server) -> None:
    for path in ("/healthz", "/nowhere", "/v1/exports"):
        answer = server.client.get(path)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "server" not in answer.headers


def test_an_answer_never_tells_of_the_inside(server: Server) -> None:
    text = base64.b64encode(b"{").decode()
    answer = server.client.get("/v1/exports", params={"cursor": text})
    assert "Traceback" not in answer.text
    assert "/work" not in answer.text
    assert answer.status_code == 400
