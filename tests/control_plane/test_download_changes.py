"""Files that change, go or differ while they are asked for: what a client gets then, and what is noted."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_hostile_requests import _Client, _finished, _store

from common.capsule.gate import Gate
from common.contract import Manifest
from common.errors import StorageFailed
from common.storage import FileStorage
from control_plane.errors import ArtifactMissing
from control_plane.exports.downloads import MAX_COMPARED, Artifact, Download, Downloads, Kind
from control_plane.jobs.holds import Holds
from control_plane.jobs.records import JobRecord
from control_plane.jobs.store import JobStore
from control_plane.operations.metrics import Metrics
from control_plane.operations.shares import Shares
from tests.test_pipeline import run, small


class Watched(FileStorage):
    """Tells how often a file was read from its beginning, and does something before the first piece is given."""

    reads = 0
    meanwhile: Callable[[], None] | None = None

    def read(self, ref: str, start: int, length: int) -> Iterator[bytes]:
        self.reads += 1
        for piece in super().read(ref, start, length):
            if self.meanwhile is not None:
                self.meanwhile()
                self.meanwhile = None
            yield piece


class House(NamedTuple):
    """A finished export and what gives out its files."""

    store: JobStore
    storage: Watched
    downloads: Downloads
    metrics: Metrics
    job: JobRecord
    files: dict[Kind, Path]

    def artifact(self, kind: Kind) -> Artifact:
        data = self.files[kind].read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        return Artifact(kind, self.files[kind].as_uri(), self.files[kind].name, "text/plain", len(data), sha256)

    async def get(self, artifact: Artifact, **headers: str) -> tuple[int, bytes, bool]:
        """Status, body, and whether the answer came to its end."""
        client = _Client(1_000)
        await Download(self.downloads, self.job, artifact, headers)(client.scope, client.receive, client.send)
        start, *bodies = client.got
        body = b"".join(message["body"] for message in bodies)
        return start["status"], body, bool(bodies) and not bodies[-1]["more_body"]

    def damage(self, kind: Kind) -> float:
        return float(self.metrics.damage.labels(kind)._value.get())

    async def noted(self) -> str | None:
        """What is wrong with the files of the job, as far as the store knows."""
        job = await self.store.get(self.job.id)
        assert job is not None
        return job.damage


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Kind, tuple[str, bytes]], Manifest]:
    with Gate() as gate:
        result = run(small(6), tmp_path_factory.mktemp("made"), gate)
    paths: dict[Kind, Path] = {
        "capsule": result.capsule_paths[0],
        "sidecar": result.sidecar_path,
        "manifest": result.manifest_path,
    }
    return {kind: (path.name, path.read_bytes()) for kind, path in paths.items()}, result.manifest


@pytest.fixture
def house(tmp_path: Path, made: tuple[dict[Kind, tuple[str, bytes]], Manifest]) -> Any:
    files, manifest = made
    (tmp_path / "files").mkdir()
    paths = {kind: tmp_path / "files" / name for kind, (name, _) in files.items()}
    for kind, path in paths.items():
        path.write_bytes(files[kind][1])

    @asynccontextmanager
    async def opened() -> AsyncIterator[House]:
        async with _store(tmp_path) as (store, _):
            metrics, storage = Metrics(), Watched([tmp_path / "files"])
            shares = Shares("downloads", 10, metrics, several=False)
            downloads = Downloads(storage, store, holds=Holds(store), metrics=metrics, shares=shares)
            job = dataclasses.replace(await _finished(store), manifest=manifest)
            yield House(store, storage, downloads, metrics, job, paths)

    return opened


def replaced(path: Path) -> None:
    """The same bytes, in another file."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def test_who_asks_at_once_gets_a_file_that_was_compared_once(house: Any) -> None:
    async def check() -> None:
        async with house() as at:
            artifact = at.artifact("capsule")
            answers = await asyncio.gather(*(at.get(artifact, range="bytes=0-9") for _ in range(8)))
            assert answers == [(206, at.files["capsule"].read_bytes()[:10], True)] * 8
            assert at.storage.reads == 1 + 8

    asyncio.run(check())


def test_a_file_that_is_replaced_while_it_is_compared_is_not_given_out_yet(house: Any) -> None:
    async def check() -> None:
        async with house() as at:
            artifact = at.artifact("capsule")
            at.storage.meanwhile = lambda: replaced(at.files["capsule"])
            with pytest.raises(StorageFailed, match="was replaced while it was read"):
                await at.get(artifact)
            assert (await at.noted(), at.damage("capsule")) == (None, 0)
            assert await at.get(artifact) == (200, at.files["capsule"].read_bytes(), True)

    asyncio.run(check())


def test_a_file_that_is_replaced_while_it_is_sent_ends_the_connection(house: Any) -> None:
    async def check() -> None:
        async with house() as at:
            artifact = at.artifact("capsule")
            assert (await at.get(artifact))[2]
            at.storage.meanwhile = lambda: replaced(at.files["capsule"])
            status, _, whole = await at.get(artifact)
            assert (status, whole) == (200, False)
            assert await at.get(artifact) == (200, at.files["capsule"].read_bytes(), True)

    asyncio.run(check())


def test_a_file_that_is_removed_while_it_is_sent_is_sent_to_its_end(house: Any) -> None:
    async def check() -> None:
        async with house() as at:
            artifact, content = at.artifact("capsule"), at.files["capsule"].read_bytes()
            assert (await at.get(artifact))[2]
            at.storage.meanwhile = at.files["capsule"].unlink
            assert await at.get(artifact) == (200, content, True)
            with pytest.raises(ArtifactMissing, match="not where it should be"):
                await at.get(artifact)

    asyncio.run(check())


@pytest.mark.parametrize("content", [b"{", b"\xff", b"{}", b""])
def test_a_manifest_that_is_none_is_damage(house: Any, content: bytes) -> None:
    async def check() -> None:
        async with house() as at:
            artifact = at.artifact("manifest")
            at.files["manifest"].write_bytes(content)
            with pytest.raises(ArtifactMissing, match="not the one that was published"):
                await at.get(artifact)
            assert at.damage("manifest") == 1
            assert artifact.file_name in str(await at.noted())

    asyncio.run(check())


def test_damage_is_counted_once_for_a_capsule_and_each_time_for_a_sidecar(house: Any) -> None:
    async def check() -> None:
        async with house() as at:
            kinds: list[Kind] = ["capsule", "sidecar"]
            given = {kind: at.artifact(kind) for kind in kinds}
            for kind in kinds:
                content = at.files[kind].read_bytes()
                at.files[kind].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            for kind in kinds * 2:
                with pytest.raises(ArtifactMissing, match="SHA-256 differs"):
                    await at.get(given[kind])
            assert (at.damage("capsule"), at.damage("sidecar")) == (1, 2)
            assert "capsule" in str(await at.noted())

    asyncio.run(check())


def test_the_files_compared_last_are_remembered(house: Any) -> None:
    async def check() -> None:
        async with house() as at:
            artifact = at.artifact("capsule")
            others = [artifact._replace(ref=f"file:///{number}") for number in range(MAX_COMPARED)]
            for other in others:
                at.downloads.remember(other, "tag")
            assert at.downloads.known(others[0], "tag")
            at.downloads.remember(artifact, "tag")
            assert [at.downloads.known(one, "tag") for one in (others[0], others[1], artifact)] == [True, False, True]

    asyncio.run(check())


class Broken(_Client):
    """A connection that fails in a way that nobody foresaw."""

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            raise RuntimeError("nobody foresaw this")
        await super().send(message)


def test_what_nobody_foresaw_reaches_the_server_s_log(house: Any) -> None:
    async def check() -> None:
        async with house() as at:
            client = Broken(10)
            with pytest.raises(RuntimeError, match="nobody foresaw this"):
                await Download(at.downloads, at.job, at.artifact("capsule"), {})(
                    client.scope, client.receive, client.send
                )
            assert at.downloads.shares.taken == 0

    asyncio.run(check())
