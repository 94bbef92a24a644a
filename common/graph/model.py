"""The graph on its way through an export: as it was read (ExportRequest) and in canonical form (Graph)."""

from __future__ import annotations

from typing import Any

import msgspec

from common import contract
from common.contract import ExportOptions, InputReport, LeftOut, Source

EXAMPLE_LENGTH = 200
"""Characters of a warning's example."""


class GraphLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a payload may hold at most; passing one raises PayloadTooLarge, nesting and long ids InvalidRequest."""

    max_payload_bytes: int = 500_000_000
    """Bytes as received."""
    max_text_bytes: int = 500_000_000
    """Bytes after decompression."""
    max_ratio: int = 200
    """Decompressed to received bytes, looked at from 16 MiB on: graphs of code stay under 40."""
    max_members: int = 100_000
    """Of gzip, or frames of zstd, one after the other; tools that write blocks take 64 KiB of text or more for each."""
    max_depth: int = 64
    """Levels of JSON inside one property."""
    max_nodes: int = 2_000_000
    max_relationships: int = 5_000_000
    max_files: int = 1_000_000
    max_values: int = 25_000_000
    """Commas and opening brackets in one JSON document or line, those in its texts too, counted before it is decoded:
    bounds the memory for its values, beside their texts, to 3 GB. Graphs of code have one in 42 bytes or more."""
    max_text_chars: int = 64_000_000
    """Characters of one file's text or one node's content."""
    max_id_chars: int = 8_192
    """Characters of an id (of a relationship: three times as many), a label, a type, a name or a path."""


class Node(msgspec.Struct, gc=False):
    """A node; ``properties`` always holds ``name`` (a non-empty string)."""

    id: str
    label: str
    properties: dict[str, Any]

    @property
    def name(self) -> str:
        """The node's name."""
        name: str = self.properties["name"]
        return name


class Relation(msgspec.Struct, gc=False):
    """A relationship; ``occurrences`` counts equal ones that were merged into it."""

    id: str
    source_id: str
    target_id: str
    type: str
    confidence: float = 1.0
    """0 to 1."""
    reason: str | None = None
    step: int | None = None
    extra: dict[str, Any] | None = None
    """Keys of the input that we do not know."""
    occurrences: int = 1


class WarningCounter:
    """Counts repairs by code and keeps the first example of each."""

    def __init__(self, warnings: list[contract.Warning] | None = None) -> None:
        self._found = {warning.code: (warning.count, warning.example) for warning in warnings or []}

    def add(self, code: str, example: str, count: int = 1) -> None:
        """Count ``count`` more repairs of this kind."""
        known = self._found.get(code)
        self._found[code] = (known[0] + count, known[1]) if known else (count, example[:EXAMPLE_LENGTH])

    def warnings(self) -> list[contract.Warning]:
        """All that was counted, by code."""
        return [
            contract.Warning(code=code, count=n, example=example) for code, (n, example) in sorted(self._found.items())
        ]


class ExportRequest(msgspec.Struct, kw_only=True):
    """A validated request: nodes and relations as they came, in the order of the input."""

    session_id: str | None
    """None for a raw graph: the canonical form derives one from the content."""
    project_name: str
    source: Source
    options: ExportOptions
    nodes: list[Node]
    relations: list[Relation]
    files: dict[str, str]
    """Path -> text, as far as the client sent it; texts may be compacted."""
    input: InputReport
    warnings: list[contract.Warning] = []


class Totals(msgspec.Struct, rename="camel", kw_only=True):
    """The manifest's ``totals``: what came in, and how much of it became frames."""

    nodes: int
    relationships: int
    exported_node_frames: int
    exported_relation_frames: int
    file_count: int


class Graph(msgspec.Struct, kw_only=True):
    """The canonical graph: the same for every order of the same input."""

    session_id: str
    project_name: str
    source: Source
    options: ExportOptions
    nodes: list[Node]
    """By id (code points), ids unique."""
    relations: list[Relation]
    """By id (code points), ids unique."""
    files: dict[str, str]
    totals: Totals
    left_out: LeftOut
    input: InputReport
    warnings: list[contract.Warning]
