"""The public API of a Runpod endpoint, as far as we use it: ``POST /run``, ``GET /status``, ``POST /cancel``.

Source: docs.runpod.io/serverless/endpoints; limits per endpoint and 10 seconds: 1,000 runs, 2,000 looks, 100 cancels.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import Annotated, Any, ClassVar, Literal

import httpx
import msgspec

from common.contract import MALFORMED, JobError
from common.errors import DeadlineExceeded, ExportError, Retry, WorkerLost
from control_plane.errors import PlatformUnavailable
from control_plane.operations.metrics import Metrics
from handler.protocol import export_error

WINDOW_SECONDS = 10.0
LIMITS = {"run": 500, "status": 1_000, "cancel": 50}
"""Requests in a window. Half of what the platform allows, since replicas do not know of each other's requests."""
TIMEOUT_SECONDS = 20.0
MAX_PAUSE_SECONDS = 60.0
MAX_ANSWER_BYTES = 20 << 20

Word = Literal["IN_QUEUE", "IN_PROGRESS", "RUNNING", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]
RUNNING: frozenset[Word] = frozenset({"IN_PROGRESS", "RUNNING"})
ENDED: frozenset[Word] = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})


class RunpodRefused(ExportError):
    """The platform does not take what the request says, and never will."""

    code: ClassVar[str] = "BACKEND_REFUSED"
    retry = Retry.never


class JobStatus(msgspec.Struct, rename="camel", kw_only=True):
    """The answer of ``/run`` and ``/status``; times in milliseconds."""

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    status: Word
    output: Any = None
    error: Any = None
    worker_id: str | None = None
    delay_time: int | None = None
    """How long the job waited there."""


class RunpodApi:
    """One endpoint. Each route keeps to its limit, and pauses for everybody when the platform says so."""

    def __init__(self, base: str, endpoint: str, key: str, metrics: Metrics) -> None:
        self._client = httpx.AsyncClient(
            base_url=f"{base.rstrip('/')}/{endpoint}/",
            headers={"Authorization": f"Bearer {key}"},
            timeout=TIMEOUT_SECONDS,
            limits=httpx.Limits(max_connections=64),
            trust_env=False,
        )
        self._metrics = metrics
        self._routes = {route: _Route(limit) for route, limit in LIMITS.items()}
        self._failing_since: float | None = None
        self._failed_at = 0.0
        self.reason = ""
        """Why the last request failed that did."""

    @property
    def away_seconds(self) -> float:
        """How long no request has been answered; 0 while they are, and where nobody has asked for long."""
        now = asyncio.get_running_loop().time()
        if self._failing_since is None or now - self._failed_at > 2 * MAX_PAUSE_SECONDS:
            return 0.0
        return now - self._failing_since

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def run(self, job: dict[str, Any], policy: dict[str, int], webhook: str | None) -> JobStatus:
        """Queue a job. ``policy``: ``executionTimeout`` and ``ttl`` in milliseconds."""
        message = {"input": job, "policy": policy, **({"webhook": webhook} if webhook else {})}
        answer = await self._send("run", "POST", "run", message)
        if answer is None:
            raise self._away(self._routes["run"], "Runpod knows no such endpoint (404); see RUNPOD_ENDPOINT_ID")
        return answer

    async def status(self, runpod_id: str) -> JobStatus | None:
        """Where a job stands, None where the platform knows it no more."""
        return await self._send("status", "GET", f"status/{runpod_id}")

    async def cancel(self, runpod_id: str) -> None:
        """Stop a job, or take it out of the queue; one that has ended stays as it is."""
        await self._send("cancel", "POST", f"cancel/{runpod_id}")

    async def _send(self, route: str, method: str, path: str, body: object = None) -> JobStatus | None:
        turn = self._routes[route]
        await turn.wait()
        content = None if body is None else msgspec.json.encode(body)
        try:
            async with (
                asyncio.timeout(TIMEOUT_SECONDS),  # httpx's own holds for each piece, and pieces may come for ever
                self._client.stream(
                    method, path, content=content, headers={"Content-Type": "application/json"}
                ) as answer,
            ):
                received = await _body(answer)
        except (httpx.HTTPError, TimeoutError) as error:
            self._metrics.runpod.labels(route, "none").inc()
            raise self._away(turn, f"Runpod cannot be reached: {type(error).__name__}") from error
        code = answer.status_code
        self._metrics.runpod.labels(route, str(code)).inc()
        if code == 429 or code >= 500:
            raise self._away(turn, f"Runpod answers {route} with {code}", answer.headers.get("retry-after"))
        if code in (401, 403):  # The operator's mistake, not the job's: it waits until that is mended.
            raise self._away(turn, f"Runpod refuses RUNPOD_API_KEY ({code})")
        if code == 404:
            self._worked(turn)
            return None
        if not answer.is_success:
            self._worked(turn)
            said = received[:300].decode(errors="replace")
            raise RunpodRefused(f"Runpod refuses {route} with {code}: {said}", status=code)
        try:
            status = msgspec.json.decode(received, type=JobStatus)
        except MALFORMED as error:
            if route == "cancel":
                self._worked(turn)
                return None
            raise self._away(turn, f"Runpod's answer to {route} makes no sense: {error}") from error
        self._worked(turn)
        return status

    def _worked(self, turn: _Route) -> None:
        turn.worked()
        self._failing_since = None

    def _away(self, turn: _Route, reason: str, retry_after: str | None = None) -> PlatformUnavailable:
        turn.failed(retry_after)
        self.reason = reason
        self._failed_at = asyncio.get_running_loop().time()
        if self._failing_since is None:
            self._failing_since = self._failed_at
        return PlatformUnavailable(reason)


async def _body(answer: httpx.Response) -> bytes:
    """An answer's body. Raises httpx.HTTPError where it is longer than ``MAX_ANSWER_BYTES``."""
    body = bytearray()
    async for piece in answer.aiter_bytes():
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            raise httpx.DecodingError(f"more than {MAX_ANSWER_BYTES:,} bytes", request=answer.request)
    return bytes(body)


class _Route:
    """A sliding window, and a pause that doubles while requests fail."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sent: deque[float] = deque()
        self._until = 0.0
        self._failures = 0

    async def wait(self) -> None:
        """Until a request may be sent."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            while self._sent and self._sent[0] <= now - WINDOW_SECONDS:
                self._sent.popleft()
            full = self._sent[0] + WINDOW_SECONDS - now if len(self._sent) >= self._limit else 0.0
            if (pause := max(full, self._until - now)) <= 0:
                self._sent.append(now)
                return
            await asyncio.sleep(pause)

    def worked(self) -> None:
        """The last request was answered."""
        self._failures = 0

    def failed(self, retry_after: str | None) -> None:
        """The last request failed: pause, as long as the platform says if it does."""
        self._failures += 1
        pause = min(0.25 * 2 ** min(self._failures, 10), MAX_PAUSE_SECONDS) * random.uniform(0.5, 1.0)  # noqa: S311
        if retry_after and retry_after.isdecimal():
            pause = min(max(pause, float(retry_after)), MAX_PAUSE_SECONDS)
        self._until = max(self._until, asyncio.get_running_loop().time() + pause)


_SILENT_ENDS: dict[str, ExportError] = {
    "TIMED_OUT": DeadlineExceeded("Runpod ended the export after its execution timeout"),
    "CANCELLED": WorkerLost("the job was canceled at Runpod"),
    "COMPLETED": WorkerLost("the worker ended without publishing anything"),
}


def why(answer: JobStatus | None) -> ExportError:
    """Why an attempt published nothing; None is a job that Runpod does not know."""
    if answer is None:
        return WorkerLost("Runpod does not know the job any more")
    if answer.status != "FAILED":
        end = _SILENT_ENDS.get(answer.status)
        return end or WorkerLost(f"the job published nothing in its time; Runpod has it as {answer.status}")
    text = answer.error if isinstance(answer.error, str) else msgspec.json.encode(answer.error).decode()
    try:
        told = msgspec.json.decode(text, type=JobError)
    except MALFORMED:
        return WorkerLost(f"the worker failed: {text[:300]}")
    return of_worker(told)


def of_worker(told: JobError) -> ExportError:
    """What a worker says of its run; one that was stopped is lost, unless it is we who stopped it."""
    return WorkerLost("the run was stopped") if told.code == "CANCELED" else export_error(told)
