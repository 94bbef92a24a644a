"""Figures for Prometheus; each server has a registry of its own."""

from __future__ import annotations

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from common.contract import EmbeddingReport, Status

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)


class Metrics:
    """What is counted while the server runs; the numbers of jobs by status come from the store at each look."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._jobs = Gauge("memvid_export_jobs", "Jobs by status", ["status"], registry=self._registry)
        self._depth = Gauge("memvid_export_queue_depth", "Jobs waiting", registry=self._registry)
        self._streams = Gauge("memvid_export_event_streams", "Open event streams", registry=self._registry)
        self.accepted = Counter("memvid_export_accepted", "Jobs accepted", registry=self._registry)
        self.ended = Counter("memvid_export_ended", "Jobs ended", ["status", "code"], registry=self._registry)
        self.retries = Counter(
            "memvid_export_retries",
            "Attempts that were tried again, by class of error",
            ["kind"],
            registry=self._registry,
        )
        self.embed_tokens = self._by_model("memvid_export_embed_tokens", "Tokens that engines read")
        self.embed_texts = self._by_model("memvid_export_embed_texts", "Texts that got a vector")
        self.embed_cache_hits = self._by_model("memvid_export_embed_cache_hits", "Vectors that came from the cache")
        self.embed_cost = self._by_model("memvid_export_embed_cost_usd", "Estimated cost of tokens, in US dollars")
        self.runpod = Counter(
            "memvid_export_runpod_requests", "Requests to Runpod", ["route", "status"], registry=self._registry
        )
        self.queue_delay = self._histogram("memvid_export_queue_delay_seconds", "From 202 to a worker taking the job")
        self.duration = self._histogram("memvid_export_duration_seconds", "From 202 to the end of a completed job")
        self.write = self._histogram("memvid_export_write_seconds", "Writing of a capsule")
        self.embed = self._histogram("memvid_export_embed_seconds", "Embedding of a capsule's texts")
        self.check = self._histogram("memvid_export_check_seconds", "Reading of a payload before 202")
        self.refused = self._counter("memvid_export_refused", "Requests that a limit refused, by limit", ["limit"])
        self.downloads = Gauge("memvid_export_downloads", "Downloads that run", registry=self._registry)
        self.damage = self._counter("memvid_export_damaged", "Stored files that were found damaged", ["file"])
        self.scrubbed = self._counter("memvid_export_scrubbed_bytes", "Stored bytes compared with their hashes", [])
        self.canary = self._counter("memvid_export_canary_runs", "Canary exports, by outcome", ["outcome"])
        self.canary_seconds = self._histogram("memvid_export_canary_seconds", "From the canary's POST to its answer")

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=SECONDS, registry=self._registry)

    def _by_model(self, name: str, text: str) -> Counter:
        return Counter(name, f"{text}, of completed jobs", ["provider", "model"], registry=self._registry)

    def embedded(self, report: EmbeddingReport) -> None:
        """Count what a completed job embedded."""
        if report.provider is not None and report.model is not None:
            for counter, value in (
                (self.embed_tokens, report.tokens),
                (self.embed_texts, report.texts),
                (self.embed_cache_hits, report.cache_hits),
                (self.embed_cost, report.cost_estimate),
            ):
                counter.labels(report.provider, report.model).inc(value)

    def text(self, counts: dict[Status, int], streams: int) -> bytes:
        """The exposition text."""
        for status in get_args(Status):
            self._jobs.labels(status).set(counts.get(status, 0))
        self._depth.set(counts.get("queued", 0))
        self._streams.set(streams)
        return generate_latest(self._registry)
