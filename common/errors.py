"""Every error that an export can end in, and the one table of what another attempt may do about it.

One hierarchy; each class names its code, its class of retry, and the exit code of the command line. What a class of
retry means to each stage stands in ``RULES``, and nowhere else. The control plane maps codes to HTTP
(``control_plane/errors.py``), the worker to Runpod failures.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, NamedTuple


class Retry(StrEnum):
    """What an error says about another attempt."""

    never = "never"
    """The same would end the same way."""
    transient = "transient"
    """Something outside the job failed for now."""
    lost = "lost"
    """The process or the machine that ran the job is gone, or must go."""
    timeout = "timeout"
    """It did not end in its time."""
    resource = "resource"
    """A process that has run other work may have had too little left for this; what nobody foresaw counts as such."""
    later = "later"
    """Nothing was begun: whoever asks may ask again later, and no attempt is counted."""


class Tries(NamedTuple):
    """How often something is tried, and the pauses between."""

    most: int
    """The first one counts. 0: no number of its own; of a job ``MEMVID_EXPORT_MAX_ATTEMPTS``, in a batch any."""
    first_wait: float = 0.0
    """Seconds before the second try; doubled before each further one."""
    longest_wait: float = 0.0

    def wait(self, failed: int) -> float:
        """Seconds to wait after so many failures, 1 or more."""
        # The exponent is bounded: what never ends may be tried often, and 2 ** 1024 is no float.
        return min(self.longest_wait, self.first_wait * 2.0 ** min(failed - 1, 16))


class Rule(NamedTuple):
    """What each stage does after an error of a class."""

    retryable: bool
    """Told with the error: the same may work another time."""
    fresh: bool
    """The process that met it takes no more work."""
    here: Tries
    """Attempts of a job on the server's own machine."""
    runpod: Tries
    """Attempts of a job on Runpod."""
    batch: Tries
    """Attempts of a graph in a batch."""
    client: Tries
    """Requests of the command line to a server that answers so."""


ONCE = Tries(1)
STORE = Tries(5, 0.2, 5.0)
"""One request to an object store, or that much in a row that brings less than 1 MiB."""
PROVIDER = Tries(8, 1.0, 60.0)
"""One request to an embedding provider; with the waits between, they outlast a limit that is counted by the minute."""
PROVIDER_USELESS = Tries(2, 1.0, 60.0)
"""Answers of a provider that are paid for and have no vectors: the next is seldom another."""
_JOB = Tries(0, 1.0, 60.0)
_GRAPH = Tries(2, 1.0, 1.0)
_REQUEST = Tries(6, 0.2, 30.0)

RULES: dict[Retry, Rule] = {
    Retry.never: Rule(False, False, ONCE, ONCE, ONCE, ONCE),
    Retry.transient: Rule(True, False, _JOB, _JOB, _GRAPH, _REQUEST),
    # On one machine the loss is certain and costs no GPU; on Runpod the second worker may be as lost as the first.
    Retry.lost: Rule(True, True, Tries(0), Tries(2), _GRAPH, _REQUEST),
    # On Runpod the second attempt may take twice as long; here it would take as long as the first.
    Retry.timeout: Rule(True, False, ONCE, Tries(2), _GRAPH, ONCE),
    Retry.resource: Rule(False, True, ONCE, ONCE, _GRAPH, ONCE),
    Retry.later: Rule(True, False, _JOB, _JOB, Tries(0, 1.0, 1.0), _REQUEST),
}
"""The one table."""


class ExportError(Exception):
    """Base of all errors that a caller is meant to see.

    ``message`` is for people; ``details`` is a small JSON object (``field``, ``allowed``, …) for programs.
    """

    code: ClassVar[str] = "INTERNAL"
    retry: ClassVar[Retry] = Retry.resource
    before: ClassVar[Tries | None] = None
    """How often the single request was tried before the error was raised."""
    retryable: ClassVar[bool] = False
    """Of the rule; no class says it itself."""
    exit_code: ClassVar[int] = 3

    def __init_subclass__(cls) -> None:
        if "retryable" in vars(cls):
            raise TypeError(f"{cls.__name__}: say retry = Retry.…; retryable follows from common.errors.RULES")
        cls.retryable = RULES[cls.retry].retryable

    def __init__(self, message: str, /, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class InvalidRequest(ExportError):
    """The input cannot be exported as it is; ``details['field']`` names the place where it goes wrong."""

    code = "INVALID_EXPORT_REQUEST"
    retry = Retry.never
    exit_code = 2


class PayloadTooLarge(ExportError):
    """The input passes a stated limit; ``details['limit']`` and ``details['field']`` say which."""

    code = "PAYLOAD_TOO_LARGE"
    retry = Retry.never
    exit_code = 2


class UnsupportedMediaType(ExportError):
    """The body's content type or encoding is not one that we read."""

    code = "UNSUPPORTED_MEDIA_TYPE"
    retry = Retry.never
    exit_code = 2


class InvalidSettings(ExportError):
    """A setting has a wrong value; the message names the setting and what is allowed, never the value of a secret."""

    code = "INVALID_SETTINGS"
    retry = Retry.never
    exit_code = 2


class CapacityExceeded(ExportError):
    """A capsule part would pass Memvid's capacity; the pipeline splits into more parts and writes again."""

    code = "CAPACITY_EXCEEDED"
    retry = Retry.never


class WriterFailed(ExportError):
    """A capsule writer could not write the file."""

    code = "WRITER_FAILED"
    retry = Retry.transient


class WriterUnavailable(ExportError):
    """The wished writer is not installed here."""

    code = "WRITER_UNAVAILABLE"
    retry = Retry.never


class GateFailed(ExportError):
    """A written capsule did not read back as planned; ``details['probe']`` names the failed probe."""

    code = "GATE_FAILED"
    retry = Retry.transient


class CapsuleUnreadable(ExportError):
    """A capsule, sidecar or manifest that should be read is missing, foreign or damaged."""

    code = "CAPSULE_UNREADABLE"
    retry = Retry.never
    exit_code = 2


class EmbeddingFailed(ExportError):
    """The embedding engine failed or answered something that is not a unit vector per text."""

    code = "EMBEDDING_FAILED"
    retry = Retry.transient
    before = PROVIDER


class EmbeddingRefused(ExportError):
    """Embedding would pass the ceiling of tokens or of money; ``details`` has the estimate and the ceiling."""

    code = "EMBEDDING_REFUSED"
    retry = Retry.never
    exit_code = 2


class ProviderRejected(ExportError):
    """A provider refuses for good (a key that is wrong or expired, a model it lacks), or its answers are of no use."""

    code = "PROVIDER_REJECTED"
    retry = Retry.never
    before = PROVIDER_USELESS


class DeviceFailed(ExportError):
    """A GPU is in a state that only a new process, or another machine, gets out of."""

    code = "DEVICE_FAILED"
    retry = Retry.lost


class StorageFailed(ExportError):
    """Reading or writing staged bytes failed for now (disk full, peer gone, peer overloaded)."""

    code = "STORAGE_FAILED"
    retry = Retry.transient
    before = STORE


class InvalidRef(ExportError):
    """A ref that is not read or written here: a scheme, bucket, host or address that is not allowed."""

    code = "INVALID_REF"
    retry = Retry.never
    exit_code = 2


class ObjectMissing(ExportError):
    """Nothing lies at a ref."""

    code = "OBJECT_MISSING"
    retry = Retry.never


class AccessDenied(ExportError):
    """The store refuses: credentials that may not do this, or a signed link past its time."""

    code = "ACCESS_DENIED"
    retry = Retry.never


class PayloadMismatch(ExportError):
    """The bytes at a ref are not those that were announced (size or SHA-256); ``details['field']`` says which."""

    code = "PAYLOAD_MISMATCH"
    retry = Retry.never


class OutOfMemory(ExportError):
    """The worker passed its memory limit."""

    code = "OUT_OF_MEMORY"
    retry = Retry.resource


class DeadlineExceeded(ExportError):
    """The job ran past its time limit."""

    code = "DEADLINE_EXCEEDED"
    retry = Retry.timeout


class WorkerLost(ExportError):
    """The process that ran the job ended without an answer."""

    code = "WORKER_LOST"
    retry = Retry.lost


class CanaryFailed(ExportError):
    """A canary export did not come through; the message says where it ended."""

    code = "CANARY_FAILED"
    retry = Retry.never


class Canceled(ExportError):
    """The job was canceled; a terminal outcome of its own, not a failure."""

    code = "CANCELED"
    retry = Retry.never
    exit_code = 130
