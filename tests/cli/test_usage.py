"""Exit codes, and where output goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import COMMAND, EXAMPLE, command, on_a_terminal


@pytest.mark.parametrize(
    "arguments",
    [
        ["export"],
        ["export", EXAMPLE, "--gitnexus", "http://127.0.0.1:9"],
        ["export", EXAMPLE, "--repo", "x"],
        ["export", EXAMPLE, "--writer", "pen"],
        ["search", EXAMPLE],
        ["search", EXAMPLE, "a", "--queries", "b"],
        ["submit"],
        ["dance"],
    ],
    ids=lambda arguments: " ".join(Path(str(word)).name for word in arguments),
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(arguments: list[object], tmp_path: Path) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"hello", "not JSON"),
        (b'{"nodes": [], "relationships": []}', "nodes"),
        (b"\x1f\x8b\x08\x00 and no more", "gzip"),
        (b'{"type":"node","data":{"id":"a","label":"File"', "cut"),
    ],
    ids=["empty", "no-json", "no-nodes", "cut-gzip", "cut-stream"],
)
def test_a_bad_graph_ends_with_2_and_a_line_that_names_the_place(content: bytes, words: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for json_flag in ([], ["--json"]):
        done = command("export", "-", "--out", out, *json_flag, stdin=content)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr.decode()
        assert "Traceback" not in done.stderr.decode()
        if json_flag:
            error = json.loads(done.stdout)["error"]
            assert error["code"] == "INVALID_EXPORT_REQUEST"
            assert error["details"]["field"]
        else:
            assert done.stdout == b""
    assert not out.exists() or list(out.iterdir()) == []


def test_a_graph_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = command("export", tmp_path / "nowhere.json", "--out", tmp_path)
    assert done.returncode == 2
    assert b"nowhere.json" in done.stderr


def test_a_wrong_setting_is_named_with_what_is_allowed() -> None:
    done = command("serve", "--dev", env={"MEMVID_EXPORT_QUEUE_CAPACITY": "many"})
    assert done.returncode == 2
    assert b"MEMVID_EXPORT_QUEUE_CAPACITY" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_the_server_does_not_start_without_a_key() -> None:
    done = command("serve")
    assert done.returncode == 2
    assert b"MEMVID_EXPORT_API_KEY" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_export_ends_with_130_and_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    arguments = [COMMAND, "export", "-", "--out", tmp_path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(list(map(str, arguments)), **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(b'{"nodes": [')
        process.stdin.flush()
        _until_it_reads(process)
        process.send_signal(number)
        assert process.wait(timeout=30) == 130
    assert list(tmp_path.iterdir()) == []


def _until_it_reads(process: subprocess.Popen[bytes]) -> None:
    """Wait until the process sleeps in ``read`` of its standard input, having taken what was there."""
    for _ in range(1000):
        wait = Path(f"/proc/{process.pid}/wchan").read_text()
        if "pipe" in wait:
            return
        time.sleep(0.02)
    raise AssertionError("the export never read its input")


def test_on_a_terminal_bars_move_while_standard_output_stays_pure_json(tmp_path: Path) -> None:
    arguments = [COMMAND, "export", EXAMPLE, "--out", tmp_path, "--json"]
    stdout, drawn = on_a_terminal(arguments, {**os.environ, "TERM": "xterm"})
    assert json.loads(stdout)["status"] == "completed"
    assert b"100%" in drawn
    assert "━".encode() in drawn
