"""The sixteen read tools: what they take, and how they answer from an open capsule."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from common.errors import ExportError, InvalidRequest, Retry
from common.frames.guide import TOOLS
from common.sidecar.build import SCHEMA_VERSION, snippet_of
from common.sidecar.open import Node, Scope, Sidecar
from common.sidecar.words import FIELDS
from common.text import split_identifier
from control_plane.reading.ask import MAX_CAPSULES, Names, check_scope, find, prepared
from control_plane.reading.library import OpenCapsule
from control_plane.reading.search import (
    DEPTH,
    EXACT_NAME,
    LINKED_SHARE,
    MAX_LIMIT,
    MEANING_WEIGHT,
    PLAIN_LABELS,
    query_words,
)

MAX_PATH_STEPS = 20_000
"""Calls followed for one ``call_trace``."""
MAX_IMPACTED = 20_000
DEPENDING = ("CALLS", "IMPORTS", "EXTENDS", "IMPLEMENTS", "METHOD_OVERRIDES", "OVERRIDES", "ACCESSES", "USES")
"""Relations whose source may break when their target changes."""
HOTSPOTS = 10
IMPACT_PAGE = 300
"""Impacted nodes of one answer, about what fits its usual budget; a cursor goes on."""
LOW_CONFIDENCE = 0.6
MAX_BY_WORDS, MAX_BY_BEGINNING = 100, 200
"""Nodes that a lookup adds to those of the whole name."""
SCOPES: dict[str, tuple[str, ...]] = {
    "files": ("File", "Folder"),
    "sections": ("Section",),
    "communities": ("Community",),
    "processes": ("Process",),
}

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=8192)]
Query = Annotated[str, msgspec.Meta(max_length=2000)]
Limit = Annotated[int, msgspec.Meta(ge=1, le=200)]
Depth = Annotated[int, msgspec.Meta(ge=1, le=10)]


class NotFound(ExportError):
    """The capsule has nothing of that id or path."""

    code = "NOT_FOUND"
    retry = Retry.never


class Locator(msgspec.Struct, rename="camel", kw_only=True, forbid_unknown_fields=True):
    """Which capsule to read: that of an export, or a file; the newest completed export where neither is given."""

    job_id: Text | None = None
    capsule_path: Text | None = None


class Arguments(msgspec.Struct, rename="camel", kw_only=True, forbid_unknown_fields=True):
    """What every tool takes."""

    locator: Locator | None = None
    cursor: Annotated[str, msgspec.Meta(max_length=200)] | None = None


class Listing(Arguments, kw_only=True):
    """A page of a list."""

    limit: Limit = 50


class SymbolLookup(Arguments, kw_only=True):
    """A name, or a part of one."""

    query: Query
    limit: Limit = 20


class NodeGet(Arguments, kw_only=True):
    """A node's id."""

    node_id: Text


class NeighborsGet(Listing, kw_only=True):
    """A node, and which of its relationships."""

    node_id: Text
    direction: Literal["in", "out", "both"] = "both"
    relation_types: Annotated[list[Text], msgspec.Meta(max_length=50)] = []


class EdgeGet(Arguments, kw_only=True):
    """A relationship's id."""

    edge_id: Text


class TextSearch(Arguments, kw_only=True):
    """Words."""

    query: Query
    scope: Literal["all", "symbols", "files", "sections", "communities", "processes"] = "all"
    labels: Annotated[list[Text], msgspec.Meta(max_length=50)] = []
    file_prefix: Text | None = None
    community_id: Text | None = None
    relation_types: Annotated[list[Text], msgspec.Meta(max_length=50)] = []
    also: Annotated[list[Locator], msgspec.Meta(max_length=MAX_CAPSULES - 1)] = []
    limit: Limit = 20


class CallTrace(Arguments, kw_only=True):
    """Where calls start, and where they should lead."""

    from_node_id: Text
    to_node_id: Text | None = None
    max_depth: Depth = 5
    limit_paths: Annotated[int, msgspec.Meta(ge=1, le=100)] = 10


class Calls(Listing, kw_only=True):
    """A node whose calls to list."""

    node_id: Text


class ProcessGet(Arguments, kw_only=True):
    """A process's id."""

    process_id: Text


class ImpactAnalysis(Arguments, kw_only=True):
    """A node that is to change, and over how many steps to look."""

    node_id: Text
    max_depth: Depth = 3


class FileOutline(Arguments, kw_only=True):
    """A file's path."""

    file_path: Text


class FileSnippet(Arguments, kw_only=True):
    """A node, or a file by its path."""

    node_id: Text | None = None
    file_path: Text | None = None
    max_chars: Annotated[int, msgspec.Meta(ge=80, le=60_000)] = 4000


class QueryExplain(Arguments, kw_only=True):
    """What is to be done, and the words of the question."""

    task: Annotated[str, msgspec.Meta(max_length=2000)]
    query: Query = ""


class Answer(NamedTuple):
    """What a tool found; ``items`` names the list in ``result`` that may go on, ``properties`` a mapping in it that may
    be shortened, ``extras`` a list beside ``items`` that may be."""

    result: dict[str, Any]
    score: float
    """How sure the answer is, 0 to 1."""
    factors: list[str]
    warnings: Sequence[str] = ()
    items: str | None = None
    properties: str | None = None
    extras: str | None = None
    more: bool = False
    """Whether something follows the last item."""


class Page(NamedTuple):
    """Where an answer starts."""

    offset: int


def _item(node: Node) -> dict[str, Any]:
    return {
        "id": node.id,
        "uri": node.uri,
        "kind": node.kind,
        "label": node.label,
        "name": node.name,
        "filePath": node.file_path,
        "startLine": node.start_line,
        "endLine": node.end_line,
    }


def _node(sidecar: Sidecar, node_id: str) -> Node:
    node = sidecar.node(node_id)
    if node is None:
        raise NotFound(f"This capsule has no node {node_id[:200]}")
    return node


def _ids(sidecar: Sidecar, *positions: int | None) -> list[str | None]:
    known = {node.position: node.id for node in sidecar.nodes(at for at in positions if at is not None)}
    return [None if at is None else known.get(at) for at in positions]


# --- symbols and nodes ---


def symbol_lookup(capsule: OpenCapsule, given: SymbolLookup, page: Page) -> Answer:
    """Exact names first, all of them; then beginnings of names, then nodes with the same words."""
    sidecar = capsule.sidecar
    scores = _symbols(sidecar, given.query)
    ranked = sorted(scores, key=lambda at: (-scores[at], at))
    chosen = ranked[page.offset : page.offset + given.limit]
    items = [{**_item(node), "score": scores[node.position]} for node in sidecar.nodes(chosen)]
    best = scores[ranked[0]] if ranked else 0.0
    factor = "exact_name" if best >= 0.9 else "name_prefix" if best >= 0.6 else "name_words" if ranked else "no_match"
    result = {"query": given.query, "items": items}
    return Answer(result, best, [factor], items="items", more=len(ranked) > page.offset + given.limit)


def _symbols(sidecar: Sidecar, query: str) -> dict[int, float]:
    """The scores of nodes by their positions: 1 for the very name, .95 for another way to write it, .92 for the last
    part of a dotted one, .6 to .8 for beginnings, up to .5 for words; what is no symbol has .05 less."""
    name = query.strip()
    scores: dict[int, float] = {}
    found = sidecar.match(query_words(name), limit=MAX_BY_WORDS)
    labels = sidecar.labels_at([position for position, _ in found])
    for position, score in found:
        scores[position] = _lookup_score(0.5 * score / found[0][1] if found[0][1] > 0 else 0.1, labels[position])
    for position, length, label in sidecar.beginning(name, limit=MAX_BY_BEGINNING):
        scores[position] = _lookup_score(0.6 + 0.2 * min(1.0, len(name) / max(1, length)), label)
    # `Class.method`, `module::function`: the last part is the name, the rest stands in the id.
    parts = re.split(r"::|[.#/]", name)
    if len(parts) > 1 and parts[-1]:
        written = name.replace("::", ".").replace("#", ".")
        for node in sidecar.nodes(sidecar.named(parts[-1], limit=1000)):
            if written in node.id.replace("::", ".").replace("#", "."):
                scores[node.position] = _lookup_score(0.92, node.label)
    for position, spelled, label in sidecar.spelled(name):
        scores[position] = _lookup_score(1.0 if spelled in (name, query) else 0.95, label)
    itself = sidecar.node(query) or sidecar.node(name)
    if itself:
        scores[itself.position] = _lookup_score(1.0, itself.label)
    return scores


def _lookup_score(score: float, label: str) -> float:
    return round(score - 0.05 if label in PLAIN_LABELS else score, 4)


def node_get(capsule: OpenCapsule, given: NodeGet, page: Page) -> Answer:
    """A node with all that is known about it."""
    node = _node(capsule.sidecar, given.node_id)
    incoming, outgoing = capsule.sidecar.degree(node.position)
    calls = capsule.sidecar.calls([node.position])
    degree = {
        "in": incoming,
        "out": outgoing,
        "callsIn": calls[0].calls_in if calls else 0,
        "callsOut": calls[0].calls_out if calls else 0,
    }
    result = {"node": _item(node), "degree": degree, "metadata": capsule.metadata(node.position)}
    return Answer(result, 1.0, ["graph_exact"], properties="metadata")


def neighbors_get(capsule: OpenCapsule, given: NeighborsGet, page: Page) -> Answer:
    """The relationships of a node with their other ends: outgoing first, then by type and id."""
    sidecar = capsule.sidecar
    node = _node(sidecar, given.node_id)
    edges = sidecar.edges(
        node.position, given.direction, given.relation_types, limit=given.limit + 1, offset=page.offset
    )
    shown = edges[: given.limit]
    others = {edge.target if side == "out" else edge.source for side, edge in shown}
    ends = {other.position: other for other in sidecar.nodes(others)} | {node.position: node}
    items = [
        {
            "edgeId": edge.written_out(ends[edge.source], ends[edge.target]),
            "direction": side,
            "type": edge.type,
            "confidence": edge.confidence,
            "reason": edge.reason,
            "step": edge.step,
            "node": _item(ends[edge.target if side == "out" else edge.source]),
        }
        for side, edge in shown
    ]
    result = {"nodeId": node.id, "direction": given.direction, "items": items}
    sureness = _sureness([edge.confidence for _, edge in shown])
    return Answer(result, sureness, ["graph_exact"], items="items", more=len(edges) > given.limit)


def edge_get(capsule: OpenCapsule, given: EdgeGet, page: Page) -> Answer:
    """A relationship with both ends and its evidence."""
    sidecar = capsule.sidecar
    edge = sidecar.edge(given.edge_id)
    if edge is None:
        raise NotFound(f"This capsule has no relationship {given.edge_id[:200]}")
    ends = {node.position: node for node in sidecar.nodes((edge.source, edge.target))}
    source, target = ends[edge.source], ends[edge.target]
    about = {
        "id": given.edge_id,
        "type": edge.type,
        "sourceId": source.id,
        "targetId": target.id,
        "confidence": edge.confidence,
        "reason": edge.reason,
        "step": edge.step,
    }
    metadata = capsule.metadata(edge.position)
    result = {"edge": about, "source": _item(source), "target": _item(target), "metadata": metadata}
    return Answer(result, edge.confidence, ["graph_exact", "edge_confidence"], properties="metadata")


def _sureness(confidences: Sequence[float]) -> float:
    """The mean confidence of relationships; that there are none is certain."""
    return sum(confidences) / len(confidences) if confidences else 1.0


# --- calls ---


def callers_of(capsule: OpenCapsule, given: Calls, page: Page) -> Answer:
    """The nodes that call a node, by id."""
    return _calls(capsule, given, page, "in")


def callees_of(capsule: OpenCapsule, given: Calls, page: Page) -> Answer:
    """The nodes that a node calls, by id."""
    return _calls(capsule, given, page, "out")


def _calls(capsule: OpenCapsule, given: Calls, page: Page, direction: Literal["in", "out"]) -> Answer:
    sidecar = capsule.sidecar
    node = _node(sidecar, given.node_id)
    found = sidecar.joined(node.position, direction, "CALLS", limit=given.limit + 1, offset=page.offset)
    shown = found[: given.limit]
    items = [{**_item(other), "confidence": confidence} for other, confidence in shown]
    sureness = _sureness([confidence for _, confidence in shown])
    result = {"nodeId": node.id, "items": items}
    factors = ["graph_exact", "edge_confidence"]
    return Answer(result, sureness, factors, items="items", more=len(found) > given.limit)


def call_trace(capsule: OpenCapsule, given: CallTrace, page: Page) -> Answer:
    """Chains of calls without repeats: to a node, shortest first; without one, as far as the depth allows."""
    sidecar = capsule.sidecar
    start = _node(sidecar, given.from_node_id)
    goal = _node(sidecar, given.to_node_id) if given.to_node_id else None
    trace = _Trace(capsule, given.max_depth, given.limit_paths)
    paths = trace.to(start.position, goal.position) if goal else trace.open_ended(start.position)
    nodes = {node.position: node for node in sidecar.nodes({at for path in paths for at in path})}
    items = [{"length": len(path) - 1, "nodes": [_item(nodes[at]) for at in path]} for path in paths]
    result = {
        "fromNodeId": start.id,
        "toNodeId": goal.id if goal else None,
        "maxDepth": given.max_depth,
        "paths": items[page.offset :],
        "pathCount": len(items),
    }
    warnings = ["TRACE_LIMITED"] if trace.limited else []
    return Answer(result, 0.85 if items else 0.6, ["graph_exact", "call_edges"], warnings, items="paths")


class _Trace:
    """Finds paths over calls; ``limited`` says that there may be more than it looked at."""

    def __init__(self, capsule: OpenCapsule, max_depth: int, limit: int) -> None:
        self._capsule = capsule
        self._max_depth = max_depth
        self._limit = limit
        self._callees: dict[int, list[int]] = {}
        self._steps = 0
        self.limited = False

    def to(self, start: int, goal: int) -> list[list[int]]:
        away = self._distances(goal)
        if start not in away or start == goal:
            return []
        paths: list[list[int]] = []
        for length in range(away[start], self._max_depth + 1):
            for path in self._walk(
                [start], length, lambda at, left: (at == goal) == (left == 0) and away.get(at, left + 1) <= left
            ):
                paths.append(path)
                if len(paths) == self._limit:
                    self.limited = True
                    return paths
        return paths

    def open_ended(self, start: int) -> list[list[int]]:
        paths: list[list[int]] = []
        for path in self._walk([start], self._max_depth, None):
            if len(path) > 1:
                if len(paths) == self._limit:
                    self.limited = True
                    break
                paths.append(path)
        return paths

    def _walk(self, path: list[int], left: int, leads: Callable[[int, int], bool] | None) -> Iterable[list[int]]:
        """Paths of exactly ``left`` more calls (with ``leads``), or ones that go no further."""
        self._steps += 1
        if self._steps > MAX_PATH_STEPS:
            self.limited = True
            return
        self._capsule.check()
        going = [at for at in self._next(path[-1]) if at not in path and (leads is None or leads(at, left - 1))]
        if left == 0 or (leads is None and not going):
            yield path
            return
        for at in going:
            yield from self._walk([*path, at], left - 1, leads)

    def _next(self, position: int) -> list[int]:
        if position not in self._callees:
            self._callees[position] = self._capsule.sidecar.targets(position, "CALLS")
        return self._callees[position]

    def _distances(self, goal: int) -> dict[int, int]:
        """How many calls lead from each node to the goal, as far as the depth allows."""
        away = {goal: 0}
        edge = [goal]
        for depth in range(1, self._max_depth + 1):
            self._capsule.check()
            callers = {source for source, _ in self._capsule.sidecar.incoming(edge, ["CALLS"])}
            edge = sorted(callers - away.keys())
            away.update((at, depth) for at in edge)
        return away


def impact_analysis(capsule: OpenCapsule, given: ImpactAnalysis, page: Page) -> Answer:
    """What depends on a node, step by step: nearest first, then by id."""
    sidecar = capsule.sidecar
    root = _node(sidecar, given.node_id)
    depths = {root.position: 0}
    edge_count = 0
    warnings: list[str] = []
    frontier = [root.position]
    for depth in range(1, given.max_depth + 1):
        capsule.check()
        incoming = sidecar.incoming(frontier, DEPENDING)
        edge_count += len(incoming)
        frontier = sorted({source for source, _ in incoming} - depths.keys())
        if len(depths) + len(frontier) > MAX_IMPACTED:
            frontier = frontier[: MAX_IMPACTED - len(depths)]
            warnings = ["IMPACT_LIMITED"]
        depths.update((at, depth) for at in frontier)
        if not frontier or warnings:
            break
    del depths[root.position]
    ordered = sorted(depths, key=lambda at: (depths[at], at))
    shown = ordered[page.offset : page.offset + IMPACT_PAGE]
    hot = sidecar.calls(ordered)[:HOTSPOTS]
    nodes = {node.position: node for node in sidecar.nodes({*shown, *(spot.position for spot in hot)})}
    result = {
        "rootNodeId": root.id,
        "maxDepth": given.max_depth,
        "impactedNodeCount": len(ordered),
        "impactedEdgeCount": edge_count,
        "hotspots": [
            {**_item(nodes[spot.position]), "callsIn": spot.calls_in, "callsOut": spot.calls_out} for spot in hot
        ],
        "impactedNodes": [{**_item(nodes[at]), "depth": depths[at]} for at in shown],
    }
    more = len(ordered) > page.offset + len(shown)
    factors = ["graph_exact", "static_relations"]
    return Answer(result, 0.85, factors, warnings, items="impactedNodes", extras="hotspots", more=more)


# --- search ---


def text_search(capsules: Sequence[tuple[str, OpenCapsule]], given: TextSearch, page: Page) -> Answer:
    """Words first; meaning too where words alone find little and a capsule has vectors. ``capsules`` have the names
    that items give them where there are several."""
    sidecars = [capsule.sidecar for _, capsule in capsules]
    scope = Scope(tuple(given.labels), given.file_prefix, given.community_id, tuple(given.relation_types))
    check_scope(sidecars, scope, _FILTERS)
    if given.scope != "all":
        scope = scope._replace(labels=_labels(sidecars, given))
    limit = min(DEPTH, page.offset + given.limit + 1)  # with more, all scores change, and pages would not fit together
    found = find(prepared(capsules, "lexical"), given.query, mode="lexical", limit=limit, scope=scope)
    score, factor = _coverage(given.query, found.hits[0].node if found.hits else None)
    factors = [factor]
    if score < LOW_CONFIDENCE and query_words(given.query):
        with_vectors = prepared(capsules, "hybrid")
        found = found._replace(warnings=with_vectors.warnings)
        if any(one.vectors is not None for one in with_vectors.searched):
            found = find(with_vectors, given.query, mode="hybrid", limit=limit, scope=scope)
        if found.semantic_used:
            factors.append("semantic_fallback")
    items = [
        {**_item(hit.node), "title": hit.node.title, "score": hit.score, "why": hit.why}
        | ({"capsule": hit.capsule} if len(capsules) > 1 else {})
        for hit in found.hits[page.offset : page.offset + given.limit]
    ]
    result = {"query": given.query, "scope": given.scope, "items": items, "semanticUsed": found.semantic_used}
    more = len(found.hits) > page.offset + given.limit
    limited = ["SEARCH_LIMITED"] if len(found.hits) == DEPTH and not more else []
    return Answer(result, score, factors, [*found.warnings, *limited], items="items", more=more)


_FILTERS = Names("labels", "filePrefix", "communityId", "relationTypes")


def _labels(sidecars: Sequence[Sidecar], given: TextSearch) -> tuple[str, ...]:
    """The labels that a scope and ``labels`` leave. Raises InvalidRequest where they leave none."""
    here = sorted({label for sidecar in sidecars for label in sidecar.labels()})
    symbols = [label for label in here if label not in PLAIN_LABELS]
    own = symbols if given.scope == "symbols" else SCOPES[given.scope]
    left = tuple(label for label in own if label in (given.labels or own))
    if given.labels and not left:
        raise InvalidRequest(f"labels: none of them is of scope {given.scope}", field="labels", allowed=list(own))
    return left


def _coverage(query: str, node: Node | None) -> tuple[float, str]:
    """How sure a search by words is, from the words that its best hit has in its name and path."""
    if node is None:
        return 0.1, "no_match"
    words = query_words(query)
    if node.name == query.strip() or not words:  # without words only a name is found
        return 0.95, "exact_name"
    held = {*split_identifier(node.name).split(), *split_identifier(node.file_path or "").split()}
    return round(0.35 + 0.5 * sum(word in held for word in words) / len(words), 4), "word_coverage"


# --- files, processes, communities ---


def file_outline(capsule: OpenCapsule, given: FileOutline, page: Page) -> Answer:
    """The symbols of a file, by line."""
    nodes = capsule.sidecar.in_file(given.file_path)
    if not nodes:
        raise NotFound(f"This capsule has no file {given.file_path[:200]}")
    symbols = [node for node in nodes if node.label not in ("File", "Folder")]
    shown = symbols[page.offset : page.offset + MAX_LIMIT]
    result = {"filePath": given.file_path, "symbols": [*map(_item, shown)], "symbolCount": len(symbols)}
    more = len(symbols) > page.offset + len(shown)
    return Answer(result, 1.0, ["graph_exact"], items="symbols", more=more)


def file_snippet(capsule: OpenCapsule, given: FileSnippet, page: Page) -> Answer:
    """The source of a node, or the beginning of a file; a cursor goes on in the text."""
    sidecar = capsule.sidecar
    if (given.node_id is None) == (given.file_path is None):
        raise InvalidRequest("nodeId, filePath: give one of them", field="nodeId")
    if given.node_id is not None:
        node = _node(sidecar, given.node_id)
    else:
        found = [node for node in sidecar.in_file(given.file_path or "") if node.label == "File"]
        if not found:
            raise NotFound(f"This capsule has no file {(given.file_path or '')[:200]}")
        node = found[0]
    snippet = snippet_of(capsule.frame(node.position).text)
    shown = snippet[page.offset : page.offset + given.max_chars]
    result = {"node": _item(node), "snippet": shown, "maxChars": given.max_chars}
    warnings = [] if snippet else ["NO_SNIPPET"]
    more = len(snippet) > page.offset + given.max_chars
    return Answer(result, 0.95 if snippet else 0.3, ["stored_source"], warnings, items="snippet", more=more)


def process_list(capsule: OpenCapsule, given: Listing, page: Page) -> Answer:
    """The processes, longest first, then by id."""
    sidecar = capsule.sidecar
    processes = sidecar.processes(limit=given.limit + 1, offset=page.offset)
    shown = processes[: given.limit]
    nodes = {node.position: node for node in sidecar.nodes(process.position for process in shown)}
    items = []
    for process in shown:
        entry, terminal = _ids(sidecar, process.entry, process.terminal)
        items.append(
            {
                **_item(nodes[process.position]),
                "processType": process.process_type,
                "stepCount": process.step_count,
                "entryPointId": entry,
                "terminalId": terminal,
            }
        )
    return Answer({"items": items}, 1.0, ["graph_exact"], items="items", more=len(processes) > given.limit)


def process_get(capsule: OpenCapsule, given: ProcessGet, page: Page) -> Answer:
    """A process with its steps in order."""
    sidecar = capsule.sidecar
    node = sidecar.node(given.process_id)
    process = sidecar.process(node.position) if node else None
    if node is None or process is None:
        raise NotFound(f"This capsule has no process {given.process_id[:200]}")
    entry, terminal = _ids(sidecar, process.entry, process.terminal)
    steps = sidecar.steps(process.position)
    shown = steps[page.offset : page.offset + MAX_LIMIT]
    nodes = {found.position: found for found in sidecar.nodes({at for _, at in shown})}
    about = {
        **_item(node),
        "processType": process.process_type,
        "stepCount": process.step_count,
        "entryPointId": entry,
        "terminalId": terminal,
    }
    result = {"process": about, "steps": [{"step": step, "node": _item(nodes[at])} for step, at in shown]}
    return Answer(result, 1.0, ["graph_exact"], items="steps", more=len(steps) > page.offset + len(shown))


def community_list(capsule: OpenCapsule, given: Listing, page: Page) -> Answer:
    """The communities, largest first, then by id."""
    sidecar = capsule.sidecar
    communities = sidecar.communities(limit=given.limit + 1, offset=page.offset)
    shown = communities[: given.limit]
    nodes = {node.position: node for node in sidecar.nodes(community.position for community in shown)}
    items = [
        {
            **_item(nodes[community.position]),
            "cohesion": community.cohesion,
            "symbolCount": community.symbol_count,
            "memberCount": community.members,
        }
        for community in shown
    ]
    return Answer({"items": items}, 1.0, ["graph_exact"], items="items", more=len(communities) > given.limit)


# --- about the capsule ---


def manifest_get(capsule: OpenCapsule, given: Arguments, page: Page) -> Answer:
    """What the capsule was made from, with counts."""
    manifest: dict[str, Any] = msgspec.json.decode(capsule.sidecar.manifest or "{}")
    result = {
        "schemaVersion": manifest.get("mv2SchemaVersion"),
        "indexSchemaVersion": SCHEMA_VERSION,
        "manifest": manifest,
        "capsuleCapabilities": manifest.get("capsuleCapabilities"),
        "counts": capsule.sidecar.counts(),
    }
    warnings = [] if manifest else ["NO_MANIFEST"]
    return Answer(result, 1.0 if manifest else 0.5, ["manifest_frame"], warnings, properties="manifest")


def query_explain(capsule: OpenCapsule, given: QueryExplain, page: Page) -> Answer:
    """Which tools to use for a task, and what the query comes down to."""
    words = query_words(given.query or given.task)
    exact = capsule.sidecar.named((given.query or given.task)[:200], limit=20)
    asked = {*split_identifier(given.task).split(), *split_identifier(given.query).split()}
    sequence = next((tools for hints, tools in _SEQUENCES if asked & hints), _SEQUENCES[-1][1])
    result = {
        "task": given.task,
        "query": given.query,
        "retrievalLadder": [
            {"step": 1, "name": "graph exact", "tools": ["symbol_lookup", "node_get"], "exactNames": len(exact)},
            {"step": 2, "name": "lexical", "tools": ["text_search"], "words": words},
            {
                "step": 3,
                "name": "graph expansion",
                "tools": ["neighbors_get", "callers_of", "callees_of", "call_trace"],
            },
            {"step": 4, "name": "semantic", "tools": ["text_search"], "when": f"confidence below {LOW_CONFIDENCE}"},
        ],
        "rankingSignals": [
            {"signal": "exact name", "weight": EXACT_NAME},
            *({"signal": f"words of the {field}", "weight": weight} for field, weight in FIELDS.items()),
            {"signal": "meaning", "weight": MEANING_WEIGHT},
            {"signal": "next to a hit", "weight": LINKED_SHARE},
        ],
        "recommendedToolSequence": [{"tool": name, "why": _USES[name]} for name in sequence],
    }
    return Answer(result, 0.9 if exact else 0.7, ["exact_name" if exact else "task_words"])


_USES = {tool.name: tool.use for tool in TOOLS}
_SEQUENCES: tuple[tuple[frozenset[str], tuple[str, ...]], ...] = (
    (
        frozenset({"break", "breaks", "impact", "affected", "change", "changes", "changing", "refactor", "rename"}),
        ("symbol_lookup", "node_get", "impact_analysis", "callers_of", "edge_get"),
    ),
    (
        frozenset({"flow", "process", "end", "steps", "sequence", "happens", "pipeline", "lifecycle"}),
        ("process_list", "process_get", "call_trace", "file_snippet"),
    ),
    (
        frozenset({"call", "calls", "called", "caller", "callers", "callee", "path", "reach"}),
        ("symbol_lookup", "callers_of", "callees_of", "call_trace"),
    ),
    (frozenset({"file", "outline", "module", "folder"}), ("file_outline", "file_snippet", "neighbors_get")),
    (
        frozenset({"overview", "architecture", "areas", "structure", "communities"}),
        ("manifest_get", "community_list", "process_list", "file_snippet"),
    ),
    (frozenset(), ("symbol_lookup", "text_search", "node_get", "file_snippet", "callers_of")),
)

Run = Callable[[Any, Any, Page], Answer]
"""Takes an open capsule (``text_search``: several, with their names), arguments and a page."""
REGISTRY: dict[str, tuple[type[Arguments], Run]] = {
    "symbol_lookup": (SymbolLookup, symbol_lookup),
    "node_get": (NodeGet, node_get),
    "neighbors_get": (NeighborsGet, neighbors_get),
    "edge_get": (EdgeGet, edge_get),
    "text_search": (TextSearch, text_search),
    "call_trace": (CallTrace, call_trace),
    "callers_of": (Calls, callers_of),
    "callees_of": (Calls, callees_of),
    "process_list": (Listing, process_list),
    "process_get": (ProcessGet, process_get),
    "impact_analysis": (ImpactAnalysis, impact_analysis),
    "file_outline": (FileOutline, file_outline),
    "file_snippet": (FileSnippet, file_snippet),
    "community_list": (Listing, community_list),
    "manifest_get": (Arguments, manifest_get),
    "query_explain": (QueryExplain, query_explain),
}
"""Every tool: what it takes, and the function that answers."""
