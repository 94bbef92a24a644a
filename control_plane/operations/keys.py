"""Who may ask, and for what: named keys with scopes, known here by their hashes alone.

A key has 256 random bits (``memvid-export key`` makes them), so one round of SHA-256 is enough: whoever reads a hash
would have to try 2^255 keys. Slow hashes are for what people think up, and would cost each request what they cost an
attacker.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
import structlog
from msgspec import Meta

from common.errors import InvalidSettings
from common.settings import Settings
from control_plane.jobs.audit import Action, AuditEntry
from control_plane.jobs.records import CANARY_CLIENT, NO_QUOTA, Quota
from control_plane.operations.limits import MAX_BURST, USUAL, Rate

log = structlog.get_logger()

Scope = Literal["export", "read", "admin"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
DEFAULT_CLIENT = "default"
"""Of the key in ``MEMVID_EXPORT_API_KEY``, of a server without keys, and of jobs from before there were clients."""
MAX_FILE_BYTES = 1 << 20
MAX_KEYS = 10_000
LOOK_SECONDS = 1.0
"""Between two looks at the files: so long a revoked key may still be taken."""
DAY_SECONDS = 86_400
_PLAIN = re.compile("[a-z_]{1,24}")
"""Names of fields that cannot be a key."""
OWN_RATE = Rate(per_minute=60_000_000, burst=MAX_BURST)


class Caller(NamedTuple):
    """Whoever sent a request: what its key stands for. The bearer check puts it into ``scope["auth"]``."""

    key: str
    """The key's name; never the key."""
    client: str
    """Whose jobs it sees and makes. Several keys may stand for one client."""
    scopes: frozenset[Scope]
    quota: Quota = NO_QUOTA
    """How many jobs it may make."""
    rate: Rate = USUAL
    """How often it may ask."""
    address: str = ""
    """Where the request came from."""
    trace: str = ""
    """The trace of the request, 32 hex; empty: not told."""

    def may(self, scope: Scope) -> bool:
        """Whether the key has a scope; ``admin`` includes the others, and the jobs of all clients."""
        return scope in self.scopes or "admin" in self.scopes

    @property
    def sees_all(self) -> bool:
        """Whether jobs of other clients are there for it."""
        return "admin" in self.scopes

    def sees(self, client: str) -> bool:
        """Whether the jobs of a client are there for it."""
        return self.sees_all or client == self.client

    @property
    def only(self) -> str | None:
        """The one client whose jobs it sees; None: those of all."""
        return None if self.sees_all else self.client

    def did(self, action: Action, job_id: str | None = None, outcome: str = "ok") -> AuditEntry:
        """An entry of the audit log."""
        return AuditEntry(self.key, self.client, self.address, action, outcome, job_id, self.trace)


EVERYBODY = Caller(DEFAULT_CLIENT, DEFAULT_CLIENT, SCOPES)
"""The caller where no key is asked for."""


class Key(NamedTuple):
    """What is known of a key; its text is not."""

    name: str
    client: str
    scopes: frozenset[Scope]
    digest: bytes
    """SHA-256."""
    rate: Rate
    quota: Quota
    expires: datetime | None

    def __repr__(self) -> str:
        """Without the hash, which is nobody's business."""
        return f"Key({self.name!r})"


_Name = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z", description="1 to 64 letters, digits, dots, dashes and underscores")
]
_Sha256 = Annotated[str, Meta(pattern=r"^[0-9A-Fa-f]{64}\Z", description="64 hex digits, the SHA-256 of the key")]
_ScopeList = Annotated[list[Scope], Meta(min_length=1, description="a list of some of export, read, admin")]
_PerMinute = Annotated[int, Meta(ge=1, le=60_000_000, description="a number of requests, 1 to 60000000")]
_Burst = Annotated[int, Meta(ge=1, le=MAX_BURST, description="a number of requests, 1 to 1000000")]
_Jobs = Annotated[int, Meta(ge=1, le=1_000_000, description="a number of jobs, 1 to 1000000")]
_Expires = Annotated[datetime, Meta(tz=True, description="a date and time with a zone, such as 2027-01-31T00:00:00Z")]
_FIELDS: dict[str, Any] = {
    "name": _Name,
    "sha256": _Sha256,
    "scopes": _ScopeList,
    "client": _Name,
    "requests_per_minute": _PerMinute,
    "burst": _Burst,
    "active_jobs": _Jobs,
    "jobs_per_day": _Jobs,
    "expires": _Expires,
}
_NEEDED = ("name", "sha256", "scopes")


class Keys:
    """The keys that are taken now. Files that they come from are read again when they change; what is wrong in a file
    stops a start, and later keeps the keys of before."""

    def __init__(self, settings: Settings) -> None:
        """Raises InvalidSettings with the place of what is wrong."""
        self._settings = settings
        self._files = [path for path in (settings.keys_file, settings.api_key_file) if path is not None]
        self.asked = bool(settings.api_key or settings.keys or settings.keys_file)
        """Whether requests need a key at all."""
        self.trouble: str | None = None
        """What is wrong with a file that changed; the keys of before hold as long."""
        self._marks = self._look_at()
        self._keys = self._load(started=False)
        self._own: tuple[Key, ...] = ()

    def add_own(self, client: str, scopes: frozenset[Scope]) -> str:
        """A key of this process, for requests that it sends to itself; kept in its memory alone, and answered here."""
        key = new_key()
        digest = hashlib.sha256(key.encode()).digest()
        self._own = (*self._own, Key(client, client, scopes, digest, OWN_RATE, NO_QUOTA, None))
        return key

    def find(self, given: bytes) -> Key | None:
        """The key of this text, expired ones too. Every hash is compared, and in constant time, so that the time says
        nothing of any."""
        digest = hashlib.sha256(given).digest()
        found = None
        for key in (*self._keys, *self._own):
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    async def watch(self, tell: Callable[[str], None]) -> None:
        """Look at the files until canceled; ``tell`` hears ``ok`` or ``wrong`` where they changed."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            changed = bool(self._files) and await asyncio.to_thread(self.refresh)
            if changed:
                if self.trouble is None:
                    log.info("keys were read again", keys=len(self._keys))
                else:
                    log.error("the keys of before are kept", reason=self.trouble)
                tell("ok" if self.trouble is None else "wrong")

    def refresh(self) -> bool:
        """Read the files again where they changed since the last look; answers whether they had."""
        marks = self._look_at()
        if marks == self._marks:
            return False
        # Taken before the files are read: one that changes meanwhile is read once more.
        self._marks = marks
        try:
            self._keys = self._load(started=True)
        except InvalidSettings as error:
            self.trouble = error.message
        else:
            self.trouble = None
        return True

    def _look_at(self) -> list[object]:
        return [_mark(path) for path in self._files]

    def _load(self, *, started: bool) -> tuple[Key, ...]:
        settings = self._settings
        keys: list[Key] = []
        if settings.keys_file is not None:
            name = "MEMVID_EXPORT_KEYS_FILE"
            keys = _parse(name, _text(name, settings.keys_file), settings)
        elif settings.keys:
            keys = _parse("MEMVID_EXPORT_KEYS", settings.keys, settings)
        if settings.api_key is not None:
            text = settings.api_key.get_secret_value()
            if started and settings.api_key_file is not None:
                text = Settings.read_key_file(settings.api_key_file)
            digest = hashlib.sha256(text.encode()).digest()
            keys.append(Key(DEFAULT_CLIENT, DEFAULT_CLIENT, SCOPES, digest, USUAL, NO_QUOTA, None))
        seen: dict[str | bytes, str] = {}
        for key in keys:
            for what, value in (("name", key.name), ("sha256", key.digest)):
                if value in seen:
                    message = f"The keys {seen[value]} and {key.name} have the same {what}; each needs its own"
                    raise InvalidSettings(message, field="MEMVID_EXPORT_KEYS")
                seen[value] = key.name
        return tuple(keys)


def _mark(path: Path) -> object:
    """Differs once a file was written or another one put in its place, also by a link on the way to it."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _text(setting: str, path: Path) -> str:
    try:
        with open(path, "rb", opener=_opened) as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise InvalidSettings(f"{setting} must have at most {MAX_FILE_BYTES:,} bytes", field=setting)
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"{setting} must be a text file that can be read", field=setting) from error


def _opened(path: str, flags: int) -> int:
    """Opens files alone: one that is a pipe would be waited for."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a file")
    return descriptor


def _parse(setting: str, text: str, settings: Settings) -> list[Key]:
    """The keys of a file. What is wrong is told by its place and never shown: it may be a key."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError too
        where = re.search(r"\(at (line \d+, column \d+)\)$", str(error))
        place = f" ({where[1]})" if where else ""
        raise InvalidSettings(f"{setting} is not TOML{place}", field=setting) from None
    entries = table.get("keys")
    if set(table) - {"keys"} or not isinstance(entries, list) or not all(isinstance(item, dict) for item in entries):
        raise InvalidSettings(f"{setting} must have tables [[keys]] and nothing else", field=setting)
    if not 1 <= len(entries) <= MAX_KEYS:
        raise InvalidSettings(f"{setting} must have 1 to {MAX_KEYS:,} keys; it has {len(entries):,}", field=setting)
    return [_key(f"{setting}: keys[{place}]", entry, settings) for place, entry in enumerate(entries)]


def _key(place: str, entry: dict[str, Any], settings: Settings) -> Key:
    if unknown := sorted(set(entry) - set(_FIELDS)):
        # One that cannot be a key which somebody put into the wrong place is shown.
        what = f"{place}.{unknown[0]}" if _PLAIN.fullmatch(unknown[0]) else f"a field of {place}"
        raise InvalidSettings(f"{what} is unknown; there are {', '.join(_FIELDS)}", field=place)
    for name in _NEEDED:
        if name not in entry:
            raise InvalidSettings(f"{place}.{name} must be given", field=place)
    given = {name: _value(f"{place}.{name}", value, _FIELDS[name]) for name, value in entry.items()}
    if given.get("client", given["name"]) == CANARY_CLIENT:
        raise InvalidSettings(f"{place} must not stand for {CANARY_CLIENT}, which the server is itself", field=place)
    if "jobs_per_day" in given and settings.history_seconds < DAY_SECONDS:
        message = f"{place}.jobs_per_day counts a day: MEMVID_EXPORT_HISTORY_SECONDS must be {DAY_SECONDS} at least"
        raise InvalidSettings(message, field=place)
    return Key(
        name=given["name"],
        client=given.get("client", given["name"]),
        scopes=frozenset(given["scopes"]),
        digest=bytes.fromhex(given["sha256"]),
        rate=Rate(given.get("requests_per_minute"), given.get("burst")),
        quota=Quota(given.get("active_jobs"), given.get("jobs_per_day")),
        expires=given.get("expires"),
    )


def _value(place: str, value: object, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, TypeError):
        (allowed,) = (part.description for part in kind.__metadata__)
        raise InvalidSettings(f"{place} must be {allowed}", field=place) from None


def new_key() -> str:
    """256 random bits; the prefix lets programs that look for leaked secrets know it."""
    return f"mvx_{secrets.token_urlsafe(32)}"


def key_entry(name: str, key: str, scopes: Sequence[str], client: str | None) -> str:
    """The lines for a keys file. Raises InvalidSettings."""
    for place, value, kind in (("NAME", name, _Name), ("--scope", [*scopes], _ScopeList), ("--client", client, _Name)):
        if value is not None:
            _value(place, value, kind)
    shown = ", ".join(f'"{scope}"' for scope in scopes)
    lines = ["[[keys]]", f'name = "{name}"', f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"']
    return "\n".join([*lines, f"scopes = [{shown}]", *([f'client = "{client}"'] if client else [])])


def expired(key: Key, now: datetime | None = None) -> bool:
    """Whether a key is past its time."""
    return key.expires is not None and key.expires <= (now or datetime.now(UTC))
