"""``memvid-export scale`` shows what would change on the endpoint, and changes it only when told to."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import REPOSITORY, command, free_port
from runpod_rest import ENDPOINT, KEY, RunpodRest

FILE = """
time_zone = "Europe/Berlin"
[workers]
workers_min = 0
workers_max = 3
idle_timeout_seconds = 5
[[schedule]]
days = ["mon-fri"]
hours = "08:00-20:00"
workers_min = 1
workers_max = 10
idle_timeout_seconds = 60
[[schedule]]
days = ["sat"]
workers_min = 0
workers_max = 4
"""
MONDAY = "2026-03-02T08:00"
SATURDAY = "2026-03-07T12:00"
SUNDAY = "2026-03-01T12:00"


@pytest.fixture
def runpod() -> Iterator[RunpodRest]:
    with RunpodRest() as running:
        yield running


def scale(
    base: str | RunpodRest, folder: Path, *arguments: str, text: str = FILE, **env: str
) -> subprocess.CompletedProcess[bytes]:
    file = folder / "profiles.toml"
    file.write_text(text)
    given = {
        "RUNPOD_REST_BASE": base if isinstance(base, str) else base.base,
        "RUNPOD_ENDPOINT_ID": ENDPOINT,
        "RUNPOD_API_KEY": KEY,
        "MEMVID_EXPORT_PROFILES_FILE": str(file),
        **env,
    }
    return command("scale", *arguments, env=given, cwd=folder)


def test_the_plan_is_shown_and_nothing_is_changed(runpod: RunpodRest, tmp_path: Path) -> None:
    done = scale(runpod, tmp_path, "--at", MONDAY)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert lines[0] == f"Endpoint {ENDPOINT} my endpoint"
    assert "schedule[0]" in lines[1]
    assert [line.split() for line in lines[2:6]] == [
        ["present", "wanted"],
        ["workersMin", "0", "1", "changes"],
        ["workersMax", "3", "10", "changes"],
        ["idleTimeout", "5", "60", "changes"],
    ]
    assert "--apply" in lines[6]
    assert [method for method, _ in runpod.requests] == ["GET"]


def test_apply_changes_the_endpoint_once_however_often_it_runs(runpod: RunpodRest, tmp_path: Path) -> None:
    assert scale(runpod, tmp_path, "--at", MONDAY, "--apply").returncode == 0
    again = scale(runpod, tmp_path, "--at", MONDAY, "--apply")
    assert again.returncode == 0
    assert b"as it should be" in again.stdout
    assert runpod.changes == [{"workersMin": 1, "workersMax": 10, "idleTimeout": 60}]
    assert (runpod.endpoint["workersMin"], runpod.endpoint["workersMax"], runpod.endpoint["idleTimeout"]) == (1, 10, 60)


def test_only_what_differs_is_sent(runpod: RunpodRest, tmp_path: Path) -> None:
    assert scale(runpod, tmp_path, "--at", SATURDAY, "--apply").returncode == 0
    # The entry says nothing about the idle timeout: it stays as it is.
    assert runpod.changes == [{"workersMax": 4}]
    assert runpod.endpoint["idleTimeout"] == 5


def test_json_is_all_there_is_on_standard_output(runpod: RunpodRest, tmp_path: Path) -> None:
    runpod.faults = [(503, {"Retry-After": "0"}, "busy")]
    done = scale(runpod, tmp_path, "--at", MONDAY, "--apply", "--json")
    assert json.loads(done.stdout) == {
        "endpointId": ENDPOINT,
        "endpointName": "my endpoint",
        "at": "2026-03-02T08:00+01:00",
        "timeZone": "Europe/Berlin",
        "place": "schedule[0]",
        "settings": [
            {"setting": "workersMin", "present": 0, "wanted": 1},
            {"setting": "workersMax", "present": 3, "wanted": 10},
            {"setting": "idleTimeout", "present": 5, "wanted": 60},
        ],
        "applied": True,
    }
    assert b"trying again" in done.stderr


def test_without_a_time_the_plan_is_for_now(runpod: RunpodRest, tmp_path: Path) -> None:
    done = scale(runpod, tmp_path, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["timeZone"] == "Europe/Berlin"


def test_a_time_with_an_offset_is_taken_at_its_word(runpod: RunpodRest, tmp_path: Path) -> None:
    plan = json.loads(scale(runpod, tmp_path, "--at", "2026-03-02T07:00Z", "--json").stdout)
    assert (plan["at"], plan["place"]) == ("2026-03-02T08:00+01:00", "schedule[0]")


def test_the_example_file_can_be_used_as_it_is(runpod: RunpodRest, tmp_path: Path) -> None:
    example = (REPOSITORY / "examples" / "profiles.toml").read_text()
    assert scale(runpod, tmp_path, "--at", MONDAY, "--apply", text=example).returncode == 0
    assert runpod.endpoint["workersMax"] == 10


@pytest.mark.parametrize(
    "faults",
    [
        [(429, {"Retry-After": "0"}, "")] * 4,
        [(500, {"Retry-After": "0"}, ""), (502, {}, "<html>"), None],
    ],
)
def test_what_passes_is_tried_again(
    runpod: RunpodRest, tmp_path: Path, faults: list[tuple[int, dict[str, str], str] | None]
) -> None:
    runpod.faults = faults
    done = scale(runpod, tmp_path, "--at", MONDAY, "--apply")
    assert done.returncode == 0, done.stderr
    assert runpod.endpoint["workersMax"] == 10


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_does_not_pass_is_given_up_after_five_tries(runpod: RunpodRest, tmp_path: Path, status: int) -> None:
    runpod.faults = [(status, {"Retry-After": "0"}, "overloaded")] * 5
    done = scale(runpod, tmp_path, "--json", "--apply")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["code"] == "PLATFORM_UNAVAILABLE"
    assert f"Runpod answered {status}: overloaded" in done.stderr.decode()
    assert len(runpod.requests) == 5


@pytest.mark.parametrize(
    ("env", "code", "words"),
    [
        ({"RUNPOD_API_KEY": "wrong"}, 2, "RUNPOD_API_KEY must be one that may read and change endpoints"),
        ({"RUNPOD_ENDPOINT_ID": "nobody"}, 2, "Runpod knows no endpoint nobody"),
        ({"RUNPOD_API_KEY": ""}, 2, "RUNPOD_API_KEY must be set"),
        ({"RUNPOD_ENDPOINT_ID": ""}, 2, "RUNPOD_ENDPOINT_ID must be set"),
        ({"RUNPOD_REST_BASE": "rest.runpod.io"}, 2, "RUNPOD_REST_BASE must be an http(s) URL"),
        ({"MEMVID_EXPORT_PROFILES_FILE": ""}, 2, "Name a profiles file"),
        ({"MEMVID_EXPORT_PROFILES_FILE": "nowhere.toml"}, 2, "nowhere.toml: the file cannot be read"),
    ],
)
def test_wrong_settings_are_named_in_one_line(
    runpod: RunpodRest, tmp_path: Path, env: dict[str, str], code: int, words: str
) -> None:
    done = scale(runpod, tmp_path, **env)
    assert done.returncode == code
    assert words in done.stderr.decode()
    assert done.stderr.decode().count("\n") == 1
    assert b"wrong" not in done.stderr


@pytest.mark.parametrize("time", ["tomorrow", "2026-13-01", "0001-01-01T00:00"])
def test_a_time_that_is_none_is_refused(runpod: RunpodRest, tmp_path: Path, time: str) -> None:
    done = scale(runpod, tmp_path, "--at", time)
    assert done.returncode == 2
    assert b"--at must be a time" in done.stderr
    assert runpod.requests == []


def test_a_file_without_workers_scales_nothing(runpod: RunpodRest, tmp_path: Path) -> None:
    done = scale(runpod, tmp_path, "--apply", text="[profiles.bulk]\nqueue_depth = 5\n")
    assert done.returncode == 2
    assert b"it has no [workers]" in done.stderr
    assert runpod.changes == []


def test_a_change_that_runpod_refuses_says_why_in_one_line(runpod: RunpodRest, tmp_path: Path) -> None:
    done = scale(runpod, tmp_path, "--at", SUNDAY, "--apply", text=FILE.replace("workers_max = 3", "workers_max = 99"))
    assert done.returncode == 2
    assert "quota (30)" in done.stderr.decode()
    assert done.stderr.decode().count("\n") == 1
    assert len(runpod.changes) == 1


def test_a_change_that_does_not_show_is_no_success(runpod: RunpodRest, tmp_path: Path) -> None:
    runpod.deaf = True
    done = scale(runpod, tmp_path, "--at", MONDAY, "--apply")
    assert done.returncode == 3
    assert b"the endpoint does not show it" in done.stderr


@pytest.mark.parametrize("answer", ["<html>", "[]", '{"id": "x"}'])
def test_another_server_is_not_taken_for_runpod(runpod: RunpodRest, tmp_path: Path, answer: str) -> None:
    runpod.faults = [(200, {}, answer)]
    done = scale(runpod, tmp_path)
    assert done.returncode == 3
    assert b"does not answer like Runpod's API" in done.stderr


def test_a_redirect_is_not_followed_with_the_key(runpod: RunpodRest, tmp_path: Path) -> None:
    runpod.faults = [(302, {"Location": "/v1/elsewhere"}, "")]
    done = scale(runpod, tmp_path)
    assert done.returncode == 3
    assert len(runpod.requests) == 1


def test_no_server_at_all_is_said_so(tmp_path: Path) -> None:
    done = scale(f"http://127.0.0.1:{free_port()}", tmp_path)
    assert done.returncode == 3
    assert b"No Runpod API answers" in done.stderr
