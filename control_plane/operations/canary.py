"""A small synthetic graph through the whole path, over HTTP: so that a defect is found before users do.

``memvid-export canary`` is the code; the schedule of a server runs that command as a process of its own, against the
server's own address, so that a canary that hangs or crashes is only ended, and never in anybody's way.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
import structlog

from common.contract import Wire
from common.errors import DeadlineExceeded, ExportError, GateFailed
from control_plane.client import ExportClient
from control_plane.operations.metrics import Metrics

log = structlog.get_logger()

SECONDS = 120.0
"""A canary is ended after so long."""
RUNPOD_SECONDS = 600.0
"""The same where a worker may have to be started first."""
GRACE_SECONDS = 15.0
"""The process of a canary starts, and ends by itself after its time, within so long beside it; then it is killed."""
REFUSALS = frozenset({"QUEUE_UNAVAILABLE", "RATE_LIMITED"})
"""What a server that is full or short of disk answers: it works as it should."""
FUNCTIONS = 300
PER_FILE = 25
AGAIN_SECONDS = 0.2
"""Between two questions while the index is being opened."""
MAX_ANSWER_BYTES = 1 << 20

Outcome = Literal["ok", "refused", "failed", "timeout"]


class Step(Wire, kw_only=True):
    """A part of the path."""

    name: str
    seconds: float
    detail: str


class CanaryRun(Wire, kw_only=True):
    """How a canary went."""

    outcome: Outcome
    seconds: float
    job_id: str | None = None
    step: str | None = None
    """The one that failed."""
    message: str = ""
    steps: list[Step] = msgspec.field(default_factory=list)
    """Those that went well."""


class _Path:
    """The steps of one canary."""

    def __init__(self, tell: Callable[[Step], None]) -> None:
        self._tell = tell
        self.begun = time.perf_counter()
        self.steps: list[Step] = []
        self.now = "start"
        self.job_id: str | None = None

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[str], None]]:
        """A part of the path; what it is told is shown with it."""
        self.now, started, said = name, time.perf_counter(), ""

        def say(detail: str) -> None:
            nonlocal said
            said = detail

        yield say
        self.steps.append(Step(name=name, seconds=round(time.perf_counter() - started, 3), detail=said))
        self._tell(self.steps[-1])

    def ended(self, outcome: Outcome, message: str = "") -> CanaryRun:
        """The result as things stand."""
        return CanaryRun(
            outcome=outcome,
            seconds=round(time.perf_counter() - self.begun, 3),
            job_id=self.job_id,
            step=None if outcome == "ok" else self.now,
            message=message,
            steps=self.steps,
        )


def fly(url: str, key: str | None, word: str, *, semantic: bool, tell: Callable[[Step], None]) -> CanaryRun:
    """Send a graph with a symbol named after ``word`` (letters, never used before) through a server, and ask for it.

    Raises nothing that is foreseen: what goes wrong is in the answer. DeadlineExceeded, which whoever bounds it raises
    from outside, is a ``timeout``.
    """
    path = _Path(tell)
    try:
        with tempfile.TemporaryDirectory(prefix="memvid-canary-") as folder, ExportClient(url, key, tries=1) as client:
            try:
                _fly(path, client, Path(folder), word, semantic=semantic)
            except BaseException:
                if path.job_id is not None and path.now == "export":
                    client.cancel(path.job_id)  # nobody waits for it any more
                raise
    except DeadlineExceeded as error:
        return path.ended("timeout", error.message)
    except ExportError as error:
        refused = path.now == "post" and error.details.get("answered") in REFUSALS
        return path.ended("refused" if refused else "failed", error.message)
    return path.ended("ok")


def _fly(path: _Path, client: ExportClient, folder: Path, word: str, *, semantic: bool) -> None:
    planted = f"canary_{word}"
    with path.step("post") as say:
        graph = folder / "canary.json"
        graph.write_text(json.dumps(graph_of(word, semantic=semantic)))
        path.job_id = client.submit(graph, lambda _done, _total: None).job_id
        say(f"job {path.job_id}")
    with path.step("export") as say:
        seen = [event.type for event in client.events(path.job_id)]
        job = client.job(path.job_id)
        if job.status != "completed":
            why = f"{job.error.code}: {job.error.message}" if job.error else job.message
            raise GateFailed(f"the export ended as {job.status}: {why}")
        say(f"{len(seen)} events, {job.message}")
    with path.step("download") as say:
        # Each file is compared with the manifest's hash and with Content-Digest while it comes.
        files = client.fetch(path.job_id, folder, lambda _name: lambda _got, _size: None)
        say(f"{len(files)} files, {sum(file.stat().st_size for file in files):,} bytes, hashes as announced")
    with path.step("verify") as say:
        from control_plane.reading.inspect import verify

        checks = list(verify(files[0]))
        if wrong := [f"{check.name}: {check.detail}" for check in checks if not check.ok]:
            raise GateFailed("; ".join(wrong))
        say(f"{len(checks)} checks")
    with path.step("search") as say:
        mode = "semantic" if semantic else "lexical"
        answer = _patiently(lambda: client.search(str(path.job_id), planted, mode=mode))
        _expect(planted, [hit.name for hit in answer.hits])
        say(f"{mode}, {len(answer.hits)} hits")
    with path.step("mcp") as say:
        arguments = {"query": planted, "limit": 5, "locator": {"jobId": path.job_id}}
        envelope = _patiently(lambda: client.ask("symbol_lookup", arguments))
        items = envelope.get("result", {}).get("items", [])
        _expect(planted, [str(item.get("name")) for item in items])
        say(f"symbol_lookup, {len(items)} items")


def _patiently(ask: Callable[[], Any]) -> Any:
    """What is answered once the capsule's index is open; whoever bounds the canary bounds this too."""
    while True:
        try:
            return ask()
        except ExportError as error:
            if error.details.get("answered") != "INDEX_BUILD_IN_PROGRESS":
                raise
        time.sleep(AGAIN_SECONDS)


def _expect(planted: str, names: list[str]) -> None:
    if planted not in names:
        raise GateFailed(f"{planted} is in the graph and was not found; found: {', '.join(names) or 'nothing'}")


def graph_of(word: str, *, semantic: bool) -> dict[str, Any]:
    """A graph of files, functions that call each other, and one symbol that no graph before had."""
    nodes: list[dict[str, Any]] = []
    edges: list[dict[str, Any]] = []
    for number in range(FUNCTIONS):
        file = f"src/part_{number // PER_FILE:02}.py"
        if number % PER_FILE == 0:
            nodes.append({"id": f"File:{file}", "label": "File", "properties": {"name": file[4:], "filePath": file}})
        name = f"canary_{word}" if number == 0 else f"canary_part_{number:03}"
        following = (number + 1) % FUNCTIONS
        node = f"Function:{number:03}"
        content = f"def {name}():\n    return canary_part_{following:03}()"
        nodes.append(
            {"id": node, "label": "Function", "properties": {"name": name, "filePath": file, "content": content}}
        )
        for kind, source, target in (("DEFINES", f"File:{file}", node), ("CALLS", node, f"Function:{following:03}")):
            edges.append({"id": f"{kind}:{number}", "sourceId": source, "targetId": target, "type": kind})
    return {
        "sessionId": f"canary-{word}",
        "projectName": "canary",
        "source": {"type": "canary", "baseName": "canary"},
        "nodes": nodes,
        "relationships": edges,
        "fileContents": {},
        "options": {"semanticEnabled": semantic},
    }


class Canary:
    """The schedule of a server: flies one after the other, and says how the last one went."""

    def __init__(self, every: float, metrics: Metrics, *, key: str, seconds: float) -> None:
        """One begins ``every`` seconds after the last one ended, and may take ``seconds``. ``key`` is the server's
        own."""
        self._every = every
        self._metrics = metrics
        self._key = key
        self._seconds = seconds
        self._url = ""
        self._listening = asyncio.Event()
        self._last: CanaryRun | None = None
        self._ended = 0.0

    def listens(self, host: str, port: int) -> None:
        """The server takes requests there; the first address that is told counts."""
        if not self._url:
            # Where it listens on all addresses, the machine's own is one of them.
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
            self._url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            self._listening.set()

    @property
    def detail(self) -> str:
        """How the last one went, in words."""
        run = self._last
        if run is None:
            return "none has ended yet"
        ago = f"{time.monotonic() - self._ended:.0f} s ago"
        if run.outcome == "ok":
            return f"ok {ago}, took {run.seconds:.1f} s"
        return f"{run.outcome} {ago} at {run.step}: {run.message}"

    async def run(self) -> None:
        """Fly until canceled."""
        await self._listening.wait()
        while True:
            run = await self._fly(self._url)
            self._last, self._ended = run, time.monotonic()
            self._metrics.canary.labels(run.outcome).inc()
            if run.outcome == "ok":
                self._metrics.canary_seconds.observe(run.seconds)
                self._metrics.canary_success.set_to_current_time()
                log.info("canary came through", job_id=run.job_id, seconds=run.seconds)
            else:
                log.error(
                    "canary did not come through",
                    outcome=run.outcome,
                    step=run.step,
                    job_id=run.job_id,
                    reason=run.message,
                )
            # Replicas that were started together do not stay together.
            await asyncio.sleep(self._every * random.uniform(0.9, 1.1))  # noqa: S311

    async def _fly(self, url: str) -> CanaryRun:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEMVID_", "OTEL_"))}
        began = time.monotonic()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                "from control_plane.cli import main; main()",
                *("canary", "--url", url, "--timeout", f"{self._seconds:g}", "--json"),
                env={**kept, "MEMVID_EXPORT_API_KEY": self._key},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                limit=MAX_ANSWER_BYTES,
                start_new_session=True,
            )
        except (OSError, RuntimeError) as error:  # no file handle, process, memory, or thread that waits for it
            seconds = round(time.monotonic() - began, 3)
            return CanaryRun(outcome="failed", seconds=seconds, step="process", message=f"it did not start: {error}")
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._seconds + GRACE_SECONDS):
                said = await process.stdout.readline()
                await process.wait()
            return msgspec.json.decode(said, type=CanaryRun)
        except TimeoutError:
            outcome: Outcome = "timeout"
            message = f"it did not end within {self._seconds:g} seconds"
        except (msgspec.DecodeError, ValueError):
            outcome, message = "failed", f"its process ended with {process.returncode} and said nothing of use"
        finally:
            if process.returncode is None:
                _end_group(process.pid)
                await process.wait()
        return CanaryRun(outcome=outcome, seconds=round(time.monotonic() - began, 3), step="process", message=message)


def _end_group(pid: int) -> None:
    with suppress(ProcessLookupError):  # it ended by itself just now
        os.killpg(pid, signal.SIGKILL)
