"""What is wrong with a request to a collection is named with its place, and changes nothing."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from nexus.shelf import Person, Shelf, shelf
from provider_server import KEY, ProviderServer, provider_server

from common.embedding.port import Embedded, Embedder
from common.embedding.static import StaticEmbedder
from common.errors import EmbeddingFailed, ExportError, InvalidRequest
from control_plane.nexus.incoming import MAX_BATCH, MAX_PAYLOAD, MAX_TEXT
from control_plane.nexus.records import MAX_COLLECTIONS
from control_plane.nexus.service import BODY_SECONDS, MAX_ASKED, MAX_BODY, QUESTIONS, SEARCH_SECONDS

BIG = 10**400


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    with shelf(tmp_path_factory.mktemp("shelf"), writes=1) as found:
        yield found


@pytest.fixture(scope="module")
def red(there: Shelf) -> Person:
    """Who has a collection with one document."""
    person = there.as_("red")
    person.make("books", 2)
    person.write("books", [{"id": "a", "vector": [1, 0], "text": "kept"}])
    return person


def _nested(depth: int) -> dict[str, Any]:
    inner: Any = 1
    for _ in range(depth - 1):
        inner = [inner]
    return {"a": inner}


WRONG_DOCUMENTS: list[tuple[dict[str, Any] | str, str, str]] = [
    ({}, "text", "where there is no vector"),
    ({"text": " \n\t"}, "text", "where there is no vector"),
    ({"text": "x", "vector": None}, "vector", "must be given"),
    ({"vector": [1]}, "vector", "2 numbers; it has 1"),
    ({"vector": []}, "vector", "2 numbers; it has 0"),
    ({"vector": [1, 2, 3]}, "vector", "must have 2 numbers"),
    ({"vector": [0, 0.0]}, "vector", "no direction"),
    ({"vector": [1, "a"]}, "vector[1]", "Expected `float`, got `str`"),
    ({"vector": [1, None]}, "vector[1]", "null"),
    ({"vector": [1, True]}, "vector[1]", "bool"),
    ({"vector": [1, [2]]}, "vector[1]", "array"),
    ({"vector": {"0": 1}}, "vector", "Expected `array`"),
    ({"vector": "1,2"}, "vector", "Expected `array`"),
    ('{"vector": [1, 1e999]}', "vector[1]", "out of range"),
    (f'{{"vector": [1, {BIG}]}}', "vector[1]", "out of range"),
    ('{"vector": [1, NaN]}', "$", "no JSON"),
    ({"vector": [1, 0], "title": 7}, "title", "Expected `str`"),
    ({"vector": [1, 0], "title": "x" * 1_001}, "title", "1,000 characters"),
    ({"vector": [1, 0], "title": "\0"}, "title", "NUL"),
    ({"vector": [1, 0], "text": "x" * (MAX_TEXT + 1)}, "text", "1,000,000 characters"),
    ({"vector": [1, 0], "text": "a\0b"}, "text", "NUL"),
    ('{"vector": [1, 0], "text": "\\ud800 alone"}', "$", "no JSON"),
    ({"vector": [1, 0], "docType": "a b"}, "docType", "64 letters"),
    ({"vector": [1, 0], "docType": "x" * 65}, "docType", "64 letters"),
    ({"vector": [1, 0], "docType": "a\n"}, "docType", "64 letters"),
    ({"vector": [1, 0], "permissions": ["k"] * 65}, "permissions", "64 names"),
    ({"vector": [1, 0], "permissions": ["ok", "not ok"]}, "permissions[1]", "name of a key"),
    ({"vector": [1, 0], "permissions": [""]}, "permissions[0]", "name of a key"),
    ({"vector": [1, 0], "permissions": [1]}, "permissions[0]", "Expected `str`"),
    ({"vector": [1, 0], "permissions": "red"}, "permissions", "Expected `array`"),
    ({"vector": [1, 0], "payload": []}, "payload", "Expected `object`"),
    ({"vector": [1, 0], "payload": {"a": "x" * MAX_PAYLOAD}}, "payload", "65,536 bytes"),
    ({"vector": [1, 0], "payload": {"a": [1e21] * 13_000}}, "payload", "65,536 bytes"),
    ('{"vector": [1, 0], "payload": {"a": [' + "1e5," * 14_000 + "1]}}", "payload", "65,536 bytes"),
    ({"vector": [1, 0], "payload": _nested(33)}, "payload", "32 objects and lists deep"),
    ('{"vector": [1, 0], "payload": {"a": ' + "[" * 5_000 + "]" * 5_000 + "}}", "$", "too deep"),
    ('{"vector": [1, 0], "payload": {"a": 1e999}}', "payload", "out of range"),
    ({"vector": [1, 0], "payload": {"graph": {}}}, "payload.graph", "for what graphs tell"),
    ({"vector": [1, 0], "doc_type": "x"}, "$", "unknown field `doc_type`"),
    ({"vector": [1, 0], "id": "b"}, "$", "unknown field `id`"),
]


@pytest.mark.parametrize(("given", "field", "said"), WRONG_DOCUMENTS, ids=range(len(WRONG_DOCUMENTS)))
def test_a_wrong_document_is_refused_at_its_place(
    red: Person, given: dict[str, Any] | str, field: str, said: str
) -> None:
    text = given if isinstance(given, str) else json.dumps(given)
    error = red.refused("PUT", "/books/documents/b", 400, content=text)
    assert (error["code"], error["details"]["field"]) == ("INVALID_EXPORT_REQUEST", field)
    assert said in error["message"]
    assert "allowed" not in error["details"] or error["details"]["allowed"]
    if "`id`" in said:
        return
    inside = '{"id": "b", ' + text.removeprefix("{") if text != "{}" else '{"id": "b"}'
    fine = '{"id": "fine", "vector": [1, 1]}'
    error = red.refused("POST", "/books/documents", 400, content=f'{{"documents": [{fine}, {inside}]}}')
    place = "documents[1]" if field == "$" and "unknown" in said else f"documents[1].{field}" if field != "$" else "$"
    assert error["details"]["field"] == place
    assert said in error["message"]
    assert red.listed("books") == ["a"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "$"),
        ([], "$"),
        ({"documents": {}}, "documents"),
        ({"documents": []}, "documents"),
        ({"documents": [{"vector": [1, 0]}]}, "documents[0]"),
        ({"documents": [{"id": "b", "vector": [1, 0]}, 7]}, "documents[1]"),
        ({"documents": [{"id": "b", "vector": [1, 0]}, {"id": "b", "vector": [1, 0]}]}, "documents[1].id"),
        ({"documents": [{"id": f"{n}", "vector": [1, 0]} for n in range(MAX_BATCH + 1)]}, "documents"),
        *(
            ({"documents": [{"id": doc_id, "vector": [1, 0]}]}, "documents[0].id")
            for doc_id in ("", "x" * 257, "a\nb", "a\x00", "a\u2028b", "a\u200bb", "..", "./", "/")
        ),
    ],
    ids=str,
)
def test_a_wrong_batch_is_refused_at_its_place(red: Person, body: Any, field: str) -> None:
    error = red.refused("POST", "/books/documents", 400, json=body)
    assert (error["code"], error["details"]["field"]) == ("INVALID_EXPORT_REQUEST", field)
    assert red.listed("books") == ["a"]


@pytest.mark.parametrize("path", ["a%00b", "a%0Ab", "x" * 257, "a%FF", "%E2%80%A8"])
def test_what_is_no_id_is_refused_in_the_path(red: Person, path: str) -> None:
    for method, body in (("PUT", {"vector": [1, 0]}),):
        error = red.refused(method, f"/books/documents/{path}", 400, json=body)
        assert error["details"]["field"] == "id"
    for method in ("GET", "DELETE"):
        answer = red.http.request(method, f"/v1/collections/books/documents/{path}")
        assert answer.status_code in (400, 404)
    assert red.listed("books") == ["a"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"dimension": 0}, "dimension"),
        ({"dimension": 8_193}, "dimension"),
        ({"dimension": 2.5}, "dimension"),
        ({"dimension": "2"}, "dimension"),
        ({"dimension": 10**30}, "dimension"),
        ({"model": "x"}, "model"),
        ({"dimension": 2, "model": ""}, "model"),
        ({"dimension": 2, "model": "a b"}, "model"),
        ({"dimension": 2, "model": "x" * 129}, "model"),
        ({"dimensions": 2}, "$"),
        ([], "$"),
    ],
    ids=str,
)
def test_wrong_settings_make_no_collection(red: Person, body: Any, field: str) -> None:
    error = red.refused("PUT", "/new", 400, json=body)
    assert (error["code"], error["details"]["field"]) == ("INVALID_EXPORT_REQUEST", field)
    assert [one["name"] for one in red.ask("GET", "")["collections"]] == ["books"]


@pytest.mark.parametrize("name", ["a b", "ü", "x" * 129, "...", "a%2Fb", "*", "a%00"])
def test_wrong_names_make_no_collection(red: Person, name: str) -> None:
    answer = red.http.put(f"/v1/collections/{name}", json={"dimension": 2})
    assert answer.status_code in (400, 404)
    if answer.status_code == 400:
        assert answer.json()["error"]["details"]["field"] == "collection"
    assert red.http.get(f"/v1/collections/{name}").status_code == 404
    assert [one["name"] for one in red.ask("GET", "")["collections"]] == ["books"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "query"),
        ({"query": None}, "query"),
        ({"query": ""}, "query"),
        ({"query": " \n"}, "query"),
        ({"vector": [1, 0], "mode": "lexical"}, "query"),
        ({"query": "x" * 2_001}, "query"),
        ({"query": 7}, "query"),
        ({"vector": [1]}, "vector"),
        ({"vector": [0, 0]}, "vector"),
        ({"query": "x", "vector": [1, "0"]}, "vector[1]"),
        ({"query": "x", "mode": "semantic"}, "mode"),
        ({"query": "x", "limit": 0}, "limit"),
        ({"query": "x", "limit": 101}, "limit"),
        ({"query": "x", "limit": 2.5}, "limit"),
        ({"query": "x", "threshold": 1.01}, "threshold"),
        ({"query": "x", "threshold": -1.01}, "threshold"),
        ({"query": "x", "docType": "a b"}, "docType"),
        ({"query": "x", "domains": "legal"}, "domains"),
        ({"query": "x", "domains": [1]}, "domains[0]"),
        ({"query": "x", "domains": ["legal", ""]}, "domains[1]"),
        ({"query": "x", "domains": ["x" * 65]}, "domains[0]"),
        ({"query": "x", "domains": ["a\0"]}, "domains[0]"),
        ({"query": "x", "domains": ["legal"] * 65}, "domains"),
        ({"query": "x", "perDomain": 0}, "perDomain"),
        ({"query": "x", "perDomain": 6, "limit": 5}, "perDomain"),
        ({"query": "x", "perDomain": "2"}, "perDomain"),
        ({"query": "x", "collections": [f"c{n}" for n in range(65)]}, "collections"),
        ({"query": "x", "collections": "*"}, "collections"),
        ({"query": "x", "collections": [None]}, "collections[0]"),
        ({"query": "x", "permissions": ["red"]}, "$"),
    ],
    ids=str,
)
def test_a_wrong_question_is_refused_at_its_place(red: Person, body: Any, field: str) -> None:
    error = red.refused("POST", "/books/search", 400, json=body)
    assert (error["code"], error["details"]["field"]) == ("INVALID_EXPORT_REQUEST", field)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "$"),
        ({"ids": []}, "ids"),
        ({"ids": ["a", ""]}, "ids[1]"),
        ({"ids": ["a"] * 1_001}, "ids"),
        ({"ids": [1]}, "ids[0]"),
    ],
    ids=["none", "empty", "no id", "many", "number"],
)
def test_a_wrong_deletion_deletes_nothing(red: Person, body: Any, field: str) -> None:
    error = red.refused("POST", "/books/deletions", 400, json=body)
    assert (error["code"], error["details"]["field"]) == ("INVALID_EXPORT_REQUEST", field)
    assert red.listed("books") == ["a"]


def test_cursors_are_those_of_the_same_list(red: Person) -> None:
    red.make("two", 2)
    red.write("two", [{"id": f"{n}", "vector": [1, 0]} for n in range(3)])
    of_two = red.ask("GET", "/two/documents", params={"limit": 1})["nextCursor"]
    of_all = red.ask("GET", "", params={"limit": 1})["nextCursor"]
    assert [one["id"] for one in red.ask("GET", "/two/documents", params={"cursor": of_two})["documents"]] == ["1", "2"]
    for path, cursor in (
        ("/books/documents", of_two),
        ("/two/documents", of_all),
        ("/two/documents", "x"),
        ("", of_two),
    ):
        error = red.refused("GET", path, 400, params={"cursor": cursor})
        assert (error["code"], error["details"]["field"]) == ("INVALID_EXPORT_REQUEST", "cursor")
    red.ask("DELETE", "/two", 204)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/new"),
        ("PUT", "/books/documents/a"),
        ("POST", "/books/documents"),
        ("POST", "/books/deletions"),
        ("POST", "/books/search"),
    ],
)
def test_a_body_is_json_of_a_bounded_size(red: Person, method: str, path: str) -> None:
    other = red.refused(method, path, 415, content=b"{}", headers={"content-type": "text/plain"})
    assert (other["code"], other["details"]["allowed"]) == ("UNSUPPORTED_MEDIA_TYPE", ["application/json"])
    for broken in (b"{", b"\xff", b'{"a": "\xff"}', b"{} {}", b"[" * 100_000):
        error = red.refused(
            method, path, 400, content=broken, headers={"content-type": "application/json; charset=utf-8"}
        )
        assert (error["code"], error["details"]["field"]) == ("INVALID_EXPORT_REQUEST", "$")
    most = MAX_BODY if "documents" in path else MAX_ASKED
    large = red.refused(method, path, 413, content=b" " * (most + 1))
    assert (large["code"], large["details"]["limit"]) == ("PAYLOAD_TOO_LARGE", most)
    assert red.listed("books") == ["a"]


def test_the_largest_document_and_batch_are_taken(red: Person) -> None:
    red.make("large", 8_192)
    vector = [n + 0.123456789 for n in range(8_192)]
    largest = {
        "vector": vector,
        "text": "🙂" * MAX_TEXT,
        "title": "🙂" * 1_000,
        "payload": {"a": "x" * (MAX_PAYLOAD - len('{"a":""}'))},
        "permissions": [f"{n:064}" for n in range(63)] + ["red"],
        "docType": "x" * 64,
    }
    red.ask("PUT", f"/large/documents/{'y' * 256}", 201, json=largest)
    assert red.document("large", "y" * 256)["payload"] == largest["payload"]
    assert red.write("large", [{"id": "deep", "vector": vector, "payload": _nested(32)}])[0]["created"]
    assert red.document("large", "deep")["payload"] == _nested(32)
    red.ask("DELETE", "/large", 204)


@pytest.mark.parametrize("scale", [5e-324, 1e-200, 1e300])
def test_a_vector_of_any_length_has_a_direction(red: Person, scale: float) -> None:
    red.make("scaled", 2)
    red.write("scaled", [{"id": "a", "vector": [scale, 0]}, {"id": "b", "vector": [scale, -scale]}])
    assert red.document("scaled", "a", vector=True)["vector"] == [1.0, 0.0]
    assert red.document("scaled", "b", vector=True)["vector"] == pytest.approx([0.5**0.5, -(0.5**0.5)])
    red.ask("DELETE", "/scaled", 204)


# --- bodies that do not come, and too many of them --------------------------------------------------------------------


@contextmanager
def _begun(there: Shelf, red: Person, path: str, length: int = 100) -> Iterator[socket.socket]:
    """A request whose body is announced, and not sent."""
    host, port = there.url.removeprefix("http://").split(":")
    head = [f"PUT /v1/collections{path} HTTP/1.1", "Host: here", f"Authorization: {red.http.headers['authorization']}"]
    lines = [*head, f"Content-Length: {length}", "Expect: 100-continue", "", ""]
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall("\r\n".join(lines).encode())
        assert connection.recv(4_096).startswith(b"HTTP/1.1 100")  # the server reads the body
        yield connection


def _answer(connection: socket.socket) -> str:
    found = b""
    while chunk := connection.recv(4_096):
        found += chunk
        if b"}}" in found:
            break
    return found.decode()


def test_a_body_that_does_not_come_is_given_up(there: Shelf, red: Person) -> None:
    for path in ("/books/documents/slow", "/slow"):
        with _begun(there, red, path) as connection:
            there.put_on(BODY_SECONDS + 1)
            answer = _answer(connection)
        assert answer.startswith("HTTP/1.1 400")
        assert f"{BODY_SECONDS:.0f} seconds" in answer
    assert red.listed("books") == ["a"]


def test_a_body_that_is_cut_off_writes_nothing_and_holds_no_place(there: Shelf, red: Person) -> None:
    whole = b'{"vector": [1, 0]}'
    with _begun(there, red, "/books/documents/cut", len(whole) + 1) as connection:
        connection.sendall(whole)
    again = {"vector": [1, 0], "text": "kept"}
    answers = (red.http.put("/v1/collections/books/documents/a", json=again).status_code for _ in range(2_000))
    assert next(status for status in answers if status != 429) == 200  # once the server knows that nobody is there
    assert red.listed("books") == ["a"]


def test_more_writers_than_there_are_places_for_are_told_to_come_again(there: Shelf, red: Person) -> None:
    with _begun(there, red, "/books/documents/slow", 2) as connection:
        answer = red.http.put("/v1/collections/books/documents/b", json={"vector": [1, 0]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "RATE_LIMITED")
        assert int(answer.headers["retry-after"]) >= 1
        assert red.found("books", query="kept") == ["a"]  # who reads is not in the way
        connection.sendall(b"{}")
        assert "INVALID_EXPORT_REQUEST" in _answer(connection)
    red.ask("PUT", "/books/documents/a", json={"vector": [1, 0], "text": "kept"})


# --- engines that are away --------------------------------------------------------------------------------------------


@pytest.fixture
def provider() -> Iterator[ProviderServer]:
    with provider_server("openai", dimension=3_072) as found:
        yield found


def test_an_engine_that_is_away_refuses_texts_and_leaves_words(tmp_path: Path, provider: ProviderServer) -> None:
    env = {
        "MEMVID_EMBEDDING_MODE": "external_api",
        "MEMVID_EMBED_PROVIDER": "openai",
        "OPENAI_API_KEY": KEY["openai"],
        "OPENAI_EMBED_BASE_URL": provider.url,
    }
    with shelf(tmp_path, **env) as there:
        red = there.as_("red")
        made = red.ask("PUT", "/texts", 201)
        assert made["model"].startswith("openai/")
        red.write("texts", [{"id": "a", "text": "unicorn"}])
        assert red.found("texts", query="unicorn", mode="vector") == ["a"]
        asked = len(provider.seen)
        provider.always("expired key")
        for path, body in (
            ("/texts/documents", {"documents": [{"id": "b", "text": "another unicorn"}]}),
            ("/texts/search", {"query": "unicorn", "mode": "vector"}),
        ):
            answer = red.http.post(f"/v1/collections{path}", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "SEMANTIC_UNAVAILABLE")
            assert int(answer.headers["retry-after"]) >= 1
        hybrid = red.search("texts", query="unicorn")
        assert ([hit["id"] for hit in hybrid["hits"]], hybrid["warnings"]) == (["a"], ["SEMANTIC_UNAVAILABLE"])
        assert red.listed("texts") == ["a"]
        assert len(provider.seen) > asked
        asked = len(provider.seen)
        assert red.found("texts", query="unicorn", mode="lexical") == ["a"]
        assert len(provider.seen) == asked
        provider.always("slow")  # which it would be for hours
        assert red.search("texts", query="unicorn") == hybrid


def test_without_an_engine_documents_bring_vectors_along(tmp_path: Path) -> None:
    def engine() -> Embedder:
        raise error

    with shelf(tmp_path, engine=engine) as there:
        red = there.as_("red")
        error: ExportError = InvalidRequest("embedding_provider must be another", field="embedding_provider")
        refused = red.refused("PUT", "/texts", 400)
        assert refused["details"]["field"] == "dimension"
        assert error.message in refused["message"]
        red.make("books", 2)
        red.write("books", [{"id": "a", "vector": [1, 0], "text": "unicorn"}])
        wrong = red.refused("PUT", "/books/documents/b", 400, json={"text": "unicorn"})
        assert (wrong["details"]["field"], error.message in wrong["message"]) == ("vector", True)
        asked = red.refused("POST", "/books/search", 400, json={"query": "unicorn", "mode": "vector"})
        assert (asked["details"]["field"], error.message in asked["message"]) == ("vector", True)
        hybrid = red.search("books", query="unicorn")
        assert ([hit["id"] for hit in hybrid["hits"]], hybrid["warnings"]) == (["a"], ["SEMANTIC_MODEL_MISSING"])
        error = EmbeddingFailed("it does not start")
        for path, body in (("/texts", {}), ("/books/documents/b", {"text": "unicorn"})):
            assert red.refused("PUT", path, 503, json=body)["code"] == "SEMANTIC_UNAVAILABLE"
        assert red.listed("books") == ["a"]


class Waiting(StaticEmbedder):
    """Answers once it is told to."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.go_on = threading.Event()

    def embed(self, texts: Sequence[str], **more: Any) -> Embedded:
        """See the port."""
        self.asked.release()
        assert self.go_on.wait(60)
        return super().embed(texts, **more)


def test_a_question_that_does_not_get_its_turn_is_given_up(tmp_path: Path) -> None:
    engine = Waiting()
    with shelf(tmp_path, engine=lambda: engine) as there, ThreadPoolExecutor(QUESTIONS + 1) as pool:
        red = there.as_("red")
        red.ask("PUT", "/texts", 201)

        def ask() -> tuple[int, str]:
            answer = red.http.post("/v1/collections/texts/search", json={"query": "unicorn"})
            return answer.status_code, answer.json().get("error", {}).get("code")

        asked = [pool.submit(ask) for _ in range(QUESTIONS + 1)]
        for _ in range(QUESTIONS):
            assert engine.asked.acquire(timeout=30)
        while not any(one.done() for one in asked):  # the one that no thread is left for
            there.put_on(SEARCH_SECONDS)
            wait(asked, 0.1, FIRST_COMPLETED)
        assert [one.result() for one in asked if one.done()] == [(503, "TIMEOUT")]
        engine.go_on.set()
        assert {one.result() for one in asked} == {(503, "TIMEOUT")}  # late is late
        assert red.search("texts", query="unicorn")["warnings"] == []


def test_a_client_has_so_many_collections_and_all_are_searched(tmp_path: Path) -> None:
    with shelf(tmp_path) as there:
        red = there.as_("red")
        red.make("books", 2, model="same")
        red.write("books", [{"id": "a", "vector": [1, 0]}])
        with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as database, database:
            database.executemany(
                "INSERT INTO collections (client, name, space, model, dimension, created_at, deleted)"
                " SELECT client, name || ?, space, model, dimension, created_at, deleted FROM collections"
                " WHERE name = 'books'",
                [(n,) for n in range(MAX_COLLECTIONS - 1)],
            )
        asked = {"vector": [1, 0], "collections": ["*"]}
        assert red.found("books", **asked) == ["a"]
        error = red.refused("PUT", "/one-more", 400, json={"dimension": 2})
        assert (error["details"]["field"], error["details"]["allowed"]) == ("collection", MAX_COLLECTIONS)
        # Neither what is there nor another client is refused; of the last one by name everything is told.
        red.ask("PUT", "/books", json={"dimension": 2, "model": "same"})
        there.as_("blue").make("one-more", 2)
        red.ask("DELETE", "/books7", 204)
        red.make("one-more", 2, model="same")
        red.write("one-more", [{"id": "b", "vector": [1, 0.1]}])
        assert red.found("books", **asked) == ["a", "b"]
