"""Storage in one bucket of a store that speaks S3."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import math
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote, urlencode

from common.errors import STORE, AccessDenied, ExportError, InvalidRef, InvalidSettings, ObjectMissing, StorageFailed
from common.storage.file import sha256_of
from common.storage.port import Found, S3Config, Stored
from common.storage.ranges import Broken, Opened, Stream, age_of, download, patiently, read_range

PART = 8 << 20
"""A file of at most so many bytes goes up in one request; larger ones in parts of at least so many."""
MAX_PARTS = 10_000
WINDOW = 10
"""Parts that go up at once: 80 MiB in memory (more for files above 78 GiB, whose parts are larger)."""
MAX_LINK_SECONDS = 7 * 86_400
MAX_KEY_BYTES = 1_024
_ENCRYPTION_HEADERS = {
    "ServerSideEncryption": "x-amz-server-side-encryption",
    "SSEKMSKeyId": "x-amz-server-side-encryption-aws-kms-key-id",
}
_TRANSIENT = ("InternalError", "NoSuchUpload", "RequestTimeout", "ServiceUnavailable", "SlowDown")
_PIECE = 256 << 10
"""Larger ones cost more in page faults than in calls."""
_CONNECT_SECONDS, _READ_SECONDS = 5, 30


class S3Storage:
    """Objects of one bucket; a ref of another one is refused before anything is asked.

    The bucket's credentials need to list it: without that a store answers 403 where nothing lies. Requests are tried
    5 times, with boto3's pauses between; a connection may take 5 s to come up and be silent for 30 s.
    """

    def __init__(self, config: S3Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._made: Any = None

    def put(self, source: Path, ref: str, *, sha256: str | None = None) -> Stored:
        """Put a file: in parts with a SHA-256 each, none of which stays behind when it fails."""
        key = self._key(ref)
        with _failing_as(ref):
            size = source.stat().st_size
            stored = Stored(ref, size, (sha256 or sha256_of(source)).lower())
            options = {**self._address(key), **self._encryption(), "Metadata": {"sha256": stored.sha256}}
            if size <= PART:
                data = source.read_bytes()
                if len(data) != size:
                    raise StorageFailed(f"{source.name} changed while it was stored")
                self._send("put_object", ref, **options, Body=data)
            else:
                self._put_parts(source, stored, options)
        return stored

    def write(self, ref: str, data: bytes, *, only_new: bool = False) -> bool:
        """Put a few bytes. A writer whose request was answered only the second time still knows that it was first."""
        key, mark = self._key(ref), secrets.token_hex(16)
        options = {**self._address(key), **self._encryption(), "Metadata": {"writer": mark}}
        if only_new:
            options["IfNoneMatch"] = "*"

        def attempt() -> bool:
            from botocore.exceptions import ClientError

            try:
                self._client.put_object(**options, Body=data, ChecksumSHA256=_checksum(data))
            except ClientError as error:
                if not only_new or _status(error) not in (409, 412):
                    raise _error(ref, error) from error
                if _status(error) == 409:  # two at once: S3 asks to try again
                    raise Broken(f"another writes {ref}") from error
                if not error.response["ResponseMetadata"].get("RetryAttempts"):
                    return False
                head = self._client.head_object(**self._address(key))
                return bool(head["Metadata"].get("writer") == mark)
            return True

        with _failing_as(ref):
            return patiently(attempt)

    def local(
        self, ref: str, scratch: Path, *, size: int | None = None, sha256: str | None = None, limit: int | None = None
    ) -> Path:
        """Fetch an object by ranges of 8 MiB, 10 at once, hashed while it is written."""
        return download(self._object(ref), ref, scratch, size=size, sha256=sha256, limit=limit)

    def size(self, ref: str) -> int | None:
        """Bytes at ``ref``, None where nothing is."""
        self._key(ref)
        return next((at.size for at in self.found(ref)), None)

    def read(self, ref: str, start: int, length: int) -> Iterator[bytes]:
        """Pieces of at most 1 MiB; goes on where it was when a connection breaks."""
        return read_range(self._object(ref), start, length)

    def found(self, prefix: str, *, uploads: bool = False) -> list[Found]:
        """The objects under ``prefix``, or the one at a ref; with ``uploads`` unfinished uploads under the prefix."""
        if not prefix.endswith("/"):
            with contextlib.suppress(ObjectMissing), contextlib.closing(Stream(self._object(prefix), 0, 1)) as stream:
                return [Found(prefix, stream.size or 0, stream.age, stream.tag or "")]
            return []
        found, key = [], self._key(prefix, prefix=True)
        with _failing_as(prefix):
            for page in self._pages("list_objects_v2", Prefix=key):
                for item in page.get("Contents", []):
                    if not item["Key"].endswith("/"):  # a folder's marker, made by other programs
                        age = age_of(item["LastModified"], page["ResponseMetadata"]["HTTPHeaders"].get("date"))
                        found.append(Found(prefix + quote(item["Key"].removeprefix(key)), item["Size"], age))
            for page in self._pages("list_multipart_uploads", Prefix=key) if uploads else ():
                for upload in page.get("Uploads", []):
                    age = age_of(upload["Initiated"], page["ResponseMetadata"]["HTTPHeaders"].get("date"))
                    found.append(Found(prefix + quote(upload["Key"].removeprefix(key)), 0, age))
        return sorted(found)

    def delete(self, prefix: str) -> int:
        """Abort the unfinished uploads, then remove the objects, a thousand with one request."""
        key, whole, count = self._key(prefix, prefix=True), prefix.endswith("/"), 0
        if not key:
            raise InvalidRef("a whole bucket is not deleted", field="ref")
        with _failing_as(prefix):
            for page in self._pages("list_multipart_uploads", Prefix=key):
                for upload in page.get("Uploads", []):
                    if whole or upload["Key"] == key:
                        self._abort(self._address(upload["Key"]), upload["UploadId"])
            if not whole:
                count = len(self.found(prefix))
                self._client.delete_object(**self._address(key))
                return count
            for page in self._pages("list_objects_v2", Prefix=key):
                keys = [{"Key": item["Key"]} for item in page.get("Contents", [])]
                if not keys:
                    continue
                done = self._client.delete_objects(Bucket=self._config.bucket, Delete={"Objects": keys, "Quiet": True})
                for error in done.get("Errors", []):
                    raise _refusal(self._ref(error["Key"]), error.get("Code", ""), error.get("Message", ""))
                count += len(keys)
        return count

    def link(self, ref: str, method: Literal["GET", "PUT"], seconds: float) -> str:
        """A signed URL, good for at most 7 days and no longer than the credentials that signed it.

        Where objects are encrypted by the store, its fragment names the headers that a PUT has to send (as a query
        string: ``#x-amz-server-side-encryption=AES256``); they are part of what is signed.
        """
        key = self._key(ref)
        encryption = self._encryption() if method == "PUT" else {}
        params = {**self._address(key), **encryption}
        with _failing_as(ref):
            url: str = self._client.generate_presigned_url(
                {"GET": "get_object", "PUT": "put_object"}[method],
                Params=params,
                ExpiresIn=max(1, min(MAX_LINK_SECONDS, math.ceil(seconds))),
            )
        headers = {_ENCRYPTION_HEADERS[name]: value for name, value in encryption.items()}
        return f"{url}#{urlencode(headers)}" if headers else url

    def _put_parts(self, source: Path, stored: Stored, options: dict[str, Any]) -> None:
        address = {name: options[name] for name in ("Bucket", "Key")}
        part_size = max(PART, -(-stored.size // MAX_PARTS))
        upload = self._client.create_multipart_upload(**options, ChecksumAlgorithm="SHA256")["UploadId"]
        try:
            with source.open("rb") as file, ThreadPoolExecutor(WINDOW, thread_name_prefix="upload") as pool:

                def put_part(number: int) -> dict[str, Any]:
                    start = (number - 1) * part_size
                    data = os.pread(file.fileno(), part_size, start)
                    if len(data) != min(part_size, stored.size - start):
                        raise StorageFailed(f"{source.name} changed while it was stored")
                    at = {**address, "UploadId": upload, "PartNumber": number}
                    checksum, answer = self._send("upload_part", stored.ref, **at, Body=data)
                    return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum}

                parts = [pool.submit(put_part, number) for number in range(1, -(-stored.size // part_size) + 1)]
                try:
                    wait(parts, return_when=FIRST_EXCEPTION)
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)
                done = [part.result() for part in parts if not part.cancelled()]
            self._complete(address, upload, stored, done)
        except BaseException:
            # What went wrong first is what the caller wants to know; a later delete() aborts what is left.
            with contextlib.suppress(ExportError), _failing_as(stored.ref):
                self._abort(address, upload)
            raise

    def _send(self, operation: str, ref: str, *, Body: bytes, **options: Any) -> tuple[str, Any]:  # noqa: N803  boto3's names
        """Send bytes with their SHA-256 (base64), which is answered too; again where they were spoiled on their way."""
        checksum = _checksum(Body)

        def attempt() -> Any:
            with _failing_as(ref):
                return getattr(self._client, operation)(**options, Body=Body, ChecksumSHA256=checksum)

        return checksum, patiently(attempt)

    def _complete(self, address: Mapping[str, str], upload: str, stored: Stored, parts: list[dict[str, Any]]) -> None:
        from botocore.exceptions import ClientError

        try:
            self._client.complete_multipart_upload(**address, UploadId=upload, MultipartUpload={"Parts": parts})
        except ClientError as error:
            if _code(error) != "NoSuchUpload":
                raise
            # Either the answer to a first try got lost, or somebody aborted the upload.
            if not self._lies_there(address, stored):
                raise StorageFailed(f"the upload of {stored.ref} was aborted by another") from error

    def _lies_there(self, address: Mapping[str, str], stored: Stored) -> bool:
        """Whether the object at an address is the one that was to be stored."""
        from botocore.exceptions import ClientError

        try:
            head = self._client.head_object(**address)
        except ClientError as error:
            if _status(error) != 404:
                raise
            return False
        return (head["ContentLength"], head["Metadata"].get("sha256")) == (stored.size, stored.sha256)

    def _abort(self, address: Mapping[str, str], upload: str) -> None:
        from botocore.exceptions import ClientError

        try:
            self._client.abort_multipart_upload(**address, UploadId=upload)
        except ClientError as error:
            if _code(error) != "NoSuchUpload":
                raise

    def _pages(self, operation: str, **options: str) -> Iterator[Any]:
        yield from self._client.get_paginator(operation).paginate(Bucket=self._config.bucket, **options)

    def _object(self, ref: str) -> _Object:
        return _Object(ref, self._address(self._key(ref)), lambda: self._client)

    def _address(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._config.bucket, "Key": key}

    def _encryption(self) -> dict[str, str]:
        kind = self._config.encryption
        if kind is None or kind in ("AES256", "aws:kms"):
            return {"ServerSideEncryption": kind} if kind else {}
        return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kind.removeprefix("aws:kms:")}

    def _ref(self, key: str) -> str:
        return f"s3://{self._config.bucket}/{quote(key)}"

    def _key(self, ref: str, *, prefix: bool = False) -> str:
        """The key that a ref names. Raises InvalidRef for one of another bucket, or one that is no ref of an object."""
        scheme, _, rest = ref.partition("://")
        bucket, _, path = rest.partition("/")
        if scheme != "s3" or bucket != self._config.bucket:
            raise InvalidRef(
                f"the bucket {bucket[:80]!r} is not read or written here",
                field="ref",
                allowed=f"s3://{self._config.bucket}/",
            )
        try:
            key = unquote(path, errors="strict")
            size = len(key.encode())
        except UnicodeError:  # not UTF-8, or half a character
            key, size = "", 0
        parts = key.removesuffix("/").split("/")
        if (prefix and not path) or not (
            any(part in ("", ".", "..") for part in parts)
            or any(sign in path for sign in "?#")
            or any(ord(letter) < 32 or ord(letter) == 127 for letter in key)
            or (key.endswith("/") and not prefix)
            or size > MAX_KEY_BYTES
        ):
            return key
        raise InvalidRef(f"not a ref of an object: {ref[:200]!a}", field="ref", allowed="s3://bucket/key")

    @property
    def _client(self) -> Any:
        """boto3's client, made when it is first needed: importing boto3 takes half a second."""
        with self._lock:
            if self._made is None:
                import boto3
                from botocore.config import Config
                from botocore.exceptions import BotoCoreError

                config = Config(
                    signature_version="s3v4",
                    # The SHA-256 of what we send is among the headers that are signed; no need for a second one.
                    s3={"addressing_style": self._config.addressing, "payload_signing_enabled": False},
                    retries={"mode": "standard", "total_max_attempts": STORE.most},
                    connect_timeout=_CONNECT_SECONDS,
                    read_timeout=_READ_SECONDS,
                    max_pool_connections=2 * WINDOW,
                    # We send SHA-256 sums of our own; other stores than Amazon's may not know the CRCs that boto3
                    # would add, and signed URLs would ask for them.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                )
                try:
                    session = boto3.Session()
                    self._made = session.client("s3", region_name=session.region_name or "us-east-1", config=config)
                except (BotoCoreError, ValueError) as error:  # no profile of that name, an endpoint that is no URL, …
                    raise InvalidSettings(f"the AWS_ settings are wrong: {error}", field="AWS_") from error
            return self._made


class _Object:
    """One object, as a source of ranges."""

    def __init__(self, ref: str, address: Mapping[str, str], client: Callable[[], Any]) -> None:
        self.name = ref
        self._address, self._client = address, client

    def open(self, start: int, stop: int | None, tag: str | None) -> Opened:
        """Ask for a range; boto3 has tried again where that may help, so no failure here is Broken."""
        from botocore.exceptions import ClientError

        options = {**self._address, "Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        if tag is not None:
            options["IfMatch"] = tag
        with _failing_as(self.name):
            try:
                answer = self._client().get_object(**options)
            except ClientError as error:
                if _status(error) == 416 and start == 0:  # an empty object has no first byte
                    head = self._client().head_object(**self._address)
                    age = age_of(head["LastModified"], head["ResponseMetadata"]["HTTPHeaders"].get("date"))
                    return Opened(0, head["ETag"], 0, True, age, iter(()), lambda: None)
                raise
        body = answer["Body"]
        size = answer.get("ContentRange", "").rpartition("/")[2]
        return Opened(
            size=int(size) if size.isdigit() else answer["ContentLength"],
            tag=answer["ETag"],
            start=start if size else 0,
            ranged=bool(size),
            age=age_of(answer["LastModified"], answer["ResponseMetadata"]["HTTPHeaders"].get("date")),
            body=_pieces(self.name, body),
            close=body.close,
        )


def _pieces(name: str, body: Any) -> Iterator[bytes]:
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    try:
        yield from body.iter_chunks(_PIECE)
    except (BotoCoreError, HTTPError, OSError) as error:
        raise Broken(f"reading {name} broke off: {error}") from error


def _checksum(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextlib.contextmanager
def _failing_as(ref: str) -> Iterator[None]:
    """Errors of boto3 as ours. What boto3 may be right about the second time it has tried already."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,  # noqa: A004  botocore's, which is no OSError
        HTTPClientError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
    )

    try:
        yield
    except ClientError as error:
        raise _error(ref, error) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise AccessDenied(f"{ref}: there are no credentials for the store: {error}") from error
    except ParamValidationError as error:
        raise InvalidRef(f"{ref}: {error}", field="ref") from error
    except (ConnectionError, HTTPClientError) as error:
        raise StorageFailed(f"{ref}: the store cannot be reached: {error}") from error
    except BotoCoreError as error:
        raise StorageFailed(f"{ref}: {error}") from error
    except OSError as error:
        raise StorageFailed(f"{ref}: {error.strerror or error}", errno=error.errno) from error


def _error(ref: str, error: Any) -> ExportError:
    """What a refusal of the store means."""
    code, status = _code(error), _status(error)
    return _refusal(ref, code, str(error.response.get("Error", {}).get("Message", "")), status)


def _refusal(ref: str, code: str, message: str, status: int = 0) -> ExportError:
    said = " ".join(filter(None, [f"{ref}: the store answered", str(status or ""), code, message and f"({message})"]))
    if code == "NoSuchBucket":
        return InvalidRef(said, field="ref", store=code)
    if status == 404 and code != "NoSuchUpload":
        return ObjectMissing(said, store=code)
    if status in (401, 403) or code in ("ExpiredToken", "InvalidToken", "AccessDenied", "TokenRefreshRequired"):
        return AccessDenied(said, store=code)
    if code in ("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody"):
        return Broken(said, store=code)  # spoiled on its way
    if status >= 500 or status in (408, 409, 412, 416, 429) or code in _TRANSIENT:
        return StorageFailed(said, store=code)
    return InvalidRef(said, field="ref", store=code)
