"""Capsules that are open while their files change or too many ask, and what a question is told then."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from clocks import Ahead
from mcp_server import Exports
from structlog.testing import capture_logs

from common.capsule.gate import Gate
from common.embedding.choice import Engines
from common.embedding.engine import OpenEngines
from common.errors import AccessDenied, CapsuleUnreadable, InvalidRequest, StorageFailed
from common.storage import FileStorage, S3Config
from common.storage.s3 import S3Storage
from control_plane.errors import IndexBuildInProgress, TimedOut
from control_plane.jobs.records import JobRecord
from control_plane.operations.keys import EVERYBODY, Caller
from control_plane.reading.artifacts import Artifacts
from control_plane.reading.library import CONNECTIONS, Library, OpenCapsule
from control_plane.reading.mcp_stdio import MAX_CAPSULES, CapsuleFiles
from control_plane.reading.places import MAX_KNOWN, ExportPlaces
from control_plane.reading.questions import SECONDS, THREADS, Questions
from control_plane.reading.reader import Reader
from control_plane.reading.tools import Locator, NotFound
from tests.test_pipeline import run, small


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Gate() as gate:
        return run(small(6), tmp_path_factory.mktemp("made"), gate)


@pytest.fixture
def capsule(made: Any, tmp_path: Path) -> Path:
    """A capsule of this test's own, with its sidecar and without a manifest."""
    path = tmp_path / "copy.mv2"
    shutil.copy(made.capsule_paths[0], path)
    shutil.copy(made.sidecar_path, f"{path}.index.v1.sqlite")
    return path


@pytest.fixture
def published(made: Any, tmp_path: Path) -> tuple[JobRecord, Path]:
    """A completed export, and its folder."""
    folder = tmp_path / "published"
    shutil.copytree(made.manifest_path.parent, folder)
    exports = Exports()
    exports.add("job", (folder / made.capsule_paths[0].name).as_uri(), made.manifest)
    return exports.records["job"], folder


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    with closing(OpenEngines(Engines())) as engines, closing(_artifacts(tmp_path)) as artifacts:
        opened = Library(artifacts, engines.get, capacity=4)
        yield opened
        opened.close()


def _artifacts(folder: Path, storage: Any = None) -> Artifacts:
    return Artifacts(storage or FileStorage([]), folder / "copies", 1 << 20)


def sidecar_of(capsule: Path) -> Path:
    return capsule.with_name(f"{capsule.name}.index.v1.sqlite")


# --- the library ----------------------------------------------------------------------------------


def test_a_capsule_that_all_connections_are_used_of_is_busy_and_free_again_later(
    library: Library, capsule: Path
) -> None:
    with ExitStack() as leases:
        for _ in range(CONNECTIONS):
            leases.enter_context(library.lease(capsule))
        with pytest.raises(TimedOut, match="busy with other questions"), library.lease(capsule):
            pass
    with library.lease(capsule) as opened:
        assert opened.sidecar.counts()["nodes"] == 6


def test_a_sidecar_that_is_spoiled_while_it_is_open_is_built_anew_for_those_who_come_later(
    library: Library, capsule: Path
) -> None:
    whole = sidecar_of(capsule).read_bytes()
    with library.lease(capsule) as first:
        other = capsule.with_name("other")
        other.write_bytes(b"no index")
        other.replace(sidecar_of(capsule))
        with pytest.raises(IndexBuildInProgress, match="is built anew"), library.lease(capsule):
            pass
        with library.lease(capsule) as again:
            assert again.sidecar.counts()["nodes"] == 6
        assert first.sidecar.counts()["nodes"] == 6  # who has it open reads on
    assert sidecar_of(capsule).read_bytes() == whole


def test_a_sidecar_that_cannot_be_put_there_is_an_outage_of_the_storage(library: Library, capsule: Path) -> None:
    sidecar_of(capsule).unlink()
    sidecar_of(capsule).mkdir()
    said = f"Cannot write the sidecar {sidecar_of(capsule).name}"
    with pytest.raises(StorageFailed, match=said), library.lease(capsule):
        pass
    assert {path.name for path in capsule.parent.iterdir()} >= {capsule.name, sidecar_of(capsule).name}
    assert not list(capsule.parent.glob(".*"))
    sidecar_of(capsule).rmdir()
    with library.lease(capsule) as opened:
        assert opened.sidecar.counts()["nodes"] == 6


def test_a_capsule_that_went_before_it_was_opened_is_not_there(library: Library, tmp_path: Path) -> None:
    with pytest.raises(CapsuleUnreadable, match=r"There is no capsule gone\.mv2"), library.lease(tmp_path / "gone.mv2"):
        pass


def test_a_question_past_its_time_is_told(library: Library, capsule: Path) -> None:
    with library.lease(capsule) as opened:
        opened.allow(60)
        opened.check()
        opened.allow(-1)
        with pytest.raises(TimedOut, match="took too long"):
            opened.check()


@pytest.mark.parametrize("harm", ["another manifest", "no manifest", "another size"])
def test_files_of_an_export_that_are_not_what_was_published_are_refused(
    library: Library, published: tuple[JobRecord, Path], harm: str
) -> None:
    job, folder = published
    with library.lease(job) as opened:
        assert opened.sidecar.counts()["nodes"] == 6
    (manifest,), (capsule,) = folder.glob("*.manifest.json"), folder.glob("*.mv2")
    if harm == "no manifest":
        manifest.unlink()
    elif harm == "another manifest":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"sidecarSha256": "0" * 64}))
    with capsule.open("ab") as file:  # another capsule than the one that is open
        file.write(b"x")
    said = r"\(size\)" if harm == "another size" else "not the one that was published"
    with pytest.raises(CapsuleUnreadable, match=said), library.lease(job):
        pass


def test_a_part_with_another_byte_answers_nothing_from_its_text(
    library: Library, published: tuple[JobRecord, Path]
) -> None:
    job, folder = published
    (capsule,) = folder.glob("*.mv2")
    content = bytearray(capsule.read_bytes())
    content[5_000] ^= 1
    capsule.write_bytes(content)
    with library.lease(job) as opened:
        assert opened.sidecar.counts()["nodes"] == 6
        with pytest.raises(CapsuleUnreadable, match=r"not what was published \(SHA-256\)"):
            opened.frame(0)


# --- copies ---------------------------------------------------------------------------------------


class Refusing(S3Storage):
    """A bucket whose credentials have expired."""

    def local(self, ref: str, scratch: Path, **checks: Any) -> Path:
        raise AccessDenied("the store answered 403 ExpiredToken")


@pytest.mark.parametrize("fault", ["refused", "no folder"])
def test_files_that_cannot_be_fetched_are_an_outage_and_are_asked_for_again(
    made: Any, tmp_path: Path, fault: str
) -> None:
    exports = Exports()
    exports.add("job", f"s3://bucket/job/1/{made.capsule_paths[0].name}", made.manifest)
    with closing(_artifacts(tmp_path, Refusing(S3Config(bucket="bucket")))) as artifacts:
        if fault == "no folder":
            (tmp_path / "copies").rmdir()
        said = "cannot be fetched: .*ExpiredToken" if fault == "refused" else "cannot be kept: No such file"
        for _ in range(2):
            with pytest.raises(StorageFailed, match=said), artifacts.held(exports.records["job"], 30):
                pass
        assert not list(tmp_path.glob("copies/*"))


class Folder(S3Storage):
    """A bucket whose objects lie in a folder, each by its name."""

    def __init__(self, folder: Path) -> None:
        super().__init__(S3Config(bucket="bucket"))
        self._files = folder

    def local(self, ref: str, scratch: Path, **checks: Any) -> Path:
        return Path(shutil.copy(self._files / ref.rpartition("/")[2], scratch / "fetched"))


def test_where_there_is_room_for_one_export_the_next_takes_its_place(made: Any, tmp_path: Path) -> None:
    exports = Exports()
    for job in ("one", "two"):
        exports.add(job, f"s3://bucket/{job}/1/{made.capsule_paths[0].name}", made.manifest)
    room = made.manifest.sidecar_size_bytes
    with closing(Artifacts(Folder(made.manifest_path.parent), tmp_path / "copies", room)) as artifacts:
        for job in ("one", "two", "one"):
            with artifacts.held(exports.records[job], 30) as held:
                assert held.mark.parent.name == job
            assert [path.name for path in (tmp_path / "copies").iterdir()] == [job]


def test_what_was_asked_for_last_gives_way_to_what_is_held(made: Any, tmp_path: Path) -> None:
    exports = Exports()
    for job in ("one", "two"):
        exports.add(job, f"s3://bucket/{job}/1/{made.capsule_paths[0].name}", made.manifest)
    # Both sidecars have room, or one with its capsule, but not all three.
    room = made.manifest.sidecar_size_bytes + max(made.manifest.sidecar_size_bytes, made.manifest.parts[0].size_bytes)
    with closing(Artifacts(Folder(made.manifest_path.parent), tmp_path / "copies", room)) as artifacts:
        with artifacts.held(exports.records["one"], 30) as one:
            with artifacts.held(exports.records["two"], 30):
                pass
            one.wait(30)
            assert one.path.is_file()
        assert [path.name for path in (tmp_path / "copies").iterdir()] == ["one"]


# --- questions ------------------------------------------------------------------------------------


def test_a_question_for_which_no_thread_gets_free_in_time_is_told_to_come_again(library: Library) -> None:
    loop, goes = Ahead(), threading.Event()

    async def check() -> None:
        questions = Questions(library)
        busy = [asyncio.create_task(questions.ask(goes.wait, 30.0)) for _ in range(THREADS)]
        await asyncio.sleep(0.05)
        late = asyncio.create_task(questions.ask(lambda: "answer"))
        await asyncio.sleep(0.05)
        loop.seconds += SECONDS
        with pytest.raises(TimedOut, match="Too many questions"):
            await late
        goes.set()
        assert await asyncio.gather(*busy) == [True] * THREADS
        assert await questions.ask(lambda: "answer") == "answer"

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(check())


def endless(opened: OpenCapsule) -> None:
    """A query that only its time ends."""
    opened.allow(0.01)
    long = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    opened.sidecar._db.execute(long).fetchone()


def test_a_query_past_its_time_is_ended_and_the_index_is_not_taken_for_damaged(library: Library, capsule: Path) -> None:
    questions = Questions(library)
    said = "took too long; ask for less"
    with pytest.raises(TimedOut, match=said), questions.opened({"": capsule}) as [(_, opened)]:
        endless(opened)
    assert sidecar_of(capsule).is_file()
    with questions.opened({"": capsule}) as [(_, opened)]:
        assert opened.sidecar.counts()["nodes"] == 6


# --- places and the reader ------------------------------------------------------------------------


async def ask(reader: Reader, tool: str, **arguments: Any) -> dict[str, Any]:
    body, _ = await reader.ask(tool, arguments, EVERYBODY)
    answer: dict[str, Any] = json.loads(body)
    return answer


def test_a_locator_that_names_too_much_or_nothing_is_told(library: Library, capsule: Path) -> None:
    async def check() -> None:
        exports = Exports()
        exports.add("damaged", capsule.as_uri())
        record = exports.records["damaged"]
        exports.records["damaged"] = dataclasses.replace(record, damage="a part is damaged")
        reader = Reader(
            ExportPlaces(exports, capsule.parent, external=False, note=lambda _entry: None), library, budget=65_536
        )
        both = await ask(reader, "manifest_get", locator={"jobId": "damaged", "capsulePath": "copy.mv2"})
        assert (both["code"], "not both" in both["message"]) == ("INVALID_ARGUMENT", True)
        damaged = await ask(reader, "manifest_get", locator={"jobId": "damaged"})
        assert (damaged["code"], "a part is damaged" in damaged["message"]) == ("NOT_FOUND", True)
        assert (await ask(reader, "manifest_get"))["code"] == "NOT_FOUND"
        arguments = {"locator": {"capsulePath": "copy.mv2"}}
        body, _ = await reader.ask("manifest_get", arguments, EVERYBODY._replace(scopes=frozenset({"read"})))
        assert "only a key with the scope admin names files" in json.loads(body)["message"]
        assert "result" in await ask(reader, "manifest_get", **arguments)
        for path in ("a\0b.mv2", "x" * 5_000 + ".mv2"):
            wrong = await ask(reader, "manifest_get", locator={"capsulePath": path})
            assert (wrong["code"], wrong["retryable"]) == ("INVALID_ARGUMENT", False)

    asyncio.run(check())


def test_of_the_exports_that_were_found_the_last_are_known_without_another_look(
    library: Library, capsule: Path
) -> None:
    class Counted(Exports):
        looks = 0

        async def get(self, job_id: str) -> JobRecord | None:
            self.looks += 1
            return await super().get(job_id)

    async def check() -> None:
        exports = Counted()
        for number in range(MAX_KNOWN + 1):
            exports.add(f"job-{number}", capsule.as_uri())
        places = ExportPlaces(exports, capsule.parent, external=False, note=lambda _entry: None)
        for number in range(MAX_KNOWN + 1):
            assert await places.find(Locator(job_id=f"job-{number}"), EVERYBODY) == exports.records[f"job-{number}"]
        assert exports.looks == MAX_KNOWN + 1
        await places.find(Locator(job_id=f"job-{MAX_KNOWN}"), EVERYBODY)
        assert exports.looks == MAX_KNOWN + 1
        await places.find(Locator(job_id="job-0"), EVERYBODY)  # the first was forgotten for the last
        assert exports.looks == MAX_KNOWN + 2

    asyncio.run(check())


class Unforeseen:
    """Places that fail in a way that nobody thought of."""

    async def find(self, _locator: Locator | None, _caller: Caller) -> Path:
        raise ZeroDivisionError("secret")


def test_what_nobody_foresaw_is_told_by_its_trace_alone_and_stands_in_the_log(library: Library) -> None:
    async def check() -> None:
        with capture_logs() as lines:
            answer = await ask(Reader(Unforeseen(), library, budget=65_536), "manifest_get")
        assert (answer["code"], answer["retryable"]) == ("INTERNAL_ERROR", True)
        assert "secret" not in json.dumps(answer)
        [line] = lines
        assert (line["log_level"], line["tool"], line["trace_id"]) == ("error", "manifest_get", answer["traceId"])
        assert isinstance(line["exc_info"], ZeroDivisionError)

    asyncio.run(check())


@pytest.mark.parametrize("cursor", ["A", "é", "AAAA", "!!!!", "\udc80"])
def test_a_cursor_that_is_none_is_refused(library: Library, capsule: Path, cursor: str) -> None:
    async def check() -> None:
        files = CapsuleFiles([capsule])
        wrong = await ask(Reader(files, library, budget=65_536), "symbol_lookup", query="do", cursor=cursor)
        assert (wrong["code"], wrong["message"].partition(":")[0]) == ("INVALID_ARGUMENT", "cursor")

    asyncio.run(check())


def test_files_are_named_by_their_path_or_by_a_name_that_only_one_has(capsule: Path, tmp_path: Path) -> None:
    async def check() -> None:
        second, same = tmp_path / "second.mv2", tmp_path / "folder" / "copy.mv2"
        same.parent.mkdir()
        for path in (second, same):
            shutil.copy(capsule, path)
        files = CapsuleFiles([capsule, second, same])
        assert await files.find(None, EVERYBODY) == capsule
        assert await files.find(Locator(capsule_path="second.mv2"), EVERYBODY) == second
        assert await files.find(Locator(capsule_path=f"{tmp_path}/folder/../second.mv2"), EVERYBODY) == second
        assert await files.find(Locator(capsule_path=str(same)), EVERYBODY) == same
        with pytest.raises(InvalidRequest, match="several files have this name"):
            await files.find(Locator(capsule_path="copy.mv2"), EVERYBODY)
        with pytest.raises(NotFound, match=r"there are copy\.mv2, second\.mv2, copy\.mv2"):
            await files.find(Locator(capsule_path="third.mv2"), EVERYBODY)
        with pytest.raises(NotFound, match="only files here"):
            await files.find(Locator(job_id="job"), EVERYBODY)
        with pytest.raises(InvalidRequest, match=f"At most {MAX_CAPSULES} capsules"):
            CapsuleFiles([capsule] * (MAX_CAPSULES + 1))

    asyncio.run(check())
