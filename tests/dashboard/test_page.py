"""The web page, driven by a person's hands: a real Chromium against the real server."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, Playwright, expect, sync_playwright
from processes import EXAMPLE, REPOSITORY, serving

KEY = "correct-horse-battery"
SHOTS = REPOSITORY / ".artifacts" / "dashboard"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
DONE = 60_000  # milliseconds until an export must be done


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert path, "chromium is not installed; run scripts/setup chromium"
    with playwright.chromium.launch(executable_path=path, args=[*FLAGS, "--disable-sync"]) as browser:
        yield browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("dashboard") / "exports", key=KEY) as url:
        yield url


class Seen:
    """What the page did behind its back."""

    def __init__(self, page: Page) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda m: self.errors.append(m.text) if "Content Security Policy" in m.text else None)
        page.on("request", lambda request: self.requests.append(request.url))


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    options = getattr(request, "param", {})
    with browser.new_context(accept_downloads=True, **options) as context:
        yield context.new_page()


def enter(page: Page, url: str, key: str = KEY) -> None:
    page.goto(url)
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Open").press("Enter")
    if key == KEY:
        expect(page.locator("#workspace")).to_be_visible()


def begin(page: Page, graph: Path) -> Locator:
    """Choose a file as a person would; the row of its export."""
    before = page.locator(".export").count()
    page.locator("#file").set_input_files(graph)
    expect(page.locator(".export")).to_have_count(before + 1)
    return page.locator(".export").first


def large(path: Path) -> Path:
    """The example graph, thirty times side by side: some seconds of work."""
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


def shot(page: Page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def test_a_graph_goes_in_and_the_capsule_comes_out(page: Page, server: str, tmp_path: Path) -> None:
    seen = Seen(page)
    enter(page, server)
    expect(page.get_by_text("Nothing here yet")).to_be_visible()
    shot(page, "empty")
    row = begin(page, EXAMPLE)
    expect(row).to_have_attribute("data-status", "completed", timeout=DONE)
    expect(row.locator(".title")).to_contain_text(".mv2")

    row.get_by_role("button", name="Report").click()
    expect(row.get_by_text("Where the time went")).to_be_visible()
    shot(page, "done")
    with page.expect_download() as waiting:
        row.get_by_role("button", name="Download capsule").click()
    capsule = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(capsule)
    with page.expect_download() as waiting:
        row.get_by_role("button", name="Manifest").click()
    waiting.value.save_as(tmp_path / "manifest.json")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert capsule.name == manifest["parts"][0]["fileName"]
    assert hashlib.sha256(capsule.read_bytes()).hexdigest() == manifest["parts"][0]["sha256"]

    assert seen.errors == []
    assert [url for url in seen.requests if not url.startswith((server, f"blob:{server}"))] == []


def test_progress_is_shown_while_an_export_runs(page: Page, server: str, tmp_path: Path) -> None:
    enter(page, server)
    row = begin(page, large(tmp_path / "large.ndjson.gz"))
    expect(row.locator("progress")).to_be_visible(timeout=DONE)
    shot(page, "running")
    expect(row).to_have_attribute("data-status", "completed", timeout=DONE)
    expect(row.locator("progress")).to_be_hidden()


def test_a_graph_can_be_dropped_on_the_page(page: Page, server: str) -> None:
    enter(page, server)
    before = page.locator(".export").count()
    files = page.evaluate_handle(
        """(bytes) => { const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "dropped.ndjson.gz")); return data; }""",
        list(EXAMPLE.read_bytes()),
    )
    page.locator("#drop").dispatch_event("dragover", {"dataTransfer": files})
    expect(page.locator("#drop")).to_have_class("card drop over")
    page.locator("#drop").dispatch_event("drop", {"dataTransfer": files})
    expect(page.locator(".export")).to_have_count(before + 1)


def test_a_wrong_key_is_named_and_the_right_one_then_opens(page: Page, server: str) -> None:
    enter(page, server, "wrong")
    expect(page.get_by_role("alert")).to_have_text("That key was not accepted.")
    expect(page.locator("#workspace")).to_be_hidden()
    shot(page, "wrong-key")
    page.keyboard.type(KEY)  # the field has the focus
    page.keyboard.press("Enter")
    expect(page.locator("#workspace")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_the_key_lasts_as_long_as_the_tab(page: Page, server: str) -> None:
    enter(page, server)
    expect(page.locator("#workspace")).to_be_visible()
    page.reload()
    expect(page.locator("#workspace")).to_be_visible()
    other = page.context.new_page()
    other.goto(server)
    expect(other.get_by_label("API key")).to_be_visible()
    page.get_by_role("button", name="Forget the key").click()
    page.reload()
    expect(page.get_by_label("API key")).to_be_visible()


def test_a_file_that_is_no_graph_is_refused_in_words(page: Page, server: str, tmp_path: Path) -> None:
    wrong = tmp_path / "letter.json"
    wrong.write_text('{"nodes": [], "relationships": []}')
    enter(page, server)
    page.locator("#file").set_input_files(wrong)
    expect(page.get_by_role("alert")).to_contain_text("nodes")
    shot(page, "refused")


def test_hostile_text_is_shown_as_text(page: Page, server: str, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    graph = {
        "sessionId": "s", "projectName": hostile, "source": {"type": "local", "baseName": hostile},
        "nodes": [{"id": hostile, "label": hostile, "properties": {"name": hostile}}],
        "relationships": [{"id": "r", "sourceId": hostile, "targetId": hostile, "type": hostile, "confidence": 7}],
        "fileContents": {}, "options": {},
    }  # fmt: skip
    file = tmp_path / "hostile.json.gz"
    file.write_bytes(gzip.compress(json.dumps(graph).encode()))
    seen = Seen(page)
    page.on("dialog", lambda dialog: seen.errors.append(dialog.message))
    enter(page, server)
    row = begin(page, file)
    expect(row.locator(".title")).to_contain_text("img")
    expect(row).to_have_attribute("data-status", "completed", timeout=DONE)
    row.get_by_role("button", name="Report").click()
    expect(row.locator(".report")).to_contain_text(hostile)
    assert page.locator(".export img").count() == 0
    assert seen.errors == []


@pytest.mark.parametrize(
    "page", [{"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "has_touch": True}], indirect=True
)
def test_it_fits_a_phone_in_the_dark(page: Page, server: str) -> None:
    enter(page, server)
    row = begin(page, EXAMPLE)
    expect(row).to_have_attribute("data-status", "completed", timeout=DONE)
    row.get_by_role("button", name="Report").tap()
    expect(row.locator(".report")).to_be_visible()
    shot(page, "phone-dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_everything_can_be_reached_with_the_keyboard(page: Page, server: str) -> None:
    enter(page, server)
    expect(begin(page, EXAMPLE)).to_have_attribute("data-status", "completed", timeout=DONE)
    page.locator("body").click(position={"x": 1, "y": 1})
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.do ?? document.activeElement.id"))
    assert {"forget", "file", "download", "sidecar", "manifest", "report"} <= reached
    page.locator('[data-do="report"]').first.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".report").first).to_be_visible()


def test_the_page_asks_for_no_key_where_the_server_wants_none(page: Page, tmp_path: Path) -> None:
    with serving(tmp_path / "exports") as url:
        page.goto(url)
        expect(page.locator("#workspace")).to_be_visible()


def test_the_page_forbids_everything_that_is_not_its_own(server: str) -> None:
    answer = httpx.get(server)
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "http" not in answer.text.replace("http-equiv", "")


@pytest.mark.parametrize("name", ["../__init__.py", "..%2f__init__.py", "nothing.js", "%2e%2e/__init__.py"])
def test_only_the_page_s_own_files_are_served(server: str, name: str) -> None:
    assert httpx.get(f"{server}/dashboard/{name}").status_code == 404
