"""Faults that strike a Runpod endpoint, its bucket and its control planes at random: what was accepted ends once.

``scripts/faults runpod --exports 200`` runs the campaign and prints a table, ``scripts/faults replicas --times 50``
kills replicas that drive jobs; the tests run a short form of the first.

Two servers share a PostgreSQL and a bucket, three workers run the exports. Between everybody and the bucket, and
between each server and the platform, stand proxies that fail at random; the platform is asked for its own faults.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import httpx
import psycopg
from botocore.config import Config
from live_server import ENDED, KEY, TERMINAL, graph
from postgres import Postgres
from runpod_house import RunpodServer, bucket_env, real_workers
from runpod_local import Platform
from services import S3, s3_server
from storage.faulty import Kind, Proxy, Seen, proxy

from common.capsule.gate import Gate
from common.embedding.static import StaticEmbedder
from common.graph.read import read_graph
from common.pipeline import export
from control_plane.reading.inspect import verify

CODES = {"WORKER_LOST", "DEADLINE_EXCEEDED", "STORAGE_FAILED"}
"""What an accepted job may fail with: a worker that was lost twice, two time limits, a bucket that stays away."""
POLL_SECONDS = 0.5
CACHE = "vectors/"
"""Below the bucket: what workers keep there is bounded, and belongs to no job."""
STRAY_SECONDS = 15
TAKE_OVER_SECONDS = 10.0
WAIT = 300.0
"""Seconds in which a job has to end, whatever strikes."""

_JOB = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Fault:
    """What a proxy does to a request with this probability."""

    name: str
    chance: float
    kind: Kind | None
    """None: the request waits ``seconds``."""
    wanted: Callable[[Seen], bool]
    seconds: tuple[float, float] = (0.0, 0.0)


def _run(seen: Seen) -> bool:
    return seen.path.endswith("/run")


STORE_FAULTS = (
    Fault("S3: 500", 0.01, "500", lambda _: True),
    Fault("S3: 503", 0.01, "503", lambda _: True),
    Fault("S3: answer lost", 0.01, "lost", lambda _: True),
    Fault("S3: answer cut", 0.02, "cut", lambda seen: seen.method == "GET"),
    Fault(
        "S3: byte spoiled", 0.01, "spoiled", lambda seen: seen.method == "PUT" and seen.headers["content-length"] != "0"
    ),
    Fault("S3: slow", 0.02, None, lambda _: True, (0.5, 3.0)),
    Fault("S3: slow part", 0.5, None, lambda seen: "partNumber=" in seen.path, (1.0, 4.0)),
)
PLATFORM_FAULTS = (
    Fault("Runpod: 429", 0.05, "429", _run),
    Fault("Runpod: 429", 0.01, "429", lambda seen: not _run(seen)),
    Fault("Runpod: 500 before accepting", 0.05, "500", _run),
    Fault("Runpod: 500 after accepting", 0.05, "failed", _run),
    Fault("Runpod: 500 for a look", 0.01, "500", lambda seen: not _run(seen)),
    Fault("Runpod: connection cut", 0.02, "cut", lambda _: True),
    Fault("Runpod: slow look", 0.02, None, lambda seen: not _run(seen), (1.0, 5.0)),
)
RUN_FAULTS: tuple[tuple[str, float, dict[str, Any], float], ...] = (
    ("worker killed", 0.08, {"fault": "worker-death"}, 3.0),
    ("delivered twice", 0.08, {"fault": "delivered-twice"}, 0.0),
    ("delivered again after its end", 0.05, {"fault": "delivered-again"}, 0.0),
    ("result lost", 0.04, {"fault": "lost-result"}, 0.0),
    ("result and job forgotten", 0.04, {"fault": "forgotten-result"}, 0.0),
    ("result without output", 0.04, {"fault": "no-output"}, 0.0),
    ("progress late, out of order", 0.06, {"fault": "late-progress", "count": 3}, 4.0),
    ("progress after the result", 0.04, {"fault": "late-progress", "count": 3}, 0.0),
    ("ttl passed", 0.05, {"fault": "ttl-passed"}, 6.0),
)
"""Name, chance of a submission, what the platform is asked for, and within how many seconds it strikes."""
COLD_START, NO_WORKERS, AWAY = "cold start", "no workers for 5 s", "S3: away for seconds"
POLLER_KILLED, REPLICA_KILLED, REPLICA_STOPPED = "poller killed", "replica killed, started again", "replica stopped"
EVENTS = (POLLER_KILLED, REPLICA_KILLED, REPLICA_STOPPED, AWAY, NO_WORKERS)
CANCELED = "canceled by its client"


class Struck:
    """How often each fault struck, and which jobs."""

    def __init__(self) -> None:
        self.times: Counter[str] = Counter()
        self.jobs: dict[str, set[str]] = defaultdict(set)
        self._lock = threading.Lock()

    def note(self, fault: str, *jobs: str, times: int = 1) -> None:
        """A fault struck these jobs."""
        with self._lock:
            self.times[fault] += times
            self.jobs[fault].update(jobs)


class Weather(Proxy):
    """A proxy whose faults come at random once it is no more ``calm``."""

    def __init__(self, url: str, faults: Sequence[Fault], chance: random.Random, struck: Struck) -> None:
        super().__init__(url)
        self.calm = True
        self.away_until = 0.0
        self._chances = faults
        self._chance = chance
        self._struck = struck

    def job_of(self, seen: Seen, body: bytes) -> str | None:
        """The job that a request is about."""
        found = _JOB.search(seen.path)
        return found[0] if found else None

    def take(self, seen: Seen, body: bytes) -> Kind | None:
        """The fault that strikes."""
        if self.calm:
            return None
        job = self.job_of(seen, body)
        jobs = (job,) if job else ()
        if time.monotonic() < self.away_until:
            self._struck.note(AWAY, *jobs, times=0)
            return "503"
        for fault in self._chances:
            if fault.wanted(seen) and self._chance.random() < fault.chance:
                self._struck.note(fault.name, *jobs)
                time.sleep(self._chance.uniform(*fault.seconds))
                return fault.kind
        return None


class StoreWeather(Weather):
    """Before the bucket; knows which manifests were put."""

    def __init__(self, url: str, chance: random.Random, struck: Struck) -> None:
        super().__init__(url, STORE_FAULTS, chance, struck)
        self.published: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        """By job and attempt, the SHA-256 of each manifest that was put: it holds timings, so every run has its own."""

    def passed(self, seen: Seen, body: bytes, status: int, answer: bytes) -> None:
        """Note a manifest that the bucket took."""
        if seen.method == "PUT" and seen.path.endswith(".manifest.json") and status == 200:
            job, attempt = seen.path.split("/")[-3:-1]
            self.published[job][attempt].add(hashlib.sha256(body).hexdigest())


class Runs:
    """The platform's ids of the jobs, and the faults that it was asked for."""

    def __init__(self, platform: Platform, chance: random.Random, struck: Struck) -> None:
        self.platform = platform
        self.jobs: dict[str, str] = {}
        self.calm = True
        self._chance = chance
        self._struck = struck
        self._asked: list[tuple[str, str, str]] = []

    def submitted(self, run: str, job: str) -> None:
        """The platform has taken a job; whatever it is going to do to it is asked for now."""
        self.jobs[run] = job
        if self.calm:
            return
        for name, chance, fault, within in RUN_FAULTS:
            if self._chance.random() < chance:
                when: dict[str, Any] = {"seconds": self._chance.uniform(0, within)} if within else {}
                self.platform.fault(match=run, **fault, **when)
                self._asked.append((name, fault["fault"], run))

    def note_struck(self) -> None:
        """Note what struck of all that was asked for."""
        view = self.platform.client.get(f"{self.platform.url}/faults").json()
        left = {(one["fault"], one.get("match")): one.get("count") for one in view["faults"]}
        for name, fault, run in self._asked:
            if left.get((fault, run)) not in (1, 3):
                self._struck.note(name, self.jobs[run])
        self._struck.note(COLD_START, times=view["struck"].get("cold-start", 0))


class PlatformWeather(Weather):
    """Between one server and the platform; knows when that server asked about which job."""

    def __init__(self, url: str, runs: Runs, chance: random.Random, struck: Struck) -> None:
        super().__init__(url, PLATFORM_FAULTS, chance, struck)
        self._runs = runs
        self.asked: list[tuple[float, str | None]] = []

    def job_of(self, seen: Seen, body: bytes) -> str | None:
        """Named in a submission; others name the run."""
        if _run(seen):
            return str(json.loads(body)["input"]["job_id"])
        return self._runs.jobs.get(seen.path.rpartition("/")[2])

    def take(self, seen: Seen, body: bytes) -> Kind | None:
        """Note the request; the fault that strikes."""
        self.asked.append((time.monotonic(), self.job_of(seen, body)))
        return super().take(seen, body)

    def passed(self, seen: Seen, body: bytes, status: int, answer: bytes) -> None:
        """Note which run belongs to which job."""
        if _run(seen) and status == 200:
            self._runs.submitted(str(json.loads(answer)["id"]), str(self.job_of(seen, body)))


@dataclass(frozen=True)
class Replica:
    """One control plane, and the proxy that it reaches the platform through."""

    server: RunpodServer
    platform: PlatformWeather

    @property
    def id(self) -> str:
        """What it calls itself in the database."""
        return (self.server.root / "replica-id").read_text()


@dataclass
class House:
    """All that runs."""

    folder: Path
    replicas: list[Replica]
    store: StoreWeather
    runs: Runs
    s3: S3
    database: psycopg.Connection[Any]
    struck: Struck
    chance: random.Random

    def driven_by(self, replica: Replica) -> set[str]:
        """The jobs that have not ended and that a replica drives."""
        query = "SELECT id FROM jobs WHERE owner = %s AND status IN ('queued', 'running')"
        return {row[0] for row in self.database.execute(query, (replica.id,))}

    def ended(self, jobs: Sequence[str]) -> set[str]:
        """Those of these jobs that have ended."""
        query = "SELECT id FROM jobs WHERE id = ANY(%s) AND status NOT IN ('queued', 'running')"
        return {row[0] for row in self.database.execute(query, (list(jobs),))}

    def calm(self, *, calm: bool) -> None:
        """Begin or end the faults of proxies and platform."""
        self.runs.calm = calm
        for weather in (self.store, *(replica.platform for replica in self.replicas)):
            weather.calm = calm
        if not calm:
            self.runs.platform.fault("cold-start", probability=0.5, seconds=3)


@contextmanager
def house(folder: Path, *, workers: int, seed: int, execution_ms: int = 40_000) -> Iterator[House]:
    """Two replicas, one database, one bucket, a platform with so many workers."""
    struck = Struck()

    def chance(name: str) -> random.Random:
        return random.Random(f"{seed} {name}")

    with ExitStack() as stack:
        postgres = Postgres()
        stack.callback(postgres.close)
        url = postgres.start().new_database()
        real = stack.enter_context(s3_server(folder / "buckets"))
        store = stack.enter_context(proxy(real.endpoint, lambda at: StoreWeather(at, chance("store"), struck)))
        (folder / "temporary").mkdir()
        own = {"TMPDIR": str(folder / "temporary")}
        s3 = real._replace(endpoint=store.url, env={**real.env, **own, "AWS_ENDPOINT_URL_S3": store.url})
        platform = stack.enter_context(
            real_workers(s3, folder / "worker", workers=f"{workers}:{workers}", seed=seed, webhook_gap_seconds=1.0)
        )
        runs = Runs(platform, chance("runs"), struck)
        replicas = []
        for name in ("a", "b"):
            weather = stack.enter_context(
                proxy(platform.url, lambda at, name=name: PlatformWeather(at, runs, chance(name), struck))  # type: ignore[misc]
            )
            server = RunpodServer(
                folder / name,
                platform,
                poll=POLL_SECONDS,
                hooks=True,
                env={**bucket_env(s3), "RUNPOD_EXECUTION_TIMEOUT_MS": str(execution_ms)},
                database_url=url,
                storage_url=s3.url,
                stray_seconds=STRAY_SECONDS,
                queue_capacity=10_000,
                max_attempts=6,
            )
            server.env["RUNPOD_API_BASE"] = f"{weather.url}/v2"
            stack.callback(server.close)
            server.start()
            replicas.append(Replica(server, weather))
        database = psycopg.connect(url.replace("+psycopg", ""), autocommit=True)
        stack.callback(database.close)
        yield House(folder, replicas, store, runs, real, database, struck, chance("house"))


# --- clients ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """What a client sends, and the digest of what it should get."""

    body: bytes
    digest: str


SIZES = ((3, 5, False), (40, 5, True), (400, 5, False), (400, 2, True), (2_500, 5, False), (12_000, 12, False))
"""Nodes, lines of text for each, and whether vectors are wanted. The last one goes up in parts."""
WEIGHTS = (24, 24, 20, 10, 15, 7)


def graphs(folder: Path, sizes: Sequence[tuple[int, int, bool]]) -> list[Graph]:
    """One graph of each size, and its digest from an export in this process."""
    made = []
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    with Gate() as gate:
        for number, (nodes, lines, vectors) in enumerate(sizes):
            options = {"semanticEnabled": vectors, "maxNodeFrames": 500_000, "maxRelationFrames": 500_000}
            body = json.dumps(graph(nodes, name=f"graph-{number}", lines=lines, options=options)).encode()
            with tempfile.TemporaryDirectory(dir=folder) as own:
                (Path(own) / "graph.json").write_bytes(body)
                result = export(
                    read_graph(Path(own) / "graph.json"),
                    out_dir=Path(own) / "out",
                    gate=gate,
                    generated_at=now,
                    embedder=StaticEmbedder() if vectors else None,
                    on_progress=lambda _: None,
                    should_stop=lambda: None,
                )
                made.append(Graph(body, result.manifest.content_digest))
    return made


@dataclass
class Export:
    """One export of a client, and what it saw of it."""

    number: int
    graph: Graph
    cancel_after: int | None
    """Cancels after so many events."""
    job: str | None = None
    seen: list[dict[str, Any]] = field(default_factory=list)
    told_by: list[str] = field(default_factory=list)
    """The replica that told each event."""


class Clients:
    """Threads that post to either replica and follow the events on either, whatever breaks off."""

    def __init__(self, house: House, exports: Iterator[Export], *, count: int, pause: float = 0.0) -> None:
        self._house = house
        self._exports = exports
        self._lock = threading.Lock()
        self._pause = pause
        self._stopped = False
        self.done: list[Export] = []
        self.broken: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(random.Random(n),)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> bool:
        """Some have not ended yet."""
        return any(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        """Wait for all."""
        for thread in self._threads:
            thread.join()

    def stop(self) -> None:
        """Give up."""
        self._stopped = True
        self.join()

    def _run(self, chance: random.Random) -> None:
        with httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=httpx.Timeout(60, connect=5)) as http:
            while True:
                with self._lock:
                    one = next(self._exports, None)
                if one is None or self._stopped:
                    return
                try:
                    self._post(http, chance, one)
                    self._follow(http, chance, one)
                except Exception as error:  # noqa: BLE001 - told as a broken promise
                    self.broken.append(f"export {one.number} ({one.job}): {type(error).__name__}: {error}")
                self.done.append(one)
                time.sleep(chance.uniform(0, self._pause))

    def _post(self, http: httpx.Client, chance: random.Random, one: Export) -> None:
        headers = {
            "idempotency-key": f"export-{one.number}",
            "content-type": "application/json",
        }
        until, said = time.monotonic() + WAIT, "nothing"
        while time.monotonic() < until and not self._stopped:
            url = chance.choice(self._house.replicas).server.url
            try:
                answer = http.post(f"{url}/v1/exports", content=one.graph.body, headers=headers)
            except httpx.HTTPError as error:
                said = type(error).__name__
            else:
                if answer.status_code == 202:
                    one.job = str(answer.json()["jobId"])
                    return
                said = f"{answer.status_code} {answer.text[:300]}"
                if answer.status_code != 503:
                    raise AssertionError(f"a post was answered with {said}")
            time.sleep(chance.uniform(0.1, 0.5))
        raise AssertionError(f"not accepted within {WAIT:.0f} seconds; the last answer was {said}")

    def _follow(self, http: httpx.Client, chance: random.Random, one: Export) -> None:
        until = time.monotonic() + WAIT
        while not (self._stopped or (one.seen and one.seen[-1]["type"] in TERMINAL)):
            if time.monotonic() > until:
                raise AssertionError(f"not ended within {WAIT:.0f} seconds; last seen: {one.seen[-1:]}")
            replica = chance.choice(self._house.replicas)
            with suppress(httpx.HTTPError):
                self._stream(http, replica, one)
            time.sleep(chance.uniform(0, 0.3))

    def _stream(self, http: httpx.Client, replica: Replica, one: Export) -> None:
        url = f"{replica.server.url}/v1/exports/{one.job}"
        with http.stream("GET", f"{url}/events/stream", params={"sinceSeq": len(one.seen)}) as stream:
            if stream.status_code != 200:
                raise httpx.ReadError(f"a stream was answered with {stream.status_code}")
            for line in stream.iter_lines():
                if self._stopped:
                    return
                if not line.startswith("data:"):
                    continue
                event = json.loads(line[5:])
                if event["seq"] != len(one.seen) + 1:
                    raise AssertionError(f"event {event['seq']} came after {len(one.seen)}")
                one.seen.append(event)
                one.told_by.append(replica.id)
                if one.cancel_after is not None and len(one.seen) >= one.cancel_after:
                    answer = http.delete(url)
                    if answer.is_success:
                        one.cancel_after = None
                        self._house.struck.note(CANCELED, str(one.job))


# --- promises ---------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a campaign found."""

    exports: int
    seconds: float
    outcomes: dict[str, str]
    """By job."""
    struck: Struck
    figures: dict[str, object]
    broken: list[str]


class Look:
    """Everything that was promised, looked at after the last export."""

    def __init__(self, house: House, clients: Clients) -> None:
        self._house = house
        self._exports = {one.job: one for one in clients.done if one.job}
        self.broken = list(clients.broken)
        self.figures: dict[str, object] = {}
        self.outcomes: dict[str, str] = {}

    def everything(self, *, sample: int) -> None:
        """Wait until all jobs have ended, then look; ``sample`` capsules are verified whole."""
        jobs = self._ended()
        for job_id in self._exports:
            if job_id not in jobs:
                self.broken.append(f"{job_id}: accepted, then forgotten")
        for job_id, job in jobs.items():
            error = job["error"]
            self.outcomes[job_id] = job["status"] + (f" {error['code']}" if error else "")
            if job["status"] not in ("completed", "failed", "canceled") or (error and error["code"] not in CODES):
                self.broken.append(f"{job_id}: {job['status']} {error}")
            self._log(job_id, job)
        completed = {job_id: job for job_id, job in jobs.items() if job["status"] == "completed"}
        chosen = set(self._house.chance.sample(sorted(completed), min(sample, len(completed))))
        for job_id, job in completed.items():
            try:
                self._files(job_id, job, whole=job_id in chosen)
            except httpx.HTTPStatusError as error:
                self.broken.append(f"{job_id}: completed, but {error.response.status_code} {error.response.text[:200]}")
        self._publications(completed)
        self._bucket(completed, {job_id for job_id, job in jobs.items() if job["status"] == "failed"})
        self._scratch()
        self._figures(jobs, len(chosen))

    def _ended(self) -> dict[str, dict[str, Any]]:
        until = time.monotonic() + WAIT
        while True:
            jobs = self._jobs()
            late = {job_id: job["status"] for job_id, job in jobs.items() if job["status"] not in ENDED}
            if not late:
                return jobs
            if time.monotonic() > until:
                self.broken.append(f"not ended: {late}")
                return jobs
            time.sleep(0.5)

    def _jobs(self) -> dict[str, dict[str, Any]]:
        jobs: dict[str, dict[str, Any]] = {}
        cursor: str | None = ""
        while cursor is not None:
            params = {"limit": "200", **({"cursor": cursor} if cursor else {})}
            page = self._get(0, "", params=params).json()
            jobs |= {job["jobId"]: job for job in page["jobs"]}
            cursor = page["nextCursor"]
        return jobs

    def _get(self, number: int, path: str, **more: Any) -> httpx.Response:
        return self._house.replicas[number % 2].server.client.get(f"/v1/exports{path}", **more).raise_for_status()

    def _log(self, job_id: str, job: dict[str, Any]) -> None:
        """Both replicas tell the same log, without gaps; what a stream told is in it."""
        logs = [self._get(n, f"/{job_id}/events", params={"limit": 2_000}).json()["events"] for n in range(2)]
        events = logs[0]
        wrong = []
        if logs[0] != logs[1]:
            wrong.append("the replicas tell different logs")
        if [event["seq"] for event in events] != list(range(1, job["lastEventSeq"] + 1)):
            wrong.append(f"numbers of events have gaps: {[event['seq'] for event in events]}")
        figures = [event["progress"] for event in events]
        if figures != sorted(figures):
            wrong.append(f"progress falls: {figures}")
        if [event["type"] in TERMINAL for event in events] != [False] * (len(events) - 1) + [True]:
            wrong.append(f"not one end at the end: {[event['type'] for event in events]}")
        if job_id in self._exports and self._exports[job_id].seen != events:
            wrong.append("a stream told something else than the log")
        self.broken += [f"{job_id}: {what}" for what in wrong]

    def _files(self, job_id: str, job: dict[str, Any], *, whole: bool) -> None:
        number = job_id.encode()[0]
        data = self._get(number, f"/{job_id}/manifest").content
        manifest = json.loads(data)
        sidecar = self._get(number, f"/{job_id}/sidecar").content
        parts = [
            self._get(number + at, f"/{job_id}/download", params={"part": at}).content
            for at in range(1, len(manifest["parts"]) + 1)
        ]
        wanted = [*(part["sha256"] for part in manifest["parts"]), manifest["sidecarSha256"]]
        found = [hashlib.sha256(part).hexdigest() for part in (*parts, sidecar)]
        if found != wanted or job["artifact"]["sha256"] != manifest["parts"][0]["sha256"]:
            self.broken.append(f"{job_id}: its files are not what it says")
        one = self._exports.get(job_id)
        if one is not None and manifest["contentDigest"] != one.graph.digest:
            self.broken.append(f"{job_id}: its content is not that of the same graph exported here")
        if whole:
            with tempfile.TemporaryDirectory(prefix="memvid-verify-") as folder:
                files = [*zip((part["fileName"] for part in manifest["parts"]), parts, strict=True)]
                files += [(manifest["sidecarFileName"], sidecar), (f"{files[0][0]}.manifest.json", data)]
                for name, content in files:
                    (Path(folder) / name).write_bytes(content)
                wrong = [check for check in verify(Path(folder) / files[0][0]) if not check.ok]
                self.broken += [f"{job_id}: {check.name}: {check.detail}" for check in wrong]

    def _publications(self, completed: dict[str, Any]) -> None:
        superseded = 0
        for job_id, attempts in self._house.store.published.items():
            superseded += len(attempts) - 1
            for attempt, manifests in attempts.items():
                if len(manifests) != 1:
                    self.broken.append(f"{job_id}: attempt {attempt} was published by {len(manifests)} runs")
        for job_id in completed:
            if not self._house.store.published.get(job_id):
                self.broken.append(f"{job_id}: completed without a manifest")
        self.figures["attempts that published after they were superseded"] = superseded

    def _bucket(self, completed: dict[str, Any], failed: set[str]) -> None:
        """Only the files of completed jobs and the payloads of failed ones are there; what nobody speaks for is removed
        by and by."""
        s3 = self._house.s3
        client = boto3.client(
            "s3",
            endpoint_url=s3.endpoint,
            region_name="us-east-1",
            aws_access_key_id=s3.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=s3.env["AWS_SECRET_ACCESS_KEY"],
            config=Config(s3={"addressing_style": "path"}),
        )
        started = time.monotonic()
        while True:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=s3.bucket)
            keys = [
                item["Key"]
                for page in pages
                for item in page.get("Contents", [])
                if (item["Size"] or item["Key"][-1] != "/") and not item["Key"].startswith(CACHE)
            ]
            uploads = client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads", [])
            wrong = [f"an upload of {upload['Key']}" for upload in uploads if not upload["Key"].startswith(CACHE)]
            attempts: dict[str, list[tuple[str, str]]] = defaultdict(list)
            for key in keys:
                kind, _, rest = key.partition("/")
                job_id, _, rest = rest.partition("/")
                attempt, _, name = rest.partition("/")
                if kind == "payloads" and job_id in failed:
                    continue
                if kind != "artifacts" or job_id not in completed:
                    wrong.append(key)
                else:
                    attempts[job_id].append((attempt, name))
            for job_id in completed:
                there = attempts[job_id]
                if (
                    len({attempt for attempt, _ in there}) != 1
                    or len(there) != 2 + completed[job_id]["artifact"]["parts"]
                ):
                    wrong.append(f"{job_id}: {there}")
            if not wrong or time.monotonic() - started > 4 * STRAY_SECONDS + 30:
                break
            time.sleep(0.5)
        client.close()
        self.figures["seconds until the bucket held nothing else"] = round(time.monotonic() - started, 1)
        if wrong:
            self.broken.append(f"left in the bucket: {wrong[:20]}")

    def _scratch(self) -> None:
        """No files of requests or runs on this machine but the folders of live workers."""
        until = time.monotonic() + 30
        while True:
            left = []
            for replica in self._house.replicas:
                root = replica.server.root
                for folder in ("staging/incoming", "staging/payloads", "artifacts", "scratch"):
                    left += [path for path in (root / folder).iterdir() if not path.name.startswith(".ready-")]
            for path in (self._house.folder / "worker" / "workers").iterdir():
                if not path.name.startswith("."):
                    left += [own for own in path.rglob("*") if own.is_file()] if _locked(path) else [path]
            if not left or time.monotonic() > until:
                break
            time.sleep(0.5)
        if left:
            self.broken.append(f"left on this machine: {[str(path) for path in left[:20]]}")

    def _figures(self, jobs: dict[str, Any], verified: int) -> None:
        rows = {row[0]: row for row in self._house.database.execute("SELECT id, attempt, owner FROM jobs")}
        attempts = Counter(rows[job_id][1] for job_id in jobs)
        told = [(one, by) for one in self._exports.values() for by in set(one.told_by)]
        other = sum(by != rows[str(one.job)][2] for one, by in told if str(one.job) in rows)
        self.figures |= {
            "attempts per job": ", ".join(f"{number}: {count}" for number, count in sorted(attempts.items())),
            "jobs followed through a replica that did not drive them at their end": other,
            "events": sum(job["lastEventSeq"] for job in jobs.values()),
            "capsules verified whole": verified,
        }


def _locked(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _left_running(folder: Path) -> list[str]:
    """Processes that were started with this folder in their environment."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            with suppress(OSError):
                if str(folder).encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200])
    return found


# --- campaigns --------------------------------------------------------------------------------------


def storm(folder: Path, exports: int, seed: int, *, workers: int = 3, gap: float = 1.5, short: bool = False) -> Result:
    """So many exports while everything fails; ``gap`` seconds or twice as many lie between faults of replicas.

    ``short``: without the largest graph, and with a time limit that a result that was lost takes less long to reach.
    """
    chance = random.Random(f"{seed} exports")
    known = graphs(folder, SIZES[:-1] if short else SIZES)
    sizes = chance.choices(known, WEIGHTS[: len(known)], k=exports)
    queue = [Export(n, one, chance.randint(1, 8) if chance.random() < 0.06 else None) for n, one in enumerate(sizes)]
    started = time.monotonic()
    with house(folder, workers=workers, seed=seed, execution_ms=12_000 if short else 40_000) as running:
        running.calm(calm=False)
        posting = Clients(running, iter(queue), count=12)
        try:
            events: list[str] = []
            while posting.running:
                if not events:
                    events = running.chance.sample(EVENTS, len(EVENTS))
                until = time.monotonic() + running.chance.uniform(gap, 2 * gap)
                while posting.running and time.monotonic() < until:
                    time.sleep(0.1)
                if posting.running:
                    _strike(running, events.pop())
        except BaseException:
            posting.stop()
            raise
        running.calm(calm=True)
        running.runs.note_struck()
        running.runs.platform.clear_faults()
        look = Look(running, posting)
        look.everything(sample=max(3, exports // 10))
    return _result(look, folder, running, started, len(queue))


def _strike(running: House, event: str) -> None:
    """One of the faults that are no answers of a server."""
    if event == AWAY:
        running.struck.note(AWAY)
        running.store.away_until = time.monotonic() + running.chance.uniform(3, 8)
        return
    if event == NO_WORKERS:
        running.struck.note(NO_WORKERS)
        running.runs.platform.fault("no-workers", seconds=5)
        return
    replica = max(running.replicas, key=lambda one: len(running.driven_by(one)))
    driven = running.driven_by(replica)
    running.struck.note(event, *driven)
    if event == REPLICA_STOPPED:
        replica.server.stop()
    else:
        replica.server.kill()
    until = time.monotonic() + 15
    while event == POLLER_KILLED and running.driven_by(replica) and time.monotonic() < until:
        time.sleep(0.1)
    replica.server.start()


def kills(folder: Path, times: int, seed: int) -> tuple[Result, list[float]]:
    """Kill a replica so often while it drives jobs; answers also the seconds until the other asked for each of them."""
    chance = random.Random(f"{seed} exports")
    known = graphs(folder, SIZES[:-1])
    over = threading.Event()

    def endless() -> Iterator[Export]:
        number = 0
        while not over.is_set():
            number += 1
            yield Export(number, chance.choice(known), None)

    started = time.monotonic()
    taken: list[float] = []
    broken: list[str] = []
    with house(folder, workers=3, seed=seed) as running:
        posting = Clients(running, endless(), count=8, pause=4.0)
        try:
            for number in range(1, times + 1):
                found = _kill(running, broken)
                taken += found
                slowest = f"{max(found):.1f} s" if found else "-"
                print(f"{number:>3}  {len(found)} jobs taken over, the last after {slowest}", flush=True)
        except BaseException:
            posting.stop()
            raise
        over.set()
        posting.join()
        look = Look(running, posting)
        look.everything(sample=max(3, times // 3))
    look.broken += broken
    return _result(look, folder, running, started, len(posting.done)), taken


def _kill(running: House, broken: list[str]) -> list[float]:
    victim, other = running.chance.sample(running.replicas, 2)
    until = time.monotonic() + 30
    while True:
        time.sleep(running.chance.uniform(0, 1.5))
        if (driven := running.driven_by(victim)) or time.monotonic() > until:
            break
    killed = time.monotonic()
    victim.server.kill()
    running.struck.note(REPLICA_KILLED, *driven)
    left, found = set(driven - running.ended(sorted(driven))), []
    while left and time.monotonic() < killed + 30:
        for at, job in list(other.platform.asked):
            if at > killed and job in left:
                found.append(at - killed)
                left.discard(job)
        left -= running.ended(sorted(left))
        time.sleep(0.05)
    broken += [f"{job}: not taken over within 30 seconds" for job in left]
    victim.server.start()
    return found


def _result(look: Look, folder: Path, running: House, started: float, exports: int) -> Result:
    """After the house is closed: what runs on, and what lies about."""
    if left := _left_running(folder):
        look.broken.append(f"left running: {left}")
    # Libraries make folders there that no process removes which is killed; they are the operating system's to clear.
    look.figures["left by killed processes in the folder of temporary files"] = len(
        list((folder / "temporary").iterdir())
    )
    return Result(exports, time.monotonic() - started, look.outcomes, running.struck, look.figures, look.broken)


def table(result: Result) -> str:
    """Fault, how often it struck, and what became of the jobs that it hit."""
    names = sorted(result.struck.times)
    rows = [("fault", "struck", "jobs hit", "their outcomes")]
    for name in names:
        hit = result.struck.jobs[name]
        ends = Counter(result.outcomes.get(job, "not accepted, sent again by its client") for job in hit)
        told = ", ".join(f"{count} {end}" for end, count in ends.most_common())
        rows.append((name, str(result.struck.times[name]), str(len(hit)) if hit else "-", told or "-"))
    ends = Counter(result.outcomes.values())
    rows.append(("all", str(sum(result.struck.times.values())), str(len(result.outcomes)), _counts(ends)))
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:<{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}  {d}" for a, b, c, d in rows]
    figures = [f"{name}: {value}" for name, value in result.figures.items()]
    return "\n".join([*lines, "", f"{result.exports} exports in {result.seconds:.0f} s", *figures])


def _counts(ends: Counter[str]) -> str:
    return ", ".join(f"{count} {end}" for end, count in ends.most_common())


def main() -> int:
    """The command line of ``scripts/faults runpod`` and ``scripts/faults replicas``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=["runpod", "replicas"])
    parser.add_argument("--exports", type=int, default=200, help="exports under all faults (200)")
    parser.add_argument("--times", type=int, default=50, help="kills of a replica (50)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="for the same faults again")
    parser.add_argument("--keep", action="store_true", help="leave logs and bucket where they are, and say where")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whatever was started is ended then
    folder = Path(tempfile.mkdtemp(prefix="memvid-faults-"))
    try:
        if options.campaign == "runpod":
            result = storm(folder, options.exports, options.seed)
        else:
            result, taken = kills(folder, options.times, options.seed)
            late = [f"a job was taken over only after {each:.1f} s" for each in taken if each > TAKE_OVER_SECONDS]
            result.broken += late
            result.figures["take-overs (seconds from the kill to the first request about the job)"] = _spread(taken)
    finally:
        if options.keep:
            print(f"everything lies in {folder}")
        else:
            shutil.rmtree(folder)
    print(table(result))
    print(f"seed {options.seed}; broken promises: {len(result.broken)}")
    for what in result.broken:
        print(f"  BROKEN {what}")
    return 1 if result.broken else 0


def _spread(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    found = sorted(seconds)
    at = {name: found[min(len(found) - 1, int(len(found) * share))] for name, share in (("median", 0.5), ("p95", 0.95))}
    told = ", ".join(f"{name} {value:.1f}" for name, value in at.items())
    return f"{len(found)}: least {found[0]:.1f}, {told}, most {found[-1]:.1f}"


if __name__ == "__main__":
    sys.exit(main())
