"""The vector cache: nothing is embedded twice, on one machine or among workers that share a bucket."""

from common.embedding.cache.embedder import CachedEmbedder
from common.embedding.cache.open import open_cache
from common.embedding.cache.port import Space, VectorCache, space_of

__all__ = ["CachedEmbedder", "Space", "VectorCache", "open_cache", "space_of"]
