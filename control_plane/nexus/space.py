"""Vectors that may be compared with each other, in memory: who is nearest to whom, and to a question.

Two documents' score is the cosine of their float32 vectors of unit length, rounded to six decimals. A document's list
holds those with the highest scores not below a threshold: the higher first, of equal ones the one whose id is closer
to its own, then the lower id, so that documents that are all the same do not all name the same few.

Up to ``EXACT_UP_TO`` documents everything is exact. A float32 matrix product finds the pairs that matter, with room
for its error; those are summed in float64. The sum is exact but for some 1e-13, which changes no sixth decimal but
beside a half, and there the sum is made without any error: so every way to compute a score gives the same one.
Above, an index names candidates (``index.py``), of which the scores are exact. What is not in it yet is compared one by
one, and so is everything for a document of which the index did not name all that reach the threshold, and while it
cannot be asked.

What a list must hold follows from two rules. It has every document whose place in it would be before its *horizon*,
which is unbounded where the list has everything above the threshold. And some more than ``top_k`` are kept, so that
only a list that lost several has to be asked for anew.

At 100,000 documents of 256 dimensions in clusters of 100, on a busy machine of 2 cores: 100 new documents are related
in 0.15 s, which changes 1,900 lists, 100 changed ones in 0.25 s, 100 that are gone in 0.1 s; a question takes 9 ms, and
20 ms beside that. With an index, at 220,000: 0.15 s and 2 ms, and it finds all that belongs in lists.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import InvalidRequest
from control_plane.nexus.index import Held, IndexLost, IndexUnavailable, VectorIndex, prints_of
from control_plane.nexus.lists import (
    MAX_ID,
    MILLION,
    NO_PAIRS,
    NOBODY,
    NOTHING,
    UNBOUNDED,
    Flags,
    Lists,
    Pairs,
    Slots,
    holders_of,
    joined,
    packed,
    places_of,
    ranked,
    rounded,
    scores_at,
    scores_of,
    stacked,
)
from control_plane.nexus.nearest import Nearest
from control_plane.nexus.records import THRESHOLD, TOP_K, Near, Vector

EXACT_UP_TO = 200_000
"""Documents in a space that are all looked at for each comparison."""
SPARE = 8
"""Kept in each list beyond those that anybody sees."""
TOLERANCE = 1e-4
"""So far from 1 a vector's length may be."""
INDEXED_AT_ONCE = 1_000
"""Vectors at least that each ``relate`` brings to an index in memory while that lacks some, in about 0.2 s."""

_INDEXED_FOR_EACH = 25
"""And as many for each document: a vector that the index lacks is compared with all that are still to come."""
_TURN_SECONDS = 1.0
_PUT_AT_ONCE = 256
"""Vectors, for which a search waits about 1 ms."""
_ASKED_AT_ONCE = 128
"""Documents that are compared with a block of others in one product: at most 8 MiB of similarities."""
_PAIRS_AT_ONCE = 2_048
"""Summed: 8 MiB of float64 at 256 dimensions."""
_ROOM = 1_024
"""Slots at least by which a space grows."""
_LOADED_AT_ONCE = 1_024
"""Lists, or vectors of a snapshot."""
_CANDIDATES = 4
"""So many times what is wanted the index is asked for."""
_MOST_CANDIDATES = 8_192
"""That the index is asked for at once."""
_ROUGH = 0.02
"""By which a score of an index may be wrong: it keeps vectors roughly. What it says of one that it has not, or of one
that is another by now, is further off."""
_BROUGHT_AT_ONCE = 256
"""Vectors, to the index."""
_MOST_LEFT = 100_000
"""Ids that are kept of what an index that is not in use may have; it has others then that it does not know of."""
_FEW = 50_000
"""Documents that a search is restricted to, up to which they are all looked at."""
_BESIDE = 64
"""Found beyond what is wanted, as some may be taken away before the search is over."""
_TRIES = 3
"""Searches, where more than that were taken away."""

_Packed = bytes
_ENTRY = np.dtype([("id", "<i8"), ("score", "<f8")])
"""What ``records.pack_near`` writes."""


@dataclass
class _Lines:
    """What is kept of each slot, but its vector."""

    ids: Slots
    live: Flags
    """May be found."""
    pending: Flags
    """Was put, and not related since."""
    listed: Flags
    """A list may have it."""
    indexed: Flags
    """The index has its vector."""
    stamp: Slots
    """The tick of its last ``put``."""
    near: NDArray[np.int32]
    micro: NDArray[np.int32]
    horizon: Slots

    @staticmethod
    def make(count: int, kept: int) -> _Lines:
        """Lines of slots that nothing is in."""
        return _Lines(
            ids=np.full(count, NOBODY, np.int64),
            live=np.zeros(count, np.bool_),
            pending=np.zeros(count, np.bool_),
            listed=np.zeros(count, np.bool_),
            indexed=np.zeros(count, np.bool_),
            stamp=np.zeros(count, np.int64),
            near=np.full((count, kept), NOBODY, np.int32),
            micro=np.zeros((count, kept), np.int32),
            horizon=np.full(count, UNBOUNDED, np.int64),
        )

    def grown(self) -> _Lines:
        """The same, with room for a quarter more."""
        larger = _Lines.make(len(self.ids) + max(_ROOM, len(self.ids) // 4), self.near.shape[1])
        for one in fields(self):
            old = getattr(self, one.name)
            getattr(larger, one.name)[: len(old)] = old
        return larger

    def put_lists(self, slots: Slots, lists: Lists) -> None:
        """Give these slots these lists."""
        self.near[slots], self.micro[slots], self.horizon[slots] = lists
        self.listed[lists.near[lists.near >= 0]] = True


class _View(NamedTuple):
    """A space at one moment. Slots that were put since then have a later stamp; of those the rest may be of before or
    of after."""

    tick: int
    used: int
    lines: _Lines
    live: Flags
    indexed: Flags
    blocks: Sequence[Vector]
    nearest: VectorIndex | None
    """None: everything is looked at."""


class _Found(NamedTuple):
    """What a search found; nothing that was put since it began."""

    slots: Slots
    micro: Slots
    more: bool
    """There was more."""


class Space:
    """Documents with their vectors and lists; for any threads.

    Lists are right once every id that was put has been related, in any order and in any groups; until then they are
    right but for those. One ``relate`` runs at a time; ``put``, ``near`` and ``search`` do not wait for it.
    """

    def __init__(
        self,
        dimension: int,
        *,
        top_k: int = TOP_K,
        threshold: float = THRESHOLD,
        exact_up_to: int = EXACT_UP_TO,
        mirrored: bool = False,
    ) -> None:
        """``threshold`` is of the rounded score; ``mirrored``: the index is one that outlives this space and that
        ``use`` names, and it is to hold every vector. It is asked above ``exact_up_to`` documents all the same."""
        self._dimension = dimension
        self._top_k = top_k
        self._kept = top_k + SPARE
        self._threshold = threshold
        self._exact_up_to = exact_up_to
        # The error of a float32 sum of so many products; rounding and lengths of vectors add less than 1e-5.
        self._margin = 1e-5 + dimension * 2.0**-24 * (1 + 3 * TOLERANCE)
        # At most 16 MiB, or what 256 vectors take.
        self._block = 1 << min(14, max(8, 22 - (dimension - 1).bit_length()))
        self._blocks: list[Vector] = []
        self._lines = _Lines.make(_ROOM, self._kept)
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._used = self._count = self._tick = 0
        self._mirrored = mirrored
        self._index: VectorIndex | None = None
        self._left: set[int] = set()
        """Ids of which the index may have vectors of before."""
        self.moved = 0
        """Vectors that were brought to the index, and taken from it."""
        self._untold: set[int] = set()
        """Ids whose lists are others here than in their rows."""
        self._at_work = False
        """A ``relate`` runs: a slot that it has seen must stay the same document's."""
        self._lock = threading.Lock()
        self._relating = threading.Lock()
        self._indexing = threading.Lock()

    def __len__(self) -> int:
        """Documents that a search finds."""
        return self._count

    @property
    def bytes(self) -> int:
        """What it takes of memory: at 256 dimensions 1,400 for a document, and 850 more where there is an index."""
        vectors = self._used * self._dimension * 4
        slots = sys.getsizeof(self._slots) + 64 * len(self._slots)
        lines = sum(int(getattr(self._lines, one.name).nbytes) for one in fields(self._lines))
        index = self._index
        return vectors + slots + lines + (index.bytes if index is not None else 0)

    # --- what is in it -----------------------------------------------------------------------------------------------

    def put(self, vectors: Mapping[int, Vector | None]) -> None:
        """Documents that are new or changed, with vectors of shape (dimension,) and unit length, or None: gone.

        A search finds them as they are now once this returns. Put all that is known before ``relate`` is called: what
        it compares with others that are about to change is done for nothing. Raises InvalidRequest.
        """
        several = iter(vectors.items())
        while part := [self._checked(one, vector) for one, vector in islice(several, _PUT_AT_ONCE)]:
            with self._lock:
                self._tick += 1
                for one, vector in part:
                    if vector is None:
                        self._take_out(one)
                    else:
                        self._put(one, vector)

    def load_lists(self, lists: Iterable[tuple[int, _Packed]]) -> None:
        """Lists as rows have them, of documents that were put before, which then count as related.

        Of documents that were never put there are no lists, and lists are kept without them: ``relate`` then says
        these anew.
        """
        several = iter(lists)
        with self._relating:
            while part := list(islice(several, _LOADED_AT_ONCE)):
                with self._lock:
                    self._load([(self._slots[one], packed) for one, packed in part if one in self._slots])

    def near(self, id: int) -> list[Near]:  # noqa: A002
        """A document's list."""
        with self._lock:
            slot = self._slots.get(id)
            return [] if slot is None else self._told(np.array([slot]))[id]

    def reverse(self, ids: Sequence[int]) -> dict[int, list[Near]]:
        """Who has these in their lists, the highest score first; takes about 5 ms for each 100,000 documents."""
        with self._lock:
            slots = self._known(ids)
            lists = self._lines.near[: self._used, : self._top_k]
        holders = holders_of(lists, slots)
        with self._lock:
            lines = self._lines
            rows, at = np.nonzero(np.isin(lines.near[holders, : self._top_k], slots))
            holders = holders[rows]
            held = lines.ids[lines.near[holders, at]].tolist()
            holding = list(map(Near, lines.ids[holders].tolist(), (lines.micro[holders, at] / MILLION).tolist()))
        found: dict[int, list[Near]] = {one: [] for one in ids}
        for one, near in zip(held, holding, strict=True):
            if one in found:  # and not another that has its slot by now
                found[one].append(near)
        return {one: sorted(near, key=lambda other: (-other.score, other.id)) for one, near in found.items()}

    # --- lists -------------------------------------------------------------------------------------------------------

    def relate(self, ids: Sequence[int]) -> dict[int, list[Near]]:
        """Compare documents that were put, or that are gone: their lists, and all others that change by that.

        With no ids: the lists that ``load_lists`` found to name documents that are not there.
        """
        with self._relating:
            # Who brings some now is done in time; who writes a snapshot is not waited for.
            if not self._mirrored and self._index is not None and self._indexing.acquire(timeout=_TURN_SECONDS):
                try:
                    self._catch_up(self._index, max(INDEXED_AT_ONCE, _INDEXED_FOR_EACH * len(ids)))
                finally:
                    self._indexing.release()
            with self._lock:
                self._at_work = True
            try:
                return self._relate(ids)
            finally:
                with self._lock:
                    self._at_work = False

    def _relate(self, ids: Sequence[int]) -> dict[int, list[Near]]:
        with self._lock:
            view = self._view()
            batch, untold = self._known(ids), self._known(self._untold)
            pending = view.lines.pending[: view.used].copy()
        standing, fallen = batch[view.live[batch]], batch[~view.live[batch]]
        closed = pending | ~view.live
        closed[batch] = True
        own, entering = self._compare(view, standing, closed)
        holders = holders_of(view.lines.near[: view.used], batch[view.lines.listed[batch]])
        if view.nearest is not None:
            entering = self._staying(view, holders[~closed[holders]], standing, entering)
        others = np.setdiff1d(np.concatenate([holders, entering.rows, untold]), batch)
        # Lists that are made anew anyway lose only what is gone. The last slot is nobody's.
        leaves = np.zeros((2, view.used + 1), np.bool_)
        leaves[0, batch] = leaves[1, fallen] = True
        leave = leaves[closed[others].astype(np.intp)[:, None], view.lines.near[others]]
        merged = self._merged(view, others, leave, entering)
        size = np.count_nonzero(merged.near >= 0, axis=1)
        short = (size < self._top_k) & (merged.horizon < UNBOUNDED) & ~closed[others]
        anew, _ = self._compare(view, others[short])
        merged.near[short], merged.micro[short], merged.horizon[short] = anew
        with self._lock:
            lines = self._lines
            seen = (lines.near[others, : self._top_k], lines.micro[others, : self._top_k])
            lines.put_lists(others, merged)
            lines.put_lists(standing, own)
            lines.put_lists(fallen, packed(len(fallen), NO_PAIRS, NOTHING, self._kept))
            lines.pending[standing[lines.stamp[standing] <= view.tick]] = False
            changed = (seen[0] != merged.near[:, : self._top_k]) | (seen[1] != merged.micro[:, : self._top_k])
            told = self._told(np.concatenate([batch, others[changed.any(axis=1)], untold]))
            self._untold.clear()
            for slot in fallen[~lines.live[fallen]].tolist():
                self._release(slot)
        return {one: [] for one in ids} | told

    def _compare(self, view: _View, asking: Slots, closed: Flags | None = None) -> tuple[Lists, Pairs]:
        """Lists of some slots, made anew; and the places, by owner and one of these slots, that they take in lists
        that are not closed."""
        ids, horizon = view.lines.ids, view.lines.horizon
        made, entering = [], []
        for start in range(0, len(asking), _ASKED_AT_ONCE):
            group = asking[start : start + _ASKED_AT_ONCE]
            with self._lock:
                vectors = self._take(view.blocks, group)
            best, places = NO_PAIRS, NOTHING
            cut = np.full(len(group), self._threshold - self._margin)
            for pairs in self._similar(view, group, vectors, cut, closed):
                if closed is not None:
                    theirs = places_of(ids[pairs.slots], ids[group[pairs.rows]], pairs.micro)
                    enters = ~closed[pairs.slots] & (theirs < horizon[pairs.slots])
                    entering.append(Pairs(pairs.slots[enters], group[pairs.rows[enters]], pairs.micro[enters]))
                best = joined([best, pairs])
                places = np.concatenate([places, places_of(ids[group[pairs.rows]], ids[pairs.slots], pairs.micro)])
                chosen, rank = ranked(best.rows, places, self._kept)
                best, places = best.some(chosen), places[chosen]
                last = rank == self._kept - 1
                cut[best.rows[last]] = best.micro[last] / MILLION - self._margin
            made.append(packed(len(group), best, places, self._kept))
        return stacked(made, self._kept), joined(entering)

    def _staying(self, view: _View, holders: Slots, standing: Slots, entering: Pairs) -> Pairs:
        """Who enters lists, and who is in one already: among the candidates of the one there may not be the other."""
        stands = np.zeros(view.used + 1, np.bool_)
        stands[standing] = True
        near = view.lines.near[holders].astype(np.int64)
        rows, at = np.nonzero(stands[near])
        owners, (held, numbers) = holders[rows], np.unique(near[rows, at], return_inverse=True)
        with self._lock:
            vectors = self._take(view.blocks, held)
        pairs = Pairs(owners, held[numbers], self._scores(view, vectors, numbers, owners))
        theirs = places_of(view.lines.ids[owners], view.lines.ids[pairs.slots], pairs.micro)
        pairs = joined([entering, self._reaching(pairs.some(theirs < view.lines.horizon[owners]))])
        return pairs.some(np.unique(pairs.rows * view.used + pairs.slots, return_index=True)[1])

    def _merged(self, view: _View, others: Slots, leave: Flags, entering: Pairs) -> Lists:
        """Lists of others, without those entries that leave them, and with what enters them."""
        ids, near = view.lines.ids, view.lines.near[others].astype(np.int64)
        rows, at = np.nonzero((near >= 0) & ~leave)
        stays = Pairs(rows, near[rows, at], view.lines.micro[others][rows, at].astype(np.int64))
        pairs = joined([stays, entering._replace(rows=np.searchsorted(others, entering.rows))])
        places = places_of(ids[others[pairs.rows]], ids[pairs.slots], pairs.micro)
        return packed(len(others), pairs, places, self._kept, view.lines.horizon[others])

    def _similar(
        self, view: _View, group: Slots, vectors: Vector, cut: NDArray[np.float64], closed: Flags | None
    ) -> Iterator[Pairs]:
        """Pairs of the group's rows with others that reach the threshold, but for those that are below the row's cut
        and would enter no list that is not closed. The cuts may be raised in between."""
        asked = self._named(view, vectors, _CANDIDATES * self._kept)
        if asked is None:
            yield from self._looked_through(view, group, vectors, cut, closed, looked_at=view.live)
            return
        named, right = asked
        lowest = np.full(len(group), MILLION)
        np.minimum.at(lowest, named.rows, named.micro)
        sure = lowest / MILLION < self._threshold - _ROUGH
        sure |= np.bincount(named.rows, minlength=len(group)) == _indexed(view)
        sure &= right
        # What was in their lists is looked at again, whether the index names it or not.
        rows, at = np.nonzero(view.lines.near[group] >= 0)
        slots = view.lines.near[group[rows], at].astype(np.int64)
        there = view.live[slots] & view.indexed[slots] & sure[rows]
        rows, slots = rows[there], slots[there]
        pairs = joined([named.some(sure[named.rows]), Pairs(rows, slots, self._scores(view, vectors, rows, slots))])
        pairs = pairs.some(np.unique(pairs.rows * view.used + pairs.slots, return_index=True)[1])
        yield self._reaching(pairs.some(pairs.slots != group[pairs.rows]))
        for looked_at, some in ((view.live & ~view.indexed, sure), (view.live, ~sure)):
            mine = np.flatnonzero(some)
            if len(mine):
                parts = group[mine], vectors[mine], cut[mine]
                for pairs in self._looked_through(view, *parts, closed, looked_at=looked_at):
                    yield pairs._replace(rows=mine[pairs.rows])

    def _looked_through(
        self,
        view: _View,
        group: Slots,
        vectors: Vector,
        cut: NDArray[np.float64],
        closed: Flags | None,
        *,
        looked_at: Flags,
    ) -> Iterator[Pairs]:
        """``_similar``, of those that are looked at one by one."""
        for first, part, columns in _blocks(view, looked_at):
            similarities = vectors @ part.T
            if columns is None:
                similarities[:, ~looked_at[first : first + len(part)]] = -2
            enough = np.flatnonzero(similarities >= self._threshold - self._margin)
            rows, at = np.divmod(enough, similarities.shape[1])
            often = np.flatnonzero(np.bincount(rows, minlength=len(group)) > 8 * self._kept)
            if len(often):
                # One of them may be the row itself.
                kept = np.partition(similarities[often], -self._kept - 1, axis=1)[:, -self._kept - 1]
                cut[often] = np.maximum(cut[often], kept - 2 * self._margin)
            about = similarities[rows, at]
            slots = first + (at if columns is None else columns[at])
            wanted = about >= cut[rows]
            if closed is not None:
                last = scores_at(view.lines.horizon[slots]) / MILLION
                wanted |= ~closed[slots] & (about >= last - self._margin)
            wanted &= slots != group[rows]
            rows, at, slots = rows[wanted], at[wanted], slots[wanted]
            if 8 * len(rows) < similarities.size:
                yield self._enough(view, vectors, rows, slots)
            else:
                with self._lock:
                    wide = part.astype(np.float64)
                sums = (vectors.astype(np.float64) @ wide.T)[rows, at]
                yield self._reaching(Pairs(rows, slots, rounded(sums, vectors, rows, wide, at)))

    def _enough(self, view: _View, vectors: Vector, rows: Slots, slots: Slots) -> Pairs:
        """Of these pairs those that reach the threshold."""
        return self._reaching(Pairs(rows, slots, self._scores(view, vectors, rows, slots)))

    def _reaching(self, pairs: Pairs) -> Pairs:
        return pairs.some(pairs.micro / MILLION >= self._threshold)

    def _scores(self, view: _View, vectors: Vector, rows: Slots, slots: Slots) -> Slots:
        """Exact scores of rows of ``vectors`` with slots."""
        found = [NOTHING]
        for start in range(0, len(rows), _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            with self._lock:
                theirs = self._take(view.blocks, slots[part])
            found.append(scores_of(vectors, rows[part], theirs))
        return np.concatenate(found)

    def _load(self, lists: Sequence[tuple[int, _Packed]]) -> None:
        """Lists as rows have them, of slots."""
        slots = np.array([slot for slot, _ in lists], np.int64)
        ids = self._lines.ids
        entries = np.frombuffer(b"".join(packed for _, packed in lists), _ENTRY)
        sizes = np.array([len(packed) // _ENTRY.itemsize for _, packed in lists], np.int64)
        rows = np.repeat(np.arange(len(slots)), sizes)
        others = self._slots_of(entries["id"])
        pairs = Pairs(rows, others, np.rint(entries["score"] * MILLION).astype(np.int64))
        places = places_of(ids[slots[rows]], entries["id"], pairs.micro)
        # What is full says nothing of places behind its last.
        horizon = np.full(len(slots), UNBOUNDED, np.int64)
        full = sizes[rows] >= self._top_k
        horizon[sizes >= self._top_k] = 0
        np.maximum.at(horizon, rows[full], places[full] + 1)
        there = others >= 0
        self._lines.put_lists(slots, packed(len(slots), pairs.some(there), places[there], self._kept, horizon))
        self._lines.pending[slots] = False
        self._untold.update(ids[slots[np.unique(rows[~there])]].tolist())

    def _told(self, slots: Slots) -> dict[int, list[Near]]:
        """Lists as others see them."""
        lines = self._lines
        near, micro = lines.near[slots, : self._top_k], lines.micro[slots, : self._top_k]
        several = zip(
            lines.ids[slots].tolist(),
            (near >= 0).sum(axis=1).tolist(),
            lines.ids[near].tolist(),
            (micro / MILLION).tolist(),
            strict=True,
        )
        return {one: list(map(Near, others[:size], values[:size])) for one, size, others, values in several}

    # --- questions ---------------------------------------------------------------------------------------------------

    def search(
        self, vector: Vector, limit: int, *, allowed: NDArray[np.int64] | None = None, threshold: float = -1.0
    ) -> list[Near]:
        """The documents nearest to a vector of unit length, the highest score first, then the lowest id.

        ``allowed``: only these ids. What is put meanwhile counts as it is at the end; where more than some dozens of
        what was found are taken away meanwhile, time after time, there may be fewer than ``limit``. Raises
        InvalidRequest.
        """
        _, query = self._checked(0, vector)
        assert query is not None
        for _ in range(_TRIES):
            with self._lock:
                view = self._view()
            found = self._search(view, query[None], limit + _BESIDE, allowed, threshold)
            with self._lock:
                ids, stamps = self._lines.ids, self._lines.stamp
                new = np.flatnonzero(stamps[: self._used] > view.tick)
                still = ~np.isin(found.slots, new)
                new = new[self._lines.live[new]]
                vectors = self._take(self._blocks, new)
                ids = np.concatenate([ids[found.slots[still]], ids[new]])
            if still.sum() >= limit or not found.more:
                break
        micro = scores_of(query[None], np.zeros(len(new), np.int64), vectors)
        micro = np.concatenate([found.micro[still], micro])
        good = micro / MILLION >= threshold
        if allowed is not None:
            good &= np.isin(ids, allowed)
        ids, micro = ids[good], micro[good]
        order = np.lexsort((ids, -micro))[: max(limit, 0)]
        return [Near(*pair) for pair in zip(ids[order].tolist(), (micro[order] / MILLION).tolist(), strict=True)]

    def _search(
        self, view: _View, query: Vector, limit: int, allowed: NDArray[np.int64] | None, threshold: float
    ) -> _Found:
        """The best of a view, for a query of shape (1, dimension)."""
        looked_at = view.live
        if allowed is not None:
            looked_at = looked_at & np.isin(view.lines.ids[: view.used], allowed)
        slots = NOTHING
        few = allowed is not None and np.count_nonzero(looked_at) <= _FEW
        share = int(np.count_nonzero(view.live)) / max(1, int(np.count_nonzero(looked_at)))
        asked = None if few else self._named(view, query, int(_CANDIDATES * limit * share))
        if asked is not None and asked[1].all():
            named = asked[0]
            wanted = named.some(looked_at[named.slots])
            # Where it named too few, or all of the last ones are equal, everything is looked at.
            enough = len(wanted.slots) > limit and np.partition(wanted.micro, -limit)[-limit] > named.micro.min()
            if enough or len(named.slots) == _indexed(view):
                slots, looked_at = wanted.slots, looked_at & ~view.indexed

        about, seen = [np.empty(0, np.float32)], [NOTHING]
        for first, part, columns in _blocks(view, looked_at):
            similarities = part @ query[0]
            which = np.flatnonzero(looked_at[first : first + len(part)]) if columns is None else columns
            about.append(similarities[which] if columns is None else similarities)
            seen.append(first + which)
        similarities = np.concatenate(about)
        cut = threshold - self._margin
        if len(similarities) > limit:
            cut = max(cut, float(np.partition(similarities, -limit)[-limit]) - 2 * self._margin)
        more = len(slots) + len(similarities) > limit
        slots = np.concatenate([slots, np.concatenate(seen)[similarities >= cut]])
        micro = self._scores(view, query, np.zeros(len(slots), np.int64), slots)
        order = np.lexsort((view.lines.ids[slots], -micro))[:limit]
        return _Found(slots[order], micro[order], more)

    # --- the index ---------------------------------------------------------------------------------------------------

    def catch_up(self, limit: int) -> int:
        """Bring at most so many vectors to the index; how many it lacks then, and a search takes the longer the more
        these are. An index in memory is begun above ``EXACT_UP_TO`` documents, and ``relate`` then does so too; raises
        IndexUnavailable."""
        with self._indexing:
            with self._lock:
                if self._index is None and not self._mirrored and self._count > self._exact_up_to:
                    self._index = Nearest(self._dimension)
                index = self._index
            return 0 if index is None else self._catch_up(index, limit)

    def use(self, index: VectorIndex) -> int:
        """Take this index, after all documents were put: how many of them it has as they are. ``catch_up`` brings the
        rest, and takes from it what is not so. Raises IndexUnavailable, and there is none then."""
        with self._indexing:
            self.leave()
            with self._lock:
                before, self._left = self._left, set()
                live = self._lines.ids[: self._used][self._lines.live[: self._used]]
            taken, left = 0, set[int]()
            try:
                for held in index.held(np.union1d(live, np.array(sorted(before), np.int64))):
                    for start in range(0, len(held.ids), _LOADED_AT_ONCE):
                        part = slice(start, start + _LOADED_AT_ONCE)
                        known = self._know(Held(held.ids[part], held.prints[part]))
                        left.update(held.ids[part][~known].tolist())
                        taken += int(known.sum())
            except IndexUnavailable:
                with self._lock:
                    self._left |= before
                raise
            with self._lock:
                self._left |= left
                self._index = index
            return taken

    def leave(self) -> None:
        """Do without an index, until ``use`` names one."""
        with self._lock:
            self._index = None
            self._lines.indexed[:] = False

    @property
    def in_use(self) -> bool:
        """There is an index."""
        return self._index is not None

    def save(self, path: Path) -> None:
        """Write a snapshot of the index, where there is one in memory. Raises OSError, and the snapshot of before
        stays."""
        with self._indexing:
            if not isinstance(self._index, Nearest):
                return
            ids, prints = [NOTHING], []
            for start in range(0, self._used, _LOADED_AT_ONCE):
                with self._lock:
                    slots = start + np.flatnonzero(
                        self._lines.indexed[start : min(start + _LOADED_AT_ONCE, self._used)]
                    )
                    ids.append(self._lines.ids[slots])
                    vectors = self._take(self._blocks, slots)
                prints += prints_of(vectors)
            self._index.save(path, np.concatenate(ids), prints)

    def restore(self, path: Path) -> int:
        """Take the index from a snapshot, after all documents were put: how many of them it has as they are. None
        where there are too few for an index or it was begun, or without a sound snapshot; ``catch_up`` brings the rest.
        """
        if self.in_use or self._count <= self._exact_up_to:
            return 0
        index = Nearest.open(path, self._dimension)
        return 0 if index is None else self.use(index)

    def recall(self, sample: Sequence[int]) -> float:
        """The part, from 0 to 1, of what belongs in the lists of these documents that is found when they are asked
        for; 1 where there is no index."""
        with self._lock:
            view, slots = self._view(), self._known(sample)
            slots = slots[view.live[slots]]
            vectors = self._take(view.blocks, slots)
        asked = self._named(view, vectors, _CANDIDATES * self._kept)
        if asked is None:
            return 1.0
        exact, _ = self._compare(view._replace(nearest=None), slots)
        rows, at = np.nonzero(exact.near[:, : self._top_k] >= 0)
        wanted = exact.near[rows, at].astype(np.int64)
        named = asked[0].rows * view.used + asked[0].slots
        hits = np.isin(rows * view.used + wanted, named) | ~view.indexed[wanted]
        return float(hits.mean()) if len(hits) else 1.0

    def _know(self, held: Held) -> Flags:
        """Which of these the index has as they are."""
        with self._lock:
            tick, slots = self._tick, self._slots_of(held.ids)
            known = slots >= 0
            vectors = self._take(self._blocks, slots[known])
        theirs = (one for one, there in zip(held.prints, known.tolist(), strict=True) if there)
        known[known] = [own == other for own, other in zip(prints_of(vectors), theirs, strict=True)]
        with self._lock:
            known &= self._lines.live[slots] & (self._lines.stamp[slots] <= tick)
            self._lines.indexed[slots[known]] = True
        return known

    def _catch_up(self, index: VectorIndex, limit: int) -> int:
        with self._lock:
            left, self._left = self._left, set()
            lacking = np.flatnonzero(self._lines.live[: self._used] & ~self._lines.indexed[: self._used])
        brought = 0
        try:
            index.remove(np.array(sorted(left), np.int64))
            self.moved += len(left)
            for start in range(0, min(limit, len(lacking)), _BROUGHT_AT_ONCE):
                slots = lacking[start : min(start + _BROUGHT_AT_ONCE, limit)]
                with self._lock:
                    tick = self._tick
                    slots = slots[self._lines.live[slots]]
                    ids, vectors = self._lines.ids[slots], self._take(self._blocks, slots)
                    left = set(ids.tolist())
                taken = index.add(ids, vectors)
                with self._lock:
                    taken &= self._lines.stamp[slots] <= tick
                    taken &= self._index is index
                    self._lines.indexed[slots[taken]] = True
                    self._left.update(ids[~taken].tolist())
                    left = set()
                brought += int(taken.sum())
                self.moved += len(ids)
        except IndexUnavailable as error:
            with self._lock:
                self._left |= left
            if isinstance(error, IndexLost):
                self.leave()
            raise
        return len(lacking) - brought

    def _named(self, view: _View, vectors: Vector, count: int) -> tuple[Pairs, Flags] | None:
        """Rows of ``vectors`` with slots that the index names, none of them twice; and of which rows what it says of
        them is right. None: there is none to ask."""
        if view.nearest is None or view.nearest is not self._index:
            return None
        try:
            named = view.nearest.search(vectors, min(count, _MOST_CANDIDATES))
        except IndexUnavailable as error:
            if isinstance(error, IndexLost):
                self.leave()
            return None
        with self._lock:
            slots = self._slots_of(named.ids)
        there = (slots >= 0) & (slots < view.used)
        there[there] = view.live[slots[there]] & view.indexed[slots[there]]
        rows, slots, said = named.rows[there], slots[there], named.scores[there]
        once = np.unique(rows * view.used + slots, return_index=True)[1]
        rows, slots, said = rows[once], slots[once], said[once]
        pairs = Pairs(rows, slots, self._scores(view, vectors, rows, slots))
        right = np.ones(len(vectors), np.bool_)
        right[rows[np.abs(said - pairs.micro / MILLION) > _ROUGH]] = False
        return pairs, right

    # --- under the lock ----------------------------------------------------------------------------------------------

    def _view(self) -> _View:
        used, lines = self._used, self._lines
        nearest = self._index if self._count > self._exact_up_to else None
        live, indexed = lines.live[:used].copy(), lines.indexed[:used].copy()
        return _View(self._tick, used, lines, live, indexed, tuple(self._blocks), nearest)

    def _known(self, ids: Iterable[int]) -> Slots:
        """Slots of those that are there."""
        return np.array(sorted({self._slots[one] for one in ids if one in self._slots}), np.int64)

    def _slots_of(self, ids: NDArray[np.int64]) -> Slots:
        """The slot of each, or ``NOBODY``."""
        return np.fromiter(map(self._slots.get, ids.tolist(), repeat(NOBODY)), np.int64, len(ids))

    def _take(self, blocks: Sequence[Vector], slots: Slots) -> Vector:
        """Copies of vectors."""
        vectors = np.empty((len(slots), self._dimension), np.float32)
        numbers, at = np.divmod(slots, self._block)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            vectors[mine] = blocks[number][at[mine]]
        return vectors

    def _put(self, one: int, vector: Vector) -> None:
        slot = self._slots.get(one)
        if slot is None:
            slot = self._slots[one] = self._free.pop() if self._free else self._new_slot()
            self._lines.ids[slot] = one
        block, at = divmod(slot, self._block)
        lines = self._lines
        if lines.live[slot]:
            if np.array_equal(self._blocks[block][at], vector):
                return
            self._leave(slot)
        else:
            self._count += 1
        self._blocks[block][at] = vector
        lines.live[slot] = lines.pending[slot] = True
        lines.stamp[slot] = self._tick

    def _take_out(self, one: int) -> None:
        slot = self._slots.get(one)
        if slot is None or not self._lines.live[slot]:
            if self._outside:
                self._left.add(one)
            return
        self._leave(slot)
        self._count -= 1
        self._lines.live[slot] = False
        self._lines.pending[slot] = True
        self._lines.stamp[slot] = self._tick
        if not self._lines.listed[slot] and not self._at_work:
            self._release(slot)

    def _leave(self, slot: int) -> None:
        """The index has another vector from now on than the document."""
        if self._lines.indexed[slot] or self._outside:
            self._lines.indexed[slot] = False
            self._left.add(int(self._lines.ids[slot]))

    @property
    def _outside(self) -> bool:
        """There is an index of which nobody knows what it has."""
        return self._mirrored and self._index is None and len(self._left) < _MOST_LEFT

    def _new_slot(self) -> int:
        if self._used == len(self._lines.ids):
            self._lines = self._lines.grown()
        if self._used == self._block * len(self._blocks):
            self._blocks.append(np.zeros((self._block, self._dimension), np.float32))
        self._used += 1
        return self._used - 1

    def _release(self, slot: int) -> None:
        """Another document may have it: no list names it."""
        lines = self._lines
        del self._slots[int(lines.ids[slot])]
        lines.ids[slot], lines.near[slot], lines.horizon[slot] = NOBODY, NOBODY, UNBOUNDED
        lines.pending[slot] = lines.listed[slot] = False
        self._free.append(slot)

    def _checked(self, one: int, vector: Vector | None) -> tuple[int, Vector | None]:
        if not 0 <= one <= MAX_ID:
            raise InvalidRequest(f"id: {one} is no id of a document", field="id", allowed=f"0 to {MAX_ID}")
        if vector is None:
            return one, None
        found = np.asarray(vector, np.float32)
        allowed = f"{self._dimension} finite numbers of unit length"
        if found.shape != (self._dimension,):
            raise InvalidRequest(f"vector: its shape is {found.shape}", field="vector", allowed=allowed)
        if not (np.isfinite(found).all() and abs(np.linalg.norm(found.astype(np.float64)) - 1) <= TOLERANCE):
            raise InvalidRequest("vector: it is not of unit length", field="vector", allowed=allowed)
        return one, found


def _indexed(view: _View) -> int:
    """Documents that an index may name."""
    return int(np.count_nonzero(view.live & view.indexed))


def _blocks(view: _View, looked_at: Flags) -> Iterator[tuple[int, Vector, Slots | None]]:
    """Vectors that hold those to be looked at: the first slot, the vectors, and which of the block they are; None:
    the first ones, with others between."""
    first = 0
    for block in view.blocks:
        which = np.flatnonzero(looked_at[first : first + len(block)])
        count = min(len(block), view.used - first)
        if 4 * len(which) > count:
            yield first, block[:count], None
        elif len(which):
            yield first, block[which], which
        first += len(block)
