"""Folders in which not everything is a file, and files that lie on another file system or cannot be read."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import ObjectMissing, StorageFailed
from common.storage import FileStorage

MEMORY = Path("/dev/shm")  # a file system of its own on Linux


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder of another file system."""
    if not MEMORY.is_dir() or MEMORY.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system")
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def test_a_file_of_another_file_system_is_copied_whole(root: Path, elsewhere: Path) -> None:
    storage, ref = FileStorage([root]), (root / "job" / "x").as_uri()
    data = os.urandom(3_000_000)
    for content in (b"before", data):
        (elsewhere / "x").write_bytes(content)
        assert storage.put(elsewhere / "x", ref) == (ref, len(content), hashlib.sha256(content).hexdigest())
    assert (root / "job" / "x").read_bytes() == data
    assert [path.name for path in (root / "job").iterdir()] == ["x"]


def test_a_file_of_another_file_system_that_finds_no_place_leaves_nothing(root: Path, elsewhere: Path) -> None:
    (root / "x" / "below").mkdir(parents=True)
    (elsewhere / "x").write_bytes(b"1")
    with pytest.raises(StorageFailed, match="cannot store x"):
        FileStorage([root]).put(elsewhere / "x", (root / "x").as_uri())
    assert [path.name for path in root.iterdir()] == ["x"]
    assert (elsewhere / "x").read_bytes() == b"1"


def test_a_file_is_not_put_in_the_place_of_a_folder(tmp_path: Path, root: Path) -> None:
    (root / "x" / "below").mkdir(parents=True)
    (tmp_path / "new").write_bytes(b"1")
    with pytest.raises(StorageFailed, match="cannot store x: Is a directory"):
        FileStorage([root]).put(tmp_path / "new", (root / "x").as_uri())
    assert (tmp_path / "new").read_bytes() == b"1"


def test_what_is_no_file_is_no_object(tmp_path: Path, root: Path) -> None:
    storage, prefix = FileStorage([root]), root.as_uri() + "/"
    storage.write(prefix + "folder/x", b"1")
    os.mkfifo(root / "pipe")
    assert [at.ref for at in storage.found(prefix)] == [prefix + "folder/x"]
    for name in ("pipe", "folder"):
        assert storage.size(prefix + name) is None
        assert storage.found(prefix + name) == []
        with pytest.raises(ObjectMissing, match=f"nothing lies at {name}"):
            storage.local(prefix + name, tmp_path)
    assert stat.S_ISFIFO((root / "pipe").stat().st_mode)


def test_a_file_that_the_disk_does_not_give_back_is_a_failure_with_its_number() -> None:
    storage = FileStorage([Path("/proc/self")])
    with pytest.raises(StorageFailed, match="cannot read mem: Input/output error") as failed:
        list(storage.read("file:///proc/self/mem", 0, 1))  # no process has anything at address 0
    assert failed.value.details["errno"] == 5
    assert failed.value.retryable
