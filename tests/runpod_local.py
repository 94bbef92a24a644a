"""A local Runpod as a process of its own, and what a test asks of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

READY = "local Runpod listens on "
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


class Platform:
    """A running local Runpod."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, endpoint: str, key: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.api_base = f"{url}/v2"
        self.endpoint = endpoint
        self.key = key
        self._log = log
        self.client = httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=60)

    @property
    def log(self) -> str:
        """What it and its workers have said."""
        return self._log.read_text(errors="replace")

    def post(self, path: str, body: object = None, **params: object) -> httpx.Response:
        """``POST {endpoint}/{path}``."""
        return self.client.post(f"{self.api_base}/{self.endpoint}/{path}", json=body, params=params)

    def get(self, path: str) -> httpx.Response:
        """``GET {endpoint}/{path}``."""
        return self.client.get(f"{self.api_base}/{self.endpoint}/{path}")

    def run(self, input: object, **more: object) -> str:  # noqa: A002 - the platform's word
        """Submit a job, answer its id."""
        answer = self.post("run", {"input": input, **more})
        assert answer.status_code == 200, answer.text
        assert answer.json()["status"] == "IN_QUEUE"
        return str(answer.json()["id"])

    def status(self, job_id: str) -> dict[str, Any]:
        """The answer of ``/status``; ``{}`` for a job that is not known."""
        answer = self.get(f"status/{job_id}")
        assert answer.status_code in (200, 404), answer.text
        return dict(answer.json()) if answer.status_code == 200 else {}

    def wait(self, job_id: str, *statuses: str) -> dict[str, Any]:
        """Until the job has one of these statuses, or a final one where none is named."""
        return wait_for(lambda: self.status(job_id), lambda found: found.get("status") in (statuses or FINAL))

    def health(self) -> dict[str, Any]:
        """Counts of jobs and workers."""
        return dict(self.get("health").json())

    def fault(self, fault: str, **more: object) -> None:
        """Ask for a fault: ``count``, ``probability``, ``match``, ``route``, ``seconds``."""
        answer = self.client.post(f"{self.url}/faults", json={"fault": fault, **more})
        assert answer.status_code == 200, answer.text

    def struck(self) -> dict[str, int]:
        """How often each fault has struck."""
        return dict(self.client.get(f"{self.url}/faults").json()["struck"])

    def clear_faults(self) -> None:
        """No faults any more."""
        assert self.client.delete(f"{self.url}/faults").status_code == 200


@contextmanager
def local_runpod(
    *,
    workers: str = "0:2",
    env: Mapping[str, str] | None = None,
    worker_command: Sequence[object] | None = None,
    endpoint: str = "test-endpoint",
    key: str = "test-runpod-key",
    **config: object,
) -> Iterator[Platform]:
    """A local Runpod whose workers are ``worker_command`` (``memvid-export worker``), with ``env`` on top of this
    process's environment; ``config`` holds other fields of LocalConfig."""
    least, most = map(int, workers.split(":"))
    given = {
        "endpoint": endpoint,
        "key": key,
        "min_workers": least,
        "max_workers": most,
        "env": dict(env or {}),
        **config,
    }
    if worker_command is not None:
        given["worker_command"] = [str(word) for word in worker_command]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "local-runpod.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "handler.local", json.dumps(given)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        platform = None
        try:
            platform = Platform(process, _url(process, log), endpoint, key, log)
            yield platform
        finally:
            if platform is not None:
                platform.client.close()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            finally:
                process.kill()
                process.wait()


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    def said() -> str:
        text = log.read_text(errors="replace")
        if process.poll() is not None:
            raise RuntimeError(f"the local Runpod did not start:\n{text}")
        return text

    text = wait_for(said, lambda text: READY in text and "\n" in text.partition(READY)[2])
    return text.partition(READY)[2].partition("\n")[0].strip()


def wait_for(look: Callable[[], Any], enough: Callable[[Any], bool], *, seconds: float = 60.0) -> Any:
    """Look until it is enough; fails with what was last seen."""
    end = time.monotonic() + seconds
    while not enough(found := look()):
        assert time.monotonic() < end, f"not within {seconds:.0f} seconds; last seen: {found}"
        time.sleep(0.05)
    return found
