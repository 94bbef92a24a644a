"""The worker's side of Runpod, as small as it can be, and a worker process that takes its jobs from there."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from processes import COMMAND, answering

POLL_SECONDS = 0.5
WAIT_SECONDS = 60


class Platform:
    """Hands jobs to whoever asks, and keeps what it is told."""

    def __init__(self) -> None:
        self.jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        self.stops: queue.Queue[str] = queue.Queue()
        self.told: list[tuple[str, dict[str, Any]]] = []
        """Job ids with progress and results, as they came."""
        self.asked: list[str] = []
        """Paths of the worker's requests."""
        self._news = threading.Condition()
        self._number = 0

    def submit(self, data: object) -> str:
        """Queue a job with this input, answer its id."""
        self._number += 1
        job_id = f"platform-{self._number}"
        self.jobs.put({"id": job_id, "input": data})
        return job_id

    def result(self, job_id: str) -> dict[str, Any]:
        """Wait for the result of a job."""
        return self._wait(lambda: self._of(job_id, progress=False), f"no result of {job_id}")[0]

    def progress(self, job_id: str) -> list[dict[str, Any]]:
        """Wait until a job told of its progress, answer all that it told."""
        return self._wait(lambda: self._of(job_id, progress=True), f"no progress of {job_id}")

    def all_of(self, job_id: str) -> list[dict[str, Any]]:
        """Progress and results so far."""
        return [body for of, body in self.told if of == job_id]

    def wait_for_requests(self, path: str, more: int = 1) -> None:
        """Wait until the worker has sent so many more requests whose path begins so."""

        def count() -> int:
            return sum(asked.startswith(path) for asked in self.asked)

        wanted = count() + more
        self._wait(lambda: count() >= wanted, f"the worker does not ask {path}")

    def heard(self, path: str, job_id: str | None = None, body: dict[str, Any] | None = None) -> None:
        """Keep a request."""
        with self._news:
            self.asked.append(path)
            if job_id is not None and body is not None:
                self.told.append((job_id, body))
            self._news.notify_all()

    def _of(self, job_id: str, *, progress: bool) -> list[dict[str, Any]]:
        return [body for body in self.all_of(job_id) if (body.get("status") == "IN_PROGRESS") == progress]

    def _wait(self, found: Any, problem: str) -> Any:
        with self._news:
            assert self._news.wait_for(found, WAIT_SECONDS), problem
            return found()


class _Requests(BaseHTTPRequestHandler):
    platform: Platform

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        kind = path.path.split("/")[1]
        self.platform.heard(f"/{kind}")
        if kind in ("job-take", "job-take-batch"):
            most = int(parse_qs(path.query).get("batch_size", ["1"])[0])
            jobs = _taken(self.platform.jobs, most)
            self._answer(jobs if kind == "job-take-batch" else jobs[0] if jobs else None)
        elif kind == "job-stop":
            stops = _taken(self.platform.stops, 100)
            self._answer({"jobsToStop": stops} if stops else None)
        else:
            self._answer({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        *_, kind, _worker, job_id = urlsplit(self.path).path.split("/")
        self.platform.heard(f"/{kind}", job_id, body)
        self._answer({})

    def _answer(self, body: object) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        try:
            self.send_response(204 if body is None else 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except ConnectionError:
            for job in body if isinstance(body, list) else []:  # the worker went away: another may take them
                self.platform.jobs.put(job)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def _taken(waiting: queue.Queue[Any], most: int) -> list[Any]:
    found: list[Any] = []
    try:
        found.append(waiting.get(timeout=POLL_SECONDS))
        while len(found) < most:
            found.append(waiting.get_nowait())
    except queue.Empty:
        pass
    return found


class Worker:
    """A process of ``memvid-export worker``."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, root: Path) -> None:
        self.process = process
        self.root = root
        self._log = log

    @property
    def log(self) -> str:
        """What it wrote."""
        return self._log.read_text(errors="replace")

    def processes(self) -> list[int]:
        """The processes that it has started."""
        return [pid for pid in _pids() if _parent(pid) == self.process.pid]

    def children(self) -> list[int]:
        """Those of them that run jobs."""
        return [pid for pid in self.processes() if "handler.child" in _command(pid)]

    def scratch(self) -> list[Path]:
        """What lies in its scratch folder."""
        return sorted(self.root.glob("workers/*/*"))

    def wait_until_ready(self) -> None:
        """Until it takes jobs."""
        for _ in range(WAIT_SECONDS * 20):
            if '"worker ready"' in self.log:
                return
            time.sleep(0.05)
        raise AssertionError(f"the worker does not start:\n{self.log}")

    def stop(self) -> int:
        """SIGTERM; answers the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


@contextmanager
def platform() -> Iterator[tuple[Platform, str]]:
    """A platform that is up, and its URL."""
    found = Platform()
    handler = type("Requests", (_Requests,), {"platform": found})
    with answering(handler) as url:
        yield found, url


@contextmanager
def worker(url: str, root: Path, env: Mapping[str, str] | None = None) -> Iterator[Worker]:
    """A worker of the platform at ``url`` with its files under ``root``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEMVID_", "RUNPOD_", "AWS_"))}
    given = {
        "MEMVID_EXPORT_ROOT": str(root),
        "MEMVID_EXPORT_STAGING_ROOT": str(root),
        "MEMVID_EXPORT_WORKER_MEMORY_BYTES": str(1 << 30),
        "RUNPOD_WEBHOOK_GET_JOB": f"{url}/job-take/$ID?gpu=none",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
        "RUNPOD_WEBHOOK_PING": f"{url}/ping/$RUNPOD_POD_ID",
        "RUNPOD_PING_INTERVAL": "1000",
        "RUNPOD_AI_API_KEY": "key",
        "RUNPOD_POD_ID": "worker1",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
    }
    root.mkdir(parents=True, exist_ok=True)
    number = len(list(root.parent.glob(f"{root.name}.*.log")))
    log = root.with_name(f"{root.name}.{number}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, COMMAND, "worker"],
            env={**kept, **given, **(env or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=root,
        )
    try:
        yield Worker(process, log, root)
    finally:
        process.kill()
        process.wait()


def group(pid: int) -> list[int]:
    """The processes of a process group that have not ended."""
    return [found for found in _pids() if (stat := _stat(found)) and stat[2] == str(pid) and stat[0] != "Z"]


def gone(pids: list[int]) -> bool:
    """Whether all these processes end."""
    for _ in range(200):
        if all(_stat(pid)[:1] in ([], ["Z"]) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _parent(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def _stat(pid: int) -> list[str]:
    """State, parent, group, … of a process; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
