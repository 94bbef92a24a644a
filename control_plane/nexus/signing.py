"""Signatures of messages between this server and others: HMAC-SHA256 over a time, a nonce and the body.

Three headers carry them, the same ones in both directions:

| header | value |
| --- | --- |
| ``X-Nexus-Timestamp`` | seconds since 1970 |
| ``X-Nexus-Nonce`` | 8 to 64 of ``A-Z a-z 0-9 _ -``, another one for each message |
| ``X-Nexus-Signature`` | ``sha256=`` and 64 hex digits: the HMAC of ``<timestamp>.<nonce>.<body>`` under the secret |
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from typing import NamedTuple

from control_plane.errors import Unauthorized

TIMESTAMP, NONCE, SIGNATURE = "X-Nexus-Timestamp", "X-Nexus-Nonce", "X-Nexus-Signature"
WINDOW_SECONDS = 300
"""The time of a message may be so far from ours, either way."""
_FORMS = {
    TIMESTAMP: (re.compile("[0-9]{1,12}"), "seconds since 1970"),
    NONCE: (re.compile("[A-Za-z0-9_-]{8,64}"), "8 to 64 letters, digits, dashes and underscores"),
    SIGNATURE: (re.compile("sha256=[0-9A-Fa-f]{64}"), "sha256= and 64 hex digits"),
}


class Seal(NamedTuple):
    """What the headers of a message say."""

    timestamp: str
    nonce: str
    signature: str
    """64 hex digits."""


class Signer:
    """Signs and checks messages under one secret, which nothing here shows."""

    def __init__(self, secret: str) -> None:
        self._key = secret.encode()

    def headers(self, body: bytes, now: int) -> dict[str, str]:
        """The headers of a message that is sent at ``now`` (milliseconds since 1970)."""
        timestamp, nonce = str(now // 1_000), secrets.token_urlsafe(24)
        return {
            TIMESTAMP: timestamp,
            NONCE: nonce,
            SIGNATURE: f"sha256={self._hmac(timestamp, nonce, body).hex()}",
        }

    def check(self, seal: Seal, body: bytes) -> None:
        """Raises Unauthorized for a body that is not the one that the seal was made for; that takes equally long
        wherever they differ."""
        made = self._hmac(seal.timestamp, seal.nonce, body)
        if not hmac.compare_digest(made, bytes.fromhex(seal.signature)):
            raise Unauthorized(f"{SIGNATURE}: does not fit the time, the nonce and the body.", field=SIGNATURE)

    def _hmac(self, timestamp: str, nonce: str, body: bytes) -> bytes:
        made = hmac.new(self._key, f"{timestamp}.{nonce}.".encode(), hashlib.sha256)
        made.update(body)
        return made.digest()


def read_seal(headers: Mapping[str, str]) -> Seal:
    """The seal of a message. Raises Unauthorized naming the header that is missing or has another form."""
    found = []
    for name, (form, allowed) in _FORMS.items():
        value = headers.get(name, "")
        if not form.fullmatch(value):
            raise Unauthorized(f"{name}: must be {allowed}.", field=name, allowed=allowed)
        found.append(value)
    timestamp, nonce, signature = found
    return Seal(timestamp, nonce, signature.removeprefix("sha256="))


def check_time(seal: Seal, now: int) -> None:
    """Raises Unauthorized for a seal whose time is further than the window from ``now`` (milliseconds since 1970)."""
    if abs(now - 1_000 * int(seal.timestamp)) > 1_000 * WINDOW_SECONDS:
        message = f"{TIMESTAMP}: must be at most {WINDOW_SECONDS} seconds before or after this server's time."
        raise Unauthorized(message, field=TIMESTAMP, allowed=WINDOW_SECONDS)
