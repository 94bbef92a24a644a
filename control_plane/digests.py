"""SHA-256 in headers, as ``Content-Digest`` and ``Repr-Digest`` have it (RFC 9530)."""

from __future__ import annotations

import base64
import hashlib
import re

_SHA256 = re.compile(r"(?:^|,)[ \t]*sha-256=:([A-Za-z0-9+/=]+):[ \t]*(?:,|$)")


def digest_of(sha256: str) -> str:
    """The header's value for a SHA-256 in hex."""
    return "sha-256=:" + base64.b64encode(bytes.fromhex(sha256)).decode() + ":"


def sha256_in(header: str) -> str | None:
    """The SHA-256, in hex, that a header's value announces; None where it has none."""
    match = _SHA256.search(header)
    try:
        digest = base64.b64decode(match[1], validate=True) if match else b""
    except ValueError:
        digest = b""
    return digest.hex() if len(digest) == hashlib.sha256().digest_size else None
