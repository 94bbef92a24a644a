"""Files as an object store: whole or not there, checked, and confined to their roots."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from common.errors import InvalidRef, ObjectMissing, PayloadMismatch, StorageFailed
from common.storage import FileStorage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def _file(folder: Path, data: bytes) -> Path:
    path = folder / "new"
    path.write_bytes(data)
    return path


def test_what_was_put_is_read_back_whole_and_in_parts(tmp_path: Path, root: Path) -> None:
    storage, ref = FileStorage([root]), (root / "a" / "b c.bin").as_uri()
    data = bytes(range(256)) * 10_000
    stored = storage.put(_file(tmp_path, data), ref)
    assert stored == (ref, len(data), hashlib.sha256(data).hexdigest())
    assert storage.size(ref) == len(data)
    assert b"".join(storage.read(ref, 0, len(data))) == data
    assert b"".join(storage.read(ref, 1_000_000, 1_000_000)) == data[1_000_000:2_000_000]
    assert [at.ref for at in storage.found(root.as_uri() + "/a/")] == [ref]


def test_a_payload_that_is_not_as_announced_is_refused(tmp_path: Path, root: Path) -> None:
    storage, ref = FileStorage([root]), (root / "payload").as_uri()
    stored = storage.put(_file(tmp_path, b"graph"), ref)
    assert storage.local(ref, tmp_path, size=5, sha256=stored.sha256.upper()).read_bytes() == b"graph"
    with pytest.raises(PayloadMismatch, match="announced"):
        storage.local(ref, tmp_path, size=6)
    with pytest.raises(PayloadMismatch, match="SHA-256"):
        storage.local(ref, tmp_path, sha256="0" * 64)
    with pytest.raises(ObjectMissing):
        storage.local((root / "nothing").as_uri(), tmp_path)


def test_a_prefix_is_deleted_with_all_in_it_and_twice_is_no_error(tmp_path: Path, root: Path) -> None:
    storage = FileStorage([root])
    for name in ("job/1/x", "job/1/y", "other/z"):
        storage.put(_file(tmp_path, b"1"), (root / name).as_uri())
    assert storage.delete(root.as_uri() + "/job/") == 2
    assert storage.delete(root.as_uri() + "/job/") == 0
    assert [at.ref for at in storage.found(root.as_uri() + "/other/")] == [(root / "other/z").as_uri()]
    assert storage.delete((root / "other/z").as_uri()) == 1
    assert storage.size((root / "other/z").as_uri()) is None


def test_no_ref_leaves_the_roots(tmp_path: Path, root: Path) -> None:
    storage = FileStorage([root])
    (tmp_path / "secret").write_text("s")
    (root / "link").symlink_to(tmp_path)
    refs = [
        (tmp_path / "secret").as_uri(),
        root.as_uri() + "/../secret",
        root.as_uri() + "/%2e%2e/secret",
        root.as_uri() + "/link/secret",
        root.as_uri(),
        "https://example.org/x",
        "file://host/x",
    ]
    for ref in refs:
        with pytest.raises(InvalidRef):
            storage.size(ref)


def test_reading_past_the_end_is_an_error_not_a_short_answer(tmp_path: Path, root: Path) -> None:
    storage, ref = FileStorage([root]), (root / "short").as_uri()
    storage.put(_file(tmp_path, b"abc"), ref)
    with pytest.raises(StorageFailed, match="shorter"):
        list(storage.read(ref, 0, 4))
