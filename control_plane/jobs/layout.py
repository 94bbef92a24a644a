"""Where the files of a job lie."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from common.errors import InvalidSettings
from common.settings import Settings


class Layout:
    """Folders under the export root and the staging root; artifacts of each attempt have a prefix of their own."""

    def __init__(self, settings: Settings) -> None:
        self.root = settings.root
        self.artifacts = settings.root / "artifacts"
        self.scratch = settings.root / "scratch"
        self.incoming = settings.staging_root / "incoming"
        self.payloads = settings.staging_root / "payloads"

    def prepare(self) -> int:
        """Make the folders and lock the root for this process; the lock lasts as long as the returned handle.

        Raises InvalidSettings where a folder cannot be written, or another server uses the root.
        """
        for name, folder in (
            ("MEMVID_EXPORT_ROOT", self.artifacts),
            ("MEMVID_EXPORT_ROOT", self.scratch),
            ("MEMVID_EXPORT_STAGING_ROOT", self.incoming),
            ("MEMVID_EXPORT_STAGING_ROOT", self.payloads),
        ):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InvalidSettings(f"{name} must be a folder that can be written: {error}", field=name) from error
            if not os.access(folder, os.W_OK | os.X_OK):
                raise InvalidSettings(f"{name} must be a folder that can be written: {folder} is not", field=name)
        handle = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise InvalidSettings(
                f"MEMVID_EXPORT_ROOT must be used by one server at a time; another one uses {self.root}",
                field="MEMVID_EXPORT_ROOT",
            ) from error
        return handle

    def payload_ref(self, job_id: str) -> str:
        """The staged payload of a job."""
        return (self.payloads / job_id).as_uri()

    def job_prefix(self, job_id: str) -> str:
        """All artifacts of a job."""
        return (self.artifacts / job_id).as_uri() + "/"

    def output_prefix(self, job_id: str, attempt: int) -> str:
        """The artifacts of one attempt: an earlier one that is still alive cannot touch them."""
        return f"{self.job_prefix(job_id)}{attempt}/"

    def sweep(self, *, waiting: Mapping[str, int], completed: Mapping[str, int]) -> int:
        """Remove all files that belong to no job; answers how many folders and files went.

        ``waiting`` and ``completed`` map job ids to the attempt whose artifacts count. Only while no job runs.
        """
        removed = 0
        for folder in (self.scratch, self.incoming):
            removed += _remove(folder, keep=set())
        removed += _remove(self.payloads, keep=set(waiting))
        removed += _remove(self.artifacts, keep=set(completed))
        for job_id, attempt in completed.items():
            removed += _remove(self.artifacts / job_id, keep={str(attempt)})
        return removed


def _remove(folder: Path, *, keep: set[str]) -> int:
    removed = 0
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if entry.name not in keep:
            removed += 1
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
    return removed
