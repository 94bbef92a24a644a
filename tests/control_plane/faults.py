"""Faults at random moments: what was accepted ends, what is visible is whole, no event is lost or told twice.

``scripts/faults --times 50`` runs the campaign and prints a table; the tests run a short form of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from left_behind import child_pids
from live_server import ENDED, TERMINAL, Server, graph

SERVER_KILLED, SERVER_STOPPED, WORKER_KILLED = "server SIGKILL", "server SIGTERM", "worker SIGKILL"
LATEST = 1.2
"""Seconds from the first request to the latest fault: long enough to hit every stage of the jobs sent."""
SIZES = (3, 40, 400, 2_500)
WAIT = 120.0


@dataclass
class Outcome:
    """What one fault led to."""

    fault: str
    moment: float
    """Seconds after the first request."""
    running: Counter[str] = field(default_factory=Counter)
    """Stages that the accepted jobs were last seen in before the fault."""
    ends: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    """Promises that were not kept."""


class Campaign:
    """Faults on one root, one after the other; after each its jobs are looked at, after the last all jobs."""

    def __init__(self, root: Path, seed: int) -> None:
        self._chance = random.Random(seed)
        self._server = Server(root, worker_slots=2, small_job_frames=1_000, queue_capacity=1_000, max_attempts=5)
        self._jobs: dict[str, str] = {}
        """Accepted jobs with their keys."""
        self._seen: dict[str, dict[int, dict[str, Any]]] = {}
        """Events that a client saw, by job and number."""

    def round(self, fault: str, number: int, *, last: bool) -> Outcome:
        """Start, send jobs, let the fault happen, start again if need be, wait and look."""
        server = self._server.start()
        outcome = Outcome(fault, self._chance.random() * LATEST)
        keys = [f"{number}-{n}" for n in range(self._chance.randint(1, 4))]
        started = time.monotonic()
        clients = [threading.Thread(target=self._client, args=(key, self._chance.choice(SIZES))) for key in keys]
        for client in clients:
            client.start()
        time.sleep(max(0.0, started + outcome.moment - time.monotonic()))
        if fault == SERVER_KILLED:
            server.kill()
        elif fault == SERVER_STOPPED:
            server.stop()
        else:
            self._kill_a_worker()
        for client in clients:
            client.join()
        for job_id, key in list(self._jobs.items()):
            if key in keys and self._seen.get(job_id):
                outcome.running[self._seen[job_id][max(self._seen[job_id])]["stage"]] += 1
        if fault != WORKER_KILLED:
            server.start()
        self._look(outcome, keys, everything=last)
        server.stop()
        return outcome

    def close(self) -> None:
        """End the server and the client."""
        self._server.close()

    def _client(self, key: str, size: int) -> None:
        """Send one job and follow it until the fault cuts the line."""
        headers = dict(self._server.client.headers)
        with suppress(httpx.HTTPError), httpx.Client(base_url=self._server.url, headers=headers, timeout=60) as client:
            body = graph(size, name=f"fault-{key}", lines=5)
            answer = client.post("/v1/exports", json=body, headers={"idempotency-key": key})
            if answer.status_code != 202:
                return
            self._follow(client, answer.json()["jobId"], key)

    def _follow(self, client: httpx.Client, job_id: str, key: str) -> None:
        """Note an accepted job, and each event that is told of it."""
        self._jobs[job_id] = key
        seen = self._seen.setdefault(job_id, {})
        with client.stream("GET", f"/v1/exports/{job_id}/events/stream") as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    event = json.loads(line[5:])
                    seen[event["seq"]] = event

    def _kill_a_worker(self) -> None:
        if children := child_pids(self._server.pid):
            os.kill(self._chance.choice(children), signal.SIGKILL)

    def _look(self, outcome: Outcome, keys: Sequence[str], *, everything: bool) -> None:
        """Wait until all jobs have ended, then check every promise on those of these keys, or on all."""
        until = time.monotonic() + WAIT
        while True:
            jobs = self._all_jobs()
            if all(job["status"] in ENDED for job in jobs.values()):
                break
            if time.monotonic() > until:
                late = {job_id: job["status"] for job_id, job in jobs.items() if job["status"] not in ENDED}
                outcome.broken.append(f"not ended: {late}")
                return
            time.sleep(0.05)
        for job_id, key in self._jobs.items():
            if job_id not in jobs:
                outcome.broken.append(f"{job_id}: accepted, then forgotten")
            elif key in keys:
                error = jobs[job_id]["error"]
                outcome.ends[jobs[job_id]["status"] + (f" {error['code']}" if error else "")] += 1
        old = {job_id for job_id, key in self._jobs.items() if key not in keys}
        for job_id, job in jobs.items():
            if job_id in old and not everything:
                continue
            outcome.broken += [f"{job_id}: {what}" for what in self._promises(job_id, job)]
        outcome.broken += self._files(jobs)

    def _all_jobs(self) -> dict[str, dict[str, Any]]:
        jobs: dict[str, dict[str, Any]] = {}
        cursor: str | None = ""
        while cursor is not None:
            params = {"limit": "200", **({"cursor": cursor} if cursor else {})}
            page = self._server.client.get("/v1/exports", params=params).raise_for_status().json()
            jobs |= {job["jobId"]: job for job in page["jobs"]}
            cursor = page["nextCursor"]
        return jobs

    def _promises(self, job_id: str, job: dict[str, Any]) -> list[str]:
        broken = []
        events = self._server.events(job_id)
        if [event["seq"] for event in events] != list(range(1, job["lastEventSeq"] + 1)):
            broken.append(f"numbers of events have gaps: {[event['seq'] for event in events]}")
        figures = [event["progress"] for event in events]
        if figures != sorted(figures):
            broken.append(f"progress falls: {figures}")
        if [event["type"] in TERMINAL for event in events] != [False] * (len(events) - 1) + [True]:
            broken.append(f"not one end at the end: {[event['type'] for event in events]}")
        by_number = {event["seq"]: event for event in events}
        for number, event in self._seen.get(job_id, {}).items():
            if by_number.get(number) != event:
                broken.append(f"event {number} was told as {event}, now it is {by_number.get(number)}")
        if job["status"] == "failed" and not job["error"]["retryable"]:
            broken.append(f"failed for good: {job['error']}")
        return broken + self._downloads(job_id, job)

    def _downloads(self, job_id: str, job: dict[str, Any]) -> list[str]:
        get = self._server.client.get
        capsule = get(f"/v1/exports/{job_id}/download")
        if job["status"] != "completed":
            return (
                [] if capsule.status_code == 409 else [f"{job['status']}, but a download answers {capsule.status_code}"]
            )
        manifest = get(f"/v1/exports/{job_id}/manifest").json()
        sidecar = get(f"/v1/exports/{job_id}/sidecar")
        wanted = [manifest["parts"][0]["sha256"], manifest["sidecarSha256"]]
        found = [hashlib.sha256(answer.content).hexdigest() for answer in (capsule, sidecar)]
        return [] if found == wanted == [job["artifact"]["sha256"], wanted[1]] else ["its files are not what it says"]

    def _files(self, jobs: dict[str, dict[str, Any]]) -> list[str]:
        """Nothing lies about that no job speaks for; removals may come a moment after the end of a job."""
        root = self._server.root
        completed = {job_id for job_id, job in jobs.items() if job["status"] == "completed"}
        failed = {job_id for job_id, job in jobs.items() if job["status"] == "failed"}
        for _ in range(100):
            staged = [path for folder in ("incoming", "payloads") for path in (root / "staging" / folder).iterdir()]
            stray = [str(path) for path in staged if path.name not in failed]
            stray += [str(path) for path in (root / "scratch").iterdir() if not path.name.startswith(".ready-")]
            stray += [str(path) for path in (root / "artifacts").iterdir() if path.name not in completed]
            for job_id in completed:
                attempts = list((root / "artifacts" / job_id).iterdir())
                names = sorted(path.name for path in attempts[0].iterdir())
                if len(attempts) != 1 or len(names) != 3:
                    stray.append(f"{job_id}: {attempts} {names}")
            if not stray:
                return []
            time.sleep(0.05)
        return [f"left lying: {stray}"]


def run(root: Path, faults: Sequence[str], seed: int) -> list[Outcome]:
    """All these faults in turn on one root, with a line printed for each."""
    campaign = Campaign(root, seed)
    outcomes = []
    print(f"{'#':>3}  {'fault':15} {'at':>6}  {'jobs were in':40} ends")
    try:
        for number, fault in enumerate(faults, 1):
            outcome = campaign.round(fault, number, last=number == len(faults))
            outcomes.append(outcome)
            states = ", ".join(f"{n} {stage}" for stage, n in sorted(outcome.running.items())) or "none accepted"
            ends = ", ".join(f"{n} {end}" for end, n in sorted(outcome.ends.items())) or "-"
            print(f"{number:>3}  {fault:15} {outcome.moment:5.2f}s  {states:40} {ends}", flush=True)
            for what in outcome.broken:
                print(f"     BROKEN {what}", flush=True)
    finally:
        campaign.close()
    return outcomes


def main() -> int:
    """The command line of ``scripts/faults``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50, help="kills of the server (50)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="for the same moments again")
    options = parser.parse_args()
    some = max(1, options.times // 5)
    faults = [SERVER_KILLED] * options.times + [SERVER_STOPPED] * some + [WORKER_KILLED] * some
    with tempfile.TemporaryDirectory(prefix="memvid-faults-") as folder:
        outcomes = run(Path(folder) / "root", faults, options.seed)
    ends = sum((outcome.ends for outcome in outcomes), Counter[str]())
    broken = sum(len(outcome.broken) for outcome in outcomes)
    told = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    print(f"{len(outcomes)} faults (seed {options.seed}), {sum(ends.values())} accepted jobs: {told}")
    print(f"broken promises: {broken}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
