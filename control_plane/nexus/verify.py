"""Compares the graph with the rows, document by document and edge by edge, and has repaired what differs.

A page at a time is compared while nothing is told to the graph; what is pending anyway is left out. Whatever differs is
marked as unknown, so that the second stage of the engine reads what the graph holds of it and makes it right; what no
row speaks for is removed at once.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from common.errors import ExportError
from control_plane.jobs.store import now_ms
from control_plane.nexus.engine import MARK, SyncEngine, node_of, pair, unforeseen
from control_plane.nexus.graph.port import Change, Held
from control_plane.nexus.overview import Look, LookReport
from control_plane.nexus.records import LookKind, Row, Told, unpack_near

log = structlog.get_logger()

PAGE = 500
LOOK_SECONDS = 1.0
"""Between two looks at what is asked for, and between two words about progress."""
AGAIN_SECONDS = 30.0
"""After a graph or a database that did not answer."""


class Verifier:
    """One look at a time: on a schedule, and when somebody asks, whichever replica they ask; the engine does after its
    start."""

    def __init__(self, engine: SyncEngine, *, every_seconds: float) -> None:
        """``every_seconds`` 0: only when asked."""
        self._engine = engine
        self._store = engine.store
        self._every = every_seconds or math.inf
        self._told = 0.0
        """When progress was told last."""

    async def run(self) -> None:
        """Look until canceled, where this replica syncs."""
        due = time.monotonic() + self._every
        while True:
            await self._engine.leading()
            try:
                state = await self._store.state()
                # Progress that is there now is of a look whose end nobody could be told.
                if state.asked or state.progress is not None or time.monotonic() >= due:
                    report = await self.look(state.asked or "verify")
                    due = time.monotonic() + (AGAIN_SECONDS if report.error else self._every)
            except SQLAlchemyError as error:
                log.error("a look at the graph waits for the database", exc_info=error)
            except Exception as error:
                log.error("looks at the graph go on after what nobody foresaw", exc_info=error)
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self, kind: LookKind) -> LookReport:
        """Have one look."""
        report, began = LookReport(kind=kind, started_at=now_ms()), time.monotonic()
        await self._tell(report, 0)
        try:
            if await self._store.last_row():  # or there is no graph either
                await self._engine.ready()
                await (self._clear(report) if kind == "rebuild" else self._compare(report))
        except (ExportError, SQLAlchemyError) as error:
            report.error = error.message if isinstance(error, ExportError) else "the database does not answer"
            log.warning("the graph could not be looked at", kind=kind, exc_info=error)
        except Exception as error:
            report.error = unforeseen(error)
            log.error("the graph could not be looked at", kind=kind, exc_info=error)
        report.seconds = round(time.monotonic() - began, 3)
        await self._store.put_verified(report.started_at, msgspec.json.encode(report).decode())
        log.info("the graph was looked at", **msgspec.to_builtins(report))
        self._engine.project_soon()
        return report

    async def _tell(self, report: LookReport, total: int) -> None:
        self._told = time.monotonic()
        progress = Look(report.kind, report.documents, max(total, report.documents))
        await self._store.put_progress(report.kind, msgspec.json.encode(progress).decode())

    async def _clear(self, report: LookReport) -> None:
        """Make the graph empty and have every row told anew."""
        async with self._engine.graph_lock:
            await self._store.distrust_all()
            report.repaired = await self._store.living()
            mark = await self._store.graph()
            await self._engine.clear()
            await self._engine.mark(mark or "")
            await self._store.nothing_told()

    async def _compare(self, report: LookReport) -> None:
        total, after = await self._store.living(), 0
        while True:
            async with self._engine.graph_lock:
                rows = await self._store.rows_after(after, PAGE)
                if not rows:
                    break
                await self._page(rows, report)
            after = rows[-1].id
            report.documents += sum(not row.deleted for row in rows)
            if time.monotonic() - self._told > LOOK_SECONDS:
                await self._tell(report, total)
        await self._left_over(report)

    async def _page(self, rows: Sequence[Row], report: LookReport) -> None:
        clean = {row.id: row for row in rows if not row.pending}
        report.pending += len(rows) - len(clean)
        held = await asyncio.to_thread(self._engine.graph.read, sorted(clean))
        back = await self._reverse(clean)
        lists = {row.id: {near.id: near.score for near in unpack_near(row.near)} for row in clean.values()}
        ends = {other for mine in lists.values() for other in mine} | {one for many in back.values() for one in many}
        ends |= {other for one in held.values() for other in [*one.similar, *one.lopsided]}
        told = await self._store.told(sorted(ends - clean.keys()))
        told |= {row.id: Told(row.near, pending=False) for row in clean.values()}
        wrong: set[int] = set()
        for row in clean.values():
            wrong |= self._differences(row, held.get(row.id), told, back.get(row.id, ()), report)
        if wrong:
            await self._store.distrust(sorted(wrong))
            report.repaired += len(wrong)

    async def _reverse(self, rows: dict[int, Row]) -> dict[int, list[int]]:
        """Who may have these rows in their lists."""
        found: dict[int, list[int]] = {}
        for name in {row.space for row in rows.values()}:
            space, _ = await self._engine.spaces.listed(name)
            mine = [row.id for row in rows.values() if row.space == name]
            found |= {
                id_: [near.id for near in many] for id_, many in (await asyncio.to_thread(space.reverse, mine)).items()
            }
        return found

    def _differences(
        self, row: Row, held: Held | None, told: dict[int, Told], back: Sequence[int], report: LookReport
    ) -> set[int]:
        """Rows that are to be told anew for what is wrong with this one."""
        if row.deleted:
            if held is not None:
                report.differs("document", f"document {row.id} was deleted")
                return {row.id}
            return set()
        wrong: set[int] = set()
        if held is None or held.node != node_of(row):
            report.differs("document", f"document {row.id} is {'missing' if held is None else 'another'}")
            wrong.add(row.id)
        mine = {near.id: near.score for near in unpack_near(row.near)}
        has = held.similar if held is not None else {}
        lopsided = held.lopsided if held is not None else frozenset()
        for other in {*mine, *back, *has, *lopsided}:
            end = told.get(other)
            if end is not None and end.pending:
                continue
            score = mine.get(other)
            if score is None and end is not None:
                score = next((near.score for near in unpack_near(end.near) if near.id == row.id), None)
            report.pairs += score is not None and (row.id < other)
            if score != has.get(other) or other in lopsided:
                if row.id < other or other not in told:
                    report.differs("pair", f"pair {pair(row.id, other)} is {has.get(other)}, not {score}")
                wrong |= {row.id, other} & told.keys()
        wanted = {entity for entity, is_wanted, _ in row.mentions if is_wanted}
        report.mentions += len(wanted)
        for entity in wanted ^ set(held.mentions if held is not None else ()):
            report.differs(
                "mention", f"document {row.id} and {entity}: {'missing' if entity in wanted else 'left over'}"
            )
            wrong.add(row.id)
        return wrong

    async def _left_over(self, report: LookReport) -> None:
        """Remove from the graph what no row speaks for."""
        await self._pages(self._documents_left, report)
        await self._pages(self._entities_left, report)

    async def _pages(self, page: Callable[[object, LookReport], Awaitable[object]], report: LookReport) -> None:
        after: object = None
        while True:
            async with self._engine.graph_lock:
                after = await page(after, report)
            if after is None:
                return

    async def _documents_left(self, after: object, report: LookReport) -> int | None:
        ids = await asyncio.to_thread(self._engine.graph.documents, after if isinstance(after, int) else MARK, PAGE)
        told = await self._store.told(ids)
        if extra := [id_ for id_ in ids if id_ not in told]:
            for id_ in extra:
                report.differs("document", f"document {id_} has no row")
            await self._engine.apply(Change(removed=extra))
            report.repaired += len(extra)
        return ids[-1] if ids else None

    async def _entities_left(self, after: object, report: LookReport) -> str | None:
        keys = await asyncio.to_thread(self._engine.graph.entities, after if isinstance(after, str) else "", PAGE)
        if extra := sorted(await self._store.orphans(keys)):
            for key in extra:
                report.differs("entity", f"nothing mentions {key}")
            await self._engine.apply(Change(forgotten=extra))
            report.repaired += len(extra)
        return keys[-1] if keys else None
