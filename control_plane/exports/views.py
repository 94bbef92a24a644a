"""Jobs as clients see them."""

from __future__ import annotations

from typing import Any

import msgspec

from common.contract import Artifact, InputReport, Job, JobCollection, JobCreated, JobMetadata, Report, Timings
from control_plane.jobs.records import TERMINAL, JobRecord, iso
from control_plane.jobs.store import now_ms
from handler.logs import trace_id_of


def created_view(job: JobRecord) -> JobCreated:
    """The 202 answer."""
    return JobCreated(
        job_id=job.id,
        status=job.status,
        progress=job.progress,
        current_stage=job.stage,
        stage_progress=job.stage_progress,
        message=job.message,
        created_at=iso(job.created_at),
    )


def job_view(job: JobRecord, retried_by: str | None = None) -> Job:
    """The whole job; ``retried_by`` is the one that does it again."""
    output = job.output
    return Job(
        job_id=job.id,
        status=job.status,
        progress=job.progress,
        current_stage=job.stage,
        stage_progress=job.stage_progress,
        elapsed_ms=max(0, (job.finished_at or now_ms()) - job.created_at),
        last_event_seq=job.last_seq,
        message=f"The files of this export are damaged: {job.damage}" if _is_damaged(job) else job.message,
        created_at=iso(job.created_at),
        updated_at=iso(job.updated_at),
        artifact=_artifact(job),
        error=job.error,
        metadata=JobMetadata(
            project_name=job.project_name,
            client=job.client,
            backend=job.backend,
            trace_id=trace_id_of(job.trace),
            attempts=job.attempt,
            retry_of=job.retry_of,
            retried_by=retried_by,
            retry_until=iso(job.expires_at) if job.status == "failed" and job.expires_at is not None else None,
            payload_sha256=job.payload_sha256,
            runpod_job_id=job.runpod_id,
            payload_ref=job.payload_ref if job.status not in TERMINAL else None,
            artifact_ref=output.artifact_ref if output else None,
            worker_metrics=output.metrics if output else None,
        ),
        collection=_collection(job),
    )


def _collection(job: JobRecord) -> JobCollection | msgspec.UnsetType:
    if job.collection is None:
        return msgspec.UNSET
    return JobCollection(
        name=job.collection,
        status=job.import_state or "pending",
        documents=job.import_documents or 0,
        error=job.import_error,
    )


def _is_damaged(job: JobRecord) -> bool:
    return job.status == "completed" and job.damage is not None


def _artifact(job: JobRecord) -> Artifact | None:
    if job.status != "completed" or job.output is None or job.manifest is None or job.expires_at is None:
        return None
    if _is_damaged(job):
        return None
    url = f"/v1/exports/{job.id}"
    first = job.manifest.parts[0]
    return Artifact(
        file_name=first.file_name,
        download_url=f"{url}/download",
        expires_at=iso(job.expires_at),
        size_bytes=job.output.size_bytes,
        sha256=job.output.sha256,
        sidecar_url=f"{url}/sidecar",
        sidecar_sha256=job.manifest.sidecar_sha256,
        manifest_url=f"{url}/manifest",
        parts=len(job.manifest.parts),
    )


def report_view(job: JobRecord, counted: dict[str, Any]) -> Report:
    """The report of a finished job; for any other what is known, with the ``nodes``, ``relationships`` and ``files``
    that were ``counted`` when it came. Raises msgspec.ValidationError where the worker's report is none."""
    if job.output is not None:
        report = msgspec.convert(job.output.metrics, Report)
        report.status = job.status
        return report
    until = job.finished_at or now_ms()
    started = job.started_at or until
    timings = Timings(queue=(started - job.created_at) / 1000, total=(until - started) / 1000)
    received = InputReport(
        nodes=counted.get("nodes", 0),
        relationships=counted.get("relationships", 0),
        files=counted.get("files", 0),
        bytes=job.payload_size,
        sha256=job.payload_sha256,
    )
    return Report(
        job_id=job.id, status=job.status, backend=job.backend, attempts=job.attempt, input=received, timings=timings
    )
