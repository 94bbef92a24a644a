"""The vector cache on one machine: what it spares, and that it never gives a wrong vector or fails an export."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from processes import REPOSITORY

from common.capsule.gate import Gate
from common.embedding.cache import CachedEmbedder, open_cache
from common.embedding.choice import Engines
from common.embedding.port import Embedded, Keep, Purpose
from common.embedding.static import StaticEmbedder
from common.errors import Canceled, InvalidSettings
from common.frames.build import frames
from common.graph.canonical import canonical
from common.graph.model import ExportRequest
from common.graph.read import read_graph
from common.pipeline import export as export_graph

GROUP = 512
LONG = "word " * 5_000


class Changed(StaticEmbedder):
    """The static engine under another model's name, or with the first values of its vectors alone."""

    def __init__(self, **changes: object) -> None:
        self.model = msgspec.structs.replace(StaticEmbedder.model, **changes)

    def embed(
        self,
        texts: Sequence[str],
        *,
        purpose: Purpose = "document",
        should_stop: Callable[[], None] = lambda: None,
        keep: Keep | None = None,
    ) -> Embedded:
        found = StaticEmbedder().embed(texts, purpose=purpose, should_stop=should_stop, keep=keep)
        vectors = found.vectors[:, : self.model.dimension]
        return found._replace(vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


class Export(msgspec.Struct):
    """What embedding the texts of one export came to."""

    vectors: bytes
    hits: int
    tokens: int
    truncated: list[int]
    trouble: str | None


def export(embedder: CachedEmbedder, texts: Sequence[str]) -> Export:
    """Embed as the pipeline does: group after group, and a flush."""
    done = [embedder.embed(texts[start : start + GROUP]) for start in range(0, len(texts), GROUP)]
    truncated = [number * GROUP + row for number, found in enumerate(done) for row in found.truncated]
    return Export(
        b"".join(found.vectors.tobytes() for found in done),
        sum(found.cache_hits for found in done),
        sum(found.tokens for found in done),
        truncated,
        embedder.flush(),
    )


def texts_of(path: Path, change: Callable[[ExportRequest], None] = lambda request: None) -> list[str]:
    """The texts of a graph, in the order of its frames."""
    request = read_graph(path)
    change(request)
    made = frames(canonical(request), generated_at="2026-01-02T00:00:00.000Z", layout="code-v1")
    return [frame.embed_text for frame in made if frame.embed_text is not None]


def change_one_percent(request: ExportRequest) -> None:
    """Give every hundredth node with a source another body and signature, as an edit does."""
    with_source = [node for node in request.nodes if node.properties.get("filePath")]
    for node in random.Random(7).sample(with_source, max(1, len(request.nodes) // 100)):
        node.properties["content"] = f"def {node.name}_of_late(self):\n    return 42\n"


@pytest.fixture(scope="module")
def graph(real_graphs: dict[str, Path]) -> Path:
    """The example graph."""
    return real_graphs["memvid-export.graph.ndjson.gz"]


@pytest.fixture(scope="module")
def texts(graph: Path) -> list[str]:
    """Its texts, the longest one last."""
    return [*texts_of(graph), LONG]


@pytest.fixture(scope="module")
def plain(texts: list[str]) -> bytes:
    """Their vectors without a cache."""
    return StaticEmbedder().embed(texts).vectors.tobytes()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the cache is."""
    return tmp_path / "cache" / "vectors.sqlite"


@pytest.fixture
def cached(file: Path) -> Iterator[Callable[..., CachedEmbedder]]:
    """Opens embedders over the cache."""
    opened = []

    def opens(engine: StaticEmbedder | None = None, max_bytes: int = 1 << 30) -> CachedEmbedder:
        cache = open_cache(Engines(cache=str(file), cache_bytes=max_bytes), None)
        assert cache is not None
        opened.append(CachedEmbedder(engine or StaticEmbedder(), cache))
        return opened[-1]

    yield opens
    for embedder in opened:
        embedder.close()


def test_a_repeat_with_one_percent_of_nodes_changed_takes_95_percent_from_the_cache(
    cached: Callable[..., CachedEmbedder], graph: Path
) -> None:
    first, changed = texts_of(graph), texts_of(graph, change_one_percent)
    assert sum(a != b for a, b in zip(first, changed, strict=True)) >= len(first) // 200
    export(cached(), first)
    repeat = export(cached(), changed)
    assert 0.95 * len(changed) <= repeat.hits < len(changed)
    assert repeat.vectors == StaticEmbedder().embed(changed).vectors.tobytes()
    assert repeat.trouble is None


def test_a_repeat_gives_the_same_bytes_and_reads_no_token(
    cached: Callable[..., CachedEmbedder], texts: list[str], plain: bytes
) -> None:
    first = export(cached(), texts)
    again = export(cached(), texts)
    assert first.vectors == again.vectors == plain
    assert first.tokens > 0
    assert (again.hits, again.tokens) == (len(texts), 0)
    assert first.truncated == again.truncated == [len(texts) - 1]


def test_equal_texts_of_one_call_are_embedded_once(cached: Callable[..., CachedEmbedder]) -> None:
    embedder = cached()
    found = embedder.embed(["a house", LONG, "a house", "a tree", "a house", LONG])
    once = StaticEmbedder().embed(["a house", LONG, "a tree"])
    assert found.tokens == once.tokens
    assert found.vectors.tobytes() == once.vectors[[0, 1, 0, 2, 0, 1]].tobytes()
    assert found.truncated == [1, 5]
    assert found.cache_hits == 0
    assert embedder.embed(["a tree", "a house", "a house"]).cache_hits == 3


def test_order_is_kept_where_only_some_are_known(
    cached: Callable[..., CachedEmbedder], texts: list[str], plain: bytes
) -> None:
    embedder = cached()
    embedder.embed(texts[::3])
    found = embedder.embed(texts)
    assert found.vectors.tobytes() == plain
    assert len(texts[::3]) <= found.cache_hits < len(texts)


def test_no_texts_are_no_vectors(cached: Callable[..., CachedEmbedder]) -> None:
    found = cached().embed([])
    assert found.vectors.shape == (0, 256)
    assert (found.tokens, found.truncated, found.batches, found.cache_hits) == (0, [], 0, 0)


def test_tokens_are_counted_of_what_the_cache_lacks(cached: Callable[..., CachedEmbedder], texts: list[str]) -> None:
    embedder = cached()
    assert embedder.count_tokens(texts) == StaticEmbedder().count_tokens(sorted(set(texts)))
    embedder.embed(texts[:1_000])
    rest = set(texts) - set(texts[:1_000])
    assert embedder.count_tokens(texts) == StaticEmbedder().count_tokens(sorted(rest)) > 0
    embedder.embed(texts)
    assert embedder.count_tokens(texts) == 0


def test_questions_are_not_kept(cached: Callable[..., CachedEmbedder]) -> None:
    embedder = cached()
    for _ in range(2):
        asked = embedder.embed(["where are the books"], purpose="query")
        assert (asked.cache_hits, asked.batches) == (0, 1)
    assert embedder.embed(["where are the books"]).cache_hits == 0


@pytest.mark.parametrize(
    "change",
    [
        {"provider": "torch"},
        {"name": "another"},
        {"revision": "0.4.1"},
        {"dimension": 128},
        {"precision": "bfloat16"},
        {"layout": "code-v1"},
        {"max_tokens": 512},
        # Joined without care these would be the same.
        {"provider": "static1", "name": "wordllama-l2-supercat-256"},
        {"provider": "static", "name": "1wordllama-l2-supercat-256"},
    ],
    ids=str,
)
def test_another_model_never_gets_a_vector_of_this_one(
    cached: Callable[..., CachedEmbedder], texts: list[str], change: dict[str, object]
) -> None:
    export(cached(), texts)
    export(cached(Changed(provider="static1")), texts[:10])
    other = Changed(**change)
    known = 10 if change.get("provider") == "static1" else 0
    found = export(cached(other), texts[:GROUP])
    assert found.hits == known
    assert found.vectors == other.embed(texts[:GROUP]).vectors.tobytes()
    assert export(cached(other), texts[:GROUP]).hits == GROUP


def test_a_price_is_not_part_of_the_key(cached: Callable[..., CachedEmbedder], texts: list[str]) -> None:
    export(cached(), texts[:10])
    assert export(cached(Changed(price_per_million_tokens=0.1)), texts[:10]).hits == 10


def test_two_threads_of_an_export_share_an_embedder(
    cached: Callable[..., CachedEmbedder], texts: list[str], plain: bytes
) -> None:
    embedder = cached()
    groups = [texts[start : start + 100] for start in range(0, len(texts), 100)]
    for turn in range(2):
        with ThreadPoolExecutor(2) as threads:
            done = list(threads.map(embedder.embed, groups))
        assert b"".join(found.vectors.tobytes() for found in done) == plain
        assert turn == 0 or sum(found.cache_hits for found in done) == len(texts)
    assert embedder.flush() is None


def test_a_repeat_export_is_byte_equal_and_its_report_tells_of_the_cache(
    cached: Callable[..., CachedEmbedder], graph: Path, file: Path, tmp_path: Path
) -> None:
    results = []
    with Gate() as gate:
        for turn, engine in enumerate([StaticEmbedder(), cached(), cached(), cached()]):
            if turn == 3:
                file.write_bytes(b"no cache" * 1_000)
            request = read_graph(graph)
            request.options.semantic_enabled = True
            results.append(
                export_graph(
                    request,
                    out_dir=tmp_path / str(turn),
                    gate=gate,
                    generated_at="2026-01-02T10:11:12.345Z",
                    embedder=engine,
                    on_progress=lambda _: None,
                    should_stop=lambda: None,
                )
            )
    assert len({result.capsule_paths[0].read_bytes() for result in results}) == 1
    reports = [result.report for result in results]
    assert reports[0].embedding.cache_hits == 0
    assert reports[2].embedding.cache_hits == reports[2].embedding.texts == reports[2].capsule.vectors
    assert reports[2].embedding.tokens == 0
    warnings = [[warning.code for warning in report.warnings] for report in reports]
    assert warnings[0] == warnings[1] == warnings[2]
    assert set(warnings[3]) - set(warnings[2]) == {"CACHE_UNAVAILABLE"}


# --- other processes ---------------------------------------------------------------------------------

WRITER = """
import random, sys
from pathlib import Path
from common.embedding.cache import CachedEmbedder, open_cache
from common.embedding.choice import Engines
from common.embedding.static import StaticEmbedder
embedder = CachedEmbedder(StaticEmbedder(), open_cache(Engines(cache=sys.argv[1]), None))
texts = Path(sys.argv[2]).read_text().split("\\0")
random.Random(sys.argv[3]).shuffle(texts)
for turn in range(int(sys.argv[4])):
    for start in range(0, len(texts), 64):
        embedder.embed([f"{turn} {text}" for text in texts[start : start + 64]])
        print(turn, start, flush=True)
    trouble = embedder.flush()
    if trouble:
        raise SystemExit(trouble)
embedder.close()
"""


def writer(file: Path, texts: list[str], seed: int, turns: int) -> subprocess.Popen[bytes]:
    """A process that embeds the texts in an order of its own."""
    source = file.parent.parent / "texts"
    source.write_text("\0".join(texts))
    command = [sys.executable, "-c", WRITER, str(file), str(source), str(seed), str(turns)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def check(file: Path) -> None:
    """SQLite finds nothing wrong with the file, and each vector has its place."""
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        orphans = "SELECT count(*) FROM {} WHERE place NOT IN (SELECT place FROM {})"
        assert database.execute(orphans.format("vectors", "records")).fetchone() == (0,)
        assert database.execute(orphans.format("records", "vectors")).fetchone() == (0,)


def test_processes_may_write_at_once(file: Path, texts: list[str], cached: Callable[..., CachedEmbedder]) -> None:
    some = texts[:800]
    processes = [writer(file, some, seed, 1) for seed in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    wanted = [f"0 {text}" for text in some]
    found = export(cached(), wanted)
    assert found.hits == len(wanted)
    assert found.vectors == StaticEmbedder().embed(wanted).vectors.tobytes()
    check(file)


def test_a_process_killed_while_it_writes_leaves_what_it_had_written(
    file: Path, texts: list[str], cached: Callable[..., CachedEmbedder]
) -> None:
    some = texts[:2_000]
    for seed in range(3):
        process = writer(file, some, seed, 100)
        assert process.stdout is not None
        for _ in range(5 + 7 * seed):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        random.Random(str(seed)).shuffle(shuffled := list(some))
        written = [f"0 {text}" for text in shuffled[: 64 * (5 + 7 * seed)]]
        found = export(cached(), written)
        assert found.hits == len(written)
        assert found.vectors == StaticEmbedder().embed(written).vectors.tobytes()
        assert found.trouble is None
    check(file)


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
from pathlib import Path
from common.embedding.cache import CachedEmbedder, open_cache
from common.embedding.choice import Engines
from common.embedding.static import StaticEmbedder
embedder = CachedEmbedder(StaticEmbedder(), open_cache(Engines(cache=sys.argv[1]), None))
texts = Path(sys.argv[2]).read_text().split("\\0")
found = [embedder.embed(texts[start : start + 200]) for start in range(0, len(texts), 200)]
assert b"".join(one.vectors.tobytes() for one in found) == StaticEmbedder().embed(texts).vectors.tobytes()
print(sum(one.cache_hits for one in found), embedder.flush())
"""


def test_a_full_disk_makes_an_export_slower_and_no_more(
    file: Path, texts: list[str], cached: Callable[..., CachedEmbedder], tmp_path: Path
) -> None:
    export(cached(), texts[:1_000])
    source = tmp_path / "texts"
    source.write_text("\0".join(texts))
    limit = str(file.stat().st_size + (1 << 18))
    command = [sys.executable, "-c", FULL_DISK, str(file), str(source), "0", limit]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    hits, _, trouble = done.stdout.partition(" ")
    assert int(hits) >= 1_000
    assert trouble.startswith("the vector cache could not be written: vectors.sqlite: ")
    assert export(cached(), texts).hits >= 1_000
    check(file)


# --- damage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["head", "middle", "all", "text"])
def test_a_damaged_file_is_set_aside_and_a_new_one_begun(
    where: str, file: Path, texts: list[str], plain: bytes, cached: Callable[..., CachedEmbedder]
) -> None:
    export(cached(), texts)
    size = file.stat().st_size
    with file.open("r+b") as damaged:
        damaged.seek({"head": 0, "middle": 16_384, "all": 0, "text": 0}[where])
        damaged.write(os.urandom({"head": 100, "middle": size // 2, "all": size, "text": 0}[where]))
        if where == "text":
            damaged.truncate(0)
            damaged.write(b"not a database at all\n" * 100)
    for _ in range(2):
        found = export(cached(), texts)
        assert found.vectors == plain
        if found.trouble:
            assert "vectors.sqlite.damaged" in found.trouble
    assert file.with_name("vectors.sqlite.damaged").exists()
    again = export(cached(), texts)
    assert again == Export(plain, len(texts), 0, [len(texts) - 1], None)
    check(file)


def test_a_damaged_file_that_cannot_be_set_aside_makes_an_export_slower_and_no_more(
    file: Path, texts: list[str], plain: bytes, cached: Callable[..., CachedEmbedder]
) -> None:
    file.parent.mkdir()
    file.write_bytes(b"not a database at all\n" * 1_000)
    file.with_name("vectors.sqlite.damaged").mkdir()
    found = export(cached(), texts)
    assert (found.vectors, found.hits) == (plain, 0)
    assert found.trouble is not None
    assert "vectors.sqlite: Is a directory" in found.trouble
    file.with_name("vectors.sqlite.damaged").rmdir()
    export(cached(), texts)
    assert export(cached(), texts).hits == len(texts)


def test_a_spoiled_vector_is_made_anew(
    file: Path, texts: list[str], plain: bytes, cached: Callable[..., CachedEmbedder]
) -> None:
    export(cached(), texts)
    with closing(sqlite3.connect(file)) as database, database:
        rows = database.execute("SELECT place, record FROM records ORDER BY place LIMIT 3").fetchall()
        spoiled = [rows[0][1][:-5] + b"\7" + rows[0][1][-4:], rows[1][1][:-1], bytes(32) + rows[2][1][32:]]
        for (place, _), record in zip(rows, spoiled, strict=True):
            database.execute("UPDATE records SET record = ? WHERE place = ?", (record, place))
    found = export(cached(), texts)
    assert found.vectors == plain
    assert len(texts) - 4 <= found.hits < len(texts)
    assert found.trouble == "2 vectors of the cache were damaged and were made anew"
    assert export(cached(), texts).hits == len(texts)


def test_a_cache_that_lost_its_clock_goes_on(
    file: Path, texts: list[str], plain: bytes, cached: Callable[..., CachedEmbedder]
) -> None:
    export(cached(), texts[:1_000])
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("DELETE FROM clock")
    for hits in (1_000, len(texts)):
        found = export(cached(), texts)
        assert (found.vectors, found.hits, found.trouble) == (plain, hits, None)


def test_a_database_of_something_else_is_left_as_it_is(
    file: Path, texts: list[str], cached: Callable[..., CachedEmbedder]
) -> None:
    file.parent.mkdir()
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE jobs (id)")
    before = file.read_bytes()
    found = export(cached(), texts[:10])
    assert found.vectors == StaticEmbedder().embed(texts[:10]).vectors.tobytes()
    assert found.trouble is not None
    assert "a database of something else" in found.trouble
    assert file.read_bytes() == before


def test_a_cache_that_cannot_be_made_is_told_once_per_export(
    tmp_path: Path, texts: list[str], plain: bytes, file: Path, cached: Callable[..., CachedEmbedder]
) -> None:
    file.parent.write_text("a file where a folder should be")
    embedder = cached()
    for _ in range(2):
        found = export(embedder, texts)
        assert found.vectors == plain
        assert found.trouble is not None
        assert found.trouble.count("vectors.sqlite") == 2  # it could not be read, nor written
    file.parent.unlink()
    assert export(embedder, texts).trouble is None
    assert export(embedder, texts).hits == len(texts)


def test_who_waits_for_a_locked_cache_can_stop(
    file: Path, texts: list[str], cached: Callable[..., CachedEmbedder]
) -> None:
    embedder = cached()
    embedder.embed(texts[:10])
    asked = threading.Event()

    def stop() -> None:
        asked.set()
        raise Canceled("no more")

    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Canceled):
            embedder.embed(texts[:20], should_stop=stop)
        other.execute("ROLLBACK")
    assert asked.is_set()


# --- the bound -----------------------------------------------------------------------------------------


def test_the_file_stays_within_its_bound_and_keeps_what_is_used(
    file: Path, texts: list[str], cached: Callable[..., CachedEmbedder]
) -> None:
    bound = 4 << 20
    embedder = cached(max_bytes=bound)
    used = texts[:300]
    for turn in range(5):
        assert export(embedder, used).hits >= (len(used) if turn else 0)
        found = export(embedder, [f"{turn} {text}" for text in texts[:1_500]])
        assert found.trouble is None
        assert file.stat().st_size <= bound
    newest = export(embedder, [f"4 {text}" for text in texts[:1_500]])
    assert newest.hits > 1_000
    assert export(embedder, [f"0 {text}" for text in texts[:1_500]]).hits == 0
    check(file)


def test_a_file_above_a_lowered_bound_shrinks(
    file: Path, texts: list[str], cached: Callable[..., CachedEmbedder]
) -> None:
    export(cached(), texts)
    before = file.stat().st_size
    embedder = cached(max_bytes=before // 2)
    for turn in range(8):
        assert export(embedder, [f"{turn} {text}" for text in texts[:GROUP]]).trouble is None
    assert file.stat().st_size <= before // 2
    check(file)


def test_settings_name_the_cache() -> None:
    assert open_cache(Engines(), None) is None
    for wrong in ("vectors.sqlite", "s3://bucket/cache/"):
        with pytest.raises(InvalidSettings):
            open_cache(Engines(cache=wrong), None)
