"""Chooses what the gate asks for, while the frames pass by on their way to the writer."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.capsule.gate import FrameProbe, GatePlan, VectorProbe, WordProbe
from common.capsule.port import CapsuleWriter
from common.frames.model import Frame

FRAMES = 24
WORDS = 8
VECTORS = 8
_WORD_CANDIDATES = 400
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*")
_MIN_WORD = 6
_COMMON_DEGREE = 12
"""Names in more relations than this are no rare words: their relation frames come before the node's own."""


class Probes:
    """Probes of one part: its first and last frame and some between, rare names, vectors that are unique."""

    def __init__(self, seed: str, expected_frames: int) -> None:
        chosen = random.Random(seed)  # noqa: S311 - a sample, not a secret
        self._positions = set(chosen.sample(range(expected_frames), min(FRAMES, expected_frames)))
        self._word_stride = max(1, expected_frames // _WORD_CANDIDATES)
        self._vector_stride = max(1, expected_frames // (VECTORS * 8))
        self._count = self._vectors = 0
        self._frames: list[Frame] = []
        self._last: Frame | None = None
        self._words: dict[str, str] = {}
        self._names: Counter[str] = Counter()
        self._texts: Counter[int] = Counter()
        self._candidates: list[tuple[int, str, list[float]]] = []

    def see(self, frames: Sequence[Frame], vectors: NDArray[np.float32] | None) -> None:
        """Take what is wanted of the next frames of the part."""
        row = 0
        for frame in frames:
            position = self._count
            self._count += 1
            if position == 0 or position in self._positions:
                self._frames.append(frame)
            if frame.kind == "relation":
                first, _, rest = frame.title.partition(" ")
                self._names[first] += 1
                self._names[rest.rpartition(" ")[2]] += 1
            elif frame.kind == "node":
                name = frame.title.partition(": ")[2]
                self._names[name] += 1
                if position % self._word_stride == 0 and len(name) >= _MIN_WORD and _WORD.fullmatch(name):
                    self._words[name] = frame.uri
            if frame.embed_text is not None and vectors is not None:
                key = hash(frame.embed_text)
                self._texts[key] += 1
                if self._vectors % self._vector_stride == 0:
                    self._candidates.append((key, frame.uri, vectors[row].tolist()))
                row += 1
                self._vectors += 1
        if frames:
            self._last = frames[-1]

    def plan(self, path: Path, writer: CapsuleWriter) -> GatePlan:
        """The gate's plan for the written part."""
        frames = {frame.uri: frame for frame in [*self._frames, *([self._last] if self._last else [])]}
        words = sorted(self._words, key=lambda word: (self._names[word], word))[:WORDS]
        unique = [(uri, values) for key, uri, values in self._candidates if self._texts[key] == 1]
        return GatePlan(
            path=str(path),
            frames=self._count,
            exact=writer.name == "native",
            vectors=self._vectors,
            reader="cli" if writer.name == "cli" else "sdk",
            frame_probes=[
                FrameProbe(uri=frame.uri, title=frame.title, track=frame.track, tags=frame.tags, text=frame.text)
                for frame in frames.values()
            ],
            word_probes=[
                WordProbe(word=word, uri=self._words[word]) for word in words if self._names[word] <= _COMMON_DEGREE
            ],
            vector_probes=[VectorProbe(values=values, uri=uri) for uri, values in unique[:VECTORS]],
        )
