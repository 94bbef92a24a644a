"""Search over the capsules of completed exports, for HTTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, cast, get_args

from common.contract import SearchAnswer, SearchHit
from common.errors import CapsuleUnreadable, InvalidRequest
from common.sidecar.open import Scope
from control_plane.errors import ArtifactMissing, SemanticUnavailable
from control_plane.exports.service import ExportService
from control_plane.jobs.audit import AuditEntry
from control_plane.jobs.holds import Holds
from control_plane.jobs.records import JobRecord
from control_plane.operations.keys import Caller
from control_plane.reading.ask import AWAY, MAX_CAPSULES, Found, Names, check_scope, find, prepared
from control_plane.reading.library import Library
from control_plane.reading.questions import Questions
from control_plane.reading.search import MAX_QUERY_CHARS, Hit, Mode

MAX_HITS = 200
MAX_FILTERS = 50
"""Labels, or types, of one question."""
MAX_FILTER_CHARS = 4096
MODES: Final = get_args(Mode)


class Question(NamedTuple):
    """What a client asks, as it came."""

    query: str
    mode: str
    limit: int
    labels: Sequence[str]
    file: str | None
    community: str | None
    types: Sequence[str]
    also: Sequence[str]
    """Ids of further exports."""


class ExportSearch:
    """Answers questions over exports in a few threads of its own."""

    def __init__(
        self, exports: ExportService, library: Library, holds: Holds, *, note: Callable[[AuditEntry], None]
    ) -> None:
        """``note`` gets what belongs into the audit log."""
        self._note = note
        self._exports = exports
        self._holds = holds
        self._questions = Questions(library)

    async def search(self, caller: Caller, job_id: str, question: Question) -> SearchAnswer:
        """The nodes of exports that fit a question.

        Raises InvalidRequest; JobNotFound, ArtifactNotReady, JobExpired, ArtifactMissing; IndexBuildInProgress,
        TimedOut, SemanticUnavailable, StorageFailed.
        """
        _check(question)
        jobs: dict[str, JobRecord] = {}
        for found in dict.fromkeys([job_id, *question.also]):
            jobs[found], _ = await self._exports.finished(caller, found)
            self._note(caller.did("export.search", found))
        async with self._holds.reading(jobs.values()):
            return await self._questions.ask(self._answer, jobs, question)

    def _answer(self, jobs: dict[str, JobRecord], question: Question) -> SearchAnswer:
        try:
            found = self._find(jobs, question)
        except CapsuleUnreadable as error:
            raise ArtifactMissing(f"The files of an export cannot be read: {error.message}") from error
        except AWAY as error:
            message = f"The engine for questions gave no vector ({error.message}); lexical and hybrid need none."
            raise SemanticUnavailable(message, field="mode") from error
        return SearchAnswer(
            query=question.query,
            mode=question.mode,
            semantic_used=found.semantic_used,
            hits=[_shown(hit) for hit in found.hits],
            warnings=found.warnings,
        )

    def _find(self, jobs: dict[str, JobRecord], question: Question) -> Found:
        scope = Scope(
            labels=tuple(question.labels),
            file_prefix=question.file or None,
            community=question.community or None,
            types=tuple(question.types),
        )
        with self._questions.opened(jobs) as capsules:
            check_scope([capsule.sidecar for _, capsule in capsules], scope, Names())
            mode = cast(Mode, question.mode)
            return find(prepared(capsules, mode), question.query, mode=mode, limit=question.limit, scope=scope)


def _shown(hit: Hit) -> SearchHit:
    node = hit.node
    return SearchHit(
        job_id=hit.capsule,
        id=node.id,
        uri=node.uri,
        kind=node.kind,
        label=node.label,
        name=node.name,
        title=node.title,
        file_path=node.file_path,
        start_line=node.start_line,
        end_line=node.end_line,
        score=hit.score,
        why=hit.why,
    )


def _check(question: Question) -> None:
    if question.mode not in MODES:
        raise InvalidRequest(f"mode must be one of {', '.join(MODES)}.", field="mode", allowed=list(MODES))
    if not 1 <= question.limit <= MAX_HITS:
        raise InvalidRequest(f"limit must be 1 to {MAX_HITS}.", field="limit", allowed=[1, MAX_HITS])
    if len(question.query) > MAX_QUERY_CHARS:
        message = f"q must have at most {MAX_QUERY_CHARS:,} characters."
        raise InvalidRequest(message, field="q", allowed=MAX_QUERY_CHARS)
    for field, most, values in (
        ("label", MAX_FILTERS, question.labels),
        ("type", MAX_FILTERS, question.types),
        ("also", MAX_CAPSULES - 1, question.also),
        ("file", 1, [question.file or ""]),
        ("community", 1, [question.community or ""]),
    ):
        if len(values) > most:
            raise InvalidRequest(f"{field} may be given at most {most} times.", field=field, allowed=most)
        if any(len(value) > MAX_FILTER_CHARS for value in values):
            message = f"{field} must have at most {MAX_FILTER_CHARS:,} characters."
            raise InvalidRequest(message, field=field, allowed=MAX_FILTER_CHARS)
