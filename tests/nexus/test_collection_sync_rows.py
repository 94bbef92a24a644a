"""What the store knows of the graph: which changes are to be compared and told, whatever happens between."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from nexus.rows import NOW, House, new, run, url

from control_plane.jobs.database import Database
from control_plane.nexus.records import (
    HELD,
    MAX_ATTEMPTS,
    MAYBE_HELD,
    NOT_HELD,
    CollectionCounts,
    Graphed,
    Mentioned,
    Near,
    Related,
    Row,
    pack_near,
    unpack_near,
)
from control_plane.nexus.store import MAX_ERROR, SPACES, STEP, CollectionStore, LeaseLost
from control_plane.nexus.tables import documents, mentions, sync_state

__all__ = ["url"]


def told(row: Row) -> Graphed:
    """That the graph holds what a row said."""
    return Graphed(row.id, row.wanted, row.near, row.mentions, row.version)


async def named(house: House, document: int) -> dict[str, tuple[bool, int]]:
    """What is known of the mentions of a document."""
    return {one.entity: (one.wanted, one.held) for one in (await house.row(document)).mentions}


async def waiting(house: House, now: int = NOW) -> list[int]:
    """Rows that the graph is to be told of."""
    return [row.id for row in await house.store.ungraphed(100, now)]


# --- compared --------------------------------------------------------------------------------------------------------


def test_changes_are_to_be_compared_in_their_order_until_they_were(url: str) -> None:
    async def scenario(house: House) -> None:
        a, b, c = await house.put("a", "b", "c")
        await house.write(new("a", "again", title="Title", doc_type="page"))
        assert [one.id for one in await house.store.unrelated(10)] == [b, c, a]
        [first, second] = await house.store.unrelated(2)
        assert (first.id, second.id) == (b, c)
        last = (await house.store.unrelated(10))[-1]
        assert last[2:] == (False, "red/model/2", "books", "page", "Title", "again")
        await house.store.put_related([Related(b, first.version, "general", frozenset())], {})
        assert [one.id for one in await house.store.unrelated(10)] == [c, a]
        await house.relate()
        assert await house.store.unrelated(10) == []
        assert (await house.document("a")).domain == "general"

    run(url, scenario)


def test_a_document_that_changed_while_it_was_compared_is_compared_again(url: str) -> None:
    async def scenario(house: House) -> None:
        [row] = await house.put("a")
        [old] = await house.store.unrelated(1)
        await house.write(new("a", "newer"))
        await house.store.put_related([Related(row, old.version, "general", frozenset(["name:x"]))], {})
        assert await waiting(house) == [row]
        [again] = await house.store.unrelated(1)
        assert again.text == "newer"
        await house.store.put_related([Related(row, again.version, "legal", frozenset())], {})
        # What an engine says that was slower changes nothing of that.
        await house.store.put_related([Related(row, old.version, "general", frozenset(["name:x"]))], {})
        assert await named(house, row) == {"name:x": (False, MAYBE_HELD)}
        assert (await house.document("a")).domain == "legal"
        assert await house.store.unrelated(1) == []
        assert (await house.document("a")).related == again.version

    run(url, scenario)


def test_what_was_deleted_while_it_was_compared_has_no_list_and_names_nothing(url: str) -> None:
    async def scenario(house: House) -> None:
        [row] = await house.put("a")
        [old] = await house.store.unrelated(1)
        await house.store.delete(house.books, ["a"], now=NOW)
        related = Related(row, old.version, "secret", frozenset(["name:secret"]))
        await house.store.put_related(
            [related, Related(999, 1, "x", frozenset(["name:x"]))], {row: [Near(7, 0.9)], 999: []}
        )
        assert (await house.row(row)).near == b""
        assert (await house.row(row)).domain == ""
        assert await house.table(mentions) == []
        assert [one.deleted for one in await house.store.unrelated(1)] == [True]

    run(url, scenario)


def test_lists_that_change_are_told_to_the_graph_whoevers_they_are(url: str) -> None:
    async def scenario(house: House) -> None:
        a, b, c = await house.put("a", "b", "c")
        await house.relate()
        await house.graph()
        assert await waiting(house) == []
        lists = {a: [Near(c, 0.9), Near(b, 0.75)], c: [Near(a, 0.9)], b: []}
        await house.store.put_related([], {a: lists[a], c: lists[c]})
        assert await waiting(house) == [a, c]
        assert await house.store.near_of([a, b, c, 999]) == lists
        assert await house.store.lists(house.books.space, 0, 10) == [(row, pack_near(lists[row])) for row in (a, b, c)]
        assert await house.store.lists(house.books.space, a, 1) == [(b, b"")]

    run(url, scenario)


def test_lists_are_of_documents_that_live_and_were_compared_once(url: str) -> None:
    async def scenario(house: House) -> None:
        other, _ = await house.store.put_collection("red", "other", "model", 3)
        await house.store.write(other, [new("x", numbers=(1, 0, 0))], now=NOW)
        await house.put("a", "b")
        await house.relate()
        c, _ = await house.put("c", "a")
        await house.store.delete(house.books, ["b"], now=NOW)
        a = (await house.document("a")).id
        assert [row for row, _ in await house.store.lists(house.books.space, 0, 10)] == [a]
        assert a < c
        assert await house.store.spaces() == [("red/model/2", 2), ("red/model/3", 3)]
        assert [one.id for one in await house.store.changed_since(other.space, 0, 10)] != []
        assert len(await house.store.changed_since(house.books.space, 0, 10)) == 3

    run(url, scenario)


# --- told ------------------------------------------------------------------------------------------------------------


def test_the_graph_is_told_all_that_belongs_to_a_document(url: str) -> None:
    async def scenario(house: House) -> None:
        await house.write(new("a", title="Title", doc_type="page"))
        a = (await house.document("a")).id
        await house.relate({a: [Near(99, 0.8)]}, a=["name:x", "path:y"])
        [row] = await house.store.ungraphed(10, NOW)
        assert row == await house.row(a)
        assert row[:10] == (a, "red/model/2", "red", "books", "a", "Title", "general", "page", NOW, NOW)
        assert (row.deleted, row.pending, row.near, row.told, row.attempts) == (
            False,
            True,
            pack_near([Near(99, 0.8)]),
            b"",
            0,
        )
        assert sorted(row.mentions) == [Mentioned("name:x", True, NOT_HELD), Mentioned("path:y", True, NOT_HELD)]
        await house.graph()
        row = await house.row(a)
        assert (row.pending, row.told) == (False, row.near)
        assert sorted(row.mentions) == [Mentioned("name:x", True, HELD), Mentioned("path:y", True, HELD)]
        assert await house.store.told_of([a, 999]) == {a: row.near}
        assert await house.store.told([a, 999]) == {a: (row.near, False)}

    run(url, scenario)


def test_what_changes_while_the_graph_is_told_is_told_next(url: str) -> None:
    async def scenario(house: House) -> None:
        [a] = await house.put("a")
        await house.relate({a: [Near(7, 0.8)]}, a=["name:kept", "name:dropped"])
        [row] = await house.store.ungraphed(1, NOW)
        await house.store.put_intended({a: [Near(7, math.nan)]})
        await house.put("a")
        await house.relate({a: [Near(8, 0.9)]}, a=["name:kept", "name:new"])
        await house.store.put_graphed([told(row)], NOW)
        again = await house.row(a)
        assert again.pending
        assert (again.told, again.near) == (pack_near([Near(7, 0.8)]), pack_near([Near(8, 0.9)]))
        assert await named(house, a) == {
            "name:kept": (True, HELD),
            "name:dropped": (False, HELD),
            "name:new": (True, NOT_HELD),
        }
        await house.graph()
        assert await named(house, a) == {"name:kept": (True, HELD), "name:new": (True, HELD)}
        assert not (await house.row(a)).pending
        # Who was slower than that has nothing to say.
        await house.store.put_graphed([told(row), Graphed(999, 1, b"", [], 1)], NOW)
        assert (await house.row(a)).told == pack_near([Near(8, 0.9)])

    run(url, scenario)


def test_what_the_graph_may_hold_is_known_whenever_the_engine_ends(url: str) -> None:
    """Between what is intended and what was told there may be the end of a process."""

    async def scenario(house: House) -> None:
        [a] = await house.put("a")
        await house.relate(a=["name:old", "name:both"])
        await house.graph()
        await house.put("a")
        await house.relate(a=["name:both", "name:new"])
        assert await named(house, a) == {
            "name:old": (False, HELD),
            "name:both": (True, HELD),
            "name:new": (True, NOT_HELD),
        }
        await house.store.put_intended({a: [Near(5, math.nan)], 999: []})
        assert await named(house, a) == {
            "name:old": (False, MAYBE_HELD),
            "name:both": (True, HELD),
            "name:new": (True, MAYBE_HELD),
        }
        [(other, score)] = unpack_near((await house.row(a)).told or b"")
        assert (other, math.isnan(score)) == (5, True)
        assert await waiting(house) == [a]
        # What is not wanted any more, but may be there, is not forgotten.
        await house.put("a")
        await house.relate(a=["name:both"])
        assert await named(house, a) == {
            "name:old": (False, MAYBE_HELD),
            "name:both": (True, HELD),
            "name:new": (False, MAYBE_HELD),
        }
        await house.graph()
        assert await named(house, a) == {"name:both": (True, HELD)}

    run(url, scenario)


def test_a_name_that_is_told_just_now_is_not_forgotten_when_it_is_dropped(url: str) -> None:
    async def scenario(house: House) -> None:
        [a] = await house.put("a")
        await house.relate(a=["name:x"])
        [row] = await house.store.ungraphed(1, NOW)
        await house.put("a")
        await house.relate(a=[])
        assert await named(house, a) == {"name:x": (False, MAYBE_HELD)}
        await house.store.put_intended({a: []})
        await house.store.put_graphed([told(row)], NOW)
        assert await named(house, a) == {"name:x": (False, HELD)}
        await house.graph()
        assert await named(house, a) == {}
        await house.put("a")
        await house.relate(a=[])
        assert await house.table(mentions) == []

    run(url, scenario)


def test_who_writes_a_lot_keeps_nobody_waiting(url: str) -> None:
    async def scenario(house: House) -> None:
        others = [(await house.store.put_collection(f"c{one}", "few", "model", 2))[0] for one in range(SPACES + 2)]
        await house.put(*[f"d{one}" for one in range(60)])
        for other in others:
            await house.store.write(other, [new("one"), new("two")], now=NOW)
        for step in (house.store.unrelated, lambda limit, turn: house.store.ungraphed(limit, NOW, turn)):
            seen: Counter[str] = Counter()
            for turn in range(2):
                rows = await step(40, turn)
                assert len(rows) <= 40
                assert len({row.id for row in rows}) == len(rows)
                seen.update(row.space for row in rows)
            assert seen.keys() == {house.books.space, *(other.space for other in others)}
            assert min(seen.values()) >= 2
            assert len(await step(1_000, 3)) == 60 + 2 * len(others)
            await house.relate()

    run(url, scenario)


def test_a_name_that_is_told_just_now_may_be_held_whatever_was_written_since_it_was_read(url: str) -> None:
    async def scenario(house: House) -> None:
        [a, b] = await house.put("a", "b")
        await house.relate(a=["name:x"], b=["name:y"])
        await house.graph()
        await house.put("b")
        await house.relate(b=[])
        [loses] = await house.store.ungraphed(9, NOW)
        await house.put("a", "b")
        await house.relate(a=["name:x", "name:z"], b=["name:y"])
        [gets, _] = await house.store.ungraphed(9, NOW)
        assert (loses.id, gets.id) == (b, a)
        await house.store.delete(house.books, ["a"], now=NOW)
        assert await named(house, a) == {"name:x": (False, HELD)}
        assert await named(house, b) == {"name:y": (True, HELD)}
        # Told as they were read; then the process ends, and the next one has to know that "a" may have z, "b" not y.
        await house.store.put_intended({a: [], b: []}, [gets, loses])
        await house.put("a")
        await house.relate(a=[])
        assert await named(house, a) == {"name:x": (False, MAYBE_HELD), "name:z": (False, MAYBE_HELD)}
        assert await named(house, b) == {"name:y": (True, MAYBE_HELD)}

    run(url, scenario)


def test_names_that_a_deleted_document_had_in_the_graph_are_known_until_it_lost_them(url: str) -> None:
    async def scenario(house: House) -> None:
        [a] = await house.put("a")
        await house.relate(a=["name:x"])
        [row] = await house.store.ungraphed(1, NOW)
        await house.store.put_intended({a: []})
        await house.store.delete(house.books, ["a"], now=NOW)
        assert await named(house, a) == {"name:x": (False, MAYBE_HELD)}
        await house.store.put_graphed([told(row)], NOW)
        assert await named(house, a) == {"name:x": (False, HELD)}
        await house.relate()
        [gone] = await house.graph()
        assert (gone.deleted, gone.mentions) == (True, [Mentioned("name:x", False, HELD)])
        assert await house.table(mentions) == []
        assert not (await house.row(a)).pending

    run(url, scenario)


def test_of_names_those_are_orphans_that_nobody_names_or_is_to_lose(url: str) -> None:
    async def scenario(house: House) -> None:
        a, b, c = await house.put("a", "b", "c")
        await house.relate(a=["name:one", "name:both"], b=["name:both", "name:dropped"], c=["name:gone", "name:'\"%"])
        await house.graph()
        await house.put("b")
        await house.relate(b=["name:both"])
        await house.store.delete(house.books, ["c"], now=NOW)
        every = ["name:one", "name:both", "name:dropped", "name:gone", "name:never", "name:'\"%", "name:ONE"]
        assert await house.store.orphans(every) == {"name:never", "name:ONE"}
        assert await house.store.orphans(every, [b]) == {"name:never", "name:ONE", "name:dropped"}
        assert await house.store.orphans(every, [a, b, c]) == set(every) - {"name:one", "name:both"}
        assert await house.store.orphans([]) == set()
        await house.store.delete(house.books, ["a"], now=NOW)
        assert await house.store.orphans(["name:one", "name:both"]) == set()
        assert await house.store.orphans(["name:one", "name:both"], [a]) == {"name:one"}

    run(url, scenario)


# --- not taken -------------------------------------------------------------------------------------------------------


def test_what_the_graph_refuses_is_tried_again_later_and_given_up_in_the_end(url: str) -> None:
    async def scenario(house: House) -> None:
        a, b = await house.put("a", "b")
        await house.relate()
        for attempt in range(1, MAX_ATTEMPTS):
            await house.store.put_failed([a], "refused " * 1_000, NOW + attempt)
            assert await waiting(house, NOW + attempt - 1) == [b]
            assert await waiting(house, NOW + attempt) == [b, a]
            assert (await house.row(a)).attempts == attempt
        assert (await house.document("a")).error == ("refused " * 1_000)[:MAX_ERROR]
        assert await house.store.failures(None, 10) == []
        await house.store.put_failed([a], "refused for good", NOW)
        assert await waiting(house, NOW + 10**12) == [b]
        assert await house.store.failures("red", 10) == [("red", "books", "a", "refused for good", MAX_ATTEMPTS)]
        assert await house.store.failures("blue", 10) == []
        # Neither a list that changes nor the graph's other work brings it back.
        await house.store.put_related([], {a: [Near(b, 0.8)]})
        assert await waiting(house) == [b]

    run(url, scenario)


@pytest.mark.parametrize("how", ["written", "deleted", "distrusted", "retried"])
def test_what_was_given_up_is_tried_again_when_it_changes_or_somebody_says_so(url: str, how: str) -> None:
    async def scenario(house: House) -> None:
        [a] = await house.put("a")
        await house.relate()
        for _ in range(MAX_ATTEMPTS):
            await house.store.put_failed([a], "no", NOW)
        assert await waiting(house) == []
        if how == "written":
            await house.put("a")
        elif how == "deleted":
            await house.store.delete(house.books, ["a"], now=NOW)
        elif how == "distrusted":
            await house.store.distrust([a])
        else:
            assert await house.store.retry_failed("blue") == 0
            assert await house.store.retry_failed("red", "other") == 0
            assert await house.store.retry_failed(None, "books") == 1
            assert await house.store.retry_failed(None) == 0
        await house.relate()
        [row] = await house.store.ungraphed(10, NOW)
        assert (row.id, row.attempts) == (a, 0)
        assert await house.store.failures(None, 10) == []
        await house.graph()
        assert await house.table(documents) != []
        assert [one["error"] for one in await house.table(documents)] == [None]

    run(url, scenario)


def test_more_is_tried_again_than_a_step_takes(url: str) -> None:
    async def scenario(house: House) -> None:
        ids = await house.put(*map(str, range(STEP + 3)))
        await house.relate()
        for _ in range(MAX_ATTEMPTS):
            await house.store.put_failed(ids, "no", NOW)
        assert await house.store.retry_failed("red") == STEP + 3
        assert len(await house.store.ungraphed(2 * STEP, NOW)) == STEP + 3

    run(url, scenario)


# --- not known -------------------------------------------------------------------------------------------------------


def test_a_document_that_is_distrusted_is_told_anew_though_it_is_told_meanwhile(url: str) -> None:
    async def scenario(house: House) -> None:
        a, b = await house.put("a", "b")
        await house.relate({a: [Near(b, 0.8)]}, a=["name:x"])
        [row] = [row for row in await house.store.ungraphed(10, NOW) if row.id == a]
        await house.graph()
        await house.put("a")
        await house.relate()
        [row] = await house.store.ungraphed(10, NOW)
        await house.store.distrust([a, 999])
        await house.store.put_intended({a: unpack_near(row.near)})
        assert await house.store.told_of([a, b]) == {a: None, b: b""}
        await house.store.put_graphed([told(row)], NOW)
        assert await house.store.told_of([a]) == {a: None}
        assert await waiting(house) == [a]
        [row] = await house.store.ungraphed(10, NOW)
        await house.store.put_graphed([told(row)], NOW)
        assert await house.store.told_of([a]) == {a: row.near}
        assert await waiting(house) == []

    run(url, scenario)


def test_everything_can_be_told_anew(url: str) -> None:
    async def scenario(house: House) -> None:
        ids = await house.put(*map(str, range(STEP + 2)))
        await house.relate({ids[0]: [Near(ids[1], 0.9)]}, **{"0": ["name:x"], "1": ["name:y"]})
        await house.graph()
        await house.put("1")
        await house.relate()
        await house.store.delete(house.books, ["2"], now=NOW)
        assert await house.store.living() == STEP + 1
        assert await house.store.distrust_all() == STEP + 2
        assert set((await house.store.told_of(ids)).values()) == {None}
        assert len(await house.store.ungraphed(2 * STEP, NOW)) == STEP + 2
        # Once the graph was made empty there is nothing to ask it.
        await house.store.nothing_told()
        assert set((await house.store.told_of(ids)).values()) == {b""}
        assert await named(house, ids[0]) == {"name:x": (True, NOT_HELD)}
        assert await named(house, ids[1]) == {}

    run(url, scenario)


def test_an_empty_store_has_nothing_to_tell_anew(url: str) -> None:
    async def scenario(house: House) -> None:
        assert await house.store.distrust_all() == 0
        await house.store.nothing_told()
        assert await house.store.rows_after(0, 10) == []
        assert await house.store.spaces() == []
        await house.store.put_related([], {})

    run(url, scenario)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_say_how_far_the_graph_is_behind(url: str) -> None:
    async def scenario(house: House) -> None:
        store = house.store
        blue, _ = await store.put_collection("blue", "empty", "model", 2)
        await house.write(new("a"), new("b"), new("c"), now=NOW)
        await house.write(new("d"), now=NOW + 5)
        assert await store.counts() == [
            CollectionCounts("blue", "empty", 0, 0, 0, None),
            CollectionCounts("red", "books", 4, 4, 0, NOW),
        ]
        await house.relate()
        assert (await store.counts())[1] == CollectionCounts("red", "books", 4, 4, 0, NOW)
        await house.graph()
        assert (await store.counts())[1] == CollectionCounts("red", "books", 4, 0, 0, None)
        await store.delete(house.books, ["a"], now=NOW + 7)
        assert (await store.counts())[1] == CollectionCounts("red", "books", 3, 1, 0, NOW + 7)
        await house.write(new("b"), now=NOW + 9)
        await house.write(new("b"), now=NOW + 11)
        assert (await store.counts())[1] == CollectionCounts("red", "books", 3, 2, 0, NOW + 7)
        await house.relate()
        b = (await house.document("b")).id
        for _ in range(MAX_ATTEMPTS):
            await store.put_failed([b], "no", NOW)
        assert (await store.counts())[1] == CollectionCounts("red", "books", 3, 1, 1, NOW + 7)
        # What is left of a dropped one counts under its name, until the graph has heard of that.
        await store.drop_collection(house.books)
        await store.put_collection("red", "books", "model", 2)
        [counts] = [one for one in await store.counts() if one.client == "red"]
        assert counts[:5] == ("red", "books", 0, 4, 0)
        await house.relate()
        await house.graph()
        assert [one for one in await store.counts() if one.client == "red"] == [
            CollectionCounts("red", "books", 0, 0, 0, None)
        ]
        await store.drop_collection(blue)
        assert [one.client for one in await store.counts()] == ["red"]

    run(url, scenario)


def test_a_document_whose_list_changes_has_waited_since_then(url: str) -> None:
    async def scenario(house: House) -> None:
        a, b = await house.put("a", "b")
        await house.relate()
        await house.graph()
        await house.store.put_related([], {a: [Near(b, 0.8)]})
        changed = (await house.row(a)).changed_at
        assert abs(changed - house.books.created_at) < 600_000
        await house.store.put_related([], {a: []})
        assert (await house.row(a)).changed_at == changed
        [row] = await house.store.ungraphed(10, NOW)
        await house.store.put_related([], {a: [Near(b, 0.9)]})
        await house.store.put_graphed([told(row)], NOW + 3)
        assert (await house.row(a)).changed_at == NOW + 3

    run(url, scenario)


# --- one replica does it ---------------------------------------------------------------------------------------------


def test_one_replica_has_the_lease_until_it_lets_go_or_lets_it_lapse(url: str) -> None:
    async def scenario(house: House) -> None:
        first, second = house.store, CollectionStore(house.database, replica="second")
        assert not await second.take_lease()
        assert await first.take_lease()
        state = await first.state()
        assert (state.enabled, state.owner, state.last_version) == (True, "first", 0)
        await second.release_lease()
        assert not await second.take_lease()
        await first.release_lease()
        assert await second.take_lease()
        assert not await first.take_lease()
        await house.execute("UPDATE sync_state SET lease_until = 1")
        assert await first.take_lease()
        # A lease that ends long from now was given before the clock went back.
        await house.execute("UPDATE sync_state SET lease_until = lease_until + 3600000")
        assert await second.take_lease()
        assert (await first.state()).lease_until < NOW * 10

    run(url, scenario)


def test_of_many_that_want_the_lease_at_once_one_gets_it(url: str) -> None:
    async def scenario(house: House) -> None:
        await house.store.release_lease()
        stores = [CollectionStore(house.database, replica=f"{n}") for n in range(6)]
        taken = await asyncio.gather(*(store.take_lease() for store in stores))
        assert taken.count(True) == 1
        assert (await house.store.state()).owner == f"{taken.index(True)}"

    run(url, scenario)


def test_a_replica_that_lost_the_lease_puts_nothing(url: str) -> None:
    async def scenario(house: House) -> None:
        await house.put("a")
        await house.relate(a=["name:x"])
        [row] = await house.store.ungraphed(10, NOW)
        [a] = [row.id]
        await house.store.release_lease()
        before = await house.table(documents), await house.table(mentions)
        for put in (
            lambda store: store.put_related([Related(a, row.version, "x", frozenset())], {a: []}),
            lambda store: store.put_intended({a: [Near(1, 0.9)]}),
            lambda store: store.put_graphed([told(row)], NOW),
            lambda store: store.put_failed([a], "no", NOW),
            lambda store: store.nothing_told(),
        ):
            with pytest.raises(LeaseLost):
                await put(house.store)
        assert (await house.table(documents), await house.table(mentions)) == before
        # One that lapsed is as good as any while nobody else has it.
        assert await house.store.take_lease()
        await house.execute("UPDATE sync_state SET lease_until = 1")
        await house.store.put_graphed([told(row)], NOW)
        assert await waiting(house) == []

    run(url, scenario)


def test_a_look_at_the_graph_is_wanted_once_and_told_by_who_does_it(url: str) -> None:
    async def scenario(house: House) -> None:
        first, second = house.store, CollectionStore(house.database, replica="second")
        assert await second.ask("rebuild")
        assert not await first.ask("verify")
        await first.put_progress("verify", "half")
        state = await second.state()
        assert (state.asked, state.progress, state.report) == ("rebuild", "half", None)
        await first.put_progress("verify", None)
        assert not await first.ask("verify")
        await first.put_progress("rebuild", "begun")
        assert (await second.state()).asked is None
        assert not await second.ask("verify")
        await second.put_progress("rebuild", "not mine")
        await first.take_lease()
        assert (await second.state()).progress == "begun"
        await first.put_verified(NOW, "found")
        state = await second.state()
        assert (state.verified_at, state.report, state.progress) == (NOW, "found", None)
        # Nobody goes on with the look of a replica that ended.
        await first.put_progress("verify", "half")
        await first.release_lease()
        assert await second.take_lease()
        assert (await first.state()).progress is None
        assert await first.ask("verify")

    run(url, scenario)


def test_the_graph_that_was_told_is_known_by_its_mark(url: str) -> None:
    async def scenario(house: House) -> None:
        assert await house.store.graph() is None
        await CollectionStore(house.database, replica="second").put_graph("other")
        assert await house.store.graph() is None
        await house.store.put_graph("mark")
        assert await house.store.graph() == "mark"

    run(url, scenario)


def test_it_can_be_switched_off_and_on(url: str) -> None:
    async def scenario(house: House) -> None:
        await house.store.set_enabled(False)
        assert not (await house.store.state()).enabled
        await house.store.set_enabled(True)
        assert (await house.store.state()).enabled
        assert len(await house.table(sync_state)) == 1

    run(url, scenario)


# --- at once ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_whoever_writes_and_syncs_at_once_in_the_end_everything_is_told(url: str, seed: int) -> None:
    """Writers of two replicas, both stages of the engine, looks that distrust, sweeps; nobody waits for another in a
    circle, and what the graph was told is what the rows say."""
    chance = random.Random(seed)
    names = [f"name:{n}" for n in range(6)]

    async def scenario(house: House) -> None:
        other = Database(url)
        stores = [house.store, CollectionStore(other, replica="second")]
        held: dict[int, tuple[bytes, frozenset[str]]] = {}
        """The graph: by document its list and the names."""
        ended = asyncio.Event()

        async def write(number: int) -> None:
            for step in range(10):
                ids = chance.sample(range(40), chance.randint(1, 15))
                doc_ids = [f"{doc_id}" for doc_id in ids]
                store = stores[number % 2]
                if step % 4 == 3:
                    await store.delete(house.books, doc_ids, now=NOW)
                else:
                    await store.write(house.books, [new(doc_id) for doc_id in doc_ids], now=NOW)

        async def relate() -> int:
            done = [
                Related(one.id, one.version, "general", frozenset([] if one.deleted else chance.sample(names, 2)))
                for one in await house.store.unrelated(20)
            ]
            rows = [row.id for row in await house.store.rows_after(0, 100)]
            lists = {row: [Near(chance.choice(rows), 0.8)] for row in chance.sample(rows, min(len(rows), 15))}
            await house.store.put_related(done, lists if done else {})
            return len(done)

        async def tell() -> int:
            rows = await house.store.ungraphed(20, NOW)
            await house.store.put_intended({row.id: unpack_near(row.near) for row in rows if row.told is not None})
            for row in rows:
                held.pop(row.id, None)
                if not row.deleted:
                    held[row.id] = row.near, frozenset(one.entity for one in row.mentions if one.wanted)
            await house.store.put_graphed([told(row) for row in rows], NOW)
            return len(rows)

        async def look() -> int:
            rows: Sequence[Row] = await house.store.rows_after(0, 100)
            await house.store.distrust([row.id for row in chance.sample(rows, min(len(rows), 5))])
            return await house.store.sweep(NOW + 10**10)

        async def loop(step: object) -> None:
            while not ended.is_set():
                await step()  # type: ignore[operator]

        loops = [asyncio.create_task(loop(step)) for step in (relate, tell, look)]
        await asyncio.gather(*map(write, range(4)))
        ended.set()
        await asyncio.gather(*loops)
        while await relate() + await tell():
            pass
        rows = await house.store.rows_after(0, 1_000)
        assert not [row for row in rows if row.pending]
        living = [row for row in rows if not row.deleted]
        assert held == {row.id: (row.near, frozenset(one.entity for one in row.mentions)) for row in living}
        assert {one.held for row in living for one in row.mentions} <= {HELD}
        assert not [row for row in rows if row.deleted and (row.mentions or row.near)]
        await other.close()

    run(url, scenario)
