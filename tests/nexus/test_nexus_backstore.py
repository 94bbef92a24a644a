"""What graphs tell is kept as it was said last, wherever and however often it comes."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nexus.back_channel import NOW, House, house, node, relationship, run, seed
from sqlalchemy import update

from common.errors import InvalidRequest
from control_plane.errors import DocumentNotFound
from control_plane.nexus.backstore import (
    LONGEST_WAIT_MS,
    MAX_DEAD,
    MAX_RELATIONS,
    MAX_SHOWN,
    MAX_WAITING,
    NONCE_MS,
    NodeChange,
    OutboundCounts,
    Outcome,
    OwnEvent,
    RelationshipChange,
    Unsent,
)
from control_plane.nexus.records import Viewer
from control_plane.nexus.tables import collections, documents, node_changes, outbound, relations, webhook_nonces

RED = Viewer("red", None)
_numbers = itertools.count()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}"
    return str(request.getfixturevalue("postgres_url"))


def _relation(**more: Any) -> RelationshipChange:
    return msgspec.convert(relationship(**more), RelationshipChange)


def _node(**more: Any) -> NodeChange:
    return msgspec.convert(node(**more), NodeChange)


async def _take(house: House, change: RelationshipChange | NodeChange, now: int = NOW) -> Outcome:
    return await house.store.take(change, nonce=f"nonce-{next(_numbers)}", now=now)


def test_a_relationship_is_shown_at_both_of_its_ends(url: str) -> None:
    async def scenario(house: House) -> None:
        ids = (await seed(house, ["a", "b", "c"])).ids
        assert await _take(house, _relation(properties={"page": 12, "why": None, "at": [1, 2.5]})) == (True, None)
        told = {"type": "CITES", "collection": "books", "origin": "graph-1", "version": 1}
        told["properties"] = {"page": 12, "why": None, "at": [1, 2.5]}
        assert await house.store.graph_payload([*ids.values(), 10**9], RED) == {
            ids["a"]: {"properties": {}, "relationships": [{**told, "id": "b", "direction": "out"}], "more": False},
            ids["b"]: {"properties": {}, "relationships": [{**told, "id": "a", "direction": "in"}], "more": False},
        }

    run(url, scenario)


def test_a_relationship_of_a_document_with_itself_is_shown_once(url: str) -> None:
    async def scenario(house: House) -> None:
        ids = (await seed(house, ["a"])).ids
        await _take(house, _relation(target={"collection": "books", "id": "a"}))
        [shown] = (await house.store.graph_payload([ids["a"]], RED))[ids["a"]]["relationships"]
        assert (shown["id"], shown["direction"]) == ("a", "out")

    run(url, scenario)


def test_the_properties_of_a_node_are_those_that_were_told_last(url: str) -> None:
    async def scenario(house: House) -> None:
        ids = (await seed(house, ["a"])).ids
        await _take(house, _node())
        told = (await house.store.graph_payload([ids["a"]], RED))[ids["a"]]
        assert told == {"properties": {"rank": 0.5, "topics": ["law", "trade"]}, "relationships": [], "more": False}
        await _take(house, _node(version=2, properties={"rank": 1}))
        assert (await house.store.graph_payload([ids["a"]], RED))[ids["a"]]["properties"] == {"rank": 1}
        await _take(house, _node(version=3, action="delete"))
        assert await house.store.graph_payload([ids["a"]], RED) == {}
        assert await _take(house, _node(version=2)) == (False, "stale")
        assert await house.store.graph_payload([ids["a"]], RED) == {}

    run(url, scenario)


@pytest.mark.parametrize("make", [_relation, _node])
def test_the_higher_version_holds_and_of_equal_ones_the_origin_that_sorts_last(make: Any, url: str) -> None:
    async def scenario(house: House) -> None:
        await seed(house, ["a", "b"])
        table = relations if make is _relation else node_changes
        for version, origin, outcome in (
            (5, "graph-b", (True, None)),
            (5, "graph-b", (False, "stale")),
            (4, "graph-z", (False, "stale")),
            (5, "graph-a", (False, "stale")),
            (5, "Graph-z", (False, "stale")),  # capitals sort first, whatever the language of the database
            (5, "graph-c", (True, None)),
            (6, "a", (True, None)),
        ):
            before = await house.rows(table)
            assert await _take(house, make(version=version, origin=origin, properties={"v": version})) == outcome
            after = await house.rows(table)
            if outcome[0]:
                assert [(row["version"], row["origin"]) for row in after] == [(version, origin)]
            else:
                assert after == before

    run(url, scenario)


def test_changes_end_the_same_in_any_order_and_however_often_they_come(url: str) -> None:
    changes = [
        make(version=version, origin=origin, action=action, properties={"said": f"{version} {origin}"})
        for version in (1, 2, 3)
        for origin in ("graph-1", "graph-2")
        for action in ("upsert",) * 2 + ("delete",) * (version == 2)
        for make in (_relation, _node)
    ]

    async def scenario(house: House) -> None:
        ends = []
        for seed_number in range(4):
            client = f"client-{seed_number}"
            ids = (await seed(house, ["a", "b"], client=client)).ids
            order = changes * 2
            random.Random(seed_number).shuffle(order)
            mine = [msgspec.structs.replace(change, client=client) for change in order]
            await asyncio.gather(*(_take(house, change) for change in mine))
            found = await house.store.graph_payload([ids["a"]], Viewer(client, None))
            ends.append(found[ids["a"]])
        assert ends == ends[:1] * 4
        assert ends[0]["properties"] == {"said": "3 graph-2"}
        assert [one["properties"] for one in ends[0]["relationships"]] == [{"said": "3 graph-2"}]

    run(url, scenario)


def test_a_deletion_is_known_even_of_what_was_never_there(url: str) -> None:
    async def scenario(house: House) -> None:
        ids = (await seed(house, ["a", "b"])).ids
        assert await _take(house, _relation(version=7, action="delete")) == (True, None)
        assert await _take(house, _relation(version=6)) == (False, "stale")
        assert await house.store.graph_payload(list(ids.values()), RED) == {}
        assert await _take(house, _relation(version=8)) == (True, None)
        assert len((await house.store.graph_payload(list(ids.values()), RED))[ids["a"]]["relationships"]) == 1

    run(url, scenario)


@pytest.mark.parametrize("make", [_relation, _node])
def test_what_this_server_made_itself_changes_nothing(make: Any, url: str) -> None:
    async def scenario(house: House) -> None:
        await seed(house, ["a", "b"])
        assert await _take(house, make(origin="memvid-export", version=100)) == (False, "own")
        assert [await house.count(table) for table in (relations, node_changes, outbound)] == [0, 0, 0]

    run(url, scenario)


def test_a_nonce_counts_once_on_whatever_replica(url: str) -> None:
    async def scenario(first: House) -> None:
        await seed(first, ["a", "b"])
        second = house(url)
        async with second as other:
            takers = [first.store, other.store] * 4
            outcomes = await asyncio.gather(
                *(store.take(_relation(version=n + 1), nonce="the-same", now=NOW) for n, store in enumerate(takers))
            )
        assert sorted(outcome.reason or "applied" for outcome in outcomes) == ["applied"] + ["replayed"] * 7
        [kept] = await first.rows(relations)
        [winner] = [n + 1 for n, outcome in enumerate(outcomes) if outcome.applied]
        assert kept["version"] == winner

    run(url, scenario)


def test_a_nonce_is_used_by_a_message_that_was_refused(url: str) -> None:
    async def scenario(house: House) -> None:
        with pytest.raises(DocumentNotFound):
            await house.store.take(_relation(), nonce="used", now=NOW)
        await seed(house, ["a", "b"])
        assert await house.store.take(_relation(), nonce="used", now=NOW) == (False, "replayed")
        assert await house.count(relations) == 0

    run(url, scenario)


def test_nonces_are_forgotten_once_no_message_with_them_could_be_in_time(url: str) -> None:
    async def scenario(house: House) -> None:
        for nonce, seen in (("old", NOW - NONCE_MS - 1), ("young", NOW - NONCE_MS)):
            await house.store.take(_relation(origin="memvid-export"), nonce=nonce, now=seen)
        assert await house.store.sweep(NOW) == 1
        assert [row["nonce"] for row in await house.rows(webhook_nonces)] == ["young"]

    run(url, scenario)


def test_documents_that_are_not_there_are_named_by_their_field(url: str) -> None:
    async def scenario(house: House) -> None:
        await seed(house, ["a", "b"])
        await seed(house, ["a", "b"], client="blue", collection="secrets")
        gone = await seed(house, ["a", "b"], collection="dropped")
        dead = (await seed(house, ["a", "b"], collection="half")).ids
        async with house.database.write.begin() as connection:
            await connection.execute(
                update(collections).where(collections.c.id == gone.collection).values(deleted=True)
            )
            await connection.execute(update(documents).where(documents.c.id == dead["a"]).values(deleted=True))
        for field in ("source", "target", "document"):
            for collection, doc_id in (
                ("books", "z"),
                ("books", "A"),
                ("shelf", "a"),
                ("secrets", "a"),
                ("dropped", "a"),
                ("half", "a"),
            ):
                wrong = {field: {"collection": collection, "id": doc_id}}
                with pytest.raises(DocumentNotFound) as refused:
                    await _take(house, _node(**wrong) if field == "document" else _relation(**wrong))
                assert refused.value.details == {"field": field}
        assert [await house.count(table) for table in (relations, node_changes, outbound)] == [0, 0, 0]

    run(url, scenario)


def test_what_was_told_goes_with_its_document(url: str) -> None:
    async def scenario(house: House) -> None:
        ids = (await seed(house, ["a", "b"])).ids
        await _take(house, _relation())
        await _take(house, _node())
        async with house.database.write.begin() as connection:
            await connection.execute(documents.delete().where(documents.c.id == ids["a"]))
        assert [await house.count(table) for table in (relations, node_changes)] == [0, 0]

    run(url, scenario)


def test_a_document_that_a_viewer_does_not_see_is_at_no_end_of_a_relationship(url: str) -> None:
    async def scenario(house: House) -> None:
        ids = (await seed(house, ["a", "b"])).ids
        hidden = (await seed(house, ["h"], collection="hidden", only=["alice", "al_ce.x"])).ids
        place = {"collection": "hidden", "id": "h"}
        await _take(house, _relation(target=place, type="HIDES"))
        await _take(house, _relation(source=place, target={"collection": "books", "id": "a"}, type="TELLS"))
        await _take(house, _relation(type="CITES"))

        async def types(viewer: Viewer, end: int = ids["a"]) -> set[str]:
            found = await house.store.graph_payload([end], viewer)
            return {one["type"] for one in found.get(end, {"relationships": []})["relationships"]}

        for key, seen in (
            ("alice", {"HIDES", "TELLS", "CITES"}),
            ("al_ce.x", {"HIDES", "TELLS", "CITES"}),
            (None, {"HIDES", "TELLS", "CITES"}),
            ("Alice", {"CITES"}),
            ("alic", {"CITES"}),
            ("lice", {"CITES"}),
            ("al_ce", {"CITES"}),
            ("bob", {"CITES"}),
        ):
            assert await types(Viewer("red", key)) == seen, key
        assert await types(Viewer(None, None)) == {"HIDES", "TELLS", "CITES"}
        assert await types(Viewer("blue", None)) == set()
        assert await types(Viewer("red", "bob"), hidden["h"]) == {"HIDES", "TELLS"}
        async with house.database.write.begin() as connection:
            await connection.execute(update(documents).where(documents.c.id == hidden["h"]).values(deleted=True))
        assert await types(Viewer(None, None)) == {"CITES"}

    run(url, scenario)


def test_the_relationships_that_changed_last_are_shown_and_that_there_are_more(url: str) -> None:
    async def scenario(house: House) -> None:
        names = [f"d{number}" for number in range(MAX_SHOWN + 1)]
        ids = (await seed(house, ["a", *names])).ids
        hidden = (await seed(house, ["h"], collection="hidden", only=["alice"])).ids
        made = {"properties": "{}", "origin": "g", "version": 1, "deleted": False, "type": "T"}
        await house.put(
            relations,
            [{**made, "source": ids["a"], "target": ids[name], "updated_at": n} for n, name in enumerate(names)]
            + [{**made, "source": ids["a"], "target": hidden["h"], "updated_at": 10**6}],
        )
        many = [ids["a"], *range(10**6, 10**6 + 600), ids["d0"]]
        found = await house.store.graph_payload(many, Viewer("red", "bob"))
        assert [one["id"] for one in found[ids["a"]]["relationships"]] == names[:0:-1]
        assert found[ids["a"]]["more"] is True
        assert [one["id"] for one in found[ids["d0"]]["relationships"]] == ["a"]
        assert found[ids["d0"]]["more"] is False
        await _take(house, _relation(target={"collection": "books", "id": "d1"}, type="T", version=2), now=10**7)
        found = await house.store.graph_payload([ids["a"]], Viewer("red", "bob"))
        assert [one["id"] for one in found[ids["a"]]["relationships"]] == ["d1", *names[:1:-1]]
        await _take(house, _relation(target={"collection": "books", "id": "d9"}, type="T", version=2, action="delete"))
        found = await house.store.graph_payload([ids["a"]], Viewer("red", "bob"))
        assert [one["id"] for one in found[ids["a"]]["relationships"]] == ["d1", *names[:9:-1], *names[8:1:-1], "d0"]
        assert found[ids["a"]]["more"] is False

    run(url, scenario)


@pytest.mark.parametrize("end", ["source", "target"])
def test_a_document_has_so_many_relationships_and_the_oldest_deleted_one_makes_room(end: str, url: str) -> None:
    other = "target" if end == "source" else "source"

    async def scenario(house: House) -> None:
        ids = (await seed(house, ["a", "b", "c"])).ids
        one = {end: ids["a"], "properties": "{}", "origin": "g", "version": 1, "updated_at": 5}
        rows = [{**one, other: ids["bc"[n % 2]], "type": f"T{n}", "deleted": n in (3, 4)} for n in range(MAX_RELATIONS)]
        await house.put(relations, rows)
        async with house.database.write.begin() as connection:
            await connection.execute(update(relations).where(relations.c.type == "T4").values(updated_at=4))
        ends = {end: {"collection": "books", "id": "a"}, other: {"collection": "books", "id": "b"}}
        assert await _take(house, _relation(**ends, type="NEW")) == (True, None)
        assert await _take(house, _relation(**ends, type="NEWER")) == (True, None)
        with pytest.raises(InvalidRequest) as refused:
            await _take(house, _relation(**ends, type="NEWEST"))
        assert refused.value.details == {"field": end, "allowed": MAX_RELATIONS}
        assert await _take(house, _relation(**ends, type="T6", version=2)) == (True, None)
        left = {row["type"] for row in await house.rows(relations)}
        assert left == {f"T{n}" for n in range(MAX_RELATIONS) if n not in (3, 4)} | {"NEW", "NEWER"}

    run(url, scenario)


def test_what_is_applied_becomes_an_event_with_the_origin_and_version_of_the_change(url: str) -> None:
    async def scenario(house: House) -> None:
        await seed(house, ["a", "b"])
        assert not house.store.written.is_set()
        await _take(house, _relation())
        assert house.store.written.is_set()
        await _take(house, _relation())
        await _take(house, _node(action="delete"), now=NOW + 5)
        bodies = [msgspec.json.decode(row["body"]) for row in await house.rows(outbound)]
        expected = [{**relationship(), "kind": "relationship.upsert"}, {**node(), "kind": "node.delete"}]
        for event in expected:
            del event["action"]
        assert bodies == expected
        assert [row["created_at"] for row in await house.rows(outbound)] == [NOW, NOW + 5]

    run(url, scenario)


def test_no_events_are_written_where_nobody_is_told(url: str) -> None:
    async def scenario(house: House) -> None:
        await seed(house, ["a", "b"])
        assert await _take(house, _relation()) == (True, None)
        await house.store.announce([OwnEvent("document.synced", "red", 3, {})], NOW)
        assert await house.count(outbound) == 0
        assert not house.store.written.is_set()

    run(url, scenario, sends=False)


def test_own_changes_are_told_as_made_here(url: str) -> None:
    async def scenario(house: House) -> None:
        ref = {"collection": "books", "id": "a"}
        await house.store.announce([], NOW)
        assert not house.store.written.is_set()
        events = [OwnEvent("document.synced", "red", version, {"document": ref}) for version in (3, 4)]
        await house.store.announce(events, NOW)
        assert house.store.written.is_set()
        bodies = [msgspec.json.decode(one.body) for one in await house.store.due(NOW, 10)]
        assert len({body.pop("eventId") for body in bodies}) == 2
        own = {"kind": "document.synced", "origin": "memvid-export", "client": "red", "document": ref}
        assert bodies == [{**own, "version": 3}, {**own, "version": 4}]

    run(url, scenario)


def test_events_are_due_in_order_and_once_their_time_has_come(url: str) -> None:
    async def scenario(house: House) -> None:
        row = {"body": "{}", "created_at": 0, "attempts": 1, "dead": False}
        times = [NOW + 1, NOW, 0, NOW + LONGEST_WAIT_MS, NOW + LONGEST_WAIT_MS + 1]
        await house.put(outbound, [{**row, "next_at": time} for time in times] + [{**row, "next_at": 0, "dead": True}])
        ids = [found["id"] for found in await house.rows(outbound)]
        # Nothing waits longer than the longest wait: the last one was written before the clock went back.
        assert [one.id for one in await house.store.due(NOW, 10)] == [ids[1], ids[2], ids[4]]
        assert [one.id for one in await house.store.due(NOW, 2)] == [ids[1], ids[2]]
        assert [one.id for one in await house.store.due(NOW + 1, 10)] == [ids[0], ids[1], ids[2]]

    run(url, scenario)


def test_events_that_were_given_up_are_kept_listed_and_sent_again_when_somebody_says_so(url: str) -> None:
    async def scenario(house: House) -> None:
        await house.store.announce([OwnEvent("k", "red", n, {}) for n in range(4)], NOW)
        a, b, c, d = (one.id for one in await house.store.due(NOW, 10))
        failed = [Unsent(b, 8, "answered 500", None), Unsent(c, 1, "answered 500", NOW + 9), Unsent(d, 1, "404", None)]
        await house.store.settle([a], failed)
        assert await house.store.outbound_counts() == OutboundCounts(1, 2)
        first, second = await house.store.dead_letters(0, 10)
        assert (first.id, first.attempts, first.error, first.created_at) == (b, 8, "answered 500", NOW)
        assert msgspec.json.decode(first.body)["version"] == 1
        assert await house.store.dead_letters(0, 1) == [first]
        assert await house.store.dead_letters(b, 10) == [second]
        assert [(one.id, one.attempts) for one in await house.store.due(NOW + 9, 10)] == [(c, 1)]
        house.store.written.clear()
        assert await house.store.retry_dead() == 2
        assert house.store.written.is_set()
        assert [(one.id, one.attempts) for one in await house.store.due(NOW, 10)] == [(b, 0), (d, 0)]
        assert await house.store.outbound_counts() == OutboundCounts(3, 0)
        house.store.written.clear()
        assert await house.store.retry_dead() == 0
        assert not house.store.written.is_set()

    run(url, scenario)


def test_an_event_for_which_there_is_no_room_is_given_up_at_once_and_counted(url: str) -> None:
    async def scenario(house: House) -> None:
        await seed(house, ["a", "b"])
        row = {"body": "{}", "created_at": 0, "attempts": 0, "next_at": NOW, "dead": False}
        await house.put(outbound, [row] * (MAX_WAITING - 1))
        await house.store.announce([OwnEvent("k", "red", n, {}) for n in range(3)], NOW)
        assert await house.store.outbound_counts() == OutboundCounts(MAX_WAITING, 2)
        house.store.written.clear()
        assert await _take(house, _relation()) == (True, None)
        await house.store.announce([OwnEvent("k", "red", 7, {})], NOW)
        assert not house.store.written.is_set()
        assert await house.store.outbound_counts() == OutboundCounts(MAX_WAITING, 4)
        dead = await house.store.dead_letters(0, 10)
        assert [one.error for one in dead] == ["full"] * 4
        assert [msgspec.json.decode(one.body)["version"] for one in dead] == [1, 2, 1, 7]
        assert house.figure("outbound_total", outcome="full") == 4
        assert await house.store.retry_dead() == 0
        [some] = await house.store.due(NOW, 1)
        await house.store.settle([some.id], [])
        assert await house.store.retry_dead() == 1
        assert [one.id for one in await house.store.dead_letters(0, 10)] == [one.id for one in dead[1:]]

    run(url, scenario)


def test_of_too_many_events_that_were_given_up_the_oldest_go(url: str) -> None:
    async def scenario(house: House) -> None:
        row = {"body": "{}", "created_at": 0, "attempts": 8, "next_at": 0, "error": "answered 500"}
        await house.put(outbound, [{**row, "dead": True}] * (MAX_DEAD - 1) + [{**row, "dead": False}] * 3)
        waiting = [one.id for one in await house.store.due(NOW, 10)]
        await house.store.settle([], [Unsent(row, 8, "answered 500", None) for row in waiting])
        assert await house.store.outbound_counts() == OutboundCounts(0, MAX_DEAD)
        assert house.figure("outbound_total", outcome="dropped") == 2
        first = waiting[0] - (MAX_DEAD - 1)
        assert (await house.store.dead_letters(0, 1))[0].id == first + 2

    run(url, scenario)
