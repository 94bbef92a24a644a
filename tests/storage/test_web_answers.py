"""Servers that answer less, later or otherwise than they were asked, and what is made of that."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from processes import free_port
from storage.answering_store import Answer, say, store
from storage.faulty import Seen, page, site

from common.contract import Links
from common.errors import ExportError, InvalidRef, ObjectMissing, PayloadTooLarge, StorageFailed
from common.storage import Storage, StorageConfig, open_storage
from common.storage.https import Asked, Web
from common.storage.ranges import PART

DATA = os.urandom(3_000_000)
MIB = 1 << 20


@pytest.fixture
def storage() -> Storage:
    return open_storage(StorageConfig(roots=[], fetch_hosts=["127.0.0.1"], fetch_private=True))


def ranged(data: bytes, most: int | None = None, **headers: str) -> Answer:
    """A page that knows ranges, and gives at most so many bytes of one."""

    def answer(handler: BaseHTTPRequestHandler, seen: Seen) -> None:
        start, stop = _span(seen, len(data))
        part = data[start : stop if most is None else min(stop, start + most)]
        span = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        say(handler, 206, part, Content_Range=span, **headers)

    return answer


def _span(seen: Seen, size: int) -> tuple[int, int]:
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", seen.headers["range"])
    assert found is not None
    return int(found[1]), min(int(found[2]) + 1, size) if found[2] else size


# --- less than was asked for ----------------------------------------------------------------------------------------


def test_a_server_that_gives_less_at_once_than_was_asked_for_is_asked_for_the_rest(
    storage: Storage, tmp_path: Path
) -> None:
    with store(ranged(DATA, MIB, ETag='"1"')) as web:
        assert b"".join(storage.read(f"{web.url}/x", 0, len(DATA))) == DATA
        assert storage.local(f"{web.url}/x", tmp_path).read_bytes() == DATA
    assert [seen.headers["range"].partition("=")[2].partition("-")[0] for seen in web.seen[:3]] == [
        "0",
        str(MIB),
        str(2 * MIB),
    ]


def test_parts_of_what_may_be_different_objects_are_not_joined(storage: Storage, tmp_path: Path) -> None:
    with store(ranged(DATA, MIB)) as web, pytest.raises(StorageFailed, match="ended early") as failed:
        list(storage.read(f"{web.url}/x", 0, len(DATA)))
    assert failed.value.retryable
    assert len(web.seen) == 1


def test_an_object_that_nothing_tells_from_another_is_fetched_with_one_request(
    storage: Storage, tmp_path: Path
) -> None:
    data = DATA * 3  # more than a part
    sha256 = hashlib.sha256(data).hexdigest()
    with store(ranged(data)) as web:
        assert storage.local(f"{web.url}/x", tmp_path, size=len(data), sha256=sha256).read_bytes() == data
    assert [seen.headers["range"] for seen in web.seen] == [f"bytes=0-{PART - 1}", "bytes=0-"]


def test_a_body_that_is_short_is_an_error_where_no_length_was_said(storage: Storage) -> None:
    with site() as web:
        web.pages["/x"] = page(DATA[:100], say_length=False)
        with pytest.raises(StorageFailed, match="shorter than it should be"):
            list(storage.read(f"{web.url}/x", 0, 101))


# --- parts side by side ---------------------------------------------------------------------------------------------


def test_a_download_whose_object_changes_ends_the_parts_that_are_still_coming(storage: Storage, tmp_path: Path) -> None:
    data, sent = bytes(3 * PART), list[int]()
    under_way, hung_up = threading.Event(), threading.Event()
    usual = ranged(data, ETag='"1"')

    def answer(handler: BaseHTTPRequestHandler, seen: Seen) -> None:
        start, _ = _span(seen, len(data))
        if start == PART:
            under_way.wait(20)
            say(handler, 412)
        elif start == 2 * PART:
            handler.send_response_only(206)
            span = f"bytes {start}-{len(data) - 1}/{len(data)}"
            for name, value in {"Content-Range": span, "Content-Length": str(PART), "ETag": '"1"'}.items():
                handler.send_header(name, value)
            handler.end_headers()
            try:
                for _ in range(0, PART, MIB // 16):
                    handler.wfile.write(bytes(MIB // 16))
                    sent.append(MIB // 16)
                    under_way.set()
                    hung_up.wait(0.02)
            except OSError:
                hung_up.set()
        else:
            usual(handler, seen)

    with store(answer) as web, pytest.raises(StorageFailed, match="changed while it was read"):
        storage.local(f"{web.url}/x", tmp_path)
    assert hung_up.wait(20)
    assert 0 < sum(sent) < PART
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_cuts_off_while_it_is_fetched_is_not_taken_for_whole(
    storage: Storage, tmp_path: Path
) -> None:
    data = os.urandom(PART + MIB)
    usual = ranged(data, ETag='"1"')

    def answer(handler: BaseHTTPRequestHandler, seen: Seen) -> None:
        if seen.headers["range"] == f"bytes=0-{PART - 1}":
            handler.send_response_only(206)
            span = f"bytes 0-{PART - 1}/{len(data)}"
            for name, value in {"Content-Range": span, "Content-Length": str(PART), "ETag": '"1"'}.items():
                handler.send_header(name, value)
            handler.end_headers()
            _once(lambda: [path for path in tmp_path.iterdir() if path.stat().st_size == len(data)])
            (unfinished,) = tmp_path.iterdir()
            os.truncate(unfinished, 0)
            handler.wfile.write(data[:PART])
        else:
            usual(handler, seen)

    with store(answer) as web, pytest.raises(StorageFailed, match="cut off by another"):
        storage.local(f"{web.url}/x", tmp_path)
    assert list(tmp_path.iterdir()) == []


def _once(holds: Callable[[], object]) -> None:
    """Wait for what is about to happen in another thread."""
    for _ in range(1_000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about in ten seconds")


# --- who cannot be asked, and what is no answer ---------------------------------------------------------------------


def test_a_server_that_is_not_there_is_asked_five_times(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match=r"ConnectError.*; tried 5 times") as failed:
        storage.local(f"http://127.0.0.1:{free_port()}/x", tmp_path)
    assert failed.value.retryable


def test_a_name_that_does_not_resolve_is_told_as_such(tmp_path: Path) -> None:
    host = "x" * 64 + ".example"  # a label too long for any name: no server is asked for it
    storage = open_storage(StorageConfig(roots=[], fetch_hosts=[host]))
    with pytest.raises(StorageFailed, match=r"the name 'x+\.example' does not resolve"):
        storage.size(f"https://{host}/x")


def test_nothing_is_asked_of_a_server_once_its_time_is_over() -> None:
    with store(ranged(DATA)) as web:
        late = Asked("GET", f"{web.url}/x", "the graph", time.monotonic() - 1, {})
        with pytest.raises(StorageFailed, match="the graph takes longer than 1,800 s"):
            Web(["127.0.0.1"], private=True).ask(late)
    assert web.seen == []


def test_an_object_that_takes_too_long_ends_between_two_of_its_pieces() -> None:
    asking = Web(["127.0.0.1"], private=True)
    with store(ranged(DATA)) as web:
        asked = Asked("GET", f"{web.url}/x", "the graph", time.monotonic() + 0.5, {"Range": "bytes=0-"})
        answer = asking.ask(asked)
        next(answer.body)
        _once(lambda: time.monotonic() > asked.until)
        with pytest.raises(StorageFailed, match="takes longer"):
            list(answer.body)
        answer.close()


def test_of_a_long_refusal_only_the_beginning_is_read(storage: Storage, tmp_path: Path) -> None:
    read_all = threading.Event()

    def answer(handler: BaseHTTPRequestHandler, seen: Seen) -> None:
        handler.send_response_only(404)
        handler.send_header("Content-Length", str(1 << 30))
        handler.end_headers()
        try:
            for _ in range(1 << 14):
                handler.wfile.write(bytes(1 << 16))
        except OSError:
            return
        read_all.set()

    with store(answer) as web, pytest.raises(ObjectMissing, match=r"/x: its server answered 404$"):
        storage.local(f"{web.url}/x", tmp_path)
    assert not read_all.is_set()


def test_what_lies_in_the_way_of_a_download_is_a_failure_of_the_disk(storage: Storage, tmp_path: Path) -> None:
    with store(ranged(DATA, ETag='"1"')) as web:
        path = storage.local(f"{web.url}/x", tmp_path)
        path.unlink()
        path.mkdir()
        with pytest.raises(StorageFailed, match=r"cannot keep .*/x: Is a directory") as failed:
            storage.local(f"{web.url}/x", tmp_path)
    assert failed.value.details["errno"] == 21
    assert list(tmp_path.iterdir()) == [path]


# --- signed links ---------------------------------------------------------------------------------------------------

REF = "s3://exports/x"


def linked(url: str, *, readable: bool = True) -> Storage:
    links = {REF: Links(put=f"{url}/put", get=f"{url}/get" if readable else None)}
    return open_storage(StorageConfig(roots=[], fetch_hosts=["127.0.0.1"], fetch_private=True), links)


def putting(status: int, body: bytes = b"", **headers: str) -> Answer:
    """A store that answers every PUT so, and every GET with three bytes."""

    def answer(handler: BaseHTTPRequestHandler, seen: Seen) -> None:
        if seen.method == "PUT":
            say(handler, status, body, **headers)
        else:
            ranged(b"old", ETag='"1"')(handler, seen)

    return answer


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (putting(307, Location="/elsewhere"), InvalidRef, "is redirected, which is not followed for PUT"),
        (putting(404, b"<Error><Code>NoSuchBucket</Code></Error>"), InvalidRef, "answered 404 NoSuchBucket"),
        (putting(202), StorageFailed, "the store answered 202 to a PUT"),
    ],
)
def test_what_is_no_answer_to_a_put_fails_it_after_one_request(
    answer: Answer, error: type[ExportError], says: str
) -> None:
    with store(answer) as web, pytest.raises(error, match=says):
        linked(web.url).write(REF, b"x")
    assert [seen.path for seen in web.seen] == ["/put"]


def test_what_lies_there_after_a_put_has_to_be_as_long_as_what_was_sent(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"newer")
    with store(putting(200)) as web:
        with pytest.raises(StorageFailed, match="is not in the store as it was sent"):
            linked(web.url).put(tmp_path / "new", REF)
        # Without a link to read it the store's word is all there is.
        assert linked(web.url, readable=False).put(tmp_path / "new", REF).size == 5


def test_a_file_too_large_for_a_link_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as sparse:
        sparse.truncate((5 << 30) + 1)
    with store(putting(200)) as web, pytest.raises(PayloadTooLarge, match="large has 5,368,709,121 bytes"):
        linked(web.url).put(tmp_path / "large", REF)
    assert web.seen == []


def test_a_scratch_folder_that_cannot_be_made_is_named_as_the_cause(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with store(ranged(DATA)) as web, pytest.raises(StorageFailed, match="cannot keep") as caught:
        storage.local(f"{web.url}/x", tmp_path / "file" / "scratch")
    assert caught.value.details["errno"] == errno.ENOTDIR


def test_a_file_that_is_not_what_it_was_is_not_sent_over_a_link(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"newer")
    with store(putting(200)) as web:
        with pytest.raises(StorageFailed, match="new changed before it was stored"):
            linked(web.url).put(tmp_path / "new", REF, sha256="0" * 64)
        with pytest.raises(StorageFailed, match="cannot read gone: No such file"):
            linked(web.url).put(tmp_path / "gone", REF)
    assert web.seen == []
