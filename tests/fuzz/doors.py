"""What reads foreign bytes, each as a function of the bytes: only ExportError may come out of it.

``python doors.py FOLDER`` answers cases on standard input, each with a line of JSON; ``Reading`` is its other end.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import resource
import select
import sqlite3
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from samples import CAPSULE, MANIFEST, PLAN, SIDECAR

SECONDS = 10.0
"""A case that takes longer hangs."""
MEMORY = 1 << 30
"""Bytes of address space that a case may add."""
_HEAD = struct.Struct("<16sI")


class Outcome(NamedTuple):
    """What came out of a door."""

    kind: str
    """``read``, ``refused``, or what is a finding: ``raised``, ``crashed``, ``hung``."""
    what: str
    """The code of an ExportError; for a finding what was raised, and where."""

    @property
    def is_finding(self) -> bool:
        """Whether it is not as it should be."""
        return self.kind not in ("read", "refused")


class Reading:
    """A child process that takes cases, started anew after one that ended it."""

    def __init__(self, folder: Path) -> None:
        """``folder`` has the samples; the child writes beside them."""
        self._folder = folder
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end()

    def read(self, door: str, data: bytes) -> Outcome:
        """Put bytes through a door."""
        if self._child is None:
            self._child = self._start()
        child = self._child
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(_HEAD.pack(door.encode(), len(data)) + data)
            child.stdin.flush()
            if not select.select([child.stdout], [], [], SECONDS)[0]:
                self._end()
                return Outcome("hung", f"more than {SECONDS:.0f} s")
            line = child.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            status = child.wait()
            self._end()
            return Outcome("crashed", f"exit status {status}")
        return Outcome(*json.loads(line))

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, __file__, self._folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "MEMVID_TELEMETRY": "0", "MEMVID_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert child.stdout is not None
        if child.stdout.readline() != b"ready\n":
            raise RuntimeError("the child that reads did not start")
        return child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue
        child.wait()


def doors(folder: Path) -> dict[str, Callable[[bytes], None]]:
    """The readers by name; files that they read are written into ``folder``, which has the samples."""
    import msgspec
    import numpy as np

    from common.capsule.gate import Gate, GatePlan
    from common.capsule.reader import CapsuleReader
    from common.embedding.choice import Engines
    from common.embedding.engine import OpenEngines
    from common.embedding.static import StaticEmbedder
    from common.errors import CapsuleUnreadable
    from common.graph.canonical import canonical
    from common.graph.read import read_graph
    from common.settings import Settings
    from common.sidecar.open import Scope, Sidecar
    from common.sidecar.rebuild import rebuild
    from common.storage import FileStorage
    from control_plane.operations.keys import EVERYBODY, Keys
    from control_plane.operations.profiles import Profiles
    from control_plane.reading.artifacts import Artifacts
    from control_plane.reading.inspect import Files, inspect, opened_sidecar, vectors
    from control_plane.reading.library import Library
    from control_plane.reading.places import ExportPlaces
    from control_plane.reading.reader import Reader
    from control_plane.reading.search import Searched, search
    from handler.job import read_manifest

    engines = OpenEngines(Engines())
    storage = FileStorage([folder])
    own = folder / "own"
    own.mkdir(exist_ok=True)
    capsule_bytes = (folder / CAPSULE).read_bytes()
    sidecar_bytes = (folder / SIDECAR).read_bytes()
    plan = msgspec.json.decode((folder / PLAN).read_bytes(), type=GatePlan)
    gate = Gate()
    StaticEmbedder().embed(["warm"])

    def graph(data: bytes) -> None:
        canonical(read_graph(io.BytesIO(data)))

    def sidecar(data: bytes) -> None:
        path = own / "sidecar.sqlite"
        path.write_bytes(data)
        try:
            with closing(Sidecar.open(path)) as opened:
                opened.check()  # as for any sidecar of which no manifest has the hash
                ask(opened)
        except sqlite3.DatabaseError as error:  # as those do who read it: it is damaged, and built anew
            raise CapsuleUnreadable(str(error)) from error

    def ask(opened: Sidecar) -> None:
        opened.counts()
        scopes = [Scope(), Scope(labels=("Function",)), Scope(types=("CALLS",)), Scope(file_prefix="src/")]
        scopes.append(Scope(community="comm_0"))
        for scope in scopes:
            search([Searched("one", opened)], "call value user", mode="lexical", scope=scope, limit=20)
            opened.named("call_0", scope=scope)
        for position in range(-2, 8):
            opened.nodes([position])
            for _, edge in opened.edges(position, "both", limit=50):
                edge.written_out(*opened.nodes([edge.source, edge.target]))
            opened.degree(position)
            opened.linked(position, ("CALLS",), at_most=5)
            opened.joined(position, "out", "CALLS", limit=5, offset=0)
            opened.sources(position, "CALLS")
        opened.node("Function:src/tiny.py:call_0")
        opened.edge("Function:src/tiny.py:call_0_CALLS_Function:src/tiny.py:call_1")
        opened.spelled("call_0")
        opened.beginning("call", limit=5)
        opened.in_file("src/tiny.py")
        for process in opened.processes(limit=5):
            opened.steps(process.position)
        for community in opened.communities(limit=5):
            opened.members(community.position)
        opened.hotspots(limit=5)
        opened.labels()
        opened.document("mv2://meta/manifest")
        opened.content_digest()
        for frame in range(3):
            opened.locate(frame)

    def capsule(data: bytes) -> None:
        path = own / "capsule.mv2"
        path.write_bytes(data)
        with CapsuleReader(path) as reader:
            failed: CapsuleUnreadable | None = None
            for what in (
                lambda: list(reader.all_frames()),
                reader.vectors,
                reader.verify,
                lambda: rebuild([path], own / "rebuilt.sqlite"),
                lambda: inspect(path),
            ):
                try:
                    what()
                except CapsuleUnreadable as error:
                    failed = error
            if failed:
                raise failed

    def gated(data: bytes) -> None:
        path = own / "gated.mv2"
        path.write_bytes(data)
        plan.path = str(path)
        gate.check(plan, lambda: None, SECONDS / 2)

    def manifest(data: bytes) -> None:
        (own / CAPSULE).write_bytes(capsule_bytes)
        (own / SIDECAR).write_bytes(sidecar_bytes)
        path = own / MANIFEST
        path.write_bytes(data)
        try:
            read_manifest(storage, path.as_uri())
            files = Files(own / CAPSULE)
            with opened_sidecar(files) as opened:
                vectors(files, opened, engines.get)
            inspect(own / CAPSULE)
        finally:
            path.unlink()

    class Nothing:
        async def newest_completed(self) -> None:
            return None

        async def get(self, _job_id: str) -> None:
            return None

    def tools(data: bytes) -> None:
        """A read tool never fails; what it did not foresee it says as INTERNAL_ERROR."""
        (own / "asked.mv2").write_bytes(capsule_bytes)
        (own / "asked.mv2.index.v1.sqlite").write_bytes(data)
        library = Library(Artifacts(FileStorage([]), own / "copies", 1), engines.get, capacity=1)
        reader = Reader(ExportPlaces(Nothing(), own, external=False, note=[].append), library, budget=100_000)
        where = {"locator": {"capsulePath": "asked.mv2"}}
        node = "Function:src/tiny.py:call_0"
        try:
            for tool, given in (
                ("text_search", {"query": "call value"}),
                ("symbol_lookup", {"query": "call"}),
                ("node_get", {"nodeId": node}),
                ("neighbors_get", {"nodeId": node}),
                ("impact_analysis", {"nodeId": node}),
                ("process_list", {}),
                ("file_outline", {"filePath": "src/tiny.py"}),
                ("file_snippet", {"nodeId": node}),
                ("manifest_get", {}),
            ):
                body = json.loads(asyncio.run(reader.ask(tool, where | given, EVERYBODY)).body)
                if body.get("code") in ("INTERNAL", "INTERNAL_ERROR"):
                    raise RuntimeError(f"{tool} failed")
        finally:
            library.close()

    def profiles(data: bytes) -> None:
        path = own / "profiles.toml"
        path.write_bytes(data)
        list(Profiles.load(path, Settings()))

    def keys(data: bytes) -> None:
        path = own / "keys.toml"
        path.write_bytes(data)
        Keys(Settings.read({"MEMVID_EXPORT_KEYS_FILE": str(path)}))

    np.seterr(all="ignore")
    return {
        "json": graph,
        "gzip": graph,
        "zstd": graph,
        "ndjson": graph,
        "sidecar": sidecar,
        "tools": tools,
        "capsule": capsule,
        "gate": gated,
        "manifest": manifest,
        "profiles": profiles,
        "keys": keys,
    }


def _place(error: BaseException) -> str:
    """The innermost line of ours that an exception went through."""
    ours = [
        f"{Path(step.filename).relative_to(REPOSITORY)}:{step.name}"
        for step in traceback.extract_tb(error.__traceback__)
        if Path(step.filename).is_relative_to(REPOSITORY)
        and ".venv" not in step.filename
        and not step.filename.endswith("doors.py")
    ]
    return f"{type(error).__name__} in {ours[-1] if ours else 'the reader'}"


REPOSITORY = Path(__file__).resolve().parents[2]


def _serve(folder: Path) -> None:
    from common.errors import ExportError

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    open_doors = doors(folder)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    answers.write(b"ready\n")
    answers.flush()
    while head := sys.stdin.buffer.read(_HEAD.size):
        name, length = _HEAD.unpack(head)
        data = sys.stdin.buffer.read(length)
        try:
            open_doors[name.rstrip(b"\0").decode()](data)
            outcome = Outcome("read", "")
        except ExportError as error:
            outcome = Outcome("refused", error.code)
        except BaseException as error:  # noqa: BLE001 - a panic of a library is one; all of it is what is looked for
            outcome = Outcome("raised", _place(error))
        del data  # the next case has room for itself
        answers.write(json.dumps(outcome).encode() + b"\n")
        answers.flush()


def digest(data: bytes) -> str:
    """A short name of some bytes."""
    return hashlib.sha256(data).hexdigest()[:8]


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
