"""Many clients at once against a real server: they post, poll, stream, download, cancel and come back.

Run by ``scripts/load``. Whatever a client asks for must be answered, or refused with 429 or 503 and a ``Retry-After``;
every export that was accepted must end, with a log without gaps and files whose hashes are those of its manifest.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import hashlib
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import aiohttp
from live_server import ENDED, KEY, TERMINAL, Server, graph
from processes import EXAMPLE
from rich.console import Console
from rich.table import Table

CHEAP = ("job", "events", "list", "report", "manifest")
"""Routes that read little; their p99 has a goal."""
GOAL_MS = 100.0
SAMPLE_SECONDS = 1.0
REST_SECONDS = (2.0, 8.0)
"""Between an export's end and the client's next one."""
POLL_SECONDS = (0.5, 1.5)
END_SECONDS = 120.0
"""After the last request every export that was accepted must have ended within so long."""
FLAT_MEMORY = 1.10
FLAT_HANDLES = 1.10


class Broken(Exception):
    """A promise that was not kept."""


class Body(NamedTuple):
    """A request body, and how often clients send it."""

    name: str
    data: bytes
    headers: dict[str, str]
    share: int


class Sample(NamedTuple):
    """What the server holds at a moment."""

    memory: int
    """Bytes of private memory of the server's own process."""
    handles: int


class Load:
    """The clients, and what they saw."""

    def __init__(self, server: Server, *, clients: int, seconds: float, seed: int) -> None:
        self._server = server
        self._clients = clients
        self._seconds = seconds
        self._seed = seed
        self._bodies = _bodies()
        self.millis: dict[str, list[float]] = defaultdict(list)
        self.statuses: dict[str, Counter[int]] = defaultdict(Counter)
        self.accepted: dict[str, str] = {}
        """From job ids to what became of them, as the clients saw it."""
        self.broken: list[str] = []
        self.samples: list[Sample] = []
        self.bytes = 0
        self.database = 0
        """Bytes of the job store at the end."""

    async def run(self) -> None:
        """All clients, until their time is over and every export has ended."""
        connector = aiohttp.TCPConnector(limit=0)
        headers = {"Authorization": f"Bearer {KEY}"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
        async with aiohttp.ClientSession(
            self._server.url, connector=connector, headers=headers, timeout=timeout, auto_decompress=False
        ) as self._http:
            self._until = time.monotonic() + self._seconds
            watch = asyncio.create_task(self._watch())
            chance = random.Random(self._seed)
            clients = [self._client(random.Random(chance.random()), n) for n in range(self._clients)]
            for ended in await asyncio.gather(*clients, return_exceptions=True):
                if isinstance(ended, BaseException):
                    self.broken.append(f"a client stopped: {type(ended).__name__}: {ended}")
            watch.cancel()
            await self._all_end()
        self.database = sum(path.stat().st_size for path in self._server.root.glob("jobs.sqlite*"))

    # --- one client -----------------------------------------------------------------------------

    async def _client(self, chance: random.Random, number: int) -> None:
        await asyncio.sleep(chance.uniform(0, min(10.0, self._seconds / 5)))
        turn = 0
        while time.monotonic() < self._until:
            turn += 1
            try:
                await self._export(chance, f"load-{self._seed}-{number}-{turn}")
            except (Broken, aiohttp.ClientError, TimeoutError) as error:
                self.broken.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(chance.uniform(*REST_SECONDS))

    async def _export(self, chance: random.Random, key: str) -> None:
        (body,) = chance.choices(self._bodies, [body.share for body in self._bodies])
        job = await self._post(body, key, chance)
        if job is None:
            return
        self.accepted.setdefault(job, "")
        if chance.random() < 0.05 and await self._post(body, key, chance) not in (job, None):
            raise Broken("an Idempotency-Key gave a second job")
        if chance.random() < 0.1:
            await asyncio.sleep(chance.uniform(0, 1))
            await self._asked("cancel", "DELETE", f"/v1/exports/{job}")
        status = await (self._streamed(job, chance) if chance.random() < 0.5 else self._polled(job, chance))
        self.accepted[job] = status
        if status == "completed":
            await self._fetched(job, chance)
        await self._asked("list", "GET", "/v1/exports?limit=20")

    async def _post(self, body: Body, key: str, chance: random.Random) -> str | None:
        while time.monotonic() < self._until:
            headers = {**body.headers, "Idempotency-Key": key}
            answer = await self._asked("post", "POST", "/v1/exports", data=body.data, headers=headers)
            if isinstance(answer, float):
                rest = max(0.0, self._until - time.monotonic())
                await asyncio.sleep(min(rest, answer * chance.uniform(1, 1.5)))
            else:
                return str(json.loads(answer)["jobId"])
        return None

    async def _polled(self, job: str, chance: random.Random) -> str:
        since = 0
        while True:
            page = await self._asked("events", "GET", f"/v1/exports/{job}/events?sinceSeq={since}")
            if not isinstance(page, float):
                events = json.loads(page)["events"]
                if [event["seq"] for event in events] != list(range(since + 1, since + 1 + len(events))):
                    raise Broken(f"the log of {job} has a gap")
                since += len(events)
                if events and events[-1]["type"] in TERMINAL:
                    found = await self._asked("job", "GET", f"/v1/exports/{job}")
                    if not isinstance(found, float):
                        return str(json.loads(found)["status"])
            await asyncio.sleep(chance.uniform(*POLL_SECONDS))

    async def _streamed(self, job: str, chance: random.Random) -> str:
        since = 0
        while True:
            leaves = chance.random() < 0.2
            headers = {"Last-Event-ID": str(since)}
            async with self._http.get(f"/v1/exports/{job}/events/stream", headers=headers) as answer:
                self.statuses["stream"][answer.status] += 1
                if answer.status == 429:
                    await asyncio.sleep(float(answer.headers["Retry-After"]))
                    continue
                if answer.status != 200:
                    raise Broken(f"stream: {answer.status} {await answer.text()}")
                seen = 0
                async for line in answer.content:
                    if not line.startswith(b"data:"):
                        continue
                    event = json.loads(line[5:])
                    if event["seq"] != since + 1:
                        raise Broken(f"the stream of {job} jumps from {since} to {event['seq']}")
                    since, seen = event["seq"], seen + 1
                    if event["type"] in TERMINAL:
                        return str(event["type"]).removeprefix("job_")
                    if leaves and seen >= 3:
                        break
                else:
                    raise Broken(f"the stream of {job} ended before the export")

    async def _fetched(self, job: str, chance: random.Random) -> None:
        manifest = await self._asked("manifest", "GET", f"/v1/exports/{job}/manifest")
        await self._asked("report", "GET", f"/v1/exports/{job}/report")
        if isinstance(manifest, float):
            return
        part = json.loads(manifest)["parts"][0]
        size, cut = part["sizeBytes"], 0
        data = b""
        ranges = ["" if chance.random() < 0.7 else "halves"]
        if ranges == ["halves"]:
            cut = size // 2
            ranges = [f"bytes=0-{cut - 1}", f"bytes={cut}-"]
        for wanted in ranges:
            while True:
                headers = {"Range": wanted} if wanted else {}
                piece = await self._asked("download", "GET", f"/v1/exports/{job}/download", headers=headers)
                if not isinstance(piece, float):
                    break
                await asyncio.sleep(piece)
            data += piece
        self.bytes += len(data)
        if hashlib.sha256(data).hexdigest() != part["sha256"]:
            raise Broken(f"the capsule of {job} is not the one that its manifest names")
        if chance.random() < 0.3:
            query = quote(chance.choice(["call", "retry a job", "client", "read settings"]))
            await self._asked("search", "GET", f"/v1/exports/{job}/search?q={query}&mode=lexical")

    async def _asked(self, route: str, method: str, path: str, **more: Any) -> bytes | float:
        """The body of a good answer, or the seconds after which a refused request may come again."""
        begun = time.perf_counter()
        async with self._http.request(method, path, **more) as answer:
            body = await answer.read()
        self.millis[route].append((time.perf_counter() - begun) * 1000)
        self.statuses[route][answer.status] += 1
        if answer.status < 300:
            return body
        if answer.status in (429, 503) and "Retry-After" in answer.headers and json.loads(body)["error"]["code"]:
            return float(answer.headers["Retry-After"])
        raise Broken(f"{route}: {answer.status} {body[:300]!r}")

    # --- the server -----------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            self.samples.append(_sample(self._server.pid))
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _all_end(self) -> None:
        """Every accepted export, also those that nobody followed to their end, and what the server says of them."""
        deadline = time.monotonic() + END_SECONDS
        for job, seen in list(self.accepted.items()):
            while True:
                found = await self._asked("job", "GET", f"/v1/exports/{job}")
                status = "" if isinstance(found, float) else json.loads(found)["status"]
                if status in ENDED or time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.2)
            if status not in ENDED:
                self.broken.append(f"{job} has not ended")
            elif seen and seen != status:
                self.broken.append(f"{job} was seen {seen} and is {status}")
            if status == "failed":
                self.broken.append(f"{job} failed: {json.loads(found)['error']}")  # type: ignore[arg-type]
            self.accepted[job] = status

    # --- what came of it ------------------------------------------------------------------------

    def judge(self) -> None:
        """Compare with what was promised of a run of minutes; what was lost stands in ``broken`` already."""
        cheap = sorted(took for route in CHEAP for took in self.millis[route])
        if _percentile(cheap, 99) > GOAL_MS:
            self.broken.append(f"p99 of cheap routes is {_percentile(cheap, 99):.0f} ms, of {GOAL_MS:.0f}")
        for name, flat in (("memory", FLAT_MEMORY), ("handles", FLAT_HANDLES)):
            early, late = self._thirds(name)
            if late > early * flat:
                self.broken.append(f"{name} grew from {early:,.0f} to {late:,.0f}")

    def _thirds(self, name: str) -> tuple[float, float]:
        """The median of the second and of the last third of the run: the first one fills caches."""
        values = [getattr(sample, name) for sample in self.samples]
        third = max(1, len(values) // 3)
        return _percentile(sorted(values[third : 2 * third]), 50), _percentile(sorted(values[-third:]), 50)

    def show(self, console: Console) -> None:
        """Print the tables."""
        ends = Counter(self.accepted.values())
        total = sum(len(found) for found in self.millis.values())
        console.print(
            f"{self._clients} clients, {self._seconds:.0f} s, seed {self._seed}: {total:,} requests, "
            f"{len(self.accepted):,} exports accepted ({', '.join(f'{n:,} {s}' for s, n in ends.most_common())}), "
            f"{self.bytes / 1e9:.2f} GB of capsules downloaded and hashed; broken promises: {len(self.broken)}"
        )
        table = Table("route", *(["answers", "p50 ms", "p95 ms", "p99 ms", "most ms"]), "statuses")
        for route in [*self.millis, *([] if "stream" in self.millis else ["stream"])]:
            found = sorted(self.millis.get(route, []))
            figures = [f"{_percentile(found, p):.1f}" if found else "–" for p in (50, 95, 99, 100)]
            statuses = ", ".join(f"{count:,} × {status}" for status, count in sorted(self.statuses[route].items()))
            table.add_row(route, f"{sum(self.statuses[route].values()):,}", *figures, statuses)
        cheap = sorted(took for route in CHEAP for took in self.millis[route])
        table.add_row("all cheap", f"{len(cheap):,}", *(f"{_percentile(cheap, p):.1f}" for p in (50, 95, 99, 100)), "")
        console.print(table)
        memory, handles = self._thirds("memory"), self._thirds("handles")
        console.print(
            f"server: {memory[0] / 1e6:.0f} MB in the second third, {memory[1] / 1e6:.0f} MB in the last; "
            f"file handles {handles[0]:.0f} and {handles[1]:.0f}; "
            f"database {self.database / 1e3 / max(1, len(self.accepted)):.1f} kB for each export"
        )
        for what, count in Counter(self.broken).most_common(20):
            console.print(f"BROKEN {count} × {what}")


def _percentile(ordered: list[Any], percent: float) -> float:
    return float(ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]) if ordered else 0.0


def _sample(pid: int) -> Sample:
    status = Path(f"/proc/{pid}/status").read_text()
    anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return Sample(int(anonymous.split()[1]) << 10, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()))


def _bodies() -> list[Body]:
    plain = {"Content-Type": "application/json"}
    packed = {**plain, "Content-Encoding": "gzip"}
    semantic = {"semanticEnabled": True}
    return [
        Body("tiny", json.dumps(graph(3)).encode(), plain, 6),
        Body("small", gzip.compress(json.dumps(graph(300, lines=6, name="small")).encode()), packed, 3),
        Body(
            "small, semantic",
            gzip.compress(json.dumps(graph(100, lines=3, name="meaning", options=semantic)).encode()),
            packed,
            2,
        ),
        Body(
            "this project",
            EXAMPLE.read_bytes(),
            {"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip", **_named("memvid-export.ndjson")},
            1,
        ),
    ]


def _named(name: str) -> dict[str, str]:
    return {"Content-Disposition": f"attachment; filename={name}"}


def main() -> None:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--clients", type=int, default=200)
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="memvid-load-") as folder:
        server = Server(Path(folder) / "root").start()
        load = Load(server, clients=given.clients, seconds=given.minutes * 60, seed=given.seed)
        try:
            asyncio.run(load.run())
        finally:
            server.close()
        if given.minutes >= 5:  # growth does not show in less
            load.judge()
    load.show(Console(width=140, highlight=False))
    sys.exit(bool(load.broken))


if __name__ == "__main__":
    main()
