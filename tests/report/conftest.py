"""A real browser for the pages; tests that need it skip where none is installed."""

from __future__ import annotations

import os
import shutil

import pytest

ARGUMENTS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]


def chromium_path() -> str | None:
    """Debian's, Ubuntu's or Google's build; ``QTARGET_CHROMIUM`` names another."""
    names = (os.environ.get("QTARGET_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@pytest.fixture(scope="module")  # while it is open, this thread has a running event loop, which other tests need free
def browser():
    """A headless Chromium for the whole session."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    path = chromium_path()
    if path is None:
        pytest.skip("no Chromium found: apt-get install chromium, or set QTARGET_CHROMIUM")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open a file; at the end of the test, fail on console errors, thrown errors, dialogs and any request but the file."""
    faults: list[str] = []
    contexts = []

    def open_file(path, *, fragment="", scheme="light"):
        context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: faults.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else faults.append(r.url))
        page.goto(path.absolute().as_uri() + fragment)
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert not faults, faults
