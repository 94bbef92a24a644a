"""The read tools as a server of the Model Context Protocol, whatever carries its messages: tools with schemas of what
they take and answer, the documents of capsules as resources, the playbooks of the guide as prompts."""

from __future__ import annotations

import copy
import re
import uuid
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import mcp_types
import msgspec
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.shared.exceptions import MCPError

from common.errors import ExportError, InvalidRequest
from common.frames.guide import PLAYBOOKS, RULES, TOOLS, Playbook, guide_pages
from control_plane.operations.keys import Caller
from control_plane.reading.inspect import META_URI
from control_plane.reading.reader import Reader, error_body
from control_plane.reading.tools import REGISTRY, Arguments, Locator, NotFound

ANSWERS: dict[str, Any] = msgspec.json.decode((Path(__file__).parent / "answers.json").read_bytes())
"""JSON Schema of every answer: the envelope, the result of each tool, the body of errors."""
MAX_ABOUT = 2_000
"""Characters that an argument of a prompt may have."""
_GUIDE = "mv2://meta/ai-bible/"
_URI = re.compile(r"mv2://(?:(?P<kind>exports|capsules)/(?P<name>[^/]+)/)?(?P<document>meta/.+)", re.DOTALL)
_INSTRUCTIONS = (
    "Answers questions about a code base from its code graph, kept in a Memvid capsule. Start with symbol_lookup where "
    "you have a name, with text_search where you have words; ids in answers go into the other tools. A cut answer says "
    "truncated: true and has a cursor; a low confidence asks for a second look. query_explain proposes tools for a "
    f"task; the resource {_GUIDE}retrieval-ladder says in which order to use them."
)
_ARGUMENTS = {
    "locator": "Which capsule to read; without it the newest completed export, or the first file.",
    "jobId": "Of a completed export.",
    "capsulePath": "A .mv2 file, by its path or its file name.",
    "cursor": "nextCursor of the answer to the same question, to go on where it was cut.",
    "limit": "How many items to answer with at most.",
    "query": "A name, a part of one, or words.",
    "nodeId": "The id of a node, as answers have it.",
    "direction": "Relationships that lead to the node (in), away from it (out), or both.",
    "relationTypes": "Only relationships of these types, such as CALLS, IMPORTS, EXTENDS; in text_search only nodes "
    "that have one.",
    "edgeId": "The id of a relationship, as neighbors_get has it.",
    "scope": "Which kinds of nodes to search.",
    "labels": "Only nodes of these labels, such as Function, Class, Method.",
    "filePrefix": "Only nodes in files whose path starts so.",
    "communityId": "Only members of this community, by an id of community_list.",
    "also": "More capsules to search together with the one that locator names.",
    "fromNodeId": "Where calls start.",
    "toNodeId": "Where they should lead.",
    "maxDepth": "How many steps to follow.",
    "limitPaths": "How many paths to answer with at most.",
    "processId": "The id of a process, as process_list has it.",
    "filePath": "A whole path, as answers have it.",
    "maxChars": "How much of the source to answer with.",
    "task": "What is to be done, in words.",
}


def mcp_server(
    reader: Reader, caller_of: Callable[[ServerRequestContext[Any]], Caller], *, exports: bool = True
) -> Server[Any]:
    """A server over ``reader``, which knows ``exports``, or files alone; ``caller_of`` says who sent a request."""

    async def call(
        context: ServerRequestContext[Any], params: mcp_types.CallToolRequestParams
    ) -> mcp_types.CallToolResult:
        body, is_error = await reader.ask(params.name, params.arguments or {}, caller_of(context))
        return mcp_types.CallToolResult(
            content=[mcp_types.TextContent(type="text", text=body.decode())],
            structured_content=msgspec.json.decode(body),
            is_error=is_error,
        )

    async def list_templates(
        _context: ServerRequestContext[Any], _params: mcp_types.PaginatedRequestParams | None
    ) -> mcp_types.ListResourceTemplatesResult:
        return mcp_types.ListResourceTemplatesResult(resource_templates=_templates(exports=exports))

    async def read(
        context: ServerRequestContext[Any], params: mcp_types.ReadResourceRequestParams
    ) -> mcp_types.ReadResourceResult:
        try:
            uri, locator = _document(params.uri)
            text = await reader.document(uri, locator, caller_of(context))
        except ExportError as error:
            raise _protocol_error(error) from error
        found = mcp_types.TextResourceContents(uri=params.uri, mime_type=_mime_type(uri), text=text)
        return mcp_types.ReadResourceResult(contents=[found])

    return Server(
        "memvid-export",
        version=version("memvid-export"),
        title="Code graphs in Memvid capsules",
        instructions=_INSTRUCTIONS,
        get_tool_input_schema=_INPUTS.get,
        on_list_tools=_list_tools,
        on_call_tool=call,
        on_list_resources=_list_resources,
        on_list_resource_templates=list_templates,
        on_read_resource=read,
        on_list_prompts=_list_prompts,
        on_get_prompt=_get_prompt,
    )


def _protocol_error(error: ExportError) -> MCPError:
    """An error of a request that is no tool's: the body of a tool's error, and the field that is wrong."""
    wrong = isinstance(error, InvalidRequest | NotFound)
    data = msgspec.json.decode(error_body(error, uuid.uuid4().hex))
    if field := error.details.get("field"):
        data["field"] = field
    return MCPError(mcp_types.INVALID_PARAMS if wrong else mcp_types.INTERNAL_ERROR, error.message, data)


# --- tools ---


def answer_schema(tool: str) -> dict[str, Any]:
    """The JSON Schema of what one tool answers, the envelope with its result or an error; refers to nothing outside.

    Errors are part of it because the TypeScript client holds the structured content of errors against it too.
    """
    envelope = copy.deepcopy(ANSWERS["$defs"]["Envelope"])
    envelope["properties"]["tool"] = {"const": tool}
    envelope["properties"]["result"] = {"$ref": f"#/$defs/Result.{tool}"}
    schema = {"type": "object", "oneOf": [{"$ref": "#/$defs/Envelope"}, {"$ref": "#/$defs/Error"}]}
    needed: dict[str, Any] = {"Envelope": envelope}
    _collect(envelope, needed)
    _collect(schema, needed)
    return {**schema, "$defs": needed}


def _collect(schema: Any, found: dict[str, Any]) -> None:
    """Add the definitions that a schema refers to."""
    for name in _references(schema):
        if name not in found:
            found[name] = ANSWERS["$defs"][name]
            _collect(found[name], found)


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(reference := schema.get("$ref"), str):
            yield reference.rpartition("/")[2]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _input_schema(arguments: type[Arguments]) -> dict[str, Any]:
    (reference,), definitions = msgspec.json.schema_components([arguments], ref_template="#/$defs/{name}")
    own = definitions.pop(reference["$ref"].rpartition("/")[2])
    for schema in (own, *definitions.values()):
        for name, argument in schema["properties"].items():
            argument["description"] = _ARGUMENTS[name]
    return {key: own[key] for key in ("type", "properties", "required", "additionalProperties")} | {
        "$defs": definitions
    }


_INPUTS = {name: _input_schema(arguments) for name, (arguments, _) in REGISTRY.items()}
_TOOLS = [
    mcp_types.Tool(
        name=tool.name,
        description=f"{tool.use} Answers {tool.answers}.",
        input_schema=_INPUTS[tool.name],
        output_schema=answer_schema(tool.name),
        annotations=mcp_types.ToolAnnotations(
            read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False
        ),
    )
    for tool in TOOLS
]


async def _list_tools(
    _context: ServerRequestContext[Any], _params: mcp_types.PaginatedRequestParams | None
) -> mcp_types.ListToolsResult:
    return mcp_types.ListToolsResult(tools=_TOOLS)


# --- resources ---

_PAGES = {f"{_GUIDE}{page}": title for page, title, _, _ in guide_pages()}
_RESOURCES = [
    mcp_types.Resource(
        uri=META_URI,
        name="manifest",
        title="Manifest",
        description="What the capsule was made from, with counts.",
        mime_type="application/json",
    ),
    *(
        mcp_types.Resource(uri=uri, name=uri.removeprefix("mv2://meta/"), title=title, mime_type="text/plain")
        for uri, title in _PAGES.items()
    ),
]


async def _list_resources(
    _context: ServerRequestContext[Any], _params: mcp_types.PaginatedRequestParams | None
) -> mcp_types.ListResourcesResult:
    return mcp_types.ListResourcesResult(resources=_RESOURCES)


def _templates(*, exports: bool) -> list[mcp_types.ResourceTemplate]:
    kinds = [("exports/{jobId}", "a completed export")] if exports else []
    kinds.append(("capsules/{capsulePath}", "a capsule file, its path percent-encoded"))
    templates = []
    for place, what in kinds:
        templates += [
            mcp_types.ResourceTemplate(
                uri_template=f"mv2://{place}/meta/manifest",
                name=f"manifest of {place.partition('/')[0]}",
                description=f"The manifest of {what}.",
                mime_type="application/json",
            ),
            mcp_types.ResourceTemplate(
                uri_template=f"mv2://{place}/meta/ai-bible/{{+page}}",
                name=f"guide of {place.partition('/')[0]}",
                description=f"A page of the agent guide in {what}: "
                f"{', '.join(uri.removeprefix(_GUIDE) for uri in _PAGES)}.",
                mime_type="text/plain",
            ),
        ]
    return templates


def _document(uri: str) -> tuple[str, Locator | None]:
    """The uri of a document in its capsule, and which capsule that is."""
    found = _URI.fullmatch(uri)
    if found is None or len(uri) > 20_000:
        raise InvalidRequest("uri: not one of resources/list or resources/templates/list", field="uri")
    locator = None
    if found["kind"] == "exports":
        locator = Locator(job_id=unquote(found["name"]))
    elif found["kind"] == "capsules":
        locator = Locator(capsule_path=unquote(found["name"]))
    return f"mv2://{found['document']}", locator


def _mime_type(uri: str) -> str:
    return "application/json" if uri == META_URI else "text/plain"


# --- prompts ---


def _prompt(playbook: Playbook) -> mcp_types.Prompt:
    about = playbook.about
    arguments = []
    if about is not None:
        arguments = [mcp_types.PromptArgument(name=about, description=_ABOUT[about], required=True)]
    return mcp_types.Prompt(
        name=playbook.name,
        title=playbook.question,
        description=f"{playbook.question} The calls that answer this, in order.",
        arguments=arguments,
    )


_ABOUT = {
    "what": "What you look for, in a few words or as a name.",
    "symbol": "The function, method or class that is to change.",
    "place": "The path of a file, or the name of an area.",
}
_PROMPTS = [_prompt(playbook) for playbook in PLAYBOOKS]


async def _list_prompts(
    _context: ServerRequestContext[Any], _params: mcp_types.PaginatedRequestParams | None
) -> mcp_types.ListPromptsResult:
    return mcp_types.ListPromptsResult(prompts=_PROMPTS)


async def _get_prompt(
    _context: ServerRequestContext[Any], params: mcp_types.GetPromptRequestParams
) -> mcp_types.GetPromptResult:
    try:
        playbook = next((playbook for playbook in PLAYBOOKS if playbook.name == params.name), None)
        if playbook is None:
            raise InvalidRequest(f"name: there is no prompt {params.name[:100]}", field="name")
        text = _played(playbook, params.arguments or {})
    except ExportError as error:
        raise _protocol_error(error) from error
    content = mcp_types.TextContent(type="text", text=text)
    message = mcp_types.PromptMessage(role="user", content=content)
    return mcp_types.GetPromptResult(description=playbook.question, messages=[message])


def _played(playbook: Playbook, given: dict[str, str]) -> str:
    lines = [playbook.question]
    for name in given:
        if name != playbook.about:
            raise InvalidRequest(f"arguments.{name[:100]}: no argument of this prompt", field="arguments")
    if playbook.about is not None:
        field = f"arguments.{playbook.about}"
        value = given.get(playbook.about, "").strip()
        if not value or len(value) > MAX_ABOUT:
            raise InvalidRequest(f"{field}: a text of 1 to {MAX_ABOUT:,} characters is needed", field=field)
        lines.append(f"{playbook.about}: {value}")
    lines += ["", "Find the answer in the code graph, with the read tools of this server:"]
    lines += [f"{number}. {step}" for number, step in enumerate(playbook.steps, start=1)]
    lines += ["", "Rules:", *(f"- {rule}" for rule in RULES)]
    return "\n".join(lines)
