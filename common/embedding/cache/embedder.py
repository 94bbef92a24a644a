"""An embedder over another one that embeds nothing twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.embedding.cache.port import KEY_BYTES, Space, VectorCache, is_whole, seal, space_of
from common.embedding.port import Embedded, Embedder, Keep, Model, Purpose
from common.errors import ExportError

_POLL_SECONDS = 0.1
_THREADS = 2
"""As many as the pipeline calls from."""
_TRUNCATED = 1
_NORM_TOLERANCE = 1e-3
"""What half-precision arithmetic may be away from unit length."""
_T = TypeVar("_T")


class _Found(NamedTuple):
    """What a cache had."""

    keys: list[bytes]
    vectors: NDArray[np.float32]
    cut: NDArray[np.bool_]


class CachedEmbedder:
    """Takes from a cache what it has, embeds the rest, and each of several equal texts in one call once.

    Questions are not kept: they seldom come twice. A cache that fails is left alone until the next ``flush``: then all
    texts are embedded as if there were none.
    """

    def __init__(self, embedder: Embedder, cache: VectorCache) -> None:
        """Both are closed with this one."""
        self._embedder, self._cache = embedder, cache
        self.model: Model = embedder.model
        self.group = embedder.group
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="cache")
        self._lock = threading.Lock()
        self._failed: dict[str, str] = {}
        self._damaged = 0

    def embed(
        self,
        texts: Sequence[str],
        *,
        purpose: Purpose = "document",
        should_stop: Callable[[], None] = lambda: None,
        keep: Keep | None = None,
    ) -> Embedded:
        """See the port. ``truncated`` names the same texts whether they came from the cache or not; ``cache_hits``
        counts all texts whose vector the cache had."""
        if purpose != "document":
            return self._embedder.embed(texts, purpose=purpose, should_stop=should_stop, keep=keep)
        space = space_of(self.model)
        rows: dict[bytes, int] = {}
        by_text = space.keys(texts)
        row_of = np.array([rows.setdefault(key, len(rows)) for key in by_text], dtype=np.intp)
        distinct = dict(zip(by_text, texts, strict=True))
        vectors = np.empty((len(rows), self.model.dimension), dtype=np.float32)
        cut = np.zeros(len(rows), dtype=bool)
        known = np.zeros(len(rows), dtype=bool)
        keys = list(rows)
        records = self._try("read", lambda: self._cache.get(space, keys), should_stop)
        if records:
            found = self._sound(space, records)
            places = np.array([rows[key] for key in found.keys], dtype=np.intp)
            vectors[places], cut[places], known[places] = found.vectors, found.cut, True
        missing = np.flatnonzero(~known)
        engine = Embedded(vectors[:0], 0, [], 0)
        if len(missing):
            answered: dict[int, bytes] = {}

            def answer(place: int, vector: NDArray[np.float32], was_cut: bool) -> None:
                key = keys[missing[place]]
                answered[place] = seal(key, vector.tobytes(), _TRUNCATED * was_cut)

            try:
                engine = self._embedder.embed(
                    [distinct[keys[row]] for row in missing], should_stop=should_stop, keep=answer
                )
            except ExportError:
                kept = list(answered.values())  # paid for: the next attempt need not pay again
                if kept:
                    self._try("written", lambda: self._cache.put(space, kept), lambda: None)
                raise
            vectors[missing] = engine.vectors
            cut[missing[engine.truncated]] = True
            made = [seal(keys[row], vectors[row].tobytes(), _TRUNCATED * int(cut[row])) for row in missing]
            self._try("written", lambda: self._cache.put(space, made), should_stop)
            if self.model.price_per_million_tokens:  # a worker that is killed must not pay again
                self._try("shared", self._cache.flush, should_stop)
        return Embedded(
            vectors[row_of] if len(rows) < len(texts) else vectors,
            engine.tokens,
            np.flatnonzero(cut[row_of]).tolist(),
            engine.batches,
            int(known[row_of].sum()),
            engine.retries,
        )

    def count_tokens(self, texts: Sequence[str]) -> int:
        """See the port: of what the cache lacks, equal texts once."""
        space = space_of(self.model)
        by_key = dict(zip(space.keys(texts), texts, strict=True))
        known = self._try("read", lambda: self._cache.has(space, list(by_key)), lambda: None) or set()
        missing = [text for key, text in by_key.items() if key not in known]
        return self._embedder.count_tokens(missing) if missing else 0

    def flush(self, should_stop: Callable[[], None] = lambda: None) -> str | None:
        """End an export, failed or not: what it added is written for others, and a cache that failed is tried anew.

        Answers in one line what kept the cache from its work since the last time, None where nothing did.
        """
        earlier = self._told()
        self._try("written", self._cache.flush, should_stop)  # also after a failure: it lets go of what was gathered
        said = [*earlier, *self._told(), self._embedder.flush(should_stop)]
        return "; ".join(dict.fromkeys(filter(None, said))) or None

    def close(self) -> None:
        """See the port; waits for what the cache is doing."""
        self._pool.shutdown()
        self._cache.close()
        self._embedder.close()

    def _told(self) -> list[str]:
        """What went wrong, which is forgotten."""
        with self._lock:
            said = list(self._failed.values())
            if self._damaged:
                said.append(f"{self._damaged:,} vectors of the cache were damaged and were made anew")
            self._failed, self._damaged = {}, 0
        return said

    def _try(self, what: str, work: Callable[[], _T], should_stop: Callable[[], None]) -> _T | None:
        """What ``work`` answers; None where it fails, now or before. A cache that can be read may still be full."""
        if what in self._failed:
            return None
        future = self._pool.submit(work)
        while not wait([future], _POLL_SECONDS).done:
            should_stop()
        try:
            return future.result()
        except ExportError as error:
            with self._lock:
                self._failed.setdefault(what, f"the vector cache could not be {what}: {error.message}")
            return None

    def _sound(self, space: Space, records: Sequence[bytes]) -> _Found:
        """The records that are as they were put; what is not counts as damaged."""
        whole = [record for record in records if len(record) == space.record_bytes and is_whole(record)]
        values = np.frombuffer(b"".join(whole), dtype="<f4").reshape(len(whole), space.record_bytes // 4)
        vectors, flags = values[:, KEY_BYTES // 4 : -2], values[:, -2].view("<u4")
        # False for what is not finite; squared, the tolerance is twice as large.
        unit = np.abs(np.einsum("ij,ij->i", vectors, vectors) - 1) < 2 * _NORM_TOLERANCE
        with self._lock:
            self._damaged += len(records) - int(unit.sum())
        keys = [record[:KEY_BYTES] for record, sound in zip(whole, unit, strict=True) if sound]
        return _Found(keys, vectors[unit], flags[unit] & _TRUNCATED != 0)
