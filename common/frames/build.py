"""A canonical graph as the frames of a capsule."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from typing import Any

import msgspec

from common.contract import AI_BIBLE_VERSION, EXPORT_SCHEMA, MV2_SCHEMA, TOOLSET_VERSION
from common.embedding.choice import WHAT, What
from common.errors import InvalidRequest
from common.frames.embed_text import LAYOUTS, NEIGHBOURS, EmbedInput, relation_text
from common.frames.guide import TOOLS, guide_pages
from common.frames.model import Frame
from common.frames.snippets import Snippets
from common.graph.model import Graph, Node, Relation, WarningCounter

META_FRAMES = 5
RESPONSE_BUDGET_BYTES = 65_536
UNKNOWN_LABEL = "Unknown"
MAX_LINE_CHARS = 500
"""Characters of a name, an id or a reason in a title or a text's head; the metadata has them in full."""
MAX_PROPERTY_CHARS = 8_192
MAX_METADATA_BYTES = 65_536
MAX_SIGNATURE_CHARS = 200
MAX_KINDS = 200
"""Labels and relation types counted in the manifest frame."""

_PREFIXES = {"Community": "mv2://communities/", "Process": "mv2://processes/"}
_KINDS = {"Community": "community", "Process": "process"}
_TRACKS = {"Community": "communities", "Process": "processes", "File": "files"}
_WHAT: dict[str, What] = {"Community": "communities", "Process": "processes", "File": "files", "Folder": "files"}
CONTAINMENT = frozenset({"HAS_METHOD", "HAS_PROPERTY", "DEFINES"})
"""Types of the relationships from a container to what it holds."""
_NODE_KEYS = frozenset({"id", "label"})
_RELATION_KEYS = frozenset(
    {
        "id",
        "type",
        "sourceId",
        "targetId",
        "confidence",
        "reason",
        "step",
        "occurrences",
    }
)
_NODE_IN_FIELDS = _NODE_KEYS | {"name"}
"""Keys that the uri, the title and the track of a node frame tell already."""
_RELATION_IN_TEXT = frozenset({"id", "type", "sourceId", "targetId", "confidence", "reason"})
"""Keys that the uri, the track and the first lines of a relation frame tell already."""
_TO_ENCODE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]|%(?=[0-9A-Fa-f]{2})")
_ENCODED = re.compile(rb"%([0-9A-Fa-f]{2})")

_encode = msgspec.json.Encoder(order="deterministic").encode


def frame_count(graph: Graph) -> int:
    """How many frames ``frames`` gives for this graph."""
    return META_FRAMES + len(graph.nodes) + len(graph.relations)


def frame_uri(prefix: str, item_id: str) -> str:
    """The uri of an id: the id itself, with control characters, line separators and a ``%`` that two hex digits
    follow percent-encoded, so that ``frame_id_of`` gives the id back."""
    return prefix + (_TO_ENCODE.sub(_percent, item_id) if "%" in item_id or not item_id.isprintable() else item_id)


def frame_id_of(uri: str) -> str:
    """The id that a uri of a node, community, process or relation frame was made from."""
    encoded = uri.split("/", 3)[3].encode()
    return _ENCODED.sub(lambda match: bytes([int(match[1], 16)]), encoded).decode()


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode())


def frames(
    graph: Graph, *, generated_at: str, layout: str | None = None, what: Collection[What] = WHAT
) -> Iterator[Frame]:
    """All frames in canonical order: meta, nodes by id, relations by id.

    ``generated_at`` (ISO 8601, UTC) stands in the manifest frame; ``layout`` names the text for vectors, which the
    frames of ``what`` have; None gives frames without ``embed_text``. When the last frame is out, ``graph.warnings``
    also counts what was found on the way (``SNIPPET_NOT_FOUND``, ``PROPERTY_CUT``). Raises InvalidRequest for an
    unknown layout.
    """
    if layout is not None and layout not in LAYOUTS:
        message = f"layout: one of {', '.join(sorted(LAYOUTS))} is needed"
        raise InvalidRequest(message, field="layout", allowed=sorted(LAYOUTS))
    return _Builder(graph, layout, what).all(generated_at)


class _Builder:
    def __init__(self, graph: Graph, layout: str | None, what: Collection[What]) -> None:
        self._graph = graph
        self._layout = LAYOUTS[layout] if layout else None
        self._what = what
        self._neighbours = _neighbours(graph) if self._layout and self._layout.neighbours else {}
        self._containers = _containers(graph) if self._layout and self._layout.container else {}
        self._session_tag = f"sessionId={graph.session_id}"
        self._found = WarningCounter()
        self._snippets = Snippets(graph, self._found)

    def all(self, generated_at: str) -> Iterator[Frame]:
        yield from self._meta(generated_at)
        for node in self._graph.nodes:
            yield self._node(node)
        yield from self._relations()
        own = {warning.code: warning for warning in self._found.warnings()}
        before = [warning for warning in self._graph.warnings if warning.code not in _OWN_WARNINGS]
        self._graph.warnings = sorted([*before, *own.values()], key=lambda warning: warning.code)

    # --- meta -------------------------------------------------------------------------------------

    def _meta(self, generated_at: str) -> Iterator[Frame]:
        graph = self._graph
        labels = _commonest(Counter(node.label for node in graph.nodes))
        types = _commonest(Counter(relation.type for relation in graph.relations))
        manifest = {
            "generatedAt": generated_at,
            "mv2SchemaVersion": MV2_SCHEMA,
            "exportSchemaVersion": EXPORT_SCHEMA,
            "aiBibleVersion": AI_BIBLE_VERSION,
            "sessionId": graph.session_id,
            "projectName": graph.project_name,
            "source": graph.source,
            "options": graph.options,
            "capsuleCapabilities": {
                "strictJsonToolResponses": True,
                "cursorPagination": True,
                "semanticFallbackOnly": True,
                "defaultResponseBudgetBytes": RESPONSE_BUDGET_BYTES,
                "supportsLegacyCapsules": True,
                "toolCount": len(TOOLS),
                "toolSetVersion": TOOLSET_VERSION,
            },
            "totals": graph.totals,
            "leftOut": graph.left_out,
            "nodeLabels": labels,
            "relationshipTypes": types,
        }
        head = [
            "GitNexus capsule manifest",
            f"projectName={_line(graph.project_name)}",
            f"sessionId={_line(graph.session_id)}",
            f"generatedAt={generated_at}",
            f"nodes={len(graph.nodes)}",
            f"relationships={len(graph.relations)}",
            f"files={len(graph.files)}",
            f"nodeLabels={', '.join(f'{name} {count}' for name, count in labels.items())}",
            f"relationshipTypes={', '.join(f'{name} {count}' for name, count in types.items())}",
        ]
        title = f"Manifest: {_line(graph.project_name)}"
        yield self._meta_frame("mv2://meta/manifest", title, "manifest", "\n".join(head), manifest)
        for page, title, text, extra in guide_pages():
            metadata = {"aiBibleVersion": AI_BIBLE_VERSION, "page": page, **extra}
            yield self._meta_frame(f"mv2://meta/ai-bible/{page}", title, "ai-bible", text, metadata)

    def _meta_frame(self, uri: str, title: str, kind: str, text: str, metadata: dict[str, Any]) -> Frame:
        encoded = _encode(metadata).decode()
        text = f"{text}\nmetadata={encoded}"
        return Frame(uri, title, "meta", "meta", [f"kind={kind}"], text, encoded, None, encoded)

    # --- nodes ------------------------------------------------------------------------------------

    def _node(self, node: Node) -> Frame:
        label = node.label
        properties = node.properties
        name = _line(properties["name"])
        metadata: dict[str, Any] = {}
        for key, value in properties.items():
            if key == "content":
                continue
            if type(value) is str and len(value) > MAX_PROPERTY_CHARS:
                self._found.add("PROPERTY_CUT", f"{node.id}: {key}")
                value = f"{value[:MAX_PROPERTY_CHARS]}...[truncated]"  # noqa: PLW2901
            metadata[f"properties.{key}" if key in _NODE_KEYS else key] = value
        metadata["id"] = node.id
        metadata["label"] = label
        encoded = self._encode_bounded(metadata, _NODE_KEYS | {"name", "filePath"}, node.id)

        snippet, signature = self._snippets.of(node)
        path = properties.get("filePath") or ""
        text = f"Node {_line(label)}\nid={_line(node.id)}\nname={name}\nfilePath={_line(path)}\n"
        if snippet:
            text = f"{text}\nsnippet:\n{snippet}\n"
        return Frame(
            frame_uri(_PREFIXES.get(label, "mv2://nodes/"), node.id),
            f"{_line(label)}: {name}",
            _TRACKS.get(label) or f"nodes/{_line(label)}",
            _KINDS.get(label, "node"),
            ["source=gitnexus", f"nodeLabel={_line(label)}", self._session_tag],
            f"{text}metadata={encoded}",
            encoded,
            self._embed_text(node, signature, snippet),
            _encode({key: value for key, value in metadata.items() if key not in _NODE_IN_FIELDS}).decode(),
        )

    def _embed_text(self, node: Node, signature: str, snippet: str) -> str | None:
        if self._layout is None or _WHAT.get(node.label, "nodes") not in self._what:
            return None
        neighbours = self._neighbours.get(node.id, ())
        container = self._containers.get(node.id, "")
        return self._layout.text(EmbedInput(node, signature[:MAX_SIGNATURE_CHARS], snippet, neighbours, container))

    def _encode_bounded(self, metadata: dict[str, Any], core: frozenset[str], item_id: str) -> str:
        """Encode; over the maximum the largest values go first, the keys of ``core`` stay."""
        encoded = _encode(metadata)
        over = len(encoded) - MAX_METADATA_BYTES
        if over > 0:
            sizes = {key: len(_encode([key, value])) for key, value in metadata.items() if key not in core}
            for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
                if over <= 0:
                    break
                self._found.add("PROPERTY_CUT", f"{item_id}: {key}")
                del metadata[key]
                over -= sizes[key]
            encoded = _encode(metadata)
        return encoded.decode()

    # --- relations --------------------------------------------------------------------------------

    def _relations(self) -> Iterator[Frame]:
        lines = {node.id: (_line(node.properties["name"]), _line(node.label)) for node in self._graph.nodes}
        tags: dict[str, list[str]] = {}
        session_tag = self._session_tag
        embedded = self._layout is not None and "relations" in self._what
        for relation in self._graph.relations:
            source_id, target_id, kind = relation.source_id, relation.target_id, relation.type
            metadata: dict[str, Any] = {
                "id": relation.id,
                "type": kind,
                "sourceId": source_id,
                "targetId": target_id,
                "confidence": relation.confidence,
            }
            if relation.reason:
                metadata["reason"] = relation.reason
            if relation.step:
                metadata["step"] = relation.step
            if relation.occurrences > 1:
                metadata["occurrences"] = relation.occurrences
            if relation.extra or (relation.reason and len(relation.reason) > MAX_PROPERTY_CHARS):
                encoded = self._relation_metadata(relation, metadata)
            else:
                encoded = _encode(metadata).decode()
            extra = {key: value for key, value in metadata.items() if key not in _RELATION_IN_TEXT}
            source_line, source_label = lines.get(source_id) or (_line(source_id), UNKNOWN_LABEL)
            target_line, target_label = lines.get(target_id) or (_line(target_id), UNKNOWN_LABEL)
            kind = _line(kind)
            reason = _line(relation.reason) if relation.reason else ""
            if kind not in tags:
                tags[kind] = ["source=gitnexus", f"relationType={kind}", session_tag]
            yield Frame(
                frame_uri("mv2://relations/", relation.id),
                f"{source_line} {kind} {target_line}",
                f"relations/{kind}",
                "relation",
                tags[kind],
                f"Relationship {kind}\nsource={source_line} ({source_label})\ntarget={target_line} ({target_label})\n"
                f"confidence={relation.confidence:.3f}\nreason={reason}\nmetadata={encoded}",
                encoded,
                relation_text(source_line, kind, target_line, reason) if embedded else None,
                _encode(extra).decode() if extra else "{}",
            )

    def _relation_metadata(self, relation: Relation, metadata: dict[str, Any]) -> str:
        if relation.reason and len(relation.reason) > MAX_PROPERTY_CHARS:
            self._found.add("PROPERTY_CUT", f"{relation.id}: reason")
            metadata["reason"] = f"{relation.reason[:MAX_PROPERTY_CHARS]}...[truncated]"
        for key, value in (relation.extra or {}).items():
            metadata[f"properties.{key}" if key in _RELATION_KEYS else key] = value
        return self._encode_bounded(metadata, _RELATION_KEYS, relation.id)


_OWN_WARNINGS = frozenset({"PROPERTY_CUT", "SNIPPET_NOT_FOUND"})


def _symbols(graph: Graph) -> dict[str, str]:
    """Names by id, of what is no file, folder, community or process."""
    return {node.id: node.name[:MAX_LINE_CHARS] for node in graph.nodes if node.label not in _WHAT}


def _neighbours(graph: Graph) -> dict[str, list[str]]:
    """Names of the symbols that a node is joined to, by its id: the first ones by the relationships' ids.

    Files and folders are in a text by their path already; the name of a community or a process would make the texts of
    all its members depend on it.
    """
    names = _symbols(graph)
    found: dict[str, list[str]] = defaultdict(list)
    for relation in graph.relations:
        ends = relation.source_id, relation.target_id
        for own, other in (ends, ends[::-1]):
            near, name = found[own], names.get(other)
            if name is not None and len(near) < NEIGHBOURS and name not in near:
                near.append(name)
    return found


def _containers(graph: Graph) -> dict[str, str]:
    """Name of the symbol that a node belongs to, by the node's id: the first one by the relationships' ids."""
    names = _symbols(graph)
    found: dict[str, str] = {}
    for relation in graph.relations:
        name = names.get(relation.source_id) if relation.type in CONTAINMENT else None
        if name is not None:
            found.setdefault(relation.target_id, name)
    return found


def _commonest(counts: Counter[str]) -> dict[str, int]:
    """By name; of very many kinds the most frequent ones."""
    commonest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_KINDS]
    return {_line(name): count for name, count in sorted(commonest)}


def _line(text: str) -> str:
    """One line of bounded length."""
    if len(text) > MAX_LINE_CHARS:
        text = f"{text[:MAX_LINE_CHARS]}..."
    return text if text.isprintable() else " ".join(text.split())
