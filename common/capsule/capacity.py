"""How much a graph will take, estimated before anything is written."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import zstandard

from common.capsule.port import CAPACITY_BYTES, MAX_INDEX_BYTES
from common.frames.model import Frame

MARGIN = 0.90
"""Share of a limit that a plan uses; samples of the two real graphs were off by 3% at most."""
_TOC_BYTES_PER_FRAME = 260
"""A frame's fixed fields and lengths in the TOC, without its texts."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that frames will take, scaled from a sample."""

    payload: int
    """Compressed texts: counts against Memvid's capacity."""
    toc: int
    vectors: int
    frames: int

    @property
    def parts(self) -> int:
        """Files that the frames need, each within the capacity and the largest readable index."""
        needed = max(self.payload / CAPACITY_BYTES, self.toc / MAX_INDEX_BYTES, self.vectors / MAX_INDEX_BYTES)
        return max(1, -(-int(needed * 1_000_000) // int(MARGIN * 1_000_000)))

    @property
    def frames_per_part(self) -> int:
        """Frames of each part but the last."""
        return -(-self.frames // self.parts)


def estimate(sample: Iterable[Frame], *, frames: int, dimension: int | None, embedded: int) -> Estimate:
    """Estimate ``frames`` frames, ``embedded`` of which get a vector, from a sample spread evenly over them."""
    compressor = zstandard.ZstdCompressor(level=3)
    count = payload = toc = 0
    for frame in sample:
        count += 1
        payload += len(compressor.compress(frame.text.encode()))
        fields = (frame.uri, frame.title, frame.track, *frame.tags, frame.extra)
        toc += _TOC_BYTES_PER_FRAME + sum(8 + len(field.encode()) for field in fields)
    scale = frames / max(1, count)
    return Estimate(
        payload=int(payload * scale),
        toc=int(toc * scale),
        vectors=8 + embedded * (16 + 4 * dimension) if dimension else 0,
        frames=frames,
    )
