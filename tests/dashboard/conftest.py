"""A real Chromium and the real server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from browsing import KEY
from playwright.sync_api import Browser, Page, Playwright, sync_playwright
from processes import serving

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


# For one module, not longer: an event loop runs as long as it does, and tests of others may come before its next one.
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


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    options = getattr(request, "param", {})
    with browser.new_context(accept_downloads=True, **options) as context:
        yield context.new_page()
