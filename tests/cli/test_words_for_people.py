"""What commands say to people: of what is not there, of what was not found, and on a terminal while it goes on."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import KEY, Server, graph, large_graph
from processes import COMMAND, command, on_a_terminal
from spoken import Say, spoken

from control_plane.cli import main


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Say]:
    with spoken(main, "memvid-export", monkeypatch, capfd) as run:
        yield run


def written(path: Path) -> Path:
    path.write_text(json.dumps(graph(name=path.stem)))
    return path


@pytest.fixture
def capsule(say: Say, tmp_path: Path) -> Path:
    code, out, err = say("export", written(tmp_path / "small.json"), "--out", tmp_path, "--json")
    assert code == 0, err
    return Path(json.loads(out)["capsule"]["path"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("words") / "root", worker_slots=1).start()
    yield running
    running.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["submit", "nowhere.json", "--url", "http://127.0.0.1:9"], "There is no file nowhere.json"),
        (["search", "nowhere.mv2", "word"], "nowhere.mv2"),
        (["inspect", "nowhere.mv2"], "nowhere.mv2"),
        (["verify", "nowhere/"], "nowhere"),
        (["serve", "--runpod-local"], "--runpod-local goes with --dev"),
        (["retry", "--wait", "--url", "http://127.0.0.1:9"], "--wait goes with JOB"),
        (["scale"], "MEMVID_EXPORT_PROFILES_FILE"),
        (["worker", "--test-input", "nowhere.json"], "nowhere.json"),
        (["local-runpod", "--worker-command", "'"], "--worker-command"),
        (["local-runpod", "--worker-command", " "], "--worker-command: give a command"),
        (["local-runpod", "--env", "NAME"], "--env NAME: give NAME=VALUE"),
        (["local-runpod", "--bind", "8600"], "--bind 8600: give HOST:PORT"),
        (["local-runpod", "--workers", "2"], "--workers 2: give MIN:MAX"),
        (["local-runpod", "--workers", "3:2"], "local-runpod"),
    ],
    ids=lambda it: " ".join(it) if isinstance(it, list) else "",
)
def test_what_is_not_there_or_not_understood_is_named_and_ends_with_2(
    say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"RUNPOD_ENDPOINT_ID": "endpoint", "RUNPOD_API_KEY": "key"}.items():
        monkeypatch.setenv(name, value)
    code, out, err = say(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"), [(None, "No such file or directory"), (b"\xff", "it is not UTF-8")], ids=["none", "binary"]
)
def test_a_file_of_a_key_that_cannot_be_read_is_named_by_its_setting(
    say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("MEMVID_EXPORT_API_KEY_FILE", str(path))
    code, out, err = say("submit", written(tmp_path / "one.json"), "--url", "http://127.0.0.1:9", "--json")
    assert code == 2
    assert f"MEMVID_EXPORT_API_KEY_FILE cannot be read: {words}" in err
    assert json.loads(out)["error"]["code"] == "INVALID_SETTINGS"


def test_without_a_key_the_server_refuses_and_the_setting_is_named(say: Say, server: Server, tmp_path: Path) -> None:
    code, _, err = say("submit", written(tmp_path / "one.json"), "--url", server.url)
    assert code == 2
    assert "set MEMVID_EXPORT_API_KEY" in err


def test_a_local_runpod_without_what_its_workers_need_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "aiohttp.py").write_text("raise ImportError('it is not installed')")
    done = command("local-runpod", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert b"memvid-export[worker]" in done.stderr


def test_a_search_without_a_hit_says_so_and_has_none_in_json(say: Say, capsule: Path) -> None:
    arguments = ("search", capsule, "zzyzx", "--mode", "lexical")
    assert say(*arguments)[:2] == (0, "Nothing found.\n")
    code, out, _ = say(*arguments, "--json")
    assert (code, json.loads(out)["hits"]) == (0, [])


def test_a_file_of_queries_that_is_not_there_is_named(say: Say, capsule: Path, tmp_path: Path) -> None:
    code, out, err = say("search", capsule, "--queries", tmp_path / "none", "--mode", "lexical")
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'none'}: No such file or directory" in err


def test_a_capsule_by_itself_is_shown_with_what_it_holds_and_without_what_lay_beside_it(
    say: Say, capsule: Path
) -> None:
    code, out, _ = say("inspect", capsule)
    assert code == 0
    assert "3 Function" in out
    assert "3 CALLS" in out
    alone = capsule.rename(capsule.parent / "alone.mv2")
    code, out, _ = say("inspect", alone)
    assert code == 0
    assert "none (it can be rebuilt from the capsule)" in out


def test_what_a_maximum_left_out_is_said_at_the_end_of_an_export(say: Say, tmp_path: Path) -> None:
    options = {"semanticEnabled": False, "maxNodeFrames": 300, "maxRelationFrames": 300}
    body = graph(400, name="cut", options=options)
    (tmp_path / "cut.json").write_text(json.dumps(body))
    code, out, err = say("export", tmp_path / "cut.json", "--out", tmp_path)
    assert code == 0, err
    assert re.search(r"left out 100 nodes and 1\d\d relationships, by the maximum", out)


def test_an_export_that_is_canceled_while_it_is_followed_ends_with_130_and_fetches_nothing(
    say: Say, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cancel() -> None:
        while not (jobs := server.client.get("/v1/exports", params={"status": "running"}).json()["jobs"]):
            time.sleep(0.01)
        server.client.delete(f"/v1/exports/{jobs[0]['jobId']}")

    (tmp_path / "large.json.gz").write_bytes(large_graph())
    monkeypatch.setenv("MEMVID_EXPORT_API_KEY", KEY)
    other = threading.Thread(target=cancel)
    other.start()
    code, out, err = say("submit", tmp_path / "large.json.gz", "--url", server.url, "--wait", "--out", tmp_path / "out")
    other.join()
    assert (code, out) == (130, "")
    assert "was canceled" in err
    assert not (tmp_path / "out").exists()


def test_on_a_terminal_a_submission_draws_what_is_sent_and_fetched_and_names_its_job_between(
    server: Server, tmp_path: Path
) -> None:
    path = written(tmp_path / "drawn.json")
    arguments = [COMMAND, "submit", path, "--url", server.url, "--wait", "--out", tmp_path / "out", "--json"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMVID_")}
    stdout, drawn = on_a_terminal(arguments, {**kept, "TERM": "xterm", "MEMVID_EXPORT_API_KEY": KEY})
    job_id = json.loads(stdout)["jobId"]
    for words in ("Sending drawn.json", f"Job {job_id}", "Fetching drawn"):
        assert words.encode() in drawn, words
    assert "━".encode() in drawn
