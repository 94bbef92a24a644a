"""What a pass over stored files finds, what it notes of it, and what it leaves to the next pass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
from operations.storehouse import Storehouse, exported, storehouse

from common.errors import StorageFailed
from common.storage import FileStorage
from control_plane.operations.scrub import Scrub
from handler.job import MAX_MANIFEST_BYTES

__all__ = ["exported"]

Ask = Callable[[Callable[[Storehouse], Awaitable[None]]], None]


@pytest.fixture
def ask(tmp_path: Path, exported: Path) -> Ask:
    """Run a scenario on an empty storehouse whose passes take a tenth of a second."""

    def run(scenario: Callable[[Storehouse], Awaitable[None]]) -> None:
        async def inside() -> None:
            async with storehouse(tmp_path / "root", exported, scrub_seconds=0.2) as house:
                await scenario(house)

        asyncio.run(inside())

    return run


@asynccontextmanager
async def scrubbing(house: Storehouse) -> AsyncIterator[Callable[[str], Awaitable[dict[str, object]]]]:
    """Passes for as long as the block lasts; gives what waits for a line of the log."""
    with structlog.testing.capture_logs() as lines:

        async def told(event: str) -> dict[str, object]:
            async with asyncio.timeout(60):
                while not (found := [line for line in lines if line["event"] == event]):
                    await asyncio.sleep(0.01)
            lines.clear()
            return dict(found[0])

        task = asyncio.create_task(Scrub(house.settings, house.store, house.storage, house.layout, house.metrics).run())
        try:
            yield told
        finally:
            task.cancel()
            assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)


def flip(data: bytes) -> bytes:
    return data[:600] + bytes([data[600] ^ 1]) + data[601:]


@pytest.mark.parametrize(
    ("ending", "harm", "file", "what"),
    [
        (".mv2", None, "capsule", ".mv2 is missing"),
        (".mv2", lambda data: data[:-1], "capsule", " were published"),
        (".mv2", flip, "capsule", "is not what was published (SHA-256)"),
        (".manifest.json", None, "manifest", "the manifest is missing"),
        (".manifest.json", lambda _: b"", "manifest", "the manifest has 0 bytes"),
        (".manifest.json", lambda _: b"{", "manifest", "the manifest cannot be read"),
        (".manifest.json", lambda data: data.replace(b'"stored"', b'"other"'), "manifest", "is not what was published"),
    ],
    ids=["gone", "cut", "flipped", "no manifest", "empty manifest", "half a manifest", "other manifest"],
)
def test_each_damage_is_noted_as_what_it_is_until_the_file_is_whole_again(
    ask: Ask, ending: str, harm: Callable[[bytes], bytes] | None, file: str, what: str
) -> None:
    async def scenario(house: Storehouse) -> None:
        job_id, folder = await house.finished()
        other, _ = await house.finished()
        path = next(folder.glob(f"*{ending}"))
        good = path.read_bytes()
        if harm is None:
            path.unlink()
        else:
            path.write_bytes(harm(good))
            assert path.read_bytes() != good
        async with scrubbing(house) as told:
            line = await told("stored files are damaged")
            assert (line["job_id"], line["file"]) == (job_id, file)
            assert what in str((await house.job(job_id)).damage)
            assert (await told("scrubbed"))["damaged"] == 1
            assert house.metric(f'memvid_export_damaged_total{{file="{file}"}}') == 1, "it is counted once"
            assert (await house.job(other)).damage is None
            path.write_bytes(good)
            assert (await told("stored files are whole again"))["job_id"] == job_id
            assert (await house.job(job_id)).damage is None

    ask(scenario)


def test_a_manifest_that_is_far_too_large_is_not_read(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        job_id, folder = await house.finished()
        with next(folder.glob("*.manifest.json")).open("r+b") as file:
            file.truncate(MAX_MANIFEST_BYTES + 1)
        async with scrubbing(house) as told:
            await told("stored files are damaged")
        assert (await house.job(job_id)).damage == f"the manifest has {MAX_MANIFEST_BYTES + 1:,} bytes"

    ask(scenario)


def test_a_damaged_sidecar_is_told_and_takes_nothing_from_the_export(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        job_id, folder = await house.finished()
        path = next(folder.glob("*.sqlite"))
        path.write_bytes(flip(path.read_bytes()))
        async with scrubbing(house) as told:
            assert (await told("stored files are damaged"))["file"] == "sidecar"
        assert house.metric('memvid_export_damaged_total{file="sidecar"}') >= 1
        assert (await house.job(job_id)).damage is None

    ask(scenario)


def test_a_damaged_record_is_written_anew_from_files_that_are_whole(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        job_id, _ = await house.finished()
        before = await house.job(job_id)
        await house.put(job_id, output="{", manifest="[]")
        harmed = await house.job(job_id)
        assert (harmed.output, harmed.manifest) == (None, None)
        async with scrubbing(house) as told:
            await told("stored files are whole again")
        after = await house.job(job_id)
        assert (after.output, after.manifest, after.damage) == (before.output, before.manifest, None)

    ask(scenario)


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "flipped"])
def test_a_damaged_record_with_no_whole_files_is_noted_as_such(ask: Ask, gone: bool) -> None:
    async def scenario(house: Storehouse) -> None:
        job_id, folder = await house.finished()
        capsule = next(folder.glob("*.mv2"))
        if gone:
            capsule.unlink()
        else:
            capsule.write_bytes(flip(capsule.read_bytes()))
        await house.put(job_id, manifest="{")
        async with scrubbing(house) as told:
            line = await told("stored files are damaged")
        assert (line["job_id"], line["file"]) == (job_id, "record")
        assert ("there are no files of it" if gone else "and so are its files") in str(line["what"])
        assert house.metric('memvid_export_damaged_total{file="record"}') == 1

    ask(scenario)


class Away(FileStorage):
    """Says nothing of sizes while it is away, or does something first."""

    away = True
    first: Callable[[], None] | None = None

    def size(self, ref: str) -> int | None:
        if self.first is not None:
            self.first()
            return None
        if self.away:
            raise StorageFailed("the store does not answer")
        return super().size(ref)


def test_a_store_that_is_away_says_nothing_about_its_files(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        job_id, _ = await house.finished()
        house.storage = away = Away([house.layout.artifacts])
        async with scrubbing(house) as told:
            line = await told("stored files cannot be read now")
            assert (line["job_id"], line["code"]) == (job_id, "STORAGE_FAILED")
            assert (await told("scrubbed"))["damaged"] == 0
            away.away = False
            await told("scrubbed")
        assert house.metric("memvid_export_damaged_total") == 0
        assert (await house.job(job_id)).damage is None

    ask(scenario)


def test_files_that_were_removed_after_their_time_while_one_looked_are_not_damaged(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        await house.finished()
        house.storage = away = Away([house.layout.artifacts])
        away.first = lambda: house.change_at_once("UPDATE jobs SET status = 'expired', stage = 'expired'")
        async with scrubbing(house) as told:
            assert (await told("scrubbed"))["damaged"] == 0
        assert house.metric("memvid_export_damaged_total") == 0

    ask(scenario)


def test_what_is_past_its_time_is_not_read(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        job_id, folder = await house.finished()
        next(folder.glob("*.mv2")).unlink()
        await house.put(job_id, expires_at=1)
        async with scrubbing(house) as told:
            assert (await told("scrubbed"))["damaged"] == 0
        assert house.metric("memvid_export_scrubbed_bytes_total") == 0

    ask(scenario)


def test_an_empty_store_is_nothing_to_tell_of_and_its_first_export_is_read(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        async with scrubbing(house) as told:
            await asyncio.sleep(0)
            await house.finished()
            line = await told("scrubbed")
        assert (line["jobs"], line["damaged"]) == (1, 0)
        assert house.metric("memvid_export_scrubbed_bytes_total") > 0

    ask(scenario)


def test_a_database_that_is_away_is_waited_for(ask: Ask) -> None:
    async def scenario(house: Storehouse) -> None:
        job_id, folder = await house.finished()
        next(folder.glob("*.mv2")).unlink()
        await house.change("ALTER TABLE jobs RENAME TO elsewhere")
        async with scrubbing(house) as told:
            await told("scrubbing waits for the database")
            await house.change("ALTER TABLE elsewhere RENAME TO jobs")
            assert (await told("stored files are damaged"))["job_id"] == job_id

    ask(scenario)


def test_a_pass_that_cannot_keep_its_time_says_so(tmp_path: Path, exported: Path) -> None:
    async def scenario() -> None:
        async with storehouse(tmp_path / "root", exported, scrub_seconds=1e-6) as house:
            await house.finished()
            async with scrubbing(house) as told:
                await told("scrubbing takes longer than it may")
                assert (await house.store.counts()) == {"completed": 1}

    asyncio.run(scenario())
