"""The disks that exports are written to: below the floor nothing new begins, so that what runs can end."""

from __future__ import annotations

import os
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from common.settings import Settings
from control_plane.errors import QueueUnavailable
from control_plane.operations.metrics import Metrics

LOOK_SECONDS = 1.0
"""The disks are looked at so often at most."""
RETRY_SECONDS = 30
"""What a refused client is told to wait."""


class Disk:
    """Free bytes of the export root, the staging root, and the storage's folder where it is one.

    Safe for several threads, and best asked in one: a disk over a network may not answer at once.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._floor = settings.disk_floor_bytes
        self._metrics = metrics
        self._folders = {"root": settings.root, "staging": settings.staging_root}
        storage = urlsplit(settings.storage_url)
        if storage.scheme == "file":
            self._folders["storage"] = Path(unquote(storage.path))
        self._looked = float("-inf")
        self._free: dict[str, int] = {}
        self._problem: str | None = None

    @property
    def free(self) -> dict[str, int]:
        """Free bytes by folder, as the disks said when they were last asked."""
        return dict(self._free)

    @property
    def trouble(self) -> str | None:
        """Why no export can begin; None where there is room."""
        free = self._look()
        if self._problem is not None:
            return self._problem
        least = min(free, key=lambda name: free[name])
        if free[least] >= self._floor:
            return None
        return f"{free[least]:,} bytes are free on the disk of {least}, {self._floor:,} must stay free"

    def check(self, coming: int = 0) -> None:
        """Raise QueueUnavailable where a disk has less free than its floor, or would have after ``coming`` bytes."""
        free = self._look()
        least = min(free.values(), default=0)
        if self._problem is None and least - coming >= self._floor:
            return
        self._metrics.refused.labels("disk").inc()
        raise QueueUnavailable(
            "There is too little room on the server's disk. Try again later.",
            freeBytes=least,
            floorBytes=self._floor,
            retryAfterSeconds=RETRY_SECONDS,
        )

    def _look(self) -> dict[str, int]:
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            try:
                self._free = {name: _free_bytes(folder) for name, folder in self._folders.items()}
                self._problem = None
            except OSError as error:
                self._problem = f"the disk does not say what is free: {error.strerror}"
            self._looked = now
        return self._free


def _free_bytes(folder: Path) -> int:
    while not folder.exists():  # it is made with the first file
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
