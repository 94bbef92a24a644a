"""The read tools as a protocol: schemas, resources, prompts, limits, and what HTTP has to say."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from mcp.client import Client
from mcp.shared.exceptions import MCPError
from mcp_calls import CALLS, CLASS
from mcp_server import GRAPHS, KEY, Exports, McpServer, write_capsule
from mcp_types import INVALID_PARAMS

from common.frames.guide import PLAYBOOKS, TOOLS, guide_pages
from control_plane.operations.limits import TokenBuckets
from control_plane.operations.origins import Origins
from control_plane.reading.mcp import ANSWERS, answer_schema

EXAMPLE = GRAPHS[0]
HEADERS = {
    "Authorization": f"Bearer {KEY}",
    "Accept": "application/json, text/event-stream",
    "Content-Type": "application/json",
}
FREE = {"metadata", "manifest", "capsuleCapabilities"}
"""Objects whose keys are those of the graph or of another version."""
PING = {"jsonrpc": "2.0", "id": 7, "method": "ping"}


@pytest.fixture(scope="module")
def capsule(real_graphs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_capsule(real_graphs[EXAMPLE], tmp_path_factory.mktemp("protocol") / "graph.mv2", vectors=True)


@pytest.fixture(scope="module")
def exports(capsule: Path) -> Exports:
    found = Exports()
    found.add("older", capsule.as_uri())
    found.add("newest", capsule.as_uri())
    return found


@pytest.fixture(scope="module")
def server(capsule: Path, exports: Exports) -> Iterator[McpServer]:
    with McpServer(capsule.parent, exports) as running:
        yield running


def whole_schema(tool: str) -> dict[str, Any]:
    """The envelope with the result of one tool, and nothing else that may be answered."""
    schema = answer_schema(tool)
    return {"$ref": "#/$defs/Envelope", "$defs": schema["$defs"]}


def refused(server: McpServer, use: Callable[[Client], Awaitable[Any]]) -> MCPError:
    """The protocol error that the official client raises."""

    async def run(client: Client) -> MCPError:
        with pytest.raises(MCPError) as caught:
            await use(client)
        return caught.value

    return server.session(run)


# --- schemas ----------------------------------------------------------------------------------------


def test_every_tool_says_what_it_takes_and_what_it_answers(server: McpServer) -> None:
    listed = {tool.name: tool for tool in server.tools()}
    assert list(listed) == [tool.name for tool in TOOLS]
    assert len(listed) == 16
    for tool in listed.values():
        assert len(tool.description) > 40
        Draft202012Validator.check_schema(tool.input_schema)
        Draft202012Validator.check_schema(tool.output_schema)
        assert tool.input_schema["additionalProperties"] is False
        assert all(argument["description"] for argument in tool.input_schema["properties"].values())
        assert tool.output_schema["type"] == "object"


def test_the_guide_names_the_arguments_that_a_tool_takes(server: McpServer) -> None:
    said = {tool.name: tool.arguments for tool in TOOLS}
    for tool in server.tools():
        words = {word.strip(" ?[]") for word in said[tool.name].replace("|", ",").split(",")} - {""}
        taken = set(tool.input_schema["properties"]) - {"locator", "cursor"}
        assert words - {"cursor"} <= taken, tool.name
        assert set(tool.input_schema["required"]) <= words


def test_the_schemas_let_nothing_through_that_they_do_not_name() -> None:
    def objects(schema: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(schema, dict):
            if schema.get("type") == "object":
                yield name, schema
            for key, value in schema.items():
                yield from objects(value, name if key in ("items", "anyOf", "properties") else key)
        elif isinstance(schema, list):
            for value in schema:
                yield from objects(value, name)

    found = list(objects(ANSWERS["$defs"], ""))
    assert len(found) > 30
    for name, schema in found:
        if name == "result":  # of the envelope: each tool puts its own in this place
            continue
        assert schema["additionalProperties"] is (name in FREE), name


@pytest.mark.parametrize("tool", CALLS)
def test_an_answer_keeps_to_its_schema_and_to_no_other(server: McpServer, tool: str) -> None:
    answer = server.ask(tool, **CALLS[tool])
    validator = Draft202012Validator(whole_schema(tool))
    validator.validate(answer)
    Draft202012Validator(ANSWERS["$defs"]["Envelope"] | {"$defs": ANSWERS["$defs"]}).validate(answer)
    assert any(answer["result"].values())
    for spoilt in (
        {**answer, "more": 1},
        {**answer, "result": {**answer["result"], "more": 1}},
        {**answer, "tool": "other"},
        {key: value for key, value in answer.items() if key != "traceId"},
    ):
        assert not validator.is_valid(spoilt)


def test_answers_that_are_empty_or_cut_keep_to_their_schemas(
    capsule: Path, exports: Exports, server: McpServer
) -> None:
    empty: list[tuple[str, dict[str, Any]]] = [
        ("symbol_lookup", {"query": ""}),
        ("text_search", {"query": "zzzzqqq"}),
        ("text_search", {"query": ""}),
        ("callers_of", {"nodeId": "File:common/progress.py"}),
        ("callees_of", {"nodeId": "File:common/progress.py"}),
        ("call_trace", {"fromNodeId": CLASS, "toNodeId": "File:common/progress.py"}),
        ("neighbors_get", {"nodeId": CLASS, "relationTypes": ["NONE"]}),
        ("impact_analysis", {"nodeId": "Function:scripts/bench:nothing"}),
        ("query_explain", {"task": ""}),
    ]
    for (tool, _), answer in zip(empty, server.call_all(empty), strict=True):
        schema = {"$ref": "#/$defs/Error", "$defs": ANSWERS["$defs"]} if answer.is_error else whole_schema(tool)
        Draft202012Validator(schema).validate(answer.structured_content)
    cut = {
        "symbol_lookup": {"query": "report", "limit": 200},
        "neighbors_get": {"nodeId": "Class:common/contract.py:Wire", "limit": 200},
        "text_search": {"query": "capsule", "limit": 200},
        "impact_analysis": {"nodeId": "Class:common/contract.py:Wire", "maxDepth": 5},
        "file_snippet": {"nodeId": CLASS, "maxChars": 80},
        "file_outline": {"filePath": "common/contract.py"},
        "process_list": {"limit": 200},
        "community_list": {"limit": 200},
        "manifest_get": {},
    }
    with McpServer(capsule.parent, exports, response_budget_bytes=4_096) as tight:
        for tool, arguments in cut.items():
            answer = tight.ask(tool, **arguments)
            Draft202012Validator(whole_schema(tool)).validate(answer)
            assert answer["pagination"]["truncated"] or tool == "manifest_get", tool


@pytest.mark.parametrize(
    ("tool", "arguments", "code"),
    [
        ("node_get", {"nodeId": "nowhere"}, "NOT_FOUND"),
        ("node_get", {}, "INVALID_ARGUMENT"),
        ("symbol_lookup", {"query": "a", "cursor": "!"}, "INVALID_ARGUMENT"),
        ("manifest_get", {"locator": {"jobId": "nobody"}}, "NOT_FOUND"),
        ("manifest_get", {"locator": {"capsulePath": "broken.mv2"}}, "CAPSULE_INCOMPATIBLE"),
        ("no_such_tool", {}, "INVALID_ARGUMENT"),
    ],
)
def test_an_error_keeps_to_its_schema(
    server: McpServer, capsule: Path, tool: str, arguments: dict[str, Any], code: str
) -> None:
    capsule.with_name("broken.mv2").write_bytes(b"not a capsule" * 100)
    error = server.fail(tool, **arguments)
    Draft202012Validator({"$ref": "#/$defs/Error", "$defs": ANSWERS["$defs"]}).validate(error)
    assert error["code"] == code
    if tool in CALLS:  # a client that holds errors against the tool's schema, as the TypeScript one does, takes them
        Draft202012Validator(answer_schema(tool)).validate(error)


# --- resources and prompts --------------------------------------------------------------------------


def test_the_manifest_and_the_guide_are_resources(server: McpServer) -> None:
    async def read_all(client: Client) -> dict[str, Any]:
        listed = (await client.list_resources()).resources
        return {item.uri: (item, (await client.read_resource(item.uri)).contents[0]) for item in listed}

    found = server.session(read_all)
    pages = {f"mv2://meta/ai-bible/{page}": text for page, _, text, _ in guide_pages()}
    assert set(found) == {"mv2://meta/manifest", *pages}
    for uri, (listed, content) in found.items():
        assert listed.mime_type == content.mime_type
        assert content.uri == uri
        if uri in pages:
            assert content.text == pages[uri]
    manifest = json.loads(found["mv2://meta/manifest"][1].text)
    assert manifest["totals"]["exportedNodeFrames"] > 100


def test_a_template_names_the_export_or_the_file(server: McpServer) -> None:
    async def read(client: Client) -> tuple[list[str], list[str]]:
        templates = [it.uri_template for it in (await client.list_resource_templates()).resource_templates]
        filled = [
            it.replace("{jobId}", "older").replace("{capsulePath}", "graph.mv2").replace("{+page}", "playbooks/core")
            for it in templates
        ]
        return templates, [(await client.read_resource(uri)).contents[0].text for uri in filled]

    templates, texts = server.session(read)
    assert len(templates) == 4
    assert texts[0] == texts[2]
    assert json.loads(texts[0])["totals"]
    assert texts[1] == texts[3]
    assert PLAYBOOKS[0].question in texts[1]


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("mv2://meta/nothing", "NOT_FOUND"),
        ("mv2://exports/nobody/meta/manifest", "NOT_FOUND"),
        ("mv2://capsules/none.mv2/meta/manifest", "NOT_FOUND"),
        ("mv2://capsules/..%2F..%2Fx.mv2/meta/manifest", "INVALID_ARGUMENT"),
        ("mv2://nodes/a", "INVALID_ARGUMENT"),
        ("file:///etc/passwd", "INVALID_ARGUMENT"),
    ],
)
def test_a_resource_that_there_is_not_is_a_protocol_error(server: McpServer, uri: str, code: str) -> None:
    error = refused(server, lambda client: client.read_resource(uri))
    assert (error.code, error.data["code"]) == (INVALID_PARAMS, code)
    assert error.data["field"]


def test_each_playbook_is_a_prompt(server: McpServer) -> None:
    async def play(client: Client) -> list[tuple[Any, str]]:
        prompts = (await client.list_prompts()).prompts
        given = [{argument.name: "Parser.parse" for argument in prompt.arguments} for prompt in prompts]
        return [
            (prompt, (await client.get_prompt(prompt.name, arguments)).messages[0].content.text)
            for prompt, arguments in zip(prompts, given, strict=True)
        ]

    played = server.session(play)
    assert len(played) == len(PLAYBOOKS) >= 4
    for playbook, (prompt, text) in zip(PLAYBOOKS, played, strict=True):
        assert (prompt.name, prompt.title) == (playbook.name, playbook.question)
        assert all(step in text for step in playbook.steps)
        assert ("Parser.parse" in text) == bool(prompt.arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "field"),
    [
        ("no-such-prompt", {}, "name"),
        ("assess-change", {}, "arguments.symbol"),
        ("assess-change", {"symbol": " "}, "arguments.symbol"),
        ("assess-change", {"symbol": "a" * 3_000}, "arguments.symbol"),
        ("assess-change", {"symbol": "a", "other": "b"}, "arguments"),
    ],
)
def test_a_prompt_asked_for_wrongly_names_the_field(
    server: McpServer, name: str, arguments: dict[str, str], field: str
) -> None:
    error = refused(server, lambda client: client.get_prompt(name, arguments))
    assert (error.code, error.data["field"]) == (INVALID_PARAMS, field)


# --- HTTP -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changed", "content", "status", "code"),
    [
        ("GET", {"Accept": "text/event-stream"}, None, 405, "METHOD_NOT_ALLOWED"),
        ("DELETE", {}, None, 405, "METHOD_NOT_ALLOWED"),
        ("POST", {"Content-Type": "text/plain"}, b"{}", 415, "UNSUPPORTED_MEDIA_TYPE"),
        ("POST", {"Accept": "text/html"}, b"{}", 406, "NOT_ACCEPTABLE"),
        ("POST", {}, b" " * (1 << 20) + b"{}", 413, "PAYLOAD_TOO_LARGE"),
        ("POST", {"Origin": "http://evil.example"}, b"{}", 403, "ORIGIN_REFUSED"),
        ("POST", {"Origin": "null"}, b"{}", 403, "ORIGIN_REFUSED"),
        ("POST", {"Host": "evil.example"}, b"{}", 421, "HOST_REFUSED"),
        ("POST", {"Host": "evil.example", "Origin": "http://evil.example"}, b"{}", 421, "HOST_REFUSED"),
        ("POST", {"Authorization": "Bearer wrong"}, b"{}", 401, "UNAUTHORIZED"),
    ],
)
def test_a_request_that_is_wrong_as_http_is_answered_like_any_other(
    server: McpServer, method: str, changed: dict[str, str], content: bytes | None, status: int, code: str
) -> None:
    answer = httpx.request(method, server.url, headers={**HEADERS, **changed}, content=content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["message"]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get("allow") == ("POST" if status == 405 else None)


def test_a_body_without_a_length_is_bounded_too(server: McpServer) -> None:
    pieces = (b" " * 65_536 for _ in range(20))
    answer = httpx.post(server.url, headers=HEADERS, content=pieces)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")


def test_a_page_of_this_server_may_ask(server: McpServer) -> None:
    origin = server.url.removesuffix("/mcp")
    local = origin.replace("127.0.0.1", "localhost")
    for headers in ({"Origin": origin}, {"Origin": local, "Host": local.removeprefix("http://")}, {}):
        answer = httpx.post(server.url, headers={**HEADERS, **headers}, json=PING)
        assert (answer.status_code, answer.json()["id"]) == (200, 7)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"jsonrpc":"2.0"}', b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]']
)
def test_what_is_no_message_is_a_json_rpc_error(server: McpServer, body: bytes) -> None:
    for version in ({}, {"MCP-Protocol-Version": "2025-06-18"}, {"MCP-Protocol-Version": "2026-07-28"}):
        answer = httpx.post(server.url, headers={**HEADERS, **version}, content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] in (-32700, -32600, -32602)


@pytest.mark.parametrize("version", ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"])
def test_the_version_that_a_client_asks_for_is_spoken(server: McpServer, version: str) -> None:
    params = {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
    result = httpx.post(server.url, headers=HEADERS, json=message).json()["result"]
    assert result["protocolVersion"] == version
    assert {"tools", "resources", "prompts"} <= set(result["capabilities"])
    call = {"name": "manifest_get", "arguments": {}}
    asked = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call}
    answer = httpx.post(server.url, headers={**HEADERS, "MCP-Protocol-Version": version}, json=asked)
    assert not answer.json()["result"]["isError"]


def test_a_version_that_nobody_knows_is_refused_and_one_is_offered(server: McpServer) -> None:
    params = {"protocolVersion": "1999-01-01", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
    offered = httpx.post(server.url, headers=HEADERS, json=message).json()["result"]["protocolVersion"]
    assert offered == "2025-11-25"
    answer = httpx.post(server.url, headers={**HEADERS, "MCP-Protocol-Version": "1999-01-01"}, json=PING)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"]


# --- how often --------------------------------------------------------------------------------------


@pytest.fixture
def strict(capsule: Path, exports: Exports) -> Iterator[McpServer]:
    """A server that answers six requests, and then one a minute."""
    with McpServer(capsule.parent, exports, buckets=TokenBuckets(per_minute=1, burst=6)) as running:
        yield running


def test_every_answer_says_how_often_one_may_still_ask(strict: McpServer) -> None:
    answers = [httpx.post(strict.url, headers=HEADERS, json=PING) for _ in range(3)]
    answers.append(httpx.get(strict.url, headers=HEADERS))
    assert [answer.headers["x-ratelimit-limit"] for answer in answers] == ["6"] * 4
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["5", "4", "3", "2"]
    resets = [int(answer.headers["x-ratelimit-reset"]) for answer in answers]
    assert resets == sorted(resets)
    assert 0 < resets[0] <= 60


def test_one_request_too_many_is_refused_in_a_form_that_clients_read(strict: McpServer) -> None:
    for _ in range(6):
        assert httpx.post(strict.url, headers=HEADERS, json=PING).status_code == 200
    call = {"jsonrpc": "2.0", "id": "x", "method": "tools/call", "params": {"name": "manifest_get", "arguments": {}}}
    answer = httpx.post(strict.url, headers=HEADERS, json=call)
    assert answer.status_code == 429
    assert 0 < int(answer.headers["retry-after"]) <= 60
    assert answer.headers["x-ratelimit-remaining"] == "0"
    body = answer.json()
    assert (body["jsonrpc"], body["id"]) == ("2.0", "x")
    Draft202012Validator({"$ref": "#/$defs/Error", "$defs": ANSWERS["$defs"]}).validate(body["error"]["data"])
    assert (body["error"]["data"]["code"], body["error"]["data"]["retryable"]) == ("RATE_LIMITED", True)


def test_one_request_too_many_is_refused_whatever_it_says(strict: McpServer) -> None:
    for _ in range(6):
        assert httpx.post(strict.url, headers=HEADERS, json=PING).status_code == 200
    answer = httpx.post(strict.url, headers=HEADERS, content=b'{"jsonrpc": "2.0", "id": "\xff", "method": "ping"}')
    assert (answer.status_code, answer.json()["id"]) == (429, None)


def test_the_official_client_is_told_that_it_asks_too_often(strict: McpServer) -> None:
    async def ask_on(client: Client) -> None:
        for _ in range(10):
            await client.call_tool("manifest_get", {})

    error = refused(strict, ask_on)
    assert (error.data["code"], error.data["retryable"]) == ("RATE_LIMITED", True)


def test_pages_of_allowed_origins_may_ask(capsule: Path, exports: Exports) -> None:
    with McpServer(capsule.parent, exports, origins=Origins(any_host=False, known=["https://app.example"])) as running:
        for origin, status in (("https://app.example", 200), ("http://app.example", 403), ("https://b.example", 403)):
            answer = httpx.post(running.url, headers={**HEADERS, "Origin": origin}, json=PING)
            assert answer.status_code == status, origin
