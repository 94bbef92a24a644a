"""Which engine embeds what, within which bounds; and what a machine that runs engines has."""

from __future__ import annotations

from typing import Literal

import msgspec

Mode = Literal["local_cpu", "runpod_gpu", "external_api"]
Tier = Literal["speed", "quality"]
Provider = Literal["static", "torch", "openai", "nvidia", "voyage", "ollama"]
What = Literal["nodes", "files", "communities", "processes", "relations"]

MODES: tuple[Mode, ...] = ("local_cpu", "runpod_gpu", "external_api")
PROVIDERS: dict[Mode, tuple[Provider, ...]] = {
    "local_cpu": ("static", "torch", "ollama"),
    "runpod_gpu": ("torch", "static"),
    "external_api": ("openai", "nvidia", "voyage", "ollama"),
}
"""What each mode allows; the first is its default, but ``external_api`` wants a provider named: it costs money."""
PAID: tuple[Provider, ...] = ("openai", "nvidia", "voyage")
"""Providers that need a key."""
WHAT: tuple[What, ...] = ("nodes", "files", "communities", "processes")
"""What is embedded unless a profile says otherwise: everything but relationships."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What one export embeds, with which engine, within which bounds."""

    mode: Mode = "local_cpu"
    provider: Provider = "static"
    model: str = "wordllama-l2-supercat-256"
    dimension: int | None = None
    """None: the model's own."""
    layout: str | None = None
    """None: the one that measured best for the model."""
    what: tuple[What, ...] = WHAT
    max_tokens: int | None = None
    """An export that would read more is refused before the first call."""
    max_usd: float | None = None
    """An export that would cost more is refused before the first call."""


class Engines(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine that runs engines has: keys, addresses, models, a cache. Never part of a job, never logged."""

    keys: dict[str, str] = {}
    """By provider."""
    urls: dict[str, str] = {}
    """By provider: where its API is, without a slash at the end."""
    request_timeout_seconds: float = 60.0
    voyage_input_type: str | None = None
    """In place of ``document``; a query stays a query."""
    voyage_output_dtype: str = "float"
    voyage_truncation: bool = True
    model_folders: tuple[str, ...] = ()
    """Where models of sentence-transformers lie: ``<folder>/<name>``."""
    model_downloads: bool = False
    """Also take models from the Hugging Face hub (``organisation/name@revision``)."""
    devices: tuple[str, ...] = ()
    """``cuda:0`` and so on, or ``cpu``; none: all GPUs, or the CPU where there is none."""
    precision: str | None = None
    """float32, bfloat16 or float16; None: bfloat16 on a GPU, float32 on a CPU."""
    cache: str | None = None
    """A file of SQLite (absolute path) or a prefix in object storage (a ref that ends in /); None: no cache."""
    cache_bytes: int = 4 << 30

    def __repr__(self) -> str:
        """Without the keys."""
        return f"Engines(keys of {', '.join(sorted(self.keys)) or 'no provider'})"
