"""``memvid-export nexus`` against a whole server: every command does what it says, and its exit code says whether."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from live_server import KEY, Server
from processes import COMMAND
from spoken import Say, spoken

from control_plane.cli import main

MAX_PENDING = 1_000
DOCUMENTS = 1_500


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with closing(Server(tmp_path / "root", env={"MEMVID_NEXUS_MAX_PENDING": str(MAX_PENDING)})) as found:
        yield found.start()


@pytest.fixture
def say(server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Say]:
    """Runs ``memvid-export nexus`` against the server."""
    with spoken(main, "memvid-export", monkeypatch, capfd) as run:
        monkeypatch.setenv("MEMVID_EXPORT_API_KEY", KEY)
        yield lambda command, *more: run("nexus", command, *more, "--url", server.url)


def until(right: Callable[[], bool]) -> None:
    """Wait for something that comes soon."""
    end = time.monotonic() + 60
    while not right():
        assert time.monotonic() < end
        time.sleep(0.02)


def figures(server: Server) -> dict[str, Any]:
    return dict(server.client.get("/v1/nexus").raise_for_status().json())


def said(answer: tuple[int, str, str]) -> str:
    """What a command that came to a good end printed."""
    code, out, err = answer
    assert code == 0, err
    return out


def test_a_load_is_killed_gone_on_with_and_looked_at_by_every_command(
    server: Server, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, report = tmp_path / "books.jsonl", tmp_path / "report.json"
    lines = [{"id": f"b{n}", "vector": [1, n % 7, n % 11, n]} for n in range(DOCUMENTS)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = [file, "--collection", "books", "--dimension", 4, "--wait"]
    until(lambda: figures(server)["leads"])
    assert said(say("status")).startswith("sync       on, by the replica that answers\n")
    assert "There are no collections." in said(say("stats"))

    # Nothing is synced: the load comes as far as may wait, and is killed while it waits itself.
    assert said(say("disable")) == "The graph stays as it is; documents wait.\n"
    until(lambda: not figures(server)["leads"])
    line = [COMMAND, "nexus", "batch", *batch, "--url", server.url]
    env = {**os.environ, "MEMVID_EXPORT_API_KEY": KEY}
    with subprocess.Popen([*map(str, line)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"It waits: The graph has to be told of 1,000 documents" in process.stderr.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    found = json.loads(said(say("status", "--json")))
    assert (found["enabled"], found["documents"], found["pending"]) == (False, MAX_PENDING, MAX_PENDING)
    assert "sync       off\n" in said(say("status"))
    [books] = json.loads(said(say("stats", "--json")))["collections"]
    assert (books["name"], books["documents"], books["pending"]) == ("books", MAX_PENDING, MAX_PENDING)
    code, _, err = say("verify", "--wait")
    assert (code, "nexus enable" in err) == (3, True)

    assert json.loads(said(say("enable", "--json"))) == {"enabled": True}
    told = json.loads(said(say("batch", *batch, "--report", report, "--json")))
    assert {
        name: told[name] for name in ("lines", "resumedAfter", "sent", "created", "updated", "failed", "error")
    } == {
        "lines": DOCUMENTS,
        "resumedAfter": MAX_PENDING,
        "sent": DOCUMENTS,
        "created": DOCUMENTS,
        "updated": 0,
        "failed": [],
        "error": None,
    }
    assert told["sync"] == {"synced": DOCUMENTS, "pending": 0, "failed": 0}
    assert json.loads(report.read_text()) == told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["books.jsonl", "report.json", "root", "root.log"]

    assert "nothing different in 1,500 documents" in said(say("verify", "--wait"))
    rebuilt = json.loads(said(say("rebuild", "--wait", "--json")))
    assert (rebuilt["kind"], rebuilt["repaired"], rebuilt["error"]) == ("rebuild", DOCUMENTS, None)
    assert json.loads(said(say("verify", "--json"))) == {"asked": "verify"}
    assert "books" in said(say("stats"))
    for more in ([], ["books"]):
        assert said(say("trigger", *more)) == "0 documents were tried again.\n"
    assert json.loads(said(say("trigger", "--json"))) == {"retried": 0}
    assert said(say("events")) == "No event was given up.\n"
    assert json.loads(said(say("events", "--json"))) == {"events": []}
    assert json.loads(said(say("events", "--retry", "--json"))) == {"retried": 0}
    assert figures(server)["documents"] == DOCUMENTS

    monkeypatch.setenv("MEMVID_EXPORT_API_KEY", "another")
    for command in ("status", "disable", "events"):
        assert say(command)[0] == 2
    server.stop()
    code, out, err = say("status", "--json")
    assert (code, json.loads(out)["error"]["code"], server.url in err) == (3, "STORAGE_FAILED", True)
