"""Seldom answers of a bucket's store, and what they mean to whoever asked."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import boto3
import pytest
from services import BUCKET, S3
from storage.answering_store import Answer, Store, say, store
from storage.faulty import Proxy, Seen, proxy

from common.errors import AccessDenied, ExportError, InvalidRef, StorageFailed
from common.storage import S3Config, Storage, StorageConfig, open_storage

LARGE = 20_000_000
"""Three parts."""


def _error(status: int, code: str) -> Answer:
    body = f"<Error><Code>{code}</Code><Message>as it is</Message></Error>".encode()
    return lambda handler, seen: say(handler, status, body, Content_Type="application/xml")


@pytest.fixture
def told(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], Store]]:
    """Starts a store in the place of the real one."""
    with ExitStack() as running:

        def start(answer: Answer) -> Store:
            begun = running.enter_context(store(answer))
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", begun.url)
            return begun

        yield start


def _uploads(s3: S3, prefix: str) -> list[str]:
    client = boto3.client("s3", endpoint_url=s3.endpoint)
    found = client.list_multipart_uploads(Bucket=s3.bucket, Prefix=prefix.removeprefix(f"{s3.url}/"))
    return [upload["Key"].rpartition("/")[2] for upload in found.get("Uploads", [])]


def _begin_upload(s3: S3, ref: str) -> None:
    client = boto3.client("s3", endpoint_url=s3.endpoint)
    key = ref.removeprefix(f"{s3.url}/")
    upload = client.create_multipart_upload(Bucket=s3.bucket, Key=key)["UploadId"]
    client.upload_part(Bucket=s3.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"part")


# --- what a store says ----------------------------------------------------------------------------------------------


def test_a_claim_that_met_another_at_the_same_moment_is_made_again(s3: S3, told: Callable[[Answer], Store]) -> None:
    conflict, answers = _error(409, "ConditionalRequestConflict"), iter([409, 200])

    def answer(handler: BaseHTTPRequestHandler, seen: Seen) -> None:
        if next(answers) == 409:
            conflict(handler, seen)
        else:
            say(handler, 200, ETag='"1"')

    running = told(answer)
    assert open_storage(s3.config()).write(f"{s3.url}/claim", b"mine", only_new=True)
    assert [(seen.method, seen.headers["if-none-match"]) for seen in running.seen] == [("PUT", "*")] * 2


@pytest.mark.parametrize(
    ("code", "error"), [("AccessDenied", AccessDenied), ("InternalError", StorageFailed), ("InvalidTag", InvalidRef)]
)
def test_an_object_that_a_store_does_not_delete_is_told_by_its_ref(
    s3: S3, told: Callable[[Answer], Store], code: str, error: type[ExportError]
) -> None:
    def answer(handler: BaseHTTPRequestHandler, seen: Seen) -> None:
        if seen.method == "POST":
            said = f"<Error><Key>job/a b</Key><Code>{code}</Code><Message>kept</Message></Error>"
            say(handler, 200, f"<DeleteResult>{said}</DeleteResult>".encode())
        elif "uploads" in seen.path:
            say(handler, 200, b"<ListMultipartUploadsResult/>")
        else:
            listed = "".join(f"<Contents><Key>job/{name}</Key><Size>1</Size></Contents>" for name in ("a b", "c"))
            say(handler, 200, f"<ListBucketResult>{listed}</ListBucketResult>".encode())

    told(answer)
    with pytest.raises(error, match=re.escape(f"s3://{BUCKET}/job/a%20b: the store answered {code} (kept)")) as kept:
        open_storage(s3.config()).delete(f"{s3.url}/job/")
    assert kept.value.details["store"] == code


def test_a_request_that_a_store_finds_wrong_is_not_sent_again(s3: S3, told: Callable[[Answer], Store]) -> None:
    running = told(_error(400, "InvalidArgument"))
    with pytest.raises(InvalidRef, match=r"answered 400 InvalidArgument \(as it is\)") as refused:
        open_storage(s3.config()).write(f"{s3.url}/x", b"x")
    assert not refused.value.retryable
    assert len(running.seen) == 1


def test_a_list_that_cannot_be_read_is_a_failure_and_no_empty_list(s3: S3, told: Callable[[Answer], Store]) -> None:
    told(lambda handler, seen: say(handler, 200, b"<html>It works!"))
    with pytest.raises(StorageFailed, match=f"^{s3.url}/job/: ") as failed:
        open_storage(s3.config()).found(f"{s3.url}/job/")
    assert failed.value.retryable


def test_a_list_without_an_end_is_a_failure(s3: S3, told: Callable[[Answer], Store]) -> None:
    said = "<IsTruncated>true</IsTruncated><NextContinuationToken>on</NextContinuationToken>"
    running = told(lambda handler, seen: say(handler, 200, f"<ListBucketResult>{said}</ListBucketResult>".encode()))
    with pytest.raises(StorageFailed, match="same next token"):
        open_storage(s3.config()).found(f"{s3.url}/job/")
    assert len(running.seen) == 2


@pytest.mark.parametrize("kept", [(), ("AWS_ACCESS_KEY_ID",)])
def test_credentials_that_are_missing_or_half_there_are_told_before_anything_is_sent(
    s3: S3, between: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: tuple[str, ...]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        if name not in kept:
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(ExportError) as denied:
        open_storage(s3.config()).size(f"{s3.url}/x")
    assert not denied.value.retryable
    assert "credentials" in denied.value.message
    assert between.seen == []


def test_a_bucket_whose_name_none_can_have_is_refused_before_anything_is_sent(between: Proxy) -> None:
    storage = open_storage(StorageConfig(roots=[], s3=S3Config(bucket="no bucket", addressing="path")))
    with pytest.raises(InvalidRef, match="Invalid bucket name") as refused:
        storage.write("s3://no bucket/x", b"x")
    assert not refused.value.retryable
    assert between.seen == []


# --- uploads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(LARGE))
    return path


def test_an_upload_whose_last_answer_got_lost_is_found_to_be_whole(
    s3: S3, between: Proxy, prefix: str, source: Path
) -> None:
    between.fault("lost", "POST", "uploadId=")
    storage = open_storage(s3.config())
    stored = storage.put(source, prefix + "x")
    assert sum(seen.method == "POST" and "uploadId=" in seen.path for seen in between.seen) == 2
    assert [(at.ref, at.size) for at in storage.found(prefix)] == [(stored.ref, LARGE)]
    assert _uploads(s3, prefix) == []


class Meddled(Proxy):
    """A proxy that lets something happen just before a POST is passed on."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.before: dict[str, Callable[[], None]] = {}

    def take(self, seen: Seen, body: bytes) -> None:
        for part in [part for part in self.before if seen.method == "POST" and part in seen.path]:
            self.before.pop(part)()
        super().take(seen, body)


@pytest.fixture
def meddled(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Meddled]:
    """A proxy through which this process reaches the S3 server."""
    with proxy(s3.endpoint, Meddled) as begun:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", begun.url)
        yield begun


def test_an_upload_that_may_not_be_completed_is_denied_and_leaves_nothing(
    s3: S3, between: Proxy, prefix: str, source: Path
) -> None:
    between.fault("403", "POST", "uploadId=")
    with pytest.raises(AccessDenied, match="ExpiredToken"):
        open_storage(s3.config()).put(source, prefix + "x")
    assert open_storage(s3.config()).found(prefix, uploads=True) == []


class Forgetful:
    """Answers of a store that takes an upload's parts, and knows nothing of the upload when it is to be completed;
    ``there`` is the SHA-256 of an object that lies in its place."""

    def __init__(self, there: str | None) -> None:
        self._there = there

    def __call__(self, handler: BaseHTTPRequestHandler, seen: Seen) -> None:
        if seen.method == "POST" and seen.path.endswith("?uploads"):
            begun = "<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
            say(handler, 200, begun.encode())
        elif seen.method == "PUT":
            say(handler, 200, ETag='"part"')
        elif seen.method == "HEAD":
            self._head(handler)
        else:
            _error(404, "NoSuchUpload")(handler, seen)

    def _head(self, handler: BaseHTTPRequestHandler) -> None:
        if self._there is None:
            say(handler, 404)
            return
        handler.send_response_only(200)
        for name, value in {"Content-Length": str(LARGE), "ETag": '"there"', "x-amz-meta-sha256": self._there}.items():
            handler.send_header(name, value)
        handler.end_headers()


@pytest.mark.parametrize("there", ["0" * 64, None], ids=["an older object", "nothing"])
def test_an_upload_that_another_aborts_fails_whether_or_not_an_older_object_lies_there(
    s3: S3, told: Callable[[Answer], Store], prefix: str, source: Path, there: str | None
) -> None:
    running = told(Forgetful(there))
    with pytest.raises(StorageFailed, match=f"^the upload of {prefix}x was aborted by another$") as failed:
        open_storage(s3.config()).put(source, prefix + "x")
    assert failed.value.retryable
    assert running.seen[-1].method == "DELETE"  # which finds nothing to abort, and that is no other error


def test_an_upload_that_is_complete_when_it_is_to_be_completed_again_is_stored(
    s3: S3, told: Callable[[Answer], Store], prefix: str, source: Path
) -> None:
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    running = told(Forgetful(sha256))
    assert open_storage(s3.config()).put(source, prefix + "x") == (prefix + "x", LARGE, sha256)
    assert [seen.method for seen in running.seen].count("DELETE") == 0


def test_a_file_that_is_cut_while_it_goes_up_is_not_stored(s3: S3, meddled: Meddled, prefix: str, source: Path) -> None:
    storage = open_storage(s3.config())
    meddled.before["uploads"] = lambda: os.truncate(source, LARGE // 2)
    with pytest.raises(StorageFailed, match="source changed while it was stored"):
        storage.put(source, prefix + "x")
    assert storage.found(prefix, uploads=True) == []


def test_a_small_file_that_has_other_bytes_than_it_says_is_not_stored(s3: S3, between: Proxy, prefix: str) -> None:
    storage = open_storage(s3.config())
    with pytest.raises(StorageFailed, match="version changed while it was stored"):
        storage.put(Path("/proc/version"), prefix + "x")  # which has no bytes by its size, and some when it is read
    assert [seen for seen in between.seen if seen.method == "PUT"] == []


def test_a_file_that_is_gone_is_a_failure_with_its_number(s3: S3, prefix: str, tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="No such file") as failed:
        open_storage(s3.config()).put(tmp_path / "gone", prefix + "x")
    assert failed.value.details["errno"] == 2


def test_unfinished_uploads_are_found_as_nothing_yet_where_they_are_asked_for(
    s3: S3, prefix: str, tmp_path: Path
) -> None:
    storage = open_storage(s3.config())
    storage.write(prefix + "a", b"1")
    _begin_upload(s3, prefix + "b c")
    assert [(at.ref, at.size) for at in storage.found(prefix)] == [(prefix + "a", 1)]
    both = storage.found(prefix, uploads=True)
    assert [(at.ref, at.size) for at in both] == [(prefix + "a", 1), (prefix + "b%20c", 0)]
    assert all(0 <= at.age < 60 for at in both)


def test_a_folders_marker_is_no_object_but_goes_with_the_folder(s3: S3, prefix: str) -> None:
    storage, theirs = open_storage(s3.config()), boto3.client("s3", endpoint_url=s3.endpoint)
    theirs.put_object(Bucket=s3.bucket, Key=prefix.removeprefix(f"{s3.url}/") + "job/", Body=b"")
    storage.write(prefix + "job/x", b"1")
    assert [at.ref for at in storage.found(prefix)] == [prefix + "job/x"]
    storage.delete(prefix + "job/")
    left = theirs.list_objects_v2(Bucket=s3.bucket, Prefix=prefix.removeprefix(f"{s3.url}/"))
    assert left.get("Contents", []) == []


def test_an_object_is_deleted_without_the_uploads_of_longer_names(s3: S3, prefix: str) -> None:
    storage = open_storage(s3.config())
    storage.write(prefix + "a", b"1")
    for name in ("a", "ab"):
        _begin_upload(s3, prefix + name)
    assert storage.delete(prefix + "a") == 1
    assert _uploads(s3, prefix) == ["ab"]


def test_an_upload_that_may_not_be_ended_is_told(s3: S3, between: Proxy, prefix: str) -> None:
    storage: Storage = open_storage(s3.config())
    storage.write(prefix + "job/x", b"1")
    _begin_upload(s3, prefix + "job/y")
    between.fault("403", "DELETE", "uploadId=")
    with pytest.raises(AccessDenied, match="ExpiredToken"):
        storage.delete(prefix + "job/")
    assert storage.size(prefix + "job/x") == 1
    assert _uploads(s3, prefix) == ["y"]
