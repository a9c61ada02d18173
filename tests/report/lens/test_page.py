"""The lens page in a real browser: it shows the document's numbers, all of them, and names stay text; and the figure."""

from __future__ import annotations

import pytest

pytest.importorskip("jinja2")

from qtarget.report.lens.document import lens
from qtarget.report.lens.losses import load_loss
from qtarget.report.lens.page import lens_figure, lens_page, save_figure
from qtarget.report.page import asset
from qtarget.storage.files import write_text

LOSSES = ("dft", "target_sft", "gem", "reverse_kl", "torch.nn.functional:cross_entropy", "sft")


@pytest.fixture(scope="module")
def document():
    return lens([load_loss(text) for text in LOSSES])


def test_the_page_shows_the_numbers_of_the_json(document, tmp_path, open_page):
    write_text(tmp_path / "page.html", lens_page(document))
    page = open_page(tmp_path / "page.html")
    rows = page.locator("#lens-summary tbody tr")
    assert rows.count() == len(LOSSES)
    for i, loss in enumerate(document["losses"]):
        assert rows.nth(i).locator("th").inner_text() == loss["name"]
        if loss["form"]["fits"]:
            assert rows.nth(i).locator("td").nth(1).inner_text() == loss["form"]["a"]["name"]
        section = page.locator(f"#loss-{i}")
        assert section.locator("ul li").all_inner_texts() == loss["verdict"]
        assert section.locator("tbody tr td:last-child").all_inner_texts() == [c["finding"] for c in loss["checks"]]
        assert section.locator("tbody th").all_inner_texts() == [c["name"] for c in loss["checks"]]
    updates = page.locator("#loss-0 figure").first.locator("circle title").all_text_contents()
    half = [text for text in updates if text.startswith("observed token: ") and "observed token 0.5," in text]
    assert [float(text.rsplit(" ", 1)[1]) for text in half] == [0.25]  # p (1 - p)
    assert page.locator("#loss-1 figure").count() == 5
    assert page.locator("#loss-3 figure").count() == 4  # no weights where the form does not fit
    bars = page.locator("#loss-1 figure").nth(2).locator("rect title").all_text_contents()
    q = dict(text.rsplit(": ", 1) for text in bars)["Q, what is taught, observed"]
    assert float(q) == pytest.approx(document["losses"][1]["situations"][0]["target"][0], rel=1e-3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_figure_is_wider_than_the_page(scheme, document, tmp_path, open_page):
    write_text(tmp_path / "page.html", lens_page(document))
    page = open_page(tmp_path / "page.html", scheme=scheme)
    assert page.locator("#qt-problem").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size({"width": 420, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_hostile_name_stays_text(document, tmp_path, open_page):
    name = "</script><img src=x onerror=\"document.title='owned'\">\u202e"
    hostile = document | {"losses": [document["losses"][0] | {"name": name}]}
    write_text(tmp_path / "hostile.html", lens_page(hostile))
    page = open_page(tmp_path / "hostile.html")
    assert page.locator("#loss-0 h2").inner_text() == name.replace("\u202e", "U+202E")
    assert page.locator("img").count() == 0
    assert page.title().startswith("What these losses teach")


def test_the_script_sets_no_markup():
    assert "innerHTML" not in asset("lens.js") and "insertAdjacentHTML" not in asset("lens.js")


def test_the_figure_holds_the_curves(document, tmp_path):
    pytest.importorskip("matplotlib")
    figure = lens_figure(document)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels[:4]] == list(LOSSES[:4])
    for axes, loss in zip(panels, document["losses"]):
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert list(lines["observed token"].get_ydata()) == loss["curves"]["observed"]
        assert ("frozen model's favourite" in lines) == (loss["frozen"] is not None)
    save_figure(figure, tmp_path / "new" / "lens.png")
    assert (tmp_path / "new" / "lens.png").read_bytes().startswith(b"\x89PNG")
