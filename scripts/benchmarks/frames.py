"""Frames for the benchmarks: made from real graphs, in any number, and kept in a file: memory is the writer's own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.frames.build import META_FRAMES, frames
from common.frames.model import Frame
from common.graph.canonical import canonical
from common.graph.read import read_graph

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data" / "gitnexus"
DIMENSION = 384
BATCH = 512
DAY = "2026-01-02T00:00:00.000Z"

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Frame]).decode


def graphs() -> list[Path]:
    """The real graphs that are here: the example, and larger ones where they lie beside the repository."""
    named = [SHARED / "litestar.export.json.gz", SHARED / "runpod-python.export.json.gz"]
    return [*(path for path in named if path.exists()), ROOT / "examples" / "memvid-export.graph.ndjson.gz"]


def real_frames() -> Iterator[Frame]:
    """Frames without end: the graphs one after the other, then again as copies under another root folder."""
    sources = [list(frames(canonical(read_graph(path)), generated_at=DAY))[META_FRAMES:] for path in graphs()]
    copy = 0
    while True:
        for source in sources:
            for frame in source:
                yield frame if copy == 0 else _moved(frame, f"copy{copy}")
        copy += 1


def _moved(frame: Frame, root: str) -> Frame:
    """The frame of the same symbol in a vendored copy: its ids, paths and so its terms are its own."""
    head, _, tail = frame.uri.partition("//")
    kind, _, name = tail.partition("/")
    text = frame.text.replace(":", f":{root}/", 1).replace("filePath=", f"filePath={root}/", 1)
    return frame._replace(uri=f"{head}//{kind}/{root}/{name}", text=text, embed_text=frame.title)


def store(folder: Path, count: int) -> tuple[Path, Path]:
    """Write ``count`` frames and a unit vector for each into two files; both are read back in batches."""
    frames_path, vectors_path = folder / f"frames-{count}.msgpack", folder / f"vectors-{count}.npy"
    random = np.random.default_rng(7)
    with frames_path.open("wb") as file:
        stream = islice(real_frames(), count)
        while batch := [frame._replace(embed_text="x") for frame in islice(stream, BATCH)]:
            data = _encode(batch)
            file.write(len(data).to_bytes(4, "little") + data)
    vectors = np.lib.format.open_memmap(vectors_path, mode="w+", dtype=np.float32, shape=(count, DIMENSION))
    for start in range(0, count, 10_000):
        rows = random.standard_normal((min(10_000, count - start), DIMENSION), dtype=np.float32)
        vectors[start : start + len(rows)] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    vectors.flush()
    return frames_path, vectors_path


def stored(frames_path: Path, vectors_path: Path) -> Iterator[tuple[list[Frame], NDArray[np.float32]]]:
    """The stored frames and vectors, batch by batch."""
    start = 0
    with frames_path.open("rb") as file, vectors_path.open("rb") as vectors:
        vectors.seek(128)  # the .npy header
        while head := file.read(4):
            batch = _decode(file.read(int.from_bytes(head, "little")))
            rows = np.frombuffer(vectors.read(len(batch) * DIMENSION * 4), dtype=np.float32)
            yield batch, rows.reshape(-1, DIMENSION)
            start += len(batch)
