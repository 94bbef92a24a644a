"""Files of a finished job over HTTP: ranges, validators, digests; never other bytes than were published."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import msgspec
import structlog
from litestar import HttpMethod
from litestar.types import Receive, Scope, Send

from common.contract import MALFORMED, Manifest
from common.errors import AccessDenied, ExportError, InvalidRef, ObjectMissing, StorageFailed
from common.storage import Storage
from control_plane.digests import digest_of
from control_plane.errors import ArtifactMissing, RangeNotSatisfiable
from control_plane.jobs.holds import LONGEST_SECONDS, Holds
from control_plane.jobs.records import JobRecord
from control_plane.jobs.store import JobStore
from control_plane.operations.metrics import Metrics
from control_plane.operations.shares import Shares
from handler.job import MAX_MANIFEST_BYTES, same_manifest, sha256_at

log = structlog.get_logger()

Kind = Literal["capsule", "sidecar", "manifest"]
COMPARISONS = 4
"""Files compared with their hashes at once, each with 1 MiB in memory."""
MAX_COMPARED = 10_000
"""Files of which is remembered that they were compared, about 3 MB."""


class Patience(NamedTuple):
    """How many seconds an answer may take."""

    total: float = LONGEST_SECONDS
    piece: float = 120.0
    """Until the client has read what was sent before: 1 MiB."""


_RANGE = re.compile(r"bytes=\s*([0-9]*)-([0-9]*)\s*$", re.IGNORECASE)
_MAX_DIGITS = 18
"""A longer number lies behind the end of any file; its value does not matter."""


class Artifact(NamedTuple):
    """A file that can be downloaded."""

    kind: Kind
    ref: str
    file_name: str
    media_type: str
    size: int
    sha256: str


class _Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    span: range
    tag: str
    """What the file had when it was looked at."""
    compared: bool
    """Its bytes are those of the export; else that is seen while they are sent."""


class Downloads:
    """Hands out the files of finished jobs: bounded in number and in time, and never other bytes than were published.

    A file on disk is compared with its SHA-256 before its first answer, and is not read again for that while its
    inode, size and time of change stay the same. An object in a store is compared whenever it is sent whole, and before
    a part of it or "not changed" is answered; that is remembered by its ETag. What differs is noted, and nobody gets
    the files of that job any more.
    """

    def __init__(
        self,
        storage: Storage,
        store: JobStore,
        *,
        holds: Holds,
        metrics: Metrics,
        shares: Shares,
        patience: Patience = Patience(),  # noqa: B008  it cannot be changed
    ) -> None:
        self.storage = storage
        self.holds = holds
        self.metrics = metrics
        self.shares = shares
        self.patience = patience
        self._store = store
        self._compared: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._comparing: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(COMPARISONS)

    async def look(self, artifact: Artifact) -> tuple[int, str]:
        """Size and tag of what lies there now. Raises ArtifactMissing, StorageFailed."""
        with _stored(artifact.kind):
            found = await asyncio.to_thread(_look, self.storage, artifact.ref)
        if found is None:
            raise _missing(artifact.kind)
        return found

    def known(self, artifact: Artifact, tag: str) -> bool:
        """Whether the file of this tag was compared."""
        known = (artifact.ref, tag) in self._compared
        if known:
            self._compared.move_to_end((artifact.ref, tag))
        return known

    def remember(self, artifact: Artifact, tag: str) -> None:
        """The file of this tag has the bytes that it should have."""
        self._compared[artifact.ref, tag] = None
        while len(self._compared) > MAX_COMPARED:
            self._compared.popitem(last=False)

    async def compare(self, job: JobRecord, artifact: Artifact, tag: str) -> None:
        """Read the whole file and compare its hash, once for all who ask at the same time. Raises ArtifactMissing,
        StorageFailed."""
        key = (artifact.ref, tag)
        if (task := self._comparing.get(key)) is None:
            task = self._comparing[key] = asyncio.create_task(self._compare(job, artifact, tag))
            task.add_done_callback(lambda done: self._done(key, done))
        await asyncio.shield(task)  # who waits may go, the others stay

    async def _compare(self, job: JobRecord, artifact: Artifact, tag: str) -> None:
        async with self._turns:
            with _stored(artifact.kind):
                found = await asyncio.to_thread(sha256_at, self.storage, artifact.ref, artifact.size)
        if found != artifact.sha256:
            raise await self.damaged(job, artifact, "its SHA-256 differs")
        if (await self.look(artifact))[1] != tag:
            raise StorageFailed(f"The {artifact.kind} was replaced while it was read. Try again.")
        self.remember(artifact, tag)

    def _done(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        del self._comparing[key]
        if not task.cancelled():
            task.exception()  # whoever waited has seen it

    async def damaged(self, job: JobRecord, artifact: Artifact, what: str) -> ArtifactMissing:
        """Note that a file is not what was published; answers the error that says so."""
        text = f"the {artifact.kind} {artifact.file_name} is damaged: {what}"
        log.error("a stored file is damaged", job_id=job.id, file=artifact.kind, ref=artifact.ref, reason=what)
        # The capsule is whole without its sidecar, which read tools make anew from it.
        if artifact.kind == "sidecar" or await self._store.damaged(job.id, text):
            self.metrics.damage.labels(artifact.kind).inc()
        return ArtifactMissing(f"The files of this export cannot be given out: {text}.", damage=text)


class Download:
    """An ASGI answer with a file or a part of it, or why there is none."""

    def __init__(
        self,
        downloads: Downloads,
        job: JobRecord,
        artifact: Artifact,
        headers: Mapping[str, str],
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self._downloads = downloads
        self._job = job
        self._artifact = artifact
        self._asked = headers
        self._extra = dict(extra or {})
        self._data: bytes | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; to HEAD without the body.

        Raises RateLimited, JobExpired, ArtifactMissing, RangeNotSatisfiable, StorageFailed before anything is sent.
        From then on the connection is cut where the rest cannot be sent.
        """
        downloads, head = self._downloads, scope.get("method") == HttpMethod.HEAD
        with downloads.shares.place(scope["auth"].client), downloads.metrics.downloads.track_inprogress():
            async with downloads.holds.reading([self._job]):
                answer = await self._prepare()
                sending = asyncio.create_task(self._send(answer, send, head=head))
                await finish(sending, receive, downloads.patience.total, "download", job_id=self._job.id)

    async def _prepare(self) -> _Answer:
        if self._artifact.kind == "manifest":
            self._data = await self._manifest()
            found = hashlib.sha256(self._data).hexdigest()
            self._artifact = self._artifact._replace(size=len(self._data), sha256=found)
            tag, compared = "", True
        else:
            size, tag = await self._downloads.look(self._artifact)
            if size != self._artifact.size:
                what = f"it has {size:,} bytes, not {self._artifact.size:,}"
                raise await self._downloads.damaged(self._job, self._artifact, what)
            compared = self._downloads.known(self._artifact, tag)
        status, headers, span = self._conditions()
        if status == 200 and not _is_file(self._artifact.ref) and self._data is None:
            compared = False  # while it is sent
        elif not compared:
            await self._downloads.compare(self._job, self._artifact, tag)
            compared = True
        return _Answer(status, headers, span, tag, compared)

    async def _manifest(self) -> bytes:
        """The bytes of the manifest, which say what the database says."""
        with _stored(self._artifact.kind):
            data = await asyncio.to_thread(_read_small, self._downloads.storage, self._artifact.ref)
        try:
            expected = self._job.manifest
            same = expected is not None and same_manifest(msgspec.json.decode(data or b"", type=Manifest), expected)
        except MALFORMED:
            same = False
        if not same or data is None:
            raise await self._downloads.damaged(self._job, self._artifact, "it is not the one that was published")
        return data

    def _conditions(self) -> tuple[int, dict[str, str], range]:
        artifact, asked = self._artifact, self._asked
        etag = f'"{artifact.sha256}"'
        digest = digest_of(artifact.sha256)
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, no-cache", **self._extra}
        if _matches(asked.get("if-none-match"), etag):
            return 304, headers, range(0)
        headers |= {
            "Content-Type": artifact.media_type,
            "Content-Disposition": content_disposition(artifact.file_name),
            "Repr-Digest": digest,
        }
        span = _span(asked.get("range"), artifact.size) if asked.get("if-range", etag) == etag else None
        if span is None:
            headers |= {"Content-Length": str(artifact.size), "Content-Digest": digest}
            return 200, headers, range(artifact.size)
        headers |= {
            "Content-Length": str(len(span)),
            "Content-Range": f"bytes {span.start}-{span.stop - 1}/{artifact.size}",
        }
        return 206, headers, span

    async def _send(self, answer: _Answer, send: Send, *, head: bool) -> None:
        """The last piece goes out only when it is known that all of them are right."""
        headers = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in answer.headers.items()]
        seconds = self._downloads.patience.piece
        await sent(send, {"type": "http.response.start", "status": answer.status, "headers": headers}, seconds)
        last = b""
        if answer.span and not head:
            digest = None if answer.compared else hashlib.sha256()
            pieces = self._pieces(answer.span)
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                if last:
                    await sent(send, {"type": "http.response.body", "body": last, "more_body": True}, seconds)
                if digest is not None:
                    await asyncio.to_thread(digest.update, piece)
                last = piece
            await self._check_end(answer, digest)
        await sent(send, {"type": "http.response.body", "body": last, "more_body": False}, seconds)

    def _pieces(self, span: range) -> Iterator[bytes]:
        if self._data is not None:
            return iter([self._data[span.start : span.stop]])
        return self._downloads.storage.read(self._artifact.ref, span.start, len(span))

    async def _check_end(self, answer: _Answer, digest: hashlib._Hash | None) -> None:
        if self._data is not None:
            return
        if digest is not None:
            if digest.hexdigest() != self._artifact.sha256:
                raise await self._downloads.damaged(self._job, self._artifact, "its SHA-256 differs")
            self._downloads.remember(self._artifact, answer.tag)
            return
        try:
            _, tag = await self._downloads.look(self._artifact)
        except ArtifactMissing:  # it was removed while it was sent, which does not change what was read
            return
        if tag != answer.tag:
            raise StorageFailed(f"the {self._artifact.kind} was replaced while it was sent")


async def finish(
    sending: asyncio.Task[None], receive: Receive, seconds: float | None, what: str, **about: object
) -> None:
    """Let an answer be sent until it is, its client goes, or its time is over. One that fails is logged, and the server
    cuts its connection."""
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait([sending, leaving], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        late = not sending.done() and not leaving.done()
    finally:
        sending.cancel()
        leaving.cancel()
        await asyncio.gather(sending, leaving, return_exceptions=True)
    if late:
        log.warning("cut off: its time is over", answer=what, seconds=seconds, **about)
    elif not sending.cancelled() and (error := sending.exception()) is not None:
        if not isinstance(error, ExportError | TimeoutError):
            raise error
        log.warning("cut off", answer=what, reason=str(error) or "nothing was read in time", **about)


async def sent(send: Send, message: Any, seconds: float) -> None:
    """Send a message; a client that reads nothing for so long gets no more. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        await send(message)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@contextmanager
def _stored(kind: Kind) -> Iterator[None]:
    """What a store says, as what it means to who downloads. Raises ArtifactMissing, StorageFailed."""
    try:
        yield
    except ObjectMissing as error:
        raise _missing(kind) from error
    except (AccessDenied, InvalidRef) as error:
        # Our own credentials, or a storage that is set to another place: not the client's fault.
        log.error("the storage does not give a file", file=kind, code=error.code, reason=error.message)
        raise StorageFailed(f"The storage does not give the {kind} now. Try again later.") from error
    except OSError as error:
        raise StorageFailed(f"The {kind} cannot be read: {error.strerror or error}.") from error


def _missing(kind: Kind) -> ArtifactMissing:
    return ArtifactMissing(f"The {kind} of this export is not where it should be.")


def _is_file(ref: str) -> bool:
    return ref.startswith("file:")


def _look(storage: Storage, ref: str) -> tuple[int, str] | None:
    """Size and tag of what lies at a ref."""
    try:
        if _is_file(ref):
            status = storage.local(ref, Path()).stat()  # the file itself: nothing is fetched
            return status.st_size, f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
        found = storage.found(ref)
    except (ObjectMissing, FileNotFoundError):
        return None
    return (found[0].size, found[0].tag) if found else None


def _read_small(storage: Storage, ref: str) -> bytes | None:
    """All bytes, None for more than a manifest has."""
    size = storage.size(ref)
    if size is None:
        raise ObjectMissing("nothing lies there")
    return b"".join(storage.read(ref, 0, size)) if size <= MAX_MANIFEST_BYTES else None


def content_disposition(file_name: str) -> str:
    """``attachment`` with a plain name for old clients and the true one for the rest (RFC 6266, RFC 8187)."""
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\%' else "_" for c in file_name)
    value = f'attachment; filename="{plain}"'
    return value if plain == file_name else f"{value}; filename*=UTF-8''{quote(file_name, safe='')}"


def _matches(header: str | None, etag: str) -> bool:
    if header is None:
        return False
    given = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in given or etag in given


def _span(header: str | None, size: int) -> range | None:
    """The asked bytes; None where the whole file is the answer (no range, several, or one that makes no sense)."""
    match = _RANGE.match(header) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - _number(last)), size
    else:
        start, stop = _number(first), min(size, _number(last) + 1) if last else size
        if last and _number(last) < start:
            return None
    if start >= stop:
        raise RangeNotSatisfiable(f"The file has {size:,} bytes.", size=size)
    return range(start, stop)


def _number(digits: str) -> int:
    return int(digits) if len(digits) <= _MAX_DIGITS else 10**_MAX_DIGITS
