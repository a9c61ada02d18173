"""The page's frame: what is written comes back the same, and nothing of the data becomes markup or script."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from jinja2 import DictLoader

from qtarget.core.errors import DataError
from qtarget.report import page as report_page
from qtarget.report.page import pack_column, render_page, safe_json, unpack_column
from qtarget.storage.files import write_text
from tests.report.hostile import HOSTILE


@pytest.mark.parametrize("text", HOSTILE)
def test_json_is_unchanged_and_cannot_end_its_element(text):
    written = str(safe_json({"text": text}))
    assert json.loads(written) == {"text": text}
    assert written.isascii() and not re.search("[<>&]", written)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_cannot_say_is_refused(value):
    with pytest.raises(DataError, match="report holds a value"):
        safe_json([value])


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float32"])
def test_columns_come_back(dtype):
    values = np.random.default_rng(0).integers(0, 100, (7, 3)).astype(dtype)
    column = json.loads(json.dumps(pack_column(values)))
    assert unpack_column(column).tolist() == values.tolist()


def test_columns_of_other_types_are_refused():
    with pytest.raises(DataError, match="float64"):
        pack_column(np.zeros(3))


@pytest.fixture
def plain_page(monkeypatch, tmp_path):
    """A page that lists ``QT.data.texts``, its title hostile too."""
    template = "{% extends 'base.html' %}{% block body %}<div id='out'></div>{% endblock %}"
    script = "for (const text of QT.data.texts || []) document.getElementById('out').append(QT.el('p', {}, QT.visible(text)));"
    script += (
        "if (QT.data.column) QT.unpack(QT.data.column).then((values) => { window.unpacked = Array.from(values); });"
    )
    read = report_page.asset
    monkeypatch.setattr(report_page, "asset", lambda name: script if name == "test.js" else read(name))
    base = Path(report_page.__file__).parent / "templates/base.html"
    sources = DictLoader({"base.html": base.read_text(), "test.html": template})
    monkeypatch.setattr(report_page, "PackageLoader", lambda name: sources)

    def write(data, title="A <b>title</b> \ud800"):
        path = tmp_path / "page.html"
        write_text(path, render_page("test.html", data, title=title, scripts=("test.js",)))
        return path

    return write


def test_hostile_text_is_shown_and_does_nothing(plain_page, open_page):
    page = open_page(plain_page({"texts": HOSTILE}))
    shown = page.locator("#out p").all_inner_texts()
    assert page.title().startswith("A <b>title</b>")
    assert shown[:6] == [*HOSTILE[:5], "{{ 7 * 7 }} {% raw %} ${7*7} &lt; &amp;"]
    assert shown[6] == "aU+202EbU+200BcU+2066dU+FEFFU+00ADU+0000U+001BU+2028U+2029"
    assert shown[7] == "U+D800 alone U+DC00"
    assert shown[9] == "e\u0301\u0316\u0301\u0316" + "U+0301U+0316" * 28  # would be drawn over the lines around
    assert page.evaluate("document.scripts.length") == 2
    assert page.locator("img, #out a").count() == 0


def test_injected_script_is_stopped_by_the_policy(plain_page, browser):
    path = plain_page({})
    path.write_text(path.read_text().replace("<div id='out'>", "<script>window.owned = 1</script><div id='out'>"))
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("typeof QT === 'object' && window.owned === undefined")
    page.close()


def test_columns_are_read_in_the_browser(plain_page, open_page):
    values = np.arange(70000, dtype=np.uint32) * 3
    page = open_page(plain_page({"column": pack_column(values)}))
    page.wait_for_function("window.unpacked")
    assert page.evaluate("unpacked") == values.tolist()


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0.0137), (-3.2, 7.9), (0, 123456), (9.9, 10.1), (2, 2), (-1e-9, 0), (0, 60)]
)
def test_ticks_are_round_and_the_line_lies_between_them(plain_page, open_page, low, high):
    page = open_page(plain_page({}))
    chart = "QT.lineChart({title: 't', x: 'x', y: 'y', range: [%r, %r], series: [{name: 's', points: [[%r, %r], [%r, %r]]}]})"
    page.evaluate(f"document.body.append({chart % (low, high, low, low, high, high)})")
    for anchor, inside in (("end", False), ("middle", True)):
        texts = page.locator(f"figure svg text[text-anchor={anchor}]:not([transform])").all_text_contents()
        values = [float(text.replace(",", "")) for text in texts if text not in ("x", "y")]
        steps = np.diff(values)
        if len(steps):
            assert 3 <= len(values) <= 9 or inside
            np.testing.assert_allclose(steps, steps[0], rtol=1e-2)
            assert f"{steps[0]:.0e}"[0] in "125" and round(values[0] / steps[0], 6) % 1 == 0
        within = (low <= values[0], values[-1] <= high) if inside else (values[0] <= low, high <= values[-1])
        assert all(within)


def test_labels_of_an_axis_stay_in_the_figure_and_apart(plain_page, open_page):
    page = open_page(plain_page({}))
    names = "Array.from({length: 20}, (_, i) => `${i / 20}-${(i + 1) / 20}`)"
    page.evaluate(
        f"document.body.append(QT.barChart({{title: 't', x: 'x', y: 'y', labels: {names}, series: [{{name: 's', "
        "values: Array(20).fill(1)}]}), QT.lineChart({title: 't', x: 'x', y: 'y', xticks: [[0, '0'], [1, '127-254']], "
        "series: [{name: 's', points: [[0, 1], [1, 2]]}]}))"
    )
    for figure in page.locator("figure svg").all():
        box = figure.bounding_box()
        labels = [one.bounding_box() for one in figure.locator("text[text-anchor=middle]:not([transform])").all()][1:]
        assert box is not None and len(labels) >= 2
        edges = [edge for one in labels if one for edge in (one["x"], one["x"] + one["width"])]
        assert edges == sorted(edges) and box["x"] <= edges[0] and edges[-1] <= box["x"] + box["width"]


def test_theme_follows_the_system_and_the_button(plain_page, open_page):
    page = open_page(plain_page({}), scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(20, 23, 28)"
    page.click("#qt-theme")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
