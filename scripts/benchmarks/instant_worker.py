"""A Runpod worker that takes no time: it publishes files that were made before, and notes when it was done.

``FILES``: a folder with a capsule, its sidecar and its manifest; ``DONE``: where lines ``job id, time`` go, in seconds.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import runpod

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.settings import WorkerSettings
from common.storage import open_storage
from handler.job import MANIFEST_ENDING, published

FILES = sorted(Path(os.environ["FILES"]).iterdir(), key=lambda path: path.name.endswith(MANIFEST_ENDING))
STORAGE = open_storage(WorkerSettings.read(os.environ).storage())


def _publish(given: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for path in FILES:  # a store of files takes what it is given away
            STORAGE.put(Path(shutil.copy(path, folder)), given["output_prefix"] + path.name)
    output = msgspec.to_builtins(published(STORAGE, given["output_prefix"], given["job_id"]).output)
    with Path(os.environ["DONE"]).open("a") as done:
        done.write(f"{given['job_id']} {time.time()}\n")
    return output


async def handler(job: dict[str, Any]) -> Any:
    """Publish and answer."""
    return await asyncio.to_thread(_publish, job["input"])


runpod.serverless.start({"handler": handler})
