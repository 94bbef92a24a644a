"""What a live server counts, and what no client can make it count."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from live_server import Server, graph, new_job
from processes import REPOSITORY
from prometheus_client.parser import text_string_to_metric_families
from runpod_house import eventually
from sqlalchemy import text

from common.contract import JobError
from common.errors import ObjectMissing
from common.storage import StorageConfig, open_storage
from control_plane.jobs.database import Database
from control_plane.jobs.hub import EventHub
from control_plane.jobs.store import JobStore, now_ms
from control_plane.operations.metrics import Metrics
from control_plane.operations.storage import CountedStorage

Labels = frozenset[tuple[str, str]]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has made an export, with vectors, while somebody followed its events; and one that failed."""
    server = Server(tmp_path_factory.mktemp("counted") / "root", worker_slots=1)
    try:
        server.start()
        body = graph(40, name="counted")
        body["options"]["semanticEnabled"] = True
        job = server.submit(body)
        assert server.wait(job)["type"] == "job_completed"
        server.client.get(f"/v1/exports/{job}/download")
        yield server
    finally:
        server.close()


def figures(server: Server) -> dict[str, dict[Labels, float]]:
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def value(server: Server, name: str, **labels: str) -> float:
    """The sum of all series of that name that have these labels."""
    return sum(
        number
        for known, number in figures(server).get(f"memvid_export_{name}", {}).items()
        if labels.items() <= {*known}
    )


def test_an_export_is_in_the_figures_of_its_stages_its_engine_and_its_events(counted: Server) -> None:
    for stage in ("transform", "embed", "write", "sidecar", "verify", "upload"):
        assert value(counted, "stage_seconds_count", stage=stage) == 1, stage
    assert value(counted, "duration_seconds_count") == value(counted, "queue_delay_seconds_count") == 1
    assert value(counted, "write_frames_per_second_count") == 1
    assert value(counted, "embed_seconds_count", provider="static") == 1
    assert value(counted, "embed_texts_total", provider="static") >= 40
    assert value(counted, "cold_start_seconds_count", backend="legacy_vps") >= 1
    assert value(counted, "event_lag_seconds_count") >= 2
    assert value(counted, "jobs", status="completed") == 1
    assert value(counted, "queue_depth") == value(counted, "queue_oldest_seconds") == 0


def test_the_process_and_its_machine_are_in_the_figures(counted: Server) -> None:
    assert value(counted, "process_resident_memory_bytes") > 10 << 20
    assert value(counted, "process_open_fds") > 5
    assert value(counted, "disk_free_bytes", folder="root") > 0
    assert value(counted, "trouble") == 0
    assert value(counted, "build_info") == 1
    eventually(lambda: value(counted, "event_loop_lag_seconds_count"))


def test_a_request_counts_under_its_route_method_and_class_of_status(counted: Server) -> None:
    of = {"route": "/v1/exports/{job_id}", "method": "GET", "status": "4xx"}
    before = value(counted, "http_request_seconds_count", **of)
    counted.client.get("/v1/exports/00000000-0000-4000-8000-000000000000")
    assert value(counted, "http_request_seconds_count", **of) == before + 1
    assert value(counted, "http_request_seconds_count", route="/v1/exports", method="POST", status="2xx") >= 1
    assert value(counted, "http_sent_bytes_total", route="/v1/exports/{job_id}/download") > 1_000


def test_what_clients_make_up_becomes_no_label(counted: Server) -> None:
    counted.client.get("/metrics")
    before = len(figures(counted)["memvid_export_http_request_seconds_count"])
    for number in range(20):
        counted.client.get(f"/made/up/{number}")
        counted.client.get(f"/v1/exports/made-up-{number}/events")
        counted.client.request(f"MADEUP{number}", "/v1/exports")
    after = figures(counted)["memvid_export_http_request_seconds_count"]
    assert len(after) <= before + 4
    assert "made" not in counted.client.get("/metrics").text.lower()
    assert after[frozenset({("route", "unmatched"), ("method", "GET"), ("status", "4xx")})] >= 20


def test_a_failed_export_counts_by_code_and_by_the_stage_it_was_at(tmp_path: Path) -> None:
    server = Server(tmp_path / "root", worker_slots=1, deadline_seconds=0.001)
    try:
        server.start()
        assert server.wait(server.submit(graph()))["type"] == "job_failed"
        assert value(server, "ended_total", status="failed", code="DEADLINE_EXCEEDED") == 1
        eventually(lambda: value(server, "failed_attempts_total") == 1)
        assert value(server, "dead_letters") == 1
    finally:
        server.close()


def test_storage_errors_count_by_operation_and_code(tmp_path: Path) -> None:
    metrics = Metrics()
    storage = CountedStorage(open_storage(StorageConfig(roots=[str(tmp_path)])), metrics)
    missing = (tmp_path / "nothing").as_uri()
    with pytest.raises(ObjectMissing):
        list(storage.read(missing, 0, 1))
    assert storage.size(missing) is None
    shown = metrics.text(None, streams=0, free={}, troubles={}).decode()
    assert 'memvid_export_storage_errors_total{code="OBJECT_MISSING",operation="read"} 1.0' in shown
    assert 'operation="size"' not in shown


def test_figures_are_there_while_the_database_is_not() -> None:
    shown = Metrics().text(None, streams=3, free={"root": 7}, troubles={"worker": True, "disk": False}).decode()
    assert "memvid_export_event_streams 3.0" in shown
    assert "memvid_export_queue_depth NaN" in shown
    assert 'memvid_export_trouble{part="worker"} 1.0' in shown
    assert 'memvid_export_trouble{part="disk"} 0.0' in shown


def test_dead_letters_and_the_oldest_wait_come_from_the_store(tmp_path: Path) -> None:
    async def counted_in_store() -> None:
        database = Database(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}")
        try:
            await database.migrate()
            store = JobStore(database, EventHub(), queue_capacity=10)
            for _ in range(3):
                await store.create(new_job())
            error = JobError(code="GATE_FAILED", message="no", retryable=False)
            async with database.write.begin() as connection:
                await connection.execute(
                    text(
                        "UPDATE jobs SET status = 'failed', error = :error, expires_at = CASE id WHEN "
                        "(SELECT min(id) FROM jobs) THEN 1 ELSE :later END WHERE id != (SELECT max(id) FROM jobs)"
                    ),
                    {"error": msgspec.json.encode(error).decode(), "later": now_ms() + 60_000},
                )
                await connection.execute(text("UPDATE jobs SET created_at = created_at - 90000"))
            found = await store.waiting()
            assert found.counts == {"failed": 2, "queued": 1}
            assert found.dead_letters == 1  # the payload of the other one has gone
            assert 90 <= found.oldest_seconds < 600
        finally:
            await database.close()

    asyncio.run(counted_in_store())


def test_the_page_about_figures_says_what_each_replica_tells() -> None:
    board = (REPOSITORY / "deploy" / "grafana.json").read_text(encoding="utf-8")
    for name in ("jobs", "queue_depth", "queue_oldest_seconds", "dead_letters"):
        assert f"sum(memvid_export_{name}" not in board
        assert f"sum by (status) (memvid_export_{name}" not in board
