"""The cache that a machine's settings name."""

from __future__ import annotations

from pathlib import Path

from common.embedding.cache.port import VectorCache
from common.embedding.cache.sqlite import SqliteCache
from common.embedding.cache.storage import StorageCache
from common.embedding.choice import Engines
from common.errors import InvalidSettings
from common.storage import Storage


def open_cache(engines: Engines, storage: Storage | None) -> VectorCache | None:
    """The cache of ``engines``: a file of SQLite, or segments under a prefix of ``storage``; None where it names none.

    Reads and writes nothing yet. Raises InvalidSettings for a prefix without a storage, or a path that is not absolute.
    """
    place = engines.cache
    if place is None:
        return None
    if "://" in place:
        if storage is None or not place.endswith("/"):
            raise InvalidSettings("a vector cache in object storage needs a storage and a prefix that ends in /")
        return StorageCache(storage, place, engines.cache_bytes)
    if not Path(place).is_absolute():
        raise InvalidSettings("the path of a vector cache must be absolute")
    return SqliteCache(Path(place), engines.cache_bytes)
