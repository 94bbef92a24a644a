"""Which pages a browser may let ask: a page of another origin, or of a name made to point here, may not."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Self
from urllib.parse import urlsplit

from common.settings import Settings
from control_plane.errors import HostRefused, OriginRefused

_PORTS = {"http": ":80", "https": ":443"}


class Origins:
    """Checks Host and Origin of requests.

    Whoever owns a name can let it point at 127.0.0.1: a page of theirs then has the same origin as a server that its
    visitor runs (DNS rebinding). Such a server, and any that asks for no key, answers only to names it knows:
    addresses, which nobody else can own, ``localhost``, and those of ``known``. A server that asks for a key and
    listens to the network has names that it is not told, and a page without the key gets nothing from it.
    """

    def __init__(self, *, any_host: bool = True, known: Iterable[str] = ()) -> None:
        """``known`` are origins (``https://host``) whose pages may ask, and ``*`` for all."""
        self._any_host = any_host
        self._known = {_origin(origin) for origin in known}
        self._hosts = {urlsplit(origin).hostname for origin in self._known}

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The origins of a server with these settings."""
        public = [settings.public_url] if settings.public_url else []
        any_host = settings.asks_for_key and not _is_loopback(settings.host)
        return cls(any_host=any_host, known=[*settings.cors_origins, *public])

    def check(self, host: str, origin: str | None) -> None:
        """Raise HostRefused or OriginRefused; ``origin`` is None where no page asks."""
        name = _name(host)
        if name is None or not (self._any_host or _is_own(name) or name in self._hosts):
            raise HostRefused(
                "This server does not answer to the name in Host; MEMVID_EXPORT_PUBLIC_URL tells it its name."
            )
        if origin is None or "*" in self._known or _origin(origin) in self._known:
            return
        scheme, _, own = _origin(origin).partition("://")
        if not own or own != host.lower().removesuffix(_PORTS.get(scheme, "")):
            raise OriginRefused("Pages of this origin may not ask here; MEMVID_EXPORT_CORS_ORIGINS allows them.")


def _origin(text: str) -> str:
    """Scheme, host and port, as browsers write them."""
    if text == "*":
        return text
    scheme, _, rest = text.lower().partition("://")
    return f"{scheme}://{rest.partition('/')[0].removesuffix(_PORTS.get(scheme, ''))}"


def _name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _is_own(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
