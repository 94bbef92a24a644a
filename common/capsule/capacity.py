"""How much a graph will take and how it is cut into parts, estimated before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import islice

import msgspec
import zstandard

from common.capsule.port import CAPACITY_BYTES, MAX_INDEX_BYTES
from common.embedding.choice import WHAT, What
from common.errors import CapacityExceeded
from common.frames.build import META_FRAMES, frames
from common.frames.model import Frame
from common.graph.model import Graph

SHARE = 0.90
"""Share of a limit that a first plan uses."""
COARSE = 500
FINE = 10_000
"""Frames that are looked at: few where all of them plainly fit into one part, else many, as every part must fit."""
ROOMY = 0.5
"""Part of the share that all frames may take where a coarse sample is to do."""
_HEADER_AND_WAL = 4_096 + 65_536
_TOC_BYTES_PER_FRAME = 105
"""A frame's other fields in the TOC, from the real graphs."""
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
    graph: Graph,
    *,
    generated_at: str,
    layout: str | None = None,
    what: Collection[What] = WHAT,
    dimension: int | None = None,
    capacity: int = CAPACITY_BYTES,
    share: float = SHARE,
) -> Plan:
    """Cut a graph's frames into parts that stay within ``share`` of the capacity and of the largest readable index.

    Looks at a sample, spread evenly. Every part also holds the meta frames. Raises CapacityExceeded where a part could
    hold nothing else.
    """
    frames_of = partial(frames, generated_at=generated_at, layout=layout, what=what)
    coarse = _plan(graph, frames_of, dimension, capacity, share=share * ROOMY, sample=COARSE)
    return coarse if len(coarse.parts) == 1 else _plan(graph, frames_of, dimension, capacity, share=share, sample=FINE)


def _plan(
    graph: Graph,
    frames_of: Callable[[Graph], Iterator[Frame]],
    dimension: int | None,
    capacity: int,
    *,
    share: float,
    sample: int,
) -> Plan:
    stride = max(1, (len(graph.nodes) + len(graph.relations)) // sample)
    thinned = msgspec.structs.replace(graph, nodes=graph.nodes[::stride], relations=graph.relations[::stride])
    looked_at = frames_of(thinned)
    cost = _Coster(dimension)
    meta = list(islice(looked_at, META_FRAMES))
    stand_for = [*_weights(len(graph.nodes), stride), *_weights(len(graph.relations), stride)]
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
    for frame, times in zip(looked_at, stand_for, strict=True):
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


def _weights(count: int, stride: int) -> Iterator[int]:
    """How many items each of ``items[::stride]`` stands for."""
    for start in range(0, count, stride):
        yield min(stride, count - start)


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
