"""Intervals against known truths, the verdict in words, the document by hand, and its page in a browser."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qtarget.core.errors import ShapeError
from qtarget.report.comparison.document import Entry, Scored, comparison_document
from qtarget.report.comparison.page import comparison_page
from qtarget.report.comparison.simultaneous import simultaneous_differences
from qtarget.report.comparison.verdict import Line, Measure, verdict
from qtarget.storage.files import write_text
from tests.report.hostile import HOSTILE

EXACT = Measure("exact", 100, 3)


def drawn(random, contenders, seeds, rows, *, luck, effects=None):
    """Right or wrong: rows of different difficulty, a luck of each training run, and coins."""
    hard = random.normal(0, 1.2, rows)
    out = np.empty((contenders, seeds, rows))
    for k in range(contenders):
        for s in range(seeds):
            logit = hard + random.normal(0, luck) + (0 if effects is None else effects[k])
            out[k, s] = random.random(rows) < 1 / (1 + np.exp(-logit))
    return out


def test_all_intervals_together_hold_the_truth_and_seeds_count():
    random = np.random.default_rng(0)
    held, naive = 0, 0
    for trial in range(80):
        scores = drawn(random, 5, 3, 150, luck=0.4)
        found = simultaneous_differences(scores, seed=trial)
        held += bool(((found.lows <= 0) & (found.highs >= 0)).all())
        rows_alone = simultaneous_differences(scores.mean(1, keepdims=True), seed=trial)
        naive += bool(((rows_alone.lows <= 0) & (rows_alone.highs >= 0)).all())
    assert held >= 70  # 95 % of 80 is 76; 70 is three standard errors below
    assert naive < 60, "the luck of three seeds would be left out"


def test_few_prompts_widen_the_intervals():
    random, held = np.random.default_rng(3), 0
    for trial in range(100):
        effect = random.normal(size=4)
        scores = np.zeros((2, 3, 16))
        scores[1] = np.repeat(effect, 4) + random.normal(0, 0.2, (3, 16))
        found = simultaneous_differences(scores, groups=np.repeat(np.arange(4), 4).tolist(), seed=trial)
        held += bool(found.lows[0] <= 0 <= found.highs[0])
    assert held >= 89  # 95 expected, 89 is three standard errors below; without Student's factor about 80


def test_a_large_difference_is_found_and_means_are_plain_means():
    scores = drawn(np.random.default_rng(1), 3, 3, 300, luck=0.05, effects=[0, 2.0, 0])
    found = simultaneous_differences(scores)
    assert found.lows[0] > 0 and found.lows[1] < 0 < found.highs[1]
    assert found.means == pytest.approx((scores.mean((1, 2)) - scores[0].mean())[1:])


def test_rows_of_one_prompt_are_drawn_together():
    scores = drawn(np.random.default_rng(2), 2, 1, 40, luck=0.1)
    copies = np.repeat(scores, 10, axis=-1)
    alone, together = (
        simultaneous_differences(scores),
        simultaneous_differences(copies, groups=[i // 10 for i in range(400)]),
    )
    apart = simultaneous_differences(copies)
    width = [float(found.highs[0] - found.lows[0]) for found in (alone, together, apart)]
    assert width[1] == pytest.approx(width[0], rel=0.1) and width[2] < 0.7 * width[0]


def test_weights_make_nats_a_token():
    found = simultaneous_differences([[[0.0, 0.0]] * 2, [[1.0, 4.0]] * 2], weights=[1, 3])
    assert found.means.tolist() == [(1 + 12) / 4]


def test_rows_of_weight_0_are_as_if_they_were_not_there():
    scores = drawn(np.random.default_rng(4), 3, 3, 40, luck=0.2)
    more = np.concatenate([scores, np.ones((3, 3, 500))], -1)
    groups = [i // 2 for i in range(540)]
    alone = simultaneous_differences(scores, None, groups[:40], reach=1.0)
    found = simultaneous_differences(more, [1.0] * 40 + [0.0] * 500, groups, reach=1.0)
    for one, other in zip(vars(alone).values(), vars(found).values(), strict=True):
        assert one == pytest.approx(other)


@pytest.mark.parametrize("scores", [np.zeros((1, 3, 4)), np.zeros((2, 3)), np.zeros((2, 3, 0))])
def test_shapes(scores):
    with pytest.raises(ShapeError, match="expected"):
        simultaneous_differences(scores)


def test_confidence_counts_how_often_chance_alone_goes_as_far():
    random = np.random.default_rng(4)
    wrongly = 0
    for trial in range(100):
        found = simultaneous_differences(drawn(random, 4, 3, 100, luck=0.3), seed=trial)
        wrongly += bool(found.confidences.max() >= 0.8)
    assert 5 <= wrongly <= 32  # 20 expected if the best of three that are no better is called better once in five
    clear = simultaneous_differences(drawn(random, 3, 3, 300, luck=0.05, effects=[0, 2.0, -2.0]))
    assert clear.confidences[0] == 1.0 and clear.confidences[1] < 0.01


def test_enough_rows_are_enough():
    random, effects = np.random.default_rng(5), [0, 0.35]
    few = simultaneous_differences(drawn(random, 2, 3, 100, luck=0.0, effects=effects))
    assert few.lows[0] < 0 < few.means[0]
    rows = int(few.enough_rows[0])
    assert 100 < rows < 5000
    # The same rows again and again have the same means, and errors that fall with the square root of their number.
    scores = drawn(np.random.default_rng(5), 2, 3, 100, luck=0.0, effects=effects)
    lows = [simultaneous_differences(np.tile(scores, round(rows / 100 * share))).lows[0] for share in (0.5, 2.0)]
    assert lows[0] < 0 < lows[1]
    assert simultaneous_differences(scores[::-1]).enough_rows[0] == np.inf


def line(name, level, low=None, high=None, **more) -> Line:
    return Line(name, level, None if low is None else {"mean": (low + high) / 2, "low": low, "high": high}, **more)


@pytest.mark.parametrize(
    ("lines", "take", "words"),
    [
        ([line("sft", 0.5), line("a", 0.55, 0.01, 0.09), line("b", 0.6, 0.02, 0.18)], "b",
         "b +10.0 points over sft (+2.0 .. +18.0); also better: a (+5.0 points); stop here"),
        ([line("sft", 0.5), line("a", 0.6, -0.1, 0.3, confidence=0.49, enough_rows=372)], "sft",
         "no difference that 3 seeds and 100 rows can show (the next is a, +10.0 points over sft (-10.0 .. +30.0)): take sft; "
         "if it is real, about 400 validation rows would show it"),
        ([line("sft", 0.5), line("a", 0.6, -0.1, 0.3, confidence=0.3)], "sft",
         "no difference that 3 seeds and 100 rows can show (the next is a, +10.0 points over sft (-10.0 .. +30.0)): take sft; "
         "if it is real, more than 3 seeds would be needed to show it"),
        ([line("sft", 0.5), line("a", 0.6, -0.01, 0.21, confidence=0.93, enough_rows=130),
          line("b", 0.58, -0.01, 0.17, confidence=0.9)], "a",
         "probably a, +10.0 points over sft (-1.0 .. +21.0), confidence 93 %: take it; about 200 validation rows would show it"),
        ([line("sft", 0.5), line("a", 0.508, -0.1, 0.116, confidence=0.6)], "sft",
         "no difference that 3 seeds and 100 rows can show (the next is a, +0.8 points over sft (-10.0 .. +11.6)): take sft; "
         "if it is real, more than 3 seeds would be needed to show it"),
        ([line("sft", 0.5), line("a", 0.5, -0.1, 0.1, confidence=0.5)], "sft",
         "no difference that 3 seeds and 100 rows can show (the next is a, 0.0 points against sft (-10.0 .. +10.0)): take sft"),
        ([line("sft", 0.5), line("a", 0.4, -0.15, -0.05)], "sft",
         "sft is best (the next is a, -10.0 points against sft (-15.0 .. -5.0)): take sft"),
        ([line("sft", 0.0), line("a", 0.0, 0.0, 0.0)], None,
         "no model answers one of 100 rows right by exact, so nothing can be told; choose another --metric, or nll"),
    ],
)  # fmt: skip
def test_verdicts(lines, take, words):
    found = verdict(lines, EXACT, {})
    assert (found.take, found.sentence) == (take, words)


def test_where_nothing_is_right_because_answers_are_cut_off_the_next_step_is_their_length():
    short = verdict([line("sft", 0.0), line("a", 0.0, 0.0, 0.0)], Measure("exact", 100, 3, cut_off=True), {})
    assert short.sentence.endswith("most answers are cut off: give more --max-new-tokens")
    assert (
        Scored([[0.0] * 4] * 2, [1.0] * 4, cut=5).mostly_cut
        and not Scored([[0.0] * 4] * 2, [1.0] * 4, cut=4).mostly_cut
    )


def test_one_seed_shows_nothing_and_the_base_may_be_better():
    lines = [line("sft", 0.5), line("a", 0.7, 0.1, 0.3)]
    one = verdict(lines, Measure("exact", 100, 1), {})
    assert one.take == "sft" and "one seed cannot show" in one.sentence and "--seeds" in one.sentence
    better = verdict(lines, EXACT, {"a": line("base", 0.9, 0.1, 0.3)})
    assert better.sentence.startswith(
        "the untrained base is better than a (+20.0 points (+10.0 .. +30.0)): these rows do not help it; of the contenders: a +20.0"
    )
    assert "as well as that" in verdict(lines, EXACT, {"a": line("base", 0.7, -0.1, 0.1)}).sentence


def entry(name, scores, **changes):
    sets = {"data": Scored(scores, [1.0] * len(scores[0]), [1.0] * len(scores))}
    return Entry(name, sets, **({"best": 1e-3, "rates": (1e-3, 1e-3), "seconds": [2.0, 4.0], "memory_bytes": 10**9,
                                 "texts": [f"{name} {i}" for i in range(len(scores[0]))]} | changes))  # fmt: skip


def document_of(entries, base=None, rows=None, **changes):
    count = len(entries[0].sets["data"].weights)
    base = base or entry("base", [[0.0] * count], best=None, rates=())
    about = {"data": {"file": "v.jsonl", "rows": count, "not_judged": 2, "metric": "exact"}} | changes.pop("sets", {})
    rows = rows or [{"prompt": f"p{i}", "reference": f"r{i}"} for i in range(count)]
    return comparison_document(base, entries, groups=list(range(count)), sets=about, settings={"steps": 4}, rows=rows,
                               cost={"seconds": 3.0}, **changes)  # fmt: skip


def two():
    sft = entry("sft", [[1, 0, 0, 0, 1, 0] * 10] * 3, curve=[[1, 2.0], [2, 1.0]])
    tuning = [{"rate": r, "level": 0.5, "halves": [0.5, 0.5]} for r in (1e-3, 3e-3)]
    better = entry("dft", [[1, 1, 0, 1, 1, 0] * 10] * 3, curve=[[1, 2.0], [2, 0.5]], tuning=tuning, notes=["a note"],
                   validation=[[1, 2.0], [2, 1.5]])  # fmt: skip
    return [sft, better]


def test_the_document_by_hand():
    document = document_of(two(), left_out=["iw_sft: no room"])
    json.dumps(document, allow_nan=False)
    sft, dft = document["contenders"]
    assert (document["take"], sft["to_baseline"]) == ("dft", None)
    assert dft["to_baseline"]["mean"] == pytest.approx(2 / 6) and dft["level"] == pytest.approx(4 / 6)
    assert document["base"]["to_baseline"]["mean"] == pytest.approx(-2 / 6)
    assert document["finding"].startswith("dft +33.3 points over sft (")
    assert document["rows"]["differing"] == 20 and document["rows"]["models"] == ["dft", "sft"]
    shown = document["rows"]["shown"][0]
    assert shown["row"] == 1 and [one["score"] for one in shown["answers"]] == [1.0, 0.0]
    assert shown["answers"][0]["completion"] == "dft 1"


def test_rows_that_judge_nobody_are_no_rows_of_the_verdict():
    weights = [0.0] * 6 + [1.0] * 54
    entries = [Entry(**{**vars(one), "sets": {"data": Scored(one.sets["data"].scores, weights)}}) for one in two()]
    base = entry("base", [[0.0] * 60], best=None, rates=())
    document = document_of(entries, Entry(**{**vars(base), "sets": {"data": Scored([[0.0] * 60], weights)}}))
    assert document["measure"]["rows"] == document["sets"]["data"]["rows"] == 54
    [line] = document["left_out"]
    assert line == "v.jsonl: 6 rows whose answer has weight 0, or no token within max_length, judge nobody"


def test_page_in_a_browser(open_page, tmp_path):
    forgetting = {"forgetting": {"file": "old.jsonl", "rows": 4, "metric": "exact"}}
    kept = Scored([[1.0, 0.0, 1.0, 1.0]] * 3, [1.0] * 4)
    entries = [Entry(**{**vars(one), "sets": {**one.sets, "forgetting": kept}}) for one in two()]
    base = entry("base", [[0.0] * 60], best=None, rates=())
    base = Entry(**{**vars(base), "sets": {**base.sets, "forgetting": Scored([[1.0] * 4], [1.0] * 4)}})
    document = document_of(entries, base, left_out=["iw_sft: no room"], sets=forgetting)
    write_text(tmp_path / "page.html", comparison_page(document))
    for scheme in ("light", "dark"):
        page = open_page(tmp_path / "page.html", scheme=scheme)
        assert page.text_content("#finding").strip() == document["finding"] + "."
        assert "+33.3 (" in page.text_content("#summary") and "-25.0 (" in page.text_content("#summary")
        assert page.text_content("#summary tr.qt-taken th") == "dft"
        assert "a note" in page.text_content("#notes") and "iw_sft: no room" in page.text_content("#notes")
        assert page.locator("#curves svg polyline").count() == 3
        assert page.locator("#rows article").count() == 20
        assert "0.003" in page.text_content("#rates")
    page.select_option("#better", "1")
    assert page.locator("#rows article").count() == 0


@pytest.mark.parametrize("text", HOSTILE[:6] if isinstance(HOSTILE, list) else list(HOSTILE)[:6])
def test_hostile_text_stays_text(open_page, tmp_path, text):
    rows = [{"prompt": text, "reference": text}] * 60
    sft, dft = two()
    dft = Entry(**{**vars(dft), "name": text[:40] or "x", "texts": [text] * 60, "notes": [text]})
    write_text(tmp_path / "page.html", comparison_page(document_of([sft, dft], rows=rows)))
    page = open_page(tmp_path / "page.html")
    assert page.locator("#rows article").count() == 20 and page.locator("#qt-problem[hidden]").count() == 1


def test_shares_of_right_answers_lie_no_further_apart_than_all_and_none():
    from qtarget.report.comparison.document import _ends, _reach
    from qtarget.report.comparison.simultaneous import simultaneous_differences

    scores = [[[1.0, 1.0, 1.0, 0.0]] * 2, [[0.0, 0.0, 0.0, 0.0]] * 2]
    found = simultaneous_differences(scores)
    assert found.lows[0] < -1
    ends = _ends(found, 0, _reach(scores))
    assert ends["low"] == -1.0
    assert ends["mean"] == found.means[0]
    assert _ends(found, 0, _reach([[[-3.0]], [[-1.0]]]))["low"] == found.lows[0]  # nats have no end


def test_contenders_that_answer_alike_may_still_differ():
    right = np.random.default_rng(3).random((1, 1, 9)).round().repeat(3, 1)
    found = simultaneous_differences(np.concatenate([right] * 3), reach=1.0)
    assert found.means.tolist() == [0.0, 0.0]
    assert (found.highs > 1 / 9).all() and (found.highs < 0.5).all() and np.allclose(found.lows, -found.highs)
    assert (found.confidences < 0.5).all(), "no gain is never probable"
    wide = simultaneous_differences(np.concatenate([np.tile(right, 20)] * 2), reach=1.0)
    assert wide.highs[0] < found.highs[0] / 10, "many rows that tell nothing apart say much"


def test_the_floor_holds_where_contenders_seldom_differ():
    """A true loss of 1 row in 30: of ten rows two in three trials see none of it."""
    random, misses, trials = np.random.default_rng(11), 0, 200
    for trial in range(trials):
        first = (random.random(10) < 0.6).astype(float)
        second = np.where(random.random(10) < 1 / 30, 0.0, first)
        found = simultaneous_differences(np.stack([first, second])[:, None], seed=trial, reach=1.0)
        misses += not found.lows[0] <= -0.6 / 30 <= found.highs[0]
    assert misses <= 0.05 * trials
