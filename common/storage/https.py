"""Objects at ``https://`` refs, read only, from hosts that are allowed and addresses that were looked at."""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import certifi
import httpcore
import httpx

from common.errors import AccessDenied, ExportError, InvalidRef, ObjectMissing, StorageFailed
from common.storage.port import Found, Stored
from common.storage.ranges import Broken, Opened, Stream, age_of, download, read_range

CONNECT_SECONDS, SILENT_SECONDS, TOTAL_SECONDS = 5.0, 30.0, 1_800.0
"""Bounds of one connection's start, of each wait for bytes, and of reading or writing one object with all retries."""
MAX_REDIRECTS = 3
MAX_CONNECTIONS = 20
_HEADERS = [("Accept-Encoding", "identity"), ("User-Agent", "memvid-export")]
_WORTH_ANOTHER_TRY = ("RequestTimeout", "BadDigest", "IncompleteBody")
"""Codes of a store that speaks S3, under status 400."""
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_SIX_TO_FOUR = ipaddress.IPv6Network("2002::/16")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether a numeric address lies on the public internet, with the IPv4 address that an IPv6 one may carry."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif found in _NAT64:
            found = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        elif found not in _GLOBAL_UNICAST or found in _SIX_TO_FOUR:
            return False
    return found.is_global and not found.is_multicast


class Answer(NamedTuple):
    """An answer of the 200s, 304, 412 or 416."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: Iterator[bytes]
    """Raises Broken where it ends early or too late."""
    close: Any


class Asked(NamedTuple):
    """A request."""

    method: Literal["GET", "PUT"]
    url: str
    name: str
    """What messages call it; holds no secrets."""
    until: float
    """When it has to be done, on the monotonic clock."""
    headers: dict[str, str]
    content: Iterable[bytes] | None = None


class Web:
    """HTTP for URLs that others chose: bound to hosts, to public addresses, to sizes and to time.

    ``hosts`` are names, exact or ``*.example.com``. ``private`` also allows addresses that are not public, and plain
    HTTP. A name is resolved here and the connection goes to the very address that was checked. Proxies and
    credentials of the environment play no part. ``tls`` replaces the system's and certifi's trusted certificates.
    """

    def __init__(self, hosts: Sequence[str], *, private: bool = False, tls: ssl.SSLContext | None = None) -> None:
        self._hosts = [host.lower().strip("[]").rstrip(".") for host in hosts]
        self._private, self._tls = private, tls
        self._lock = threading.Lock()
        self._made: httpcore.ConnectionPool | None = None

    def ask(self, request: Asked) -> Answer:
        """One request, with at most 3 redirects on the same host; close the answer.

        Raises InvalidRef, AccessDenied, ObjectMissing, or Broken where another try may help.
        """
        name, at = request.name, self._checked(request.url, request.name)
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._once(request, at)
            if answer.status not in (301, 302, 303, 307, 308):
                return self._judged(answer, name)
            answer.close()
            if request.method != "GET":
                raise InvalidRef(f"{name} is redirected, which is not followed for {request.method}", field="ref")
            target = self._checked(_joined(at, answer.headers.get("location", ""), name), name)
            if (target.scheme, target.host, target.port) != (at.scheme, at.host, at.port):
                raise InvalidRef(f"{name} is redirected to another host, {target.host[:80]!r}", field="ref")
            at = target
        raise InvalidRef(f"{name} is redirected more than {MAX_REDIRECTS} times", field="ref")

    def _once(self, request: Asked, url: httpx.URL) -> Answer:
        name, until = request.name, request.until

        def silence() -> float:
            left = until - time.monotonic()
            if left <= 0:
                raise StorageFailed(f"{name} takes longer than {TOTAL_SECONDS:,.0f} s")
            return min(SILENT_SECONDS, left)

        wait = silence()
        times = {"connect": min(CONNECT_SECONDS, wait), "read": wait, "write": wait, "pool": wait}
        host = url.netloc.decode("ascii")
        try:
            response = self._pool.handle_request(
                httpcore.Request(
                    method=request.method,
                    url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                    headers=[("Host", host), *_HEADERS, *request.headers.items()],
                    content=request.content,
                    extensions={"timeout": times},
                )
            )
        except _TRANSPORT as error:
            _raise_for(error, name)

        def body() -> Iterator[bytes]:
            try:
                for piece in response.iter_stream():
                    silence()
                    yield piece
            except _TRANSPORT as error:
                _raise_for(error, name)

        found = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in response.headers}
        return Answer(response.status, found, body(), response.close)

    def _judged(self, answer: Answer, name: str) -> Answer:
        status = answer.status
        if 200 <= status < 300 or status in (304, 412, 416):
            return answer
        said = b""
        with suppress(ExportError):  # the status alone says enough
            for piece in answer.body:
                said += piece
                if len(said) > 4_096:
                    break
        answer.close()
        code = re.search(rb"<Code>(\w{1,60})</Code>", said)  # of a store that speaks S3
        store = code[1].decode() if code else ""
        message = f"{name}: its server answered {status} {store}".rstrip()
        details = {"status": status, **({"store": store} if store else {})}
        if store == "NoSuchBucket":
            raise InvalidRef(message, field="ref", **details)
        if status in (404, 410):
            raise ObjectMissing(message, **details)
        if status in (401, 403) or store in ("ExpiredToken", "InvalidToken"):
            raise AccessDenied(message, **details)
        if status >= 500 or status in (408, 409, 425, 429) or store in _WORTH_ANOTHER_TRY:
            raise Broken(message, **details)
        raise InvalidRef(message, field="ref", **details)

    def _checked(self, url: str, name: str) -> httpx.URL:
        schemes = ("https", "http") if self._private else ("https",)
        try:
            url.encode()
            parsed = httpx.URL(url)
            host = parsed.raw_host.decode("ascii").rstrip(".")
        except (httpx.InvalidURL, ValueError) as error:
            raise InvalidRef(f"{name} is not a URL: {error}", field="ref") from error
        if parsed.scheme not in schemes:
            raise InvalidRef(
                f"{name}: {parsed.scheme[:20]!r} URLs are not read here", field="ref", allowed=", ".join(schemes)
            )
        if parsed.userinfo:
            raise InvalidRef(f"{name}: a URL must not hold credentials", field="ref")
        if not _HOST.fullmatch(host) or not 0 < (1 if parsed.port is None else parsed.port) <= 65_535:
            raise InvalidRef(f"{name}: not the name of a host", field="ref")
        if not any(host == known or (known[:2] == "*." and host.endswith(known[1:])) for known in self._hosts):
            raise InvalidRef(
                f"{name}: the host {host[:80]!r} is not one that is read from here",
                field="ref",
                allowed=", ".join(self._hosts) or "no host",
            )
        return parsed

    @property
    def _pool(self) -> httpcore.ConnectionPool:
        with self._lock:
            if self._made is None:
                tls = self._tls
                if tls is None:
                    tls = ssl.create_default_context()
                    tls.load_verify_locations(certifi.where())  # a small image may have no certificates of its own
                self._made = httpcore.ConnectionPool(
                    ssl_context=tls,
                    max_connections=MAX_CONNECTIONS,
                    keepalive_expiry=5.0,
                    network_backend=_CheckedConnections(private=self._private),
                )
                weakref.finalize(self, self._made.close)
            return self._made


class HttpsStorage:
    """Objects at URLs of allowed hosts. Nothing can be written."""

    def __init__(self, web: Web) -> None:
        self._web = web

    def put(self, source: Path, ref: str, *, sha256: str | None = None) -> Stored:
        """Refused."""
        _read_only()

    def write(self, ref: str, data: bytes, *, only_new: bool = False) -> bool:
        """Refused."""
        _read_only()

    def delete(self, prefix: str) -> int:
        """Refused."""
        _read_only()

    def link(self, ref: str, method: Literal["GET", "PUT"], seconds: float) -> str:
        """Refused."""
        _read_only()

    def local(
        self, ref: str, scratch: Path, *, size: int | None = None, sha256: str | None = None, limit: int | None = None
    ) -> Path:
        """Fetch an object: by ranges where its server has them and tags what it serves, else in one stream."""
        return download(self._at(ref), ref, scratch, size=size, sha256=sha256, limit=limit)

    def size(self, ref: str) -> int | None:
        """Bytes at ``ref``, None where nothing is."""
        return next((at.size for at in self.found(ref)), None)

    def read(self, ref: str, start: int, length: int) -> Iterator[bytes]:
        """Pieces of at most 1 MiB; goes on where it was when a connection breaks."""
        return read_range(self._at(ref), start, length)

    def found(self, prefix: str, *, uploads: bool = False) -> list[Found]:
        """The one at a ref; there is no listing."""
        return found_at(self._at(prefix), prefix)

    def _at(self, ref: str) -> Linked:
        return Linked(self._web, ref, _shown(ref))


class Linked:
    """The object behind a URL, as a source of ranges."""

    def __init__(self, web: Web, url: str, name: str) -> None:
        self._web, self._url, self.name = web, url, name
        self._until = time.monotonic() + TOTAL_SECONDS

    def open(self, start: int, stop: int | None, tag: str | None) -> Opened:
        """Ask for a range, of the object with this tag (an ETag, or else a time of change)."""
        headers = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        if tag is not None:
            headers["If-Match" if tag.startswith('"') else "If-Unmodified-Since"] = tag
        answer = self._web.ask(Asked("GET", self._url, self.name, self._until, headers))
        if answer.status == 416 and start == 0:  # an empty object has no first byte
            answer.close()
            answer = self._web.ask(Asked("GET", self._url, self.name, self._until, {}))
        etag = answer.headers.get("etag", "")
        found = etag if etag.startswith('"') else answer.headers.get("last-modified")
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("content-range", ""))
        age = age_of(answer.headers.get("last-modified"), answer.headers.get("date"))
        if answer.status not in (200, 206) or (tag is not None and found != tag):
            answer.close()
            raise StorageFailed(f"{self.name} is shorter than it was, or changed while it was read")
        if answer.status == 206 and span:
            return Opened(int(span[2]), found, int(span[1]), True, age, answer.body, answer.close)
        length = answer.headers.get("content-length", "")
        size = int(length) if length.isdigit() else None
        return Opened(size, found, 0, False, age, answer.body, answer.close)


def found_at(source: Linked, ref: str) -> list[Found]:
    """The object of a source, or nothing. Raises InvalidRef where its server does not say how long it is."""
    try:
        with closing(Stream(source, 0, 1)) as stream:
            if stream.size is None:
                raise InvalidRef(f"{source.name}: its server does not say how long it is", field="ref")
            return [Found(ref, stream.size, stream.age)]
    except ObjectMissing:
        return []


class _CheckedConnections(httpcore.NetworkBackend):
    """Connects to no address that is not allowed, whatever a name resolves to."""

    def __init__(self, *, private: bool) -> None:
        self._private, self._backend = private, httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"the name {host[:80]!r} does not resolve") from error
        addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
        if not self._private and not all(map(is_public, addresses)):
            raise InvalidRef(f"the host {host[:80]!r} is not at a public address", field="ref")
        for last, address in enumerate(addresses, 1 - len(addresses)):
            try:
                return self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if last == 0:
                    raise
        raise httpcore.ConnectError(f"the name {host[:80]!r} has no address")


_TRANSPORT = (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError)


def _raise_for(error: Exception, name: str) -> NoReturn:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise InvalidRef(f"{name}: its certificate is not trusted: {cause.verify_message}", field="ref") from error
        cause = cause.__cause__ or cause.__context__
    raise Broken(f"{name}: {type(error).__name__}: {error}") from error


def _shown(ref: str) -> str:
    """A URL without what may be a secret in it: credentials, query, fragment."""
    scheme, _, rest = re.split(r"[?#]", ref, maxsplit=1)[0].partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"[:200]


def _joined(at: httpx.URL, location: str, name: str) -> str:
    try:
        return str(at.join(location))
    except (httpx.InvalidURL, ValueError) as error:
        raise InvalidRef(f"{name} is redirected to what is no URL: {error}", field="ref") from error


def _read_only() -> NoReturn:
    raise InvalidRef("https:// refs are only read from", field="ref", allowed="file://, s3://")
