"""What becomes of a body, or of a kept payload, that cannot be taken: told as what it is, and nothing stays of it."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from clocks import Ahead
from litestar.datastructures import Headers
from litestar.exceptions import ClientException
from live_server import new_job

from common.contract import Progress
from common.errors import AccessDenied, InvalidRequest, StorageFailed
from common.settings import Settings
from common.storage import FileStorage, Storage
from control_plane.backends.checker import PayloadChecker
from control_plane.backends.legacy_vps import LegacyVps
from control_plane.backends.port import Means
from control_plane.errors import PayloadGone
from control_plane.exports.intake import CHUNK_SECONDS, MAX_UPLOADS, UPLOAD_SECONDS, Intake
from control_plane.jobs.database import Database
from control_plane.jobs.hub import EventHub
from control_plane.jobs.layout import Layout
from control_plane.jobs.records import JobRecord, NewEvent
from control_plane.jobs.store import JobStore, now_ms
from control_plane.operations.disk import Disk
from control_plane.operations.keys import EVERYBODY
from control_plane.operations.metrics import Metrics
from control_plane.operations.profiles import Profiles
from control_plane.operations.shares import Shares
from handler.pool import WorkerPool
from tests.handler.small_job import config_of

BODY = b'{"nodes": [], "relationships": []}'
HEADERS = {"content-type": "application/json"}


class House(NamedTuple):
    """The way of a body into a store, without a server around it; no worker runs."""

    intake: Intake
    store: JobStore
    layout: Layout

    async def failed(self, payload: bytes | None = BODY) -> JobRecord:
        """A job that has failed, and may be started again with the ``payload`` that was kept of it."""
        job = new_job(sha256=hashlib.sha256(BODY).hexdigest())
        ref = self.layout.payload_ref(job.id)
        await self.store.create(dataclasses.replace(job, payload_ref=ref, payload_size=len(BODY)))
        assert await self.store.claim(max_weight=None)
        told = Progress(stage="failed", progress=0, stage_progress=0, message="Failed")
        values = {"expires_at": now_ms() + 86_400_000}
        moved = await self.store.move(job.id, "failed", NewEvent("job_failed", told), values=values)
        assert moved is not None
        if payload is not None:
            (self.layout.payloads / job.id).write_bytes(payload)
        return moved

    async def accept(self, chunks: AsyncIterator[bytes], **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        await self.intake.accept(Headers({**HEADERS, **named}), chunks, EVERYBODY)

    def payloads(self) -> set[str]:
        return {path.name for path in self.layout.payloads.iterdir()}

    def on_their_way(self) -> list[Path]:
        return list(self.layout.incoming.iterdir())


@asynccontextmanager
async def house(
    root: Path,
    *,
    storage: Callable[[Layout], Storage] = lambda layout: FileStorage([layout.payloads]),
    store: type[JobStore] = JobStore,
    staging: Path | None = None,
) -> AsyncIterator[House]:
    given = {"MEMVID_EXPORT_ROOT": str(root), "MEMVID_EXPORT_STAGING_ROOT": str(staging or root / "staging")}
    settings = Settings.read(given, dev=True)
    layout, metrics, hub = Layout(settings), Metrics(), EventHub()
    lock = layout.prepare()
    database = Database(f"sqlite+aiosqlite:///{root / 'jobs.sqlite'}")
    await database.migrate()
    try:
        jobs = store(database, hub, queue_capacity=10)
        kept, disk = storage(layout), Disk(settings, metrics)
        pool, profiles = WorkerPool(config_of(root), 1), Profiles.load(None, settings)
        backend = LegacyVps(Means(settings, jobs, kept, layout, metrics), pool=pool, profiles=profiles, disk=disk)
        intake = Intake(
            jobs,
            kept,
            layout,
            backend,
            checker=PayloadChecker(pool, metrics),
            profiles=profiles,
            metrics=metrics,
            disk=disk,
            uploads=Shares("uploads", MAX_UPLOADS, metrics, several=False),
            capacity=10,
            max_bytes=1 << 20,
        )
        yield House(intake, jobs, layout)
    finally:
        await database.close()
        os.close(lock)


# --- a failed export, once more -------------------------------------------------------------------


class Slow(FileStorage):
    """Gives the first payload that it is asked for only when it is told to."""

    def __init__(self, layout: Layout) -> None:
        super().__init__([layout.payloads])
        self.asked, self.goes = threading.Event(), threading.Event()

    def local(self, ref: str, scratch: Path, **checks: Any) -> Path:
        if not self.asked.is_set():
            self.asked.set()
            assert self.goes.wait(30)
        return super().local(ref, scratch, **checks)


def test_who_is_overtaken_by_another_retry_gets_the_job_of_that_one(tmp_path: Path) -> None:
    async def check() -> None:
        made: list[Slow] = []

        def storage(layout: Layout) -> Storage:
            made.append(Slow(layout))
            return made[0]

        async with house(tmp_path, storage=storage) as at:
            job = await at.failed()
            overtaken = asyncio.create_task(at.intake.retry(job, EVERYBODY))
            assert await asyncio.to_thread(made[0].asked.wait, 30)
            quicker, new = await at.intake.retry(job, EVERYBODY)
            made[0].goes.set()
            assert new
            assert await overtaken == (quicker, False)
            assert at.payloads() == {quicker.id}
            assert at.on_their_way() == []

    asyncio.run(check())


class Refusing(FileStorage):
    """As a bucket whose credentials have expired."""

    def local(self, ref: str, scratch: Path, **checks: Any) -> Path:
        raise AccessDenied(f"{ref}: the store answered 403 ExpiredToken")


class Full(FileStorage):
    """Takes nothing."""

    def put(self, source: Path, ref: str, *, sha256: str | None = None) -> Any:
        raise AccessDenied(f"{ref}: the store answered 403 ExpiredToken")

    def delete(self, prefix: str) -> int:
        raise AccessDenied(f"{prefix}: the store answered 403 ExpiredToken")


@pytest.mark.parametrize(("kind", "what"), [(Refusing, "does not give"), (Full, "does not take")])
def test_a_store_that_refuses_a_payload_is_an_outage_of_ours_and_the_job_may_be_started_again(
    tmp_path: Path, kind: type[FileStorage], what: str
) -> None:
    async def check() -> None:
        async with house(tmp_path, storage=lambda layout: kind([layout.payloads])) as at:
            job = await at.failed()
            with pytest.raises(StorageFailed, match=f"{what} the payload now") as refused:
                await at.intake.retry(job, EVERYBODY)
            assert "ExpiredToken" not in refused.value.message
            assert await at.store.retry_of(job.id) is None
            assert await at.store.kept_payloads() == at.payloads() == {job.id}
            assert at.on_their_way() == []
        async with house(tmp_path) as at:
            again, new = await at.intake.retry(job, EVERYBODY)
            assert (new, again.retry_of, at.payloads()) == (True, job.id, {again.id})

    asyncio.run(check())


def test_a_payload_outside_the_storage_is_an_outage_of_ours(tmp_path: Path) -> None:
    async def check() -> None:
        async with house(tmp_path, storage=lambda layout: FileStorage([layout.artifacts])) as at:
            job = await at.failed()
            with pytest.raises(StorageFailed, match="does not give the payload now"):
                await at.intake.retry(job, EVERYBODY)
            assert at.payloads() == {job.id}

    asyncio.run(check())


def test_a_payload_that_cannot_be_linked_is_copied(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")

    elsewhere = tmp_path / "elsewhere" / "payload"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(BODY)

    def storage(layout: Layout) -> Storage:
        return FileStorage([elsewhere.parent, layout.payloads])

    async def check(staging: Path) -> None:
        async with house(tmp_path, staging=staging, storage=storage) as at:
            job = dataclasses.replace(await at.failed(payload=None), payload_ref=elsewhere.as_uri())
            again, new = await at.intake.retry(job, EVERYBODY)
            assert (new, at.payloads(), at.on_their_way()) == (True, {again.id}, [])
            assert (at.layout.payloads / again.id).read_bytes() == elsewhere.read_bytes() == BODY

    with tempfile.TemporaryDirectory(dir=memory) as staging:
        asyncio.run(check(Path(staging)))


def test_a_folder_that_went_away_is_told_and_the_payload_stays(tmp_path: Path) -> None:
    async def check() -> None:
        async with house(tmp_path) as at:
            job = await at.failed()
            at.layout.incoming.rmdir()
            with pytest.raises(StorageFailed, match="payload cannot be copied: No such file"):
                await at.intake.retry(job, EVERYBODY)
            with pytest.raises(StorageFailed, match="body cannot be kept: No such file"):
                await at.accept(pieces(BODY))
            assert at.payloads() == {job.id}
            assert await at.store.queued(None) == (0, 0.0)

    asyncio.run(check())


def test_a_payload_of_other_bytes_is_given_up_once_and_for_all(tmp_path: Path) -> None:
    async def check() -> None:
        async with house(tmp_path) as at:
            job = await at.failed(payload=BODY[::-1])
            with pytest.raises(PayloadGone, match="damaged or gone"):
                await at.intake.retry(job, EVERYBODY)
            assert await at.store.kept_payloads() == set()
            left = await at.store.get(job.id)
            assert left is not None
            with pytest.raises(PayloadGone, match="not kept any more"):
                await at.intake.retry(left, EVERYBODY)

    asyncio.run(check())


class Interrupted(JobStore):
    """Ends the request just after its job was made."""

    async def create(self, *arguments: Any, **more: Any) -> tuple[JobRecord, bool]:
        made = await super().create(*arguments, **more)
        if more.get("quota") is not None:
            raise asyncio.CancelledError
        return made


def test_a_request_that_is_cut_off_when_its_job_is_made_leaves_the_job_its_payload(tmp_path: Path) -> None:
    async def check() -> None:
        async with house(tmp_path, store=Interrupted) as at:
            job = await at.failed()
            with pytest.raises(asyncio.CancelledError):
                await at.intake.retry(job, EVERYBODY)
            made = await at.store.retry_of(job.id)
            assert made is not None
            assert (made.status, made.payload_ref) == ("queued", at.layout.payload_ref(made.id))
            assert (at.layout.payloads / made.id).read_bytes() == BODY
            assert at.on_their_way() == []

    asyncio.run(check())


# --- a body ---------------------------------------------------------------------------------------


async def pieces(*given: bytes) -> AsyncIterator[bytes]:
    for piece in given:
        yield piece


def on_a_clock_ahead(check: Callable[[Ahead], Awaitable[None]]) -> None:
    loop = Ahead()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(check(loop))  # type: ignore[arg-type]


def test_a_body_of_which_nothing_comes_is_given_up(tmp_path: Path) -> None:
    async def check(loop: Ahead) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield BODY[:9]
            loop.seconds += CHUNK_SECONDS
            await asyncio.Event().wait()

        async with house(tmp_path) as at:
            with pytest.raises(InvalidRequest, match="brought nothing for 60 seconds"):
                await at.accept(body())
            assert at.on_their_way() == []

    on_a_clock_ahead(check)


def test_a_body_that_comes_byte_by_byte_is_given_up_in_the_end(tmp_path: Path) -> None:
    async def check(loop: Ahead) -> None:
        taken = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal taken
            while True:
                loop.seconds += CHUNK_SECONDS / 2
                taken += 1
                await asyncio.sleep(0)
                yield b" "

        async with house(tmp_path) as at:
            with pytest.raises(InvalidRequest, match="is not there after 3600 seconds"):
                await at.accept(body())
            assert 0 <= taken - 2 * UPLOAD_SECONDS / CHUNK_SECONDS <= 1
            assert at.on_their_way() == []

    on_a_clock_ahead(check)


def test_a_body_that_ends_early_is_the_client_s(tmp_path: Path) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield BODY[:9]
        raise ClientException("the connection ended")

    async def check() -> None:
        async with house(tmp_path) as at:
            with pytest.raises(InvalidRequest, match="ended before its announced length"):
                await at.accept(body())
            assert at.on_their_way() == []

    asyncio.run(check())


def test_what_is_wrong_with_a_body_is_told_though_what_came_of_it_cannot_be_removed(tmp_path: Path) -> None:
    async def check() -> None:
        async with house(tmp_path) as at:

            async def body() -> AsyncIterator[bytes]:
                yield BODY
                at.layout.incoming.rename(tmp_path / "away")
                at.layout.incoming.touch()

            with pytest.raises(InvalidRequest) as refused:
                await at.accept(body(), content_digest="sha-256=:" + "A" * 43 + "=:")
            assert refused.value.details["field"] == "Content-Digest"

    asyncio.run(check())
