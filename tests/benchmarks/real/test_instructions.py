"""Instruction following (IFEval): sums, tables and refusals need no package; the official checks are skipped without theirs."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from qtarget.benchmarks.real import instructions
from qtarget.benchmarks.real.bench import run_real
from qtarget.benchmarks.real.results import instruction_table, untrained_table
from qtarget.cli.app import app
from qtarget.core.errors import DataError, MissingDependencyError
from tests import ROOT, SHARED
from tests.benchmarks.real.test_real_noise import TINY

ROWS = [
    {"key": 1, "prompt": "Say hello without commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "key": 2, "prompt": "Two sentences, in capitals.", "kwargs": [{"relation": "at least", "num_sentences": 2}, {}],
        "instruction_id_list": ["length_constraints:number_sentences", "change_case:english_capital"],
    },
]  # fmt: skip
COLUMNS = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")


def data_folder(path, rows=ROWS):
    """A folder of real data that holds these prompts alone."""
    file = path / instructions.FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


@pytest.fixture
def no_packages(monkeypatch):
    monkeypatch.setattr(instructions, "PACKAGES", ("no_such_package.of_checks",))


def test_prompts_are_read_in_order_and_a_sample_is_the_same_each_time(tmp_path):
    rows = [{**ROWS[0], "key": i} for i in range(40)]
    data = data_folder(tmp_path, rows)
    assert instructions.instruction_rows(data) == rows and instructions.instruction_rows(None) == []
    keys = [[row["key"] for row in instructions.instruction_rows(data, 7)] for _ in range(2)]
    assert keys[0] == keys[1] == sorted(set(keys[0])) and len(keys[0]) == 7 and keys[0] != list(range(7))
    assert instructions.asked_of(ROWS) == [1, 2]
    with pytest.raises(DataError, match=r"ifeval_input_data.jsonl.gz is missing; name the folder .* --data"):
        instructions.instruction_rows(tmp_path / "other")


def test_intervals_are_those_of_whole_prompts_drawn_again():
    """Against a plain loop: prompts with their instructions, many times, the sums divided."""
    draw = random.Random(3)
    asked = [draw.randint(1, 3) for _ in range(60)]
    before, after = ([draw.randint(0, n) for n in asked] for _ in range(2))
    found = instructions.share_percent([after], asked, [before])
    assert found["mean"] == pytest.approx(100 * (sum(after) - sum(before)) / sum(asked), abs=0.01)
    sums = []
    for _ in range(4000):
        some = draw.choices(range(60), k=60)
        sums.append(100 * sum(after[i] - before[i] for i in some) / sum(asked[i] for i in some))
    low, high = np.percentile(sums, [2.5, 97.5])
    assert (found["low"], found["high"]) == (pytest.approx(low, abs=1.5), pytest.approx(high, abs=1.5))
    # two seeds that say the same are no more than one, and a model is no better than itself
    assert (
        instructions.share_percent([after, after], asked)["mean"] == instructions.share_percent([after], asked)["mean"]
    )
    assert set(instructions.share_percent([after], asked, [after]).values()) == {0.0}


def test_a_table_says_what_was_followed_gained_and_cut():
    def run(whole, parts):
        return {
            "instructions": {
                **dict.fromkeys(COLUMNS[::2], whole),
                **dict.fromkeys(COLUMNS[1::2], parts),
                "ended": [1, 0],
            }
        }

    results = {
        "instructions": {"keys": [1, 2], "asked": [1, 2], "answer_tokens": 9}, "untrained": {"x": run([0, 0], [0, 1])}
    }  # fmt: skip
    cell = {"runs": {"sft": [run([1, 0], [1, 1])], "dft": [run([1, 1], [1, 2])]}}
    lines = [line.split(" | ") for line in instruction_table(results, cell).splitlines() if line.startswith("| ")]
    cells = [[cell.strip("| ").split(" ")[0] for cell in line] for line in lines[2:]]
    assert cells == [
        ["*untrained*", "0.0", "33.3", "0.0", "33.3", "", "", "50"],
        ["sft", "50.0", "66.7", "50.0", "66.7", "+50.0", "", "50"],
        ["dft", "100.0", "100.0", "100.0", "100.0", "+100.0", "+50.0", "50"],
    ]


def test_without_packages_or_prompts_nothing_is_begun(tmp_path, no_packages):
    data, output = data_folder(tmp_path / "data"), tmp_path / "n.json"
    options = ["bench", "noise", "--base", "smollm2", "--short", "--output", str(output), "--data"]
    absent = CliRunner().invoke(app, [*options, str(data)])
    assert isinstance(absent.exception, MissingDependencyError)
    assert "make real" in str(absent.exception) and "no_such_package" in str(absent.exception)
    empty = CliRunner().invoke(app, [*options, str(tmp_path)])
    assert isinstance(empty.exception, DataError) and "leave it out" in str(empty.exception)
    with pytest.raises(MissingDependencyError, match="leave --data out"):
        run_real(replace(TINY, noise=replace(TINY.noise, data=str(data))), output, resume=False, progress=print)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_answers_are_asked_in_the_template_and_judged_by_the_checks(monkeypatch):
    """The model and the checks are stand-ins: what passes between them is not."""
    asked = []

    def answers(model, tokenizer, prompts, **settings):
        asked.append((prompts, settings["max_new_tokens"]))
        return [SimpleNamespace(text="Hello, you", stopped=True), SimpleNamespace(text="ONE. TWO.", stopped=False)]

    drawn = []

    def check(row, results):
        drawn.append(random.random())
        parts = [row["key"] == 2, results == ["ONE. TWO."]][: len(row["kwargs"])]
        return {theirs: parts if "inst" in theirs else all(parts) for theirs in instructions.MEASURES.values()}

    class Template:
        def apply_chat_template(self, turns, *, tokenize, add_generation_prompt):
            return f"<{turns[0]['content']}>" * add_generation_prompt

    monkeypatch.setattr(instructions, "greedy_answers", answers)
    monkeypatch.setattr(instructions, "official_checks", lambda: check)
    random.seed(7)
    found = instructions.instruction_following(None, Template(), ROWS, 9)
    # whatever a check draws, an answer gets one verdict, and the caller's own draws go on
    assert len(set(drawn)) == 1 and random.random() == random.Random(7).random()
    assert asked == [(["<Say hello without commas.>", "<Two sentences, in capitals.>"], 9)]
    assert found == {
        "prompt_strict": [0, 1], "instruction_strict": [0, 2], "prompt_loose": [0, 1], "instruction_loose": [0, 2],
        "ended": [1, 0],
    }  # fmt: skip


@pytest.mark.skipif(not (SHARED / instructions.FILE).is_file(), reason=f"no prompts at {SHARED / instructions.FILE}")
def test_the_prompts_are_those_that_the_page_names():
    rows = instructions.instruction_rows(SHARED)
    kinds = {kind for row in rows for kind in row["instruction_id_list"]}
    assert (len(rows), sum(instructions.asked_of(rows)), len(kinds)) == (instructions.PROMPTS, 834, 25)


def test_the_table_of_the_page_is_the_result_file():
    page, file = (ROOT / "docs/real_model.md").read_text(), ROOT / "benchmarks/results/ifeval_smollm2.json"
    assert untrained_table(json.loads(file.read_text())) in page
