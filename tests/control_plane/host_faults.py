"""Faults of the host and of what is stored, while a real server exports: nothing is lost, nothing wrong is served.

``scripts/faults host --times 10`` runs the campaign and prints a table; a test runs a short form of it. The disk that
fills up and the one that cannot be written are file systems of their own, which only root can mount; the clock jumps by
a library of 30 lines that is put before the system's. What cannot be had is said, and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from faults import LATEST, Campaign, Outcome
from live_server import ENDED, Server, graph
from postgres import Postgres
from processes import free_port
from runpod_house import RunpodServer
from runpod_local import local_runpod
from services import BUCKET, VERSITYGW

SIZES = (400, 4_000, 8_000, 15_000)
DISK_BYTES = 6 << 30
"""A file system in memory, which takes what is written to it and no more."""
AWAY_SECONDS = 2.0
LOCKED_SECONDS = 12.0
"""Longer than the ten seconds that a statement waits for a lock."""
SCRUB_SECONDS = 2
JUDGED_TIMES = 5
"""A fault that was struck so often has met a job."""
DAY, HOUR = 86_400, 3_600
STATED = {200, 206, 304, 404, 409, 410, 416, 429, 503}
"""Answers of routes that give out files, whatever happened to those."""
CLOCK = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long *ahead;
__attribute__((constructor)) static void begin(void) {
    int file = open(getenv("CLOCK_AHEAD"), O_RDONLY);
    void *page = file < 0 ? MAP_FAILED : mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) ahead = page;
    if (file >= 0) close(file);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && ahead && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *ahead;
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *into) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (into) *into = exact.tv_sec;
    return exact.tv_sec;
}
"""


class Clock:
    """The clock of the processes that are started with ``env``; the one that never falls or jumps is left alone."""

    def __init__(self, folder: Path) -> None:
        source, library = folder / "clock.c", folder / "clock.so"
        self._ahead = folder / "ahead"
        source.write_text(CLOCK)
        self.set(0)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True, timeout=60)
        self.env = {"LD_PRELOAD": str(library), "CLOCK_AHEAD": str(self._ahead)}

    def set(self, seconds: int) -> None:
        """Be so far ahead of the true time from now on, everywhere at once."""
        with self._ahead.open("r+b" if self._ahead.exists() else "wb") as file:
            file.write(seconds.to_bytes(8, sys.byteorder, signed=True))


class House(Campaign):
    """A server that stays up while things happen to it, and what was promised by it."""

    def __init__(self, server: Server, chance: random.Random, clock: Clock | None = None) -> None:
        self._chance = chance
        self._server = server
        self._jobs = {}
        self._seen = {}
        self.server = server
        self.chance = chance
        self.clock = clock
        self.refused: list[int] = []
        """Answers to requests that were not accepted."""
        self._other: str | None = None

    def strike(self, fault: Fault, number: int) -> Outcome:
        """Send jobs, let the fault happen and pass, wait for their ends and look at every promise."""
        outcome = Outcome(fault.name, self.chance.random() * LATEST)
        keys = [f"{fault.name}-{number}-{n}" for n in range(self.chance.randint(1, 3))]
        clients = [threading.Thread(target=self._client, args=(key, self.chance.choice(SIZES))) for key in keys]
        self.refused.clear()
        for client in clients:
            client.start()
        end = time.monotonic() + 20  # a fault before anything was promised says little
        while not any(key in keys for key in list(self._jobs.values())) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(outcome.moment)
        for job_id, key in list(self._jobs.items()):
            if key in keys:
                seen = self._seen.get(job_id)
                outcome.running[seen[max(seen)]["stage"] if seen else "queued"] += 1
        try:
            outcome.broken += fault.strike(self)
        finally:
            for client in clients:
                client.join()
        self._look(outcome, keys, everything=False)
        outcome.broken += [f"a request was answered with {code}" for code in self.refused if code not in (429, 503)]
        return outcome

    def _client(self, key: str, size: int) -> None:
        """Send one job, again while it is refused, and follow it until the line is cut."""
        headers = dict(self.server.client.headers)
        body = graph(size, name=f"fault-{len(self._jobs)}", lines=5)
        with suppress(httpx.HTTPError), httpx.Client(base_url=self.server.url, headers=headers, timeout=60) as client:
            for _ in range(40):
                answer = client.post("/v1/exports", json=body, headers={"idempotency-key": key})
                if answer.status_code == 202:
                    break
                self.refused.append(answer.status_code)
                time.sleep(0.5)
            else:
                return
            self._follow(client, answer.json()["jobId"], key)

    def _files(self, jobs: dict[str, dict[str, Any]]) -> list[str]:
        """What a request left whose answer was lost goes with the sweep, an hour later."""
        return super()._files(jobs) if self.clock else []

    def _all_jobs(self) -> dict[str, dict[str, Any]]:
        for _ in range(300):
            with suppress(httpx.HTTPError):
                return super()._all_jobs()
            time.sleep(0.1)
        return super()._all_jobs()

    def completed(self, name: str) -> str:
        """A new job that has completed."""
        job_id = self.server.submit(graph(self.chance.choice((6, 60)), name=name, lines=3))
        end = self.server.wait(job_id)
        assert end["type"] == "job_completed", end
        return job_id

    def other(self) -> str:
        """A completed job whose files nobody touches."""
        if self._other is None:
            self._other = self.completed("other")
        return self._other

    def files(self, job_id: str) -> dict[str, Path]:
        """The stored files of a completed job."""
        found = list((self.server.root / "artifacts" / job_id).glob("*/*"))
        kinds = {".mv2": "capsule", ".sqlite": "sidecar", ".json": "manifest"}
        return {kinds[path.suffix]: path for path in found if path.suffix in kinds and not path.name.startswith(".")}

    def answers(self, job_id: str) -> dict[str, str]:
        """What each route that reads a job's files says of it: a digest, or an error."""
        base = f"/v1/exports/{job_id}"
        locator = {"jobId": job_id}
        name = "call_2"
        found = {
            "download": self._get(f"{base}/download"),
            "range": self._get(f"{base}/download", {"range": "bytes=100-4000"}),
            "sidecar": self._get(f"{base}/sidecar"),
            "manifest": self._get(f"{base}/manifest"),
            "search": self._get(f"{base}/search?q={name}&mode=lexical"),
            "report": self._get(f"{base}/report"),
        }
        for tool, arguments in (
            ("symbol_lookup", {"query": name}),
            ("text_search", {"query": name}),
            ("file_outline", {"filePath": "nothing.py"}),
            ("manifest_get", {}),
        ):
            found[tool] = self._tool(tool, {**arguments, "locator": locator})
        return found

    def _get(self, path: str, headers: Mapping[str, str] | None = None) -> str:
        for _ in range(40):
            try:
                answer = self.server.client.get(path, headers=headers)
            except httpx.RemoteProtocolError:
                return "error cut"
            if answer.status_code != 503:
                break
            time.sleep(0.25)  # it is fetched, or built anew
        if answer.status_code not in STATED:
            return f"BROKEN {path} answered {answer.status_code}"
        body = answer.content
        if answer.is_success and "/search?" in path:
            told = answer.json()
            body = json.dumps([told["hits"] if "hits" in told else told.get("items", told)], sort_keys=True).encode()
        return hashlib.sha256(body).hexdigest() if answer.is_success else f"error {answer.status_code}"

    def _tool(self, tool: str, arguments: Mapping[str, Any]) -> str:
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}
        headers = {"accept": "application/json, text/event-stream"}
        for _ in range(40):
            answer = self.server.client.post("/mcp", json=call, headers=headers)
            if answer.status_code != 200:
                return f"BROKEN {tool} answered {answer.status_code}"
            line = next((line for line in answer.text.splitlines() if line.startswith("data:")), None)
            result = json.loads(line[5:] if line else answer.text).get("result", {})
            told = json.loads(result["content"][0]["text"]) if result.get("content") else {}
            if told.get("code") not in ("INDEX_BUILD_IN_PROGRESS", "TIMEOUT"):
                break
            time.sleep(0.25)
        if "result" not in told:
            return f"error {told.get('code')}"
        return hashlib.sha256(json.dumps(told["result"], sort_keys=True).encode()).hexdigest()

    def differing(self, before: Mapping[str, str], job_id: str, what: str) -> list[str]:
        """Routes that now answer neither as before nor with an error."""
        now = self.answers(job_id)
        return [
            f"{what}: {route} serves something else ({answer})"
            for route, answer in now.items()
            if answer.startswith("BROKEN ")
            or (route != "report" and answer != before[route] and not answer.startswith("error "))
        ]

    def unlike(self, before: Mapping[str, str], job_id: str) -> list[str]:
        """Routes that do not answer as before. A report that was made anew from the manifest has fewer timings."""
        now = self.answers(job_id)
        return [route for route in before if route != "report" and now[route] != before[route]]

    def until(self, what: str, look: Callable[[], object], seconds: float = 45.0) -> list[str]:
        """Wait for something that has to come; what is broken where it does not."""
        end = time.monotonic() + seconds
        while not look():
            if time.monotonic() > end:
                return [f"not within {seconds:.0f} s: {what}"]
            time.sleep(0.1)
        return []


class Fault(NamedTuple):
    """Something that happens, and passes, while jobs run."""

    name: str
    strike: Callable[[House], list[str]]
    """Answers the promises that were broken."""
    share: int = 1
    """It is struck once for so many times of the others: it takes long."""


# --- processes, disks, clocks -----------------------------------------------------------------------------


def server_killed(house: House) -> list[str]:
    """SIGKILL of the server, which also polls where jobs run elsewhere."""
    house.server.kill()
    house.server.start()
    return []


def child_killed(house: House) -> list[str]:
    """SIGKILL of one of its children."""
    house._kill_a_worker()
    return []


def disk_full(house: House) -> list[str]:
    """Hardly a byte is left on the disk of the database, the payloads and the scratch folder, or of the artifacts."""
    folder = house.server.root / house.chance.choice(("", "artifacts"))
    while True:
        disk = os.statvfs(folder)
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        if subprocess.run(_resized(folder, used), check=False, capture_output=True, timeout=10).returncode == 0:
            break  # else more was written in between
    time.sleep(house.chance.uniform(0.5, AWAY_SECONDS))
    subprocess.run(_resized(folder, DISK_BYTES), check=True, timeout=10)
    return []


def _resized(folder: Path, size: int) -> list[str]:
    return ["mount", "-o", f"remount,size={size}", str(folder)]


def disk_read_only(house: House) -> list[str]:
    """The disk of the artifacts takes no writes, but for files that are open."""
    folder = str(house.server.root / "artifacts")
    for command in (("mount", "--bind", folder, folder), ("mount", "-o", "remount,bind,ro", folder)):
        subprocess.run(command, check=True, timeout=10)
    time.sleep(house.chance.uniform(0.5, AWAY_SECONDS))
    subprocess.run(("umount", "-l", folder), check=True, timeout=10)
    return []


def database_locked(house: House) -> list[str]:
    """Somebody else holds the database for longer than a statement waits."""
    with contextlib.closing(sqlite3.connect(house.server.root / "jobs.sqlite", timeout=30)) as other:
        other.execute("BEGIN EXCLUSIVE")
        time.sleep(LOCKED_SECONDS)
        other.rollback()
    return []


def clock_ahead(house: House) -> list[str]:
    """A day forward, and back again."""
    return _jump(house, DAY)


def clock_back(house: House) -> list[str]:
    """An hour back, and forward again."""
    return _jump(house, -HOUR)


def _jump(house: House, seconds: int) -> list[str]:
    assert house.clock is not None
    house.clock.set(seconds)
    time.sleep(house.chance.uniform(1.0, 4.0))
    house.clock.set(0)
    return []


# --- what is stored ---------------------------------------------------------------------------------------


def file_damaged(house: House) -> list[str]:
    """A capsule, sidecar or manifest is changed, cut, emptied, replaced or removed, while the server is up or down."""
    other, job_id = house.other(), house.completed("struck")
    files, foreign = house.files(job_id), house.files(other)
    before, untouched = house.answers(job_id), house.answers(other)
    kind = house.chance.choice(sorted(files))
    how = house.chance.choice(("flipped", "cut", "emptied", "replaced", "removed"))
    what, path, good = f"{kind} {how}", files[kind], files[kind].read_bytes()
    down = house.chance.random() < 0.4
    if down:
        house.server.stop()
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(_harmed(good, how, foreign[kind].read_bytes(), house.chance))
    if down:
        house.server.start()
    broken = house.differing(before, job_id, what)
    broken += house.differing(untouched, other, f"{what} of another job")
    broken += house.until(
        f"{what} is noticed, or mended from the capsule",
        lambda: house.server.job(job_id)["artifact"] is None or (path.is_file() and path.read_bytes() == good),
    )
    broken += house.differing(before, job_id, f"{what}, noticed")
    path.write_bytes(good)
    broken += house.until(f"{what}: whole again", lambda: house.server.job(job_id)["artifact"] is not None)
    return broken + [f"{what}: {route} is not as before" for route in house.unlike(before, job_id)]


def _harmed(good: bytes, how: str, foreign: bytes, chance: random.Random) -> bytes:
    if how == "flipped":
        at = chance.randrange(len(good))
        return good[:at] + bytes([good[at] ^ (1 << chance.randrange(8))]) + good[at + 1 :]
    if how == "cut":
        return good[: chance.randrange(1, len(good))]
    return foreign if how == "replaced" else b""


GARBAGE = (
    ("output", "{"),
    ("output", '{"artifact_ref": 1}'),
    ("manifest", "not JSON"),
    ("manifest", b"\xff\xfe"),
    ("error", "}{"),
    ("status", "banana"),
    ("stage", "nowhere"),
    ("created_at", "soon"),
    ("expires_at", 10**18),
    ("progress", "half"),
)
"""Columns, and what they come to hold."""


def row_damaged(house: House) -> list[str]:
    """A column of a job's row holds garbage, while the server is up or down."""
    other, job_id = house.other(), house.completed("struck")
    before, untouched = house.answers(job_id), house.answers(other)
    column, value = house.chance.choice(GARBAGE)
    down = house.chance.random() < 0.5
    if down:
        house.server.stop()
    with contextlib.closing(sqlite3.connect(house.server.root / "jobs.sqlite", timeout=30)) as database, database:
        was = database.execute(f"SELECT {column} FROM jobs WHERE id = ?", (job_id,)).fetchone()[0]
        database.execute(f"UPDATE jobs SET {column} = ? WHERE id = ?", (value, job_id))
    if down:
        house.server.start()
    what = f"row: {column} = {value!r}"
    broken = house.differing(before, job_id, what) + house.differing(untouched, other, f"{what} of another job")
    listed = house._all_jobs()
    broken += [f"{what}: a job is not listed" for known in (job_id, other) if known not in listed]
    broken += [f"{what}: listed as {listed[job_id]['status']}"] * (listed[job_id]["status"] not in ENDED)
    house.completed("after")
    if column in ("output", "manifest"):  # the record is made anew from the manifest
        broken += house.until(f"{what}: whole again", lambda: not house.unlike(before, job_id))
    else:
        with contextlib.closing(sqlite3.connect(house.server.root / "jobs.sqlite", timeout=30)) as database, database:
            database.execute(f"UPDATE jobs SET {column} = ? WHERE id = ?", (was, job_id))
    return broken


# --- houses -----------------------------------------------------------------------------------------------


@contextmanager
def disks(root: Path) -> Iterator[bool]:
    """Small file systems at ``root`` and at its artifacts; False where they cannot be mounted."""
    root.mkdir(parents=True)
    with ExitStack() as mounted:
        for folder in (root, root / "artifacts"):
            folder.mkdir(exist_ok=True)
            try:
                command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", folder]
                subprocess.run(command, check=True, capture_output=True, timeout=10)
                mounted.callback(subprocess.run, ["umount", "-l", folder], check=True, timeout=10)
            except (OSError, subprocess.CalledProcessError):
                yield False
                return
        yield True


@contextmanager
def plain(folder: Path, chance: random.Random) -> Iterator[tuple[House, list[Fault]]]:
    """A server with its children, its SQLite and its files."""
    faults = [
        Fault("server SIGKILL", server_killed),
        Fault("child SIGKILL", child_killed),
        Fault("database locked for 12 s", database_locked, share=5),
        Fault("stored file damaged", file_damaged),
        Fault("job's row damaged", row_damaged),
    ]
    with disks(folder / "root") as small:
        if small:
            faults += [Fault("disk full", disk_full), Fault("disk read-only", disk_read_only)]
        else:
            print("left out: disk full, disk read-only (only root may mount a file system for them)", flush=True)
        clock = None
        if shutil.which("cc"):
            clock = Clock(folder)
            faults += [Fault("clock a day ahead", clock_ahead), Fault("clock an hour back", clock_back)]
        else:
            print("left out: clock jumps (there is no C compiler)", flush=True)
        server = Server(
            folder / "root",
            env=clock.env if clock else {},
            worker_slots=2,
            small_job_frames=1_000,
            queue_capacity=1_000,
            max_attempts=5,
            scrub_seconds=SCRUB_SECONDS,
            disk_floor_bytes=0,
        )
        try:
            yield House(server.start(), chance, clock), faults
        finally:
            server.close()


@contextmanager
def over_postgres(folder: Path, chance: random.Random) -> Iterator[tuple[House, list[Fault]]]:
    """A server whose database stops and starts."""
    postgres = Postgres(durable=True).start()

    def gone(house: House) -> list[str]:
        house.chance.choice((postgres.stop, postgres.crash))()
        time.sleep(house.chance.uniform(0.2, AWAY_SECONDS))
        postgres.start()
        return []

    server = Server(folder / "root", database_url=postgres.new_database(), worker_slots=2, max_attempts=5)
    try:
        yield House(server.start(), chance), [Fault("database gone and back", gone)]
    finally:
        server.close()
        postgres.close()


class Gateway:
    """An S3 server that ends and starts again on the same port, with the same objects."""

    def __init__(self, folder: Path) -> None:
        (folder / BUCKET).mkdir(parents=True)
        self._folder = folder
        self._port = free_port()
        self.env = {
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "only-for-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self._port}",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MEMVID_EXPORT_S3_ADDRESSING": "path",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Gateway:
        """Start and wait until it answers."""
        keys = {"ROOT_ACCESS_KEY": "tests", "ROOT_SECRET_KEY": "only-for-tests"}
        command = [
            VERSITYGW,
            "--quiet",
            "--keep-alive",
            "--port",
            f"127.0.0.1:{self._port}",
            "posix",
            str(self._folder),
        ]
        with (self._folder.parent / "s3.log").open("ab") as log:
            self._process = subprocess.Popen(command, env={**os.environ, **keys}, stdout=log, stderr=log)
        for _ in range(600):
            with suppress(httpx.TransportError):
                httpx.get(self.env["AWS_ENDPOINT_URL_S3"], timeout=2)
                return self
            time.sleep(0.05)
        raise RuntimeError("the S3 server did not start")

    def stop(self) -> None:
        """End at once."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextmanager
def over_s3(folder: Path, chance: random.Random) -> Iterator[tuple[House, list[Fault]]]:
    """A server whose bucket goes away and comes back."""
    gateway = Gateway(folder / "s3").start()

    def gone(house: House) -> list[str]:
        gateway.stop()
        time.sleep(house.chance.uniform(0.2, 2 * AWAY_SECONDS))
        gateway.start()
        return []

    url = f"s3://{BUCKET}/host"
    server = Server(folder / "root", env=gateway.env, storage_url=url, worker_slots=2, max_attempts=8)
    try:
        yield House(server.start(), chance), [Fault("S3 gone and back", gone)]
    finally:
        server.close()
        gateway.stop()


@contextmanager
def over_runpod(folder: Path, chance: random.Random) -> Iterator[tuple[House, list[Fault]]]:
    """A server that hands jobs to a local Runpod and polls it; what both share is a folder."""
    shared = (folder / "shared").as_uri()
    env = {"MEMVID_EXPORT_ROOT": str(folder / "worker"), "MEMVID_EXPORT_STORAGE_URL": shared}
    with local_runpod(workers="1:2", env=env, idle_seconds=120.0) as platform:
        server = RunpodServer(folder / "root", platform, storage_url=shared)
        try:
            yield House(server.start(), chance), [Fault("poller SIGKILL", server_killed)]
        finally:
            server.close()


HOUSES = (plain, over_postgres, over_s3, over_runpod)


def run(folder: Path, times: int, seed: int, houses: Sequence[Any] = HOUSES) -> list[Outcome]:
    """Strike each fault so many times, in turn and in random order; prints a line for each."""
    chance = random.Random(seed)
    outcomes: list[Outcome] = []
    print(f"{'#':>3}  {'fault':26} {'at':>6}  {'jobs were in':40} ends", flush=True)
    for make in houses:
        room = folder / make.__name__
        room.mkdir()
        with make(room, chance) as (house, faults):
            strikes = [fault for fault in faults for _ in range(max(1, times // fault.share))]
            chance.shuffle(strikes)
            for fault in strikes:
                outcome = house.strike(fault, len(outcomes) + 1)
                outcomes.append(outcome)
                states = ", ".join(f"{n} {stage}" for stage, n in sorted(outcome.running.items())) or "none accepted"
                ends = ", ".join(f"{n} {end}" for end, n in sorted(outcome.ends.items())) or "-"
                print(f"{len(outcomes):>3}  {fault.name:26} {outcome.moment:5.2f}s  {states:40} {ends}", flush=True)
                for what in outcome.broken:
                    print(f"     BROKEN {what}", flush=True)
    return outcomes


def idle(outcomes: Sequence[Outcome]) -> list[str]:
    """Kinds of faults that only struck when there was no job, or all had come to their end."""
    struck = {outcome.fault for outcome in outcomes if outcome.running.keys() - {*ENDED, "download_ready"}}
    return sorted({outcome.fault for outcome in outcomes} - struck)


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """One line for each kind of fault, as Markdown."""
    lines = ["| fault | times | jobs were in | they ended | broken promises |", "| --- | --- | --- | --- | --- |"]
    for name in dict.fromkeys(sorted(outcome.fault for outcome in outcomes)):
        of = [outcome for outcome in outcomes if outcome.fault == name]
        running = sum((outcome.running for outcome in of), Counter[str]())
        ends = sum((outcome.ends for outcome in of), Counter[str]())
        were, ended = (", ".join(f"{n} {what}" for what, n in c.most_common()) or "–" for c in (running, ends))
        lines.append(f"| {name} | {len(of)} | {were} | {ended} | {sum(len(outcome.broken) for outcome in of)} |")
    return lines


def main() -> int:
    """The command line of ``scripts/faults host``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10, help="strikes of each fault (10)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="for the same moments again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memvid-faults-") as folder:
        outcomes = run(Path(folder), options.times, options.seed)
    ends = sum((outcome.ends for outcome in outcomes), Counter[str]())
    idly = idle(outcomes) if options.times >= JUDGED_TIMES else []
    broken = sum(len(outcome.broken) for outcome in outcomes) + len(idly)
    told = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    print(*table(outcomes), sep="\n")
    print(f"{len(outcomes)} faults (seed {options.seed}), {sum(ends.values())} accepted jobs: {told}")
    for fault in idly:
        print(f"BROKEN {fault}: never struck while a job ran")
    print(f"broken promises: {broken}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
