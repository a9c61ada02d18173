"""Plans, and an evaluation of several models: what they depend on, what is refused first, and which rows count."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("trl")

from datasets import Dataset

from qtarget.core.errors import ConfigError, DataError
from qtarget.data.embedded import base_model_path, load_demonstrations
from qtarget.evaluation.contenders import Contender
from qtarget.evaluation.evaluate import Choices, Evaluation, RowSet, plan
from qtarget.evaluation.judges import make_judge
from qtarget.evaluation.questions import ask
from qtarget.evaluation.records import Records

ROWS = [{"prompt": row["prompt"], "completion": row["completion"]} for row in load_demonstrations("test")[:4]]


def row_set(rows=ROWS) -> RowSet:
    judge = make_judge("exact")
    return RowSet("data", "rows.jsonl", Dataset.from_list(rows), ask(rows, judge, "rows.jsonl"), judge)


def contender(name="base", model=None, **settings) -> Contender:
    path = str(model or base_model_path())
    return Contender(name, path, path, settings=settings)


def test_a_plan_names_what_decides_which_tokens_count_where_rows_have_weights():
    run = contender(weights_scale="label", unplaced_spans="leave_out", seed=3)
    assert "weights" not in plan([run], [row_set()], Choices())
    weighed = row_set([row | {"weight": 0.5} for row in ROWS])
    found = plan([run], [weighed], Choices())["weights"]
    assert found["settings"] == {"base": {"weights_scale": "label", "unplaced_spans": "leave_out"}}
    assert found["rule"] == "tokens and answers of weight 0 do not count"


def test_records_of_another_counting_rule_are_refused_and_those_without_weights_go_on(tmp_path):
    file, plain = tmp_path / "e.rows.jsonl", plan([contender()], [row_set()], Choices())
    weighed = plan([contender()], [row_set([row | {"weight": 0.0} for row in ROWS[:1]] + ROWS[1:])], Choices())
    file.write_text(json.dumps({"plan": plain}) + "\n")
    Records(file, plain, resume=True)
    earlier = {key: value for key, value in weighed.items() if key != "weights"}
    file.write_text(json.dumps({"plan": earlier}) + "\n")
    with pytest.raises(
        ConfigError, match=r"counted tokens and answers of weight 0 too.*begin anew with another --output"
    ):
        Records(file, weighed, resume=True)
    other = plan([contender(weights_scale="label")], [row_set([row | {"weight": 0.5} for row in ROWS])], Choices())
    file.write_text(json.dumps({"plan": {**other, "weights": {**other["weights"], "settings": {"base": {}}}}}) + "\n")
    with pytest.raises(ConfigError, match=r"weights\.settings\.base\.weights_scale was not set and is label"):
        Records(file, other, resume=True)


def test_a_later_model_with_fewer_positions_is_refused_before_the_first_is_measured(tmp_path):
    """No model is loaded for it: this one has a config and a tokenizer alone."""
    small = tmp_path / "small"
    shutil.copytree(base_model_path(), small, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    told: list[str] = []
    records = Records(tmp_path / "e.rows.jsonl", {}, resume=False)
    evaluation = Evaluation(
        [contender(), contender("small", small)], [row_set()], Choices(), records, lambda *said: told.append(said[2])
    )
    with pytest.raises(DataError, match=r"rows.jsonl: 4 of 4 rows .* the 8 positions of small"):
        evaluation.run()
    assert told == [] and not (tmp_path / "e.rows.jsonl").exists()


def test_an_answer_of_weight_0_is_not_asked_and_has_no_nll(tmp_path):
    rows = row_set([row | {"weight": float(i != 1)} for i, row in enumerate(ROWS)])
    told: list[tuple[int, int, str]] = []
    records = Records(tmp_path / "e.rows.jsonl", {}, resume=False)
    choices = Choices(max_new_tokens=4, batch_size=2)
    evaluation = Evaluation([contender()], [rows], choices, records, lambda *said: told.append(said))
    found = evaluation.run()["data", "base"]
    assert [line is None for line in found["completion"]] == [False, True, False, False]
    assert [line["tokens"] == 0 for line in found["nll"]] == [False, True, False, False]
    assert told[-1][:2] == (7, 7)
    alone = Evaluation([contender()], [row_set(ROWS[:1])], choices, Records(tmp_path / "a.jsonl", {}, resume=False))
    assert alone.run()["data", "base"]["completion"][0]["completions"] == found["completion"][0]["completions"]
