"""Splitting identifiers into words, and words into what is indexed: for embedding texts, the sidecar and queries."""

from __future__ import annotations

import re
from functools import lru_cache
from unicodedata import combining, normalize

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


@lru_cache(maxsize=65_536)
def stem(word: str) -> str:
    """The form under which a lower-case word is indexed: without accents, endings and abbreviation.

    ``exporting``, ``exports`` and ``exporter`` -> ``export``; ``params`` -> ``paramet``, as ``parameter`` does. Words
    of other scripts stay as they are.
    """
    if not word.isascii():
        decomposed = normalize("NFKD", word)
        word = "".join(letter for letter in decomposed if not combining(letter)).lower()
    word = ABBREVIATIONS.get(word, word)
    if len(word) < _SHORTEST or not word.isascii():
        return word
    if word.endswith("ies") and len(word) > 4:
        word = f"{word[:-3]}y"
    elif word.endswith(("sses", "shes", "ches", "xes")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    word = ABBREVIATIONS.get(word, word)
    for ending in ("ing", "ed"):
        root = word.removesuffix(ending)
        if root != word and len(root) >= 3 and not _VOWELS.isdisjoint(root):
            word = root[:-1] if len(root) > 3 and root[-1] == root[-2] and root[-1] not in "lsz" else root
            break
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= _SHORTEST:
            return word[: -len(ending)]
    return word


_SHORTEST = 4
"""Letters that a word has to keep."""
_VOWELS = frozenset("aeiouy")
_ENDINGS = (
    *("ization", "isation", "ation", "ition", "ator", "ion", "or", "er", "ment", "able", "ible"),
    *("al", "ly", "ize", "ise", "ate", "e"),
)

# fmt: off
ABBREVIATIONS = {
    "addr": "address", "app": "application", "arg": "argument", "async": "asynchronous", "attr": "attribute",
    "auth": "authentication", "authenticate": "authentication", "bool": "boolean", "calc": "calculate",
    "cfg": "configuration", "cmd": "command", "conf": "configuration", "config": "configuration",
    "configure": "configuration", "conn": "connection", "ctx": "context", "db": "database", "del": "delete",
    "dict": "dictionary", "dir": "directory", "doc": "documentation", "env": "environment", "err": "error",
    "eval": "evaluate", "exc": "exception", "exec": "execute", "fn": "function", "func": "function",
    "gen": "generator", "idx": "index", "impl": "implementation", "info": "information", "init": "initialize",
    "int": "integer", "iter": "iterate", "kwarg": "argument", "len": "length", "lib": "library", "max": "maximum",
    "min": "minimum", "msg": "message", "num": "number", "obj": "object", "opt": "option", "param": "parameter",
    "pkg": "package", "prev": "previous", "proc": "process", "prop": "property", "ref": "reference",
    "repr": "representation", "req": "request", "resp": "response", "seq": "sequence", "spec": "specification",
    "src": "source", "stmt": "statement", "str": "string", "sync": "synchronous", "temp": "temporary",
    "tmp": "temporary", "tok": "token", "util": "utility", "val": "value", "var": "variable", "ws": "websocket",
}
# fmt: on
"""What names in code cut short, and the words that people write for it."""
