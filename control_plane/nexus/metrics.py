"""Figures of collections, their sync with the graph, and the back channel."""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from control_plane.operations.metrics import SHORT

MAX_COLLECTIONS = 1_000
"""Names of collections that are told apart in a process; all that come after them are ``other``."""
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
    "replayed",
    "unknown",
    "full",
)
"""Why a webhook is refused, in the order in which that is looked at."""
OUTCOMES = ("sent", "retried", "dead", "full", "dropped")
"""Of events for outside: taken; not taken, and tried again; given up; given up at once, as too many wait; given up
before, and not kept any longer."""


class NexusMetrics:
    """What is counted while the server runs, in this process alone."""

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
        # From 0 on, so that the first one is a rise: an alert hears of it.
        for reason in REFUSALS:
            self.webhook_refused.labels(reason)
        for outcome in OUTCOMES:
            self.outbound.labels(outcome)

    def synced(self, collection: str, status: Literal["synced", "retried", "failed"], seconds: float | None) -> None:
        """Count a document that the graph was told, and the seconds since it changed where it has it now."""
        label = self._label(collection)
        self._sync.labels(label, status).inc()
        if seconds is not None:
            self._sync_seconds.labels(label).observe(seconds)

    def _label(self, collection: str) -> str:
        if collection not in self._collections:
            if len(self._collections) >= MAX_COLLECTIONS:
                return OTHER
            self._collections.add(collection)
        return collection
