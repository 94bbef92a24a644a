"""A worker with the unmodified runpod package; the job's input says what it does."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import runpod


def _note(line: str) -> None:
    with Path(os.environ["NOTES"]).open("a") as notes:
        notes.write(f"{os.environ['RUNPOD_POD_ID']} {line}\n")


async def handler(job: dict[str, Any]) -> Any:
    """Do what ``input.do`` says."""
    given = job["input"]
    do = given["do"]
    _note(f"started {job['id']}")
    if do == "echo":
        return {"echo": given.get("value"), "s3": job.get("s3Config"), "env": os.environ.get("GIVEN")}
    if do == "text":
        return "x" * given["size"]
    if do == "nothing":
        return {}
    if do == "fail":
        return {"error": json.dumps({"code": "GATE_FAILED"})}
    if do == "raise":
        raise ValueError("as asked")
    if do == "refresh":
        return {"done": True, "refresh_worker": True}
    if do == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "crash once" and not Path(given["mark"]).exists():
        Path(given["mark"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "mute":
        for process in multiprocessing.active_children():
            process.kill()
        do = "slow"
    if do == "deaf":
        time.sleep(given["seconds"])
    if do == "progress":
        for step in range(given["steps"]):
            runpod.serverless.progress_update(job, {"step": step})
            await asyncio.sleep(given["gap"])
    if do == "slow":
        try:
            await asyncio.sleep(given["seconds"])
        except asyncio.CancelledError:
            _note(f"stopped {job['id']}")
            raise
    return {"done": do}


runpod.serverless.start({
    "handler": handler,
    "concurrency_modifier": lambda _: int(os.environ.get("CONCURRENCY", "1")),
})  # fmt: skip
