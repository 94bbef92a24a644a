"""One job of a worker: payload from storage, the export, artifacts to storage."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import msgspec

from common.capsule.gate import Gate
from common.contract import (
    EXPORT_SCHEMA,
    MALFORMED,
    ExportOptions,
    JobInput,
    JobOutput,
    Manifest,
    Progress,
    Report,
    Source,
    WriterName,
)
from common.embedding.choice import Choice
from common.embedding.port import Embedder
from common.errors import (
    AccessDenied,
    CapsuleUnreadable,
    GateFailed,
    InvalidRef,
    InvalidRequest,
    ObjectMissing,
    StorageFailed,
)
from common.graph.model import ExportRequest, GraphLimits
from common.graph.read import OPTION_RANGES, read_graph
from common.pipeline import export
from common.storage import Storage

MANIFEST_ENDING = ".manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
MAX_ATTEMPT = 1_000_000


_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TRACE = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
_OPTIONS = {field.encode_name for field in msgspec.structs.fields(ExportOptions)}


def decode_input(data: Any) -> JobInput:
    """A job's input from JSON. Raises InvalidRequest that names the field where this worker does not understand it."""
    try:
        job = msgspec.convert(data, JobInput)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        missing = re.search(r"missing required field `(\w+)`", what)
        inside = path.rstrip("`").lstrip(".")
        field = ".".join(filter(None, (inside, missing[1] if missing else ""))) or "input"
        raise InvalidRequest(f"{field}: {what[:1].lower()}{what[1:]}", field=field) from error
    for field in job.__struct_fields__:
        try:
            msgspec.json.encode(getattr(job, field))
        except (UnicodeEncodeError, OverflowError, RecursionError) as error:
            message = f"{field} must be JSON of whole characters, numbers of at most 64 bits and few levels"
            raise InvalidRequest(message, field=field) from error
    check_input(job)
    return job


def check_input(job: JobInput) -> None:
    """Raise InvalidRequest for an input that this worker does not understand."""
    if job.schema_version != EXPORT_SCHEMA:
        raise InvalidRequest(
            f"schema_version {job.schema_version[:100]!r} is not known here",
            field="schema_version",
            allowed=EXPORT_SCHEMA,
        )
    for field, right, shape in (
        ("job_id", _JOB_ID.fullmatch(job.job_id), "letters, digits, dots, - and _, at most 128"),
        ("attempt", 1 <= job.attempt <= MAX_ATTEMPT, f"a number from 1 to {MAX_ATTEMPT:,}"),
        ("output_prefix", job.output_prefix.endswith("/"), "a ref that ends in /"),
        ("payload_size", (job.payload_size or 0) >= 0, "a number of bytes"),
        ("payload_sha256", job.payload_sha256 is None or _SHA256.fullmatch(job.payload_sha256), "64 hex digits"),
        (
            "timeout_seconds",
            job.timeout_seconds is None or 0 < job.timeout_seconds < math.inf,
            "a number of seconds above 0",
        ),
        ("trace", job.trace is None or _TRACE.fullmatch(job.trace), "a W3C traceparent"),
        ("created_at", job.created_at is None or _is_time(job.created_at), "a time in ISO 8601"),
    ):
        if not right:
            raise InvalidRequest(f"{field} must be {shape}", field=field)
    with_options(ExportOptions(), job.options)


def with_options(options: ExportOptions, changes: dict[str, Any]) -> ExportOptions:
    """Options with those of a job in place of the payload's. Raises InvalidRequest that names ``options.<name>``."""
    for name, value in changes.items():
        field = f"options.{name[:100]}"
        if name not in _OPTIONS:
            raise InvalidRequest(f"{field} is not an option", field=field, allowed=", ".join(sorted(_OPTIONS)))
        try:
            options = msgspec.convert({**msgspec.to_builtins(options), name: value}, ExportOptions)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"{field}: {str(error).partition(' - at ')[0].lower()}", field=field) from error
        low, high = OPTION_RANGES.get(name, (0, 0))
        if name in OPTION_RANGES and not low <= value <= high:
            raise InvalidRequest(f"{field} must be a whole number from {low:,} to {high:,}", field=field)
    return options


def read_payload(
    ref: str,
    *,
    storage: Storage,
    scratch: Path,
    limits: GraphLimits,
    size: int | None = None,
    sha256: str | None = None,
    source: Source | None = None,
) -> ExportRequest:
    """Read a staged graph; size (bytes) and SHA-256 (hex) are checked while it is fetched. ``source`` is where it comes
    from if it does not say so itself.

    Raises InvalidRequest, PayloadTooLarge, PayloadMismatch, and what the storage raises.
    """
    try:
        path = storage.local(ref, scratch, size=size, sha256=sha256, limit=limits.max_payload_bytes)
    except (InvalidRef, ObjectMissing, AccessDenied) as error:
        error.details["field"] = "payload_ref"
        raise
    return read_graph(path, limits=limits, defaults=source)


def run_job(
    job: JobInput,
    *,
    storage: Storage,
    scratch: Path,
    limits: GraphLimits,
    writer: WriterName | None,
    choose: Callable[[JobInput], Choice],
    embedder: Callable[[Choice], Embedder],
    gate: Gate,
    emit: Callable[[Progress], None],
    should_stop: Callable[[], None],
    generated_at: str,
    before_publish: Callable[[], None] = lambda: None,
    request: ExportRequest | None = None,
    read_seconds: float = 0.0,
) -> JobOutput:
    """Export the payload of a job and publish capsule, sidecar and manifest, in this order, under ``output_prefix``.

    ``request`` is the payload where it was read before, in ``read_seconds``. ``scratch`` is a folder of this job's
    own; it is removed. ``choose`` says what is embedded; ``embedder`` opens the engine for it, only if the request
    wants vectors. ``before_publish`` is called right before the manifest is put: what it raises leaves the attempt
    unpublished. Raises any ExportError.
    """
    check_input(job)
    choice = choose(job)
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        if request is None:
            started = time.perf_counter()
            request = read_payload(
                job.payload_ref,
                storage=storage,
                scratch=scratch,
                limits=limits,
                size=job.payload_size,
                sha256=job.payload_sha256,
                source=job.source,
            )
            read_seconds = time.perf_counter() - started
        request.options = with_options(request.options, job.options)
        result = export(
            request,
            out_dir=scratch,
            writer=writer,
            embedder=embedder(choice) if request.options.semantic_enabled else None,
            choice=choice,
            gate=gate,
            on_progress=emit,
            should_stop=should_stop,
            generated_at=generated_at,
        )
        should_stop()
        started = time.perf_counter()
        manifest, report = result.manifest, result.report
        hashes = {name: sha256 for name, _, sha256 in files_of(manifest)}
        for path in (*result.capsule_paths, result.sidecar_path):
            _put(path, job.output_prefix, storage, hashes[path.name])
        before_publish()
        _put(result.manifest_path, job.output_prefix, storage, None)
        report.capsule.path = report.sidecar.path = None
        report.job_id, report.attempts = job.job_id, job.attempt
        report.timings.read = round(read_seconds, 4)
        report.timings.upload = round(time.perf_counter() - started, 4)
        report.timings.total = round(report.timings.total + report.timings.read + report.timings.upload, 4)
        return _output(job.output_prefix, result.manifest_path.name, manifest, report)
    except OSError as error:
        raise StorageFailed(f"the worker's disk failed: {error.strerror or error}", errno=error.errno) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class Published(NamedTuple):
    """What an attempt left."""

    output: JobOutput
    manifest: Manifest


def published(storage: Storage, prefix: str, job_id: str) -> Published | None:
    """What an attempt published under a prefix: None unless a manifest lies there with all that it names."""
    sizes = {unquote(found.ref.rpartition("/")[2]): found.size for found in storage.found(prefix)}
    manifests = [name for name in sizes if name.endswith(MANIFEST_ENDING)]
    if len(manifests) != 1:
        return None
    manifest = read_manifest(storage, ref_of(prefix, manifests[0]))
    if any(sizes.get(name) != size for name, size, _ in files_of(manifest)):
        return None
    report = msgspec.structs.replace(manifest.report, job_id=job_id)
    return Published(_output(prefix, manifests[0], manifest, report), manifest)


def files_of(manifest: Manifest) -> list[tuple[str, int, str]]:
    """(name, size in bytes, SHA-256) of each file that a manifest names."""
    return [
        *((part.file_name, part.size_bytes, part.sha256) for part in manifest.parts),
        (manifest.sidecar_file_name, manifest.sidecar_size_bytes, manifest.sidecar_sha256),
    ]


def check_bytes(storage: Storage, prefix: str, manifest: Manifest, payload_sha256: str) -> None:
    """Read all that an attempt published. Raises GateFailed where it is not what its manifest says, or was made of
    another payload."""
    if manifest.report.input.sha256 != payload_sha256:
        raise GateFailed("the worker exported another payload", probe="payload_sha256")
    for name, size, sha256 in files_of(manifest):
        if sha256_at(storage, ref_of(prefix, name), size) != sha256:
            raise GateFailed(f"{name} in storage is not what its manifest says (SHA-256)", probe="sha256")


def sha256_at(storage: Storage, ref: str, size: int) -> str:
    """SHA-256 of the first ``size`` bytes that lie at a ref, lower-case hex."""
    digest = hashlib.sha256()
    for piece in storage.read(ref, 0, size):
        digest.update(piece)
    return digest.hexdigest()


def read_manifest(storage: Storage, ref: str) -> Manifest:
    """The manifest at a ref. Raises StorageFailed if it is not there, CapsuleUnreadable if it is damaged."""
    size = storage.size(ref)
    if size is None or size > MAX_MANIFEST_BYTES:
        raise StorageFailed("there is no manifest at its ref")
    try:
        return msgspec.json.decode(b"".join(storage.read(ref, 0, size)), type=Manifest)
    except MALFORMED as error:
        raise CapsuleUnreadable(f"the manifest is damaged: {error}") from error


def same_manifest(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests say the same; records of earlier versions have the job's id in it."""
    mine, its = (msgspec.structs.replace(each.report, job_id=None) for each in (one, other))
    return msgspec.structs.replace(one, report=mine) == msgspec.structs.replace(other, report=its)


def ref_of(prefix: str, name: str) -> str:
    """The ref of a file under a prefix."""
    return prefix + quote(name)


def _put(path: Path, prefix: str, storage: Storage, sha256: str | None) -> None:
    try:
        storage.put(path, ref_of(prefix, path.name), sha256=sha256)
    except (InvalidRef, AccessDenied) as error:
        error.details["field"] = "output_prefix"
        raise


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _output(prefix: str, manifest_name: str, manifest: Manifest, report: Report) -> JobOutput:
    return JobOutput(
        artifact_ref=ref_of(prefix, manifest.parts[0].file_name),
        sidecar_ref=ref_of(prefix, manifest.sidecar_file_name),
        manifest_ref=ref_of(prefix, manifest_name),
        sha256=manifest.capsule_sha256,
        size_bytes=sum(part.size_bytes for part in manifest.parts),
        metrics=msgspec.to_builtins(report),
    )
