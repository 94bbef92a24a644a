"""A question to one or several open capsules: its filters are checked, and words answer where meaning cannot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

from common.embedding.port import Embedded, Embedder, Model, Purpose
from common.errors import CapsuleUnreadable, DeviceFailed, EmbeddingFailed, InvalidRequest, ProviderRejected
from common.sidecar.open import Scope, Sidecar
from control_plane.errors import QueueUnavailable
from control_plane.reading.library import OpenCapsule
from control_plane.reading.search import Hit, Mode, Searched, Vectors, search

MEANING_SECONDS = 5.0
"""That a question's vector may take; without one the answer is what words find."""
MAX_CAPSULES = 8
"""Searched together."""
MAX_LISTED = 40
"""Labels or types that an error names."""
AWAY = (EmbeddingFailed, ProviderRejected, DeviceFailed)
"""What an engine raises that gives a question no vector."""


class Names(NamedTuple):
    """What a door calls the filters of a ``Scope``, for errors."""

    label: str = "label"
    file: str = "file"
    community: str = "community"
    type: str = "type"


class Found(NamedTuple):
    """The hits of a question, and how it was answered."""

    hits: list[Hit]
    semantic_used: bool
    warnings: list[str]
    """``SEMANTIC_MODEL_MISSING``: a capsule's model may not, or cannot, be asked here. ``SEMANTIC_UNAVAILABLE``: its
    engine gave no vector, its vectors are damaged, or the disk has no room for them. What words find is there in both
    cases."""


class Prepared(NamedTuple):
    """Capsules that can be searched, and why some are searched by words alone."""

    searched: list[Searched]
    warnings: list[str]


def prepared(capsules: Sequence[tuple[str, OpenCapsule]], mode: Mode) -> Prepared:
    """Capsules by their names, with their vectors as far as ``mode`` wants any; ``hybrid`` does without those whose
    engine is not to be had, ``semantic`` does not.

    Raises InvalidRequest for ``semantic`` without vectors or a model that may be asked here, what opening an engine
    does, and what ``OpenCapsule.vectors`` does.
    """
    warnings: dict[str, None] = {}
    searched = []
    for name, capsule in capsules:
        vectors = None
        if mode != "lexical":
            try:
                vectors = capsule.vectors
            except InvalidRequest as error:
                if mode == "semantic":
                    message = f"mode: {error.message}; lexical and hybrid need no engine"
                    raise InvalidRequest(message, field="mode", allowed=["lexical", "hybrid"]) from error
                warnings["SEMANTIC_MODEL_MISSING"] = None
            except (*AWAY, CapsuleUnreadable, QueueUnavailable):  # the words are in the sidecar, which is here
                if mode == "semantic":
                    raise
                warnings["SEMANTIC_UNAVAILABLE"] = None
        searched.append(Searched(name, capsule.sidecar, vectors))
    if mode == "semantic":
        check_semantic(searched, "mode")
    return Prepared(searched, list(warnings))


def find(prepared: Prepared, query: str, *, mode: Mode, limit: int, scope: Scope) -> Found:
    """Search; where an engine gives no vector within ``MEANING_SECONDS``, ``hybrid`` goes on without its capsules.

    Raises what ``search`` does, and for ``semantic`` what an engine does.
    """
    engines: dict[Model, _Engine] = {}
    searched = []
    for one in prepared.searched:
        if one.vectors is not None:
            engine = engines.setdefault(one.vectors.embedder.model, _Engine(one.vectors.embedder))
            vectors = Vectors(one.vectors.positions, one.vectors.matrix, cast(Embedder, engine))
            one = one._replace(vectors=vectors)  # noqa: PLW2901
        searched.append(one)
    warnings = dict.fromkeys(prepared.warnings)
    until = time.monotonic() + MEANING_SECONDS

    def in_time() -> None:
        if time.monotonic() > until:
            raise EmbeddingFailed("The question's vector was long in coming; ask again.")

    while True:
        try:
            hits = search(searched, query, mode=mode, limit=limit, scope=scope, should_stop=in_time)
        except AWAY:
            if mode == "semantic":
                raise
            warnings["SEMANTIC_UNAVAILABLE"] = None
            away = [model for model, engine in engines.items() if engine.away]
            searched = [
                one._replace(vectors=None) if one.vectors and one.vectors.embedder.model in away else one
                for one in searched
            ]
        else:
            used = mode != "lexical" and any(one.vectors is not None for one in searched)
            return Found(hits, used, list(warnings))


class _Engine:
    """An engine that is asked one question, and once."""

    def __init__(self, embedder: Embedder) -> None:
        self.model = embedder.model
        self._embedder = embedder
        self._answer: Embedded | None = None
        self.away = False
        """It gave no vector."""

    def embed(self, texts: Sequence[str], *, purpose: Purpose, should_stop: Callable[[], None]) -> Embedded:
        """The question's vector. Raises as ``Embedder.embed``."""
        if self._answer is None:
            try:
                self._answer = self._embedder.embed(texts, purpose=purpose, should_stop=should_stop)
            except AWAY:
                self.away = True
                raise
        return self._answer


def check_semantic(searched: Sequence[Searched], field: str) -> None:
    """Raise InvalidRequest where a capsule has no vectors: a search by meaning would leave it out."""
    for one in searched:
        if one.vectors is None:
            which = f"{one.name} holds" if len(searched) > 1 else "this capsule holds"
            raise InvalidRequest(f"{field}: {which} no vectors; export with semantic search enabled", field=field)


def check_scope(sidecars: Sequence[Sidecar], scope: Scope, names: Names) -> None:
    """Raise InvalidRequest for a filter that none of the capsules knows: an empty answer would say that nothing fits
    the words."""
    for field, wanted, known in (
        (names.label, scope.labels, [sidecar.labels() for sidecar in sidecars] if scope.labels else []),
        (names.type, scope.types, [sidecar.types() for sidecar in sidecars] if scope.types else []),
    ):
        here = sorted(set().union(*known))
        if unknown := [name for name in wanted if name not in here]:
            message = f"{field}: there is no {_shown(unknown[0])} here; there are {_listed(here)}"
            raise InvalidRequest(message, field=field, allowed=here[:MAX_LISTED])
    if scope.community is not None and not any(sidecar.is_community(scope.community) for sidecar in sidecars):
        message = f"{names.community}: there is no community {_shown(scope.community)} here; give the id of one"
        raise InvalidRequest(message, field=names.community)
    if scope.file_prefix is not None and not any(sidecar.has_path(scope.file_prefix) for sidecar in sidecars):
        message = f"{names.file}: no path here begins with {_shown(scope.file_prefix)}"
        raise InvalidRequest(message, field=names.file)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:100]}…")


def _listed(names: Iterable[str]) -> str:
    shown = [name[:100] for name in names]
    more = f" and {len(shown) - MAX_LISTED} more" if len(shown) > MAX_LISTED else ""
    return (", ".join(shown[:MAX_LISTED]) or "none") + more
