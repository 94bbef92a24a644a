"""What is counted of the sync, under names of collections whose number is bounded."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from control_plane.nexus.metrics import MAX_COLLECTIONS, OTHER, OUTCOMES, REFUSALS, NexusMetrics


def test_documents_are_counted_by_collection_and_by_how_it_ended() -> None:
    registry = CollectorRegistry()
    metrics = NexusMetrics(registry)
    metrics.synced("books", "synced", 0.25)
    metrics.synced("books", "synced", 2.0)
    metrics.synced("books", "failed", None)

    def figure(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"vectorizer_nexus_{name}", {"collection": "books", **labels})

    assert figure("sync_total", status="synced") == 2
    assert figure("sync_total", status="failed") == 1
    assert figure("sync_duration_seconds_count") == 2
    assert figure("sync_duration_seconds_sum") == 2.25


def test_collections_beyond_the_bound_are_counted_together() -> None:
    registry = CollectorRegistry()
    metrics = NexusMetrics(registry)
    for round_ in range(2):
        for number in range(MAX_COLLECTIONS + 5):
            metrics.synced(f"c{number}", "synced", 1.0)
        counted = {
            sample.labels["collection"]: sample.value
            for family in registry.collect()
            for sample in family.samples
            if sample.name == "vectorizer_nexus_sync_total"
        }
        assert len(counted) == MAX_COLLECTIONS + 1
        assert counted["other"] == 5 * (round_ + 1)
        assert counted[f"c{MAX_COLLECTIONS - 1}"] == round_ + 1


def test_refusals_and_events_are_told_from_zero_on() -> None:
    registry = CollectorRegistry()
    NexusMetrics(registry)
    for reason in REFUSALS:
        assert registry.get_sample_value("vectorizer_nexus_webhook_refused_total", {"reason": reason}) == 0
    for outcome in OUTCOMES:
        assert registry.get_sample_value("vectorizer_nexus_outbound_total", {"outcome": outcome}) == 0


def test_a_client_that_makes_ten_thousand_collections_leaves_the_figures_small() -> None:
    registry = CollectorRegistry()
    metrics = NexusMetrics(registry)
    for number in range(10_000):
        metrics.synced(f"c{number}", "synced", 1.0)
        metrics.synced(f"c{number}", "retried", None)
        metrics.synced(f"c{number}", "failed", None)
    assert sum("collection" in sample.labels for family in registry.collect() for sample in family.samples) < 5_000
    others = registry.get_sample_value("vectorizer_nexus_sync_total", {"collection": OTHER, "status": "failed"})
    assert others == 10_000 - MAX_COLLECTIONS
