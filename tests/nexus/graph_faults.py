"""Faults at random moments while documents come, change and go: what was accepted is there, and the graph says so too.

``scripts/faults nexus --times 200`` runs the campaign over the embedded graph, and where ``NEXUS_SERVER_BIN`` names the
program of a Nexus server over that too, behind a proxy that fails as told; prints a table for each. The tests run a
short form of it.

Some faults strike while three collections of one space are written, then the load rests. Once the server says that all
is in step, everything is looked at from outside: each document, as it was accepted last; what a comparison by the
server finds; and, after both servers have ended, the graph as it lies on the disk beside a computation of its own. Of
requests without an answer it is not known whether they happened, but each did as a whole or not at all.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from live_server import KEY, Server
from nexus.brute_force import pairs
from nexus.nexus_server import PROGRAM, NexusServer
from processes import answering

from control_plane.nexus.engine import MARK
from control_plane.nexus.graph.ladybug import LadybugGraph
from control_plane.nexus.graph.nexus import NexusGraph
from control_plane.nexus.graph.port import DocumentNode, GraphStore
from control_plane.nexus.part import GRAPH_FILE
from control_plane.nexus.records import Vector

SERVER_KILLED, SERVER_STOPPED = "server SIGKILL", "server SIGTERM"
GRAPH_KILLED, GRAPH_STOPPED, GRAPH_AWAY = "graph SIGKILL", "graph SIGTERM", "graph away for seconds"
BOTH_KILLED = "both SIGKILL"
SLOW, REFUSED, ERROR, CUT = "graph slow", "graph: 503", "graph: error under 200", "answer cut"
LOST, HALF = "answer lost", "half of a batch"
OF_THE_EMBEDDED = {SERVER_KILLED: 3, SERVER_STOPPED: 1}
"""Faults, and how often each comes beside the others."""
OF_NEXUS = {SERVER_KILLED: 4, GRAPH_KILLED: 4, BOTH_KILLED: 4} | dict.fromkeys(
    (SERVER_STOPPED, GRAPH_STOPPED, GRAPH_AWAY, SLOW, REFUSED, ERROR, CUT, LOST, HALF), 1
)
ERRORS = ("Execution error: out of the blue", "Type mismatch: out of the blue")
"""One that may pass, and one that the adapter takes for a refusal of what it brought."""
FAILED_REQUESTS = 3
"""At most that one fault of the proxy meets: so few that no document is given up for them."""
AT_ONCE = 3
"""Faults at most, before all is looked at."""
LATEST = 1.5
"""Seconds from an accepted request to the latest fault."""
AWAY_SECONDS = 2.0, 8.0
SLOW_SECONDS = 0.2, 3.0
WAIT = 180.0
"""Seconds in which whatever has to come must come."""

COLLECTIONS = "one", "two", "three"
NAMES, BEGUN = 70, 45
"""Ids of a collection, of which some three quarters are there; and documents that it begins with."""
DIMENSION = 32
CENTRES = 5
SPREAD = 0.15, 0.7
"""Noise beside a centre: scores on both sides of the threshold."""
PAUSE = 0.05
"""Seconds at most between two requests of a writer."""
LARGEST_BATCH = 12
SAID = {
    "": (),
    "see src/a.py for it": ("path:src/a.py",),
    "it calls parse_graph there": ("identifier:parse_graph",),
    "parse_graph in src/a.py, by Ada Lovelace, of https://example.com/x": (
        "identifier:parse_graph",
        "path:src/a.py",
        "name:Ada Lovelace",
        "url:https://example.com/x",
    ),
}
"""Texts, and the entities that they name."""
TYPES = {"": "general", "note": "general", "contract": "legal", "invoice": "financial"}
"""And the domains that they belong to."""


# --- what was said -------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a document may be."""

    request: int
    """That made it so."""
    said: Mapping[str, Any] | None
    """The document as it was sent; None: it is not there."""

    def fits(self, view: Mapping[str, Any] | None) -> bool:
        """Whether a document is shown so."""
        if self.said is None or view is None:
            return self.said is None and view is None
        sent = np.array(self.said["vector"])
        same = all(view[name] == self.said[name] for name in ("title", "text", "payload", "docType"))
        return same and np.allclose(view["vector"], sent / np.linalg.norm(sent), atol=1e-6)


class Kept(NamedTuple):
    """A document that is there."""

    node: DocumentNode
    """As the graph should have it, but for the id of its row."""
    vector: Vector
    mentions: frozenset[str]


class Writer:
    """Writes, changes and deletes documents of one collection, one request after the other, and knows what became of
    them."""

    def __init__(self, server: Server, collection: str, seed: int) -> None:
        self.collection = collection
        self.accepted = self.unanswered = 0
        self.broken: list[str] = []
        """Promises that were not kept."""
        self._states = {f"d{number}": [State(0, None)] for number in range(NAMES)}
        """What each may be, in the order in which it was said; only one once that is known."""
        self._seen: dict[str, dict[str, Any]] = {}
        """Documents as they were shown whole."""
        self._version = 0
        self._there = False
        """The collection is known to be there."""
        self._numbers = itertools.count(1)
        self._chance = random.Random(f"{seed} {collection}")
        self._rng = np.random.default_rng([seed, *collection.encode()])
        centres = np.random.default_rng(seed).normal(size=(CENTRES, DIMENSION))
        self._centres = centres / np.linalg.norm(centres, axis=1, keepdims=True)
        self._http = httpx.Client(
            base_url=f"{server.url}/v1/collections/{collection}",
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=60,
            trust_env=False,
        )

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def begin(self) -> None:
        """Make the collection, with some documents."""
        if self.ready():
            self._write_some(BEGUN)

    def run(self, stop: threading.Event) -> None:
        """Write until told to stop."""
        acts = (self._write, self._write_some, self._delete, self._delete_some, self._drop)
        while not stop.is_set():
            if self.ready():
                self._chance.choices(acts, (45, 25, 15, 14, 1))[0]()
            stop.wait(self._chance.uniform(0, PAUSE))

    def ready(self) -> bool:
        """Make the collection where it is not known to be there; whether it is."""
        if not self._there:
            answer = self._ask("PUT", "", {}, {"dimension": DIMENSION, "model": "own"})
            self._there = answer is not None
            if answer is not None and answer.status_code == 201:
                for name, states in self._states.items():
                    if all(state.said is not None for state in states):
                        self._break(f"{name} is gone with the collection")
                self._set(dict.fromkeys(self._states, State(0, None)))
        return self._there

    def _write(self) -> None:
        name = self._chance.choice([*self._states])
        new = {name: self._new()}
        before = self._before(new)
        if answer := self._ask("PUT", f"/documents/{name}", new, new[name].said):
            self._written([answer.json()], new, before)

    def _write_some(self, count: int | None = None) -> None:
        number, names = next(self._numbers), self._some(count)
        new = {name: self._new()._replace(request=number) for name in names}
        before = self._before(new)
        body = {"documents": [{"id": name, **(state.said or {})} for name, state in new.items()]}
        if answer := self._ask("POST", "/documents", new, body):
            self._written(answer.json()["documents"], new, before)

    def _written(self, told: list[Any], new: dict[str, State], before: dict[str, set[bool]]) -> None:
        if [one["id"] for one in told] != [*new]:
            self._break(f"{[*new]} were answered with {told}")
        for one in told:
            if one["version"] <= self._version:
                self._break(f"version {one['version']} came after {self._version}")
            self._version = one["version"]
            if one["created"] not in {not there for there in before[one["id"]]}:
                self._break(f"{one['id']} was{'' if one['created'] else ' not'} created anew")
        self._accept(new)

    def _delete(self) -> None:
        name = self._chance.choice([*self._states])
        gone = {name: State(next(self._numbers), None)}
        before = self._before(gone)
        if answer := self._ask("DELETE", f"/documents/{name}", gone, None, allowed=404):
            if (answer.status_code != 404) not in before[name]:
                self._break(f"the deletion of {name} was answered with {answer.status_code}")
            self._accept(gone)

    def _delete_some(self) -> None:
        number, names = next(self._numbers), self._some()
        gone = {name: State(number, None) for name in names}
        before = self._before(gone)
        if answer := self._ask("POST", "/deletions", gone, {"ids": names}):
            least, most = (sum(kind(there) for there in before.values()) for kind in (all, any))
            if not least <= answer.json()["deleted"] <= most:
                self._break(f"{answer.json()['deleted']} of {least} to {most} were deleted")
            self._accept(gone)

    def _drop(self) -> None:
        gone = dict.fromkeys(self._states, State(next(self._numbers), None))
        self._there = False
        if self._ask("DELETE", "", gone, None):
            self._accept(gone)

    def _new(self) -> State:
        number = next(self._numbers)
        centre, spread = self._chance.choice(self._centres), self._chance.uniform(*SPREAD)
        same = self._chance.random() < 0.15
        noise = 0 if same else spread * self._rng.normal(size=DIMENSION) / np.sqrt(DIMENSION)
        said = {
            "title": f"as of {number}",
            "text": self._chance.choice([*SAID]),
            "payload": {"number": number},
            "docType": self._chance.choice([*TYPES]),
            "vector": (centre + noise).tolist(),
        }
        return State(number, said)

    def _some(self, count: int | None = None) -> list[str]:
        return self._chance.sample([*self._states], count or self._chance.randint(2, LARGEST_BATCH))

    def _before(self, names: Mapping[str, State]) -> dict[str, set[bool]]:
        """Whether each may be there, and may not."""
        return {name: {state.said is not None for state in self._states[name]} for name in names}

    def _ask(
        self, method: str, path: str, wanted: Mapping[str, State], body: object, *, allowed: int = 200
    ) -> httpx.Response | None:
        """The answer to a request that makes documents what is ``wanted``; None: there was none that says so."""
        for name, state in wanted.items():
            self._states[name].append(state)
        try:
            answer = self._http.request(method, path, json=body)
        except httpx.ConnectError:  # nobody heard of it
            self._undo(wanted)
            return None
        except httpx.TransportError as error:
            if isinstance(error, httpx.TimeoutException):
                self._break(f"{method} {path} was not answered within a minute")
            self.unanswered += 1
            return None
        if answer.is_success or answer.status_code == allowed:
            return answer
        if answer.status_code < 500:
            self._undo(wanted)
        else:
            self.unanswered += 1
        if answer.status_code not in (429, 503):
            self._break(f"{method} {path} was answered with {answer.status_code}: {answer.text[:300]}")
        return None

    def _undo(self, wanted: Mapping[str, State]) -> None:
        for name in wanted:
            self._states[name].pop()

    def _accept(self, wanted: Mapping[str, State]) -> None:
        self.accepted += 1
        self._set(wanted)

    def _set(self, known: Mapping[str, State]) -> None:
        for name, state in known.items():
            self._states[name] = [state]

    def _break(self, what: str) -> None:
        self.broken.append(f"{self.collection}: {what}")

    # --- what became of it -------------------------------------------------------------------------------------------

    def look(self) -> dict[str, Kept]:
        """All documents that are there; whatever may not be so is a broken promise. Nobody writes meanwhile."""
        views = self._views()
        happened: dict[int, set[bool]] = defaultdict(set)
        kept: dict[str, Kept] = {}
        for name, states in self._states.items():
            view = views.pop(name, None)
            fit = [state for state in states if state.fits(view)]
            if not fit:
                known = [None if one.said is None else one.said["title"] for one in states]
                self._break(f"{name} is {view and view['title']!r}, not of {known}; it is shown as {view}")
            elif len(fit) == 1:
                at = states.index(fit[0])
                happened[fit[0].request].add(True)
                for later in states[at + 1 :]:
                    happened[later.request].add(False)
            if view is not None:
                kept[name] = self._kept(view)
                if view["sync"]["status"] != "synced":
                    self._break(f"{name} is {view['sync']} where all is in step")
                if fit and kept[name].node.domain != TYPES[view["docType"]]:
                    self._break(f"{name} belongs to {view['domain']}")
            self._states[name] = fit[:1] or states
        for name in views:
            self._break(f"{name} was never written")
        for number, said in happened.items():
            if len(said) == 2:
                self._break(f"request {number} happened by half")
        return kept

    def _kept(self, view: Mapping[str, Any]) -> Kept:
        node = DocumentNode(
            id=0,
            vector_id=view["id"],
            client="default",
            collection=self.collection,
            title=view["title"],
            domain=view["domain"],
            doc_type=view["docType"],
            created_at=round(datetime.fromisoformat(view["createdAt"]).timestamp() * 1_000),
            version=view["version"],
        )
        return Kept(node, np.array(view["vector"], dtype=np.float32), frozenset(SAID.get(view["text"], ())))

    def _views(self) -> dict[str, dict[str, Any]]:
        """Documents as they are shown, whole, by their ids; of those that have not changed only the list is asked."""
        found: dict[str, dict[str, Any]] = {}
        cursor: str | None = ""
        while cursor is not None:
            params = {"limit": "100"} | ({"cursor": cursor} if cursor else {})
            page = self._http.get("/documents", params=params).raise_for_status().json()
            for line in page["documents"]:
                seen = self._seen.get(line["id"])
                if seen is None or seen["version"] != line["version"]:
                    path = f"/documents/{line['id']}"
                    seen = self._http.get(path, params={"vector": "true"}).raise_for_status().json()
                found[line["id"]] = {**line, "text": seen["text"], "vector": seen["vector"]}
            cursor = page["nextCursor"]
        self._seen = dict(found)
        return found


# --- the graph -----------------------------------------------------------------------------------------------------


class Differences(NamedTuple):
    """What a graph holds otherwise than it should."""

    pairs: int
    """That it should hold."""
    found: list[str]


def differences(graph: GraphStore, documents: Mapping[tuple[str, str], Kept]) -> Differences:
    """Compare all that a graph holds with what is computed of these documents, by collection and id."""
    held = graph.read(graph.documents(MARK, sys.maxsize))
    found, rows = [], dict[int, Kept]()
    missing = dict(documents)
    for row, one in sorted(held.items()):
        node = one.node
        kept = None if node is None else missing.pop((node.collection, node.vector_id), None)
        if kept is None or node is None:
            found.append(f"document {row} is left over: {node}")
            continue
        rows[row] = kept
        if node != kept.node._replace(id=row):
            found.append(f"document {row} is {node}, not {kept.node}")
        if one.mentions != kept.mentions:
            found.append(f"document {row} mentions {sorted(one.mentions)}, not {sorted(kept.mentions)}")
    found += [f"document {name} of {collection} is missing" for collection, name in missing]
    found += [f"document {row} has edges of one direction: {one.lopsided}" for row, one in held.items() if one.lopsided]
    right = pairs({row: kept.vector for row, kept in rows.items()})
    similar = {(row, other): score for row, one in held.items() for other, score in one.similar.items()}
    for a, b in sorted(right.keys() | {(min(ends), max(ends)) for ends in similar}):
        both = similar.get((a, b)), similar.get((b, a))
        if both != (right.get((a, b)),) * 2:
            found.append(f"pair {a}, {b} is {both}, not {right.get((a, b))}")
    entities = {entity for kept in rows.values() for entity in kept.mentions}
    found += [f"entity {key} is there wrongly" for key in {*graph.entities("", sys.maxsize)} ^ entities]
    return Differences(len(right), found)


class Ours(Server):
    """Our server, and since when it runs."""

    started = 0
    """In milliseconds since 1970."""

    def start(self) -> Ours:
        """Start and wait until it is ready."""
        self.started = int(time.time() * 1_000)
        super().start()
        return self


class House:
    """A graph, and what can happen to it and to our server."""

    faults: Mapping[str, int] = OF_THE_EMBEDDED

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.env: dict[str, str] = {}
        """Of our server."""

    def strike(self, fault: str, ours: Ours) -> list[str]:
        """Let a fault happen, and pass; answers the promises that were broken."""
        status = 0
        if fault == SERVER_STOPPED:
            status = ours.stop()
        else:
            ours.kill()
        ours.start()
        return [f"a server that was told to end did with {status}"] if status else []

    @contextmanager
    def on_disk(self, *, kill: bool) -> Iterator[GraphStore]:
        """What is on the disk, where our server has ended; ``kill``: nobody tidies up first."""
        raise NotImplementedError

    def close(self) -> None:
        """End what runs."""


class Embedded(House):
    """The graph is a file of our server."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        super().__init__(chance)
        self._file = folder / "root" / GRAPH_FILE
        self._copies = folder / "copies"

    @contextmanager
    def on_disk(self, *, kill: bool) -> Iterator[GraphStore]:
        """A copy of the files: opening them may change them."""
        self._copies.mkdir()
        for path in self._file.parent.glob(f"{self._file.name}*"):
            shutil.copy(path, self._copies)
        graph = LadybugGraph(self._copies / self._file.name)
        try:
            graph.prepare()
            yield graph
        finally:
            graph.close()
            shutil.rmtree(self._copies)


class Proxy:
    """Passes requests on to a Nexus server, but for some that meet a fault."""

    def __init__(self, upstream: str, chance: random.Random) -> None:
        self._host = upstream.removeprefix("http://")
        self._chance = chance
        self._lock = threading.Condition()
        self._fault = ""
        self._left = 0

    def meet(self, fault: str, requests: int) -> bool:
        """Let so many requests meet a fault; whether they came."""
        with self._lock:
            self._fault, self._left = fault, requests
            came = self._lock.wait_for(lambda: not self._left, WAIT)
            self._left = 0
        return came

    def _take(self, body: bytes) -> str:
        with self._lock:
            if not self._left or (self._fault == HALF and _half(body) == body):
                return ""
            self._left -= 1
            self._lock.notify_all()
            return self._fault

    @contextmanager
    def running(self) -> Iterator[str]:
        """Its URL."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy._answer(self, body)

            do_GET = do_POST = _pass  # noqa: N815

        with answering(Handler) as url:
            yield url

    def _answer(self, asked: BaseHTTPRequestHandler, body: bytes) -> None:
        fault = self._take(body)
        if fault == REFUSED:
            _say(asked, 503, {"Retry-After": "1"}, b'{"error": "overloaded"}')
            return
        if fault == ERROR:
            said = {"columns": [], "rows": [], "execution_time_ms": 0, "error": self._chance.choice(ERRORS)}
            _say(asked, 200, {"Content-Type": "application/json"}, json.dumps(said).encode())
            return
        if fault == SLOW:
            time.sleep(self._chance.uniform(*SLOW_SECONDS))
        try:
            status, headers, data = self._forward(asked, _half(body) if fault == HALF else body)
        except (OSError, http.client.HTTPException):
            asked.close_connection = True
            return
        if fault in (LOST, HALF):
            asked.close_connection = True
            return
        _say(asked, status, headers, data, cut=fault == CUT)

    def _forward(self, asked: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        left_out = ("connection", "content-length", "transfer-encoding")
        connection = http.client.HTTPConnection(self._host, timeout=60)
        try:
            headers = {name: value for name, value in asked.headers.items() if name.lower() not in left_out}
            connection.request(asked.command, asked.path, body=body, headers=headers)
            answer = connection.getresponse()
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in left_out}
            return answer.status, kept, answer.read()
        finally:
            connection.close()


_CREATE = re.compile(r"(MATCH .*\) CREATE )(\(.*\))( RETURN 1 AS one)")


def _half(body: bytes) -> bytes:
    """A request with half of what it brings; the same where it does not bring several things."""
    asked = json.loads(body) if body else {}
    rows = asked.get("parameters", {}).get("rows", [])
    if len(rows) > 1:
        return json.dumps(asked | {"parameters": {"rows": rows[: len(rows) // 2]}}).encode()
    if (found := _CREATE.fullmatch(asked.get("query", ""))) and len(made := found[2].split(", (")) > 1:
        return json.dumps(asked | {"query": found[1] + ", (".join(made[: len(made) // 2]) + found[3]}).encode()
    return body


def _say(
    asked: BaseHTTPRequestHandler, status: int, headers: Mapping[str, str], data: bytes, *, cut: bool = False
) -> None:
    asked.send_response_only(status)
    for name, value in headers.items():
        asked.send_header(name, value)
    asked.send_header("Content-Length", str(len(data)))
    asked.end_headers()
    asked.wfile.write(data[: len(data) // 2] if cut else data)
    asked.close_connection = asked.close_connection or cut


class Nexus(House):
    """The graph is in a real Nexus server, behind a proxy."""

    faults = OF_NEXUS

    def __init__(self, folder: Path, chance: random.Random) -> None:
        super().__init__(chance)
        self._server = NexusServer(folder / "nexus")
        self._proxy = Proxy(self._server.url, chance)
        self._stack = ExitStack()
        self._server.start()
        self._stack.callback(self._server.kill)
        self.env["MEMVID_NEXUS_URL"] = self._stack.enter_context(self._proxy.running())

    def strike(self, fault: str, ours: Ours) -> list[str]:
        """Ends a server, or both, or has the proxy do something to some requests."""
        if fault in (SERVER_KILLED, SERVER_STOPPED):
            return super().strike(fault, ours)
        if fault == BOTH_KILLED:
            for acts in ((ours.kill, self._server.kill), (ours.start, self._server.start)):
                for act in self.chance.sample(acts, 2):
                    act()
        elif fault in (GRAPH_KILLED, GRAPH_STOPPED, GRAPH_AWAY):
            (self._server.stop if fault == GRAPH_STOPPED else self._server.kill)()
            if fault == GRAPH_AWAY:
                time.sleep(self.chance.uniform(*AWAY_SECONDS))
            self._server.start()
        elif not self._proxy.meet(fault, self.chance.randint(1, FAILED_REQUESTS)):
            return [f"{fault}: the graph was not asked for {WAIT:.0f} s"]
        return []

    @contextmanager
    def on_disk(self, *, kill: bool) -> Iterator[GraphStore]:
        """What the server shows after it has started anew."""
        self._server.restart(kill=kill)
        graph = NexusGraph(self._server.url)
        try:
            yield graph
        finally:
            graph.close()

    def close(self) -> None:
        """End the server."""
        self._stack.close()


# --- the campaign --------------------------------------------------------------------------------------------------


@dataclass
class Round:
    """What some faults in a row led to."""

    faults: Sequence[str]
    accepted: int = 0
    unanswered: int = 0
    seconds: float | None = None
    """From the end of faults and load until the graph had everything for good; None: it never had."""
    documents: int = 0
    pairs: int = 0
    repaired: int = 0
    """Differences that the server has found and repaired by itself since it started."""
    differences: int = 0
    broken: list[str] = field(default_factory=list)
    """Promises that were not kept; of differences found by the server not more than it tells one by one."""


class Campaign:
    """A server and its graph, with faults one after the other, and looks in between."""

    def __init__(self, folder: Path, house: House, chance: random.Random, seed: int) -> None:
        self._house = house
        self._chance = chance
        self._server = Ours(folder / "root", env=house.env, worker_slots=1)
        self._writers = [Writer(self._server, name, seed) for name in COLLECTIONS]
        self._looks: dict[int, dict[str, Any]] = {}
        """Reports of looks by the server, by when they began."""
        self._server.start()
        for writer in self._writers:
            writer.begin()

    def close(self) -> None:
        """End our server."""
        self._server.close()
        for writer in self._writers:
            writer.close()

    def round(self, faults: Sequence[str]) -> Round:
        """Let these happen under load, and look at everything once that rests. Both servers begin anew at the end."""
        done = Round(faults)
        before = self._figures()
        with self._load():
            for fault in faults:
                accepted = self._figures()[0]
                done.broken += _until("a request accepted", lambda: self._figures()[0] > accepted)  # noqa: B023
                time.sleep(self._chance.random() * LATEST)
                done.broken += self._house.strike(fault, self._server)
        self._look(done)
        done.accepted, done.unanswered = (now - then for now, then in zip(self._figures(), before, strict=True))
        for writer in self._writers:
            done.broken += writer.broken
            writer.broken.clear()
        return done

    def _figures(self) -> tuple[int, int]:
        return sum(one.accepted for one in self._writers), sum(one.unanswered for one in self._writers)

    @contextmanager
    def _load(self) -> Iterator[None]:
        stop = threading.Event()
        with ThreadPoolExecutor(len(self._writers)) as threads:
            running = [threads.submit(writer.run, stop) for writer in self._writers]
            try:
                yield
            finally:
                stop.set()
        for one in running:
            one.result()

    # --- looks -------------------------------------------------------------------------------------------------------

    def _look(self, done: Round) -> None:
        for writer in self._writers:  # a deletion of it may have had no answer
            done.broken += _until(f"the collection {writer.collection}", writer.ready)
        known = set(self._looks)
        done.seconds = self._in_step(done)
        kept = {(one.collection, name): kept for one in self._writers for name, kept in one.look().items()}
        done.repaired = sum(sum(look["different"].values()) for at, look in self._looks.items() if at not in known)
        compared = self._verify(done)
        done.documents = len(kept)
        kill = self._chance.random() < 0.5
        (self._server.kill if kill else self._server.stop)()
        with self._house.on_disk(kill=kill) as graph:
            found = differences(graph, kept)
        done.pairs = found.pairs
        if found.pairs != compared:
            done.broken.append(f"the server compared {compared:,} of {found.pairs:,} pairs")
        done.differences += len(found.found)
        done.broken += [f"on the disk: {what}" for what in found.found]
        self._server.start()

    def _overview(self) -> dict[str, Any]:
        found: dict[str, Any] = self._server.client.get("/v1/nexus").raise_for_status().json()
        if found["last"] is not None:
            self._looks[found["last"]["startedAt"]] = found["last"]
        return found

    def _in_step(self, done: Round) -> float | None:
        """Wait until nothing is left to be done by itself: nothing is pending, and the look that follows a start has
        ended. Answers for how long something was pending."""
        began = time.monotonic()
        since: float | None = None
        now: dict[str, Any] = {}

        def settled() -> bool:
            nonlocal since, now
            now = self._overview()
            if now["pending"] or now["failed"]:
                since = None
            elif since is None:
                since = time.monotonic()
            looked = now["progress"] is None and any(
                at >= self._server.started and look["error"] is None for at, look in self._looks.items()
            )
            return since is not None and looked

        if late := _until("in step", settled):
            done.broken += [f"{what}; {now}" for what in late]
            return None
        assert since is not None
        return since - began

    def _verify(self, done: Round) -> int:
        """Have the server compare everything; answers how many pairs it has compared."""
        known, compared = set(self._looks), 0
        done.broken += _until("a comparison wanted", self._ask)
        ended = lambda: self._overview()["progress"] is None and bool(self._looks.keys() - known)  # noqa: E731
        done.broken += _until("a comparison", ended)
        for at in sorted(self._looks.keys() - known):
            look = self._looks[at]
            done.differences += sum(look["different"].values())
            done.broken += [f"found by the server: {what}" for what in look["examples"]]
            if look["error"] or look["pending"]:
                done.broken.append(f"a comparison did not compare all: {look}")
            compared = look["pairs"]
        if done.differences:
            self._in_step(done)
        return compared

    def _ask(self) -> bool:
        answer = self._server.client.post("/v1/nexus/verify")
        if answer.status_code == 429:  # one goes on
            return False
        answer.raise_for_status()
        return True


def _until(what: str, look: Callable[[], bool]) -> list[str]:
    """Wait for something that has to come; what is broken where it does not."""
    until = time.monotonic() + WAIT
    while not look():
        if time.monotonic() > until:
            return [f"not within {WAIT:.0f} s: {what}"]
        time.sleep(0.05)
    return []


def drawn(of: Mapping[str, int], times: int, chance: random.Random) -> list[str]:
    """So many faults in random order, each as often as it is to come beside the others."""
    found: list[str] = []
    while len(found) < times:
        turn = [fault for fault, share in of.items() for _ in range(share)]
        found += chance.sample(turn, len(turn))
    return found[:times]


def run(folder: Path, make: Callable[[Path, random.Random], House], faults: Sequence[str], seed: int) -> list[Round]:
    """Let all these happen, some in a row; prints a line for each such round."""
    chance = random.Random(seed)
    house = make(folder, chance)
    rounds: list[Round] = []
    left = list(faults)
    print(f"{'#':>3}  accepted  unanswered  documents   pairs  differences  in step  faults", flush=True)
    with ExitStack() as stack:
        stack.callback(house.close)
        campaign = Campaign(folder, house, chance, seed)
        stack.callback(campaign.close)
        while left:
            count = chance.randint(1, AT_ONCE)
            done = campaign.round(left[:count])
            del left[:count]
            rounds.append(done)
            took = "never" if done.seconds is None else f"{done.seconds:.1f} s"
            print(
                f"{len(rounds):>3}  {done.accepted:>8}  {done.unanswered:>10}  {done.documents:>9}  {done.pairs:>6}"
                f"  {done.differences:>11}  {took:>7}  {', '.join(done.faults)}",
                flush=True,
            )
            for what in done.broken:
                print(f"     BROKEN {what}", flush=True)
    return rounds


def table(rounds: Sequence[Round]) -> list[str]:
    """One line for each kind of fault, as Markdown; a round counts for each kind that struck in it."""
    lines = [
        "| fault | times | recoveries | documents checked | pairs checked | differences | longest until in step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    times = Counter(fault for one in rounds for fault in one.faults)
    for name, count in [*sorted(times.items()), ("all", times.total())]:
        of = [one for one in rounds if name in (*one.faults, "all")]
        well = [fault for one in of if one.seconds is not None for fault in one.faults if name in (fault, "all")]
        figures = [sum(getattr(one, figure) for one in of) for figure in ("documents", "pairs", "differences")]
        longest = max((one.seconds for one in of if one.seconds is not None), default=float("inf"))
        shown = " | ".join(f"{figure:,}" for figure in (count, len(well), *figures))
        lines.append(f"| {name} | {shown} | {longest:.1f} s |")
    return lines


def main() -> int:
    """The command line of ``scripts/faults nexus``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=200, help="faults for each graph (200)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="for the same faults again")
    options = parser.parse_args()
    broken = 0
    for name, make in (("embedded", Embedded), ("Nexus", Nexus)):
        if make is Nexus and not PROGRAM:
            print("the graph on a Nexus server is left out: it needs NEXUS_SERVER_BIN, its program")
            continue
        faults = drawn(make.faults, options.times, random.Random(options.seed))
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="memvid-faults-") as folder:
            rounds = run(Path(folder), make, faults, options.seed)
        broken += sum(len(one.broken) for one in rounds)
        print(*table(rounds), sep="\n")
        print(
            f"{name}: {len(faults)} faults (seed {options.seed}) in {time.monotonic() - began:.0f} s, "
            f"{sum(one.accepted for one in rounds):,} accepted requests, "
            f"{sum(one.unanswered for one in rounds):,} without an answer; "
            f"the server repaired {sum(one.repaired for one in rounds):,} differences by itself"
        )
    print(f"broken promises: {broken}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
