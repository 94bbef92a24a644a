"""The parent's side of a worker's child process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import msgspec

from common.contract import MALFORMED, Stage
from common.errors import RULES, DeadlineExceeded, ExportError, OutOfMemory, WorkerLost
from handler.protocol import ChildConfig, Command, Failed, Message, Ready, Reported, Run, export_error

TERM_SECONDS = 0.3
"""From asking a process group to end to ending it."""
PIPE_SECONDS = 1.0
"""From a process's end to the end of its output."""
WATCH_SECONDS = 0.05
START_SECONDS = 120.0
MAX_LINE = 64 << 20


class ChildProcess:
    """One child with its process group; it takes one command at a time.

    Made by ``start``. However it ends, ``receive`` raises the reason: the one that ``kill`` was given, else
    OutOfMemory or WorkerLost. A job that stays in one stage for too long ends with DeadlineExceeded.
    """

    def __init__(self, process: asyncio.subprocess.Process, config: ChildConfig) -> None:
        self._process = process
        self._config = config
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._reason: ExportError | None = None
        self._peak = self._own = 0
        self._stage: Stage | None = None
        self._stage_ends: asyncio.TimerHandle | None = None
        self.kept_job: str | None = None
        """The job whose payload this child has read and still holds."""
        self.ended = False
        self._reading = asyncio.create_task(self._read())
        self._watching = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, config: ChildConfig) -> ChildProcess:
        """Start a child and wait until it takes commands. Raises WorkerLost if it does not come up, or why
        its engine cannot be loaded."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "handler.child",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_LINE,
            start_new_session=True,
        )
        child = cls(process, config)
        try:
            await child.send(config)
            async with asyncio.timeout(START_SECONDS):
                first = await child.receive()
            if not isinstance(first, Ready):
                raise WorkerLost("the worker's process spoke before it was ready")
            child._own = child._memory()
            child._peak = 0
        except TimeoutError as error:
            await child.close()
            raise WorkerLost(f"the worker's process was not ready within {START_SECONDS:.0f} seconds") from error
        except BaseException:
            await child.close()
            raise
        return child

    @property
    def pid(self) -> int:
        """The process, and the group that it leads."""
        return self._process.pid

    @property
    def usable(self) -> bool:
        """It takes another command."""
        return not self.ended and self._reason is None

    @property
    def lean(self) -> bool:
        """It holds less than half of the memory that it may: the next job gets enough."""
        return self.memory() < self._config.memory_limit // 2

    async def send(self, command: Command | ChildConfig) -> None:
        """Give it a command; first of all its config."""
        stdin = self._process.stdin
        assert stdin is not None
        if isinstance(command, Run):
            self._enter("transform")
        with contextlib.suppress(ConnectionError):  # A dead child is told of by ``receive``.
            stdin.write(msgspec.json.encode(command) + b"\n")
            await stdin.drain()

    async def receive(self) -> Message:
        """The next message; raises the reason when the process has ended, and the error of a failed command."""
        message = await self._messages.get()
        return self._open(message)

    def receive_now(self) -> Message | None:
        """The next message if there is one already, other than the end."""
        if self._messages.empty():
            return None
        return self._open(self._messages.get_nowait())

    def _open(self, message: Message | None) -> Message:
        if message is None:
            self._messages.put_nowait(None)
            raise self._reason or WorkerLost("the worker's process ended without an answer")
        if isinstance(message, Failed):
            error = export_error(message.error)
            if RULES[error.retry].fresh:  # It ends by itself after these.
                self.kill(error)
            raise error
        return message

    def kill(self, reason: ExportError) -> None:
        """End the process and all that it started, within ``TERM_SECONDS``; ``receive`` then raises ``reason``."""
        if self._reason is None and not self.ended:
            self._reason = reason
            self._signal(signal.SIGTERM)
            asyncio.get_running_loop().call_later(TERM_SECONDS, self._signal, signal.SIGKILL)

    async def close(self) -> None:
        """End the process at once and wait until it is gone."""
        self._signal(signal.SIGKILL)
        self._enter(None)
        await self._process.wait()
        # With the end of its output its pipes are closed; a process that left the group may hold it open.
        await asyncio.wait([self._reading], timeout=PIPE_SECONDS)
        self._reading.cancel()
        self._watching.cancel()
        await asyncio.gather(self._reading, self._watching, return_exceptions=True)
        if self._process.stdin is not None:
            self._process.stdin.close()

    def memory(self) -> int:
        """Bytes of private memory that the group holds now, beyond those that it held when it was ready: an engine that
        is loaded before the first job is no job's."""
        return max(0, self._memory() - self._own)

    def _memory(self) -> int:
        return sum(_private_memory(pid) for pid in [self.pid, *_children(self.pid)])

    def _enter(self, stage: Stage | None) -> None:
        """The job is in this stage from now on; None: in none. Steps of the same stage do not give it more time."""
        if stage == self._stage:
            return
        self._stage = stage
        if self._stage_ends is not None:
            self._stage_ends.cancel()
        limit = self._config.stage_seconds
        if stage is not None and limit is not None:
            message = f"the stage {stage} took longer than the {limit:g} seconds that a stage may"
            too_long = DeadlineExceeded(message, limit=limit, stage=stage)
            self._stage_ends = asyncio.get_running_loop().call_later(limit, self.kill, too_long)

    def _signal(self, number: signal.Signals) -> None:
        if self.ended:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def _read(self) -> None:
        try:
            await self._read_messages()
            self._enter(None)
            code = await self._process.wait()
            if self._reason is None:
                self._reason = self._why(code)
        finally:  # whatever ends the reading, nobody waits for more
            self._signal(signal.SIGKILL)
            self.ended = True
            self._messages.put_nowait(None)

    async def _read_messages(self) -> None:
        decoder = msgspec.json.Decoder(Message)
        stdout = self._process.stdout
        assert stdout is not None
        try:
            # A process that is killed leaves half a line.
            while (line := await stdout.readline()).endswith(b"\n"):
                message = decoder.decode(line)
                self._enter(message.progress.stage if isinstance(message, Reported) else None)
                self._messages.put_nowait(message)
        except (*MALFORMED, ValueError) as error:  # ValueError: a line of more than MAX_LINE
            self.kill(WorkerLost(f"the worker's process said what is no message: {error}"))
            while await stdout.read(MAX_LINE):  # it ends all the same, but not while its pipe is full
                pass

    def _why(self, code: int) -> ExportError:
        # Native code crashes where it gets no more memory; the watch has then seen much of it in use.
        if code in (-signal.SIGABRT, -signal.SIGSEGV) and self._peak > self._config.memory_limit // 2:
            return self._out_of_memory()
        return WorkerLost(f"the worker's process ended ({_exit_text(code)}) before the job was done")

    def _out_of_memory(self) -> OutOfMemory:
        limit = self._config.memory_limit
        return OutOfMemory(f"the job needs more than the {limit >> 20:,} MiB that a worker may use", limit=limit)

    async def _watch(self) -> None:
        while not self.ended:
            self._peak = max(self._peak, held := self.memory())
            if held > self._config.memory_limit:
                self.kill(self._out_of_memory())
                return
            await asyncio.sleep(WATCH_SECONDS)


def _exit_text(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _private_memory(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), "RssAnon: 0 kB")
    return int(line.split()[1]) << 10


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
