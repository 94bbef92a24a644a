"""Figures for Prometheus; each server has a registry of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from common.contract import EmbeddingReport, Report, Status
from common.errors import ExportError
from control_plane.jobs.store import Waiting

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)
"""Seconds, of what should take milliseconds."""
FRAMES = (300, 1_000, 3_000, 10_000, 20_000, 30_000, 50_000, 100_000, 200_000, 300_000, 1_000_000)
STAGES = ("read", "transform", "embed", "write", "sidecar", "verify", "upload")
"""Of the report's timings."""


class Metrics:
    """What is counted while the server runs; what is known of jobs comes from the store at each look.

    Counters and histograms are of this process. Those from the store (``jobs``, ``queue_depth``,
    ``queue_oldest_seconds``, ``dead_letters``) are of all replicas, and each of these tells the same.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the text, and say when each counter was first used
        self.registry = CollectorRegistry()
        ProcessCollector(namespace="memvid_export", registry=self.registry)
        build = Gauge("memvid_export_build_info", "1, with the version", ["version"], registry=self.registry)
        build.labels(version("memvid-export")).set(1)
        self._jobs = Gauge("memvid_export_jobs", "Jobs by status", ["status"], registry=self.registry)
        self._depth = Gauge("memvid_export_queue_depth", "Jobs waiting", registry=self.registry)
        self._streams = Gauge("memvid_export_event_streams", "Open event streams", registry=self.registry)
        self._oldest = self._gauge("memvid_export_queue_oldest_seconds", "Wait of the job that has waited longest", [])
        self._dead = self._gauge("memvid_export_dead_letters", "Failed jobs whose payload is kept", [])
        self._trouble = self._gauge(
            "memvid_export_trouble", "1 where a part of the server says what is wrong", ["part"]
        )
        self._free = self._gauge("memvid_export_disk_free_bytes", "Free on the disk of a folder", ["folder"])
        self.accepted = Counter("memvid_export_accepted", "Jobs accepted", registry=self.registry)
        self.ended = Counter("memvid_export_ended", "Jobs ended", ["status", "code"], registry=self.registry)
        self.retries = Counter(
            "memvid_export_retries",
            "Attempts that were tried again, by class of error",
            ["kind"],
            registry=self.registry,
        )
        self.embed_tokens = self._by_model("memvid_export_embed_tokens", "Tokens that engines read")
        self.embed_texts = self._by_model("memvid_export_embed_texts", "Texts that got a vector")
        self.embed_cache_hits = self._by_model("memvid_export_embed_cache_hits", "Vectors that came from the cache")
        self.embed_retries = self._by_model("memvid_export_embed_retries", "Requests to engines that were tried again")
        self.embed_cost = self._by_model("memvid_export_embed_cost_usd", "Estimated cost of tokens, in US dollars")
        self.runpod = Counter(
            "memvid_export_runpod_requests", "Requests to Runpod", ["route", "status"], registry=self.registry
        )
        self.queue_delay = self._histogram("memvid_export_queue_delay_seconds", "From 202 to a worker taking the job")
        self.duration = self._histogram("memvid_export_duration_seconds", "From 202 to the end of a completed job")
        self.write_rate = self._histogram(
            "memvid_export_write_frames_per_second", "Frames a second while a capsule is written", buckets=FRAMES
        )
        self.stage = self._histogram("memvid_export_stage_seconds", "Stages of completed jobs", ["stage"])
        self.failed_stage = self._counter(
            "memvid_export_failed_attempts", "Attempts that failed, by the stage that they were at", ["stage"]
        )
        self.cold_start = self._histogram(
            "memvid_export_cold_start_seconds", "Starts of workers, until they take a job", ["backend"]
        )
        self.embed = self._histogram(
            "memvid_export_embed_seconds", "Embedding of a capsule's texts", ["provider", "model"]
        )
        self.check = self._histogram("memvid_export_check_seconds", "Reading of a payload before 202")
        self.refused = self._counter("memvid_export_refused", "Requests that a limit refused, by limit", ["limit"])
        self.audit_dropped = self._counter(
            "memvid_export_audit_dropped", "Entries of the audit log that were not written", []
        )
        self.downloads = Gauge("memvid_export_downloads", "Downloads that run", registry=self.registry)
        self.damage = self._counter("memvid_export_damaged", "Stored files that were found damaged", ["file"])
        self.scrubbed = self._counter("memvid_export_scrubbed_bytes", "Stored bytes compared with their hashes", [])
        self.canary = self._counter("memvid_export_canary_runs", "Canary exports, by outcome", ["outcome"])
        # From 0 on, so that the first one is a rise: an alert hears of it.
        for file in ("payload", "capsule", "sidecar", "manifest"):
            self.damage.labels(file)
        for outcome in ("ok", "refused", "failed", "timeout"):
            self.canary.labels(outcome)
        for kind in ExportError.__subclasses__():
            if kind.__module__ == ExportError.__module__:
                self.ended.labels("failed", kind.code)
        self.canary_seconds = self._histogram("memvid_export_canary_seconds", "From the canary's POST to its answer")

        self.canary_success = self._gauge(
            "memvid_export_canary_last_success_timestamp_seconds", "When a canary last came through; 0: not yet", []
        )
        self.event_lag = self._histogram(
            "memvid_export_event_lag_seconds", "From an event's commit to its being handed to a stream", buckets=SHORT
        )
        self.storage_errors = self._counter(
            "memvid_export_storage_errors", "What the storage raised in this process", ["operation", "code"]
        )
        self.http = self._histogram(
            "memvid_export_http_request_seconds",
            "Requests, from their first byte to the last of the answer",
            ["route", "method", "status"],
            buckets=SHORT,
        )
        for status in ("2xx", "5xx"):
            self.http.labels("/v1/exports", "POST", status)
        self.http_bytes = self._counter("memvid_export_http_sent_bytes", "Bytes of answers", ["route"])
        self.loop_lag = self._histogram(
            "memvid_export_event_loop_lag_seconds", "How late the event loop wakes who sleeps", buckets=SHORT
        )

    def _gauge(self, name: str, text: str, labels: list[str]) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: Sequence[str] = (), *, buckets: Sequence[float] = SECONDS
    ) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def _by_model(self, name: str, text: str) -> Counter:
        return Counter(name, f"{text}, of completed jobs", ["provider", "model"], registry=self.registry)

    def completed(self, report: Report, backend: str, seconds: float) -> None:
        """Count a job that was completed so many seconds after its 202."""
        timings = report.timings
        self.duration.observe(seconds)
        for stage in STAGES:
            if spent := getattr(timings, stage):
                self.stage.labels(stage).observe(spent)
        if timings.write:
            self.write_rate.observe(report.capsule.frames / timings.write)
        if timings.cold_start:
            self.cold_start.labels(backend).observe(timings.cold_start)
        if report.embedding.texts:
            self._embedded(report.embedding, timings.embed)

    def _embedded(self, report: EmbeddingReport, seconds: float) -> None:
        if report.provider is not None and report.model is not None:
            self.embed.labels(report.provider, report.model).observe(seconds)
            for counter, value in (
                (self.embed_tokens, report.tokens),
                (self.embed_texts, report.texts),
                (self.embed_cache_hits, report.cache_hits),
                (self.embed_retries, report.retries),
                (self.embed_cost, report.cost_estimate),
            ):
                counter.labels(report.provider, report.model).inc(value)

    def text(
        self, waiting: Waiting | None, *, streams: int, free: Mapping[str, int], troubles: Mapping[str, bool]
    ) -> bytes:
        """The exposition text. ``waiting`` None: the database does not say; ``free`` are bytes by folder, ``troubles``
        whether something is wrong with a part of the server."""
        counts = {} if waiting is None else waiting.counts
        for status in get_args(Status):
            self._jobs.labels(status).set(math.nan if waiting is None else counts.get(status, 0))
        self._depth.set(math.nan if waiting is None else counts.get("queued", 0))
        self._oldest.set(math.nan if waiting is None else waiting.oldest_seconds)
        self._dead.set(math.nan if waiting is None else waiting.dead_letters)
        self._streams.set(streams)
        for folder, size in free.items():
            self._free.labels(folder).set(size)
        for part, trouble in troubles.items():
            self._trouble.labels(part).set(trouble)
        return generate_latest(self.registry)
