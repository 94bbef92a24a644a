"""The last writer: the ``memvid`` command (npm ``memvid-cli``), where neither the crate nor memvid-sdk can write.

It takes no vectors here, drops track and kind, and needs about 0.2 s a frame. Files of version 2.0.151 can be read
by that command only: memvid-sdk 2.0.160 refuses their table of contents.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.capsule.port import CAPACITY_BYTES, never
from common.capsule.process import MEMVID_ENVIRONMENT, POLL_SECONDS
from common.contract import WriterName
from common.errors import WriterFailed, WriterUnavailable
from common.frames.model import Frame

COMMAND = "memvid"
SECONDS_PER_CALL = 600
BATCH = 500
"""memvid's batch call hangs above about 512 documents."""


def run(*arguments: str, should_stop: Callable[[], None] = never) -> str:
    """Standard output of the command.

    Raises subprocess.SubprocessError with the end of what it said, and what ``should_stop`` raises.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=said,
            env={**os.environ, **MEMVID_ENVIRONMENT},
        )
        try:
            _wait(process, should_stop)
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        text = out.read().decode(errors="replace")
        if process.returncode != 0:
            said.seek(0)
            reason = (said.read().decode(errors="replace") or text).strip()[-300:]
            raise subprocess.SubprocessError(f"memvid {arguments[0]}: {reason}")
        return text


def _wait(process: subprocess.Popen[bytes], should_stop: Callable[[], None]) -> None:
    until = time.monotonic() + SECONDS_PER_CALL
    while True:
        try:
            process.wait(POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            if time.monotonic() > until:
                raise
            should_stop()


class CliPartWriter:
    """One file under way; see ``common.capsule.port.PartWriter``."""

    def __init__(self, path: Path, should_stop: Callable[[], None]) -> None:
        self._path = path
        self._should_stop = should_stop
        self._call("create", str(path))

    def _call(self, *arguments: str) -> None:
        try:
            run(*arguments, should_stop=self._should_stop)
        except (subprocess.SubprocessError, OSError) as error:
            raise WriterFailed(f"{self._path.name}: {error}") from error

    def add(self, frames: Sequence[Frame], vectors: NDArray[np.float32] | None) -> None:
        """See the port."""
        for start in range(0, len(frames), BATCH):
            documents = [
                {
                    "title": frame.title,
                    "label": frame.kind,
                    "text": frame.text,
                    "uri": frame.uri,
                    "tags": frame.tags,
                    "labels": [],
                    "metadata": msgspec.json.decode(frame.extra),
                }
                for frame in frames[start : start + BATCH]
            ]
            with tempfile.NamedTemporaryFile(dir=self._path.parent, suffix=".json") as file:
                file.write(msgspec.json.encode(documents))
                file.flush()
                self._call("put-many", str(self._path), "--input", file.name, "--raw")

    def finish(self) -> None:
        """See the port."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def abort(self) -> None:
        """See the port: no process outlives a call."""


class CliWriter:
    """Writes through the ``memvid`` command."""

    name: WriterName = "cli"
    readers = "the memvid command that wrote it"
    takes_vectors = False
    exact = False
    batch = BATCH

    def __init__(self) -> None:
        if shutil.which(COMMAND) is None:
            raise WriterUnavailable("the memvid command is not on PATH; npm has it as memvid-cli")

    def open(
        self,
        path: Path,
        *,
        timestamp: int,
        model: str | None,
        dimension: int | None,
        expected_frames: int,
        capacity: int = CAPACITY_BYTES,
        should_stop: Callable[[], None] = never,
    ) -> CliPartWriter:
        """See the port; the command sets the timestamp itself, and its own capacity."""
        if dimension is not None:
            raise WriterFailed("the memvid command takes no vectors of ours; export without semanticEnabled")
        return CliPartWriter(path, should_stop)
