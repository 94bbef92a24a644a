"""``memvid-export mcp``: the read tools over standard input and output; and the MCP inspector, over both transports."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
from jsonschema import Draft202012Validator
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp_calls import CALLS
from processes import COMMAND, EXAMPLE, REPOSITORY, command, serving

from control_plane.reading.mcp import ANSWERS, answer_schema

INSPECTOR = REPOSITORY / ".cache" / "npm" / "node_modules" / ".bin" / "mcp-inspector"
KEY = "test-key"
PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
HELLO = {
    "jsonrpc": "2.0",
    "id": 0,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}},
}


@pytest.fixture(scope="module")
def capsule(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The capsule of the example, as the command makes it."""
    folder = tmp_path_factory.mktemp("capsules")
    done = command("export", EXAMPLE, "--out", folder, "--semantic", env={"SOURCE_DATE_EPOCH": "1767323045"})
    assert done.returncode == 0, done.stderr
    [made] = folder.glob("*.mv2")
    return made


@pytest.fixture
def bare(capsule: Path, tmp_path: Path) -> Path:
    """A capsule without its sidecar and manifest."""
    return Path(shutil.copy(capsule, tmp_path / "bare.mv2"))


def session(capsules: list[Path], use: Callable[[Client], Awaitable[Any]]) -> Any:
    """What ``use`` makes of a session of the official client with the command."""

    async def run() -> Any:
        server = StdioServerParameters(command=str(COMMAND), args=["mcp", *map(str, capsules)])
        async with Client(stdio_client(server)) as client:
            return await use(client)

    return asyncio.run(run())


async def call_all(client: Client) -> dict[str, Any]:
    """The tools that there are, and the answer of each."""
    tools = [tool.name for tool in (await client.list_tools()).tools]
    return {name: await client.call_tool(name, CALLS[name]) for name in tools}


def lines(*messages: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(message).encode() + b"\n" for message in messages)


def answers_are_right(answers: dict[str, dict[str, Any]]) -> None:
    assert set(answers) == set(CALLS)
    assert len(answers) == 16
    for tool, answer in answers.items():
        schema = {"$ref": "#/$defs/Envelope", "$defs": answer_schema(tool)["$defs"]}
        Draft202012Validator(schema).validate(answer)


def test_the_official_client_lists_and_calls_every_tool(capsule: Path) -> None:
    answers = session([capsule], call_all)
    assert not [name for name, answer in answers.items() if answer.is_error]
    answers_are_right({name: answer.structured_content for name, answer in answers.items()})


def test_nothing_but_protocol_is_written_and_the_end_of_input_is_the_end(capsule: Path) -> None:
    call = {"name": "text_search", "arguments": {"query": "shrink numbers so that humans comprehend them quickly"}}
    asked = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call}
    with subprocess.Popen(
        [COMMAND, "mcp", capsule], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(lines(HELLO, {"jsonrpc": "2.0", "method": "notifications/initialized"}, PING, asked))
        process.stdin.flush()
        answers = [json.loads(process.stdout.readline()) for _ in range(3)]
        rest, errors = process.communicate(timeout=30)
    assert {answer["id"] for answer in answers} == {0, 1, 2}
    assert answers[0]["result"]["protocolVersion"] == "2025-06-18"
    assert (rest, errors, process.returncode) == (b"", b"", 0)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_while_it_waits(capsule: Path, number: signal.Signals, status: int) -> None:
    with subprocess.Popen([COMMAND, "mcp", capsule], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(lines(HELLO))
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == 0
        process.send_signal(number)
        assert process.wait(timeout=30) == status  # its input is still open
        assert process.stdout.read() == b""


def test_a_client_that_goes_away_ends_it(capsule: Path) -> None:
    reading, writing = os.pipe()
    with subprocess.Popen([COMMAND, "mcp", capsule], stdin=subprocess.PIPE, stdout=writing) as process:
        os.close(writing)
        assert process.stdin
        process.stdin.write(lines(HELLO))
        process.stdin.flush()
        assert os.read(reading, 1)
        os.close(reading)
        process.stdin.write(lines(PING))
        process.stdin.flush()
        assert process.wait(timeout=30) == 0


def test_a_message_without_an_end_is_refused(capsule: Path) -> None:
    done = command("mcp", capsule, stdin=b'{"jsonrpc": "' + b"a" * (2 << 20))
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"1,048,576 bytes" in done.stderr


@pytest.mark.parametrize("content", [None, b"", b"no capsule" * 1_000])
def test_a_capsule_that_is_missing_or_broken_ends_it_before_it_begins(
    capsule: Path, tmp_path: Path, content: bytes | None
) -> None:
    wrong = tmp_path / "wrong.mv2"
    if content is not None:
        wrong.write_bytes(content)
    done = command("mcp", capsule, wrong, stdin=lines(HELLO))
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"wrong.mv2" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_without_an_input_or_output_it_does_not_begin(capsule: Path, closed: str) -> None:
    line = f'"{COMMAND}" mcp "{capsule}" {closed}'
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"closed" in done.stderr


def test_no_capsule_is_wrong_usage() -> None:
    done = command("mcp")
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_locator_chooses_a_file_by_path_or_name_and_the_first_is_the_default(capsule: Path, bare: Path) -> None:
    async def ask(client: Client) -> list[Any]:
        named = [None, {"capsulePath": bare.name}, {"capsulePath": str(bare)}, {"capsulePath": str(capsule)}]
        wrong = [{"capsulePath": "other.mv2"}, {"capsulePath": "/etc/passwd"}, {"jobId": "a"}]
        answers = []
        for locator in [*named, *wrong]:
            arguments = {} if locator is None else {"locator": locator}
            for _ in range(100):
                answer = await client.call_tool("manifest_get", arguments)
                if not answer.is_error or not answer.structured_content["retryable"]:
                    break
            answers.append(answer)
        page = await client.read_resource(f"mv2://capsules/{bare.name}/meta/ai-bible/tool-matrix")
        assert "symbol_lookup" in page.contents[0].text
        return answers

    found = session([capsule, bare], ask)
    assert [answer.is_error for answer in found] == [False] * 4 + [True] * 3
    assert {answer.structured_content["code"] for answer in found[4:]} == {"NOT_FOUND"}
    assert len({json.dumps(answer.structured_content["result"]) for answer in found[:4]}) == 1


def test_a_capsule_that_breaks_later_is_the_error_of_a_tool(bare: Path) -> None:
    async def ask(client: Client) -> Any:
        bare.unlink()
        return await client.call_tool("node_get", CALLS["node_get"])

    answer = session([bare], ask)
    assert answer.is_error
    Draft202012Validator({"$ref": "#/$defs/Error", "$defs": ANSWERS["$defs"]}).validate(answer.structured_content)
    assert answer.structured_content["code"] == "CAPSULE_INCOMPATIBLE"


# --- the inspector, and HTTP ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with an export of the example."""
    root = tmp_path_factory.mktemp("server") / "root"
    root.mkdir()
    with serving(root, key=KEY) as found:
        done = command("submit", EXAMPLE, "--url", found, "--wait", "--out", root, env={"MEMVID_EXPORT_API_KEY": KEY})
        assert done.returncode == 0, done.stderr
        yield f"{found}/mcp"


def test_the_official_client_lists_and_calls_every_tool_of_a_server(url: str) -> None:
    async def run() -> dict[str, Any]:
        http = httpx2.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        async with http, Client(streamable_http_client(url, http_client=http)) as client:
            return await call_all(client)

    answers_are_right({name: answer.structured_content for name, answer in asyncio.run(run()).items()})
    assert int(httpx.post(url, headers={"Authorization": f"Bearer {KEY}"}).headers["x-ratelimit-limit"]) == 8_000


def inspect(target: list[object], method: str, *arguments: object) -> dict[str, Any]:
    """What one run of the inspector prints."""
    if not INSPECTOR.exists():
        raise FileNotFoundError("The MCP inspector is not installed; run scripts/setup npm")
    done = subprocess.run(
        [str(word) for word in (INSPECTOR, "--cli", *target, "--method", method, *arguments)],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_the_inspector_lists_and_calls_every_tool(
    transport: str, capsule: Path, request: pytest.FixtureRequest
) -> None:
    target: list[object] = [COMMAND, "mcp", capsule]
    header: list[object] = []
    if transport == "http":
        target, header = [request.getfixturevalue("url")], ["--header", f"Authorization: Bearer {KEY}"]
    # `--strict` fails for a schema that some clients cannot read.
    tools = [tool["name"] for tool in inspect(target, "tools/list", "--strict", *header)["tools"]]

    def call(tool: str) -> dict[str, Any]:
        given = [f"{name}={value}" for name, value in CALLS[tool].items()]
        arguments = ["--tool-arg", *given] if given else []
        answer = inspect(target, "tools/call", "--tool-name", tool, *arguments, *header)
        assert not answer["isError"]
        return dict(answer["structuredContent"])

    with ThreadPoolExecutor(2) as several:
        answers_are_right(dict(zip(tools, several.map(call, tools), strict=True)))
    assert len(inspect(target, "resources/list", *header)["resources"]) == 5
    assert len(inspect(target, "prompts/list", *header)["prompts"]) >= 4
