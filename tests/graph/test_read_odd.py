"""Payloads that nobody sends on purpose: each is read whole or refused with its place."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import InvalidRequest, PayloadTooLarge, StorageFailed
from common.frames.build import frames
from common.graph.canonical import canonical
from common.graph.model import ExportRequest, GraphLimits
from common.graph.read import read_graph

NODE = {"id": "n", "label": "Function", "properties": {"name": "f"}}
DEPTH_8 = GraphLimits(max_depth=8)
RELATION = {"id": "r", "sourceId": "n", "targetId": "n", "type": "CALLS", "confidence": 1}


def read(limits: GraphLimits | None = None, **changes: Any) -> ExportRequest:
    document = {"nodes": [NODE], "relationships": [RELATION], **changes}
    return read_graph(io.BytesIO(json.dumps(document).encode()), limits=limits)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


class Dribble(io.RawIOBase):
    """A stream that gives two bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def read(self, _size: int = -1) -> bytes:
        return self._data.read(2)


@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_the_compression_is_told_from_the_first_bytes_however_few_come_at_a_time(pack: Any) -> None:
    data = pack(json.dumps({"nodes": [NODE], "relationships": [RELATION]}).encode())
    request = read_graph(Dribble(data))  # type: ignore[arg-type]
    assert [node.id for node in request.nodes] == ["n"]
    assert request.input.bytes == len(data)


def test_a_path_that_no_file_can_have_is_told() -> None:
    with pytest.raises(StorageFailed, match="too long"):
        read_graph(Path("/" + "a" * 300))


def test_a_payload_that_the_disk_does_not_give_back_is_a_storage_error() -> None:
    with (
        Path("/proc/self/mem").open("rb", buffering=0) as unreadable,
        pytest.raises(StorageFailed, match="the payload cannot be read"),
    ):
        read_graph(unreadable)  # type: ignore[arg-type]


def test_a_stream_of_many_members_is_refused() -> None:
    line = json.dumps({"type": "node", "data": NODE}).encode() + b"\n"
    with pytest.raises(PayloadTooLarge, match="more than 3 members"):
        read_graph(io.BytesIO(gzip.compress(line) * 4), limits=GraphLimits(max_members=3))


def test_a_line_longer_than_what_is_read_at_once_is_one_line() -> None:
    code = "x = 1\n" * 400_000
    long = {**NODE, "properties": {"name": "f", "content": code}}
    lines = [{"type": "node", "data": long}, {"type": "relationship", "data": RELATION}]
    request = read_graph(io.BytesIO(b"".join(json.dumps(line).encode() + b"\n" for line in lines)))
    assert request.nodes[0].properties["content"] == code
    assert len(request.relations) == 1


@pytest.mark.parametrize(
    ("changes", "limits", "field"),
    [
        (
            {"nodes": [{**NODE, "properties": {"name": "f", "notes": "long enough"}}]},
            GraphLimits(max_text_chars=10),
            "nodes[0].properties.notes",
        ),
        (
            {"nodes": [NODE, {**NODE, "properties": {"name": "f", "x": nested(9)}}]},
            GraphLimits(max_depth=8),
            "nodes[1]",
        ),
        ({"relationships": [{**RELATION, "why": nested(9)}]}, DEPTH_8, "relationships[0]"),
        ({"fileContents": {"a.py": 5}}, None, "fileContents['a.py']"),
        ({"options": {"maxNodeFrames": 10.5}}, None, "options.maxNodeFrames"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(changes: dict[str, Any], limits: GraphLimits | None, field: str) -> None:
    with pytest.raises((InvalidRequest, PayloadTooLarge)) as caught:
        read(limits, **changes)
    assert str(caught.value.details["field"]).startswith(field)


def test_a_whole_number_may_be_written_as_a_fraction_and_a_text_may_be_missing() -> None:
    request = read(options={"maxNodeFrames": 100.0}, fileContents={"a.py": None})
    assert request.options.max_node_frames == 100
    assert [warning.code for warning in request.warnings] == ["FILE_WITHOUT_TEXT"]


def test_a_syntax_error_after_the_document_has_its_place() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_graph(io.BytesIO(b'{"nodes": []} {"more": 1'))
    assert caught.value.details["field"] == "$"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b'"' + b'\\"' * 500_000 + b'\\NaN"', "NaN is not allowed"),
        (b'"' + b'\\"' * 500_000 + b" " + b"1" * 400 + b'", "b": 1e999', "the number is out of range"),
    ],
)
def test_the_place_inside_a_long_text_is_named_in_one_pass_over_it(value: bytes, message: str) -> None:
    # A pass from each of the half million quotes would take longer than a test may.
    node = b'{"id": "a", "label": ' + value + b"}"
    for payload, field in (
        (b'{"nodes": [%s]}' % node, "nodes[0].label"),
        (b'{"type": "node", "data": %s}\n' % node, "line 1: data.label"),
    ):
        with pytest.raises(InvalidRequest, match=message) as caught:
            read_graph(io.BytesIO(payload))
        assert caught.value.details["field"] == field


def test_a_path_that_is_too_long_names_its_file() -> None:
    assert read(fileContents={"p" * 8_192: "x"}).files == {"p" * 8_192: "x"}
    with pytest.raises(InvalidRequest, match=r"at most 8,192 characters") as caught:
        read(fileContents={"p" * 8_193: None})
    assert caught.value.details["field"] == f"fileContents['{'p' * 200}']"


def test_a_description_is_part_of_what_is_embedded() -> None:
    said = {"name": "load_user", "description": "Reads one user from the cache."}
    community = {"id": "c", "label": "Community", "properties": {"name": "Users", "description": "All about users."}}
    request = read(nodes=[{**NODE, "properties": said}, community])
    texts = [
        frame.embed_text
        for frame in frames(canonical(request), generated_at="2026-01-02T00:00:00.000Z", layout="static-v2")
    ]
    assert any("All about users." in text for text in texts if text is not None)
