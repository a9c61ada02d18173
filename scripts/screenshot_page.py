"""A picture of a page of `qtarget inspect`, the first rows, one token explained.

python scripts/screenshot_page.py docs/inspect/gsm8k_model_solutions.html docs/inspect.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--token", type=int, default=33, help="trained token of the second row to explain")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    options = parser.parse_args()
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=options.chromium, args=["--headless=new", "--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 760}, color_scheme=options.scheme)
        tab.goto(options.page.absolute().as_uri())
        tab.wait_for_selector("html[data-ready]")
        tab.select_option("#target", "1")
        tab.select_option("#sort", "order")
        tab.wait_for_timeout(800)
        tab.locator(".row").nth(1).locator(".tok[data-j]").nth(options.token).hover()
        tab.wait_for_selector("#qt-tip:not([hidden])")
        tab.wait_for_timeout(300)
        tab.screenshot(path=options.picture)
        browser.close()


if __name__ == "__main__":
    main()
