"""What each check of a server says of what it looks at, and what the figures are while that is away."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import structlog
from operations.storehouse import Storehouse, storehouse

from common.errors import StorageFailed
from common.settings import Settings
from common.storage import FileStorage
from control_plane.errors import QueueUnavailable
from control_plane.jobs.hub import EventHub
from control_plane.operations.disk import Disk
from control_plane.operations.health import Figures, Health, Probes
from control_plane.operations.keys import Keys
from control_plane.operations.metrics import Metrics

Ask = Callable[[Callable[[Storehouse, Probes], Awaitable[None]]], None]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Run a scenario on the parts of a server and the probes over them."""

    def run(scenario: Callable[[Storehouse, Probes], Awaitable[None]]) -> None:
        async def inside() -> None:
            async with storehouse(tmp_path / "root", disk_floor_bytes=0) as house:
                disk = Disk(house.settings, house.metrics)
                probes = Probes(house.store, house.storage, house.layout, disk)
                try:
                    await scenario(house, probes)
                finally:
                    probes.close()

        asyncio.run(inside())

    return run


def test_where_all_is_well_every_probe_says_nothing_and_leaves_nothing(ask: Ask) -> None:
    async def scenario(house: Storehouse, probes: Probes) -> None:
        before = sorted(house.settings.root.rglob("*"))
        for probe in (probes.database, probes.root, probes.storage, probes.disk):
            assert await probe() is None
        assert sorted(house.settings.root.rglob("*")) == before

    ask(scenario)


def test_a_database_that_takes_no_write_is_named_by_the_kind_of_its_error(ask: Ask) -> None:
    async def scenario(house: Storehouse, probes: Probes) -> None:
        await house.change("ALTER TABLE idempotency_keys RENAME TO elsewhere")
        assert await probes.database() == "cannot be written: OperationalError"
        await house.change("ALTER TABLE elsewhere RENAME TO idempotency_keys")
        assert await probes.database() is None

    ask(scenario)


def test_a_root_that_is_gone_cannot_be_written(ask: Ask) -> None:
    async def scenario(house: Storehouse, probes: Probes) -> None:
        shutil.rmtree(house.layout.scratch)
        assert await probes.root() == "cannot be written: No such file or directory"
        house.layout.scratch.mkdir()
        assert await probes.root() is None

    ask(scenario)


class Odd(FileStorage):
    """Gives back other bytes than were written, or is away."""

    other = False
    away = False
    writes = 0

    def write(self, ref: str, data: bytes, *, only_new: bool = False) -> bool:
        self.writes += 1
        return super().write(ref, data, only_new=only_new)

    def read(self, ref: str, start: int, length: int) -> Iterator[bytes]:
        return iter([b"other bytes"]) if self.other else super().read(ref, start, length)

    def size(self, ref: str) -> int | None:
        if self.away:
            raise StorageFailed("the store does not answer")
        return super().size(ref)


def test_a_storage_is_written_to_until_it_gives_back_what_was_written_and_then_only_asked(ask: Ask) -> None:
    async def scenario(house: Storehouse, _: Probes) -> None:
        odd = Odd([house.layout.artifacts, house.layout.payloads])
        probes = Probes(house.store, odd, house.layout, Disk(house.settings, house.metrics))
        odd.other = True
        assert [await probes.storage() for _ in range(2)] == ["gives back other bytes than were written"] * 2
        odd.other = False
        assert [await probes.storage() for _ in range(3)] == [None] * 3
        assert odd.writes == 3
        odd.away = True
        assert await probes.storage() == "the store does not answer"
        assert list(house.layout.payloads.iterdir()) == []
        probes.close()

    ask(scenario)


def test_a_disk_that_does_not_say_what_is_free_takes_no_export_until_it_does(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 300)  # longer than a name may be
    env = {"MEMVID_EXPORT_ROOT": str(tmp_path), "MEMVID_EXPORT_STORAGE_URL": folder.as_uri()}
    metrics = Metrics()
    disk = Disk(Settings.read({**env, "MEMVID_EXPORT_DISK_FLOOR_BYTES": "0"}, dev=True), metrics)
    assert disk.trouble == "the disk does not say what is free: File name too long"
    with pytest.raises(QueueUnavailable) as caught:
        disk.check()
    assert caught.value.details["freeBytes"] == 0
    assert disk.free == {}
    shown = metrics.text(None, streams=0, free={}, troubles={}).decode()
    assert 'memvid_export_refused_total{limit="disk"} 1.0' in shown


def test_within_a_second_nothing_is_looked_at_again() -> None:
    looks = []

    async def check() -> str | None:
        looks.append(1)
        return "it is wrong"

    async def scenario() -> None:
        health = Health({"part": check}, {"count": lambda: len(looks)})
        for _ in range(3):
            found = await health.look()
            assert (found.ok, found.checks, found.notes) == (False, {"part": "it is wrong"}, {"count": 1})

    asyncio.run(scenario())


def test_a_check_that_hangs_when_the_server_ends_is_ended() -> None:
    async def scenario() -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def check() -> str | None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            return None

        health = Health({"part": check}, {})
        look = asyncio.create_task(health.look())
        await begun.wait()
        await health.close()
        assert ended.is_set()
        assert isinstance((await asyncio.gather(look, return_exceptions=True))[0], asyncio.CancelledError)

    asyncio.run(scenario())


def test_without_the_database_the_figures_are_told_and_those_of_jobs_are_no_numbers(ask: Ask) -> None:
    async def scenario(house: Storehouse, probes: Probes) -> None:
        disk = Disk(house.settings, house.metrics)
        health = Health({"database": probes.database, "disk": probes.disk}, {})
        figures = Figures(house.store, EventHub(), house.metrics, disk, health=health, keys=Keys(house.settings))
        await house.change("ALTER TABLE jobs RENAME TO elsewhere")
        await house.change("ALTER TABLE idempotency_keys RENAME TO nowhere")
        with structlog.testing.capture_logs() as lines:
            text = (await figures.text()).decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        for name in ('memvid_export_jobs{status="queued"}', "memvid_export_queue_depth", "memvid_export_dead_letters"):
            assert math.isnan(float(values[name])), name
        troubles = {part: float(values[f'memvid_export_trouble{{part="{part}"}}']) for part in ("database", "disk")}
        assert troubles == {"database": 1, "disk": 0}
        assert float(values["memvid_export_event_streams"]) == 0
        assert [line["reason"] for line in lines if line["event"] == "the jobs cannot be counted"] == [
            "OperationalError"
        ]

    ask(scenario)
