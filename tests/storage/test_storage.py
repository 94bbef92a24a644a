"""What every storage does, whatever stands behind it: files, a bucket, signed links."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from left_behind import nothing_left
from services import S3

from common.contract import Links
from common.errors import InvalidRef, ObjectMissing, PayloadMismatch, PayloadTooLarge, StorageFailed
from common.storage import Storage, StorageConfig, open_storage

Open = Callable[..., tuple[Storage, str]]
LARGE = 20_000_000
"""More than two parts."""


@pytest.fixture(params=["files", "bucket", "links"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens a storage for the given names under a prefix of its own; only links have to know the names."""

    def open_for(*names: str) -> tuple[Storage, str]:
        if request.param == "files":
            return open_storage(StorageConfig(roots=[str(tmp_path)])), (tmp_path / "at").as_uri() + "/"
        s3: S3 = request.getfixturevalue("s3")
        storage, prefix = open_storage(s3.config()), f"{s3.url}/{uuid.uuid4()}/"
        if request.param == "bucket":
            return storage, prefix
        refs = [prefix + name for name in names]
        links = {r: Links(get=storage.link(r, "GET", 60), put=storage.link(r, "PUT", 60)) for r in refs}
        return open_storage(s3.config(links=True), links), prefix

    return open_for


@pytest.fixture
def new(tmp_path: Path) -> Callable[[bytes], Path]:
    """Makes a file that may be moved away."""

    def make(data: bytes) -> Path:
        path = tmp_path / "new"
        path.write_bytes(data)
        return path

    return make


@pytest.fixture(scope="module")
def large() -> bytes:
    return os.urandom(LARGE)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def test_what_was_put_is_read_back_whole_and_in_parts(
    opened: Open, new: Callable[[bytes], Path], scratch: Path, large: bytes
) -> None:
    storage, prefix = opened("a/b%20c%2B%C3%A4.bin")
    ref, sha256 = prefix + "a/b%20c%2B%C3%A4.bin", hashlib.sha256(large).hexdigest()
    with nothing_left():
        assert storage.put(new(large), ref) == (ref, LARGE, sha256)
        assert storage.size(ref) == LARGE
        path = storage.local(ref, scratch, size=LARGE, sha256=sha256.upper(), limit=LARGE)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
        pieces = list(storage.read(ref, 3_000_000, 16_000_000))
        assert b"".join(pieces) == large[3_000_000:19_000_000]
        assert max(map(len, pieces)) <= 1 << 20
    assert [(at.ref, at.size) for at in storage.found(prefix)] == [(ref, LARGE)]
    assert [(at.ref, at.size) for at in storage.found(ref)] == [(ref, LARGE)]
    assert 0 <= storage.found(ref)[0].age < 60


def test_a_second_put_replaces_the_first(opened: Open, new: Callable[[bytes], Path], scratch: Path) -> None:
    storage, prefix = opened("x")
    storage.put(new(b"first"), prefix + "x")
    storage.put(new(b"2nd"), prefix + "x", sha256=hashlib.sha256(b"2nd").hexdigest())
    assert storage.local(prefix + "x", scratch, size=3).read_bytes() == b"2nd"


def test_an_empty_object_is_an_object(opened: Open, new: Callable[[bytes], Path], scratch: Path) -> None:
    storage, prefix = opened("put", "written")
    storage.put(new(b""), prefix + "put")
    assert storage.write(prefix + "written", b"")
    for ref in (prefix + "put", prefix + "written"):
        assert storage.size(ref) == 0
        assert storage.local(ref, scratch, size=0, sha256=hashlib.sha256().hexdigest(), limit=0).read_bytes() == b""
        assert list(storage.read(ref, 0, 0)) == []


def test_of_several_that_write_something_new_exactly_one_does(opened: Open) -> None:
    storage, prefix = opened("claim")
    ref = prefix + "claim"
    with ThreadPoolExecutor(8) as pool:
        tries = [pool.submit(storage.write, ref, f"writer {i}".encode(), only_new=True) for i in range(8)]
    winners = [i for i, tried in enumerate(tries) if tried.result()]
    assert len(winners) == 1
    assert b"".join(storage.read(ref, 0, 8)) == f"writer {winners[0]}".encode()
    assert storage.write(ref, b"anyone")
    assert b"".join(storage.read(ref, 0, 6)) == b"anyone"


def test_where_nothing_lies_there_is_nothing_to_read(opened: Open, scratch: Path) -> None:
    storage, prefix = opened("x")
    assert storage.size(prefix + "x") is None
    assert storage.found(prefix + "x") == storage.found(prefix) == []
    with pytest.raises(ObjectMissing):
        storage.local(prefix + "x", scratch)
    with pytest.raises(ObjectMissing):
        list(storage.read(prefix + "x", 0, 1))


def test_a_payload_that_is_not_as_announced_is_refused_and_not_kept(
    opened: Open, new: Callable[[bytes], Path], scratch: Path, large: bytes
) -> None:
    storage, prefix = opened("x")
    ref = prefix + "x"
    storage.put(new(large), ref)
    with pytest.raises(PayloadMismatch, match="announced") as size:
        storage.local(ref, scratch, size=LARGE + 1)
    with pytest.raises(PayloadMismatch, match="SHA-256") as sha256:
        storage.local(ref, scratch, size=LARGE, sha256="0" * 64)
    with pytest.raises(PayloadTooLarge):
        storage.local(ref, scratch, limit=LARGE - 1)
    assert (size.value.details["field"], sha256.value.details["field"]) == ("payload_size", "payload_sha256")
    assert not any((size.value.retryable, sha256.value.retryable))
    assert not scratch.exists() or list(scratch.iterdir()) == []


def test_reading_past_the_end_is_an_error_not_a_short_answer(opened: Open) -> None:
    storage, prefix = opened("short")
    storage.write(prefix + "short", b"abc")
    for start, length in ((0, 4), (2, 2), (3, 1), (9, 1)):
        with pytest.raises(StorageFailed):
            list(storage.read(prefix + "short", start, length))


def test_a_prefix_lists_only_what_is_under_it_in_order(opened: Open) -> None:
    names = ("job/1/y", "job/1/x", "job/10/x", "other/z")
    storage, prefix = opened(*names)
    for name in names:
        storage.write(prefix + name, b"1")
    assert [at.ref.removeprefix(prefix) for at in storage.found(prefix + "job/1/")] == ["job/1/x", "job/1/y"]
    assert [at.ref.removeprefix(prefix) for at in storage.found(prefix + "job/")] == ["job/1/x", "job/1/y", "job/10/x"]
    assert storage.found(prefix + "nothing/") == []


@pytest.mark.parametrize("opened", ["files", "bucket"], indirect=True)
@pytest.mark.parametrize("folder", ["env=prod", "a+b", "team:a@b", "(1)~", "%65nv", "with%20space", "é"])
def test_what_is_found_begins_with_the_prefix_that_was_asked_however_that_is_written(opened: Open, folder: str) -> None:
    storage, prefix = opened()
    prefix += f"{folder}/"
    storage.write(prefix + "job/x%20y", b"1")
    assert [at.ref for at in storage.found(prefix)] == [prefix + "job/x%20y"]
    assert storage.delete(storage.found(prefix)[0].ref) == 1


@pytest.mark.parametrize("opened", ["files", "bucket"], indirect=True)
def test_a_prefix_is_deleted_with_all_in_it_and_twice_is_no_error(opened: Open) -> None:
    storage, prefix = opened()
    for name in ("job/1/x", "job/1/y", "job/10/x", "other/z"):
        storage.write(prefix + name, b"1")
    assert storage.delete(prefix + "job/1/") == 2
    assert storage.delete(prefix + "job/1/") == 0
    assert [at.ref.removeprefix(prefix) for at in storage.found(prefix)] == ["job/10/x", "other/z"]
    assert storage.delete(prefix + "other/z") == 1
    assert storage.delete(prefix + "other/z") == 0
    assert storage.size(prefix + "other/z") is None


BAD_REFS = [
    "",
    "x",
    "ftp://host/x",
    "data:,x",
    "file:///etc/passwd",
    "file://host/x",
    "file:///%00",
    "file:///%ff",
    "s3://elsewhere/x",
    "s3://exports",
    "s3://exports/",
    "s3://exports//x",
    "s3://exports/a/../x",
    "s3://exports/a/%2e%2e/x",
    "s3://exports/a//x",
    "s3://exports/x?versionId=1",
    "s3://exports/x%0a",
    "s3://exports/%ff",
    "s3://exports/\ud800",
    "s3://exports/" + "x" * 1_025,
    "S3://exports@elsewhere/x",
    "https://user:secret@127.0.0.1/x",
    "https://elsewhere.example/x",
    "https:///x",
    "https://127.0.0.1:99999/x",
    "https://127.0.0.1%2f.elsewhere/x",
]


def test_a_ref_that_is_not_allowed_is_refused_by_every_method_and_never_worth_a_retry(
    opened: Open, new: Callable[[bytes], Path], scratch: Path
) -> None:
    storage, _ = opened("x")
    uses: list[Callable[[str], object]] = [
        storage.size,
        lambda ref: storage.local(ref, scratch),
        lambda ref: list(storage.read(ref, 0, 1)),
        lambda ref: storage.put(new(b"x"), ref),
        lambda ref: storage.write(ref, b"x"),
        lambda ref: storage.link(ref, "GET", 1),
    ]
    for ref in BAD_REFS:
        for use in uses:
            with pytest.raises(InvalidRef) as refused:
                use(ref)
            assert not refused.value.retryable
            assert "secret" not in str(refused.value)
