"""What a failed attempt on Runpod comes to: retried, or failed with a reason. The workers here do as the job says."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from live_server import graph
from runpod_house import RunpodServer, eventually
from runpod_local import Platform, local_runpod

WORKER = [sys.executable, Path(__file__).with_name("scripted_worker.py")]
PROFILES = """
[profiles.short]
execution_timeout_ms = 5000
ttl_ms = 600000

[profiles.brief]
execution_timeout_ms = 5000
ttl_ms = 10000

[profiles.narrow]
queue_depth = 2

[profiles.impatient]
queue_age_seconds = 1

[profiles.thorough]
provider = "voyage"
dimension = 512
layout = "code-v1"
embed = ["nodes", "relations"]
max_tokens = 1_000
max_usd = 0.5
"""


class House(NamedTuple):
    """A local Runpod with workers that do as told, and a server before it."""

    platform: Platform
    server: RunpodServer
    folder: Path

    def submit(self, do: str, profile: str = "default") -> str:
        """Post a job with which the worker does this."""
        body = graph(2, name="job")
        body["projectName"] = do
        body["options"]["profile"] = profile
        return self.server.submit(body)

    def notes(self, job_id: str, what: str = "started") -> list[dict[str, Any]]:
        """The inputs with which a job's runs were started or stopped."""
        lines = [json.loads(line) for line in (self.folder / "notes").read_text().splitlines()]
        return [line["input"] for line in lines if line["input"]["job_id"] == job_id and line["what"] == what]

    def wait(self, job_id: str, what: str = "started", times: int = 1) -> list[dict[str, Any]]:
        """Wait until a job's runs were started or stopped so often."""
        return list(eventually(lambda: notes if len(notes := self.notes(job_id, what)) >= times else None))

    def files(self, job_id: str) -> list[str]:
        """Payload and artifacts of a job, claims too."""
        return sorted(
            str(path) for path in (self.folder / "shared").rglob("*") if path.is_file() and job_id in str(path)
        )

    def only_payload(self, job_id: str) -> bool:
        """A failed job keeps its payload, and nothing else."""
        return [Path(path).parent.name for path in self.files(job_id)] == ["payloads"]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One for all tests of this module."""
    folder = tmp_path_factory.mktemp("retries")
    (folder / "notes").touch()
    (folder / "profiles.toml").write_text(PROFILES)
    env = {"NOTES": str(folder / "notes")}
    with local_runpod(workers="1:2", worker_command=WORKER, env=env, ping_seconds=1, idle_seconds=60) as platform:
        server = RunpodServer(
            folder / "root",
            platform,
            env={
                "MEMVID_EMBEDDING_MODE": "external_api",
                "MEMVID_EMBED_PROVIDER": "openai",
                "OPENAI_API_KEY": "sk-of-the-server",
            },
            storage_url=(folder / "shared").as_uri(),
            profiles_file=folder / "profiles.toml",
        )
        try:
            yield House(platform, server.start(), folder)
        finally:
            server.close()


def test_an_error_that_would_come_again_fails_the_job_at_once_and_is_told(house: House) -> None:
    job = house.submit("PAYLOAD_MISMATCH")
    ended = house.server.ended(job)
    assert ended["status"] == "failed"
    error = ended["error"]
    assert (error["code"], error["message"], error["retryable"]) == (
        "PAYLOAD_MISMATCH",
        "PAYLOAD_MISMATCH as asked",
        False,
    )
    assert error["details"] == {"message": "of a class of its own", "self": 1}
    assert house.server.attempts(job) == 1
    assert len(house.notes(job)) == 1
    eventually(lambda: house.only_payload(job))


def test_an_error_that_may_pass_is_tried_again_under_another_prefix_until_the_attempts_are_used_up(
    house: House,
) -> None:
    job = house.submit("STORAGE_FAILED")
    ended = house.server.ended(job)
    assert (ended["status"], ended["error"]["code"], ended["error"]["retryable"]) == ("failed", "STORAGE_FAILED", True)
    assert "given up after 3 attempts" in ended["error"]["message"]
    runs = house.notes(job)
    assert [run["attempt"] for run in runs] == [1, 2, 3]
    assert [run["output_prefix"].rsplit("/", 2)[1] for run in runs] == ["1", "2", "3"]
    assert len({run["payload_sha256"] for run in runs}) == 1
    eventually(lambda: house.only_payload(job))
    events = [event for event in house.server.events(job) if event["type"] != "stage_heartbeat"]
    assert [(event["type"], event["stage"]) for event in events] == [
        ("stage_progress", "queued"),
        ("job_started", "transform"),
        ("stage_progress", "queued"),
        ("job_started", "transform"),
        ("stage_progress", "queued"),
        ("job_started", "transform"),
        ("job_failed", "failed"),
    ]
    waits = [event["message"] for event in events[1:] if event["type"] == "stage_progress"]
    assert waits == ["Waiting to start again: STORAGE_FAILED as asked"] * 2


def test_a_worker_that_dies_is_replaced_once_by_the_platform_and_once_by_us(house: House) -> None:
    job = house.submit("crash")
    ended = house.server.ended(job)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "WORKER_LOST")
    assert "given up after 2 attempts" in ended["error"]["message"]
    assert [run["attempt"] for run in house.notes(job)] == [1, 1, 2, 2]
    eventually(lambda: house.only_payload(job))


@pytest.mark.parametrize("do", ["nothing", "odd"])
def test_a_job_that_completes_without_publishing_is_lost_whatever_its_output_says(house: House, do: str) -> None:
    job = house.submit(do)
    ended = house.server.ended(job)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "WORKER_LOST")
    assert "without publishing anything" in ended["error"]["message"]
    assert [run["attempt"] for run in house.notes(job)] == [1, 2]


def test_an_error_that_is_not_ours_counts_as_a_lost_worker(house: House) -> None:
    job = house.submit("shout")
    ended = house.server.ended(job)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "WORKER_LOST")
    assert "something broke" in ended["error"]["message"]
    assert len(house.notes(job)) == 2


def test_an_attempt_that_runs_out_of_time_is_tried_once_more_with_twice_as_long(house: House) -> None:
    job = house.submit("hang", "short")
    ended = house.server.ended(job)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "DEADLINE_EXCEEDED")
    assert [run["timeout_seconds"] for run in house.notes(job)] == [3, 8]
    assert len(house.wait(job, "stopped", 2)) == 2
    eventually(lambda: house.only_payload(job))


def test_a_worker_that_says_that_it_ran_out_of_time_is_given_twice_as_long_once(house: House) -> None:
    job = house.submit("DEADLINE_EXCEEDED", "short")
    ended = house.server.ended(job)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "DEADLINE_EXCEEDED")
    assert [run["timeout_seconds"] for run in house.notes(job)] == [3, 8]


def test_a_job_that_the_platform_forgets_is_lost_and_tried_once_more(house: House) -> None:
    job = house.submit("hang")
    for attempt in (1, 2):
        house.wait(job, times=attempt)
        here = house.server.job(job)["metadata"]["runpodJobId"]
        house.platform.fault("ttl-passed", match=here)
    ended = house.server.ended(job)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "WORKER_LOST")
    assert "does not know the job any more" in ended["error"]["message"]
    assert len(house.wait(job, "stopped", 2)) == 2


def test_a_job_whose_time_to_live_passes_in_the_queue_is_tried_once_more(house: House) -> None:
    house.platform.fault("no-workers", match="nobody")
    try:
        job = house.submit("nothing", "brief")
        first = house.server.runpod_id(job)
        second = eventually(lambda: (now := house.server.job(job)["metadata"]["runpodJobId"]) != first and now)
        assert house.platform.status(first) == {}
        assert house.platform.status(second)["status"] == "IN_QUEUE"
        assert house.server.job(job)["status"] == "queued"
    finally:
        house.platform.clear_faults()
    ended = house.server.ended(job)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "WORKER_LOST")


def test_a_job_that_somebody_cancels_at_the_platform_is_tried_once_more(house: House) -> None:
    job = house.submit("hang")
    for attempt in (1, 2):
        house.wait(job, times=attempt)
        answer = house.platform.post(f"cancel/{house.server.runpod_id(job)}")
        assert answer.json()["status"] == "CANCELLED"
    ended = house.server.ended(job)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "WORKER_LOST")
    assert "canceled at Runpod" in ended["error"]["message"]


def test_a_canceled_job_is_stopped_at_the_platform_and_not_tried_again(house: House) -> None:
    job = house.submit("hang")
    house.wait(job)
    there = house.server.runpod_id(job)
    assert house.server.client.delete(f"/v1/exports/{job}").json()["status"] == "canceled"
    assert house.platform.wait(there)["status"] == "CANCELLED"
    assert len(house.wait(job, "stopped")) == 1
    eventually(lambda: house.files(job) == [])
    assert house.server.client.delete(f"/v1/exports/{job}").json()["status"] == "canceled"
    assert [event["type"] for event in house.server.events(job)].count("job_canceled") == 1
    assert len(house.notes(job)) == 1


def test_a_job_canceled_while_it_waits_at_the_platform_never_runs(house: House) -> None:
    house.platform.fault("no-workers", match="nobody")
    try:
        job = house.submit("nothing")
        there = house.server.runpod_id(job)
        assert house.server.job(job)["status"] == "queued"
        house.server.client.delete(f"/v1/exports/{job}")
        assert house.platform.wait(there)["status"] == "CANCELLED"
        eventually(lambda: house.files(job) == [])
    finally:
        house.platform.clear_faults()
    other = house.submit("nothing")
    house.server.ended(other)
    assert house.notes(job) == []


def test_a_cancel_gets_through_a_platform_that_answers_with_errors_for_a_while(house: House) -> None:
    job = house.submit("hang")
    house.wait(job)
    there = house.server.runpod_id(job)
    house.platform.fault("http-500", route="cancel", count=2)
    house.platform.fault("http-429", route="cancel")
    house.server.client.delete(f"/v1/exports/{job}")
    assert house.platform.wait(there)["status"] == "CANCELLED"
    assert house.platform.struck()["http-429"] >= 1
    assert len(house.wait(job, "stopped")) == 1


def test_all_that_was_tried_again_is_counted_by_its_kind(house: House) -> None:
    for do in ("GATE_FAILED once", "nothing", "DEADLINE_EXCEEDED"):
        house.server.ended(house.submit(do))
    text = house.server.client.get("/metrics").text
    for kind in ("retries", "lost", "timeouts"):
        line = next(
            line for line in text.splitlines() if line.startswith(f'memvid_export_retries_total{{kind="{kind}"')
        )
        assert float(line.rpartition(" ")[2]) > 0


@pytest.mark.parametrize(("profile", "waiting", "figure"), [("narrow", 2, "depth"), ("impatient", 1, "ageSeconds")])
def test_a_queue_that_is_too_deep_or_too_old_turns_jobs_away_and_says_when_to_come_again(
    house: House, profile: str, waiting: int, figure: str
) -> None:
    def post(profile: str) -> httpx.Response:
        body = graph(2)
        body["options"]["profile"] = profile
        return house.server.post({**body, "projectName": "PAYLOAD_MISMATCH"})

    house.platform.fault("no-workers", match="nobody")
    try:
        jobs = [post(profile).json()["jobId"] for _ in range(waiting)]
        answer = eventually(
            lambda: None if (found := post(profile)).status_code == 202 and figure == "depth" else found
        )
        while answer.status_code == 202:
            jobs.append(answer.json()["jobId"])
            answer = post(profile)
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert error["code"] == "QUEUE_UNAVAILABLE"
        assert error["details"]["profile"] == profile
        assert error["details"][figure] >= error["details"]["limit"]
        assert answer.headers["retry-after"] == str(error["details"]["retryAfterSeconds"])
        assert 1 <= int(answer.headers["retry-after"]) <= 600
        jobs.append(post("default").json()["jobId"])
    finally:
        house.platform.clear_faults()
    for job in jobs:
        assert house.server.ended(job)["error"]["code"] == "PAYLOAD_MISMATCH"
    assert post(profile).status_code == 202


def test_a_profile_that_there_is_not_is_refused_with_those_that_there_are(house: House) -> None:
    body = graph(2)
    body["options"]["profile"] = "unheard-of"
    answer = house.server.post(body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "INVALID_EXPORT_REQUEST")
    allowed = ["brief", "default", "impatient", "narrow", "quality", "short", "speed", "thorough"]
    assert answer.json()["error"]["details"]["allowed"] == allowed


def test_a_worker_is_told_what_the_profile_embeds_and_no_key(house: House) -> None:
    [thorough] = house.wait(house.submit("PAYLOAD_MISMATCH", "thorough"))
    assert {name: value for name, value in thorough.items() if name.startswith("embedding_")} == {
        "embedding_mode": "external_api",
        "embedding_provider": "voyage",
        "embedding_model": "voyage-code-3",
        "embedding_dimension": 512,
        "embedding_layout": "code-v1",
        "embedding_what": ["nodes", "relations"],
        "embedding_max_tokens": 1_000,
        "embedding_max_usd": 0.5,
    }
    assert "sk-of-the-server" not in json.dumps(thorough)
    [default] = house.wait(house.submit("PAYLOAD_MISMATCH"))
    assert (default["embedding_provider"], default["embedding_model"]) == ("openai", "text-embedding-3-large")
    [quick] = house.wait(house.submit("PAYLOAD_MISMATCH", "speed"))
    assert quick["embedding_model"] == "text-embedding-3-small"
