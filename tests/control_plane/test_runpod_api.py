"""The client of Runpod's API, against a platform and against a site that answers as told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from live_server import graph
from processes import free_port
from runpod_house import RunpodServer, eventually
from runpod_local import local_runpod

from control_plane.backends.runpod_api import (
    LIMITS,
    MAX_ANSWER_BYTES,
    TIMEOUT_SECONDS,
    RunpodApi,
    RunpodRefused,
)
from control_plane.errors import PlatformUnavailable
from control_plane.operations.metrics import Metrics

QUEUED = {"id": "job-1", "status": "IN_QUEUE"}
ASKED = {"run": ("POST", "run"), "status": ("GET", "status/job-1"), "cancel": ("POST", "cancel/job-1")}


@dataclass
class Site:
    """What came, and how the next requests are answered: bytes as they go over the wire, then the connection ends."""

    base: str = ""
    came: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)
    usual: bytes = b""
    delay: float = 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")
            first, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            method, path, _ = first.split(" ")
            self.came.append((method, path, headers, json.loads(body) if body else None))
            self.at.append(asyncio.get_running_loop().time())
            answer = self.answers.pop(0) if self.answers else self.usual
            await asyncio.sleep(self.delay)
            writer.write(answer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # The client went away.
        finally:
            writer.close()


def said(status: int, body: object = None, **headers: str) -> bytes:
    """An answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} As-Told", f"Content-Length: {len(data)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


@asynccontextmanager
async def site() -> AsyncIterator[tuple[Site, RunpodApi]]:
    """A site, and a client of the endpoint ``ep`` there."""
    found = Site(usual=said(200, QUEUED))
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v2"
    api = RunpodApi(found.base + "/", "ep", "secret-key", Metrics())
    try:
        yield found, api
    finally:
        await api.close()
        server.close()
        await server.wait_closed()


def call(api: RunpodApi, route: str) -> Awaitable[Any]:
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "run": lambda: api.run({"job_id": "1"}, {"executionTimeout": 5_000, "ttl": 10_000}, None),
        "status": lambda: api.status("job-1"),
        "cancel": lambda: api.cancel("job-1"),
    }
    return calls[route]()


def test_the_messages_are_those_of_the_platform() -> None:
    async def inside() -> None:
        async with site() as (found, api):
            policy = {"executionTimeout": 5_000, "ttl": 10_000}
            answer = await api.run({"job_id": "1"}, policy, "https://here/hook")
            assert (answer.id, answer.status) == ("job-1", "IN_QUEUE")
            await api.run({"job_id": "1"}, policy, None)
            whole = {"status": "FAILED", "delayTime": 12, "executionTime": 7, "error": "{}", "workerId": "w", "new": 1}
            found.answers = [said(200, {"id": "job-1", **whole})]
            status = await api.status("job-1")
            assert status is not None
            assert (status.status, status.delay_time, status.error, status.worker_id) == ("FAILED", 12, "{}", "w")
            await api.cancel("job-1")
            assert [(method, path) for method, path, _, _ in found.came] == [
                ("POST", "/v2/ep/run"),
                ("POST", "/v2/ep/run"),
                ("GET", "/v2/ep/status/job-1"),
                ("POST", "/v2/ep/cancel/job-1"),
            ]
            assert all(headers["authorization"] == "Bearer secret-key" for _, _, headers, _ in found.came)
            assert found.came[0][2]["content-type"] == "application/json"
            message = {"input": {"job_id": "1"}, "policy": policy}
            assert [body for *_, body in found.came] == [
                {**message, "webhook": "https://here/hook"},
                message,
                None,
                None,
            ]

    asyncio.run(inside())


@pytest.mark.parametrize("route", LIMITS)
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (said(429, {"error": "too many requests"}), "429"),
        (said(500, {"error": "internal"}), "500"),
        (said(503, b"<html>"), "503"),
        (b"", "cannot be reached"),
        (said(200, QUEUED)[:-9], "cannot be reached"),
        (b"220 smtp.example.com ready\r\n", "cannot be reached"),
        (said(200, b"\x1f\x8b\x08nonsense", content_encoding="gzip"), "cannot be reached"),
    ],
)
def test_a_platform_that_is_away_is_asked_again_after_a_pause(route: str, answer: bytes, reason: str) -> None:
    async def inside() -> None:
        async with site() as (found, api):
            found.answers = [answer]
            with pytest.raises(PlatformUnavailable, match=reason):
                await call(api, route)
            assert api.away_seconds > 0
            await call(api, route)
            assert api.away_seconds == 0
            assert found.at[1] - found.at[0] >= 0.25  # the shortest pause
            assert [(method, path.removeprefix("/v2/ep/")) for method, path, _, _ in found.came] == [ASKED[route]] * 2

    asyncio.run(inside())


@pytest.mark.parametrize("route", ["run", "status"])
@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", {"id": "job-1"}, {"id": "job-1", "status": "GONE"}, {"id": 7, "status": "FAILED"}]
)
def test_an_answer_that_makes_no_sense_is_no_answer(route: str, body: object) -> None:
    async def inside() -> None:
        async with site() as (found, api):
            found.answers = [said(200, body)]
            with pytest.raises(PlatformUnavailable, match="makes no sense"):
                await call(api, route)
            assert api.away_seconds > 0
            await call(api, route)
            assert found.at[1] - found.at[0] >= 0.25

    asyncio.run(inside())


def test_an_answer_without_end_is_given_up() -> None:
    async def inside() -> None:
        async with site() as (found, api):
            found.answers = [said(200, b" " * (MAX_ANSWER_BYTES + 1))]
            with pytest.raises(PlatformUnavailable, match="cannot be reached"):
                await api.status("job-1")

    asyncio.run(inside())


def test_an_answer_that_drips_is_given_up() -> None:
    gone = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 As-Told\r\nContent-Length: 1000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while not writer.transport.is_closing():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.2)
        writer.close()
        gone.set()

    async def inside() -> None:
        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        api = RunpodApi(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v2", "ep", "secret-key", Metrics())
        async with server, asyncio.timeout(2 * TIMEOUT_SECONDS):
            with pytest.raises(PlatformUnavailable, match="cannot be reached"):
                await api.status("job-1")
            await gone.wait()
        await api.close()

    asyncio.run(inside())


def test_the_pause_is_as_long_as_the_platform_asks_and_holds_for_all_who_ask_the_same() -> None:
    async def inside() -> None:
        async with site() as (found, api):
            found.answers = [said(429, b"", Retry_After="2")]
            with pytest.raises(PlatformUnavailable):
                await api.status("job-1")
            await asyncio.gather(*(api.status("job-1") for _ in range(3)), api.cancel("job-1"))
            asked = [path.split("/")[3] for _, path, _, _ in found.came]
            assert asked == ["status", "cancel", "status", "status", "status"]
            assert min(found.at[2:]) - found.at[0] >= 2.0

    asyncio.run(inside())


def test_the_pause_grows_while_requests_fail_and_is_short_again_after_one_that_works() -> None:
    async def inside() -> None:
        async with site() as (found, api):
            found.answers = [said(500)] * 4 + [said(200, QUEUED), said(500)]
            for _ in range(4):
                with pytest.raises(PlatformUnavailable):
                    await api.run({}, {}, None)
            await api.run({}, {}, None)
            with pytest.raises(PlatformUnavailable):
                await api.run({}, {}, None)
            await api.run({}, {}, None)
            gaps = [after - before for before, after in zip(found.at, found.at[1:], strict=False)]
            assert gaps[3] >= 2.0  # half of 4 s at least
            assert gaps[5] < gaps[3]

    asyncio.run(inside())


@pytest.mark.parametrize("code", [400, 413, 422])
@pytest.mark.parametrize("route", LIMITS)
def test_a_refusal_is_told_with_its_reason_and_is_no_outage(route: str, code: int) -> None:
    async def inside() -> None:
        async with site() as (found, api):
            found.answers = [said(code, {"error": "because"})]
            with pytest.raises(RunpodRefused, match=f"{code}.*because"):
                await call(api, route)
            assert api.away_seconds == 0

    asyncio.run(inside())


@pytest.mark.parametrize("code", [401, 403])
def test_a_wrong_key_is_an_outage_that_jobs_wait_for(code: int) -> None:
    async def inside() -> None:
        async with site() as (found, api):
            found.answers = [said(code, {"error": "because"})]
            with pytest.raises(PlatformUnavailable, match="RUNPOD_API_KEY"):
                await api.run({}, {}, None)
            assert "RUNPOD_API_KEY" in api.reason
            assert api.away_seconds > 0

    asyncio.run(inside())


def test_a_job_that_is_not_known_is_none_and_an_endpoint_that_is_not_known_is_an_outage() -> None:
    async def inside() -> None:
        async with site() as (found, api):
            found.usual = said(404, {"error": "not found"})
            assert await api.status("job-1") is None
            await api.cancel("job-1")
            with pytest.raises(PlatformUnavailable, match="no such endpoint"):
                await api.run({}, {}, None)

    asyncio.run(inside())


def test_slow_answers_hold_up_neither_each_other_nor_other_requests() -> None:
    async def inside() -> None:
        async with site() as (found, api):
            found.delay = 1.0
            answers = [asyncio.create_task(api.status("job-1")) for _ in range(8)]
            answers.append(asyncio.create_task(api.run({}, {}, None)))
            while len(found.came) < 9:
                assert not any(answer.done() for answer in answers)
                await asyncio.sleep(0.01)
            await asyncio.gather(*answers)

    asyncio.run(inside())


def test_no_more_requests_are_sent_in_a_window_than_half_of_what_the_platform_allows() -> None:
    async def inside() -> None:
        async with site() as (found, api):
            many = [asyncio.create_task(api.cancel("job-1")) for _ in range(LIMITS["cancel"] + 10)]
            while len(found.came) < LIMITS["cancel"]:
                await asyncio.sleep(0.01)
            await asyncio.sleep(1)
            assert len(found.came) == LIMITS["cancel"]
            await api.status("job-1")  # another window
            for task in many:
                task.cancel()
            await asyncio.gather(*many, return_exceptions=True)

    assert LIMITS == {"run": 500, "status": 1_000, "cancel": 50}
    asyncio.run(inside())


def test_it_follows_a_job_of_a_local_runpod() -> None:
    async def inside(base: str, endpoint: str, key: str) -> None:
        api = RunpodApi(base, endpoint, key, Metrics())
        job = await api.run({"any": "thing"}, {"executionTimeout": 5_000, "ttl": 10_000}, None)
        status = await api.status(job.id)
        assert status is not None
        assert status.status == "IN_QUEUE"
        await api.cancel(job.id)
        status = await api.status(job.id)
        assert status is not None
        assert status.status == "CANCELLED"
        assert await api.status("unknown") is None
        with pytest.raises(RunpodRefused, match="executionTimeout"):
            await api.run({}, {"executionTimeout": 1}, None)
        await api.close()
        for wrong in (RunpodApi(base, endpoint, "wrong", Metrics()), RunpodApi(base, "wrong", key, Metrics())):
            with pytest.raises(PlatformUnavailable):
                await wrong.run({}, {}, None)
            await wrong.close()

    with local_runpod(workers="0:0") as platform:
        asyncio.run(inside(platform.api_base, platform.endpoint, platform.key))


def test_a_server_is_not_ready_while_the_platform_is_away_and_hands_its_jobs_over_when_it_is_back(
    tmp_path: Any,
) -> None:
    port = free_port()
    with local_runpod(workers="0:0") as gone:
        pass
    gone.api_base = f"http://127.0.0.1:{port}/v2"
    server = RunpodServer(tmp_path / "root", gone)
    try:
        server.start()
        job = server.submit(graph(2))
        answer = eventually(lambda: None if (found := server.client.get("/readyz")).is_success else found)
        assert answer.status_code == 503
        assert answer.json()["error"]["details"]["checks"]["worker"] != "ok"
        assert server.job(job)["status"] == "queued"
        with local_runpod(workers="0:0", port=port) as back:
            here = server.runpod_id(job)
            assert back.status(here)["status"] == "IN_QUEUE"
            eventually(lambda: server.client.get("/readyz").is_success)
    finally:
        server.close()
