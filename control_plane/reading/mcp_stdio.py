"""The read tools over standard input and output: for a client on this machine, with capsule files and no server."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import anyio
from mcp.server.stdio import stdio_server

from common.capsule.reader import CapsuleReader
from common.embedding.choice import Choice
from common.embedding.port import Embedder
from common.errors import InvalidRequest
from common.storage import FileStorage
from control_plane.operations.keys import EVERYBODY, Caller
from control_plane.reading.artifacts import Artifacts
from control_plane.reading.inspect import Files
from control_plane.reading.library import Library
from control_plane.reading.mcp import mcp_server
from control_plane.reading.reader import Reader
from control_plane.reading.tools import Locator, NotFound

MAX_CAPSULES = 64
"""Files of one server; so many are kept open."""
MAX_LINE_BYTES = 1 << 20
"""Of one message."""
LAST_SECONDS = 5
"""So long after a signal the process ends, whatever hangs: a client that does not read, say."""


class CapsuleFiles:
    """A few capsule files: the first one by default, others by path or by file name."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises CapsuleUnreadable where one is missing or damaged, InvalidRequest for too many."""
        if len(paths) > MAX_CAPSULES:
            raise InvalidRequest(f"At most {MAX_CAPSULES} capsules are served at once", field="CAPSULE")
        for path in paths:
            for part in Files(path).parts:
                CapsuleReader(part).close()
        self._names: dict[Path, set[str]] = {}
        for path in paths:
            names = {str(path), path.name, _absolute(str(path)), str(path.resolve())}
            self._names.setdefault(path.resolve(), set()).update(names)

    async def find(self, locator: Locator | None, _caller: Caller) -> Path:
        """The file that a locator means. Raises NotFound, InvalidRequest."""
        if locator is not None and locator.job_id is not None:
            raise NotFound("There are only files here; locator.capsulePath names one", field="locator.jobId")
        if locator is None or locator.capsule_path is None:
            return next(iter(self._names))
        wanted = {locator.capsule_path, _absolute(locator.capsule_path)}
        found = [path for path, names in self._names.items() if names & wanted]
        if len(found) > 1:
            raise InvalidRequest("locator.capsulePath: several files have this name; give a path", field="locator")
        if not found:
            known = ", ".join(path.name for path in [*self._names][:10])
            raise NotFound(f"There is no such capsule at locator.capsulePath; there are {known}", field="locator")
        return found[0]


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - resolve() follows links


def serve(capsules: CapsuleFiles, engine: Callable[[Choice], Embedder], *, budget: int) -> None:
    """Answer until standard input ends, or SIGTERM. Raises KeyboardInterrupt on SIGINT, InvalidRequest for a message
    that is too long, or where standard input or output is closed."""
    if sys.stdin is None or sys.stdout is None:
        raise InvalidRequest("mcp speaks over standard input and output; one of them is closed", field="stdin")
    with tempfile.TemporaryDirectory(prefix="memvid-export-") as folder:
        artifacts = Artifacts(FileStorage([]), Path(folder) / "copies", 1)
        library = Library(artifacts, engine, capacity=MAX_CAPSULES)
        try:
            stopped = anyio.run(_serve, Reader(capsules, library, budget=budget))
        finally:
            artifacts.close()
            library.close()
    if stopped == signal.SIGINT:
        raise KeyboardInterrupt


async def _serve(reader: Reader) -> signal.Signals | None:
    server = mcp_server(reader, lambda _context: EVERYBODY, exports=False)
    stopped: list[signal.Signals] = []
    wire = _Wire(sys.stdin.fileno())
    try:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with anyio.create_task_group() as group:

                async def watch() -> None:
                    async for number in signals:
                        stopped.append(number)
                        last = threading.Timer(LAST_SECONDS, os._exit, (128 + number,))
                        last.daemon = True
                        last.start()
                        wire.end()
                        group.cancel_scope.cancel()

                group.start_soon(watch)
                async with stdio_server(stdin=anyio.wrap_file(wire.lines)) as (read, write):
                    try:
                        await server.run(read, write, server.create_initialization_options())
                    finally:
                        wire.end()  # also where nobody reads the answers
                group.cancel_scope.cancel()
    except* BrokenPipeError:
        pass  # a client that went away has ended the session too
    finally:
        wire.close()
    if wire.too_long:
        raise InvalidRequest(f"A message has at most {MAX_LINE_BYTES:,} bytes", field="stdin")
    return stopped[0] if stopped else None


class _Wire:
    """What comes on a file descriptor, as a file that can be ended while it is waited for: a read of standard input
    itself goes on until something comes, and would keep the process after a signal."""

    def __init__(self, descriptor: int) -> None:
        self._from = descriptor
        self._in, self._out = socket.socketpair()
        self.lines = self._out.makefile("r", encoding="utf-8", errors="replace")
        self.too_long = False
        threading.Thread(target=self._relay, daemon=True).start()

    def _relay(self) -> None:
        length = 0
        with suppress(OSError):  # ended meanwhile
            while chunk := os.read(self._from, 65_536):
                length = len(chunk) - chunk.rfind(b"\n") - 1 + (0 if b"\n" in chunk else length)
                self.too_long = length > MAX_LINE_BYTES
                if self.too_long:
                    break
                self._in.sendall(chunk)
            self.end()

    def end(self) -> None:
        """Let the file end after what has come."""
        with suppress(OSError):
            self._in.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Nobody reads any more."""
        self.end()
        self.lines.close()
        self._out.close()
