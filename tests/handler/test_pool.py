"""A pool of child processes on a machine that is short of something for a while."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path

from small_job import config_of

from handler.pool import WorkerPool


def test_children_come_up_once_the_machine_has_files_again_that_they_may_open(tmp_path: Path) -> None:
    config = config_of(tmp_path)

    async def inside() -> None:
        pool = WorkerPool(config, 1)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208 - numbers, not paths
        spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, limits[1]))
        try:
            pool.start()
            await asyncio.sleep(0.3)
            assert not pool.ready
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for handle in spare:
                os.close(handle)
        try:
            async with asyncio.timeout(60):
                child = await pool.acquire()
            await pool.release(child, reuse=True)
            assert pool.ready
        finally:
            await pool.close()

    asyncio.run(inside())
