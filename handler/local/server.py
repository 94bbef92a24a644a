"""The local Runpod over HTTP: the public routes, those of workers, and ``/faults``."""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any, TypeVar, cast

import msgspec
import structlog
from aiohttp import ClientError, ClientSession, ClientTimeout, web

from common.contract import MALFORMED
from common.errors import InvalidRequest, InvalidSettings
from handler.local.config import LocalConfig
from handler.local.endpoint import Endpoint
from handler.local.faults import Fault, Faults, Route
from handler.local.fleet import Worker
from handler.local.job import Job, Refused, Result, RunRequest

log = structlog.get_logger()

MAX_RUN_BODY = 10 << 20
MAX_RUNSYNC_BODY = 20 << 20
MAX_RESULT_BODY = 20 << 20
MAX_FAULT_BODY = 64 << 10
LIMIT_SECONDS = 10.0
SYNC_WAIT_SECONDS = (1.0, 90.0, 300.0)
"""Least, usual and longest wait of ``/runsync``."""
WEBHOOK_TRIES = 3
WEBHOOK_TIMEOUT = ClientTimeout(total=10)
MAX_BATCH = 64

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
T = TypeVar("T")


class LocalRunpod:
    """A local Runpod in this process: ``await start()``, then ``url`` and ``api_base``; ``await stop()``."""

    def __init__(self, config: LocalConfig) -> None:
        """Raises InvalidRequest for a fault that there is not."""
        self._config = config
        self._faults = Faults(config.faults, config.seed)
        self._endpoint = Endpoint(config, self._faults, announce=self._announce)
        self._recent: dict[str, deque[float]] = {}
        self._limits = {
            "run": config.run_limit,
            "runsync": config.runsync_limit,
            "status": config.status_limit,
            "cancel": config.cancel_limit,
            "purge-queue": config.purge_limit,
        }
        self._runner: web.AppRunner | None = None
        self._http: ClientSession | None = None
        self._webhooks: set[asyncio.Task[None]] = set()
        self.url = ""
        """``http://HOST:PORT``, once started."""

    @property
    def api_base(self) -> str:
        """What a client takes as the API's base."""
        return f"{self.url}/v2"

    async def start(self) -> None:
        """Listen and start the first workers. Raises InvalidSettings where the address cannot be used."""
        application = web.Application(middlewares=[_errors_as_json])
        application.add_routes(self._routes())
        self._runner = web.AppRunner(
            application, access_log=None, handler_cancellation=True, handle_signals=False, shutdown_timeout=0.2
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._config.host, self._config.port)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            message = f"{self._config.host}:{self._config.port} cannot be listened on: {error.strerror}"
            raise InvalidSettings(message, field="bind") from error
        port: int = self._runner.addresses[0][1]
        host = self._config.host
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{port}"
        self._http = ClientSession(timeout=WEBHOOK_TIMEOUT)
        local = shown if host not in ("0.0.0.0", "::") else "127.0.0.1"  # noqa: S104 - compared with
        await self._endpoint.fleet.open(f"http://{local}:{port}/v2/{self._config.endpoint}")

    async def stop(self) -> None:
        """End the workers and close the port; what is queued is lost."""
        if self._http is not None:
            await self._endpoint.fleet.close()
            for task in self._webhooks:
                task.cancel()
            await asyncio.gather(*self._webhooks, return_exceptions=True)
            await self._http.close()
        if self._runner is not None:
            await self._runner.cleanup()

    def _routes(self) -> list[web.RouteDef]:
        endpoint = "/v2/{endpoint}"
        return [
            web.post(f"{endpoint}/run", self._public("run", self._run)),
            web.post(f"{endpoint}/runsync", self._public("runsync", self._runsync)),
            web.get(f"{endpoint}/status/{{job}}", self._public("status", self._status)),
            web.post(f"{endpoint}/cancel/{{job}}", self._public("cancel", self._cancel)),
            web.post(f"{endpoint}/retry/{{job}}", self._public("retry", self._retry)),
            web.get(f"{endpoint}/health", self._public("health", self._health)),
            web.post(f"{endpoint}/purge-queue", self._public("purge-queue", self._purge)),
            web.get(f"{endpoint}/job-take/{{worker}}", self._take),
            web.get(f"{endpoint}/job-take-batch/{{worker}}", self._take_batch),
            web.post(f"{endpoint}/job-done/{{worker}}/{{job}}", self._done),
            web.get(f"{endpoint}/job-stop/{{worker}}", self._stops),
            web.get(f"{endpoint}/ping/{{worker}}", self._ping),
            web.get("/faults", self._show_faults),
            web.post("/faults", self._add_fault),
            web.delete("/faults", self._clear_faults),
        ]

    # --- public -------------------------------------------------------------------------------------

    def _public(self, route: Route, handler: Handler) -> Handler:
        async def answer(request: web.Request) -> web.StreamResponse:
            self._check_key(request)
            if request.match_info["endpoint"] != self._config.endpoint:
                raise Refused(404, "endpoint not found")
            job = request.match_info.get("job")
            if self._faults.strike("http-429", job=job, route=route):
                raise Refused(429, "too many requests")
            if self._faults.strike("http-500", job=job, route=route):
                raise Refused(500, "internal server error")
            self._check_limit(route)
            response = cast("web.Response", await handler(request))
            if route == "status" and (fault := self._faults.strike("slow-status", job=job)):
                await asyncio.sleep(2.0 if fault.seconds is None else fault.seconds)
            if self._faults.strike("http-500-after", job=job, route=route):
                raise Refused(500, "internal server error")
            if self._faults.strike("cut-connection", job=job, route=route):
                return await _cut(request, response)
            return response

        return answer

    def _check_key(self, request: web.Request) -> None:
        key = self._config.key
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if key is not None and not secrets.compare_digest(given.encode(), key.encode()):
            raise Refused(401, "unauthorized")

    def _check_limit(self, route: Route) -> None:
        limit = self._limits.get(route)
        if limit is None:
            return
        now = asyncio.get_running_loop().time()
        recent = self._recent.setdefault(route, deque())
        while recent and recent[0] <= now - LIMIT_SECONDS:
            recent.popleft()
        if len(recent) >= limit:
            raise Refused(429, "too many requests")
        recent.append(now)

    async def _run(self, request: web.Request) -> web.Response:
        job = await self._submit(request, MAX_RUN_BODY, sync=False)
        return _json({"id": job.id, "status": job.status})

    async def _runsync(self, request: web.Request) -> web.Response:
        least, usual, most = SYNC_WAIT_SECONDS
        try:
            wait = float(request.query.get("wait", usual * 1_000)) / 1_000
        except ValueError as error:
            raise Refused(400, "wait must be a number of milliseconds") from error
        if not least <= wait <= most:
            raise Refused(400, f"wait must be from {least * 1_000:.0f} to {most * 1_000:.0f}")
        job = await self._submit(request, MAX_RUNSYNC_BODY, sync=True)
        await self._endpoint.wait(job, wait)
        return _json(job.view())

    async def _submit(self, request: web.Request, limit: int, *, sync: bool) -> Job:
        body = await _body(request, limit)
        return self._endpoint.submit(_decode(body, RunRequest), len(body), sync=sync)

    async def _status(self, request: web.Request) -> web.Response:
        return _json(self._endpoint.job(request.match_info["job"]).view())

    async def _cancel(self, request: web.Request) -> web.Response:
        job = self._endpoint.cancel(request.match_info["job"])
        return _json({"id": job.id, "status": job.status})

    async def _retry(self, request: web.Request) -> web.Response:
        job = self._endpoint.retry(request.match_info["job"])
        return _json({"id": job.id, "status": job.status})

    async def _health(self, _request: web.Request) -> web.Response:
        return _json(self._endpoint.health())

    async def _purge(self, _request: web.Request) -> web.Response:
        return _json({"removed": self._endpoint.purge(), "status": "completed"})

    # --- workers ------------------------------------------------------------------------------------

    async def _worker(self, request: web.Request) -> Worker:
        worker = self._endpoint.fleet.workers.get(request.match_info["worker"])
        token = request.query.get("token", "")
        if worker is None or not secrets.compare_digest(token.encode(), worker.token.encode()):
            await asyncio.sleep(1.0)  # The package asks again at once.
            raise Refused(401, "unauthorized")
        return worker

    async def _take(self, request: web.Request) -> web.Response:
        jobs = await self._endpoint.take(await self._worker(request), 1)
        return _json(jobs[0]) if jobs else web.Response(status=204)

    async def _take_batch(self, request: web.Request) -> web.Response:
        size = request.query.get("batch_size", "1")
        if not size.isdecimal() or not 1 <= int(size) <= MAX_BATCH:
            raise Refused(400, f"batch_size must be from 1 to {MAX_BATCH}")
        jobs = await self._endpoint.take(await self._worker(request), int(size))
        return _json(jobs) if jobs else web.Response(status=204)

    async def _done(self, request: web.Request) -> web.Response:
        worker = await self._worker(request)
        body = await _body(request, MAX_RESULT_BODY)
        self._endpoint.done(worker, request.match_info["job"], _decode(body, Result))
        return _json({})

    async def _stops(self, request: web.Request) -> web.Response:
        stops = await self._endpoint.stops(await self._worker(request))
        return _json({"jobsToStop": stops}) if stops else web.Response(status=204)

    async def _ping(self, request: web.Request) -> web.Response:
        worker = await self._worker(request)
        self._endpoint.ping(worker, request.query.get("job_id", "").split(","))
        return _json({})

    # --- faults and webhooks ------------------------------------------------------------------------

    async def _show_faults(self, request: web.Request) -> web.Response:
        self._check_key(request)
        return _json(self._faults.view())

    async def _add_fault(self, request: web.Request) -> web.Response:
        self._check_key(request)
        try:
            self._endpoint.fault(_decode(await _body(request, MAX_FAULT_BODY), Fault))
        except InvalidRequest as error:
            raise Refused(400, error.message) from error
        return _json(self._faults.view())

    async def _clear_faults(self, request: web.Request) -> web.Response:
        self._check_key(request)
        self._faults.clear()
        self._endpoint.fleet.scale()
        return _json(self._faults.view())

    def _announce(self, job: Job) -> None:
        assert job.request.webhook is not None
        task = asyncio.create_task(self._call_webhook(job.request.webhook, msgspec.json.encode(job.view()), job.id))
        self._webhooks.add(task)
        task.add_done_callback(self._webhooks.discard)

    async def _call_webhook(self, url: str, body: bytes, job_id: str) -> None:
        assert self._http is not None
        headers = {"Content-Type": "application/json"}
        reason = ""
        for attempt in range(WEBHOOK_TRIES):
            if attempt:
                await asyncio.sleep(self._config.webhook_gap_seconds)
            try:
                async with self._http.post(url, data=body, headers=headers, allow_redirects=False) as response:
                    if response.status == HTTPStatus.OK:
                        return
                    reason = str(response.status)
            except (ClientError, TimeoutError, ValueError) as error:
                reason = type(error).__name__
        log.warning("a webhook was not called", job=job_id, tries=WEBHOOK_TRIES, reason=reason)


def serve(config: LocalConfig) -> None:
    """Run until SIGTERM or SIGINT; says on standard error when it listens. Raises InvalidSettings, InvalidRequest."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    asyncio.run(_serve(config))


async def _serve(config: LocalConfig) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    platform = LocalRunpod(config)
    await platform.start()
    print(f"local Runpod listens on {platform.url}", file=sys.stderr, flush=True)
    try:
        await ended.wait()
    finally:
        await platform.stop()


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refused as error:
        return _json({"error": error.message}, error.status)
    except web.HTTPException as error:
        return _json({"error": error.reason.lower()}, error.status)


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


def _decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except MALFORMED as error:
        raise Refused(400, f"bad request: {error}") from error


async def _body(request: web.Request, limit: int) -> bytes:
    """The body, ``limit`` bytes at most. Raises Refused as the platform does."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.content.iter_any():
        size += len(chunk)
        if size > limit:
            raise Refused(400, f"exceeded max body size of {limit >> 20}MiB")
        chunks.append(chunk)
    return b"".join(chunks)


async def _cut(request: web.Request, response: web.Response) -> web.StreamResponse:
    """Send half of an answer and close the connection."""
    body: Any = response.body
    cut = web.StreamResponse(status=response.status, headers={"Content-Type": "application/json"})
    cut.content_length = len(body)
    await cut.prepare(request)
    with suppress(ConnectionError):
        await cut.write(body[: len(body) // 2])
    if request.transport is not None:
        request.transport.close()
    return cut
