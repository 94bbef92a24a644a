"""What a worker's child process and its parent say to each other: one JSON object a line, commands down, events up."""

from __future__ import annotations

from typing import Any

import msgspec

from common.contract import JobError, JobInput, JobOutput, Progress, Source, WriterName
from common.embedding.choice import Choice, Engines
from common.embedding.routing import CATALOG
from common.errors import ExportError
from common.graph.model import GraphLimits
from common.storage import StorageConfig


class ChildConfig(msgspec.Struct, kw_only=True, frozen=True):
    """What a child is started with; paths are absolute."""

    parent_pid: int
    storage: StorageConfig
    scratch: str
    writer: WriterName | None
    memory_limit: int
    """Bytes of private memory; more raises OutOfMemory."""
    stage_seconds: float | None = None
    """That a job may stay in one stage; longer raises DeadlineExceeded. None: no limit but the job's."""
    limits: GraphLimits
    choice: Choice = Choice()
    """What jobs embed that do not say so themselves."""
    models: frozenset[str] = CATALOG
    """That jobs may ask for."""
    engines: Engines = Engines()
    """With keys: so the config goes to the child through a pipe, never as an argument."""
    preload: bool = False
    """Load the engine of ``choice`` before the first command, unless it is a provider's."""


class Check(msgspec.Struct, tag="check", kw_only=True):
    """Read a staged payload and say what is in it; what was read is kept for the job of that id."""

    job_id: str
    payload_ref: str
    source: Source | None = None
    """Stands in for what the payload does not say."""
    trace: str | None = None
    """W3C ``traceparent`` of the request."""


class Run(msgspec.Struct, tag="run", kw_only=True):
    """Run a job."""

    job: JobInput
    generated_at: str
    """ISO 8601 in UTC; the same for every attempt, so that every attempt gives the same bytes."""
    run: str | None = None
    """Who must hold the claim on the output prefix when the manifest is put there; None: it is not claimed."""


Command = Check | Run


class Ready(msgspec.Struct, tag="ready"):
    """Everything is imported; commands are taken."""


class Checked(msgspec.Struct, tag="checked", kw_only=True):
    """A payload can be exported."""

    session_id: str
    project_name: str
    nodes: int
    relationships: int
    files: int
    base_name: str
    profile: str | None
    collection: str | None = None


class Reported(msgspec.Struct, tag="progress", kw_only=True):
    """A step of the running job."""

    progress: Progress


class Done(msgspec.Struct, tag="done", kw_only=True):
    """The job is published."""

    output: JobOutput


class Failed(msgspec.Struct, tag="failed", kw_only=True):
    """The command ended in an error."""

    error: JobError


Message = Ready | Checked | Reported | Done | Failed


_CLASSES = {kind.code: kind for kind in ExportError.__subclasses__()}


def job_error(error: ExportError) -> JobError:
    """An error as it is told to others."""
    details: dict[str, Any] = msgspec.to_builtins(error.details, str_keys=True)
    return JobError(code=error.code, message=error.message, retryable=error.retryable, details=details)


def export_error(error: JobError) -> ExportError:
    """The error that ``job_error`` told of."""
    return _CLASSES.get(error.code, ExportError)(error.message, **error.details)
