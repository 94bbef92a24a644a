"""Search in the page, and the walk from a hit over its neighbours."""

from __future__ import annotations

import re

import pytest
from browsing import KEY, PHONE, Seen, enter, function, graph, made, neighbour, search, shot, town
from playwright.sync_api import Locator, Page, expect
from processes import EXAMPLE, serving

HOSTILE = "evil<img src=x onerror=alert(1)>"
TURNED = "evil\u202egnp.exe"
LONG = "evil_" + "x" * 3000


@pytest.fixture(scope="module")
def first(server: str) -> str:
    """The older export, a town."""
    return made(server, town())


@pytest.fixture(scope="module")
def project(server: str, first: str) -> str:
    """The newest export, of a real project."""
    return made(server, EXAMPLE.read_bytes())


def test_words_find_a_symbol_with_its_place_and_why_it_is_there(page: Page, server: str, project: str) -> None:
    seen = Seen(page)
    enter(page, server)
    hits = search(page, "capsule writer", project)
    expect(page.locator("#where-text")).to_contain_text(".mv2")
    expect(hits.first).to_contain_text(re.compile("writer", re.IGNORECASE))
    expect(hits.first.locator(".place")).to_contain_text(re.compile(r"\.(py|rs):\d+"))
    expect(hits.first.locator(".why")).not_to_be_empty()
    shot(page, "search")
    page.get_by_role("button", name="Show more hits").click()
    expect(hits).to_have_count(50)
    assert seen.errors == []


def test_filters_narrow_what_is_found(page: Page, server: str, project: str) -> None:
    enter(page, server)
    hits = search(page, "capsule", project)
    page.locator("#filters summary").click()
    page.locator("#labels").get_by_label("Class", exact=True).check()
    page.get_by_label("Files under").fill("common/capsule/")
    page.get_by_label("Files under").press("Enter")
    expect(hits.first.locator(".kind")).to_have_text("Class")
    expect(hits.locator(".kind", has_text=re.compile("^(?!Class$)"))).to_have_count(0)
    assert all(place.startswith("common/capsule/") for place in hits.locator(".place").all_inner_texts())
    shot(page, "search-filters")
    page.reload()  # what is asked stands in the address
    expect(hits.first.locator(".kind")).to_have_text("Class")
    expect(page.get_by_label("Files under")).to_have_value("common/capsule/")


def test_several_capsules_are_searched_together(page: Page, server: str, first: str, project: str) -> None:
    enter(page, server)
    search(page, "market", project)
    expect(page.locator(".hit", has_text="src/town.py")).to_have_count(0)
    page.locator("#where summary").click()
    page.locator(f'#where-list input[value="{first}"]').check()
    page.get_by_role("button", name="Search").click()
    hit = page.locator(".hit", has_text="src/town.py").first
    expect(hit).to_contain_text("in town-gitnexus-mem_capsule")
    hit.get_by_role("link").click()
    expect(page.locator("#walk-title")).to_contain_text("market")


def test_a_person_walks_from_a_hit_to_its_neighbours_and_back(page: Page, server: str, first: str) -> None:
    enter(page, server)
    search(page, "market", first).first.get_by_role("link").click()
    expect(page.locator("#walk-title")).to_have_text("Function market")
    expect(page.locator("#walk-place")).to_have_text("src/town.py:3–5")
    expect(page.locator("#snippet")).to_contain_text("return mint()")
    expect(page.locator("#walk-degree")).to_contain_text("30 relationships lead here, 3 lead on.")
    shot(page, "walk")

    neighbour(page, "bank").click()
    expect(page.locator("#walk-title")).to_have_text("Function bank")
    neighbour(page, "vault").click()
    expect(page.locator("#walk-title")).to_have_text("Function vault")
    expect(page.locator(".graph .type")).to_have_text(["calls", "uses", "calls"])
    page.get_by_role("button", name="Back").click()
    expect(page.locator("#walk-title")).to_have_text("Function bank")
    page.go_back()  # the browser's own does the same
    expect(page.locator("#walk-title")).to_have_text("Function market")
    page.get_by_role("link", name="Close").click()
    expect(page.locator(".hit").first.get_by_role("link")).to_be_focused()


def test_more_neighbours_than_fit_come_page_by_page_each_once(page: Page, server: str, first: str) -> None:
    enter(page, f"{server}/#search=market&in={first}&of={first}&node=market")
    seen: list[str] = []
    for shown in ("1–12", "13–24", "25–30"):
        expect(page.locator("#pager-in")).to_contain_text(f"{shown} of 30 lead here")
        seen += [
            name for name in page.locator(".graph .neighbour .name").all_text_contents() if name.startswith("stall")
        ]
        page.locator("#list summary").click()
        listed = page.locator("#list-body").get_by_role("link", name="stall")
        expect(listed).to_have_count(len(page.locator(".graph .name", has_text="stall").all()))
        page.locator("#list summary").click()
        if shown != "25–30":
            page.get_by_role("button", name="Later ones that lead here").click()
    assert seen == sorted({f"stall_{at:02}" for at in range(30)})
    expect(page.get_by_role("button", name="Later ones that lead here")).to_be_disabled()
    page.get_by_role("button", name="Earlier ones that lead here").click()
    expect(page.locator("#pager-in")).to_contain_text("13–24 of 30")


def test_the_walk_goes_by_the_keyboard_alone(page: Page, server: str, first: str) -> None:
    enter(page, f"{server}/#search=market&in={first}")
    expect(page.locator(".hit").first).to_be_visible()
    page.locator(".hit a").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#walk-title")).to_be_focused()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.graph a')"):
            break
    expect(neighbour(page, "stall_00")).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(neighbour(page, "stall_01")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(neighbour(page, "mint")).to_be_focused()
    shot(page, "walk-keyboard")
    page.set_viewport_size({"width": 800, "height": 600})
    page.set_viewport_size({"width": 1280, "height": 720})
    expect(page.locator(".graph")).to_have_attribute("width", re.compile("7.."))
    expect(neighbour(page, "mint")).to_be_focused()  # drawn for another width, it is where it was
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(neighbour(page, "bank")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#walk-title")).to_have_text("Function bank")
    expect(neighbour(page, "market")).to_be_focused()  # the walk goes on from where it stands
    page.keyboard.press("Escape")
    expect(page.locator(".hit a").first).to_be_focused()


def test_nothing_found_and_nothing_known_are_said_in_words(page: Page, server: str, first: str) -> None:
    enter(page, server)
    search(page, "zzzzqqq", first)
    expect(page.locator("#search-status")).to_contain_text("Nothing fits.")
    shot(page, "search-nothing")
    page.get_by_label("Find by").select_option("semantic")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("#search-error")).to_contain_text("no vectors")
    page.goto(f"{server}/#search=market&in={first}&of={first}&node=nowhere")
    expect(page.locator("#walk-error")).to_contain_text("no node nowhere")


def test_a_page_without_capsules_says_what_to_do(page: Page, tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("bare") / "exports", key=KEY) as url:
        enter(page, url)
        page.get_by_role("link", name="Search").click()
        expect(page.locator("#search-status")).to_contain_text("Make a capsule first")


@pytest.mark.parametrize("page", [{}, PHONE], indirect=True, ids=["desk", "phone"])
def test_hostile_names_paths_and_code_are_shown_as_text(
    page: Page, server: str, request: pytest.FixtureRequest
) -> None:
    code = f"def f():\n    '</pre><script>alert(2)</script>{TURNED}'"
    nodes = [
        function(HOSTILE, label="<b>Kind</b>", filePath="src/<svg onload=alert(3)>.py", content=code),
        function(TURNED),
        function(LONG, filePath="deep/" * 500),
        function("evil\x07bell\u0000"),
        function("﷽" * 300 + "evil"),
    ]
    names = [node["id"] for node in nodes]
    relations = [(names[0], "<i>TYPE</i>", name) for name in names[1:]] + [(name, "CALLS", names[0]) for name in names]
    job_id = made(server, graph(nodes, relations, "evil<u>"))
    seen = Seen(page)
    enter(page, server)
    hits = search(page, "evil", job_id)
    expect(hits).to_have_count(5)

    def hit(name: str) -> Locator:
        return hits.filter(has=page.locator("strong", has_text=name))

    expect(hit(HOSTILE)).to_contain_text("src/<svg onload=alert(3)>.py")
    expect(hit("evil⟨U+202E⟩gnp.exe")).to_have_count(1)
    cut = hit("evil_xxx").locator("strong")
    expect(cut).to_have_attribute("title", LONG)
    assert len(cut.inner_text()) <= 120
    shot(page, f"hostile-search-{request.node.callspec.id}")

    hit(HOSTILE).get_by_role("link").click()
    expect(page.locator("#walk-title")).to_contain_text(HOSTILE)
    expect(page.locator("#snippet")).to_contain_text("</pre><script>alert(2)</script>evil⟨U+202E⟩gnp.exe")
    expect(page.locator(".graph .type")).to_have_text(["calls", "<i>type</i>", "calls"])
    boxes = page.locator(".graph .neighbour").all()
    assert len(boxes) == 10
    for box in boxes:  # no text leaves its box
        outer, inner = box.locator("rect").bounding_box(), box.locator(".name").bounding_box()
        assert outer
        assert inner
        assert inner["x"] >= outer["x"]
        assert inner["x"] + inner["width"] <= outer["x"] + outer["width"]
    shot(page, f"hostile-walk-{request.node.callspec.id}")
    page.get_by_text("All that is known about it").click()
    expect(page.locator("#properties-list")).to_contain_text("src/<svg onload=alert(3)>.py")
    width = page.viewport_size or {}
    assert page.evaluate("document.documentElement.scrollWidth") <= width["width"]
    assert page.locator("main :is(img, script, i, u, b, iframe, object)").count() == 0
    assert seen.errors == []


def test_an_address_of_an_export_that_is_not_there_is_answered_in_words(page: Page, server: str, first: str) -> None:
    nobody = "00000000-0000-4000-8000-000000000000"
    enter(page, f"{server}/#search=market&in={nobody}")
    expect(page.locator("#search-error")).to_contain_text("There is no export of this id.")


def test_an_address_that_asks_for_nothing_shows_nothing_found_before(page: Page, server: str, first: str) -> None:
    enter(page, server)
    expect(search(page, "market", first)).not_to_have_count(0)
    page.get_by_role("link", name="Search", exact=True).first.click()
    expect(page.locator(".hit")).to_have_count(0)
    expect(page.locator("#query")).to_be_focused()
    page.evaluate("hash => { location.hash = hash }", f"#search=&node=&of={first}")
    expect(page.locator("#walk")).to_be_hidden()
    expect(page.locator("#search-form")).to_be_visible()
    page.go_back()
    page.go_back()
    expect(page.locator(".hit")).not_to_have_count(0)


def test_a_community_can_be_searched_on_its_own(page: Page, server: str, project: str) -> None:
    enter(page, f"{server}/#search=capsule&in={project}&label=Community")
    page.locator(".hit").first.get_by_role("link").click()
    page.get_by_role("link", name="Search in this community").click()
    page.get_by_role("searchbox").fill("capsule")
    page.keyboard.press("Enter")
    expect(page.locator("#search-status")).to_contain_text(re.compile(r"\d+ hits?"))
    inside = page.locator(".hit").count()
    page.locator("#filters summary").click()
    page.locator("#community").get_by_role("checkbox").uncheck()
    page.get_by_role("button", name="Search").click()
    expect(page.locator("#community-box")).to_be_hidden()
    expect(page.locator(".hit")).to_have_count(20)
    assert inside > 0


def test_a_capsule_with_vectors_is_searched_by_meaning_too(page: Page, server: str) -> None:
    job_id = made(server, {**town("semantic"), "options": {"semanticEnabled": True}})
    enter(page, server)
    search(page, "market", job_id)
    expect(page.locator("#search-status")).not_to_contain_text("by words only")
    page.get_by_label("Find by").select_option("semantic")
    page.get_by_role("button", name="Search").click()
    expect(page.locator(".hit").first).to_contain_text("market")
    assert "mode=semantic" in page.url
