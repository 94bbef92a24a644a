"""``serve --dev --runpod-local``: a local Runpod with its workers beside the server, ended with it."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from common.errors import InvalidSettings, WorkerLost
from common.settings import Settings

WORKERS = (1, 2)
"""One is kept warm, as long as the server runs."""
POLL_SECONDS = "1"
STOP_SECONDS = 15
LISTENS = "local Runpod listens on "


@contextmanager
def local_platform(env: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Start it; gives the environment with which the server drives it. Its workers read and write the server's root.

    Raises InvalidSettings, WorkerLost if it does not come up.
    """
    try:
        from handler.local import LocalConfig
    except ImportError as error:
        raise InvalidSettings("--runpod-local needs the worker extra: pip install 'memvid-export[worker]'") from error
    key = secrets.token_urlsafe(16)
    settings = Settings.read({**env, "MEMVID_EXPORT_BACKEND_MODE": "legacy_vps"}, dev=True)
    roots = {
        "MEMVID_EXPORT_ROOT": str(settings.root),
        "MEMVID_EXPORT_STAGING_ROOT": str(settings.staging_root),
    }
    config = LocalConfig(key=key, min_workers=WORKERS[0], max_workers=WORKERS[1], env=roots)
    process = subprocess.Popen(
        [
            sys.executable,
            str(Path(__file__).parents[1] / "handler" / "local" / "guard.py"),
            "start",
            str(os.getpid()),
            sys.executable,
            "-m",
            "handler.local",
            msgspec.json.encode(config).decode(),
        ],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=dict(env),
        text=True,
    )
    assert process.stderr is not None
    passing = threading.Thread(target=_pass_on, args=(process.stderr,), daemon=True)
    try:
        url = _listening(process.stderr)
        passing.start()
        driven = {
            **env,
            "MEMVID_EXPORT_BACKEND_MODE": "runpod_queue",
            "RUNPOD_API_BASE": f"{url}/v2",
            "RUNPOD_ENDPOINT_ID": config.endpoint,
            "RUNPOD_API_KEY": key,
        }
        driven.setdefault("RUNPOD_POLL_INTERVAL_SECONDS", POLL_SECONDS)
        if settings.port:
            driven.setdefault("MEMVID_EXPORT_PUBLIC_URL", f"http://127.0.0.1:{settings.port}")
        yield driven
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if passing.ident is not None:
            passing.join(STOP_SECONDS)
        process.stderr.close()


def _listening(log: IO[str]) -> str:
    for line in log:
        sys.stderr.write(line)
        if line.startswith(LISTENS):
            return line.removeprefix(LISTENS).strip()
    raise WorkerLost("the local Runpod did not start; its log has the reason")


def _pass_on(log: IO[str]) -> None:
    for line in log:
        sys.stderr.write(line)
