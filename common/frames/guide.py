"""The agent guide inside every capsule: four frames that tell a reader how to get answers out of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from common.contract import AI_BIBLE_VERSION, TOOLSET_VERSION


class Tool(NamedTuple):
    """One read tool: how it is called, what it answers and when it is the right one."""

    name: str
    arguments: str
    answers: str
    use: str


class Playbook(NamedTuple):
    """The calls that answer one kind of question."""

    name: str
    question: str
    about: str | None
    """What the question is about, as the name of an argument."""
    steps: tuple[str, ...]


TOOLS: tuple[Tool, ...] = (
    Tool(
        "symbol_lookup",
        "query, limit, cursor",
        "query, items",
        "You have a name, or a part of one: start here. Give the name alone (getUser, Class.method); its ids go into "
        "the other tools.",
    ),
    Tool(
        "node_get",
        "nodeId",
        "node, degree, metadata",
        "You have an id and want all that is known about it; check here that it is the right one of its name.",
    ),
    Tool(
        "neighbors_get",
        "nodeId, direction, relationTypes[], limit, cursor",
        "nodeId, direction, items",
        "Look one step around a node: what it contains, extends, imports, is a member of. Name relationTypes where a "
        "node has many.",
    ),
    Tool(
        "edge_get",
        "edgeId",
        "edge, source, target, metadata",
        "Check one relation, by the edgeId of neighbors_get: its reason and confidence.",
    ),
    Tool(
        "text_search",
        "query, scope, labels[], filePrefix, communityId, relationTypes[], also[], limit, cursor",
        "query, scope, items, semanticUsed",
        "You have words, not a name. Two to four rare words find more than a sentence; semantic search is added only "
        "where words alone find little.",
    ),
    Tool(
        "call_trace",
        "fromNodeId, toNodeId?, maxDepth, limitPaths",
        "fromNodeId, toNodeId, maxDepth, paths, pathCount",
        "How does the code get from here to there? Without toNodeId: where do calls from here lead?",
    ),
    Tool("callers_of", "nodeId, limit, cursor", "nodeId, items", "Who calls this? Direct callers only, all of them."),
    Tool("callees_of", "nodeId, limit, cursor", "nodeId, items", "What does this call? Direct callees only."),
    Tool(
        "process_list",
        "limit, cursor",
        "items",
        "Which flows through the code are known? The longest come first; process_get has their steps.",
    ),
    Tool("process_get", "processId", "process, steps", "The steps of one flow, in order, by an id of process_list."),
    Tool(
        "impact_analysis",
        "nodeId, maxDepth",
        "rootNodeId, maxDepth, impactedNodeCount, impactedEdgeCount, impactedNodes, hotspots",
        "What may break when this changes? Follows calls, imports and inheritance backwards; begin with maxDepth 2 and "
        "read hotspots first.",
    ),
    Tool(
        "file_outline",
        "filePath",
        "filePath, symbols, symbolCount",
        "Which symbols does a file hold? Give its path as other answers do (filePath), not a part of it.",
    ),
    Tool(
        "file_snippet",
        "nodeId | filePath, maxChars",
        "node, snippet, maxChars",
        "Read the source of a symbol, or the beginning of a file, as the capsule holds it.",
    ),
    Tool(
        "community_list",
        "limit, cursor",
        "items",
        "Which areas does the code fall into? The largest come first; neighbors_get with MEMBER_OF has the members.",
    ),
    Tool(
        "manifest_get",
        "",
        "schemaVersion, indexSchemaVersion, manifest, capsuleCapabilities, counts",
        "What is in this capsule, from which source, and of when?",
    ),
    Tool(
        "query_explain",
        "task, query",
        "task, query, retrievalLadder, rankingSignals, recommendedToolSequence",
        "Unsure which tool fits a task: say the task in words, and what you would search for as query.",
    ),
)

_LADDER: tuple[tuple[str, str], ...] = (
    (
        "Graph, exact",
        "symbol_lookup, node_get, edge_get, file_outline. Names and ids are facts: when a lookup finds the symbol, "
        "stop searching and go on along its relations.",
    ),
    (
        "Lexical",
        "text_search with the words of the question. Identifiers are split: `user` finds getUserById. Use two to four "
        "rare words, not a sentence.",
    ),
    (
        "Graph expansion",
        "neighbors_get, callers_of, callees_of, call_trace around the best hits. What is connected to several hits is "
        "more likely the answer than a single good text match.",
    ),
    (
        "Semantic",
        "Only when confidence stays low. Treat what it finds as a suggestion and confirm it with node_get and "
        "file_snippet.",
    ),
)

PLAYBOOKS: tuple[Playbook, ...] = (
    Playbook(
        "find-code",
        "Where is this done?",
        "what",
        (
            "symbol_lookup with the likely name; else text_search with the rarest words.",
            "file_snippet of the best hit: does the code do it?",
            "callers_of, to see who relies on it.",
        ),
    ),
    Playbook(
        "follow-flow",
        "How does this work from end to end?",
        "what",
        (
            "process_list, then process_get of the flow whose name fits; its steps are in order.",
            "Without a fitting flow: call_trace from the entry point to the last function.",
            "file_snippet of each step that matters.",
        ),
    ),
    Playbook(
        "assess-change",
        "What breaks if this changes?",
        "symbol",
        (
            "symbol_lookup, and check with node_get that it is the right one of its name.",
            "impact_analysis with maxDepth 2; read hotspots first.",
            "neighbors_get with relationTypes EXTENDS, IMPLEMENTS, METHOD_OVERRIDES for what calls do not show.",
            "edge_get where a relation's confidence is below 0.7 before relying on it.",
        ),
    ),
    Playbook(
        "survey-area",
        "What is in this file or area?",
        "place",
        (
            "file_outline of the path; file_snippet where a name does not say enough.",
            "community_list for the area; neighbors_get with MEMBER_OF for its members.",
        ),
    ),
    Playbook(
        "get-to-know",
        "Getting to know the code base",
        None,
        (
            "manifest_get: source, counts, labels and relation types.",
            "community_list for the areas, process_list for the flows.",
            "file_snippet of the README's File node, then of the entry points of the largest flows.",
        ),
    ),
)

RULES = (
    "Every fact has an id: give the ids and paths that an answer rests on.",
    "A relation's confidence says how sure the analysis was; 1.000 is certain, below 0.700 wants a look at the source.",
    "An answer that was cut says truncated: true and has a cursor that goes on where it stopped; go on or say so.",
    "A node without a snippet had no text in the export, or its lines could not be found: read the file itself.",
    "The graph is the code at one moment (generatedAt in the manifest); check the working copy before changing it.",
)


def guide_pages() -> list[tuple[str, str, str, dict[str, Any]]]:
    """The guide's frames: (last part of the uri, title, text, what its metadata adds)."""
    return [
        ("manifest", "AI bible: how to use this capsule", _overview(), {"pages": [*_PAGES], "toolCount": len(TOOLS)}),
        (
            "tool-matrix",
            "AI bible: tool matrix",
            _tool_matrix(),
            {"toolSetVersion": TOOLSET_VERSION, "tools": [tool.name for tool in TOOLS]},
        ),
        (
            "retrieval-ladder",
            "AI bible: retrieval ladder",
            _ladder(),
            {"ladder": [name for name, _ in _LADDER]},
        ),
        (
            "playbooks/core",
            "AI bible: core playbooks",
            _playbooks(),
            {"playbooks": [playbook.question for playbook in PLAYBOOKS]},
        ),
    ]


_PAGES = ("tool-matrix", "retrieval-ladder", "playbooks/core")


def _overview() -> str:
    lines = [
        f"Agent guide ({AI_BIBLE_VERSION})",
        "",
        "This capsule holds a code graph: symbols, files, communities (areas) and processes (flows) as node frames,",
        "calls, imports, inheritance and membership as relation frames.",
        "",
        "Frames by uri:",
        "mv2://nodes/<id>          symbols, files and folders; track nodes/<Label>, files for File",
        "mv2://communities/<id>    areas of related symbols; track communities",
        "mv2://processes/<id>      flows through the code; track processes",
        "mv2://relations/<id>      relationships; track relations/<TYPE>",
        "mv2://meta/manifest       what this capsule was made from, with counts",
        *(f"mv2://meta/ai-bible/{page}" for page in _PAGES),
        "",
        "The last line of every frame is metadata=<JSON> with all properties.",
        "",
        "Rules:",
        *(f"- {rule}" for rule in RULES),
    ]
    return "\n".join(lines)


def _tool_matrix() -> str:
    lines = [f"Tool matrix ({TOOLSET_VERSION}): {len(TOOLS)} read tools, each also takes a locator", ""]
    for tool in TOOLS:
        lines.append(f"{tool.name}({tool.arguments}) -> {tool.answers}")
        lines.append(f"  {tool.use}")
    return "\n".join(lines)


def _ladder() -> str:
    lines = ["Retrieval ladder: take the first step that answers, climb only while confidence is low", ""]
    for number, (name, text) in enumerate(_LADDER, start=1):
        lines.append(f"{number}. {name}: {text}")
    return "\n".join(lines)


def _playbooks() -> str:
    lines = ["Core playbooks: questions and the calls that answer them"]
    for playbook in PLAYBOOKS:
        lines += ["", playbook.question]
        lines += [f"{number}. {step}" for number, step in enumerate(playbook.steps, start=1)]
    return "\n".join(lines)
