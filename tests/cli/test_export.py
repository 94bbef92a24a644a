"""``export`` of every form of a graph, and reading the result back with the other commands."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
import zstandard
from processes import EXAMPLE, command
from provider_server import KEY, provider_server

SMALL = Path(__file__).parents[1] / "fixtures/graphs/accepted/plain.json"


@pytest.fixture(scope="module")
def capsule(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example graph as a capsule with vectors."""
    out = tmp_path_factory.mktemp("capsule")
    done = command("export", EXAMPLE, "--out", out, "--semantic", "--json")
    assert done.returncode == 0, done.stderr
    path: str = json.loads(done.stdout)["capsule"]["path"]
    return Path(path)


@pytest.fixture
def copy(capsule: Path, tmp_path: Path) -> Path:
    """The capsule and its companions in a folder of this test's own."""
    for path in capsule.parent.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path / capsule.name


def forms() -> dict[str, bytes]:
    lines = gzip.decompress(EXAMPLE.read_bytes())
    records = [json.loads(line) for line in lines.splitlines()]
    graph = {
        name: [record["data"] for record in records if record["type"] == kind]
        for name, kind in (("nodes", "node"), ("relationships", "relationship"))
    }
    raw = json.dumps(graph).encode()
    return {
        "graph.ndjson": lines,
        "graph.ndjson.gz": EXAMPLE.read_bytes(),
        "graph.json": raw,
        "graph.json.zst": zstandard.compress(raw),
        "edges.json": json.dumps({"nodes": graph["nodes"], "edges": graph["relationships"]}).encode(),
    }


def test_every_form_of_one_graph_gives_the_same_capsule_content(tmp_path: Path) -> None:
    digests, frames = set(), set()
    for name, content in forms().items():
        (tmp_path / name).write_bytes(content)
        done = command("export", tmp_path / name, "--out", tmp_path / "out" / name, "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        digests.add(report["capsule"]["contentDigest"])
        frames.add(report["capsule"]["frames"])
    piped = command("export", "-", "--out", tmp_path / "out" / "pipe", "--json", stdin=forms()["graph.json"])
    frames.add(json.loads(piped.stdout)["capsule"]["frames"])
    assert len(frames) == 1


def test_the_same_graph_at_the_same_time_gives_the_same_bytes(tmp_path: Path) -> None:
    hashes = set()
    for folder in ("a", "b"):
        env = {"SOURCE_DATE_EPOCH": "1700000000"}
        done = command("export", EXAMPLE, "--out", tmp_path / folder, "--semantic", "--json", env=env)
        report = json.loads(done.stdout)
        assert report["capsule"]["fileName"].endswith("-2023-11-14.mv2")
        hashes.add(report["capsule"]["sha256"])
    assert len(hashes) == 1


@pytest.mark.parametrize("seconds", ["²", "9" * 20, "-1"])
def test_a_time_that_is_none_ends_with_2_and_names_the_variable(seconds: str, tmp_path: Path) -> None:
    done = command("export", SMALL, "--out", tmp_path, env={"SOURCE_DATE_EPOCH": seconds})
    assert done.returncode == 2, done.stderr
    assert b"SOURCE_DATE_EPOCH must be" in done.stderr


def test_several_graphs_are_exported_one_after_the_other(tmp_path: Path) -> None:
    for name in ("one.ndjson.gz", "two.graph.ndjson.gz"):
        shutil.copy(EXAMPLE, tmp_path / name)
    done = command("export", tmp_path / "one.ndjson.gz", tmp_path / "two.graph.ndjson.gz", "--out", tmp_path, "--json")
    names = [json.loads(line)["capsule"]["fileName"] for line in done.stdout.splitlines()]
    assert [name.split("-gitnexus")[0] for name in names] == ["one", "two"]


def test_for_people_it_says_where_the_files_are_and_in_a_pipe_one_line_a_stage(tmp_path: Path) -> None:
    done = command("export", EXAMPLE, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode()
    for path in tmp_path.iterdir():
        assert str(path) in said
    assert "100%" in done.stderr.decode()
    assert b"\x1b" not in done.stderr + done.stdout


def test_search_finds_a_function_by_its_name_by_words_and_by_meaning(capsule: Path) -> None:
    for mode, query in (("lexical", "capsule_sha256"), ("hybrid", "capsule sha256"), ("semantic", "hash of a capsule")):
        done = command("search", capsule, query, "--mode", mode, "--json")
        answer = json.loads(done.stdout)
        assert (answer["query"], answer["mode"]) == (query, mode)
        assert set(answer["hits"][0]) == {"id", "uri", "kind", "title", "score", "why"}
        if mode != "semantic":
            assert answer["hits"][0]["id"].endswith(":capsule_sha256")


def test_search_of_a_file_of_queries_prints_a_ranking_for_each(capsule: Path, tmp_path: Path) -> None:
    queries = tmp_path / "queries.jsonl"
    nowhere = "zq" * 9
    queries.write_text(f'{{"query_id": "q1", "text": "capsule sha256"}}\n\n{{"query_id": "q2", "text": "{nowhere}"}}\n')
    done = command("search", capsule, "--queries", queries, "--json", "--mode", "lexical")
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["query_id"], second["query_id"]) == ("q1", "q2")
    assert 0 < len(first["ranked"]) <= 100
    assert second["ranked"] == []


def test_search_works_from_the_capsule_alone(copy: Path, capsule: Path) -> None:
    for path in copy.parent.glob("*.mv2.*"):
        path.unlink()
    alone = command("search", copy, "capsule_sha256", "--json")
    whole = command("search", capsule, "capsule_sha256", "--json")
    assert json.loads(alone.stdout) == json.loads(whole.stdout)


def test_semantic_search_without_vectors_is_a_usage_error(tmp_path: Path) -> None:
    command("export", EXAMPLE, "--out", tmp_path)
    done = command("search", next(tmp_path.glob("*.mv2")), "x", "--mode", "semantic")
    assert done.returncode == 2
    assert b"no vectors" in done.stderr


def test_a_question_to_vectors_of_a_paid_provider_leaves_this_machine_only_in_the_mode_for_it(tmp_path: Path) -> None:
    with provider_server("openai", dimension=3_072) as openai:
        keys = {
            "OPENAI_API_KEY": KEY["openai"],
            "OPENAI_EMBED_BASE_URL": openai.url,
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }
        outside = {**keys, "MEMVID_EMBEDDING_MODE": "external_api", "MEMVID_EMBED_PROVIDER": "openai"}
        made = command("export", SMALL, "--out", tmp_path, "--semantic", "--json", env=outside)
        assert made.returncode == 0, made.stderr
        asked = len(openai.seen)

        refused = command("search", json.loads(made.stdout)["capsule"]["path"], "a secret", env=keys)
        assert refused.returncode == 2
        assert b"MEMVID_EMBEDDING_MODE must be external_api" in refused.stderr
        assert b"--mode lexical" in refused.stderr
        assert KEY["openai"].encode() not in refused.stderr
        assert len(openai.seen) == asked

        done = command("search", json.loads(made.stdout)["capsule"]["path"], "a secret", env=outside)
        assert done.returncode == 0, done.stderr
        assert len(openai.seen) == asked + 1


def test_a_profile_without_vectors_says_that_none_are_made(tmp_path: Path) -> None:
    done = command("export", SMALL, "--out", tmp_path, "--profile", "speed")
    assert done.returncode == 0
    assert b"no vectors are made without --semantic" in done.stderr


def test_inspect_counts_what_is_inside(capsule: Path) -> None:
    found = json.loads(command("inspect", capsule, "--json").stdout)
    assert found["frames"] == sum(part["frames"] for part in found["parts"])
    assert found["vectors"] > 0
    assert found["manifest"]["nodeLabels"]["File"] > 10
    assert b"Function" in command("inspect", capsule).stdout


def test_verify_passes_a_capsule_as_it_was_published(capsule: Path) -> None:
    done = command("verify", capsule, "--json")
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["ok"] is True
    assert command("verify", capsule).stdout.count(b"ok ") >= 4


@pytest.mark.parametrize("suffix", ["", ".index.v1.sqlite"])
def test_verify_fails_on_one_flipped_byte_anywhere(copy: Path, suffix: str) -> None:
    path = copy.with_name(copy.name + suffix)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x20
    path.write_bytes(content)
    done = command("verify", copy)
    assert done.returncode in (2, 3)
    assert b"Traceback" not in done.stderr


def test_a_file_that_is_no_capsule_is_refused_by_every_reader(tmp_path: Path) -> None:
    wrong = tmp_path / "letter.mv2"
    wrong.write_bytes(b"dear reader" * 1000)
    for arguments in (["inspect", wrong], ["verify", wrong], ["search", wrong, "x"], ["inspect", tmp_path / "no.mv2"]):
        done = command(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert b"Traceback" not in done.stderr


def test_names_in_a_graph_send_no_escape_sequences_to_the_terminal(tmp_path: Path) -> None:
    evil = "red \u001b[31m text\u0007"
    graph = {
        "nodes": [{"id": f"Function:a:{n}", "label": "Function", "properties": {"name": evil}} for n in range(2)],
        "relationships": [
            {"id": "r", "sourceId": "Function:a:0", "targetId": "Function:a:1", "type": "CALLS", "confidence": 1}
        ],
    }
    command("export", "-", "--out", tmp_path, stdin=json.dumps(graph).encode())
    done = command("search", next(tmp_path.glob("*.mv2")), "red")
    assert b"text" in done.stdout
    assert b"\x1b" not in done.stdout
