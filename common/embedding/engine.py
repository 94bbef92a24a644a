"""Opening the engine of a choice, with its cache."""

from __future__ import annotations

import threading

import msgspec

from common.embedding.cache import CachedEmbedder, open_cache
from common.embedding.choice import WHAT, Choice, Engines
from common.embedding.port import Embedder
from common.embedding.static import StaticEmbedder
from common.frames.embed_text import CODE_V1
from common.storage import Storage

KEPT = 2


class OpenEngines:
    """Opens engines when they are first asked for, and keeps the last ``KEPT``; threads may share it."""

    def __init__(self, engines: Engines, storage: Storage | None = None) -> None:
        self._engines = engines
        self._storage = storage
        self._lock = threading.Lock()
        self._open: dict[Choice, Embedder] = {}

    def get(self, choice: Choice) -> Embedder:
        """The engine of a choice. Raises what ``open_embedder`` does."""
        engine = msgspec.structs.replace(choice, what=WHAT, max_tokens=None, max_usd=None)
        with self._lock:
            embedder = self._open.pop(engine, None) or open_embedder(engine, self._engines, self._storage)
            self._open[engine] = embedder
            while len(self._open) > KEPT:
                self._open.pop(next(iter(self._open))).close()
            return embedder


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
