"""A batch: graphs are fetched a few ahead, the largest first, and run on whatever slot is free."""

from __future__ import annotations

import asyncio
import shutil
from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from common.contract import ErrorInfo, Wire
from common.errors import RULES, Canceled, ExportError, Retry, StorageFailed, WorkerLost
from common.storage import Storage
from control_plane.batch.board import Board
from control_plane.batch.journal import Journal, Record
from control_plane.batch.slots import Kept, Plan, Slot, Work
from control_plane.batch.sources import Graph, GraphSource, Payload
from handler.job import ref_of

STRIKES = 3
"""A slot that was at fault so often in a row takes no more graphs."""
FETCHES = 2
"""Graphs that are fetched at once; as many as there are slots wait, fetched, beyond that."""
PAUSE_SECONDS = RULES[Retry.lost].batch.first_wait
"""Before a slot that failed is tried again."""


class Summary(Wire, kw_only=True):
    """What a batch did; the sums are over the graphs that this run completed."""

    destination: str
    """A ref; the folders of the graphs are below it."""
    graphs: int
    completed: int = 0
    failed: int = 0
    """In this run, or in an earlier one and not tried again."""
    skipped: int = 0
    """Unchanged since they were completed."""
    left: int = 0
    """Not reached, as the batch was stopped."""
    interrupted: bool = False
    frames: int = 0
    vectors: int = 0
    tokens: int = 0
    cache_hits: int = 0
    cost_estimate: float = 0.0
    seconds: float = 0.0
    frames_per_second: float = 0.0
    tokens_per_second: float = 0.0
    devices: list[str]
    profile: str | None
    per_graph: list[Record] = msgspec.field(default_factory=list)
    errors: list[ErrorInfo] = msgspec.field(default_factory=list)
    """Of the failed graphs, each with ``details.name``; last the one that ended the batch, if any did."""


class Batch:
    """Runs every graph of a source that is not done yet; made for one run."""

    def __init__(
        self,
        source: GraphSource,
        graphs: Sequence[Graph],
        slots: Sequence[Slot],
        *,
        plan: Plan,
        journal: Journal,
        destination: Storage,
        prefix: str,
        there: Mapping[str, int],
        folder: Path,
        max_payload_bytes: int,
        retry_failed: bool,
        board: Board,
    ) -> None:
        """``there``: bytes of what lies in the destination, by ref. ``folder``: for payloads that are fetched."""
        self._source, self._slots, self._plan = source, slots, plan
        self._journal, self._destination, self._prefix, self._there = journal, destination, prefix, there
        self._folder, self._limit, self._retry_failed, self._board = folder, max_payload_bytes, retry_failed, board
        self._waiting = deque(graphs)
        self._open = len(graphs)
        """Graphs that have not ended."""
        self._ready: list[Work] = []
        self._changed = asyncio.Condition()
        self._room = asyncio.Semaphore(len(slots) + FETCHES)
        self._keeps = asyncio.Semaphore(len(slots))
        self._alive = len(slots)
        self._loops: list[asyncio.Task[None]] = []
        self._records: list[Record] = []
        self._stopped = False
        self._began = 0.0
        self._total = len(graphs)

    async def run(self) -> None:
        """Run all graphs. Raises WorkerLost where no slot is left, StorageFailed where the journal cannot be kept;
        ``summary`` tells what was done until then."""
        self._began = asyncio.get_running_loop().time()
        try:
            async with asyncio.TaskGroup() as group:
                over = asyncio.Event()
                group.create_task(self._journal.keep(over))
                await self._run_all(over)
        except BaseExceptionGroup as several:
            first: BaseException = several
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from several
        finally:
            try:
                await self._journal.write()
            finally:
                await asyncio.gather(*(slot.close() for slot in self._slots))

    async def _run_all(self, over: asyncio.Event) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(FETCHES):
                    self._loops.append(group.create_task(self._fetch_all()))
                for slot in self._slots:
                    self._loops.append(group.create_task(self._work(slot, group)))
        finally:
            over.set()

    def stop(self) -> None:
        """Run no more graphs and end those that run; what is done already is still put where it belongs."""
        self._stopped = True
        for loop in self._loops:
            loop.cancel()

    # --- fetching -------------------------------------------------------------------------------------

    async def _fetch_all(self) -> None:
        while True:
            await self._room.acquire()
            if not self._waiting:
                self._room.release()
                return
            graph = self._waiting.popleft()
            before = self._journal.get(graph.name)
            try:
                payload = await self._fetch(graph, self._folder / graph.name)
            except ExportError as error:
                # What is known of a payload stays known: the next batch skips it if it is unchanged.
                keep = before is None or not before.payload_sha256
                await self._end(graph, self._failure(graph, error), keep=keep)
                continue
            if known := self._known(before, payload):
                await self._end(graph, known, keep=False)
                continue
            async with self._changed:
                insort(self._ready, Work(graph, payload, before), key=_order)
                self._changed.notify_all()

    async def _fetch(self, graph: Graph, folder: Path) -> Payload:
        failed = 0
        while True:
            try:
                return await asyncio.to_thread(self._fetch_into, graph, folder)
            except ExportError as error:
                failed += 1
                tries = RULES[Retry.transient].batch
                if not error.retryable or failed >= tries.most:
                    raise
            await asyncio.sleep(tries.wait(failed))

    def _fetch_into(self, graph: Graph, folder: Path) -> Payload:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            return self._source.fetch(graph, folder, self._limit)
        except OSError as error:
            raise StorageFailed(f"this machine's disk failed: {error.strerror or error}") from error

    def _known(self, before: Record | None, payload: Payload) -> Record | None:
        """The record of a graph that need not run again."""
        if before is None or (before.payload_sha256, before.options_sha256) != (payload.sha256, self._plan.sha256):
            return None
        if before.status == "failed":
            return None if self._retry_failed else before
        folder = self._prefix + before.folder
        whole = all(self._there.get(ref_of(folder, name)) == size for name, size in before.files.items())
        return msgspec.structs.replace(before, status="skipped") if whole else None

    # --- running --------------------------------------------------------------------------------------

    async def _work(self, slot: Slot, group: asyncio.TaskGroup) -> None:
        while (work := await self._take(slot)) is not None:
            counted = False
            work.began = work.began or asyncio.get_running_loop().time()
            try:
                await slot.ready()
                counted = True
                with self._board.running(slot.label, slot.device, work.graph) as tell:
                    keep = await slot.run(work, tell)
            except ExportError as error:
                await self._again(work, slot, error, counted=counted)
                if slot.strikes >= STRIKES:
                    await self._retire(slot, error)
                    return
                if slot.strikes:
                    await asyncio.sleep(PAUSE_SECONDS)
            else:
                group.create_task(self._keep(work, slot, keep))

    async def _take(self, slot: Slot) -> Work | None:
        """A graph to run; None once all have ended."""
        async with self._changed:
            while self._open:
                for work in self._ready:
                    if work.avoid is not slot or self._alive == 1:
                        self._ready.remove(work)
                        return work
                await self._changed.wait()
        return None

    async def _keep(self, work: Work, slot: Slot, keep: Callable[[], Kept]) -> None:
        async with self._keeps:
            try:
                kept = await asyncio.to_thread(keep)
            except ExportError as error:
                await self._again(work, slot, error, counted=True)
                return
        # Before the record that knows them is replaced.
        left = await asyncio.to_thread(self._remove_old, work.before, kept) if work.before else []
        report = kept.report
        record = Record(
            name=work.graph.name,
            source=work.graph.address,
            status="completed",
            payload_sha256=work.payload.sha256,
            options_sha256=self._plan.sha256,
            folder=kept.folder,
            files=kept.files,
            left=left,
            frames=report.capsule.frames,
            vectors=report.capsule.vectors,
            texts=report.embedding.texts,
            tokens=report.embedding.tokens,
            cache_hits=report.embedding.cache_hits,
            cost_estimate=report.embedding.cost_estimate,
            seconds=_since(work.began),
            attempts=work.attempts + 1,
            device=slot.device,
            ended_at=_now(),
        )
        if left:
            self._board.note(f"{work.graph.name}: {len(left)} files of an earlier export could not be removed")
        await self._end(work.graph, record)

    def _remove_old(self, before: Record, kept: Kept) -> list[str]:
        """Remove files of earlier exports that the new one has not replaced; answers those that could not be."""
        new = {ref_of(kept.folder, name) for name in kept.files}
        left = []
        for ref in sorted({*before.left, *(ref_of(before.folder, name) for name in before.files)} - new):
            try:
                self._destination.delete(self._prefix + ref)
            except ExportError:
                left.append(ref)
        return left

    async def _again(self, work: Work, slot: Slot, error: ExportError, *, counted: bool) -> None:
        """Back to the others, as the next one; or failed for good."""
        counted = counted and error.retry is not Retry.later  # it was not even begun, or nobody can tell
        work.attempts += counted
        if isinstance(error, Canceled):
            error = WorkerLost(error.message)
        if counted and work.attempts >= RULES[error.retry].batch.most:
            await self._end(work.graph, self._failure(work.graph, error, work=work, device=slot.device))
            return
        self._board.note(f"{work.graph.name}: again, after {error.message}")
        async with self._changed:
            work.avoid = slot if slot.strikes else None
            insort(self._ready, work, key=_order)
            self._changed.notify_all()

    def _failure(self, graph: Graph, error: ExportError, *, work: Work | None = None, device: str = "") -> Record:
        before = self._journal.get(graph.name)
        return Record(
            name=graph.name,
            source=graph.address,
            status="failed",
            payload_sha256=work.payload.sha256 if work else "",
            options_sha256=self._plan.sha256,
            folder=before.folder if before else "",  # what an earlier export left is still there
            files=before.files if before else {},
            left=before.left if before else [],
            seconds=_since(work.began) if work else 0.0,
            attempts=work.attempts if work else 0,
            device=device,
            ended_at=_now(),
            error=ErrorInfo(code=error.code, message=error.message),
        )

    async def _retire(self, slot: Slot, error: ExportError) -> None:
        await slot.close()
        self._alive -= 1
        self._board.note(f"{slot.label} ({slot.device}) takes no more graphs: {error.message}")
        if not self._alive and self._open:
            raise WorkerLost(f"no worker is left: {error.message}") from error
        async with self._changed:
            self._changed.notify_all()

    async def _end(self, graph: Graph, record: Record, *, keep: bool = True) -> None:
        if keep:
            self._journal.add(record)
        self._records.append(record)
        self._board.ended(graph, record)
        await asyncio.to_thread(shutil.rmtree, self._folder / graph.name, ignore_errors=True)
        self._room.release()
        async with self._changed:
            self._open -= 1
            self._changed.notify_all()

    # --- what came of it --------------------------------------------------------------------------------

    def summary(self, error: ExportError | None = None) -> Summary:
        """What was done; ``error`` ended it early."""
        records = sorted(self._records, key=lambda record: record.name)
        done = [record for record in records if record.status == "completed"]
        seconds = asyncio.get_running_loop().time() - self._began
        frames, tokens = sum(it.frames for it in done), sum(it.tokens for it in done)
        failed = [(it, it.error) for it in records if it.error is not None]
        errors = [ErrorInfo(code=why.code, message=why.message, details={"name": it.name}) for it, why in failed]
        if error is not None:
            errors.append(ErrorInfo(code=error.code, message=error.message))
        return Summary(
            destination=self._prefix,
            graphs=self._total,
            completed=len(done),
            failed=len(failed),
            skipped=sum(it.status == "skipped" for it in records),
            left=self._total - len(records),
            interrupted=self._stopped,
            frames=frames,
            vectors=sum(it.vectors for it in done),
            tokens=tokens,
            cache_hits=sum(it.cache_hits for it in done),
            cost_estimate=round(sum(it.cost_estimate for it in done), 6),
            seconds=round(seconds, 3),
            frames_per_second=round(frames / seconds, 1),
            tokens_per_second=round(tokens / seconds, 1),
            devices=sorted({slot.device for slot in self._slots}),
            profile=self._plan.options.get("profile"),
            per_graph=records,
            errors=errors,
        )


def _order(work: Work) -> tuple[bool, int]:
    """What was tried before comes first, then the largest: the end of a batch is short."""
    return not work.attempts, -work.graph.weight


def _since(began: float) -> float:
    return round(asyncio.get_running_loop().time() - began, 3)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
