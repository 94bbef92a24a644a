"""The export, as one streaming path: graph → frames → vectors → capsule → sidecar → gate → published files."""

from __future__ import annotations

import hashlib
import os
import queue
import re
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.capsule.capacity import SHARE, plan
from common.capsule.cli import CliWriter
from common.capsule.gate import Gate, GatePlan
from common.capsule.native import NativeWriter, native
from common.capsule.port import CAPACITY_BYTES, CapsuleWriter, PartWriter
from common.capsule.probes import Probes
from common.capsule.process import POLL_SECONDS
from common.capsule.sdk import SdkWriter
from common.contract import (
    CapsuleReport,
    EmbeddingReport,
    Manifest,
    ManifestPart,
    Progress,
    Report,
    SidecarReport,
    Timings,
    Versions,
    WriterName,
)
from common.embedding.choice import Choice
from common.embedding.port import Embedder, Model
from common.errors import (
    Canceled,
    CapacityExceeded,
    EmbeddingRefused,
    ExportError,
    InvalidRequest,
    StorageFailed,
    WriterFailed,
    WriterUnavailable,
)
from common.frames.build import META_FRAMES, frame_count, frames
from common.frames.model import Frame
from common.graph.canonical import canonical, content_digest
from common.graph.model import ExportRequest, WarningCounter
from common.graph.names import capsule_file_name
from common.memory import peak_memory_bytes
from common.progress import ProgressReporter
from common.sidecar.build import SidecarBuilder

AHEAD = 2
"""Groups of batches that are being embedded at once, while the frames of the next one are made."""
SIDECAR_QUEUE = 16
"""Batches that may wait for the sidecar's thread."""
PLANS = 4
"""Plans that are tried where the estimate was too low, each with two thirds of the frames of the last one a part."""

WRITERS: Mapping[WriterName, Callable[[], CapsuleWriter]] = {"native": NativeWriter, "sdk": SdkWriter, "cli": CliWriter}
"""All writers, the best one first."""
_HASH_BLOCK = 1 << 20


class ExportResult(msgspec.Struct, kw_only=True):
    """What an export published."""

    report: Report
    manifest: Manifest
    capsule_paths: list[Path]
    sidecar_path: Path
    manifest_path: Path


def export(
    request: ExportRequest,
    *,
    out_dir: Path,
    gate: Gate,
    generated_at: str,
    writer: WriterName | None = None,
    embedder: Embedder | None = None,
    choice: Choice = Choice(),  # noqa: B008 - immutable
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], None],
    capacity: int = CAPACITY_BYTES,
    writers: Mapping[WriterName, Callable[[], CapsuleWriter]] = WRITERS,
) -> ExportResult:
    """Export a graph into ``out_dir`` and answer what was published there.

    ``generated_at`` is an ISO 8601 time in UTC; its day names the files and stamps the frames, so that the same graph
    gives the same bytes all day long. ``writer`` None takes the first of ``writers`` that works, and the report says
    so when it is not the native one. ``embedder`` None exports without vectors; of ``choice`` counts what is embedded,
    and the ceilings. ``should_stop`` is called, also by other threads, at least once per batch of frames and ten times
    a second while waiting; what it raises ends the export, with nothing left behind.
    A graph that passes ``capacity`` (bytes of one file before its indexes) becomes several parts.

    Raises InvalidRequest (also for vectors with a writer that takes none), WriterFailed, WriterUnavailable, GateFailed,
    StorageFailed, EmbeddingRefused before the first text is embedded, what the embedder raises, and CapacityExceeded
    where no plan of parts holds the frames.
    """
    started = time.perf_counter()
    run = _Export(
        request=request,
        out_dir=out_dir,
        gate=gate,
        generated_at=generated_at,
        embedder=embedder,
        choice=choice,
        progress=ProgressReporter(on_progress),
        should_stop=should_stop,
        capacity=capacity,
    )
    result = run.run({name: make for name, make in writers.items() if writer in (name, None)})
    result.report.timings.total = round(time.perf_counter() - started, 4)
    return result


class _Stage:
    """Adds the seconds of a block to one of the timings."""

    def __init__(self, timings: Timings, name: str) -> None:
        self._timings, self._name = timings, name

    def __enter__(self) -> None:
        self._from = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = getattr(self._timings, self._name) + time.perf_counter() - self._from
        setattr(self._timings, self._name, round(spent, 4))


class _Shared:
    """Adds to one of the timings the seconds in which at least one thread is in the block."""

    def __init__(self, timings: Timings, name: str) -> None:
        self._timings, self._name = timings, name
        self.lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self.lock:
            if not self._inside:
                self._from = time.perf_counter()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self._inside -= 1
            if not self._inside:
                spent = getattr(self._timings, self._name) + time.perf_counter() - self._from
                setattr(self._timings, self._name, round(spent, 4))


class _SidecarThread:
    """Builds the sidecar beside the writer and the gate: SQLite works while they do."""

    def __init__(self, path: Path, timings: Timings) -> None:
        self._builder = SidecarBuilder(path)
        self._timings = timings
        self._batches: queue.Queue[tuple[Sequence[Frame], int, int] | None] = queue.Queue(SIDECAR_QUEUE)
        self._error: BaseException | None = None
        self._aborted = False
        self._thread = threading.Thread(target=self._run, name="sidecar", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (batch := self._batches.get()) is not None:
            self._guarded(self._builder.add, *batch)
        self._guarded(self._builder.complete)

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        if self._error is None and not self._aborted:
            try:
                with _Stage(self._timings, "sidecar"):
                    work(*arguments)
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
                self._error = error

    def add(self, batch: Sequence[Frame], first_frame_id: int, part: int) -> None:
        if self._error is not None:
            raise self._error
        self._batches.put((batch, first_frame_id, part))

    def end(self) -> None:
        """Say that all frames are in; what is left is done while the caller goes on."""
        self._batches.put(None)

    def finish(self, capsule_sha256: str, should_stop: Callable[[], None]) -> None:
        """Wait for the thread, and seal the file."""
        while self._thread.is_alive():
            self._thread.join(POLL_SECONDS)
            should_stop()
        if self._error is not None:
            raise self._error
        self._builder.finish(capsule_sha256)

    def abort(self) -> None:
        self._aborted = True
        if self._thread.is_alive():
            self._batches.put(None)
            self._thread.join()
        self._builder.abort()


class _Written(msgspec.Struct):
    """Parts written into the working folder."""

    paths: list[Path]
    plans: list[GatePlan]
    sidecar: _SidecarThread


class _Export:
    def __init__(
        self,
        *,
        request: ExportRequest,
        out_dir: Path,
        gate: Gate,
        generated_at: str,
        embedder: Embedder | None,
        choice: Choice,
        progress: ProgressReporter,
        should_stop: Callable[[], None],
        capacity: int,
    ) -> None:
        self._capacity = capacity
        self._out_dir = out_dir
        self._gate = gate
        self._generated_at = generated_at
        self._day = f"{generated_at[:10]}T00:00:00.000Z"
        self._embedder = embedder
        self._choice = choice
        self._progress = progress
        self._should_stop = should_stop
        self._report = Report(profile=request.options.profile)
        self._extra_warnings = WarningCounter()
        self._timings = self._report.timings
        self._request = request
        if embedder:
            self._report.embedding = _about(embedder.model)
        self._embedding = _Shared(self._timings, "embed")

    def run(self, writers: Mapping[WriterName, Callable[[], CapsuleWriter]]) -> ExportResult:
        self._progress.report("transform", 0.0, f"Reading the graph of {_one_line(self._request.project_name)}")
        with _Stage(self._timings, "transform"):
            self._graph = canonical(self._request)
            self._digest = content_digest(self._graph)
        self._total = frame_count(self._graph)
        self._hold_ceilings()
        self._progress.report(
            "transform",
            1.0,
            f"Ordered {len(self._graph.nodes):,} nodes and {len(self._graph.relations):,} relationships",
            nodes=len(self._graph.nodes),
            relationships=len(self._graph.relations),
        )
        try:
            self._out_dir.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=".export-", dir=self._out_dir))
        except OSError as error:
            raise StorageFailed(f"the output folder cannot be written: {error.strerror}") from error
        try:
            return self._export_in(work, writers)
        except OSError as error:
            raise StorageFailed(f"{error.strerror or error}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _export_in(self, work: Path, writers: Mapping[WriterName, Callable[[], CapsuleWriter]]) -> ExportResult:
        try:
            writer, written = self._write_with_any(work, writers)
        except BaseException:
            with suppress(ExportError):  # what is paid for is kept; the first error is the one to tell
                self._flush()
            raise
        try:
            self._flush()
            with _Stage(self._timings, "verify"):
                self._progress.report("finalize", 0.0, "Reading the capsule back to prove it")
                probes = sum(self._gate.check(plan, self._should_stop) for plan in written.plans)
            hashes = [_sha256(path, self._should_stop) for path in written.paths]
            capsule_sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
            written.sidecar.finish(capsule_sha256, self._should_stop)
        except BaseException:
            written.sidecar.abort()
            raise
        self._progress.report("finalize", 0.9, f"{probes} probes held; publishing", probes=probes)
        return self._publish(work, writer, written, hashes, capsule_sha256)

    def _hold_ceilings(self) -> None:
        """Refuse what would read or cost too much, before anything is paid for."""
        embedder, choice = self._embedder, self._choice
        if embedder is None or (choice.max_tokens is None and choice.max_usd is None):
            return
        tokens = 0
        texts = (frame.embed_text for frame in self._frames() if frame.embed_text is not None)
        while some := list(islice(texts, embedder.group)):
            self._should_stop()
            tokens += embedder.count_tokens(some)
        self._refuse_above(tokens, "would read about")

    def _refuse_above(self, tokens: int, verb: str) -> None:
        embedder, choice = self._embedder, self._choice
        assert embedder is not None
        cost = tokens * embedder.model.price_per_million_tokens / 1e6
        for value, most, shown in (
            (tokens, choice.max_tokens, "{:,} tokens"),
            (cost, choice.max_usd, "{:,.4f} US dollars"),
        ):
            if most is not None and value > most:
                raise EmbeddingRefused(
                    f"{embedder.model.provider} {embedder.model.name} {verb} {tokens:,} tokens ({cost:,.4f} US dollars)"
                    f"; at most {shown.format(most)} are allowed",
                    tokens=tokens,
                    costEstimate=round(cost, 6),
                    maxTokens=choice.max_tokens,
                    maxUsd=choice.max_usd,
                )

    def _frames(self) -> Iterator[Frame]:
        layout = self._embedder.model.layout if self._embedder else None
        return frames(self._graph, generated_at=self._day, layout=layout, what=self._choice.what)

    # --- writing ----------------------------------------------------------------------------------

    def _write_with_any(
        self, work: Path, writers: Mapping[WriterName, Callable[[], CapsuleWriter]]
    ) -> tuple[CapsuleWriter, _Written]:
        """Write with the first writer that can; a step down is counted as a warning."""
        failed: list[str] = []
        last: WriterFailed | WriterUnavailable = WriterUnavailable("there is no writer of that name")
        for name, make in writers.items():
            try:
                writer = make()
                if self._embedder and not writer.takes_vectors:
                    if len(writers) == 1:
                        message = f"the writer {name} takes no vectors; export without semanticEnabled"
                        raise InvalidRequest(message, field="options.semanticEnabled")
                    continue
                written = self._write_in_parts(work, writer)
            except (WriterUnavailable, WriterFailed) as error:
                failed.append(f"{name}: {error.message}")
                last = error
            else:
                for reason in failed:
                    self._extra_warnings.add("WRITER_FALLBACK", f"{reason}; {name} wrote it, ~1,000 times slower")
                return writer, written
        raise type(last)("; ".join(failed) or last.message) from last

    def _write_in_parts(self, work: Path, writer: CapsuleWriter) -> _Written:
        share = SHARE
        for attempt in range(PLANS):
            parts = plan(
                self._graph,
                generated_at=self._day,
                layout=self._embedder.model.layout if self._embedder else None,
                what=self._choice.what,
                dimension=self._embedder.model.dimension if self._embedder else None,
                capacity=self._capacity,
                share=share,
            ).parts
            try:
                return self._write(work, writer, parts)
            except CapacityExceeded as error:
                if attempt == PLANS - 1:
                    raise
                self._extra_warnings.add("CAPACITY_UNDERESTIMATED", error.message)
                share *= 2 / 3
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _write(self, work: Path, writer: CapsuleWriter, parts: list[int]) -> _Written:
        name = capsule_file_name(self._graph.source.base_name, self._generated_at)
        embedder = self._embedder
        totals = self._report.embedding  # what was paid for stays, where a second writer begins again
        totals.texts = totals.truncated = totals.cache_hits = 0
        for left_over in work.iterdir():
            left_over.unlink()
        sidecar = _SidecarThread(work / f"{name}.index.v1.sqlite", self._timings)
        written = _Written([], [], sidecar)
        with ExitStack() as undo:
            undo.callback(sidecar.abort)
            # Undone from last to first: parts, embedding, sidecar.
            ahead = ThreadPoolExecutor(AHEAD, thread_name_prefix="embed")
            undo.callback(ahead.shutdown, cancel_futures=True)
            abandoned = threading.Event()
            undo.callback(abandoned.set)
            for number, (size, batches) in enumerate(self._parts(parts, writer.batch), start=1):
                path = work / (name if len(parts) == 1 else f"{name[:-4]}.part{number:03}.mv2")
                probes = Probes(f"{self._digest}:{number}", size, writer)
                with _Stage(self._timings, "write"):
                    part = writer.open(
                        path,
                        timestamp=int(datetime.fromisoformat(self._day).timestamp()),
                        model=embedder.model.name if embedder else None,
                        dimension=embedder.model.dimension if embedder else None,
                        expected_frames=size,
                        capacity=self._capacity,
                        should_stop=self._should_stop,
                    )
                undo.callback(part.abort)
                self._write_part(part, self._embedded(batches, ahead, abandoned), sidecar, probes, number - 1)
                doing = f"Writing {self._total:,} frames"
                self._progress.report("write_capsule", (number - 0.7) / len(parts), doing, frames=self._total)
                with _Stage(self._timings, "write"):
                    part.finish()
                self._should_stop()
                written.paths.append(path)
                written.plans.append(probes.plan(path))
            self._progress.report("write_capsule", 1.0, f"Wrote {self._total:,} frames", frames=self._total)
            self._progress.report("build_sidecar", 0.0, "Building the index for reading")
            sidecar.end()
            ahead.shutdown()
            undo.pop_all()
        self._report.capsule = self._counts(written)
        return written

    def _write_part(
        self,
        part: PartWriter,
        batches: Iterator[tuple[list[Frame], NDArray[np.float32] | None]],
        sidecar: _SidecarThread,
        probes: Probes,
        number: int,
    ) -> None:
        position = 0
        for batch, vectors in batches:
            with _Stage(self._timings, "write"):
                part.add(batch, vectors)
            sidecar.add(batch, position, number)
            probes.see(batch, vectors)
            position += len(batch)

    def _parts(self, parts: list[int], batch_frames: int) -> Iterator[tuple[int, Iterator[list[Frame]]]]:
        """Frames in batches, cut into parts; every part begins with the meta frames, so that each explains itself."""
        stream = self._frames()
        meta = list(islice(stream, META_FRAMES))
        done = len(meta)

        def batches(left: int) -> Iterator[list[Frame]]:
            nonlocal done
            yield meta
            while left and (batch := list(islice(stream, min(batch_frames, left)))):
                self._should_stop()
                left -= len(batch)
                done += len(batch)
                self._progress.report(
                    "frame_prep",
                    done / self._total,
                    f"Prepared {done:,} of {self._total:,} frames{self._embedded_so_far()}",
                    frames=done,
                    texts=self._report.embedding.texts,
                )
                yield batch

        for size in parts:
            yield META_FRAMES + size, batches(size)
        next(stream, None)  # runs the generator to its end, where it counts its warnings

    def _embedded_so_far(self) -> str:
        texts = self._report.embedding.texts
        return f", embedded {texts:,} texts" if texts else ""

    def _embedded(
        self, batches: Iterator[list[Frame]], ahead: ThreadPoolExecutor, abandoned: threading.Event
    ) -> Iterator[tuple[list[Frame], NDArray[np.float32] | None]]:
        """Batches with their vectors, which threads make while the next batches' frames are made here."""
        if self._embedder is None:
            for batch in batches:
                yield batch, None
            return

        def stop() -> None:
            if abandoned.is_set():
                raise Canceled("the export has ended")
            self._should_stop()

        waiting: deque[tuple[list[list[Frame]], Future[NDArray[np.float32]]]] = deque()
        for group in _groups(batches, self._embedder.group):
            waiting.append((group, ahead.submit(self._vectors, group, stop)))
            if len(waiting) > AHEAD:
                yield from self._waited(*waiting.popleft())
        while waiting:
            yield from self._waited(*waiting.popleft())

    def _waited(
        self, group: list[list[Frame]], future: Future[NDArray[np.float32]]
    ) -> Iterator[tuple[list[Frame], NDArray[np.float32] | None]]:
        while not wait([future], POLL_SECONDS).done:  # what the engine raises may be a TimeoutError too
            self._should_stop()
        vectors = future.result()
        done = 0
        for batch in group:
            texts = _texts(batch)
            yield batch, vectors[done : done + texts] if texts else None
            done += texts

    def _vectors(self, group: list[list[Frame]], stop: Callable[[], None]) -> NDArray[np.float32]:
        """The vectors of a group's texts, shape (texts, dimension)."""
        assert self._embedder is not None
        model, totals = self._embedder.model, self._report.embedding
        texts = [frame.embed_text for batch in group for frame in batch if frame.embed_text is not None]
        if not texts:
            return np.empty((0, model.dimension), dtype=np.float32)
        with self._embedding:
            embedded = self._embedder.embed(texts, should_stop=stop)
        with self._embedding.lock:
            totals.texts += len(texts)
            totals.tokens += embedded.tokens
            totals.cache_hits += embedded.cache_hits
            totals.truncated += len(embedded.truncated)
            totals.batches += embedded.batches
            totals.retries += embedded.retries
            totals.cost_estimate = round(totals.tokens * model.price_per_million_tokens / 1e6, 6)
        self._refuse_above(totals.tokens, "has read")
        return embedded.vectors

    def _counts(self, written: _Written) -> CapsuleReport:
        embedder = self._embedder
        return CapsuleReport(
            content_digest=self._digest,
            frames=sum(plan.frames for plan in written.plans),
            node_frames=len(self._graph.nodes),
            relation_frames=len(self._graph.relations),
            vectors=sum(plan.vectors for plan in written.plans),
            dimension=embedder.model.dimension if embedder else None,
            model=embedder.model.name if embedder else None,
            parts=len(written.paths),
        )

    def _flush(self) -> None:
        if self._embedder and (trouble := self._embedder.flush(self._should_stop)):
            self._extra_warnings.add("CACHE_UNAVAILABLE", trouble)

    # --- publishing -------------------------------------------------------------------------------

    def _publish(
        self, work: Path, writer: CapsuleWriter, written: _Written, hashes: list[str], capsule_sha256: str
    ) -> ExportResult:
        name = capsule_file_name(self._graph.source.base_name, self._generated_at)
        sidecar = work / f"{name}.index.v1.sqlite"
        sidecar_sha256 = _sha256(sidecar, self._should_stop)
        report = self._finished_report(writer, written, capsule_sha256, sidecar, sidecar_sha256)
        manifest = self._manifest(writer, written, hashes, report)
        (work / f"{name}.manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
        self._should_stop()

        capsule_paths, sidecar_path, manifest_path = self._replace_set(
            written.paths, sidecar, work / f"{name}.manifest.json"
        )
        self._progress.report("download_ready", 1.0, "The capsule is ready")
        report.capsule.path, report.sidecar.path = _shown(capsule_paths[0]), _shown(sidecar_path)
        return ExportResult(
            report=report,
            manifest=manifest,
            capsule_paths=capsule_paths,
            sidecar_path=sidecar_path,
            manifest_path=manifest_path,
        )

    def _replace_set(self, parts: list[Path], sidecar: Path, manifest: Path) -> tuple[list[Path], Path, Path]:
        """Put the new set in the place of one of the same name, if there is one.

        The old manifest goes first and the new one comes last: whoever finds a manifest finds what it names.
        """
        moved: list[Path] = []
        name = manifest.name.removesuffix(".mv2.manifest.json")
        part_of_old = re.compile(re.escape(name) + r"(\.part[0-9]+)?\.mv2")
        try:
            (self._out_dir / manifest.name).unlink(missing_ok=True)
            for path in self._out_dir.iterdir():
                if part_of_old.fullmatch(path.name):
                    path.unlink()
            for path in (*parts, sidecar, manifest):
                _sync(path)
                moved.append(path.replace(self._out_dir / path.name))
            _sync_folder(self._out_dir)
        except OSError:
            for path in moved:
                path.unlink(missing_ok=True)
            raise
        *capsule_paths, sidecar_path, manifest_path = moved
        return capsule_paths, sidecar_path, manifest_path

    def _finished_report(
        self, writer: CapsuleWriter, written: _Written, capsule_sha256: str, sidecar: Path, sidecar_sha256: str
    ) -> Report:
        report, graph = self._report, self._graph
        report.writer = writer.name
        report.input = graph.input
        report.left_out = graph.left_out
        report.warnings = sorted([*graph.warnings, *self._extra_warnings.warnings()], key=lambda warning: warning.code)
        report.capsule.file_name = written.paths[0].name
        report.capsule.size_bytes = sum(path.stat().st_size for path in written.paths)
        report.capsule.sha256 = capsule_sha256
        report.sidecar = SidecarReport(size_bytes=sidecar.stat().st_size, sha256=sidecar_sha256)
        report.peak_memory_bytes = peak_memory_bytes()
        report.versions = versions()
        return report

    def _manifest(self, writer: CapsuleWriter, written: _Written, hashes: list[str], report: Report) -> Manifest:
        graph, capsule, embedder = self._graph, report.capsule, self._embedder
        return Manifest(
            generated_at=self._generated_at,
            session_id=graph.session_id,
            project_name=graph.project_name,
            source=graph.source,
            options=graph.options,
            content_digest=self._digest,
            capsule_sha256=capsule.sha256,
            parts=[
                ManifestPart(
                    file_name=path.name,
                    size_bytes=path.stat().st_size,
                    sha256=sha256,
                    frames=plan.frames,
                    vectors=plan.vectors,
                )
                for path, sha256, plan in zip(written.paths, hashes, written.plans, strict=True)
            ],
            sidecar_file_name=f"{capsule_file_name(graph.source.base_name, self._generated_at)}.index.v1.sqlite",
            sidecar_size_bytes=report.sidecar.size_bytes,
            sidecar_sha256=report.sidecar.sha256,
            frames=capsule.frames,
            node_frames=capsule.node_frames,
            relation_frames=capsule.relation_frames,
            vectors=capsule.vectors,
            dimension=capsule.dimension,
            embedding_provider=embedder.model.provider if embedder else None,
            embedding_model=capsule.model,
            embedding_revision=embedder.model.revision if embedder else None,
            embedding_layout=embedder.model.layout if embedder else None,
            writer=writer.name,
            readers=writer.readers,
            versions=report.versions,
            report=report,
        )


def _groups(batches: Iterator[list[Frame]], texts: int) -> Iterator[list[list[Frame]]]:
    """Batches together until they have so many texts; one that has none goes on at once."""
    group: list[list[Frame]] = []
    found = 0
    for batch in batches:
        own = _texts(batch)
        group.append(batch)
        found += own
        if found >= texts or not own:
            yield group
            group, found = [], 0
    if group:
        yield group


def _texts(batch: Sequence[Frame]) -> int:
    return sum(frame.embed_text is not None for frame in batch)


def _about(model: Model) -> EmbeddingReport:
    return EmbeddingReport(
        provider=model.provider,
        model=model.name,
        revision=model.revision,
        precision=model.precision,
        layout=model.layout,
    )


def _shown(path: Path) -> str:
    """A path as text; bytes of it that are not UTF-8 become U+FFFD."""
    return os.fsencode(path).decode(errors="replace")


def _one_line(text: str) -> str:
    """A text of the graph in a message for people: one line, no control or direction marks, at most 100 characters."""
    return "".join(char if char.isprintable() else " " for char in text[:100]).strip()


def versions() -> Versions:
    """Versions of this program and of the two memvid libraries; empty for one that is not installed."""
    found = Versions(memvid_core=native.MEMVID_CORE_VERSION if native else "")
    with suppress(PackageNotFoundError):
        found.memvid_export = version("memvid-export")
    with suppress(PackageNotFoundError):
        found.memvid_sdk = version("memvid-sdk")
    return found


def _sha256(path: Path, should_stop: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            should_stop()
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
