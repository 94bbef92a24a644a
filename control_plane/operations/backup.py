"""A copy of the job store of a server that runs."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import make_url

from common.errors import InvalidSettings, StorageFailed
from common.storage.file import fsync_directory

PAGES = 256
"""Copied at a time, 1 MiB; the server writes between."""
WAIT_SECONDS = 30.0
"""For a database that somebody else has locked."""


def backup(database_url: str, target: Path, amount: Callable[[int, int], None]) -> int:
    """Copy the job store to ``target``, which appears whole and checked or not at all; answers its bytes.

    ``amount`` is told ``(bytes, bytes in all)``. Raises InvalidSettings for a database that has tools of its own or is
    not there, StorageFailed.
    """
    url = make_url(database_url)
    if url.get_backend_name() != "sqlite":
        raise InvalidSettings(
            "The job store is PostgreSQL: back it up with pg_dump --format=custom, and restore it with pg_restore",
            field="MEMVID_EXPORT_DATABASE_URL",
        )
    source = Path(url.database or "")
    if not source.is_file():
        raise InvalidSettings(
            f"There is no job store {source}; MEMVID_EXPORT_ROOT or MEMVID_EXPORT_DATABASE_URL say where it is",
            field="MEMVID_EXPORT_DATABASE_URL",
        )
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o600))  # it holds the secrets of webhooks
        with (
            contextlib.closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as live,
            contextlib.closing(sqlite3.connect(temporary)) as copy,
        ):
            live.execute(f"PRAGMA busy_timeout = {int(WAIT_SECONDS * 1000)}")
            # One read transaction over all of it: otherwise every commit of the server begins the copy anew.
            live.execute("BEGIN")
            live.execute("SELECT count(*) FROM sqlite_master").fetchone()
            page = live.execute("PRAGMA page_size").fetchone()[0]

            def tell(_status: int, left: int, total: int) -> None:
                amount((total - left) * page, total * page)

            live.backup(copy, pages=PAGES, progress=tell, sleep=0)
            copy.execute("PRAGMA journal_mode = DELETE")  # a single file
            wrong = [row[0] for row in copy.execute("PRAGMA integrity_check(10)")]
            if wrong != ["ok"]:
                raise StorageFailed(f"the job store itself is damaged: {wrong[0]}")
            if copy.execute("SELECT count(*) FROM sqlite_master WHERE name = 'jobs'").fetchone()[0] != 1:
                raise StorageFailed(f"{source} is not a job store")
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        size = temporary.stat().st_size
        temporary.chmod(source.stat().st_mode & 0o777)
        temporary.replace(target)
        fsync_directory(target.parent.resolve())
    except (sqlite3.Error, OSError) as error:
        raise StorageFailed(f"The job store could not be copied: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return size
