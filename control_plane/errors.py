"""Errors of the HTTP boundary, and the one place where any exception becomes an answer."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.status_codes import HTTP_500_INTERNAL_SERVER_ERROR

from common.contract import ErrorBody, ErrorInfo
from common.errors import ExportError, InvalidRequest, Retry
from control_plane.operations.tracing import current

log = structlog.get_logger()

ERROR_CODE = "error_code"
"""Where the state of a request has the code of the error that it was answered with."""
RETRY_AFTER_SECONDS = 5
"""Where an error does not say it better in ``details['retryAfterSeconds']``."""


class Unauthorized(ExportError):
    """No bearer key, or a wrong one."""

    code = "UNAUTHORIZED"
    retry = Retry.never


class Forbidden(ExportError):
    """The key may not do this; ``details['scopes']`` has the scopes of which one is wanted."""

    code = "FORBIDDEN"
    retry = Retry.never


class NotFound(ExportError):
    """No such route."""

    code = "NOT_FOUND"
    retry = Retry.never


class MethodNotAllowed(ExportError):
    """The route does not know this method."""

    code = "METHOD_NOT_ALLOWED"
    retry = Retry.never


class NotAcceptable(ExportError):
    """The client takes no answer of the kind that the route gives."""

    code = "NOT_ACCEPTABLE"
    retry = Retry.never


class HostRefused(ExportError):
    """The request's Host is not a name of this server."""

    code = "HOST_REFUSED"
    retry = Retry.never


class OriginRefused(ExportError):
    """The request comes from a page of another origin, which may not ask."""

    code = "ORIGIN_REFUSED"
    retry = Retry.never


class JobNotFound(ExportError):
    """No job of this id."""

    code = "JOB_NOT_FOUND"
    retry = Retry.never


class JobExpired(ExportError):
    """The job's artifacts were removed after their time."""

    code = "JOB_EXPIRED"
    retry = Retry.never


class ArtifactNotReady(ExportError):
    """The job has not finished, or ended without an artifact."""

    code = "ARTIFACT_NOT_READY"
    retry = Retry.never


class ArtifactMissing(ExportError):
    """The artifact of a finished job is not where it should be."""

    code = "ARTIFACT_MISSING"
    retry = Retry.never


class JobNotFailed(ExportError):
    """Only an export that has failed is started again."""

    code = "JOB_NOT_FAILED"
    retry = Retry.never


class PayloadGone(ExportError):
    """The payload of a failed export is not kept any more."""

    code = "PAYLOAD_GONE"
    retry = Retry.never


class CollectionNotFound(ExportError):
    """The client has no collection of this name; ``details['field']`` says which one, where a search names several."""

    code = "COLLECTION_NOT_FOUND"
    retry = Retry.never


class CollectionDiffers(ExportError):
    """There is a collection of this name with vectors of another model or dimension."""

    code = "COLLECTION_DIFFERS"
    retry = Retry.never


class DocumentNotFound(ExportError):
    """No document of this id, or none that the key sees; ``details['field']`` says which one, where there are
    several."""

    code = "DOCUMENT_NOT_FOUND"
    retry = Retry.never


class RangeNotSatisfiable(ExportError):
    """The range lies outside the file; ``details['size']`` says how long it is."""

    code = "RANGE_NOT_SATISFIABLE"
    retry = Retry.never


class RateLimited(ExportError):
    """Too many of something at once."""

    code = "RATE_LIMITED"
    retry = Retry.later


class QuotaReached(RateLimited):
    """A client has as many jobs or documents as it may; ``details`` has the name of the ``quota`` and its ``limit``."""


class QueueUnavailable(ExportError):
    """The queue is full or the server is stopping."""

    code = "QUEUE_UNAVAILABLE"
    retry = Retry.later


class QueueFull(QueueUnavailable):
    """More jobs wait than may, or for longer than they may."""


class PlatformUnavailable(ExportError):
    """Runpod cannot be reached, is overloaded, does not answer as its documentation says, or does not know the key or
    the endpoint; the same request may work later."""

    code = "PLATFORM_UNAVAILABLE"
    retry = Retry.later


class IndexBuildInProgress(ExportError):
    """The files of a capsule are being fetched or indexed; the same question has an answer soon."""

    code = "INDEX_BUILD_IN_PROGRESS"
    retry = Retry.later


class TimedOut(ExportError):
    """A question took longer than it may."""

    code = "TIMEOUT"
    retry = Retry.later


class SemanticUnavailable(ExportError):
    """The engine that made a capsule's vectors does not answer a question now."""

    code = "SEMANTIC_UNAVAILABLE"
    retry = Retry.later


STATUS: dict[str, int] = {
    "UNAUTHORIZED": 401,
    "FORBIDDEN": 403,
    "INVALID_EXPORT_REQUEST": 400,
    "PAYLOAD_TOO_LARGE": 413,
    "UNSUPPORTED_MEDIA_TYPE": 415,
    "NOT_FOUND": 404,
    "METHOD_NOT_ALLOWED": 405,
    "NOT_ACCEPTABLE": 406,
    "HOST_REFUSED": 421,
    "ORIGIN_REFUSED": 403,
    "JOB_NOT_FOUND": 404,
    "JOB_EXPIRED": 410,
    "ARTIFACT_NOT_READY": 409,
    "ARTIFACT_MISSING": 410,
    "JOB_NOT_FAILED": 409,
    "PAYLOAD_GONE": 410,
    "COLLECTION_NOT_FOUND": 404,
    "COLLECTION_DIFFERS": 409,
    "DOCUMENT_NOT_FOUND": 404,
    "RANGE_NOT_SATISFIABLE": 416,
    "RATE_LIMITED": 429,
    "QUEUE_UNAVAILABLE": 503,
    "PLATFORM_UNAVAILABLE": 503,
    "STORAGE_FAILED": 503,
    "WORKER_LOST": 503,
    "INDEX_BUILD_IN_PROGRESS": 503,
    "SEMANTIC_UNAVAILABLE": 503,
    "TIMEOUT": 503,
    "GRAPH_UNAVAILABLE": 503,
    "LEASE_LOST": 503,
}
"""HTTP status of each code; any other code is a 500."""

_MISSING = re.compile(r"Missing required query parameter '(\w+)'")
_FRAMEWORK: dict[int, type[ExportError]] = {404: NotFound, 405: MethodNotAllowed}


def status_of(error: ExportError) -> int:
    """The HTTP status for an error."""
    return STATUS.get(error.code, HTTP_500_INTERNAL_SERVER_ERROR)


def body_of(error: ExportError) -> ErrorBody:
    """The JSON body for an error."""
    details: dict[str, Any] | msgspec.UnsetType = dict(error.details) or msgspec.UNSET
    return ErrorBody(error=ErrorInfo(code=error.code, message=error.message, details=details))


QUOTA_HEADERS = {
    "active_jobs": "X-Quota-Active-Jobs",
    "jobs_per_day": "X-Quota-Jobs-Per-Day",
    "documents_per_minute": "X-Quota-Documents-Per-Minute",
    "pending_documents": "X-Quota-Pending-Documents",
}
"""By the name of the quota; ``limit=5, remaining=2``."""


def headers_of(error: ExportError) -> dict[str, str]:
    """Headers that belong to an error."""
    if error.retryable and status_of(error) in (429, 503):
        headers = {"Retry-After": str(error.details.get("retryAfterSeconds", RETRY_AFTER_SECONDS))}
        if isinstance(error, QuotaReached):
            headers[QUOTA_HEADERS[str(error.details["quota"])]] = f"limit={error.details['limit']}, remaining=0"
        return headers
    if error.code == "UNAUTHORIZED":
        return {"WWW-Authenticate": "Bearer"}
    if error.code == "RANGE_NOT_SATISFIABLE":
        return {"Content-Range": f"bytes */{error.details['size']}"}
    return {}


def to_response(request: Request[Any, Any, Any], error: Exception) -> Response[ErrorBody]:
    """Any exception as an answer; what nobody foresaw becomes a 500 with a trace id, its story goes to the log."""
    known = _known(error)
    if known is None or status_of(known) == HTTP_500_INTERNAL_SERVER_ERROR:
        trace_id = current().trace
        log.error("request failed", exc_info=error)
        known = ExportError("Something went wrong on our side; the log has it under this trace id.", traceId=trace_id)
    request.scope["state"][ERROR_CODE] = known.code
    headers = headers_of(known)
    if isinstance(error, HTTPException) and error.headers:
        headers |= {name: value for name, value in error.headers.items() if name.lower() == "allow"}
    return Response(body_of(known), status_code=status_of(known), headers=headers, media_type="application/json")


def _known(error: Exception) -> ExportError | None:
    from control_plane.jobs.database import AWAY  # commands that need these classes need no database

    if isinstance(error, ExportError):
        return error
    if isinstance(error, AWAY):
        log.error("the database is away", error=str(error))
        return QueueUnavailable("The database does not answer now. Try again later.")
    if not isinstance(error, HTTPException) or error.status_code >= HTTP_500_INTERNAL_SERVER_ERROR:
        return None
    if kind := _FRAMEWORK.get(error.status_code):
        return kind("There is no such route." if error.status_code == 404 else "This route does not know that method.")
    wrong = [item for item in error.extra if "key" in item] if isinstance(error.extra, list) else []
    if not wrong:
        missing = _MISSING.match(error.detail)
        return (
            InvalidRequest(f"{missing[1]}: must be given", field=missing[1])
            if missing
            else InvalidRequest(error.detail)
        )
    what = "; ".join(f"{_wire_name(item)}: {_said(item['message'])}" for item in wrong)
    return InvalidRequest(what, field=_wire_name(wrong[0]))


def _said(message: str) -> str:
    """The framework speaks of Python's types; clients send texts."""
    return "must be a whole number" if message.startswith("Expected `int") else message


def _wire_name(wrong: dict[str, str]) -> str:
    """The framework names parameters as our functions do; clients know ``sinceSeq`` and ``Last-Event-ID``."""
    first, *rest = wrong["key"].split("_")
    if wrong.get("source") == "header":
        return "-".join([first, *rest])
    return first + "".join(word.capitalize() for word in rest)
