"""What a local Runpod answers to a worker's requests, which the tests send themselves, and to those of clients then."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from processes import answering, free_port
from structlog.testing import capture_logs

from common.errors import InvalidSettings
from handler.local import LocalConfig, LocalRunpod, worker_environment
from handler.local.faults import MAX_FAULTS

NOTES_ITS_ENVIRONMENT = ["sh", "-c", 'cd "$NOTES"; env > new; mv new worker; exec sleep 300']


class Sides(NamedTuple):
    """A local Runpod, seen from its clients and from its worker."""

    client: httpx.AsyncClient
    """Its base is the endpoint."""
    worker: dict[str, str]
    """The environment of the one worker."""

    async def run(self, value: Any = 1, **more: Any) -> str:
        """Submit a job."""
        answer = await self.client.post("run", json={"input": value, **more})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    async def status(self, job: str) -> dict[str, Any]:
        """Of a job, as clients see it."""
        return dict((await self.client.get(f"status/{job}")).json())

    async def fault(self, **fault: Any) -> httpx.Response:
        """Ask for a fault."""
        return await self.client.post(str(self.client.base_url.join("/faults")), json=fault)

    async def take(self, most: int | str = 1) -> httpx.Response:
        """Ask for jobs as the worker."""
        url = self.worker["RUNPOD_WEBHOOK_GET_JOB"].replace("job-take/", "job-take-batch/")
        return await self.client.get(f"{url.replace('$ID', self.worker['RUNPOD_POD_ID'])}&batch_size={most}")

    async def done(self, job: str, output: Any, **more: Any) -> httpx.Response:
        """Post a result as the worker, or with ``status="IN_PROGRESS"`` a progress update."""
        url = self.worker["RUNPOD_WEBHOOK_POST_OUTPUT"].replace("$RUNPOD_POD_ID", self.worker["RUNPOD_POD_ID"])
        return await self.client.post(url.replace("$ID", job), json={"output": output, **more})


def _with_runpod(tmp_path: Path, scenario: Callable[[Sides], Awaitable[None]], **config: Any) -> None:
    async def inside() -> None:
        given = {"min_workers": 1, "max_workers": 1, "poll_seconds": 0.2, **config}
        env = worker_environment(os.environ, {"NOTES": str(tmp_path)})
        platform = LocalRunpod(LocalConfig(worker_command=NOTES_ITS_ENVIRONMENT, env=env, **given))
        await platform.start()
        try:
            async with (
                asyncio.timeout(60),
                httpx.AsyncClient(base_url=f"{platform.api_base}/local", timeout=30) as http,
            ):
                worker = tmp_path / "worker"
                while given["min_workers"] and not worker.exists():
                    await asyncio.sleep(0.02)
                lines = worker.read_text().splitlines() if given["min_workers"] else []
                await scenario(Sides(http, dict(line.split("=", 1) for line in lines if "=" in line)))
        finally:
            async with asyncio.timeout(20):
                await platform.stop()

    asyncio.run(inside())


def test_a_worker_gets_as_many_jobs_as_it_asks_for_and_no_more_than_it_may(tmp_path: Path) -> None:
    async def scenario(sides: Sides) -> None:
        for wrong in (0, 65, -1, "x", ""):
            answer = await sides.take(wrong)
            assert (answer.status_code, answer.json()) == (400, {"error": "batch_size must be from 1 to 64"})
        jobs = [await sides.run(number) for number in range(3)]
        taken = (await sides.take(2)).json()
        assert [(job["id"], job["input"]) for job in taken] == [(jobs[0], 0), (jobs[1], 1)]
        assert [job["id"] for job in (await sides.take(64)).json()] == [jobs[2]]
        assert (await sides.take(64)).status_code == 204

    _with_runpod(tmp_path, scenario)


def test_a_result_of_a_job_that_there_is_not_is_refused(tmp_path: Path) -> None:
    async def scenario(sides: Sides) -> None:
        refused = await sides.done("nothing", 1)
        assert (refused.status_code, refused.json()) == (404, {"error": "job not found"})
        job = await sides.run()
        await sides.take()
        assert (await sides.done(job, {"made": 1})).status_code == 200
        assert (await sides.done(job, {"made": 2})).status_code == 200
        found = await sides.status(job)
        assert (found["status"], found["output"]) == ("COMPLETED", {"made": 1}), "the first result counts"

    _with_runpod(tmp_path, scenario)


def test_a_second_delivery_goes_to_another_worker_or_to_none(tmp_path: Path) -> None:
    async def scenario(sides: Sides) -> None:
        await sides.fault(fault="delivered-twice")
        twice = await sides.run()
        assert [job["id"] for job in (await sides.take(5)).json()] == [twice]
        assert (await sides.take(5)).status_code == 204
        other = await sides.run()
        assert [job["id"] for job in (await sides.take(5)).json()] == [other]

    _with_runpod(tmp_path, scenario)


def test_an_ended_job_stays_as_it_is_when_the_worker_dies_that_got_it_once_more(tmp_path: Path) -> None:
    async def scenario(sides: Sides) -> None:
        await sides.fault(fault="delivered-again")
        job = await sides.run()
        await sides.take()
        await sides.done(job, {"made": 1})
        ended = await sides.status(job)
        assert [taken["id"] for taken in (await sides.take()).json()] == [job]
        await sides.fault(fault="worker-death")
        while (await sides.take()).status_code != 401:  # it is known until it has ended
            await asyncio.sleep(0.02)
        assert (await sides.status(job)) == ended
        assert ended["output"] == {"made": 1}
        jobs = (await sides.client.get("health")).json()["jobs"]
        assert (jobs["completed"], jobs["retried"], jobs["inQueue"]) == (1, 0, 0)

    _with_runpod(tmp_path, scenario)


def test_without_workers_the_one_that_works_keeps_its_job_to_the_end(tmp_path: Path) -> None:
    async def scenario(sides: Sides) -> None:
        job = await sides.run()
        assert [taken["id"] for taken in (await sides.take()).json()] == [job]
        await sides.fault(fault="no-workers")
        assert (await sides.client.get("health")).json()["workers"]["running"] == 1
        waits = await sides.run()
        assert (await sides.take()).status_code == 204
        assert (await sides.done(job, {"made": 1})).status_code == 200
        assert (await sides.status(job))["status"] == "COMPLETED"
        assert (await sides.status(waits))["status"] == "IN_QUEUE"

    _with_runpod(tmp_path, scenario)


def test_a_fault_that_finds_nothing_to_strike_waits_until_there_is_something(tmp_path: Path) -> None:
    async def scenario(sides: Sides) -> None:
        assert (await sides.fault(fault="ttl-passed", seconds=0)).json()["struck"] == {}
        job = await sides.run()
        await asyncio.sleep(0.05)
        assert (await sides.client.get(f"status/{job}")).status_code == 404
        assert (await sides.take()).status_code == 204
        again = await sides.run()
        assert (await sides.status(again))["status"] == "IN_QUEUE"

    _with_runpod(tmp_path, scenario)


def test_a_job_that_is_gone_stays_gone_whatever_comes_late(tmp_path: Path) -> None:
    async def scenario(sides: Sides) -> None:
        await sides.fault(fault="late-progress", seconds=0.3)
        job = await sides.run()
        await sides.take()
        assert (await sides.done(job, {"step": 1}, status="IN_PROGRESS")).status_code == 200
        for seconds in (0.2, 0.25):
            await sides.fault(fault="ttl-passed", match=job, seconds=seconds)
        await asyncio.sleep(0.5)
        assert (await sides.client.get(f"status/{job}")).status_code == 404
        assert (await sides.done(job, {"made": 1})).status_code == 404
        jobs = (await sides.client.get("health")).json()["jobs"]
        assert (jobs["inQueue"], jobs["inProgress"], jobs["completed"], jobs["failed"]) == (0, 0, 0, 0)
        other = await sides.run()
        assert [taken["id"] for taken in (await sides.take()).json()] == [other]

    _with_runpod(tmp_path, scenario)


def test_more_faults_than_there_may_be_are_refused_and_those_before_stay(tmp_path: Path) -> None:
    async def scenario(sides: Sides) -> None:
        for _ in range(MAX_FAULTS):
            assert (await sides.fault(fault="no-output")).status_code == 200
        refused = await sides.fault(fault="no-output")
        assert (refused.status_code, refused.json()) == (400, {"error": "more than 1,000 faults"})
        url = str(sides.client.base_url.join("/faults"))
        assert len((await sides.client.get(url)).json()["faults"]) == MAX_FAULTS

    _with_runpod(tmp_path, scenario, min_workers=0)


@pytest.mark.parametrize("wait", ["999", "300001", "-1", "inf", "nan", "soon", ""])
def test_a_wait_that_is_too_short_too_long_or_none_queues_nothing(tmp_path: Path, wait: str) -> None:
    async def scenario(sides: Sides) -> None:
        refused = await sides.client.post("runsync", params={"wait": wait}, json={"input": 1})
        assert refused.status_code == 400
        assert refused.json()["error"].startswith("wait must be ")
        assert (await sides.client.get("health")).json()["jobs"]["inQueue"] == 0

    _with_runpod(tmp_path, scenario, min_workers=0)


def test_a_wait_that_is_over_answers_how_far_the_job_is(tmp_path: Path) -> None:
    async def scenario(sides: Sides) -> None:
        answer = (await sides.client.post("runsync", params={"wait": 1_000}, json={"input": 1})).json()
        assert answer["status"] == "IN_QUEUE"
        assert (await sides.client.post(f"cancel/{answer['id']}")).json()["status"] == "CANCELLED"

    _with_runpod(tmp_path, scenario, min_workers=0)


def test_ended_jobs_are_forgotten_before_a_new_one_is_refused(tmp_path: Path) -> None:
    async def scenario(sides: Sides) -> None:
        large = "x" * ((10 << 20) - 100)
        ended = [await sides.run("small"), await sides.run(large), await sides.run(large)]
        for job in ended:
            await sides.client.post(f"cancel/{job}")
        waiting = [await sides.run(large) for _ in range(23)]
        assert (await sides.client.get(f"status/{ended[0]}")).status_code == 200
        waiting.append(await sides.run(large))
        known = [(await sides.client.get(f"status/{job}")).status_code for job in (*ended, *waiting)]
        assert known == [404, 404, 200] + [200] * 24, "the oldest first, and no more than it takes"

    _with_runpod(tmp_path, scenario, min_workers=0)


@pytest.mark.parametrize("unreachable", ["nobody listens", "no address"])
def test_a_webhook_that_cannot_be_called_is_tried_three_times_and_the_job_has_ended_all_the_same(
    tmp_path: Path, unreachable: str
) -> None:
    url = f"http://127.0.0.1:{free_port()}/hook" if unreachable == "nobody listens" else "hook"

    async def scenario(sides: Sides) -> None:
        with capture_logs() as logs:
            job = await sides.run(webhook=url)
            await sides.client.post(f"cancel/{job}")
            while not (said := [line for line in logs if line["event"] == "a webhook was not called"]):
                await asyncio.sleep(0.02)
        assert [(line["job"], line["tries"]) for line in said] == [(job, 3)]
        assert (await sides.status(job))["status"] == "CANCELLED"

    _with_runpod(tmp_path, scenario, min_workers=0, webhook_gap_seconds=0.05)


def test_a_webhook_that_is_to_be_tried_again_does_not_keep_the_platform_from_ending(tmp_path: Path) -> None:
    called: list[str] = []

    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            called.append(self.path)
            self.send_response(500)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with answering(Refuses) as url:

        async def scenario(sides: Sides) -> None:
            job = await sides.run(webhook=f"{url}/hook")
            await sides.client.post(f"cancel/{job}")
            while not called:
                await asyncio.sleep(0.02)

        _with_runpod(tmp_path, scenario, min_workers=0, webhook_gap_seconds=300)
    assert called == ["/hook"]


def test_one_whose_address_is_taken_says_so_and_stops_as_any_other() -> None:
    async def inside() -> None:
        first, second = LocalRunpod(LocalConfig()), LocalRunpod(LocalConfig())
        await second.stop()
        await first.start()
        try:
            port = int(first.url.rpartition(":")[2])
            third = LocalRunpod(LocalConfig(port=port))
            with pytest.raises(InvalidSettings, match=f"127.0.0.1:{port} cannot be listened on") as caught:
                await third.start()
            assert caught.value.details["field"] == "bind"
            await third.stop()
            async with httpx.AsyncClient() as client:
                assert (await client.get(f"{first.api_base}/local/health")).status_code == 200
        finally:
            await first.stop()

    asyncio.run(inside())
