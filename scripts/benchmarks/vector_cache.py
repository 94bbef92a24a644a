"""The vector cache: how fast it is, and what a repeat export with 1% of its nodes changed takes from it."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from common.embedding.cache import CachedEmbedder, VectorCache, open_cache, space_of
from common.embedding.cache.port import seal
from common.embedding.choice import Engines
from common.embedding.port import Embedder
from common.embedding.static import StaticEmbedder
from common.errors import InvalidRequest
from common.frames.build import frames
from common.graph.canonical import canonical
from common.graph.read import read_graph
from common.storage import S3Config, Storage, StorageConfig, open_storage
from scripts.benchmarks.frames import DAY, ROOT, graphs
from scripts.benchmarks.storage import s3_server

MODEL = "all-MiniLM-L6-v2"
CHUNK = 4_096


class Rates(NamedTuple):
    """Vectors of 384 values a second, each way, and what a new process finds."""

    put: float
    get: float
    megabytes: float


class Repeat(NamedTuple):
    """Embedding a graph again, 1% of whose nodes have changed."""

    everything: float
    """Seconds without a cache."""
    again: float
    """Seconds with it, its flush included."""
    share: float
    """Of the vectors that came from the cache, in percent."""


@contextmanager
def places(folder: Path) -> Iterator[dict[str, tuple[Engines, Storage | None]]]:
    """An empty cache of each kind; the S3 server is on this machine."""
    folder.mkdir()
    with s3_server(folder / "s3") as server:
        os.environ.update(server.env)
        storage = open_storage(StorageConfig(roots=[], s3=S3Config(bucket=server.bucket, addressing="path")))
        storage.found(f"{server.url}/")  # it is connected then
        yield {
            "SQLite": (Engines(cache=str(folder / "vectors.sqlite")), None),
            "S3": (Engines(cache=f"{server.url}/vectors/"), storage),
        }


def rates(folder: Path, count: int) -> dict[str, Rates]:
    """Random vectors put, flushed, and read by another instance in the same order."""
    space = space_of(msgspec.structs.replace(StaticEmbedder.model, dimension=384))
    values = np.random.default_rng(5).standard_normal((count, 384)).astype(np.float32)
    keys = space.keys([f"text {number}" for number in range(count)])
    records = [seal(key, row.tobytes(), 0) for key, row in zip(keys, values, strict=True)]
    found = {}
    with places(folder) as caches:
        for name, place in caches.items():
            started = time.perf_counter()
            with closing(_opened(*place)) as cache:
                for start in range(0, count, CHUNK):
                    cache.put(space, records[start : start + CHUNK])
                cache.flush()
            put = time.perf_counter() - started
            started = time.perf_counter()
            with closing(_opened(*place)) as cache:
                got = sum(len(cache.get(space, keys[start : start + CHUNK])) for start in range(0, count, CHUNK))
            if got != count:
                raise SystemExit(f"{name}: {got:,} of {count:,} vectors were found")
            found[name] = Rates(count / put, count / (time.perf_counter() - started), sum(map(len, records)) / 1e6)
    return found


def engine(name: str) -> Embedder | None:
    """The engine ``static`` or ``torch`` (MiniLM on this machine's CPU); None where it is not installed."""
    if name == "static":
        return StaticEmbedder()
    try:
        from common.embedding.torch_engine import TorchEmbedder

        return TorchEmbedder(MODEL, Engines(devices=("cpu",)), layout="code-v1")
    except (ImportError, InvalidRequest):
        return None


def repeats(folder: Path, embedder: Embedder, graph: Path, rounds: int) -> tuple[int, float, dict[str, list[Repeat]]]:
    """Texts of the graph, seconds of the first export with an empty cache (SQLite), and repeats by kind of cache.

    Each of several rounds has other nodes changed and embeds everything without a cache too; a single one is compared
    with the first export.
    """
    before = _texts(graph, embedder.model.layout, None)
    embedder.embed(before[: embedder.group])
    first, found, source = 0.0, {}, embedder
    with places(folder) as caches:
        for name, place in caches.items():
            source = CachedEmbedder(source, _opened(*place))  # the second one is filled from the first
            seconds, _ = _seconds(source, before)
            first = first or seconds
            found[name] = []
            for seed in range(rounds):
                changed = _texts(graph, embedder.model.layout, seed)
                everything = _seconds(embedder, changed)[0] if rounds > 1 else first
                with closing(_opened(*place)) as cache:
                    again, hits = _seconds(CachedEmbedder(embedder, cache), changed)
                found[name].append(Repeat(everything, again, 100 * hits / len(changed)))
        source.close()
    return len(before), first, found


def _opened(engines: Engines, storage: Storage | None) -> VectorCache:
    cache = open_cache(engines, storage)
    assert cache is not None
    return cache


def _seconds(embedder: Embedder, texts: Sequence[str]) -> tuple[float, int]:
    """Seconds for texts in groups, as an export asks for them, and how many came from a cache."""
    started = time.perf_counter()
    hits = 0
    for start in range(0, len(texts), embedder.group):
        hits += embedder.embed(texts[start : start + embedder.group]).cache_hits
    trouble = embedder.flush()
    if trouble:
        raise SystemExit(trouble)
    return time.perf_counter() - started, hits


def _texts(path: Path, layout: str, seed: int | None) -> list[str]:
    """The texts of a graph; with a seed 1% of its nodes, among those with a source, have another body and signature."""
    request = read_graph(path)
    if seed is not None:
        nodes = [node for node in request.nodes if node.properties.get("filePath")]
        for node in random.Random(seed).sample(nodes, len(request.nodes) // 100):  # noqa: S311
            node.properties["content"] = f"def {node.name}_{seed}(self):\n    return {seed}\n"
    made = frames(canonical(request), generated_at=DAY, layout=layout)
    return [frame.embed_text for frame in made if frame.embed_text is not None]


def times_faster(found: Sequence[Repeat]) -> float:
    """Median of everything over again, turn by turn."""
    return statistics.median(one.everything / one.again for one in found)


def largest(*, short: bool) -> Path:
    """The largest graph here, or the example."""
    return ROOT / "examples" / "memvid-export.graph.ndjson.gz" if short else graphs()[0]
