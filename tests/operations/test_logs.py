"""The log: JSON, a trace on each line, and nothing of what clients send."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import KEY, Server, graph
from runpod_house import Bucket, RunpodServer, bucket_env, eventually, real_workers
from services import s3_server

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
WORD = "kanarienvogel"
"""In everything that a client writes, and in keys; it must be in no log."""
SECRETS = (WORD, KEY, "test-runpod-key", "only-for-tests")
SAID = "memvid-export listens on "
"""The one line for people."""


def lines(text: str) -> list[dict[str, Any]]:
    """The lines of a log; each but one is a JSON object."""
    return [json.loads(line) for line in text.splitlines() if line and not line.startswith(SAID)]


def full_of_words(**more: Any) -> dict[str, Any]:
    body = graph(3, name=WORD, lines=2, **more)
    body["fileContents"] = {f"src/{WORD}.py": f"def {WORD}():\n    return '{WORD}'\n"}
    return body


def ask_everything(server: Server, job: str) -> None:
    """Requests of all kinds, good ones and bad ones, with the word wherever a client can write."""
    client = server.client
    for mode in ("lexical", "hybrid", "none"):
        client.get(f"/v1/exports/{job}/search", params={"q": WORD, "mode": mode, "file": WORD, "label": WORD})
    client.get(f"/v1/exports/{WORD}")
    client.get(f"/{WORD}", params={WORD: WORD})
    client.get("/v1/exports", params={"cursor": WORD, "status": WORD})
    client.get(f"/v1/exports/{job}", headers={"authorization": f"Bearer {WORD}", "user-agent": WORD, "cookie": WORD})
    client.post(f"/v1/hooks/runpod/{job}/{WORD}", json={"id": WORD, "status": WORD})
    server.post({"nodes": [{"id": WORD, "label": WORD, "properties": WORD}], "relationships": WORD})
    server.post(f'{{"nodes": [{WORD}'.encode())
    server.post(full_of_words(), idempotency_key=WORD, content_disposition=f'attachment; filename="{WORD}.json"')
    server.post(full_of_words(options={WORD: WORD}), content_encoding=WORD)
    call = {"name": "query", "arguments": {"query": WORD, "export_id": job, WORD: WORD}}
    for method in ("tools/call", WORD):
        message = {"jsonrpc": "2.0", "id": WORD, "method": method, "params": call}
        client.post("/mcp", json=message, headers={"accept": "application/json, text/event-stream"})


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """What a server and its children have said of an export that came through and of one that failed, the job's id,
    and a job of which a request told the trace."""
    server = Server(tmp_path_factory.mktemp("told") / "root", worker_slots=1)
    try:
        server.start()
        job = server.submit(full_of_words())
        assert server.wait(job)["type"] == "job_completed"
        ask_everything(server, job)
        (capsule,) = (server.root / "artifacts" / job).rglob("*.mv2")
        assert WORD in capsule.name
        capsule.write_bytes(b"!" + capsule.read_bytes()[1:])
        assert server.client.get(f"/v1/exports/{job}/download").status_code == 410
        traced = server.post(graph(name="traced"), traceparent=f"00-{TRACE}-{SPAN}-01").json()["jobId"]
        server.wait(traced, "job_started")
        httpx.delete(f"{server.url}/v1/exports/{traced}", headers={"authorization": f"Bearer {KEY}"})
        server.client.get("/healthz")
        server.client.get("/metrics")
    finally:
        server.close()
    return server.log.read_text(), job, str(traced)


def test_each_line_is_json_with_a_trace(told: tuple[str, str, str]) -> None:
    found = lines(told[0])
    assert len(found) > 10
    for line in found:
        assert re.fullmatch(r"[0-9a-f]{32}", line["trace"]), line
        assert {"event", "level", "timestamp"} <= set(line)


def test_each_request_is_one_line_that_says_what_and_who_but_not_the_words(told: tuple[str, str, str]) -> None:
    text, job, traced = told
    found = [line for line in lines(text) if line["event"] == "request"]
    (post,) = [line for line in found if line["route"] == "/v1/exports" and line.get("job_id") == job]
    assert (post["method"], post["status"], post["key"], post["client"]) == ("POST", 202, "default", "default")
    assert post["ms"] > 0
    assert post["bytes"] > 0
    of = {line["route"] for line in found if line.get("job_id") == job}
    assert {"/v1/exports/{job_id}", "/v1/exports/{job_id}/search", "/v1/exports/{job_id}/events/stream"} <= of
    assert {line["trace"] for line in found if line.get("job_id") == traced and line["method"] == "POST"} == {TRACE}
    assert {line["status"] for line in found if line["route"] == "unmatched"} >= {404}
    assert not {line["route"] for line in found} & {"/healthz", "/metrics"}
    refused = [line for line in found if line["status"] == 401]
    assert refused
    assert {line["key"] for line in refused} == {None}


def test_nothing_that_clients_send_is_in_the_log(told: tuple[str, str, str]) -> None:
    for secret in SECRETS:
        assert secret not in told[0]


def test_nothing_is_in_the_logs_of_a_runpod_worker_and_they_say_job_and_trace(tmp_path: Path) -> None:
    with s3_server(tmp_path / "s3") as s3, real_workers(s3, tmp_path / "worker", workers="0:1") as platform:
        server = RunpodServer(tmp_path / "root", platform, env=bucket_env(s3), storage_url=s3.url)
        bucket = Bucket(s3, "direct")
        try:
            server.start()
            answer = server.post(full_of_words(), traceparent=f"00-{TRACE}-{SPAN}-01")
            job = answer.json()["jobId"]
            assert server.ended(job)["status"] == "completed"
            ask_everything(server, job)
            bucket.write("payload", json.dumps({"nodes": [{"id": WORD, "label": 7}], WORD: WORD}).encode())
            direct = {"job_id": "direct", "payload_ref": f"{bucket.url}/payload", "output_prefix": f"{bucket.url}/out/"}
            assert "INVALID_EXPORT_REQUEST" in json.dumps(platform.wait(platform.run(direct)))
            started = [line for line in platform.log.splitlines() if '"export started"' in line]
            said = [(json.loads(line)["job_id"], json.loads(line)["trace"]) for line in started]
            assert [trace for told, trace in said if told == job] == [TRACE]
            assert "direct" in {told for told, _ in said}
        finally:
            bucket.close()
            server.close()
        for text in (server.log.read_text(), platform.log):
            for secret in SECRETS:
                assert secret not in text
        lines(server.log.read_text())


def test_a_run_that_fails_is_told_under_its_job_and_the_trace_of_its_request(tmp_path: Path) -> None:
    server = Server(tmp_path / "root", worker_slots=1, deadline_seconds=0.001)
    try:
        server.start()
        job = server.post(graph(name=WORD), traceparent=f"00-{TRACE}-{SPAN}-01").json()["jobId"]
        assert server.wait(job)["type"] == "job_failed"
        said = eventually(lambda: [line for line in lines(server.log.read_text()) if line["event"] == "export failed"])
        assert [(line["job_id"], line["trace"], line["code"]) for line in said] == [(job, TRACE, "DEADLINE_EXCEEDED")]
    finally:
        server.close()


def test_what_libraries_and_python_say_is_json_too() -> None:
    script = """
import asyncio, logging, threading, warnings
from handler.logs import log_as_json
log_as_json()
for name in ("uvicorn.error", "sqlalchemy.pool", "botocore.retries"):
    logging.getLogger(name).warning("%s of %s", "trouble", name)
    logging.getLogger(name).info("small talk")
warnings.warn("old", DeprecationWarning, stacklevel=1)
warnings.warn("odd", UserWarning, stacklevel=1)
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
async def forgotten():
    asyncio.get_running_loop().call_soon(lambda: [][1])
    await asyncio.sleep(0.01)
asyncio.run(forgotten())
raise ValueError("the end")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    found = lines(done.stderr)
    assert [line["logger"] for line in found[:3]] == ["uvicorn.error", "sqlalchemy.pool", "botocore.retries"]
    assert found[0]["event"] == "trouble of uvicorn.error"
    assert any("UserWarning: odd" in line["event"] for line in found)
    for story in ("ZeroDivisionError", "IndexError", "ValueError: the end"):
        assert [line for line in found if story in line.get("exception", "")], story
    assert "small talk" not in done.stderr
    assert len({line["trace"] for line in found}) == 1
