"""The whole export through its one door."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from common.capsule.capacity import COARSE
from common.capsule.gate import Gate
from common.capsule.native import NativePartWriter, NativeWriter
from common.capsule.port import CapsuleWriter
from common.capsule.reader import CapsuleReader
from common.contract import Manifest, Progress, WriterName
from common.embedding.choice import Choice
from common.embedding.port import Embedder
from common.embedding.static import StaticEmbedder
from common.errors import (
    Canceled,
    CapacityExceeded,
    EmbeddingRefused,
    GateFailed,
    InvalidRequest,
    StorageFailed,
    WriterFailed,
    WriterUnavailable,
)
from common.frames.model import Frame
from common.graph.model import ExportRequest
from common.graph.read import read_graph
from common.pipeline import ExportResult, export
from common.progress import MARKS
from common.sidecar.open import Sidecar
from common.sidecar.rebuild import capsule_sha256, rebuild
from tests.left_behind import nothing_left

EXAMPLE = "memvid-export.graph.ndjson.gz"
NOW = "2026-01-02T10:11:12.345Z"
ALL_STAGES = ["transform", "frame_prep", "write_capsule", "build_sidecar", "finalize", "download_ready"]


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with Gate() as running:
        yield running


@pytest.fixture(scope="session")
def example(real_graphs: dict[str, Path]) -> Path:
    return real_graphs[EXAMPLE]


def run(
    source: Path | ExportRequest,
    out_dir: Path,
    gate: Gate,
    *,
    vectors: bool = False,
    engine: Embedder | None = None,
    now: str = NOW,
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], None] = lambda: None,
    **more: Any,
) -> ExportResult:
    """Export as the command line and the worker do."""
    return export(
        read_graph(source) if isinstance(source, Path) else source,
        out_dir=out_dir,
        gate=gate,
        generated_at=now,
        embedder=StaticEmbedder() if vectors else engine,
        on_progress=on_progress,
        should_stop=should_stop,
        **more,
    )


def small(count: int = 40, **more: Any) -> ExportRequest:
    """A graph made by hand: functions that call the next one."""
    return request_of(
        {
            "nodes": [{"id": f"n{i:05}", "label": "Function", "properties": {"name": f"do_{i}"}} for i in range(count)],
            "relationships": [
                {"id": f"r{i:05}", "sourceId": f"n{i:05}", "targetId": f"n{(i + 1) % count:05}", "type": "CALLS"}
                for i in range(count)
            ],
            **more,
        }
    )


def request_of(document: dict[str, Any]) -> ExportRequest:
    """A request as it is read from bytes."""
    import io

    return read_graph(io.BytesIO(json.dumps(document).encode()))


def content(folder: Path) -> set[str]:
    """Everything in a folder, hidden things too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def meta_of(sidecar: Path) -> dict[str, str]:
    """What a sidecar says of itself."""
    with closing(sqlite3.connect(sidecar)) as db:
        return dict(db.execute("SELECT * FROM meta"))


def frames_in(path: Path) -> list[Frame]:
    with CapsuleReader(path) as reader:
        return [frame for batch in reader.all_frames() for frame in batch]


def codes(result: ExportResult) -> dict[str, int]:
    return {warning.code: warning.count for warning in result.report.warnings}


# --- what is published ------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", [False, True])
def test_the_report_and_the_manifest_say_what_lies_in_the_folder(
    example: Path, tmp_path: Path, gate: Gate, vectors: bool
) -> None:
    told: list[Progress] = []
    with nothing_left():
        result = run(example, tmp_path, gate, vectors=vectors, on_progress=told.append)
    report, manifest = result.report, result.manifest
    assert msgspec.json.decode(result.manifest_path.read_bytes(), type=Manifest).parts == manifest.parts
    name = result.capsule_paths[0].name
    assert name == "graph-gitnexus-mem_capsule-2026-01-02.mv2"
    assert content(tmp_path) == {name, f"{name}.index.v1.sqlite", f"{name}.manifest.json"}
    (part,) = manifest.parts
    capsule, sidecar = result.capsule_paths[0], result.sidecar_path
    assert (part.file_name, part.size_bytes, part.sha256) == (name, capsule.stat().st_size, sha256(capsule))
    assert (manifest.sidecar_file_name, manifest.sidecar_size_bytes) == (sidecar.name, sidecar.stat().st_size)
    assert manifest.sidecar_sha256 == report.sidecar.sha256 == sha256(sidecar)
    assert manifest.capsule_sha256 == report.capsule.sha256 == sha256(capsule) == meta_of(sidecar)["capsule_sha256"]
    assert report.capsule.size_bytes == capsule.stat().st_size

    frames = frames_in(capsule)
    kinds = [frame.kind for frame in frames]
    assert manifest.frames == report.capsule.frames == len(frames)
    assert report.capsule.relation_frames == kinds.count("relation")
    assert report.capsule.node_frames == len(kinds) - kinds.count("relation") - kinds.count("meta")
    with CapsuleReader(capsule) as reader:
        found = reader.vectors()
    assert report.capsule.vectors == manifest.vectors == part.vectors == (0 if found is None else len(found[0]))
    assert (report.capsule.vectors > 500) == vectors
    assert report.embedding.texts == report.capsule.vectors
    assert report.capsule.dimension == (256 if vectors else None)
    assert report.writer == "native"
    assert report.input.sha256 == sha256(example)
    assert report.versions.memvid_core
    assert report.versions.memvid_export


def test_warnings_of_reading_ordering_and_frames_come_together(tmp_path: Path, gate: Gate) -> None:
    at = {"filePath": "a.py", "startLine": 1, "endLine": 2}
    node = {"id": "n", "label": "Function", "properties": {"name": "gone", **at}}
    relation = {"id": "r", "sourceId": "n", "targetId": "nowhere", "type": "CALLS"}
    graph = {"nodes": [node, node], "relationships": [relation], "fileContents": {"a.py": "def other():\n    pass\n"}}
    found = codes(run(request_of(graph), tmp_path, gate))
    assert found == {"CONFIDENCE_MISSING": 1, "DANGLING_RELATION": 1, "DUPLICATE_NODE": 1, "SNIPPET_NOT_FOUND": 1}


def test_progress_goes_through_the_stages_and_never_falls(example: Path, tmp_path: Path, gate: Gate) -> None:
    told: list[Progress] = []
    run(example, tmp_path, gate, vectors=True, on_progress=told.append)
    stages = [progress.stage for progress in told]
    assert sorted(set(stages), key=stages.index) == ALL_STAGES
    assert [list(MARKS).index(stage) for stage in stages] == sorted(list(MARKS).index(stage) for stage in stages)
    assert [p.progress for p in told] == sorted(p.progress for p in told)
    assert (told[0].progress, told[-1].progress) == (5, 100)
    for progress in told:
        assert MARKS[progress.stage][0] <= progress.progress <= MARKS[progress.stage][1]
        assert progress.message
    assert len(told) < 400


def test_the_sidecar_can_be_made_again_from_the_capsule(example: Path, tmp_path: Path, gate: Gate) -> None:
    result = run(example, tmp_path / "out", gate)
    rebuild(result.capsule_paths, tmp_path / "again.sqlite")
    assert (tmp_path / "again.sqlite").read_bytes() == result.sidecar_path.read_bytes()


# --- the same graph gives the same bytes ------------------------------------------------------------------


def shuffled(request: ExportRequest, seed: int) -> ExportRequest:
    """The same graph in another order."""
    order = random.Random(seed)
    nodes, relations, files = list(request.nodes), list(request.relations), list(request.files.items())
    for items in (nodes, relations, files):
        order.shuffle(items)
    return msgspec.structs.replace(request, nodes=nodes, relations=relations, files=dict(files))


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("name", [EXAMPLE, "runpod-python.export.json.gz"])
def test_a_shuffled_graph_gives_equal_bytes(
    real_graphs: dict[str, Path], tmp_path: Path, gate: Gate, name: str, vectors: bool
) -> None:
    if name not in real_graphs:
        pytest.skip(f"{name} lies only beside this repository")
    first = run(real_graphs[name], tmp_path / "a", gate, vectors=vectors)
    again = run(
        shuffled(read_graph(real_graphs[name]), 7), tmp_path / "b", gate, vectors=vectors, now=NOW[:11] + "23:59:59Z"
    )
    assert again.report.capsule.content_digest == first.report.capsule.content_digest
    assert again.capsule_paths[0].read_bytes() == first.capsule_paths[0].read_bytes()
    assert again.sidecar_path.read_bytes() == first.sidecar_path.read_bytes()


def test_every_form_of_a_raw_graph_gives_equal_bytes(example: Path, tmp_path: Path, gate: Gate) -> None:
    lines = [json.loads(line) for line in gzip.decompress(example.read_bytes()).splitlines()]
    kinds = {"nodes": "node", "relationships": "relationship"}
    document = {key: [line["data"] for line in lines if line["type"] == kind] for key, kind in kinds.items()}
    plain = json.dumps(document).encode()
    edges = json.dumps({"nodes": document["nodes"], "edges": document["relationships"]}).encode()
    stream = b"".join(json.dumps(line).encode() + b"\n" for line in reversed(lines))
    forms = {
        "json": plain,
        "json.gz": gzip.compress(plain),
        "json.zst": zstandard.compress(plain),
        "edges": edges,
        "ndjson": stream,
        "ndjson.gz": gzip.compress(stream),
        "ndjson.zst": zstandard.compress(stream),
    }
    made = set()
    for form, data in forms.items():
        path = tmp_path / f"graph.{form}"
        path.write_bytes(data)
        result = run(path, tmp_path / f"out-{form}", gate)
        made.add((sha256(result.capsule_paths[0]), sha256(result.sidecar_path), result.manifest.content_digest))
    assert len(made) == 1


# --- an end before the end ---------------------------------------------------------------------------------


def stopping_at(call: int, error: type[Exception] = Canceled) -> Callable[[], None]:
    """A ``should_stop`` that raises at its n-th call."""
    calls = iter(range(1, 1 << 30))

    def should_stop() -> None:
        if next(calls) >= call:
            raise error("stop")

    return should_stop


@pytest.mark.parametrize("vectors", [False, True])
def test_a_cancel_at_any_call_leaves_nothing(example: Path, tmp_path: Path, gate: Gate, vectors: bool) -> None:
    calls: list[int] = []
    request = read_graph(example)
    run(request, tmp_path / "whole", gate, vectors=vectors, should_stop=lambda: calls.append(1))
    assert len(calls) > 5
    for call in sorted({1, 2, 3, 4, 5, *range(6, len(calls), max(1, len(calls) // 8))}):
        out = tmp_path / "canceled"
        gate.start()  # a cancel while it worked has ended its process
        with nothing_left():
            try:
                run(request, out, gate, vectors=vectors, should_stop=stopping_at(call))
            except Canceled:
                assert content(out) == set()
            else:
                assert call >= len(calls) // 2  # waiting makes calls too, so their number differs a little
                for path in out.iterdir():
                    path.unlink()


@pytest.mark.parametrize("stage", ALL_STAGES[:-1])
def test_an_error_of_whom_progress_is_told_leaves_nothing(
    example: Path, tmp_path: Path, gate: Gate, stage: str
) -> None:
    def tell(progress: Progress) -> None:
        if progress.stage == stage:
            raise Canceled("the client has gone")

    with nothing_left(), pytest.raises(Canceled):
        run(example, tmp_path / "out", gate, vectors=True, on_progress=tell)
    assert not (tmp_path / "out").exists() or content(tmp_path / "out") == set()


def test_a_failing_embedder_ends_the_export_with_its_own_error(example: Path, tmp_path: Path, gate: Gate) -> None:
    class Failing(StaticEmbedder):
        def embed(self, texts: Any, **_: Any) -> Any:
            raise InvalidRequest("no model")

    with nothing_left(), pytest.raises(InvalidRequest, match="no model"):
        export(
            read_graph(example),
            out_dir=tmp_path,
            gate=gate,
            generated_at=NOW,
            embedder=Failing(),
            on_progress=lambda _: None,
            should_stop=lambda: None,
        )
    assert content(tmp_path) == set()


def test_an_engine_that_raises_a_timeout_of_the_system_ends_the_export_too(tmp_path: Path, gate: Gate) -> None:
    class Late(StaticEmbedder):
        def embed(self, texts: Any, **_: Any) -> Any:
            raise TimeoutError(110, "Connection timed out")

    with nothing_left(), pytest.raises(StorageFailed, match="timed out"):
        run(small(), tmp_path, gate, engine=Late())
    assert content(tmp_path) == set()


# --- a set is replaced whole --------------------------------------------------------------------------------


def test_a_second_export_of_the_day_replaces_the_set_whole(tmp_path: Path, gate: Gate) -> None:
    (tmp_path / "graph-gitnexus-mem_capsule-2026-01-01.mv2").write_text("of another day")
    (tmp_path / "graph-gitnexus-mem_capsule-2026-01-02.partly.mv2").write_text("of somebody else")
    others = content(tmp_path)
    parts = run(small(2_000), tmp_path, gate, capacity=180_000)
    assert len(parts.capsule_paths) > 2
    for request, more in ((small(30), {}), (small(2_000), {"capacity": 180_000}), (small(50), {})):
        result = run(request, tmp_path, gate, **more)
        named = {part.file_name for part in result.manifest.parts}
        assert content(tmp_path) - others == named | {result.sidecar_path.name, result.manifest_path.name}
        assert {part.file_name: part.sha256 for part in result.manifest.parts} == {
            path.name: sha256(path) for path in result.capsule_paths
        }
        assert sha256(result.sidecar_path) == result.manifest.sidecar_sha256


# --- parts --------------------------------------------------------------------------------------------------


def test_over_the_capacity_the_frames_lie_in_parts_each_once(example: Path, tmp_path: Path, gate: Gate) -> None:
    capacity = 170_000
    whole = frames_in(run(example, tmp_path / "whole", gate).capsule_paths[0])
    told: list[Progress] = []
    result = run(example, tmp_path / "parts", gate, vectors=True, capacity=capacity, on_progress=told.append)
    paths = result.capsule_paths
    assert len(paths) == result.report.capsule.parts > 3
    assert [path.name for path in paths] == [part.file_name for part in result.manifest.parts]
    assert [path.name[-11:] for path in paths] == [f".part{n:03}.mv2"[-11:] for n in range(1, len(paths) + 1)]
    assert "CAPACITY_UNDERESTIMATED" not in codes(result)
    read = [frames_in(path) for path in paths]
    assert all(part[:5] == whole[:5] for part in read)
    assert [frame for part in read for frame in part[5:]] == whole[5:]
    assert [part.frames for part in result.manifest.parts] == [len(part) for part in read]
    assert result.manifest.frames == sum(len(part) for part in read)
    assert result.manifest.vectors == sum(part.vectors for part in result.manifest.parts) > 500
    assert [p.progress for p in told] == sorted(p.progress for p in told)

    assert result.manifest.capsule_sha256 == capsule_sha256(paths) == meta_of(result.sidecar_path)["capsule_sha256"]
    with closing(Sidecar.open(result.sidecar_path)) as sidecar:
        counts = sidecar.counts()
        place = next(i for i, frame in enumerate(read[2]) if frame.kind != "meta")
        position = sidecar.position(2, place)
        assert sidecar.locate(position) == (2, place)
    with closing(Sidecar.open(run(example, tmp_path / "one", gate, vectors=True).sidecar_path)) as one:
        assert {k: v for k, v in one.counts().items() if k in ("nodes", "edges")} == {
            k: v for k, v in counts.items() if k in ("nodes", "edges")
        }
    rebuild(paths, tmp_path / "again.sqlite")
    assert (tmp_path / "again.sqlite").read_bytes() == result.sidecar_path.read_bytes()


def heavy_between(count: int) -> ExportRequest:
    """A graph whose sampled nodes are light and whose others are heavy."""
    noise = random.Random(3)
    stride = (count + 1) // COARSE
    nodes = [
        {
            "id": f"n{i:05}",
            "label": "Function",
            "properties": {"name": f"f{i}", **({"blob": noise.randbytes(300).hex()} if i % stride else {})},
        }
        for i in range(count)
    ]
    return request_of(
        {"nodes": nodes, "relationships": [{"sourceId": "n00000", "targetId": "n00001", "type": "CALLS"}]}
    )


def test_an_estimate_that_is_too_low_leads_to_another_plan(tmp_path: Path, gate: Gate) -> None:
    result = run(heavy_between(3_000), tmp_path, gate, capacity=1_000_000)
    assert codes(result)["CAPACITY_UNDERESTIMATED"] >= 1
    assert len(result.capsule_paths) > 1
    read = [frame.uri for path in result.capsule_paths for frame in frames_in(path)[5:]]
    assert read == sorted(set(read), key=read.index)
    assert len(read) == 3_001
    assert {part.file_name for part in result.manifest.parts} < content(tmp_path)


def test_a_capacity_that_no_plan_keeps_is_an_error_of_its_own(tmp_path: Path, gate: Gate) -> None:
    with nothing_left(), pytest.raises(CapacityExceeded):
        run(small(), tmp_path, gate, capacity=70_000)
    assert content(tmp_path) == set()


# --- writers ------------------------------------------------------------------------------------------------


class Breaking(NativeWriter):
    """A writer whose file breaks after so many batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self._batches = batches

    def open(self, path: Path, **more: Any) -> NativePartWriter:  # type: ignore[override]
        part, batches = super().open(path, **more), self._batches

        class Part(NativePartWriter):
            def __init__(self) -> None:
                self._added = 0

            def add(self, frames: Any, vectors: Any) -> None:
                if self._added == batches:
                    raise WriterFailed("the medium broke")
                self._added += 1
                part.add(frames, vectors)

            def finish(self) -> None:
                part.finish()

            def abort(self) -> None:
                part.abort()

        return Part()


def missing() -> CapsuleWriter:
    raise WriterUnavailable("it is not built here")


@pytest.mark.parametrize("first", [missing, lambda: Breaking(0), lambda: Breaking(2)])
@pytest.mark.parametrize("vectors", [False, True])
def test_the_next_writer_takes_over_and_the_report_says_so(
    example: Path, tmp_path: Path, gate: Gate, first: Callable[[], CapsuleWriter], vectors: bool
) -> None:
    writers: dict[WriterName, Callable[[], CapsuleWriter]] = {"sdk": first, "native": NativeWriter}
    with nothing_left():
        result = run(example, tmp_path / "a", gate, vectors=vectors, writers=writers)
    assert codes(result)["WRITER_FALLBACK"] == 1
    straight = run(example, tmp_path / "b", gate, vectors=vectors)
    assert "WRITER_FALLBACK" not in codes(straight)
    assert result.capsule_paths[0].read_bytes() == straight.capsule_paths[0].read_bytes()
    assert result.report.embedding.texts == straight.report.embedding.texts


def test_when_no_writer_can_the_error_names_them_all(tmp_path: Path, gate: Gate) -> None:
    writers: dict[WriterName, Callable[[], CapsuleWriter]] = {"native": missing, "sdk": lambda: Breaking(1)}
    with nothing_left(), pytest.raises(WriterFailed, match=r"native: it is not built here; sdk: the medium broke"):
        run(small(), tmp_path, gate, writers=writers)
    assert content(tmp_path) == set()


def test_a_wished_writer_has_no_stand_in(tmp_path: Path, gate: Gate) -> None:
    with pytest.raises(WriterUnavailable):
        run(small(), tmp_path, gate, writer="native", writers={"native": missing, "sdk": NativeWriter})


def test_a_writer_that_loses_a_frame_is_not_published(tmp_path: Path, gate: Gate) -> None:
    class Losing(NativeWriter):
        def open(self, path: Path, **more: Any) -> NativePartWriter:  # type: ignore[override]
            part = super().open(path, **more)
            add = part.add
            part.add = lambda frames, vectors: add(frames[:-1], vectors)  # type: ignore[method-assign]
            return part

    with nothing_left(), pytest.raises(GateFailed) as failed:
        run(small(), tmp_path, gate, writers={"native": Losing})
    assert failed.value.details["probe"] == "frame_count"
    assert content(tmp_path) == set()


# --- folders and disks ----------------------------------------------------------------------------------------


def test_a_missing_folder_is_made(tmp_path: Path, gate: Gate) -> None:
    result = run(small(), tmp_path / "a" / "b", gate)
    assert result.manifest_path.parent == tmp_path / "a" / "b"


def test_a_file_in_the_place_of_the_folder_is_a_storage_error(tmp_path: Path, gate: Gate) -> None:
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        with nothing_left(), pytest.raises(StorageFailed, match="output folder"):
            run(small(), out, gate)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path, gate: Gate) -> None:
    folder = Path("/proc/self") if os.geteuid() == 0 else tmp_path / "locked"
    if os.geteuid() != 0:
        folder.mkdir(mode=0o500)
    with nothing_left(), pytest.raises(StorageFailed, match="output folder"):
        run(small(), folder, gate)


def test_a_folder_in_the_place_of_a_file_leaves_nothing_half(tmp_path: Path, gate: Gate) -> None:
    blocked = tmp_path / "graph-gitnexus-mem_capsule-2026-01-02.mv2.index.v1.sqlite"
    (blocked / "mine").mkdir(parents=True)
    with nothing_left(), pytest.raises(StorageFailed):
        run(small(), tmp_path, gate)
    assert content(tmp_path) == {blocked.name, f"{blocked.name}/mine"}


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from common.capsule.gate import Gate
from common.errors import StorageFailed
from tests.left_behind import child_pids
from tests.test_pipeline import content, run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
out, graph = Path(sys.argv[2]), Path(sys.argv[3])
with Gate() as gate:
    before = child_pids()
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
    try:
        run(graph, out, gate, vectors=True)
    except StorageFailed as error:
        assert error.retryable
        assert content(out) == set(), content(out)
        assert child_pids() == before
        print("storage failed:", error.message)
    else:
        print("published")
"""


@pytest.mark.parametrize("limit", [2_000, 20_000, 80_000, 250_000, 360_000, 700_000, 1_500_000])
def test_a_full_disk_is_a_storage_error_and_leaves_nothing(example: Path, tmp_path: Path, limit: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(limit), str(tmp_path / "out"), str(example)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("storage failed")
    assert "memvid-sdk" not in done.stdout  # another writer would not find more room


# --- odd requests -----------------------------------------------------------------------------------------------


def test_a_path_in_the_base_name_stays_in_the_folder(tmp_path: Path, gate: Gate) -> None:
    request = small(source={"type": "local", "baseName": "../../etc/pass wd%20\\x", "displayName": "x"})
    result = run(request, tmp_path / "out", gate)
    assert result.capsule_paths[0].name == "etc-pass wd%20-x-gitnexus-mem_capsule-2026-01-02.mv2"
    assert content(tmp_path) == {"out", *(f"out/{name}" for name in content(tmp_path / "out"))}
    assert len(content(tmp_path / "out")) == 3


def test_a_maximum_cuts_and_says_so(tmp_path: Path, gate: Gate) -> None:
    result = run(small(300, options={"maxNodeFrames": 100, "maxRelationFrames": 20}), tmp_path, gate)
    assert (result.report.capsule.node_frames, result.report.capsule.relation_frames) == (100, 20)
    assert (result.report.left_out.nodes, result.report.left_out.relationships) == (200, 280)
    assert len(frames_in(result.capsule_paths[0])) == 125


@pytest.mark.parametrize("files", [{}, None, {"a.py": ""}])
def test_no_file_contents_are_no_obstacle(tmp_path: Path, gate: Gate, files: object) -> None:
    result = run(small(3, fileContents=files), tmp_path, gate, vectors=True)
    assert result.report.capsule.vectors == 3


def test_one_node_without_any_text_is_enough(tmp_path: Path, gate: Gate) -> None:
    node = {"id": "🙂", "label": "Function", "properties": {}}
    request = request_of({"nodes": [node], "relationships": [{"sourceId": "🙂", "targetId": "gone", "type": "CALLS"}]})
    result = run(request, tmp_path, gate, vectors=True)
    assert result.report.capsule.frames == 7
    assert {"DANGLING_RELATION", "NODE_WITHOUT_NAME"} <= codes(result).keys()


# --- what is embedded, and what it may cost -------------------------------------------------------


class Priced(StaticEmbedder):
    """The static engine, as if a provider asked a price for it; counts what it was asked to embed."""

    model = msgspec.structs.replace(StaticEmbedder.model, provider="openai", price_per_million_tokens=1_000.0)
    group = 7

    def __init__(self) -> None:
        self.texts = 0

    def embed(self, texts: Any, **more: Any) -> Any:
        self.texts += len(texts)
        return super().embed(texts, **more)


@pytest.mark.parametrize("ceiling", [{"max_tokens": 10}, {"max_usd": 0.01}])
def test_an_export_above_its_ceiling_is_refused_with_the_estimate_before_the_first_call(
    tmp_path: Path, gate: Gate, ceiling: dict[str, Any]
) -> None:
    engine = Priced()
    with nothing_left(), pytest.raises(EmbeddingRefused) as caught:
        run(small(), tmp_path, gate, engine=engine, choice=Choice(**ceiling))
    assert engine.texts == 0
    details = caught.value.details
    assert details["tokens"] == 300
    assert details["costEstimate"] == pytest.approx(details["tokens"] / 1_000)
    assert "300 tokens" in caught.value.message


def test_an_export_at_its_ceiling_is_made_and_the_report_has_what_it_cost(tmp_path: Path, gate: Gate) -> None:
    engine = Priced()
    report = run(small(), tmp_path, gate, engine=engine, choice=Choice(max_tokens=300, max_usd=0.30)).report
    assert engine.texts == 40
    assert (report.embedding.texts, report.embedding.tokens, report.embedding.cost_estimate) == (40, 300, 0.30)


def test_an_engine_that_reads_more_than_it_said_is_stopped(tmp_path: Path, gate: Gate) -> None:
    class Understating(Priced):
        def count_tokens(self, texts: Any) -> int:
            return len(texts)

    engine = Understating()
    with nothing_left(), pytest.raises(EmbeddingRefused, match="has read"):
        run(small(4_000), tmp_path, gate, engine=engine, choice=Choice(max_tokens=4_000))
    assert engine.texts < 4_000


def test_relationships_have_vectors_where_they_are_asked_for(tmp_path: Path, gate: Gate) -> None:
    def vectors(folder: str, **more: Any) -> tuple[int, int]:
        report = run(small(), tmp_path / folder, gate, vectors=True, **more).report
        return report.capsule.vectors, report.embedding.texts

    assert vectors("default") == (40, 40)
    assert vectors("all", choice=Choice(what=("nodes", "relations"))) == (80, 80)
    assert vectors("none", choice=Choice(what=("communities",))) == (0, 0)


def test_what_a_first_writer_that_failed_had_embedded_is_counted_in_the_cost(tmp_path: Path, gate: Gate) -> None:
    class Failing(NativeWriter):
        def open(self, *arguments: Any, **more: Any) -> Any:
            part = super().open(*arguments, **more)

            class Part(NativePartWriter):
                def finish(self) -> None:
                    raise WriterFailed("no")

            part.__class__ = Part
            return part

    engine = Priced()
    writers: dict[WriterName, Callable[[], CapsuleWriter]] = {"native": Failing, "sdk": NativeWriter}
    report = run(small(), tmp_path, gate, engine=engine, writers=writers).report
    assert (engine.texts, report.embedding.texts) == (80, 40)
    assert report.embedding.tokens == 600
