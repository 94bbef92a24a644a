"""The log of a server or worker: one JSON object a line on standard error, what libraries say included.

Each line has ``trace`` (32 hex): that of the request or job that it speaks of, else one of the process; and ``job_id``
where it speaks of a job. Content, names, queries, keys and the values of settings are not logged.
"""

from __future__ import annotations

import logging
import re
import secrets
import sys
import threading
from types import TracebackType

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.types import EventDict, Processor

from common.errors import ExportError, InvalidRequest, PayloadMismatch, PayloadTooLarge, UnsupportedMediaType

log = structlog.get_logger()

_CAPSULE = re.compile(r"[^/\s'\"]+(?=\.mv2)")
"""Files of a capsule are called as the client calls its project."""
_ABOUT_INPUT = (InvalidRequest, PayloadTooLarge, PayloadMismatch, UnsupportedMediaType)
"""Their messages quote what the client sent."""


def log_as_json() -> None:
    """From now on in this process."""
    own = secrets.token_hex(16)

    def with_trace(_logger: object, _method: str, line: EventDict) -> EventDict:
        line.setdefault("trace", own)
        return line

    first: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        with_trace,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Processor] = [structlog.processors.format_exc_info, _without_names, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[*first, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[*first, structlog.stdlib.add_logger_name],
            processors=[ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    sys.excepthook = _crashed
    threading.excepthook = _thread_crashed


def _without_names(_logger: object, _method: str, line: EventDict) -> EventDict:
    for key, value in line.items():
        if isinstance(value, str) and ".mv2" in value:
            line[key] = _CAPSULE.sub("*", value)
    return line


def reason_of(error: ExportError) -> str:
    """Why, as a log may say it: the message, but for errors whose messages quote the input."""
    return "the input; its sender is told what" if isinstance(error, _ABOUT_INPUT) else error.message


def job_context(job_id: str, traceparent: str | None) -> dict[str, str]:
    """What ``structlog.contextvars`` are to bind while something is done for a job; ``traceparent`` as W3C writes it,
    empty or None where nobody knows it."""
    trace = trace_id_of(traceparent)
    return {"job_id": job_id} | ({"trace": trace} if trace else {})


def trace_id_of(traceparent: str | None) -> str | None:
    """The 32 hex digits of the trace in a valid W3C ``traceparent``; None where there is none."""
    return traceparent.split("-")[1] if traceparent else None


def _crashed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        log.critical("the process ends", exc_info=(kind, error, trace))


def _thread_crashed(told: threading.ExceptHookArgs) -> None:
    if told.exc_value is not None:
        name = told.thread.name if told.thread else ""
        log.critical("a thread ended", thread=name, exc_info=(told.exc_type, told.exc_value, told.exc_traceback))
