"""A bucket behind a network that fails: what is stored is whole, what fails is said so, and nothing stays behind."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import boto3
import pytest
from services import S3
from storage.faulty import Proxy

from common.errors import AccessDenied, InvalidRef, InvalidSettings, StorageFailed
from common.storage import S3Config, Storage, StorageConfig, open_storage

SIZE = 20_000_000


@pytest.fixture(scope="module")
def data() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture
def storage(s3: S3, between: Proxy) -> Storage:
    """A storage that goes through the proxy."""
    return open_storage(s3.config())


@pytest.fixture
def source(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "source"
    path.write_bytes(data)
    return path


def _uploads(s3: S3, prefix: str) -> list[str]:
    """Keys of the unfinished uploads under a prefix."""
    client = boto3.client("s3", endpoint_url=s3.endpoint)
    found = client.list_multipart_uploads(Bucket=s3.bucket, Prefix=prefix.removeprefix(f"{s3.url}/"))
    return [upload["Key"] for upload in found.get("Uploads", [])]


def test_a_large_file_goes_up_in_parts_with_their_sums_and_its_own(
    s3: S3, storage: Storage, prefix: str, source: Path, data: bytes, between: Proxy
) -> None:
    stored = storage.put(source, prefix + "x")
    parts = [seen for seen in between.seen if seen.method == "PUT"]
    assert len(parts) == 3
    assert all(len(part.headers["x-amz-checksum-sha256"]) == 44 for part in parts)
    head = boto3.client("s3", endpoint_url=s3.endpoint).head_object(
        Bucket=s3.bucket, Key=stored.ref.removeprefix(f"{s3.url}/")
    )
    assert head["Metadata"]["sha256"] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("kind", "method"), [("503", "PUT"), ("spoiled", "PUT"), ("500", "POST"), ("lost", "PUT"), ("lost", "POST")]
)
def test_an_upload_gets_through_a_store_that_fails_now_and_then(
    storage: Storage, prefix: str, source: Path, data: bytes, between: Proxy, tmp_path: Path, kind: str, method: str
) -> None:
    between.fault(kind, method, times=2)  # type: ignore[arg-type]
    storage.put(source, prefix + "x")
    assert storage.local(prefix + "x", tmp_path / "scratch").read_bytes() == data


@pytest.mark.parametrize("kind", ["500", "cut", "slow", "lost"])
def test_a_download_gets_through_a_store_that_fails_now_and_then(
    storage: Storage, prefix: str, source: Path, data: bytes, between: Proxy, tmp_path: Path, kind: str
) -> None:
    storage.put(source, prefix + "x")
    between.fault(kind, "GET", prefix[-10:], times=3)  # type: ignore[arg-type]
    sha256 = hashlib.sha256(data).hexdigest()
    assert storage.local(prefix + "x", tmp_path / "scratch", sha256=sha256).read_bytes() == data
    between.fault(kind, "GET", prefix[-10:], times=3)  # type: ignore[arg-type]
    assert b"".join(storage.read(prefix + "x", 1, SIZE - 1)) == data[1:]


@pytest.mark.parametrize("kind", ["503", "spoiled"])
def test_an_upload_that_fails_leaves_nothing_behind(
    s3: S3, storage: Storage, prefix: str, source: Path, between: Proxy, kind: str
) -> None:
    between.fault(kind, "PUT", "partNumber=2", times=100)  # type: ignore[arg-type]
    with pytest.raises(StorageFailed):
        storage.put(source, prefix + "x")
    assert storage.size(prefix + "x") is None
    assert _uploads(s3, prefix) == []


def test_a_small_object_that_is_spoiled_on_its_way_is_not_stored(storage: Storage, prefix: str, between: Proxy) -> None:
    between.fault("spoiled", "PUT", times=100)
    with pytest.raises(StorageFailed):
        storage.write(prefix + "x", b"abc")
    assert storage.size(prefix + "x") is None


def test_a_download_that_fails_says_so_and_leaves_nothing_behind(
    storage: Storage, prefix: str, source: Path, between: Proxy, tmp_path: Path
) -> None:
    storage.put(source, prefix + "x")
    between.fault("cut", "GET", prefix[-10:], times=1_000)
    with pytest.raises(StorageFailed, match="5 times") as failed:
        storage.local(prefix + "x", tmp_path / "scratch")
    assert failed.value.retryable
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_writer_whose_first_answer_got_lost_still_knows_that_it_was_first(
    storage: Storage, prefix: str, between: Proxy
) -> None:
    between.fault("lost", "PUT")
    assert storage.write(prefix + "claim", b"mine", only_new=True)
    between.fault("lost", "PUT")
    assert not storage.write(prefix + "claim", b"mine", only_new=True)


def test_an_object_that_is_replaced_while_it_is_read_is_not_mixed(
    storage: Storage, prefix: str, source: Path, data: bytes, between: Proxy, tmp_path: Path
) -> None:
    storage.put(source, prefix + "x")
    between.fault("cut", "GET", prefix[-10:])
    reading = storage.read(prefix + "x", 0, SIZE)
    next(reading)
    (tmp_path / "other").write_bytes(data[::-1])
    storage.put(tmp_path / "other", prefix + "x")
    with pytest.raises(StorageFailed):
        list(reading)


def test_deleting_a_prefix_ends_the_uploads_that_dead_writers_left_there(s3: S3, storage: Storage, prefix: str) -> None:
    client = boto3.client("s3", endpoint_url=s3.endpoint)
    for name in ("1/a", "1/b", "2/c"):
        key = prefix.removeprefix(f"{s3.url}/") + name
        upload = client.create_multipart_upload(Bucket=s3.bucket, Key=key)
        client.upload_part(Bucket=s3.bucket, Key=key, UploadId=upload["UploadId"], PartNumber=1, Body=b"part")
    assert storage.delete(prefix + "1/") == 0
    assert [key.rpartition("/")[2] for key in _uploads(s3, prefix)] == ["c"]
    assert storage.delete(prefix + "2/c") == 0
    assert _uploads(s3, prefix) == []


def test_a_foreign_bucket_is_refused_before_anything_is_asked(storage: Storage, between: Proxy) -> None:
    with pytest.raises(InvalidRef, match="'elsewhere'") as refused:
        storage.size("s3://elsewhere/x")
    assert refused.value.details["allowed"] == "s3://exports/"
    assert between.seen == []


def test_a_whole_bucket_is_not_deleted(s3: S3, storage: Storage, between: Proxy) -> None:
    with pytest.raises(InvalidRef):
        storage.delete(f"{s3.url}/")
    assert between.seen == []


def test_a_bucket_that_is_not_there_is_no_matter_of_trying_again(between: Proxy, source: Path, tmp_path: Path) -> None:
    storage = open_storage(StorageConfig(roots=[], s3=S3Config(bucket="nowhere", addressing="path")))
    ref = "s3://nowhere/x"
    for use in (
        lambda: storage.put(source, ref),
        lambda: storage.write(ref, b""),
        lambda: storage.size(ref),
        lambda: storage.local(ref, tmp_path),
        lambda: storage.found("s3://nowhere/a/"),
    ):
        between.seen.clear()
        with pytest.raises(InvalidRef, match="NoSuchBucket"):
            use()
        assert len(between.seen) == 1


def test_wrong_credentials_are_denied_once(
    s3: S3, between: Proxy, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    storage = open_storage(s3.config())
    for use in (lambda: storage.size(f"{s3.url}/x"), lambda: storage.put(source, f"{s3.url}/x")):
        between.seen.clear()
        with pytest.raises(AccessDenied) as denied:
            use()
        assert not denied.value.retryable
        assert len(between.seen) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_ENDPOINT_URL_S3", "garbage"), ("AWS_DEFAULT_REGION", "not a region!"), ("AWS_PROFILE", "nobody")],
)
def test_wrong_settings_of_the_store_are_named_and_no_matter_of_trying_again(
    s3: S3, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    storage, ref = open_storage(s3.config()), f"{s3.url}/x"
    for use in (storage.size, storage.delete, storage.found, lambda ref: storage.link(ref, "GET", 60)):
        with pytest.raises(InvalidSettings, match="AWS_ settings") as wrong:
            use(ref)
        assert not wrong.value.retryable


def test_a_store_that_is_away_may_come_back(s3: S3, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(StorageFailed) as away:
        open_storage(s3.config()).put(source, f"{s3.url}/x")
    assert away.value.retryable


@pytest.mark.parametrize(
    ("encryption", "sent"),
    [
        ("AES256", {"x-amz-server-side-encryption": "AES256"}),
        ("aws:kms", {"x-amz-server-side-encryption": "aws:kms"}),
        (
            "aws:kms:key/1",
            {"x-amz-server-side-encryption": "aws:kms", "x-amz-server-side-encryption-aws-kms-key-id": "key/1"},
        ),
    ],
)
def test_the_wished_encryption_is_asked_for_with_every_object_and_signed_into_links(
    s3: S3, between: Proxy, prefix: str, source: Path, encryption: str, sent: dict[str, str]
) -> None:
    storage = open_storage(
        StorageConfig(roots=[], s3=S3Config(bucket=s3.bucket, addressing="path", encryption=encryption))
    )
    for use in (lambda: storage.write(prefix + "x", b"x"), lambda: storage.put(source, prefix + "y")):
        between.seen.clear()
        use()
        first = between.seen[0].headers
        assert {name: first[name] for name in first if "server-side-encryption" in name} == sent
    link = urlsplit(storage.link(prefix + "x", "PUT", 60))
    assert {name: values[0] for name, values in parse_qs(link.fragment).items()} == sent
    assert set(sent) <= set(parse_qs(link.query)["X-Amz-SignedHeaders"][0].split(";"))
    assert "#" not in storage.link(prefix + "x", "GET", 60)


@pytest.mark.parametrize(
    ("addressing", "host", "path"),
    [("path", "s3.example:9000", "/exports/a%20b"), ("virtual", "exports.s3.example:9000", "/a%20b")],
)
def test_buckets_are_addressed_by_path_or_by_host(
    s3: S3, monkeypatch: pytest.MonkeyPatch, addressing: str, host: str, path: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example:9000")
    config = S3Config(bucket=s3.bucket, addressing=addressing)  # type: ignore[arg-type]
    link = urlsplit(open_storage(StorageConfig(roots=[], s3=config)).link(f"{s3.url}/a%20b", "GET", 60))
    assert (link.netloc, link.path) == (host, path)
