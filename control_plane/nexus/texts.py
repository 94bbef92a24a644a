"""Vectors of texts that come without one: by the engine of this server, for collections that have its vectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from common.embedding.port import Embedder, Model, Purpose
from common.errors import EmbeddingFailed, ExportError, InvalidRequest
from control_plane.errors import SemanticUnavailable
from control_plane.nexus.incoming import Incoming
from control_plane.nexus.records import Collection, NewDocument, Vector
from control_plane.reading.ask import AWAY, MEANING_SECONDS

DOCUMENT_SECONDS = 60.0
"""That the vectors of one request's documents may take."""
CHARACTERS = 16
"""Of a text, for each token that the engine reads at most: what is beyond would be cut off, but only after it was all
split."""


class Texts:
    """Embeds; its methods block."""

    def __init__(self, engine: Callable[[], Embedder]) -> None:
        """``engine`` gives the one of this server, and raises InvalidRequest where there is none."""
        self._engine = engine

    def model(self) -> tuple[str, int]:
        """Whose vectors texts get here, and their dimension. Raises InvalidRequest, SemanticUnavailable."""
        try:
            model = self._engine().model
        except InvalidRequest as error:
            message = f"dimension: must be given, as texts are not embedded here: {error.message}"
            raise InvalidRequest(message, field="dimension") from error
        except AWAY as error:
            raise _away(error) from error
        return _name(model), model.dimension

    def complete(self, collection: Collection, documents: Sequence[Incoming]) -> list[NewDocument]:
        """Documents with the vectors that they lack. Raises InvalidRequest, SemanticUnavailable."""
        lacking = [one for one in documents if one.vector is None]
        vectors = dict(zip(map(id, lacking), self._embedded(collection, lacking) if lacking else (), strict=True))
        return [
            NewDocument(
                doc_id=one.doc_id,
                title=one.title,
                text=one.text,
                payload=one.payload,
                doc_type=one.doc_type,
                permissions=one.permissions,
                vector=vectors[id(one)] if one.vector is None else one.vector,
            )
            for one in documents
        ]

    def _embedded(self, collection: Collection, documents: Sequence[Incoming]) -> Sequence[Vector]:
        field = f"{documents[0].place}vector"
        try:
            engine = self._engine()
        except InvalidRequest as error:
            message = f"{field}: must be given, as texts are not embedded here: {error.message}"
            raise InvalidRequest(message, field=field) from error
        except AWAY as error:
            raise _away(error) from error
        if (own := _name(engine.model)) != collection.model or engine.model.dimension != collection.dimension:
            has = f"this collection has vectors of {collection.model} ({collection.dimension:,} numbers)"
            does = f"this server embeds with {own} ({engine.model.dimension:,})"
            raise InvalidRequest(f"{field}: must be given: {has}, {does}", field=field)
        try:
            return _embed(engine, [one.text for one in documents], "document", DOCUMENT_SECONDS)
        except AWAY as error:
            raise _away(error) from error

    def question(self, query: str, collections: Iterable[Collection]) -> dict[str, Vector]:
        """The vector of a question for the spaces of those collections that have vectors of this server's engine.
        Raises InvalidRequest where there is no engine, and what ``Embedder.embed`` does."""
        engine = self._engine()
        fitting = (_name(engine.model), engine.model.dimension)
        spaces = {one.space for one in collections if (one.model, one.dimension) == fitting}
        if not spaces:
            return {}
        return dict.fromkeys(spaces, _embed(engine, [query], "query", MEANING_SECONDS)[0])


def _away(error: ExportError) -> SemanticUnavailable:
    return SemanticUnavailable(
        f"The engine gave no vector ({error.message}), and nothing was written. Try again later."
    )


def _name(model: Model) -> str:
    return f"{model.provider}/{model.name}"


def _embed(engine: Embedder, texts: Sequence[str], purpose: Purpose, seconds: float) -> Sequence[Vector]:
    until = time.monotonic() + seconds

    def in_time() -> None:
        if time.monotonic() > until:
            raise EmbeddingFailed(f"the vectors are not there after {seconds:.0f} seconds")

    most = CHARACTERS * engine.model.max_tokens
    return list(engine.embed([text[:most] for text in texts], purpose=purpose, should_stop=in_time).vectors)
