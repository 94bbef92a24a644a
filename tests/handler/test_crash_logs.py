"""A crash of a server or worker is one JSON line of its log, like all else, and names no project."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

PRELUDE = "import threading\nfrom handler.logs import log_as_json\nlog_as_json()\n"


def _ended(script: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", PRELUDE + script]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)


def test_a_process_that_crashes_says_why_in_one_line() -> None:
    ended = _ended("raise ValueError('/data/out/secret-project.mv2 is broken')")
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = map(json.loads, ended.stderr.splitlines())
    assert (line["event"], line["level"]) == ("the process ends", "critical")
    assert "ValueError: /data/out/*.mv2 is broken" in line["exception"]
    assert "secret-project" not in ended.stderr
    assert len(line["trace"]) == 32


def test_a_thread_that_crashes_is_named_and_the_process_goes_on() -> None:
    ended = _ended(
        "def crash():\n    raise ValueError('as asked')\n"
        "thread = threading.Thread(target=crash, name='jobs')\nthread.start()\nthread.join()\nprint('goes on')\n"
    )
    assert (ended.returncode, ended.stdout) == (0, "goes on\n")
    (line,) = map(json.loads, ended.stderr.splitlines())
    assert (line["event"], line["level"], line["thread"]) == ("a thread ended", "critical", "jobs")
    assert "ValueError: as asked" in line["exception"]


def test_what_is_typed_to_end_a_process_is_no_crash() -> None:
    ended = _ended("raise KeyboardInterrupt")
    assert ended.returncode in (130, -signal.SIGINT)
    assert ended.stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert "the process ends" not in ended.stderr


def test_a_warning_of_a_library_is_a_line_too() -> None:
    ended = _ended("import warnings\nwarnings.warn('soon gone: secret-project.mv2')\n")
    (line,) = map(json.loads, ended.stderr.splitlines())
    assert (line["level"], line["logger"]) == ("warning", "py.warnings")
    assert "soon gone: *.mv2" in line["event"]
