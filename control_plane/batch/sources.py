"""Where the graphs of a batch come from: a folder, a prefix in S3, or the repositories of a GitNexus server."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol
from urllib.parse import unquote

from common.contract import Source
from common.errors import InvalidRequest, PayloadTooLarge, StorageFailed
from common.graph.names import base_name_of, safe_base_name
from common.storage import Storage
from common.storage.file import sha256_of
from control_plane.batch.journal import JOURNAL_NAME
from control_plane.client import GitNexus, GitNexusRepo

MAX_GRAPHS = 100_000
_ENDING = re.compile(r"(?<!\.manifest)\.(json|ndjson|jsonl)(\.(gz|zst))?$", re.IGNORECASE)
_CHUNK = 1 << 20


class Graph(NamedTuple):
    """One graph of a batch."""

    name: str
    """Of its folder in the destination: unique, and safe as a file name."""
    address: str
    """Where it comes from, for people and for the journal."""
    weight: int
    """How large it is, in bytes or in nodes and relationships; comparable within one source."""
    origin: Source
    """What a raw graph does not say of itself."""
    key: str
    """How its source finds it."""


class Payload(NamedTuple):
    """A graph that was fetched."""

    path: Path
    size: int
    sha256: str


class GraphSource(Protocol):
    """Lists graphs once, then fetches them in any order, several at once."""

    def graphs(self) -> list[Graph]:
        """All graphs, the largest first. Raises InvalidRequest where there is none or too many, StorageFailed."""
        ...

    def fetch(self, graph: Graph, folder: Path, limit: int) -> Payload:
        """The bytes of a graph as a file, in ``folder`` unless it lies on this machine already.

        Raises PayloadTooLarge above ``limit`` bytes, StorageFailed, ObjectMissing, InvalidRequest.
        """
        ...


class FolderSource:
    """Graph files in a folder and in all below it, but for hidden ones and ``without``."""

    def __init__(self, folder: Path, without: Path | None) -> None:
        self._folder = folder
        self._without = without

    def graphs(self) -> list[Graph]:
        """Files that end as those that ``export`` takes: .json, .ndjson, .jsonl, also with .gz or .zst."""
        found = []
        for parent, folders, files in os.walk(self._folder, onerror=_unreadable):
            at = Path(parent)
            folders[:] = [name for name in folders if not name.startswith(".") and at / name != self._without]
            for path in (at / name for name in files if _is_graph(name)):
                try:
                    size = path.stat().st_size
                except OSError:
                    size = 0  # it will fail when it is fetched, alone
                found.append(_of_file(path.relative_to(self._folder).as_posix(), str(path), size))
        return _named(found, str(self._folder))

    def fetch(self, graph: Graph, folder: Path, limit: int) -> Payload:
        """The file itself: nothing is copied."""
        path = self._folder / graph.key
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for who writes to it
                raise StorageFailed(f"{path}: it is no file")
            _check_size(status.st_size, limit)
            return Payload(path, status.st_size, sha256_of(path))
        except OSError as error:
            raise StorageFailed(f"{path}: {error.strerror or error}") from error


def _unreadable(error: OSError) -> NoReturn:
    """A folder that cannot be listed may hold graphs: a batch without them would not be whole."""
    raise StorageFailed(f"{error.filename}: {error.strerror or error}") from error


class S3Source:
    """Graph files under a prefix, but for those under ``without``."""

    def __init__(self, storage: Storage, prefix: str, without: str | None) -> None:
        self._storage = storage
        self._prefix = prefix
        self._without = without

    def graphs(self) -> list[Graph]:
        """Objects that end as the files that ``export`` takes."""
        found = []
        for one in self._storage.found(self._prefix):
            below = unquote(one.ref.removeprefix(self._prefix))
            if _is_graph(below) and not (self._without and one.ref.startswith(self._without)):
                found.append(_of_file(below, one.ref, one.size))
        return _named(found, self._prefix)

    def fetch(self, graph: Graph, folder: Path, limit: int) -> Payload:
        """A copy in ``folder``."""
        path = self._storage.local(graph.address, folder, limit=limit)
        return Payload(path, path.stat().st_size, sha256_of(path))


class GitNexusSource:
    """The repositories of a running GitNexus server."""

    def __init__(self, server: GitNexus, url: str) -> None:
        self._server = server
        self._url = url.rstrip("/")
        self._repos: dict[str, GitNexusRepo] = {}

    def graphs(self) -> list[Graph]:
        """One for each repository; how large it is, the server counted when it indexed it."""
        self._repos = {repo.path or repo.name: repo for repo in self._server.repositories()}
        found = [
            Graph(repo.name, f"{self._url}/{repo.name}", repo.size, self._server.source(repo), key)
            for key, repo in self._repos.items()
        ]
        return _named(found, self._url)

    def fetch(self, graph: Graph, folder: Path, limit: int) -> Payload:
        """The server's stream as a file in ``folder``."""
        path = folder / "graph.ndjson"
        digest, size = hashlib.sha256(), 0
        with self._server.graph(self._repos[graph.key]) as body, path.open("wb") as file:
            while chunk := body.read(_CHUNK):
                size += len(chunk)
                _check_size(size, limit)
                digest.update(chunk)
                file.write(chunk)
        return Payload(path, size, digest.hexdigest())


def _is_graph(path: str) -> bool:
    return bool(_ENDING.search(path)) and not any(part.startswith(".") for part in path.split("/"))


def _of_file(below: str, address: str, size: int) -> Graph:
    folder, slash, file = below.rpartition("/")
    shown = os.fsencode(file).decode(errors="replace")
    base_name = base_name_of(shown)
    origin = Source(base_name=base_name, original_file_name=shown)
    return Graph(folder + slash + base_name, os.fsencode(address).decode(errors="replace"), size, origin, below)


def _named(found: Sequence[Graph], where: str) -> list[Graph]:
    """The largest first, with safe names; those that would share one, or the journal's, all get a part of their key's
    hash, so that no name depends on the order."""
    if not found:
        raise InvalidRequest(f"SOURCE: {where} has no graphs", field="SOURCE")
    if len(found) > MAX_GRAPHS:
        raise InvalidRequest(f"SOURCE: {where} has more than {MAX_GRAPHS:,} graphs", field="SOURCE", allowed=MAX_GRAPHS)
    names = [safe_base_name(graph.name) for graph in found]
    shared = Counter([*names, JOURNAL_NAME])
    unique = [
        f"{name}-{hashlib.sha256(os.fsencode(graph.key)).hexdigest()[:8]}" if shared[name] > 1 else name
        for name, graph in zip(names, found, strict=True)
    ]
    graphs = [graph._replace(name=name) for name, graph in zip(unique, found, strict=True)]
    return sorted(graphs, key=lambda graph: (-graph.weight, graph.name))


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise PayloadTooLarge(
            f"the graph has more than the {limit:,} bytes that are read", field="payload", limit=limit
        )
