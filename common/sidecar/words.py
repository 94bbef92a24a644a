"""The full text of a sidecar: for each word the nodes that hold it, and how much it says about each (BM25F).

FTS5 looks at every row that holds a word, and at its length: 17 ms a query at 50,000 nodes. Here all that does not
depend on the query is worked out when the sidecar is built, so that a search adds up a few arrays; and each field has
its own length and weight, which FTS5 has no way to say.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.text import split_identifier, stem

FIELDS = {
    "name": 4.0,
    "path": 1.0,
    "signature": 0.5,
    "container": 0.7,
    "callers": 0.5,
    "callees": 0.5,
    "processes": 0.3,
    "body": 0.3,
}
"""Weights of the fields (at most eight); ``docs/decisions.md`` says how they were found."""
SATURATION = 2.0
"""BM25's k1: how soon more of a word says no more."""
LENGTH_SHARE = 0.75
"""BM25's b: how much a word in a long field counts less."""
NAME_LENGTH_SHARE = 1.0
"""The same for names: of a name of two words, each is half of what it says."""

_TOKENS = re.compile(r"\w+")
_KNOWN_TOKENS = 200_000
_FULL = 255
"""An impact of 1, which none reaches."""
_GAP = 65_535

Row = tuple[str, int, bytes]


class Postings(NamedTuple):
    """Where one word stands."""

    positions: NDArray[np.int64]
    """Of the nodes, in order; some may come with an impact of 0."""
    impacts: NDArray[np.uint8]


class _Tokens(dict[str, tuple[int, ...]]):
    """The numbers of the words of a token; each distinct token is split and stemmed once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __missing__(self, token: str) -> tuple[int, ...]:
        numbers = self.numbers
        if len(self) > _KNOWN_TOKENS:
            self.clear()
        words = self[token] = tuple(
            numbers.setdefault(stem(word), len(numbers)) for word in split_identifier(token).split()
        )
        return words


class WordIndex:
    """Collects the words of all nodes and gives the rows of the table ``words``; 4 bytes a word until then."""

    def __init__(self) -> None:
        self._known = _Tokens()
        self._words = array("I")
        self._owners = array("I")
        self._fields = array("B")
        self._lengths = array("I")

    def split(self, text: str) -> tuple[int, ...]:
        """The numbers of the words of a text."""
        return tuple(chain.from_iterable(map(self._known.__getitem__, _TOKENS.findall(text))))

    def add(self, position: int, field: str, words: Iterable[int]) -> None:
        """Words (see ``split``) that a node has in a field, which they make up together."""
        before = len(self._words)
        self._words.extend(words)
        length = len(self._words) - before
        if length:
            self._owners.append(position)
            self._fields.append(_NUMBER[field])
            self._lengths.append(length)

    def add_text(self, position: int, field: str, text: str) -> None:
        """The same for the words of a text."""
        self.add(position, field, chain.from_iterable(map(self._known.__getitem__, _TOKENS.findall(text))))

    def rows(self) -> Iterator[Row]:
        """(word, how many nodes hold it, packed postings) in order of the words."""
        if not self._words:
            return
        numbers = self._known.numbers
        lengths = np.frombuffer(self._lengths, dtype=np.uint32)
        fields = np.frombuffer(self._fields, dtype=np.uint8)
        owners, places = np.unique(np.frombuffer(self._owners, dtype=np.uint32), return_inverse=True)
        weights = _weights(fields, places, lengths, len(owners))
        vocabulary = sorted(numbers)
        ranks = np.empty(len(vocabulary), dtype=np.int64)
        ranks[[numbers[word] for word in vocabulary]] = np.arange(len(vocabulary))
        # One number for word, node and field: sorting them all is most of the work, and numbers sort quickest.
        packed = ranks[np.frombuffer(self._words, dtype=np.uint32)]
        packed *= len(owners)
        packed += np.repeat(places, lengths)
        packed <<= 3
        packed += np.repeat(fields, lengths)
        packed.sort()
        keys = packed >> 3
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        frequencies = np.add.reduceat(weights[packed & 7, keys % len(owners)], starts)
        impacts = np.rint(_FULL * frequencies / (SATURATION + frequencies)).clip(1, _FULL - 1).astype(np.uint8)
        keys = keys[starts]
        places = keys % len(owners)
        first = np.flatnonzero(np.diff(keys // len(owners), prepend=-1))
        holders = np.diff(first, append=len(keys))
        gaps = np.diff(owners[places].astype(np.int64), prepend=0)
        gaps[first] = owners[places[first]]
        steps = np.maximum(gaps - 1, 0) // _GAP
        if steps.any():
            last = np.cumsum(steps + 1) - 1
            first = last[first] - steps[first]
            gaps, impacts = _spread(gaps - steps * _GAP, last, _GAP), _spread(impacts, last, 0)
        gap_bytes, impact_bytes = gaps.astype("<u2").tobytes(), impacts.tobytes()
        ends = [*first[1:].tolist(), len(impacts)]
        for word, count, start, end in zip(vocabulary, holders.tolist(), first.tolist(), ends, strict=True):
            yield word, count, gap_bytes[2 * start : 2 * end] + impact_bytes[start:end]


def _spread(values: NDArray[Any], last: NDArray[np.int64], between: int) -> NDArray[Any]:
    spread = np.full(int(last[-1]) + 1, between, dtype=values.dtype)
    spread[last] = values
    return spread


_NUMBER = {field: number for number, field in enumerate(FIELDS)}


def _weights(
    fields: NDArray[np.uint8], places: NDArray[np.int64], lengths: NDArray[np.uint32], nodes: int
) -> NDArray[np.float64]:
    """What one word counts, of shape (fields, nodes): less in a longer field."""
    weights = np.zeros((len(FIELDS), nodes))
    for number, (field, weight) in enumerate(FIELDS.items()):
        here = fields == number
        if here.any():
            own = lengths[here]
            share = NAME_LENGTH_SHARE if field == "name" else LENGTH_SHARE
            weights[number, places[here]] = weight / (1 - share + share * own / own.mean())
    return weights


def unpack(packed: bytes) -> Postings:
    """The postings of a row: gaps between positions in two bytes each, then impacts.

    A wider gap has steps of impact 0 in it.
    """
    count = len(packed) // 3
    gaps = np.frombuffer(packed, dtype="<u2", count=count)
    return Postings(np.cumsum(gaps, dtype=np.int64), np.frombuffer(packed, dtype=np.uint8, offset=2 * count))


def scores(rows: Iterable[Row], nodes: int, end: int) -> NDArray[np.float32]:
    """The BM25F score of each position below ``end`` for the rows of a query's words; ``nodes`` in all hold words."""
    total = np.zeros(end, dtype=np.float32)
    for _, holders, packed in rows:
        rarity = math.log(1 + (nodes - holders + 0.5) / (holders + 0.5))
        positions, impacts = unpack(packed)
        # No position comes twice in the postings of a word.
        total[positions] += impacts * np.float32(rarity * (SATURATION + 1) / _FULL)
    return total


def best_rows(found: NDArray[np.float32], limit: int) -> NDArray[np.int64]:
    """Where the highest scores above 0 stand, best first, equal ones in order."""
    rows = np.flatnonzero(found > 0)
    if len(rows) > limit:
        least = np.partition(found[rows], len(rows) - limit)[len(rows) - limit]
        rows = rows[found[rows] >= least]
    return rows[np.lexsort((rows, -found[rows]))[:limit]]
