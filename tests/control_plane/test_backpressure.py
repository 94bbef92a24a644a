"""While too many jobs of a profile wait, or one waits for too long, new ones are told when to come again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
from live_server import Server, graph, large_graph

PROFILES = """
[profiles.narrow]
queue_depth = 2
[profiles.impatient]
queue_age_seconds = 1
"""


def post(server: Server, profile: str | None) -> httpx.Response:
    return server.post(graph(options={"profile": profile}))


def refused(answer: httpx.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "QUEUE_UNAVAILABLE")
    assert answer.headers["Retry-After"] == str(error["details"]["retryAfterSeconds"])
    return dict(error["details"])


def test_a_profile_past_its_limits_is_refused_with_the_time_that_its_rate_asks_for(
    start_server: Any, tmp_path: Path
) -> None:
    file = tmp_path / "profiles.toml"
    file.write_text(PROFILES)
    server: Server = start_server(worker_slots=1, profiles_file=file)

    def busy() -> str:
        job_id = server.submit(large_graph(nodes=30_000))
        server.wait(job_id, "job_started")
        return job_id

    running = busy()
    waiting = [post(server, "narrow"), post(server, "narrow"), post(server, "impatient")]
    assert [answer.status_code for answer in waiting] == [202] * 3
    # Nothing of the profile has ended yet: there is no rate, and the stated time holds.
    assert refused(post(server, "narrow")) == {"profile": "narrow", "depth": 2, "limit": 2, "retryAfterSeconds": 5}
    assert post(server, None).status_code == 202
    unknown = post(server, "nobody")
    assert unknown.status_code == 400
    assert {"default", "impatient", "narrow", "speed"} <= set(unknown.json()["error"]["details"]["allowed"])
    time.sleep(1.1)
    details = refused(post(server, "impatient"))
    assert details["ageSeconds"] > details["limit"] == 1

    server.client.delete(f"/v1/exports/{running}")
    for answer in waiting:
        assert server.wait(answer.json()["jobId"])["type"] == "job_completed"
    running = busy()
    assert [post(server, "narrow").status_code for _ in range(2)] == [202] * 2
    # One has to end, and those that did took a moment each, however few they were.
    assert refused(post(server, "narrow"))["retryAfterSeconds"] <= 3
    assert 'memvid_export_refused_total{limit="queue"} 3.0' in server.client.get("/metrics").text
    server.client.delete(f"/v1/exports/{running}")
