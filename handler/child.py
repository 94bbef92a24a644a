"""The process that runs jobs: ``python -m handler.child``.

The first line of its stdin is a ChildConfig as JSON, each that follows is a command; it writes messages to what was
its stdout, and whatever a library prints goes to stderr. It is the leader of a process group of its own and dies with
its parent, and all that it started dies with it.
"""

from __future__ import annotations

import ctypes
import os
import queue
import resource
import signal
import threading
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec
import structlog

from common.capsule.gate import Gate
from common.contract import JobInput, Progress
from common.embedding.choice import Choice
from common.embedding.engine import OpenEngines
from common.embedding.port import Embedder
from common.embedding.routing import check_choice, choice_of
from common.errors import Canceled, DeviceFailed, ExportError, OutOfMemory
from common.graph.model import ExportRequest
from common.storage import open_storage
from handler import claim
from handler.job import read_payload, run_job
from handler.logs import job_context, log_as_json
from handler.protocol import (
    Check,
    Checked,
    ChildConfig,
    Command,
    Done,
    Failed,
    Message,
    Ready,
    Reported,
    Run,
    job_error,
)

log = structlog.get_logger()

PR_SET_PDEATHSIG = 1
NICE = 10
"""Exports take every processor that they get; the process that answers clients, or a platform's pings, goes before."""


class _Kept(NamedTuple):
    """The last payload that was checked, so that the job that follows need not read it again."""

    job_id: str
    request: ExportRequest
    seconds: float
    """How long that took."""


class Child:
    """Runs one command after the other."""

    def __init__(self, config: ChildConfig, gate: Gate, out: int) -> None:
        self._config = config
        self._gate = gate
        self._out = out
        self._lock = threading.Lock()
        self._storage = open_storage(config.storage)
        self._engines = OpenEngines(config.engines, self._storage)
        self._scratch = Path(config.scratch)
        self._kept: _Kept | None = None

    def send(self, message: Message) -> None:
        """Write one line; waits while the parent is behind."""
        data = msgspec.json.encode(message) + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self._out, data) :]

    def preload(self) -> None:
        """Load the engine that jobs want unless they say otherwise, if it runs here."""
        if self._config.choice.provider in ("static", "torch"):
            self._embedder(self._config.choice).embed(["ready"], purpose="query")  # which no cache keeps

    def serve(self, command: Command) -> bool:
        """Carry out one command; False if this process should not take another."""
        structlog.contextvars.clear_contextvars()
        job_id, trace = (
            (command.job_id, command.trace) if isinstance(command, Check) else (command.job.job_id, command.job.trace)
        )
        structlog.contextvars.bind_contextvars(**job_context(job_id, trace))
        try:
            self.send(self._check(command) if isinstance(command, Check) else self._run(command))
        except DeviceFailed as error:
            self.send(Failed(error=job_error(error)))
            return False
        except ExportError as error:
            self.send(Failed(error=job_error(error)))
        except MemoryError:
            self._kept = None
            limit = self._config.memory_limit
            full = OutOfMemory(f"the job needs more than the {limit >> 20:,} MiB that a worker may use", limit=limit)
            self.send(Failed(error=job_error(full)))
            return False
        except Exception:
            log.exception("the command failed")
            unforeseen = ExportError("the worker failed in a way that nobody foresaw; its log has the story")
            self.send(Failed(error=job_error(unforeseen)))
            return False
        return True

    def _check(self, command: Check) -> Checked:
        self._kept = None
        started = time.perf_counter()
        request = read_payload(
            command.payload_ref,
            storage=self._storage,
            scratch=self._scratch,
            limits=self._config.limits,
            source=command.source,
        )
        self._kept = _Kept(command.job_id, request, time.perf_counter() - started)
        return Checked(
            session_id=request.session_id or "",
            project_name=request.project_name,
            nodes=len(request.nodes),
            relationships=len(request.relations),
            files=len(request.files),
            base_name=request.source.base_name,
            profile=request.options.profile,
            collection=request.options.collection or None,
        )

    def _run(self, command: Run) -> Done:
        job, kept = command.job, self._kept
        self._kept = None
        if kept is None or kept.job_id != job.job_id:
            kept = None
        storage = open_storage(self._config.storage, job.links) if job.links else self._storage

        def before_publish() -> None:
            if command.run is not None and not claim.holds(storage, job.output_prefix, command.run):
                raise Canceled("the attempt was closed while it ran")

        output = run_job(
            job,
            storage=storage,
            scratch=self._scratch / f"{job.job_id}-{job.attempt}",
            limits=self._config.limits,
            writer=self._config.writer,
            choose=self._choice,
            embedder=self._embedder,
            gate=self._gate,
            emit=self._report,
            should_stop=_never,
            before_publish=before_publish,
            generated_at=command.generated_at,
            request=kept.request if kept else None,
            read_seconds=kept.seconds if kept else 0.0,
        )
        return Done(output=output)

    def _choice(self, job: JobInput) -> Choice:
        engines = self._config.engines
        choice = choice_of(job, self._config.choice, ollama_host=engines.urls.get("ollama"))
        check_choice(choice, engines, runs_here=False, allowed=self._config.models)
        return choice

    def _embedder(self, choice: Choice) -> Embedder:
        check_choice(choice, self._config.engines, runs_here=True, allowed=self._config.models)
        if choice.mode == "runpod_gpu":  # CUDA reserves far more than it uses
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return self._engines.get(choice)

    def _report(self, progress: Progress) -> None:
        self.send(Reported(progress=progress))


def _never() -> None:
    """Who wants this process to stop ends it with a signal, which also reaches native code."""


def die_with_parent() -> None:
    """Let the kernel end this process when the thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _die_with(parent_pid: int) -> None:
    die_with_parent()
    if os.getppid() != parent_pid:
        os._exit(1)


def _read_commands(told: BinaryIO, commands: queue.SimpleQueue[Command]) -> None:
    decoder = msgspec.json.Decoder(Command)
    for line in told:
        commands.put(decoder.decode(line))
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    """Serve until the parent goes away."""
    told = open(0, "rb", closefd=False)  # noqa: SIM115 - sys.stdin's lock, held while it is read, aborts the end
    config = msgspec.json.decode(told.readline(), type=ChildConfig)
    _die_with(config.parent_pid)
    log_as_json()
    os.nice(NICE)
    out = os.dup(1)
    os.dup2(2, 1)
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=_read_commands, args=(told, commands), daemon=True).start()
    with Gate() as gate:
        # The parent watches what is in use; this stops what grows faster than it looks.
        most = config.memory_limit + config.memory_limit // 2
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
        child = Child(config, gate, out)
        if config.preload:
            try:
                child.preload()
            except ExportError as error:
                child.send(Failed(error=job_error(error)))
                return
        child.send(Ready())
        while child.serve(commands.get()):
            pass


if __name__ == "__main__":
    main()
