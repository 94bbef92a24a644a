"""Which request a thing belongs to, as W3C trace context says it; and its spans, where a collector is configured."""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple, Self

from common.errors import InvalidSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1
QUEUE = 4_096
"""Spans that wait for the collector, a few MB; more are dropped."""
BATCH = 512
DELAY_MS = 1_000
SEND_SECONDS = 5.0
"""The collector has so long for a batch, with all tries."""
CLOSE_SECONDS = 2.0
"""And so long for what is left when the server stops."""

Attributes = Mapping[str, str | int | float | bool]


class Mark(NamedTuple):
    """A place in a trace: a span that others hang below."""

    trace: str
    """32 hex."""
    span: str
    """16 hex."""
    sampled: bool = True
    """Whoever began the trace wants its spans."""

    @property
    def traceparent(self) -> str:
        """As the header says it."""
        return f"00-{self.trace}-{self.span}-{_SAMPLED if self.sampled else 0:02x}"

    @classmethod
    def of(cls, traceparent: str) -> Self | None:
        """From a header; None for one that is not valid."""
        match = _TRACEPARENT.fullmatch(traceparent)
        if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
            return None
        if not int(match[2], 16) or not int(match[3], 16):
            return None
        return cls(match[2], match[3], bool(int(match[4], 16) & _SAMPLED))

    def below(self) -> Self:
        """A new span of the same trace."""
        return self._replace(span=secrets.token_hex(8))

    def named(self, name: str) -> Self:
        """The span of the same trace that always has this name's id: whoever ends it need not have begun it."""
        return self._replace(span=hashlib.sha256(f"{self.trace} {name}".encode()).hexdigest()[:16])


REQUEST: ContextVar[Mark | None] = ContextVar("request", default=None)
"""The request that is being answered."""


def new_mark() -> Mark:
    """The first span of a new trace."""
    return Mark(secrets.token_hex(16), secrets.token_hex(8))


def current() -> Mark:
    """The request that is being answered; outside of one, a new trace."""
    return REQUEST.get() or new_mark()


class Span(NamedTuple):
    """Something that took time; times in nanoseconds since 1970."""

    name: str
    mark: Mark
    parent: str | None
    """16 hex; None at the root."""
    start: int
    end: int
    attributes: Attributes
    error: str | None = None
    """A code, where it failed."""
    server: bool = False
    """The answer to a request."""


class Tracing:
    """Gives spans to a collector in batches and in a thread of its own; nobody waits for it, and none hears that it is
    away but the log."""

    def __init__(self, endpoint: str | None, *, replica: str) -> None:
        """``endpoint`` is the collector's URL without ``/v1/traces``; None makes no spans and imports nothing. Further
        settings of the exporter (OTEL_EXPORTER_OTLP_HEADERS, …) are OpenTelemetry's own. Raises InvalidSettings."""
        self.on = endpoint is not None
        self._batches: BatchSpanProcessor | None = None
        if endpoint is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            name = "OTEL_EXPORTER_OTLP_ENDPOINT"
            raise InvalidSettings(f"{name} needs the extra otel: memvid-export[otel]", field=name) from error
        self._exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=SEND_SECONDS)
        self._batches = BatchSpanProcessor(
            self._exporter, max_queue_size=QUEUE, schedule_delay_millis=DELAY_MS, max_export_batch_size=BATCH
        )
        self._resource = Resource.create(
            {
                "service.name": "memvid-export",
                "service.version": version("memvid-export"),
                "service.instance.id": replica,
            }
        )

    def end(self, spans: Iterable[Span]) -> None:
        """Hand over spans that have ended."""
        if self._batches is None:
            return
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
        from opentelemetry.trace.status import Status, StatusCode

        for span in spans:
            if not span.mark.sampled:
                continue
            trace, flags = int(span.mark.trace, 16), TraceFlags(TraceFlags.SAMPLED)
            parent = None
            if span.parent is not None:
                parent = SpanContext(trace, int(span.parent, 16), is_remote=True, trace_flags=flags)
            self._batches.on_end(
                ReadableSpan(
                    name=span.name,
                    context=SpanContext(trace, int(span.mark.span, 16), is_remote=False, trace_flags=flags),
                    parent=parent,
                    resource=self._resource,
                    attributes=span.attributes,
                    kind=SpanKind.SERVER if span.server else SpanKind.INTERNAL,
                    status=Status(StatusCode.ERROR, span.error) if span.error else Status(),
                    start_time=span.start,
                    end_time=max(span.start, span.end),
                )
            )

    def close(self) -> None:
        """Send what is left, for a moment."""
        if self._batches is not None:
            # It waits for the collector, in a thread that nobody has to wait for.
            last = threading.Thread(target=self._batches.shutdown, daemon=True, name="last spans")
            last.start()
            last.join(CLOSE_SECONDS)
            if last.is_alive():
                self._exporter.shutdown()  # type: ignore[no-untyped-call]
