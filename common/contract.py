"""The messages that clients, the control plane and workers exchange.

JSON keys are camelCase on the wire (``docs/contract.md`` shows them); times are ISO 8601 in UTC with milliseconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

MV2_SCHEMA = "gitnexus.mv2.schema.v1"
EXPORT_SCHEMA = "gitnexus.export.schema.v1"
AI_BIBLE_VERSION = "gitnexus.ai-bible.v1"
TOOLSET_VERSION = "gitnexus.tools.v1"
MANIFEST_SCHEMA = "memvid-export.manifest.v1"

Status = Literal["queued", "running", "completed", "failed", "canceled", "expired"]
Stage = Literal[
    "queued",
    "transform",
    "frame_prep",
    "write_capsule",
    "build_sidecar",
    "finalize",
    "download_ready",
    "failed",
    "canceled",
    "expired",
]
EventType = Literal[
    "job_started",
    "stage_progress",
    "stage_heartbeat",
    "job_completed",
    "job_failed",
    "job_canceled",
    "job_expired",
]
WriterName = Literal["native", "sdk", "cli"]
ImportStatus = Literal["pending", "importing", "done", "failed"]


MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What ``msgspec`` raises for bytes that are not the message that is looked for."""

COLLECTION_NAME = r"(?!\.+$)[A-Za-z0-9._-]{1,128}"
"""The whole name of a collection."""

Percent = Annotated[int, msgspec.Meta(ge=0, le=100)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
"""What every reader of JSON holds exactly; so are sums of a few, which 64 bits of a database hold."""


class Wire(msgspec.Struct, rename="camel", kw_only=True, omit_defaults=False):
    """A message on the wire."""


# --- request ---------------------------------------------------------------


class Source(Wire, kw_only=True):
    """Where the graph came from; ``base_name`` becomes the capsule's file name after cleaning."""

    type: str = "local"
    base_name: str = "graph"
    display_name: str | None = None
    url: str | None = None
    branch: str | None = None
    original_file_name: str | None = None
    folder_name: str | None = None


class ExportOptions(Wire, kw_only=True):
    """What to make of the graph."""

    semantic_enabled: bool = False
    max_snippet_chars: int = 1400
    max_node_frames: int = 50_000
    max_relation_frames: int = 120_000
    profile: str | None = None
    collection: str | msgspec.UnsetType = msgspec.UNSET
    """A collection of the job's client that is to hold the node frames once they are there."""


# --- progress, events, jobs ---------------------------------------------------


class Progress(Wire, kw_only=True):
    """One step of a running export, as the pipeline reports it (0–100 for both figures)."""

    stage: Stage
    progress: Percent
    stage_progress: Percent
    message: str
    meta: dict[str, Any] = msgspec.field(default_factory=dict)


class Event(Wire, kw_only=True):
    """One line of a job's event log; ``seq`` starts at 1 without gaps, ``progress`` never falls."""

    seq: int
    ts: str
    job_id: str
    type: EventType
    stage: Stage
    progress: int
    stage_progress: int
    emoji: str
    message: str
    meta: dict[str, Any] = msgspec.field(default_factory=dict)


class Artifact(Wire, kw_only=True):
    """What a finished job offers for download."""

    file_name: str
    download_url: str
    expires_at: str
    size_bytes: int
    sha256: str
    sidecar_url: str
    sidecar_sha256: str
    manifest_url: str
    parts: int = 1


class JobError(Wire, kw_only=True):
    """Why a job failed."""

    code: str
    message: str
    retryable: bool
    details: dict[str, Any] = msgspec.field(default_factory=dict)


class JobMetadata(Wire, kw_only=True):
    """What a job is of, where it ran and what it moved."""

    project_name: str
    client: str
    """Whose it is: keys of this client see it."""
    backend: str
    trace_id: str | None = None
    """Of the request that made it; logs and traces have it."""
    attempts: int = 0
    """How often a worker took it."""
    retry_of: str | None = None
    """The failed job that this one does again."""
    retried_by: str | None = None
    """The job that does this failed one again."""
    retry_until: str | None = None
    """A failed job can be started again until then: so long its payload is kept."""
    payload_sha256: str
    runpod_job_id: str | None = None
    payload_ref: str | None = None
    artifact_ref: str | None = None
    worker_metrics: dict[str, Any] | None = None


class JobCollection(Wire, kw_only=True):
    """The collection that an export is to become, and how far that is."""

    name: str
    status: ImportStatus
    documents: int
    """Node frames that it has been given so far, those too that it had already."""
    error: JobError | None
    """Why it was given up, or why it has to be tried again."""


class JobCreated(Wire, kw_only=True):
    """The 202 answer of ``POST /v1/exports``."""

    job_id: str
    status: Status
    progress: int
    current_stage: Stage
    stage_progress: int
    message: str
    created_at: str


class Job(Wire, kw_only=True):
    """A job as ``GET /v1/exports/{jobId}`` answers it."""

    job_id: str
    status: Status
    progress: int
    current_stage: Stage
    stage_progress: int
    elapsed_ms: int
    last_event_seq: int
    message: str
    created_at: str
    updated_at: str
    artifact: Artifact | None
    error: JobError | None
    metadata: JobMetadata
    collection: JobCollection | msgspec.UnsetType = msgspec.UNSET
    """Only where one was asked for."""


class JobPage(Wire, kw_only=True):
    """``GET /v1/exports``."""

    jobs: list[Job]
    next_cursor: str | None


class EventPage(Wire, kw_only=True):
    """``GET /v1/exports/{jobId}/events``."""

    job_id: str
    events: list[Event]
    next_seq: int
    status_snapshot: Job


class AuditRecord(Wire, kw_only=True):
    """What somebody did."""

    at: str
    key: str | None
    """The key's name; None where no key was known."""
    client: str | None
    address: str
    action: str
    outcome: str
    """``ok``, or the code of an error."""
    count: int
    """How often: what comes again within a minute is counted."""
    job_id: str | None
    trace_id: str | None


class AuditPage(Wire, kw_only=True):
    """A page of the audit log, newest first; ``nextCursor`` is None at the end."""

    entries: list[AuditRecord]
    next_cursor: str | None


class ErrorInfo(Wire, kw_only=True):
    """Code and text of an error, with details where there are any."""

    code: str
    message: str
    details: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class ErrorBody(Wire, kw_only=True):
    """The body of every answer with a status of 400 and above."""

    error: ErrorInfo


# --- reading ----------------------------------------------------------------------


class SearchHit(Wire, kw_only=True):
    """A node that fits a question; ``score`` compares hits of one answer only, ``why`` says what matched."""

    job_id: str
    id: str
    uri: str
    kind: str
    label: str
    name: str
    title: str
    file_path: str | None
    start_line: int | None
    """Lines as the graph gives them."""
    end_line: int | None
    score: float
    why: str


class SearchAnswer(Wire, kw_only=True):
    """``GET /v1/exports/{jobId}/search``; best hits first."""

    query: str
    mode: str
    semantic_used: bool
    hits: list[SearchHit]
    warnings: list[str]


class QueueStats(Wire, kw_only=True):
    """The queue now."""

    queued: int
    running: int
    capacity: int
    oldest_seconds: float
    """That the oldest waiting job has waited; 0 where none does."""


class StatsBucket(Wire, kw_only=True):
    """What happened from ``start`` on for ``bucketSeconds``; ``frames`` are those of the completed exports."""

    start: str
    submitted: int = 0
    completed: int = 0
    failed: int = 0
    canceled: int = 0
    frames: int = 0


class FailureCount(Wire, kw_only=True):
    """How many jobs ended with an error of this code."""

    code: str
    count: int


class Stats(Wire, kw_only=True):
    """``GET /v1/stats``: the queue, and the jobs of the last hours in equal buckets, oldest first, none left out."""

    at: str
    queue: QueueStats
    bucket_seconds: int
    buckets: list[StatsBucket]
    failures: list[FailureCount]
    """Most frequent first."""


# --- worker ---------------------------------------------------------------------


class Links(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Signed URLs of one object."""

    get: str | None = None
    put: str | None = None


class JobInput(msgspec.Struct, kw_only=True):
    """The input of a worker's job; snake_case, as today's worker takes it. Refs are ``file://``, ``s3://`` or ``https://``."""

    job_id: str
    payload_ref: str
    output_prefix: str
    payload_sha256: str | None = None
    payload_size: int | None = None
    schema_version: str = EXPORT_SCHEMA
    embedding_mode: str | None = None
    embedding_provider: str | None = None
    embedding_model: str | None = None
    embedding_dimension: int | None = None
    embedding_layout: str | None = None
    embedding_what: list[str] | None = None
    """``nodes``, ``files``, ``communities``, ``processes``, ``relations``; None: all but the last."""
    embedding_max_tokens: int | None = None
    embedding_max_usd: float | None = None
    """Ceilings: a job whose estimate passes one is refused before the first call."""
    ollama_host: str | None = None
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    source: Source | None = None
    """Stands in for what the payload does not say of its origin."""
    attempt: int = 1
    created_at: str | None = None
    trace: str | None = None
    """W3C ``traceparent`` of the request that made the job; the worker's log has it."""
    timeout_seconds: float | None = None
    """The worker gives up after so long, a little before the platform would."""
    links: dict[str, Links] = msgspec.field(default_factory=dict)
    """By ref: signed URLs, for a worker without credentials of its own."""


class WorkerProgress(msgspec.Struct, kw_only=True):
    """The steps of one run so far; updates may arrive late, twice or not at all, so each carries them all.

    ``first`` is the number of the first step in ``steps`` (1 unless older ones were dropped).
    """

    first: int = 1
    steps: list[Progress]


class JobOutput(msgspec.Struct, kw_only=True):
    """The output of a worker's job; the artifacts themselves lie in storage."""

    artifact_ref: str
    sidecar_ref: str
    manifest_ref: str
    sha256: str
    size_bytes: int
    metrics: dict[str, Any]
    schema_version: str = EXPORT_SCHEMA
    progress: WorkerProgress | None = None
    """All steps, so that none is missing however fast the job was."""


# --- report -----------------------------------------------------------------------


class InputReport(Wire, kw_only=True):
    """What came in; ``bytes`` and ``sha256`` are of the payload as it was received."""

    nodes: Count = 0
    relationships: Count = 0
    files: Count = 0
    bytes: Count = 0
    sha256: str = ""


class CapsuleReport(Wire, kw_only=True):
    """What was written; ``content_digest`` depends on the graph and the options alone, not on the day or the writer."""

    path: str | None = None
    file_name: str = ""
    size_bytes: int = 0
    sha256: str = ""
    content_digest: str = ""
    frames: int = 0
    node_frames: int = 0
    relation_frames: int = 0
    vectors: int = 0
    dimension: int | None = None
    model: str | None = None
    parts: int = 1


class SidecarReport(Wire, kw_only=True):
    """The SQLite index beside the capsule."""

    path: str | None = None
    size_bytes: int = 0
    sha256: str = ""


class Timings(Wire, kw_only=True):
    """Seconds; stages overlap, so the parts may add up to more than ``total``."""

    queue: float = 0.0
    cold_start: float = 0.0
    read: float = 0.0
    transform: float = 0.0
    embed: float = 0.0
    write: float = 0.0
    sidecar: float = 0.0
    verify: float = 0.0
    upload: float = 0.0
    total: float = 0.0


class EmbeddingReport(Wire, kw_only=True):
    """What the embedding engine did; ``tokens`` and ``cost_estimate`` (US dollars) without what a cache had."""

    provider: str | None = None
    model: str | None = None
    revision: str | None = None
    precision: str | None = None
    layout: str | None = None
    texts: int = 0
    tokens: int = 0
    cache_hits: int = 0
    truncated: int = 0
    batches: int = 0
    retries: int = 0
    cost_estimate: float = 0.0


class Warning(Wire, kw_only=True):  # noqa: A001 - the report's own word; used as contract.Warning
    """One kind of repair made to the input, how often, and the first place."""

    code: str
    count: int
    example: str


class LeftOut(Wire, kw_only=True):
    """What a maximum cut off, least connected first."""

    nodes: int = 0
    relationships: int = 0


class Versions(Wire, kw_only=True):
    """Versions that made the artifact."""

    memvid_export: str = ""
    memvid_core: str = ""
    memvid_sdk: str = ""
    schema: str = MV2_SCHEMA


class Report(Wire, kw_only=True):
    """One page on one export: ``export --json``, ``GET …/report`` and the worker's metrics are this object."""

    job_id: str | None = None
    status: Status = "completed"
    backend: str = "inline"
    writer: WriterName = "native"
    profile: str | None = None
    input: InputReport = msgspec.field(default_factory=InputReport)
    capsule: CapsuleReport = msgspec.field(default_factory=CapsuleReport)
    sidecar: SidecarReport = msgspec.field(default_factory=SidecarReport)
    timings: Timings = msgspec.field(default_factory=Timings)
    embedding: EmbeddingReport = msgspec.field(default_factory=EmbeddingReport)
    attempts: int = 1
    peak_memory_bytes: int = 0
    warnings: list[Warning] = msgspec.field(default_factory=list)
    left_out: LeftOut = msgspec.field(default_factory=LeftOut)
    versions: Versions = msgspec.field(default_factory=Versions)


# --- manifest file ------------------------------------------------------------------


class ManifestPart(Wire, kw_only=True):
    """One ``.mv2`` file of a capsule."""

    file_name: str
    size_bytes: Count
    sha256: str
    frames: Count
    vectors: Count


class Manifest(Wire, kw_only=True):
    """``<capsule>.manifest.json``: written last; who finds it finds every file that it names, beside it."""

    schema_version: str = MANIFEST_SCHEMA
    generated_at: str
    session_id: str
    project_name: str
    source: Source
    options: ExportOptions
    content_digest: str
    capsule_sha256: str
    """SHA-256 of the only part, or of the parts' hex digests joined in order."""
    parts: Annotated[list[ManifestPart], msgspec.Meta(min_length=1)]
    sidecar_file_name: str
    sidecar_size_bytes: Count
    sidecar_sha256: str
    frames: Count
    node_frames: Count
    relation_frames: Count
    vectors: Count
    dimension: int | None
    embedding_provider: str | None = None
    embedding_model: str | None
    embedding_revision: str | None = None
    embedding_layout: str | None
    writer: WriterName
    readers: str
    """Which memvid versions read these files."""
    versions: Versions
    report: Report
