"""The direct layout, read back through memvid-sdk and compared with memvid-core's own commit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import memvid_export_native
import numpy as np
import pytest

from common.capsule.native import NativeWriter
from common.capsule.reader import CapsuleReader
from common.errors import CapacityExceeded, CapsuleUnreadable, StorageFailed, WriterFailed
from common.frames.model import Frame
from tests.capsule.conftest import frames_of, vectors_of

TIMESTAMP = 1_767_312_000
SYMBOLS = {"Function", "Method", "Class", "Struct", "Property", "Variable", "Const", "Interface", "Enum"}


def write(path: Path, frames: list[Frame], vectors: Any = None, batch: int = 512) -> Path:
    """Write a capsule in batches, as the pipeline does."""
    writer = NativeWriter().open(
        path,
        timestamp=TIMESTAMP,
        model="wordllama-l2-supercat-256" if vectors is not None else None,
        dimension=vectors.shape[1] if vectors is not None else None,
        expected_frames=len(frames),
    )
    row = 0
    for start in range(0, len(frames), batch):
        part = frames[start : start + batch]
        wanted = sum(frame.embed_text is not None for frame in part)
        writer.add(part, vectors[row : row + wanted] if vectors is not None else None)
        row += wanted
    writer.finish()
    return path


def one(uri: str = "mv2://nodes/a", text: str = "Node Function\nhello", **changed: Any) -> Frame:
    """A frame made by hand."""
    given = {"title": "Function: a", "track": "nodes/Function", "kind": "node", "tags": ["source=gitnexus"]}
    return Frame(**{**given, "uri": uri, "text": text, "metadata": "{}", **changed})


@pytest.fixture(
    scope="module",
    params=["memvid-export.graph.ndjson.gz", "runpod-python.export.json.gz", "litestar.export.json.gz"],
)
def written(
    request: pytest.FixtureRequest, real_graphs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Frame], Any]:
    """A capsule of a real graph with static vectors, and what went in."""
    if request.param not in real_graphs:
        pytest.skip(f"{request.param} lies only beside this repository")
    frames = frames_of(real_graphs[request.param])
    vectors = vectors_of(frames)
    return write(tmp_path_factory.mktemp("capsule") / "c.mv2", frames, vectors), frames, vectors


def test_every_frame_comes_back_by_uri_with_text_track_tags_and_metadata(
    written: tuple[Path, list[Frame], Any], memvid: Callable[[Path], Any]
) -> None:
    path, frames, _ = written
    memory = memvid(path)
    assert memory.stats()["active_frame_count"] == len(frames)
    for frame in frames:
        found = memory.frame(frame.uri)
        extra = found.get("extra_metadata", {})
        expected = json.loads(frame.extra)
        assert (found["title"], found["track"], found["tags"]) == (frame.title, frame.track, frame.tags)
        assert {
            key: extra[key] if type(value) is str else json.loads(extra[key]) for key, value in expected.items()
        } == expected
        assert extra.keys() == expected.keys()
        assert found["timestamp"] == TIMESTAMP
        assert memory.blob(frame.uri).decode() == frame.text


@pytest.mark.timeout(900)  # litestar: 13,698 searches
def test_every_vector_is_its_own_nearest_neighbour(
    written: tuple[Path, list[Frame], Any], memvid: Callable[[Path], Any]
) -> None:
    path, frames, vectors = written
    memory = memvid(path)
    embedded = [frame for frame in frames if frame.embed_text is not None]
    same_vector = defaultdict(set)  # texts with the same words have the same static vector
    for frame, vector in zip(embedded, vectors, strict=True):
        same_vector[vector.tobytes()].add(frame.uri)
    assert len(embedded) == len(vectors) > 500
    for frame, vector in zip(embedded, vectors, strict=True):
        hits = memory.find("", k=1, mode="sem", query_embedding=vector.tolist(), snippet_chars=80)["hits"]
        assert hits[0]["uri"] in same_vector[vector.tobytes()], frame.uri


@pytest.mark.timeout(900)  # litestar: 6,103 names
def test_lexical_search_finds_every_symbol_by_its_name(
    written: tuple[Path, list[Frame], Any], memvid: Callable[[Path], Any]
) -> None:
    path, frames, _ = written
    memory = memvid(path)
    wanted = defaultdict(set)
    for frame in frames:
        label, _, name = frame.title.partition(": ")
        if frame.kind == "node" and label in SYMBOLS and re.search(r"[A-Za-z0-9]", name):
            wanted[name].add(frame.uri)
    assert sum(map(len, wanted.values())) > 500
    for name, uris in wanted.items():
        hits = memory.find(f'"{name}"', k=len(frames), mode="lex", snippet_chars=80)["hits"]
        assert uris <= {hit["uri"] for hit in hits}, name


def test_the_reader_gives_back_what_was_written(written: tuple[Path, list[Frame], Any]) -> None:
    path, frames, vectors = written
    with CapsuleReader(path) as reader:
        read = [frame for batch in reader.all_frames() for frame in batch]
        places, rows = reader.vectors() or (np.empty(0), np.empty(0))
        model = reader.model
    assert read == [frame._replace(embed_text=None, extra="{}") for frame in frames]
    assert places.tolist() == [place for place, frame in enumerate(frames) if frame.embed_text is not None]
    assert np.array_equal(rows, vectors)
    assert model == "wordllama-l2-supercat-256"


def test_bytes_depend_on_neither_batches_nor_cores(
    example_frames: list[Frame], real_graphs: dict[str, Path], tmp_path: Path
) -> None:
    here = write(tmp_path / "a.mv2", example_frames, vectors_of(example_frames), batch=37).read_bytes()
    script = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from pathlib import Path; from tests.capsule.conftest import frames_of, vectors_of;"
        "from tests.capsule.test_native_writer import write;"
        "frames = frames_of(Path(sys.argv[1])); write(Path(sys.argv[2]), frames, vectors_of(frames))"
    )
    graph = real_graphs["memvid-export.graph.ndjson.gz"]
    subprocess.run([sys.executable, "-c", script, str(graph), str(tmp_path / "b.mv2")], check=True, timeout=120)
    assert (tmp_path / "b.mv2").read_bytes() == here


def _hits(memory: Any, query: str) -> dict[str, tuple[float, tuple[Any, ...]]]:
    """The best hits by uri; without the last group of equal scores, of which memvid shows some."""
    hits = memory.find(query, k=30, mode="lex")["hits"]
    last = hits[-1]["score"] * (1 + 1e-6) if len(hits) == 30 else 0
    shown = ("snippet", "title", "track", "tags", "matches")
    return {hit["uri"]: (hit["score"], tuple(hit[key] for key in shown)) for hit in hits if hit["score"] > last}


def test_memvid_core_s_own_commit_answers_every_probe_alike(
    example_frames: list[Frame], tmp_path: Path, memvid: Callable[[Path], Any]
) -> None:
    frames = example_frames
    vectors = vectors_of(frames)
    theirs_path = shutil.copy(write(tmp_path / "ours.mv2", frames, vectors), tmp_path / "theirs.mv2")
    memvid_export_native.memvid_core_commit(theirs_path)
    assert theirs_path.read_bytes() != (tmp_path / "ours.mv2").read_bytes()
    ours, theirs = memvid(tmp_path / "ours.mv2"), memvid(theirs_path)
    words = {word for frame in frames[::7] for word in re.findall(r"[A-Za-z_]{4,}", frame.text)[:12]}
    queries = sorted(words)[:400]
    names = [frame.title.partition(": ")[2].replace('"', "") for frame in frames[::11] if frame.kind == "node"]
    queries += [f'"{name}"' for name in names if re.search(r"\w", name)]
    queries += ["track:nodes/Function", "tag:source=gitnexus", "export AND graph", "NOT function"]
    found = 0
    for query in queries:
        left, right = (_hits(memory, query) for memory in (ours, theirs))
        assert left.keys() == right.keys(), query
        for uri, (score, shown) in left.items():
            # Sums of float32 in another order of segments: the last bit may differ.
            assert right[uri] == (pytest.approx(score, rel=1e-6), shown), (query, uri)
        found += len(left)
    assert found > 1_000
    for vector in vectors[::9]:
        left, right = (
            [
                (hit["uri"], hit["score"])
                for hit in memory.find("", k=10, mode="sem", query_embedding=vector.tolist())["hits"]
            ]
            for memory in (ours, theirs)
        )
        assert left == right


def test_a_payload_over_the_capacity_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(1)
    writer = NativeWriter().open(tmp_path / "c.mv2", timestamp=0, model=None, dimension=None, expected_frames=100)
    frames = [one(f"mv2://nodes/{i}", noise.bytes(400_000).hex()) for i in range(140)]

    def write_all() -> None:
        writer.add(frames, None)
        writer.finish()

    with pytest.raises(CapacityExceeded, match="52428800"):
        write_all()
    writer.abort()


@pytest.mark.parametrize(
    ("rows", "message"),
    [(np.zeros((2, 8), np.float32), "shape"), (np.zeros((1, 7), np.float32), "takes 8"), (None, None)],
)
def test_vectors_must_fit_the_frames(tmp_path: Path, rows: Any, message: str | None) -> None:
    writer = NativeWriter().open(tmp_path / "c.mv2", timestamp=0, model="m", dimension=8, expected_frames=1)
    frame = one()._replace(embed_text="a")
    if message is None:
        with pytest.raises(WriterFailed, match="vector"):
            writer.add([frame], rows)
    else:
        with pytest.raises((WriterFailed, ValueError), match=message):
            writer.add([frame], rows)
    writer.abort()


def test_a_finished_writer_takes_nothing_more(tmp_path: Path) -> None:
    writer = NativeWriter().open(tmp_path / "c.mv2", timestamp=0, model=None, dimension=None, expected_frames=1)
    writer.add([one()], None)
    writer.finish()
    with pytest.raises(WriterFailed, match="already finished"):
        writer.add([one()], None)
    writer.abort()


def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises((StorageFailed, WriterFailed), match=r"c\.mv2"):
        NativeWriter().open(tmp_path / "none" / "c.mv2", timestamp=0, model=None, dimension=None, expected_frames=1)


@pytest.mark.parametrize("damage", ["cut", "payload", "vectors", "toc", "foreign", "empty", "missing"])
def test_a_damaged_capsule_is_refused_by_name(example_frames: list[Frame], tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "c.mv2", example_frames, vectors_of(example_frames))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "payload":
        data[70_000] ^= 0xFF
        path.write_bytes(data)
    elif damage == "vectors":
        data[data.index(np.ascontiguousarray(vectors_of(example_frames)[500]).tobytes())] ^= 0xFF
        path.write_bytes(data)
    elif damage == "toc":
        data[-200] ^= 0xFF
        path.write_bytes(data)
    elif damage == "foreign":
        path.write_bytes(b"PK\x03\x04" * 4_000)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()

    def read_all() -> None:
        with CapsuleReader(path) as reader:
            list(reader.all_frames())
            reader.vectors()

    with pytest.raises(CapsuleUnreadable, match=r"c\.mv2"):
        read_all()


def test_a_capsule_that_is_cut_while_it_is_open_ends_in_an_error(example_frames: list[Frame], tmp_path: Path) -> None:
    path = write(tmp_path / "c.mv2", example_frames, vectors_of(example_frames))
    with CapsuleReader(path) as reader:
        assert reader.frames(0, 1)
        os.truncate(path, path.stat().st_size // 2)
        for read in (lambda: reader.frames(len(example_frames) - 1, 1), reader.vectors, reader.verify):
            with pytest.raises(CapsuleUnreadable, match="cut"):
                read()
