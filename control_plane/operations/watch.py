"""Sees how attempts and jobs end on this replica, and makes figures and spans of it."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from common.contract import Event
from control_plane.jobs.records import TERMINAL, JobRecord
from control_plane.jobs.store import JobStore, StageSpan
from control_plane.operations.metrics import Metrics
from control_plane.operations.tracing import Mark, Span, Tracing

log = structlog.get_logger()

WAITING = 1_000
"""Ends that are looked at while more come; beyond, they are not told."""
CLOSE_SECONDS = 2.0
_MS = 1_000_000


class JobWatch:
    """``saw`` is called with each change of a job's state, after its commit."""

    def __init__(self, store: JobStore, metrics: Metrics, tracing: Tracing) -> None:
        self._store = store
        self._metrics = metrics
        self._tracing = tracing
        self._tasks: set[asyncio.Task[None]] = set()

    def saw(self, job: JobRecord, event: Event) -> None:
        """The job is now so, and this event of its log says it."""
        ended = job.status in TERMINAL
        if not ended and (job.status != "queued" or not job.attempt):
            return  # It was begun.
        failed = job.status in ("failed", "queued")
        if not (failed or self._tracing.on):
            return
        if len(self._tasks) >= WAITING:
            log.warning("more jobs end than can be told of", job_id=job.id)
            return
        task = asyncio.create_task(self._tell(job, event.seq, failed=failed, ended=ended))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, job: JobRecord, seq: int, *, failed: bool, ended: bool) -> None:
        try:
            found = await self._store.stages(job.id, before=seq)
        except SQLAlchemyError as error:
            log.warning("how a job ended cannot be told", job_id=job.id, reason=type(error).__name__)
            return
        if not found:  # it was forgotten meanwhile
            return
        waited, *stages = found
        if failed:
            self._metrics.failed_stage.labels(stages[-1].stage if stages else waited.stage).inc()
        if (request := Mark.of(job.trace)) is not None and self._tracing.on:
            self._tracing.end(_spans(job, request, waited, stages, failed=failed, ended=ended))

    async def close(self) -> None:
        """What is known is told."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)


def _spans(
    job: JobRecord, request: Mark, waited: StageSpan, stages: list[StageSpan], *, failed: bool, ended: bool
) -> list[Span]:
    """The attempt that ended with its wait and its stages, and the job where it has ended too."""
    about: dict[str, Any] = {"memvid.job_id": job.id, "memvid.backend": job.backend}
    end, code = job.updated_at * _MS, job.error.code if job.error else "RETRIED"
    whole = request.named(f"job {job.id}")
    spans = []
    begun = stages[0].start * _MS if stages else end
    attempt = about | {"memvid.attempt": job.attempt}
    queue = whole.named(f"queue {job.id} {job.attempt}")
    spans.append(Span("queue", queue, whole.span, waited.start * _MS, begun, attempt))
    if stages:
        this = whole.named(f"attempt {job.id} {job.attempt}")
        timings = job.output.metrics.get("timings", {}) if job.output else {}
        told = {f"memvid.{name}_seconds": float(value) for name, value in timings.items()}
        spans.append(Span("attempt", this, whole.span, begun, end, attempt | told, error=code if failed else None))
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            stop = following.start * _MS if following else end
            mark = this.named(f"{stage.stage} {job.id} {job.attempt}")
            wrong = code if failed and following is None else None
            spans.append(Span(stage.stage, mark, this.span, stage.start * _MS, stop, attempt, error=wrong))
    if ended:
        what = about | {
            "memvid.status": job.status,
            "memvid.attempts": job.attempt,
            "memvid.frames": job.frames or 0,
            "memvid.payload_bytes": job.payload_size,
        }
        if job.error is not None:
            what["memvid.code"] = job.error.code
        spans.append(Span("export", whole, request.span, job.created_at * _MS, end, what, code if job.error else None))
    return spans
