"""A copy of the job store: whole and checked, while others write; or none, and the last one stays."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from live_server import new_job
from operations.storehouse import storehouse

from common.errors import InvalidSettings, StorageFailed
from control_plane.operations.backup import PAGES, backup


def url(path: Path) -> str:
    return f"sqlite+aiosqlite:///{path}"


def copied(source: Path, target: Path) -> tuple[int, list[tuple[int, int]]]:
    """The bytes of the copy, and what was told of it."""
    told: list[tuple[int, int]] = []
    return backup(url(source), target, lambda done, total: told.append((done, total))), told


def store(path: Path, *, rows: int = 0) -> None:
    """A file that has the table of jobs, and this many rows of half a page."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE jobs (id TEXT)")
        database.executemany("INSERT INTO jobs VALUES (?)", [("x" * 2_000,)] * rows)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_copy_of_a_store_at_work_holds_all_that_was_committed_and_is_one_file(tmp_path: Path) -> None:
    root, target = tmp_path / "root", tmp_path / "copies" / "jobs.sqlite"
    target.parent.mkdir()
    target.write_bytes(b"an older copy")

    async def scenario() -> None:
        async with storehouse(root) as house:
            job_id = (await house.store.create(new_job()))[0].id
            (root / "jobs.sqlite").chmod(0o640)
            with closing(sqlite3.connect(root / "jobs.sqlite", isolation_level=None)) as writer:
                writer.execute("BEGIN IMMEDIATE")
                writer.execute("DELETE FROM jobs")
                size, _ = await asyncio.to_thread(copied, root / "jobs.sqlite", target)
                writer.execute("ROLLBACK")
            assert size == target.stat().st_size > 0
            assert target.stat().st_mode & 0o777 == 0o640
            assert names(target.parent) == ["jobs.sqlite"]
            with closing(sqlite3.connect(target)) as copy:
                assert copy.execute("SELECT id FROM jobs").fetchall() == [(job_id,)]
                assert copy.execute("PRAGMA journal_mode").fetchone() == ("delete",)

    asyncio.run(scenario())


def test_how_far_it_is_is_told_in_steps_up_to_the_whole(tmp_path: Path) -> None:
    store(tmp_path / "jobs.sqlite", rows=3 * PAGES)
    _, told = copied(tmp_path / "jobs.sqlite", tmp_path / "copy")
    done, total = zip(*told, strict=True)
    assert list(done) == sorted(set(done))
    assert len(done) > 1
    assert set(total) == {done[-1]}


@pytest.mark.parametrize(
    ("database_url", "words"),
    [
        ("postgresql+psycopg://user:secret@127.0.0.1/jobs", "pg_dump --format=custom"),
        ("sqlite+aiosqlite:////nowhere/jobs.sqlite", "no job store /nowhere/jobs.sqlite"),
        ("sqlite+aiosqlite://", "no job store"),
    ],
)
def test_what_is_no_file_of_this_machine_is_refused_by_the_name_of_its_setting(
    tmp_path: Path, database_url: str, words: str
) -> None:
    with pytest.raises(InvalidSettings, match=words) as caught:
        backup(database_url, tmp_path / "copy", lambda _done, _total: None)
    assert caught.value.details["field"] == "MEMVID_EXPORT_DATABASE_URL"
    assert "secret" not in caught.value.message
    assert names(tmp_path) == []


def test_another_database_is_no_job_store(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as database, database:
        database.execute("CREATE TABLE letters (id TEXT)")
    with pytest.raises(StorageFailed, match="is not a job store"):
        copied(tmp_path / "other.sqlite", tmp_path / "copy")
    assert names(tmp_path) == ["other.sqlite"]


def test_a_store_that_is_damaged_inside_leaves_the_last_copy_as_it_was(tmp_path: Path) -> None:
    path, target = tmp_path / "jobs.sqlite", tmp_path / "copy"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE jobs (id TEXT)")
        database.execute("CREATE INDEX ids ON jobs (id)")
        database.execute("INSERT INTO jobs VALUES ('one of many')")
    path.write_bytes(path.read_bytes().replace(b"one of many", b"one of manx", 1))  # in the table or its index
    target.write_bytes(b"the last one")
    with pytest.raises(StorageFailed, match="the job store itself is damaged"):
        copied(path, target)
    assert target.read_bytes() == b"the last one"
    assert names(tmp_path) == ["copy", "jobs.sqlite"]


def test_a_folder_that_is_not_there_and_a_file_that_is_no_database_are_told_as_such(tmp_path: Path) -> None:
    store(tmp_path / "jobs.sqlite")
    (tmp_path / "letter").write_bytes(b"dear reader" * 1_000)
    for source, target, words in (
        ("jobs.sqlite", "nowhere/copy", "No such file or directory"),
        ("letter", "copy", "not a database"),
    ):
        with pytest.raises(StorageFailed, match=words):
            copied(tmp_path / source, tmp_path / target)
    assert names(tmp_path) == ["jobs.sqlite", "letter"]
