"""The read tools as a server of the Model Context Protocol, whatever carries its messages."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import mcp_types
import msgspec
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server

from common.frames.guide import TOOLS
from control_plane.reading.reader import Reader
from control_plane.reading.tools import REGISTRY, Arguments


def mcp_server(reader: Reader) -> Server[Any]:
    """A server whose tools ``reader`` answers."""

    async def call(
        _context: ServerRequestContext[Any], params: mcp_types.CallToolRequestParams
    ) -> mcp_types.CallToolResult:
        body, is_error = await reader.ask(params.name, params.arguments or {})
        return mcp_types.CallToolResult(
            content=[mcp_types.TextContent(type="text", text=body.decode())],
            structured_content=msgspec.json.decode(body),
            is_error=is_error,
        )

    return Server(
        "memvid-export",
        version=version("memvid-export"),
        instructions="Reads code graphs from Memvid capsules. Start with symbol_lookup or text_search.",
        on_list_tools=_list_tools,
        on_call_tool=call,
    )


def _schema(arguments: type[Arguments]) -> dict[str, Any]:
    (reference,), definitions = msgspec.json.schema_components([arguments], ref_template="#/$defs/{name}")
    own = dict(definitions.pop(reference["$ref"].rpartition("/")[2]))
    return {**own, "$defs": definitions}


_TOOLS = [
    mcp_types.Tool(
        name=tool.name,
        description=f"{tool.use} Answers {tool.answers}.",
        input_schema=_schema(REGISTRY[tool.name][0]),
        annotations=mcp_types.ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False),
    )
    for tool in TOOLS
]


async def _list_tools(
    _context: ServerRequestContext[Any], _params: mcp_types.PaginatedRequestParams | None
) -> mcp_types.ListToolsResult:
    return mcp_types.ListToolsResult(tools=_TOOLS)
