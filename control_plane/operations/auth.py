"""The bearer key: looked at before anything of the body is read.

Which scopes a route wants stands in its ``opt``, beside its path: one of ``SCOPES`` is enough, and a route that names
none is for ``admin`` alone.

| routes | scopes |
| --- | --- |
| create, cancel and retry an export | export |
| list exports; state, events, stream, report of one | export or read |
| download, sidecar, manifest, search, /mcp | read |
| make or delete a collection, write or delete documents | export |
| read or search collections | read |
| /v1/stats, /v1/audit, /v1/nexus, /metrics where it wants a key | admin |
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

from litestar import Request
from litestar.datastructures import Headers, MutableScopeHeaders
from litestar.enums import ScopeType
from litestar.middleware import ASGIMiddleware
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from common.settings import Settings
from control_plane.errors import ERROR_CODE, Forbidden, RateLimited, Unauthorized
from control_plane.jobs.audit import Action, AuditEntry
from control_plane.operations.keys import EVERYBODY, Caller, Key, Keys, expired
from control_plane.operations.keys import Scope as KeyScope
from control_plane.operations.limits import TokenBuckets, rate_headers, too_many
from control_plane.operations.metrics import Metrics
from control_plane.operations.origins import Origins
from control_plane.operations.tracing import REQUEST

OPEN = "open"
"""The ``opt`` of a route that wants no key."""
NEEDS = "needs"
"""The ``opt`` with the scopes of which a key needs one."""
AUDITED = "audited"
"""The ``opt`` with the action that the audit log has for a route, where the route does not write it itself."""
EXPORT: Final[tuple[KeyScope, ...]] = ("export",)
READ: Final[tuple[KeyScope, ...]] = ("read",)
FOLLOW: Final[tuple[KeyScope, ...]] = ("export", "read")
ADMIN: Final[tuple[KeyScope, ...]] = ("admin",)

LIMITED = "/v1/"
"""Routes whose requests the key's rate counts; ``/mcp`` has buckets of its own."""
WRONG_PER_MINUTE = 60
"""Wrong keys that one address may try in a minute, and at once."""
MAX_ACCEPTED = 10_000
"""Pairs of address and key that are remembered as good."""
_ALLOWANCE = "allowance"


class BearerAuth(ASGIMiddleware):
    """Refuses every request without a key that may do it, but to routes that say they are open."""

    scopes = (ScopeType.HTTP,)
    exclude_opt_key = OPEN
    exclude_path_pattern = ("^/schema",)

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        origins: Origins,
        *,
        note: Callable[[AuditEntry], None],
        metrics: Metrics,
    ) -> None:
        """``note`` gets what belongs into the audit log. Where no key is asked for, ``origins`` says which pages may
        ask."""
        self._keys = keys
        self._origins = origins
        self._note = note
        self._metrics = metrics
        self._requests = TokenBuckets(per_minute=settings.rate_limit_per_minute, burst=settings.rate_limit_burst)
        self._wrong = TokenBuckets(per_minute=WRONG_PER_MINUTE, burst=WRONG_PER_MINUTE)
        self._accepted: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        """Go on with the Caller in ``scope["auth"]``. Raises Unauthorized, Forbidden, RateLimited, HostRefused,
        OriginRefused."""
        assert scope["type"] == ScopeType.HTTP
        opt: Mapping[str, Any] = scope["route_handler"].opt
        caller = self._caller(scope)
        scope["auth"] = caller
        wanted: tuple[KeyScope, ...] = opt.get(NEEDS, ADMIN)
        if not any(caller.may(need) for need in wanted):
            self._note(caller.did("access.forbidden", outcome=f"FORBIDDEN {opt.get(AUDITED, wanted[0])}"))
            scopes = " or ".join(wanted)
            raise Forbidden(f"The key {caller.key} lacks the scope {scopes}, which this needs.", scopes=list(wanted))
        if action := opt.get(AUDITED):
            send = self._noting(send, scope, caller, action)
        await next_app(scope, receive, send)

    def _caller(self, scope: HTTPScope) -> Caller:
        mark = REQUEST.get()
        address, trace = address_of(scope), mark.trace if mark else ""
        given = _bearer(scope)
        if not self._keys.asked and (given is None or self._keys.find(given) is None):
            headers = Headers.from_scope(scope)
            self._origins.check(headers.get("host", ""), headers.get("origin"))
            return EVERYBODY._replace(address=address, trace=trace)
        if given is None:
            raise Unauthorized("This route wants the header Authorization: Bearer <key>.")
        key = self._keys.find(given)
        self._check_guesses(key, address, trace)
        assert key is not None
        if expired(key):
            self._note(AuditEntry(key.name, key.client, address, "key.refused", "EXPIRED", None, trace))
            raise Unauthorized("This key has expired.")
        if scope["path"].startswith(LIMITED):
            self._count(scope, key)
        return Caller(key.name, key.client, key.scopes, key.quota, key.rate, address, trace)

    def _check_guesses(self, key: Key | None, address: str, trace: str) -> None:
        """Raise for a wrong key: Unauthorized, and RateLimited once an address has tried too many. Then a right one is
        refused as well, or the limit would keep nobody from guessing on; but not one that came from there before."""
        pair = (address, key.name) if key else None
        if pair is not None and pair in self._accepted:
            self._accepted.move_to_end(pair)
            return
        now = time.monotonic()
        network = _network(address)
        if pair is not None and not self._wrong.empty(network, now):
            self._accepted[pair] = None
            if len(self._accepted) > MAX_ACCEPTED:
                self._accepted.popitem(last=False)
            return
        tried = self._wrong.take(network, now)
        outcome = "UNAUTHORIZED" if tried.retry_after_seconds is None else "RATE_LIMITED"
        self._note(AuditEntry("", "", address, "key.refused", outcome, None, trace))
        if tried.retry_after_seconds is not None:
            self._metrics.refused.labels("wrong_keys").inc()
            raise RateLimited(
                "Too many wrong keys came from this address; try again later.",
                retryAfterSeconds=tried.retry_after_seconds,
            )
        raise Unauthorized("This route wants the header Authorization: Bearer <key>.")

    def _count(self, scope: HTTPScope, key: Key) -> None:
        allowance = self._requests.take(key.name, time.monotonic(), key.rate)
        scope["state"][_ALLOWANCE] = allowance
        if allowance.retry_after_seconds is not None:
            self._metrics.refused.labels("requests").inc()
            raise too_many(allowance)

    def _noting(self, send: Send, scope: HTTPScope, caller: Caller, action: Action) -> Send:
        """Note how it ended: what was read, and what failed. What changes a job writes its own entry with it, and a
        search one for each export."""
        noted = action in ("export.create", "export.cancel", "export.retry", "export.search")

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                if status >= 400:
                    outcome = str(scope["state"].get(ERROR_CODE) or status)
                    self._note(caller.did(action, _job_id(scope), outcome))
                elif not noted and status != 304 and scope["method"] != "HEAD":
                    self._note(caller.did(action, _job_id(scope)))
            await send(message)

        return sending


async def limit_headers(message: Message, scope: Scope) -> None:
    """Tell in every answer to a key how much of its rate is left."""
    if message["type"] == "http.response.start" and (allowance := scope.get("state", {}).get(_ALLOWANCE)):
        headers = MutableScopeHeaders.from_message(message)
        for name, value in rate_headers(allowance).items():
            headers[name] = value


def caller_of(request: Request[Any, Any, Any]) -> Caller:
    """Whoever sent a request to a route that wants a key."""
    caller: Caller = request.scope["auth"]
    return caller


def _bearer(scope: HTTPScope) -> bytes | None:
    """The key that came; None where none did."""
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, key = given.partition(b" ")
    return key.strip() or None if scheme.lower() == b"bearer" else None


def address_of(scope: HTTPScope) -> str:
    """Who is connected, or whom a proxy on this machine speaks for (uvicorn reads X-Forwarded-For of those that
    FORWARDED_ALLOW_IPS names, 127.0.0.1 by default); a text of the client's making is none."""
    client = scope.get("client")
    try:
        found = ipaddress.ip_address(client[0] if client else "")
    except ValueError:
        return "unknown"
    return str(getattr(found, "ipv4_mapped", None) or found)


def _network(address: str) -> str:
    """What one guesser has for certain: an address of IPv4, 2^64 of IPv6."""
    if ":" not in address:
        return address
    return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))


def _job_id(scope: HTTPScope) -> str | None:
    """That of the path; None for a text that is too long to be one."""
    job_id = scope["path_params"].get("job_id")
    return job_id if isinstance(job_id, str) and len(job_id) <= 36 else None
