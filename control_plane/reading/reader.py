"""Answers one question of a read tool: finds the capsule, asks the tool, and puts the answer in its envelope."""

from __future__ import annotations

import base64
import binascii
import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog

from common.errors import CapsuleUnreadable, ExportError, InvalidRequest, Retry
from control_plane.errors import IndexBuildInProgress, JobExpired, RateLimited, TimedOut
from control_plane.jobs.records import JobRecord
from control_plane.operations.keys import Caller
from control_plane.operations.tracing import current
from control_plane.reading.inspect import META_URI
from control_plane.reading.library import Library, OpenCapsule
from control_plane.reading.places import Places
from control_plane.reading.questions import Questions
from control_plane.reading.tools import REGISTRY, Answer, Arguments, Locator, NotFound, Page, TextSearch, text_search

SCHEMA_VERSION = "gitnexus.mcp.v1"
AT_ONCE_SECONDS = 0.02
"""How long an answer may take on the event loop."""
_LONG = frozenset({"text_search", "call_trace", "impact_analysis", "query_explain"})
"""Tools that go to a thread at once: they ask an engine, walk, or take a long text apart."""
_PAGING = frozenset({"locator", "also", "cursor", "limit", "max_chars"})
_TIMING_BYTES = 8
"""That the time may grow by meanwhile."""
_SHORT = 200
"""Characters that the texts of an item keep which alone passes the budget."""

log = structlog.get_logger()


class ResultTruncated(ExportError):
    """Nothing of an answer fits the budget."""

    code = "RESULT_TRUNCATED"
    retry = Retry.later


class Reply(NamedTuple):
    """What a question was answered with."""

    body: bytes
    """JSON: the envelope, or an error ``{code, message, traceId, retryable}``."""
    is_error: bool


class _Question(NamedTuple):
    tool: str
    given: Arguments
    places: dict[str, Path | JobRecord]
    """What is asked, by the names that an answer has for them; more than one where several are searched."""
    trace_id: str
    started: float


class Reader:
    """Answers the read tools over the capsules of ``places``."""

    def __init__(
        self,
        places: Places,
        library: Library,
        *,
        budget: int,
        reading: Callable[[list[JobRecord]], AbstractAsyncContextManager[object]] = nullcontext,
    ) -> None:
        """An answer has at most ``budget`` bytes; ``reading`` keeps the files of exports for as long as its context
        lasts."""
        self._reading = reading
        self._places = places
        self._library = library
        self._budget = budget
        self._questions = Questions(library)

    async def ask(self, tool: str, arguments: Mapping[str, Any], caller: Caller) -> Reply:
        """Answer one call; raises nothing but cancellation."""
        trace_id = current().trace
        started = time.perf_counter()
        try:
            if tool not in REGISTRY:
                raise InvalidRequest(f"name: there is no tool {tool[:100]}", field="name")
            given = _arguments(tool, arguments)
            places = {}
            for locator in (given.locator, *(given.also if isinstance(given, TextSearch) else ())):
                place = await self._places.find(locator, caller)
                places[_name(locator, place)] = place
            question = _Question(tool, given, places, trace_id, started)
            body = None if tool in _LONG else self._answer_at_once(question)
            if body is None:
                async with self._reading(_exports(places.values())):
                    body = await self._questions.ask(self._answer, question)
        except ExportError as error:
            return Reply(error_body(error, trace_id), is_error=True)
        except Exception as error:
            # The boundary: what nobody foresaw is logged and answered.
            log.error("read tool failed", tool=tool, trace_id=trace_id, exc_info=error)
            unforeseen = ExportError("Something went wrong on our side; the log has it under this trace id.")
            return Reply(error_body(unforeseen, trace_id), is_error=True)
        return Reply(body, is_error=False)

    async def document(self, uri: str, locator: Locator | None, caller: Caller) -> str:
        """The manifest of a capsule as JSON, or the text of one of its other documents, by uri.

        Raises NotFound, InvalidRequest, CapsuleUnreadable, IndexBuildInProgress, StorageFailed, TimedOut.
        """
        place = await self._places.find(locator, caller)
        async with self._reading(_exports([place])):
            return await self._questions.ask(self._document, place, uri)

    def _document(self, place: Path | JobRecord, uri: str) -> str:
        with self._questions.opened({"": place}) as [(_, capsule)]:
            if uri == META_URI and capsule.sidecar.manifest:
                return capsule.sidecar.manifest
            position = capsule.sidecar.document(uri)
            if position is None:
                raise NotFound(f"This capsule has no document {uri[:200]}", field="uri")
            text, _, _ = capsule.frame(position).text.rpartition("\nmetadata=")
            return text

    def _answer_at_once(self, question: _Question) -> bytes | None:
        """The answer where it takes a moment, on the event loop: the way to a thread and back takes longer than most
        answers do. None where it has to wait for something, or takes long: then it begins anew in a thread."""
        try:
            [(name, place)] = question.places.items()
            with self._library.at_hand(place) as capsule:
                if capsule is None:
                    return None
                capsule.allow(AT_ONCE_SECONDS, waits=False)
                return self._answer_from([(name, capsule)], question)
        except (TimedOut, sqlite3.DatabaseError):
            return None

    def _answer(self, question: _Question) -> bytes:
        with self._questions.opened(question.places) as capsules:
            return self._answer_from(capsules, question)

    def _answer_from(self, capsules: Sequence[tuple[str, OpenCapsule]], question: _Question) -> bytes:
        tag = _tag(question, [capsule.sidecar.capsule_sha256 for _, capsule in capsules])
        page = Page(_offset(question.given.cursor, tag))
        if isinstance(question.given, TextSearch):
            answer = text_search(capsules, question.given, page)
        else:
            answer = REGISTRY[question.tool][1](capsules[0][1], question.given, page)
        return _envelope(question, answer, page, tag, self._budget)


def _exports(places: Iterable[Path | JobRecord]) -> list[JobRecord]:
    return [place for place in places if isinstance(place, JobRecord)]


def _arguments(tool: str, given: Mapping[str, Any]) -> Arguments:
    try:
        return msgspec.convert(given, REGISTRY[tool][0])
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        field = place.strip("`").lstrip(".") or "arguments"
        raise InvalidRequest(f"{field}: {message}", field=field) from error


def _name(locator: Locator | None, place: Path | JobRecord) -> str:
    """What a client can name a capsule by."""
    if isinstance(place, JobRecord):
        return place.id
    return locator.capsule_path if locator and locator.capsule_path else place.name


def _tag(question: _Question, capsules: Sequence[str]) -> str:
    """Ties a cursor to its question and its capsules, by their hashes; how much a page holds may change from page to
    page."""
    asked = {name: getattr(question.given, name) for name in question.given.__struct_fields__ if name not in _PAGING}
    return hashlib.sha256(msgspec.json.encode([question.tool, capsules, asked])).hexdigest()[:16]


def _cursor(offset: int, tag: str) -> str:
    return base64.urlsafe_b64encode(f"{tag}{offset}".encode()).decode().rstrip("=")


def _offset(cursor: str | None, tag: str) -> int:
    if cursor is None:
        return 0
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
    except (binascii.Error, ValueError):
        text = ""
    offset = text[len(tag) :]
    if not text.startswith(tag) or not offset.isdecimal() or len(offset) > 9:
        raise InvalidRequest("cursor: not one that this question was answered with", field="cursor")
    return int(offset)


def _envelope(question: _Question, answer: Answer, page: Page, tag: str, budget: int) -> bytes:
    """The answer as JSON of at most ``budget`` bytes: cut at an item, with a cursor that goes on there.

    Raises ResultTruncated for one of which not even the first item, shortened, fits.
    """
    score = round(min(1.0, max(0.0, answer.score)), 4)
    tier = "high" if score >= 0.85 else "medium" if score >= 0.6 else "low"
    found = answer.result[answer.items] if answer.items else None
    warnings = list(answer.warnings)
    result = answer.result

    def encoded(returned: int, *, more: bool, cut: bool) -> bytes:
        return msgspec.json.encode(
            {
                "schemaVersion": SCHEMA_VERSION,
                "traceId": question.trace_id,
                "tool": question.tool,
                "confidence": {"score": score, "tier": tier, "factors": answer.factors, "warnings": warnings},
                "result": result,
                "pagination": {
                    "nextCursor": _cursor(page.offset + returned, tag) if more and found is not None else None,
                    "truncated": more or cut,
                    "returned": returned,
                },
                "timingMs": round(1000 * (time.perf_counter() - question.started)),
            }
        )

    body = encoded(1 if found is None else len(found), more=answer.more, cut=False)
    if len(body) <= budget:
        return body
    result = dict(answer.result)
    if answer.items:
        result[answer.items] = "" if isinstance(found, str) else []
    if answer.properties:
        result[answer.properties] = {}
    warnings.append("RESULT_TRUNCATED")
    if answer.extras:
        result[answer.extras] = _fitting_items(answer.result[answer.extras], budget // 4)
    room = budget - len(encoded(10**8, more=True, cut=True)) - _TIMING_BYTES
    if answer.properties:
        result[answer.properties] = _fitting_properties(answer.result[answer.properties], room)
    returned = 1
    if answer.items and found is not None:
        kept = _fitting_text(found, room) if isinstance(found, str) else _fitting_items(found, room)
        if isinstance(found, list) and not kept:
            warnings.append("ITEM_SHORTENED")
            kept = [_shortened(item) for item in found[:1]]
        returned = len(kept)
        result[answer.items] = kept
    body = encoded(returned, more=answer.more or (found is not None and returned < len(found)), cut=True)
    if len(body) > budget or (found and not returned):
        raise ResultTruncated(f"Not even a part of this answer fits {budget:,} bytes; ask for less of it.")
    return body


def _fitting_items(items: list[Any], room: int) -> list[Any]:
    """The first items, which together fit."""
    for count, item in enumerate(items):
        room -= len(msgspec.json.encode(item)) + 1
        if room < 0:
            return items[:count]
    return items


def _shortened(value: Any) -> Any:
    """The value with long texts cut and long lists ended: one item that alone passes the budget."""
    if isinstance(value, str):
        return value if len(value) <= _SHORT else f"{value[:_SHORT]}...[truncated]"
    if isinstance(value, list):
        return [_shortened(item) for item in value[:20]]
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    return value


def _fitting_text(text: str, room: int) -> str:
    """The longest beginning whose JSON fits."""
    low, high = 0, min(len(text), max(0, room))
    while low < high:
        middle = (low + high + 1) // 2
        if len(msgspec.json.encode(text[:middle])) - 2 <= room:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def _fitting_properties(properties: dict[str, Any], room: int) -> dict[str, Any]:
    """The properties without the largest ones that do not fit."""
    sizes = {key: len(msgspec.json.encode({key: value})) - 1 for key, value in properties.items()}
    total = sum(sizes.values())
    gone: set[str] = set()
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        if total <= room:
            break
        total -= sizes[key]
        gone.add(key)
    return {key: value for key, value in properties.items() if key not in gone}


def error_body(error: ExportError, trace_id: str) -> bytes:
    """The JSON ``{code, message, traceId, retryable}`` of an error."""
    code = _CODES.get(type(error), "INTERNAL_ERROR")
    # Of our own failures the retryable ones say so; a wrong question stays wrong.
    retryable = code in (
        "INDEX_BUILD_IN_PROGRESS",
        "RESULT_TRUNCATED",
        "RATE_LIMITED",
        "TIMEOUT",
        "INTERNAL_ERROR",
    )
    body = {"code": code, "message": error.message, "traceId": trace_id, "retryable": retryable}
    return msgspec.json.encode(body)


_CODES: dict[type[ExportError], str] = {
    InvalidRequest: "INVALID_ARGUMENT",
    NotFound: "NOT_FOUND",
    JobExpired: "NOT_FOUND",
    CapsuleUnreadable: "CAPSULE_INCOMPATIBLE",
    IndexBuildInProgress: "INDEX_BUILD_IN_PROGRESS",
    ResultTruncated: "RESULT_TRUNCATED",
    TimedOut: "TIMEOUT",
    RateLimited: "RATE_LIMITED",
}
