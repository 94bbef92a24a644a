"""One request to an API, bound in time and size, that ends when it is told to."""

from __future__ import annotations

import select
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import certifi
import httpcore
import httpx

from common.embedding.providers.pace import POLL_SECONDS
from common.errors import InvalidRequest, ProviderRejected

CONNECT_SECONDS, IDLE_SECONDS = 5.0, 15.0
"""To start a connection; and how long an unused one is kept."""
MAX_ERROR_BYTES = 64 << 10
"""Of the body of an error that is read."""
_WRITE = 16 << 10


class Lost(Exception):
    """The connection could not be made, broke, or the answer ended early."""


class TimedOut(Lost):
    """Nothing came, or not all of it, within the time of a request."""


class TooLong(Exception):
    """The body is larger than any answer could be."""


class Reply(NamedTuple):
    """A whole answer, of any status."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


class Channel:
    """Talks to one API, over connections that are kept. Certificates are verified; neither redirects nor proxies are
    followed, and nothing of the environment plays a part. Threads share one; each request runs on one thread."""

    def __init__(self, url: str, key: str | None, most: int, *, field: str) -> None:
        # Both checks come before httpcore sees either: its errors repeat what they complain about.
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise InvalidRequest("a key is printable ASCII without spaces", field=field)
        try:
            found = httpx.URL(url)
        except (httpx.InvalidURL, ValueError):
            found = httpx.URL("")
        if found.scheme not in ("https", "http") or not found.host or found.userinfo or found.query or found.fragment:
            raise InvalidRequest("the address of an API is an http(s) URL without credentials and query", field=field)
        self.host = found.netloc.decode("ascii")
        self._url = found
        self._headers = [
            ("Host", self.host),
            ("Content-Type", "application/json"),
            ("Accept", "application/json"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", "memvid-export"),
            *([("Authorization", f"Bearer {key}")] if key else []),
        ]
        tls = None
        if found.scheme == "https":
            tls = ssl.create_default_context()
            tls.load_verify_locations(certifi.where())  # a small image may have no certificates of its own
        self._watching = _Watching()
        self._pool = httpcore.ConnectionPool(
            ssl_context=tls,
            max_connections=most,
            max_keepalive_connections=most,
            keepalive_expiry=IDLE_SECONDS,
            network_backend=_Backend(self._watching),
        )

    def send(
        self,
        path: str,
        body: bytes | None = None,
        *,
        seconds: float,
        most_bytes: int,
        check: Callable[[], None] = lambda: None,
    ) -> Reply:
        """Post a body, or get where there is none, and read the answer, in at most so many seconds. ``check`` is called
        twenty times a second.

        Raises Lost, TimedOut, TooLong, ProviderRejected for a certificate that is not trusted, and what ``check`` does.
        """
        self._watching.check, self._watching.until = check, time.monotonic() + seconds
        url = httpcore.URL(
            scheme=self._url.raw_scheme,
            host=self._url.raw_host,
            port=self._url.port,
            target=self._url.raw_path.rstrip(b"/") + path.encode(),
        )
        times = {"connect": min(CONNECT_SECONDS, seconds), "read": seconds, "write": seconds, "pool": seconds}
        request = httpcore.Request(
            "GET" if body is None else "POST",
            url,
            headers=[*self._headers, *([("Content-Length", str(len(body)))] if body is not None else [])],
            content=body,
            extensions={"timeout": times},
        )
        try:
            response = self._pool.handle_request(request)
            try:
                return self._read(response, most_bytes)
            finally:
                response.close()
        except httpcore.ConnectTimeout as error:
            raise Lost(f"no connection to {self.host} within {times['connect']:g} s") from error
        except httpcore.TimeoutException as error:
            raise TimedOut(f"no whole answer from {self.host} within {seconds:g} s") from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            self._raise_for(error)
            raise Lost(f"{self.host}: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Close all connections; no request is under way."""
        self._pool.close()

    def _read(self, response: httpcore.Response, most_bytes: int) -> Reply:
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in response.headers}
        most = most_bytes if response.status == 200 else MAX_ERROR_BYTES
        length = headers.get("content-length", "")
        if response.status == 200 and length.isdigit() and int(length) > most:
            raise TooLong(f"{int(length):,} bytes")
        read = bytearray()
        try:
            for piece in response.iter_stream():
                read += piece
                if len(read) > most:
                    break
        except (httpcore.NetworkError, httpcore.ProtocolError):
            if response.status == 200:  # of an error, the beginning says enough, and so does the status alone
                raise
        if response.status == 200 and len(read) > most:
            raise TooLong(f"more than {most:,} bytes")
        return Reply(response.status, headers, bytes(read[:most]))

    def _raise_for(self, error: BaseException) -> None:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise ProviderRejected(
                    f"the certificate of {self.host} is not trusted: {cause.verify_message}"
                ) from error
            cause = cause.__cause__ or cause.__context__


class _Watching(threading.local):
    """What the request of this thread watches."""

    def __init__(self) -> None:
        self.until = 0.0
        self.check: Callable[[], None] = lambda: None


class _Backend(httpcore.NetworkBackend):
    """Connections whose waits are cut into short ones."""

    def __init__(self, watching: _Watching) -> None:
        self._watching, self._backend = watching, httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        self._watching.check()
        return _Stream(self._backend.connect_tcp(host, port, timeout, local_address, socket_options), self._watching)


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, watching: _Watching) -> None:
        self._stream, self._watching = stream, watching

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Until the request's end, not for a while since the last byte: an answer that dribbles ends too."""
        while True:
            self._watching.check()
            left = self._watching.until - time.monotonic()
            if left <= 0:
                raise httpcore.ReadTimeout("the time of the request is over")
            with suppress(httpcore.ReadTimeout):
                return self._stream.read(max_bytes, min(left, POLL_SECONDS))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        writable = select.poll()
        writable.register(self._stream.get_extra_info("socket"), select.POLLOUT)
        for start in range(0, len(buffer), _WRITE):
            while not writable.poll(POLL_SECONDS * 1_000):
                self._watching.check()
                if time.monotonic() > self._watching.until:
                    raise httpcore.WriteTimeout("the time of the request is over")
            self._stream.write(buffer[start : start + _WRITE], timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, timeout), self._watching)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
