"""The back channel's open door: what changed in a graph is told here, signed (see ``signing``).

``POST /webhooks/nexus/relationship`` takes ``{"eventId", "origin", "version", "action", "client", "source":
{"collection", "id"}, "target": {"collection", "id"}, "type", "properties"}``, and ``POST /webhooks/nexus/node`` the
same with ``"document": {"collection", "id"}`` in place of the ends and the type. ``action`` is ``upsert`` or
``delete``; ``properties`` are all that there are from then on.

The answer is ``{"applied": true}``, or false with the ``reason`` that nothing changed: ``own`` (this server made the
change) or ``stale`` (it knows a later one). A message that could not be taken (429, 503, or no answer) is sent again,
with another time and nonce.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
from litestar import Request, post
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from msgspec import UNSET, UnsetType

from common.contract import MALFORMED, Wire
from common.errors import ExportError, InvalidRequest, PayloadTooLarge
from control_plane.errors import DocumentNotFound, RateLimited, Unauthorized
from control_plane.jobs.audit import Action, AuditEntry
from control_plane.jobs.store import now_ms
from control_plane.nexus.backstore import (
    BackStore,
    DocumentRef,
    NodeChange,
    Properties,
    RelationshipChange,
    Scalar,
)
from control_plane.nexus.metrics import NexusMetrics
from control_plane.nexus.signing import NONCE, Signer, check_time, read_seal
from control_plane.operations.auth import OPEN, address_of
from control_plane.operations.limits import TokenBuckets
from control_plane.operations.tracing import REQUEST

MAX_BODY = 1 << 20
"""Bytes."""
BODY_SECONDS = 10.0
"""A body that is not whole by then is given up."""
MAX_BODIES = 64
"""That are on their way at once."""
PER_MINUTE = 60_000
"""Messages whose signature is right, a tenth of them at once; about one client half as many."""
MAX_NUMBER = 2**53 - 1
"""Of versions and properties: what every reader of JSON holds exactly."""
MAX_ID = 256
"""Characters."""
MAX_PROPERTIES = 64
MAX_NAME = 128
"""Characters of a property's name."""
MAX_TEXT = 4_096
"""Characters of a property."""
MAX_LIST = 64
MAX_PROPERTIES_BYTES = 64 << 10
"""Of all properties, as JSON."""
RESERVED = frozenset({"SIMILAR_TO", "MENTIONS"})
"""Types of relationships that this server makes itself."""
_SHOWN = 100
"""Characters of a name that a client made up."""

_NAME = re.compile("[A-Za-z0-9._-]{1,64}")
_EVENT = re.compile("[A-Za-z0-9._:-]{1,128}")
_COLLECTION = re.compile("[A-Za-z0-9._-]{1,128}")
_TYPE = re.compile("[A-Z][A-Z0-9_]{0,63}")
_PLACE = re.compile(r"(.*?)(?: - at `(?:key` in `)?\$\.?([^`]*)`)?", re.DOTALL)
_FIELD = re.compile("Object (missing required|contains unknown) field `(.*)`", re.DOTALL)
_REF = 'an object with "collection" and "id"'
_ALLOWED = {
    "": "a JSON object",
    "eventId": "1 to 128 letters, digits, dots, dashes, underscores and colons",
    "origin": "1 to 64 letters, digits, dots, dashes and underscores",
    "version": f"a whole number, 1 to {MAX_NUMBER}",
    "action": "upsert or delete",
    "client": "1 to 64 letters, digits, dots, dashes and underscores",
    "source": _REF,
    "target": _REF,
    "document": _REF,
    "collection": "1 to 128 letters, digits, dots, dashes and underscores",
    "id": f"1 to {MAX_ID} printable characters",
    "type": "1 to 64 of A-Z, 0-9 and _, a letter first, and neither SIMILAR_TO nor MENTIONS, which are made here",
    "properties": f"an object with at most {MAX_PROPERTIES} properties, of {MAX_PROPERTIES_BYTES:,} bytes as JSON, "
    f"with names of 1 to {MAX_NAME} printable characters",
}
"""What a field must be, by the last part of its name."""
_VALUE = (
    f"a text of at most {MAX_TEXT:,} characters, a number of at most 2^53 - 1, true, false, null, or a list of at most "
    f"{MAX_LIST} of these"
)

C = TypeVar("C", RelationshipChange, NodeChange)


class WebhookAnswer(Wire):
    """What became of a change."""

    applied: bool
    reason: str | UnsetType = UNSET


class Webhooks:
    """Takes messages one by one; for one event loop."""

    def __init__(
        self,
        store: BackStore,
        secret: str,
        metrics: NexusMetrics,
        *,
        note: Callable[[AuditEntry], None],
        clock: Callable[[], int],
        per_minute: int,
    ) -> None:
        """``note`` gets what belongs into the audit log; ``clock`` tells milliseconds since 1970."""
        self._store = store
        self._signer = Signer(secret)
        self._metrics = metrics
        self._note = note
        self._clock = clock
        self._bodies = 0
        self._rates = {
            "all clients together": TokenBuckets(per_minute=per_minute, burst=per_minute // 10),
            "one client": TokenBuckets(per_minute=per_minute // 2, burst=per_minute // 20),
        }

    async def take(self, route: str, request: Request[Any, Any, Any], kind: type[C]) -> WebhookAnswer:
        """Raises Unauthorized, PayloadTooLarge, RateLimited, InvalidRequest, DocumentNotFound."""
        began = time.perf_counter()
        try:
            # Nothing is kept, and no database asked, before the signature is known to be right.
            with self._refusing("headers"):
                seal = read_seal(request.headers)
            with self._refusing("window"):
                check_time(seal, self._clock())
            body = await self._body(request)
            with self._noting(request, "key.refused"), self._refusing("signature"):
                self._signer.check(seal, body)
            with self._refusing("invalid"):
                change = change_of(body, kind)
            with self._noting(request, "nexus.webhook", change.client):
                with self._refusing("rate"):
                    self._check_rate(change.client)
                with self._refusing("unknown", DocumentNotFound), self._refusing("full", InvalidRequest):
                    outcome = await self._store.take(change, nonce=seal.nonce, now=self._clock())
                with self._refusing("replayed"):
                    if outcome.reason == "replayed":
                        raise Unauthorized(f"{NONCE}: came before; each message needs its own.", field=NONCE)
            if outcome.applied:
                self._note(_entry(request, "nexus.webhook", change.client, "ok"))
            self._metrics.webhooks.labels(route, outcome.reason or "applied").inc()
        finally:
            self._metrics.webhook_seconds.labels(route).observe(time.perf_counter() - began)
        return WebhookAnswer(applied=outcome.applied, reason=outcome.reason or UNSET)

    @contextmanager
    def _refusing(self, reason: str, kind: type[ExportError] = ExportError) -> Iterator[None]:
        """Count a refusal."""
        try:
            yield
        except kind:
            self._metrics.webhook_refused.labels(reason).inc()
            raise

    @contextmanager
    def _noting(self, request: Request[Any, Any, Any], action: Action, client: str = "") -> Iterator[None]:
        """Note a refusal."""
        try:
            yield
        except ExportError as error:
            self._note(_entry(request, action, client, error.code))
            raise

    def _check_rate(self, client: str) -> None:
        """Raises RateLimited."""
        now = time.monotonic()
        for (of, buckets), name in zip(self._rates.items(), ("", client), strict=True):
            allowance = buckets.take(name, now)
            if allowance.retry_after_seconds is not None:
                raise RateLimited(
                    f"Too many messages about {of}: at most {allowance.limit:,} at once, and then steadily.",
                    retryAfterSeconds=allowance.retry_after_seconds,
                )

    async def _body(self, request: Request[Any, Any, Any]) -> bytes:
        length = request.headers.get("content-length", "")
        with self._refusing("size", PayloadTooLarge), self._refusing("body", InvalidRequest):
            if length.isdecimal() and int(length) > MAX_BODY:
                raise _too_large()
            with self._refusing("busy", RateLimited):
                if self._bodies >= MAX_BODIES:
                    raise RateLimited(f"{MAX_BODIES} messages are on their way here; try again later.")
            self._bodies += 1
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    return await _whole(request.stream())
            except TimeoutError:
                message = f"The body is not there after {BODY_SECONDS:.0f} seconds."
                raise InvalidRequest(message, field="$", allowed=BODY_SECONDS) from None
            except HTTPException as error:
                raise InvalidRequest("The body ended before its announced length.", field="$") from error
            finally:
                self._bodies -= 1


def webhook_routes(
    store: BackStore,
    secret: str | None,
    metrics: NexusMetrics,
    *,
    note: Callable[[AuditEntry], None],
    clock: Callable[[], int] = now_ms,
    per_minute: int = PER_MINUTE,
) -> list[HTTPRouteHandler]:
    """The two routes; none where there is no secret."""
    if not secret:
        return []
    webhooks = Webhooks(store, secret, metrics, note=note, clock=clock, per_minute=per_minute)
    settings: dict[str, Any] = {
        "status_code": 200,
        "request_max_body_size": None,  # it is bounded here, and a body that is too large is counted
        "opt": {OPEN: True},
        "include_in_schema": False,
    }

    @post("/webhooks/nexus/relationship", **settings)
    async def relationship(request: Request[Any, Any, Any]) -> WebhookAnswer:
        """A relationship is there, or is not, from now on."""
        return await webhooks.take("relationship", request, RelationshipChange)

    @post("/webhooks/nexus/node", **settings)
    async def node(request: Request[Any, Any, Any]) -> WebhookAnswer:
        """The node of a document has these properties from now on."""
        return await webhooks.take("node", request, NodeChange)

    return [relationship, node]


def _entry(request: Request[Any, Any, Any], action: Action, client: str, outcome: str) -> AuditEntry:
    mark = REQUEST.get()
    return AuditEntry("", client, address_of(request.scope), action, outcome, None, mark.trace if mark else "")


def change_of(body: bytes, kind: type[C]) -> C:
    """A change that came, checked. Raises InvalidRequest, which names the field."""
    try:
        change = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _misread(str(error), kind) from None
    except MALFORMED:
        raise _wrong("") from None
    _check("eventId", _EVENT.fullmatch(change.event_id))
    _check("origin", _NAME.fullmatch(change.origin))
    _check("version", 1 <= change.version <= MAX_NUMBER)
    _check("client", _NAME.fullmatch(change.client))
    if isinstance(change, NodeChange):
        _check_ref("document", change.document)
    else:
        _check_ref("source", change.source)
        _check_ref("target", change.target)
        _check("type", _TYPE.fullmatch(change.type) and change.type not in RESERVED)
    _check_properties(change.properties)
    return change


def _check_ref(field: str, ref: DocumentRef) -> None:
    _check(f"{field}.collection", _COLLECTION.fullmatch(ref.collection))
    _check(f"{field}.id", 1 <= len(ref.id) <= MAX_ID and ref.id.isprintable())


def _check_properties(properties: Properties) -> None:
    names = all(1 <= len(name) <= MAX_NAME and name.isprintable() for name in properties)
    _check("properties", names and len(properties) <= MAX_PROPERTIES)
    for name, value in properties.items():
        values = value if isinstance(value, list) else [value]
        if len(values) > MAX_LIST or not all(map(_small, values)):
            raise InvalidRequest(f"properties.{name}: must be {_VALUE}.", field=f"properties.{name}", allowed=_VALUE)
    _check("properties", len(msgspec.json.encode(properties)) <= MAX_PROPERTIES_BYTES)


def _small(value: Scalar) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_TEXT
    return not isinstance(value, int) or abs(value) <= MAX_NUMBER


def _check(field: str, right: object) -> None:
    if not right:
        raise _wrong(field)


def _wrong(field: str) -> InvalidRequest:
    allowed = _ALLOWED[field.rpartition(".")[2]]
    return InvalidRequest(f"{field or 'The body'}: must be {allowed}.", field=field or "$", allowed=allowed)


def _misread(said: str, kind: type[RelationshipChange | NodeChange]) -> InvalidRequest:
    """What is wrong, of what ``msgspec`` says."""
    found = _PLACE.fullmatch(said)
    assert found is not None
    place = (found[2] or "").partition("[")[0]
    if place.rpartition(".")[2] not in _ALLOWED:  # a name that somebody made up reads like a place
        place = ""
    if (named := _FIELD.fullmatch(found[1])) is None:
        return _wrong(place)
    field = f"{place}.{named[2][:_SHOWN]}".removeprefix(".")
    if named[1] == "missing required":
        allowed = _ALLOWED[named[2]]
        return InvalidRequest(f"{field}: must be given, {allowed}.", field=field, allowed=allowed)
    known = sorted((DocumentRef if place else kind).__struct_encode_fields__)
    return InvalidRequest(f"{field}: is unknown; there are {', '.join(known)}.", field=field, allowed=known)


def _too_large() -> PayloadTooLarge:
    return PayloadTooLarge(f"The body may have at most {MAX_BODY:,} bytes.", field="$", limit=MAX_BODY)


async def _whole(chunks: AsyncIterator[bytes]) -> bytes:
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > MAX_BODY:
            raise _too_large()
    return bytes(body)
