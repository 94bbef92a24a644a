"""Every error that an export can end in.

One hierarchy; each class names its code, whether a retry can help, and the exit code of the command line.
The control plane maps codes to HTTP (``control_plane/errors.py``), the worker to Runpod failures.
"""

from __future__ import annotations

from typing import ClassVar


class ExportError(Exception):
    """Base of all errors that a caller is meant to see.

    ``message`` is for people; ``details`` is a small JSON object (``field``, ``allowed``, …) for programs.
    """

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class InvalidRequest(ExportError):
    """The input cannot be exported as it is; ``details['field']`` names the place where it goes wrong."""

    code = "INVALID_EXPORT_REQUEST"
    exit_code = 2


class PayloadTooLarge(ExportError):
    """The input passes a stated limit; ``details['limit']`` and ``details['field']`` say which."""

    code = "PAYLOAD_TOO_LARGE"
    exit_code = 2


class UnsupportedMediaType(ExportError):
    """The body's content type or encoding is not one that we read."""

    code = "UNSUPPORTED_MEDIA_TYPE"
    exit_code = 2


class InvalidSettings(ExportError):
    """A setting has a wrong value; the message names the setting and what is allowed, never the value of a secret."""

    code = "INVALID_SETTINGS"
    exit_code = 2


class CapacityExceeded(ExportError):
    """A capsule part would pass Memvid's capacity; the pipeline splits into more parts and writes again."""

    code = "CAPACITY_EXCEEDED"


class WriterFailed(ExportError):
    """A capsule writer could not write the file."""

    code = "WRITER_FAILED"
    retryable = True


class WriterUnavailable(ExportError):
    """The wished writer is not installed here."""

    code = "WRITER_UNAVAILABLE"


class GateFailed(ExportError):
    """A written capsule did not read back as planned; ``details['probe']`` names the failed probe."""

    code = "GATE_FAILED"
    retryable = True


class CapsuleUnreadable(ExportError):
    """A capsule, sidecar or manifest that should be read is missing, foreign or damaged."""

    code = "CAPSULE_UNREADABLE"
    exit_code = 2


class EmbeddingFailed(ExportError):
    """The embedding engine failed or answered something that is not a unit vector per text."""

    code = "EMBEDDING_FAILED"
    retryable = True


class EmbeddingRefused(ExportError):
    """Embedding would pass the ceiling of tokens or of money; ``details`` has the estimate and the ceiling."""

    code = "EMBEDDING_REFUSED"
    exit_code = 2


class ProviderRejected(ExportError):
    """A provider refuses for good (a key that is wrong or expired, a model it lacks), or its answers are of no use."""

    code = "PROVIDER_REJECTED"


class DeviceFailed(ExportError):
    """A GPU is in a state that only a new process, or another machine, gets out of."""

    code = "DEVICE_FAILED"
    retryable = True


class StorageFailed(ExportError):
    """Reading or writing staged bytes failed for now (disk full, peer gone, peer overloaded)."""

    code = "STORAGE_FAILED"
    retryable = True


class InvalidRef(ExportError):
    """A ref that is not read or written here: a scheme, bucket, host or address that is not allowed."""

    code = "INVALID_REF"
    exit_code = 2


class ObjectMissing(ExportError):
    """Nothing lies at a ref."""

    code = "OBJECT_MISSING"


class AccessDenied(ExportError):
    """The store refuses: credentials that may not do this, or a signed link past its time."""

    code = "ACCESS_DENIED"


class PayloadMismatch(ExportError):
    """The bytes at a ref are not those that were announced (size or SHA-256); ``details['field']`` says which."""

    code = "PAYLOAD_MISMATCH"


class OutOfMemory(ExportError):
    """The worker passed its memory limit."""

    code = "OUT_OF_MEMORY"


class DeadlineExceeded(ExportError):
    """The job ran past its time limit."""

    code = "DEADLINE_EXCEEDED"
    retryable = True


class WorkerLost(ExportError):
    """The process that ran the job ended without an answer."""

    code = "WORKER_LOST"
    retryable = True


class Canceled(ExportError):
    """The job was canceled; a terminal outcome of its own, not a failure."""

    code = "CANCELED"
    exit_code = 130
