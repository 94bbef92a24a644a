"""The canonical form: sorted, unique ids, within the maxima; the same for every order of the same input."""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from operator import attrgetter
from typing import TypeVar

import msgspec

from common.contract import LeftOut
from common.graph.model import ExportRequest, Graph, Node, Relation, Totals, WarningCounter

_SESSION_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://gitnexus.dev/memvid-export/session")
_DIGEST_BATCH = 2_000

_by_id = attrgetter("id")
_Item = TypeVar("_Item", Node, Relation)


def canonical(request: ExportRequest) -> Graph:
    """Bring a request into canonical form.

    Nodes equal in every field become one, relations too (``occurrences`` counts them); equal ids with other content
    become ``<id>#2``, ``<id>#3``, … in the order of their content. Relations to nodes that are not there stay. Over
    ``maxNodeFrames`` and ``maxRelationFrames`` the least connected go first (then by id), and the relations of cut
    nodes with them; ``left_out`` counts both.
    """
    found = WarningCounter(request.warnings)
    nodes = _unique(request.nodes, "DUPLICATE_NODE", "NODE_ID_REUSED", found)
    relations = _unique(request.relations, "DUPLICATE_RELATION", "RELATION_ID_REUSED", found)
    totals = Totals(
        nodes=len(request.nodes),
        relationships=len(request.relations),
        exported_node_frames=0,
        exported_relation_frames=0,
        file_count=len(request.files),
    )
    ids = {node.id for node in nodes}
    dangling = [r for r in relations if r.source_id not in ids or r.target_id not in ids]
    if dangling:
        found.add("DANGLING_RELATION", dangling[0].id, len(dangling))

    kept_nodes, kept_relations = _within_maxima(nodes, relations, request)
    totals.exported_node_frames = len(kept_nodes)
    totals.exported_relation_frames = len(kept_relations)
    left_out = LeftOut(nodes=len(nodes) - len(kept_nodes), relationships=len(relations) - len(kept_relations))
    graph = Graph(
        session_id=request.session_id or "",
        project_name=request.project_name,
        source=request.source,
        options=request.options,
        nodes=kept_nodes,
        relations=kept_relations,
        files=request.files,
        totals=totals,
        left_out=left_out,
        input=request.input,
        warnings=found.warnings(),
    )
    if not graph.session_id:
        graph.session_id = str(uuid.uuid5(_SESSION_NAMESPACE, content_digest(graph)))
    return graph


def content_digest(graph: Graph) -> str:
    """SHA-256 (hex) over the nodes, relations, files, project, source and options of a canonical graph.

    It depends neither on the day nor on the session, the order of the input or the writer.
    """
    digest = hashlib.sha256()
    encode = msgspec.json.Encoder(order="deterministic").encode
    head = [graph.project_name, graph.source, graph.options, len(graph.nodes), len(graph.relations), len(graph.files)]
    digest.update(encode(head))
    for batch in _batches(graph.nodes):
        digest.update(encode(batch))
    for relations in _batches(graph.relations):
        digest.update(encode(relations))
    for path in sorted(graph.files):
        digest.update(encode([path, len(graph.files[path])]))
        digest.update(graph.files[path].encode())
    return digest.hexdigest()


def _batches(items: list[_Item]) -> Iterator[list[_Item]]:
    for start in range(0, len(items), _DIGEST_BATCH):
        yield items[start : start + _DIGEST_BATCH]


def _unique(items: Sequence[_Item], equal: str, reused: str, found: WarningCounter) -> list[_Item]:
    """Sort by id, merge equal items and give those that share an id a new one each."""
    ordered = sorted(items, key=_by_id)
    if all(a.id != b.id for a, b in pairwise(ordered)):
        return ordered
    encode = msgspec.json.Encoder(order="deterministic").encode
    taken = {item.id for item in ordered}
    unique: list[_Item] = []
    for item_id, group in groupby(ordered, key=_by_id):
        same = list(group)
        if len(same) == 1:
            unique.append(same[0])
            continue
        contents = Counter(map(encode, same))
        by_content = {encode(item): item for item in same}
        number = 1
        for position, content in enumerate(sorted(contents)):
            item, count = by_content[content], contents[content]
            new_id = item_id
            if position:
                found.add(reused, item_id)
                while new_id in taken:
                    number += 1
                    new_id = f"{item_id}#{number}"
                taken.add(new_id)
            if count > 1:
                found.add(equal, item_id, count - 1)
            if isinstance(item, Relation):
                unique.append(msgspec.structs.replace(item, id=new_id, occurrences=count))
            else:
                unique.append(msgspec.structs.replace(item, id=new_id))
    unique.sort(key=_by_id)
    return unique


def _within_maxima(
    nodes: list[Node], relations: list[Relation], request: ExportRequest
) -> tuple[list[Node], list[Relation]]:
    max_nodes, max_relations = request.options.max_node_frames, request.options.max_relation_frames
    if len(nodes) <= max_nodes and len(relations) <= max_relations:
        return nodes, relations
    degree: Counter[str] = Counter()
    for relation in relations:
        degree[relation.source_id] += 1
        degree[relation.target_id] += 1
    if len(nodes) > max_nodes:
        ranked = sorted(nodes, key=lambda node: (degree[node.id], node.id))
        cut = {node.id for node in ranked[: len(nodes) - max_nodes]}
        nodes = [node for node in nodes if node.id not in cut]
        relations = [r for r in relations if r.source_id not in cut and r.target_id not in cut]
    if len(relations) > max_relations:
        weakest = sorted(relations, key=lambda r: (degree[r.source_id] + degree[r.target_id], r.id))
        cut = {relation.id for relation in weakest[: len(relations) - max_relations]}
        relations = [relation for relation in relations if relation.id not in cut]
    return nodes, relations
