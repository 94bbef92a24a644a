"""The charts of the queue, of throughput and of failures."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import httpx
import pytest
from browsing import KEY, Seen, ended, enter, made, shot, town
from playwright.sync_api import Page, expect
from processes import COMMAND, EXAMPLE, free_port, running


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with two exports done, one canceled and one that took longer than it may."""
    folder = tmp_path_factory.mktemp("busy")
    url = f"http://127.0.0.1:{(port := free_port())}"
    env = {k: v for k, v in os.environ.items() if not k.startswith("MEMVID_EXPORT_")} | {
        "MEMVID_EXPORT_BIND_ADDR": f"127.0.0.1:{port}",
        "MEMVID_EXPORT_ROOT": str(folder / "exports"),
        "MEMVID_EXPORT_API_KEY": KEY,
    }
    key = {"Authorization": f"Bearer {KEY}"}
    packed = {"Content-Encoding": "gzip", "Content-Type": "application/x-ndjson"}
    short = env | {"MEMVID_EXPORT_DEADLINE_SECONDS": "0.05", "MEMVID_EXPORT_MAX_ATTEMPTS": "1"}
    with (
        running((COMMAND, "serve"), folder / "short.log", short, f"{url}/readyz"),
        httpx.Client(base_url=url, headers=key, timeout=60) as client,
    ):
        late = client.post("/v1/exports", content=EXAMPLE.read_bytes(), headers=packed).json()["jobId"]
        ended(client, late, "failed")
    with (
        running((COMMAND, "serve"), folder / "long.log", env, f"{url}/readyz"),
        httpx.Client(base_url=url, headers=key, timeout=60) as client,
    ):
        made(url, town())
        made(url, town("village"))
        given_up = client.post("/v1/exports", content=EXAMPLE.read_bytes(), headers=packed).json()["jobId"]
        client.delete(f"/v1/exports/{given_up}")
        yield url


def test_charts_and_their_table_tell_what_happened(page: Page, busy: str) -> None:
    seen = Seen(page)
    enter(page, busy)
    page.get_by_role("link", name="Activity").click()
    expect(page.locator("#throughput .column")).to_have_count(3)
    tiles = page.locator(".tile")
    expect(tiles.filter(has_text="Waiting")).to_contain_text("0 of 128 places")
    expect(tiles.filter(has_text="Made ready")).to_contain_text("2 in 24 hours")
    expect(tiles.filter(has_text="Failed")).to_contain_text("33% 1 of 3")
    expect(page.locator("#throughput").get_by_role("img")).to_have_attribute("aria-label", re.compile("At most 4, "))
    expect(page.locator("#depth").get_by_role("img")).to_have_attribute("aria-label", re.compile("Queue depth"))
    expect(page.locator("#failures")).to_contain_text("It took longer than an export may. 1 export · DEADLINE_EXCEEDED")
    shot(page, "charts")

    page.get_by_text("The numbers as a table").click()
    cells = [row.split("\t") for row in page.locator("#numbers-body tbody tr").all_inner_texts()]
    assert [sum(int(row[at].replace(",", "")) for row in cells) for at in (1, 2, 3, 4)] == [4, 2, 1, 1]
    assert seen.errors == []


def test_the_range_goes_from_a_day_to_a_week(page: Page, busy: str) -> None:
    enter(page, busy)
    page.get_by_role("link", name="Activity").click()
    expect(page.locator("#throughput")).to_contain_text("each hour")
    page.get_by_text("7 days").click()
    expect(page.locator("#throughput")).to_contain_text("each 6 hours")
    expect(page.locator(".tile").filter(has_text="Made ready")).to_contain_text("2 in 7 days")
    shot(page, "charts-week")
    page.reload()
    expect(page.get_by_role("radio", name="7 days")).to_be_checked()
    page.get_by_role("radio", name="7 days").press("ArrowLeft")
    expect(page.locator("#throughput")).to_contain_text("each hour")
    page.evaluate("location.hash = '#activity=toString'")  # no range, though each object has something of this name
    expect(page.locator("#throughput")).to_contain_text("each hour")
    expect(page.locator("#activity-error")).to_be_hidden()


def test_a_failed_export_says_why_and_what_would_help(page: Page, busy: str) -> None:
    enter(page, busy)
    row = page.locator('.export[data-status="failed"]')
    expect(row.locator(".message")).to_contain_text(re.compile("Trying again .*help"))
    row.get_by_role("button", name="Timeline").click()
    expect(row.locator(".timeline line.failed")).to_have_count(1)
    shot(page, "failed")
