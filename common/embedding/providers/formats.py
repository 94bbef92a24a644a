"""What each API is sent and answers, byte for byte, and how its errors read."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.contract import MALFORMED
from common.embedding.catalog import KnownModel
from common.embedding.choice import Engines, Provider
from common.embedding.port import Purpose
from common.errors import InvalidRequest

T = TypeVar("T")
Row = NDArray[np.float32] | NDArray[np.float64] | None
"""One vector as it came, of one dimension; None: not one."""
URLS: dict[Provider, str] = {
    "openai": "https://api.openai.com/v1",
    "nvidia": "https://integrate.api.nvidia.com/v1",
    "voyage": "https://api.voyageai.com/v1",
    "ollama": "http://127.0.0.1:11434",
}
_MAX_MESSAGE = 300
"""Characters of a provider's own message that an error repeats."""
_LOOKS_LIKE_A_KEY = re.compile(r"\b(?:sk|pa|al|nvapi)-[\w*.-]+|(?<![\w.-])[\w.-]*+\*{3,}[\w*.-]*")
"""Keys of the three, and what a provider shows of one that it does not know (``sk-ab***yz``)."""
_TOO_LARGE = re.compile(
    r"max_tokens_per_request|max \d+ tokens|context.length|too (?:many (?:tokens|inputs)|large|long)|batch.size"
    r"|max(?:imum)? (?:allowed )?(?:tokens?|number of (?:tokens|inputs)|context|length|input)",
    re.IGNORECASE,
)
"""Seen, in turn: "Requested 416735 tokens, max 300000 tokens per request" with that code, "This model's maximum context
length is 8192 tokens" (OpenAI); "The max allowed tokens per submitted batch is 120000" (Voyage); "Input length 1728
exceeds maximum allowed token size 512" (NVIDIA); "the input length exceeds the context length" (Ollama)."""
_QUOTA = re.compile(r"insufficient_quota|billing_(?:hard_limit|not_active)|exceeded your current quota", re.IGNORECASE)
"""Under status 429, of OpenAI. Voyage speaks of billing when it only slows an account without a card down."""


class Garbled(Exception):
    """An answer of status 200 that is none of the API's: what a proxy may say, or what is left of a good one."""


class Answer(NamedTuple):
    """What a request came back with."""

    rows: list[Row]
    """One for each text, in their order, unless ``wrong``."""
    tokens: int | None
    """Read and paid for; None: not said."""
    model: str | None
    wrong: str = ""
    """Why the vectors are not those of the texts."""


class Format(Protocol):
    """How one API is spoken to."""

    path: str
    revision: str
    """What the vectors depend on beside the model's name."""
    unit: bool
    """The API promises unit vectors: another length is a fault, not a matter of taste."""
    added_tokens: int
    """What it puts around each text, on its own account."""
    cut: bool
    """The API refuses what is longer than the model's maximum; else it cuts that itself."""
    strict: bool
    """A text that is too long is to be refused, not cut."""

    def body(self, texts: Sequence[str], purpose: Purpose) -> bytes:
        """The body of a request."""
        ...

    def read(self, body: bytes, texts: int) -> Answer:
        """The answer to a request of so many texts. Raises Garbled."""
        ...


class _Item(msgspec.Struct):
    embedding: str | list[float | None]
    index: int | None = None


class _Usage(msgspec.Struct):
    total_tokens: int | None = None


class _List(msgspec.Struct):
    data: list[_Item]
    model: str | None = None
    usage: _Usage | None = None


class _Ollama(msgspec.Struct):
    embeddings: list[list[float | None]]
    model: str | None = None
    prompt_eval_count: int | None = None


class _Tag(msgspec.Struct):
    name: str
    digest: str


class _Tags(msgspec.Struct):
    models: list[_Tag]


class OpenAI:
    """``POST /embeddings`` of api.openai.com (platform.openai.com/docs/api-reference/embeddings). Its vectors are of
    unit length, shortened ones too (platform.openai.com/docs/guides/embeddings, its questions)."""

    path, unit, added_tokens, cut, strict = "/embeddings", True, 0, True, False

    def __init__(self, model: KnownModel, dimension: int) -> None:
        self.revision = model.name
        self._fixed: dict[str, Any] = {"model": model.name, "encoding_format": "base64"}
        if dimension != model.dimension:
            self._fixed["dimensions"] = dimension

    def body(self, texts: Sequence[str], purpose: Purpose) -> bytes:
        """See Format; a question is read like any text."""
        return msgspec.json.encode({"input": texts, **self._fixed})

    def read(self, body: bytes, texts: int) -> Answer:
        """See Format."""
        return _read_list(body, texts)


class Nvidia:
    """``POST /embeddings`` of a NIM (docs.nvidia.com/nim/nemo-retriever/text-embedding/latest/reference.html). Nothing
    there promises unit vectors. Vectors as numbers: not every NIM knows base64."""

    path, unit, added_tokens, cut, strict = "/embeddings", False, 0, False, False

    def __init__(self, model: KnownModel, dimension: int) -> None:
        self.revision = model.name
        self._fixed: dict[str, Any] = {"model": model.name, "truncate": "END", "encoding_format": "float"}
        if dimension != model.dimension:
            self._fixed["dimensions"] = dimension

    def body(self, texts: Sequence[str], purpose: Purpose) -> bytes:
        """See Format."""
        input_type = "query" if purpose == "query" else "passage"
        return msgspec.json.encode({"input": texts, "input_type": input_type, **self._fixed})

    def read(self, body: bytes, texts: int) -> Answer:
        """See Format."""
        return _read_list(body, texts)


class Voyage:
    """``POST /embeddings`` of api.voyageai.com (docs.voyageai.com/reference/embeddings-api), in base64, as its own
    client asks for. Its vectors are of unit length (docs.voyageai.com/docs/faq). It puts "Represent the document for
    retrieval: " before a document, or a like sentence before a query, and counts it."""

    path, unit, added_tokens, cut = "/embeddings", True, 10, False

    def __init__(self, model: KnownModel, dimension: int, engines: Engines) -> None:
        document = engines.voyage_input_type or "document"
        if document not in ("document", "query", "none"):
            raise InvalidRequest(
                "the input type of documents that Voyage is told is not one of its own",
                field="voyage_input_type",
                allowed="document, query, none",
            )
        if engines.voyage_output_dtype != "float":
            raise InvalidRequest(
                "a capsule holds vectors of 32-bit floats: no other number format of Voyage can be used",
                field="voyage_output_dtype",
                allowed="float",
            )
        self.strict = not engines.voyage_truncation
        self.revision = model.name if document == "document" else f"{model.name} input_type={document}"
        self._document = None if document == "none" else document
        self._fixed: dict[str, Any] = {
            "model": model.name,
            "truncation": engines.voyage_truncation,
            "output_dtype": "float",
            "encoding_format": "base64",
        }
        if dimension != model.dimension:
            self._fixed["output_dimension"] = dimension

    def body(self, texts: Sequence[str], purpose: Purpose) -> bytes:
        """See Format."""
        input_type = "query" if purpose == "query" else self._document
        return msgspec.json.encode({"input": texts, "input_type": input_type, **self._fixed})

    def read(self, body: bytes, texts: int) -> Answer:
        """See Format."""
        return _read_list(body, texts)


class Ollama:
    """``POST /api/embed`` of an Ollama server (docs/api.md of github.com/ollama/ollama). It makes vectors unit length
    itself (server/routes.go); what some models want before a text it does not add."""

    path, unit, cut, strict = "/api/embed", True, False, False

    def __init__(self, model: KnownModel, dimension: int) -> None:
        self.revision = model.name
        self.added_tokens = max(len(prefix.split()) * 2 for prefix in model.prefixes)
        self._prefixes = model.prefixes
        self._fixed: dict[str, Any] = {"model": model.name, "truncate": True}
        if dimension != model.dimension:
            self._fixed["dimensions"] = dimension

    def body(self, texts: Sequence[str], purpose: Purpose) -> bytes:
        """See Format."""
        prefix = self._prefixes[purpose == "query"]
        return msgspec.json.encode({"input": [prefix + text for text in texts], **self._fixed})

    def read(self, body: bytes, texts: int) -> Answer:
        """See Format."""
        found = _decoded(body, _Ollama)
        rows = [_row(row) for row in found.embeddings]
        wrong = "" if len(rows) == texts else f"{len(rows)} vectors for {texts} texts"
        return Answer(rows, found.prompt_eval_count, found.model, wrong)


def read_digest(body: bytes, name: str) -> str | None:
    """The digest that Ollama's list of models (``GET /api/tags``) has for a name, in the twelve digits that its own
    command shows; None where it does not have the model. Raises Garbled."""
    names = {name, f"{name}:latest"}
    return next((tag.digest[:12] for tag in _decoded(body, _Tags).models if tag.name in names), None)


def format_of(model: KnownModel, dimension: int, engines: Engines) -> Format:
    """The format of a provider that has an API. Raises InvalidRequest where a setting is wrong."""
    if model.provider == "voyage":
        return Voyage(model, dimension, engines)
    if model.provider == "openai":
        return OpenAI(model, dimension)
    if model.provider == "nvidia":
        return Nvidia(model, dimension)
    return Ollama(model, dimension)


class Refusal(NamedTuple):
    """What an answer other than 200 says."""

    message: str
    """The provider's own words, one line, without the key."""
    too_large: bool
    """A text or the whole request is longer than the API takes."""
    quota: bool
    """Nothing is left to pay with: asking again is of no use."""


def read_refusal(body: bytes, key: str | None) -> Refusal:
    """What the body of an error says: ``{error: {message, code, type}}`` (OpenAI), ``{detail}`` (Voyage), ``{error}``
    or ``{title, detail}`` (NVIDIA), ``{error}`` (Ollama), or anything else as text."""
    code = ""
    try:
        said = msgspec.json.decode(body)
    except MALFORMED:
        said = re.sub(r"<[^<>]*>", " ", body.decode(errors="replace"))
    for name in ("error", "detail", "message", "title"):
        if isinstance(said, dict) and said.get(name):
            said = said[name]
            if isinstance(said, dict):
                code = f"{said.get('code') or ''} {said.get('type') or ''}"
    text = said if isinstance(said, str) else msgspec.json.encode(said).decode()
    return Refusal(
        message=scrubbed(text, key),
        too_large=bool(_TOO_LARGE.search(f"{code} {text}")),
        quota=bool(_QUOTA.search(f"{code} {text}")),
    )


def scrubbed(text: str, key: str | None) -> str:
    """One line of at most 300 characters without the key, whole or in the part that a provider shows."""
    if key:
        text = text.replace(key, "[key]")
    text = _LOOKS_LIKE_A_KEY.sub("[key]", text)
    text = " ".join("".join(char if char.isprintable() else " " for char in text[:4_096]).split())
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}…"


def same_model(asked: str, answered: str) -> bool:
    """Whether an answer is of the model that was asked for: its name, with or without the organisation before it, or
    with a version behind it (OpenAI answers ``text-embedding-ada-002-v2``, Ollama may add ``:latest``, a NIM the mode).
    """
    asked, answered = (name.rpartition("/")[2].casefold() for name in (asked, answered))
    behind = answered.removeprefix(asked) if answered.startswith(asked) else "another"
    return bool(re.fullmatch(r"(-v\d+|:[\w.-]+|-query|-passage)?", behind))


def _read_list(body: bytes, texts: int) -> Answer:
    found = _decoded(body, _List)
    wrong = "" if len(found.data) == texts else f"{len(found.data)} vectors for {texts} texts"
    rows: dict[int, Row] = {}
    for place, item in enumerate(found.data):
        rows[place if item.index is None else item.index] = _row(item.embedding)
    if not wrong and rows.keys() != set(range(texts)):
        wrong = "vectors that are not numbered as the texts are"
    ordered = [] if wrong else [rows[place] for place in range(texts)]
    return Answer(ordered, found.usage.total_tokens if found.usage else None, found.model, wrong)


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            # NaN and Infinity are not JSON, but what servers written in Python answer: the vector beside is whole.
            return msgspec.convert(json.loads(body), kind)
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        raise Garbled(f"an answer that is not the API's: {str(error)[:120]}") from error


def _row(embedding: str | list[float | None]) -> Row:
    try:
        if isinstance(embedding, str):
            return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
        return np.array(embedding, dtype=np.float64)
    except (binascii.Error, ValueError, TypeError):
        return None
