"""Collections and their documents in a database: what was written is there, for those who may see it, until it is
deleted, and then nothing of it."""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nexus.rows import NOW, House, new, run, url
from sqlalchemy import event

from common.errors import InvalidRequest
from control_plane.errors import CollectionDiffers, CollectionNotFound, DocumentNotFound
from control_plane.jobs.database import Database
from control_plane.jobs.tables import metadata
from control_plane.nexus import domains, entities
from control_plane.nexus.records import MAX_ATTEMPTS, Collection, Near, Viewer
from control_plane.nexus.sight import Scope, Sight
from control_plane.nexus.statements import QUERY_WORDS, WORD_LENGTH
from control_plane.nexus.store import EVERYTHING, STEP, TOMBSTONE_MS, CollectionStore
from control_plane.nexus.tables import collections, document_contents, documents, spaces

__all__ = ["url"]

RED = Viewer("red", None)


def key(name: str) -> Viewer:
    """A key of the client ``red``."""
    return Viewer("red", name)


async def seen_inside(house: House, space: str, viewer: Viewer) -> set[int]:
    """Rows of a space that a viewer sees."""
    rows, _ = await Sight(house.database).inside(space, viewer)
    return set(rows.tolist())


# --- collections -----------------------------------------------------------------------------------------------------


def test_a_collection_is_made_once_and_found_by_its_name(url: str) -> None:
    async def scenario(house: House) -> None:
        made, created = await house.store.put_collection("red", "notes", "openai/small", 3)
        assert created
        assert made[1:-1] == ("red", "notes", "red/openai/small/3", "openai/small", 3)
        assert abs(made.created_at - house.books.created_at) < 60_000
        assert await house.store.put_collection("red", "notes", "openai/small", 3) == (made, False)
        assert await house.store.collection("red", "notes") == made
        for client, name in (("blue", "notes"), ("red", "Notes"), ("red", "note")):
            with pytest.raises(CollectionNotFound):
                await house.store.collection(client, name)

    run(url, scenario)


@pytest.mark.parametrize(("model", "dimension"), [("other", 2), ("model", 3)])
def test_a_name_stands_for_vectors_of_one_kind(url: str, model: str, dimension: int) -> None:
    async def scenario(house: House) -> None:
        with pytest.raises(CollectionDiffers, match="books of the model model with 2 numbers") as raised:
            await house.store.put_collection("red", "books", model, dimension)
        assert raised.value.details == {"model": "model", "dimension": 2}
        assert (await house.store.put_collection("blue", "books", model, dimension))[1]

    run(url, scenario)


def test_of_many_that_make_a_collection_at_once_one_does(url: str) -> None:
    async def scenario(house: House) -> None:
        made = await asyncio.gather(*(house.store.put_collection("red", "new", "model", 2) for _ in range(8)))
        assert len({one.id for one, _ in made}) == 1
        assert sorted(created for _, created in made) == [False] * 7 + [True]
        # One space for all whose vectors are comparable.
        assert [row["name"] for row in await house.table(spaces)] == ["red/model/2"]

    run(url, scenario)


def test_collections_are_listed_page_by_page(url: str) -> None:
    async def scenario(house: House) -> None:
        for client in ("red", "blue", "green"):
            for name in ("a", "b", "c"):
                await house.store.put_collection(client, name, "model", 2)
        await house.store.drop_collection(await house.store.collection("blue", "b"))

        async def paged(client: str | None) -> list[str]:
            found: list[str] = []
            after = ""
            while page := await house.store.collections(client, after, 2):
                found += [f"{one.name}/{one.client}" for one in page]
                after = page[-1].name if client else found[-1]
            return found

        assert await paged("red") == ["a/red", "b/red", "books/red", "c/red"]
        assert await paged("blue") == ["a/blue", "c/blue"]
        every = ["a/blue", "a/green", "a/red", "b/green", "b/red", "books/red", "c/blue", "c/green", "c/red"]
        assert await paged(None) == every

    run(url, scenario)


def test_a_dropped_collection_is_gone_at_once_and_its_name_is_free(url: str) -> None:
    async def scenario(house: House) -> None:
        await house.write(*(new(f"{n}", "zebra") for n in range(3)))
        await house.store.delete(house.books, ["2"], now=NOW)
        assert await house.store.drop_collection(house.books) == 2
        for attempt in (
            house.store.collection("red", "books"),
            house.store.drop_collection(house.books),
            house.put("9"),
        ):
            with pytest.raises(CollectionNotFound):
                await attempt
        again, created = await house.store.put_collection("red", "books", "other", 3)
        assert created
        assert again.id != house.books.id
        assert await house.store.listing(again, EVERYTHING, after=0, limit=10) == []
        await house.forget()
        assert await house.table(documents) == []
        assert [row["id"] for row in await house.table(collections)] == [again.id]
        assert [row["name"] for row in await house.table(spaces)] == ["red/other/3"]

    run(url, scenario)


def test_documents_of_a_collection_that_is_being_dropped_are_seen_by_nobody_and_swept(url: str) -> None:
    async def scenario(house: House) -> None:
        ids = await house.put("a", "b")
        await house.write(new("c", "zebra"))
        # As if who dropped it had ended right after the first step.
        await house.execute("UPDATE collections SET deleted = true")
        store = house.store
        assert await store.get(house.books, ["a"], EVERYTHING) == []
        assert await store.by_ids(ids, EVERYTHING) == {}
        assert await store.listing(house.books, EVERYTHING, after=0, limit=10) == []
        assert await store.count(house.books, EVERYTHING) == 0
        assert await seen_inside(house, house.books.space, EVERYTHING) == set()
        assert await store.words([house.books.id], "zebra", EVERYTHING, 10) == []
        assert await store.delete(house.books, ["a"], now=NOW) == 0
        assert await store.sweep(NOW) == 3
        assert [row["deleted"] for row in await house.table(documents)] == [True] * 3
        assert await house.table(document_contents) == []

    run(url, scenario)


def test_a_collection_of_more_documents_than_a_step_takes_is_dropped_whole(url: str) -> None:
    async def scenario(house: House) -> None:
        count = STEP + 5
        await house.put(*map(str, range(count)))
        before = (await house.store.state()).last_version
        assert await house.store.drop_collection(house.books) == count
        rows = await house.table(documents)
        assert all(row["deleted"] for row in rows)
        assert len({row["version"] for row in rows}) == count
        assert min(row["version"] for row in rows) > before

    run(url, scenario)


# --- documents -------------------------------------------------------------------------------------------------------


def test_a_document_is_read_as_it_was_written(url: str) -> None:
    async def scenario(house: House) -> None:
        payload = {"lines": [1, 2.5, None], "ключ": {"nested": True}, "nul": "\0"}
        document = new(
            "a b/ü", "Text\n日本語", title="Title", payload=payload, doc_type="page", permissions=("k2", "K")
        )
        [written] = await house.write(document)
        found = await house.document("a b/ü", key("K"))
        assert (found.id, found.version) == (written.id, written.version)
        assert (found.collection, found.doc_id, found.title, found.text) == (
            *(house.books.id, "a b/ü", "Title", "Text\n日本語"),
        )
        assert (found.payload, found.doc_type, found.permissions) == (payload, "page", ("k2", "K"))
        assert (found.created_at, found.updated_at, found.synced_at) == (NOW, NOW, None)
        assert (found.domain, found.status, found.attempts, found.error) == ("", "pending", 0, None)
        [vector] = await house.store.changed_since(house.books.space, 0, 10)
        assert vector == (written.id, written.version, False, np.array([1, 0], dtype="<f4").tobytes())

    run(url, scenario)


def test_writing_again_takes_the_place_of_what_was_there(url: str) -> None:
    async def scenario(house: House) -> None:
        [first] = await house.write(new("a", "old", permissions=("k",), payload={"n": 1}))
        [other] = await house.write(new("b"))
        [again] = await house.write(new("a", "new", numbers=(0, 1), title="Changed", doc_type="page"), now=NOW + 5)
        assert (first.created, other.created, again.created) == (True, True, False)
        assert again.id == first.id
        assert first.version < other.version < again.version
        found = await house.document("a")
        assert (found.title, found.text, found.payload, found.doc_type, found.permissions) == (
            *("Changed", "new", {}, "page", ()),
        )
        assert (found.created_at, found.updated_at) == (NOW, NOW + 5)
        assert await house.store.count(house.books, RED) == 2

    run(url, scenario)


def test_several_are_written_in_the_order_in_which_they_came(url: str) -> None:
    async def scenario(house: House) -> None:
        await house.put("b")
        written = await house.write(new("c"), new("b"), new("a"))
        assert [one.doc_id for one in written] == ["c", "b", "a"]
        assert [one.created for one in written] == [True, False, True]
        assert [one.version for one in written] == list(range(written[0].version, written[0].version + 3))
        assert {one.doc_id: one.id for one in written} == {
            doc_id: (await house.document(doc_id)).id for doc_id in ("a", "b", "c")
        }
        assert await house.write() == []

    run(url, scenario)


@pytest.mark.parametrize(
    ("document", "field"),
    [
        (new("a"), "documents[1].id"),
        (new("x\0y"), "documents[1].id"),
        (new("half \ud800"), "documents[1].id"),
        (new("b", numbers=(1, 0, 0)), "documents[1].vector"),
    ],
    ids=["twice", "nul", "half", "dimension"],
)
def test_what_cannot_be_written_is_refused_with_all_that_came_with_it(url: str, document: object, field: str) -> None:
    async def scenario(house: House) -> None:
        with pytest.raises(InvalidRequest) as raised:
            await house.write(new("a"), document)  # type: ignore[arg-type]
        assert raised.value.details["field"] == field
        assert await house.table(documents) == []

    run(url, scenario)


def test_ids_that_are_nearly_alike_are_different_documents(url: str) -> None:
    async def scenario(house: House) -> None:
        names = ["a", "A", "a ", "á", "a\u0301", "%", "_", "a%", '"a"', "[]", "null", "1", "01", "\u2028"]
        await house.write(*(new(name, title=name) for name in names))
        assert [one.title for one in await house.store.get(house.books, names, RED)] == names
        for name in names:
            assert (await house.document(name)).title == name
        assert await house.store.get(house.books, ["b", "a\0", "a\0b", "\ud800", ""], RED) == []
        assert await house.store.delete(house.books, ["a\0", "\ud800", "b"], now=NOW) == 0
        assert await house.store.delete(house.books, ["A", "A", "%"], now=NOW) == 2
        assert [one.doc_id for one in await house.store.get(house.books, names, RED)] == [
            name for name in names if name not in ("A", "%")
        ]

    run(url, scenario)


def test_the_character_nul_in_texts_does_no_harm(url: str) -> None:
    async def scenario(house: House) -> None:
        await house.write(new("a", "left\0right", title="\0"))
        found = await house.document("a")
        assert (found.title, found.text) == ("\ufffd", "left\ufffdright")
        assert len(await house.store.words([house.books.id], "right", RED, 5)) == 1

    run(url, scenario)


def test_many_are_asked_for_at_once(url: str) -> None:
    async def scenario(house: House) -> None:
        ids = await house.put(*map(str, range(50)))
        many = [*map(str, range(70_000))]
        assert len(await house.store.get(house.books, many, RED)) == 50
        assert await house.store.by_ids(range(-100_000, 100_000), RED) == await house.store.by_ids(ids, RED)
        assert await house.store.delete(house.books, many, now=NOW) == 50

    run(url, scenario)


def test_documents_are_listed_page_by_page(url: str) -> None:
    async def scenario(house: House) -> None:
        other, _ = await house.store.put_collection("red", "other", "model", 2)
        await house.put("e", "d")
        await house.store.write(other, [new("x")], now=NOW)
        await house.write(new("c", permissions=("k",)), new("b"), new("a"))
        await house.store.delete(house.books, ["d"], now=NOW)
        found, after = [], 0
        while page := await house.store.listing(house.books, key("other"), after=after, limit=2):
            found += [one.doc_id for one in page]
            after = page[-1].id
        assert found == ["e", "b", "a"]
        assert await house.store.count(house.books, key("other")) == 3

    run(url, scenario)


def test_a_deleted_document_comes_again_as_a_new_one_in_another_row(url: str) -> None:
    async def scenario(house: House) -> None:
        [first] = await house.write(new("a", "old"))
        await house.relate({first.id: [Near(99, 0.9)]})
        await house.store.delete(house.books, ["a"], now=NOW + 1)
        [again] = await house.write(new("a", "new"), now=NOW + 2)
        assert again.id > first.id
        assert again.created
        found = await house.document("a")
        assert (found.text, found.created_at, found.domain, found.synced_at) == ("new", NOW + 2, "", None)
        assert await house.store.near_of([first.id, again.id]) == {first.id: [], again.id: []}

    run(url, scenario)


def test_the_id_of_a_row_that_went_is_not_used_again(url: str) -> None:
    async def scenario(house: House) -> None:
        ids = await house.put("a", "b")
        await house.store.delete(house.books, ["a", "b"], now=NOW)
        await house.forget()
        assert await house.table(documents) == []
        assert min(await house.put("a", "c")) > max(ids)

    run(url, scenario)


SECRETS = ("zebrafinch", "quagga", "okapi", "tapir")


@pytest.mark.parametrize("graphed", [False, True])
def test_of_a_deleted_document_nothing_is_left_but_its_id(url: str, graphed: bool) -> None:
    """Names that the graph holds stay until it has lost them, which is noted in no other way."""

    async def scenario(house: House) -> None:
        await house.write(
            new("a", "zebrafinch", title="quagga", payload={"okapi": 1}, numbers=(0.6, 0.8)), new("b", "tame")
        )
        row = (await house.document("a")).id
        await house.relate(a=["name:tapir"])
        if graphed:
            await house.graph()
        await house.execute(
            "INSERT INTO node_changes (document, properties, origin, version, updated_at) "
            f"VALUES ({row}, 'okapi', 'graph', 1, 1)"
        )
        for ends in (f"{row}, {row + 1}", f"{row + 1}, {row}"):
            await house.execute(
                "INSERT INTO relations (source, target, type, properties, origin, version, deleted, updated_at) "
                f"VALUES ({ends}, 'T', 'okapi', 'graph', 1, false, 1)"
            )
        assert await house.store.delete(house.books, ["a", "missing"], now=NOW + 7) == 1
        said = await everything(house)
        assert [word for word in SECRETS if word in said] == (["tapir"] if graphed else [])
        assert str(np.array([0.6, 0.8], dtype="<f4").tobytes()) not in said
        found = await house.store.words([house.books.id], "zebrafinch quagga", EVERYTHING, 10)
        assert found == []
        # Those who compare and tell the graph hear of it.
        [change] = await house.store.changed_since(house.books.space, 2, 10)
        assert (change.id, change.deleted, change.vector) == (row, True, b"")
        [unrelated] = await house.store.unrelated(10)
        assert unrelated[2:] == (True, house.books.space, "books", "", "", "")
        await house.relate()
        [told] = [one for one in await house.graph() if one.deleted]
        assert (told.id, told.doc_id, told.title, told.domain, told.doc_type, told.near) == (row, "a", "", "", "", b"")
        assert not [word for word in SECRETS if word in await everything(house)]
        assert (await house.document("b")).text == "tame"

    run(url, scenario)


async def everything(house: House) -> str:
    """All that is in all rows, the word index too."""
    tables = [row for name in metadata.tables for row in await house.table(metadata.tables[name])]
    if house.database.postgres:
        words = await house.execute("SELECT words::text FROM document_words")
    else:
        await house.execute("CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab(main, document_words, row)")
        words = await house.execute("SELECT term FROM temp.vocabulary")
        await house.execute("DROP TABLE temp.vocabulary")
    return f"{tables}{words}"


def test_words_of_deleted_documents_leave_the_file_of_the_index(tmp_path: Path) -> None:
    """On SQLite a word that is found no more is still in its index, until a sweep has written that anew."""

    async def scenario(house: House) -> None:
        await house.write(*(new(f"{n}", f"common word{n}") for n in range(50)), new("a", "zebrafinch"))
        await house.store.delete(house.books, ["a"], now=NOW)
        await house.store.sweep(NOW)
        blocks = await house.execute("SELECT block FROM document_words_data")
        assert not [1 for (block,) in blocks if b"zebrafinch" in block]
        assert [1 for (block,) in blocks if b"common" in block]
        assert len(await house.store.words([house.books.id], "word17", RED, 10)) == 1

    run(f"sqlite+aiosqlite:///{tmp_path}/jobs.sqlite", scenario)


def test_tombstones_stay_until_the_graph_has_lost_the_document_and_an_hour_longer(url: str) -> None:
    async def scenario(house: House) -> None:
        await house.put("a", "b")
        await house.relate()
        await house.graph()
        await house.store.delete(house.books, ["a"], now=NOW)
        late = NOW + TOMBSTONE_MS + 1
        assert await house.store.sweep(late) == 0
        await house.relate()
        assert await house.store.sweep(late) == 0
        await house.graph()
        assert await house.store.sweep(late - 1) == 0
        assert await house.store.sweep(late) == 1
        assert [row["doc_id"] for row in await house.table(documents)] == ["b"]
        assert await house.store.sweep(late) == 0
        assert await house.store.collection("red", "books") == house.books

    run(url, scenario)


# --- who sees what ---------------------------------------------------------------------------------------------------

NAMES = ["r", "R", "re_", "red", "red2", "Red", "r.d", "r%", "a", "b", "-"]


def test_a_document_is_there_for_the_keys_that_it_names_and_no_others(url: str) -> None:
    chance = random.Random(5)

    async def scenario(house: House) -> None:
        store = house.store
        allowed = {f"{n}": chance.sample(NAMES, chance.randint(0, 3)) for n in range(60)}
        await house.write(*(new(doc_id, "zebra", permissions=names) for doc_id, names in allowed.items()))
        every = await store.get(house.books, [*allowed], EVERYTHING)
        ids = {one.id: one.doc_id for one in every}
        assert len(ids) == 60
        for viewer in (EVERYTHING, RED, Viewer(None, "red"), *map(key, [*NAMES, "re", "ed", "", "[]", '"', "r_d"])):
            seen = {
                doc_id for doc_id, names in allowed.items() if viewer.key is None or not names or viewer.key in names
            }
            assert {one.doc_id for one in await store.get(house.books, [*allowed], viewer)} == seen
            assert {one.doc_id for one in (await store.by_ids([*ids], viewer)).values()} == seen
            assert {one.doc_id for one in await store.listing(house.books, viewer, after=0, limit=100)} == seen
            assert await store.count(house.books, viewer) == len(seen)
            assert {ids[row] for row in await seen_inside(house, house.books.space, viewer)} == seen
            assert {ids[row] for row, _ in await store.words([house.books.id], "zebra", viewer, 100)} == seen

    run(url, scenario)


def test_documents_of_another_client_are_there_for_nobody_else(url: str) -> None:
    async def scenario(house: House) -> None:
        [row] = await house.put("a")
        blue, _ = await house.store.put_collection("blue", "books", "model", 2)
        [written] = await house.store.write(blue, [new("a", "zebra")], now=NOW)
        for viewer, ids in ((RED, {row}), (Viewer("blue", None), {written.id}), (EVERYTHING, {row, written.id})):
            assert set(await house.store.by_ids([row, written.id], viewer)) == ids
            found = [await house.store.get(one, ["a"], viewer) for one in (house.books, blue)]
            assert {one.id for some in found for one in some} == ids
            shown = await house.store.words([house.books.id, blue.id], "zebra a", viewer, 10)
            assert {one for one, _ in shown} == ids
            assert await seen_inside(house, blue.space, viewer) == ids - {row}
        assert await house.store.delete(blue, ["a"], now=NOW, viewer=RED) == 0

    run(url, scenario)


def test_what_a_key_does_not_see_it_neither_replaces_nor_deletes(url: str) -> None:
    async def scenario(house: House) -> None:
        await house.write(new("hidden", "old", permissions=("Owner",)), new("open", "old"))
        for documents_ in ([new("hidden", "new")], [new("open", "new"), new("hidden", "new")]):
            for name in ("owner", "other"):
                with pytest.raises(DocumentNotFound):
                    await house.write(*documents_, viewer=key(name))
        assert await house.store.delete(house.books, ["hidden", "open"], now=NOW, viewer=key("owner")) == 1
        assert (await house.document("hidden")).text == "old"
        await house.write(new("hidden", "own", permissions=("other",)), new("next"), viewer=key("Owner"))
        assert (await house.document("hidden", key("other"))).text == "own"
        assert await house.store.delete(house.books, ["hidden"], now=NOW, viewer=key("Owner")) == 0
        assert await house.store.delete(house.books, ["hidden"], now=NOW, viewer=RED) == 1
        # Where it was there is nothing that anybody might not see.
        assert (await house.write(new("hidden"), viewer=key("owner")))[0].created

    run(url, scenario)


# --- words -----------------------------------------------------------------------------------------------------------


def test_documents_are_found_by_the_parts_of_what_they_name(url: str) -> None:
    said = {
        "identifier": "def parse_graph(self): pass",
        "path": "see src/deep-folder/a.py:17",
        "address": "https://example.org/shelf?book=9#top and someone@example.com",
        "sign": "C++, <b>bold</b> &amp; O'Neil's \"quote\" [3.14] {x|y} ^~`$%\\",
        "word": "Übergröße 日本語 naïve straße",
        "number": "2024-11-22 0x1F 1e5 007",
    }
    asked = {
        "parse_graph": ["identifier"],
        "graph": ["identifier"],
        "PARSE": ["identifier"],
        "src/deep-folder/a.py": ["path"],
        "folder": ["path"],
        "17": ["path"],
        "shelf": ["address"],
        "someone@nowhere": ["address"],
        "Neil": ["sign"],
        "bold": ["sign"],
        "amp": ["sign"],
        "14": ["sign"],
        "übergröße": ["word"],
        "日本語": ["word"],
        "naive": [],
        "naïve": ["word"],
        "11": ["number"],
        "0x1F": ["number"],
        "007": ["number"],
        "7": [],
        "grap": [],
        "title": ["address", "identifier", "number", "path", "sign", "word"],
    }

    async def scenario(house: House) -> None:
        await house.write(*(new(doc_id, text) for doc_id, text in said.items()))
        ids = {one.id: one.doc_id for one in await house.store.get(house.books, [*said], RED)}
        found = {
            query: sorted(ids[row] for row, _ in await house.store.words([house.books.id], query, RED, 10))
            for query in asked
        }
        assert found == asked

    run(url, scenario)


ODD = [
    *["_", "'", '"', "''", "\\", "*", "-", "NOT", "NEAR(", "(a", "a:b", "!", "<->", "&|", "%", "^a", "a+", ":*"],
    *("a AND", "{a b}:c", "😀", "\u0301", "٣", "ǅ", "a\u200db", "ﬁ", "²", "\0", "\ud800"),
    *("", " ", "x" * 100_000, "x " * 100_000),
]


def test_no_question_is_an_error(url: str) -> None:
    async def scenario(house: House) -> None:
        await house.write(new("found", "zebra"), new("other", "nothing"))
        row = (await house.document("found")).id
        for query in (*ODD, " ".join(ODD[:-1])):
            assert await house.store.words([house.books.id], query, RED, 10) == []
            assert [one for one, _ in await house.store.words([house.books.id], f"zebra {query}", RED, 10)] == [row]

    run(url, scenario)


def test_the_best_fit_comes_first_and_a_title_counts_more(url: str) -> None:
    filler = "other things that are told at length " * 5

    async def scenario(house: House) -> None:
        await house.write(
            new("text", f"zebra {filler}"),
            new("title", filler, title="A zebra"),
            new("both", f"zebra and quagga {filler}", title="zebra quagga"),
            new("none", filler),
            *(new(f"more{n}", filler) for n in range(20)),
        )
        ids = {one.doc_id: one.id for one in await house.store.get(house.books, ["text", "title", "both"], RED)}
        found = await house.store.words([house.books.id], "zebra quagga", RED, 10)
        assert [row for row, _ in found] == [ids["both"], ids["title"], ids["text"]]
        scores = [score for _, score in found]
        assert scores == sorted(scores, reverse=True)
        assert await house.store.words([house.books.id], "zebra quagga", RED, 2) == found[:2]

    run(url, scenario)


def test_words_follow_what_documents_say_now_and_where_they_are(url: str) -> None:
    async def scenario(house: House) -> None:
        other, _ = await house.store.put_collection("red", "other", "model", 2)
        await house.write(new("a", "zebra", title="quagga"))
        [elsewhere] = await house.store.write(other, [new("a", "zebra")], now=NOW)
        row = (await house.document("a")).id

        async def found(word: str, *inside: Collection) -> set[int]:
            return {one for one, _ in await house.store.words([one.id for one in inside], word, RED, 10)}

        assert await found("zebra", house.books) == {row}
        assert await found("zebra", house.books, other) == {row, elsewhere.id}
        assert await found("zebra") == set()
        await house.write(new("a", "okapi", title="quagga"))
        assert await found("zebra", house.books, other) == {elsewhere.id}
        assert await found("okapi", house.books) == await found("quagga", house.books) == {row}
        await house.write(new("a", "okapi", title="tapir", payload={"n": 1}))
        assert await found("quagga", house.books) == set()
        assert await found("tapir", house.books) == {row}
        await house.write(new("a", "okapi", title="tapir", payload={"n": 2}))
        assert await found("okapi", house.books) == await found("tapir", house.books) == {row}
        await house.store.delete(house.books, ["a"], now=NOW)
        assert await found("okapi", house.books) == set()
        [again] = await house.write(new("a", "zebra again"))
        assert await found("again", house.books) == {again.id}

    run(url, scenario)


def test_texts_are_read_where_they_are_shown_and_as_far_as_rules_look_at_them(url: str) -> None:
    async def scenario(house: House) -> None:
        [row] = await house.write(new("a", "x" * 150_000, title="a title"))
        assert len((await house.document("a")).text) == 150_000
        for found in (
            *(await house.store.by_ids([row.id], EVERYTHING)).values(),
            *await house.store.listing(house.books, EVERYTHING, after=0, limit=10),
        ):
            assert (found.title, found.text) == ("a title", "")
        [written] = await house.store.unrelated(10)
        assert written.text == "x" * max(entities.MAX_CHARS, domains.MAX_CHARS)

    run(url, scenario)


def test_long_texts_are_found_by_their_beginning(url: str) -> None:
    many = " ".join(f"w{n:x}" for n in range(150_000))
    wide = " ".join(chr(0x20000 + n) for n in range(40_000)) + " " + "x" * 5_000

    async def scenario(house: House) -> None:
        await house.write(new("many", f"zebra {many} quagga"), new("wide", wide))
        assert len(await house.store.words([house.books.id], "zebra", RED, 5)) == 1
        assert await house.store.words([house.books.id], "quagga", RED, 5) == []
        assert len(await house.store.words([house.books.id], chr(0x20000 + 7), RED, 5)) == 1
        await house.write(new("many", "short"))
        await house.store.delete(house.books, ["wide"], now=NOW)
        for word in ("zebra", "w77", chr(0x20000 + 7)):
            assert await house.store.words([house.books.id], word, RED, 5) == []

    run(url, scenario)


def test_of_a_long_question_the_first_words_count(url: str) -> None:
    async def scenario(house: House) -> None:
        await house.write(new("a", "zebra quagga"))
        before = " ".join(f"x{n}" for n in range(QUERY_WORDS - 1))
        assert len(await house.store.words([house.books.id], f"{before} {'y' * (WORD_LENGTH + 1)} zebra", RED, 5)) == 1
        assert await house.store.words([house.books.id], f"{before} x quagga", RED, 5) == []
        assert len(await house.store.words([house.books.id], f"{before} x1 x1 quagga", RED, 5)) == 1

    run(url, scenario)


# --- versions --------------------------------------------------------------------------------------------------------


def test_whoever_has_seen_a_version_has_seen_all_before_it(url: str) -> None:
    """Several write at once while somebody follows; what was followed is what is there in the end."""
    chance = random.Random(11)

    async def scenario(house: House) -> None:
        others = [Database(url) for _ in range(2)] if house.database.postgres else []
        stores = [house.store, *(CollectionStore(other) for other in others)]
        done = asyncio.Event()
        seen: dict[int, int] = {}

        async def write(number: int) -> None:
            for step in range(12):
                ids = [f"{chance.randint(0, 30)}" for _ in range(chance.randint(1, 6))]
                store = stores[(number + step) % len(stores)]
                if step % 4 == 3:
                    await store.delete(house.books, ids, now=NOW)
                else:
                    await store.write(house.books, [new(doc_id) for doc_id in dict.fromkeys(ids)], now=NOW)

        async def follow() -> None:
            after = 0
            while True:
                ended = done.is_set()
                page = await house.store.changed_since(house.books.space, after, 3)
                versions = [one.version for one in page]
                assert versions == sorted(set(versions))
                for one in page:
                    seen[one.id] = after = one.version
                if ended and not page:
                    return

        following = asyncio.create_task(follow())
        await asyncio.gather(*map(write, range(6)))
        done.set()
        await following
        assert seen == {row["id"]: row["version"] for row in await house.table(documents)}
        for other in others:
            await other.close()

    run(url, scenario)


def test_a_write_that_fails_leaves_nothing_and_holds_up_nobody(url: str) -> None:
    async def scenario(house: House) -> None:
        await house.write(new("hidden", permissions=("k",)))
        before = {table.name: await house.table(table) for table in (documents, document_contents)}
        with pytest.raises(DocumentNotFound):
            await house.write(new("a"), new("hidden"), viewer=key("other"))
        assert {table.name: await house.table(table) for table in (documents, document_contents)} == before
        await house.put("a")

    run(url, scenario)


# --- what is stored --------------------------------------------------------------------------------------------------


def test_what_asks_all_the_time_reads_no_whole_table(tmp_path: Path) -> None:
    """By SQLite's own account of how it answers."""
    asked: list[tuple[str, Any]] = []

    async def scenario(house: House) -> None:
        event.listen(
            house.database.read.sync_engine,
            "before_cursor_execute",
            lambda _c, _x, statement, parameters, *_: asked.append((statement, parameters)),
        )
        store, space = house.store, house.books.space
        ids = await house.put("a", "b")
        await store.changed_since(space, 0, 10)
        await store.lists(space, 0, 10)
        await store.unrelated(10)
        await store.ungraphed(10, NOW)
        await store.orphans(["name:x"])
        await store.told(ids)
        await store.told_of(ids)
        await store.near_of(ids)
        await store.spaces()
        await store.counts()
        await store.failures(None, 10)
        await store.get(house.books, ["a"], key("k"))
        await store.by_ids(ids, key("k"))
        await store.listing(house.books, key("k"), after=0, limit=10)
        sight = Sight(house.database)
        await sight.inside(space, key("k"))
        await sight.entities(ids[0], key("k"))
        await sight.naming(ids, Scope([house.books.id], key("k")), 10)
        await store.words([house.books.id], "title", key("k"), 10)
        await store.sweep(NOW)
        questions = tuple(asked)
        assert len(questions) > 15
        plans = []
        async with house.database.read.connect() as connection:
            for statement, parameters in questions:
                plan = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                plans += [line.detail for line in plan]
        whole = re.compile(
            r"SCAN (documents|document_contents|mentions)\b(?! USING (COVERING INDEX|INDEX ix_documents_[ud]))"
        )
        assert [line for line in plans if whole.match(line)] == []
        assert "SEARCH documents USING INDEX ux_documents_collection_doc_id (collection=? AND doc_id=?)" in plans
        assert "SCAN document_words VIRTUAL TABLE INDEX 0:M2" in plans
        assert "SCAN documents USING INDEX ix_documents_deleted" in plans

    run(f"sqlite+aiosqlite:///{tmp_path}/jobs.sqlite", scenario)


def test_a_document_of_few_attempts_is_pending_until_the_graph_has_it(url: str) -> None:
    async def scenario(house: House) -> None:
        [row] = await house.put("a")

        async def status() -> str:
            return (await house.document("a")).status

        assert await status() == "pending"
        await house.relate()
        assert await status() == "pending"
        await house.graph(now=NOW + 3)
        assert await status() == "synced"
        assert (await house.document("a")).synced_at == NOW + 3
        await house.put("a")
        await house.relate()
        for _ in range(MAX_ATTEMPTS):
            assert await status() == "pending"
            await house.store.put_failed([row], "no", 0)
        assert await status() == "failed"

    run(url, scenario)
