"""A job may stay in one stage for so long: then it ends, and says which stage it was."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from small_job import config_of

from common.contract import JobInput
from common.errors import DeadlineExceeded, ExportError
from handler.pool import WorkerPool
from handler.process import ChildProcess
from handler.protocol import Check, Checked, Done, Reported, Run
from handler.worker import JobRun, Worker


def _input(root: Path, nodes: int) -> dict[str, Any]:
    text = "\n".join(f"    value_{n} = compute_{n}(argument_{n})" for n in range(12))
    graph = {
        "sessionId": "s",
        "projectName": "p",
        "nodes": [
            {"id": f"n{n}", "label": "Function", "properties": {"name": f"call_{n}", "content": text}}
            for n in range(nodes)
        ],
        "relationships": [{"id": "e", "sourceId": "n0", "targetId": "n0", "type": "CALLS"}],
    }
    (root / "payload").write_text(json.dumps(graph))
    out = (root / "out").as_uri() + "/"
    return {"job_id": "job", "payload_ref": (root / "payload").as_uri(), "output_prefix": out}


def _with_child(root: Path, seconds: float, scenario: Callable[[ChildProcess], Awaitable[None]]) -> None:
    async def inside() -> None:
        child = await ChildProcess.start(config_of(root, stage_seconds=seconds))
        try:
            await scenario(child)
        finally:
            await child.close()

    asyncio.run(inside())


async def _end(child: ChildProcess) -> Done:
    while not isinstance(message := await child.receive(), Done):
        assert isinstance(message, Reported)
    return message


def _run(given: dict[str, Any]) -> Run:
    return Run(job=JobInput(**given), generated_at="2026-11-21T10:00:00.000Z")


def test_a_stage_that_takes_too_long_ends_the_job_and_is_named(tmp_path: Path) -> None:
    given = _input(tmp_path, 30_000)

    async def scenario(child: ChildProcess) -> None:
        await child.send(_run(given))
        with pytest.raises(DeadlineExceeded) as caught:
            await _end(child)
        stage = caught.value.details["stage"]
        assert stage in {"transform", "frame_prep", "write_capsule", "build_sidecar", "finalize"}
        assert caught.value.details["limit"] == 0.05
        assert f"the stage {stage} took longer than the 0.05 seconds" in caught.value.message
        assert not child.usable

    _with_child(tmp_path, 0.05, scenario)
    assert not (tmp_path / "out").exists()


def test_the_clock_runs_for_jobs_alone_and_starts_anew_with_each(tmp_path: Path) -> None:
    given = _input(tmp_path, 3)

    async def scenario(child: ChildProcess) -> None:
        for attempt in range(2):
            checks = Check(job_id="other", payload_ref=given["payload_ref"])
            await child.send(checks)
            assert isinstance(await child.receive(), Checked)
            await child.send(_run({**given, "output_prefix": f"{given['output_prefix']}{attempt}/"}))
            await _end(child)
            await child.send(_run({**given, "payload_ref": given["payload_ref"] + "-missing"}))
            with pytest.raises(ExportError):
                await _end(child)
            # Longer than a stage may take; no job runs, so nothing ends.
            await asyncio.sleep(2.2)
            assert child.usable

    _with_child(tmp_path, 2.0, scenario)


def test_the_runpod_worker_says_which_stage_it_was_and_leaves_nothing(tmp_path: Path) -> None:
    given = _input(tmp_path, 30_000)

    async def inside() -> dict[str, Any]:
        config = config_of(tmp_path, stage_seconds=0.05)
        pool = WorkerPool(config, 1)
        pool.start()
        worker = Worker(config.storage, Path(config.scratch), pool)
        try:
            return await worker.run(JobRun(given, lambda _progress: None))
        finally:
            await worker.close()

    error = json.loads(asyncio.run(inside())["error"])
    assert (error["code"], error["retryable"]) == ("DEADLINE_EXCEEDED", True)
    assert error["details"]["stage"] in error["message"]
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [name for name in left if ".mv2" in name], left
