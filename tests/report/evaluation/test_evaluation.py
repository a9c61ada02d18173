"""The document by hand, and its page in a browser."""

from __future__ import annotations

import json

import pytest

from qtarget.core.errors import DataError
from qtarget.report.evaluation.document import ROWS_SHOWN, Entry, evaluation_document
from qtarget.report.evaluation.page import evaluation_page
from qtarget.storage.files import write_text
from tests.report.hostile import HOSTILE

ENTRIES = [
    Entry("base", "/m/base", None, [], {"data": 20}),
    Entry("a", "/m/a", "base", ["checkpoint-4"], {"data": 20}),
    Entry("b", "/m/b", "base", [], {"data": 20}),
]


def scored(nats, tokens=None, keys="k"):
    return [{"nats": n, "tokens": t, "key": keys} for n, t in zip(nats, tokens or [2] * len(nats), strict=True)]


def said(scores, texts=None, stopped=None):
    texts = texts or ["said"] * len(scores)
    ends = stopped or [True] * len(scores)
    return [
        {"scores": s if isinstance(s, list) else [float(s)], "completions": [t], "stopped": [e]}
        for s, t, e in zip(scores, texts, ends, strict=True)
    ]


def document_of(results, sets=("data",), entries=ENTRIES, texts=None):
    rows = len(next(part for one in results.values() for part in one.values() if part))
    about = {name: {"file": f"{name}.jsonl", "rows": rows, "fingerprint": "f", "metric": "exact"} for name in sets}
    texts = texts or [{"prompt": f"p{i}", "reference": f"r{i}"} for i in range(rows)]
    return evaluation_document(entries, about, results, settings={"temperature": 0.0}, texts=dict.fromkeys(sets, texts))


def results(base, a, b, name="data", /, **changes):
    of = {"base": base, "a": a, "b": b}
    nll = {"base": scored([4.0] * 4), "a": scored([2.0, 2.0, 2.0, 4.0]), "b": scored([2.0] * 4)} | changes
    return {(name, who): {"nll": nll[who], "completion": scores and said(scores)} for who, scores in of.items()}


def test_numbers_by_hand():
    document = document_of(results([0, 0, 0, 0], [1, 1, 0, 1], [1, 0, 0, 1]))
    json.dumps(document, allow_nan=False)
    base, a, b = document["contenders"]
    assert [one["sets"]["data"]["completion"]["mean"] for one in (base, a, b)] == [0, 0.75, 0.5]
    assert [one["sets"]["data"]["nll"]["mean"] for one in (base, a, b)] == [2, 1.25, 1]
    assert base["sets"]["data"]["to_base"] is None
    assert a["sets"]["data"]["to_base"]["completion"]["mean"] == 0.75
    assert a["sets"]["data"]["to_base"]["nll"]["mean"] == -0.75
    assert b["sets"]["data"]["to_base"]["nll"] == {"mean": -1, "low": -1, "high": -1, "method": "paired bootstrap"}
    (pair,) = document["pairs"]
    assert (pair["a"], pair["b"], pair["sets"]["data"]["completion"]["mean"]) == ("a", "b", 0.25)
    assert pair["sets"]["data"]["nll"]["mean"] == 0.25
    assert [row["row"] for row in document["rows"]["data"]["shown"]] == [0, 1, 3]
    assert document["finding"].startswith("a completes 75.0 % (")
    assert (
        "against b: +25.0 points" in document["finding"] and "no difference that 4 rows can show" in document["finding"]
    )
    assert a["notes"] == ["checkpoint-4"]


def test_the_better_of_two_is_ahead_whatever_their_order():
    document = document_of(results([0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]))
    assert "b completes 100.0 %" in document["finding"]
    assert "against a: +100.0 points (+67.3 .. +100.0)" in document["finding"]


def test_other_tokens_have_no_common_measure():
    document = document_of(results([0] * 4, [1] * 4, [1] * 4, a=scored([1.0] * 4, keys="other")))
    _, a, b = document["contenders"]
    assert a["sets"]["data"]["to_base"]["nll"] is None and b["sets"]["data"]["to_base"]["nll"] is not None
    assert any("other tokens than for base" in note for note in a["notes"])
    assert document["pairs"][0]["sets"]["data"]["nll"] is None


def test_rows_beyond_max_length_and_cut_answers_are_noted():
    short = scored([1.0, 1.0, 1.0, 0.0], [2, 2, 2, 0])
    found = results([0] * 4, [1] * 4, [1] * 4, base=short, a=short, b=short)
    found["data", "b"]["completion"] = said([1] * 4, stopped=[True, False, True, False])
    b = document_of(found)["contenders"][2]
    assert b["sets"]["data"]["nll"]["mean"] == 0.5 and b["sets"]["data"]["nll"]["rows"] == 3
    assert b["sets"]["data"]["completion"]["unfinished"] == 0.5
    assert any("1 row has no answer token" in note for note in b["notes"])
    assert any("2 rows have a completion cut off at 20" in note for note in b["notes"])


def test_answers_of_weight_0_judge_nobody_and_are_counted():
    off = scored([2.0, 2.0, 2.0, 0.0], [2, 2, 2, 0])
    found = results([0] * 4, [1] * 4, [1, 0, 1, 1], base=off, a=off, b=off)
    found = {key: one | {"completion": [*one["completion"][:3], None]} for key, one in found.items()}
    document = document_of(found)
    _, a, b = document["contenders"]
    assert (a["sets"]["data"]["completion"]["rows"], b["sets"]["data"]["completion"]["rows"]) == (3, 3)
    assert b["sets"]["data"]["completion"]["mean"] == pytest.approx(2 / 3)
    assert a["sets"]["data"]["to_base"]["completion"]["mean"] == 1.0
    assert [row["row"] for row in document["rows"]["data"]["shown"]] == [0, 1, 2]
    assert "data: 1 row has an answer of weight 0, and no completion" in a["notes"]


def test_without_completions_likelihood_decides_and_forgetting_is_said():
    found = results(None, None, None) | results([1] * 4, [0] * 4, [1] * 4, "forgetting")
    document = document_of(found, ("data", "forgetting"))
    assert document["finding"].startswith("b has an nll of 1.000 (1.000 .. 1.000), its base base has an nll of 2.000")
    assert document["finding"].endswith(
        "on forgetting.jsonl: +0.0 points (-32.7 .. +32.7), -1.000 (-1.000 .. -1.000) nats a token"
    )


def test_a_base_alone():
    only = {("data", "base"): {"nll": None, "completion": said([1, 0])}}
    assert document_of(only, entries=ENTRIES[:1])["finding"].startswith("base: completes 50.0 %")


def test_only_the_first_differing_rows_are_held_the_largest_differences_first():
    count = ROWS_SHOWN + 30
    half = [[0.5]] * (count - 1) + [[1.0]]
    nothing = scored([1.0] * count)
    found = results([0] * count, half, [0] * count, base=nothing, a=nothing, b=nothing)
    rows = document_of(found)["rows"]["data"]
    assert (rows["differing"], len(rows["shown"]), rows["shown"][0]["row"]) == (count, ROWS_SHOWN, count - 1)


def test_a_number_that_is_none_is_refused_by_the_page():
    document = document_of(results([0] * 4, [1] * 4, [1] * 4))
    document["settings"]["temperature"] = float("nan")
    with pytest.raises(DataError):
        evaluation_page(document)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(open_page, tmp_path, scheme):
    count = len(HOSTILE)
    texts = [{"prompt": f"ask {text}", "reference": text} for text in HOSTILE]
    scores = {"base": [0] * count, "a": [1, [0.5], *[0] * (count - 3), 1], "b": [1] * (count - 1) + [0]}
    found = {("data", who): {"nll": scored([2.0] * count), "completion": said(scores[who], HOSTILE)} for who in scores}
    entries = [ENTRIES[0], Entry("a", "/m/a", "base", [HOSTILE[0]], {"data": 20}), ENTRIES[2]]
    path = tmp_path / "page.html"
    document = document_of(found, entries=entries, texts=texts)
    write_text(path, evaluation_page(document))
    page = open_page(path, scheme=scheme)
    assert page.title() == "Evaluation on data.jsonl"
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.locator("#finding").inner_text() == document["finding"] + "."
    cells = page.locator("#summary tbody tr").nth(1).locator("th, td").all_inner_texts()
    assert (cells[0], cells[4], cells[5]) == ("a", "1.000 (1.000 .. 1.000)", "0.000 (0.000 .. 0.000)")
    assert cells[1].startswith(f"{100 * 2.5 / count:.1f} % (")
    assert page.locator("#notes li").first.inner_text() == f"a: {HOSTILE[0]}"
    cards = page.locator(".qt-case")
    assert cards.count() == document["rows"]["data"]["differing"] == count
    first = cards.first.locator("dd").all_inner_texts()
    assert first == [f"ask {HOSTILE[0]}", *[HOSTILE[0]] * 4]
    assert [cards.first.locator("dd").nth(i).get_attribute("class") for i in (2, 3)] == ["qt-wrong", "qt-right"]
    page.select_option("#better", "1")
    page.select_option("#worse", "2")
    assert page.locator(".qt-case").count() == 1
    assert page.locator("#count").inner_text().startswith(f"1 of the {count} rows")
    page.select_option("#better", "2")
    page.select_option("#worse", "1")
    assert page.locator(".qt-case").count() == count - 2
    assert page.locator("#pairs tbody tr").count() == 1
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#qt-theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
