"""What sync adds to an insert, how far the graph is behind, and what large collections take; against a real server.

The documents are synthetic: unit vectors around centres, a dozen each, so that a document resembles some eleven others,
as those of real code do.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TextIO

import msgspec
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "control_plane")]  # servers that the tests start

from live_server import Server  # noqa: E402

from control_plane.nexus.signing import Signer  # noqa: E402

DIMENSION = 256
CLUSTER = 12
BATCH = 1_000
SECRET = "a secret of the benchmark's own"  # noqa: S105


class Inserts(NamedTuple):
    """Single inserts at a rate, with sync and without, in turn on the same server."""

    with_sync: list[float]
    """Seconds of each request."""
    without: list[float]
    out: list[float]
    """Seconds from the answer to each of ``with_sync`` until a listener had the event that the graph has it."""
    back: list[float]
    """Seconds from sending a signed webhook to the payload that shows it."""


class Bulk(NamedTuple):
    """Many documents by batches."""

    accepted: float
    """Seconds until the last batch was answered."""
    synced: float
    """Seconds from the first batch until the graph has all."""
    memory: int
    """Peak resident bytes of the server."""
    disk: int
    """Bytes of its folder."""
    verified: float
    """Seconds of comparing all documents and edges with the graph."""
    pairs: int
    different: int


def vectors(count: int, seed: int = 1) -> NDArray[np.float32]:
    """Shape (count, 256), rows of unit length."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, count // CLUSTER), DIMENSION)).astype(np.float32)
    found = centres[rng.integers(0, len(centres), count)]
    found += 0.45 * rng.normal(size=found.shape).astype(np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


@contextmanager
def running(folder: Path, **env: str) -> Iterator[Server]:
    """A server with an empty collection ``bench``."""
    folder.mkdir()
    server = Server(folder / "root", env={name: value for name, value in os.environ.items() if "NEXUS" in name} | env)
    try:
        server.start()
        server.client.put("/v1/collections/bench", json={"dimension": DIMENSION}).raise_for_status()
        yield server
    finally:
        server.close()


class _Take(BaseHTTPRequestHandler):
    """Notes of each event when it came."""

    log: ClassVar[TextIO]
    protocol_version = "HTTP/1.1"
    """Connections stay open, as those of a real receiver."""

    def do_POST(self) -> None:
        now = time.time()
        event = msgspec.json.decode(self.rfile.read(int(self.headers["content-length"])))
        if event["kind"] == "document.synced":
            print(event["document"]["id"], now, file=self.log, flush=True)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


def _take_events(told: Connection, log: Path) -> None:
    with log.open("w") as _Take.log, ThreadingHTTPServer(("127.0.0.1", 0), _Take) as server:
        told.send(server.server_port)
        server.serve_forever()


@contextmanager
def listener(log: Path) -> Iterator[str]:
    """The URL of one that takes events, and writes into ``log`` which document's came and when. It is a process of its
    own, so that what it does does not count as time of who inserts."""
    spawn = multiprocessing.get_context("spawn")
    mine, told = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_take_events, args=(told, log))
    process.start()
    try:
        yield f"http://127.0.0.1:{mine.recv()}/events"
    finally:
        process.kill()
        process.join()


def _heard(log: Path) -> dict[str, float]:
    """By document, when its first event came."""
    found: dict[str, float] = {}
    for line in log.read_text().splitlines():
        name, now = line.split()
        found.setdefault(name, float(now))
    return found


def inserts(folder: Path, *, count: int, rate: float, held: int) -> Inserts:
    """``count`` single inserts each way at ``rate`` a second, into a collection that holds ``held`` documents."""
    data, log = vectors(held + 2 * count), folder.with_suffix(".events")
    with (
        listener(log) as hook,
        running(folder, MEMVID_NEXUS_WEBHOOK_SECRET=SECRET, MEMVID_NEXUS_OUTBOUND_URL=hook) as server,
    ):
        load(server, data[:held], "held")
        settle(server)
        took: dict[bool, list[float]] = {True: [], False: []}
        answered: dict[str, float] = {}
        rounds = 4
        for turn in range(2 * rounds):
            on = turn % 2 == 0
            switch(server, on=on)
            begin, due = held + turn * count // rounds, time.perf_counter()
            for number in range(begin, begin + count // rounds):
                body = {"title": f"document {number}", "text": "what it says", "vector": data[number].tolist()}
                encoded, name = msgspec.json.encode(body), f"{'on' if on else 'off'}-{number}"
                time.sleep(max(0.0, due - time.perf_counter()))
                due += 1 / rate
                began = time.perf_counter()
                server.client.put(f"/v1/collections/bench/documents/{name}", content=encoded).raise_for_status()
                took[on].append(time.perf_counter() - began)
                answered[name] = time.time()
            if on:
                settle(server)
        switch(server, on=True)
        back = [webhook(server, f"on-{held + number}") for number in range(count // rounds)]
        deadline = time.monotonic() + 30
        wanted = [name for name in answered if name.startswith("on-")]
        while any(name not in (heard := _heard(log)) for name in wanted) and time.monotonic() < deadline:
            time.sleep(0.1)
    out = [heard.get(name, float("inf")) - answered[name] for name in wanted]
    return Inserts(took[True], took[False], out, back)


def load(server: Server, data: NDArray[np.float32], name: str) -> float:
    """Send documents in batches; answers the seconds."""
    began = time.perf_counter()
    for start in range(0, len(data), BATCH):
        documents = [
            {"id": f"{name}-{start + place}", "title": f"document {start + place}", "vector": vector.tolist()}
            for place, vector in enumerate(data[start : start + BATCH])
        ]
        body = msgspec.json.encode({"documents": documents})
        while True:
            answer = server.client.post("/v1/collections/bench/documents", content=body)
            if answer.status_code not in (429, 503):
                break
            time.sleep(float(answer.headers.get("retry-after", 1)))
        answer.raise_for_status()
    return time.perf_counter() - began


def settle(server: Server, every: float = 0.05) -> None:
    """Wait until the graph has every document, by a look every so many seconds: counting what waits takes the longer
    the more that is. Raises RuntimeError where one was given up."""
    while True:
        sync = server.client.get("/v1/collections/bench").raise_for_status().json()["sync"]
        if sync["failed"]:
            raise RuntimeError(f"documents were given up: {sync}")
        if not sync["pending"]:
            return
        time.sleep(every)


def switch(server: Server, *, on: bool) -> None:
    """Have the graph kept in step or not; waits until that is so, with all that waited, the comparison at its begin
    and the events before done."""
    server.client.post(f"/v1/nexus/{'enable' if on else 'disable'}").raise_for_status()
    if on:
        settle(server)
    while True:
        overview = server.client.get("/v1/nexus").raise_for_status().json()
        begun = overview["last"] is not None and overview["progress"] is None and not overview["outbound"]["waiting"]
        if overview["leads"] is on and (begun or not on):
            return
        time.sleep(0.05)


def webhook(server: Server, name: str) -> float:
    """Tell a property of a document's node as a graph would; answers the seconds until its payload shows it."""
    now = time.time_ns()
    body = msgspec.json.encode(
        {
            "eventId": f"event-{now}",
            "origin": "bench",
            "version": now // 1_000,
            "action": "upsert",
            "client": "default",
            "document": {"collection": "bench", "id": name},
            "properties": {"mark": str(now)},
        }
    )
    headers = {"content-type": "application/json", **Signer(SECRET).headers(body, now // 1_000_000)}
    began = time.perf_counter()
    server.client.post("/webhooks/nexus/node", content=body, headers=headers).raise_for_status()
    while True:
        document = server.client.get(f"/v1/collections/bench/documents/{name}").raise_for_status().json()
        if document["payload"].get("graph", {}).get("properties", {}).get("mark") == str(now):
            return time.perf_counter() - began


def bulk(folder: Path, count: int) -> Bulk:
    """``count`` documents into an empty collection, and a comparison of all of them with the graph."""
    with running(folder) as server:
        began = time.perf_counter()
        accepted = load(server, vectors(count), "bulk")
        settle(server, count / 1e5)
        synced = time.perf_counter() - began
        server.client.post("/v1/nexus/verify").raise_for_status()
        asked = time.perf_counter()
        while True:
            overview = server.client.get("/v1/nexus").raise_for_status().json()
            last = overview["last"]
            if overview["progress"] is None and last is not None and last["documents"] == count:
                break
            if time.perf_counter() - asked > 7_200:
                raise RuntimeError(f"the comparison did not end: {overview}")
            time.sleep(0.2)
        peak = next(line for line in Path(f"/proc/{server.pid}/status").read_text().splitlines() if "VmHWM" in line)
        disk = sum(path.stat().st_size for path in server.root.rglob("*") if path.is_file())
        different = sum(last["different"].values())
        found = Bulk(accepted, synced, int(peak.split()[1]) << 10, disk, last["seconds"], last["pairs"], different)
    shutil.rmtree(folder)
    return found


def percentile(values: list[float], share: float) -> float:
    """The value that ``share`` of all do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
