"""Vector caches that others change while they are in use: nothing but the time that it spares is lost."""

from __future__ import annotations

import fcntl
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import pytest

from common.embedding.cache import CachedEmbedder
from common.embedding.cache.sqlite import SqliteCache
from common.embedding.cache.storage import MERGE_FROM, StorageCache
from common.embedding.static import StaticEmbedder
from common.storage import FileStorage
from common.storage.port import Found

MANY = [f"class Handler{number}: reads request {number} and answers it" for number in range(3_000)]
SOME = MANY[:40]


class Export(NamedTuple):
    """What embedding the texts of one export came to."""

    right: bool
    """The vectors are those of the engine, byte by byte."""
    hits: int
    trouble: str | None


def export(embedder: CachedEmbedder, texts: Sequence[str]) -> Export:
    """Embed as the pipeline does: all texts, and a flush."""
    found = embedder.embed(texts)
    return Export(
        found.vectors.tobytes() == StaticEmbedder().embed(texts).vectors.tobytes(), found.cache_hits, embedder.flush()
    )


@pytest.fixture
def opened() -> Iterator[Callable[[SqliteCache | StorageCache], CachedEmbedder]]:
    """Puts caches before the static engine, and closes them."""
    with ExitStack() as stack:
        yield lambda cache: stack.enter_context(closing(CachedEmbedder(StaticEmbedder(), cache)))


Opened = Callable[[SqliteCache | StorageCache], CachedEmbedder]

# --- a file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "vectors.sqlite"


def test_who_comes_while_another_opens_the_file_waits_for_it(file: Path, opened: Opened) -> None:
    assert export(opened(SqliteCache(file, 1 << 30)), SOME).trouble is None
    with Path(f"{file}.lock").open("wb") as other, ThreadPoolExecutor(1) as thread:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = thread.submit(export, opened(SqliteCache(file, 1 << 30)), SOME)
        threading.Event().wait(0.2)
        assert not waiting.done()
        fcntl.flock(other, fcntl.LOCK_UN)
        assert waiting.result() == Export(True, len(SOME), None)


def test_a_damaged_file_that_another_has_set_aside_already_is_not_set_aside_again(file: Path, opened: Opened) -> None:
    export(opened(SqliteCache(file, 1 << 30)), MANY)
    reader = opened(SqliteCache(file, 1 << 30))
    assert reader.embed(SOME).cache_hits == len(SOME)
    damaged = file.with_name("vectors.sqlite.damaged")
    with file.open("r+b") as spoiled:  # after its first page, which the reader knows
        spoiled.seek(16_384)
        spoiled.write(b"\xff" * (file.stat().st_size - 16_384))
    file.replace(damaged)
    kept = damaged.read_bytes()
    found = export(reader, MANY)
    assert found.right
    assert found.trouble is not None
    assert "vectors.sqlite was damaged" in found.trouble
    assert damaged.read_bytes() == kept
    export(reader, MANY)
    assert export(opened(SqliteCache(file, 1 << 30)), MANY) == Export(True, len(MANY), None)


def test_a_file_that_lost_a_table_is_told_and_keeps_nobody_from_writing(file: Path, opened: Opened) -> None:
    export(opened(SqliteCache(file, 1 << 30)), SOME)
    with closing(sqlite3.connect(file)) as other:
        other.execute("DROP TABLE records")
    embedder = opened(SqliteCache(file, 1 << 30))
    assert embedder.embed(SOME).vectors.tobytes() == StaticEmbedder().embed(SOME).vectors.tobytes()
    with closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # what could not be written holds no lock
        other.execute("ROLLBACK")
    trouble = embedder.flush()
    assert trouble is not None
    assert "could not be read: vectors.sqlite: no such table: records" in trouble
    assert "could not be written: vectors.sqlite: no such table: records" in trouble


# --- segments in object storage -------------------------------------------------------------------------------------


class Meddled(FileStorage):
    """A folder in which others are at work too."""

    def __init__(self, root: Path) -> None:
        super().__init__([root])
        self.after_listing: Callable[[list[Found]], object] = lambda found: None
        self.before_rows: Callable[[Path], None] = lambda segment: None

    def found(self, prefix: str, *, uploads: bool = False) -> list[Found]:
        """Found, and then something happens."""
        listed = super().found(prefix, uploads=uploads)
        self.after_listing(listed)
        return listed

    def read(self, ref: str, start: int, length: int) -> Iterator[bytes]:
        """Something happens before rows of a large segment are read; its keys take less."""
        if length >= 1 << 20:
            self.before_rows(Path(ref.removeprefix("file://")).parent)
        return super().read(ref, start, length)


@pytest.fixture
def storage(tmp_path: Path) -> Meddled:
    return Meddled(tmp_path)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return (tmp_path / "vectors").as_uri() + "/"


def test_a_segment_that_is_removed_before_its_keys_are_read_is_not_missed(
    storage: Meddled, prefix: str, opened: Opened
) -> None:
    export(opened(StorageCache(storage, prefix, 1 << 30)), SOME)
    storage.after_listing = lambda found: storage.delete(prefix)
    assert export(opened(StorageCache(storage, prefix, 1 << 30)), SOME) == Export(True, 0, None)
    storage.after_listing = lambda found: None
    assert export(opened(StorageCache(storage, prefix, 1 << 30)), SOME) == Export(True, len(SOME), None)


def test_segments_that_move_whenever_they_are_read_are_given_up_at_the_second_try(
    storage: Meddled, prefix: str, opened: Opened
) -> None:
    many = MANY[:1_500]  # 1.6 MB
    export(opened(StorageCache(storage, prefix, 1 << 30)), many)
    moved: list[Path] = []

    def move(segment: Path) -> None:
        if segment.exists():
            moved.append(segment.rename(segment.with_name(f"moved-{len(moved)}")))

    storage.before_rows = move
    assert export(opened(StorageCache(storage, prefix, 1 << 30)), many) == Export(True, 0, None)
    assert len(moved) == 2


def test_a_small_segment_that_another_merges_first_is_left_out_of_the_merge(
    storage: Meddled, prefix: str, opened: Opened
) -> None:
    worker = opened(StorageCache(storage, prefix, 1 << 30))
    groups = [MANY[start : start + 10] for start in range(0, 10 * (MERGE_FROM + 1), 10)]
    for group in groups[:-1]:
        assert export(worker, group) == Export(True, 0, None)
    lists: list[list[Found]] = []

    def lose_one(found: list[Found]) -> None:
        lists.append(found)
        if len(lists) == 2:  # the first is for what is known, the second for what is merged
            storage.delete(found[0].ref.rpartition("/")[0] + "/")

    storage.after_listing = lose_one
    assert export(worker, groups[-1]) == Export(True, 0, None)
    storage.after_listing = lambda found: None
    (whole,) = storage.found(prefix)
    assert whole.size < sum(found.size for found in lists[1])
    again = export(opened(StorageCache(storage, prefix, 1 << 30)), [text for group in groups for text in group])
    assert again == Export(True, 10 * MERGE_FROM, None)


def test_without_a_folder_for_temporary_files_an_export_is_slower_and_no_more(
    storage: Meddled, prefix: str, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(opened(StorageCache(storage, prefix, 1 << 30)), SOME)
    with monkeypatch.context() as without:
        without.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        found = export(opened(StorageCache(storage, prefix, 1 << 30)), MANY[:80])
    assert (found.right, found.hits) == (True, 0)
    assert found.trouble is not None
    assert "could not be read: temporary files: No such file" in found.trouble
    assert export(opened(StorageCache(storage, prefix, 1 << 30)), SOME) == Export(True, len(SOME), None)
