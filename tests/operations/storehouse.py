"""A job store and a storage with finished exports, without a server: what its loops look after."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import beside
import pytest
from live_server import graph
from sqlalchemy import insert, select, update
from worker_run import run_here

from common.contract import JobInput
from common.settings import Settings
from common.storage import FileStorage
from control_plane.jobs.database import Database
from control_plane.jobs.hub import EventHub
from control_plane.jobs.layout import Layout
from control_plane.jobs.records import JobRecord
from control_plane.jobs.store import JobStore
from control_plane.jobs.tables import jobs
from control_plane.operations.metrics import Metrics
from control_plane.operations.recovery import Recovery


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what an export published."""
    root = tmp_path_factory.mktemp("exported")
    (root / "payload").write_text(json.dumps(graph(name="stored")))
    prefix = (root / "1").as_uri() + "/"
    job = JobInput(job_id="job", payload_ref=(root / "payload").as_uri(), output_prefix=prefix)
    run_here(job, FileStorage([root]), root / "scratch")
    return root / "1"


class Storehouse:
    """The parts that the loops of a server share."""

    def __init__(self, root: Path, exported: Path | None, database: Database, settings: Settings) -> None:
        self._exported = exported
        self._database = database
        self._file = root / "jobs.sqlite"
        self.settings = settings
        self.layout = Layout(settings)
        os.close(self.layout.prepare())
        self.storage = FileStorage([self.layout.artifacts, self.layout.payloads])
        self.store = JobStore(database, EventHub(), queue_capacity=100)
        self.metrics = Metrics()

    def stored(self, job_id: str | None = None, *, attempt: int = 1, age: float = 0.0) -> Path:
        """The folder of an export that lies in storage since ``age`` seconds; no record knows of it."""
        assert self._exported is not None
        folder = self.layout.artifacts / (job_id or str(uuid.uuid4())) / str(attempt)
        shutil.copytree(self._exported, folder)
        self.age(folder, age)
        return folder

    def age(self, folder: Path, seconds: float) -> None:
        """Let files seem to lie there for so long."""
        written = time.time() - seconds
        for path in folder.iterdir():
            os.utime(path, (written, written))

    async def finished(self) -> tuple[str, Path]:
        """The id and the folder of an export that has its record too."""
        folder = self.stored()
        await Recovery(self.settings, self.store, self.storage, self.layout).all()
        return folder.parent.name, folder

    async def job(self, job_id: str) -> JobRecord:
        """The record."""
        found = await self.store.get(job_id)
        assert found is not None
        return found

    async def put(self, job_id: str, **columns: Any) -> None:
        """Give a record these columns."""
        async with self._database.write.begin() as connection:
            await connection.execute(update(jobs).where(jobs.c.id == job_id).values(**columns))

    async def many_like(self, job_id: str, count: int) -> None:
        """So many more records like one."""
        async with self._database.write.begin() as connection:
            row = (await connection.execute(select(jobs).where(jobs.c.id == job_id))).one()
            rows = [{**row._mapping, "id": str(uuid.uuid4())} for _ in range(count)]
            await connection.execute(insert(jobs), rows)

    async def change(self, statement: str) -> None:
        """Change the database from beside."""
        await beside.change(self._file, statement)

    def change_at_once(self, statement: str) -> None:
        """The same before any other task goes on; on the loop's own thread only where no transaction is open."""
        beside.execute(self._file, statement)

    def metric(self, name: str) -> float:
        """The sum of a figure's lines that begin so."""
        lines = self.metrics.text(None, streams=0, free={}, troubles={}).decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@asynccontextmanager
async def storehouse(root: Path, exported: Path | None = None, **settings: object) -> AsyncIterator[Storehouse]:
    """An empty one over a folder; ``exported`` is what its exports are copies of, ``settings`` are those of
    ``MEMVID_EXPORT_…``."""
    given = {f"MEMVID_EXPORT_{name.upper()}": str(value) for name, value in settings.items()}
    root.mkdir()
    database = Database(f"sqlite+aiosqlite:///{root / 'jobs.sqlite'}")
    await database.migrate()
    try:
        yield Storehouse(root, exported, database, Settings.read({"MEMVID_EXPORT_ROOT": str(root), **given}, dev=True))
    finally:
        await database.close()
