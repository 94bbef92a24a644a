"""Profiles of jobs and the schedule of workers: one TOML file (``MEMVID_EXPORT_PROFILES_FILE``; an example lies in
``examples/profiles.toml``). Without being named there are the profile ``default``, made of the settings, and one for
each tier of embedding, ``speed`` and ``quality``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args
from zoneinfo import ZoneInfo

import msgspec
import structlog
from msgspec import Meta

from common.embedding import routing
from common.embedding.choice import Choice, Provider, Tier
from common.errors import InvalidRequest, InvalidSettings
from common.settings import Settings

log = structlog.get_logger()

DEFAULT = "default"
TIERS: tuple[Tier, ...] = get_args(Tier)
MAX_FILE_BYTES = 1 << 20
DAY_MINUTES = 24 * 60
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HOURS = re.compile(r"([01]\d|2[0-4]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """How jobs of one kind are run, and how many may wait."""

    name: str
    execution_timeout_ms: int
    """How long one attempt may run."""
    ttl_ms: int
    """How long an attempt may wait and run together; then the platform forgets it."""
    queue_depth: int
    """New jobs are turned away while so many wait,"""
    queue_age_seconds: float
    """or while the oldest one waits longer than this."""
    embedding: Choice = Choice()
    """What is embedded and with what, where vectors are asked for."""
    refusal: str | None = None
    """Why the engine of a tier that no file names cannot run; requests of the profile are refused with it."""


class Workers(msgspec.Struct, frozen=True, kw_only=True):
    """How many workers an endpoint has."""

    workers_min: int
    workers_max: int
    idle_timeout_seconds: int | None = None
    """How long an idle worker above the minimum is kept; None: as it is on the endpoint."""


class Wanted(NamedTuple):
    """What the schedule says for a moment."""

    workers: Workers
    place: str
    """The entry that says so: ``schedule[0]``, or ``workers`` where none matches."""


_Ceiling = Annotated[int, Meta(ge=0, description="a number of tokens, at least 0")]
_Days = Annotated[list[str], Meta(min_length=1, description="days such as ['mon-fri', 'sun']")]
_Dimension = Annotated[int, Meta(ge=1, description="a number, at least 1")]
_Embed = Annotated[list[str], Meta(min_length=1, description=f"a list of some of {', '.join(routing.EVERYTHING)}")]
_Hours = Annotated[str, Meta(description="hours such as '08:00-20:00', or '22:00-06:00' over midnight")]
_Idle = Annotated[int, Meta(ge=1, le=3_600, description="a number of seconds, 1 to 3600")]
_Jobs = Annotated[int, Meta(ge=1, le=100_000, description="a number of jobs, 1 to 100000")]
_Layout = Annotated[str, Meta(description="the name of a text layout")]
_Model = Annotated[str, Meta(min_length=1, max_length=200, description="the name of a model")]
_Profiles = Annotated[dict[str, Any], Meta(description="tables [profiles.NAME]")]
_Provider = Annotated[str, Meta(description="a provider: static, torch, openai, nvidia, voyage or ollama")]
_Schedule = Annotated[list[Any], Meta(description="tables [[schedule]]")]
_Seconds = Annotated[float, Meta(ge=1, le=604_800, description="a number of seconds, 1 to 604800")]
_Tier = Annotated[Tier, Meta(description="a tier: speed or quality")]
_Tiers = Annotated[dict[str, Any], Meta(description="tables [tiers.speed] and [tiers.quality]")]
_Timeout = Annotated[int, Meta(ge=5_000, le=604_800_000, description="a number of milliseconds, 5000 to 604800000")]
_Ttl = Annotated[int, Meta(ge=10_000, le=604_800_000, description="a number of milliseconds, 10000 to 604800000")]
_Usd = Annotated[float, Meta(ge=0, le=1_000_000, description="a number of US dollars, 0 to 1000000")]
_WorkerCount = Annotated[int, Meta(ge=0, le=1_000, description="a number of workers, 0 to 1000")]
_WorkersOf = Annotated[dict[str, Any], Meta(description="a table [workers]")]
_Zone = Annotated[str, Meta(description="the name of an IANA time zone, such as Europe/Berlin")]


class _EngineTable(msgspec.Struct, kw_only=True):
    provider: _Provider | None = None
    model: _Model | None = None
    dimension: _Dimension | None = None
    layout: _Layout | None = None

    @property
    def named(self) -> list[str]:
        """What it says of an engine."""
        return [name for name in _EngineTable.__struct_fields__ if getattr(self, name) is not None]

    def over(self, choice: Choice, place: str) -> Choice:
        """A choice with this engine."""
        provider: Provider | None = None
        if self.provider is not None:
            known: tuple[Provider, ...] = get_args(Provider)
            wanted = routing.ALIASES.get(self.provider, self.provider)
            provider = next((name for name in known if name == wanted), None)
            if provider is None:
                raise _wrong(f"{place}.provider", _allowed(_Provider), self.provider)
        return routing.switch(choice, provider, self.model, self.dimension, self.layout)


class _ProfileTable(_EngineTable, kw_only=True):
    execution_timeout_ms: _Timeout | None = None
    ttl_ms: _Ttl | None = None
    queue_depth: _Jobs | None = None
    queue_age_seconds: _Seconds | None = None
    tier: _Tier | None = None
    embed: _Embed | None = None
    max_tokens: _Ceiling | None = None
    max_usd: _Usd | None = None


class _WorkersTable(msgspec.Struct, kw_only=True):
    workers_min: _WorkerCount
    workers_max: _WorkerCount
    idle_timeout_seconds: _Idle | None = None


class _EntryTable(_WorkersTable, kw_only=True):
    days: _Days = msgspec.field(default_factory=lambda: ["mon-sun"])
    hours: _Hours = "00:00-24:00"


class _File(msgspec.Struct):
    profiles: _Profiles = {}
    tiers: _Tiers = {}
    time_zone: _Zone = "UTC"
    workers: _WorkersOf | None = None
    schedule: _Schedule = []


class _Entry(NamedTuple):
    days: frozenset[int]
    """0 is Monday."""
    start: int
    """Minutes after midnight."""
    end: int
    """At or below ``start``: on the next day."""
    workers: Workers

    def holds(self, day: int, minute: int) -> bool:
        if self.start < self.end:
            return day in self.days and self.start <= minute < self.end
        # Over midnight: the hours belong to the day on which they begin.
        return (day in self.days and minute >= self.start) or ((day - 1) % 7 in self.days and minute < self.end)


class Profiles:
    """All profiles, and the schedule."""

    def __init__(
        self,
        profiles: Iterable[Profile],
        *,
        zone: ZoneInfo,
        workers: Workers | None = None,
        schedule: tuple[_Entry, ...] = (),
    ) -> None:
        self._profiles = {profile.name: profile for profile in profiles}
        self._zone = zone
        self._workers = workers
        self._schedule = schedule

    def __iter__(self) -> Iterator[Profile]:
        """Those that take jobs."""
        return (profile for profile in self._profiles.values() if profile.refusal is None)

    @classmethod
    def load(cls, path: Path | None, settings: Settings) -> Profiles:
        """The profiles of a file of at most ``MAX_FILE_BYTES``; what a profile leaves out comes from ``settings``.

        Raises InvalidSettings, which names the place in the file.
        """
        try:
            return cls._of({} if path is None else _document(path), settings)
        except InvalidSettings as error:
            variable = "MEMVID_EXPORT_PROFILES_FILE, " if path == settings.profiles_file else ""
            raise InvalidSettings(f"{variable}{path}: {error.message}", **error.details) from error

    @classmethod
    def _of(cls, document: dict[str, Any], settings: Settings) -> Profiles:
        file = _read(document, _File, "")
        for name in file.profiles:
            if not _NAME.fullmatch(name):
                raise _wrong("profiles", "named by at most 64 letters, digits, - and _", name)
        embeddings = _Embeddings(file.tiers, settings)
        tables = {name: _read(table, _ProfileTable, f"profiles.{name}") for name, table in file.profiles.items()}
        built_in = {name: _ProfileTable() for name in (DEFAULT, *TIERS)}
        profiles = [_profile(name, table, settings, embeddings) for name, table in (built_in | tables).items()]
        workers = None if file.workers is None else _workers(_read(file.workers, _WorkersTable, "workers"), "workers")
        schedule = tuple(_entry(table, f"schedule[{place}]") for place, table in enumerate(file.schedule))
        if schedule and workers is None:
            raise InvalidSettings("[workers] is missing: it says what holds outside the schedule", field="workers")
        return cls(profiles, zone=_zone(file.time_zone), workers=workers, schedule=schedule)

    def get(self, name: str | None) -> Profile:
        """The profile of a name; None is the default. Raises InvalidRequest, also where its engine cannot run."""
        profile = self._profiles.get(DEFAULT if name is None else name)
        if profile is not None and profile.refusal is None:
            return profile
        allowed = sorted(each.name for each in self)
        what = "there is no profile of that name" if profile is None else f"{profile.name} {profile.refusal}"
        raise InvalidRequest(
            f"options.profile: {what}; there is {', '.join(allowed)}", field="options.profile", allowed=allowed
        )

    def of_job(self, name: str) -> Profile:
        """The profile of a job that was accepted. Where it is gone since, the default takes its place: a restart with
        another file fails no job that was promised, and what the default may cost is bounded by the settings."""
        try:
            return self.get(name)
        except InvalidRequest as error:
            log.warning("the profile of a job is gone; the default holds", profile=name, reason=error.message)
            return self.get(None)

    def workers_at(self, moment: datetime) -> Wanted | None:
        """What holds at a moment (with a time zone): the first entry that matches its local time; None where the file
        says nothing about workers.

        An hour that the clock skips in spring is in no entry, one that comes twice in autumn counts twice.
        """
        if self._workers is None:
            return None
        local = moment.astimezone(self._zone)
        minute = local.hour * 60 + local.minute
        for place, entry in enumerate(self._schedule):
            if entry.holds(local.weekday(), minute):
                return Wanted(entry.workers, f"schedule[{place}]")
        return Wanted(self._workers, "workers")

    @property
    def time_zone(self) -> str:
        """The name of the schedule's time zone."""
        return self._zone.key


def _document(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
        if len(text) > MAX_FILE_BYTES:
            raise InvalidSettings(f"the file has more than {MAX_FILE_BYTES:,} bytes", field="file")
        return tomllib.loads(text.decode())
    except OSError as error:
        raise InvalidSettings(f"the file cannot be read: {error.strerror}", field="file") from error
    except UnicodeDecodeError as error:
        raise InvalidSettings("the file is not UTF-8", field="file") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidSettings(f"the file is not TOML: {error}", field="file") from error
    except ValueError as error:  # a number of thousands of digits
        raise InvalidSettings(f"the file has a value that cannot be read: {error}", field="file") from error
    except RecursionError as error:
        raise InvalidSettings("the file is nested too deeply", field="file") from error


Table = TypeVar("Table", bound=msgspec.Struct)


def _read(table: Any, kind: type[Table], place: str) -> Table:
    """A table as a struct, field by field, so that an error names its place."""
    if not isinstance(table, Mapping):
        raise _wrong(place, "a table", table)
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for name, value in table.items():
        at = f"{place}.{name if _NAME.fullmatch(name) else repr(name)}".lstrip(".")
        if name not in fields:
            raise InvalidSettings(f"{at} is not known; there is {', '.join(sorted(fields))}", field=at)
        try:
            msgspec.convert(value, fields[name].type)
        except msgspec.ValidationError as error:
            raise _wrong(at, _allowed(fields[name].type), value) from error
    for name, field in fields.items():
        if field.required and name not in table:
            raise InvalidSettings(f"{place}.{name} is missing", field=f"{place}.{name}")
    return msgspec.convert(table, kind)


def _allowed(kind: Any) -> str:
    """The description in ``Annotated[…]``, also of what may be left out."""
    kind = kind if hasattr(kind, "__metadata__") else get_args(kind)[0]
    (meta,) = kind.__metadata__
    return str(meta.description)


def _wrong(place: str, allowed: str, value: object) -> InvalidSettings:
    try:
        shown = repr(value)
    except ValueError:
        shown = "a number of thousands of digits"
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return InvalidSettings(f"{place} must be {allowed}; it is {shown}", field=place)


class _Embeddings:
    """The choices that profiles and tiers lead to, checked against the settings."""

    def __init__(self, tiers: dict[str, Any], settings: Settings) -> None:
        self._settings = settings
        self._default = settings.choice()
        self._tiers: dict[Tier, Choice] = {}
        for name in tiers:
            if name not in TIERS:
                raise InvalidSettings(f"tiers.{name} is not known; there is {', '.join(TIERS)}", field=f"tiers.{name}")
        for tier in TIERS:
            choice = routing.tier_of(self._default, tier)
            if tier in tiers:
                place = f"tiers.{tier}"
                choice = _read(tiers[tier], _EngineTable, place).over(choice, place)
                self._check(choice, place)
            self._tiers[tier] = choice
        self._named = frozenset(tiers)

    def of(self, name: str, table: _ProfileTable) -> tuple[Choice, str | None]:
        """What a profile embeds, and why that cannot run where it was not the file that wished for it."""
        place = f"profiles.{name}"
        if table.tier is not None and table.named:
            must = f"the only word on the engine; the profile has {', '.join(table.named)} too"
            raise _wrong(f"{place}.tier", must, table.tier)
        built_in = next((tier for tier in TIERS if tier == name and not table.named), None)
        tier = table.tier or built_in
        choice = self._with_bounds(self._default if tier is None else self._tiers[tier], table, place)
        try:
            self._check(table.over(choice, place), place, "tier" if table.tier else "")
        except InvalidSettings as error:
            if table.tier is not None or built_in is None or built_in in self._named:
                raise
            return choice, f"cannot run here: {error.message.removeprefix(f'{place}.')}"
        return table.over(choice, place), None

    def _with_bounds(self, choice: Choice, table: _ProfileTable, place: str) -> Choice:
        bounds: dict[str, Any] = {}
        for name in ("max_tokens", "max_usd"):
            own, most = getattr(table, name), getattr(self._default, name)
            if own is not None and most is not None and own > most:
                raise _wrong(f"{place}.{name}", f"at most the {most} of MEMVID_EMBED_{name.upper()}", own)
            if own is not None:
                bounds[name] = own
        if table.embed is not None:
            if unknown := [kind for kind in table.embed if kind not in routing.EVERYTHING]:
                raise _wrong(f"{place}.embed", _allowed(_Embed), unknown[0])
            bounds["what"] = routing.in_order(table.embed)
        return msgspec.structs.replace(choice, **bounds)

    def _check(self, choice: Choice, place: str, instead: str = "") -> None:
        """Raise InvalidSettings with the place; ``instead`` is the key to name for whatever part of the engine."""
        settings = self._settings
        try:
            routing.check_choice(
                choice, settings.engines(), runs_here=settings.embeds_here, allowed=settings.allowed_models()
            )
        except InvalidRequest as error:
            field = str(error.details["field"])
            at = f"{place}.{instead or field.removeprefix('embedding_').replace('what', 'embed')}"
            raise InvalidSettings(f"{at}{error.message.removeprefix(field)}", field=at) from error


def _profile(name: str, table: _ProfileTable, settings: Settings, embeddings: _Embeddings) -> Profile:
    ttl_ms = table.ttl_ms or settings.runpod_ttl_ms
    timeout_ms = table.execution_timeout_ms or settings.runpod_execution_timeout_ms
    if (table.ttl_ms or table.execution_timeout_ms) and ttl_ms < timeout_ms:
        allowed = f"at least the {timeout_ms} milliseconds of its execution_timeout_ms"
        raise _wrong(f"profiles.{name}.ttl_ms", allowed, ttl_ms)
    embedding, refusal = embeddings.of(name, table)
    return Profile(
        name=name,
        execution_timeout_ms=timeout_ms,
        ttl_ms=ttl_ms,
        queue_depth=table.queue_depth or settings.queue_capacity,
        # A job that waits past its time to live is forgotten by the platform: nothing is gained by a longer queue.
        queue_age_seconds=table.queue_age_seconds or ttl_ms / 1000,
        embedding=embedding,
        refusal=refusal,
    )


def _workers(table: _WorkersTable, place: str) -> Workers:
    if table.workers_min > table.workers_max:
        raise _wrong(f"{place}.workers_min", f"at most its workers_max, {table.workers_max}", table.workers_min)
    return Workers(
        workers_min=table.workers_min,
        workers_max=table.workers_max,
        idle_timeout_seconds=table.idle_timeout_seconds,
    )


def _entry(given: Any, place: str) -> _Entry:
    table = _read(given, _EntryTable, place)
    hours = _HOURS.fullmatch(table.hours)
    start, end = (int(hours[1]) * 60 + int(hours[2]), int(hours[3]) * 60 + int(hours[4])) if hours else (0, 0)
    if start == end or start >= DAY_MINUTES or end > DAY_MINUTES:
        raise _wrong(f"{place}.hours", "hours such as '08:00-20:00', or '22:00-06:00' over midnight", table.hours)
    days = frozenset(day for text in table.days for day in _range(text, f"{place}.days"))
    return _Entry(days, start, end, _workers(table, place))


def _range(text: str, place: str) -> list[int]:
    first, _, last = text.partition("-")
    if first not in _DAYS or (last or first) not in _DAYS or text.endswith("-"):
        raise _wrong(place, f"days ({', '.join(_DAYS)}) or ranges of them ('mon-fri')", text)
    start, end = _DAYS.index(first), _DAYS.index(last or first)
    return [(start + step) % 7 for step in range((end - start) % 7 + 1)]


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError) as error:
        raise _wrong("time_zone", "the name of an IANA time zone, such as Europe/Berlin", name) from error
