"""A trace holds a request, the job it made and the job's stages; no collector has a say in an export."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from collector import Collector, collector
from live_server import Server, graph
from processes import free_port
from runpod_house import eventually

from control_plane.operations.tracing import QUEUE, Mark, Span, Tracing, new_mark

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Collector]]:
    """A server that tells a collector."""
    with collector() as told:
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": told.url}
        server = Server(tmp_path_factory.mktemp("traced") / "root", env=env, worker_slots=1)
        try:
            yield server.start(), told
        finally:
            server.close()


def submitted(server: Server, traceparent: str, name: str) -> str:
    answer = server.post(graph(name=name), traceparent=traceparent)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["jobId"])


def test_one_trace_links_the_caller_the_request_the_job_its_attempt_and_its_stages(
    house: tuple[Server, Collector],
) -> None:
    server, told = house
    job = submitted(server, f"00-{TRACE}-{CALLER}-01", "linked")
    assert server.wait(job)["type"] == "job_completed"
    assert server.job(job)["metadata"]["traceId"] == TRACE
    (whole,) = eventually(lambda: told.named("export", job_id=job))
    (request,) = eventually(lambda: told.named("POST /v1/exports", job_id=job))
    (queue,), (attempt,) = told.named("queue", job_id=job), told.named("attempt", job_id=job)
    stages = [span for span in told.spans if span.parent == attempt.span]
    assert {span.trace for span in (whole, request, queue, attempt, *stages)} == {TRACE}
    assert (request.parent, whole.parent) == (CALLER, request.span)
    assert queue.parent == attempt.parent == whole.span
    assert {"transform", "finalize"} <= {span.name for span in stages}
    assert all(attempt.start <= span.start <= span.end <= attempt.end for span in stages)
    assert whole.start == queue.start <= queue.end <= attempt.start <= attempt.end == whole.end
    assert whole.attributes["memvid.backend"] == "legacy_vps"
    assert whole.attributes["memvid.frames"] > 0
    assert attempt.attributes["memvid.write_seconds"] > 0
    assert whole.resource["service.name"] == "memvid-export"
    assert not any(span.failed for span in (whole, request, attempt))


def test_a_failure_is_told_with_its_code(tmp_path: Path) -> None:
    with collector() as told:
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"{told.url}/"}
        server = Server(tmp_path / "root", env=env, worker_slots=1, deadline_seconds=0.001)
        try:
            job = server.start().submit(graph())
            assert server.wait(job)["type"] == "job_failed"
            (whole,) = eventually(lambda: told.named("export", job_id=job))
            assert (whole.failed, whole.attributes["memvid.code"]) == (True, "DEADLINE_EXCEEDED")
            assert told.named("attempt", job_id=job)[0].failed
        finally:
            server.close()


@pytest.mark.parametrize(
    "wrong",
    [
        f"00-{'0' * 32}-{CALLER}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{CALLER}-01",
        f"00-{TRACE.upper()}-{CALLER}-01",
        f"00-{TRACE}-{CALLER}-01-more",
        f"00-{TRACE}-{CALLER}",
        "canary words",
        "",
    ],
)
def test_a_wrong_traceparent_is_not_taken_over(house: tuple[Server, Collector], wrong: str) -> None:
    answer = house[0].client.get("/healthz", headers={"traceparent": wrong})
    mark = Mark.of(answer.headers["traceparent"])
    assert mark is not None
    assert mark.trace != TRACE
    assert wrong == "" or wrong not in answer.headers["traceparent"]


def test_two_traceparents_are_none(house: tuple[Server, Collector]) -> None:
    two = [("traceparent", f"00-{TRACE}-{CALLER}-01")] * 2
    assert TRACE not in house[0].client.get("/healthz", headers=two).headers["traceparent"]


def test_a_later_version_is_understood_and_answers_have_spans_of_their_own(house: tuple[Server, Collector]) -> None:
    headers = {"traceparent": f"01-{TRACE}-{CALLER}-01-later"}
    answers = {house[0].client.get("/healthz", headers=headers).headers["traceparent"] for _ in range(3)}
    assert len(answers) == 3
    assert all(answer.startswith(f"00-{TRACE}-") and CALLER not in answer for answer in answers)


def test_what_the_caller_does_not_sample_has_no_spans(house: tuple[Server, Collector]) -> None:
    server, told = house
    job = submitted(server, f"00-{TRACE}-{CALLER}-00", "unsampled")
    assert server.wait(job)["type"] == "job_completed"
    other = server.submit(graph(name="sampled"))
    assert server.wait(other)["type"] == "job_completed"
    eventually(lambda: told.named("export", job_id=other))
    assert not [span for span in told.spans if span.trace == TRACE and span.attributes.get("memvid.job_id") == job]


def test_errors_say_the_trace_that_the_answer_says(house: tuple[Server, Collector]) -> None:
    answer = house[0].client.get("/v1/exports/none", headers={"traceparent": f"00-{TRACE}-{CALLER}-01"})
    assert answer.status_code == 404
    assert answer.headers["traceparent"].split("-")[1] == TRACE


def test_exports_go_on_while_the_collector_is_away_or_hangs(tmp_path: Path) -> None:
    with collector() as told:
        told.answers.clear()
        for endpoint in (f"http://127.0.0.1:{free_port()}", told.url):
            env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
            server = Server(tmp_path / endpoint.rpartition(":")[2], env=env, worker_slots=1)
            try:
                server.start()
                for number in range(2):
                    assert server.wait(server.submit(graph(name=f"alone{number}")))["type"] == "job_completed"
            finally:
                server.stop()  # fails after 30 seconds
                server.close()
        assert told.asked.is_set()


def test_spans_that_wait_for_a_collector_are_bounded() -> None:
    with collector() as told:
        told.answers.clear()
        tracing = Tracing(told.url, replica="bounded")
        mark = new_mark()
        for number in range(3 * QUEUE):
            tracing.end([Span(str(number), mark.below(), mark.span, 1, 2, {})])
        told.answers.set()
        tracing.close()
        assert len(told.spans) <= 2 * QUEUE
        assert str(3 * QUEUE - 1) in {span.name for span in told.spans}  # the newest are kept


def test_nothing_of_opentelemetry_is_imported_where_no_collector_is_configured() -> None:
    script = (
        "import sys; import control_plane.app; from control_plane.operations.tracing import Tracing; "
        "Tracing(None, replica='r').close(); "
        "print([m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
