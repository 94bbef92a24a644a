"""What an export says and counts while it works, on graphs so small that every figure is known."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from left_behind import nothing_left
from test_pipeline import NOW, Priced, codes, content, frames_in, gate, meta_of, missing, run, sha256, small

from common.capsule.gate import Gate
from common.capsule.native import NativePartWriter, NativeWriter
from common.capsule.port import CapsuleWriter
from common.capsule.reader import CapsuleReader
from common.contract import Progress, WriterName
from common.embedding.choice import Choice
from common.embedding.port import Embedded
from common.embedding.static import StaticEmbedder
from common.errors import (
    Canceled,
    CapacityExceeded,
    EmbeddingRefused,
    InvalidRequest,
    StorageFailed,
    WriterFailed,
    WriterUnavailable,
)
from common.sidecar.open import Sidecar
from common.sidecar.rebuild import rebuild

__all__ = ["gate"]

PARTS = 180_000
"""Bytes of one file that make several parts of ``small(1_500)``."""


class Noting(Priced):
    """An engine that notes what it is asked, and how often at once."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.calls: list[list[str]] = []
        self.most = self._inside = 0
        self._pause = pause
        self._lock = threading.Lock()

    def embed(self, texts: Any, **more: Any) -> Any:
        with self._lock:
            self.calls.append(list(texts))
            self._inside += 1
            self.most = max(self.most, self._inside)
        time.sleep(self._pause)
        try:
            return super().embed(texts, **more)
        finally:
            with self._lock:
                self._inside -= 1


def test_every_step_is_told_with_its_figures(tmp_path: Path, gate: Gate) -> None:
    told: list[Progress] = []
    run(small(40), tmp_path, gate, on_progress=told.append)
    probes = told[-2].meta["probes"]
    assert probes > 20
    assert [(p.stage, p.progress, p.stage_progress, p.message, p.meta) for p in told] == [
        ("transform", 5, 0, "Reading the graph of graph", {}),
        ("transform", 20, 100, "Ordered 40 nodes and 40 relationships", {"nodes": 40, "relationships": 40}),
        ("frame_prep", 45, 100, "Prepared 85 of 85 frames", {"frames": 85, "texts": 0}),
        ("write_capsule", 65, 30, "Writing 85 frames", {"frames": 85}),
        ("write_capsule", 79, 100, "Wrote 85 frames", {"frames": 85}),
        ("build_sidecar", 79, 0, "Building the index for reading", {}),
        ("finalize", 90, 0, "Reading the capsule back to prove it", {}),
        ("finalize", 95, 90, f"{probes} probes held; publishing", {"probes": probes}),
        ("download_ready", 100, 100, "The capsule is ready", {}),
    ]


def test_the_steps_of_parts_and_batches_add_up(tmp_path: Path, gate: Gate) -> None:
    told: list[Progress] = []
    result = run(small(1_500), tmp_path, gate, capacity=PARTS, on_progress=told.append)
    parts = result.manifest.parts
    assert len(parts) == len(result.capsule_paths) == 4
    name = "graph-gitnexus-mem_capsule-2026-01-02"
    assert [path.name for path in result.capsule_paths] == [f"{name}.part00{n}.mv2" for n in range(1, 5)]
    assert (result.sidecar_path.name, result.manifest_path.name) == (
        *(f"{name}.mv2.index.v1.sqlite", f"{name}.mv2.manifest.json"),
    )
    assert sum(part.frames for part in parts) == result.manifest.frames == 3_005 + 3 * 5
    assert [p.stage_progress for p in told if p.stage == "write_capsule"] == [7, 32, 57, 82, 100]
    prepared = [p.meta["frames"] for p in told if p.stage == "frame_prep"]
    assert prepared == [517, 5 + parts[0].frames - 5]
    assert [p.stage_progress for p in told if p.stage == "frame_prep"] == [100 * n // 3_005 for n in prepared]
    read = [frames_in(path) for path in result.capsule_paths]
    assert [len(frames) for frames in read] == [part.frames for part in parts]
    assert {tuple(frame.uri for frame in frames[:5]) for frames in read} == {tuple(f.uri for f in read[0][:5])}
    own = [frame.uri for frames in read for frame in frames[5:]]
    assert len(own) == len(set(own)) == 3_000
    assert [part.sha256 for part in parts] == [sha256(path) for path in result.capsule_paths]
    assert result.report.capsule.size_bytes == sum(part.size_bytes for part in parts)
    assert meta_of(result.sidecar_path)["capsule_sha256"] == result.manifest.capsule_sha256
    with closing(Sidecar.open(result.sidecar_path)) as sidecar:
        assert [sidecar.locate(sidecar.position(part, 7)) for part in range(4)] == [(part, 7) for part in range(4)]
    rebuild(result.capsule_paths, tmp_path / "again.sqlite")
    assert (tmp_path / "again.sqlite").read_bytes() == result.sidecar_path.read_bytes()


@pytest.mark.parametrize(("given", "shown"), [("a\nb\u202ec\x00", "a b c"), ("é" * 101, "é" * 100), (" a ", "a")])
def test_a_projects_name_is_told_on_one_short_line(tmp_path: Path, gate: Gate, given: str, shown: str) -> None:
    told: list[Progress] = []
    request = msgspec.structs.replace(small(2), project_name=given)
    run(request, tmp_path, gate, on_progress=told.append)
    assert told[0].message == f"Reading the graph of {shown}"


def test_the_times_of_the_stages_are_parts_of_the_whole(tmp_path: Path, gate: Gate) -> None:
    before = time.perf_counter()
    timings = run(small(1_500), tmp_path, gate, engine=Noting(0.02)).report.timings
    wall = time.perf_counter() - before
    stages = [timings.transform, timings.embed, timings.write, timings.sidecar, timings.verify]
    assert all(0 < seconds < timings.total for seconds in stages)
    assert timings.embed >= 0.02
    assert timings.transform + timings.write + timings.verify <= timings.total <= wall
    assert [timings.queue, timings.read, timings.upload] == [0, 0, 0]
    alone = run(small(5), tmp_path, gate, engine=Noting(0.02)).report.timings
    assert 0.02 <= alone.embed < alone.total


def test_two_groups_are_embedded_at_once_and_their_time_counts_once(tmp_path: Path, gate: Gate) -> None:
    together = threading.Barrier(2, timeout=60)

    class Meeting(Noting):
        """Each call waits for another one."""

        def embed(self, texts: Any, **more: Any) -> Any:
            together.wait()
            return super().embed(texts, **more)

    engine = Meeting(0.05)
    timings = run(small(2_000), tmp_path, gate, engine=engine).report.timings
    assert len(engine.calls) == 4
    assert engine.most == 2
    assert 0.1 <= timings.embed < timings.total


def test_an_engine_gets_texts_in_groups_and_a_batch_without_any_does_not_wait(tmp_path: Path, gate: Gate) -> None:
    class Wide(Noting):
        group = 1_024

    engine = Wide()
    result = run(small(1_300), tmp_path, gate, engine=engine, choice=Choice(what=("nodes", "relations")))
    sizes = [len(texts) for texts in engine.calls]
    assert sum(sizes) == 2_600
    assert sorted(sizes) == [552, 1_024, 1_024]
    assert result.report.embedding.texts == result.manifest.vectors == 2_600
    assert len({text for texts in engine.calls for text in texts}) == 2_600


def test_each_frame_has_the_vector_of_its_own_text(tmp_path: Path, gate: Gate) -> None:
    engine = Noting()
    result = run(small(1_100), tmp_path, gate, engine=engine)
    frames = frames_in(result.capsule_paths[0])
    with CapsuleReader(result.capsule_paths[0]) as reader:
        found = reader.vectors()
    assert found is not None
    rows = dict(zip([int(place) for place in found[0]], found[1], strict=True))
    assert [frames[place].kind for place in rows] == ["node"] * 1_100
    texts = {text for call in engine.calls for text in call}
    for number in (0, 511, 512, 1_099):
        (place,) = [place for place in rows if frames[place].title.endswith(f"do_{number}")]
        text = f"do {number} do {number}"
        assert text in texts
        assert np.allclose(rows[place], StaticEmbedder().embed([text]).vectors[0], atol=1e-3), text


def test_what_the_engine_answers_is_added_up_in_the_report(tmp_path: Path, gate: Gate) -> None:
    class Counting(Priced):
        group = 500

        def embed(self, texts: Any, **more: Any) -> Embedded:
            answer = super().embed(texts, **more)
            return answer._replace(tokens=1_000, truncated=[0, 2], batches=3, cache_hits=4, retries=5)

    report = run(small(1_100), tmp_path, gate, engine=Counting()).report.embedding
    assert (report.texts, report.tokens, report.truncated) == (1_100, 3_000, 6)
    assert (report.batches, report.cache_hits, report.retries) == (9, 12, 15)
    assert report.cost_estimate == 3.0
    assert (report.provider, report.model) == ("openai", StaticEmbedder.model.name)


def test_what_stays_of_a_first_writer_is_what_was_paid(tmp_path: Path, gate: Gate) -> None:
    class Failing(NativeWriter):
        def open(self, *arguments: Any, **more: Any) -> Any:
            part = super().open(*arguments, **more)

            class Part(NativePartWriter):
                def finish(self) -> None:
                    raise WriterFailed("the medium broke")

            part.__class__ = Part
            return part

    class Cut(Priced):
        def embed(self, texts: Any, **more: Any) -> Embedded:
            return super().embed(texts, **more)._replace(tokens=10, truncated=[1], cache_hits=2, batches=1)

    writers: dict[WriterName, Callable[[], CapsuleWriter]] = {"native": Failing, "sdk": NativeWriter}
    result = run(small(), tmp_path, gate, engine=Cut(), writers=writers)
    report = result.report.embedding
    assert (report.texts, report.truncated, report.cache_hits, report.tokens, report.batches) == (40, 1, 2, 20, 2)
    (warning,) = [warning for warning in result.report.warnings if warning.code == "WRITER_FALLBACK"]
    assert (warning.count, warning.example) == (1, "native: the medium broke; sdk wrote it, ~1,000 times slower")
    assert content(tmp_path) == {
        path.name for path in (*result.capsule_paths, result.sidecar_path, result.manifest_path)
    }


# --- ceilings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ceiling", "told"),
    [
        ({"max_tokens": 299}, "would read about 300 tokens (0.3000 US dollars); at most 299 tokens are allowed"),
        ({"max_usd": 0.29}, "would read about 300 tokens (0.3000 US dollars); at most 0.2900 US dollars are allowed"),
        ({"max_tokens": 300, "max_usd": 0.2999}, "at most 0.2999 US dollars are allowed"),
        ({"max_tokens": 299, "max_usd": 9.0}, "at most 299 tokens are allowed"),
    ],
)
def test_who_is_refused_is_told_the_estimate_and_the_ceiling(
    tmp_path: Path, gate: Gate, ceiling: dict[str, Any], told: str
) -> None:
    with pytest.raises(EmbeddingRefused) as caught:
        run(small(), tmp_path / "out", gate, engine=Priced(), choice=Choice(**ceiling))
    assert told in caught.value.message
    assert caught.value.details == {
        "tokens": 300,
        "costEstimate": 0.3,
        "maxTokens": ceiling.get("max_tokens"),
        "maxUsd": ceiling.get("max_usd"),
    }
    assert not (tmp_path / "out").exists()


def test_without_a_ceiling_nothing_is_counted_ahead(tmp_path: Path, gate: Gate) -> None:
    class Uncounted(Priced):
        def count_tokens(self, texts: Any) -> int:
            raise InvalidRequest("nobody asked for an estimate")

    assert run(small(3), tmp_path / "a", gate, engine=Uncounted()).report.embedding.texts == 3
    for ceiling in ({"max_tokens": 10**6}, {"max_usd": 10.0}):
        with pytest.raises(InvalidRequest, match="nobody asked"):
            run(small(3), tmp_path / "b", gate, engine=Uncounted(), choice=Choice(**ceiling))


def test_an_estimate_can_be_stopped(tmp_path: Path, gate: Gate) -> None:
    counted: list[int] = []

    class Counted(Priced):
        def count_tokens(self, texts: Any) -> int:
            counted.append(len(texts))
            return super().count_tokens(texts)

    def stop() -> None:
        if len(counted) == 2:
            raise Canceled("enough")

    with pytest.raises(Canceled):
        run(small(), tmp_path, gate, engine=Counted(), choice=Choice(max_tokens=10**6), should_stop=stop)
    assert counted == [7, 7]


# --- writers ---------------------------------------------------------------------------------------------


class WithoutVectors(NativeWriter):
    """A writer that takes no vectors."""

    takes_vectors = False


def test_vectors_go_to_a_writer_that_takes_them_or_the_request_is_refused(tmp_path: Path, gate: Gate) -> None:
    writers: dict[WriterName, Callable[[], CapsuleWriter]] = {"sdk": WithoutVectors, "cli": NativeWriter}
    result = run(small(3), tmp_path / "a", gate, vectors=True, writers=writers)
    assert result.manifest.vectors == 3
    assert "WRITER_FALLBACK" not in codes(result)
    assert run(small(3), tmp_path / "b", gate, writers=writers).manifest.vectors == 0
    with pytest.raises(InvalidRequest, match="sdk takes no vectors") as caught:
        run(small(3), tmp_path / "c", gate, vectors=True, writer="sdk", writers=writers)
    assert caught.value.details["field"] == "options.semanticEnabled"
    assert content(tmp_path / "c") == set()


def test_a_writer_of_another_name_is_not_taken(tmp_path: Path, gate: Gate) -> None:
    with pytest.raises(WriterUnavailable, match="no writer of that name"):
        run(small(3), tmp_path, gate, writer="cli", writers={"native": NativeWriter})
    with pytest.raises(WriterUnavailable, match="native: it is not built here"):
        run(small(3), tmp_path, gate, writers={"native": missing})


def test_a_writer_gets_each_batch_at_most_as_large_as_it_wants(tmp_path: Path, gate: Gate) -> None:
    sizes: list[int] = []
    opened: list[dict[str, Any]] = []

    class Narrow(NativeWriter):
        batch = 16

        def open(self, path: Path, **more: Any) -> NativePartWriter:  # type: ignore[override]
            opened.append(more)
            part = super().open(path, **more)
            add = part.add

            def noted(frames: Any, vectors: Any) -> None:
                sizes.append(len(frames))
                add(frames, vectors)

            part.add = noted  # type: ignore[method-assign]
            return part

    stops: list[int] = []
    run(small(40), tmp_path, gate, writers={"native": Narrow}, should_stop=lambda: stops.append(len(sizes)))
    assert sizes == [5, 16, 16, 16, 16, 16]
    assert {0, 1, 2, 3, 4, 5} <= {*stops, 0}
    (more,) = opened
    assert (more["expected_frames"], more["model"], more["dimension"]) == (85, None, None)
    assert more["timestamp"] == 1_767_312_000  # 2026-01-02T00:00:00Z
    run(small(40), tmp_path, gate, vectors=True, writers={"native": Narrow})
    assert (opened[1]["model"], opened[1]["dimension"]) == (StaticEmbedder.model.name, 256)


def test_four_plans_are_tried_each_with_smaller_parts(tmp_path: Path, gate: Gate) -> None:
    expected: list[int] = []

    class Small(NativeWriter):
        """A file of it is full with the first frame, whatever the plan says."""

        def open(self, path: Path, **more: Any) -> NativePartWriter:  # type: ignore[override]
            expected.append(more["expected_frames"])
            raise CapacityExceeded("full")

    with nothing_left(), pytest.raises(CapacityExceeded, match="full"):
        run(small(1_500), tmp_path, gate, capacity=PARTS, writers={"native": Small})
    assert len(expected) == 4
    assert expected == sorted(expected, reverse=True)
    assert expected[3] < expected[0] / 2
    assert content(tmp_path) == set()


# --- the folder --------------------------------------------------------------------------------------------


def test_the_set_of_a_name_is_replaced_and_nothing_else_is(tmp_path: Path, gate: Gate) -> None:
    name = "graph-gitnexus-mem_capsule-2026-01-02"
    old = [f"{name}.mv2", f"{name}.part001.mv2", f"{name}.part1234.mv2", f"{name}.mv2.manifest.json"]
    kept = [f"{name}.mv2.bak", f"{name}.part.mv2", f"{name}.partX.mv2", f"a{name}.mv2", f"{name}xmv2", "other.mv2"]
    for path in (*old, *kept):
        (tmp_path / path).write_text("old")
    result = run(small(3), tmp_path, gate)
    assert content(tmp_path) == {
        *kept,
        *(path.name for path in (*result.capsule_paths, result.sidecar_path, result.manifest_path)),
    }
    assert all((tmp_path / path).read_text() == "old" for path in kept)
    assert result.manifest_path.read_bytes().startswith(b'{\n  "')


def test_what_cannot_be_put_in_its_place_takes_the_rest_back(tmp_path: Path, gate: Gate) -> None:
    name = "graph-gitnexus-mem_capsule-2026-01-02.mv2"
    (tmp_path / f"{name}.manifest.json" / "mine").mkdir(parents=True)
    with nothing_left(), pytest.raises(StorageFailed):
        run(small(3), tmp_path, gate)
    assert content(tmp_path) == {f"{name}.manifest.json", f"{name}.manifest.json/mine"}


def test_a_sidecar_that_cannot_be_built_ends_the_export(tmp_path: Path, gate: Gate) -> None:
    class Doubling(NativeWriter):
        """Puts a folder where the sidecar's journal would be, once the first frames are in."""

        def open(self, path: Path, **more: Any) -> NativePartWriter:  # type: ignore[override]
            sidecar = path.with_name(f"{path.name}.index.v1.sqlite")
            sidecar.unlink(missing_ok=True)
            sidecar.mkdir()
            return super().open(path, **more)

    with nothing_left(), pytest.raises(StorageFailed):
        run(small(600), tmp_path, gate, writers={"native": Doubling})
    assert content(tmp_path) == set()


def test_a_stop_while_hashes_are_made_leaves_nothing(tmp_path: Path, gate: Gate) -> None:
    told: list[Progress] = []

    def stop() -> None:
        if told and told[-1].stage == "finalize" and told[-1].stage_progress == 90:
            raise Canceled("enough")

    with nothing_left(), pytest.raises(Canceled):
        run(small(3), tmp_path, gate, on_progress=told.append, should_stop=stop)
    assert content(tmp_path) == set()


def test_the_cache_of_an_engine_is_flushed_and_its_trouble_told(tmp_path: Path, gate: Gate) -> None:
    flushed: list[str] = []

    class Cached(Priced):
        def flush(self, should_stop: Any) -> str | None:
            flushed.append("now")
            return "the bucket is away"

    result = run(small(3), tmp_path / "a", gate, engine=Cached())
    assert codes(result)["CACHE_UNAVAILABLE"] == 1
    assert flushed == ["now"]
    with pytest.raises(WriterUnavailable):
        run(small(3), tmp_path / "b", gate, engine=Cached(), writers={"native": missing})
    assert flushed == ["now"] * 2


def test_a_report_names_who_made_it(tmp_path: Path, gate: Gate) -> None:
    report = run(small(1), tmp_path, gate)
    versions = report.report.versions
    assert all((versions.memvid_export, versions.memvid_core, versions.memvid_sdk))
    assert report.report.peak_memory_bytes > 10 << 20
    assert report.manifest.generated_at == NOW
    assert 0 < report.report.timings.total == round(report.report.timings.total, 4)
