"""The portable writer: memvid-sdk in a child process, for machines where the crate is not built.

About a thousand times slower than the native writer, and with memvid's own limits: documents of 2,400 characters and
more are cut into chunks, so a file holds more frames than were planned.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.contract import WriterName
from common.errors import CapacityExceeded, StorageFailed, WriterFailed, WriterUnavailable
from common.frames.model import Frame

SECONDS_PER_FRAME = 2.0
"""Deadline of one batch: memvid-sdk needs 0.04 to 0.3 s a frame here; a hung put is ended after this many."""
MEMVID_ENVIRONMENT = {"MEMVID_TELEMETRY": "0", "MEMVID_OFFLINE": "1"}
"""memvid reports usage to its maker by default; nothing of a user's code leaves the machine from here."""
_STDERR_LINES = 20

_encode = msgspec.msgpack.Encoder().encode
_ready = msgspec.msgpack.Decoder(dict[str, str]).decode


class SdkPartWriter:
    """One file under way; see ``common.capsule.port.PartWriter``."""

    def __init__(self, path: Path, *, timestamp: int, dimension: int | None) -> None:
        self._path = path
        self._timestamp = timestamp
        self._process = subprocess.Popen(
            [sys.executable, "-m", "common.capsule.sdk_child", str(path), "1" if dimension else "0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **MEMVID_ENVIRONMENT},
        )
        self._errors: deque[str] = deque(maxlen=_STDERR_LINES)
        self._drain = threading.Thread(target=self._read_errors, daemon=True)
        self._drain.start()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors.append(line.decode(errors="replace").rstrip()[:500])

    def _ask(self, message: object, seconds: float) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        try:
            data = _encode(message)
            self._process.stdin.write(len(data).to_bytes(4, "little") + data)
            self._process.stdin.flush()
            head = self._process.stdout.read(4)
            answer = _ready(self._process.stdout.read(int.from_bytes(head, "little"))) if len(head) == 4 else {}
        except OSError as error:
            raise WriterFailed(f"{self._path.name}: memvid-sdk's process ended: {error}") from error
        finally:
            timer.cancel()
        if not answer:
            reason = self._errors[-1] if self._errors else "it was ended, or took too long"
            raise WriterFailed(f"{self._path.name}: memvid-sdk's process gave no answer: {reason}")
        if answer["outcome"] != "ok":
            text = f"{self._path.name}: memvid-sdk: {answer['message']}"
            raise {"capacity": CapacityExceeded, "storage": StorageFailed}.get(answer["outcome"], WriterFailed)(text)

    def add(self, frames: Sequence[Frame], vectors: NDArray[np.float32] | None) -> None:
        """See the port."""
        rows = iter(vectors if vectors is not None else ())
        documents = [
            (frame, next(rows).tolist() if frame.embed_text is not None else None, self._timestamp) for frame in frames
        ]
        self._ask(documents, 30 + SECONDS_PER_FRAME * len(frames))

    def finish(self) -> None:
        """See the port."""
        self._ask("finish", 600)
        self.abort()
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def abort(self) -> None:
        """See the port."""
        self._process.kill()
        self._process.wait()
        self._drain.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # what was not flushed to an ended process is of no use


class SdkWriter:
    """Writes through memvid-sdk's own put."""

    name: WriterName = "sdk"
    readers = "memvid-sdk >= 2.0.160"
    takes_vectors = True

    def __init__(self) -> None:
        import importlib.util

        if importlib.util.find_spec("memvid_sdk") is None:
            raise WriterUnavailable("memvid-sdk is not installed")

    def open(
        self, path: Path, *, timestamp: int, model: str | None, dimension: int | None, expected_frames: int
    ) -> SdkPartWriter:
        """See the port; memvid-sdk keeps no model name for vectors that it did not make."""
        return SdkPartWriter(path, timestamp=timestamp, dimension=dimension)
