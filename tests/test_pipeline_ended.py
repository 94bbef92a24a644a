"""Exports that fail in one of their threads while others are at work: the first error is told, and all of them end."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Any

import pytest
from left_behind import nothing_left
from test_pipeline import Breaking, Priced, content, gate, run, small

from common.capsule.gate import Gate
from common.contract import Progress
from common.errors import Canceled, StorageFailed, WriterFailed

__all__ = ["gate"]


def test_vectors_that_nobody_waits_for_any_more_are_not_made_to_their_end(tmp_path: Path, gate: Gate) -> None:
    ended: list[Exception] = []

    class Endless(Priced):
        def embed(self, texts: Any, **more: Any) -> Any:
            if self.texts:  # those after the first, which the writer gets
                for _ in range(3_000):
                    try:
                        more["should_stop"]()
                    except Canceled as error:
                        ended.append(error)
                        raise
                    threading.Event().wait(0.01)
            return super().embed(texts, **more)

    with nothing_left(), pytest.raises(WriterFailed, match="the medium broke"):
        run(small(4_000), tmp_path, gate, engine=Endless(), writers={"native": lambda: Breaking(0)})
    assert [str(error) for error in ended] == ["the export has ended"] * len(ended)
    assert ended
    assert content(tmp_path) == set()


def test_a_disk_that_is_full_when_the_index_is_sealed_fails_the_export(tmp_path: Path, gate: Gate) -> None:
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(progress: Progress) -> None:
        if progress.stage == "build_sidecar":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, usual[1]))

    try:
        with nothing_left(), pytest.raises(StorageFailed, match="Cannot finish the sidecar") as failed:
            run(small(), tmp_path, gate, on_progress=full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert failed.value.retryable
    assert content(tmp_path) == set()
