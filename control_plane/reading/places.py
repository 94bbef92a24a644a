"""Which capsule a question is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import anyio

from common.errors import InvalidRequest
from control_plane.jobs.records import JobRecord
from control_plane.reading.tools import Locator, NotFound


class Jobs(Protocol):
    """Where exports are looked up; ``control_plane.jobs.store.JobStore`` is one."""

    async def get(self, job_id: str) -> JobRecord | None:
        """The job of that id."""
        ...

    async def page(self, *, status: Any, before: tuple[int, str] | None, limit: int) -> list[JobRecord]:
        """Jobs, newest first."""
        ...


class Places(Protocol):
    """What a locator can mean."""

    async def find(self, locator: Locator | None) -> Path | JobRecord:
        """The capsule file or the completed export that a locator means. Raises NotFound, InvalidRequest."""
        ...


class ExportPlaces:
    """The completed exports, the newest by default, and the capsules under a folder."""

    def __init__(self, jobs: Jobs, root: Path, *, external: bool) -> None:
        """Capsules outside ``root`` are found only where ``external``."""
        self._jobs = jobs
        self._root = root
        self._external = external

    async def find(self, locator: Locator | None) -> Path | JobRecord:
        """The capsule file or the completed export that a locator means. Raises NotFound, InvalidRequest."""
        if locator is not None and locator.capsule_path is not None:
            if locator.job_id is not None:
                raise InvalidRequest("locator: give jobId or capsulePath, not both", field="locator")
            return await anyio.to_thread.run_sync(self._inside, locator.capsule_path)
        if locator is not None and locator.job_id is not None:
            job = await self._jobs.get(locator.job_id)
            if job is None or job.status != "completed" or job.output is None:
                raise NotFound("There is no completed export of that jobId", field="locator.jobId")
        else:
            newest = await self._jobs.page(status="completed", before=None, limit=1)
            if not newest or newest[0].output is None:
                raise NotFound("There is no completed export yet; give a locator", field="locator")
            job = newest[0]
        return job

    def _inside(self, text: str) -> Path:
        path = Path(text)
        try:
            path = (path if path.is_absolute() else self._root / path).resolve()
            if not self._external and not path.is_relative_to(self._root.resolve()):
                raise InvalidRequest("locator.capsulePath: a file under the export root is needed", field="locator")
            if path.suffix != ".mv2" or not path.is_file():
                raise NotFound("There is no capsule at locator.capsulePath", field="locator.capsulePath")
        except (OSError, ValueError) as error:
            raise InvalidRequest("locator.capsulePath: not a path", field="locator.capsulePath") from error
        return path
