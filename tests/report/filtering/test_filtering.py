"""The document and the page of a filter, on rows made up here; the page in a real browser."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qtarget.core.errors import DataError
from qtarget.filtering import decide
from qtarget.report.filtering.document import BORDER_ROWS, filter_document
from qtarget.report.filtering.page import filter_page
from qtarget.storage.files import write_text
from tests.filtering.test_decision import rows_of, share
from tests.report.hostile import HOSTILE


def document_of(bad, *, marks=True, wanted="auto", groups=None, said=None, **more):
    rows = rows_of(bad)
    texts = iter(said or [])
    document = filter_document(
        decide(rows, wanted), rows, len(rows) + 2, title="rows.jsonl", cache="/c", groups=groups,
        marks=bad if marks else None, decode=lambda ids: next(texts, f"{len(ids)} tokens"),
        **more,
    )  # fmt: skip
    scores = document.pop("scores")
    return document, scores


def test_the_document_counts_and_is_json():
    bad = share(400, 0.2)
    document, scores = document_of(bad, groups=("source", ["a", "b"] * 200 + ["c"] * 2))
    assert document["kept"] + document["dropped"] == document["rows"] == 402
    assert document["not_judged"] == 2
    assert sum(line["dropped"] for line in document["groups"]["rows"]) == document["dropped"]
    assert {line["value"]: line["rows"] for line in document["groups"]["rows"]} == {"a": 200, "b": 200, "c": 2}
    assert sum(document["histogram"]["rows"]) == 400
    fitted = sum(document["histogram"]["good"]) + sum(document["histogram"]["bad"])
    assert fitted == pytest.approx(400, rel=0.1)
    assert document["roc"]["marked"] == 80
    assert document["roc"]["auc"]["surprise"] > 0.95
    curve = np.array(document["roc"]["curve"])
    assert (curve[0].tolist(), curve[-1].tolist()) == ([0, 0], [1, 1])
    area = np.trapezoid(curve[:, 1], curve[:, 0])
    assert area == pytest.approx(document["roc"]["auc"]["surprise"], abs=0.01)
    assert set(scores) == {"nll", "worst_nll", "surprise", "agreement", "combined"}
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_the_border_cases_are_the_ones_next_to_the_threshold():
    document, scores = document_of(share(400, 0.2))
    surprise, threshold = scores["surprise"], document["threshold"]
    worst_kept = document["borders"]["worst kept"]
    assert len(worst_kept) == BORDER_ROWS
    assert worst_kept[0]["scores"]["surprise"] == pytest.approx(threshold, abs=1e-3)
    assert all(case["kept"] for case in worst_kept)
    best = document["borders"]["best dropped"]
    assert best[0]["scores"]["surprise"] == pytest.approx(surprise[surprise > threshold].min(), abs=1e-3)
    near = document["borders"]["nearest to the threshold"]
    farthest = np.sort(np.abs(surprise - threshold))[BORDER_ROWS - 1]
    assert all(abs(case["scores"]["surprise"] - threshold) <= farthest + 1e-3 for case in near)


def test_where_nothing_can_be_told_nothing_is_dropped():
    document, _ = document_of(np.zeros(300, dtype=bool), marks=False)
    assert (document["verdict"], document["dropped"], document["threshold"], document["roc"]) == (
        "cannot tell",
        0,
        None,
        None,
    )
    assert document["borders"]["worst dropped"] == []
    assert "cannot tell" in filter_page(document)


def test_a_number_that_is_none_is_refused_by_the_page():
    document, _ = document_of(share(100, 0.2))
    document["facts"]["gain"] = float("nan")
    with pytest.raises(DataError):
        filter_page(document)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(open_page, tmp_path, scheme):
    said = [text for text in HOSTILE for _ in range(2)]
    document, _ = document_of(share(400, 0.2), groups=("source", [HOSTILE[0], "b"] * 201), said=said)
    path = tmp_path / "page.html"
    write_text(path, filter_page(document))
    page = open_page(path, scheme=scheme)
    assert page.title() == "Filter of rows.jsonl"
    assert page.locator("#finding").inner_text() == document["summary"] + "."
    cells = page.locator("#counts tbody tr td, #counts tbody tr th").all_inner_texts()
    assert cells[:4] == ["kept", str(document["kept"]), "dropped", str(document["dropped"])]
    assert HOSTILE[0] in cells
    assert page.locator("#histogram polyline").count() == 3
    assert page.locator("#roc tbody tr").count() == 5
    assert page.locator("#roc polyline").count() == 1
    cards = page.locator(".qt-case")
    assert cards.count() == BORDER_ROWS
    assert cards.first.locator("dd").first.inner_text() == HOSTILE[0]
    page.select_option("#kind", "worst dropped")
    assert page.locator(".qt-case.qt-dropped").count() == BORDER_ROWS
    assert page.locator(".qt-marked").count() > BORDER_ROWS // 2
    page.select_option("#kind", "worst kept")
    assert page.locator(".qt-case.qt-dropped").count() == 0
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#qt-theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground


def test_weighed_rows_are_all_kept_and_counted_by_their_weights():
    bad, groups = share(400, 0.2), ("source", ["a", "b"] * 200 + ["c"] * 2)
    document, _ = document_of(bad, groups=groups, form="weight", own=3)
    expected = decide(rows_of(bad)).weights
    assert (document["kept"], document["dropped"], document["weights"]["own"]) == (402, 0, 3)
    assert document["weights"]["sum"] == pytest.approx(expected.sum(), abs=1e-3)
    assert document["weights"]["light"] == (expected < 0.05).sum() > 50
    by_value = {line["value"]: (line["weight"], line["light"]) for line in document["groups"]["rows"]}
    assert by_value["a"] == (pytest.approx(expected[::2].sum(), abs=1e-3), (expected[::2] < 0.05).sum())
    assert by_value["c"] == (0, 0)  # nobody judged them
    lightest = document["borders"]["least weight"][0]
    assert lightest["kept"] and lightest["reason"].startswith("weighed 0.0")
    assert document_of(np.zeros(300, dtype=bool), form="weight")[0]["weights"] is None


def test_the_page_of_weights_in_a_browser(open_page, tmp_path):
    lines = ["b: 1 of 9 rows has a weight under 0.05: row 2, '<b>'"]
    document, _ = document_of(share(400, 0.2), groups=("source", ["a", "b"] * 201), form="weight", own=2, light=lines)
    write_text(tmp_path / "page.html", filter_page(document))
    page = open_page(tmp_path / "page.html")
    cells = page.locator("#counts tbody tr td, #counts tbody tr th").all_inner_texts()
    assert cells[:4] == [
        "kept, each weighed by P(right)",
        "402",
        "their weights in all",
        f"{document['weights']['sum']:.1f}",
    ]
    assert lines[0] in page.locator("#counts").inner_text()
    assert page.locator("#kind option").first.inner_text().startswith("nearest")
    page.select_option("#kind", "least weight")
    assert page.locator(".qt-case.qt-dropped").count() == 0


def test_the_page_without_marks_or_drops_in_a_browser(open_page, tmp_path):
    document, _ = document_of(np.zeros(300, dtype=bool), marks=False)
    path = tmp_path / "page.html"
    write_text(path, filter_page(document))
    page = open_page(path)
    assert page.locator("#finding").inner_text().startswith("cannot tell")
    assert page.locator("#roc table").count() == 0
    assert page.locator("#kind option").all_inner_texts() == [f"worst kept ({BORDER_ROWS})"]
