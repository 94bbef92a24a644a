"""Splitting identifiers into words: one rule for embedding texts, the sidecar's full text and its queries."""

from __future__ import annotations

import re
from functools import lru_cache

_WORDS = re.compile(r"[A-Z]{2,}s(?![^\W\d_])|[A-Z]+(?![^\W\d_A-Z])|[A-Z]?[^\W\d_A-Z]+|\d+")
"""An acronym in the plural, an acronym (up to where a capitalised word starts), a word, or a run of digits."""


def split_identifier(name: str) -> str:
    """Split a name at case changes, digits and everything that is no letter, into lower-case words joined by a space.

    ``getUserById`` -> ``get user by id``, ``HTTPServer2`` -> ``http server 2``, ``max_snippet_chars`` ->
    ``max snippet chars``, ``userIDs`` -> ``user ids``. Letters of any script count; a name without letters and
    digits gives the empty string.
    """
    return _split(name) if len(name) > _CACHED_LENGTH else _split_cached(name)


_CACHED_LENGTH = 200
"""Longer names are split without the cache, so that it stays under 32 MB."""


def _split(name: str) -> str:
    return " ".join(_WORDS.findall(name)).lower()


_split_cached = lru_cache(maxsize=65_536)(_split)
