"""Reading a graph: export JSON, a raw GitNexus graph or its NDJSON stream, plain or compressed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeGuard

import msgspec

from common.contract import COLLECTION_NAME, ExportOptions, InputReport, Source
from common.errors import InvalidRequest, PayloadTooLarge
from common.graph.model import ExportRequest, GraphLimits, Node, Relation, WarningCounter
from common.graph.names import safe_base_name
from common.graph.payload import Payload, decode, opened

_STREAM_START = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*"(?:type"\s*:\s*"|data"\s*:\s*[{"])')
_STREAM_START_BYTES = 256
_ERROR_TEXT_CHARS = 500
_QUOTED_ID = re.compile(r"'([^']*)'")
_RELATION_KEYS = frozenset({"id", "sourceId", "targetId", "type", "confidence", "reason", "step"})
_NODE_KEYS = frozenset({"id", "label", "properties"})
_COLLECTION = re.compile(COLLECTION_NAME)
_MAX_TEXT_FIELD = 2_000
_MAX_STEP = 2**53
"""JSON numbers are exact up to here."""

OPTION_RANGES: dict[str, tuple[int, int]] = {
    "maxSnippetChars": (0, 100_000),
    "maxNodeFrames": (1, 2_000_000),
    "maxRelationFrames": (0, 5_000_000),
}
"""Smallest and largest value of each number among the options."""


def read_graph(
    source: BinaryIO | Path,
    *,
    limits: GraphLimits | None = None,
    defaults: Source | None = None,
) -> ExportRequest:
    """Read and validate one graph; the format and the compression (gzip, zstd) are told from the bytes.

    ``defaults`` stand in for what a raw graph does not say of its source; what an export request says itself wins.
    Raises InvalidRequest (``details['field']`` names the place), PayloadTooLarge, StorageFailed. What can be repaired
    is, and is counted in ``warnings``.
    """
    reader = _Reader(limits or GraphLimits())
    with opened(source) as stream:
        payload = Payload(stream, reader.limits)
        head, chunks = _peek(payload.chunks())
        document = reader.stream(chunks) if _is_stream(head) else reader.document(chunks)
    request = reader.request(document, defaults or Source())
    report = payload.report()
    report.nodes, report.relationships, report.files = len(request.nodes), len(request.relations), len(request.files)
    request.input = report
    return request


def _is_stream(head: bytes) -> bool:
    """Whether a payload begins with a record of an NDJSON stream: ``type`` first, or a whole first line with one."""
    if _STREAM_START.match(head):
        return True
    line, end, _ = head.partition(b"\n")
    try:
        record = msgspec.json.decode(line) if end else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return type(record) is dict and "type" in record and "nodes" not in record


def _peek(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    first: list[bytes] = []
    head = b""
    for chunk in chunks:
        first.append(chunk)
        head = (head + chunk[:_STREAM_START_BYTES]).lstrip()
        if len(head) >= _STREAM_START_BYTES:
            break

    def both() -> Iterator[bytes]:
        yield from first
        yield from chunks

    return head, both()


class _Reader:
    """Validates one payload; its methods are its formats, ``found`` counts the repairs."""

    def __init__(self, limits: GraphLimits) -> None:
        self.limits = limits
        self.found = WarningCounter()
        self.nodes: list[Node] = []
        self.relations: list[Relation] = []

    def document(self, chunks: Iterator[bytes]) -> dict[str, Any]:
        """Read one JSON document; answers what is left of it without nodes and relationships."""
        data = bytearray()  # grows in place: a list of chunks and its join would be the payload twice
        for chunk in chunks:
            data += chunk
        if not data:
            raise InvalidRequest("the payload is empty", field="$")
        document = decode(data, self.limits, self.found)
        del data
        if type(document) is not dict:
            _wrong("$", "an object with nodes and relationships", document)
        name = "relationships" if "relationships" in document or "edges" not in document else "edges"
        nodes = self._list(document, "nodes", self.limits.max_nodes)
        relations = self._list(document, name, self.limits.max_relationships)
        self.nodes = [self._node(item, "nodes", i) for i, item in enumerate(nodes)]
        self.relations = [self._relation(item, name, i) for i, item in enumerate(relations)]
        return document

    def _list(self, document: dict[str, Any], name: str, maximum: int) -> list[Any]:
        items = document.pop(name, None)
        if type(items) is not list or not items:
            _wrong(name, "a list with at least one entry", items)
        if len(items) > maximum:
            raise PayloadTooLarge(f"{name} has more than {maximum:,} entries", field=name, limit=maximum)
        return items

    def stream(self, chunks: Iterator[bytes]) -> dict[str, Any]:
        """Read an NDJSON stream line by line; there is no end record, so an unfinished last line means a cut."""
        number = 0
        for line in _lines(chunks):
            number += 1
            if not line.endswith(b"\n"):
                message = f"line {number}: the stream is cut: its last line is unfinished"
                raise InvalidRequest(message, field=f"line {number}")
            if line.isspace():
                continue
            self._record(line, number)
        for name, items in (("nodes", self.nodes), ("relationships", self.relations)):
            if not items:
                _wrong(name, "a stream with at least one", [])
        return {}

    def _record(self, line: bytes, number: int) -> None:
        where = f"line {number}"
        record = decode(line, self.limits, self.found, where)
        kind = record.get("type") if type(record) is dict else None
        if kind == "node":
            self.nodes.append(self._node(record.get("data"), where, None))
            if len(self.nodes) > self.limits.max_nodes:
                maximum = self.limits.max_nodes
                raise PayloadTooLarge(f"the stream has more than {maximum:,} nodes", field=where, limit=maximum)
        elif kind == "relationship":
            self.relations.append(self._relation(record.get("data"), where, None))
            if len(self.relations) > self.limits.max_relationships:
                maximum = self.limits.max_relationships
                raise PayloadTooLarge(f"the stream has more than {maximum:,} relationships", field=where, limit=maximum)
        elif kind == "error":
            text = record.get("error") or record.get("message") or record.get("data") or "no reason given"
            message = f"{where}: GitNexus ended the stream with an error: {str(text)[:_ERROR_TEXT_CHARS]}"
            raise InvalidRequest(message, field=where)
        elif type(kind) is str:
            self.found.add("UNKNOWN_RECORD", f"{where}: {kind}")
        else:
            _wrong(f"{where}: type", "node, relationship or error", kind)

    # --- one node, one relationship ---------------------------------------------------------------

    def _node(self, item: Any, where: str, index: int | None) -> Node:
        if type(item) is not dict:
            _wrong(_place(where, index), "an object", item)
        node_id = item.get("id")
        label = item.get("label")
        if not self._is_name(node_id):
            self._wrong_name(_place(where, index, "id"), node_id)
        if not self._is_name(label):
            self._wrong_name(_place(where, index, "label"), label)
        properties = item.get("properties")
        if properties is None:
            properties = {}
            self.found.add("NODE_WITHOUT_PROPERTIES", node_id)
        elif type(properties) is not dict:
            _wrong(_place(where, index, "properties"), "an object", properties)
        if not item.keys() <= _NODE_KEYS:
            for key in item.keys() - _NODE_KEYS:
                properties.setdefault(key, item[key])

        name = properties.get("name")
        if not self._is_name(name):
            if name is not None and name != "":
                self._wrong_name(_place(where, index, "properties.name"), name)
            properties["name"] = node_id.rsplit(":", 1)[-1] or node_id
            self.found.add("NODE_WITHOUT_NAME", node_id)
        self._any_properties(properties, where, index)
        self._known_properties(properties, node_id, where, index)
        return Node(node_id, label, properties)

    def _any_properties(self, properties: dict[str, Any], where: str, index: int | None) -> None:
        for key, value in properties.items():
            kind = type(value)
            if kind is str:
                if len(value) > self.limits.max_text_chars:
                    maximum = self.limits.max_text_chars
                    field = _place(where, index, f"properties.{key[:80]}")
                    raise PayloadTooLarge(f"{field} has more than {maximum:,} characters", field=field, limit=maximum)
            elif (kind is list or kind is dict) and value and _too_deep(value, self.limits.max_depth):
                field = _place(where, index, f"properties.{key[:80]}")
                message = f"{field} is nested deeper than {self.limits.max_depth} levels"
                raise InvalidRequest(message, field=field, allowed=self.limits.max_depth)

    def _known_properties(self, properties: dict[str, Any], node_id: str, where: str, index: int | None) -> None:
        path = properties.get("filePath")
        if path is not None and (type(path) is not str or len(path) > self.limits.max_id_chars):
            self._wrong_name(_place(where, index, "properties.filePath"), path)
        content = properties.get("content")
        if content is not None and type(content) is not str:
            _wrong(_place(where, index, "properties.content"), "a string", content)
        for key in ("startLine", "endLine"):
            line = properties.get(key)
            if line is not None and type(line) is not int:
                if type(line) is not float or not line.is_integer():
                    _wrong(_place(where, index, f"properties.{key}"), "a whole number", line)
                properties[key] = int(line)
        communities = properties.get("communities")
        if communities and type(communities) is list:
            for i, value in enumerate(communities):
                quoted = _QUOTED_ID.fullmatch(value) if type(value) is str else None
                if quoted:
                    communities[i] = quoted[1]
                    self.found.add("COMMUNITY_ID_QUOTED", f"{node_id}: {value}")

    def _relation(self, item: Any, where: str, index: int | None) -> Relation:
        if type(item) is not dict:
            _wrong(_place(where, index), "an object", item)
        source, target, kind = item.get("sourceId"), item.get("targetId"), item.get("type")
        if not self._is_name(source):
            self._wrong_name(_place(where, index, "sourceId"), source)
        if not self._is_name(target):
            self._wrong_name(_place(where, index, "targetId"), target)
        if not self._is_name(kind):
            self._wrong_name(_place(where, index, "type"), kind)
        relation_id = item.get("id")
        if relation_id is None or relation_id == "":
            relation_id = f"{source}_{kind}_{target}"
            self.found.add("RELATION_WITHOUT_ID", relation_id)
        elif type(relation_id) is not str or len(relation_id) > 3 * self.limits.max_id_chars:
            # GitNexus joins both ends and the type into the id
            _wrong(
                _place(where, index, "id"), f"a string of 1 to {3 * self.limits.max_id_chars:,} characters", relation_id
            )
        reason = item.get("reason")
        if reason is not None and type(reason) is not str:
            _wrong(_place(where, index, "reason"), "a string or null", reason)
        step = item.get("step")
        if step is not None:
            step = self._step(step, where, index)
        confidence = item.get("confidence")
        if type(confidence) is not float or not 0.0 <= confidence <= 1.0:
            confidence = self._confidence(confidence, relation_id, where, index)
        extra = None
        if len(item) > len(_RELATION_KEYS) or not item.keys() <= _RELATION_KEYS:
            extra = {key: item[key] for key in item.keys() - _RELATION_KEYS}
            if _too_deep(extra, self.limits.max_depth):
                field = _place(where, index)
                raise InvalidRequest(f"{field} is nested deeper than {self.limits.max_depth} levels", field=field)
        return Relation(relation_id, source, target, kind, confidence, reason, step, extra)

    def _step(self, value: Any, where: str, index: int | None) -> int:
        whole = type(value) is int or (type(value) is float and value.is_integer())
        if not whole or abs(value) > _MAX_STEP:
            _wrong(_place(where, index, "step"), f"a whole number up to {_MAX_STEP:,} or null", value)
        return int(value)

    def _confidence(self, value: Any, relation_id: str, where: str, index: int | None) -> float:
        if value is None:
            self.found.add("CONFIDENCE_MISSING", relation_id)
            return 1.0
        if type(value) not in (int, float):
            _wrong(_place(where, index, "confidence"), "a number from 0 to 1", value)
        if not 0 <= value <= 1:
            self.found.add("CONFIDENCE_OUT_OF_RANGE", f"{relation_id}: {value}")
            return 0.0 if value < 0 else 1.0
        return float(value)

    def _is_name(self, value: Any) -> TypeGuard[str]:
        return type(value) is str and 0 < len(value) <= self.limits.max_id_chars

    def _wrong_name(self, field: str, value: Any) -> NoReturn:
        _wrong(field, f"a string of 1 to {self.limits.max_id_chars:,} characters", value)

    # --- everything else of the request -------------------------------------------------------------

    def request(self, document: dict[str, Any], defaults: Source) -> ExportRequest:
        """Put the request together from what the document says, and ``defaults`` for what it does not."""
        files = self._files(document.get("fileContents"))
        source = self._source(document.get("source"), defaults)
        options = self._options(document.get("options"))
        session = _text(document, "sessionId", "sessionId")
        project = _text(document, "projectName", "projectName")
        return ExportRequest(
            session_id=session,
            project_name=project or source.display_name or source.base_name,
            source=source,
            options=options,
            nodes=self.nodes,
            relations=self.relations,
            files=files,
            input=InputReport(),
            warnings=self.found.warnings(),
        )

    def _files(self, value: Any) -> dict[str, str]:
        if value is None:
            return {}
        if type(value) is not dict:
            _wrong("fileContents", "an object of path and text", value)
        if len(value) > self.limits.max_files:
            message = f"fileContents has more than {self.limits.max_files:,} entries"
            raise PayloadTooLarge(message, field="fileContents", limit=self.limits.max_files)
        files: dict[str, str] = {}
        for path, text in value.items():
            field = f"fileContents[{path[:200]!r}]"
            if len(path) > self.limits.max_id_chars:
                _wrong(field, f"a path of at most {self.limits.max_id_chars:,} characters", path)
            if text is None:
                self.found.add("FILE_WITHOUT_TEXT", path)
            elif type(text) is not str:
                _wrong(field, "a string", text)
            elif len(text) > self.limits.max_text_chars:
                maximum = self.limits.max_text_chars
                raise PayloadTooLarge(f"{field} has more than {maximum:,} characters", field=field, limit=maximum)
            else:
                files[path] = text
        return files

    def _source(self, value: Any, defaults: Source) -> Source:
        if value is None:
            value = {}
        if type(value) is not dict:
            _wrong("source", "an object", value)
        source = Source(
            type=_text(value, "type", "source.type") or defaults.type,
            base_name=_text(value, "baseName", "source.baseName") or defaults.base_name,
            display_name=_text(value, "displayName", "source.displayName") or defaults.display_name,
            url=_text(value, "url", "source.url") or defaults.url,
            branch=_text(value, "branch", "source.branch") or defaults.branch,
            original_file_name=_text(value, "originalFileName", "source.originalFileName")
            or defaults.original_file_name,
            folder_name=_text(value, "folderName", "source.folderName") or defaults.folder_name,
        )
        if safe_base_name(source.base_name) != source.base_name:
            self.found.add("BASE_NAME_CLEANED", source.base_name)
        return source

    def _options(self, value: Any) -> ExportOptions:
        options = ExportOptions()
        if value is None:
            return options
        if type(value) is not dict:
            _wrong("options", "an object", value)
        semantic = value.get("semanticEnabled")
        if semantic is not None:
            if type(semantic) is not bool:
                _wrong("options.semanticEnabled", "true or false", semantic)
            options.semantic_enabled = semantic
        options.profile = _text(value, "profile", "options.profile")
        collection = value.get("collection")
        if collection is not None:
            if type(collection) is not str or not _COLLECTION.fullmatch(collection):
                what = "1 to 128 letters, digits, dots, dashes and underscores, not dots alone"
                _wrong("options.collection", what, collection)
            options.collection = collection
        options.max_snippet_chars = _number(value, "maxSnippetChars", options.max_snippet_chars)
        options.max_node_frames = _number(value, "maxNodeFrames", options.max_node_frames)
        options.max_relation_frames = _number(value, "maxRelationFrames", options.max_relation_frames)
        return options


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines with their line feeds; the last one may lack it."""
    pieces: list[bytes] = []
    for chunk in chunks:
        lines = chunk.split(b"\n")
        if len(lines) == 1:
            pieces.append(chunk)
            continue
        pieces.append(lines[0])
        yield b"".join(pieces) + b"\n"
        for line in lines[1:-1]:
            yield line + b"\n"
        pieces = [lines[-1]]
    rest = b"".join(pieces)
    if rest:
        yield rest


def _place(where: str, index: int | None, key: str = "") -> str:
    if index is None:
        return f"{where}: {key or 'data'}"
    return f"{where}[{index}].{key}".removesuffix(".")


def _text(value: dict[str, Any], key: str, field: str) -> str | None:
    text = value.get(key)
    if text is not None and (type(text) is not str or len(text) > _MAX_TEXT_FIELD):
        _wrong(field, f"a string of at most {_MAX_TEXT_FIELD:,} characters", text)
    return text or None


def _number(value: dict[str, Any], key: str, default: int) -> int:
    number = value.get(key)
    if number is None:
        return default
    if type(number) is float and number.is_integer():
        number = int(number)
    low, high = OPTION_RANGES[key]
    if type(number) is not int or not low <= number <= high:
        _wrong(f"options.{key}", f"a whole number from {low:,} to {high:,}", number)
    return number


def _too_deep(value: Any, maximum: int) -> bool:
    level = [value]
    for _ in range(maximum):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return False
    return True


def _wrong(field: str, allowed: str, value: Any) -> NoReturn:
    if value is None:
        seen = "nothing"
    elif type(value) is str:
        seen = "an empty string" if not value else f"a string of {len(value):,} characters"
    elif type(value) in (list, dict):
        kind = "a list" if type(value) is list else "an object"
        seen = f"{kind} with {len(value):,} entries" if value else f"{kind} that is empty"
    else:
        seen = f"{'true' if value is True else 'false' if value is False else str(value)[:40]}"
    raise InvalidRequest(f"{field}: {allowed} is needed, got {seen}", field=field, allowed=allowed)
