"""Where the files of a job lie."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from common.errors import InvalidSettings
from common.settings import Settings
from common.storage import Storage, StorageConfig
from handler.claim import NAMES


class Layout:
    """Folders on this machine, and refs in the storage; artifacts of each attempt have a prefix of their own."""

    def __init__(self, settings: Settings) -> None:
        self.root = settings.root
        self.artifacts = settings.root / "artifacts"
        self.scratch = settings.root / "scratch"
        self.copies = settings.root / "copies"
        """What read tools have fetched from the storage."""
        self.incoming = settings.staging_root / "incoming"
        self.payloads = settings.staging_root / "payloads"
        url = settings.storage_url
        self.payload_prefix = f"{url}/payloads/" if url else self.payloads.as_uri() + "/"
        self.artifact_prefix = f"{url}/artifacts/" if url else self.artifacts.as_uri() + "/"
        self.shared = bool(url)
        """Other machines use the same storage."""

    def replica(self) -> str:
        """The id of this root's server, the same after a restart."""
        path = self.root / "replica-id"
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(str(uuid.uuid4()), encoding="ascii")
            temporary.replace(path)
        return path.read_text(encoding="ascii")

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

    def storage(self, settings: Settings) -> StorageConfig:
        """What this server and its children may read and write."""
        return settings.storage(self.artifacts, self.payloads, self.incoming)

    def payload_ref(self, job_id: str) -> str:
        """The staged payload of a job."""
        return f"{self.payload_prefix}{job_id}"

    def job_prefix(self, job_id: str) -> str:
        """All artifacts of a job."""
        return f"{self.artifact_prefix}{job_id}/"

    def output_prefix(self, job_id: str, attempt: int) -> str:
        """The artifacts of one attempt: an earlier one that is still alive cannot touch them."""
        return f"{self.job_prefix(job_id)}{attempt}/"

    def incoming_ref(self, job_id: str) -> str:
        """A request body while it comes in."""
        return (self.incoming / job_id).as_uri()

    def clear(self, *, in_flight: Mapping[str, int], completed: Mapping[str, int], kept: Collection[str]) -> int:
        """Remove all files on this machine that belong to no job; answers how many files and folders went.

        The maps are from job ids to the attempt whose artifacts count; ``kept`` are failed jobs that have their payload
        still. Only while no job and no request runs here.
        """
        removed = 0
        for folder in (self.scratch, self.incoming):
            removed += _remove(folder, keep=set())
        if not self.shared:
            removed += _remove(self.payloads, keep={*in_flight, *kept})
            removed += _remove(self.artifacts, keep={*in_flight, *completed})
            for job_id, attempt in completed.items():
                removed += _remove(self.artifacts / job_id, keep={str(attempt)})
        return removed

    def aged(self, storage: Storage, age: float) -> list[str]:
        """Refs of all payloads and artifacts, half put ones too, that nobody wrote for ``age`` seconds."""
        prefixes = (self.payload_prefix, self.artifact_prefix)
        return [found.ref for prefix in prefixes for found in storage.found(prefix, uploads=True) if found.age >= age]

    def strays(
        self, refs: Iterable[str], *, in_flight: Mapping[str, int], completed: Mapping[str, int], kept: Collection[str]
    ) -> list[str]:
        """Those of ``refs`` that no job speaks for.

        ``in_flight`` and ``completed`` map job ids to their attempt, as it is after the refs were listed: a job that
        was made meanwhile speaks too. A job speaks for its payload until it ends, or longer if it is among ``kept``;
        for the artifacts of its attempt; and until it ends for every claim: a closed one keeps a late run from
        starting.
        """
        gone = []
        attempts = {**completed, **in_flight}
        for ref in refs:
            if ref.startswith(self.payload_prefix):
                job_id = ref.removeprefix(self.payload_prefix)
                wanted = job_id in in_flight or job_id in kept
            else:
                job_id, _, rest = ref.removeprefix(self.artifact_prefix).partition("/")
                attempt, _, name = rest.partition("/")
                wanted = attempt == str(attempts.get(job_id)) and not (job_id in completed and name in NAMES)
                wanted = wanted or (job_id in in_flight and name in NAMES)
                # A later attempt than the job store knows: it was put back from a backup.
                wanted = wanted or (attempt.isdecimal() and int(attempt) > in_flight.get(job_id, int(attempt)))
            if not wanted:
                gone.append(ref)
        return gone


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
