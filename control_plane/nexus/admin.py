"""What an operator sees and does of the sync, and the routes of ``/v1/nexus``.

Of several replicas one syncs, and any may be asked: what is wanted of the sync, and what it says of itself, stands in
the row that they share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from litestar import Controller, Request, get, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, Operation, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIType
from litestar.params import QueryParameter

from control_plane.errors import RateLimited
from control_plane.jobs.store import now_ms
from control_plane.nexus.backstore import BackStore
from control_plane.nexus.engine import SyncEngine
from control_plane.nexus.incoming import trigger_of
from control_plane.nexus.overview import (
    CollectionLag,
    DeadEvent,
    DeadEvents,
    DeadLetter,
    DeadLetters,
    Enabled,
    Kind,
    Look,
    LookAsked,
    LookReport,
    OutboundSize,
    Overview,
    Retried,
    SpacesSize,
)
from control_plane.nexus.records import CollectionCounts, SyncState
from control_plane.nexus.spaces import Spaces
from control_plane.nexus.store import CollectionStore
from control_plane.operations.auth import ADMIN, AUDITED, NEEDS
from control_plane.operations.openapi import REFUSALS, error_specs

MAX_COLLECTIONS = 1_000
"""Of an overview; its sums are of all."""
MAX_FAILURES = 500
"""Documents or events of one answer."""
MAX_EVENT = 2**63 - 1
"""The largest number that a database knows."""


class Operator:
    """The sync, for whoever keeps it running."""

    def __init__(self, store: CollectionStore, engine: SyncEngine, spaces: Spaces, events: BackStore) -> None:
        self._store = store
        self._engine = engine
        self._spaces = spaces
        self._events = events

    async def overview(self) -> Overview:
        """How it stands."""
        state, now = await self._store.state(), now_ms()
        counts, outbound = await self._store.counts(), await self._events.outbound_counts()
        since = [one.pending_since for one in counts if one.pending_since is not None]
        status = self._engine.status
        behind = sorted(counts, key=lambda one: (-one.failed, -one.pending, one.client, one.name))
        return Overview(
            enabled=state.enabled,
            leads=status.leads,
            owner=state.owner if state.lease_until > now else None,
            graph=status.graph,
            trouble=status.trouble,
            documents=sum(one.documents for one in counts),
            pending=sum(one.pending for one in counts),
            failed=sum(one.failed for one in counts),
            oldest_pending_seconds=_age(min(since, default=None), now),
            collections=[_lag(one, now) for one in behind[:MAX_COLLECTIONS]],
            progress=_look(state),
            last=None if state.report is None else msgspec.json.decode(state.report, type=LookReport),
            spaces=SpacesSize(count=len(await self._store.spaces()), bytes=self._spaces.bytes),
            outbound=OutboundSize(waiting=outbound.waiting, dead=outbound.dead),
        )

    async def enable(self, *, on: bool) -> Enabled:
        """Have the graph kept in step, or left as it is."""
        await self._store.set_enabled(on)
        return Enabled(enabled=on)

    async def trigger(self, collection: str | None) -> Retried:
        """Have documents tried again that were given up."""
        retried = await self._store.retry_failed(None, collection)
        self._engine.wake()
        self._engine.project_soon()
        return Retried(retried=retried)

    async def look(self, kind: Kind) -> LookAsked:
        """Have the graph looked at soon. Raises RateLimited while that goes on or waits: more would find no more."""
        if not await self._store.ask(kind):
            raise RateLimited("The graph is being looked at already, or is going to be; try again when that has ended.")
        return LookAsked(asked=kind)

    async def failures(self, limit: int) -> DeadLetters:
        """Documents that were given up."""
        return DeadLetters(
            failures=[
                DeadLetter(
                    client=one.client,
                    collection=one.collection,
                    id=one.doc_id,
                    attempts=one.attempts,
                    error=one.error,
                )
                for one in await self._store.failures(None, limit)
            ]
        )

    async def dead_events(self, after: int, limit: int) -> DeadEvents:
        """Events that were given up, by their ids, above ``after``."""
        return DeadEvents(
            events=[
                DeadEvent(
                    id=one.id,
                    created_at=one.created_at,
                    attempts=one.attempts,
                    error=one.error,
                    event=msgspec.json.decode(one.body),
                )
                for one in await self._events.dead_letters(after, limit)
            ]
        )

    async def retry_events(self) -> Retried:
        """Have events sent again that were given up."""
        return Retried(retried=await self._events.retry_dead())


def _lag(counts: CollectionCounts, now: int) -> CollectionLag:
    return CollectionLag(
        client=counts.client,
        name=counts.name,
        documents=counts.documents,
        pending=counts.pending,
        failed=counts.failed,
        oldest_pending_seconds=_age(counts.pending_since, now),
    )


def _age(since: int | None, now: int) -> float | None:
    return None if since is None else max(0, now - since) / 1_000


def _look(state: SyncState) -> Look | None:
    """The look that goes on, or else the one that waits."""
    if state.progress is not None:
        return msgspec.json.decode(state.progress, type=Look)
    return None if state.asked is None else Look(kind=state.asked, done=0, total=0)


def _errors(*codes: str) -> dict[int, ResponseSpec]:
    return error_specs(*REFUSALS, *codes, "QUEUE_UNAVAILABLE", "INTERNAL")


@dataclass
class _Triggering(Operation):
    """The body is read as all others of this part are, so the framework does not see its shape."""

    def __post_init__(self) -> None:
        schema = Schema(
            type=OpenAPIType.OBJECT,
            properties={"collection": Schema(type=[OpenAPIType.STRING, OpenAPIType.NULL])},
            additional_properties=False,
        )
        content = {"application/json": OpenAPIMediaType(schema=schema)}
        self.request_body = RequestBody(content=content, required=False)


class NexusController(Controller):
    """The sync of documents with the graph, for operators."""

    path = "/v1/nexus"
    tags = ("nexus",)

    @get(
        opt={NEEDS: ADMIN},
        operation_id="getNexus",
        summary="How the sync stands",
        responses=_errors(),
    )
    async def overview(self, operator: NamedDependency[Operator]) -> Overview:
        """Of all clients. Whichever replica is asked, but for ``leads``, ``graph``, ``trouble`` and the memory of
        ``spaces``, which are its own."""
        return await operator.overview()

    @post(
        "/enable",
        status_code=200,
        opt={NEEDS: ADMIN, AUDITED: "nexus.enable"},
        operation_id="enableNexus",
        summary="Keep the graph in step",
        responses=_errors(),
    )
    async def enable(self, operator: NamedDependency[Operator]) -> Enabled:
        """As it is from the beginning."""
        return await operator.enable(on=True)

    @post(
        "/disable",
        status_code=200,
        opt={NEEDS: ADMIN, AUDITED: "nexus.disable"},
        operation_id="disableNexus",
        summary="Leave the graph as it is",
        responses=_errors(),
    )
    async def disable(self, operator: NamedDependency[Operator]) -> Enabled:
        """Within seconds. Documents are taken and searched as before, and wait."""
        return await operator.enable(on=False)

    @post(
        "/trigger",
        status_code=200,
        operation_class=_Triggering,
        opt={NEEDS: ADMIN, AUDITED: "nexus.trigger"},
        operation_id="triggerNexus",
        summary="Try documents again that were given up",
        responses=_errors("INVALID_EXPORT_REQUEST"),
    )
    async def trigger(self, operator: NamedDependency[Operator], request: Request[Any, Any, Any]) -> Retried:
        """Of all clients; with a ``collection`` those of collections with this name."""
        return await operator.trigger(trigger_of(await request.body()).collection)

    @post(
        "/verify",
        status_code=202,
        opt={NEEDS: ADMIN, AUDITED: "nexus.verify"},
        operation_id="verifyNexus",
        summary="Compare the graph with the documents",
        responses=_errors(),
    )
    async def verify(self, operator: NamedDependency[Operator]) -> LookAsked:
        """And repair what differs. `GET /v1/nexus` has its progress, and what it found. 429 while one goes on."""
        return await operator.look("verify")

    @post(
        "/rebuild",
        status_code=202,
        opt={NEEDS: ADMIN, AUDITED: "nexus.rebuild"},
        operation_id="rebuildNexus",
        summary="Make the graph anew",
        responses=_errors(),
    )
    async def rebuild(self, operator: NamedDependency[Operator]) -> LookAsked:
        """It is made empty, and told every document. 429 while it is compared or made already."""
        return await operator.look("rebuild")

    @get(
        "/failures",
        opt={NEEDS: ADMIN},
        operation_id="listNexusFailures",
        summary="Documents that were given up",
        responses=_errors("INVALID_EXPORT_REQUEST"),
    )
    async def failures(
        self,
        operator: NamedDependency[Operator],
        limit: Annotated[int, QueryParameter(description=f"1 to {MAX_FAILURES}")] = 100,
    ) -> DeadLetters:
        """Of all clients; the graph refused them several times, and `error` is why."""
        return await operator.failures(min(max(limit, 1), MAX_FAILURES))

    @get(
        "/events",
        opt={NEEDS: ADMIN},
        operation_id="listNexusEvents",
        summary="Events that were given up",
        responses=_errors("INVALID_EXPORT_REQUEST"),
    )
    async def events(
        self,
        operator: NamedDependency[Operator],
        after: Annotated[int, QueryParameter(description="Only events with ids above this one")] = 0,
        limit: Annotated[int, QueryParameter(description=f"1 to {MAX_FAILURES}")] = 100,
    ) -> DeadEvents:
        """Of all clients, oldest first. Whoever is told did not take them, or there was no room for them."""
        return await operator.dead_events(min(max(after, 0), MAX_EVENT), min(max(limit, 1), MAX_FAILURES))

    @post(
        "/events/retry",
        status_code=200,
        opt={NEEDS: ADMIN, AUDITED: "nexus.events"},
        operation_id="retryNexusEvents",
        summary="Send events again that were given up",
        responses=_errors(),
    )
    async def retry_events(self, operator: NamedDependency[Operator]) -> Retried:
        """The oldest ones, as many as there is room for."""
        return await operator.retry_events()
