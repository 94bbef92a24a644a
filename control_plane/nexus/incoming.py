"""Bodies of requests as documents and questions: everything that a client sends is checked here, and named where it is
wrong. Pure, and slow enough for large batches to belong in a thread."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, get_args

import msgspec
import numpy as np
from msgspec import Raw

from common.contract import COLLECTION_NAME, MALFORMED
from common.errors import InvalidRequest
from control_plane.nexus.messages import (
    ALL,
    Asked,
    Batch,
    CollectionSettings,
    Deletion,
    DocumentBody,
    Mode,
    SearchQuestion,
)
from control_plane.nexus.overview import Trigger
from control_plane.nexus.records import Vector

MAX_DIMENSION = 8_192
"""Numbers of a vector."""
MAX_BATCH = 1_000
"""Documents, or ids, of one request."""
MAX_ID = 256
"""Characters, as of titles and texts."""
MAX_TITLE = 1_000
MAX_TEXT = 1_000_000
MAX_PAYLOAD = 64 << 10
"""Bytes, as they came and as they are kept."""
MAX_DEPTH = 32
"""Objects and lists of a payload within each other."""
TOLD = "graph"
"""What graphs told of a document stands in its payload under this name."""
MAX_PERMISSIONS = 64
MAX_HITS = 100
MAX_QUERY = 2_000
"""Characters."""
MAX_NAMED = 64
"""Collections that one search names beside its own."""
MAX_DOMAINS = 64
"""Domains that one search names."""
MAX_DOMAIN = 64
"""Characters of one."""
_COLLECTION = re.compile(COLLECTION_NAME)
_MODEL = re.compile(r"[A-Za-z0-9._/@:-]{1,128}")
_DOC_TYPE = re.compile(r"[A-Za-z0-9._-]{0,64}")
_KEY = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PLACE = re.compile(r"(.*?)(?: - at `\$\.?(.*)`)?", re.DOTALL)
_MODES: tuple[Mode, ...] = get_args(Mode)

Body = TypeVar("Body", bound=Asked)


class Incoming(NamedTuple):
    """A document that came, checked."""

    place: str
    """Where it stands in the body, as prefix of a field: ``documents[3].``; empty where it is the body."""
    doc_id: str
    title: str
    text: str
    payload: dict[str, Any]
    doc_type: str
    permissions: Sequence[str]
    vector: Vector | None
    """Of unit length; None: its text is to be embedded."""


class Question(NamedTuple):
    """What a client asks, checked."""

    query: str | None
    vector: Vector | None
    limit: int
    mode: Mode
    doc_type: str | None
    threshold: float
    others: Sequence[str]
    """Names of further collections; ``ALL``: all of the client."""
    domains: Sequence[str]
    """None of them: any."""
    per_domain: int | None
    """Hits of one domain, at most."""


def settings_of(body: bytes) -> CollectionSettings:
    """What a collection is to be; an empty body says nothing. Raises InvalidRequest."""
    wanted = _decode(body or b"{}", CollectionSettings)
    if wanted.dimension is not None and not 1 <= wanted.dimension <= MAX_DIMENSION:
        raise _wrong("dimension", f"must be 1 to {MAX_DIMENSION:,}", [1, MAX_DIMENSION])
    if wanted.model is not None and wanted.dimension is None:
        raise _wrong("model", "needs a dimension: without one texts are embedded, and the model is this server's own")
    if wanted.model is not None and not _MODEL.fullmatch(wanted.model):
        raise _wrong("model", "must be 1 to 128 letters, digits and ._/@:-", _MODEL.pattern)
    return wanted


def check_collection(name: str) -> None:
    """Raise InvalidRequest for what is no name of a collection."""
    if not _COLLECTION.fullmatch(name):
        allowed = "must be 1 to 128 letters, digits, dots, dashes and underscores, and not dots alone"
        raise _wrong("collection", allowed, "[A-Za-z0-9._-]{1,128}")


def check_domain(field: str, domain: str) -> None:
    """Raise InvalidRequest for what no domain is called; which there are, each server decides for itself."""
    if not 1 <= len(domain) <= MAX_DOMAIN or not domain.isprintable():
        raise _wrong(field, f"must be 1 to {MAX_DOMAIN} printable characters", MAX_DOMAIN)


def document_of(doc_id: str, body: bytes, dimension: int) -> Incoming:
    """A document whose id stands in the path. Raises InvalidRequest."""
    return _incoming("", doc_id, _decode(body, DocumentBody), dimension)


def batch_of(body: bytes, dimension: int) -> list[Incoming]:
    """Several documents with different ids. Raises InvalidRequest."""
    given = _decode(body, Batch).documents
    if not 1 <= len(given) <= MAX_BATCH:
        raise _wrong("documents", f"must be 1 to {MAX_BATCH:,} documents", [1, MAX_BATCH])
    first: dict[str, int] = {}
    for number, one in enumerate(given):
        if (before := first.setdefault(one.id, number)) != number:
            raise _wrong(f"documents[{number}].id", f"is that of documents[{before}] too")
    return [_incoming(f"documents[{number}].", one.id, one, dimension) for number, one in enumerate(given)]


def ids_of(body: bytes) -> list[str]:
    """Ids of documents, each once. Raises InvalidRequest."""
    ids = _decode(body, Deletion).ids
    if not 1 <= len(ids) <= MAX_BATCH:
        raise _wrong("ids", f"must be 1 to {MAX_BATCH:,} ids", [1, MAX_BATCH])
    for number, doc_id in enumerate(ids):
        _check_id(f"ids[{number}]", doc_id)
    return list(dict.fromkeys(ids))


def question_of(body: bytes, dimension: int) -> Question:
    """A search of a collection with vectors of this dimension. Raises InvalidRequest."""
    asked = _decode(body, SearchQuestion)
    if asked.mode not in _MODES:
        raise _wrong("mode", f"must be one of {', '.join(_MODES)}", list(_MODES))
    if not 1 <= asked.limit <= MAX_HITS:
        raise _wrong("limit", f"must be 1 to {MAX_HITS}", [1, MAX_HITS])
    if asked.threshold is not None and not -1 <= asked.threshold <= 1:
        raise _wrong("threshold", "must be -1 to 1, a cosine", [-1, 1])
    if asked.doc_type is not None:
        _check_doc_type("docType", asked.doc_type)
    if sum(name != ALL for name in asked.collections) > MAX_NAMED:
        raise _wrong("collections", f"must be at most {MAX_NAMED} names, or {ALL} for all", MAX_NAMED)
    if len(asked.domains) > MAX_DOMAINS:
        raise _wrong("domains", f"must be at most {MAX_DOMAINS} names", MAX_DOMAINS)
    for number, domain in enumerate(asked.domains):
        check_domain(f"domains[{number}]", domain)
    if asked.per_domain is not None and not 1 <= asked.per_domain <= asked.limit:
        raise _wrong("perDomain", f"must be 1 to {asked.limit}, the limit", [1, asked.limit])
    query = asked.query if asked.query and asked.query.strip() else None
    if query is not None and len(query) > MAX_QUERY:
        raise _wrong("query", f"must have at most {MAX_QUERY:,} characters", MAX_QUERY)
    vector = _vector("vector", asked.vector, dimension)
    if query is None and (vector is None or asked.mode == "lexical"):
        raise _wrong("query", "must be given" if asked.mode == "lexical" else "must be given, or a vector")
    return Question(
        query=query,
        vector=vector,
        limit=asked.limit,
        mode=asked.mode,
        doc_type=asked.doc_type,
        threshold=-1.0 if asked.threshold is None else asked.threshold,
        others=asked.collections,
        domains=tuple(dict.fromkeys(asked.domains)),
        per_domain=asked.per_domain,
    )


def trigger_of(body: bytes) -> Trigger:
    """Which documents are to be tried again; an empty body: all. Raises InvalidRequest."""
    return _decode(body or b"{}", Trigger)


def unit(numbers: Sequence[float]) -> Vector | None:
    """The direction of finite numbers, of unit length; None where all are zero."""
    exact = np.array(numbers, dtype=np.float64)
    # The largest first made 1, so that no square is too large or too small for the sum.
    if (largest := float(np.abs(exact).max())) == 0:
        return None
    exact /= largest
    vector: Vector = (exact / np.sqrt(np.sum(exact * exact))).astype("<f4")
    return vector


def _incoming(place: str, doc_id: str, given: DocumentBody, dimension: int) -> Incoming:
    _check_id(f"{place}id", doc_id)
    for field, text, most in (("title", given.title, MAX_TITLE), ("text", given.text, MAX_TEXT)):
        if len(text) > most:
            raise _wrong(f"{place}{field}", f"must have at most {most:,} characters", most)
        if "\0" in text:
            raise _wrong(f"{place}{field}", "must not have the character NUL")
    _check_doc_type(f"{place}docType", given.doc_type)
    if len(given.permissions) > MAX_PERMISSIONS:
        raise _wrong(f"{place}permissions", f"must be at most {MAX_PERMISSIONS} names of keys", MAX_PERMISSIONS)
    for number, key in enumerate(given.permissions):
        if not _KEY.fullmatch(key):
            said = "must be the name of a key: 1 to 64 letters, digits, dots, dashes and underscores"
            raise _wrong(f"{place}permissions[{number}]", said, _KEY.pattern)
    vector = _vector(f"{place}vector", given.vector, dimension)
    if vector is None and not given.text.strip():
        raise _wrong(f"{place}text", "must say something where there is no vector")
    return Incoming(
        place=place,
        doc_id=doc_id,
        title=given.title,
        text=given.text,
        payload=_payload(f"{place}payload", given.payload),
        doc_type=given.doc_type,
        permissions=tuple(dict.fromkeys(given.permissions)),
        vector=vector,
    )


def _check_id(field: str, doc_id: str) -> None:
    # What is all dots and slashes is no part of a path: clients and servers take it away, or the part before it.
    if not 1 <= len(doc_id) <= MAX_ID or not doc_id.isprintable() or not doc_id.strip("./"):
        raise _wrong(field, f"must be 1 to {MAX_ID} printable characters, not dots and slashes alone", MAX_ID)


def _check_doc_type(field: str, doc_type: str) -> None:
    if not _DOC_TYPE.fullmatch(doc_type):
        raise _wrong(field, "must be at most 64 letters, digits, dots, dashes and underscores", _DOC_TYPE.pattern)


def _vector(field: str, given: Raw, dimension: int) -> Vector | None:
    """None where none was given."""
    data = bytes(given)
    if data in (b"", b"null"):
        return None
    # Counted first: numbers take up to sixteen times the memory of their text.
    if data.count(b",") >= dimension:
        raise _wrong(field, f"must have {dimension:,} numbers", dimension)
    try:
        numbers = msgspec.json.decode(data, type=list[float])
    except MALFORMED as error:
        raise _misread(error, field) from None
    if len(numbers) != dimension:
        raise _wrong(field, f"must have {dimension:,} numbers; it has {len(numbers):,}", dimension)
    if (vector := unit(numbers)) is None:
        raise _wrong(field, "must not be zero: it has no direction")
    return vector


def _payload(field: str, given: Raw) -> dict[str, Any]:
    data = bytes(given)
    if data in (b"", b"null"):
        return {}
    if len(data) > MAX_PAYLOAD:
        raise _wrong(field, f"must have at most {MAX_PAYLOAD:,} bytes", MAX_PAYLOAD)
    try:
        payload = msgspec.json.decode(data, type=dict[str, Any])
    except MALFORMED as error:
        raise _misread(error, field) from None
    if TOLD in payload:
        raise _wrong(f"{field}.{TOLD}", "this name is for what graphs tell", "any other name")
    if _depth(payload) > MAX_DEPTH:
        raise _wrong(field, f"must be at most {MAX_DEPTH} objects and lists deep", MAX_DEPTH)
    if len(msgspec.json.encode(payload)) > MAX_PAYLOAD:  # numbers may be written longer than they came
        raise _wrong(field, f"must have at most {MAX_PAYLOAD:,} bytes", MAX_PAYLOAD)
    return payload


def _depth(value: object) -> int:
    deep, level = 0, [value]
    while level:
        inner = [one for one in level if isinstance(one, dict | list)]
        deep += bool(inner)
        level = [part for one in inner for part in (one.values() if isinstance(one, dict) else one)]
    return deep


def _decode(body: bytes, kind: type[Body]) -> Body:
    try:
        return msgspec.json.decode(body, type=kind)
    except MALFORMED as error:
        raise _misread(error, "") from None


def _misread(error: Exception, field: str) -> InvalidRequest:
    """What ``msgspec`` says of a place within ``field``, or the whole body."""
    if not isinstance(error, msgspec.ValidationError):
        said = "is no JSON" if not isinstance(error, RecursionError) else "is too deep"
        return InvalidRequest(f"{field or 'The body'} {said}.", field=field or "$")
    found = _PLACE.fullmatch(str(error))
    assert found is not None
    inner = (found[2] or "").replace("[...]", "")  # of an object, any of its values
    place = f"{field}{inner}" if inner.startswith("[") else ".".join(filter(None, [field, inner]))
    return InvalidRequest(f"{place or 'The body'}: {found[1]}", field=place or "$")


def _wrong(field: str, said: str, allowed: object = None) -> InvalidRequest:
    more = {} if allowed is None else {"allowed": allowed}
    return InvalidRequest(f"{field}: {said}", field=field, **more)
