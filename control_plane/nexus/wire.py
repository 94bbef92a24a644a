"""Requests to a database server: bound in time and in size, and nothing of the environment plays a part."""

from __future__ import annotations

import time
from typing import NamedTuple

import httpx

from common.errors import ExportError, InvalidRequest

CONNECT_SECONDS = 5.0
MAX_ANSWER_BYTES = 64 << 20


class Answered(NamedTuple):
    """An answer, read whole."""

    status: int
    headers: httpx.Headers
    body: bytes


class Wire:
    """A server; for any threads. Neither redirects nor proxies are followed."""

    def __init__(self, url: str, key: str | None, failure: type[ExportError]) -> None:
        """``url`` may have a path, under which the server answers; ``key`` is sent as ``X-API-Key``; ``failure`` is
        raised where there is no answer. Raises InvalidRequest."""
        if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
            raise InvalidRequest("key: printable ASCII without spaces", field="key", allowed="printable ASCII")
        try:
            found = httpx.URL(url)
        except httpx.InvalidURL:
            found = httpx.URL("")
        odd = not found.host or "%" in found.host or found.userinfo or found.query or found.fragment
        if odd or found.scheme not in ("http", "https"):
            message = "url: an http(s) URL without credentials, query and fragment"
            raise InvalidRequest(message, field="url", allowed="http://host:port/path")
        self.host = found.netloc.decode("ascii")
        self._url = f"{found.scheme}://{self.host}{found.raw_path.decode('ascii').rstrip('/')}"
        self._failure = failure
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "memvid-export"}
        self._client = httpx.Client(
            headers=headers | ({"X-API-Key": key} if key else {}), trust_env=False, follow_redirects=False
        )

    def ask(self, method: str, path: str, content: bytes | None, seconds: float) -> Answered:
        """The answer to a request with JSON, or with nothing."""
        until = time.monotonic() + seconds
        times = httpx.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds))
        headers = {} if content is None else {"Content-Type": "application/json"}
        try:
            with self._client.stream(
                method, self._url + path, content=content, headers=headers, timeout=times
            ) as response:
                read = bytearray()
                for piece in response.iter_raw():
                    read += piece
                    if len(read) > MAX_ANSWER_BYTES:
                        raise self._failure(f"{self.host} answers more than {MAX_ANSWER_BYTES:,} bytes")
                    if time.monotonic() > until:
                        raise self._failure(f"{self.host} has not answered whole within {seconds:g} s")
                return Answered(response.status_code, response.headers, bytes(read))
        except httpx.TimeoutException as error:
            raise self._failure(f"{self.host} has not answered within {seconds:g} s") from error
        except httpx.HTTPError as error:
            raise self._failure(f"{self.host}: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Close all connections."""
        self._client.close()
