"""Draw the pictures of docs/report.md from the runs and the report that its commands leave.

    python scripts/draw_report_pictures.py --runs runs/live --output docs

Needs playwright and a Chromium for the one that shows the page.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

from PIL import Image

from qtarget.report.heatmap import MEASURES, heatmap_image
from qtarget.report.runs.figures import comparison_figures, png_bytes
from qtarget.report.runs.records import SAMPLES_FILE, read_lines

SMALL = {"width": 1100, "height": 620}


def page_picture(page_file: Path, output: Path) -> None:
    """The tokens of the first run's rows, as the page shows them."""
    from playwright.sync_api import sync_playwright

    names = (os.environ.get("QTARGET_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-quic"])
        page = browser.new_page(viewport=SMALL)
        page.goto(page_file.absolute().as_uri())
        page.evaluate("document.getElementById('tokens').previousElementSibling.scrollIntoView()")
        page.screenshot(path=output)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/live"))
    parser.add_argument("--output", type=Path, default=Path("docs"))
    options = parser.parse_args()
    report = json.loads((options.runs / "report.json").read_text())
    figure = comparison_figures(report)["evaluation_nll"]
    (options.output / "report_curves.png").write_bytes(png_bytes(figure))
    sample = next(line for line in read_lines(options.runs / "sft" / SAMPLES_FILE) if line["step"] == 20)
    picture = heatmap_image(sample["rows"], MEASURES["token_log_probs"], f"{sample['name']}, step {sample['step']}")
    Image.fromarray(picture).save(options.output / "token_picture.png")
    page_picture(options.runs / "report.html", options.output / "report_tokens.png")


if __name__ == "__main__":
    main()
