"""A worker's run of a job, in the test's own process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from common.capsule.gate import Gate
from common.contract import JobInput, JobOutput, Progress
from common.embedding.choice import Choice
from common.embedding.static import StaticEmbedder
from common.graph.model import GraphLimits
from common.storage import Storage
from handler.job import run_job


def run_here(
    job: JobInput,
    storage: Storage,
    scratch: Path,
    *,
    gate: Gate | None = None,
    emit: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], None] = lambda: None,
    generated_at: str = "2026-11-21T10:00:00.000Z",
) -> JobOutput:
    """Export a job's payload and publish it, with the engine that needs no settings; without ``gate`` through one of
    its own."""
    with nullcontext(gate) if gate is not None else Gate() as opened:
        return run_job(
            job,
            storage=storage,
            scratch=scratch,
            limits=GraphLimits(),
            writer=None,
            choose=lambda _: Choice(),
            embedder=lambda _: StaticEmbedder(),
            gate=opened,
            emit=emit,
            should_stop=should_stop,
            generated_at=generated_at,
        )
