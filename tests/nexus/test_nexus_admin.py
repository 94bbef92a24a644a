"""The routes of ``/v1/nexus``: what an operator sees of the sync, and does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from litestar.handlers import HTTPRouteHandler
from nexus.office import Office, office
from sqlalchemy import Row, insert, select, update

from control_plane.jobs.audit import Action, AuditQuery
from control_plane.jobs.database import Database
from control_plane.jobs.store import now_ms
from control_plane.nexus import admin
from control_plane.nexus.admin import NexusController
from control_plane.nexus.backstore import OwnEvent, Unsent
from control_plane.nexus.context import ContextController, DuplicatesController
from control_plane.nexus.overview import LookReport
from control_plane.nexus.routes import CollectionController
from control_plane.nexus.tables import collections, sync_state
from control_plane.operations.auth import AUDITED

ROUTES = [
    ("GET", "", None),
    ("GET", "/failures", None),
    ("POST", "/enable", "nexus.enable"),
    ("POST", "/disable", "nexus.disable"),
    ("POST", "/trigger", "nexus.trigger"),
    ("POST", "/verify", "nexus.verify"),
    ("POST", "/rebuild", "nexus.rebuild"),
    ("GET", "/events", None),
    ("POST", "/events/retry", "nexus.events"),
]


@pytest.fixture(params=["sqlite", "postgresql"])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Office]:
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else None
    with office(tmp_path, url) as found:
        yield found


@pytest.fixture
def on_sqlite(tmp_path: Path) -> Iterator[Office]:
    with office(tmp_path) as found:
        yield found


def overview(house: Office) -> dict[str, Any]:
    return dict(house.ask("GET", "/v1/nexus"))


def look(house: Office, kind: str, status: int = 202) -> Any:
    return house.ask("POST", f"/v1/nexus/{kind}", status)


def test_before_anything_happened_there_is_nothing(house: Office) -> None:
    assert overview(house) == {
        "enabled": True,
        "leads": False,
        "owner": None,
        "graph": "",
        "trouble": None,
        "documents": 0,
        "pending": 0,
        "failed": 0,
        "oldestPendingSeconds": None,
        "collections": [],
        "progress": None,
        "last": None,
        "spaces": {"count": 0, "bytes": 0},
        "outbound": {"waiting": 0, "dead": 0},
    }
    assert house.ask("GET", "/v1/nexus/failures") == {"failures": []}


def test_collections_of_all_clients_are_there_and_those_that_are_furthest_behind_come_first(house: Office) -> None:
    house.write("synced", ["a", "b", "c"])
    house.sync()
    house.write("refused", ["d", "strange"], key="blue")
    house.sync(refused=frozenset({"strange"}))
    begun = time.monotonic()
    house.write("pending", ["e", "f"])
    found = overview(house)
    seconds = found["oldestPendingSeconds"]
    assert 0 <= seconds <= time.monotonic() - begun + 1
    lag = {"documents": 0, "pending": 0, "failed": 0, "oldestPendingSeconds": None}
    assert found["collections"] == [
        {**lag, "client": "blue", "name": "refused", "documents": 2, "failed": 1},
        {**lag, "client": "red", "name": "pending", "documents": 2, "pending": 2, "oldestPendingSeconds": seconds},
        {**lag, "client": "red", "name": "synced", "documents": 3},
    ]
    assert (found["documents"], found["pending"], found["failed"]) == (7, 2, 1)
    assert found["spaces"]["count"] == 3
    assert house.ask("GET", "/v1/nexus/failures")["failures"] == [
        {
            "client": "blue",
            "collection": "refused",
            "id": "strange",
            "attempts": 4,
            "error": "it is too strange for a graph",
        }
    ]


def test_the_list_of_collections_is_bounded_and_its_sums_are_not(on_sqlite: Office) -> None:
    async def many() -> None:
        database = Database(on_sqlite.database_url)
        async with database.write.begin() as connection:
            row = (await connection.execute(select(collections).limit(1))).one()._asdict()
            numbers = range(admin.MAX_COLLECTIONS)
            rows = [{**row, "id": row["id"] + 1 + n, "client": "other", "name": f"c{n:04}"} for n in numbers]
            await connection.execute(insert(collections), rows)
        await database.close()

    on_sqlite.write("last", ["a"])
    on_sqlite.do(many())
    on_sqlite.write("z-last", ["a"])
    found = overview(on_sqlite)
    assert len(found["collections"]) == admin.MAX_COLLECTIONS
    assert [one["name"] for one in found["collections"]][:3] == ["last", "z-last", "c0000"]
    assert (found["documents"], found["pending"]) == (2, 2)


def test_the_memory_of_spaces_counts_once_somebody_searches(on_sqlite: Office) -> None:
    on_sqlite.write("books", ["a", "b"])
    assert overview(on_sqlite)["spaces"] == {"count": 1, "bytes": 0}
    question = {"vector": [1, 1], "mode": "vector"}
    on_sqlite.ask("POST", "/v1/collections/books/search", key="red", json=question)
    assert overview(on_sqlite)["spaces"]["bytes"] > 0


def test_events_for_outside_are_counted(house: Office) -> None:
    events = [OwnEvent("document.synced", "red", version, {}) for version in range(3)]
    house.do(house.events.announce(events, now_ms()))
    [first, *_] = house.do(house.events.due(now_ms(), 1))
    house.do(house.events.settle([], [Unsent(first.id, 9, "nobody is there", None)]))
    assert overview(house)["outbound"] == {"waiting": 2, "dead": 1}


def test_events_that_were_given_up_are_listed_and_sent_again(house: Office) -> None:
    now = now_ms()
    told = {"document": {"collection": "books", "id": "a"}}
    house.do(house.events.announce([OwnEvent("document.synced", "red", version, told) for version in range(3)], now))
    lost = house.do(house.events.due(now, 2))
    house.do(house.events.settle([], [Unsent(one.id, 8, "answered 500", None) for one in lost]))
    found = house.ask("GET", "/v1/nexus/events")["events"]
    assert [(one["id"], one["createdAt"], one["attempts"], one["error"]) for one in found] == [
        (one.id, now, 8, "answered 500") for one in lost
    ]
    assert [(one["event"]["version"], one["event"]["document"]["id"]) for one in found] == [(0, "a"), (1, "a")]
    for params, ids in (
        ({"limit": 1}, [lost[0].id]),
        ({"after": lost[0].id}, [lost[1].id]),
        ({"after": -1, "limit": 0}, [lost[0].id]),
        ({"after": 10**30}, []),
    ):
        page = house.ask("GET", "/v1/nexus/events", params=params)["events"]
        assert [one["id"] for one in page] == ids
    assert house.ask("POST", "/v1/nexus/events/retry") == {"retried": 2}
    assert house.ask("GET", "/v1/nexus/events") == {"events": []}
    assert [one.id for one in house.do(house.events.due(now_ms(), 9))][:2] == [one.id for one in lost]
    assert overview(house)["outbound"] == {"waiting": 3, "dead": 0}
    assert house.ask("POST", "/v1/nexus/events/retry") == {"retried": 0}


def test_documents_that_were_given_up_are_tried_again_of_one_collection_or_of_all(house: Office) -> None:
    for collection, key in (("books", "red"), ("books", "blue"), ("films", "red")):
        house.write(collection, ["a", "b"], key=key)
    house.sync(refused=frozenset({"a"}))
    assert overview(house)["failed"] == 3
    assert len(house.ask("GET", "/v1/nexus/failures", params={"limit": 2})["failures"]) == 2
    assert len(house.ask("GET", "/v1/nexus/failures", params={"limit": -5})["failures"]) == 1
    assert house.ask("POST", "/v1/nexus/trigger", json={"collection": "none"}) == {"retried": 0}
    assert house.ask("POST", "/v1/nexus/trigger", json={"collection": "books"}) == {"retried": 2}
    found = overview(house)
    assert {(one["client"], one["name"]): (one["pending"], one["failed"]) for one in found["collections"]} == {
        ("red", "books"): (1, 0),
        ("blue", "books"): (1, 0),
        ("red", "films"): (0, 1),
    }
    assert house.ask("POST", "/v1/nexus/trigger") == {"retried": 1}
    assert house.ask("POST", "/v1/nexus/trigger", json={"collection": None}) == {"retried": 0}
    assert overview(house)["pending"] == 3
    house.sync()
    assert (overview(house)["pending"], overview(house)["failed"]) == (0, 0)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", None),
        (b'{"collection":7}', "collection"),
        (b'{"colection":"books"}', "colection"),
        (b"[]", None),
        (b"[" * 1_000_000, None),
        (b'{"a":' * 50_000, "`a`"),
    ],
    ids=["no-json", "type", "unknown", "list", "deep-list", "deep-object"],
)
def test_a_wrong_wish_is_refused_and_named(on_sqlite: Office, body: bytes, field: str | None) -> None:
    error = on_sqlite.ask("POST", "/v1/nexus/trigger", 400, content=body)["error"]
    assert error["code"] == "INVALID_EXPORT_REQUEST"
    assert field is None or field in error["message"]
    answer = on_sqlite.ask("GET", "/v1/nexus/failures", 400, params={"limit": "many"})
    assert answer["error"]["details"]["field"] == "limit"


def test_the_sync_is_switched_for_every_replica(house: Office, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    with office(tmp_path / "second", house.database_url) as second:
        assert house.ask("POST", "/v1/nexus/disable") == {"enabled": False}
        assert house.ask("POST", "/v1/nexus/disable") == {"enabled": False}
        assert overview(second)["enabled"] is False
        assert second.ask("POST", "/v1/nexus/enable") == {"enabled": True}
        assert overview(house)["enabled"] is True


def test_a_look_is_asked_for_once_and_all_replicas_tell_how_it_goes_on(house: Office, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    with office(tmp_path / "second", house.database_url) as second:
        assert look(second, "rebuild") == {"asked": "rebuild"}
        assert overview(house)["progress"] == {"kind": "rebuild", "done": 0, "total": 0}
        for kind in ("verify", "rebuild"):
            assert look(house, kind, 429)["error"]["code"] == "RATE_LIMITED"
        assert house.do(house.store.take_lease())
        house.do(house.store.put_progress("rebuild", '{"kind":"rebuild","done":3,"total":9}'))
        assert overview(second)["progress"] == {"kind": "rebuild", "done": 3, "total": 9}
        look(second, "verify", 429)
        report = LookReport(kind="rebuild", started_at=7, seconds=1.5, documents=9, repaired=9, different={"pair": 2})
        house.do(house.store.put_verified(7, msgspec.json.encode(report).decode()))
        found = overview(second)
        assert found["progress"] is None
        assert found["last"] == msgspec.to_builtins(report)
        assert look(second, "verify") == {"asked": "verify"}
        assert overview(house)["last"]["startedAt"] == 7


def test_a_report_of_an_earlier_version_that_knew_less_is_told(on_sqlite: Office) -> None:
    on_sqlite.do(on_sqlite.store.put_verified(7, '{"kind":"verify","startedAt":7}'))
    found = overview(on_sqlite)["last"]
    assert (found["startedAt"], found["documents"], found["different"], found["error"]) == (7, 0, {}, None)


def test_the_replica_that_syncs_is_named_as_long_as_its_lease_lasts(house: Office) -> None:
    assert house.do(house.store.take_lease())
    assert overview(house)["owner"] == "office"

    async def lapse() -> None:
        database = Database(house.database_url)
        async with database.write.begin() as connection:
            await connection.execute(update(sync_state).values(lease_until=now_ms() - 1))
        await database.close()

    house.do(lapse())
    assert overview(house)["owner"] is None


def test_every_route_that_changes_something_is_in_the_audit_log() -> None:
    changing = 0
    for controller in (CollectionController, ContextController, DuplicatesController, NexusController):
        for handler in vars(controller).values():
            if isinstance(handler, HTTPRouteHandler) and handler.http_methods - {"GET", "HEAD", "OPTIONS"}:
                changing += 1
                assert handler.opt.get(AUDITED) in get_args(Action), handler
    assert changing >= 12


def test_only_an_operator_may_and_everything_that_changes_something_is_in_the_audit_log(house: Office) -> None:
    for method, path, _ in ROUTES:
        for key in ("red", "red-export", "red-read"):
            assert house.ask(method, f"/v1/nexus{path}", 403, key=key)["error"]["code"] == "FORBIDDEN"
        house.ask(method, f"/v1/nexus{path}", 429 if path == "/rebuild" else 202 if path == "/verify" else 200)
    wanted = {(action, "RATE_LIMITED" if action == "nexus.rebuild" else "ok") for *_, action in ROUTES if action}
    wanted |= {("access.forbidden", f"FORBIDDEN {action or 'admin'}") for *_, action in ROUTES}

    def written() -> list[Row[Any]]:
        return house.do(house.jobs.audit_page(AuditQuery(None, None, None, None), 100))

    for _ in range(400):
        if {(row.action, row.outcome) for row in written()} == wanted:
            break
        time.sleep(0.05)
    assert {(row.action, row.outcome) for row in written()} == wanted
    assert {row.key for row in written() if row.action.startswith("nexus.")} == {"operator"}
