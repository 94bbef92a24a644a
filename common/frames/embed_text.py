"""The texts that embedding engines read; each engine names the layout that it wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from common.graph.model import Node
from common.text import split_identifier

STATIC_V1 = "static-v1"
_MAX_KEYWORDS = 20
_MAX_DESCRIPTION = 300
_MAX_CHARS = 2_000


class EmbedInput(NamedTuple):
    """What a layout may draw from."""

    node: Node
    signature: str
    """The first line of the declaration, or the empty string."""


def _static_v1(given: EmbedInput) -> str:
    """Name and path, split into words, and the signature; no body, which measured worse for static vectors."""
    properties: dict[str, Any] = given.node.properties
    parts = [split_identifier(given.node.name)]
    path = properties.get("filePath")
    if path:
        parts.append(split_identifier(path))
    if given.signature:
        parts.append(given.signature)
    keywords = properties.get("keywords")
    if type(keywords) is list:
        parts.extend(
            split_identifier(word[:_MAX_DESCRIPTION]) for word in keywords[:_MAX_KEYWORDS] if type(word) is str
        )
    description = properties.get("description")
    if type(description) is str:
        parts.append(description[:_MAX_DESCRIPTION])
    return " ".join(part for part in parts if part)[:_MAX_CHARS] or given.node.name[:_MAX_CHARS]


LAYOUTS: dict[str, Callable[[EmbedInput], str]] = {STATIC_V1: _static_v1}
"""Name of a layout -> what makes its text. The name is part of every vector cache key: a changed text, a new name."""
