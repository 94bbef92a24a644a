"""Collections in the page: their documents, search in them, and what resembles a document, drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import pytest
from browsing import KEY, PHONE, Seen, comes, enter, neighbour, shot
from operations.keyring import Keyed, entry, keyed, text_of
from playwright.sync_api import Locator, Page, expect
from shelves import ARCHIVE, PAPERS, client_of, office_papers, put, settled

KEYS = "\n".join(
    [
        entry("owner", "admin", text=KEY, client="'red'"),
        entry("reader", "read", client="'red'"),
        entry("sender", "export", client="'red'"),
        entry("stranger", "read"),
    ]
)
MARKUP = "<img src=x onerror=alert(1)>"
TURNED = "turned \u202egnp.exe"


@pytest.fixture(scope="module")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """A server with collections, whose graph has all of them."""
    with keyed(tmp_path_factory.mktemp("shelves"), KEYS) as found:
        with client_of(found.server.url) as client:
            office_papers(client)
        yield found


@pytest.fixture
def url(keyed_server: Keyed) -> str:
    """Where it is."""
    return keyed_server.server.url


def go(page: Page, hash_: str) -> None:
    """Follow an address within the page."""
    page.evaluate("hash => { location.hash = hash }", hash_)


def row(page: Page, text: str) -> Locator:
    """Of a list that is shown."""
    return page.locator("#view-collections .hit").filter(visible=True, has_text=text)


def related(name: str) -> list[tuple[str, float]]:
    """What resembles a paper by its angle: the title, and the score; best first."""
    angles = {f"papers/{one}": angle for one, angle in PAPERS.items()} | {
        f"archive/{one}": angle for one, angle in ARCHIVE.items()
    }
    own = angles.pop(f"papers/{name}")
    scores = {one: math.cos(math.radians(angle - own)) for one, angle in angles.items()}
    best = sorted((one for one in scores if scores[one] >= 0.75), key=lambda one: -scores[one])
    return [(one.split("/", 1)[1].replace("/", " of ").title().replace("Of", "of"), scores[one]) for one in best]


def test_collections_lead_to_their_documents_and_the_address_keeps_the_place(page: Page, url: str) -> None:
    seen = Seen(page)
    enter(page, url)
    page.get_by_role("link", name="Collections", exact=True).click()
    expect(row(page, "papers")).to_contain_text("11 documents · 2 numbers of compass")
    expect(row(page, "papers").locator(".badge")).to_have_text("all in the graph")
    shot(page, "collections")
    page.get_by_role("link", name="papers").click()
    expect(page.locator("#documents-list .hit")).to_have_count(11)
    expect(row(page, "invoice/dune")).to_have_text(re.compile("Invoice of Dune.*financial.*invoice.*in the graph"))
    shot(page, "collection")
    page.reload()
    expect(page.locator("#documents-list .hit")).to_have_count(11)
    page.get_by_role("link", name="All collections").click()
    expect(row(page, "archive")).to_contain_text("4 documents")
    page.go_back()
    expect(page.locator("#collection-title")).to_have_text("papers")
    assert seen.errors == []


def test_documents_come_page_by_page_each_once(page: Page, url: str) -> None:
    with client_of(url) as client:
        documents = [{"id": f"n{at:02}", "text": "marmalade", "vector": [1, at]} for at in range(45)]
        put(client, "long", documents, dimension=2)
    enter(page, f"{url}/#collections=long")
    listed = page.locator("#documents-list .hit strong")
    found: list[str] = []
    for shown in ("n00", "n20", "n40"):
        expect(listed.first).to_have_text(shown)
        found += listed.all_inner_texts()
        if shown != "n40":
            page.get_by_role("link", name="Next ones").click()
    assert found == [f"n{at:02}" for at in range(45)]
    expect(page.get_by_role("link", name="Next ones")).to_be_hidden()
    page.reload()
    expect(listed.first).to_have_text("n40")
    page.get_by_role("link", name="From the beginning").click()
    expect(listed.first).to_have_text("n00")
    page.go_back()
    expect(listed.first).to_have_text("n40")
    go(page, "#collections=long&find=marmalade")
    expect(page.locator("#find-status")).to_have_text("20 hits or more")
    page.get_by_role("button", name="More hits").click()
    expect(page.locator("#finds .hit")).to_have_count(45)
    expect(page.get_by_role("button", name="More hits")).to_be_hidden()


def test_words_find_documents_with_why_and_lead_there_and_back(page: Page, url: str) -> None:
    enter(page, f"{url}/#collections=notes")
    page.get_by_role("searchbox", name="Find documents").fill("employee salary and payroll")
    page.keyboard.press("Enter")
    hits = page.locator("#finds .hit")
    expect(hits.first).to_contain_text(re.compile("payroll-(acme|dune)"))
    expect(hits.first.locator(".why")).to_have_text(re.compile(r"number \d by meaning, cosine 0\.\d\d"))
    expect(hits.first.locator(".why")).to_contain_text(re.compile(r"number \d by words"))
    shot(page, "collection-search")
    page.reload()
    expect(page.locator("#find")).to_have_value("employee salary and payroll")
    hits.first.get_by_role("link").press("Enter")
    expect(page.locator("#document-title")).to_be_focused()
    page.keyboard.press("Escape")
    expect(hits.first.get_by_role("link")).to_be_focused()

    go(page, "#collections=papers&find=invoice")
    expect(page.locator("#find-warnings")).to_contain_text("searched by words only")
    expect(hits.nth(2)).to_contain_text(re.compile("Invoice of .*number 3 by words"))
    page.get_by_role("searchbox").fill("zzzzqqq")
    page.get_by_role("button", name="Find").click()
    expect(page.locator("#find-status")).to_have_text("Nothing fits. Try other or fewer words.")
    page.get_by_role("searchbox").fill("")
    page.keyboard.press("Enter")
    expect(page.locator("#documents-list .hit")).to_have_count(11)


def test_a_document_is_shown_with_all_that_is_known_of_it(page: Page, url: str) -> None:
    enter(page, f"{url}/#collections=papers&document=invoice/acme")
    expect(page.locator("#document-title")).to_have_text("Invoice of Acme")
    facts = page.locator("#document-facts")
    for text in ("invoice/acme", "financial", "in the graph", "all keys of its client"):
        expect(facts).to_contain_text(text)
    expect(page.locator("#text")).to_contain_text("The invoice to Acme is due in thirty days")
    page.get_by_text("Payload, 2 fields").click()
    expect(page.locator("#payload")).to_contain_text('"degrees": 12')
    page.locator("#entities").get_by_role("link", name="write_ledger").click()
    expect(page.locator("#finds .hit").first).to_contain_text("Invoice of")
    expect(page).to_have_title("papers · memvid-export")


def test_the_drawing_has_who_is_alike_with_scores_and_leads_there(page: Page, url: str) -> None:
    enter(page, f"{url}/#collections=papers&document=lease/acme")
    boxes = page.locator("#neighbourhood .neighbour")
    expected = related("lease/acme")
    expect(page.locator("#neighbourhood .between")).not_to_have_count(0)
    assert boxes.locator(".name").all_text_contents() == [title for title, _ in expected]
    assert boxes.locator(".figure").all_text_contents() == [f"{score:.3f}" for _, score in expected]
    expect(page.locator("#neighbourhood .spoke")).to_have_count(len(expected))
    # Each is joined with the three of the others that it is most alike, as their own lists have it.
    ends = page.locator("#neighbourhood .between title").all_text_contents()
    assert len(set(ends)) == len(ends)
    assert len(expected) * 3 / 2 <= len(ends) <= len(expected) * 3
    expect(page.locator("#legend")).to_have_text(re.compile("engineering.*financial.*general.*hr.*legal"))
    drawn = page.locator("#neighbourhood").inner_html()
    page.reload()
    expect(page.locator("#neighbourhood .between")).to_have_count(len(ends))
    assert page.locator("#neighbourhood").inner_html() == drawn  # the same is drawn alike

    boxes.nth(3).hover()
    expect(page.locator("#neighbourhood .spoke.on")).to_have_count(1)
    expect(page.locator("#neighbourhood .score.on").last).to_have_text(f"{expected[3][1]:.3f}")
    shot(page, "document")
    page.get_by_text("Collection", exact=True).check()
    expect(page.locator("#legend li")).to_have_text(["archive", "papers"])
    page.get_by_text("As a list, with scores").click()
    listed = page.locator("#related-body > li")
    expect(listed.first).to_have_text(re.compile(rf"Lease of Acme {expected[0][1]:.3f} · legal · archive; alike with "))
    expect(listed).to_have_count(len(expected))

    boxes.first.click()  # in the other collection
    expect(page.locator("#document-collection")).to_have_text("archive")
    expect(page.get_by_label("Collection", exact=True)).to_be_checked()
    page.go_back()
    expect(page.locator("#document-collection")).to_have_text("papers")


def test_the_neighbourhood_is_walked_by_the_keyboard_alone(page: Page, url: str) -> None:
    enter(page, f"{url}/#collections=papers")
    row(page, "lease/acme").get_by_role("link").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#document-title")).to_be_focused()
    first, second = (title for title, _ in related("lease/acme")[:2])
    expect(neighbour(page, second)).to_be_visible()
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.graph a')"):
            break
    expect(neighbour(page, first)).to_be_focused()
    expect(page.locator("#neighbourhood .spoke.on")).to_have_count(1)
    page.keyboard.press("ArrowDown")
    expect(neighbour(page, second)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#document-title")).to_have_text(second)
    expect(page.locator("#neighbourhood a").first).to_be_focused()  # the walk goes on from where it stands
    expect(page.locator("#document-status")).to_have_text(f"Now at {second}")
    page.keyboard.press("Escape")
    expect(row(page, "lease/acme").get_by_role("link")).to_be_focused()


@pytest.mark.parametrize("page", [{}, PHONE], indirect=True, ids=["desk", "phone"])
def test_hostile_documents_are_shown_as_text(page: Page, url: str, request: pytest.FixtureRequest) -> None:
    names = [MARKUP, TURNED, "w" * 1000, "כותרת בעברית <b>", "bell\x07"]
    texts = ["</pre><script>alert(2)</script>", TURNED, "x" * 10_000, "טקסט בעברית", ""]
    documents = [
        {
            "id": f"{MARKUP}{at}",
            "title": name,
            "text": text,
            "vector": [1, at / 50],
            "payload": {"<svg onload=alert(3)>": MARKUP + "y" * 5000},
        }
        for at, (name, text) in enumerate(zip(names, texts, strict=True))
    ]
    with client_of(url) as client:
        put(client, "hostile", documents, dimension=2)
        settled(client, "hostile")
    seen = Seen(page)
    enter(page, f"{url}/#collections=hostile")
    fits = "document.documentElement.scrollWidth <= innerWidth"
    expect(row(page, "turned ⟨U+202E⟩gnp.exe")).to_have_count(1)
    assert page.evaluate(fits)
    row(page, f"{MARKUP}0").get_by_role("link").click()
    for at, name in enumerate(names):
        expect(page.locator("#document-title")).to_contain_text(re.compile(re.escape(name[:4])))
        expect(page.locator("#document-facts")).to_contain_text(f"{MARKUP}{at}")
        expect(page.locator("#neighbourhood .centre .label")).to_have_text("general · hostile")
        expect(page.locator("#neighbourhood .neighbour")).to_have_count(4)
        expect(page.locator("#neighbourhood .neighbour title", has_text=f"{MARKUP}{at}\n")).to_have_count(0)
        expect(page.locator("#neighbourhood .between")).to_have_count(6)
        page.locator("#payload-box summary").click()
        page.locator("#related-list summary").click()
        assert page.evaluate(fits), name
        for box in page.locator("#neighbourhood .neighbour").all():  # no text leaves its box
            outer, inner = box.locator("rect").bounding_box(), box.locator(".name").bounding_box()
            assert outer
            assert inner
            assert outer["x"] <= inner["x"]
            assert inner["x"] + inner["width"] <= outer["x"] + outer["width"]
        if at == 2:
            shot(page, f"hostile-document-{request.node.callspec.id}")
            expect(page.locator("#text")).to_have_text("x" * 10_000)
        page.locator("#payload-box summary").click()
        page.locator("#related-list summary").click()
        if at < 4:
            go(page, "#collections=hostile&document=" + f"{MARKUP}{at + 1}".replace("=", "%3D"))
    expect(page.locator("#text-none")).to_be_visible()
    expect(page.locator("#document-title")).to_have_text("bell␇")
    assert page.locator("main :is(img, script, b, iframe, object)").count() == 0
    assert seen.errors == []


def test_what_changes_is_seen_without_a_reload(page: Page, url: str) -> None:
    with client_of(url) as client:
        put(client, "live", [{"id": "one", "text": "first", "vector": [1, 0]}], dimension=2)
        settled(client, "live")
        page.clock.install()
        enter(page, f"{url}/#collections=live")
        expect(page.locator("#documents-list .hit")).to_have_count(1)
        put(client, "live", [{"id": "two", "vector": [1, 0.1]}], dimension=2)
        comes(page, row(page, "two").get_by_text("in the graph"))
        expect(page.locator("#collection-facts")).to_contain_text("2 documents")
        row(page, "one").get_by_role("link").click()
        expect(neighbour(page, "two")).to_be_visible()
        neighbour(page, "two").focus()
        put(client, "live", [{"id": "three", "vector": [1, 0.2]}], dimension=2)
        comes(page, neighbour(page, "three"))
        expect(neighbour(page, "two")).to_be_focused()
        client.delete("/v1/collections/live").raise_for_status()
        comes(page, page.locator("#collections-error").get_by_text("There is no collection"))
        put(client, "live", [{"id": "one", "vector": [1, 0]}], dimension=2)
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("#related-none")).to_be_visible()


def test_what_is_not_there_is_answered_in_words(page: Page, url: str) -> None:
    with client_of(url) as client:
        put(client, "bare", [], dimension=2)
    enter(page, f"{url}/#collections=bare")
    expect(page.locator("#documents-empty")).to_contain_text("No document is here")
    go(page, "#collections=nowhere")
    expect(page.locator("#collections-error")).to_contain_text("There is no collection")
    go(page, "#collections=papers&document=nothing")
    expect(page.locator("#collections-error")).to_contain_text("There is no document of this id.")
    expect(page.locator("#document")).to_be_hidden()
    go(page, "#collections=papers&document=runbook/iris")
    expect(page.locator("#related-none")).to_have_text(re.compile("No document is alike enough"))
    expect(page.locator("#collections-error")).to_be_hidden()


def test_a_client_without_collections_reads_how_to_begin(page: Page, url: str) -> None:
    enter(page, f"{url}/#collections", text_of("stranger"))
    expect(page.locator("#shelf-empty")).to_contain_text("memvid-export nexus batch")
    expect(page.locator("#shelf-list .hit")).to_have_count(0)


def test_a_key_sees_what_it_may_and_no_button_that_it_may_not_press(page: Page, url: str) -> None:
    seen = Seen(page)
    enter(page, f"{url}/#collections=papers&document=lease/acme", text_of("reader"))
    expect(page.locator("#neighbourhood .neighbour")).to_have_count(len(related("lease/acme")))
    go(page, "#sync")
    expect(page.locator("#sync-error")).to_have_text("The key reader lacks the scope admin, which this needs.")
    expect(page.locator("#view-sync").get_by_role("button")).to_have_count(0)
    shot(page, "sync-forbidden")
    page.get_by_role("button", name="Forget the key").click()
    enter(page, f"{url}/#collections", text_of("sender"))
    expect(page.locator("#collections-error")).to_have_text("The key sender lacks the scope read, which this needs.")
    expect(page.locator("#view-collections").get_by_role("button")).to_have_count(0)
    assert seen.errors == []
