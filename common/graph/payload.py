"""Bytes in: hashing, decompression within limits, and JSON made readable where a repair is harmless."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec
import zstandard

from common.contract import InputReport
from common.errors import InvalidRequest, PayloadTooLarge, StorageFailed
from common.graph.model import GraphLimits, WarningCounter

_CHUNK = 1 << 20
_RATIO_FROM = 16 << 20
_GZIP_SLICE = 1 << 14
_ZSTD_SLICE = 1 << 10
"""Four bytes of zstd can stand for 128 KiB: a slice gives 32 MiB at most before the limits are looked at."""
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_UTF8_BOM = b"\xef\xbb\xbf"
_PATH_SEARCH_BYTES = 64 << 20


@contextmanager
def opened(source: BinaryIO | Path) -> Iterator[BinaryIO]:
    """Open a path, or pass a stream through. Raises InvalidRequest where there is no such file, else StorageFailed."""
    if not isinstance(source, Path):
        yield source
        return
    try:
        stream = source.open("rb")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise InvalidRequest(f"{source}: {error.strerror}", field="path") from error
    except OSError as error:
        raise StorageFailed(f"{source}: {error.strerror}") from error
    with stream:
        yield stream


class Payload:
    """The bytes of a request: counted and hashed as received, handed out decompressed."""

    def __init__(self, stream: BinaryIO, limits: GraphLimits) -> None:
        self._stream = stream
        self._limits = limits
        self._sha256 = hashlib.sha256()
        self._received = 0
        self._written = 0

    def report(self) -> InputReport:
        """Bytes and SHA-256 of what was received; complete once ``chunks`` has ended."""
        return InputReport(bytes=self._received, sha256=self._sha256.hexdigest())

    def chunks(self) -> Iterator[bytes]:
        """Decompressed bytes, in pieces. Raises InvalidRequest for a damaged or cut stream, PayloadTooLarge."""
        received = self._read()
        first = next(received, b"")
        while 0 < len(first) < len(_ZSTD_MAGIC) and (more := next(received, b"")):
            first += more
        if first.startswith(_GZIP_MAGIC):
            pieces = self._inflate(first, received, "gzip", _GZIP_SLICE, lambda: zlib.decompressobj(wbits=31))
        elif first.startswith(_ZSTD_MAGIC):
            pieces = self._inflate(first, received, "zstd", _ZSTD_SLICE, zstandard.ZstdDecompressor().decompressobj)
        else:
            pieces = _chain(first, received)
        for piece in pieces:
            self._written += len(piece)
            self._check_size()
            yield piece

    def _read(self) -> Iterator[bytes]:
        while True:
            try:
                chunk = self._stream.read(_CHUNK)
            except OSError as error:
                raise StorageFailed(f"the payload cannot be read: {error.strerror or error}") from error
            if not chunk:
                return
            self._received += len(chunk)
            self._sha256.update(chunk)
            if self._received > self._limits.max_payload_bytes:
                raise _too_large("payload", self._limits.max_payload_bytes, "bytes")
            yield chunk

    def _inflate(
        self, first: bytes, received: Iterator[bytes], name: str, slice_size: int, new: _NewDecompressor
    ) -> Iterator[bytes]:
        inflater, members = new(), 1
        for chunk in _chain(first, received):
            for start in range(0, len(chunk), slice_size):
                data = chunk[start : start + slice_size]
                while data:
                    if inflater.eof:
                        inflater, members = new(), members + 1
                        if members > self._limits.max_members:
                            raise _too_large(f"{name} stream", self._limits.max_members, "members")
                    try:
                        piece = inflater.decompress(data)
                    except (zlib.error, zstandard.ZstdError) as error:
                        raise InvalidRequest(f"the {name} stream is damaged: {error}", field="$") from error
                    data = inflater.unused_data if inflater.eof else b""
                    if piece:
                        yield piece
        if not inflater.eof:
            raise InvalidRequest(f"the {name} stream is cut: its end is missing", field="$")

    def _check_size(self) -> None:
        if self._written > self._limits.max_text_bytes:
            raise _too_large("payload after decompression", self._limits.max_text_bytes, "bytes")
        if self._written > _RATIO_FROM and self._written > self._received * self._limits.max_ratio:
            message = f"the payload expands more than {self._limits.max_ratio} times: refused as a decompression bomb"
            raise PayloadTooLarge(message, field="$", limit=self._limits.max_ratio)


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class _NewDecompressor(Protocol):
    def __call__(self) -> _Decompressor: ...


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest


def _too_large(what: str, limit: int, unit: str) -> PayloadTooLarge:
    return PayloadTooLarge(f"the {what} has more than {limit:,} {unit}", field="$", limit=limit)


_ESCAPED_CONTROL = re.compile(rb"\\u00(?:0[0-8bBeEfF]|1[0-9a-fA-F])")
"""May also hit behind an escaped backslash: says only whether a repair is worth its time."""
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(u[dD][89a-fA-F][0-9a-fA-F]{2})"
    rb"|(u00(?:0[0-8bBeEfF]|1[0-9a-fA-F]))"
    rb"|.)",
    re.DOTALL,
)
"""Any escape, so that the backslashes of a text pair up; groups: a lone surrogate, a control character."""
_NOT_FINITE = re.compile(rb"-?(?:NaN|Infinity)")
_HUGE_NUMBER = re.compile(rb"(?<=[:\[,\s])-?\d+(?:\.\d+)?(?:[eE]\+?\d{3,})|(?<=[:\[,\s])-?\d{400,}")
_BYTE = re.compile(r"\(byte (\d+)\)")
_TOKEN = re.compile(rb'"([^"\\]*+(?:\\.[^"\\]*+)*+)"|["{}\[\]:,]', re.DOTALL)
"""A quote alone begins a string that does not end; possessive, so that a long string takes no memory of its own."""


def decode(data: bytes | bytearray, limits: GraphLimits, found: WarningCounter, where: str = "") -> Any:
    """Decode one JSON document.

    Lone surrogates, control characters (escaped ones, but tab, line feed, form feed, carriage return) and bytes that
    are not UTF-8 become U+FFFD, with a counted warning; all else that is not JSON raises InvalidRequest. ``where``
    (``line 7``) leads the field's name.
    """
    try:
        return _decoded(data, limits, found, where)
    except MemoryError as error:
        raise PayloadTooLarge("the payload does not fit into this process's memory", field="$") from error


def _decoded(data: bytes | bytearray, limits: GraphLimits, found: WarningCounter, where: str) -> Any:
    _check_values(data, limits)
    if data.startswith(_UTF8_BOM):
        data = data[len(_UTF8_BOM) :]
    if _ESCAPED_CONTROL.search(data):
        data = _repair_escapes(data, found)
    while True:  # each repair removes what it is for, so it happens once at most
        try:
            return msgspec.json.decode(data)
        except RecursionError as error:
            message = f"{_join(where, '')}the JSON is nested deeper than {limits.max_depth} levels"
            raise InvalidRequest(message, field=where or "$", allowed=limits.max_depth) from error
        except UnicodeDecodeError:
            text = data.decode(errors="replace")
            found.add("INVALID_UTF8", _around(text, text.find("\ufffd")), text.count("\ufffd"))
            data = text.encode()
        except msgspec.DecodeError as error:
            repaired = _repair_escapes(data, found)
            if repaired == data:
                raise _not_json(data, error, where) from error
            data = repaired


def _check_values(data: bytes | bytearray, limits: GraphLimits) -> None:
    if len(data) > limits.max_values and data.count(b",") + data.count(b"{") + data.count(b"[") > limits.max_values:
        raise _too_large("payload", limits.max_values, "JSON values")


def _repair_escapes(data: bytes | bytearray, found: WarningCounter) -> bytes | bytearray:
    counts = {"LONE_SURROGATE": 0, "CONTROL_CHARACTER": 0}

    def repair(match: re.Match[bytes]) -> bytes:
        if not match.lastindex:
            return match[0]
        counts["LONE_SURROGATE" if match[1] else "CONTROL_CHARACTER"] += 1
        return rb"\ufffd"

    data = _ESCAPE.sub(repair, data)
    for code, count in counts.items():
        if count:
            text = data[max(0, data.find(rb"\ufffd") - 40) :][:80].decode(errors="replace")
            found.add(code, text, count)
    return data


def _not_json(data: bytes | bytearray, error: Exception, where: str) -> InvalidRequest:
    text = str(error)
    if "out of range" in text:
        number = _HUGE_NUMBER.search(data)
        field = _join(where, _path_at(data, number.start()) if number else "$")
        return InvalidRequest(f"{field}: the number is out of range; a finite number is needed", field=field)
    if "truncated" in text:
        message = f"{_join(where, '')}the JSON is cut: its end is missing"
        return InvalidRequest(message, field=where or "$")
    place = _BYTE.search(text)
    offset = int(place[1]) if place else 0
    constant = _NOT_FINITE.match(data, max(0, offset - 1)) or _NOT_FINITE.match(data, offset)
    if constant:
        field = _join(where, _path_at(data, offset))
        message = f"{field}: {constant[0].decode()} is not allowed; a finite number is needed"
        return InvalidRequest(message, field=field)
    reason = text.removeprefix("JSON is malformed: ")
    if offset < len(data) and data[offset] < 0x20 and "invalid character" in reason:
        reason = f"unescaped control character 0x{data[offset]:02x} (byte {offset})"
    return InvalidRequest(f"{_join(where, '')}not JSON: {reason}", field=where or "$", offset=offset)


def _join(where: str, path: str) -> str:
    return f"{where}: {path}" if where else path


def _around(text: str, position: int) -> str:
    return text[max(0, position - 40) : position + 40]


def _path_at(data: bytes | bytearray, offset: int) -> str:
    """The JSON path of the value at ``offset``, as ``nodes[3].properties.cohesion``."""
    if offset > _PATH_SEARCH_BYTES:
        return f"byte {offset}"
    stack: list[list[Any]] = []
    key = ""
    for token in _TOKEN.finditer(data, 0, offset):
        mark = token[0][:1]
        if token[0] == b'"':  # the string that ``offset`` is in: what follows is its text
            break
        if mark == b'"':
            key = token[1][:80].decode(errors="replace")
        elif mark == b"{":
            stack.append(["", False])
        elif mark == b"[":
            stack.append([0, True])
        elif not stack:
            break
        elif mark in b"}]":
            stack.pop()
        elif mark == b":":
            stack[-1][0] = key
        elif stack[-1][1]:
            stack[-1][0] += 1
    path = "".join(f"[{step}]" if is_list else f".{step}" for step, is_list in stack[:32])
    return path.removeprefix(".") or "$"
