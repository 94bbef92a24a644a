"""Figures of collections, their sync with the graph, and the back channel."""

from __future__ import annotations

import math
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from control_plane.operations.metrics import SHORT

MAX_COLLECTIONS = 200
"""Names of collections that are told apart in a process, some twenty series each; all that come after them are
``other``."""
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500)
"""Documents, of what is handled at once."""
OTHER = "other"
REFUSALS = (
    "headers",
    "window",
    "size",
    "busy",
    "body",
    "signature",
    "invalid",
    "rate",
    "replayed",
    "unknown",
    "full",
)
"""Why a webhook is refused, in the order in which that is looked at."""
OUTCOMES = ("sent", "retried", "dead", "full", "dropped")
"""Of events for outside: taken; not taken, and tried again; given up; given up at once, as too many wait; given up
before, and not kept any longer."""
IMPORTED = ("done", "retried", "failed")
"""Of exports that are to become collections; the last: given up."""


class NexusMetrics:
    """What is counted while the server runs, in this process alone; gauges but for ``trouble`` are of all replicas, and
    each of these tells the same."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._collections: set[str] = set()
        self._sync = Counter(
            "vectorizer_nexus_sync",
            "Documents that the graph was told, by how that ended",
            ["collection", "status"],
            registry=registry,
        )
        self._sync_seconds = Histogram(
            "vectorizer_nexus_sync_duration_seconds",
            "From the change of a document to the graph that has it",
            ["collection"],
            buckets=SECONDS,
            registry=registry,
        )
        self.relationships = Counter(
            "vectorizer_nexus_relationships_created",
            "Edges that the graph was told to have",
            ["type"],
            registry=registry,
        )
        self.errors = Counter(
            "vectorizer_nexus_errors", "What went wrong during sync, by code", ["code"], registry=registry
        )
        self.queue_depth = Gauge(
            "vectorizer_nexus_queue_depth", "Documents that the graph does not have as they are", registry=registry
        )
        self.oldest = Gauge(
            "vectorizer_nexus_oldest_pending_seconds", "Wait of the one that has waited longest", registry=registry
        )
        self.given_up = Gauge("vectorizer_nexus_given_up", "Documents that were given up", registry=registry)
        self.trouble = Gauge(
            "vectorizer_nexus_trouble",
            "1 where this replica syncs, and the graph does not answer or cannot be used",
            registry=registry,
        )
        self.differences = Gauge(
            "vectorizer_nexus_differences",
            "Between documents and graph, that the last look found and had repaired",
            registry=registry,
        )
        self.events = Gauge("vectorizer_nexus_events", "Events for outside that are kept", ["state"], registry=registry)
        self.batch = Histogram(
            "vectorizer_nexus_batch_size",
            "Documents handled at once, by stage",
            ["stage"],
            buckets=SIZES,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "vectorizer_nexus_stage_seconds", "Steps of the sync, by stage", ["stage"], buckets=SHORT, registry=registry
        )
        self.webhooks = Counter(
            "vectorizer_nexus_webhooks",
            "Webhooks whose signature was right and that were understood, by what came of them",
            ["route", "outcome"],
            registry=registry,
        )
        self.webhook_refused = Counter(
            "vectorizer_nexus_webhook_refused", "Webhooks that were refused, by reason", ["reason"], registry=registry
        )
        self.webhook_seconds = Histogram(
            "vectorizer_nexus_webhook_seconds",
            "Webhooks, from their head to their answer, refused ones too",
            ["route"],
            buckets=SHORT,
            registry=registry,
        )
        self.outbound = Counter(
            "vectorizer_nexus_outbound", "Events for outside, by what came of them", ["outcome"], registry=registry
        )
        self.imports = Counter(
            "vectorizer_nexus_imports",
            "Exports that are to become collections, by what came of an attempt",
            ["outcome"],
            registry=registry,
        )
        self.context_cache = Counter(
            "vectorizer_nexus_context_cache",
            "Answers about what is around a document: kept from before, or new",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("hit", "miss"):
            self.context_cache.labels(outcome)
        # From 0 on, so that the first one is a rise: an alert hears of it.
        for reason in REFUSALS:
            self.webhook_refused.labels(reason)
        for outcome in OUTCOMES:
            self.outbound.labels(outcome)
        for outcome in IMPORTED:
            self.imports.labels(outcome)

    def synced(self, collection: str, status: Literal["synced", "retried", "failed"], seconds: float | None) -> None:
        """Count a document that the graph was told, and the seconds since it changed where it has it now."""
        label = self._label(collection)
        self._sync.labels(label, status).inc()
        if seconds is not None:
            self._sync_seconds.labels(label).observe(seconds)

    def unknown(self) -> None:
        """The database does not say what the gauges of all replicas tell."""
        for gauge in (self.queue_depth, self.oldest, self.given_up, self.differences):
            gauge.set(math.nan)
        for state in ("waiting", "dead"):
            self.events.labels(state).set(math.nan)

    def _label(self, collection: str) -> str:
        if collection not in self._collections:
            if len(self._collections) >= MAX_COLLECTIONS:
                return OTHER
            self._collections.add(collection)
        return collection
