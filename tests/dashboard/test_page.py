"""The list of exports, driven by a person's hands: a real Chromium against the real server."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
import re
import sqlite3
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx
import pytest
from browsing import DONE, KEY, Seen, begin, enter, function, graph, large, made, search, shot, town
from playwright.sync_api import Page, expect
from processes import COMMAND, EXAMPLE, answering, free_port, running, serving

from common.contract import Progress
from control_plane.jobs.database import Database
from control_plane.jobs.hub import EventHub
from control_plane.jobs.records import NewEvent, NewJob
from control_plane.jobs.store import JobStore


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
    expect(row.locator(".report").get_by_role("img")).to_have_attribute("aria-label", re.compile("Writing"))
    # Warnings are sentences; the code and the first place stand behind them.
    expect(row.get_by_text("The same relationship came more than once")).to_be_visible()
    row.locator(".warnings summary").first.click()
    expect(row.locator(".warnings code").first).to_be_visible()
    shot(page, "report")
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


def test_the_timeline_shows_each_stage_with_its_beginning_and_length(page: Page, server: str) -> None:
    job_id = made(server, EXAMPLE.read_bytes())
    events = httpx.get(
        f"{server}/v1/exports/{job_id}/events", params={"limit": 2000}, headers={"Authorization": f"Bearer {KEY}"}
    ).json()["events"]
    enter(page, server)
    row = page.locator(f'[data-job="{job_id}"]')
    row.get_by_role("button", name="Timeline").click()
    picture = row.locator(".timeline").get_by_role("img")
    expect(picture).to_have_attribute("aria-label", re.compile("from start to end. Longest: "))
    names = ["Waiting", "Reading the graph", "Preparing frames", "Writing the capsule", "Building the index"]
    for name in [*names, "Checking it"]:
        expect(picture.locator("text", has_text=name)).to_have_count(1)
    first = {event["stage"]: datetime.fromisoformat(event["ts"]).timestamp() for event in reversed(events)}
    whole = first["download_ready"] - first["queued"]
    drawn = [float(bar.get_attribute("x") or 0) for bar in picture.locator("rect").all()]
    end = float(picture.locator("line.end").get_attribute("x1") or 0)
    shares = [(left - drawn[0]) / (end - drawn[0]) for left in drawn]
    stages = ["queued", "transform", "frame_prep", "write_capsule", "build_sidecar", "finalize"]
    assert shares == pytest.approx([(first[stage] - first["queued"]) / whole for stage in stages], abs=0.01)
    shot(page, "timeline")

    row.locator(".timeline summary").click()
    rows = row.get_by_role("table").get_by_role("row")
    expect(rows).to_have_count(7)
    assert [text.split("\t")[0] for text in rows.all_inner_texts()[1:]] == [*names, "Checking it"]
    page.keyboard.press("Escape")
    expect(row.locator(".timeline")).to_be_hidden()
    expect(row.get_by_role("button", name="Timeline")).to_be_focused()


def test_a_capsule_of_fifty_thousand_nodes_is_watched_while_it_is_made_then_searched_and_walked(
    page: Page, server: str, tmp_path: Path
) -> None:
    seen = Seen(page)
    enter(page, server)
    row = begin(page, large(tmp_path / "large.ndjson.gz"))
    expect(row.locator(".bar")).to_be_visible(timeout=DONE)
    live = row.locator(".timeline").get_by_role("img")
    expect(live.locator(".span.open")).to_have_count(1, timeout=DONE)
    expect(live).to_have_attribute("aria-label", re.compile("Preparing frames, .* since it came in"), timeout=DONE)
    shot(page, "running")
    expect(row).to_have_attribute("data-status", "completed", timeout=DONE)
    expect(row.locator(".bar")).to_be_hidden()
    expect(live).to_have_attribute("aria-label", re.compile("from start to end"))
    row.get_by_role("link", name="Search").click()
    page.get_by_role("searchbox").fill("capsule writer")
    page.keyboard.press("Enter")
    expect(page.locator(".hit")).to_have_count(20, timeout=30_000)
    page.locator(".hit a").first.click()
    expect(page.locator(".graph .centre")).to_be_visible(timeout=30_000)
    assert seen.errors == []


def test_a_graph_can_be_dropped_on_the_page(page: Page, server: str) -> None:
    enter(page, server)
    page.get_by_label("Show").select_option("failed")
    expect(page.get_by_text("No export is in this state.")).to_be_visible()
    files = page.evaluate_handle(
        """(bytes) => { const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "dropped.ndjson.gz")); return data; }""",
        list(EXAMPLE.read_bytes()),
    )
    page.locator("#drop").dispatch_event("dragover", {"dataTransfer": files})
    expect(page.locator("#drop")).to_have_class("card drop over")
    page.locator("#drop").dispatch_event("drop", {"dataTransfer": files})
    row = page.locator(".export").first
    expect(row).to_have_attribute("data-status", "completed", timeout=DONE)
    expect(row.locator(".timeline").get_by_role("img")).to_be_visible()  # and it is followed at once


def test_a_running_export_can_be_canceled(page: Page, server: str, tmp_path: Path) -> None:
    enter(page, server)
    row = begin(page, large(tmp_path / "large.ndjson.gz"))
    row.get_by_role("button", name="Cancel").click()
    expect(row).to_have_attribute("data-status", "canceled", timeout=DONE)
    expect(row.locator(".message")).to_have_text("Export canceled")
    page.reload()  # and the page that knew the file is gone
    expect(page.locator(".export .title").first).to_have_text("large")


def test_a_wrong_key_is_named_and_the_right_one_then_opens(page: Page, server: str) -> None:
    enter(page, server, "wrong")
    expect(page.locator("#notice")).to_have_text("That key was not accepted.")
    expect(page.locator("#workspace")).to_be_hidden()
    shot(page, "wrong-key")
    page.keyboard.type(KEY)  # the field has the focus
    page.keyboard.press("Enter")
    expect(page.locator("#workspace")).to_be_visible()
    expect(page.locator("#notice")).to_be_hidden()


def test_the_key_lasts_as_long_as_the_tab(page: Page, server: str) -> None:
    enter(page, server)
    expect(page.locator("#workspace")).to_be_visible()
    page.reload()
    expect(page.locator("#workspace")).to_be_visible()
    other = page.context.new_page()
    other.goto(server)
    expect(other.get_by_label("API key")).to_be_visible()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_label("API key")).to_be_visible()
    page.reload()
    expect(page.get_by_label("API key")).to_be_visible()


def test_the_key_stands_nowhere_in_the_page_and_what_it_opened_goes_with_it(page: Page, server: str) -> None:
    job_id = made(server, town("secret"))
    enter(page, f"{server}/#search=x&of={job_id}&node=market")
    expect(page.locator("#snippet")).to_contain_text("def market")
    expect(page.locator("#key")).to_have_value("")
    assert KEY not in page.content()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page).to_have_title("memvid-export")
    assert "market" not in page.content()


@pytest.mark.parametrize("text", ["ключ", "correct\u200bhorse", "😀", "   "])
def test_what_can_be_no_key_is_named_and_not_sent(page: Page, server: str, text: str) -> None:
    enter(page, server, text)
    expect(page.locator("#notice")).to_contain_text("That is no key")
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").press("Enter")
    expect(page.locator("#workspace")).to_be_visible()
    expect(page.locator("main")).to_be_focused()


def test_answers_of_something_in_between_are_named_and_hold_nothing_up(page: Page, server: str, tmp_path: Path) -> None:
    strange: list[tuple[str, str]] = []  # method and path that the proxy answers itself, with a success

    class Proxy(BaseHTTPRequestHandler):
        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if (self.command, self.path.partition("?")[0]) in strange:
                status, kind, content = 200, "text/html", b"<html>Please log in"
            else:
                headers = {k: v for k, v in self.headers.items() if k not in ("Host", "Connection", "Accept-Encoding")}
                answer = httpx.request(self.command, server + self.path, content=body, headers=headers, timeout=60)
                status, kind, content = answer.status_code, answer.headers["Content-Type"], answer.content
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _pass  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    file = tmp_path / "town.json"
    file.write_text(json.dumps(town()))
    garbled = re.compile("The answer was cut off, or something between")
    seen = Seen(page)
    with answering(Proxy) as url:
        enter(page, url)
        strange.append(("POST", "/v1/exports"))
        page.locator("#file").set_input_files(file)
        expect(page.locator("#notice")).to_have_text(garbled)
        strange[:] = []
        row = begin(page, file)  # the next file goes on
        expect(row).to_have_attribute("data-status", "completed", timeout=DONE)
        strange.append(("GET", "/v1/stats"))
        page.get_by_role("link", name="Activity").click()
        expect(page.locator("#activity-error")).to_have_text(garbled)
        page.goto("about:blank")
    assert seen.errors == []


def test_a_file_that_is_no_graph_is_refused_in_words(page: Page, server: str, tmp_path: Path) -> None:
    wrong = tmp_path / "letter.json"
    wrong.write_text('{"nodes": [], "relationships": []}')
    enter(page, server)
    page.locator("#file").set_input_files(wrong)
    expect(page.locator("#notice")).to_contain_text("nodes")
    shot(page, "refused")


def test_of_several_files_each_that_is_refused_is_named(page: Page, server: str, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("cut.json", "good.json", "empty.json")]
    for file, text in zip(files, ['{"nodes": [', json.dumps(town("good")), ""], strict=True):
        file.write_text(text)
    enter(page, server)
    before = page.locator(".export").count()
    page.locator("#file").set_input_files(files[:2])
    expect(page.locator(".export")).to_have_count(before + 1, timeout=DONE)
    expect(page.locator(".export .timeline").first.get_by_role("img")).to_be_visible()
    expect(page.locator("#notice")).to_have_text("cut.json: the JSON is cut: its end is missing")
    page.locator("#file").set_input_files([files[0], files[2]])
    expect(page.locator("#notice")).to_have_text(re.compile("^cut.json: .*cut.* — empty.json: .*empty"))


def test_hostile_text_is_shown_as_text(page: Page, server: str, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    body = graph([function(hostile, label=hostile)], [(hostile, hostile, hostile)], hostile)
    body["relationships"][0]["confidence"] = 7
    file = tmp_path / "hostile\u202egnp.json.gz"
    file.write_bytes(gzip.compress(json.dumps(body).encode()))
    seen = Seen(page)
    enter(page, server)
    row = begin(page, file)
    expect(row.locator(".title")).to_contain_text("img")
    expect(row).to_have_attribute("data-status", "completed", timeout=DONE)
    row.get_by_role("button", name="Report").click()
    expect(row.locator(".report")).to_contain_text(hostile)
    assert page.locator(".export img").count() == 0
    assert seen.errors == []


def test_two_hundred_exports_can_be_looked_through(page: Page, tmp_path: Path) -> None:
    (tmp_path / "exports").mkdir()
    with ThreadPoolExecutor(1) as thread:  # this one has the browser's loop
        thread.submit(asyncio.run, _canceled(tmp_path / "exports" / "jobs.sqlite", 200)).result()
    with serving(tmp_path / "exports", key=KEY) as url:
        enter(page, url)
        expect(page.locator(".export")).to_have_count(20)
        for shown in range(40, 201, 20):
            page.get_by_role("button", name="Show older exports").click()
            expect(page.locator(".export")).to_have_count(shown)
        expect(page.get_by_role("button", name="Show older exports")).to_be_hidden()
        page.get_by_label("Show").select_option("failed")
        expect(page.get_by_text("No export is in this state.")).to_be_visible()
        page.get_by_label("Show").select_option("canceled")
        expect(page.locator(".export")).to_have_count(20)


async def _canceled(path: Path, number: int) -> None:
    """A database of exports that were canceled while they waited."""
    database = Database(f"sqlite+aiosqlite:///{path}")
    await database.migrate()
    store = JobStore(database, EventHub(), queue_capacity=number)
    for at in range(number):
        job = NewJob(
            id=str(uuid.uuid4()),
            backend="legacy_vps",
            weight=1,
            session_id="s",
            project_name=f"project {at}",
            payload_ref="file:///nowhere",
            payload_sha256="0" * 64,
            payload_size=1,
            message="Queued for export: 1 node and 1 relationship",
            meta={},
        )
        await store.create(job)
        step = Progress(stage="canceled", progress=0, stage_progress=100, message="Export canceled")
        await store.move(job.id, "canceled", NewEvent("job_canceled", step))
    await database.close()


def test_a_server_that_goes_away_is_named_and_found_again(page: Page, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {k: v for k, v in os.environ.items() if not k.startswith("MEMVID_EXPORT_")} | {
        "MEMVID_EXPORT_BIND_ADDR": f"127.0.0.1:{port}",
        "MEMVID_EXPORT_ROOT": str(tmp_path / "exports"),
        "MEMVID_EXPORT_API_KEY": KEY,
    }
    up = (COMMAND, "serve")
    with running(up, tmp_path / "first.log", env, f"{url}/readyz"):
        job_id = made(url, town())
        enter(page, url)
        expect(page.locator(".export")).to_have_count(1)
        search(page, "market")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("#search-error")).to_contain_text("The server does not answer. Is it running?")
    expect(page.locator("#notice")).to_contain_text("The server does not answer. Is it running?", timeout=20_000)
    shot(page, "server-away")
    with running(up, tmp_path / "second.log", env, f"{url}/readyz"):
        expect(page.locator("#notice")).to_be_hidden(timeout=20_000)
        page.get_by_role("button", name="Try again").click()
        expect(page.locator(".hit").first).to_be_visible()
        page.get_by_role("link", name="Exports").click()
        expect(page.locator(".export")).to_have_attribute("data-job", job_id)


def test_the_address_of_an_export_opens_its_timeline(page: Page, server: str) -> None:
    job_id = made(server, town())
    enter(page, f"{server}/#export={job_id}")
    expect(page.locator(f'[data-job="{job_id}"]').locator(".timeline").get_by_role("img")).to_be_visible()


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
    assert "style=" not in answer.text


@pytest.mark.parametrize("name", ["../__init__.py", "..%2f__init__.py", "nothing.js", "%2e%2e/__init__.py"])
def test_only_the_page_s_own_files_are_served(server: str, name: str) -> None:
    answer = httpx.get(f"{server}/dashboard/{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "NOT_FOUND")


def test_an_export_whose_files_are_damaged_says_so_and_offers_none(page: Page, tmp_path: Path) -> None:
    with serving(tmp_path / "exports", key=KEY) as url:
        job_id = made(url, town("spoiled"))
        with closing(sqlite3.connect(tmp_path / "exports" / "jobs.sqlite", timeout=30)) as database, database:
            database.execute("UPDATE jobs SET damage = 'its SHA-256 differs'")
        seen = Seen(page)
        enter(page, url)
        row = page.locator(f'[data-job="{job_id}"]')
        expect(row.locator(".message")).to_contain_text("its SHA-256 differs")
        for name in ("Download capsule", "Index", "Manifest"):
            expect(row.get_by_role("button", name=name)).to_be_hidden()
        expect(row.get_by_role("link", name="Search")).to_be_hidden()
        row.get_by_role("button", name="Report").click()
        expect(row.get_by_text("Where the time went")).to_be_visible()
        assert seen.errors == []


def test_a_failed_export_is_tried_again_by_keyboard(page: Page, tmp_path: Path) -> None:
    profiles = tmp_path / "profiles.toml"
    profiles.write_text("[profiles.thrifty]\nmax_tokens = 3\n")
    costly = town("costly")
    costly["options"] = {"semanticEnabled": True, "profile": "thrifty"}
    (tmp_path / "costly.json").write_text(json.dumps(costly))
    (tmp_path / "exports").mkdir()
    port = free_port()
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MEMVID_")},
        "MEMVID_EXPORT_API_KEY": KEY,
        "MEMVID_EXPORT_BIND_ADDR": f"127.0.0.1:{port}",
        "MEMVID_EXPORT_ROOT": str(tmp_path / "exports"),
        "MEMVID_EXPORT_PROFILES_FILE": str(profiles),
    }
    url = f"http://127.0.0.1:{port}"
    with running([COMMAND, "serve"], tmp_path / "log", env, f"{url}/readyz"):
        seen = Seen(page)
        enter(page, url)
        row = begin(page, tmp_path / "costly.json")
        expect(row).to_have_attribute("data-status", "failed", timeout=DONE)
        expect(row.locator(".facts")).to_contain_text("can be tried again until")
        shot(page, "failed")
        row.get_by_role("button", name="Try again").press("Enter")
        expect(page.locator(".export")).to_have_count(2, timeout=DONE)
        again = page.locator(".export").first
        expect(again.locator(".facts")).to_contain_text("does a failed one again")
        expect(again.locator(".title a")).to_be_focused()
        expect(row.locator(".facts")).to_contain_text("was started again as a new export")
        expect(row.get_by_role("button", name="Try again")).to_be_hidden()
        expect(again).to_have_attribute("data-status", "failed", timeout=DONE)  # nothing was mended
        expect(again.get_by_role("button", name="Try again")).to_be_visible()
        assert seen.errors == []
