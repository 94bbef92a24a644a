"""Which child of a pool a job gets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from left_behind import child_pids
from small_job import config_of

from handler.pool import WorkerPool
from handler.process import ChildProcess


def test_a_job_gets_the_child_that_has_read_its_payload_and_leaves_those_of_others(tmp_path: Path) -> None:
    async def inside() -> None:
        pool = WorkerPool(config_of(tmp_path), 2)
        pool.start()
        try:
            async with asyncio.timeout(60):
                reader, other = await pool.acquire(), await pool.acquire()
                reader.kept_job = "read"
                await pool.release(reader, reuse=True)
                await pool.release(other, reuse=True)
                for job, wanted in (("new", other), ("read", reader), (None, other)):
                    child = await pool.acquire(job)
                    assert child is wanted, job
                    await pool.release(child, reuse=True)
                other.kept_job = "another"
                taken = await pool.acquire("another"), await pool.acquire("new")
                assert taken == (other, reader), "better one that holds another's payload than none"
        finally:
            await pool.close()

    asyncio.run(inside())


def test_a_child_that_was_started_elsewhere_is_taken_in_and_ended_with_the_pool(tmp_path: Path) -> None:
    async def inside() -> None:
        config = config_of(tmp_path)
        pool = WorkerPool(config, 1)
        ready = [pool.ready]
        child = await ChildProcess.start(config)
        await pool.adopt(child)
        ready.append(pool.ready)
        assert await pool.acquire() is child
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await pool.acquire()
        await pool.close()
        assert child.ended
        await pool.release(child, reuse=True)
        assert [*ready, pool.ready] == [False, True, False]

    asyncio.run(inside())


def test_a_pool_that_closes_while_children_start_leaves_none(tmp_path: Path) -> None:
    async def inside() -> None:
        others = set(child_pids())
        pool = WorkerPool(config_of(tmp_path), 2)
        pool.start()
        async with asyncio.timeout(60):
            while not set(child_pids()) - others:
                await asyncio.sleep(0.01)
        await pool.close()
        assert not set(child_pids()) - others

    asyncio.run(inside())
