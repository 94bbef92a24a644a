"""Files as an object store: confined to their roots, and with nothing half written in sight."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from urllib.parse import quote

import pytest

from common.errors import InvalidRef
from common.storage import FileStorage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


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
        root.as_uri() + "/" + "x" * 300,
    ]
    for ref in refs:
        with pytest.raises(InvalidRef):
            storage.local(ref, tmp_path)
        with pytest.raises(InvalidRef):
            storage.write(ref, b"")


def test_a_ref_through_links_that_lead_in_a_circle_is_refused(tmp_path: Path, root: Path) -> None:
    storage = FileStorage([root])
    (root / "one").symlink_to(root / "other")
    (root / "other").symlink_to(root / "one")
    for ref in (f"{root.as_uri()}/one", f"{root.as_uri()}/one/x"):
        with pytest.raises(InvalidRef, match="Too many levels of symbolic links"):
            storage.local(ref, tmp_path)


def test_a_ref_that_is_not_written_as_one_names_nothing_else_by_mistake(tmp_path: Path, root: Path) -> None:
    storage, folder = FileStorage([root]), root.as_uri()
    storage.write(f"{folder}/x", b"kept")
    odd = ["file://[::1", "file://\u2100/x", f"{folder}/x?y", f"{folder}/x#y", f"{folder}/\nx", f"{folder}/\tx"]
    for ref in [*odd, f"{folder}/x\ud800", f"{folder}/x\udc80"]:
        for use in (storage.size, storage.delete, storage.found, lambda ref: storage.local(ref, tmp_path)):
            with pytest.raises(InvalidRef) as refused:
                use(ref)
            assert refused.value.message.encode()
    assert storage.size(f"{folder}/x") == 4


def test_a_whole_root_is_listed_under_the_name_that_it_was_given_and_never_deleted(tmp_path: Path, root: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    storage, prefix = FileStorage([tmp_path / "link"]), (tmp_path / "link").as_uri() + "/"
    storage.write(prefix + "job/x", b"1")
    assert [at.ref for at in storage.found(prefix)] == [prefix + "job/x"]
    with pytest.raises(InvalidRef):
        storage.delete(prefix)


def test_what_another_writer_has_not_finished_is_not_found_but_deleted(root: Path) -> None:
    storage, prefix = FileStorage([root]), (root / "job").as_uri() + "/"
    storage.write(prefix + "whole", b"1")
    (root / "job" / ".tmp-1-2").write_bytes(b"half")
    assert [at.ref for at in storage.found(prefix)] == [prefix + "whole"]
    storage.delete(prefix)
    assert not (root / "job").exists()


def test_what_is_removed_while_a_folder_is_listed_is_left_out(root: Path) -> None:
    storage, prefix = FileStorage([root]), root.as_uri() + "/"
    names = [f"job {n}/x" for n in range(2_000)]
    for name in names:
        (root / name).parent.mkdir()
        (root / name).write_bytes(b"1")
    kept, gone = names[0], sorted({entry.name for entry in root.iterdir()} - {"job 0"})
    remover = threading.Thread(target=lambda: [shutil.rmtree(root / name) for name in gone])
    remover.start()
    while remover.is_alive():
        assert prefix + quote(kept) in [at.ref for at in storage.found(prefix)]
    remover.join()
    assert [at.ref for at in storage.found(prefix)] == [prefix + quote(kept)]


def test_folders_behind_links_are_not_listed_and_files_behind_links_are(tmp_path: Path, root: Path) -> None:
    storage, prefix = FileStorage([root]), root.as_uri() + "/"
    storage.write(prefix + "deep/er/x", b"123")
    (root / "folder").symlink_to(root / "deep")
    (root / "file").symlink_to(root / "deep" / "er" / "x")
    (root / "nowhere").symlink_to(tmp_path / "nothing")
    assert [(at.ref, at.size) for at in storage.found(prefix)] == [(prefix + "deep/er/x", 3), (prefix + "file", 3)]


def test_the_age_of_a_file_counts_from_when_it_was_put(tmp_path: Path, root: Path) -> None:
    storage, ref = FileStorage([root]), (root / "x").as_uri()
    source = tmp_path / "old"
    source.write_bytes(b"1")
    os.utime(source, (0, 0))
    storage.put(source, ref)
    assert storage.found(ref)[0].age < 3_600
    os.utime(root / "x", (0, 0))
    assert storage.found(ref)[0].age > 3_600


def test_files_have_no_links(root: Path) -> None:
    with pytest.raises(InvalidRef, match="no signed URL"):
        FileStorage([root]).link((root / "x").as_uri(), "GET", 60)
