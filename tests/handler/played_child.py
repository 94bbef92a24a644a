"""A child process that says what a test has it say, in place of the real one."""

from __future__ import annotations

from pathlib import Path

import pytest

PRELUDE = """\
import json, os, resource, signal, sys, time

def play():
    def say(**message):
        os.write(1, json.dumps(message).encode() + b"\\n")

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdin.readline()
"""
END = """
    os._exit(0)

if "handler.child" in sys.orig_argv:
    play()
"""


def played(folder: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Let children from now on run ``part``, lines of Python, once they have read their config; ``say`` writes a
    message, ``sys.stdin.readline()`` waits for a command."""
    folder.mkdir()
    lines = "".join(f"    {line}\n" for line in part.strip().splitlines())
    (folder / "sitecustomize.py").write_text(PRELUDE + lines + END)
    monkeypatch.setenv("PYTHONPATH", str(folder))
