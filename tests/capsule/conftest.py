"""Frames of real graphs, and memvid-sdk as the reader that users have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.embedding.static import StaticEmbedder
from common.frames.build import frames
from common.frames.model import Frame
from common.graph.canonical import canonical
from common.graph.read import read_graph

os.environ.update(MEMVID_TELEMETRY="0", MEMVID_OFFLINE="1")
DAY = "2026-01-02T00:00:00.000Z"


def frames_of(path: Path, layout: str | None = "static-v2") -> list[Frame]:
    """All frames of a graph file."""
    return list(frames(canonical(read_graph(path)), generated_at=DAY, layout=layout))


def vectors_of(given: list[Frame]) -> NDArray[np.float32]:
    """A vector for each frame that wants one."""
    return StaticEmbedder().embed([frame.embed_text for frame in given if frame.embed_text is not None]).vectors


@pytest.fixture(scope="session")
def example_frames(real_graphs: dict[str, Path]) -> list[Frame]:
    """Frames of this repository's own example graph."""
    return frames_of(real_graphs["memvid-export.graph.ndjson.gz"])


@pytest.fixture
def scripted_memvid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script where the ``memvid`` command is found first: ``bin`` below the test's folder."""

    def put(script: str) -> None:
        command = tmp_path / "bin" / "memvid"
        command.parent.mkdir()
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)

    return put


@pytest.fixture
def memvid() -> Iterator[Callable[[Path], Any]]:
    """Opens capsules with memvid-sdk, and closes them."""
    import memvid_sdk

    opened = []

    def use(path: Path) -> Any:
        memory = memvid_sdk.use("basic", str(path), mode="open", read_only=True, enable_vec=True)
        opened.append(memory)
        return memory

    yield use
    for memory in opened:
        memory.close()
