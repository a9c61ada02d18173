"""`qtarget init`: shapes of rows by the command line, and the config that it writes trains as it is."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("trl")

from qtarget.cli.main import run
from qtarget.cli.options.config import load_config
from qtarget.data.embedded import base_model_path, load_demonstrations
from qtarget.report.audit.contenders import proposal
from tests import SHARED

BASE = str(base_model_path())
STORIES = SHARED / "models" / "tinystories-656k"


def called(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def asked(count: int = 60) -> list[tuple[str, str]]:
    return [(row["prompt"], row["completion"]) for row in load_demonstrations("train")[:count]]


def messages(q: str, a: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": q}, {"role": "assistant", "content": a}]


SHAPES = {
    "messages": lambda q, a: {"messages": messages(q, a), "note": "kept"},
    "pairs": lambda q, a: {"prompt": q, "completion": a, "id": 7},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "text": lambda q, a: {"text": q + a},
    "qa": lambda q, a: {"question": q, "answer": a, "id": 7},
}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gets_a_config_and_loses_nothing(shape, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [SHAPES[shape](q, a) for q, a in asked()]
    data = write(tmp_path / "rows.jsonl", rows)
    before = data.read_bytes()
    assert called("init", "rows.jsonl", "--model", BASE, "-o", "made/run.yaml", "--num_train_epochs", "1") == 0
    said = capsys.readouterr().out
    assert "qtarget train made/run.yaml" in said
    assert ("rows of text are trained as they stand" in said) == (shape in ("pairs", "text"))
    proposed = f"qtarget compare made/run.yaml {' '.join(proposal().options())}"
    assert f"  {proposed}\n" in said and "  qtarget score made/run.yaml\n" in said
    if shape == "pairs":  # the audit, before it has the base's numbers, proposes the same
        assert called("audit-data", "made/run.yaml") == 0
        audited = capsys.readouterr().out
        assert f"`{proposed}`" in audited and "`qtarget score made/run.yaml`" in audited
    config = load_config("made/run.yaml")
    assert config.training.num_train_epochs == 1
    assert config.training.assistant_only_loss == (shape in ("messages", "sharegpt"))
    train, validation = (read(tmp_path / f"made/run.{name}.jsonl") for name in ("train", "validation"))
    assert f"{len(train)} rows to train, {len(validation)} to validate" in said
    assert f"{len(validation)} validation rows can show a difference of about" in said
    assert 3 <= len(validation) <= 6
    assert data.read_bytes() == before
    names = {"question": "instruction", "answer": "output"} if shape == "qa" else {}
    expected = [{names.get(key, key): value for key, value in row.items()} for row in rows]
    assert sorted(map(json.dumps, train + validation)) == sorted(map(json.dumps, expected))


def test_what_it_writes_trains_and_it_writes_over_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [SHAPES["messages"](q, a) for q, a in asked()])
    assert called("init", "rows.jsonl", "--model", BASE) == 0
    assert called("train", "run.yaml", "--max_steps", "2") == 0
    assert json.loads((tmp_path / "runs/run/sft/train_summary.json").read_text())["steps"] == 2
    text = (tmp_path / "run.yaml").read_text()
    assert called("init", "rows.jsonl", "--model", BASE) == 2
    assert "run.yaml exists" in capsys.readouterr().err
    (tmp_path / "run.yaml").unlink()
    write(tmp_path / "run.train.jsonl", [{"text": "mine"}])
    assert called("init", "rows.jsonl", "--model", BASE) == 2
    assert "run.train.jsonl exists, with another content" in capsys.readouterr().err
    assert not (tmp_path / "run.yaml").exists()
    (tmp_path / "run.train.jsonl").unlink()
    assert called("init", "rows.jsonl", "--model", BASE) == 0
    assert (tmp_path / "run.yaml").read_text() == text


def test_a_planned_adapter_trains_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [SHAPES["messages"](q, a) for q, a in asked()])
    assert called("init", "rows.jsonl", "--model", BASE, "--use_peft", "true") == 0
    config = load_config(tmp_path / "run.yaml")
    assert (config.model.use_peft, config.model.lora_target_modules) == (True, "all-linear")
    assert called("train", "run.yaml", "--max_steps", "1") == 0
    adapter = json.loads((tmp_path / "runs/run/sft/adapter_config.json").read_text())
    assert {"q_proj", "down_proj"} <= set(adapter["target_modules"])


def test_a_template_without_marks_trains_the_one_answer_of_each_row(tiny_model, tmp_path, monkeypatch, capsys):
    """As the templates of most instruct models: nothing in them tells an answer from a prompt."""
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": messages(f"{i}+1?", f"it is {i + 1}"), "note": i} for i in range(20)]
    write(tmp_path / "rows.jsonl", rows)
    assert called("init", "rows.jsonl", "--model", tiny_model, "--validation", "0") == 0
    said = capsys.readouterr().out
    assert "answers alone are trained" in said and "prompts are trained too" not in said
    assert "cannot judge" in said and "  qtarget compare" not in said, "no command that would be refused"
    # one character is a token; of "<assistant>it is 1" and the end mark, "<assistant>" is not the prompt's with this template
    made = read(tmp_path / "run.train.jsonl")
    assert [row["prompt"] + row["completion"] for row in made] == [row["messages"] for row in rows]
    assert [row["note"] for row in made] == list(range(20))
    trained = sum(len(f"<assistant>it is {i + 1}") + 1 for i in range(20))
    assert f"{trained:,} tokens are trained" in said
    assert called("train", "run.yaml", "--max_steps", "1") == 0
    # several answers in a row, and a user who decides, are left as they are
    write(tmp_path / "long.jsonl", [{"messages": row["messages"] * 2} for row in rows])
    assert called("init", "long.jsonl", "--model", tiny_model, "-o", "long.yaml", "--validation", "0") == 0
    assert "prompts are trained too" in capsys.readouterr().out
    said_so = ("--assistant_only_loss", "false", "--validation", "0")
    assert called("init", "rows.jsonl", "--model", tiny_model, "-o", "own.yaml", *said_so) == 0
    assert not (tmp_path / "own.train.jsonl").exists()
    # a format and roles that the user names are the file's, and the copy has neither
    write(
        tmp_path / "chats.jsonl",
        [{"conversations": [{"from": "me", "value": f"{i}?"}, {"from": "gpt", "value": "a"}]} for i in range(8)],
    )
    named = ("--data_format", "sharegpt", "--roles", '{"me": "user"}', "--validation", "0")
    assert called("init", "chats.jsonl", "--model", tiny_model, "-o", "chats.yaml", *named) == 0
    assert called("audit-data", "chats.yaml") == 0


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the data folder beside the checkout")
def test_a_model_without_a_template_gets_one_that_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}]
    call = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo"}}}
    turns = [
        {"role": "user", "content": "rain"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "no rain"},
    ]
    write(
        tmp_path / "rows.jsonl",
        [{"messages": [{**turns[0], "content": f"rain {i}"}, *turns[1:]], "tools": tools} for i in range(8)],
    )
    assert called("init", "rows.jsonl", "--model", STORIES) == 0
    assert "ChatML is proposed" in capsys.readouterr().out
    assert "chat_template_path: run.chat_template.jinja" in (tmp_path / "run.yaml").read_text()
    assert called("train", "run.yaml", "--max_steps", "1") == 0


def test_a_row_beyond_the_model_is_told_by_every_verb_in_our_words(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": q, "completion": a} for q, a in asked(20)]
    write(tmp_path / "rows.jsonl", [*rows, {"prompt": "count", "completion": " one" * 400}])
    assert called("init", "rows.jsonl", "--model", BASE, "--validation", "0") == 0
    out, err = capfd.readouterr()
    assert "1 of 21 rows are truncated before their end (max_length 256), " in out and "lost in all: row 21" in out
    assert "max_length: 256 " in (tmp_path / "run.yaml").read_text()
    assert called("audit-data", "run.yaml", "--max_length", "null") == 0
    audited, more = capfd.readouterr()
    assert "1 of 21 rows are, as they are trained, longer than the 256 tokens that the model was made for" in audited
    assert called("train", "run.yaml", "--max_length", "512", "--max_steps", "1") == 0
    trained, last = capfd.readouterr()
    assert "set max_length to 256 or less" in trained + last
    uncut = ("init", "rows.jsonl", "--model", BASE, "--validation", "0", "-o", "uncut.yaml")
    assert called(*uncut, "--max_length", "null") == 0
    written, _ = capfd.readouterr()
    assert "truncated" not in written and "longer than the 256 tokens" in written
    assert "max_length: null" in (tmp_path / "uncut.yaml").read_text()
    assert "indexing errors" not in out + err + audited + more + trained + last


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data folder beside the checkout")
def test_real_rows_under_other_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with gzip.open(SHARED / "gsm8k/train.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(40), strict=False)]
    write(tmp_path / "rows.jsonl", rows)
    assert called("init", "rows.jsonl", "--model", BASE, "--max_length", "128") == 0
    assert "columns question -> instruction, answer -> output" in capsys.readouterr().out
    assert load_config("run.yaml").training.max_length == 128


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"score": 1}, [], "no usable columns; found score"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
            [],
            "null_content: drop",
        ),
        ({"prompt": "a", "completion": "b"}, ["--learning_rat", "1"], "did you mean learning_rate"),
        ({"prompt": "a", "completion": "b"}, ["--train_file", "x"], "--train_file is said by DATA"),
        ({"prompt": "a", "completion": "b"}, ["--model", "./nowhere"], "check the path"),
        ({"prompt": "a", "completion": "b"}, ["-o", "run.json"], "ends in .yaml"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_next_step(row, options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [row])
    model = [] if "--model" in options else ["--model", BASE]
    assert called("init", "rows.jsonl", *model, *options) == 2
    error = capsys.readouterr().err
    assert words in " ".join(error.split())
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_a_conversation_in_which_nobody_answers_is_named(tmp_path, monkeypatch, capsys):
    """One of them would decide that the prompts of all rows are trained."""
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": messages(q, a)} for q, a in asked(20)]
    rows[9]["messages"] = rows[9]["messages"][:1]
    write(tmp_path / "rows.jsonl", rows)
    assert called("init", "rows.jsonl", "--model", BASE) == 2
    said = capsys.readouterr().err
    assert "no assistant answers in" in said
    assert "line 10" in said
    assert not (tmp_path / "run.yaml").exists()


def test_a_second_file_is_told_at_once_which_name_is_free(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("mine")
    assert called("init", "no such file.jsonl", "--model", BASE) == 2
    assert "run.yaml exists; write another with -o 'no such file.yaml'" in capsys.readouterr().err


def test_a_mistyped_model_is_told_the_folder_beside_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    write(tmp_path / "rows.jsonl", [{"text": "a"}])
    assert called("init", "rows.jsonl", "--model", "bas") == 2
    assert "--model: there is no folder bas; did you mean base?" in capsys.readouterr().err


def test_an_option_is_proposed_for_an_unknown_key(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [{"text": "a"}])
    assert called("init", "rows.jsonl", "--model", BASE, "--validaton", "0.2") == 2
    assert "did you mean --validation?" in capsys.readouterr().err


def test_the_copy_has_the_roles_as_read_and_no_folder_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = [
        {"messages": [{"role": "human", "content": f"{i}?"}, {"role": "gpt", "content": "y", "name": "z"}]}
        for i in range(9)
    ]
    write(tmp_path / "rows.jsonl", theirs)
    assert called("init", "rows.jsonl", "--model", BASE, "--validation", "0.3") == 0
    copied = read(tmp_path / "run.train.jsonl") + read(tmp_path / "run.validation.jsonl")
    assert len(copied) == 9 and not (tmp_path / "runs").exists()
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in copied)
    assert {row["messages"][0]["content"] for row in copied} == {f"{i}?" for i in range(9)}
    assert all(row["messages"][1]["name"] == "z" for row in copied)
