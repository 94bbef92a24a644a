"""The page on a telephone, by keyboard, in the dark, and for eyes that need contrast."""

from __future__ import annotations

import re

import pytest
from browsing import DONE, PHONE, begin, enter, made, neighbour, search, shot, town
from playwright.sync_api import Page, expect
from processes import EXAMPLE
from shelves import client_of, office_papers

# Every piece of text that can be seen against what it stands on (WCAG 2.2, 1.4.3: 4.5, large text 3), and every edge of
# a control (1.4.11: 3). Answers those that are too faint.
FAINT = """() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((m, n) => n - m);
    return (x + 0.05) / (y + 0.05);
  };
  const solid = (c) => c.length < 4 || c[3] === 1;
  const behind = (element) => {
    const box = element.closest("svg a, svg .centre")?.querySelector("rect");
    if (box) return rgb(getComputedStyle(box).fill);
    for (let at = element; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (solid(colour)) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    if (!element.checkVisibility() || element.closest(":disabled, .visually-hidden, .skip")) continue;
    const style = getComputedStyle(element);
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (own && element.tagName !== "title" && element.tagName !== "OPTION") {
      const colour = rgb(element instanceof SVGElement ? style.fill : style.color);
      const size = parseFloat(style.fontSize);
      const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
      const got = ratio(colour, behind(element));
      if (got < (large ? 3 : 4.5)) found.push(`${element.textContent.trim().slice(0, 40)}: ${got.toFixed(2)}`);
    }
    if (element.matches("input:is([type=text], [type=search], [type=password]), select")) {
      const got = ratio(rgb(style.borderTopColor), behind(element.parentElement));
      if (got < 3) found.push(`edge of ${element.id}: ${got.toFixed(2)}`);
    }
  }
  return found;
}"""
# Where the focus is, and whether it can be seen.
FOCUS = """() => {
  const at = document.activeElement;
  const shown = (element) => element && getComputedStyle(element).outlineStyle !== "none"
    && parseFloat(getComputedStyle(element).outlineWidth) >= 2;
  const rect = at.matches("svg a") && at.querySelector("rect");
  const marked = shown(at) || shown(at.closest(".pick, .segments")) || shown(at.parentElement?.querySelector(".button"))
    || (rect && parseFloat(getComputedStyle(rect).strokeWidth) >= 3);
  const { view, do: act, ask, link } = at.dataset ?? {};
  return [at.id || view || act || ask || link || at.className.baseVal || at.className || at.tagName, Boolean(marked)];
}"""


@pytest.fixture(scope="module")
def project(server: str) -> str:
    """An export of a real project, and after it a town."""
    made(server, EXAMPLE.read_bytes())
    return made(server, town())


@pytest.fixture(scope="module")
def papers(server: str) -> None:
    """Collections with documents that resemble each other."""
    with client_of(server) as client:
        office_papers(client)


def see(page: Page, address: str, part: str) -> None:
    """Go to an address within the page, and wait for what it shows."""
    page.evaluate("hash => { location.hash = hash }", address)
    expect(page.locator(part).first).to_be_visible()


def from_the_top(page: Page) -> None:
    """The next tab key reaches the first stop of the page."""
    page.evaluate("document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')")


def stops(page: Page, most: int) -> list[str]:
    """What the tab key reaches, one after the other; each must be seen to have the focus."""
    from_the_top(page)
    found: list[str] = []
    for _ in range(most):
        page.keyboard.press("Tab")
        name, marked = page.evaluate(FOCUS)
        if name == "BODY":
            break
        assert marked, f"{name} has the focus and does not show it"
        found.append(name)
    return found


@pytest.mark.parametrize("page", [{**PHONE, "color_scheme": "dark"}], indirect=True)
def test_it_fits_a_phone_in_the_dark(page: Page, server: str, project: str, papers: None) -> None:
    def fits(name: str) -> None:
        shot(page, f"phone-dark-{name}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        small = page.evaluate(
            """() => [...document.querySelectorAll("main button, main .button, nav a")]
            .filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 24).map((e) => e.textContent)"""
        )
        assert small == [], "WCAG 2.2, 2.5.8: 24 pixels at the least"

    enter(page, server)
    row = begin(page, EXAMPLE)
    expect(row).to_have_attribute("data-status", "completed", timeout=DONE)
    expect(row.locator(".timeline").get_by_role("img")).to_be_visible()
    row.get_by_role("button", name="Report").tap()
    expect(row.locator(".report")).to_be_visible()
    row.locator(".warnings summary").first.tap()
    fits("report")
    hits = search(page, "market", project)
    fits("search")
    hits.first.get_by_role("link").tap()
    expect(page.locator(".graph")).to_be_visible()
    fits("walk")
    page.get_by_role("link", name="Activity").tap()
    expect(page.locator("#throughput .column")).not_to_have_count(0)
    page.get_by_text("The numbers as a table").tap()
    fits("charts")
    see(page, "#collections", "#shelf-list .badge")
    fits("collections")
    see(page, "#collections=papers", "#documents-list .hit")
    fits("collection")
    see(page, "#collections=papers&document=lease/acme", "#neighbourhood .between")
    page.get_by_text("As a list, with scores").tap()
    fits("document")
    see(page, "#sync", "#sync-report dl")
    page.get_by_text("By collection").tap()
    fits("sync")


@pytest.mark.parametrize("page", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True)
def test_all_text_stands_out_in_both_schemes(
    page: Page, server: str, project: str, papers: None, request: pytest.FixtureRequest
) -> None:
    scheme = request.node.callspec.params["page"]["color_scheme"]
    enter(page, server, "wrong")
    expect(page.locator("#notice")).to_be_visible()
    assert page.evaluate(FAINT) == []
    enter(page, server)
    for row in page.locator(".export").all()[:2]:
        row.get_by_role("button", name="Timeline").click()
        row.get_by_role("button", name="Report").click()
        expect(row.locator(".report")).to_be_visible()
    assert page.evaluate(FAINT) == []
    shot(page, f"list-{scheme}")
    hits = search(page, "market", project)
    page.locator("#filters summary").click()
    page.locator("#where summary").click()
    assert page.evaluate(FAINT) == []
    hits.first.get_by_role("link").click()
    expect(page.locator(".graph")).to_be_visible()
    page.locator("#list summary").click()
    neighbour(page, "bank").hover()
    assert page.evaluate(FAINT) == []
    shot(page, f"walk-{scheme}")
    page.get_by_role("link", name="Activity").click()
    expect(page.locator("#throughput .column")).not_to_have_count(0)
    page.get_by_text("The numbers as a table").click()
    assert page.evaluate(FAINT) == []
    shot(page, f"charts-{scheme}")
    see(page, "#collections=notes&find=invoice", "#finds .hit")
    page.locator("#finds .hit").first.hover()
    assert page.evaluate(FAINT) == []
    see(page, "#collections=papers&document=lease/acme", "#neighbourhood .between")
    page.get_by_text("As a list, with scores").click()
    page.locator("#neighbourhood a").nth(2).hover()
    assert page.evaluate(FAINT) == []
    shot(page, f"document-{scheme}")
    see(page, "#sync", "#sync-report dl")
    page.get_by_text("By collection").click()
    assert page.evaluate(FAINT) == []
    shot(page, f"sync-{scheme}")
    page.get_by_role("button", name="Make the graph anew").click()
    assert page.evaluate(FAINT) == []


def test_everything_can_be_reached_with_the_keyboard(page: Page, server: str, project: str, papers: None) -> None:
    enter(page, server)
    expect(page.locator(".export")).not_to_have_count(0)
    reached = stops(page, 22)
    head = ["skip", "exports", "search", "collections", "activity", "sync", "forget", "file", "status"]
    assert reached[: len(head)] == head
    assert {"download", "search", "timeline", "report", "sidecar", "manifest"} <= set(reached[len(head) :])
    page.locator('[data-do="report"]').first.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".report").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".report").first).to_be_hidden()

    page.locator('[data-view="search"]').press("Enter")
    expect(page.locator("#query")).to_be_focused()
    page.keyboard.type("market")
    page.keyboard.press("Enter")
    expect(page.locator("#search-status")).to_have_text(re.compile("hit|Nothing fits"))
    assert stops(page, 16)[7:13] == ["query", "strong", "mode", "file-prefix", "SUMMARY", "filters-text"]
    page.locator('[data-view="activity"]').press("Enter")
    expect(page.locator("#throughput .column")).not_to_have_count(0)
    assert stops(page, 10)[7:] == ["INPUT", "SUMMARY"]
    page.locator('[data-view="collections"]').press("Enter")
    expect(page.locator("#shelf-list .badge")).to_have_count(3)
    assert stops(page, 10)[7:] == ["A"] * 3
    see(page, "#collections=papers&document=lease/acme", "#neighbourhood .between")
    reached = stops(page, 14)[7:]
    assert reached == ["A", "document-collection", "text", "payload-text", "INPUT", "neighbour", "SUMMARY"]
    page.locator('[data-view="sync"]').press("Enter")
    expect(page.locator("#sync-report dl")).to_be_visible()
    assert stops(page, 11)[7:] == ["verify", "rebuild", "disable", "sync-more"]


def test_the_first_stop_leads_past_the_head_of_the_page(page: Page, server: str, project: str) -> None:
    enter(page, f"{server}/#search=market&in={project}")
    expect(page.locator(".hit").first).to_be_visible()
    from_the_top(page)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_in_viewport()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.locator("#query")).to_be_focused()


@pytest.mark.parametrize("page", [{"reduced_motion": "reduce"}], indirect=True)
def test_nothing_moves_for_those_who_ask_for_it(page: Page, server: str, project: str) -> None:
    enter(page, server)
    page.locator('[data-do="timeline"]').first.click()
    expect(page.locator(".timeline-chart")).to_be_visible()
    page.evaluate("document.querySelector('.timeline-chart rect').classList.add('open')")
    moving = "[...document.querySelectorAll('*')].flatMap((element) => element.getAnimations()).length"
    assert page.evaluate(moving) == 0
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(moving) == 1


def test_each_figure_and_each_field_has_a_name(page: Page, server: str, project: str, papers: None) -> None:
    nameless = """() => [...document.querySelectorAll(
      "main :is(button, a, input, select, svg[role], progress, [role=region])")]
      .filter((e) => e.checkVisibility() && !e.closest("[aria-hidden]"))
      .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length
        || document.getElementById(e.getAttribute("aria-labelledby"))?.textContent.trim()))
      .map((e) => e.outerHTML.slice(0, 120))"""
    enter(page, server)
    page.locator('[data-do="timeline"]').first.click()
    page.locator('[data-do="report"]').first.click()
    expect(page.locator(".bars-chart")).to_be_visible()
    assert page.evaluate(nameless) == []
    search(page, "market", project).first.get_by_role("link").click()
    expect(page.locator(".graph")).to_be_visible()
    assert page.evaluate(nameless) == []
    page.get_by_role("link", name="Activity").click()
    expect(page.locator("#throughput .column")).not_to_have_count(0)
    assert page.evaluate(nameless) == []
    for address, part in (
        ("#collections=papers", "#documents-list .hit"),
        ("#collections=papers&document=lease/acme", "#neighbourhood .between"),
        ("#sync", "#sync-queue svg"),
    ):
        see(page, address, part)
        assert page.evaluate(nameless) == []
