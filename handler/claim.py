"""Who runs an attempt: of all that it is delivered to, one run claims its prefix, and it alone may publish there.

Two small objects under the prefix. ``claim.json`` says who holds it; it is made once, and only a close replaces it, so
that no renewal can undo a close. ``renewed.json`` is rewritten by the holder; its age tells whether the run is alive.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from common.contract import MALFORMED, JobError
from common.errors import ObjectMissing
from common.storage import Storage

CLAIM_NAME = "claim.json"
RENEWED_NAME = "renewed.json"
NAMES = (CLAIM_NAME, RENEWED_NAME)
"""All that this module writes under a prefix; a worker that has signed links instead of credentials needs GET and PUT
for both."""
RENEW_SECONDS = 2.0
STALE_SECONDS = 10.0
"""A claim that was not renewed for so long, by the store's clock, is stale: its run is dead."""

_BYTES = 4_096
"""Every claim has this size, padded, so that one read gets it whole while it is replaced."""

State = Literal["free", "held", "stale", "closed"]


class Claim(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What ``claim.json`` says."""

    run: str = ""
    closed: bool = False
    error: JobError | None = None
    """What the run ended in, where it failed."""


def take(storage: Storage, prefix: str, run: str) -> bool:
    """Claim the prefix for a run; of several at once exactly one gets True."""
    # A store may have written it and lost the answer: then a second try finds it there.
    return storage.write(prefix + CLAIM_NAME, _encoded(Claim(run=run)), only_new=True) or holds(storage, prefix, run)


def renew(storage: Storage, prefix: str, run: str) -> bool:
    """Say that the run is alive; False if it holds the prefix no more."""
    if not holds(storage, prefix, run):
        return False
    storage.write(prefix + RENEWED_NAME, msgspec.json.encode({"run": run}))
    return True


def holds(storage: Storage, prefix: str, run: str) -> bool:
    """Whether the run may publish under the prefix."""
    claim = read(storage, prefix)
    return claim is not None and claim.run == run and not claim.closed


def state(storage: Storage, prefix: str) -> State:
    """``free``: never claimed; ``held`` by a live run; ``stale``: its run is dead; ``closed``: nobody may publish."""
    claim = read(storage, prefix)
    if claim is None:
        return "free"
    if claim.closed:
        return "closed"
    ages = [found.age for name in NAMES for found in storage.found(prefix + name)]
    return "held" if min(ages, default=0.0) < STALE_SECONDS else "stale"


def close(storage: Storage, prefix: str, *, force: bool = False, error: JobError | None = None) -> bool:
    """Take the prefix from whoever holds it, with ``force`` from a live run too.

    True: no run may publish there any more (one that looked just before may be about to); False: a live run holds it.
    ``error`` is told to runs that come late.
    """
    data = _encoded(Claim(closed=True, error=error))
    if storage.write(prefix + CLAIM_NAME, data, only_new=True):
        return True
    now: State = "stale" if force else state(storage, prefix)
    if now == "held":
        return False
    if now != "closed":
        storage.write(prefix + CLAIM_NAME, data)
    return True


def read(storage: Storage, prefix: str) -> Claim | None:
    """The claim, None where there is none."""
    try:
        data = b"".join(storage.read(prefix + CLAIM_NAME, 0, _BYTES))
    except ObjectMissing:
        return None
    try:
        return msgspec.json.decode(data, type=Claim)
    except MALFORMED:
        return Claim()  # Damaged: nobody holds it, and it can be closed.


def _encoded(claim: Claim) -> bytes:
    data = msgspec.json.encode(claim)
    if len(data) > _BYTES and claim.error is not None:
        short = msgspec.structs.replace(claim.error, message=claim.error.message[:500], details={})
        data = msgspec.json.encode(msgspec.structs.replace(claim, error=short))
    return data.ljust(_BYTES)
