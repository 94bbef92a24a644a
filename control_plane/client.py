"""Clients of other servers: our own HTTP API, and a running GitNexus whose graph we read.

Errors of the network are mapped here: what the peer says about our input is an input error (exit code 2),
a peer that is away, cuts an answer or answers nonsense is a storage error that may be tried again.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from common.contract import (
    MALFORMED,
    ErrorBody,
    Event,
    EventPage,
    Job,
    JobCollection,
    JobCreated,
    JobPage,
    Manifest,
    Report,
    SearchAnswer,
    Source,
)
from common.errors import (
    RULES,
    Canceled,
    ExportError,
    InvalidRequest,
    InvalidSettings,
    PayloadTooLarge,
    Retry,
    StorageFailed,
    UnsupportedMediaType,
)
from control_plane.digests import digest_of, sha256_in
from control_plane.nexus.messages import BatchWritten, CollectionView
from control_plane.nexus.overview import (
    DeadEvent,
    DeadEvents,
    DeadLetter,
    DeadLetters,
    Enabled,
    Kind,
    LookAsked,
    Overview,
    Retried,
)

T = TypeVar("T")
TERMINAL = frozenset({"job_completed", "job_failed", "job_canceled", "job_expired"})

_CHUNK = 1 << 18
_TRIES = RULES[Retry.later].client
"""Of one request or download before we give up; the waits between them add up to about six seconds."""
_POLL_SECONDS = 0.5
_ACCEPT_SECONDS = 600.0
"""How long the server may read and check a graph that it has received."""
_RETRYABLE = frozenset({429, 502, 503, 504})


# --- GitNexus ---------------------------------------------------------------------


class GitNexusRepo(msgspec.Struct, rename="camel"):
    """A repository that a GitNexus server has indexed."""

    name: str
    path: str = ""
    branch: str | None = None
    stats: dict[str, Any] | None = None

    @property
    def size(self) -> int:
        """How many nodes and relationships the server counted when it indexed it; 0 where it does not say."""
        counts = [(self.stats or {}).get(name) for name in ("nodes", "edges")]
        return sum(count for count in counts if isinstance(count, int))


class GitNexus:
    """Reads graphs of repositories from a running ``gitnexus serve``; several threads may do so at once."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        # A graph is read from GitNexus's database while it is sent: the first line may take a while on a large one.
        self._http = httpx.Client(base_url=self._url, timeout=httpx.Timeout(120.0, connect=10.0))

    def __enter__(self) -> GitNexus:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def repositories(self) -> list[GitNexusRepo]:
        """All repositories. Raises StorageFailed when the server is away."""
        try:
            answer = self._http.get("/api/repos")
        except httpx.HTTPError as error:
            raise StorageFailed(f"No GitNexus server answers at {self._url}: {error}", url=self._url) from error
        self._refuse(answer)
        try:
            return msgspec.json.decode(answer.content, type=list[GitNexusRepo])
        except MALFORMED as error:
            raise StorageFailed(f"{self._url} does not answer like a GitNexus server: {error}") from error

    def find(self, wanted: str | None) -> GitNexusRepo:
        """The repository of that name or path; without one, the only repository there is.

        Raises InvalidRequest when there is none or more than one, StorageFailed when the server is away.
        """
        repos = self.repositories()
        path = str(Path(wanted).expanduser().resolve()) if wanted else ""
        found = [r for r in repos if wanted is None or wanted in (r.name, r.path) or path == r.path]
        if len(found) == 1:
            return found[0]
        names = ", ".join(sorted(r.path if wanted else r.name for r in (found or repos))) or "none"
        if found:
            raise InvalidRequest(f"GitNexus has several repositories; choose with --repo: {names}", field="repo")
        raise InvalidRequest(f"GitNexus has no repository {wanted!r}; it has: {names}", field="repo")

    def source(self, repo: GitNexusRepo) -> Source:
        """What the export says about its origin: the repository's name and branch, no machine's paths."""
        return Source(type="gitnexus", base_name=repo.name, display_name=repo.name, branch=repo.branch)

    @contextmanager
    def graph(self, repo: GitNexusRepo) -> Iterator[BinaryIO]:
        """The graph as NDJSON with file contents, as a stream to read.

        Reading raises StorageFailed when the connection breaks; an ``error`` line and a half last line are left to
        ``read_graph``, which refuses both.
        """
        params = {"repo": repo.path or repo.name, "includeContent": "true", "stream": "true"}
        try:
            with self._http.stream("GET", "/api/graph", params=params) as answer:
                if answer.is_error:
                    answer.read()
                    self._refuse(answer)
                yield io.BufferedReader(_Body(answer, f"GitNexus at {self._url}"), _CHUNK)
        except httpx.HTTPError as error:
            raise StorageFailed(f"GitNexus at {self._url} stopped answering: {error}", url=self._url) from error

    def _refuse(self, answer: httpx.Response) -> None:
        if not answer.is_error:
            return
        try:
            said = str(answer.json()["error"])
        except (ValueError, KeyError, TypeError):
            said = answer.reason_phrase
        text = f"GitNexus at {self._url} answered {answer.status_code}: {said}"
        raise InvalidRequest(text, field="repo") if answer.status_code in (400, 404) else StorageFailed(text)


class _Body(io.RawIOBase):
    """The body of a streamed answer as a file; a broken connection is a StorageFailed that says how far we came."""

    def __init__(self, answer: httpx.Response, who: str) -> None:
        self._chunks = answer.iter_bytes(_CHUNK)
        self._rest = memoryview(b"")
        self._who = who
        self._got = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            try:
                self._rest = memoryview(next(self._chunks))
            except StopIteration:
                return 0
            except httpx.HTTPError as error:
                raise StorageFailed(f"{self._who} cut its answer after {self._got:,} bytes: {error}") from error
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        self._got += size
        return size


# --- our own HTTP API ----------------------------------------------------------------


def api_key(env: Mapping[str, str]) -> str | None:
    """The key of the server that a command talks to. Raises InvalidSettings for a file that cannot be read."""
    if key := env.get("MEMVID_EXPORT_API_KEY"):
        return key
    file = env.get("MEMVID_EXPORT_API_KEY_FILE")
    if not file:
        return None
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InvalidSettings(f"MEMVID_EXPORT_API_KEY_FILE cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidSettings("MEMVID_EXPORT_API_KEY_FILE cannot be read: it is not UTF-8") from error


class ExportClient:
    """A client of the export API: submit, follow, download.

    Every request is tried again on a broken connection and on 429, 502, 503 and 504 (``Retry-After`` is honoured);
    a submission carries an ``Idempotency-Key``, so a retry never starts a second job.
    """

    def __init__(
        self, url: str, key: str | None, *, tries: int = _TRIES.most, waits: Callable[[str], None] | None = None
    ) -> None:
        """``tries`` of a request before it is given up. Where somebody ``waits``, a server that names a time (429) is
        asked again however often, and they hear why."""
        self._url = url.rstrip("/")
        self._tries = tries
        self._waits = waits
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # The server sends a ping every 2 s; 30 s of silence is a dead connection.
        self._http = httpx.Client(base_url=self._url, headers=headers, timeout=httpx.Timeout(30.0, write=120.0))

    def __enter__(self) -> ExportClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit(self, graph: Path, on_bytes: Callable[[int, int], None], *, collection: str | None = None) -> JobCreated:
        """Send a graph file, which is to become a ``collection`` where one is named, and answer the new job. A file
        that is not compressed yet goes out as gzip.

        ``on_bytes(sent, total)`` counts bytes of the file. Raises InvalidRequest, PayloadTooLarge,
        UnsupportedMediaType as the server says, StorageFailed when it cannot be reached.
        """
        with graph.open("rb") as file:
            magic = file.read(4)
        encoding = "zstd" if magic == b"\x28\xb5\x2f\xfd" else "gzip"
        compress = encoding == "gzip" and magic[:2] != b"\x1f\x8b"
        with tempfile.TemporaryFile() if compress else graph.open("rb") as body:
            if compress:
                _compress(graph, body)
            body.seek(0)
            sha256 = hashlib.file_digest(body, "sha256").hexdigest()
            headers = {
                "Content-Type": "application/x-ndjson" if ".ndjson" in graph.name else "application/json",
                "Content-Encoding": encoding,
                "Content-Digest": digest_of(sha256),
                "Content-Disposition": f"attachment; filename*=UTF-8''{quote(os.fsencode(graph.name))}",
                "Content-Length": str(body.tell()),
                "Idempotency-Key": str(uuid.uuid4()),
            }
            total = graph.stat().st_size
            answer = self._send(
                "POST",
                "/v1/exports",
                params={} if collection is None else {"collection": collection},
                headers=headers,
                content=lambda: _upload(body, total, on_bytes),
            )
        if answer.headers.get("X-Payload-SHA256", sha256) != sha256:
            raise StorageFailed(f"{self._url} says that it got other bytes than were sent", url=self._url)
        return self._read(answer, JobCreated)

    def job(self, job_id: str) -> Job:
        """The job as it is now."""
        return self._read(self._send("GET", f"/v1/exports/{job_id}"), Job)

    def imported(self, job_id: str) -> JobCollection | None:
        """The collection of a completed export, once it holds all or was given up; None where none was asked for."""
        while True:
            found = self.job(job_id).collection
            if not isinstance(found, JobCollection):
                return None
            if found.status in ("done", "failed"):
                return found
            time.sleep(_POLL_SECONDS)

    def report(self, job_id: str) -> Report:
        """The report of a finished job."""
        return self._read(self._send("GET", f"/v1/exports/{job_id}/report"), Report)

    def cancel(self, job_id: str) -> Job:
        """Ask the server to stop a job; a finished one answers its state."""
        return self._read(self._send("DELETE", f"/v1/exports/{job_id}"), Job)

    def retry(self, job_id: str) -> JobCreated:
        """Start a failed job again; answers the new job, which is the same one however often this is asked."""
        return self._read(self._send("POST", f"/v1/exports/{job_id}/retry"), JobCreated)

    def failed(self) -> Iterator[Job]:
        """All jobs that have failed, newest first."""
        cursor: str | None = ""
        while cursor is not None:
            params = {"status": "failed", "limit": 200} | ({"cursor": cursor} if cursor else {})
            page = self._read(self._send("GET", "/v1/exports", params=params), JobPage)
            yield from page.jobs
            cursor = page.next_cursor

    def search(self, job_id: str, query: str, *, mode: str) -> SearchAnswer:
        """The best five nodes of an export that fit a question."""
        params = {"q": query, "mode": mode, "limit": 5}
        answer = self._send("GET", f"/v1/exports/{job_id}/search", params=params)
        return self._read(answer, SearchAnswer)

    def ask(self, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The envelope of a read tool's answer. Raises StorageFailed with the tool's error, ``details['answered']`` its
        code."""
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}
        headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        body = msgspec.json.encode(call)
        answer = self._send("POST", "/mcp", headers=headers, content=lambda: iter([body]))
        try:
            result = answer.json()["result"]
            content: dict[str, Any] = result["structuredContent"]
            wrong = bool(result.get("isError"))
        except (ValueError, KeyError, TypeError) as error:
            raise StorageFailed(f"{tool} was not answered like a tool") from error
        if wrong:
            raise StorageFailed(f"{tool}: {content.get('message')}", answered=content.get("code"))
        return content

    def events(self, job_id: str) -> Iterator[Event]:
        """Every event of a job once and in order, until the terminal one.

        Follows the event stream; when that breaks or is not offered, asks for pages of events instead, for as long
        as the server says that the job lives. Raises StorageFailed when the server is gone.
        """
        seen = 0
        while True:
            try:
                for event in self._stream(job_id, seen):
                    if event.seq > seen:
                        seen = event.seq
                        yield event
                        if event.type in TERMINAL:
                            return
            except (httpx.TransportError, *MALFORMED):
                pass  # a stream may break at any time: the pages below say what is really there
            while True:
                answer = self._send("GET", f"/v1/exports/{job_id}/events", params={"sinceSeq": seen})
                page = self._read(answer, EventPage)
                events = [event for event in page.events if event.seq > seen]
                for event in events:
                    seen = event.seq
                    yield event
                    if event.type in TERMINAL:
                        return
                if not events:
                    break
            if page.status_snapshot.status not in ("queued", "running"):
                raise StorageFailed(f"Job {job_id} has ended, but its last event is missing", url=self._url)
            time.sleep(_POLL_SECONDS)

    def fetch(self, job_id: str, folder: Path, on_bytes: Callable[[str], Callable[[int, int], None]]) -> list[Path]:
        """Fetch the files of a finished job into ``folder``: its parts, the sidecar, the manifest last, as in the
        answer. ``on_bytes(name)`` gives the sink of one file's ``(got, total)``.

        Each file appears whole or not at all; a broken download goes on where it stopped. Raises StorageFailed for
        bytes that are not what the manifest and ``Content-Digest`` announce.
        """
        url = f"/v1/exports/{job_id}"
        answer = self._send("GET", f"{url}/manifest")
        _check_digest(answer.headers, hashlib.sha256(answer.content).hexdigest(), "manifest")
        manifest = self._read(answer, Manifest)
        wanted = [(f"{url}/download?part={n}", part) for n, part in enumerate(manifest.parts, 1)]
        paths = []
        for address, part in wanted:
            paths.append(folder / _plain(part.file_name))
            self._download(address, paths[-1], part.size_bytes, part.sha256, on_bytes(part.file_name))
        name, size = manifest.sidecar_file_name, manifest.sidecar_size_bytes
        paths.append(folder / _plain(name))
        self._download(f"{url}/sidecar", paths[-1], size, manifest.sidecar_sha256, on_bytes(name))
        paths.append(folder / f"{paths[0].name}.manifest.json")
        temporary = paths[-1].with_name(f".{paths[-1].name}.part")
        temporary.write_bytes(answer.content)
        temporary.replace(paths[-1])
        return paths

    def _download(self, url: str, path: Path, size: int, sha256: str, on_bytes: Callable[[int, int], None]) -> None:
        temporary = path.with_name(f".{path.name}.part")
        digest = hashlib.sha256()
        etag, failures = "", 0
        try:
            with temporary.open("wb") as file:
                while (got := file.tell()) < size:
                    headers = {"Range": f"bytes={got}-", "If-Range": etag} if got else {}
                    try:
                        with self._http.stream("GET", url, headers=headers) as answer:
                            if answer.is_error:
                                answer.read()
                                failures += 1
                                self._wait_or_refuse(answer, failures)
                                continue
                            if got and answer.status_code != httpx.codes.PARTIAL_CONTENT:
                                raise StorageFailed(f"{path.name} changed on the server while it was fetched")
                            if not got:
                                etag = answer.headers.get("ETag", "")
                                _check_digest(answer.headers, sha256, path.name)
                            for chunk in answer.iter_raw(_CHUNK):
                                file.write(chunk)
                                digest.update(chunk)
                                on_bytes(file.tell(), size)
                    except httpx.TransportError as error:
                        failures = failures + 1 if file.tell() == got else 0
                        self._pause(failures, error)
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() != sha256:
                raise StorageFailed(f"{path.name} is not what its manifest says: its SHA-256 differs")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    # -- collections and their sync with the graph ---------------------------------------

    def put_collection(self, name: str, dimension: int | None, model: str | None) -> CollectionView:
        """Make a collection, or find it as it is wished; without a dimension the server embeds texts."""
        wished = {"dimension": dimension, "model": model}
        body = {field: value for field, value in wished.items() if value is not None}
        return self._read(self._send_json("PUT", _collection(name), msgspec.json.encode(body)), CollectionView)

    def collection(self, name: str) -> CollectionView | None:
        """A collection with its figures; None: there is none."""
        try:
            return self._read(self._send("GET", _collection(name)), CollectionView)
        except InvalidRequest as error:
            if error.details.get("answered") != "COLLECTION_NOT_FOUND":
                raise
            return None

    def write_documents(self, name: str, documents: Sequence[bytes]) -> BatchWritten:
        """Write documents, each as JSON, all or none. Raises InvalidRequest, whose ``details['field']`` begins with
        ``documents[n]`` where it is about one of them."""
        body = b'{"documents":[%b]}' % b",".join(documents)
        return self._read(self._send_json("POST", f"{_collection(name)}/documents", body), BatchWritten)

    def nexus(self) -> Overview:
        """How the sync of documents with the graph stands."""
        return self._read(self._send("GET", "/v1/nexus"), Overview)

    def nexus_failures(self, limit: int) -> list[DeadLetter]:
        """Documents that were given up."""
        answer = self._send("GET", "/v1/nexus/failures", params={"limit": limit})
        return self._read(answer, DeadLetters).failures

    def nexus_enable(self, *, on: bool) -> Enabled:
        """Have documents synced with the graph, or not."""
        return self._read(self._send("POST", f"/v1/nexus/{'enable' if on else 'disable'}"), Enabled)

    def nexus_trigger(self, collection: str | None) -> Retried:
        """Have documents tried again that were given up, of one collection or of all."""
        body = msgspec.json.encode({"collection": collection} if collection is not None else {})
        return self._read(self._send_json("POST", "/v1/nexus/trigger", body), Retried)

    def nexus_events(self, limit: int) -> list[DeadEvent]:
        """Events for outside that were given up, oldest first."""
        answer = self._send("GET", "/v1/nexus/events", params={"limit": limit})
        return self._read(answer, DeadEvents).events

    def nexus_retry_events(self) -> Retried:
        """Have events sent again that were given up."""
        return self._read(self._send("POST", "/v1/nexus/events/retry"), Retried)

    def nexus_look(self, kind: Kind) -> LookAsked:
        """Have the graph compared with the rows, or made anew. Raises StorageFailed while that goes on already."""
        return self._read(self._send("POST", f"/v1/nexus/{kind}"), LookAsked)

    # -- one request -------------------------------------------------------------------

    def _send_json(self, method: str, url: str, body: bytes) -> httpx.Response:
        return self._send(method, url, headers={"Content-Type": "application/json"}, content=lambda: iter([body]))

    def _send(
        self,
        method: str,
        url: str,
        *,
        headers: dict[str, str] | None = None,
        params: dict[str, Any] | None = None,
        content: Callable[[], Iterator[bytes]] | None = None,
    ) -> httpx.Response:
        failures = 0
        while True:
            try:
                answer = self._http.request(
                    method,
                    url,
                    headers=headers,
                    params=params,
                    content=content() if content else None,
                    timeout=httpx.Timeout(_ACCEPT_SECONDS, connect=10.0) if content else httpx.USE_CLIENT_DEFAULT,
                )
            except httpx.TransportError as error:
                failures += 1
                self._pause(failures, error)
                continue
            if not answer.is_error:
                return answer
            busy = answer.status_code == 429 and answer.headers.get("Retry-After", "").isdigit()
            if busy and self._waits is not None:
                self._waits(self._why(answer))
            else:
                failures += 1
            self._wait_or_refuse(answer, failures)

    def _wait_or_refuse(self, answer: httpx.Response, failures: int) -> None:
        """Wait until the same may be asked again; raise what the answer says where that is of no use."""
        if answer.status_code not in _RETRYABLE or failures >= self._tries:
            self._refuse(answer)
        wait = answer.headers.get("Retry-After", "")
        time.sleep(min(_TRIES.longest_wait, float(wait)) if wait.isdigit() else _TRIES.wait(failures))

    def _pause(self, failures: int, error: httpx.TransportError) -> None:
        if failures >= self._tries:
            raise StorageFailed(f"No export server answers at {self._url}: {error}", url=self._url) from error
        time.sleep(_TRIES.wait(failures))

    def _stream(self, job_id: str, since: int) -> Iterator[Event]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(since)}
        url = f"/v1/exports/{job_id}/events/stream"
        with self._http.stream("GET", url, headers=headers, params={"sinceSeq": since}) as answer:
            if answer.is_error:
                return
            data: list[str] = []
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    data.append(line[5:].removeprefix(" "))
                elif not line and data:
                    yield msgspec.json.decode("\n".join(data), type=Event)
                    data.clear()

    def _read(self, answer: httpx.Response, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except MALFORMED as error:
            raise StorageFailed(f"{self._url} answered what is no {kind.__name__}: {error}", url=self._url) from error

    def _why(self, answer: httpx.Response) -> str:
        try:
            return msgspec.json.decode(answer.content, type=ErrorBody).error.message
        except MALFORMED:
            return f"{self._url} answered {answer.status_code} {answer.reason_phrase}"

    def _refuse(self, answer: httpx.Response) -> NoReturn:
        try:
            said = msgspec.json.decode(answer.content, type=ErrorBody).error
        except MALFORMED as error:
            raise StorageFailed(self._why(answer)) from error
        details: dict[str, Any] = {} if said.details is msgspec.UNSET else said.details
        classes: dict[str, type[ExportError]] = {
            c.code: c for c in (InvalidRequest, PayloadTooLarge, UnsupportedMediaType, Canceled)
        }
        if said.code == "UNAUTHORIZED":
            raise InvalidRequest(f"{said.message} (set MEMVID_EXPORT_API_KEY)", **details)
        ours = answer.is_client_error and answer.status_code not in _RETRYABLE
        kind = classes.get(said.code) or (InvalidRequest if ours else StorageFailed)
        raise kind(f"{said.message} ({said.code})", **details, answered=said.code)


def _compress(graph: Path, to: BinaryIO) -> None:
    """The same graph as gzip, in a file: so its length and its hash are known before the first byte is sent. Raises
    StorageFailed where there is no room for it."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, 31)
    with graph.open("rb") as file:
        try:
            while chunk := file.read(_CHUNK):
                to.write(deflate.compress(chunk))
            to.write(deflate.flush())
            to.flush()
        except OSError as error:
            raise StorageFailed(f"{graph.name} cannot be compressed: {error.strerror or error}") from error


def _upload(body: BinaryIO, total: int, on_bytes: Callable[[int, int], None]) -> Iterator[bytes]:
    """The body from its start, as often as it is asked for; ``on_bytes`` hears of as large a share of ``total``."""
    size = body.seek(0, os.SEEK_END)
    body.seek(0)
    while chunk := body.read(_CHUNK):
        yield chunk
        on_bytes(total * body.tell() // size, total)


def _collection(name: str) -> str:
    return f"/v1/collections/{quote(name, safe='')}"


def _plain(name: str) -> str:
    """A file name from the server, which must be one. Raises StorageFailed."""
    if not name or name != Path(name).name or name.startswith("."):
        raise StorageFailed(f"The server names a file {name!r}, which is no plain file name")
    return name


def _check_digest(headers: httpx.Headers, found: str, what: str) -> None:
    """Compare a SHA-256 (hex) with ``Content-Digest``. Raises StorageFailed."""
    if sha256_in(headers.get("Content-Digest", "")) != found:
        raise StorageFailed(f"{what} is not what the server announces: Content-Digest differs or is missing")
