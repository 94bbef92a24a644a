"""Which engine a job, a setting or a profile leads to, and the rules that it must keep.

Messages begin with the name of the field that is wrong, as a job's input has it: settings and profiles put their own
name for it in its place.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Collection, Iterable
from typing import Any, TypeVar, get_args
from urllib.parse import urlsplit

import msgspec

from common.contract import JobInput
from common.embedding import catalog
from common.embedding.choice import MODES, PAID, PROVIDERS, Choice, Engines, Mode, Provider, Tier, What
from common.errors import InvalidRequest
from common.frames.embed_text import LAYOUTS, STATIC_V2

CATALOG = frozenset(f"{provider}/{name}" for provider, name in catalog.MODELS)
"""What may be used where nobody says otherwise."""
ALIASES: dict[str, Provider] = {"voyageai": "voyage", "local": "ollama"}
"""Other names of providers that clients of the first service know."""
EVERYTHING: tuple[What, ...] = get_args(What)
OLLAMA_PORT = 11_434
_OURS = ("static", "torch")
"""Providers that are code of this package, between which a tier chooses."""

Word = TypeVar("Word", bound=str)
Number = TypeVar("Number", int, float)


def choose(mode: Mode, provider: Provider | None = None, model: str | None = None) -> Choice:
    """The choice of a mode, with its defaults for what is None; dimension, layout and ceilings are left open.

    Raises InvalidRequest where a mode has no default provider.
    """
    if provider is None and mode == "external_api":
        allowed = PROVIDERS[mode]
        raise _wrong("embedding_provider", f"be set ({_listed(allowed)}) where the mode is {mode}", allowed)
    provider = provider or PROVIDERS[mode][0]
    return Choice(mode=mode, provider=provider, model=model or catalog.DEFAULTS[provider])


def tier_of(default: Choice, tier: Tier) -> Choice:
    """A tier of the mode and provider of a default choice; what it embeds and its ceilings stay."""
    provider = default.provider
    if provider in _OURS:
        provider = catalog.MODE_TIERS[default.mode][tier]
    return switch(default, provider, catalog.TIERS[provider][tier])


def switch(
    choice: Choice,
    provider: Provider | None = None,
    model: str | None = None,
    dimension: int | None = None,
    layout: str | None = None,
) -> Choice:
    """A choice with another engine. What is None stays where the engine can have it, else it is the engine's own."""
    same = provider in (None, choice.provider)
    provider = provider or choice.provider
    model = model or (choice.model if same else catalog.DEFAULTS[provider])
    same_model = same and model == choice.model
    known = catalog.MODELS.get((provider, model))
    if dimension is None and (same_model or (same and known is not None and choice.dimension in known.dimensions)):
        dimension = choice.dimension
    if layout is None and same_model:
        layout = choice.layout
    return msgspec.structs.replace(choice, provider=provider, model=model, dimension=dimension, layout=layout)


def check_choice(choice: Choice, engines: Engines, *, runs_here: bool, allowed: Collection[str]) -> None:
    """Raise InvalidRequest for a choice that cannot or may not run; loads nothing and asks nobody.

    ``runs_here`` False leaves out what the machine that runs the engine has to have: keys, packages, models.
    ``allowed`` has models as ``MODEL`` or ``PROVIDER/MODEL``; the static one, which comes with this package, always
    is.
    """
    _one_of("embedding_mode", choice.mode, MODES)
    if choice.provider not in PROVIDERS[choice.mode]:
        must = f"be {_listed(PROVIDERS[choice.mode])} where the mode is {choice.mode}; it is {_shown(choice.provider)}"
        raise _wrong("embedding_provider", must, PROVIDERS[choice.mode])
    _check_model(choice, allowed)
    layouts = (STATIC_V2,) if choice.provider == "static" else tuple(sorted(LAYOUTS))
    if choice.layout is not None:
        _one_of("embedding_layout", choice.layout, layouts)
    if not choice.what:
        raise _wrong("embedding_what", f"name something: {_listed(EVERYTHING)}", EVERYTHING)
    for kind in choice.what:
        _one_of("embedding_what", kind, EVERYTHING)
    if choice.max_tokens is not None and choice.max_tokens < 0:
        raise _wrong("embedding_max_tokens", "be a number of tokens, at least 0")
    if choice.max_usd is not None and not 0 <= choice.max_usd < math.inf:
        raise _wrong("embedding_max_usd", "be a number of US dollars, at least 0")
    if runs_here:
        _check_engine(choice, engines)


def check_question(choice: Choice, engines: Engines, *, mode: Mode, allowed: Collection[str]) -> None:
    """Raise InvalidRequest for the engine of a capsule's vectors where it may not embed questions on this machine.

    What a capsule says of its engine is held to the same rules as a job. Capsules come from anywhere: what is asked of
    one goes to who wants a key only where ``mode``, that of this machine, says that texts may leave it.
    """
    if choice.provider in PAID and mode != "external_api":
        must = f"be external_api for questions to vectors of {choice.provider}; it is {_shown(mode)}"
        raise _wrong("embedding_mode", must, setting="MEMVID_EMBEDDING_MODE")
    check_choice(choice, engines, runs_here=True, allowed=allowed)


def choice_of(job: JobInput, default: Choice, *, ollama_host: str | None = None) -> Choice:
    """What a job wants embedded; what it leaves out comes from ``default``, and its ceilings are at most those.

    A job names no host: its ``ollama_host`` must be ``ollama_host``, this machine's own. Otherwise whoever may start
    jobs could let the worker call any address of its network. Raises InvalidRequest.
    """
    mode = default.mode if job.embedding_mode is None else _one_of("embedding_mode", job.embedding_mode, MODES)
    provider: Provider | None = None
    if job.embedding_provider is not None:
        known: tuple[Provider, ...] = get_args(Provider)
        provider = _one_of("embedding_provider", ALIASES.get(job.embedding_provider, job.embedding_provider), known)
    if mode != default.mode:
        chosen = choose(mode, provider)
        default = msgspec.structs.replace(default, mode=mode)
        provider = chosen.provider
    choice = switch(default, provider, job.embedding_model, job.embedding_dimension, job.embedding_layout)
    what = choice.what
    if job.embedding_what is not None:
        for kind in job.embedding_what:
            _one_of("embedding_what", kind, EVERYTHING)
        what = in_order(job.embedding_what)
    if job.ollama_host is not None and (ollama_host is None or _ollama(job.ollama_host) != _ollama(ollama_host)):
        raise _wrong(
            "ollama_host", "be left out, or be the OLLAMA_HOST of the worker: a job does not say whom it calls"
        )
    return msgspec.structs.replace(
        choice,
        what=what,
        max_tokens=_least(job.embedding_max_tokens, default.max_tokens),
        max_usd=_least(job.embedding_max_usd, default.max_usd),
    )


def fields_of(choice: Choice) -> dict[str, Any]:
    """A choice as the fields of a JobInput; ``choice_of`` reads them back."""
    return {
        "embedding_mode": choice.mode,
        "embedding_provider": choice.provider,
        "embedding_model": choice.model,
        "embedding_dimension": choice.dimension,
        "embedding_layout": choice.layout,
        "embedding_what": list(choice.what),
        "embedding_max_tokens": choice.max_tokens,
        "embedding_max_usd": choice.max_usd,
    }


def in_order(what: Collection[str]) -> tuple[What, ...]:
    """Known kinds, each once, in the order of all lists of them: it decides nothing."""
    return tuple(kind for kind in EVERYTHING if kind in what)


def ollama_url(host: str) -> str:
    """``HOST``, ``HOST:PORT`` or a URL, as Ollama's own clients read it, as a URL. Raises ValueError."""
    scheme, _, rest = host.rpartition("://")
    url = urlsplit(f"{scheme or 'http'}://{rest}")
    if not scheme and url.port is None:
        url = url._replace(netloc=f"{url.netloc}:{OLLAMA_PORT}")
    return url.geturl().rstrip("/")


def _ollama(host: str) -> str:
    try:
        return ollama_url(host)
    except ValueError:
        return host


# --- rules ------------------------------------------------------------------------------------------


def _check_model(choice: Choice, allowed: Collection[str]) -> None:
    provider, model = choice.provider, choice.model
    if provider == "static":
        _one_of("embedding_model", model, (catalog.DEFAULTS[provider],))
    # Which revision, and which size of Ollama's, may stand behind the name: an entry without it allows all.
    names = (model, *(model.partition(mark)[0] for mark in {"torch": "@", "ollama": ":"}.get(provider, "")))
    if provider != "static" and not any(name in allowed or f"{provider}/{name}" in allowed for name in names):
        own = sorted(name for name in allowed if _may_be_of(name, provider))
        must = f"be one that is allowed here for {provider} ({_listed(own) if own else 'none is'})"
        raise _wrong("embedding_model", f"{must}; it is {_shown(model)}", own)
    if provider == "torch" and (provider, model) not in catalog.MODELS:
        if choice.dimension is not None and choice.dimension < 1:
            raise _wrong("embedding_dimension", "be at least 1")
        return  # Its own files tell the rest.
    try:
        known = catalog.find_model(provider, model, choice.dimension)
    except InvalidRequest as error:
        if "allowed" not in error.details:  # Of no dimension: no model can have this name.
            raise _wrong("embedding_model", f"be another: {error.message}") from error
        if choice.dimension is None:  # The name has passed, so that is what is missing.
            raise _wrong("embedding_dimension", f"be set: {_shown(model)} is not known here") from error
        must = f"be another: {error.message} ({error.details.get('allowed', '')})"
        raise _wrong("embedding_dimension", must) from error
    if known.price is None and choice.max_usd is not None:
        raise _wrong("embedding_max_usd", f"be left out: the price of {_shown(model)} is not known here")


def _may_be_of(name: str, provider: Provider) -> bool:
    return name.startswith(f"{provider}/") or name.partition("/")[0] not in get_args(Provider)


def _check_engine(choice: Choice, engines: Engines) -> None:
    """What the machine that embeds has to have."""
    if choice.provider in PAID and choice.provider not in engines.keys:
        name = f"{choice.provider.upper()}_API_KEY"
        raise _wrong("embedding_provider", f"be one whose key is set: {name} is not", setting=name)
    if choice.provider != "torch":
        return
    for package in ("torch", "sentence_transformers"):
        if importlib.util.find_spec(package) is None:
            must = f"be one that is installed: torch needs the package {package} (pip install 'memvid-export[gpu]')"
            raise _wrong("embedding_provider", must)
    if engines.model_downloads and "@" in choice.model:
        return  # Only the hub knows, and it is asked when the engine is opened.
    from common.embedding.torch_engine import find_model  # with numpy, which few who read settings need

    try:
        find_model(choice.model, engines)
    except InvalidRequest as error:
        raise _wrong("embedding_model", f"be one that is here: {error.message}") from error


def _one_of(field: str, value: str, allowed: Collection[Word]) -> Word:
    for word in allowed:
        if value == word:
            return word
    raise _wrong(field, f"be {_listed(allowed)}; it is {_shown(value)}", allowed)


def _wrong(field: str, must: str, allowed: Collection[str] = (), **details: object) -> InvalidRequest:
    more = {"allowed": list(allowed)} if allowed else {}
    return InvalidRequest(f"{field} must {must}", field=field, **more, **details)


def _least(one: Number | None, other: Number | None) -> Number | None:
    return other if one is None else one if other is None else min(one, other)


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def _shown(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:97]}...")
