"""Takes a request body to disk, checks it in a worker, and queues the job; the promise of 202 holds from then on."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import BinaryIO, NamedTuple

import structlog
from litestar.exceptions import HTTPException
from sqlalchemy.exc import SQLAlchemyError

from common.contract import Source
from common.errors import (
    AccessDenied,
    ExportError,
    InvalidRef,
    InvalidRequest,
    ObjectMissing,
    PayloadMismatch,
    PayloadTooLarge,
    StorageFailed,
    UnsupportedMediaType,
)
from common.graph import base_name_of
from common.storage import Storage, Stored
from control_plane.backends.checker import PayloadChecker
from control_plane.backends.port import Backend
from control_plane.digests import sha256_in
from control_plane.errors import QUOTA_HEADERS, JobNotFailed, PayloadGone, QueueFull, QuotaReached
from control_plane.exports.admission import Admission
from control_plane.jobs.layout import Layout
from control_plane.jobs.records import NO_QUOTA, JobRecord, NewJob, Quota
from control_plane.jobs.store import JobStore, now_ms
from control_plane.operations.disk import Disk
from control_plane.operations.keys import Caller
from control_plane.operations.metrics import Metrics
from control_plane.operations.profiles import Profiles
from control_plane.operations.shares import Shares
from control_plane.operations.tracing import current
from handler.protocol import Checked

log = structlog.get_logger()

CONTENT_TYPES = ("application/json", "application/x-ndjson", "application/ndjson", "application/octet-stream")
MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
MAX_UPLOADS = 64
CHUNK_SECONDS = 60.0
"""A body that brings nothing for so long is given up."""
UPLOAD_SECONDS = 3_600.0
"""So long a whole body may take, which is 140 KB a second for the largest one."""
PIECE = 1 << 20
DIGESTS = ("Content-Digest", "Repr-Digest")
MAX_KEY = 255
MAX_FILE_NAME = 255
_MAX_DISPOSITION = 4_096
"""Characters, enough for the longest name in both of its forms; reading takes the square of them: 3 s for 60,000."""


class Intake:
    """``POST /v1/exports``."""

    def __init__(
        self,
        store: JobStore,
        storage: Storage,
        layout: Layout,
        backend: Backend,
        *,
        checker: PayloadChecker,
        profiles: Profiles,
        metrics: Metrics,
        disk: Disk,
        uploads: Shares,
        capacity: int,
        max_bytes: int,
    ) -> None:
        self._store = store
        self._storage = storage
        self._layout = layout
        self._backend = backend
        self._checker = checker
        self._profiles = profiles
        self._admission = Admission(store, profiles, capacity=capacity)
        self._metrics = metrics
        self._disk = disk
        self._uploads = uploads
        self._max_bytes = max_bytes

    async def accept(
        self, headers: Mapping[str, str], chunks: AsyncIterator[bytes], caller: Caller, collection: str | None = None
    ) -> tuple[JobRecord, bool]:
        """Stage, check and queue a job of ``caller``; answers the job and whether it is a new one. ``collection``
        stands in for the body's option.

        Raises InvalidRequest, PayloadTooLarge, UnsupportedMediaType, QueueUnavailable, RateLimited, StorageFailed.
        """
        encoding = _encoding(headers)
        _check_content_type(headers)
        key = _idempotency_key(headers)
        source = _source(headers)
        announced = _digests(headers)
        await asyncio.to_thread(self._disk.check, self._check_length(headers))
        with self._counting():
            await self._admission.check_any()
            with self._uploads.place(caller.client):
                if key is None:  # with one it may be a retry, which is answered with the job that counts already
                    await self._store.check_quota(caller.client, caller.quota)
                return await self._accept(_Upload(chunks, encoding, announced), key, source, caller, collection)

    async def retry(self, job: JobRecord, caller: Caller) -> tuple[JobRecord, bool]:
        """Queue a failed job once more, as a new job with the same payload, of the same client; answers that job and
        whether it is new: a job is done again once.

        Raises JobNotFailed, PayloadGone, QueueUnavailable, RateLimited, StorageFailed.
        """
        if (first := await self._store.retry_of(job.id)) is not None:
            return first, False
        if job.status != "failed":
            raise JobNotFailed(f"Only an export that has failed is started again; this one is {job.status}.")
        if job.expires_at is None or job.expires_at <= now_ms():
            raise PayloadGone("The payload of this export is not kept any more; send the graph again.")
        await asyncio.to_thread(self._disk.check, job.payload_size)
        with self._counting():
            await self._admission.check_any()
            await self._admission.check(self._profiles.of_job(job.profile))
            with self._uploads.place(caller.client):
                return await self._again(job, caller)

    async def _again(self, job: JobRecord, caller: Caller) -> tuple[JobRecord, bool]:
        job_id = str(uuid.uuid4())
        ref = self._layout.payload_ref(job_id)
        folder = self._layout.incoming / job_id
        try:
            try:
                found = await asyncio.to_thread(self._fetched, job, folder)
            except (ObjectMissing, PayloadMismatch) as error:
                if (first := await self._store.retry_of(job.id)) is not None:  # who asked at the same time was quicker
                    return first, False
                log.error("a kept payload is of no use", code=error.code, reason=error.message)
                await self._store.let_go(job_id=job.id)
                raise PayloadGone("The payload of this export is damaged or gone; send the graph again.") from error
            staged = await self._put(found, ref, job.payload_sha256)
            begun = await self._store.events(job.id, 0, 1)  # what was counted before its 202 stands there
            record, new = await self._store.create(
                NewJob(
                    id=job_id,
                    backend=self._backend.name,
                    weight=job.weight,
                    session_id=job.session_id,
                    project_name=job.project_name,
                    payload_ref=staged.ref,
                    payload_sha256=staged.sha256,
                    payload_size=staged.size,
                    message="Queued once more, after an export that failed",
                    meta={**(begun[0].meta if begun else {}), "retryOf": job.id},
                    profile=job.profile,
                    base_name=job.base_name,
                    client=job.client,
                    trace=current().traceparent,
                    retry_of=job.id,
                    collection=job.collection,
                ),
                quota=caller.quota if caller.client == job.client else NO_QUOTA,
                entry=caller.did("export.retry", job_id),
            )
        except BaseException:
            await asyncio.shield(self._give_up(job_id, ref))
            raise
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))
        # The payload is the new job's from now on; what cannot be removed now is swept as a stray.
        await self._remove(self._layout.payload_ref(job.id) if new else ref)
        if new:
            self._metrics.accepted.inc()
            self._backend.wake()
        return record, new

    def _fetched(self, job: JobRecord, folder: Path) -> Path:
        """A file in ``folder`` with the payload of a job, its hash compared; what is stored stays where it is."""
        path = folder / "payload"
        try:
            folder.mkdir()
            found = self._storage.local(job.payload_ref, folder, size=job.payload_size, sha256=job.payload_sha256)
            if found.is_relative_to(folder):
                return found
            try:
                path.hardlink_to(found)
            except OSError:  # another file system, or one without links
                shutil.copyfile(found, path)
        except OSError as error:
            raise StorageFailed(f"The payload cannot be copied: {error.strerror or error}.") from error
        except (AccessDenied, InvalidRef) as error:
            log.error("the storage does not give a payload", code=error.code, reason=error.message)
            raise StorageFailed("The storage does not give the payload now. Try again later.") from error
        return path

    async def _accept(
        self, upload: _Upload, key: str | None, source: Source | None, caller: Caller, collection: str | None
    ) -> tuple[JobRecord, bool]:
        job_id = str(uuid.uuid4())
        structlog.contextvars.bind_contextvars(job_id=job_id)
        ref = self._layout.payload_ref(job_id)
        path = self._layout.incoming / job_id
        try:
            size, sha256 = await self._staged(path, upload)
            if key is not None and (first := await self._store.find_key(caller.client, key, sha256)) is not None:
                if collection not in (None, first.collection):
                    message = "This Idempotency-Key was used before with another collection; use a new key."
                    raise InvalidRequest(message, field="Idempotency-Key")
                return first, False
            try:
                checked = await self._checker.check(job_id, self._layout.incoming_ref(job_id), size, source)
            except PayloadTooLarge:
                self._metrics.refused.labels("graph").inc()
                raise
            await self._admission.check(self._profiles.get(checked.profile))
            staged = await self._put(path, ref, sha256)
            record, new = await self._store.create(
                self._new_job(job_id, staged, checked, caller, collection or checked.collection),
                key,
                quota=caller.quota,
                entry=caller.did("export.create", job_id),
            )
        except BaseException:
            await asyncio.shield(self._give_up(job_id, ref))
            raise
        finally:
            # Of 500 MB it takes a while; a request that is cut off does it all the same.
            await asyncio.shield(asyncio.to_thread(_discard, path))
        if new:
            self._metrics.accepted.inc()
            self._backend.wake()
        else:
            await self._remove(ref)
        return record, new

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count refusals by the queue and by a quota."""
        try:
            yield
        except QueueFull:
            self._metrics.refused.labels("queue").inc()
            raise
        except QuotaReached as error:
            self._metrics.refused.labels(str(error.details["quota"])).inc()
            raise

    async def quota_headers(self, caller: Caller) -> dict[str, str]:
        """How many jobs the client may have by each quota of its key, and how many more."""
        used = await self._store.quota_used(caller.client, caller.quota)
        return {
            QUOTA_HEADERS[name]: f"limit={limit}, remaining={max(0, limit - count)}"
            for name, limit, count in zip(Quota._fields, caller.quota, used, strict=True)
            if limit is not None and count is not None
        }

    async def _put(self, path: Path, ref: str, sha256: str) -> Stored:
        try:
            return await asyncio.to_thread(self._storage.put, path, ref, sha256=sha256)
        except (AccessDenied, InvalidRef, ObjectMissing) as error:
            # Our own credentials or bucket: not the client's fault.
            log.error("the storage does not take a payload", code=error.code, reason=error.message)
            raise StorageFailed("The storage does not take the payload now. Try again later.") from error

    def _new_job(self, job_id: str, staged: Stored, checked: Checked, caller: Caller, collection: str | None) -> NewJob:
        counts = {"nodes": checked.nodes, "relationships": checked.relationships, "files": checked.files}
        return NewJob(
            id=job_id,
            backend=self._backend.name,
            weight=checked.nodes + checked.relationships,
            session_id=checked.session_id,
            project_name=checked.project_name,
            payload_ref=staged.ref,
            payload_sha256=staged.sha256,
            payload_size=staged.size,
            message=f"Queued for export: {checked.nodes:,} nodes and {checked.relationships:,} relationships",
            meta=counts,
            profile=self._profiles.get(checked.profile).name,
            base_name=checked.base_name,
            client=caller.client,
            trace=current().traceparent,
            collection=collection,
        )

    async def _give_up(self, job_id: str, ref: str) -> None:
        # A request that was cut off while its job was being recorded may have made it all the same.
        try:
            made = await self._store.get(job_id) is not None
        except SQLAlchemyError as error:  # what went wrong first is what the client is told
            log.warning("a payload stays until the next sweep", ref=ref, reason=str(error))
            return
        if not made:
            await self._remove(ref)

    async def _remove(self, ref: str) -> None:
        try:
            await asyncio.to_thread(self._storage.delete, ref)
        except ExportError as error:
            log.warning("a payload stays until the next sweep", ref=ref, reason=error.message)

    async def _staged(self, path: Path, upload: _Upload) -> tuple[int, str]:
        try:
            size, sha256 = await self._write(path, upload)
        except OSError as error:
            raise StorageFailed(f"The body cannot be kept: {error.strerror or error}.") from error
        for name, value in upload.announced.items():
            if value != sha256:
                raise InvalidRequest(f"{name} does not fit the body: other bytes were sent than came here.", field=name)
        return size, sha256

    async def _write(self, path: Path, upload: _Upload) -> tuple[int, str]:
        encoding, digest = upload.encoding, hashlib.sha256()
        size, held = 0, bytearray()

        def flush(file: BinaryIO, data: bytearray) -> None:
            self._disk.check(len(data))
            file.write(data)
            digest.update(data)

        with await asyncio.to_thread(path.open, "xb") as file:
            async for chunk in _timed(upload.chunks):
                size += len(chunk)
                held += chunk
                if size > self._max_bytes:
                    raise self._too_large()
                if len(held) >= PIECE:
                    full, held = held, bytearray()
                    if size == len(full):
                        _check_magic(full, encoding)
                    await asyncio.to_thread(flush, file, full)
            if size == len(held):
                _check_magic(held, encoding)
            await asyncio.to_thread(flush, file, held)
        if not size:
            raise InvalidRequest("The body is empty; it must be a graph with nodes and relationships.", field="$")
        return size, digest.hexdigest()

    def _check_length(self, headers: Mapping[str, str]) -> int:
        """What the body announces to have, 0 where it does not say. Raises PayloadTooLarge."""
        length = headers.get("content-length", "")
        size = int(length) if length.isdecimal() else 0
        if size > self._max_bytes:
            raise self._too_large()
        return size

    def _too_large(self) -> PayloadTooLarge:
        self._metrics.refused.labels("payload_bytes").inc()
        limit = self._max_bytes
        return PayloadTooLarge(f"The body may have at most {limit:,} bytes.", field="$", limit=limit)


class _Upload(NamedTuple):
    """A body on its way."""

    chunks: AsyncIterator[bytes]
    encoding: str
    announced: dict[str, str]
    """SHA-256 (hex) by the header that announces it."""


def _discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # no reason to lose the answer
        log.warning("an upload stays until the next start", reason=error.strerror)


async def _timed(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    iterator = aiter(chunks)
    ends = asyncio.get_running_loop().time() + UPLOAD_SECONDS
    while True:
        try:
            async with asyncio.timeout(min(CHUNK_SECONDS, ends - asyncio.get_running_loop().time())):
                chunk = await anext(iterator, None)
        except TimeoutError as error:
            late = asyncio.get_running_loop().time() >= ends
            what = f"is not there after {UPLOAD_SECONDS:.0f}" if late else f"brought nothing for {CHUNK_SECONDS:.0f}"
            raise InvalidRequest(f"The body {what} seconds.", field="$") from error
        except HTTPException as error:
            raise InvalidRequest("The body ended before its announced length.", field="$") from error
        if chunk is None:
            return
        yield chunk


def _encoding(headers: Mapping[str, str]) -> str:
    encoding = headers.get("content-encoding", "identity").strip().lower() or "identity"
    if encoding not in ("identity", *MAGIC):
        raise UnsupportedMediaType(
            "Content-Encoding must be gzip, zstd or identity.", field="Content-Encoding", allowed=["gzip", "zstd"]
        )
    return encoding


def _digests(headers: Mapping[str, str]) -> dict[str, str]:
    """What ``Content-Digest`` and ``Repr-Digest`` (RFC 9530) announce: both are of the body as it is sent, compressed
    or not. Raises InvalidRequest for one without a SHA-256."""
    found = {}
    for name in DIGESTS:
        if (given := headers.get(name)) is None:
            continue
        if (digest := sha256_in(given)) is None:
            raise InvalidRequest(f"{name} must be sha-256=:<SHA-256 of the body in base64>:", field=name)
        found[name] = digest
    return found


def _check_content_type(headers: Mapping[str, str]) -> None:
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in CONTENT_TYPES:
        raise UnsupportedMediaType(
            f"Content-Type must be one of {', '.join(CONTENT_TYPES)}.",
            field="Content-Type",
            allowed=list(CONTENT_TYPES),
        )


def _check_magic(start: bytearray, encoding: str) -> None:
    if (magic := MAGIC.get(encoding)) and not start.startswith(magic):
        raise InvalidRequest(
            f"Content-Encoding says {encoding}, but the body does not begin like {encoding}.", field="Content-Encoding"
        )


def _source(headers: Mapping[str, str]) -> Source | None:
    """What the file's name says, for a graph that does not say where it comes from."""
    given = headers.get("content-disposition")
    if given is None:
        return None
    parsed = Message()
    # Header values come as Latin-1; names of other scripts are written as RFC 8187 has it (filename*=UTF-8''...).
    parsed["Content-Disposition"] = given
    try:
        name = (parsed.get_filename() or "") if len(given) <= _MAX_DISPOSITION else ""
        name = name.replace("\\", "/").rpartition("/")[2]
        name.encode()  # half a character cannot be stored
    except (ValueError, TypeError):  # of parameters that contradict each other, or an encoding that is none
        name = ""
    if not 0 < len(name) <= MAX_FILE_NAME:
        message = (
            f"Content-Disposition must name a file in 1 to {MAX_FILE_NAME} characters (attachment; filename=app.json)."
        )
        raise InvalidRequest(message, field="Content-Disposition")
    return Source(base_name=base_name_of(name))


def _idempotency_key(headers: Mapping[str, str]) -> str | None:
    key = headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= MAX_KEY and key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"Idempotency-Key must have 1 to {MAX_KEY} printable ASCII characters.", field="Idempotency-Key"
        )
    return key
