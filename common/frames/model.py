"""The frame: one document of a capsule, on its way from the graph to a writer and the sidecar."""

from __future__ import annotations

from typing import NamedTuple


class Frame(NamedTuple):
    """One document of a capsule.

    A tuple, so that the native writer takes thousands in one call without a conversion.
    """

    uri: str
    title: str
    track: str
    kind: str
    """``node``, ``community``, ``process``, ``relation`` or ``meta``."""
    tags: list[str]
    text: str
    """What readers see; its last line is ``metadata=`` and ``metadata``."""
    metadata: str
    """A compact JSON object with typed values: all that is known, for readers and the sidecar."""
    embed_text: str | None = None
    """The text to embed in the layout of the engine, or None for a frame without a vector."""
    extra: str = "{}"
    """A compact JSON object whose top-level values a writer stores as strings (strings as they are, all else as
    compact JSON) in the frame's ``extra_metadata``, which lies uncompressed in the capsule's table of contents. So it
    leaves out what the frame's other fields hold: see ``docs/decisions.md``."""
