"""A worker with the unmodified runpod package that exports nothing: the payload's project name says what it does.

``hang``: until it is stopped; ``crash``; ``nothing``: no output; ``odd``: an output that names files that are not
there; ``shout``: an error that is no error of ours; ``CODE``: that error; ``CODE once``: at the first attempt, then
nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import runpod

RETRYABLE = {"STORAGE_FAILED", "GATE_FAILED", "WRITER_FAILED"}


def _note(what: str, job: dict[str, Any]) -> None:
    with Path(os.environ["NOTES"]).open("a") as notes:
        notes.write(json.dumps({"what": what, "webhook": job.get("webhook"), "input": job["input"]}) + "\n")


async def handler(job: dict[str, Any]) -> Any:
    """Do what the payload says."""
    given = job["input"]
    do = json.loads(Path(unquote(urlsplit(given["payload_ref"]).path)).read_text())["projectName"]
    _note("started", job)
    if do == "hang":
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            _note("stopped", job)
            raise
    if do == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "odd":
        prefix = given["output_prefix"]
        refs = {name: f"{prefix}{name}" for name in ("artifact_ref", "sidecar_ref", "manifest_ref")}
        return {**refs, "sha256": "0" * 64, "size_bytes": 1, "metrics": {}, "schema_version": given["schema_version"]}
    if do == "shout":
        return {"error": "Traceback (most recent call last): something broke"}
    code, _, once = do.partition(" ")
    if code.isupper() and not (once and given["attempt"] > 1):
        details = {"message": "of a class of its own", "self": 1}
        error = {"code": code, "message": f"{code} as asked", "retryable": code in RETRYABLE, "details": details}
        return {"error": json.dumps(error)}
    return None


runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda _: 4})
