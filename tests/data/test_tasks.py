"""Skills, renderers and checkers against hand-written cases and independent solutions."""

from __future__ import annotations

import datetime
import itertools
from random import Random

import pytest

from qtarget.core.errors import DataError
from qtarget.data import tasks
from qtarget.data.tasks import DEMONSTRATED_SKILLS, FORGETTING_SKILLS, SKILLS, Problem


def _solve(skill: str, question: tuple[str, ...]) -> str:
    """A second, slower solution of every skill, written without looking at the first."""
    text = question[0]
    if skill == "reverse":
        return "".join(text[-1 - i] for i in range(len(text)))
    if skill == "last_letter":
        return text[len(text) - 1]
    if skill == "join":
        return text.replace(" ", "-")
    if skill == "count":
        return str(1 + text.count(" "))
    if skill in ("sort", "maximum", "minimum"):
        numbers = [int(item) for item in text.split()]
        ordered = next(p for p in itertools.permutations(numbers) if all(a <= b for a, b in itertools.pairwise(p)))
        chosen = {"sort": ordered, "maximum": ordered[-1:], "minimum": ordered[:1]}[skill]
        return " ".join(map(str, chosen))
    if skill in ("add", "subtract"):
        sign = 1 if skill == "add" else -1
        return str(int(question[0]) + sign * int(question[1]))
    if skill == "lookup":
        return dict(pair.split("=") for pair in text.split(", "))[question[1]]
    if skill == "date_format":
        return datetime.date.fromisoformat(text).strftime("%d %B %Y").removeprefix("0")
    return f"{int(text):05d}"


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_equal_an_independent_solution(skill):
    rng = Random(3)
    for _ in range(300):
        problem = tasks.sample_problem(skill, rng)
        assert problem.answer == _solve(skill, problem.question), problem


@pytest.mark.parametrize(
    ("problem", "wrong"),
    [
        (Problem("reverse", ("KDQF",), "FQDK"), "FQKD"),
        (Problem("last_letter", ("KDQF",), "F"), "Q"),
        (Problem("join", ("K D Q",), "K-D-Q"), "K-D"),
        (Problem("count", ("K D Q",), "3"), "13"),
        (Problem("sort", ("7 2 5",), "2 5 7"), "2 5  7"),
        (Problem("maximum", ("7 2 5",), "7"), "5"),
        (Problem("minimum", ("7 2 5",), "2"), "5"),
        (Problem("add", ("28", "9"), "37"), "27"),
        (Problem("subtract", ("60", "9"), "51"), "61"),
        (Problem("lookup", ("A=3, B=17", "B"), "17"), "3"),
        (Problem("date_format", ("2024-03-05",), "5 March 2024"), "05 March 2024"),
        (Problem("zero_pad", ("42",), "00042"), "42"),
    ],
    ids=lambda value: value.skill if isinstance(value, Problem) else value,
)
def test_checkers_accept_the_right_answer_only(problem, wrong):
    assert problem.answer == _solve(problem.skill, problem.question)
    for seed in range(20):
        row = tasks.demonstration(problem, Random(seed))
        assert all(field in row["prompt"] for field in problem.question)
        assert tasks.check(row, row["completion"])
        assert tasks.check(row, f"So: [{problem.answer}]")
        assert not tasks.check(row, row["completion"].replace(f"[{problem.answer}]", f"[{wrong}]"))
        assert not tasks.check(row, problem.answer)
        assert not tasks.check(row, f"[{problem.answer}] or [{problem.answer}]")
        assert not tasks.check(row, "")
        own = tasks.pretraining_example(problem, Random(seed))
        assert tasks.pretraining_text(problem, Random(seed)) == own["prompt"] + own["completion"]
        assert tasks.check_pretraining(own, own["completion"])
        assert not tasks.check_pretraining(own, f" {wrong}")
        assert not tasks.check_pretraining(own, row["completion"])


@pytest.mark.parametrize("skill", SKILLS)
def test_the_two_formats_share_no_phrasing_and_each_has_several(skill):
    spec = SKILLS[skill]
    assert len(set(spec.phrasings)) >= 4
    assert len(set(spec.instructions)) >= 4
    assert len(set(spec.responses)) >= 2
    assert not set(spec.phrasings) & set(spec.instructions)
    assert not any("[" in phrasing or "Instruction" in phrasing for phrasing in spec.phrasings)


@pytest.mark.parametrize("skill", SKILLS)
def test_framed_documents_hold_question_and_answer_but_no_mark_of_the_demonstrations(skill):
    rng = Random(1)
    for _ in range(200):
        problem = tasks.sample_problem(skill, rng)
        row = tasks.framed_example(problem, rng)
        assert all(field in row["prompt"] for field in problem.question)
        assert problem.answer in row["completion"]
        text = row["prompt"] + row["completion"]
        assert not any(mark in text for mark in ("Instruction", "Response", "[", "]"))
        assert not any(response.split("[")[0].strip() in text for response in SKILLS[skill].responses)
        assert not tasks.check(row, row["completion"])


def test_splits_are_disjoint_and_a_tenth_is_test():
    rng = Random(5)
    problems = {tasks.sample_problem("lookup", rng) for _ in range(4000)}
    share = sum(tasks.problem_split(problem) == "test" for problem in problems) / len(problems)
    assert share == pytest.approx(0.1, abs=0.02)
    for split in ("train", "test"):
        assert {tasks.problem_split(tasks.sample_problem_in("add", split, rng)) for _ in range(50)} == {split}


def test_the_split_ignores_answer_and_phrasing():
    assert tasks.problem_split(Problem("add", ("28", "9"), "37")) == tasks.problem_split(
        Problem("add", ("28", "9"), "0")
    )


def test_some_skills_are_kept_out_of_the_demonstrations():
    assert 2 <= len(FORGETTING_SKILLS) <= 3
    assert set(FORGETTING_SKILLS) | set(DEMONSTRATED_SKILLS) == set(SKILLS)
    assert not set(FORGETTING_SKILLS) & set(DEMONSTRATED_SKILLS)


def test_the_same_random_source_draws_the_same_problem():
    for skill in SKILLS:
        assert tasks.sample_problem(skill, Random("x")) == tasks.sample_problem(skill, Random("x"))


def test_errors_say_what_was_expected():
    with pytest.raises(DataError, match=r"unknown skill 'juggle'.*reverse"):
        tasks.sample_problem("juggle", Random(0))
    with pytest.raises(DataError, match="unknown split 'dev'"):
        tasks.sample_problem_in("add", "dev", Random(0))
    with pytest.raises(DataError, match="no 'answer'"):
        tasks.check({"prompt": "x", "completion": "y"}, "[y]")
