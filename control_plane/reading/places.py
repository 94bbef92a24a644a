"""Which capsule a question is about."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import anyio

from common.errors import InvalidRequest
from control_plane.jobs.audit import AuditEntry
from control_plane.jobs.records import JobRecord
from control_plane.operations.keys import Caller
from control_plane.reading.tools import Locator, NotFound

KNOWN_SECONDS = 1.0
"""For so long an export that was found is not looked up again, unless a job has ended meanwhile."""
MAX_KNOWN = 256
NEWEST = 10
"""Exports among which the newest is looked for whose files are whole."""


class Jobs(Protocol):
    """Where exports are looked up; ``control_plane.jobs.store.JobStore`` is one."""

    @property
    def changes(self) -> int:
        """Grows with every job that ends or expires, as far as this process hears of it."""
        ...

    async def get(self, job_id: str) -> JobRecord | None:
        """The job of that id."""
        ...

    async def page(
        self, *, status: Any, before: tuple[int, str] | None, limit: int, client: str | None = None
    ) -> list[JobRecord]:
        """Jobs (of one client), newest first."""
        ...


class Places(Protocol):
    """What a locator can mean."""

    async def find(self, locator: Locator | None, caller: Caller) -> Path | JobRecord:
        """The capsule file or the completed export that a locator of ``caller`` means. Raises NotFound,
        InvalidRequest."""
        ...


class ExportPlaces:
    """The completed exports, the newest by default, and the capsules under a folder."""

    def __init__(self, jobs: Jobs, root: Path, *, external: bool, note: Callable[[AuditEntry], None]) -> None:
        """Capsules outside ``root`` are found only where ``external``; ``note`` hears whose exports are read."""
        self._jobs = jobs
        self._root = root
        self._external = external
        self._note = note
        self._found: dict[tuple[str | None, str | None], tuple[JobRecord, int, float]] = {}

    async def find(self, locator: Locator | None, caller: Caller) -> Path | JobRecord:
        """The capsule file or the completed export that a locator of ``caller`` means. Raises NotFound,
        InvalidRequest. Files belong to no client: who does not see all jobs names none of them."""
        if locator is not None and locator.capsule_path is not None:
            if locator.job_id is not None:
                raise InvalidRequest("locator: give jobId or capsulePath, not both", field="locator")
            if not caller.sees_all:
                raise InvalidRequest(
                    "locator.capsulePath: only a key with the scope admin names files; give a jobId", field="locator"
                )
            return await anyio.to_thread.run_sync(self._inside, locator.capsule_path)
        job_id = locator.job_id if locator is not None else None
        asked = (caller.only, job_id)  # what was found for one client is not looked at for another
        changes, now = self._jobs.changes, time.monotonic()
        found, then, until = self._found.get(asked, (None, -1, 0.0))
        if found is None or then != changes or now >= until:
            found = await self._find(job_id, caller)
            while len(self._found) >= MAX_KNOWN:
                del self._found[next(iter(self._found))]
            self._found[asked] = found, changes, now + KNOWN_SECONDS
        self._note(caller.did("export.search", found.id))
        return found

    async def _find(self, job_id: str | None, caller: Caller) -> JobRecord:
        if job_id is not None:
            job = await self._jobs.get(job_id)
            if job is None or not caller.sees(job.client) or job.status != "completed" or job.output is None:
                raise NotFound("There is no export of that jobId whose files are there", field="locator.jobId")
            if job.damage is not None:
                message = f"The files of this export cannot be read: {job.damage}"
                raise NotFound(message, field="locator.jobId")
            return job
        newest = await self._jobs.page(status="completed", before=None, limit=NEWEST, client=caller.only)
        whole = next((job for job in newest if job.output is not None and job.damage is None), None)
        if whole is None:
            raise NotFound("There is no completed export yet; give a locator", field="locator")
        return whole

    def _inside(self, text: str) -> Path:
        path = Path(text)
        try:
            path = Path(os.path.realpath(path if path.is_absolute() else self._root / path))
            if not self._external and not path.is_relative_to(self._root.resolve()):
                raise InvalidRequest("locator.capsulePath: a file under the export root is needed", field="locator")
            if path.suffix != ".mv2" or not path.is_file():
                raise NotFound("There is no capsule at locator.capsulePath", field="locator.capsulePath")
        except (OSError, ValueError) as error:
            raise InvalidRequest("locator.capsulePath: not a path", field="locator.capsulePath") from error
        return path
