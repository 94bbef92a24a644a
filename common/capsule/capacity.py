"""How much a graph will take and how it is cut into parts, estimated before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import zstandard

from common.capsule.port import CAPACITY_BYTES, MAX_INDEX_BYTES
from common.errors import CapacityExceeded
from common.frames.model import Frame

SHARE = 0.90
"""Share of a limit that a first plan uses; samples of the two real graphs were off by 3% at most."""
_HEADER_AND_WAL = 4_096 + 65_536
_TOC_BYTES_PER_FRAME = 260
"""A frame's fixed fields and lengths in the TOC, without its texts."""
_LEVEL = 3


class Costs(msgspec.Struct):
    """Bytes of frames: of their compressed texts, in the TOC, in the vector index."""

    payload: float = 0.0
    toc: float = 0.0
    vectors: float = 0.0

    def add(self, other: Costs, times: float) -> None:
        """Count ``other`` so many times more."""
        self.payload += other.payload * times
        self.toc += other.toc * times
        self.vectors += other.vectors * times


class Plan(msgspec.Struct, frozen=True):
    """How many frames each part takes, its meta frames not counted, and what all parts take together."""

    parts: list[int]
    costs: Costs


def plan(
    sample: Iterable[tuple[Frame, int]],
    *,
    meta: Sequence[Frame],
    dimension: int | None,
    capacity: int = CAPACITY_BYTES,
    share: float = SHARE,
) -> Plan:
    """Cut frames into parts that stay within ``share`` of the capacity and of the largest readable index.

    ``sample`` gives frames in order, each with the number of frames it stands for; every part also holds the ``meta``
    frames. Raises CapacityExceeded where a part could hold nothing else.
    """
    cost = _Coster(dimension)
    own = Costs(payload=_HEADER_AND_WAL)
    for frame in meta:
        own.add(cost.of(frame), 1)
    limits = [
        ((capacity - own.payload) * share, "payload"),
        ((MAX_INDEX_BYTES - own.toc) * share, "toc"),
        (MAX_INDEX_BYTES * share, "vectors"),
    ]
    if min(limits)[0] <= 0:
        raise CapacityExceeded(f"a capsule of {capacity:,} bytes has no room beside its own {int(own.payload):,}")
    parts, total, used = [0], Costs(), Costs()
    for frame, times in sample:
        one = cost.of(frame)
        total.add(one, times)
        left = times
        while left:
            fits = min(int((limit - getattr(used, name)) / max(getattr(one, name), 1e-9)) for limit, name in limits)
            if fits <= 0 and parts[-1]:
                parts.append(0)
                used = Costs()
                continue
            taken = min(left, max(1, fits))
            parts[-1] += taken
            used.add(one, taken)
            left -= taken
    total.add(own, len(parts))
    return Plan(parts, total)


class _Coster:
    def __init__(self, dimension: int | None) -> None:
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self._row = 16 + 4 * dimension if dimension else 0

    def of(self, frame: Frame) -> Costs:
        fields = (frame.uri, frame.title, frame.track, *frame.tags, frame.extra)
        return Costs(
            payload=len(self._compressor.compress(frame.text.encode())),
            toc=_TOC_BYTES_PER_FRAME + sum(8 + len(field.encode()) for field in fields),
            vectors=self._row if frame.embed_text is not None else 0,
        )
