"""The read tools of a running server, asked by the official client about an export that it made."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import httpx2
import pytest
from live_server import KEY, Server, graph
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client


def ask(server: Server, tool: str, **arguments: Any) -> dict[str, Any]:
    """The envelope of one answer."""

    async def run() -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with (
            httpx2.AsyncClient(headers=headers, timeout=30) as http,
            Client(streamable_http_client(f"{server.url}/mcp", http_client=http)) as client,
        ):
            assert len((await client.list_tools()).tools) == 16
            result = await client.call_tool(tool, arguments)
            answer: dict[str, Any] = json.loads(result.content[0].text)  # type: ignore[union-attr]
            return answer

    return asyncio.run(run())


@pytest.fixture(scope="module")
def job(server: Server) -> str:
    """A finished export."""
    job_id = server.submit(graph(4, name="tools"))
    assert server.wait(job_id)["type"] == "job_completed"
    return job_id


def test_an_export_answers_read_tools_by_its_job_id(server: Server, job: str) -> None:
    found = ask(server, "symbol_lookup", query="call_2", locator={"jobId": job})
    assert next(item["name"] for item in found["result"]["items"]) == "call_2"
    node = found["result"]["items"][0]["id"]
    callees = ask(server, "callees_of", nodeId=node, locator={"jobId": job})
    assert [item["name"] for item in callees["result"]["items"]] == ["call_3"]
    manifest = ask(server, "manifest_get", locator={"jobId": job})
    assert manifest["result"]["counts"]["nodes"] == 4


def test_the_read_tools_want_the_key(server: Server, job: str) -> None:
    answer = httpx.post(f"{server.url}/mcp", json={"jsonrpc": "2.0", "id": 1, "method": "tools/list"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "UNAUTHORIZED")
