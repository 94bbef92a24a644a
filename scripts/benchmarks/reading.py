"""The read tools over HTTP: a server of its own, a large graph, and clients that ask about ever other nodes."""

from __future__ import annotations

import asyncio
import gc
import gzip
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

ROOT = Path(__file__).resolve().parents[2]
COMMON = ("symbol_lookup", "node_get", "neighbors_get", "text_search", "callers_of")
TRAVERSALS = ("call_trace", "impact_analysis", "process_get")
CLIENTS = 16
PACE = 4.0
"""Questions a second of each client that does not ask back to back."""

Graph = dict[str, Any]

_VERBS = """
add apply bind build cache call check clean close collect compare compute connect convert copy count create decode
delete describe detect dispatch drop emit encode ensure execute expand export extract fetch filter find flush format
generate get group handle hash import index init insert inspect invoke join list load lock log make map mark merge
migrate move normalize notify open pack parse patch poll prepare process publish pull push queue read receive register
release reload remove render replace report request reset resolve restore retry return route run save scan schedule
search select send serialize set setup show sign sort split start stop store stream submit subscribe sync track
transform translate trim unlock unpack update upload validate verify visit wait walk watch write
""".split()  # noqa: SIM905 - readable
_NOUNS = """
account adapter agent alias answer argument array asset attribute audit backend batch body branch broker bucket buffer
button bytes cache callback certificate channel chart chunk client clock cluster code column command config connection
container content context controller cookie counter cursor data database dataset date decorator dependency device
dialect dictionary digest directory document domain driver edge element email engine entity entry environment error
event exception executor export extension factory feature field file filter flag folder form format frame function
gateway graph group guard handle handler hash header heap history hook host icon identity image import index input
instance interface invoice item iterator job journal key label language layer layout ledger level library limit line
link list listener loader locale lock log manager manifest mapper matrix measure member memory menu message metadata
method metric middleware migration mode model module monitor name namespace network node notification number object
offset operation operator option order origin output owner package packet page pager panel parameter parser part
password patch path payload payment permission pipeline plan platform plugin point policy pool port prefix price
printer process producer profile project property protocol provider proxy query queue quota range rate record reference
region registry relation release report repository request resolver resource response result retry revision role route
router row rule runner sample schedule schema scope script search section segment selector sender sensor serializer
server service session setting shape shard signal size slot snapshot socket source span stage state statement status
step storage store stream string style subject subscription suffix summary symbol table tag target task template tenant
term test text theme thread throttle ticket timeout timer token tool topic trace tracker transaction transport tree
trigger type unit upload user validator value variable vector version view visitor volume wallet widget window worker
workflow wrapper writer zone
""".split()  # noqa: SIM905 - readable


def synthetic(nodes: int, relationships: int) -> Graph:
    """A graph of so many nodes and relationships, the same each time: packages of files of classes and functions, whose
    names are words; few are called by many, most calls stay in a package; communities, processes and source texts."""
    made = _Code()
    communities, processes = nodes // 80, nodes // 100
    folders, files, classes = nodes // 160, nodes // 16, nodes // 9
    made.files(folders, files, communities)
    made.classes(classes)
    made.callables(nodes - communities - processes - folders - files - classes)
    made.groups(communities, processes)
    made.relations(relationships)
    return {
        "sessionId": "bench",
        "projectName": "synthetic",
        "source": {"type": "folder", "baseName": "synthetic", "displayName": "synthetic"},
        "nodes": made.nodes,
        "relationships": made.edges[:relationships],
        "fileContents": {path: "\n".join(lines) for path, lines in made.texts.items()},
        "options": {"semanticEnabled": True},
    }


class _Code:
    """Invents code, step by step."""

    def __init__(self) -> None:
        self._chance = random.Random(6)  # noqa: S311 - no secret
        self.nodes: list[Graph] = []
        self.edges: list[Graph] = []
        self.texts: dict[str, list[str]] = {}
        self._joined: set[tuple[str, str, str]] = set()
        self._taken: Counter[str] = Counter()
        self._package: dict[str, int] = {}
        self._classes: list[tuple[str, str, str]] = []
        self._callables: list[tuple[str, str]] = []
        self._near: dict[int, list[str]] = defaultdict(list)

    def files(self, folders: int, files: int, communities: int) -> None:
        places = [f"src/{self._noun()}s/{number:03}_{self._noun()}" for number in range(folders)]
        for place in places:
            self._node("Folder", f"Folder:{place}", place.rpartition("/")[2], filePath=place)
        for number in range(files):
            which = number % folders
            path = f"{places[which]}/{self._noun()}_{self._noun()}_{number}.py"
            self.texts[path] = []
            self._package[path] = which * communities // folders
            self._node("File", f"File:{path}", path.rpartition("/")[2], filePath=path)
            self._join(f"Folder:{places[which]}", "CONTAINS", f"File:{path}")

    def classes(self, count: int) -> None:
        for path, _ in zip(itertools.cycle(self.texts), range(count), strict=False):
            name = self._unused(path, "".join(self._noun().title() for _ in range(3)))
            at = self._symbol("Class", path, name, f"class {name}:", 2)
            self._join(f"File:{path}", "DEFINES", at)
            self._classes.append((at, path, name))

    def callables(self, count: int) -> None:
        paths = list(self.texts)
        for number in range(count):
            name = f"{self._few(_VERBS)}_{self._noun()}" + (f"_{self._noun()}" if self._chance.random() < 0.6 else "")
            if number % 3:
                owner, path, of = self._chance.choice(self._classes)
                name = self._unused(path, f"{of}.{name}")
                declared = f"    def {name.rpartition('.')[2]}(self):"
                at = self._symbol("Method", path, name, declared, self._chance.randint(2, 12))
                self._join(owner, "HAS_METHOD", at)
            else:
                path = self._chance.choice(paths)
                name = self._unused(path, name)
                at = self._symbol("Function", path, name, f"def {name}(value):", self._chance.randint(2, 20))
                self._join(f"File:{path}", "DEFINES", at)
                self._join(at, "MEMBER_OF", f"comm_{self._package[path]}")
            self._callables.append((at, path))
            self._near[self._package[path]].append(at)

    def groups(self, communities: int, processes: int) -> None:
        for number in range(communities):
            name = f"{self._noun()}s".title()
            size = len(self._near[number])
            self._node("Community", f"comm_{number}", name, heuristicLabel=name, cohesion=0.8, symbolCount=size)
        large = [some for some in self._near.values() if len(some) > 8]
        for number in range(processes):
            steps = self._chance.sample(self._chance.choice(large), 6)
            name = f"{steps[0].rpartition(':')[2]} → {steps[-1].rpartition(':')[2]}"
            about = {"entryPointId": steps[0], "terminalId": steps[-1], "stepCount": len(steps)}
            self._node("Process", f"proc_{number}", name, processType="cross_community", **about)
            for step, one in enumerate(steps, 1):
                self._join(one, "STEP_IN_PROCESS", f"proc_{number}", step=step)

    def relations(self, count: int) -> None:
        paths = [f"File:{path}" for path in self.texts]
        owners = [at for at, _, _ in self._classes]
        for kind, among, some in (("EXTENDS", owners, len(owners) // 3), ("IMPORTS", paths, len(paths) * 2)):
            for _ in range(some):
                self._join(self._chance.choice(among), kind, self._favourite(among, 3))
        everywhere = [at for at, _ in self._callables]
        self._chance.shuffle(everywhere)
        while len(self.edges) < count:
            source, path = self._chance.choice(self._callables)
            among = self._near[self._package[path]] if self._chance.random() < 0.8 else everywhere
            kind = "CALLS" if self._chance.random() < 0.9 else "ACCESSES"
            self._join(source, kind, self._favourite(among, 2.5), confidence=self._chance.choice((0.5, 0.85, 0.9, 1)))

    def _noun(self) -> str:
        return self._few(_NOUNS)

    def _few(self, words: list[str]) -> str:
        """A word; some are far more common than others, and one of three is a rare one."""
        word = words[min(int(self._chance.expovariate(4 / len(words))), len(words) - 1)]
        return word + self._chance.choice(_NOUNS) if self._chance.random() < 0.33 else word

    def _favourite(self, among: list[str], power: float) -> str:
        return among[int(len(among) * self._chance.random() ** power)]

    def _unused(self, path: str, name: str) -> str:
        self._taken[f"{path}:{name}"] += 1
        count = self._taken[f"{path}:{name}"]
        return name if count == 1 else f"{name}{count}"

    def _node(self, label: str, at: str, name: str, **properties: Any) -> None:
        self.nodes.append({"id": at, "label": label, "properties": {"name": name, **properties}})

    def _symbol(self, label: str, path: str, name: str, declared: str, lines: int) -> str:
        text = self.texts[path]
        start = len(text)
        text.append(declared)
        for _ in range(lines):
            text.append(f"        {self._noun()} = self.{self._few(_VERBS)}_{self._noun()}()")
        at = f"{label}:{path}:{name}"
        where = {"filePath": path, "startLine": start, "endLine": len(text) - 1}
        self._node(label, at, name.rpartition(".")[2], **where, language="python", isExported=True)
        return at

    def _join(self, source: str, kind: str, target: str, *, confidence: float = 1, step: int = 0) -> None:
        if source == target or (source, kind, target) in self._joined:
            return
        self._joined.add((source, kind, target))
        ends = {"id": f"{source}_{kind}_{target}", "sourceId": source, "targetId": target, "type": kind}
        self.edges.append({**ends, "confidence": confidence, "reason": "import-resolved", "step": step})


class Server(NamedTuple):
    """A control plane in a process of its own."""

    url: str
    pid: int

    def memory(self) -> float:
        """MB of its resident memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    """A server that listens; ended with the context."""
    folder.mkdir()
    environment = {
        **os.environ,
        "MEMVID_EXPORT_BIND_ADDR": "127.0.0.1:0",
        "MEMVID_EXPORT_ROOT": str(folder / "root"),
        "MEMVID_EMBED_CACHE": "off",
    }
    log = folder / "server.log"
    command = [Path(sys.executable).with_name("memvid-export"), "serve", "--dev"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 60
        while "listens on " not in log.read_text():
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        url = log.read_text().partition("listens on ")[2].split()[0]
        yield Server(url, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def export(url: str, graph: Graph) -> str:
    """The id of the completed export of a graph."""
    with httpx.Client(base_url=url, timeout=300) as client:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        body = gzip.compress(json.dumps(graph).encode(), 1)
        job: str = client.post("/v1/exports", content=body, headers=headers).raise_for_status().json()["jobId"]
        while (state := client.get(f"/v1/exports/{job}").json())["status"] != "completed":
            if state["status"] not in ("queued", "running"):
                raise SystemExit(f"the export ended as {state['status']}: {state['error']}")
            time.sleep(0.2)
    return job


Question = tuple[str, Graph]


def questions(graph: Graph) -> dict[str, Iterator[Graph]]:
    """For each tool arguments without end: nodes and words of the whole graph, half of the nodes drawn by how often
    relationships name them, so that those asked about most are the busiest."""
    chance = random.Random(60)  # noqa: S311 - no secret
    nodes, edges = graph["nodes"], graph["relationships"]
    known = {node["id"]: node for node in nodes}
    edges = [edge for edge in edges if edge["sourceId"] in known and edge["targetId"] in known]
    calls = [edge for edge in edges if edge["type"] == "CALLS"]
    callees: dict[str, list[str]] = defaultdict(list)
    for edge in calls:
        callees[edge["sourceId"]].append(edge["targetId"])
    symbols = [node for node in nodes if node["properties"].get("startLine") is not None] or nodes
    processes = [node["id"] for node in nodes if node["label"] == "Process"] or [""]
    words = sorted(
        {word for node in symbols for word in node["properties"]["name"].lower().split("_") if len(word) > 2}
    )

    def any_node() -> str:
        end = chance.choice(("sourceId", "targetId"))
        return str(chance.choice(nodes)["id"] if chance.random() < 0.5 else chance.choice(edges)[end])

    def name() -> str:
        found: str = chance.choice(symbols)["properties"]["name"]
        return found[: max(3, len(found) // 2)] if chance.random() < 0.3 else found

    def some_words() -> str:
        own = [word for word in chance.choice(symbols)["properties"]["name"].lower().split("_") if word]
        return " ".join([*own, *chance.sample(words, chance.randint(1, 2))])

    def trace() -> Graph:
        at = start = chance.choice(calls)["sourceId"]
        for _ in range(chance.randint(1, 4)):
            at = chance.choice(callees[at]) if callees[at] else at
        return {"fromNodeId": start, **({"toNodeId": at} if at != start and chance.random() < 0.5 else {})}

    asked: dict[str, Callable[[], Graph]] = {
        "symbol_lookup": lambda: {"query": name()},
        "node_get": lambda: {"nodeId": any_node()},
        "neighbors_get": lambda: {"nodeId": any_node()},
        "text_search": lambda: {"query": some_words()},
        "callers_of": lambda: {"nodeId": chance.choice(calls)["targetId"]},
        "call_trace": trace,
        "impact_analysis": lambda: {"nodeId": chance.choice(edges)["targetId"]},
        "process_get": lambda: {"processId": chance.choice(processes)},
    }
    return {tool: itertools.starmap(make, itertools.repeat(())) for tool, make in asked.items()}


class Times(NamedTuple):
    """Seconds of answers, shortest first, and how many came in a second."""

    seconds: list[float]
    rate: float

    def at(self, share: float) -> float:
        """Milliseconds within which this share of the answers came."""
        return 1000 * self.seconds[max(0, math.ceil(share * len(self.seconds)) - 1)]


async def _client(url: str, asked: Iterator[bytes], gaps: Iterator[float] | None, times: list[float]) -> None:
    host, _, port = url.rpartition("/")[2].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        due = time.perf_counter()
        for request in asked:
            if gaps is not None:
                due += next(gaps)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
            started = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            at = head.lower().find(b"content-length:")
            body = await reader.readexactly(int(head[at + 15 : head.find(b"\r\n", at)]))
            times.append(time.perf_counter() - started)
            if b" 200 " not in head[:16] or b'"isError":true' in body:
                raise SystemExit(f"not an answer: {head!r} {body[:500]!r}")
    finally:
        writer.close()


def _request(url: str, job: str, tool: str, arguments: Graph) -> bytes:
    params = {"name": tool, "arguments": {**arguments, "locator": {"jobId": job}}}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}).encode()
    head = (
        f"POST /mcp HTTP/1.1\r\nHost: {url.rpartition('/')[2]}\r\nAuthorization: Bearer none\r\n"
        "Accept: application/json, text/event-stream\r\nContent-Type: application/json\r\n"
        f"MCP-Protocol-Version: 2025-06-18\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def ask(url: str, job: str, asked: list[Question], *, clients: int, pace: float | None = None) -> Times:
    """Have clients ask in turn, each back to back, or ``pace`` questions a second at random moments."""
    requests = [_request(url, job, tool, arguments) for tool, arguments in asked]
    chance = random.Random(7)  # noqa: S311 - no secret
    times: list[float] = []

    async def run() -> None:
        shares = [iter(requests[number::clients]) for number in range(clients)]
        gaps = [iter(lambda: chance.expovariate(pace or 1), -1.0) if pace else None for _ in shares]
        await asyncio.gather(*[_client(url, *share, times) for share in zip(shares, gaps, strict=True)])

    gc.collect()
    gc.freeze()  # the graph lies in this process and is not to be looked through meanwhile
    started = time.perf_counter()
    asyncio.run(run())
    taken = time.perf_counter() - started
    gc.unfreeze()
    return Times(sorted(times), len(times) / taken)


class Asked(NamedTuple):
    """How one tool answered."""

    tool: str
    alone: Times
    paced: Times
    crowd: Times
    goal: float
    """Milliseconds."""


class Found(NamedTuple):
    """How the tools answered over one graph."""

    nodes: int
    relationships: int
    tools: list[Asked]
    before: float
    """MB of the server before the first question."""
    after: float


def measure(folder: Path, graph: Graph, *, count: int) -> Found:
    """Export a graph and ask every tool ``count`` questions alone, and as many by 16 clients, in turn and at once."""
    with server(folder) as running:
        job = export(running.url, graph)
        given = questions(graph)
        tools = (*COMMON, *TRAVERSALS)
        before = running.memory()

        def some(tool: str, number: int) -> list[Question]:
            return [(tool, arguments) for arguments in itertools.islice(given[tool], number)]

        for tool in tools:
            ask(running.url, job, some(tool, 20), clients=1)
        found = [
            Asked(
                tool,
                ask(running.url, job, some(tool, count), clients=1),
                ask(running.url, job, some(tool, max(CLIENTS, count // 4)), clients=CLIENTS, pace=PACE),
                ask(running.url, job, some(tool, count * 2), clients=CLIENTS),
                15 if tool in COMMON else 60,
            )
            for tool in tools
        ]
        return Found(len(graph["nodes"]), len(graph["relationships"]), found, before, running.memory())
