"""Keeps the graph in step with the rows of documents.

Two stages, each of which takes what its watermark says is pending, in the order in which it was written:

1. *Relate*: the document's list of those that resemble it most, its domain and its entities, and the lists of others
   that change by that; all in one transaction with the watermark.
2. *Project*: what changed becomes one change of the graph. What the graph may hold afterwards is noted before it is
   told, so that a change that got there by half, or that nobody heard the end of, is made good by the next one.

An insert waits for neither, and a process that ends at any point goes on from the rows. Of several replicas one does
this, the one that has the lease; the transactions of one that lost it fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import secrets
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple

import structlog
from sqlalchemy.exc import SQLAlchemyError

from common.errors import ExportError
from control_plane.jobs.store import now_ms
from control_plane.nexus.domains import Domains
from control_plane.nexus.entities import entities
from control_plane.nexus.graph.port import (
    Change,
    DocumentNode,
    GraphRefused,
    GraphStore,
    GraphUnavailable,
    Held,
    Mention,
    Similar,
)
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.records import (
    HELD,
    MAX_ATTEMPTS,
    Graphed,
    Near,
    Related,
    Row,
    Unrelated,
    unpack_near,
)
from control_plane.nexus.space import Space
from control_plane.nexus.spaces import Spaces
from control_plane.nexus.store import LEASE_MS, CollectionStore, LeaseLost

log = structlog.get_logger()

RELATED = 100
"""Documents of one step of the first stage, and more where there is a space of more than ``LARGE``, in proportion: each
step looks through all lists of its space."""
LARGE = 250_000
PROJECTED = 500
"""Documents of one step of the second: a commit of the graph for all of them."""
GATHER_SECONDS = 0.15
"""After a step that took all that waited: what comes meanwhile goes into one step. A step is several transactions, and
inserts wait for each of them."""
LOOK_SECONDS = 0.25
"""Between two looks at the rows where nobody says that there is something: other replicas write too."""
RENEW_SECONDS = LEASE_MS / 1_000 / 3
PAUSES = (0.25, 0.5, 1.0, 2.0, 5.0)
"""Seconds after a graph that did not answer, by how often it has not; the last one for good."""
RETRY_SECONDS = (1, 2, 4)
"""Before a document that the graph refused is tried again."""
MARK = 0
"""A document that no row has: its ``vector_id`` says which graph this is."""
UNCONFIRMED = math.nan
"""The score of a pair that the graph may have, or may have with another score."""


class Status(NamedTuple):
    """What the engine does."""

    leads: bool
    """This replica syncs."""
    enabled: bool
    graph: str
    """What answers; empty: not asked yet."""
    trouble: str | None
    """Why the graph is behind, where it is not for work."""


class SyncEngine:
    """The loops of both stages, and of the lease."""

    def __init__(
        self,
        store: CollectionStore,
        spaces: Spaces,
        graph: GraphStore,
        *,
        domains: Domains,
        metrics: NexusMetrics,
        synced: Callable[[Sequence[Row]], Awaitable[None]],
    ) -> None:
        """``synced`` is told of documents whose last change the graph has now; of some twice, where a process ends just
        then."""
        self.store = store
        self.spaces = spaces
        self.graph = graph
        self._domains = domains
        self._metrics = metrics
        self._synced = synced
        self.graph_lock = asyncio.Lock()
        """Held by whoever changes the graph, or needs it not to change."""
        self._written, self._related = asyncio.Event(), asyncio.Event()
        self._turns = itertools.count(), itertools.count()
        self._leading = asyncio.Event()
        self._unsure = False
        """Nobody knows whether the lists of the last step were written."""
        self._enabled = True
        self._answers = ""
        self._prepared = False
        self._troubles: dict[Callable[[], Awaitable[int]], str] = {}
        """By stage."""

    @property
    def status(self) -> Status:
        """What it does now."""
        return Status(self._leading.is_set(), self._enabled, self._answers, self.trouble)

    @property
    def trouble(self) -> str | None:
        """As in ``Status``."""
        return next(iter(self._troubles.values()), None)

    def wake(self) -> None:
        """Documents were written."""
        self._written.set()

    def project_soon(self) -> None:
        """Rows are to be told to the graph."""
        self._related.set()

    async def run(self) -> None:
        """Sync until canceled; then another replica may at once."""
        loops = [
            self._lease(),
            self._loop(self._relate, RELATED, self._written),
            self._loop(self._project, PROJECTED, self._related),
        ]
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            await asyncio.gather(*tasks)
        finally:
            self._leading.clear()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            async with self.graph_lock:  # nothing is told to the graph any more once another replica may
                try:
                    await self.store.release_lease()
                except SQLAlchemyError as error:
                    log.warning("the lease lapses by itself", exc_info=error)

    async def leading(self) -> None:
        """Wait until this replica syncs."""
        await self._leading.wait()

    async def while_leading(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Work only as long as this replica syncs, each time anew."""
        while True:
            await self._leading.wait()
            working = asyncio.create_task(work())
            try:
                while self._leading.is_set() and not working.done():
                    await asyncio.wait({working}, timeout=LOOK_SECONDS)
                if working.done():
                    working.result()
            finally:
                working.cancel()

    # --- the lease ---------------------------------------------------------------------------------------------------

    async def _lease(self) -> None:
        while True:
            try:
                self._enabled = (await self.store.state()).enabled
                has = self._enabled and await self.store.take_lease()
                new = has and not self._leading.is_set()
                if new:
                    # What a process that was killed in the middle of a look has left would keep all others away.
                    await self.store.put_progress("verify", None)
                    # A change of the one before may have reached the graph after all that this one knows of.
                    await self.store.ask("verify")
            except SQLAlchemyError as error:
                log.error("the lease of the graph cannot be kept", again_in_seconds=RENEW_SECONDS, exc_info=error)
                has = new = False
            if new:
                log.info("this replica keeps the graph in step")
                self._prepared = False
                self._leading.set()
            elif not has and self._leading.is_set():
                self._let_go()
            await asyncio.sleep(RENEW_SECONDS)

    def _let_go(self) -> None:
        log.info("this replica does not keep the graph in step any more", enabled=self._enabled)
        self._leading.clear()
        self.spaces.drop_lists()

    # --- the loops ---------------------------------------------------------------------------------------------------

    async def _loop(self, step: Callable[[], Awaitable[int]], full: int, woken: asyncio.Event) -> None:
        failures = 0
        while True:
            await self._leading.wait()
            woken.clear()
            try:
                count = await step()
                failures = 0
                self._troubles.pop(step, None)
            except LeaseLost:
                self._let_go()
                continue
            except GraphUnavailable as error:
                self._prepared = False
                self._troubles[step] = f"the graph database does not answer: {error.message}"
                self._metrics.errors.labels(error.code).inc()
                log.warning("the graph waits", reason=error.message, failures=failures)
            except GraphRefused as error:  # of all, not of one document
                self._troubles[step] = error.message
                self._metrics.errors.labels(error.code).inc()
                log.error("the graph cannot be used", reason=error.message)
            except SQLAlchemyError as error:
                log.error("sync waits for the database", exc_info=error)
            except Exception as error:
                self._troubles[step] = unforeseen(error)
                self._metrics.errors.labels(ExportError.code).inc()
                log.error("sync waits after what nobody foresaw", failures=failures, exc_info=error)
            else:
                if not count:
                    await _wait(woken, LOOK_SECONDS)
                elif count < full:
                    await asyncio.sleep(GATHER_SECONDS)
                continue
            pause = PAUSES[min(failures, len(PAUSES) - 1)]
            failures += 1
            await _wait(woken if failures == 1 else asyncio.Event(), pause * (1 + random.random() / 4))  # noqa: S311

    # --- stage 1 -----------------------------------------------------------------------------------------------------

    async def _relate(self) -> int:
        """Compare what was written with the rest of its space."""
        if self._unsure:
            # A database that gave no answer may still write: this waits until it has.
            await self.store.take_lease()
            self._unsure = False
        largest = max(map(len, self.spaces.whole.values()), default=0)
        rows = await self.store.unrelated(RELATED * max(1, largest // LARGE), next(self._turns[0]))
        groups: dict[str, list[Unrelated]] = defaultdict(list)
        for row in rows:
            groups[row.space].append(row)
        for name, written in groups.items():
            with self.spaces.using(name):
                space, version = await self.spaces.listed(name)
                group = [row for row in written if row.version <= version]  # what was not seen is not compared
                began = time.perf_counter()
                lists, done = await asyncio.to_thread(self._compare, space, group)
                try:
                    await self.store.put_related(done, lists)
                except BaseException:
                    self.spaces.drop(name)  # its lists are not those of the rows
                    self._unsure = True
                    raise
                self.spaces.drop(name, unless=space)  # read meanwhile, it may have the lists of before
                self._metrics.batch.labels("relate").observe(len(group))
                self._metrics.stage_seconds.labels("relate").observe(time.perf_counter() - began)
            self._related.set()
        return len(rows)

    def _compare(self, space: Space, rows: Sequence[Unrelated]) -> tuple[dict[int, list[Near]], list[Related]]:
        lists = space.relate([row.id for row in rows])
        return lists, [
            Related(row.id, row.version, "", frozenset())
            if row.deleted
            else Related(
                row.id,
                row.version,
                self._domains.of(row.collection, row.doc_type, f"{row.title}\n{row.text}"),
                entities(f"{row.title}\n{row.text}"),
            )
            for row in rows
        ]

    # --- stage 2 -----------------------------------------------------------------------------------------------------

    async def _project(self) -> int:
        """Tell the graph what changed."""
        turn = next(self._turns[1])
        rows = await self.store.ungraphed(PROJECTED, now_ms(), turn)
        if rows and not self._prepared:
            await self.ready()
            rows = await self.store.ungraphed(PROJECTED, now_ms(), turn)
        if rows:
            async with self.graph_lock:
                began = time.perf_counter()
                await self._tell(rows)
                self._metrics.batch.labels("project").observe(len(rows))
                self._metrics.stage_seconds.labels("project").observe(time.perf_counter() - began)
        return len(rows)

    async def ready(self) -> None:
        """Have the graph ready to be asked, and know whether it is the one that was told."""
        if self._prepared:
            return
        async with self.graph_lock:
            await asyncio.to_thread(self.graph.prepare)
            self._answers = await asyncio.to_thread(self.graph.probe)
            held = (await asyncio.to_thread(self.graph.read, [MARK])).get(MARK)
            mark = held.node.vector_id if held is not None and held.node is not None else None
            if mark is None:
                mark = secrets.token_hex(16)
                await self.mark(mark)
            told = await self.store.graph()
            ahead = await self._remove_beyond(await self.store.last_row())
            if told != mark or ahead:
                log.info(
                    "this graph was told of other documents than there are: all are told anew",
                    graph=self._answers,
                    removed=ahead,
                )
                await self.store.distrust_all()
                await self.store.put_graph(mark)
                if told is not None:
                    await self.store.ask("verify")  # what it holds beyond
        self._prepared = True

    async def _remove_beyond(self, last: int) -> int:
        """Remove documents whose ids no row has had yet, and new ones will get: a graph knows such after the rows were
        put back from a backup. Answers how many."""
        count = 0
        while ids := await asyncio.to_thread(self.graph.documents, last, PROJECTED):
            await self.apply(Change(removed=ids))
            count += len(ids)
        return count

    async def mark(self, mark: str) -> None:
        """Write into the graph which one it is, so that one that is put in its place is noticed."""
        node = DocumentNode(MARK, mark, "", "", "", "", "", 0, 0)
        await self.apply(Change(documents=[node]))

    async def apply(self, change: Change) -> None:
        """Tell the graph; for who holds ``graph_lock``."""
        await _to_its_end(lambda: self.graph.apply(change))

    async def clear(self) -> None:
        """Make the graph empty; for who holds ``graph_lock``."""
        await _to_its_end(self.graph.clear)

    async def _tell(self, rows: Sequence[Row]) -> None:
        """One change for these rows; where the graph refuses it, one for each half."""
        change = await self._change(rows)
        await self.store.put_intended({row.id: _either(row) for row in rows if row.told is not None}, rows)
        try:
            await self.apply(change)
        except GraphRefused as error:
            self._metrics.errors.labels(error.code).inc()
            if len(rows) > 1:
                middle = len(rows) // 2
                await self._tell(await self._again(rows[:middle]))
                await self._tell(await self._again(rows[middle:]))
                return
            row = rows[0]
            pause = RETRY_SECONDS[min(row.attempts, len(RETRY_SECONDS) - 1)]
            await self.store.put_failed([row.id], error.message, now_ms() + 1_000 * pause)
            self._metrics.synced(row.collection, "failed" if row.attempts + 1 >= MAX_ATTEMPTS else "retried", None)
            log.warning("the graph refuses a document", document=row.id, attempt=row.attempts + 1, reason=error.message)
            return
        now = now_ms()
        # Before it is noted: better twice than never. Lists of others that changed by it are no news.
        await self._synced([row for row in rows if row.news])
        done = [Graphed(row.id, row.wanted, row.near, row.mentions, row.version if row.news else 0) for row in rows]
        await self.store.put_graphed(done, now)
        self._metrics.relationships.labels("SIMILAR_TO").inc(len(change.similar))
        self._metrics.relationships.labels("MENTIONS").inc(len(change.mentions))
        for row in rows:
            self._metrics.synced(row.collection, "synced", max(0, now - row.changed_at) / 1_000)

    async def _again(self, rows: Sequence[Row]) -> list[Row]:
        """The same rows, with what was noted of them since."""
        told = await self.store.told_of([row.id for row in rows])
        return [row._replace(told=told.get(row.id)) for row in rows]

    async def _change(self, rows: Sequence[Row]) -> Change:
        """What makes the graph hold of these rows what they say."""
        living = [row for row in rows if not row.deleted]
        unknown = [row.id for row in living if row.told is None]
        held = await asyncio.to_thread(self.graph.read, unknown) if unknown else {}
        similar: dict[tuple[int, int], float] = {}
        doubted: dict[int, list[int]] = {}
        """By the owner of a list, those that are in it no more."""
        for row in living:
            told = _told(row, held.get(row.id))
            own = {near.id: near.score for near in unpack_near(row.near)}
            similar |= {pair(row.id, other): score for other, score in own.items() if told.get(other) != score}
            doubted[row.id] = [other for other in told if other not in own]
        kept = {row.id: {near.id: near.score for near in unpack_near(row.near)} for row in living}
        others = {other for gone in doubted.values() for other in gone} - kept.keys()
        for other, told_of in (await self.store.told_of(sorted(others)) if others else {}).items():
            kept[other] = {near.id: near.score for near in unpack_near(told_of)} if told_of is not None else {}
        dissimilar = set()
        for owner, gone in doubted.items():
            for other in gone:
                score = kept.get(other, {}).get(owner, UNCONFIRMED)
                if math.isnan(score):
                    dissimilar.add(pair(owner, other))
                else:
                    similar[pair(owner, other)] = score
        mentions, unmentioned = _mentions(living, held)
        removed = [row.id for row in rows if row.deleted]
        lost = {mention.entity for mention in unmentioned}
        lost |= {entity for row in rows if row.deleted for entity, *_ in row.mentions}
        forgotten = await self.store.orphans(sorted(lost), [row.id for row in rows]) if lost else set()
        return Change(
            documents=[node_of(row) for row in living],
            similar=[Similar(a, b, score) for (a, b), score in sorted(similar.items())],
            mentions=mentions,
            dissimilar=sorted(dissimilar - similar.keys()),
            unmentioned=unmentioned,
            removed=removed,
            forgotten=sorted(forgotten),
        )


def pair(one: int, other: int) -> tuple[int, int]:
    return (one, other) if one < other else (other, one)


def _told(row: Row, held: Held | None) -> dict[int, float]:
    """By id, the score of each pair that the graph may have because of this row's list."""
    if row.told is not None:
        return {near.id: near.score for near in unpack_near(row.told)}
    if held is None:
        return {}
    return dict(held.similar) | dict.fromkeys(held.lopsided, UNCONFIRMED)


def _either(row: Row) -> list[Near]:
    """What the graph may hold of a row's list once it is told: what it held, and what it is to hold."""
    told, own = unpack_near(row.told or b""), unpack_near(row.near)
    sure = set(told)
    return [near if near in sure else near._replace(score=UNCONFIRMED) for near in own] + [
        near._replace(score=UNCONFIRMED) for near in told if near.id not in {one.id for one in own}
    ]


def _mentions(rows: Iterable[Row], held: dict[int, Held]) -> tuple[list[Mention], list[Mention]]:
    """Mentions that the graph is to be told, and those that it is to lose."""
    there, gone = [], []
    for row in rows:
        wanted = {entity for entity, is_wanted, _ in row.mentions if is_wanted}
        if row.told is None:
            has = held[row.id].mentions if row.id in held else frozenset()
            sure = maybe = has
        else:
            sure = frozenset(entity for entity, _, is_held in row.mentions if is_held == HELD)
            maybe = frozenset(entity for entity, _, is_held in row.mentions if is_held)
        there += [Mention(row.id, entity) for entity in sorted(wanted - sure)]
        gone += [Mention(row.id, entity) for entity in sorted(maybe - wanted)]
    return there, gone


def node_of(row: Row) -> DocumentNode:
    return DocumentNode(
        id=row.id,
        vector_id=row.doc_id,
        client=row.client,
        collection=row.collection,
        title=row.title,
        domain=row.domain,
        doc_type=row.doc_type,
        created_at=row.created_at,
        version=row.version,
    )


def unforeseen(error: Exception) -> str:
    """What is said of an error of which only the log tells more."""
    return f"an error that nobody foresaw ({type(error).__name__}); the log has it"


async def _to_its_end(work: Callable[[], None]) -> None:
    """In a thread; where this is canceled it has come to its end all the same, before another replica begins."""
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(working)
    finally:
        await asyncio.wait({working})


async def _wait(woken: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):  # wait_for loses a cancellation that comes with the event
        async with asyncio.timeout(seconds):
            await woken.wait()
