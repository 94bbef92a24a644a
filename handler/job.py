"""One job of a worker: payload from storage, the export, artifacts to storage."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec

from common.capsule.gate import Gate
from common.contract import EXPORT_SCHEMA, JobInput, JobOutput, Manifest, Progress, Report, WriterName
from common.embedding.port import Embedder
from common.errors import CapsuleUnreadable, InvalidRequest, StorageFailed
from common.graph.model import ExportRequest, GraphLimits
from common.graph.read import read_graph
from common.pipeline import export
from common.storage import Storage

MANIFEST_ENDING = ".manifest.json"
MAX_MANIFEST_BYTES = 64 << 20


def check_input(job: JobInput) -> None:
    """Raise InvalidRequest for an input that this worker does not understand."""
    if job.schema_version != EXPORT_SCHEMA:
        raise InvalidRequest(
            f"schema_version {job.schema_version!r} is not known here", field="schema_version", allowed=EXPORT_SCHEMA
        )
    if not job.output_prefix.endswith("/"):
        raise InvalidRequest("output_prefix must end in /", field="output_prefix")
    if job.embedding_mode not in (None, "local_cpu"):
        raise InvalidRequest(
            f"embedding_mode {job.embedding_mode!r} is not known here", field="embedding_mode", allowed="local_cpu"
        )


def read_payload(
    ref: str,
    *,
    storage: Storage,
    scratch: Path,
    limits: GraphLimits,
    size: int | None = None,
    sha256: str | None = None,
) -> ExportRequest:
    """Read a staged graph. Raises InvalidRequest, PayloadTooLarge, and StorageFailed if it is not as announced."""
    request = read_graph(storage.local(ref, scratch, size=size), limits=limits)
    if sha256 is not None and request.input.sha256 != sha256.lower():
        raise StorageFailed("the payload is not what was announced (SHA-256)", field="payload_sha256")
    return request


def run_job(
    job: JobInput,
    *,
    storage: Storage,
    scratch: Path,
    limits: GraphLimits,
    writer: WriterName | None,
    embedder: Callable[[], Embedder],
    gate: Gate,
    emit: Callable[[Progress], None],
    should_stop: Callable[[], None],
    generated_at: str,
    request: ExportRequest | None = None,
    read_seconds: float = 0.0,
) -> JobOutput:
    """Export the payload of a job and publish capsule, sidecar and manifest, in this order, under ``output_prefix``.

    ``request`` is the payload where it was read before, in ``read_seconds``. ``scratch`` is a folder of this job's
    own; it is removed. ``embedder`` is asked for only if the request wants vectors. Raises any ExportError.
    """
    check_input(job)
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
            )
            read_seconds = time.perf_counter() - started
        result = export(
            request,
            out_dir=scratch,
            writer=writer,
            embedder=embedder() if request.options.semantic_enabled else None,
            gate=gate,
            on_progress=emit,
            should_stop=should_stop,
            generated_at=generated_at,
        )
        should_stop()
        started = time.perf_counter()
        manifest, report = result.manifest, result.report
        hashes = {part.file_name: part.sha256 for part in manifest.parts}
        hashes[manifest.sidecar_file_name] = manifest.sidecar_sha256
        for path in (*result.capsule_paths, result.sidecar_path, result.manifest_path):
            storage.put(path, ref_of(job.output_prefix, path.name), sha256=hashes.get(path.name))
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


def published(storage: Storage, prefix: str, job_id: str) -> JobOutput | None:
    """What an attempt published under a prefix: None unless a manifest lies there with all that it names."""
    found = [at.ref for at in storage.found(prefix) if at.ref.endswith(MANIFEST_ENDING)]
    if len(found) != 1:
        return None
    manifest = read_manifest(storage, found[0])
    sizes = {part.file_name: part.size_bytes for part in manifest.parts}
    sizes[manifest.sidecar_file_name] = manifest.sidecar_size_bytes
    if any(storage.size(ref_of(prefix, name)) != size for name, size in sizes.items()):
        return None
    manifest.report.job_id = job_id
    return _output(prefix, unquote(found[0].rsplit("/", 1)[1]), manifest, manifest.report)


def read_manifest(storage: Storage, ref: str) -> Manifest:
    """The manifest at a ref. Raises StorageFailed if it is not there, CapsuleUnreadable if it is damaged."""
    size = storage.size(ref)
    if size is None or size > MAX_MANIFEST_BYTES:
        raise StorageFailed("there is no manifest at its ref")
    try:
        return msgspec.json.decode(b"".join(storage.read(ref, 0, size)), type=Manifest)
    except msgspec.MsgspecError as error:
        raise CapsuleUnreadable(f"the manifest is damaged: {error}") from error


def ref_of(prefix: str, name: str) -> str:
    """The ref of a file under a prefix."""
    return prefix + quote(name)


def _output(prefix: str, manifest_name: str, manifest: Manifest, report: Report) -> JobOutput:
    return JobOutput(
        artifact_ref=ref_of(prefix, manifest.parts[0].file_name),
        sidecar_ref=ref_of(prefix, manifest.sidecar_file_name),
        manifest_ref=ref_of(prefix, manifest_name),
        sha256=manifest.capsule_sha256,
        size_bytes=sum(part.size_bytes for part in manifest.parts),
        metrics=msgspec.to_builtins(report),
    )
