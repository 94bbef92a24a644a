"""A child that fails in a way that nobody foresaw, and one that dies while it waits: neither takes another job."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import msgspec
import pytest

from common.contract import JobInput
from common.errors import ExportError
from common.graph.model import GraphLimits
from common.storage import StorageConfig
from handler.pool import WorkerPool
from handler.process import ChildProcess
from handler.protocol import Check, Checked, ChildConfig, Run

GRAPH = {
    "sessionId": "s",
    "projectName": "p",
    "nodes": [{"id": "a", "label": "Function", "properties": {"name": "first"}}],
    "relationships": [{"id": "e", "sourceId": "a", "targetId": "a", "type": "CALLS", "confidence": 1.0}],
}


def config_of(root: Path) -> ChildConfig:
    return ChildConfig(
        parent_pid=os.getpid(),
        storage=StorageConfig(roots=[str(root)]),
        scratch=str(root / "scratch"),
        writer=None,
        memory_limit=4 << 30,
        limits=GraphLimits(),
    )


def payload(root: Path) -> str:
    path = root / "payload"
    path.write_text(json.dumps(GRAPH))
    return path.as_uri()


async def to_the_end(child: ChildProcess) -> None:
    """Take messages until there are no more."""
    while True:
        await child.receive()


def test_what_nobody_foresaw_fails_the_job_and_ends_the_child(tmp_path: Path) -> None:
    ref = payload(tmp_path)
    job = JobInput(job_id="job", payload_ref=ref, output_prefix=(tmp_path / "out").as_uri() + "/")

    async def inside() -> None:
        # No path has a NUL in it, and nothing of the child's asks whether one has.
        config = msgspec.structs.replace(config_of(tmp_path), scratch=f"{tmp_path}/a\x00b")
        child = await ChildProcess.start(config)
        try:
            await child.send(Run(job=job, generated_at="2026-11-21T10:00:00.000Z"))
            with pytest.raises(ExportError, match="nobody foresaw") as caught:
                await to_the_end(child)
            assert caught.value.code == "INTERNAL"
            assert not child.usable
            with pytest.raises(ExportError, match="nobody foresaw"):
                await to_the_end(child)
            assert child.ended
        finally:
            await child.close()

    asyncio.run(inside())
    assert not (tmp_path / "out").exists()


def test_a_child_that_dies_while_it_waits_is_replaced_before_the_next_job(tmp_path: Path) -> None:
    ref = payload(tmp_path)

    async def inside() -> None:
        pool = WorkerPool(config_of(tmp_path), 1)
        pool.start()
        try:
            first = await pool.acquire()
            await pool.release(first, reuse=True)
            os.kill(first.pid, signal.SIGKILL)
            while not first.ended:
                await asyncio.sleep(0.01)
            assert not pool.ready
            second = await pool.acquire()
            assert second.pid != first.pid
            await second.send(Check(job_id="job", payload_ref=ref))
            answer = await second.receive()
            assert isinstance(answer, Checked)
            assert answer.nodes == 1
            await pool.release(second, reuse=False)
            assert not Path(f"/proc/{second.pid}").exists()
            third = await pool.acquire()
            assert third.pid not in (first.pid, second.pid)
        finally:
            await pool.close()

    asyncio.run(inside())
