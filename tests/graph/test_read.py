"""Reading: every form of a graph, and every way in which one can be bad."""

from __future__ import annotations

import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import zstandard

from common.contract import Source
from common.errors import InvalidRequest, PayloadTooLarge
from common.graph import ExportRequest, GraphLimits, canonical, content_digest, read_graph

NODE = {"id": "Function:a.py:f", "label": "Function", "properties": {"name": "f", "filePath": "a.py"}}
OTHER = {"id": "Function:a.py:g", "label": "Function", "properties": {"name": "g", "filePath": "a.py"}}
CALL = {"id": "f_CALLS_g", "sourceId": NODE["id"], "targetId": OTHER["id"], "type": "CALLS", "confidence": 0.9}


def body(**changes: Any) -> dict[str, Any]:
    return {
        "sessionId": "s-1",
        "projectName": "demo",
        "source": {"type": "github", "baseName": "demo", "displayName": "Demo"},
        "nodes": [NODE, OTHER],
        "relationships": [CALL],
        "fileContents": {"a.py": "def f():\n    g()\n"},
        "options": {"maxSnippetChars": 900},
        **changes,
    }


def read(value: Any, **arguments: Any) -> ExportRequest:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return read_graph(io.BytesIO(data), **arguments)


def ndjson(*records: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


STREAM = ndjson({"type": "node", "data": NODE}, {"type": "node", "data": OTHER}, {"type": "relationship", "data": CALL})


def found(request: ExportRequest) -> dict[str, int]:
    return {warning.code: warning.count for warning in request.warnings}


def refused(value: Any, error: type[InvalidRequest] | type[PayloadTooLarge] = InvalidRequest, **arguments: Any) -> Any:
    with pytest.raises(error) as caught:
        read(value, **arguments)
    assert "field" in caught.value.details
    return caught.value


# --- forms ----------------------------------------------------------------------------------------


def test_an_export_request_keeps_what_it_says() -> None:
    request = read(body())
    assert (request.session_id, request.project_name, request.source.base_name) == ("s-1", "demo", "demo")
    assert request.options.max_snippet_chars == 900
    assert request.options.max_node_frames == 50_000
    assert [node.id for node in request.nodes] == [NODE["id"], OTHER["id"]]
    assert request.relations[0].confidence == 0.9
    assert request.files == {"a.py": "def f():\n    g()\n"}
    assert found(request) == {}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"])
def test_hash_and_size_are_those_of_the_payload_as_received(pack: Callable[[bytes], bytes]) -> None:
    payload = pack(json.dumps(body()).encode())
    request = read(payload)
    assert request.input.sha256 == sha256(payload).hexdigest()
    assert request.input.bytes == len(payload)
    assert (request.input.nodes, request.input.relationships, request.input.files) == (2, 1, 1)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"])
@pytest.mark.parametrize(
    "raw",
    [
        json.dumps({"nodes": [NODE, OTHER], "relationships": [CALL]}).encode(),
        json.dumps({"nodes": [NODE, OTHER], "edges": [CALL]}, indent=2).encode(),
        STREAM,
        STREAM.replace(b"\n", b"\r\n\n"),
    ],
    ids=["relationships", "edges", "ndjson", "ndjson-crlf"],
)
def test_every_raw_form_gives_the_same_graph(raw: bytes, pack: Callable[[bytes], bytes]) -> None:
    plain = canonical(read({"nodes": [NODE, OTHER], "relationships": [CALL]}))
    graph = canonical(read(pack(raw)))
    assert (graph.session_id, content_digest(graph)) == (plain.session_id, content_digest(plain))


def test_defaults_stand_in_for_what_a_raw_graph_does_not_say() -> None:
    source = Source(type="gitnexus", base_name="repo", url="http://127.0.0.1:4747")
    request = read(STREAM, defaults=source)
    assert (request.session_id, request.project_name, request.source) == (None, "repo", source)
    assert read(body(), defaults=source).source.base_name == "demo"


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_more_members_than_there_may_be_are_refused(compress: Callable[[bytes], bytes]) -> None:
    text = json.dumps(body()).encode()
    parts = [compress(text[:10]), compress(b""), compress(text[10:])]
    limits = GraphLimits(max_members=3)
    assert len(read_graph(io.BytesIO(b"".join(parts)), limits=limits).nodes) == 2
    with pytest.raises(PayloadTooLarge, match="more than 3 members") as caught:
        read_graph(io.BytesIO(b"".join([*parts, compress(b"")])), limits=limits)
    assert caught.value.details["limit"] == 3


def test_two_gzip_members_are_one_payload() -> None:
    data = json.dumps(body()).encode()
    assert len(read(gzip.compress(data[:50]) + gzip.compress(data[50:])).nodes) == 2


def test_a_byte_order_mark_is_skipped() -> None:
    assert len(read(b"\xef\xbb\xbf" + json.dumps(body()).encode()).nodes) == 2
    assert len(read(b"\xef\xbb\xbf" + STREAM).nodes) == 2


def test_a_stream_that_gives_few_bytes_at_a_time_is_read_whole() -> None:
    read_end, write_end = os.pipe()
    payload = zstandard.compress(STREAM)
    with os.fdopen(read_end, "rb", buffering=0) as stream:
        os.write(write_end, payload[:3])
        os.write(write_end, payload[3:])
        os.close(write_end)
        assert len(read_graph(stream).nodes) == 2


def test_real_graphs_are_read_with_their_warnings(real_graphs: dict[str, Path]) -> None:
    assert real_graphs
    for path in real_graphs.values():
        request = read_graph(path)
        assert request.input.bytes == path.stat().st_size
        assert len(request.nodes) == request.input.nodes > 0
        assert {warning.code for warning in request.warnings} <= {"COMMUNITY_ID_QUOTED"}


def test_the_raw_forms_of_one_repository_agree(real_graphs: dict[str, Path]) -> None:
    raw = [path for name, path in real_graphs.items() if name.startswith("runpod-python.graph")]
    digests = {content_digest(canonical(read_graph(path))) for path in raw}
    assert len(digests) == min(1, len(raw))


# --- what real graphs do --------------------------------------------------------------------------


def test_odd_but_readable_graphs_pass() -> None:
    node = {
        "id": "proc_1",
        "label": "BrandNewLabel",
        "color": "red",
        "properties": {
            "name": "p",
            "communities": ["'comm_23'", "comm_4"],
            "startLine": 3.0,
            "filePath": None,
            "nested": {"a": [1, None]},
        },
    }
    relation = {**CALL, "reason": None, "step": 0, "confidence": 1, "weight": 3}
    request = read(body(nodes=[node, OTHER], relationships=[relation], options=None, extraTopLevelKey=[]))
    assert request.nodes[0].properties["communities"] == ["comm_23", "comm_4"]
    assert request.nodes[0].properties["startLine"] == 3
    assert request.nodes[0].properties["color"] == "red"
    assert request.relations[0].extra == {"weight": 3}
    assert found(request) == {"COMMUNITY_ID_QUOTED": 1}


def test_a_node_without_properties_gets_a_name_from_its_id() -> None:
    bare = {"id": "Function:a.py:lonely", "label": "Function"}
    request = read(body(nodes=[bare, {**OTHER, "properties": None}]))
    assert [node.name for node in request.nodes] == ["lonely", "g"]
    assert found(request) == {"NODE_WITHOUT_PROPERTIES": 2, "NODE_WITHOUT_NAME": 2}


def test_a_node_keeps_what_it_says_beside_its_properties() -> None:
    flat = {"id": "Function:a.py:1", "label": "Function", "name": "lonely"}
    request = read(body(nodes=[flat, {**OTHER, "language": "python"}]))
    assert [node.name for node in request.nodes] == ["lonely", "g"]
    assert request.nodes[1].properties["language"] == "python"
    assert found(request) == {"NODE_WITHOUT_PROPERTIES": 1}


def test_missing_and_excessive_confidence_is_repaired() -> None:
    without = {key: value for key, value in CALL.items() if key != "confidence"}
    request = read(body(relationships=[without, {**CALL, "confidence": 85}, {**CALL, "confidence": -1}]))
    assert [relation.confidence for relation in request.relations] == [1.0, 1.0, 0.0]
    assert found(request) == {"CONFIDENCE_MISSING": 1, "CONFIDENCE_OUT_OF_RANGE": 2}


def test_a_relation_without_id_gets_one_from_its_ends() -> None:
    request = read(body(relationships=[{**CALL, "id": None}]))
    assert request.relations[0].id == "Function:a.py:f_CALLS_Function:a.py:g"
    assert found(request) == {"RELATION_WITHOUT_ID": 1}


def test_a_path_in_base_name_is_accepted_and_counted() -> None:
    request = read(body(source={"type": "zip", "baseName": "../../etc/passwd"}))
    assert found(request) == {"BASE_NAME_CLEANED": 1}


def test_a_lone_surrogate_becomes_a_replacement_character() -> None:
    text = json.dumps(body(fileContents={"a.py": "x = '@@' # 😀"}))
    for escape, count in (("\\ud800", 1), ("\\udc00\\ud83d", 2), ("\\\\ud800", 0), ("\\ud83d\\ude00", 0)):
        request = read(text.replace("@@", escape).encode())
        assert found(request) == ({"LONE_SURROGATE": count} if count else {})
        assert request.files["a.py"].count("\ufffd") == count
        assert request.files["a.py"].endswith("😀")


def test_escaped_control_characters_in_code_are_replaced_and_counted() -> None:
    text = json.dumps(body(fileContents={"a.py": "a\x00b\x1b[0m\tc\r\n\f"}))
    request = read(text.encode())
    assert request.files["a.py"] == "a\ufffdb\ufffd[0m\tc\r\n\f"
    assert found(request) == {"CONTROL_CHARACTER": 2}


def test_bytes_that_are_no_utf8_are_replaced_and_counted() -> None:
    data = json.dumps(body(fileContents={"a.py": "x = 1 # @@"})).encode().replace(b"@@", b"\xff\xed\xa0\x80")
    request = read(data)
    assert request.files["a.py"] == "x = 1 # \ufffd\ufffd\ufffd\ufffd"
    assert found(request) == {"INVALID_UTF8": 4}


def test_a_file_of_40_mb_is_read() -> None:
    request = read(body(fileContents={"big.py": "x = 1\n" * 7_000_000}))
    assert len(request.files["big.py"]) == 42_000_000


def test_dangling_and_repeated_relations_are_read_as_they_are() -> None:
    request = read(body(relationships=[CALL, CALL, {**CALL, "targetId": "nowhere"}]))
    assert len(request.relations) == 3


# --- refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n", b"\xff\xfe{\x00", b"[1, 2]", b'"text"', b"{} {}"])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize("cut", [1, 10, 40])
@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_cut_compressed_stream_is_refused(pack: Callable[[bytes], bytes], cut: int) -> None:
    assert "cut" in refused(pack(json.dumps(body()).encode())[:-cut]).message


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_damaged_compressed_stream_is_refused(pack: Callable[[bytes], bytes]) -> None:
    data = bytearray(pack(os.urandom(400) + json.dumps(body()).encode()))
    data[200] ^= 0xFF
    data[-3] ^= 0xFF
    refused(bytes(data))
    refused(pack(json.dumps(body()).encode()) + b"garbage after the end")


def test_cut_json_is_refused() -> None:
    assert "cut" in refused(json.dumps(body()).encode()[:-5]).message


def test_a_stream_without_its_last_line_feed_is_refused() -> None:
    error = refused(STREAM[:-1])
    assert error.details["field"] == "line 3"
    assert "cut" in error.message
    assert refused(STREAM[:-20]).details["field"] == "line 3"


def test_a_stream_with_a_broken_line_names_the_line() -> None:
    assert refused(STREAM + b'{"type":"node","data":{\n').details["field"] == "line 4"
    assert refused(STREAM + b"null\n").details["field"] == "line 4: type"
    assert refused(STREAM + b'{"type":"node","data":{"id":7,"label":"x"}}\n').details["field"] == "line 4: id"


def test_an_error_line_in_a_stream_is_refused_with_its_text() -> None:
    line = ndjson({"type": "error", "error": "database is locked " + "x" * 10_000})
    error = refused(STREAM + line)
    assert "database is locked" in error.message
    assert len(error.message) < 700
    refused(line)


def test_an_unknown_record_in_a_stream_is_counted() -> None:
    assert found(read(STREAM + ndjson({"type": "progress", "data": 3}))) == {"UNKNOWN_RECORD": 1}


@pytest.mark.parametrize("name", ["nodes", "relationships"])
@pytest.mark.parametrize("value", [[], None, {}, "x", 3])
def test_empty_or_wrong_lists_are_refused(name: str, value: Any) -> None:
    assert refused(body(**{name: value})).details["field"] == name


@pytest.mark.parametrize("name", ["nodes", "relationships"])
def test_missing_lists_are_refused(name: str) -> None:
    whole = body()
    del whole[name]
    assert refused(whole).details["field"] == name


def test_a_stream_without_relationships_is_refused() -> None:
    assert refused(ndjson({"type": "node", "data": NODE})).details["field"] == "relationships"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"nodes": [NODE, 7]}, "nodes[1]"),
        ({"nodes": [NODE, {**OTHER, "id": 7}]}, "nodes[1].id"),
        ({"nodes": [NODE, {**OTHER, "id": ""}]}, "nodes[1].id"),
        ({"nodes": [NODE, {**OTHER, "id": "x" * 10_000}]}, "nodes[1].id"),
        ({"nodes": [{**NODE, "label": None}]}, "nodes[0].label"),
        ({"nodes": [{**NODE, "properties": []}]}, "nodes[0].properties"),
        ({"nodes": [{**NODE, "properties": {"name": 3}}]}, "nodes[0].properties.name"),
        ({"nodes": [{**NODE, "properties": {"name": "a", "startLine": "3"}}]}, "nodes[0].properties.startLine"),
        ({"nodes": [{**NODE, "properties": {"name": "a", "endLine": True}}]}, "nodes[0].properties.endLine"),
        ({"nodes": [{**NODE, "properties": {"name": "a", "filePath": 3}}]}, "nodes[0].properties.filePath"),
        ({"nodes": [{**NODE, "properties": {"name": "a", "content": 3}}]}, "nodes[0].properties.content"),
        ({"relationships": [[]]}, "relationships[0]"),
        ({"relationships": [{**CALL, "id": 3}]}, "relationships[0].id"),
        ({"relationships": [{**CALL, "sourceId": None}]}, "relationships[0].sourceId"),
        ({"relationships": [{**CALL, "targetId": 3}]}, "relationships[0].targetId"),
        ({"relationships": [{**CALL, "type": ""}]}, "relationships[0].type"),
        ({"relationships": [{**CALL, "confidence": "high"}]}, "relationships[0].confidence"),
        ({"relationships": [{**CALL, "reason": 3}]}, "relationships[0].reason"),
        ({"relationships": [{**CALL, "step": 1.5}]}, "relationships[0].step"),
        ({"fileContents": []}, "fileContents"),
        ({"fileContents": {"a.py": 3}}, "fileContents['a.py']"),
        ({"source": "github"}, "source"),
        ({"source": {"baseName": 3}}, "source.baseName"),
        ({"sessionId": 3}, "sessionId"),
        ({"projectName": "x" * 3_000}, "projectName"),
        ({"options": []}, "options"),
        ({"options": {"semanticEnabled": "yes"}}, "options.semanticEnabled"),
        ({"options": {"maxSnippetChars": -1}}, "options.maxSnippetChars"),
        ({"options": {"maxNodeFrames": 0}}, "options.maxNodeFrames"),
        ({"options": {"maxNodeFrames": 1.5}}, "options.maxNodeFrames"),
        ({"options": {"maxRelationFrames": 10**9}}, "options.maxRelationFrames"),
        ({"options": {"profile": 3}}, "options.profile"),
    ],
)
def test_a_wrong_value_names_its_field(changes: dict[str, Any], field: str) -> None:
    error = refused(body(**changes))
    assert error.details["field"] == field
    assert error.message.startswith(field)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999", "-1e400", "9" * 5_000])
def test_a_number_that_is_not_finite_names_its_field(constant: str) -> None:
    text = json.dumps(body(relationships=[CALL, {**CALL, "confidence": "@@"}])).replace('"@@"', constant)
    error = refused(text.encode())
    assert error.details["field"] == "relationships[1].confidence"


def test_an_unescaped_control_character_is_refused_with_its_place() -> None:
    error = refused(json.dumps(body()).replace("def f", "def\x01f").encode())
    assert "control character 0x01" in error.message


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting_is_refused_wherever_it_stands(opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    deep = opening * 10_000 + "1" + closing * 10_000
    text = json.dumps(body(nodes=[{**NODE, "properties": {"name": "a", "deep": "@@"}}], unknown="@@"))
    refused(deep.encode())
    refused(text.replace('"@@"', deep).encode())
    refused(text.replace('"@@"', "[" * 10_000).encode())
    line = ndjson({"type": "node", "data": {**NODE, "properties": {"deep": "@@"}}})
    assert refused(STREAM + line.replace(b'"@@"', deep.encode())).details["field"] == "line 4"


def test_nesting_over_the_limit_names_its_property() -> None:
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    error = refused(body(nodes=[{**NODE, "properties": {"name": "a", "deep": deep}}]))
    assert error.details["field"] == "nodes[0].properties.deep"


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_decompression_bomb_is_refused_within_bounded_memory(pack: Callable[[bytes], bytes]) -> None:
    bomb = pack(b" " * 400_000_000)
    tracemalloc.start()
    try:
        refused(bomb, PayloadTooLarge)
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("limits", "value"),
    [
        (GraphLimits(max_payload_bytes=100), body()),
        (GraphLimits(max_text_bytes=100), gzip.compress(json.dumps(body()).encode())),
        (GraphLimits(max_nodes=1), body()),
        (GraphLimits(max_nodes=1), STREAM),
        (GraphLimits(max_relationships=0), body()),
        (GraphLimits(max_relationships=0), STREAM),
        (GraphLimits(max_files=0), body()),
        (GraphLimits(max_text_chars=5), body()),
        (GraphLimits(max_values=10), body()),
    ],
)
def test_each_limit_is_stated_when_it_is_passed(limits: GraphLimits, value: Any) -> None:
    error = refused(value, PayloadTooLarge, limits=limits)
    assert isinstance(error.details["limit"], int)


def test_a_missing_path_is_a_wrong_request(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InvalidRequest) as caught:
            read_graph(path)
        assert caught.value.details["field"] == "path"


# --- one small file for each failure ----------------------------------------------------------------


def test_every_refused_fixture_names_its_field(fixtures: Path) -> None:
    paths = sorted((fixtures / "graphs" / "refused").iterdir())
    assert paths
    for path in paths:
        with pytest.raises((InvalidRequest, PayloadTooLarge)) as caught:
            read_graph(path)
        assert caught.value.details["field"], path.name
        assert caught.value.exit_code == 2


def test_every_repaired_fixture_counts_a_warning(fixtures: Path) -> None:
    paths = sorted((fixtures / "graphs" / "accepted").iterdir())
    assert paths
    for path in paths:
        graph = canonical(read_graph(path))
        assert bool(graph.warnings) is not path.name.startswith("plain"), path.name
