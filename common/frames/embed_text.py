"""The texts that embedding engines read; each engine names the layout that it wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from common.graph.model import Node
from common.text import split_identifier

STATIC_V2 = "static-v2"
CODE_V1 = "code-v1"
NEIGHBOURS = 8
"""Names of neighbours in a text; with more, one renamed node changes too many texts of others."""
_MAX_KEYWORDS = 20
_MAX_DESCRIPTION = 300
_MAX_BODY = 300
_MAX_CHARS = 2_000


class EmbedInput(NamedTuple):
    """What a layout may draw from."""

    node: Node
    signature: str
    """The first line of the declaration, or the empty string."""
    snippet: str
    neighbours: Sequence[str]
    """Names of callers, callees and containers, at most ``NEIGHBOURS``."""
    container: str
    """Name of the class or the like that it belongs to, or the empty string."""


class Layout(NamedTuple):
    """How the text of a node is made; the one of a relationship is the same in all layouts."""

    text: Callable[[EmbedInput], str]
    neighbours: bool
    """It reads them."""
    container: bool
    """The same."""


def _static_v2(given: EmbedInput) -> str:
    """The name twice, its container, path and signature, all split into words; no body, which measured worse.

    A static vector is the mean of its words' vectors: what stands twice counts twice.
    """
    names = (split_identifier(given.node.name), split_identifier(given.container))
    signature = split_identifier(given.signature)
    return _joined(given.node, *names, *_head(given._replace(signature=signature)))


def _code_v1(given: EmbedInput) -> str:
    """The same with the names of neighbours and the first lines of the body: what transformer models read best."""
    neighbours = ", ".join(split_identifier(name) for name in given.neighbours)
    return _joined(given.node, *_head(given), neighbours, given.snippet[:_MAX_BODY])


def _head(given: EmbedInput) -> list[str]:
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
    return parts


def _joined(node: Node, *parts: str) -> str:
    return " ".join(part for part in parts if part)[:_MAX_CHARS] or node.name[:_MAX_CHARS]


def relation_text(source: str, kind: str, target: str, reason: str) -> str:
    """The text of a relationship: what it joins, and how."""
    parts = (split_identifier(source), split_identifier(kind), split_identifier(target), reason[:_MAX_DESCRIPTION])
    return " ".join(part for part in parts if part)[:_MAX_CHARS] or kind[:_MAX_CHARS]


LAYOUTS: dict[str, Layout] = {
    STATIC_V2: Layout(_static_v2, neighbours=False, container=True),
    CODE_V1: Layout(_code_v1, neighbours=True, container=False),
}
"""By name, which is part of every vector cache key: a changed text, a new name."""
