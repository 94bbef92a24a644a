"""Which files the read tools open: those under the export root, each with an index that belongs to it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from mcp_server import GRAPHS, Exports

from common.capsule.gate import Gate
from common.capsule.reader import CapsuleReader
from common.embedding.choice import Choice, Engines
from common.embedding.engine import OpenEngines
from common.embedding.port import Embedder
from common.embedding.static import StaticEmbedder
from common.graph.read import read_graph
from common.pipeline import export
from common.sidecar.open import Sidecar
from common.storage import FileStorage
from control_plane.operations.keys import EVERYBODY
from control_plane.reading.artifacts import Artifacts
from control_plane.reading.library import CONNECTIONS, Library
from control_plane.reading.places import ExportPlaces
from control_plane.reading.reader import Reader


@pytest.fixture
def root(capsules: dict[str, Path], tmp_path: Path) -> Path:
    """An export root with a copy of the example's capsule, which has its sidecar."""
    folder = tmp_path / "root"
    folder.mkdir()
    shutil.copy(capsules[GRAPHS[0]], folder / "copy.mv2")
    shutil.copy(f"{capsules[GRAPHS[0]]}.index.v1.sqlite", folder / "copy.mv2.index.v1.sqlite")
    return folder


@pytest.fixture
def reader(root: Path, tmp_path: Path) -> Iterator[Reader]:
    """The tools over the root; two capsules are kept open."""
    with closing(OpenEngines(Engines())) as engines:
        artifacts = Artifacts(FileStorage([]), tmp_path / "copies", 1)
        library = Library(artifacts, engines.get, capacity=2)
        yield Reader(ExportPlaces(Exports(), root, external=False, note=[].append), library, budget=65_536)
        library.close()
        artifacts.close()


async def ask(reader: Reader, tool: str, path: str, **arguments: Any) -> dict[str, Any]:
    """The envelope, or the error."""
    body, _ = await reader.ask(tool, {**arguments, "locator": {"capsulePath": path}}, EVERYBODY)
    answer: dict[str, Any] = json.loads(body)
    return answer


async def patiently(reader: Reader, tool: str, path: str, **arguments: Any) -> dict[str, Any]:
    """The envelope, after the index that a question may have to wait for."""
    for _ in range(100):
        answer = await ask(reader, tool, path, **arguments)
        if answer.get("code") not in ("INDEX_BUILD_IN_PROGRESS", "TIMEOUT"):
            break
    return answer


@pytest.mark.parametrize("harm", ["missing", "damaged", "damaged in the middle"])
def test_many_who_ask_at_once_all_get_the_answer_of_one_new_index(reader: Reader, root: Path, harm: str) -> None:
    sidecar = root / "copy.mv2.index.v1.sqlite"
    with closing(Sidecar.open(sidecar)) as opened:
        before = opened.content_digest()
    if harm == "missing":
        sidecar.unlink()
    elif harm == "damaged":
        sidecar.write_bytes(b"no index")
    else:
        content = sidecar.read_bytes()
        sidecar.write_bytes(content[:8192] + bytes(len(content) - 8192))

    async def check() -> None:
        asked = [("symbol_lookup", {"query": "ProgressReporter"}), ("community_list", {}), ("process_list", {})]
        questions = [patiently(reader, tool, "copy.mv2", **given) for tool, given in asked * 8]
        answers = await asyncio.gather(*questions)
        assert all(answer["result"]["items"] for answer in answers)

    asyncio.run(check())
    with closing(Sidecar.open(sidecar)) as opened:
        assert opened.content_digest() == before


HARMS = {
    "a letter that is no UTF-8": "UPDATE nodes SET name = CAST(x'fffe' AS TEXT)",
    "a table that is gone": "DROP TABLE words",
    "postings cut off": "UPDATE words SET postings = substr(postings, 1, length(postings) - 1)",
    "postings of nodes that are not there": "UPDATE words SET postings = x'ffffff'",
    "a filter's positions cut off": "UPDATE labels SET nodes = substr(nodes, 1, length(nodes) - 1)",
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_sidecar_with_damage_that_only_a_question_finds_is_built_anew(reader: Reader, root: Path, harm: str) -> None:
    sidecar = root / "copy.mv2.index.v1.sqlite"
    with closing(Sidecar.open(sidecar)) as opened:
        before = opened.content_digest()
    with closing(sqlite3.connect(sidecar)) as db:
        db.execute(HARMS[harm])
        db.commit()

    async def check() -> None:
        asked = [("symbol_lookup", {}), ("text_search", {}), ("text_search", {"labels": ["Class"]})]
        for tool, given in asked:
            answer = await patiently(reader, tool, "copy.mv2", query="ProgressReporter", **given)
            assert answer["result"]["items"][0]["name"] == "ProgressReporter"

    asyncio.run(check())
    with closing(Sidecar.open(sidecar)) as opened:
        assert opened.content_digest() == before


def test_many_questions_to_one_capsule_are_answered_side_by_side(reader: Reader) -> None:
    async def check() -> None:
        node = "Class:common/contract.py:Wire"
        tools = ("impact_analysis", "call_trace", "text_search", "node_get")
        key = {"call_trace": "fromNodeId", "text_search": "query"}
        questions = [
            ask(reader, tool, "copy.mv2", **{key.get(tool, "nodeId"): node}) for tool in tools * CONNECTIONS * 2
        ]
        first = await ask(reader, "manifest_get", "copy.mv2")
        assert first["result"]["counts"]["nodes"]
        answers = await asyncio.gather(*questions)
        assert [answer.get("tool") for answer in answers] == [*tools] * CONNECTIONS * 2

    asyncio.run(check())


def test_no_link_leads_out_of_the_export_root(reader: Reader, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(root / "copy.mv2", outside / "secret.mv2")
    (root / "link.mv2").symlink_to(outside / "secret.mv2")
    (root / "folder").symlink_to(outside)

    async def check() -> None:
        for path in ("link.mv2", "folder/secret.mv2", "../outside/secret.mv2", str(outside / "secret.mv2")):
            assert (await ask(reader, "manifest_get", path))["code"] == "INVALID_ARGUMENT"
        for path in ("copy.mv2.index.v1.sqlite", ".", "folder"):
            assert (await ask(reader, "manifest_get", path))["code"] in ("NOT_FOUND", "INVALID_ARGUMENT")

    asyncio.run(check())
    assert [path.name for path in outside.iterdir()] == ["secret.mv2"]


@pytest.mark.parametrize("path", ["../outside/secret.txt", "/etc/passwd", "..", "common/../../outside/secret.txt"])
def test_a_file_path_is_only_a_name_in_the_capsule(reader: Reader, path: str) -> None:
    async def check() -> None:
        for tool in ("file_outline", "file_snippet"):
            assert (await ask(reader, tool, "copy.mv2", filePath=path))["code"] == "NOT_FOUND"

    asyncio.run(check())


def test_a_capsule_that_changed_is_noticed(reader: Reader, root: Path, capsules: dict[str, Path]) -> None:
    others = [name for name in GRAPHS[1:] if name in capsules]
    if not others:
        pytest.skip("another graph lies beside the repository only")

    async def check() -> None:
        before = await patiently(reader, "manifest_get", "copy.mv2")
        shutil.copy(capsules[others[0]], root / "new.mv2")
        (root / "new.mv2").replace(root / "copy.mv2")
        await asyncio.sleep(1.1)  # for a second a capsule is taken for the same
        after = await patiently(reader, "manifest_get", "copy.mv2")
        assert before["result"]["counts"] != after["result"]["counts"]

    asyncio.run(check())


def test_an_index_that_is_built_keeps_no_other_capsule_waiting(
    reader: Reader, root: Path, capsules: dict[str, Path]
) -> None:
    large = list(capsules.values())[-1]
    names = [f"large-{number}.mv2" for number in range(3)]
    for name in names:
        shutil.copy(large, root / name)  # without its index

    async def check() -> None:
        building = [asyncio.create_task(patiently(reader, "manifest_get", name)) for name in names]
        await asyncio.sleep(0)
        answer = await ask(reader, "manifest_get", "copy.mv2")
        assert answer["result"]["counts"]["nodes"]
        assert not all(task.done() for task in building)
        for answer in await asyncio.gather(*building):
            assert answer["result"]["counts"]["nodes"]

    asyncio.run(check())


def test_a_capsule_that_was_removed_is_closed_when_another_is_opened(reader: Reader, root: Path) -> None:
    for name in ("one.mv2", "two.mv2"):
        for end in ("", ".index.v1.sqlite"):
            shutil.copy(root / f"copy.mv2{end}", root / f"{name}{end}")

    def kept_open() -> set[str]:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return {name for link in links if (name := str(link.readlink())).startswith(str(root))}

    async def check() -> None:
        node = {"nodeId": "Class:common/contract.py:Wire"}
        assert "result" in await patiently(reader, "node_get", "one.mv2", **node)
        assert kept_open() == {str(root / "one.mv2"), str(root / "one.mv2.index.v1.sqlite")}
        for path in root.glob("one.mv2*"):
            path.unlink()
        assert (await ask(reader, "node_get", "one.mv2", **node))["code"] == "NOT_FOUND"
        assert "result" in await patiently(reader, "node_get", "two.mv2", **node)
        assert kept_open() == {str(root / "two.mv2"), str(root / "two.mv2.index.v1.sqlite")}

    asyncio.run(check())


def _exported(root: Path, real_graphs: dict[str, Path]) -> tuple[str, Path]:
    """The name of a capsule under the root, and its manifest."""
    with Gate() as gate:
        result = export(
            read_graph(real_graphs[GRAPHS[0]]),
            out_dir=root,
            gate=gate,
            generated_at="2026-01-02T10:11:12.345Z",
            embedder=None,
            on_progress=lambda _: None,
            should_stop=lambda: None,
        )
    return result.capsule_paths[0].name, result.manifest_path


def test_a_published_sidecar_of_another_version_is_read_anew_and_left_as_it_is(
    reader: Reader, root: Path, real_graphs: dict[str, Path]
) -> None:
    capsule, path = _exported(root, real_graphs)
    sidecar = root / f"{capsule}.index.v1.sqlite"
    published = sidecar.read_bytes()
    with closing(sqlite3.connect(sidecar)) as db:
        db.execute("PRAGMA user_version = 1")
    old = sidecar.read_bytes()
    manifest = json.loads(path.read_bytes())
    # As an earlier version published it.
    manifest["sidecarSha256"] = hashlib.sha256(old).hexdigest()
    path.write_text(json.dumps(manifest))
    found = asyncio.run(patiently(reader, "symbol_lookup", capsule, query="ProgressReporter"))
    assert found["result"]["items"][0]["name"] == "ProgressReporter"
    assert sidecar.read_bytes() == old
    manifest["sidecarSha256"] = hashlib.sha256(published).hexdigest()
    path.write_text(json.dumps(manifest))
    sidecar.unlink()
    (root / "again").mkdir()
    for file in (root / capsule, path):
        shutil.copy(file, root / "again")
    assert "result" in asyncio.run(patiently(reader, "symbol_lookup", f"again/{capsule}", query="ProgressReporter"))
    assert (root / "again" / sidecar.name).read_bytes() == published


def test_a_manifest_that_names_files_elsewhere_is_refused(
    reader: Reader, root: Path, real_graphs: dict[str, Path]
) -> None:
    capsule, path = _exported(root, real_graphs)
    manifest = json.loads(path.read_bytes())
    for name in ("../copy.mv2.index.v1.sqlite", "/etc/passwd", "..", "", "a\0b"):
        path.write_text(json.dumps(manifest | {"sidecarFileName": name}))
        answer = asyncio.run(ask(reader, "manifest_get", capsule))
        assert answer.get("code") == "CAPSULE_INCOMPATIBLE", answer


def test_words_answer_where_the_vectors_are_damaged(reader: Reader, root: Path) -> None:
    capsule = root / "copy.mv2"
    with CapsuleReader(capsule) as opened:
        found = opened.vectors()
    assert found is not None
    content = bytearray(capsule.read_bytes())
    at = content.index(found[1][len(found[1]) // 2].tobytes())
    content[at] ^= 0xFF
    capsule.write_bytes(content)
    with closing(sqlite3.connect(root / "copy.mv2.index.v1.sqlite")) as db:
        same = hashlib.sha256(content).hexdigest()
        db.execute("UPDATE meta SET value = ? WHERE key = 'capsule_sha256'", (same,))
        db.commit()
    answer = asyncio.run(patiently(reader, "text_search", "copy.mv2", query="zebra progress unheard of"))
    assert answer["confidence"]["warnings"] == ["SEMANTIC_UNAVAILABLE"]
    assert answer["result"]["items"]
    assert answer["result"]["semanticUsed"] is False


def test_a_search_says_where_it_ends_before_its_hits_do(reader: Reader) -> None:
    async def pages() -> list[dict[str, Any]]:
        found = [await patiently(reader, "text_search", "copy.mv2", query="test", limit=150)]
        while cursor := found[-1]["pagination"]["nextCursor"]:
            found.append(await patiently(reader, "text_search", "copy.mv2", query="test", limit=150, cursor=cursor))
        return found

    found = asyncio.run(pages())
    assert sum(len(page["result"]["items"]) for page in found) == 200
    assert [page["confidence"]["warnings"] for page in found][-1] == ["SEARCH_LIMITED"]
    few = asyncio.run(patiently(reader, "text_search", "copy.mv2", query="ProgressReporter", limit=5))
    assert few["confidence"]["warnings"] == []


def test_a_model_that_opens_slowly_leaves_the_question_to_the_words(root: Path, real_graphs: dict[str, Path]) -> None:
    opening = threading.Event()
    choice = Choice(mode="local_cpu", provider="torch", model="slow", dimension=256)

    class Slow(StaticEmbedder):
        model = msgspec.structs.replace(StaticEmbedder.model, provider="torch", name="slow")

    def engine(_choice: Choice) -> Embedder:
        assert opening.wait(60)
        return Slow()

    with Gate() as gate:
        result = export(
            read_graph(real_graphs[GRAPHS[0]]),
            out_dir=root,
            gate=gate,
            generated_at="2026-01-02T10:11:12.345Z",
            embedder=Slow(),
            choice=choice,
            on_progress=lambda _: None,
            should_stop=lambda: None,
        )
    artifacts = Artifacts(FileStorage([]), root / "copies", 1)
    library = Library(artifacts, engine, capacity=2)
    reader = Reader(ExportPlaces(Exports(), root, external=False, note=[].append), library, budget=65_536)
    asked = {"path": result.capsule_paths[0].name, "query": "zebra progress unheard of"}
    try:
        meanwhile = asyncio.run(ask(reader, "text_search", **asked))
        opening.set()
        after = asyncio.run(patiently(reader, "text_search", **asked))
    finally:
        opening.set()
        library.close()
        artifacts.close()
    assert meanwhile["confidence"]["warnings"] == ["SEMANTIC_UNAVAILABLE"]
    assert meanwhile["result"]["items"]
    assert (after["result"]["semanticUsed"], after["confidence"]["warnings"]) == (True, [])
