"""The sync with the graph in the page, as an operator sees it."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest
from browsing import KEY, Seen, comes, enter, shot
from live_server import Server
from playwright.sync_api import Locator, Page, expect
from processes import free_port
from shelves import client_of, put, settled

from control_plane.nexus.statements import NEVER


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose graph does not answer: 43 documents wait for it, and two were given up."""
    root = tmp_path_factory.mktemp("behind") / "root"
    env = {"MEMVID_NEXUS_URL": f"http://127.0.0.1:{free_port()}"}
    with closing(Server(root, env=env, api_key=KEY)) as server, client_of(server.start().url) as client:
        put(client, "papers", [{"id": f"n{at:02}", "vector": [1, at]} for at in range(45)], dimension=2)
        with closing(sqlite3.connect(root / "jobs.sqlite", timeout=30)) as database, database:
            database.execute(
                "UPDATE documents SET attempts = 4, next_at = ?, error = 'no <b>such</b> thing' WHERE doc_id < 'n02'",
                [NEVER],
            )
        yield server.url


def tile(page: Page, name: str) -> Locator:
    """A figure."""
    return page.locator("#sync-tiles .tile").filter(has=page.get_by_text(name, exact=True))


def test_a_graph_that_is_away_is_named_with_what_waits_and_why(page: Page, behind: str) -> None:
    seen = Seen(page)
    page.clock.install()
    enter(page, behind)
    page.get_by_role("link", name="Sync", exact=True).click()
    comes(page, page.locator("#sync-trouble").get_by_text("The graph database does not answer"))
    expect(tile(page, "Sync")).to_contain_text("by this server")
    expect(tile(page, "Waiting")).to_have_text("Waiting43of 45 documents")
    expect(tile(page, "Lag")).to_contain_text("the oldest that waits")
    expect(tile(page, "Given up").locator("strong")).to_have_text("2")
    expect(page.locator("#sync-failures .hit")).to_have_text(
        [f"n0{at} in papers of default, 4 attemptsno <b>such</b> thing" for at in range(2)]
    )
    expect(page.locator("#sync-queue").get_by_role("img")).to_have_attribute(
        "aria-label", re.compile("Documents that wait for the graph. At most 43, ")
    )
    page.get_by_text("By collection").click()
    expect(page.locator("#sync-table tbody tr")).to_have_text(re.compile(r"papers\s*default\s*45\s*43\s*2"))
    shot(page, "sync-behind")
    page.get_by_role("link", name="Collections", exact=True).click()
    page.get_by_role("link", name="papers").click()
    expect(page.locator("#collection-state .badge")).to_have_text(["43 waiting", "2 given up"])
    expect(page.locator("#documents-list .hit").first).to_contain_text("no <b>such</b> thing")
    expect(page.get_by_role("progressbar", name="0 of 45 documents in the graph")).to_be_visible()
    page.go_back()
    page.go_back()

    page.get_by_role("button", name="Try those given up again").click()
    expect(page.locator("#sync-status")).to_have_text("2 documents will be tried again.")
    expect(tile(page, "Waiting").locator("strong")).to_have_text("45")
    expect(page.locator("#sync-failures-box")).to_be_hidden()
    expect(page.get_by_role("button", name="Try those given up again")).to_be_hidden()
    page.get_by_role("button", name="Compare now").click()
    comes(page, page.locator("#sync-report").get_by_text("It ended early"))
    assert seen.errors == []


def test_an_operator_switches_the_sync_and_has_the_graph_made_anew(page: Page, server: str) -> None:
    seen = Seen(page)
    with client_of(server) as client:
        put(client, "notes", [{"id": f"n{at}", "vector": [1, at / 10]} for at in range(3)], dimension=2)
        settled(client, "notes")
        page.clock.install()
        enter(page, f"{server}/#sync")
        expect(page.locator("#sync-graph")).to_have_text(re.compile("Graph: LadybugDB"))
        expect(page.locator("#sync-queue")).to_contain_text("none in this time")
        page.get_by_role("button", name="Switch it off").press("Enter")
        expect(tile(page, "Sync")).to_contain_text("the graph is left as it is")
        expect(page.get_by_role("button", name="Switch it on")).to_be_focused()  # the one that was pressed is gone
        assert client.get("/v1/nexus").json()["enabled"] is False
        page.get_by_role("button", name="Switch it on").click()
        expect(tile(page, "Sync")).to_contain_text("by this server")
        assert client.get("/v1/nexus").json()["enabled"] is True

        page.get_by_role("button", name="Make the graph anew").click()
        expect(page.get_by_role("button", name="Leave it")).to_be_focused()
        shot(page, "sync-rebuild")
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        page.get_by_role("button", name="Make the graph anew").click()
        page.get_by_role("button", name="Leave it").click()
        report = page.locator("#sync-report")
        expect(report).to_contain_text("comparison")
        assert not any(url.endswith("/rebuild") for url in seen.requests)
        page.get_by_role("button", name="Make the graph anew").click()
        page.get_by_role("button", name="Make it anew").click()
        comes(page, report.filter(has_text=re.compile("rebuild, .*Repaired3 documents")))
        page.get_by_role("button", name="Compare now").click()
        comes(page, report.filter(has_text=re.compile("comparison, .*3 documents, 3 pairs.*Differencesnone")))
    shot(page, "sync")
    assert seen.errors == []


def test_a_look_that_goes_on_is_followed(page: Page, server: str) -> None:
    def answer(done: int) -> None:
        progress = {"kind": "verify", "done": done, "total": 3000}
        page.unroute("**/v1/nexus")
        page.route("**/v1/nexus", lambda route: route.fulfill(json={**route.fetch().json(), "progress": progress}))

    answer(1000)
    page.clock.install()
    enter(page, f"{server}/#sync")
    text = page.locator("#sync-progress-text")
    expect(text).to_have_text("Comparing the graph with the documents: 1,000 of 3,000 documents")
    for name in ("Compare now", "Make the graph anew"):
        expect(page.get_by_role("button", name=name)).to_be_hidden()
    answer(2000)
    comes(page, text.filter(has_text="2,000 of 3,000"))
    expect(page.locator("#sync-progress-bar")).to_have_js_property("value", 2000)
    page.unroute("**/v1/nexus")
    comes(page, page.get_by_role("button", name="Compare now"))
    expect(page.locator("#sync-progress")).to_be_hidden()


def test_the_page_asks_at_a_steady_pace_and_not_at_all_where_nobody_looks(page: Page, server: str) -> None:
    page.clock.install()
    page.add_init_script("Object.defineProperty(document, 'hidden', { get: () => window.away === true })")
    seen = Seen(page)
    enter(page, f"{server}/#sync")
    expect(tile(page, "Sync")).to_be_visible()

    def asked(route: str) -> int:
        seen.requests.clear()
        for _ in range(10):
            with page.expect_response("**/v1/nexus"):
                page.clock.run_for(4000)
        return len([url for url in seen.requests if url.endswith(route)])

    assert asked("/v1/nexus") == 10  # in 40 seconds
    page.evaluate("window.away = true")
    seen.requests.clear()
    page.clock.run_for(60_000)
    assert seen.requests == []
    page.evaluate("window.away = false")
    assert asked("/v1/nexus") == 10
    unseen = page.locator("#sync-queue .unseen")
    expect(unseen).not_to_have_count(0)  # what nobody looked at is not drawn as nothing


def test_a_server_that_does_not_answer_leaves_what_was_read_and_is_found_again(page: Page, server: str) -> None:
    page.clock.install()
    enter(page, f"{server}/#sync")
    expect(tile(page, "Sync")).to_be_visible()
    page.context.set_offline(True)
    comes(page, page.locator("#notice").get_by_text("The server does not answer"))
    expect(tile(page, "Sync")).to_be_visible()
    page.get_by_role("link", name="Collections", exact=True).click()
    expect(page.locator("#collections-error")).to_contain_text("The server does not answer")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#shelf")).to_be_visible()
    page.clock.run_for(4_000)
    expect(page.locator("#notice")).to_be_hidden()
