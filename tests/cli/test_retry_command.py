"""``retry`` against the real server: what was given up is listed, and started again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import KEY, Server, graph
from processes import command

CEILING = "[profiles.thrifty]\nmax_tokens = {}\n"


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("retry") / "profiles.toml"
    path.write_text(CEILING.format(3))
    return path


@pytest.fixture(scope="module")
def server(profiles: Path) -> Iterator[Server]:
    running = Server(profiles.parent / "root", profiles_file=profiles, worker_slots=1).start()
    yield running
    running.close()


def failed(server: Server, name: str) -> str:
    body = graph(5, name=name)
    body["options"] |= {"semanticEnabled": True, "profile": "thrifty"}
    job_id = server.submit(body)
    assert server.wait(job_id)["type"] == "job_failed"
    return job_id


def retry(server: Server, *arguments: object, key: str = KEY) -> tuple[int, str, str]:
    done = command("retry", *arguments, "--url", server.url, env={"MEMVID_EXPORT_API_KEY": key})
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_what_was_given_up_is_listed_then_started_again_and_followed(server: Server, profiles: Path) -> None:
    assert retry(server) == (0, "Nothing was given up.\n", "")
    job_id = failed(server, "listed")
    code, listed, _ = retry(server)
    assert code == 0
    first, second, third = listed.splitlines()
    assert first == f"{job_id}  listed"
    assert second.startswith("  EMBEDDING_REFUSED: ")
    assert third.startswith("  1 attempt, failed ")
    assert third.endswith(f"kept until {server.job(job_id)['metadata']['retryUntil']}")
    code, text, _ = retry(server, "--json")
    assert [job["jobId"] for job in json.loads(text)] == [job_id]

    code, text, _ = retry(server, job_id, "--json")  # nothing was mended
    new_id = json.loads(text)["jobId"]
    assert (code, server.wait(new_id)["type"]) == (0, "job_failed")
    code, text, error = retry(server, new_id, "--wait")
    assert (code, "EMBEDDING_REFUSED" in error or "tokens" in error, text) == (2, True, "")

    server.stop()
    profiles.write_text(CEILING.format(1_000_000))
    server.start()
    (given_up,) = json.loads(retry(server, "--json")[1])
    code, text, error = retry(server, given_up["jobId"], "--wait", "--json")
    assert code == 0, error
    done = json.loads(text)
    assert (done["status"], done["metadata"]["retryOf"]) == ("completed", given_up["jobId"])
    assert retry(server)[1] == "Nothing was given up.\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["00000000-0000-4000-8000-000000000000"], "JOB_NOT_FOUND"),
        (["../../etc/passwd"], "is not the id of an export"),
        (["--wait"], "--wait goes with JOB"),
    ],
)
def test_what_cannot_be_started_again_ends_with_2(server: Server, arguments: list[str], words: str) -> None:
    code, text, error = retry(server, *arguments)
    assert (code, text) == (2, "")
    assert words in error


def test_a_wrong_key_ends_with_2(server: Server) -> None:
    code, _, error = retry(server, key="wrong")
    assert code == 2
    assert "MEMVID_EXPORT_API_KEY" in error
