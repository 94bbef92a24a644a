"""Exports that lie in an object store are read like those on this machine, through copies that are bounded."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mcp_server import GRAPHS, Exports, McpServer
from services import S3

from common.capsule.gate import Gate
from common.contract import Manifest
from common.embedding.static import StaticEmbedder
from common.errors import CapsuleUnreadable, StorageFailed
from common.graph.read import read_graph
from common.pipeline import export
from common.storage import FileStorage, S3Config
from common.storage.s3 import S3Storage
from control_plane.errors import IndexBuildInProgress, QueueUnavailable, TimedOut
from control_plane.jobs.records import JobRecord
from control_plane.reading.artifacts import Artifacts
from control_plane.reading.library import FRESH_SECONDS
from handler.job import ref_of

SYMBOL = {"query": "ProgressReporter"}


class Published(NamedTuple):
    """An export of several parts: its files, and what its manifest says."""

    files: list[Path]
    manifest: Manifest

    @property
    def small(self) -> int:
        """Bytes of the sidecar."""
        return self.manifest.sidecar_size_bytes

    @property
    def large(self) -> int:
        """Bytes of all parts."""
        return sum(part.size_bytes for part in self.manifest.parts)


@pytest.fixture(scope="module")
def published(real_graphs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Published:
    with Gate() as gate:
        result = export(
            read_graph(real_graphs[GRAPHS[0]]),
            out_dir=tmp_path_factory.mktemp("published"),
            gate=gate,
            generated_at="2026-01-02T10:11:12.345Z",
            embedder=StaticEmbedder(),
            on_progress=lambda _: None,
            should_stop=lambda: None,
            capacity=170_000,
        )
    assert len(result.capsule_paths) > 1
    return Published([*result.capsule_paths, result.sidecar_path, result.manifest_path], result.manifest)


class Store(S3Storage):
    """The real store; counts what is fetched, and waits where it is told to."""

    def __init__(self, s3: S3) -> None:
        super().__init__(S3Config(bucket=s3.bucket, addressing="path"))
        self.fetched: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.away = False

    def local(self, ref: str, scratch: Path, **checks: Any) -> Path:
        self.fetched.append(ref)
        assert self.open.wait(60)
        if self.away:
            raise StorageFailed("the store is away")
        return super().local(ref, scratch, **checks)


class Place:
    """A store with exports in it, and the folder for copies of this test."""

    def __init__(self, s3: S3, published: Published, folder: Path) -> None:
        self.store = Store(s3)
        self.published = published
        self.folder = folder / "copies"
        self.prefix = f"{s3.url}/{folder.name}/"
        self.exports = Exports()

    def publish(self, *job_ids: str) -> list[JobRecord]:
        for job_id in job_ids:
            prefix = f"{self.prefix}{job_id}/1/"
            for path in self.published.files:
                copy = path.with_name("copy")  # a store may move away what it is given
                copy.write_bytes(path.read_bytes())
                self.store.put(copy, ref_of(prefix, path.name))
            ref = ref_of(prefix, self.published.files[0].name)
            self.exports.add(job_id, ref, self.published.manifest)
        return [self.exports.records[job_id] for job_id in job_ids]

    def ref(self, job_id: str, name: str) -> str:
        return ref_of(f"{self.prefix}{job_id}/1/", name)

    def artifacts(self, capacity: int = 1 << 30) -> Artifacts:
        return Artifacts(self.store, self.folder, capacity)

    def copies(self) -> set[str]:
        """Names of all files under the folder."""
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}

    def jobs_kept(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def place(s3: S3, published: Published, tmp_path: Path) -> Iterator[Place]:
    made = Place(s3, published, tmp_path)
    yield made
    made.store.open.set()
    made.store.delete(made.prefix)


def hold(artifacts: Artifacts, job: JobRecord, *, whole: bool = False) -> None:
    """Use an export for a moment."""
    with artifacts.held(job, 60) as held:
        if whole:
            held.wait(60)


# --- through the read tools -----------------------------------------------------------------------


def test_an_export_in_the_store_answers_like_the_same_one_on_this_machine(place: Place, tmp_path: Path) -> None:
    place.exports.add("here", place.published.files[0].as_uri())
    place.publish("there")
    calls = [
        ("symbol_lookup", SYMBOL),
        ("text_search", {"query": "who keeps the progress from falling back"}),
        ("process_list", {"limit": 3}),
        ("manifest_get", {}),
    ]
    with McpServer(tmp_path, place.exports, place.artifacts()) as server:
        node = server.ask("symbol_lookup", **SYMBOL)["result"]["items"][0]["id"]
        calls += [("node_get", {"nodeId": node}), ("file_snippet", {"nodeId": node}), ("callers_of", {"nodeId": node})]
        answers = [
            [answer["result"] for answer in server.ask_all([(tool, {**given, **locator}) for tool, given in calls])]
            for locator in ({"locator": {"jobId": "here"}}, {"locator": {"jobId": "there"}}, {})
        ]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0]["items"]
    assert answers[0][5]["snippet"]


def test_only_what_an_answer_needs_is_fetched_and_only_once(place: Place, tmp_path: Path) -> None:
    place.publish("job")
    capsule, sidecar = place.published.files[0].name, place.published.manifest.sidecar_file_name
    with McpServer(tmp_path, place.exports, place.artifacts()) as server:
        first, _ = server.ask_all([("symbol_lookup", SYMBOL), ("process_list", {})])
        assert place.copies() == {f"job/{sidecar}", f"job/{capsule}.manifest.json"}
        node = first["result"]["items"][0]["id"]
        server.ask_all([("node_get", {"nodeId": node}), ("file_snippet", {"nodeId": node}), ("manifest_get", {})])
        parts = [part.file_name for part in place.published.manifest.parts]
        assert place.copies() == {f"job/{name}" for name in (sidecar, f"{capsule}.manifest.json", *parts)}
    assert place.store.fetched == [place.ref("job", name) for name in (sidecar, *parts)]


def test_a_question_during_the_fetch_is_told_to_come_again(place: Place, tmp_path: Path) -> None:
    place.publish("job")
    place.store.open.clear()
    with McpServer(tmp_path, place.exports, place.artifacts()) as server:
        error = server.fail("symbol_lookup", **SYMBOL)
        assert (error["code"], error["retryable"]) == ("INDEX_BUILD_IN_PROGRESS", True)
        place.store.open.set()
        node = server.ask("symbol_lookup", **SYMBOL)["result"]["items"][0]["id"]
        place.store.open.clear()
        assert server.fail("node_get", nodeId=node)["code"] == "INDEX_BUILD_IN_PROGRESS"
        assert server.ask("callers_of", nodeId=node)["result"]["nodeId"] == node
        place.store.open.set()
        assert server.ask("node_get", nodeId=node)["result"]["metadata"]
    assert len(place.store.fetched) == len(set(place.store.fetched))


def test_a_store_that_is_away_and_comes_back(place: Place, tmp_path: Path) -> None:
    place.publish("job")
    place.store.away = True
    with McpServer(tmp_path, place.exports, place.artifacts()) as server:
        error = server.fail("symbol_lookup", **SYMBOL)
        assert (error["code"], error["retryable"]) == ("INTERNAL_ERROR", True)
        assert place.jobs_kept() == []
        place.store.away = False
        assert server.ask("symbol_lookup", **SYMBOL)["result"]["items"]


@pytest.mark.parametrize("harm", ["missing", "other bytes", "another size"])
def test_files_that_are_not_those_of_the_manifest_are_refused(place: Place, tmp_path: Path, harm: str) -> None:
    place.publish("job")
    ref = place.ref("job", place.published.manifest.sidecar_file_name)
    place.store.delete(ref)
    if harm != "missing":
        place.store.write(ref, b"x" * (place.published.small if harm == "other bytes" else 1))
    with McpServer(tmp_path, place.exports, place.artifacts()) as server:
        error = server.fail("symbol_lookup", **SYMBOL)
    assert (error["code"], error["retryable"]) == ("CAPSULE_INCOMPATIBLE", False)
    assert place.jobs_kept() == []


def test_a_part_that_is_missing_spoils_no_answer_that_does_without(place: Place, tmp_path: Path) -> None:
    place.publish("job")
    place.store.delete(place.ref("job", place.published.manifest.parts[-1].file_name))
    with McpServer(tmp_path, place.exports, place.artifacts()) as server:
        node = server.ask("symbol_lookup", **SYMBOL)["result"]["items"][0]["id"]
        assert server.fail("node_get", nodeId=node)["code"] == "CAPSULE_INCOMPATIBLE"
        assert server.ask("callers_of", nodeId=node)["result"]["nodeId"] == node
    assert not any(name.endswith(".mv2") for name in place.copies())


def test_a_copy_of_the_sidecar_found_damaged_is_built_anew(place: Place, tmp_path: Path) -> None:
    place.publish("job")
    with McpServer(tmp_path, place.exports, place.artifacts()) as server:
        before = server.ask("symbol_lookup", **SYMBOL)["result"]
        sidecar = place.folder / "job" / place.published.manifest.sidecar_file_name
        content = sidecar.read_bytes()
        sidecar.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
        for query in ("ProgressReporter", "frames", "writer"):
            server.call_all([("text_search", {"query": query})])
        for _ in range(100):
            (answer,) = server.call_all([("symbol_lookup", SYMBOL)])
            if not answer.is_error:
                break
            assert answer.structured_content["code"] == "INDEX_BUILD_IN_PROGRESS"
        assert answer.structured_content["result"] == before
    with closing(sqlite3.connect(sidecar)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_what_is_open_but_idle_makes_room_for_another_export(place: Place, tmp_path: Path) -> None:
    place.publish("one", "two", "three")
    capacity = 2 * place.published.small
    with McpServer(tmp_path, place.exports, place.artifacts(capacity)) as server:
        answers = []
        for job in ("one", "two", "one", "three", "one", "two"):
            if job in place.jobs_kept():
                # Until then a question does not look at the copies, nor say that they are used.
                time.sleep(1.1 * FRESH_SECONDS)
            answers.append(server.ask("symbol_lookup", **SYMBOL, locator={"jobId": job})["result"])
        assert place.jobs_kept() == ["one", "two"]
    assert all(answer == answers[0] for answer in answers)
    # The third took the room of the second, which was fetched again in the end.
    assert [ref.split("/")[4] for ref in place.store.fetched] == ["one", "two", "three", "two"]


# --- the copies -------------------------------------------------------------------------------------


def test_those_who_ask_at_once_fetch_once(place: Place) -> None:
    (job,) = place.publish("job")
    artifacts = place.artifacts()
    with ThreadPoolExecutor(16) as askers:
        for done in [askers.submit(hold, artifacts, job, whole=True) for _ in range(64)]:
            done.result()
    assert len(place.store.fetched) == 1 + len(place.published.manifest.parts)


def test_nothing_that_is_held_or_fetched_is_removed(place: Place) -> None:
    one, two, three = place.publish("one", "two", "three")
    artifacts = place.artifacts(2 * place.published.small)
    with artifacts.held(one, 60) as held:
        place.store.open.clear()
        with pytest.raises(IndexBuildInProgress), artifacts.held(two, 0):
            pass
        # The first is held, the second on its way: there is no room, for now.
        with pytest.raises(TimedOut), artifacts.held(three, 60):
            pass
        place.store.open.set()
        hold(artifacts, two)
        hold(artifacts, three)
        assert held.mark.is_file()
        assert place.jobs_kept() == ["one", "three"]
    hold(artifacts, two)
    assert place.jobs_kept() == ["three", "two"]


def test_copies_never_pass_their_bytes_while_many_ask_for_many(place: Place) -> None:
    jobs = place.publish(*(f"job-{n}" for n in range(6)))
    small, large = place.published.small, place.published.large
    capacity = 2 * (small + large)
    artifacts = place.artifacts(capacity)
    passed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            with suppress(FileNotFoundError):
                files = [path for path in place.folder.rglob("*.mv2*") if path.suffix in (".mv2", ".sqlite")]
                passed.append(sum(path.stat().st_size for path in files))

    def ask(turn: int) -> int:
        try:
            hold(artifacts, jobs[turn * 7 % len(jobs)], whole=turn % 2 == 0)
        except TimedOut:
            return 0
        return 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as askers:
        answered = sum(askers.map(ask, range(120)))
    over.set()
    watcher.join()
    assert answered
    assert 0 < max(passed) <= capacity


def test_an_export_above_the_bound_is_refused_with_both_figures(place: Place) -> None:
    (job,) = place.publish("job")
    small, whole = place.published.small, place.published.small + place.published.large
    with pytest.raises(CapsuleUnreadable, match=f"{small:,} bytes; at most {small - 1:,}"):
        hold(place.artifacts(small - 1), job)
    artifacts = place.artifacts(small)
    hold(artifacts, job)
    with pytest.raises(CapsuleUnreadable, match=f"{whole:,} bytes; at most {small:,}"):
        hold(artifacts, job, whole=True)
    hold(artifacts, job)


def test_what_the_disk_has_no_room_for_is_not_fetched(place: Place) -> None:
    (job,) = place.publish("job")
    asked: list[int] = []

    def full(size: int) -> None:
        asked.append(size)
        raise QueueUnavailable("There is too little room on the server's disk.")

    artifacts = Artifacts(place.store, place.folder, 1 << 30, room=full)
    with pytest.raises(QueueUnavailable, match="too little room"):
        hold(artifacts, job)
    assert asked == [place.published.small]
    assert place.copies() == set()
    hold(place.artifacts(), job)


def test_words_find_what_the_disk_has_no_room_to_search_by_meaning(place: Place, tmp_path: Path) -> None:
    place.publish("job")

    def small(size: int) -> None:
        if size > place.published.small:
            raise QueueUnavailable("There is too little room on the server's disk.")

    artifacts = Artifacts(place.store, place.folder, 1 << 30, room=small)
    with McpServer(tmp_path, place.exports, artifacts) as server:
        answer = server.ask("text_search", query="who keeps the progress from falling back")
    assert answer["confidence"]["warnings"] == ["SEMANTIC_UNAVAILABLE"]
    assert answer["result"]["semanticUsed"] is False


def test_leftovers_of_an_earlier_process_are_removed(place: Place) -> None:
    for name in (".job.sidecar/x", "job/graph.mv2", "stray"):
        path = place.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"left behind")
    place.artifacts()
    assert place.jobs_kept() == []


def test_files_on_this_machine_are_used_where_they_lie(tmp_path: Path, published: Published) -> None:
    exports = Exports()
    exports.add("job", published.files[0].as_uri())
    artifacts = Artifacts(FileStorage([]), tmp_path / "copies", 1)
    with artifacts.held(exports.records["job"], 0) as held:
        assert held.path == published.files[0]
        held.wait(0)
    assert list((tmp_path / "copies").iterdir()) == []
