"""A child process that answers one message after the other, with a deadline on each.

Messages go both ways as four bytes of length, little-endian, and that many bytes. memvid's libraries can hang, crash or
print to standard output: so they run at the other end of these pipes.
"""

from __future__ import annotations

import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import IO

MEMVID_ENVIRONMENT = {"MEMVID_TELEMETRY": "0", "MEMVID_OFFLINE": "1"}
"""memvid reports usage to its maker by default; nothing of a user's code leaves the machine from here."""
POLL_SECONDS = 0.1
"""How often ``should_stop`` is called while a child works."""
_BLOCK = 1 << 16
_HEAD = 4
_ERROR_LINES = 20
_ERROR_CHARS = 500


class ChildLost(Exception):
    """The child died, hung or said something else than an answer; the text says which, and its last words."""


class Child:
    """One running child; calls come from one thread at a time."""

    def __init__(self, module: str, *arguments: str) -> None:
        """Start ``python -m module arguments…``, whose ``main`` calls ``serve``."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **MEMVID_ENVIRONMENT},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdin, self._stdout, self._stderr = self._process.stdin, self._process.stdout, self._process.stderr
        os.set_blocking(self._stdin.fileno(), False)
        self._errors: deque[str] = deque(maxlen=_ERROR_LINES)
        self._drain = threading.Thread(target=_read_lines, args=(self._stderr, self._errors), daemon=True)
        self._drain.start()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ask(self, message: bytes, seconds: float, should_stop: Callable[[], None]) -> bytes:
        """Send a message and wait for its answer.

        Raises ChildLost, and what ``should_stop`` raises; after either the process is ended.
        """
        try:
            return self._exchange(len(message).to_bytes(_HEAD, "little") + message, seconds, should_stop)
        except OSError:
            self.close()
            raise ChildLost(self._last_words()) from None
        except BaseException:
            self.close()
            raise

    def _exchange(self, message: bytes, seconds: float, should_stop: Callable[[], None]) -> bytes:
        until = time.monotonic() + seconds
        unsent = memoryview(message)
        answer = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdin, selectors.EVENT_WRITE)
            selector.register(self._stdout, selectors.EVENT_READ)
            while time.monotonic() < until:
                for key, _ in selector.select(POLL_SECONDS):
                    if key.fileobj is self._stdin:
                        unsent = unsent[os.write(self._stdin.fileno(), unsent[:_BLOCK]) :]
                        if not unsent:
                            selector.unregister(self._stdin)
                    else:
                        block = os.read(self._stdout.fileno(), _BLOCK)
                        if not block:
                            raise BrokenPipeError
                        answer += block
                        if len(answer) >= _HEAD and len(answer) - _HEAD >= int.from_bytes(answer[:_HEAD], "little"):
                            return bytes(answer[_HEAD:])
                should_stop()
        raise ChildLost(f"it took longer than {seconds:g} s")

    def _last_words(self) -> str:
        return next((line for line in reversed(self._errors) if line), "it ended")

    def close(self) -> None:
        """End the process. Idempotent."""
        self._process.kill()
        self._process.wait()
        self._drain.join()
        for pipe in (self._stdin, self._stdout, self._stderr):
            pipe.close()


def _read_lines(stream: IO[bytes], lines: deque[str]) -> None:
    for line in stream:
        lines.append(line.decode(errors="replace").rstrip()[:_ERROR_CHARS])


def serve(handle: Callable[[bytes], bytes]) -> None:
    """The child's side: answer messages until standard input ends; then end at once, in whatever it hangs."""
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_messages, args=(messages,), daemon=True).start()
    while True:
        answer = handle(messages.get())
        data = len(answer).to_bytes(_HEAD, "little") + answer
        while data:
            data = data[os.write(out, data) :]


def _read_messages(messages: queue.SimpleQueue[bytes]) -> None:
    while len(head := _read(_HEAD)) == _HEAD:
        messages.put(_read(int.from_bytes(head, "little")))
    os._exit(0)


def _read(count: int) -> bytes:
    """So many bytes of standard input, fewer at its end; past Python's buffer, whose lock would not let a crash end."""
    data = bytearray()
    while len(data) < count and (block := os.read(0, min(_BLOCK, count - len(data)))):
        data += block
    return bytes(data)
