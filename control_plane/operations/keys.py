"""Who may ask, and for what: named keys with scopes, known here by their hashes alone."""

from __future__ import annotations

from typing import Literal, NamedTuple

Scope = Literal["export", "read", "admin"]
SCOPES: frozenset[Scope] = frozenset({"export", "read", "admin"})
DEFAULT_CLIENT = "default"
"""Of the key in ``MEMVID_EXPORT_API_KEY``, of a server without keys, and of jobs from before there were clients."""


class Caller(NamedTuple):
    """Whoever sent a request: what its key stands for. The bearer check puts it into ``scope["auth"]``."""

    key: str
    """The key's name; never the key."""
    client: str
    """Whose jobs it sees and makes. Several keys may stand for one client."""
    scopes: frozenset[Scope]

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


EVERYBODY = Caller(DEFAULT_CLIENT, DEFAULT_CLIENT, SCOPES)
"""The caller where no key is asked for."""
