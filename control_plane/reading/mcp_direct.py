"""The short way for the usual message, a plain ``tools/call``: what the ``mcp`` package would answer, byte for byte
(but for the spelling of huge numbers: 1e300 here, 1e+300 there).

For each message without a session the package builds a transport, streams, tasks and a dispatcher, and takes the answer
apart and together again as objects of pydantic: 1.5 to 3 ms of the processor, ten times what most tools take. Whatever
is not plain (other methods, ``_meta``, protocols without a handshake, a message that is wrong) is left to the package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

import msgspec
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS

from common.contract import MALFORMED
from control_plane.operations.keys import Caller
from control_plane.reading.reader import Reader

_VERSIONS = frozenset(version.encode() for version in HANDSHAKE_PROTOCOL_VERSIONS)
_LONG_NUMBER = re.compile(rb"\d{16}")
"""The package reads whole numbers of any length; the reader here does not."""
_MAX_BRACKETS = 100
"""The package refuses what is nested 200 deep; a question for a tool has a dozen of them."""


class _Params(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, Any] | None = None


class _Call(msgspec.Struct, forbid_unknown_fields=True):
    jsonrpc: Literal["2.0"]
    id: int | str
    method: Literal["tools/call"]
    params: _Params


_decode = msgspec.json.Decoder(_Call).decode
_encode = msgspec.json.Encoder().encode


async def answer(reader: Reader, headers: Iterable[tuple[bytes, bytes]], body: bytes, caller: Caller) -> bytes | None:
    """The body of the answer, of status 200, to a message; None for one that is not plain.

    What every message of these headers has to fulfil (method, content type, length) is checked before.
    """
    versions = [value for name, value in headers if name == b"mcp-protocol-version"]
    if len(versions) > 1 or not _VERSIONS.issuperset(versions) or _LONG_NUMBER.search(body):
        return None
    if body.count(b"[") + body.count(b"{") > _MAX_BRACKETS:
        return None
    try:
        call = _decode(body)
    except MALFORMED:
        return None
    found, is_error = await reader.ask(call.params.name, call.params.arguments or {}, caller)
    return b"".join(
        (
            b'{"jsonrpc":"2.0","id":',
            _encode(call.id),
            b',"result":{"content":[{"text":',
            _encode(found.decode()),
            b',"type":"text"}],"isError":true' if is_error else b',"type":"text"}],"isError":false',
            b',"structuredContent":',
            found,
            b"}}",
        )
    )
