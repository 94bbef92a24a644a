"""The vector cache in object storage: shared by workers, few requests, and never a wrong vector or a failed export."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from processes import REPOSITORY, free_port
from services import S3

from common.embedding.cache import CachedEmbedder
from common.embedding.cache.storage import MERGE_FROM, TOUCH_SECONDS, StorageCache
from common.embedding.static import StaticEmbedder
from common.frames.build import frames
from common.graph.canonical import canonical
from common.graph.read import read_graph
from common.storage import FileStorage, Storage, StorageConfig, open_storage

GROUP = 512
FULL = 1 << 20
"""Bytes of a full segment here: some 980 vectors."""


class Counted:
    """A storage that counts what is asked of it."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self.asked = storage, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.asked[name] += 1
        return getattr(self._storage, name)


class Place(NamedTuple):
    """Where a cache is."""

    storage: Storage
    prefix: str

    def names(self) -> list[str]:
        """The names of its objects, without their folders."""
        return [found.ref.rpartition("/")[2] for found in self.storage.found(self.prefix)]

    def sizes(self) -> list[int]:
        """The sizes of its segments."""
        return [found.size for found in self.storage.found(self.prefix) if found.size]


Opens = Callable[..., CachedEmbedder]


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty prefix of a folder, and of an S3 server."""
    if request.param == "file":
        return _files(tmp_path)
    server: S3 = request.getfixturevalue("s3")
    return Place(open_storage(server.config()), f"{server.url}/{tmp_path.name}/vectors/")


@pytest.fixture
def files(tmp_path: Path) -> Place:
    """An empty prefix of a folder."""
    return _files(tmp_path)


def _files(folder: Path) -> Place:
    return Place(FileStorage([folder]), (folder / "vectors").as_uri() + "/")


@pytest.fixture
def opens() -> Iterator[Opens]:
    """Opens embedders over caches, each as another worker would."""
    opened: list[CachedEmbedder] = []

    def make(place: Place, max_bytes: int = 1 << 30, storage: Any = None) -> CachedEmbedder:
        cache = StorageCache(storage or place.storage, place.prefix, max_bytes, segment_bytes=FULL)
        opened.append(CachedEmbedder(StaticEmbedder(), cache))
        return opened[-1]

    yield make
    for embedder in opened:
        embedder.close()


@pytest.fixture(scope="module")
def texts(real_graphs: dict[str, Path]) -> list[str]:
    """Texts of the example graph, in the order of its frames."""
    graph = canonical(read_graph(real_graphs["memvid-export.graph.ndjson.gz"]))
    made = frames(graph, generated_at="2026-01-02T00:00:00.000Z", layout="code-v1")
    return [frame.embed_text for frame in made if frame.embed_text is not None][:2_200]


class Export(NamedTuple):
    """What embedding the texts of one export came to."""

    right: bool
    """The vectors are those of the engine, byte by byte."""
    hits: int
    trouble: str | None


def export(embedder: CachedEmbedder, texts: Sequence[str]) -> Export:
    """Embed as the pipeline does: group after group, and a flush."""
    done = [embedder.embed(texts[start : start + GROUP]) for start in range(0, len(texts), GROUP)]
    vectors = b"".join(found.vectors.tobytes() for found in done)
    return Export(vectors == _plain(texts), sum(found.cache_hits for found in done), embedder.flush())


_known: dict[str, bytes] = {}


def _plain(texts: Sequence[str]) -> bytes:
    """The vectors of the engine, each made once."""
    missing = [text for text in texts if text not in _known]
    for text, vector in zip(missing, StaticEmbedder().embed(missing).vectors, strict=True):
        _known[text] = vector.tobytes()
    return b"".join(_known[text] for text in texts)


def changed(texts: Sequence[str], seed: int, share: float = 0.01) -> list[str]:
    """The texts, one percent of them another."""
    some = set(random.Random(seed).sample(range(len(texts)), int(share * len(texts))))
    return [f"{text} {seed}" if place in some else text for place, text in enumerate(texts)]


def test_another_worker_takes_from_the_cache_what_one_has_embedded(
    place: Place, opens: Opens, texts: list[str]
) -> None:
    assert export(opens(place), texts).right
    again = export(opens(place), texts)
    assert again == Export(True, len(texts), None)
    repeat = export(opens(place), changed(texts, 1))
    assert repeat.right
    assert 0.95 * len(texts) <= repeat.hits < len(texts)
    assert opens(place).count_tokens(changed(texts, 1)) == 0


def test_an_export_makes_few_requests(place: Place, opens: Opens, texts: list[str]) -> None:
    first = Counted(place.storage)
    export(opens(place, storage=first), texts)
    segments = len(place.sizes())
    assert segments == 3  # 2.3 MB of vectors
    assert first.asked == {"found": 2, "put": segments}

    repeat = Counted(place.storage)
    worker = opens(place, storage=repeat)
    export(worker, texts)
    # A key table each, and the two blocks of 1 MiB that a segment of 1 MiB and a table touches.
    assert repeat.asked["read"] <= 3 * segments
    assert repeat.asked["found"] == 1
    assert sum(repeat.asked.values()) == repeat.asked["read"] + 1

    before = repeat.asked.copy()
    export(worker, texts)
    assert repeat.asked - before == {"found": 1}

    before = repeat.asked.copy()
    export(worker, changed(texts, 1))
    assert repeat.asked - before == {"found": 2, "put": 1}


def test_rows_come_in_longer_and_longer_runs(files: Place, opens: Opens, texts: list[str]) -> None:
    many = [f"{turn} {text}" for turn in range(5) for text in texts]
    cache = StorageCache(files.storage, files.prefix, 1 << 30)
    writer = CachedEmbedder(StaticEmbedder(), cache)
    export(writer, many)
    writer.close()
    (size,) = files.sizes()
    counted = Counted(files.storage)
    assert export(opens(files, storage=counted), many) == Export(True, len(many), None)
    assert counted.asked["read"] <= 1 + 7 < size >> 20


def test_full_segments_are_written_before_the_end(place: Place, opens: Opens, texts: list[str]) -> None:
    embedder = opens(place)
    embedder.embed(texts)
    # The first upload is done when the second one starts.
    assert 1 <= len(place.sizes()) <= 2
    assert max(place.sizes()) < FULL + 20_000
    # What is in no segment yet is known all the same.
    assert embedder.embed(texts[-50:]).cache_hits == 50
    embedder.flush()
    assert len(place.sizes()) == 3


def test_workers_may_write_at_once(place: Place, opens: Opens, texts: list[str]) -> None:
    workers = [opens(place) for _ in range(4)]
    shares = [texts[start : start + 1_500] for start in range(0, 800, 200)]
    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(export, workers, shares))
    assert all(one.right and one.trouble is None for one in done)
    assert export(opens(place), texts[:2_100]) == Export(True, 2_100, None)


def test_many_small_segments_become_one(place: Place, opens: Opens, texts: list[str]) -> None:
    worker = opens(place)
    some = texts[:400]
    export(worker, some)
    for turn in range(3 * MERGE_FROM):
        assert export(worker, changed(some, turn)).trouble is None
    small = [size for size in place.sizes() if size < FULL // 4]
    assert 1 <= len(small) <= MERGE_FROM
    for reader in (worker, opens(place)):
        for turn in range(0, 3 * MERGE_FROM, 5):
            assert export(reader, changed(some, turn)) == Export(True, len(some), None)


def test_what_another_worker_removed_meanwhile_is_made_anew(place: Place, opens: Opens, texts: list[str]) -> None:
    export(opens(place), texts)
    reader = opens(place)
    assert reader.embed(texts[:10]).cache_hits == 10
    place.storage.delete(place.prefix)
    found = export(reader, texts)
    assert found.right
    assert found.hits < len(texts)  # what was fetched before is still there
    assert found.trouble is None
    assert export(opens(place), texts).right


def test_what_another_worker_merged_meanwhile_is_found(place: Place, opens: Opens, texts: list[str]) -> None:
    worker = opens(place)
    for turn in range(MERGE_FROM):
        export(worker, texts[turn * 20 : turn * 20 + 20])
    reader = opens(place)
    assert reader.count_tokens(texts[: MERGE_FROM * 20]) == 0  # it has the key tables
    export(worker, texts[1_000:1_010])
    assert len(place.sizes()) == 1
    assert export(reader, texts[: MERGE_FROM * 20]) == Export(True, MERGE_FROM * 20, None)


def test_the_bound_holds_and_what_is_used_stays(files: Place, opens: Opens, texts: list[str]) -> None:
    bound, aged = 4 << 20, set[str]()
    for turn in range(5):
        worker = opens(files, bound)
        assert export(worker, texts).hits >= (len(texts) if turn else 0)
        found = export(worker, [f"{turn} {text}" for text in texts[:1_000]])
        assert found.trouble is None
        assert sum(files.sizes()) <= bound
        for stored in files.storage.found(files.prefix):
            if stored.ref not in aged:
                _age(stored.ref, (9 - turn) * TOUCH_SECONDS)
                aged.add(stored.ref)
    assert export(opens(files, bound), [f"0 {text}" for text in texts[:1_000]]).hits == 0


def test_last_use_is_written_down_once_a_day(files: Place, opens: Opens, texts: list[str]) -> None:
    export(opens(files), texts)
    assert files.names().count("used") == 0
    for stored in files.storage.found(files.prefix):
        _age(stored.ref, 2 * TOUCH_SECONDS)
    for _ in range(2):
        counted = Counted(files.storage)
        export(opens(files, storage=counted), texts)
        assert files.names().count("used") == len(files.sizes())
    assert counted.asked["write"] == 0


def _age(ref: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(ref.removeprefix("file://"), (then, then))


def test_a_spoiled_vector_is_made_anew(files: Place, opens: Opens, texts: list[str]) -> None:
    export(opens(files), texts)
    paths = [Path(found.ref.removeprefix("file://")) for found in files.storage.found(files.prefix)]
    for path in paths:
        data = bytearray(path.read_bytes())
        data[-700] ^= 1
        path.write_bytes(data)
    found = export(opens(files), texts)
    assert found.right
    assert found.trouble == "3 vectors of the cache were damaged and were made anew"
    assert export(opens(files), texts) == Export(True, len(texts), None)


@pytest.mark.parametrize("damage", ["table", "short", "empty"])
def test_a_damaged_segment_is_removed(damage: str, files: Place, opens: Opens, texts: list[str]) -> None:
    export(opens(files), texts)
    path = Path(files.storage.found(files.prefix)[0].ref.removeprefix("file://"))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes({"table": data, "short": data[:-1], "empty": b""}[damage])
    found = export(opens(files), texts)
    assert found.right
    assert found.hits >= 1_200
    assert found.trouble is not None
    assert "1 segments" in found.trouble
    assert "were damaged and are removed" in found.trouble
    assert export(opens(files), texts) == Export(True, len(texts), None)


def test_a_store_that_is_away_makes_an_export_slower_and_no_more(
    s3: S3, opens: Opens, texts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prefix = f"{s3.url}/{tmp_path.name}/vectors/"
    with monkeypatch.context() as away:
        away.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
        storage = open_storage(s3.config())
        found = export(opens(Place(storage, prefix)), texts)
    assert found.right
    assert found.hits < 20  # those that are equal to one that waits to be written
    assert found.trouble is not None
    assert "could not be read" in found.trouble
    assert "could not be written" in found.trouble
    assert s3.env["AWS_SECRET_ACCESS_KEY"] not in found.trouble


def test_a_prefix_that_may_not_be_used_is_told(opens: Opens, texts: list[str], tmp_path: Path) -> None:
    storage = open_storage(StorageConfig(roots=[str(tmp_path)]))
    found = export(opens(Place(storage, "s3://another/vectors/")), texts[:10])
    assert found.right
    assert found.trouble is not None
    assert "could not be read" in found.trouble


def test_what_was_paid_for_is_there_for_others_at_once(place: Place, opens: Opens, texts: list[str]) -> None:
    class Priced(StaticEmbedder):
        model = msgspec.structs.replace(StaticEmbedder.model, price_per_million_tokens=0.13)

    def opened() -> CachedEmbedder:
        return CachedEmbedder(Priced(), StorageCache(place.storage, place.prefix, 1 << 30))

    with closing(opened()) as paying, closing(opened()) as other:
        paying.embed(texts[:300])  # whose worker may be killed now
        assert other.embed(texts[:400]).cache_hits == 300
        assert paying.flush() is None
        assert export(paying, texts[:400]) == Export(True, 400, None)


KILLED = """
import json, sys
from pathlib import Path
from common.embedding.cache import CachedEmbedder
from common.embedding.cache.storage import StorageCache
from common.embedding.static import StaticEmbedder
from common.storage import FileStorage
cache = StorageCache(FileStorage([Path(sys.argv[1])]), sys.argv[2], 1 << 30, segment_bytes=1 << 18)
embedder = CachedEmbedder(StaticEmbedder(), cache)
texts = Path(sys.argv[3]).read_text().split("\\0")
for turn in range(100):
    for start in range(0, len(texts), 100):
        embedder.embed([f"{turn} {text}" for text in texts[start : start + 100]])
        print(turn, start, flush=True)
    embedder.flush()
"""


def test_a_worker_killed_while_it_writes_leaves_a_usable_cache(
    files: Place, opens: Opens, texts: list[str], tmp_path: Path
) -> None:
    source = tmp_path / "texts"
    source.write_text("\0".join(texts[:1_000]))
    command = [sys.executable, "-c", KILLED, str(tmp_path), files.prefix, str(source)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(17):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first, second = ([f"{turn} {text}" for text in texts[:1_000]] for turn in range(2))
    assert export(opens(files), first) == Export(True, 1_000, None)
    found = export(opens(files), second)
    assert (found.right, found.trouble) == (True, None)
    assert export(opens(files), second).hits == 1_000
