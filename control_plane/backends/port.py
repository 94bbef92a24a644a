"""The compute port: where queued jobs are run."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from common.settings import Settings
from common.storage import Storage
from control_plane.jobs.layout import Layout
from control_plane.jobs.store import JobStore
from control_plane.operations.metrics import Metrics


class Means(NamedTuple):
    """What every backend works with."""

    settings: Settings
    store: JobStore
    storage: Storage
    layout: Layout
    metrics: Metrics


@runtime_checkable
class Backend(Protocol):
    """Takes queued jobs from the store and brings them to an end."""

    name: str

    async def start(self) -> None:
        """Take up what an earlier server left, then take jobs."""
        ...

    async def stop(self) -> None:
        """Stop taking jobs; those that run go back to the queue."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why no job can be run now; None where a worker takes one now, or as soon as the running ones end."""
        ...

    def wake(self, job_id: str | None = None) -> None:
        """There is a new job in the queue, or something may be new about a job."""
        ...

    async def cancel(self, job_id: str) -> None:
        """Stop the work on a job that was canceled and remove what it left; returns when nothing of it runs."""
        ...
