"""Indexes follow the rows in the background, in a vector store or in files, and outlive what happens to either."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import numpy as np
import pytest
from live_server import Server
from nexus import brute_force
from nexus.index_conformance import clustered
from nexus.synced import meanwhile
from nexus.vectorizer_twin import Points, Twin
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from control_plane.jobs.database import Database
from control_plane.jobs.store import now_ms
from control_plane.nexus.index import name_of
from control_plane.nexus.indexing import SAVE_MOVES, SAVE_SECONDS, Indexing, Snapshots
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.records import Collection, NewDocument, Vector
from control_plane.nexus.space import Space
from control_plane.nexus.spaces import Spaces
from control_plane.nexus.store import EVERYTHING, CollectionStore
from control_plane.nexus.vectorizer import PREFIX, Vectorizer

DIMENSION = 16
WAIT_SECONDS = 30.0


@pytest.fixture
def twin() -> Iterator[Twin]:
    twin = Twin()
    with twin.running():
        yield twin


class Parts:
    """What a server has of collections, as far as indexes need it."""

    def __init__(self, database: Database, folder: Path, url: str | None) -> None:
        self.store = CollectionStore(database, replica="one")
        metrics = NexusMetrics(CollectorRegistry())
        self.server = Vectorizer(url, None, metrics, pause=0.05) if url else None
        self.spaces = Spaces(self.store, memory_bytes=1 << 28, mirrored=url is not None)
        self.snapshots = Snapshots(folder, metrics)
        self.indexing = Indexing(self.store, self.spaces, self.snapshots, self.server)

    async def write(self, collection: Collection, vectors: dict[str, Vector]) -> None:
        new = [NewDocument(one, one, "", {}, "", (), vector) for one, vector in vectors.items()]
        await self.store.write(collection, new, now=now_ms())

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The loop."""
        async with meanwhile(self.indexing.run()):
            yield


async def until(right: Callable[[], bool]) -> None:
    """Wait for something that comes soon."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not right():
            await asyncio.sleep(0.01)


def play(folder: Path, url: str | None, story: Callable[[Parts], Awaitable[None]]) -> None:
    """Play a story with the parts of a process that has begun."""

    async def inside() -> None:
        database = Database(f"sqlite+aiosqlite:///{folder / 'jobs.sqlite'}")
        parts = Parts(database, folder / "spaces", url)
        try:
            await database.migrate()
            await story(parts)
        finally:
            await database.close()
            if parts.server is not None:
                parts.server.close()

    asyncio.run(inside())


def drawn(seed: int, count: int) -> dict[str, Vector]:
    return {f"d{one}": vector for one, vector in enumerate(clustered(seed, count, clusters=5, dimension=DIMENSION))}


def inserted(twin: Twin) -> int:
    """Vectors that the server was told."""
    return sum(len(one.body["vectors"]) for one in twin.seen if one.path == "/insert_vectors")


def has(twin: Twin, name: str) -> Points:
    return twin.collections.get(PREFIX + name_of(name), Points(DIMENSION))


# --- in a vector store -----------------------------------------------------------------------------------------------


def test_the_server_holds_every_vector_of_every_space_and_nothing_else(twin: Twin, tmp_path: Path) -> None:
    names = f"red/own/{DIMENSION}", f"blue/own/{DIMENSION}"

    async def first(parts: Parts) -> None:
        red = (await parts.store.put_collection("red", "code", "own", DIMENSION))[0]
        blue = (await parts.store.put_collection("blue", "code", "own", DIMENSION))[0]
        await parts.write(red, drawn(1, 60))
        await parts.write(blue, drawn(2, 40))
        async with parts.running():
            await until(lambda: [len(has(twin, name).vectors) for name in names] == [60, 40])
            await parts.store.delete(red, ["d1", "d2"], now=now_ms())
            await parts.write(red, {"d3": drawn(3, 1)["d0"], "d60": drawn(3, 2)["d1"]})
            space = await parts.spaces.space(names[0])
            await until(lambda: len(has(twin, names[0]).vectors) == 59 and not space.catch_up(0))
            rows = {one.doc_id: one.id for one in await parts.store.get(red, ["d3", "d4"], EVERYTHING)}
            assert np.allclose(has(twin, names[0]).vectors[str(rows["d3"])], drawn(3, 1)["d0"], atol=1e-5)
        assert not space.in_use  # another replica may sync now
        assert inserted(twin) == 102

    play(tmp_path, twin.url, first)

    async def again(parts: Parts) -> None:
        twin.collections[PREFIX + name_of("gone/own/3")] = Points(3)
        red = (await parts.store.put_collection("red", "code", "own", DIMENSION))[0]
        await parts.store.delete(red, ["d5"], now=now_ms())
        await parts.write(red, {"d61": drawn(4, 1)["d0"]})
        async with parts.running():
            await until(lambda: len(twin.collections) == 2 and inserted(twin) == 103)
            await until(lambda: [len(has(twin, name).vectors) for name in names] == [59, 40])

    play(tmp_path, twin.url, again)


def test_a_server_that_is_away_gets_what_it_lacks_once_it_is_back(twin: Twin, tmp_path: Path) -> None:
    name = f"red/own/{DIMENSION}"

    async def story(parts: Parts) -> None:
        twin.answer = lambda _: None
        red = (await parts.store.put_collection("red", "code", "own", DIMENSION))[0]
        await parts.write(red, drawn(1, 60))
        async with parts.running():
            await until(lambda: len(twin.seen) > 1)
            space = await parts.spaces.space(name)
            question = drawn(5, 1)["d0"]
            rows = {one.doc_id: one.id for one in await parts.store.get(red, [*drawn(1, 60)], EVERYTHING)}
            vectors = {rows[one]: vector for one, vector in drawn(1, 60).items()}
            wanted = brute_force.search(vectors, question, 10)
            assert space.search(question, 10) == wanted
            twin.answer = twin.usual
            await until(lambda: len(has(twin, name).vectors) == 60)
            twin.collections.clear()
            await parts.write(red, {"d70": question})
            await parts.spaces.space(name)
            await until(lambda: len(has(twin, name).vectors) == 61)

    play(tmp_path, twin.url, story)


def test_a_whole_server_keeps_its_vectors_in_the_store_that_is_named(twin: Twin, tmp_path: Path) -> None:
    env = {"MEMVID_VECTORIZER_URL": twin.url, "MEMVID_VECTORIZER_API_KEY": "vk_0123"}
    with closing(Server(tmp_path / "root", env=env)) as server:
        server.start()
        assert server.client.put("/v1/collections/mine", json={"dimension": DIMENSION}).is_success
        body = {"documents": [{"id": one, "vector": vector.tolist()} for one, vector in drawn(1, 20).items()]}
        assert server.client.post("/v1/collections/mine/documents", json=body).is_success
        end = time.monotonic() + WAIT_SECONDS
        while sum(len(one.vectors) for one in twin.collections.values()) < 20:
            assert time.monotonic() < end
            time.sleep(0.02)
        server.stop()
    assert {one.headers["x-api-key"] for one in twin.seen} == {"vk_0123"}


# --- in files --------------------------------------------------------------------------------------------------------


def large(count: int = 3_000) -> Space:
    """A space that has an index."""
    space = Space(DIMENSION, exact_up_to=100)
    space.put(dict(enumerate(clustered(1, count, clusters=60, dimension=DIMENSION))))
    return space


def test_an_index_is_saved_when_much_has_changed_and_read_at_the_next_start(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "spaces", NexusMetrics(CollectorRegistry()))
    space = large()
    snapshots.restore("a", space)
    assert not space.in_use
    assert space.catch_up(10_000) == 0
    snapshots.save("a", space, 0)
    first = snapshots.path("a").read_bytes()
    fresh = clustered(2, SAVE_MOVES, clusters=60, dimension=DIMENSION)
    space.put(dict(enumerate(fresh[:10])))
    assert space.catch_up(10_000) == 0
    snapshots.save("a", space, 2 * SAVE_SECONDS)  # little has changed
    assert snapshots.path("a").read_bytes() == first
    space.put(dict(enumerate(fresh)))
    assert space.catch_up(10_000) == 0
    snapshots.save("a", space, 3 * SAVE_SECONDS)
    second = snapshots.path("a").read_bytes()
    assert second != first
    space.put(dict(enumerate(clustered(3, SAVE_MOVES, clusters=60, dimension=DIMENSION))))
    assert space.catch_up(10_000) == 0
    snapshots.save("a", space, 3.5 * SAVE_SECONDS)  # it was saved just now
    assert snapshots.path("a").read_bytes() == second
    again = large()
    again.put(dict(enumerate(fresh)))
    Snapshots(tmp_path / "spaces", NexusMetrics(CollectorRegistry())).restore("a", again)
    assert again.catch_up(0) == 0


def test_files_of_spaces_that_are_gone_are_deleted(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "spaces", NexusMetrics(CollectorRegistry()))
    snapshots.keep_only(["a"])  # there is no folder yet
    for name in ("a", "b"):
        space = large(1_200)
        snapshots.restore(name, space)
        space.catch_up(10_000)
        snapshots.save(name, space, 0)
    (tmp_path / "spaces" / f"{name_of('c')}.0123456789abcdef.index").write_bytes(b"half")
    snapshots.keep_only(["a"])
    assert {one.name.partition(".")[0] for one in (tmp_path / "spaces").iterdir()} == {name_of("a")}


def test_a_disk_that_is_full_costs_a_line_in_the_log(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    snapshots = Snapshots(tmp_path / "spaces", NexusMetrics(registry))
    space = large(1_200)
    snapshots.restore("a", space)
    space.catch_up(10_000)
    (tmp_path / "spaces").symlink_to("/dev/full")
    with capture_logs() as logs:
        snapshots.save("a", space, 0)
        snapshots.save("a", space, 1)  # it is not tried again at once
    assert [one["event"] for one in logs] == ["an index cannot be saved; the snapshot of before stays"]
    assert registry.get_sample_value("vectorizer_nexus_errors_total", {"code": "INDEX_NOT_SAVED"}) == 1
    (tmp_path / "spaces").unlink()
    snapshots.save("a", space, 2 * SAVE_SECONDS)
    assert large(1_200).restore(snapshots.path("a")) == 1_200


def test_what_a_server_saves_when_it_stops_is_there_when_it_starts(tmp_path: Path) -> None:
    name = f"red/own/{DIMENSION}"
    path = Snapshots(tmp_path / "spaces", NexusMetrics(CollectorRegistry())).path(name)
    path.parent.mkdir()
    (path.parent / name_of("gone")).write_bytes(b"of a space that is gone")

    async def story(parts: Parts) -> None:
        red = (await parts.store.put_collection("red", "code", "own", DIMENSION))[0]
        await parts.write(red, drawn(1, 5))
        space = await parts.spaces.space(name)
        space._exact_up_to = 4
        async with parts.running():
            await until(lambda: space.in_use)
            more = drawn(2, 1_300)
            for start in range(0, 1_300, 100):
                await parts.write(red, dict(list(more.items())[start : start + 100]))
            await parts.spaces.space(name)
            await until(lambda: not space.catch_up(0))
        await parts.indexing.save()
        await parts.indexing.save()

    play(tmp_path, None, story)
    assert not (path.parent / name_of("gone")).exists()
    assert path.exists()


def test_a_process_that_is_killed_while_it_saves_leaves_a_whole_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "spaces" / "one"
    code = f"""
        from pathlib import Path
        from nexus.index_conformance import clustered
        from control_plane.nexus.space import Space
        space = Space({DIMENSION}, exact_up_to=100)
        space.put(dict(enumerate(clustered(1, 3_000, clusters=60, dimension={DIMENSION}))))
        space.catch_up(10_000)
        while True:
            space.save(Path({str(path)!r}))
            print("saved", flush=True)
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(one for one in sys.path if one)}
    chance = np.random.default_rng(1)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, env=env)
        assert process.stdout is not None
        for _ in range(int(chance.integers(1, 4))):
            assert process.stdout.readline() == b"saved\n"
        time.sleep(chance.uniform(0, 0.02))  # at any moment of the next one
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        space = large()
        assert space.restore(path) == 3_000
        assert space.catch_up(0) == 0
    space.save(path)
    assert len(list(path.parent.iterdir())) == 2  # what was half is gone with the next one
