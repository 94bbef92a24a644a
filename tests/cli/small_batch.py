"""A batch on slots of a test's own."""

from __future__ import annotations

from pathlib import Path

from common.embedding.choice import Choice
from common.storage import FileStorage, Storage
from control_plane.batch.board import Board
from control_plane.batch.journal import Journal
from control_plane.batch.run import Batch
from control_plane.batch.slots import Plan, Slot
from control_plane.batch.sources import GraphSource

PLAN = Plan({"semanticEnabled": False}, Choice(), "2026-11-21T10:00:00.000Z", "0" * 64)


def batch_of(source: GraphSource, root: Path, *slots: Slot, storage: Storage | None = None) -> Batch:
    """All graphs of a source, kept below ``root``; payloads are fetched into its ``payloads``."""
    storage = storage or FileStorage([root])
    prefix = root.as_uri() + "/"
    graphs = source.graphs()
    return Batch(
        source,
        graphs,
        slots,
        plan=PLAN,
        journal=Journal(storage, prefix),
        destination=storage,
        prefix=prefix,
        there={},
        folder=root / "payloads",
        max_payload_bytes=1_000,
        retry_failed=False,
        board=Board(graphs),
    )
