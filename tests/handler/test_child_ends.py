"""A child that fails in a way that nobody foresaw, and one that dies while it waits: neither takes another job."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest
from small_job import config_of, payload

from common.contract import JobInput
from common.errors import ExportError, WorkerLost
from handler.pool import WorkerPool
from handler.process import MAX_LINE, ChildProcess
from handler.protocol import Check, Checked, Run


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


def _say(pid: int, data: bytes) -> None:
    """Write where a child writes its messages: into the pipe that this process reads."""
    ours = {fd.readlink() for fd in Path("/proc/self/fd").iterdir() if fd.is_fifo()}
    (pipe,) = (fd for fd in Path(f"/proc/{pid}/fd").iterdir() if int(fd.name) > 2 and fd.readlink() in ours)
    with pipe.open("wb") as file:
        file.write(data)


@pytest.mark.parametrize(
    ("said", "killed", "reason"),
    [
        (b'{"type":"done","output":{"artif', True, "signal 9"),
        (b'{"type":"done"}\n', False, "no message"),
        (b"\xff\n", False, "no message"),
        (b"x" * (MAX_LINE + (1 << 20)), False, "no message"),
    ],
    ids=["half a line", "another message", "no text", "a line without measure"],
)
def test_a_child_that_says_what_is_no_message_has_ended(tmp_path: Path, said: bytes, killed: bool, reason: str) -> None:
    async def inside() -> None:
        child = await ChildProcess.start(config_of(tmp_path))
        try:
            await asyncio.to_thread(_say, child.pid, said)
            if killed:
                os.kill(child.pid, signal.SIGKILL)
            async with asyncio.timeout(60):
                for _ in range(2):
                    with pytest.raises(WorkerLost, match=reason):
                        await child.receive()
            assert child.ended
            assert not child.usable
        finally:
            await child.close()

    asyncio.run(inside())


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
