"""A collector of traces on this machine: it takes OTLP over HTTP as the OpenTelemetry Collector does."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from processes import answering


class Told(NamedTuple):
    """A span that came; ids in hex."""

    name: str
    trace: str
    span: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]
    failed: bool
    resource: dict[str, Any]


class Collector:
    """What came, and whether it answers."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[Told] = []
        self.asked = threading.Event()
        self.answers = threading.Event()
        self.answers.set()

    def named(self, name: str, **attributes: object) -> list[Told]:
        """The spans of a name that have these attributes (``job_id`` is ``memvid.job_id``)."""
        wanted = {f"memvid.{key}": value for key, value in attributes.items()}
        return [span for span in list(self.spans) if span.name == name and wanted.items() <= span.attributes.items()]


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextmanager
def collector() -> Iterator[Collector]:
    """One on a free port; where ``answers`` is cleared it lets those who send wait."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            known.asked.set()
            known.answers.wait(60)
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            assert (self.path, self.headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf")
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    known.spans += [
                        Told(
                            span.name,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            _values(span.attributes),
                            span.status.code == 2,
                            _values(resource.resource.attributes),
                        )
                        for span in scope.spans
                    ]
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with answering(Handler) as url:
        known = Collector(url)
        yield known
        known.answers.set()
