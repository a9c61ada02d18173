"""Rows of two answers are no demonstrations: what is said of them, and that it works."""

from __future__ import annotations

import json
import logging

import pytest

from qtarget.core.errors import DataError
from qtarget.data.formats.shape import ReadOptions
from qtarget.data.loading import load_dataset_file, read_files, read_given

ASKED, CHOSEN, REJECTED = (
    {"role": role, "content": text} for role, text in (("user", "q?"), ("assistant", "good"), ("assistant", "bad"))
)
HUMAN, GPT, WORSE = ({"from": who, "value": text} for who, text in (("human", "q?"), ("gpt", "good"), ("gpt", "bad")))
EARLIER = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]


def two(chosen, rejected, **others):
    return {**others, "chosen": chosen, "rejected": rejected}


# each with what is said, and the row that somebody makes who does it
PAIRS = {
    "TRL": (
        two("good", "bad", prompt="q?"),
        "rename 'chosen' to 'completion' and leave 'rejected' out",
        {"prompt": "q?", "completion": "good"},
    ),
    "TRL, conversations": (
        two([CHOSEN], [REJECTED], prompt=[ASKED]),
        "rename 'chosen' to 'completion' and leave 'rejected' out",
        {"prompt": [ASKED], "completion": [CHOSEN]},
    ),
    "TRL, a message each": (
        two(CHOSEN, REJECTED, prompt=[ASKED]),
        "rename 'chosen' to 'completion' (as 'prompt': a list of messages) and leave 'rejected' out",
        {"prompt": [ASKED], "completion": [CHOSEN]},
    ),
    "UltraFeedback": (
        two([ASKED, CHOSEN], [ASKED, REJECTED], prompt="q?"),
        "rename 'chosen' to 'messages' and leave 'rejected' out",
        {"prompt": "q?", "messages": [ASKED, CHOSEN]},
    ),
    "UltraFeedback in a table": (
        two(json.dumps([ASKED, CHOSEN]), json.dumps([ASKED, REJECTED])),
        "rename 'chosen' to 'messages' and leave 'rejected' out",
        {"messages": json.dumps([ASKED, CHOSEN])},
    ),
    "hh-rlhf": (
        two("\n\nHuman: q?\n\nAssistant: good", "\n\nHuman: q?\n\nAssistant: bad"),
        "split the last answer off 'chosen': call it 'completion' and what stands before it 'prompt', and leave 'rejected' out",
        {"prompt": "\n\nHuman: q?\n\nAssistant:", "completion": " good"},
    ),
    "LLaMA-Factory": (
        two(GPT, WORSE, conversations=[HUMAN]),
        "put 'chosen' at the end of 'conversations', as the assistant's turn, and leave 'rejected' out",
        {"conversations": [HUMAN, GPT]},
    ),
    "LLaMA-Factory, several turns": (
        two(GPT, WORSE, conversations=[*EARLIER, HUMAN]),
        "put 'chosen' at the end of 'conversations', as the assistant's turn, and leave 'rejected' out",
        {"conversations": [*EARLIER, HUMAN, GPT]},
    ),
    "LLaMA-Factory, alpaca": (
        two("good", "bad", instruction="q?", input=""),
        "rename 'chosen' to 'output' and leave 'rejected' out",
        {"instruction": "q?", "input": "", "output": "good"},
    ),
    "Orca": (
        two("good", "bad", system="", question="q?"),
        "rename 'question' to 'prompt' and 'chosen' to 'completion' and leave 'rejected' out",
        {"system": "", "prompt": "q?", "completion": "good"},
    ),
}


def read(tmp_path, *rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_files(path, ReadOptions(**options))


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_refused_and_what_is_said_makes_a_row_that_trains_the_chosen_answer(tmp_path, name):
    row, step, made = PAIRS[name]
    with pytest.raises(DataError, match="line 1: a preference pair") as refused:
        read(tmp_path, row)
    assert f"to train on the chosen answers, {step}; to train on pairs, take TRL's DPOTrainer" in str(refused.value)
    for columns in ({}, {"rejected": row["rejected"]}):  # nothing is lost where it is left in
        (found,) = read(tmp_path, {**made, **columns}).rows
        last = (found.get("messages") or found["completion"])[-1:]
        assert last == [CHOSEN] or found["completion"].strip() == "good"
        assert "rejected" not in found


def test_a_pair_among_demonstrations_is_refused_by_its_line(tmp_path):
    with pytest.raises(DataError, match="line 2: a preference pair"):
        read(tmp_path, {"conversations": [HUMAN, GPT]}, PAIRS["LLaMA-Factory"][0])


@pytest.mark.parametrize(
    "own",
    [
        {"messages": [ASKED, CHOSEN]},
        {"prompt": "q?", "completion": "good"},
        {"conversations": [HUMAN, GPT]},
        {"instruction": "q?", "output": "good"},
    ],
)
def test_a_row_with_an_answer_of_its_own_trains_it(tmp_path, own):
    reading = read(tmp_path, two([ASKED, CHOSEN], [ASKED, REJECTED], **own))
    assert not {"chosen", "rejected"} & set(reading.rows[0])
    assert any("`chosen` and `rejected` are not what rows" in line for line in reading.announced)


@pytest.mark.parametrize(
    ("own", "options"),
    [
        ({"text": "hello"}, {}),
        ({"body": "hello"}, {"text_field": "body"}),
        ({"messages": [ASKED, CHOSEN, {"role": "user", "content": "thanks"}]}, {}),
        ({"conversations": [HUMAN, GPT, {"from": "human", "value": "thanks"}]}, {}),
    ],
)
def test_notes_of_these_names_beside_what_is_trained_are_left_out(tmp_path, own, options):
    reading = read(tmp_path, two("a", "b", **own), **options)
    assert set(reading.rows[0]) == {next(iter(own)).replace("conversations", "messages")}
    assert any("`chosen` and `rejected` are not what rows" in line for line in reading.announced)


def test_a_text_beside_an_unanswered_conversation_is_no_answer(tmp_path):
    with pytest.raises(DataError, match="a preference pair"):
        read(tmp_path, two(GPT, WORSE, conversations=[HUMAN], text="q? good"))


@pytest.mark.parametrize(("before", "said"), [([], False), (EARLIER, True)])
def test_where_a_conversation_has_answers_before_the_pair_both_ways_are_said(tmp_path, before, said):
    with pytest.raises(DataError) as refused:
        read(tmp_path, two(GPT, WORSE, conversations=[*before, HUMAN]))
    assert ("to train on the answers before them alone, remove both columns" in str(refused.value)) == said


def test_scores_under_these_names_are_notes(tmp_path):
    assert read(tmp_path, {"text": "a", "chosen": 1, "rejected": 0}).rows == [{"text": "a"}]


KTO = [{"prompt": f"{i}?", "completion": "y", "label": i % 2 == 0} for i in range(5)]


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (KTO, "label"),
        ([{"conversations": [HUMAN, GPT], "kto_tag": row["label"]} for row in KTO], "kto_tag"),
        ([{**row, "label": str(row["label"])} for row in KTO], "label"),  # a CSV of pandas
        ([{**row, "label": str(row["label"]).lower()} for row in KTO], "label"),
        ([{**row, "label": str(row["label"]).upper()} for row in KTO], "label"),  # of a spreadsheet
    ],
)
def test_answers_that_are_marked_as_rejected_are_counted(tmp_path, rows, name):
    found = read(tmp_path, *rows)
    assert len(found.rows) == 5
    assert found.rejected == {name: 2}
    (line,) = (line for line in found.announced if "false" in line)
    assert line.startswith(f"2 rows with `{name}` false, trained like the others: ") and "take these rows out" in line
    assert not read(tmp_path, *rows[::2]).rejected


def test_a_class_is_no_mark_of_rejection(tmp_path):
    assert not read(tmp_path, *({**row, "label": int(row["label"])} for row in KTO)).rejected
    assert not read(tmp_path, {"text": "a", "label": False}).rejected


def test_rejected_answers_are_told_once_of_files_and_of_a_dataset(tmp_path, caplog):
    from datasets import Dataset

    path = tmp_path / "kto.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in KTO))
    with caplog.at_level(logging.WARNING):
        read_given(load_dataset_file(path).select(range(4)))
        read_given(Dataset.from_list(KTO), name="own")
    assert [line.split(": ")[0] for line in told_of(caplog)] == [str(path), "own data"]


def told_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "`label` false" in record.getMessage()]


def test_a_users_own_dataset_is_left_as_it_is(caplog):
    from datasets import Dataset

    own = Dataset.from_list(KTO)
    own.info.description = "mine"
    with caplog.at_level(logging.WARNING):
        first = read_given(own)
        assert own.info.description == "mine"
        assert first.info.description.splitlines()[0] == "mine" and first.to_list() == KTO
        read_given(first)
        assert len(told_of(caplog)) == 1
        read_given(own)
    assert len(told_of(caplog)) == 2


def test_more_rejected_answers_than_were_told_of_are_told(caplog):
    from datasets import Dataset, concatenate_datasets

    told = read_given(Dataset.from_list(KTO))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        read_given(told.select([1]))  # as the rows of a fold
        assert not told_of(caplog)
        joined = read_given(concatenate_datasets([told, Dataset.from_list(KTO)]))
        read_given(joined)
    (line,) = told_of(caplog)
    assert ": 4 rows with `label` false" in line


@pytest.mark.parametrize("mark", ["False", "false", "FALSE"])
def test_a_text_that_says_false_is_counted_in_a_dataset(caplog, mark):
    from datasets import Dataset

    with caplog.at_level(logging.WARNING):
        read_given(Dataset.from_list([{**row, "label": "true" if row["label"] else mark} for row in KTO]))
    (line,) = told_of(caplog)
    assert "2 rows" in line


def test_classes_in_words_need_no_reading():
    from datasets import Dataset

    data = Dataset.from_list([{**row, "label": "physics"} for row in KTO])
    assert read_given(data) is data


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"prompt": "a"},
            "add 'completion', or remove the row; `qtarget rl` takes prompts alone, and the model answers",
        ),
        (
            {"instruction": "a"},
            "add 'output', or remove the row; `qtarget rl` takes prompts alone, in a column `prompt`",
        ),
        (
            {"prompt": "a", "answer": "b"},
            "rename 'answer' to 'completion', or let the model answer: `qtarget rl` takes these rows as they are",
        ),
    ],
)
def test_prompts_without_an_answer_are_sent_to_rl(tmp_path, row, words):
    with pytest.raises(DataError) as refused:
        read(tmp_path, row)
    assert words in str(refused.value)
