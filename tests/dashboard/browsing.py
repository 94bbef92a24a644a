"""What a person does with the page, and the graphs they bring."""

from __future__ import annotations

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Locator, Page, expect
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from processes import EXAMPLE, REPOSITORY

KEY = "correct-horse-battery"
SHOTS = REPOSITORY / ".artifacts" / "dashboard"
DONE = 90_000  # milliseconds until an export must be done
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True}


class Seen:
    """What the page did behind its back."""

    def __init__(self, page: Page) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda m: self.errors.append(m.text) if "Content Security Policy" in m.text else None)
        page.on("dialog", lambda dialog: self.errors.append(dialog.message))
        page.on("request", lambda request: self.requests.append(request.url))


def enter(page: Page, url: str, key: str = KEY) -> None:
    page.goto(url)
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Open").press("Enter")
    if key == KEY:
        expect(page.locator("#workspace")).to_be_visible()


def comes(page: Page, locator: Locator) -> None:
    """Turn the page's clock (which is to be installed) from refresh to refresh until something can be seen."""
    for _ in range(40):
        page.clock.run_for(4_000)
        try:
            locator.wait_for(timeout=500)
        except PlaywrightTimeout:
            continue
        return
    expect(locator).to_be_visible()


def begin(page: Page, graph: Path) -> Locator:
    """Choose a file as a person would; the row of its export."""
    before = page.locator(".export").count()
    page.locator("#file").set_input_files(graph)
    expect(page.locator(".export")).to_have_count(before + 1, timeout=DONE)
    return page.locator(f'.export[data-job="{page.locator(".export").first.get_attribute("data-job")}"]')


def made(url: str, body: dict[str, Any] | bytes, key: str | None = KEY) -> str:
    """The id of an export that is done."""
    kind = "application/json" if isinstance(body, dict) else "application/x-ndjson"
    content = gzip.compress(json.dumps(body).encode()) if isinstance(body, dict) else body
    headers = {"Content-Encoding": "gzip", "Content-Type": kind}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        answer = client.post("/v1/exports", content=content)
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["jobId"]
        ended(client, job_id, "completed")
        return job_id


def ended(client: httpx.Client, job_id: str, status: str) -> None:
    """Read an export's events to their end."""
    with client.stream("GET", f"/v1/exports/{job_id}/events/stream", timeout=90) as events:
        for _ in events.iter_lines():
            pass
    assert client.get(f"/v1/exports/{job_id}").json()["status"] == status


def shot(page: Page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def large(path: Path) -> Path:
    """The example graph, thirty times side by side: more than the 50,000 nodes and 120,000 relationships of a capsule,
    and some seconds of work."""
    lines = gzip.decompress(EXAMPLE.read_bytes()).splitlines()
    records = [json.loads(line) for line in lines]
    with gzip.open(path, "wb", compresslevel=1) as file:
        for kind in ("node", "relationship"):
            for copy in range(30):
                for record in (record for record in records if record["type"] == kind):
                    data = {
                        k: f"{v}~{copy}" if k in ("id", "sourceId", "targetId") else v
                        for k, v in record["data"].items()
                    }
                    file.write(json.dumps({"type": kind, "data": data}).encode() + b"\n")
    return path


def graph(nodes: list[dict[str, Any]], relationships: list[tuple[str, str, str]], name: str = "town") -> dict[str, Any]:
    """An export request; relationships are (source, type, target)."""
    return {
        "sessionId": "s",
        "projectName": name,
        "source": {"type": "local", "baseName": name},
        "nodes": nodes,
        "relationships": [
            {"id": f"r{at}", "sourceId": source, "targetId": target, "type": kind, "confidence": 0.5 if at % 3 else 1}
            for at, (source, kind, target) in enumerate(relationships)
        ],
        "fileContents": {},
        "options": {},
    }


def function(name: str, *, label: str = "Function", **properties: Any) -> dict[str, Any]:
    """A node whose id is its name."""
    return {"id": name, "label": label, "properties": {"name": name, "filePath": "src/town.py", **properties}}


def town(name: str = "town") -> dict[str, Any]:
    """A market that thirty stalls call, that calls two banks, and a street of four houses that lead on."""
    stalls = [f"stall_{at:02}" for at in range(30)]
    houses = ["market", "bank", "vault", "guard"]
    market = function("market", startLine=3, endLine=5, content="def market():\n    bank()\n    return mint()")
    nodes = [market, *(function(house) for house in ["bank", "vault", "guard", "mint", *stalls])]
    calls = [(stall, "CALLS", "market") for stall in stalls]
    calls += [(source, "CALLS", target) for source, target in pairwise(houses)]
    return graph(nodes, [*calls, ("market", "CALLS", "mint"), ("market", "USES", "vault")], name)


def search(page: Page, words: str, capsule: str | None = None) -> Locator:
    """Ask in the search view, of the newest capsule or of that of an export; the hits."""
    if capsule:
        page.evaluate("hash => { location.hash = hash }", f"#search=&in={capsule}")
    elif page.locator("#search").is_hidden():
        page.get_by_role("link", name="Search", exact=True).first.click()
    page.get_by_role("searchbox").fill(words)
    page.get_by_role("button", name="Search").click()
    expect(page.locator("#search-status")).to_have_text(re.compile("hit|Nothing fits"), timeout=20_000)
    return page.locator(".hit")


def neighbour(page: Page, name: str) -> Locator:
    """A neighbour in the drawn graph."""
    return page.locator(".graph a").filter(has=page.locator(".name", has_text=re.compile(f"^{re.escape(name)}$")))
