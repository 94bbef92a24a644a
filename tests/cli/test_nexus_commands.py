"""The other commands of ``memvid-export nexus``: what an operator reads on a terminal, and what the exit code says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from nexus.office import Office, Request, office
from operations.keyring import text_of
from processes import free_port
from spoken import Say, spoken

from control_plane.cli import main
from control_plane.nexus.backstore import OwnEvent, Unsent
from control_plane.nexus.overview import LookReport

LOOKS = ("GET", "/v1/nexus")
BEGAN = 1_800_000_000_000
"""A look of long ago: 2027-01-15T08:00:00Z."""


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Office]:
    with office(tmp_path) as found:
        yield found


@pytest.fixture
def say(house: Office, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Say]:
    """Runs ``memvid-export nexus`` against the server."""
    with spoken(main, "memvid-export", monkeypatch, capfd) as run:
        monkeypatch.setenv("MEMVID_EXPORT_API_KEY", text_of("operator"))
        yield lambda command, *more: run("nexus", command, "--url", house.url, *more)


def report(house: Office, kind: Any = "verify", began: int = BEGAN, **more: Any) -> LookReport:
    """Put what a look found where it is kept."""
    found = LookReport(kind=kind, started_at=began, seconds=1.25, **more)
    house.do(house.store.put_verified(began, msgspec.json.encode(found).decode()))
    return found


# --- what there is ----------------------------------------------------------------------------------------------------


def test_the_status_of_a_server_that_did_nothing_yet_is_a_screen(say: Say) -> None:
    code, out, _ = say("status")
    assert code == 0
    assert out.splitlines() == [
        "sync       on, by nobody yet",
        "graph      not asked yet",
        "documents  0: 0 pending, 0 given up",
        "last look  none yet",
        "spaces     0, 0.0 MB in memory",
        "events     0 waiting, 0 given up",
    ]


def test_the_status_names_who_syncs_what_waits_and_what_was_found(house: Office, say: Say) -> None:
    house.write("books", ["a", "b", "strange"])
    house.sync(refused=frozenset({"strange"}))
    house.write("books", ["a"])
    house.do(house.events.announce([OwnEvent("document.synced", "red", 1, {})], BEGAN))
    report(house, documents=3, different={"pair": 2, "document": 1}, repaired=3)
    house.do(house.store.put_progress("rebuild", '{"kind":"rebuild","done":1000,"total":3000}'))
    code, out, _ = say("status")
    assert code == 0
    lines = {line[:11].rstrip(): line[11:] for line in out.splitlines()}
    assert lines.pop("lag").endswith(" s")
    assert lines == {
        "sync": "on, by replica office",
        "graph": "not asked yet",
        "documents": "3: 1 pending, 1 given up",
        "going on": "rebuild, 1,000 of 3,000 documents",
        "last look": "verify of 2027-01-15T08:00:00Z: 1 x document, 2 x pair different in 3 documents, "
        "3 of them repaired, 1.2 s",
        "spaces": "1, 0.0 MB in memory",
        "events": "1 waiting, 0 given up",
    }


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"documents": 1200}, "nothing different in 1,200 documents, 1.2 s"),
        ({"kind": "rebuild", "repaired": 7}, "7 documents are told anew, after 1.2 s"),
        ({"error": "the graph is away"}, "it did not come to its end: the graph is away"),
    ],
    ids=["same", "rebuilt", "failed"],
)
def test_what_the_last_look_found_is_a_line(house: Office, say: Say, more: dict[str, Any], words: str) -> None:
    report(house, **more)
    assert words in say("status")[1]


def test_the_status_as_json_is_what_the_server_answers(house: Office, say: Say) -> None:
    house.write("books", ["a"])
    house.sync()
    code, out, _ = say("status", "--json")
    assert code == 0
    assert json.loads(out) == house.ask("GET", "/v1/nexus")


def test_statistics_are_a_table_with_the_documents_that_were_given_up(house: Office, say: Say) -> None:
    house.write("books", [f"b{number}" for number in range(1_000)])
    house.write("films", ["f", "strange"], key="blue")
    house.sync(refused=frozenset({"strange"}))
    code, out, _ = say("stats")
    assert code == 0
    assert out.splitlines() == [
        "client  collection  documents  pending  failed  oldest",
        "blue    films               2        0       1",
        "red     books           1,000        0       0",
        "given up: blue/films strange, after 4 attempts: it is too strange for a graph",
    ]
    house.write("films", ["g"], key="blue")
    assert [line.split()[-1] for line in say("stats")[1].splitlines()][1] == "s"
    found = json.loads(say("stats", "--json")[1])
    assert [one["name"] for one in found["collections"]] == ["films", "books"]
    assert [one["id"] for one in found["failures"]] == ["strange"]


def test_a_server_without_collections_says_so(say: Say) -> None:
    assert "There are no collections." in say("stats")[1]


# --- what is done -----------------------------------------------------------------------------------------------------


def test_the_sync_is_switched_off_and_on(house: Office, say: Say) -> None:
    code, out, _ = say("disable")
    assert (code, out) == (0, "The graph stays as it is; documents wait.\n")
    assert not house.do(house.store.state()).enabled
    assert say("status")[1].startswith("sync       off\n")
    assert json.loads(say("enable", "--json")[1]) == {"enabled": True}
    assert say("enable")[1] == "The graph is kept in step.\n"
    assert house.do(house.store.state()).enabled


def test_documents_that_were_given_up_are_tried_again(house: Office, say: Say) -> None:
    house.write("books", ["strange", "odd"])
    house.write("films", ["strange"])
    house.sync(refused=frozenset({"strange", "odd"}))
    assert say("trigger", "nothing")[1] == "0 documents were tried again.\n"
    assert say("trigger", "films")[1] == "1 document was tried again.\n"
    assert json.loads(say("trigger", "--json")[1]) == {"retried": 2}
    assert house.ask("GET", "/v1/nexus")["pending"] == 3


def test_events_that_were_given_up_are_shown_and_sent_again(house: Office, say: Say) -> None:
    assert say("events")[:2] == (0, "No event was given up.\n")
    house.do(house.events.announce([OwnEvent("document.synced", "red", version, {}) for version in (1, 2)], BEGAN))
    lost = house.do(house.events.due(BEGAN, 2))
    house.do(house.events.settle([], [Unsent(one.id, 2 - n, f"answered 50{n}", None) for n, one in enumerate(lost)]))
    code, out, _ = say("events")
    assert code == 0
    assert out.splitlines() == [
        "2027-01-15T08:00:00Z  document.synced of red, after 2 attempts: answered 500",
        "2027-01-15T08:00:00Z  document.synced of red, after 1 attempt: answered 501",
    ]
    assert json.loads(say("events", "--json")[1]) == house.ask("GET", "/v1/nexus/events")
    assert say("events", "--retry")[:2] == (0, "2 events are sent again.\n")
    assert json.loads(say("events", "--retry", "--json")[1]) == {"retried": 0}
    house.do(house.events.settle([], [Unsent(lost[0].id, 1, "answered 400", None)]))
    assert say("events", "--retry")[1] == "1 event is sent again.\n"


@pytest.mark.parametrize("kind", ["verify", "rebuild"])
def test_a_look_is_asked_for(house: Office, say: Say, kind: str) -> None:
    code, out, _ = say(kind)
    assert code == 0
    assert "It begins soon" in out
    assert house.do(house.store.state()).asked == kind
    house.do(house.store.take_lease())
    house.do(house.store.put_progress(kind, None))
    assert json.loads(say(kind, "--json")[1]) == {"asked": kind}


def at_looks(house: Office, *steps: Callable[[], object]) -> None:
    """What the sync does between the polls of a command that waits: one step before each answer."""
    left = list(steps)

    def step(request: Request) -> httpx.Response | None:
        if (request.method, request.path) == LOOKS and left:
            left.pop(0)()
        return None

    house.before = step


def nothing() -> None:
    """It takes its time."""


def test_waiting_follows_a_look_to_what_it_found(house: Office, say: Say) -> None:
    house.write("books", ["a", "b"])
    house.sync()
    report(house, began=1)

    def goes_on() -> None:
        assert house.do(house.store.state()).asked == "verify"
        house.do(house.store.put_progress("verify", '{"kind":"verify","done":1,"total":2}'))

    at_looks(house, nothing, nothing, goes_on, lambda: report(house, began=2, documents=2))
    code, out, err = say("verify", "--wait")
    assert code == 0
    assert out == "verify: nothing different in 2 documents, 1.2 s\n"
    assert err == "Comparing: 2 documents\n"
    assert len(house.seen(*LOOKS)) == 5


def test_what_differed_is_told_before_the_waiting_ends(house: Office, say: Say) -> None:
    house.write("books", ["a", "b"])
    house.sync()

    def finds() -> None:
        house.do(house.store.put_progress("verify", '{"kind":"verify","done":0,"total":2}'))
        house.do(house.store.distrust_all())
        report(house, documents=2, different={"document": 2}, repaired=2)

    at_looks(house, nothing, finds, nothing, house.sync)
    code, out, err = say("verify", "--wait", "--json")
    assert code == 0
    assert json.loads(out)["repaired"] == 2
    assert "Telling the graph: 2 documents" in err
    assert len(house.seen(*LOOKS)) == 4


def test_a_rebuild_ends_when_the_graph_has_everything_again(house: Office, say: Say) -> None:
    house.write("books", ["a", "b", "c"])
    house.sync()

    def rebuilds() -> None:
        house.do(house.store.put_progress("rebuild", '{"kind":"rebuild","done":0,"total":0}'))
        report(house, "rebuild", repaired=house.do(house.store.distrust_all()))

    at_looks(house, nothing, nothing, rebuilds, nothing, nothing, house.sync)
    code, out, err = say("rebuild", "--wait")
    assert (code, err) == (0, "Telling the graph: 3 documents\n")
    assert out == "rebuild: 3 documents are told anew, after 1.2 s\n"
    assert len(house.seen(*LOOKS)) == 6
    assert house.ask("GET", "/v1/nexus")["pending"] == 0


def test_documents_that_the_graph_refuses_are_a_failure_of_the_rebuild(house: Office, say: Say) -> None:
    house.write("books", ["a", "strange"])
    house.sync()

    def rebuilds() -> None:
        house.do(house.store.put_progress("rebuild", '{"kind":"rebuild","done":0,"total":0}'))
        report(house, "rebuild", repaired=house.do(house.store.distrust_all()))
        house.sync(refused=frozenset({"strange"}))

    at_looks(house, nothing, rebuilds)
    code, _, err = say("rebuild", "--wait")
    assert code == 3
    assert "1 document was given up" in err


def test_documents_that_were_written_since_are_not_waited_for(
    house: Office, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is always written to has always something pending."""
    writes = iter(range(1_000))

    def write() -> None:
        number = next(writes)
        if number:
            house.sync()
        if number == 1:
            house.do(house.store.put_progress("verify", None))
            report(house)
        house.write("books", [f"b{number}"])

    at_looks(house, *[write] * 100)
    code, _, _ = say("verify", "--wait")
    assert code == 0
    assert house.ask("GET", "/v1/nexus")["pending"] == 1


def test_a_look_that_did_not_come_to_its_end_is_a_failure(house: Office, say: Say) -> None:
    def fails() -> None:
        house.do(house.store.take_lease())
        house.do(house.store.put_progress("verify", None))
        report(house, error="the graph is away")

    at_looks(house, nothing, fails)
    code, out, err = say("verify", "--wait", "--json")
    assert code == 3
    assert json.loads(out.splitlines()[0])["error"] == "the graph is away"
    assert "the graph is away" in err


def test_a_rebuild_whose_replica_ended_is_a_failure(house: Office, say: Say) -> None:
    def breaks_off() -> None:
        house.do(house.store.take_lease())
        house.do(house.store.put_progress("rebuild", None))
        report(house, "verify")

    at_looks(house, nothing, breaks_off)
    code, _, err = say("rebuild", "--wait")
    assert code == 3
    assert "was broken off" in err


def test_a_look_that_goes_on_already_is_waited_for_first(house: Office, say: Say) -> None:
    house.do(house.store.take_lease())
    house.do(house.store.put_progress("rebuild", '{"kind":"rebuild","done":1,"total":2}'))

    def verified() -> None:
        house.do(house.store.put_progress("verify", None))
        report(house, began=2)

    at_looks(house, nothing, lambda: report(house, "rebuild", began=1), nothing, verified)
    code, out, err = say("verify", "--wait")
    assert code == 0, err
    assert "Another one goes on: rebuild" in err
    assert out.startswith("verify: ")


def test_what_it_waits_for_is_said_once(house: Office, say: Say) -> None:
    found = house.ask("GET", "/v1/nexus")
    last = msgspec.to_builtins(LookReport(kind="verify", started_at=1))
    answers = iter(
        [
            {},
            {"trouble": "the graph is away"},
            {"trouble": "the graph is away"},
            {"last": last},
            {},
        ]
    )
    house.before = lambda request: (
        httpx.Response(200, json={**found, **next(answers)}) if (request.method, request.path) == LOOKS else None
    )
    code, _, err = say("verify", "--wait")
    assert code == 0
    assert err.count("It waits: the graph is away") == 1


def test_nothing_is_waited_for_while_the_sync_is_disabled(house: Office, say: Say) -> None:
    say("disable")
    for kind in ("verify", "rebuild"):
        code, _, err = say(kind, "--wait")
        assert code == 3
        assert "nexus enable" in err
    assert house.do(house.store.state()).asked is None


def test_a_look_that_is_refused_again_and_again_ends_with_3(house: Office, say: Say) -> None:
    assert house.do(house.store.ask("verify"))
    refused = {"error": {"code": "RATE_LIMITED", "message": "The graph is being looked at already."}}
    house.before = lambda request: (
        httpx.Response(429, headers={"Retry-After": "0"}, json=refused) if request.path == "/v1/nexus/rebuild" else None
    )
    code, _, err = say("rebuild")
    assert code == 3
    assert "The graph is being looked at already" in err


# --- who may, and who answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["enable", "disable", "status", "stats", "trigger", "events", "verify", "rebuild"])
def test_a_key_of_a_client_is_not_enough(say: Say, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMVID_EXPORT_API_KEY", text_of("red"))
    code, out, err = say(command)
    assert (code, out) == (2, "")
    assert "admin" in err


def test_a_server_that_is_away_ends_with_3(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with spoken(main, "memvid-export", monkeypatch, capfd) as run:
        code, _, err = run("nexus", "status", "--url", url)
    assert code == 3
    assert url in err


def test_without_a_command_there_is_help(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with spoken(main, "memvid-export", monkeypatch, capfd) as run:
        code, out, _ = run("nexus", "--help")
    assert code == 0
    assert [
        word
        for word in ("enable", "disable", "status", "stats", "trigger", "events", "verify", "rebuild", "batch")
        if word not in out
    ] == []
