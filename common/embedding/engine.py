"""Opening the engine of a choice, with its cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from common.embedding.cache import CachedEmbedder, open_cache
from common.embedding.choice import WHAT, Choice, Engines
from common.embedding.port import Embedded, Embedder, Keep, Purpose
from common.embedding.static import StaticEmbedder
from common.errors import EmbeddingFailed
from common.frames.embed_text import CODE_V1
from common.storage import Storage

KEPT = 2
"""Engines that stay open; those in use are kept in any case."""


class OpenEngines:
    """Opens engines when they are first asked for, and keeps ``KEPT`` of those that nobody uses, the last ones used;
    threads may share it."""

    def __init__(self, engines: Engines, storage: Storage | None = None) -> None:
        self._engines = engines
        self._storage = storage
        self._lock = threading.Lock()
        self._slots: dict[Choice, _Slot] = {}

    def get(self, choice: Choice) -> Embedder:
        """The engine of a choice, for as long as the caller likes: where others took its place meanwhile, its next use
        opens it again. Raises what ``open_embedder`` does."""
        engine = msgspec.structs.replace(choice, what=WHAT, max_tokens=None, max_usd=None)
        with self.used(engine) as embedder:
            return _Reopened(self, engine, embedder)

    @contextmanager
    def used(self, engine: Choice) -> Iterator[Embedder]:
        """The engine, which is not closed meanwhile."""
        with self._lock:
            slot = self._slots.pop(engine, _Slot())
            self._slots[engine] = slot  # the last one used comes last
            slot.users += 1
        try:
            with slot.opening:  # of one engine: who asks for another one waits for nobody
                slot.embedder = slot.embedder or open_embedder(engine, self._engines, self._storage)
            yield slot.embedder
        finally:
            with self._lock:
                slot.users -= 1
                idle = [one for one, other in self._slots.items() if not other.users]
                closed = [self._slots.pop(one).embedder for one in idle[: max(0, len(self._slots) - KEPT)]]
                if slot.embedder is None and not slot.users:  # it could not be opened
                    self._slots = {one: other for one, other in self._slots.items() if other is not slot}
            for embedder in closed:
                if embedder is not None:
                    embedder.close()

    def close(self) -> None:
        """Close what is open; nobody uses it any more."""
        with self._lock:
            while self._slots:
                _, slot = self._slots.popitem()
                if slot.embedder is not None:
                    slot.embedder.close()


class _Slot:
    """One engine, from the first wish for it on."""

    def __init__(self) -> None:
        self.embedder: Embedder | None = None
        self.opening = threading.Lock()
        self.users = 0


class _Reopened:
    """An engine of ``OpenEngines``, each of whose uses may open it again."""

    def __init__(self, open_engines: OpenEngines, engine: Choice, embedder: Embedder) -> None:
        self._open, self._engine = open_engines, engine
        self.model, self.group = embedder.model, embedder.group

    def embed(
        self,
        texts: Sequence[str],
        *,
        purpose: Purpose = "document",
        should_stop: Callable[[], None] = lambda: None,
        keep: Keep | None = None,
    ) -> Embedded:
        """See the port."""
        with self._same() as embedder:
            return embedder.embed(texts, purpose=purpose, should_stop=should_stop, keep=keep)

    def count_tokens(self, texts: Sequence[str]) -> int:
        """See the port."""
        with self._same() as embedder:
            return embedder.count_tokens(texts)

    def flush(self, should_stop: Callable[[], None] = lambda: None) -> str | None:
        """See the port."""
        with self._same() as embedder:
            return embedder.flush(should_stop)

    def close(self) -> None:
        """Nothing: others may use it."""

    @contextmanager
    def _same(self) -> Iterator[Embedder]:
        with self._open.used(self._engine) as embedder:
            if embedder.model != self.model:
                raise EmbeddingFailed(f"the model {self.model.name} became another while it was not in use")
            yield embedder


def open_embedder(choice: Choice, engines: Engines, storage: Storage | None = None) -> Embedder:
    """The engine of a choice, which ``check_choice`` has passed, over the cache that ``engines`` names.

    ``storage`` holds the cache where that is a prefix of refs. Raises InvalidRequest, EmbeddingFailed, DeviceFailed.
    """
    embedder = _engine(choice, engines)
    cache = open_cache(engines, storage)
    return CachedEmbedder(embedder, cache) if cache else embedder


def _engine(choice: Choice, engines: Engines) -> Embedder:
    if choice.provider == "static":
        return StaticEmbedder()
    if choice.provider == "torch":
        from common.embedding.torch_engine import TorchEmbedder  # torch takes seconds to import, and may be absent

        if choice.mode == "local_cpu":
            engines = msgspec.structs.replace(engines, devices=("cpu",))
        return TorchEmbedder(choice.model, engines, dimension=choice.dimension, layout=choice.layout or CODE_V1)
    from common.embedding.providers import open_provider

    return open_provider(choice, engines, layout=choice.layout)
