"""Finished exports become collections, by way of a real capsule, on both databases."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from nexus.rows import url
from prometheus_client import CollectorRegistry
from services import S3
from sqlalchemy import event, text
from structlog.testing import capture_logs
from worker_run import run_here

from common.capsule.gate import Gate
from common.capsule.reader import CapsuleReader
from common.contract import JobInput, Progress
from common.embedding.port import Embedder
from common.embedding.static import StaticEmbedder
from common.errors import AccessDenied, EmbeddingFailed, InvalidRequest, StorageFailed
from common.storage import FileStorage, Storage, open_storage
from control_plane.errors import QueueUnavailable
from control_plane.exports.views import job_view
from control_plane.jobs.database import Database
from control_plane.jobs.holds import Holds
from control_plane.jobs.hub import EventHub
from control_plane.jobs.records import JobRecord, NewEvent, NewJob
from control_plane.jobs.store import JobStore, now_ms
from control_plane.nexus.exported import BATCH, Importer, doc_id_of
from control_plane.nexus.imports import TRIES, Imports
from control_plane.nexus.incoming import MAX_ID
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.records import Collection, Document, NewDocument, Viewer
from control_plane.nexus.store import EVERYTHING, CollectionStore, LeaseLost
from control_plane.nexus.texts import Texts
from handler.job import published

__all__ = ["url"]

MODEL = f"static/{StaticEmbedder.model.name}"
DIMENSION = StaticEmbedder.model.dimension
LONG = f"Function:src/{'long/' * 200}deep.py:sink"
ODD = "Function:src/a\nb.py:odd"


def function(name: str, body: str = "return 1", node_id: str | None = None) -> dict[str, Any]:
    """A node."""
    return {
        "id": node_id or f"Function:src/a.py:{name}",
        "label": "Function",
        "properties": {
            "name": name,
            "filePath": "src/a.py",
            "startLine": 3,
            "endLine": 4,
            "content": f"def {name}():\n    {body}",
        },
    }


def graph(*nodes: dict[str, Any], semantic: bool = True, project: str = "engine") -> dict[str, Any]:
    """A request with a community beside the nodes."""
    first = nodes[0]["id"]
    community = {"id": "comm_1", "label": "Odd Label/Community", "properties": {"name": "All"}}
    return {
        "projectName": project,
        "source": {"type": "local", "baseName": project, "displayName": project},
        "nodes": [*nodes, community],
        "relationships": [{"id": "e", "sourceId": first, "targetId": first, "type": "CALLS", "confidence": 1.0}],
        "options": {"semanticEnabled": semantic},
    }


SMALL = graph(function("parse"), function("build"))


class Works:
    """Exports graphs, each once for all tests."""

    def __init__(self, folder: Path, gate: Gate) -> None:
        self.folder = folder
        self._gate = gate
        self._made: dict[str, Path] = {}

    def made(self, request: dict[str, Any], storage: Storage | None = None, prefix: str = "") -> str:
        """Where the files of its export lie; with a ``storage`` there, under ``prefix``."""
        payload = json.dumps(request)
        if payload not in self._made:
            folder = self._made[payload] = self.folder / uuid.uuid4().hex
            folder.mkdir()
            (folder / "payload").write_text(payload)
            target = f"{folder.as_uri()}/out/"
            job = JobInput(job_id="job", payload_ref=(folder / "payload").as_uri(), output_prefix=target)
            run_here(job, FileStorage([self.folder]), folder / "scratch", gate=self._gate)
        out = self._made[payload] / "out"
        if storage is None:
            return f"{out.as_uri()}/"
        for path in out.iterdir():
            storage.put(path, prefix + path.name)
        return prefix


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Works]:
    """Real capsules."""
    with Gate() as gate:
        yield Works(tmp_path_factory.mktemp("exports"), gate)


class Killed(BaseException):
    """The process ends."""


class Yard:
    """A database, an importer, and exports that have ended."""

    def __init__(self, database: Database, works: Works, folder: Path) -> None:
        self.database = database
        self.works = works
        self.folder = folder
        self.storage: Storage = FileStorage([works.folder])
        self.engine: Callable[[], Embedder] = StaticEmbedder
        self.room: Callable[[int], None] = lambda _: None
        self.woken = 0
        self.jobs = JobStore(database, EventHub(), queue_capacity=100, replica="first")
        self.store = CollectionStore(database, replica="first")
        self.registry = CollectorRegistry()
        self.metrics = NexusMetrics(self.registry)

    def importer(self) -> Importer:
        """As a process has it that has just begun."""

        def woken() -> None:
            self.woken += 1

        return Importer(
            Imports(self.database, replica="first"),
            self.store,
            self.storage,
            self.folder / "imports",
            reading=Holds(self.jobs).reading,
            room=self.room,
            texts=Texts(self.engine),
            wake=woken,
            metrics=self.metrics,
        )

    async def queued(self, collection: str | None) -> JobRecord:
        """A job that a worker has begun."""
        new = NewJob(
            id=str(uuid.uuid4()),
            backend="legacy_vps",
            weight=1,
            session_id="s",
            project_name="engine",
            payload_ref="file:///payload",
            payload_sha256="0" * 64,
            payload_size=1,
            message="Queued",
            meta={},
            client="red",
            collection=collection,
        )
        await self.jobs.create(new)
        job = await self.jobs.claim(max_weight=None)
        assert job is not None
        return job

    async def finished(self, request: dict[str, Any], collection: str = "code", **more: Any) -> str:
        """An export that is completed; answers its id."""
        job = await self.queued(collection)
        prefix = await asyncio.to_thread(self.works.made, request, **more)
        found = await asyncio.to_thread(published, self.storage, prefix, job.id)
        assert found is not None
        progress = Progress(stage="download_ready", progress=100, stage_progress=100, message="Ready")
        values = {
            "output": json.dumps(msgspec.to_builtins(found.output)),
            "manifest": json.dumps(msgspec.to_builtins(found.manifest)),
            "expires_at": now_ms() + 3_600_000,
        }
        moved = await self.jobs.move(job.id, "completed", NewEvent("job_completed", progress), values=values)
        assert moved is not None
        return job.id

    async def ended(self, job_id: str) -> dict[str, Any]:
        """What a client sees of the collection."""
        job = await self.jobs.get(job_id)
        assert job is not None
        shown: dict[str, Any] = msgspec.to_builtins(job_view(job))["collection"]
        return shown

    async def bring(self, *job_ids: str) -> list[dict[str, Any]]:
        """Import all that is due; answers what is seen of these."""
        importer = self.importer()
        while await importer.step():
            pass
        return [await self.ended(job_id) for job_id in job_ids]

    async def collection(self, name: str = "code") -> Collection:
        return await self.store.collection("red", name)

    async def documents(self, name: str = "code") -> dict[str, Document]:
        """Of a collection, by id."""
        collection = await self.collection(name)
        found = await self.store.listing(collection, EVERYTHING, after=0, limit=10_000)
        return {one.doc_id: one for one in await self.store.get(collection, [one.doc_id for one in found], EVERYTHING)}

    async def execute(self, statement: str, **values: Any) -> list[Any]:
        async with self.database.write.begin() as connection:
            found = await connection.execute(text(statement), values)
            return list(found) if found.returns_rows else []

    def counted(self, outcome: str) -> float | None:
        return self.registry.get_sample_value("vectorizer_nexus_imports_total", {"outcome": outcome})


Story = Callable[[Yard], Awaitable[None]]


def play(url: str, works: Works, folder: Path, story: Story) -> None:
    """A story over an empty database, by the replica that has the lease."""

    async def inside() -> None:
        database = Database(url)
        try:
            await database.migrate()
            yard = Yard(database, works, folder)
            assert await yard.store.take_lease()
            await story(yard)
        finally:
            await database.close()

    asyncio.run(inside())


def test_an_export_is_a_collection_with_its_vectors(url: str, works: Works, tmp_path: Path) -> None:
    nodes = [function("parse"), function("sink", node_id=LONG), function("odd", node_id=ODD)]

    async def story(yard: Yard) -> None:
        yard.engine = nobody  # nothing is embedded
        job_id = await yard.finished(graph(*nodes))
        assert (await yard.ended(job_id)) == {"name": "code", "status": "pending", "documents": 0, "error": None}
        [seen] = await yard.bring(job_id)
        assert seen == {"name": "code", "status": "done", "documents": 4, "error": None}
        assert (await yard.collection())[3:6] == (f"red/{MODEL}/{DIMENSION}", MODEL, DIMENSION)
        found = await yard.documents()
        assert set(found) == {"Function:src/a.py:parse", doc_id_of(LONG), doc_id_of(ODD), "comm_1"}
        parse = found["Function:src/a.py:parse"]
        assert (parse.title, parse.doc_type, parse.permissions) == ("Function: parse", "Function", ())
        assert parse.text == "parse\nsrc/a.py\n\ndef parse():\n    return 1"
        assert parse.payload == {
            "label": "Function", "name": "parse", "project": "engine", "path": "src/a.py",
            "startLine": 3, "endLine": 4, "jobId": job_id,
        }  # fmt: skip
        assert found["comm_1"].doc_type == "Odd_Label_Community"
        assert found["comm_1"].text == "All"
        assert found[doc_id_of(ODD)].payload["nodeId"] == ODD
        assert max(map(len, found)) == MAX_ID
        assert yard.woken == 1
        assert yard.counted("done") == 1
        record = await yard.jobs.get(job_id)
        assert record is not None
        assert record.output is not None
        with CapsuleReader(Path(record.output.artifact_ref.removeprefix("file://"))) as reader:
            at, matrix = reader.vectors() or (np.array([]), np.array([]))
            vectors = {reader.frames(int(place), 1)[0].title: row for place, row in zip(at, matrix, strict=True)}
        held = await yard.execute("SELECT title, vector FROM document_contents")
        assert {row.title: row.vector for row in held} == {name: row.tobytes() for name, row in vectors.items()}
        assert not (tmp_path / "imports").exists() or not any((tmp_path / "imports").iterdir())

    play(url, works, tmp_path, story)


def test_another_export_changes_what_changed_and_deletes_what_is_gone(url: str, works: Works, tmp_path: Path) -> None:
    async def story(yard: Yard) -> None:
        await yard.bring(await yard.finished(SMALL))
        before = await yard.documents()
        own = NewDocument("notes", "Mine", "mine", {}, "", (), unit())
        taken = NewDocument("Function:src/a.py:parse", "Mine too", "mine", {}, "", ("alice",), unit())
        await yard.store.write(await yard.collection(), [own, taken], now=now_ms())
        second = await yard.finished(graph(function("parse", "return 2"), function("new")))
        [seen] = await yard.bring(second)
        assert (seen["status"], seen["documents"]) == ("done", 3)
        after = await yard.documents()
        assert set(after) == {"notes", "Function:src/a.py:parse", "Function:src/a.py:new", "comm_1"}
        assert after["comm_1"] == before["comm_1"]  # its version too, and the job that wrote it
        assert after["Function:src/a.py:parse"].title == "Mine too"
        # Once the client's is gone the node's comes again.
        await yard.store.delete(await yard.collection(), ["Function:src/a.py:parse"], now=now_ms())
        third = await yard.finished(graph(function("parse", "return 2"), function("new", "return 3")))
        await yard.bring(third)
        last = await yard.documents()
        assert last["Function:src/a.py:parse"].payload["jobId"] == third
        assert last["Function:src/a.py:new"].version > after["Function:src/a.py:new"].version
        # An export of before that comes late changes nothing.
        await yard.execute("UPDATE jobs SET import_at = 0, import_state = 'pending' WHERE id = :id", id=second)
        [late] = await yard.bring(second)
        assert (late["status"], late["error"]["code"]) == ("failed", "SUPERSEDED")
        assert late["error"]["details"] == {"jobId": third}
        assert await yard.documents() == last

    play(url, works, tmp_path, story)


def test_an_import_that_ends_at_any_point_is_gone_on_with(url: str, works: Works, tmp_path: Path) -> None:
    first = graph(*(function(f"f{number}") for number in range(2 * BATCH)))
    left_over = range(BATCH // 2, 2 * BATCH)
    nodes = [function(f"f{number}", "return 1" if number % 2 else "return 2") for number in left_over]

    async def story(yard: Yard) -> None:
        await yard.bring(await yard.finished(first))
        before = await yard.documents()
        job_id = await yard.finished(graph(*nodes))
        left = 0

        def committing(_connection: object) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        event.listen(yard.database.write.sync_engine, "commit", committing)
        ends = 0
        while True:
            left = ends
            try:
                await yard.importer().step()
                break
            except Killed:
                ends += 1
            left = 1_000
            seen = await yard.ended(job_id)
            assert seen["status"] in ("pending", "importing")
            await yard.execute("UPDATE jobs SET import_attempts = 0 WHERE id = :id", id=job_id)
        event.remove(yard.database.write.sync_engine, "commit", committing)
        assert ends >= 6
        assert await yard.ended(job_id) == {
            "name": "code", "status": "done", "documents": len(nodes) + 1, "error": None,
        }  # fmt: skip
        after = await yard.documents()
        assert set(after) == {"comm_1", *(node["id"] for node in nodes)}
        changed = {doc_id for doc_id, one in after.items() if one.version != before[doc_id].version}
        assert changed == {node["id"] for node in nodes if "return 2" in node["properties"]["content"]}
        written = {one.version for doc_id, one in after.items() if doc_id in changed}
        counter = (await yard.execute("SELECT version FROM last_version"))[0].version
        assert counter - min(written) < 2 * len(nodes)  # each was written once, each deleted once

    play(url, works, tmp_path, story)


def test_a_collection_of_another_model_stays_as_it_is(url: str, works: Works, tmp_path: Path) -> None:
    async def story(yard: Yard) -> None:
        made, _ = await yard.store.put_collection("red", "code", "other", 2)
        [seen] = await yard.bring(await yard.finished(SMALL))
        assert (seen["status"], seen["documents"]) == ("failed", 0)
        assert seen["error"]["code"] == "COLLECTION_DIFFERS"
        assert seen["error"]["details"] == {"model": "other", "dimension": 2}
        assert await yard.store.count(made, EVERYTHING) == 0
        assert yard.counted("failed") == 1

    play(url, works, tmp_path, story)


def test_texts_are_embedded_where_the_export_has_no_vectors(url: str, works: Works, tmp_path: Path) -> None:
    request = graph(function("parse"), function("build"), semantic=False)

    async def story(yard: Yard) -> None:
        yard.engine = nobody
        refused = await yard.finished(request, "none")
        [seen] = await yard.bring(refused)
        assert (seen["status"], seen["error"]["code"]) == ("failed", "INVALID_EXPORT_REQUEST")
        assert seen["error"]["details"] == {"field": "options.semanticEnabled"}
        assert "nobody embeds here" in seen["error"]["message"]
        job_id = await yard.finished(request)
        yard.engine = away
        [seen] = await yard.bring(job_id)
        assert (seen["status"], seen["error"]["code"]) == ("pending", "SEMANTIC_UNAVAILABLE")
        yard.engine = StaticEmbedder
        await due(yard)
        [seen] = await yard.bring(job_id)
        assert (seen["status"], seen["documents"], seen["error"]) == ("done", 3, None)
        found = await yard.documents()
        parse = found["Function:src/a.py:parse"]
        [vector] = StaticEmbedder().embed([parse.text]).vectors
        held = await yard.execute("SELECT vector FROM document_contents WHERE document = :id", id=parse.id)
        assert held[0].vector == vector.tobytes()
        # The same again is embedded again by nobody.
        yard.engine = OnlyModel
        [seen] = await yard.bring(await yard.finished(request))
        assert seen["status"] == "done"
        assert await yard.documents() == found

    play(url, works, tmp_path, story)


def test_what_a_storage_lacks_for_now_is_tried_again(url: str, works: Works, tmp_path: Path) -> None:
    class Shaky(FileStorage):
        error: Exception | None = StorageFailed("it is away")

        def local(self, ref: str, scratch: Path, **more: Any) -> Path:
            if self.error is not None:
                raise self.error
            return super().local(ref, scratch, **more)

    async def story(yard: Yard) -> None:
        storage = yard.storage = Shaky([works.folder])
        storage.error = None
        job_id = await yard.finished(SMALL)
        for error in (StorageFailed("it is away"), AccessDenied("the key is old"), OSError(28, "no space")):
            storage.error = error
            [seen] = await yard.bring(job_id)
            assert (seen["status"], seen["error"]["code"]) == ("pending", "STORAGE_FAILED")
            assert not await yard.importer().step()  # there is a pause
            await due(yard)
        await yard.execute("UPDATE jobs SET import_attempts = :most", most=TRIES.most - 1)
        [seen] = await yard.bring(job_id)
        assert (seen["status"], seen["error"]["code"]) == ("failed", "STORAGE_FAILED")
        assert (yard.counted("retried"), yard.counted("failed")) == (3, 1)
        storage.error = None
        late = await yard.finished(SMALL)
        yard.folder = tmp_path / "no folder"
        yard.folder.write_bytes(b"")
        [seen] = await yard.bring(late)
        assert (seen["status"], seen["error"]["code"]) == ("pending", "STORAGE_FAILED")
        yard.folder = tmp_path
        await due(yard)
        [seen] = await yard.bring(late)
        assert (seen["status"], seen["documents"]) == ("done", 3)
        lost = await yard.finished(SMALL)
        storage.error = KeyError("nobody foresaw it")
        [seen] = await yard.bring(lost)
        assert (seen["status"], seen["error"]["code"]) == ("failed", "INTERNAL")

    play(url, works, tmp_path, story)


def test_exports_without_files_say_so(url: str, works: Works, tmp_path: Path) -> None:
    async def story(yard: Yard) -> None:
        gone = await yard.finished(SMALL)
        await yard.execute("UPDATE jobs SET expires_at = 1 WHERE id = :id", id=gone)
        canceled = (await yard.queued("code")).id
        progress = Progress(stage="canceled", progress=0, stage_progress=100, message="Export canceled")
        assert await yard.importer().step()  # the first; the other one has not ended
        assert not await yard.importer().step()
        await yard.jobs.move(canceled, "canceled", NewEvent("job_canceled", progress))
        damaged = await yard.finished(SMALL)
        await yard.jobs.damaged(damaged, "a byte is wrong")
        missing = await yard.finished(SMALL)
        await yard.execute(
            "UPDATE jobs SET output = replace(output, '/out/', '/elsewhere/') WHERE id = :id", id=missing
        )
        seen = await yard.bring(gone, canceled, damaged, missing)
        assert [one["status"] for one in seen] == ["failed"] * 4
        assert [one["error"]["code"] for one in seen] == [
            "JOB_EXPIRED", "ARTIFACT_NOT_READY", "ARTIFACT_MISSING", "ARTIFACT_MISSING",
        ]  # fmt: skip
        killed = await yard.finished(SMALL)
        await yard.execute("UPDATE jobs SET import_attempts = :most WHERE id = :id", most=TRIES.most, id=killed)
        [last] = await yard.bring(killed)
        assert (last["status"], last["error"]["code"]) == ("failed", "INTERNAL")
        assert "in the middle of it" in last["error"]["message"]
        plain = await yard.jobs.get((await yard.queued(None)).id)
        assert plain is not None
        assert "collection" not in msgspec.to_builtins(job_view(plain))

    play(url, works, tmp_path, story)


def test_a_capsule_of_several_parts_is_read_to_its_end(works: Works, tmp_path: Path) -> None:
    def part(*nodes: dict[str, Any]) -> dict[str, Any]:
        request = graph(*nodes)
        request["options"]["maxRelationFrames"] = 0
        return request

    async def story(yard: Yard) -> None:
        job_id = await yard.finished(part(function("parse"), function("build")))
        other = await yard.finished(part(function("later")), "other")
        one, two = await yard.jobs.get(job_id), await yard.jobs.get(other)
        assert one is not None
        assert two is not None
        assert one.manifest is not None
        assert two.manifest is not None
        assert one.output is not None
        assert two.output is not None
        second = msgspec.structs.replace(two.manifest.parts[0], file_name="part-2.mv2")
        beside = Path(one.output.artifact_ref.removeprefix("file://")).with_name(second.file_name)
        beside.write_bytes(Path(two.output.artifact_ref.removeprefix("file://")).read_bytes())
        manifest = msgspec.structs.replace(one.manifest, parts=[*one.manifest.parts, second])
        put = "UPDATE jobs SET manifest = :manifest WHERE id = :id"
        await yard.execute(put, manifest=msgspec.json.encode(manifest).decode(), id=job_id)
        [seen] = await yard.bring(job_id)
        assert (seen["status"], seen["documents"]) == ("done", 5)  # the community is in both
        assert set(await yard.documents()) == {
            "comm_1",
            *(f"Function:src/a.py:{name}" for name in ("parse", "build", "later")),
        }
        unsaid = msgspec.structs.replace(manifest, embedding_model=None)
        await yard.execute(put, manifest=msgspec.json.encode(unsaid).decode(), id=job_id)
        await yard.execute("UPDATE jobs SET import_at = 0 WHERE id = :id", id=job_id)
        [seen] = await yard.bring(job_id)
        assert (seen["status"], seen["error"]["code"]) == ("failed", "ARTIFACT_MISSING")

    play(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}", works, tmp_path, story)


def test_who_has_lost_the_lease_writes_nothing(url: str, works: Works, tmp_path: Path) -> None:
    async def story(yard: Yard) -> None:
        job_id = await yard.finished(graph(function("parse"), semantic=False))
        other = CollectionStore(yard.database, replica="second")
        embedder = StaticEmbedder()

        def taken() -> Embedder:
            run = asyncio.run_coroutine_threadsafe(yard.execute("UPDATE sync_state SET owner = 'second'"), loop)
            run.result(10)
            return embedder

        loop = asyncio.get_running_loop()
        made = await other.put_collection("red", "code", MODEL, DIMENSION)
        calls = 0

        def second_time() -> Embedder:
            nonlocal calls
            calls += 1
            return taken() if calls == 2 else embedder

        yard.engine = second_time
        importer = yard.importer()
        with pytest.raises(LeaseLost):
            await importer.step()
        assert await yard.store.count(made[0], EVERYTHING) == 0
        assert (await yard.ended(job_id))["status"] == "importing"
        with pytest.raises(LeaseLost):
            await importer.step()
        with pytest.raises(LeaseLost):
            await yard.store.delete(made[0], ["x"], now=1, exported=True)
        assert await other.take_lease()

    play(url, works, tmp_path, story)


def test_a_document_that_a_client_writes_just_then_is_the_clients(url: str, works: Works, tmp_path: Path) -> None:
    async def story(yard: Yard) -> None:
        loop = asyncio.get_running_loop()
        mine = NewDocument("Function:src/a.py:parse", "Mine", "mine", {}, "", (), unit())
        calls = 0

        def between() -> Embedder:
            nonlocal calls
            calls += 1
            if calls == 2:
                writing = yard.store.write(made, [mine], now=now_ms())
                asyncio.run_coroutine_threadsafe(writing, loop).result(10)
            return StaticEmbedder()

        made, _ = await yard.store.put_collection("red", "code", MODEL, DIMENSION)
        yard.engine = between
        [seen] = await yard.bring(await yard.finished(graph(function("parse"), semantic=False)))
        assert seen["status"] == "done"
        found = await yard.documents()
        assert {doc_id: one.title for doc_id, one in found.items()} == {
            "Function:src/a.py:parse": "Mine", "comm_1": "Odd Label/Community: All",
        }  # fmt: skip
        # It is nobody's to overwrite who does not see it, and a client that writes over an export's owns it.
        assert await yard.store.exported(made, list(found)) == {"Function:src/a.py:parse": "", "comm_1": ANY_HASH}
        await yard.store.write(made, [mine._replace(doc_id="comm_1")], now=now_ms(), viewer=Viewer("red", "any"))
        assert await yard.store.exported_after(made, 0, 10) == []

    play(url, works, tmp_path, story)


def test_files_in_a_bucket_are_fetched_one_at_a_time(works: Works, tmp_path: Path, s3: S3) -> None:
    async def story(yard: Yard) -> None:
        bucket = open_storage(s3.config())
        prefix = f"{s3.url}/artifacts/{uuid.uuid4()}/1/"
        yard.storage = bucket
        job_id = await yard.finished(SMALL, storage=bucket, prefix=prefix)
        asked: list[int] = []

        def full(size: int) -> None:
            asked.append(size)
            if len(asked) == 1:
                raise QueueUnavailable("There is too little room.")

        yard.room = full
        (tmp_path / "imports" / "left-over").mkdir(parents=True)
        [seen] = await yard.bring(job_id)
        assert (seen["status"], seen["error"]["code"]) == ("pending", "QUEUE_UNAVAILABLE")
        await due(yard)
        [seen] = await yard.bring(job_id)
        assert (seen["status"], seen["documents"]) == ("done", 3)
        record = await yard.jobs.get(job_id)
        assert record is not None
        assert record.manifest is not None
        assert asked == [record.manifest.parts[0].size_bytes] * 2
        assert list((tmp_path / "imports").iterdir()) == []

    play(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}", works, tmp_path, story)


def test_the_loop_imports_and_outlives_a_database_that_is_away(works: Works, tmp_path: Path) -> None:
    async def story(yard: Yard) -> None:
        job_id = await yard.finished(SMALL)
        with capture_logs() as told:

            async def said(what: str) -> None:
                async with asyncio.timeout(20):
                    while not any(one["event"] == what for one in told):
                        await asyncio.sleep(0.01)

            await yard.execute("ALTER TABLE sync_state RENAME TO away")
            running = asyncio.create_task(yard.importer().run())
            await said("imports wait for the database")
            await yard.execute("ALTER TABLE away RENAME TO sync_state")
            await yard.execute("UPDATE sync_state SET owner = 'second'")
            await said("another replica brings exports into collections")
            assert (await yard.ended(job_id))["status"] == "pending"
            await yard.execute("UPDATE sync_state SET owner = 'first'")
            await said("an export is a collection")
            await yard.execute("ALTER TABLE spaces RENAME TO away")
            late = await yard.finished(SMALL)
            await said("an import waits for the database")
            await said("an export is no collection")
            await yard.execute("ALTER TABLE away RENAME TO spaces")
        seen = await yard.ended(late)
        assert (seen["status"], seen["error"]["code"]) == ("pending", "QUEUE_UNAVAILABLE")
        assert (await yard.ended(job_id))["status"] == "done"
        assert not running.done()
        running.cancel()

    play(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}", works, tmp_path, story)


class _AnyHash:
    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and len(other) == 64

    __hash__ = None  # type: ignore[assignment]


ANY_HASH = _AnyHash()


class OnlyModel:
    """An engine that says what it is, and embeds nothing."""

    model = StaticEmbedder.model
    group = 1

    def embed(self, texts: Sequence[str], **_more: Any) -> Any:
        raise AssertionError(texts)

    count_tokens = flush = close = embed


def nobody() -> Embedder:
    raise InvalidRequest("nobody embeds here")


def away() -> Embedder:
    raise EmbeddingFailed("it does not answer")


def unit() -> np.ndarray[Any, np.dtype[np.float32]]:
    vector = np.zeros(DIMENSION, dtype=np.float32)
    vector[0] = 1
    return vector


async def due(yard: Yard) -> None:
    """Let the pauses be over."""
    await yard.execute("UPDATE jobs SET import_at = 0 WHERE import_at IS NOT NULL")
