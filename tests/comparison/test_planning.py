"""What fits into a budget, which rows tune and which judge, and a comparison of runs that are made up."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from qtarget.comparison.assemble import base_entry, entry_of
from qtarget.comparison.budget import Plan, fitting, left_out, parse_budget
from qtarget.comparison.compare import Comparison, best_rate
from qtarget.comparison.halves import groups_of, halves
from qtarget.comparison.jobs import TUNING_SEED, Contender
from qtarget.core.errors import ConfigError
from qtarget.data.prompts import questions_of

PLAN = Plan(("sft", "a", "b", "c"), (1.0, 0.3, 3.0), 3)


def test_a_budget_drops_seeds_then_contenders_then_rates():
    assert fitting(PLAN, 24 * 10, 10, 1) == PLAN
    assert fitting(PLAN, 12 * 10, 10, 2) == PLAN
    assert fitting(Plan(PLAN.contenders, PLAN.rates, 6), 24 * 10, 10, 1).seeds == 3
    assert fitting(PLAN, 23 * 10, 10, 1).contenders == ("sft", "a", "b")
    one = fitting(PLAN, 11 * 10, 10, 1)
    assert (one.contenders, one.rates, one.seeds) == (("sft", "a", "b"), (1.0,), 3)
    assert fitting(PLAN, 4 * 10, 10, 1) == Plan(("sft", "a"), (1.0,), 2)
    with pytest.raises(ConfigError, match=r"one run takes 10 s.*about 40 s"):
        fitting(PLAN, 39, 10, 1)


def test_what_is_left_out_is_said():
    assert left_out(PLAN, Plan(("sft", "a"), (1.0,), 2), 10) == [
        "b, c: not run; a run takes 10 s, and --budget has no room",
        "learning rates 0.3, 3: not tried; a run takes 10 s",
        "seeds 2 to 2: not run; a run takes 10 s",
    ]
    assert left_out(PLAN, PLAN, 10) == []


@pytest.mark.parametrize("text", ["", "-3m", "soon", "0", "3x", "m"])
def test_no_budget(text):
    with pytest.raises(ConfigError, match="is no time"):
        parse_budget(text)


def test_halves_are_equal_keep_prompts_together_and_do_not_depend_on_order():
    rows = [{"prompt": f"p{i % 30}", "completion": str(i)} for i in range(60)]
    parts = halves(questions_of(rows))
    assert sum(parts) == 30
    assert all(parts[i] == parts[i + 30] for i in range(30))
    assert halves(questions_of(rows[::-1])) == parts[::-1]
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in ("ab", "ac")
    ]
    assert groups_of([*questions_of([*chats, {"messages": [{"role": "user", "content": "z"}]}])]) == [0, 0, 1]


def test_rows_without_prompts_of_their_own_are_apart():
    """All in one half, and one group, would be judged by rates that nothing chose, and with intervals of no width."""
    named = questions_of([{"body": f"row {i % 20}"} for i in range(40)], "body")
    assert sum(halves(named)) == 20 and groups_of(named) == [*range(20)] * 2
    free = questions_of([{"prompt": "", "completion": f"row {i % 20}"} for i in range(40)])
    assert sum(halves(free)) == 20 and groups_of(free) == [*range(20)] * 2


def result(scores, seconds=1.0, steps=4):
    nll = [[1.0, 2.0]] * len(scores)
    return {
        "steps": steps, "seconds": seconds, "cpu_seconds": 1.0, "memory_bytes": 10, "curve": [[1, 2.0]], "validation": [],
        "sets": {"data": {"nll": nll, "scores": scores, "unfinished": 0}}, "max_new_tokens": {"data": 9},
    }  # fmt: skip


class MadeUp:
    """A pool: a function of the job gives the scores of eight rows; jobs are counted, and some may be forbidden."""

    def __init__(self, scores, fails=lambda job: None, seconds: float | Callable = 1.0):
        self.scores, self.fails, self.seconds, self.ran = scores, fails, seconds, []

    def map(self, jobs, on_done):
        for job in jobs:
            self.ran.append(job.key)
            why = self.fails(job)
            seconds = self.seconds(job) if callable(self.seconds) else self.seconds
            found = {"failed": why} if why else result(self.scores(job), seconds)
            on_done(
                job, found if why else {**found, "texts": {"data": [job.key] * len(found["sets"]["data"]["scores"])}}
            )


HALVES = [0, 1] * 4


def run(folder, pool, plan=PLAN, seconds=None, at_once=1):
    told = []
    comparison = Comparison(folder, pool, HALVES, at_once=at_once, seconds=seconds, advance=lambda *a: told.append(a))
    return comparison.run(plan), told


def scores(job):
    """Rate 3 is best on rows of half 0, rate 0.3 on half 1, for contender a; all others are alike."""
    if job.contender != "a" or job.kind == "base":
        return [0.0] * 8
    good = {3.0: 0, 0.3: 1}.get(job.rate)
    return [1.0 if half == good else 0.0 for half in HALVES]


def test_rows_are_judged_at_the_rate_that_the_other_half_chose(tmp_path):
    pool = MadeUp(scores)
    found, _ = run(tmp_path, pool)
    # rate 3 is best on half 0, so it judges half 1, where it is bad
    assert found.chosen["a"] == (0.3, 3.0) and found.chosen["sft"] == (1.0, 1.0)
    entry = entry_of(found, Contender("a", {"target": "a"}), HALVES, tmp_path)
    assert entry.sets["data"].scores == [[0.0] * 8] * 3
    assert any("halves of the rows chose different rates, 3 and 0.3" in note for note in entry.notes)
    assert entry.texts is not None and {str(text).split("|")[1] for text in entry.texts} == {"0.3", "3"}
    assert base_entry(found, "base", tmp_path).sets["data"].scores == [[0.0] * 8]
    assert len(pool.ran) == 1 + 12 + 9 + 6
    assert not any(key.endswith(f"|{TUNING_SEED}") for key in pool.ran[13:])


def test_finished_runs_are_never_run_again_and_more_seeds_go_on(tmp_path):
    run(tmp_path, MadeUp(scores))
    again = MadeUp(scores)
    found, told = run(tmp_path, again)
    assert again.ran == [] and len(found.final) == 15 and told[-1][0] == told[-1][1] == 28
    more = MadeUp(scores)
    run(tmp_path, more, Plan(PLAN.contenders, PLAN.rates, 4))
    assert sorted(more.ran) == ["a|0.3|3", "a|3|3", "b|1|3", "c|1|3", "sft|1|3"]
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines)
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:20]) + '\n{"key": "cut o')
    rest = MadeUp(scores)
    run(tmp_path, rest)
    assert len(rest.ran) == 8 and set(rest.ran) <= {json.loads(line)["key"] for line in lines[20:]}


def test_a_rate_that_fails_is_noted_and_a_contender_that_fails_is_left_out(tmp_path):
    def fails(job):
        broken = (job.contender, job.rate) == ("b", 3.0) or (job.contender, job.seed) == ("c", 1)
        return "loss is nan" if broken else None

    found, _ = run(tmp_path, MadeUp(scores, fails))
    assert "rate 3 failed: loss is nan" in found.notes["b"] and "b" in found.plan.contenders
    assert found.left_out == ["c: seed 1 failed: loss is nan"] and "c" not in found.plan.contenders
    found, _ = run(tmp_path / "other", MadeUp(scores, lambda job: "no memory" if job.contender == "a" else None))
    assert found.left_out == ["a: rate 3 failed: no memory"]
    with pytest.raises(ConfigError, match="sft, which all are compared with, cannot be trained"):
        run(
            tmp_path / "third",
            MadeUp(scores, lambda job: "x" if job.contender == "sft" and job.kind == "tune" else None),
        )


def test_a_budget_measures_the_first_run_and_plans(tmp_path):
    pool = MadeUp(scores, seconds=10.0)
    found, _ = run(tmp_path, pool, seconds=18 * 10 + 5)
    assert found.plan.contenders == ("sft", "a", "b")
    assert found.left_out == ["c: not run; a run takes 10 s, and --budget has no room"]
    assert not any(key.startswith("c|") for key in pool.ran)
    with pytest.raises(ConfigError, match="--budget"):
        run(tmp_path / "none", MadeUp(scores, seconds=10.0), seconds=20)


def test_each_line_says_how_long_the_rest_takes_once_a_run_was_trained(tmp_path):
    """Runs that tune are shorter, and nobody knows yet where the halves disagree: until then it is the least."""
    _, told = run(tmp_path, MadeUp(scores, seconds=lambda job: 120.0 if job.kind == "final" else 60.0))
    assert "left" not in told[0][2] and "left" not in told[-1][2]
    assert told[1][2].endswith("tuning: 60.0 s; at least about 23 min left")
    assert told[13][2].endswith("seed 0: 120.0 s; about 28 min left") and told[-2][2].endswith("; about 2 min left")


def test_an_answer_of_weight_0_judges_nobody(tmp_path):
    """It has no score; were it wrong for all, it would weigh down whoever answers rightly."""
    found, _ = run(tmp_path, MadeUp(lambda job: [None, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, None]), Plan(("sft",), (1.0,), 2))
    entry = entry_of(found, Contender("sft", {}), HALVES, tmp_path)
    scored = entry.sets["data"]
    assert scored.weights == [0, 1, 1, 1, 1, 1, 1, 0] and scored.judging == 6
    good, bad = result([None, *[1.0] * 7]), result([1.0, *[0.0] * 7])
    assert best_rate({1.0: bad, 3.0: good}, HALVES, None) == 3.0
    assert best_rate({1.0: result([None] * 8), 3.0: good}, HALVES, 0) == 3.0


def test_of_equal_rates_the_first_is_taken():
    assert best_rate({1.0: result([1.0] * 8), 3.0: result([1.0] * 8)}, HALVES, 0) == 1.0


def test_each_run_is_told_once(tmp_path):
    """With a budget the first run is asked for twice: for its seconds, and among the others."""
    _, told = run(tmp_path, MadeUp(lambda job: [0.0] * 8), seconds=1000)
    assert [done for done, _, _ in told] == list(range(1, len(told) + 1))
    assert told[-1][:2] == (1 + 12 + 12, 1 + 12 + 12)
    _, again = run(tmp_path, MadeUp(lambda job: [0.0] * 8), seconds=1000)
    assert again[-1][0] == 25 and "finished before" in again[0][2]
