"""``memvid-export nexus batch``: a file of documents gets into a collection as it is, whatever happens on the way."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard
from nexus.office import Office, Request, office
from operations.keyring import text_of
from processes import COMMAND, command, free_port
from spoken import Say, spoken

from control_plane.cli import main
from control_plane.nexus.batch import BATCH_BYTES, MAX_LINE_BYTES
from control_plane.nexus.commands import PATIENCE

WRITES = ("POST", "/v1/collections/books/documents")


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Office]:
    folder = tmp_path / "server"
    folder.mkdir()
    with office(folder) as found:
        yield found


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Say]:
    with spoken(main, "memvid-export", monkeypatch, capfd) as run:
        monkeypatch.setenv("MEMVID_EXPORT_API_KEY", text_of("red"))
        yield run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder / "books.jsonl"


def document(number: int, **more: Any) -> dict[str, Any]:
    return {"id": f"b{number}", "title": f"Book {number}", "vector": [1.0, number], **more}


def lines_of(documents: Sequence[object]) -> bytes:
    return b"".join(one if isinstance(one, bytes) else json.dumps(one).encode() + b"\n" for one in documents)


def arguments(house: Office, file: object, *more: object) -> list[object]:
    return ["nexus", "batch", file, "--url", house.url, "--collection", "books", "--batch-size", 100, *more]


def titles(count: int) -> dict[str, str]:
    return {f"b{number}": f"Book {number}" for number in range(count)}


def sent(house: Office) -> list[list[str]]:
    """Ids of each request that wrote documents."""
    return [[one["id"] for one in json.loads(request.body)["documents"]] for request in house.seen(*WRITES)]


def test_a_file_makes_its_collection_and_every_line_is_a_document_there(house: Office, say: Say, file: Path) -> None:
    more = {"payload": {"shelf": 3}, "docType": "novel", "permissions": ["red"], "text": "Once"}
    file.write_bytes(lines_of([document(number, **more) for number in range(250)]))
    code, out, err = say(*arguments(house, file, "--dimension", 2, "--model", "own/two", "--json"))
    assert (code, err.count("Sending")) == (0, 1), err
    report = json.loads(out)
    assert [len(ids) for ids in sent(house)] == [100, 100, 50]
    assert house.documents("books") == titles(250)
    made = house.ask("GET", "/v1/collections/books", key="red")
    assert (made["model"], made["dimension"]) == ("own/two", 2)
    one = house.ask("GET", "/v1/collections/books/documents/b7", key="red", params={"vector": True})
    assert {name: one[name] for name in more} == more
    assert one["vector"] == pytest.approx([1 / 50**0.5, 7 / 50**0.5])
    figures = {name: report[name] for name in ("collection", "lines", "sent", "created", "updated", "resumedAfter")}
    assert figures == {
        "collection": "books",
        "lines": 250,
        "sent": 250,
        "created": 250,
        "updated": 0,
        "resumedAfter": 0,
    }
    assert report["failed"] == []
    assert report["documentsPerSecond"] == pytest.approx(250 / report["seconds"], rel=0.1)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_same_file_again_replaces_and_the_report_lies_where_it_was_wished(
    house: Office, say: Say, file: Path
) -> None:
    file.write_bytes(lines_of([document(number) for number in range(3)]))
    assert say(*arguments(house, file, "--dimension", 2))[0] == 0
    file.write_bytes(lines_of([document(number) for number in range(5)]))
    code, out, _ = say(*arguments(house, file, "--report", file.with_name("report.json")))
    assert code == 0
    assert "5 documents were sent" in out
    assert "2 new, 3 replaced" in out
    report = json.loads(file.with_name("report.json").read_text())
    assert (report["sent"], report["created"], report["updated"], report["error"]) == (5, 2, 3, None)
    assert house.documents("books") == titles(5)


@pytest.mark.parametrize("packed", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_compressed_file_is_sent_as_if_it_were_not(
    house: Office, say: Say, file: Path, packed: Callable[[bytes], bytes]
) -> None:
    file.write_bytes(packed(lines_of([document(number) for number in range(120)])))
    assert say(*arguments(house, file, "--dimension", 2))[0] == 0
    assert house.documents("books") == titles(120)


def test_standard_input_is_sent_too_and_leaves_no_state(house: Office, tmp_path: Path) -> None:
    env = {"MEMVID_EXPORT_API_KEY": text_of("red")}
    data = lines_of([document(number) for number in range(120)])
    done = command(*arguments(house, "-", "--dimension", 2, "--json"), env=env, stdin=data, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sent"] == 120
    assert done.stderr == b""
    assert house.documents("books") == titles(120)
    assert [path.name for path in tmp_path.iterdir()] == ["server"]


def test_a_closed_standard_input_is_refused(tmp_path: Path) -> None:
    line = [COMMAND, "nexus", "batch", "-", "--url", "http://127.0.0.1:9", "--collection", "books"]
    done = subprocess.run(["sh", "-c", 'exec "$0" "$@" <&-', *map(str, line)], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (2, b"error: -: standard input is closed\n")


def test_a_long_last_line_without_an_end_is_wrong_too(house: Office, say: Say, file: Path) -> None:
    file.write_bytes(lines_of([document(0)]) + b"x" * (MAX_LINE_BYTES + (2 << 20)))
    code, out, _ = say(*arguments(house, file, "--dimension", 2, "--json"))
    assert code == 3
    assert [wrong["line"] for wrong in json.loads(out.splitlines()[0])["failed"]] == [2]
    assert house.documents("books") == titles(1)


def test_texts_without_vectors_are_embedded_by_the_server(house: Office, say: Say, file: Path) -> None:
    file.write_bytes(lines_of([{"id": "b0", "title": "Book 0", "text": "The sea, the sea"}]))
    assert say(*arguments(house, file))[0] == 0
    found = house.ask("POST", "/v1/collections/books/search", key="red", json={"query": "ocean", "mode": "vector"})
    assert [hit["id"] for hit in found["hits"]] == ["b0"]


WRONG: list[tuple[bytes, str, str]] = [
    (b"no json\n", "$", "is no JSON"),
    (b'{"id":"x","vector":[1,2]},{"id":"y","vector":[1,2]}\n', "$", "is no JSON"),
    (b'{"id":"x","vector":[1,2]}],"documents":[{"id":"y","vector":[1,2]}\n', "$", "is no JSON"),
    (b"[1]\n", "$", "Expected `object`"),
    (b'{"title":"no id","vector":[1,2]}\n', "$", "`id`"),
    (b'{"id":"x","colour":"red","vector":[1,2]}\n', "$", "colour"),
    (b'{"id":"x","vector":[1,2,3]}\n', "vector", "must have 2 numbers"),
    (b'{"id":"x","vector":[0,0]}\n', "vector", "must not be zero"),
    (b'{"id":"x"}\n', "text", "must say something"),
    (b'{"id":"x","title":7,"vector":[1,2]}\n', "title", "Expected `str`"),
    (b'{"id":"x","vector":[1,2],"permissions":["a b"]}\n', "permissions[0]", "must be the name of a key"),
    (b'{"id":"x","vector":[1,2],"title":"\xff"}\n', "$", "utf-8"),
    (b'{"id":"x","vector":[1,2],"text":"' + b"x" * MAX_LINE_BYTES + b'"}\n', "$", "15,728,640 bytes"),
    (b"x" * (MAX_LINE_BYTES + (2 << 20)) + b"\n", "$", "15,728,640 bytes"),
]


def test_wrong_lines_are_named_with_their_fields_and_all_others_are_sent(house: Office, say: Say, file: Path) -> None:
    documents: list[object] = []
    for number, (wrong, *_) in enumerate(WRONG):
        documents += [document(2 * number), wrong, b"\n", document(2 * number + 1)]
    file.write_bytes(lines_of(documents))
    code, out, err = say(*arguments(house, file, "--dimension", 2, "--json"))
    report = json.loads(out.splitlines()[0])
    assert code == 3
    assert "14 lines were not sent" in err
    assert [wrong["line"] for wrong in report["failed"]] == [4 * number + 2 for number in range(len(WRONG))]
    for wrong, (_, field, words) in zip(report["failed"], WRONG, strict=True):
        assert wrong["field"] == field, wrong
        assert words in wrong["message"], wrong
    assert house.documents("books") == titles(2 * len(WRONG))
    assert (report["sent"], report["lines"], report["error"]) == (28, 56, None)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_more_wrong_lines_than_may_be_end_it_and_what_was_sent_is_not_sent_again(
    house: Office, say: Say, file: Path
) -> None:
    good = [document(number) for number in range(250)]
    file.write_bytes(lines_of([*good[:220], b"{}\n", b"{}\n", *good[220:]]))
    report = file.with_name("report.json")
    code, _, err = say(*arguments(house, file, "--dimension", 2, "--max-wrong", 1, "--report", report))
    assert code == 3
    assert "line 222" in err
    told = json.loads(report.read_text())
    assert [wrong["line"] for wrong in told["failed"]] == [221, 222]
    assert (told["sent"], told["lines"]) == (200, 200)
    assert "line 222" in told["error"]
    code, _, err = say(*arguments(house, file, "--report", report))
    assert code == 3
    assert "Going on behind line 200" in err
    told = json.loads(report.read_text())
    assert [wrong["line"] for wrong in told["failed"]] == [221, 222]
    assert (told["sent"], told["lines"], told["resumedAfter"], told["error"]) == (250, 252, 200, None)
    assert house.documents("books") == titles(250)
    assert [len(ids) for ids in sent(house)] == [100, 100, 50]


def test_none_may_be_wrong_where_that_is_wished(house: Office, say: Say, file: Path) -> None:
    file.write_bytes(lines_of([document(0), b"{}\n"]))
    code, out, _ = say(*arguments(house, file, "--dimension", 2, "--max-wrong", 0))
    assert code == 3
    assert "not sent: line 2" in out
    assert sent(house) == []


def test_what_only_the_server_finds_wrong_is_named_by_its_line_too(house: Office, say: Say, file: Path) -> None:
    """Some lines lack a vector, and the server does not embed for this collection."""
    lacking = {"id": "x", "text": "words alone"}
    file.write_bytes(lines_of([document(0), lacking, document(1), {**lacking, "id": "y"}, document(2)]))
    code, out, _ = say(*arguments(house, file, "--dimension", 2, "--json"))
    assert code == 3
    failed = json.loads(out.splitlines()[0])["failed"]
    assert [(wrong["line"], wrong["field"]) for wrong in failed] == [(2, "vector"), (4, "vector")]
    assert house.documents("books") == titles(3)


def test_an_id_of_a_hidden_document_is_a_wrong_line(house: Office, say: Say, file: Path) -> None:
    house.write("books", ["b2"])
    hidden = [document(number, title="hidden", permissions=["red-export"]) for number in (1, 3)]
    house.ask("POST", "/v1/collections/books/documents", key="red-export", json={"documents": hidden})
    file.write_bytes(lines_of([document(number) for number in range(5)]))
    code, out, _ = say(*arguments(house, file, "--max-wrong", 1))
    assert code == 3
    assert "line 4" in out
    code, out, _ = say(*arguments(house, file, "--restart", "--json"))
    assert code == 3
    failed = json.loads(out.splitlines()[0])["failed"]
    assert [(wrong["line"], wrong["field"]) for wrong in failed] == [(2, "id"), (4, "id")]
    assert failed[0]["message"].startswith("there is a document of this id that the key does not see")
    assert house.documents("books") == {"b0": "Book 0", "b2": "Book 2", "b4": "Book 4"}


def test_of_two_lines_with_one_id_the_later_one_holds(house: Office, say: Say, file: Path) -> None:
    same = [document(0), document(1, title="early"), document(2), document(1, title="late"), document(3)]
    file.write_bytes(lines_of(same))
    assert say(*arguments(house, file, "--dimension", 2))[0] == 0
    assert house.documents("books") == titles(4) | {"b1": "late"}
    assert sent(house) == [["b0", "b1", "b2"], ["b1", "b3"]]


def test_requests_are_bounded_by_their_bytes_and_a_longer_line_goes_alone(house: Office, say: Say, file: Path) -> None:
    large = b'{"id":"%s","vector":[1,2],"text":"%s"}\n'
    texts = [large % (b"b%d" % number, rb"\u00e9" * 400_000) for number in range(5)]
    alone = large % (b"alone", rb"\ud83d\ude00" * 900_000)
    file.write_bytes(b"".join([*texts[:2], alone, *texts[2:]]))
    assert len(alone) > BATCH_BYTES
    assert say(*arguments(house, file, "--dimension", 2))[0] == 0
    assert sent(house) == [["b0", "b1"], ["alone"], ["b2", "b3", "b4"]]
    found = house.ask("GET", "/v1/collections/books/documents/alone", key="red")
    assert found["text"] == "\U0001f600" * 900_000


# --- broken off, and gone on with -------------------------------------------------------------------------------------


class Victim:
    """The command as a process that is killed at a request."""

    def __init__(self, house: Office, arguments: Sequence[object]) -> None:
        env = {**os.environ, "MEMVID_EXPORT_API_KEY": text_of("red")}
        self._house = house
        self._start = [str(COMMAND), *map(str, arguments)]
        self._env = env

    def die(self, *, number: int, written: bool) -> None:
        """Run until it is killed: at its request ``number`` that writes documents, once the server has done so, or
        before."""

        def kill(request: Request) -> None:
            if (request.method, request.path) == WRITES and request.number == number:
                process.kill()
                process.wait()

        def kill_first(request: Request) -> httpx.Response | None:
            kill(request)
            killed = (request.method, request.path) == WRITES and request.number == number
            return httpx.Response(500) if killed else None

        if written:
            self._house.after = kill
        else:
            self._house.before = kill_first
        with subprocess.Popen(self._start, env=self._env, stderr=subprocess.PIPE) as process:
            process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        self._house.before, self._house.after = lambda _: None, lambda _: None


@pytest.mark.parametrize("packed", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("number", "written", "again"),
    [(1, False, [100, 100, 50]), (1, True, [100, 100, 50]), (2, False, [100, 50]), (3, True, [50])],
    ids=["before-the-first", "after-the-first", "before-the-second", "after-the-last"],
)
def test_killed_at_any_moment_the_same_command_sends_what_is_left(
    house: Office, say: Say, file: Path, packed: Callable[[bytes], bytes], number: int, written: bool, again: list[int]
) -> None:
    file.write_bytes(packed(lines_of([document(number) for number in range(250)])))
    command = arguments(house, file, "--dimension", 2, "--json")
    Victim(house, command).die(number=number, written=written)
    before = len(sent(house))
    code, out, _ = say(*command)
    assert code == 0
    report = json.loads(out)
    assert [len(ids) for ids in sent(house)[before:]] == again
    assert house.documents("books") == titles(250)
    assert (report["lines"], report["sent"], report["resumedAfter"]) == (250, 250, 250 - sum(again))
    assert report["updated"] == (100 if number == 1 and written else 50 if written else 0)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_file_that_is_done_with_and_whose_end_nobody_heard_is_not_sent_again(
    house: Office, say: Say, file: Path
) -> None:
    file.write_bytes(lines_of([document(number) for number in range(3)]))
    looks = 0

    def kill(request: Request) -> httpx.Response | None:
        nonlocal looks
        looks += (request.method, request.path) == ("GET", "/v1/collections/books")
        if looks == 2:  # the first one asked whether it is there: this waits
            process.kill()
            process.wait()
        return None

    house.before = kill
    line = [str(COMMAND), *map(str, arguments(house, file, "--dimension", 2, "--wait"))]
    env = {**os.environ, "MEMVID_EXPORT_API_KEY": text_of("red")}
    with subprocess.Popen(line, env=env, stderr=subprocess.PIPE) as process:
        process.communicate(timeout=60)
    house.before = lambda _: None
    code, out, _ = say(*arguments(house, file, "--json"))
    assert code == 0
    assert (len(sent(house)), json.loads(out)["sent"]) == (1, 3)


def broken_off(house: Office, say: Say, file: Path) -> None:
    """A file of which 200 lines of 250 are sent."""
    good = lines_of([document(number) for number in range(250)])
    file.write_bytes(good + b"{}\n")
    assert say(*arguments(house, file, "--dimension", 2, "--max-wrong", 0))[0] == 3
    assert len(sent(house)) == 2


@pytest.mark.parametrize("what", ["changed", "cut", "grown"])
def test_another_file_of_the_same_name_is_noticed(house: Office, say: Say, file: Path, what: str) -> None:
    if what == "grown":  # its last line goes on
        file.write_bytes(lines_of([document(0)]).rstrip())
        state = file.with_name(file.name + ".nexus-batch.json")
        broken = [*arguments(house, file, "--dimension", 2, "--report", file.parent / "no" / "report")]
        assert say(*broken)[0] == 3
        assert json.loads(state.read_text())["lines"] == 1
        file.write_bytes(file.read_bytes() + b" " + lines_of([document(1)]))
    else:
        broken_off(house, say, file)
        file.write_bytes(file.read_bytes().replace(b"Book 7", b"Boot 7") if what == "changed" else b"{}\n")
    before = len(sent(house))
    code, _, err = say(*arguments(house, file))
    assert code == 2
    assert "are not those that the file begins with; --restart forgets it" in err
    assert len(sent(house)) == before


def test_a_new_beginning_sends_everything(house: Office, say: Say, file: Path) -> None:
    broken_off(house, say, file)
    file.write_bytes(lines_of([document(number, title="new") for number in range(3)]))
    code, out, _ = say(*arguments(house, file, "--restart", "--json"))
    assert code == 0
    assert json.loads(out)["resumedAfter"] == 0
    assert sent(house)[2:] == [["b0", "b1", "b2"]]
    assert house.documents("books")["b1"] == "new"


def test_the_state_of_another_collection_or_of_nothing_is_not_gone_on_with(house: Office, say: Say, file: Path) -> None:
    broken_off(house, say, file)
    other = ["nexus", "batch", file, "--url", house.url, "--collection", "films"]
    code, _, err = say(*other)
    assert code == 2
    assert f"it is of collection books at {house.url}; --restart forgets it" in err
    file.with_name(file.name + ".nexus-batch.json").write_text("[]")
    code, _, err = say(*other)
    assert code == 2
    assert "it is no state of a batch" in err
    file.with_name(file.name + ".nexus-batch.json").unlink()
    file.with_name(file.name + ".nexus-batch.json").mkdir()
    assert say(*other)[0] == 2


def test_a_folder_that_takes_no_state_is_said_before_anything_is_sent(house: Office, say: Say, file: Path) -> None:
    file.write_bytes(lines_of([document(0)]))
    file.with_name(f".{file.name}.nexus-batch.json.part").mkdir()
    code, _, err = say(*arguments(house, file, "--dimension", 2))
    assert code == 3
    assert "cannot be written" in err
    assert house.requests == []


# --- a server that is busy, away, or says no --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_is_busy_is_asked_again_when_it_says_so(house: Office, say: Say, file: Path, status: int) -> None:
    came = []

    def busy(request: Request) -> httpx.Response | None:
        if (request.method, request.path) != WRITES:
            return None
        came.append(time.monotonic())
        return httpx.Response(status, headers={"Retry-After": "1"}) if request.number in (1, 2, 4) else None

    house.before = busy
    file.write_bytes(lines_of([document(number) for number in range(150)]))
    assert say(*arguments(house, file, "--dimension", 2))[0] == 0
    assert house.documents("books") == titles(150)
    assert [len(ids) for ids in sent(house)] == [100, 100, 100, 50, 50]
    for refused, again in ((0, 1), (1, 2), (3, 4)):
        assert came[again] - came[refused] >= 1


def test_a_client_that_is_to_wait_does_so_however_often_it_is_told(house: Office, say: Say, file: Path) -> None:
    told = {"error": {"code": "RATE_LIMITED", "message": "The graph has to be told first."}}
    house.before = lambda request: (
        httpx.Response(429, headers={"Retry-After": "0"}, json=told)
        if (request.method, request.path) == WRITES and request.number <= 2 * PATIENCE
        else None
    )
    file.write_bytes(lines_of([document(number) for number in range(150)]))
    code, _, err = say(*arguments(house, file, "--dimension", 2))
    assert (code, err.count("It waits: The graph has to be told first.")) == (0, 1)
    assert house.documents("books") == titles(150)
    assert len(sent(house)) == 2 * PATIENCE + 2


def test_a_server_that_is_away_ends_with_3_and_the_report_says_so(say: Say, file: Path) -> None:
    file.write_bytes(lines_of([document(0)]))
    url = f"http://127.0.0.1:{free_port()}"
    report = file.with_name("report.json")
    code, _, err = say("nexus", "batch", file, "--url", url, "--collection", "books", "--report", report)
    assert code == 3
    assert url in err
    assert url in json.loads(report.read_text())["error"]


@pytest.mark.parametrize(("status", "name"), [(413, "PAYLOAD_TOO_LARGE"), (404, "COLLECTION_NOT_FOUND")])
def test_what_the_server_refuses_as_a_whole_ends_it(
    house: Office, say: Say, file: Path, status: int, name: str
) -> None:
    house.before = lambda request: (
        httpx.Response(status, json={"error": {"code": name, "message": "not so"}})
        if (request.method, request.path) == WRITES
        else None
    )
    file.write_bytes(lines_of([document(0)]))
    code, _, err = say(*arguments(house, file, "--dimension", 2))
    assert (code, len(sent(house))) == (2, 1)
    assert "not so" in err


def test_a_key_that_may_not_write_is_refused(
    house: Office, say: Say, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_bytes(lines_of([document(0)]))
    monkeypatch.setenv("MEMVID_EXPORT_API_KEY", text_of("red-read"))
    code, _, err = say(*arguments(house, file))
    assert code == 2
    assert "export" in err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--dimension", 3], "--dimension: collection books has 2"),
        (["--dimension", 2, "--model", "other"], "--model: collection books has books"),
    ],
    ids=["dimension", "model"],
)
def test_a_collection_that_is_another_is_not_written_to(
    house: Office, say: Say, file: Path, more: list[object], words: str
) -> None:
    file.write_bytes(lines_of([document(0)]))
    house.ask("PUT", "/v1/collections/books", 201, key="red", json={"dimension": 2})
    code, _, err = say(*arguments(house, file, *more))
    assert code == 2
    assert words in err
    assert sent(house) == []


# --- until the graph has it -------------------------------------------------------------------------------------------


def synced_at_look(house: Office, number: int, refused: frozenset[str] = frozenset()) -> None:
    """Have everything synced when the collection is looked at for the nth time."""

    def sync(request: Request) -> httpx.Response | None:
        if (request.method, request.path, request.number) == ("GET", "/v1/collections/books", number):
            house.sync(refused)
        return None

    house.before = sync


def test_waiting_ends_when_the_graph_has_every_document(house: Office, say: Say, file: Path) -> None:
    synced_at_look(house, 3)
    file.write_bytes(lines_of([document(number) for number in range(5)]))
    code, out, err = say(*arguments(house, file, "--dimension", 2, "--wait", "--json"))
    assert code == 0
    assert json.loads(out)["sync"] == {"synced": 5, "pending": 0, "failed": 0}
    assert "Telling the graph: 5 documents" in err
    assert len(house.seen("GET", "/v1/collections/books")) == 3


def test_documents_that_the_graph_refuses_are_a_failure(house: Office, say: Say, file: Path) -> None:
    synced_at_look(house, 2, frozenset({"b1"}))
    file.write_bytes(lines_of([document(number) for number in range(3)]))
    code, out, err = say(*arguments(house, file, "--dimension", 2, "--wait", "--json"))
    assert code == 3
    assert json.loads(out.splitlines()[0])["sync"] == {"synced": 2, "pending": 0, "failed": 1}
    assert "1 document was given up by the sync" in err


def test_a_collection_that_is_deleted_meanwhile_ends_the_waiting(house: Office, say: Say, file: Path) -> None:
    def drop(request: Request) -> httpx.Response | None:
        if (request.method, request.path, request.number) == ("GET", "/v1/collections/books", 2):
            headers = {"Authorization": f"Bearer {text_of('red')}"}
            assert httpx.delete(f"{house.url}/v1/collections/books", headers=headers).status_code == 204
        return None

    house.before = drop
    file.write_bytes(lines_of([document(0)]))
    code, _, err = say(*arguments(house, file, "--dimension", 2, "--wait"))
    assert code == 2
    assert "was deleted meanwhile" in err


# --- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        ["books.jsonl", "--model", "x"],
        ["-", "--restart"],
        ["books.jsonl", "--batch-size", "99"],
        ["books.jsonl", "--batch-size", "1001"],
        ["books.jsonl", "--max-wrong", "10001"],
        ["books.jsonl", "--dimension", "0"],
        ["nowhere.jsonl"],
        ["cut.jsonl.gz"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2_and_nothing_is_sent(
    house: Office, say: Say, file: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    file.write_bytes(lines_of([document(0)]))
    file.with_name("cut.jsonl.gz").write_bytes(gzip.compress(lines_of([document(0)]))[:-9])
    code, _, err = say("nexus", "batch", *more, "--url", house.url, "--collection", "books")
    assert code == 2
    assert err
    assert sent(house) == []


def test_an_empty_file_makes_an_empty_collection(house: Office, say: Say, file: Path) -> None:
    file.write_bytes(b"")
    code, out, _ = say(*arguments(house, file, "--dimension", 2, "--json"))
    assert code == 0
    assert json.loads(out)["sent"] == 0
    assert house.documents("books") == {}
