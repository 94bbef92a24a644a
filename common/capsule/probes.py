"""Chooses what the gate asks for, while the frames pass by on their way to the writer."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.capsule.gate import FrameDigest, FrameProbe, GatePlan, VectorProbe, WordProbe
from common.capsule.port import CapsuleWriter
from common.frames.model import Frame

FRAMES = 24
WORDS = 8
VECTORS = 8
_WORD_CANDIDATES = 400
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*")
_MIN_WORD = 6
_TOKEN = re.compile(r"[^\W_]+")
_MAX_TOKEN = 30
_QUERY_WORDS = 25
_QUERY_CHARS = 1_000
"""All words of the first of the chunks that memvid-sdk cuts; see ``common.capsule.sdk``."""
_OPERATORS = frozenset({"and", "or", "not"})
_PHRASE = '"GitNexus capsule manifest"'
"""Stands in the manifest frame of every part, so that each has a lexical probe whatever its names are."""
_MANIFEST = "mv2://meta/manifest"
_COMMON_DEGREE = 12
"""Names in more relations than this are no rare words: their relation frames come before the node's own."""


def query_of(text: str) -> str:
    """The first words of a text, as a query that finds its frame in files that memvid wrote itself too."""
    if len(text) > _QUERY_CHARS:
        text = " ".join(text[:_QUERY_CHARS].split()[:-1])  # the last one may be half a word
    words = dict.fromkeys(word.lower() for word in _TOKEN.findall(text))
    plain = [word for word in words if word.isascii() and word[0].isalpha() and 2 <= len(word) <= _MAX_TOKEN]
    return " ".join([word for word in plain if word not in _OPERATORS][:_QUERY_WORDS])


class Probes:
    """Probes of one part: its first and last frame and some between, rare names, vectors that are unique."""

    def __init__(self, seed: str, expected_frames: int, writer: CapsuleWriter) -> None:
        chosen = random.Random(seed)  # noqa: S311 - a sample, not a secret
        self._positions = set(chosen.sample(range(expected_frames), min(FRAMES, expected_frames)))
        self._word_stride = max(1, expected_frames // _WORD_CANDIDATES)
        self._vector_stride = max(1, expected_frames // (VECTORS * 8))
        self._writer = writer
        self._count = self._vectors = 0
        self._frames: list[Frame] = []
        self._last: Frame | None = None
        self._words: dict[str, str] = {}
        self._names: Counter[str] = Counter()
        self._equal: Counter[int] = Counter()
        self._candidates: list[tuple[int, str, list[float]]] = []
        self._frame_digest = FrameDigest()
        self._vector_digest = hashlib.sha256()

    def see(self, frames: Sequence[Frame], vectors: NDArray[np.float32] | None) -> None:
        """Take what is wanted of the next frames of the part."""
        if not frames:
            return
        if self._writer.exact:
            self._frame_digest.add((uri, title, track, tags, text) for uri, title, track, _, tags, text, *_ in frames)
            if vectors is not None:
                self._vector_digest.update(np.ascontiguousarray(vectors).data)
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
                # By vector, not by text: the same words in another order have the same static vector.
                key = hash(vectors[row].tobytes())
                self._equal[key] += 1
                if self._vectors % self._vector_stride == 0:
                    self._candidates.append((key, frame.uri, vectors[row].tolist()))
                row += 1
                self._vectors += 1
        self._last = frames[-1]

    def plan(self, path: Path) -> GatePlan:
        """The gate's plan for the written part."""
        writer = self._writer
        frames = {frame.uri: frame for frame in [*self._frames, *([self._last] if self._last else [])]}
        words = sorted(self._words, key=lambda word: (self._names[word], word))[:WORDS]
        unique = [(uri, values) for key, uri, values in self._candidates if self._equal[key] == 1]
        return GatePlan(
            path=str(path),
            frames=self._count,
            exact=writer.exact,
            vectors=self._vectors,
            reader="cli" if writer.name == "cli" else "sdk",
            frame_probes=[
                FrameProbe(
                    uri=frame.uri,
                    title=frame.title,
                    track=None if writer.name == "sdk" and frame.embed_text is not None else frame.track,
                    tags=frame.tags,
                    text=frame.text,
                )
                for frame in frames.values()
            ],
            word_probes=[
                WordProbe(word=_PHRASE, uri=_MANIFEST),
                *(WordProbe(word=word, uri=self._words[word]) for word in words if self._names[word] <= _COMMON_DEGREE),
            ]
            if writer.name != "sdk"
            else [WordProbe(word=query_of(frame.text), uri=frame.uri) for frame in frames.values()],
            vector_probes=[VectorProbe(values=values, uri=uri) for uri, values in unique[:VECTORS]],
            frames_sha256=self._frame_digest.hexdigest() if writer.exact else None,
            vectors_sha256=self._vector_digest.hexdigest() if writer.exact else None,
        )
