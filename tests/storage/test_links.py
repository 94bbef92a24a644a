"""Signed links: a process without credentials reads and writes just what it was given."""

from __future__ import annotations

import time
from pathlib import Path

import boto3
import pytest
from services import S3
from storage.faulty import Proxy

from common.contract import Links
from common.errors import AccessDenied, InvalidRef, StorageFailed
from common.storage import S3Config, Storage, StorageConfig, open_storage


@pytest.fixture
def owner(s3: S3, between: Proxy) -> Storage:
    """Who may do all and signs links."""
    return open_storage(s3.config())


def _linked(owner: Storage, s3: S3, *refs: str, seconds: float = 60) -> Storage:
    links = {ref: Links(get=owner.link(ref, "GET", seconds), put=owner.link(ref, "PUT", seconds)) for ref in refs}
    return open_storage(s3.config(links=True), links)


def test_a_ref_without_a_link_is_refused_by_name(s3: S3, owner: Storage, prefix: str, tmp_path: Path) -> None:
    storage = _linked(owner, s3, prefix + "x")
    for use in (
        lambda: storage.size(prefix + "y"),
        lambda: storage.write(prefix + "y", b""),
        lambda: storage.local(prefix + "y", tmp_path),
    ):
        with pytest.raises(InvalidRef, match=prefix + "y"):
            use()
    assert storage.found(prefix) == []
    assert storage.delete(prefix) == 0


def test_a_link_is_used_although_there_are_credentials(s3: S3, owner: Storage, prefix: str) -> None:
    config = StorageConfig(
        roots=[], s3=S3Config(bucket=s3.bucket, addressing="path"), fetch_hosts=["127.0.0.1"], fetch_private=True
    )
    storage = open_storage(config, {prefix + "x": Links(put=owner.link(prefix + "x", "PUT", 60))})
    assert storage.write(prefix + "x", b"x")
    with pytest.raises(InvalidRef, match="no link to read"):
        storage.size(prefix + "x")


def test_a_link_past_its_time_is_denied_and_not_tried_again(
    s3: S3, owner: Storage, prefix: str, between: Proxy, tmp_path: Path
) -> None:
    owner.write(prefix + "x", b"x")
    storage = _linked(owner, s3, prefix + "x", seconds=1)
    time.sleep(2.1)
    (tmp_path / "new").write_bytes(b"new")
    for use in (
        lambda: storage.size(prefix + "x"),
        lambda: storage.local(prefix + "x", tmp_path),
        lambda: storage.write(prefix + "x", b"y"),
        lambda: storage.put(tmp_path / "new", prefix + "x"),
    ):
        between.seen.clear()
        with pytest.raises(AccessDenied) as denied:
            use()
        assert not denied.value.retryable
        assert len(between.seen) == 1
        assert "Signature" not in str(denied.value)


def test_a_link_for_one_object_is_none_for_another(s3: S3, owner: Storage, prefix: str) -> None:
    owner.write(prefix + "x", b"x")
    forged = owner.link(prefix + "x", "GET", 60).replace("/x?", "/y?")
    storage = open_storage(s3.config(links=True), {prefix + "y": Links(get=forged)})
    with pytest.raises(AccessDenied):
        storage.size(prefix + "y")


@pytest.mark.parametrize("kind", ["503", "lost"])
def test_an_upload_over_a_link_gets_through_a_store_that_fails_now_and_then(
    s3: S3, owner: Storage, prefix: str, between: Proxy, tmp_path: Path, kind: str
) -> None:
    storage = _linked(owner, s3, prefix + "x")
    (tmp_path / "new").write_bytes(b"new" * 1_000_000)
    between.fault(kind, "PUT", times=2)  # type: ignore[arg-type]
    storage.put(tmp_path / "new", prefix + "x")
    assert owner.size(prefix + "x") == 3_000_000


def test_what_is_spoiled_on_its_way_over_a_link_is_not_stored(
    s3: S3, owner: Storage, prefix: str, between: Proxy
) -> None:
    between.fault("spoiled", "PUT", times=100)
    with pytest.raises(StorageFailed):
        _linked(owner, s3, prefix + "x").write(prefix + "x", b"abc")
    assert owner.size(prefix + "x") is None


def test_a_writer_whose_first_answer_got_lost_still_knows_that_it_was_first(
    s3: S3, owner: Storage, prefix: str, between: Proxy
) -> None:
    storage = _linked(owner, s3, prefix + "claim")
    between.fault("lost", "PUT")
    assert storage.write(prefix + "claim", b"run 1", only_new=True)
    between.fault("lost", "PUT")
    assert not storage.write(prefix + "claim", b"run 2", only_new=True)


def test_links_lead_only_to_hosts_that_are_allowed(s3: S3, owner: Storage, prefix: str, between: Proxy) -> None:
    links = {prefix + "x": Links(get=owner.link(prefix + "x", "GET", 60), put=owner.link(prefix + "x", "PUT", 60))}
    with pytest.raises(InvalidRef, match="no host is allowed"):
        open_storage(StorageConfig(roots=[]), links)
    for config, why in (
        (StorageConfig(roots=[], fetch_hosts=["elsewhere"], fetch_private=True), "is not one that is read from here"),
        (StorageConfig(roots=[], fetch_hosts=["127.0.0.1"]), "URLs are not read here"),
    ):
        storage = open_storage(config, links)
        for use in (lambda s=storage: s.size(prefix + "x"), lambda s=storage: s.write(prefix + "x", b"")):
            with pytest.raises(InvalidRef, match=why):
                use()
    assert between.seen == []


@pytest.mark.parametrize(
    "url",
    ["http://[", "http://127.0.0.1/\ud800", "{put}#Content-Length=0", "{put}#x-amz-a=1%0d%0aX:2", "{put}#x-amz-%E9=1"],
)
def test_a_link_that_is_none_is_refused_and_not_tried_again(
    s3: S3, owner: Storage, prefix: str, between: Proxy, url: str
) -> None:
    ref = prefix + "x"
    storage = open_storage(s3.config(links=True), {ref: Links(put=url.format(put=owner.link(ref, "PUT", 60)))})
    with pytest.raises(InvalidRef) as refused:
        storage.write(ref, b"x")
    assert refused.value.message.encode()
    assert between.seen == []


def test_the_encryption_that_a_link_was_signed_for_is_asked_for(s3: S3, between: Proxy, prefix: str) -> None:
    config = S3Config(bucket=s3.bucket, addressing="path", encryption="AES256")
    owner = open_storage(StorageConfig(roots=[], s3=config))
    assert _linked(owner, s3, prefix + "x").write(prefix + "x", b"x")
    assert between.seen[-1].headers["x-amz-server-side-encryption"] == "AES256"
    head = boto3.client("s3", endpoint_url=s3.endpoint).head_object(
        Bucket=s3.bucket, Key=prefix.removeprefix(f"{s3.url}/") + "x"
    )
    assert head["ContentLength"] == 1
