"""Refs to the web: only hosts that are allowed, only public addresses, no more bytes and hops than wanted."""

from __future__ import annotations

import hashlib
import os
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from storage.faulty import Site, page, site

from common.errors import AccessDenied, InvalidRef, ObjectMissing, PayloadMismatch, PayloadTooLarge, StorageFailed
from common.storage import Storage, StorageConfig, open_storage
from common.storage.https import HttpsStorage, Web, is_public

DATA = os.urandom(3_000_000)


@pytest.fixture
def web() -> Iterator[Site]:
    with site() as running:
        yield running


@pytest.fixture
def storage() -> Storage:
    return open_storage(StorageConfig(roots=[], fetch_hosts=["127.0.0.1"], fetch_private=True))


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    """A certificate and key for localhost that nobody trusts."""
    path = tmp_path / "localhost.pem"
    what = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", path, "-out", path]
    subprocess.run(["openssl", *what.split(), *names], check=True, capture_output=True)
    return path


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "017700000001",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.0.1",
        "100.64.0.1",
        "169.254.169.254",
        "224.0.0.1",
        "255.255.255.255",
        "[::1]",
        "[::]",
        "[::ffff:10.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:a00:1::]",
        "[fe80::1]",
        "[fd00::1]",
        "[fec0::1]",
        "[ff02::1]",
        "localhost",
    ],
)
def test_an_address_that_is_not_public_is_refused_even_where_its_host_is_allowed(host: str, tmp_path: Path) -> None:
    storage = open_storage(StorageConfig(roots=[], fetch_hosts=[host]))
    with pytest.raises(InvalidRef, match="not at a public address") as refused:
        storage.local(f"https://{host}/x", tmp_path)
    assert not refused.value.retryable


def test_what_counts_as_public() -> None:
    for address in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(address)
    for address in ("2001:db8::1", "2001::1", "198.18.0.1", "192.0.2.1", "240.0.0.1", "fe80::1%eth0", "::7f00:1"):
        assert not is_public(address)


def test_plain_http_is_for_private_places_only(web: Site, tmp_path: Path) -> None:
    web.pages["/x"] = page(DATA)
    with pytest.raises(InvalidRef):
        open_storage(StorageConfig(roots=[], fetch_hosts=["127.0.0.1"])).local(f"{web.url}/x", tmp_path)
    assert web.seen == []


@pytest.mark.parametrize("allowed", ["example.com", "*.example.com", "*.0.0.1x", "27.0.0.1"])
def test_a_host_that_is_not_on_the_list_is_never_asked(web: Site, tmp_path: Path, allowed: str) -> None:
    storage = open_storage(StorageConfig(roots=[], fetch_hosts=[allowed], fetch_private=True))
    with pytest.raises(InvalidRef, match="not one that is read from here") as refused:
        storage.local(f"{web.url}/x", tmp_path)
    assert refused.value.details["allowed"] == allowed
    assert web.seen == []


def test_a_whole_domain_can_be_allowed(web: Site, tmp_path: Path) -> None:
    web.pages["/x"] = page(DATA)
    storage = open_storage(StorageConfig(roots=[], fetch_hosts=["*.0.0.1"], fetch_private=True))
    assert storage.local(f"{web.url}/x", tmp_path).read_bytes() == DATA


def test_a_payload_is_fetched_from_a_server_that_knows_neither_ranges_nor_lengths(
    web: Site, storage: Storage, tmp_path: Path
) -> None:
    web.pages["/x.json?secret=1"] = page(DATA, say_length=False)
    sha256 = hashlib.sha256(DATA).hexdigest()
    path = storage.local(f"{web.url}/x.json?secret=1", tmp_path, size=len(DATA), sha256=sha256, limit=len(DATA))
    assert path.read_bytes() == DATA
    with pytest.raises(InvalidRef, match="how long"):
        storage.size(f"{web.url}/x.json?secret=1")


def test_size_and_parts_are_read_where_the_server_can(web: Site, storage: Storage) -> None:
    web.pages["/x"] = page(DATA)
    assert storage.size(f"{web.url}/x") == len(DATA)
    assert b"".join(storage.read(f"{web.url}/x", 0, 100)) == DATA[:100]
    with pytest.raises(StorageFailed):
        list(storage.read(f"{web.url}/x", 1, 100))
    assert storage.found(f"{web.url}/none") == []


@pytest.mark.parametrize("headers", [{}, {"ETag": '"1"'}])
def test_a_download_that_breaks_off_is_begun_again(
    web: Site, storage: Storage, tmp_path: Path, headers: dict[str, str]
) -> None:
    web.pages["/x"] = page(DATA, cut=2, **headers)
    if headers:  # no ranges: the rest cannot be had, and nothing is pieced together
        with pytest.raises(StorageFailed):
            storage.local(f"{web.url}/x", tmp_path / "scratch")
        assert list((tmp_path / "scratch").iterdir()) == []
    else:
        assert storage.local(f"{web.url}/x", tmp_path / "scratch").read_bytes() == DATA


def test_more_bytes_than_wanted_are_refused_at_once_or_when_they_come(
    web: Site, storage: Storage, tmp_path: Path
) -> None:
    web.pages["/said"], web.pages["/unsaid"] = page(DATA), page(DATA, say_length=False)
    for path in ("/said", "/unsaid"):
        with pytest.raises(PayloadTooLarge):
            storage.local(web.url + path, tmp_path / "scratch", limit=len(DATA) - 1)
        with pytest.raises(PayloadMismatch):
            storage.local(web.url + path, tmp_path / "scratch", size=len(DATA) + 1)
        with pytest.raises(PayloadMismatch):
            storage.local(web.url + path, tmp_path / "scratch", sha256="0" * 64)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_redirects_are_followed_on_the_same_host_only_and_not_forever(
    web: Site, storage: Storage, tmp_path: Path
) -> None:
    web.pages["/x"] = page(DATA)
    web.pages["/here"] = page(b"", status=302, Location="/x")
    web.pages["/round"] = page(b"", status=307, Location="/round")
    with site() as other:
        other.pages["/x"] = page(b"secret")
        for path, location in (
            ("/port", f"{other.url}/x"),
            ("/name", web.url.replace("127.0.0.1", "localhost") + "/x"),
            ("/meta", "http://169.254.169.254/latest"),
            ("/file", "file:///etc/passwd"),
        ):
            web.pages[path] = page(b"", status=302, Location=location)
            with pytest.raises(InvalidRef):
                storage.local(web.url + path, tmp_path)
        assert other.seen == []
    assert storage.local(f"{web.url}/here", tmp_path).read_bytes() == DATA
    web.seen.clear()
    with pytest.raises(InvalidRef, match="more than 3"):
        storage.local(f"{web.url}/round", tmp_path)
    assert len(web.seen) == 4


def test_a_redirect_to_what_is_no_url_is_refused(web: Site, storage: Storage, tmp_path: Path) -> None:
    for location in ("http://[", "http://127.0.0.1:99999/", "https://exa mple/", "http://127.0.0.1:x/"):
        web.pages["/x"] = page(b"", status=302, Location=location)
        with pytest.raises(InvalidRef):
            storage.local(f"{web.url}/x", tmp_path)


def test_dates_that_are_none_do_not_keep_an_object_from_being_read(web: Site, storage: Storage, tmp_path: Path) -> None:
    for date in ("yesterday", "Sat, 21 Nov 2026 10:00:00 -0000", "Sat, 99 Nov 99999 10:00:00 GMT", "0"):
        web.pages["/x"] = page(DATA, **{"Last-Modified": date})
        assert storage.local(f"{web.url}/x", tmp_path).read_bytes() == DATA
        web.pages["/x"] = page(DATA, **{"Last-Modified": "Sat, 21 Nov 2026 10:00:00 GMT", "Date": date})
        assert storage.size(f"{web.url}/x") == len(DATA)


def test_what_is_no_url_of_a_host_is_refused_with_a_message_that_can_be_sent(storage: Storage, tmp_path: Path) -> None:
    for ref in ("http://127.0.0.1:0/", "http://127.0.0.1:-1/", "http://127.0.0.1/\ud800", "http://[", "http://\ud800/"):
        with pytest.raises(InvalidRef) as refused:
            storage.local(ref, tmp_path)
        assert refused.value.message.encode()


@pytest.mark.parametrize(
    ("status", "error", "times"),
    [
        (403, AccessDenied, 1),
        (401, AccessDenied, 1),
        (404, ObjectMissing, 1),
        (400, InvalidRef, 1),
        (503, StorageFailed, 5),
    ],
)
def test_what_a_server_refuses_is_asked_again_only_where_that_can_help(
    web: Site, storage: Storage, tmp_path: Path, status: int, error: type[Exception], times: int
) -> None:
    web.pages["/x?signature=s"] = page(b"no", status=status)
    with pytest.raises(error) as refused:
        storage.local(f"{web.url}/x?signature=s", tmp_path)
    assert len(web.seen) == times
    assert "signature" not in str(refused.value)


def test_nothing_is_written_to_the_web(web: Site, storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    for use in (
        lambda: storage.put(tmp_path / "x", f"{web.url}/x"),
        lambda: storage.write(f"{web.url}/x", b"x"),
        lambda: storage.delete(f"{web.url}/x"),
        lambda: storage.link(f"{web.url}/x", "PUT", 1),
    ):
        with pytest.raises(InvalidRef, match="only read"):
            use()
    assert web.seen == []


def test_a_proxy_of_the_environment_plays_no_part(
    web: Site, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.pages["/x"] = page(DATA)
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert storage.local(f"{web.url}/x", tmp_path).read_bytes() == DATA


def test_a_certificate_counts_only_when_it_is_trusted_and_for_the_name_that_was_asked(
    tls: Path, tmp_path: Path
) -> None:
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    serving.load_cert_chain(tls)
    with site(serving) as web:
        web.pages["/x"] = page(DATA)
        named = web.url.replace("127.0.0.1", "localhost")
        stranger = HttpsStorage(Web(["localhost"], private=True))
        with pytest.raises(InvalidRef, match="not trusted"):
            stranger.local(f"{named}/x", tmp_path)
        friend = HttpsStorage(Web(["localhost", "127.0.0.1"], private=True, tls=ssl.create_default_context(cafile=tls)))
        assert friend.local(f"{named}/x", tmp_path).read_bytes() == DATA
        with pytest.raises(InvalidRef, match="not trusted"):
            friend.local(f"{web.url}/x", tmp_path)
        assert web.seen == ["/x"]
