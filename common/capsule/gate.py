"""The gate: a capsule is read back in another process before anyone may call it done.

The child process (``common.capsule.gate_child``) reads through memvid-sdk, the reader that users have, or through the
``memvid`` command for files that only this command can read. It is started early, so that its imports overlap with the
writing, and checks one capsule after the other.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal

import msgspec

from common.capsule.sdk import MEMVID_ENVIRONMENT
from common.errors import GateFailed

CHECK_SECONDS = 300.0
"""Longest one file may take: 170,000 frames with vectors take 3 s here."""
_POLL_SECONDS = 0.1
_MAX_ANSWER = 1 << 20


class FrameProbe(msgspec.Struct):
    """A frame that must come back by its uri as it was written."""

    uri: str
    title: str
    track: str
    tags: list[str]
    text: str


class WordProbe(msgspec.Struct):
    """A word that must find a frame."""

    word: str
    uri: str


class VectorProbe(msgspec.Struct):
    """A vector that must be its own nearest neighbour."""

    values: list[float]
    uri: str


class GatePlan(msgspec.Struct, kw_only=True):
    """What one file must hold."""

    path: str
    frames: int
    exact: bool
    """False where the writer may add frames of its own (memvid-sdk cuts long documents into chunks)."""
    vectors: int
    reader: Literal["sdk", "cli"]
    frame_probes: list[FrameProbe]
    word_probes: list[WordProbe]
    vector_probes: list[VectorProbe]


class GateAnswer(msgspec.Struct):
    """What the child says of a plan."""

    probe: str | None
    """None when all held, else which did not."""
    message: str
    probes: int


class Gate:
    """A gate process; use it as a context manager, for one capsule after the other."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Gate:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Start the process, if it does not run."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "common.capsule.gate_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **MEMVID_ENVIRONMENT},
            )

    def check(self, plan: GatePlan, should_stop: Callable[[], None], seconds: float = CHECK_SECONDS) -> int:
        """Read the file back and answer how many probes held.

        Raises GateFailed with the name of the probe that did not, or ``process`` where the child died or took longer
        than ``seconds``; and what ``should_stop`` raises.
        """
        self.start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(msgspec.json.encode(plan) + b"\n")
            process.stdin.flush()
            line = self._answer(process, should_stop, seconds)
        except BrokenPipeError:
            line = b""
        except BaseException:
            self.close()
            raise
        if not line:
            self.close()
            raise GateFailed("the process that reads the capsule back gave no answer", probe="process")
        answer = msgspec.json.decode(line, type=GateAnswer)
        if answer.probe is not None:
            raise GateFailed(f"the capsule does not read back: {answer.message}", probe=answer.probe)
        return answer.probes

    def _answer(self, process: subprocess.Popen[bytes], should_stop: Callable[[], None], seconds: float) -> bytes:
        assert process.stdout is not None
        until = time.monotonic() + seconds
        received = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while time.monotonic() < until and len(received) < _MAX_ANSWER:
                if selector.select(_POLL_SECONDS):
                    chunk = os.read(process.stdout.fileno(), 65_536)
                    if not chunk:
                        return b""
                    received += chunk
                    if received.endswith(b"\n"):
                        return bytes(received)
                should_stop()
        return b""

    def close(self) -> None:
        """End the process. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
