"""The routes of ``/v1/exports``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from litestar import Controller, HttpMethod, Request, Response, delete, get, post, route
from litestar.datastructures import ResponseHeader
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, Operation, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIFormat, OpenAPIType
from litestar.params import Parameter
from litestar.types import ASGIApp

from common.contract import (
    COLLECTION_NAME,
    EventPage,
    EventType,
    Job,
    JobCreated,
    JobPage,
    Manifest,
    Report,
    SearchAnswer,
    Status,
)
from common.errors import InvalidRequest
from common.graph.model import GraphLimits
from control_plane.exports.intake import CONTENT_TYPES, MAX_KEY, Intake
from control_plane.exports.search import MAX_HITS, MODES, ExportSearch, Question
from control_plane.exports.service import ExportService
from control_plane.exports.views import created_view
from control_plane.jobs.records import JobRecord
from control_plane.nexus.incoming import check_collection
from control_plane.operations.auth import AUDITED, EXPORT, FOLLOW, NEEDS, READ
from control_plane.operations.keys import Caller
from control_plane.operations.openapi import REFUSALS, error_specs
from control_plane.reading.ask import MAX_CAPSULES
from control_plane.reading.search import MAX_QUERY_CHARS

MAX_DIGITS = 18
PAYLOAD_SHA256 = "X-Payload-SHA256"
"""Of the 202 answer: the SHA-256 (hex) of the body as it came."""

_OBJECT = Schema(type=OpenAPIType.OBJECT)
_NAMED = f"^{COLLECTION_NAME}$"
_NAME = Schema(type=OpenAPIType.STRING, min_length=1, max_length=GraphLimits().max_id_chars)
_RELATIONSHIPS = Schema(
    type=OpenAPIType.ARRAY,
    min_items=1,
    items=Schema(
        type=OpenAPIType.OBJECT,
        required=["sourceId", "targetId", "type"],
        properties={
            "id": Schema(type=OpenAPIType.STRING),
            "sourceId": _NAME,
            "targetId": _NAME,
            "type": _NAME,
            "confidence": Schema(type=OpenAPIType.NUMBER),
        },
    ),
)
_GRAPH = Schema(
    type=OpenAPIType.OBJECT,
    title="ExportRequest",
    description="An export request, or the answer of GitNexus `GET /api/graph` (`edges` for `relationships` will do).",
    required=["nodes"],
    # Where there are both, nobody reads the edges.
    any_of=[Schema(required=["relationships"]), Schema(required=["edges"], properties={"edges": _RELATIONSHIPS})],
    properties={
        "sessionId": Schema(type=OpenAPIType.STRING),
        "projectName": Schema(type=OpenAPIType.STRING),
        "source": _OBJECT,
        "nodes": Schema(
            type=OpenAPIType.ARRAY,
            min_items=1,
            items=Schema(
                type=OpenAPIType.OBJECT,
                required=["id", "label"],
                properties={
                    "id": _NAME,
                    "label": _NAME,
                    "properties": _OBJECT,
                },
            ),
        ),
        "relationships": _RELATIONSHIPS,
        "fileContents": Schema(type=OpenAPIType.OBJECT, additional_properties=Schema(type=OpenAPIType.STRING)),
        "options": Schema(
            type=OpenAPIType.OBJECT,
            properties={"collection": Schema(type=[OpenAPIType.STRING, OpenAPIType.NULL], pattern=_NAMED)},
        ),
    },
)
_SEQ = {"type": [OpenAPIType.INTEGER, OpenAPIType.STRING], "minimum": 0, "pattern": "^[0-9]*$", "default": 0}
_KEY = {"min_length": 1, "max_length": MAX_KEY, "pattern": "^[ -~]+$"}
_PART = {"minimum": 1}
_COLLECTION = {"pattern": _NAMED}
_MODE = {"enum": list(MODES)}
_LIMIT = {"minimum": 1, "maximum": MAX_HITS}
_BINARY = Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY)


class _SentEvent(msgspec.Struct):
    """What the fields of a server-sent event hold."""

    id: str
    """The number of the event."""
    event: EventType
    data: str
    """The event, as JSON."""


@dataclass
class _CreateOperation(Operation):
    """The body is streamed to disk, so the framework does not see its shape."""

    def __post_init__(self) -> None:
        content = {kind: OpenAPIMediaType(schema=_BINARY) for kind in CONTENT_TYPES}
        content["application/json"] = OpenAPIMediaType(schema=_GRAPH)
        self.request_body = RequestBody(content=content, required=True, description="Plain, gzip or zstd.")


def _number(text: str) -> int | None:
    """A number of at most 18 digits (no log is that long, a longer one counts as the greatest); None for other text."""
    if not (text.isascii() and text.isdecimal()):
        return None
    return int(text) if len(text) <= MAX_DIGITS else 10**MAX_DIGITS


def _since(text: str) -> int:
    number = _number(text or "0")
    if number is None:
        raise InvalidRequest("sinceSeq must be a whole number, 0 or more.", field="sinceSeq")
    return number


def _errors(*codes: str) -> dict[int, ResponseSpec]:
    return error_specs(*REFUSALS, *codes, "INTERNAL")


def _file(media_type: str, whole_as: type = bytes) -> dict[int, ResponseSpec]:
    whole = ResponseSpec(
        data_container=whole_as, media_type=media_type, description="The file", generate_examples=False
    )
    part = ResponseSpec(data_container=bytes, media_type=media_type, description="A range", generate_examples=False)
    same = ResponseSpec(data_container=None, description="Not changed", generate_examples=False)
    errors = _errors(
        "INVALID_EXPORT_REQUEST",
        "JOB_NOT_FOUND",
        "ARTIFACT_NOT_READY",
        "JOB_EXPIRED",
        "ARTIFACT_MISSING",
        "RANGE_NOT_SATISFIABLE",
        "RATE_LIMITED",
        "STORAGE_FAILED",
    )
    return {200: whole, 206: part, 304: same, **errors}


def _accepted(job: JobRecord, *, new: bool, quotas: dict[str, str]) -> Response[JobCreated]:
    headers = {"Location": f"/v1/exports/{job.id}", PAYLOAD_SHA256: job.payload_sha256, **quotas}
    headers |= {} if new else {"Idempotent-Replayed": "true"}
    return Response(created_view(job), status_code=202, headers=headers)


class ExportController(Controller):
    """Create, follow, fetch and cancel exports."""

    path = "/v1/exports"
    tags = ("exports",)

    @post(
        status_code=202,
        request_max_body_size=None,
        operation_class=_CreateOperation,
        opt={NEEDS: EXPORT, AUDITED: "export.create"},
        operation_id="createExport",
        summary="Queue an export",
        response_headers=[
            ResponseHeader(
                name=PAYLOAD_SHA256, description="SHA-256 (hex) of the body as it came.", documentation_only=True
            )
        ],
        responses=_errors(
            "INVALID_EXPORT_REQUEST",
            "PAYLOAD_TOO_LARGE",
            "UNSUPPORTED_MEDIA_TYPE",
            "QUEUE_UNAVAILABLE",
            "RATE_LIMITED",
            "STORAGE_FAILED",
        ),
    )
    async def create(
        self,
        request: Request[Any, Any, Any],
        intake: Intake,
        caller: Caller,
        *,
        idempotency_key: Annotated[
            str | None,
            Parameter(
                header="Idempotency-Key", schema_extra=_KEY, description="A retry with it returns the first job."
            ),
        ] = None,
        content_disposition: Annotated[
            str | None,
            Parameter(header="Content-Disposition", description="The file's name, for a graph that names no source."),
        ] = None,
        content_digest: Annotated[
            str | None,
            Parameter(
                header="Content-Digest",
                description="`sha-256=:<base64>:` of the body as it is sent (RFC 9530); other bytes are refused.",
            ),
        ] = None,
        collection: Annotated[
            str | None, Parameter(schema_extra=_COLLECTION, description="In place of the body's `options.collection`.")
        ] = None,
    ) -> Response[JobCreated]:
        """The answer comes when the graph has been read and is safe on disk."""
        if collection is not None:
            check_collection(collection)
        job, new = await intake.accept(request.headers, request.stream(), caller, collection)
        return _accepted(job, new=new, quotas=await intake.quota_headers(caller))

    @get(
        opt={NEEDS: FOLLOW},
        operation_id="listExports",
        summary="List exports, newest first",
        responses=_errors("INVALID_EXPORT_REQUEST"),
    )
    async def list_jobs(
        self,
        exports: ExportService,
        caller: Caller,
        status: Status | None = None,
        cursor: str | None = None,
        limit: Annotated[int, Parameter(description="1 to 200")] = 50,
    ) -> JobPage:
        """``nextCursor`` begins the next page; null at the end."""
        return await exports.list(caller, status, cursor, limit)

    @get(
        "/{job_id:str}",
        opt={NEEDS: FOLLOW},
        operation_id="getExport",
        summary="One export",
        responses=_errors("JOB_NOT_FOUND"),
    )
    async def read(self, exports: ExportService, caller: Caller, job_id: str) -> Job:
        """Status, progress, and the artifact once it is there."""
        return await exports.job(caller, job_id)

    @delete(
        "/{job_id:str}",
        status_code=200,
        opt={NEEDS: EXPORT, AUDITED: "export.cancel"},
        operation_id="cancelExport",
        summary="Cancel an export",
        responses=_errors("JOB_NOT_FOUND"),
    )
    async def cancel(self, exports: ExportService, caller: Caller, job_id: str) -> Job:
        """A queued or running export is canceled; one that has ended answers as it is."""
        return await exports.cancel(caller, job_id)

    @post(
        "/{job_id:str}/retry",
        status_code=202,
        opt={NEEDS: EXPORT, AUDITED: "export.retry"},
        operation_id="retryExport",
        summary="Start a failed export again",
        responses=_errors(
            "JOB_NOT_FOUND", "JOB_NOT_FAILED", "PAYLOAD_GONE", "QUEUE_UNAVAILABLE", "RATE_LIMITED", "STORAGE_FAILED"
        ),
    )
    async def retry(self, exports: ExportService, intake: Intake, caller: Caller, job_id: str) -> Response[JobCreated]:
        """A new export of the same payload, whose `metadata.retryOf` names the failed one; asked again, the same."""
        job, new = await intake.retry(await exports.record(caller, job_id), caller)
        return _accepted(job, new=new, quotas=await intake.quota_headers(caller))

    @get(
        "/{job_id:str}/events",
        opt={NEEDS: FOLLOW},
        operation_id="listEvents",
        summary="Events of an export",
        responses=_errors("JOB_NOT_FOUND", "INVALID_EXPORT_REQUEST"),
    )
    async def events(
        self,
        exports: ExportService,
        caller: Caller,
        job_id: str,
        since_seq: Annotated[
            str, Parameter(query="sinceSeq", schema_extra=_SEQ, description="Events after this number")
        ] = "",
        limit: Annotated[int, Parameter(description="1 to 2000; a number outside counts as the nearest")] = 200,
    ) -> EventPage:
        """``nextSeq`` is the number of the first event that is not in this page."""
        return await exports.events(caller, job_id, _since(since_seq), limit)

    @get(
        "/{job_id:str}/events/stream",
        opt={NEEDS: FOLLOW},
        operation_id="streamEvents",
        summary="Events of an export as they come",
        responses={
            200: ResponseSpec(
                data_container=_SentEvent,
                media_type="text/event-stream",
                description="Server-sent events like this; the stream ends after the terminal one",
                generate_examples=False,
            ),
            **_errors("JOB_NOT_FOUND", "INVALID_EXPORT_REQUEST", "RATE_LIMITED"),
        },
    )
    async def stream(
        self,
        exports: ExportService,
        caller: Caller,
        job_id: str,
        since_seq: Annotated[
            str, Parameter(query="sinceSeq", schema_extra=_SEQ, description="Events after this number")
        ] = "",
        last_event_id: Annotated[
            str, Parameter(header="Last-Event-ID", description="A number counts instead of `sinceSeq`")
        ] = "",
    ) -> ASGIApp:
        """``Last-Event-ID`` goes before ``sinceSeq``; one that is no number counts as absent."""
        since, seen = _since(since_seq), _number(last_event_id)
        return await exports.stream(caller, job_id, since if seen is None else seen)

    @route(
        "/{job_id:str}/download",
        http_method=[HttpMethod.GET, HttpMethod.HEAD],
        opt={NEEDS: READ, AUDITED: "export.download"},
        operation_id=lambda _route, method, _path: f"{method.lower()}Capsule",
        summary="The capsule",
        responses=_file("application/octet-stream"),
    )
    async def download(
        self,
        request: Request[Any, Any, Any],
        exports: ExportService,
        caller: Caller,
        job_id: str,
        part: Annotated[int, Parameter(schema_extra=_PART, description="Which file of a capsule in several parts")] = 1,
    ) -> ASGIApp:
        """Ranges, validators and digests are given."""
        return await exports.download(caller, job_id, part, request.headers)

    @route(
        "/{job_id:str}/sidecar",
        http_method=[HttpMethod.GET, HttpMethod.HEAD],
        opt={NEEDS: READ, AUDITED: "export.sidecar"},
        operation_id=lambda _route, method, _path: f"{method.lower()}Sidecar",
        summary="The capsule's SQLite index",
        responses=_file("application/vnd.sqlite3"),
    )
    async def sidecar(
        self, request: Request[Any, Any, Any], exports: ExportService, caller: Caller, job_id: str
    ) -> ASGIApp:
        """Ranges, validators and digests are given."""
        return await exports.sidecar(caller, job_id, request.headers)

    @route(
        "/{job_id:str}/manifest",
        http_method=[HttpMethod.GET, HttpMethod.HEAD],
        opt={NEEDS: READ, AUDITED: "export.manifest"},
        operation_id=lambda _route, method, _path: f"{method.lower()}Manifest",
        summary="The capsule's manifest",
        responses=_file("application/json", Manifest),
    )
    async def manifest(
        self, request: Request[Any, Any, Any], exports: ExportService, caller: Caller, job_id: str
    ) -> ASGIApp:
        """Hashes, counts and versions of all files."""
        return await exports.manifest(caller, job_id, request.headers)

    @get(
        "/{job_id:str}/search",
        opt={NEEDS: READ, AUDITED: "export.search"},
        operation_id="searchExport",
        summary="Search the capsule of an export, or those of several",
        responses=_errors(
            "INVALID_EXPORT_REQUEST",
            "JOB_NOT_FOUND",
            "ARTIFACT_NOT_READY",
            "JOB_EXPIRED",
            "ARTIFACT_MISSING",
            "INDEX_BUILD_IN_PROGRESS",
            "SEMANTIC_UNAVAILABLE",
            "STORAGE_FAILED",
            "TIMEOUT",
        ),
    )
    async def search(
        self,
        search: ExportSearch,
        caller: Caller,
        job_id: str,
        *,
        q: Annotated[str, Parameter(description=f"Words, or a name; at most {MAX_QUERY_CHARS:,} characters")],
        mode: Annotated[str, Parameter(schema_extra=_MODE, description="By words, by meaning, or both")] = "hybrid",
        limit: Annotated[int, Parameter(schema_extra=_LIMIT, description=f"1 to {MAX_HITS}")] = 20,
        label: Annotated[list[str] | None, Parameter(description="Only nodes with one of these labels")] = None,
        file: Annotated[str | None, Parameter(description="Only nodes whose path begins so")] = None,
        community: Annotated[str | None, Parameter(description="Only members of the community of this id")] = None,
        type_: Annotated[
            list[str] | None,
            Parameter(query="type", description="Only nodes with a relationship of one of these types"),
        ] = None,
        also: Annotated[
            list[str] | None,
            Parameter(description=f"Exports searched together with this one, {MAX_CAPSULES - 1} at most"),
        ] = None,
    ) -> SearchAnswer:
        """Best first. `warnings` says where `hybrid` had to do without vectors that are there."""
        question = Question(q, mode, limit, label or (), file, community, type_ or (), also or ())
        return await search.search(caller, job_id, question)

    @get(
        "/{job_id:str}/report",
        opt={NEEDS: FOLLOW},
        operation_id="getReport",
        summary="Report",
        responses=_errors("JOB_NOT_FOUND"),
    )
    async def report(self, exports: ExportService, caller: Caller, job_id: str) -> Report:
        """Timings, counts and sizes of a finished export; of any other what is known."""
        return await exports.report(caller, job_id)
