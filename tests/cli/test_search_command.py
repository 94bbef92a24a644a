"""``memvid-export search``: several capsules, filters, files of queries, and what it says where something is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from processes import EXAMPLE, command
from provider_server import KEY, provider_server


def _graph(name: str) -> bytes:
    """Two classes of a method each, which calls the other's; one of them in a community."""
    nodes = []
    for kind in ("Reader", "Writer"):
        path = f"src/{name}/{kind.lower()}.py"
        for label, own in (("Class", f"{name}{kind}"), ("Method", f"run_{name}_{kind.lower()}")):
            properties = {"name": own, "filePath": path, "content": f"def {own}(): ..."}
            nodes.append({"id": f"{label}:{path}:{own}", "label": label, "properties": properties})
    nodes.append({"id": "comm_1", "label": "Community", "properties": {"name": "Reading"}})
    edges = [
        (nodes[0]["id"], nodes[1]["id"], "HAS_METHOD"),
        (nodes[2]["id"], nodes[3]["id"], "HAS_METHOD"),
        (nodes[1]["id"], nodes[3]["id"], "CALLS"),
        (nodes[0]["id"], "comm_1", "MEMBER_OF"),
    ]
    return json.dumps(
        {
            "projectName": name,
            "source": {"type": "folder", "baseName": name},
            "nodes": nodes,
            "relationships": [{"sourceId": a, "targetId": b, "type": kind} for a, b, kind in edges],
        }
    ).encode()


def _export(folder: Path, name: str, *arguments: str, env: Mapping[str, str] | None = None) -> Path:
    graph = folder / f"{name}.json"
    graph.write_bytes(_graph(name))
    done = command("export", graph, "--out", folder / name, "--json", *arguments, env=env)
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout)["capsule"]["path"])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capsule with vectors of the model that comes with the package."""
    return _export(tmp_path_factory.mktemp("one"), "one", "--semantic")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capsule without vectors."""
    return _export(tmp_path_factory.mktemp("two"), "two")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The capsule of this repository's own graph."""
    done = command("export", EXAMPLE, "--out", tmp_path_factory.mktemp("example"), "--json")
    return Path(json.loads(done.stdout)["capsule"]["path"])


def _hits(*arguments: object) -> list[dict[str, Any]]:
    done = command("search", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout)["hits"])


def _titles(*arguments: object) -> set[str]:
    return {hit["title"] for hit in _hits(*arguments)}


def _refused(*arguments: object) -> tuple[int, str]:
    done = command("search", *arguments)
    assert done.stdout == b""
    return done.returncode, done.stderr.decode()


def test_several_capsules_are_searched_together_and_each_hit_names_its_own(one: Path, two: Path) -> None:
    hits = _hits(one, "reader", "--also", two)
    assert {(hit["capsule"], hit["title"]) for hit in hits if hit["title"].startswith("Class")} >= {
        (str(one), "Class: oneReader"),
        (str(two), "Class: twoReader"),
    }
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert hits == _hits(one, "reader", "--also", two, "--also", one, "--also", two)
    shown = command("search", one, "reader", "--also", two).stdout.decode()
    assert str(one) in shown
    assert str(two) in shown


def test_a_single_capsule_is_not_named_in_its_hits(one: Path) -> None:
    assert all(set(hit) == {"id", "uri", "kind", "title", "score", "why"} for hit in _hits(one, "reader"))


def test_a_sidecar_whose_bytes_were_changed_answers_nothing(two: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(two.parent, tmp_path / "copy")) / two.name
    sidecar = next(copy.parent.glob("*.sqlite"))
    before = sidecar.read_bytes()
    sidecar.write_bytes(before.replace(b"twoReader", b"oddReader"))
    assert sidecar.read_bytes() != before
    assert _hits(copy, "reader") == _hits(two, "reader")


def test_filters_keep_what_they_name(one: Path, two: Path) -> None:
    assert _titles(one, "reader writer", "--label", "Class") == {"Class: oneReader", "Class: oneWriter"}
    both = _titles(one, "reader writer", "--label", "Class", "--label", "Method")
    assert both == {"Class: oneReader", "Class: oneWriter", "Method: run_one_reader", "Method: run_one_writer"}
    assert _titles(one, "one", "--file", "src/one/writer") == {"Class: oneWriter", "Method: run_one_writer"}
    assert _titles(one, "one", "--community", "comm_1") == {"Class: oneReader"}
    assert _titles(one, "one", "--type", "CALLS") == {"Method: run_one_reader", "Method: run_one_writer"}
    narrow = ("--label", "Class", "--type", "HAS_METHOD", "--file", "src/two/reader", "--also", two)
    assert _titles(one, "reader", *narrow) == {"Class: twoReader"}


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        (["--label", "Clas"], "--label: there is no 'Clas' here; there are Class, Community, Method"),
        (["--type", "calls"], "--type: there is no 'calls' here; there are CALLS, HAS_METHOD, MEMBER_OF"),
        (["--community", "comm_9"], "--community: there is no community 'comm_9' here"),
        (["--file", "nowhere/"], "--file: no path here begins with 'nowhere/'"),
        (["--label", "'; DROP TABLE nodes; --"], "--label: there is no"),
        (["--file", "%"], "--file: no path here begins with '%'"),
    ],
)
def test_a_filter_that_nothing_here_has_is_refused_with_what_there_is(one: Path, filters: list[str], said: str) -> None:
    status, error = _refused(one, "reader", *filters)
    assert status == 2
    assert said in error


def test_a_filter_is_known_if_one_of_the_capsules_has_it(one: Path, two: Path) -> None:
    found = _titles(one, "reader", "--also", two, "--file", "src/two/")
    assert "Class: twoReader" in found
    assert all("two" in title for title in found)


def test_search_by_meaning_wants_vectors_in_each_capsule(one: Path, two: Path) -> None:
    status, error = _refused(one, "reader", "--also", two, "--mode", "semantic")
    assert status == 2
    assert f"{two} holds no vectors" in error
    assert len(_hits(one, "something that reads", "--mode", "semantic")) > 0


def test_more_capsules_than_can_be_searched_together_are_refused(one: Path) -> None:
    status, error = _refused(one, "reader", *["--also", one] * 8)
    assert status == 2
    assert "--also" in error


def test_without_the_engine_for_questions_words_are_named_as_the_way_on(tmp_path: Path, one: Path) -> None:
    with provider_server("openai", dimension=3_072) as openai:
        env = {
            "OPENAI_API_KEY": KEY["openai"],
            "OPENAI_EMBED_BASE_URL": openai.url,
            "MEMVID_EMBEDDING_MODE": "external_api",
            "MEMVID_EMBED_PROVIDER": "openai",
        }
        paid = _export(tmp_path, "paid", "--semantic", env=env)
    # Its mode is not set; its manifest, which says who made the vectors, is gone; and nobody listens any more.
    alone = tmp_path / "alone.mv2"
    shutil.copy(paid, alone)
    cases: list[tuple[Path, dict[str, str]]] = [(paid, {}), (alone, {}), (paid, env)]
    for capsule, given in cases:
        done = command("search", one, "reader", "--also", capsule, env=given)
        assert done.returncode in (2, 3)
        assert "--mode lexical needs no engine" in done.stderr.decode()
        assert KEY["openai"] not in done.stderr.decode()
        words = command("search", one, "reader", "--also", capsule, "--mode", "lexical", "--json", env=given)
        assert {hit["title"] for hit in json.loads(words.stdout)["hits"]} >= {"Class: oneReader", "Class: paidReader"}


def _rankings(done: subprocess.CompletedProcess[bytes]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_queries_of_a_file_are_answered_under_the_same_filters(one: Path, two: Path, tmp_path: Path) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"query_id": 7, "text": "reader"}\n\n{"query_id": "b", "text": "run writer", "more": 1}')
    done = command("search", one, "--also", two, "--queries", queries, "--label", "Method", "--limit", "1")
    assert done.returncode == 0, done.stderr
    first, second = _rankings(done)
    assert (first["query_id"], second["query_id"]) == (7, "b")
    assert [len(answer["ranked"]) for answer in (first, second)] == [1, 1]
    assert second["ranked"][0].startswith("Method:")


@pytest.mark.parametrize(
    "line",
    [
        b'{"query_id": "x"}',
        b'{"query_id": true, "text": "x"}',
        b'{"query_id": "x", "text": 5}',
        b'{"query_id": "x", "text": "\xff"}',
        b'{"query_id": "x", "more": ' + b"[" * 100_000,
        b'{"query_id": "x", "text": "' + b"y" * (1 << 20) + b'"}',
    ],
)
def test_a_bad_line_is_named_after_the_lines_before_it_are_answered(one: Path, tmp_path: Path, line: bytes) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_bytes(b'{"query_id": "a", "text": "reader"}\n\n' + line + b'\n{"query_id": "c", "text": "x"}\n')
    done = command("search", one, "--queries", queries, "--mode", "lexical")
    assert done.returncode == 2
    assert [answer["query_id"] for answer in _rankings(done)] == ["a"]
    assert "queries.jsonl, line 3: " in done.stderr.decode()


def test_a_file_of_queries_is_answered_with_at_most_a_hundred_each(example: Path, tmp_path: Path) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"query_id": "a", "text": "test"}\n')
    (answer,) = _rankings(command("search", example, "--queries", queries, "--mode", "lexical"))
    assert len(set(answer["ranked"])) == len(answer["ranked"]) == 100
    status, error = _refused(example, "--queries", queries, "--limit", "101")
    assert (status, "--limit" in error) == (2, True)


@pytest.mark.parametrize("query", ['" OR * name:x', "\x1b[31mred'; DROP --", "x" * 50_000])
def test_hostile_questions_are_only_words(one: Path, query: str) -> None:
    done = command("search", one, "--", query)
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout
