"""What rows become, and what is said where they do not become it: each right value is written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from qtarget import QTargetConfig, QTargetTrainer
from qtarget.core.errors import DataError
from qtarget.integrations.sft.audit import tokenise
from tests import SHARED
from tests.integrations.conftest import SETTINGS, make_model, make_tokenizer

CHATML = (
    "{%- for m in messages -%}{{ '<' + m['role'] + ':' }}"
    "{%- if m['role'] == 'assistant' -%}{%- generation -%}{{ m['content'] }}"
    "{%- for c in m.tool_calls or [] -%}{{ '!' + c.function.name + ' ' + (c.function.arguments | tojson) }}{%- endfor -%}"
    "{{ '>' }}{%- endgeneration -%}"
    "{%- else -%}{{ m['content'] + '>' }}{%- endif -%}{%- endfor -%}"
)
PLAIN = "{%- for m in messages -%}{{ '<' + m['role'] + ':' + m['content'] + '>' }}{%- endfor -%}"
NO_SYSTEM = (
    "{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}" + PLAIN
)
DROPS = (
    "{%- for m in messages -%}{%- if m.role in ('user', 'assistant') -%}{{ m.role + ':' + m.content + '\n' }}"
    "{%- endif -%}{%- endfor -%}"
)
USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "rain", "arguments": {"city": "Oslo", "days": 3}}}]}  # fmt: skip


def tokenizer_with(template: str | None = None, **special):
    tokenizer = make_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    for name, value in special.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.fixture
def train(tmp_path):
    """A trainer of rows, which is where all of this is decided."""

    def make(rows, tokenizer=None, model=None, evals=None, formatting_func=None, **settings):
        data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
        args = QTargetConfig(str(tmp_path / "out"), target="sft", **{**SETTINGS, "shuffle_dataset": False, **settings})
        return QTargetTrainer(
            model or make_model(),
            args,
            None,
            data,
            evals,
            tokenizer or make_tokenizer(),
            formatting_func=formatting_func,
        )

    return make


def texts(trainer) -> list[tuple[str, str]]:
    """Whole text and trained text of each row."""
    decode = trainer.processing_class.decode
    return [
        (decode(row["input_ids"]), decode([i for i in row["labels"] if i != -100])) for row in trainer.train_dataset
    ]


def said(trainer, data: str = "train") -> str:
    return "\n".join(trainer.preparation.audits[data])


# -- columns ----------------------------------------------------------------------------------------------------

PAIR = {"prompt": "2+2= ", "completion": "4"}
NOTES = {
    "text": "geo",
    "row_ids": 7,
    "seq_lengths": [1, 2],
    "position_ids": "x",
    "images": [],
    "reference_rows": [9],
    "qtarget_row": 5,
    "qtarget_row_ids": [1, 2],
    "label": 1,
    "attention_mask": [0, 0],
    "messages": [USER, ANSWER],
}


@pytest.mark.parametrize("note", NOTES)
def test_a_column_that_the_shape_does_not_use_changes_no_token(note, train):
    trainer = train([{**PAIR, note: NOTES[note]}] * 2)
    assert texts(trainer) == [("2+2= 4^", "4^")] * 2  # the end token stays with the answer


def test_the_order_of_the_shapes_is_trls_and_said(train):
    both = {**PAIR, "messages": [USER, ANSWER], "text": "abc"}
    trainer = train([both])
    assert texts(trainer) == [("2+2= 4^", "4^")]
    assert "read as `prompt` and `completion`; not read: messages, text" in said(trainer)
    talk = train([{"messages": [USER, ANSWER], "prompt": "Hello", "text": "abc"}])
    assert texts(talk) == [("<Hello>Hi there^", "<Hello>Hi there^")]
    tokens = train([{**both, "input_ids": [5, 6, 1]}])
    assert [row["input_ids"] for row in tokens.train_dataset] == [[5, 6, 1]]


def test_evaluation_rows_are_treated_alike(train):
    noted = Dataset.from_list([{**PAIR, "text": "geo", "row_ids": 1}])
    trainer = train([PAIR], evals={"a": noted, "b": noted})
    decode = trainer.processing_class.decode
    assert {name: decode(part[0]["input_ids"]) for name, part in trainer.eval_dataset.items()} == {
        "a": "2+2= 4^",
        "b": "2+2= 4^",
    }
    assert trainer.evaluate(noted)["eval_loss"] == pytest.approx(
        trainer.evaluate(Dataset.from_list([PAIR]))["eval_loss"]
    )


@pytest.mark.parametrize("labels", [1, [1, 2], "positive"])
def test_labels_beside_text_are_refused_by_name(labels, train):
    with pytest.raises(DataError, match="column 'labels'"):
        train([{**PAIR, "labels": labels}])


def test_misspelt_columns_get_the_nearest_name(train):
    row = {
        **PAIR,
        "loss_weight": 1.0,
        "weights": 2.0,
        "noise_span": [[0, 1]],
        "weight_span": [[0, 1, 0]],
        "source": "web",
    }
    found = said(train([row]))
    for name, meant in (("loss_weight", "loss_weights"), ("weights", "weight"), ("noise_span", "noise_spans"),
                        ("weight_span", "weight_spans")):  # fmt: skip
        assert f"{name!r} is not read; did you mean {meant!r}" in found
    assert "'source' is not read" not in found
    talk = said(train([{"messages": [USER, {**ANSWER, "weights": 0}]}]))
    assert "'messages[...].weights' is not read; did you mean 'weight'" in talk


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"messages": [USER, ANSWER]}, {"messages": []}], r"train data, row 2: column 'messages' is a list \[\]"),
        ([{"messages": [USER, ANSWER]}, {"messages": [USER, None]}], r"row 2: messages\[1\] is null"),
        ([{"messages": [{"form": "human", "text": "Hi"}]}], "row 1: messages"),
        ([{"messages": [USER, ANSWER]}, {"messages": None}], "row 2: 'messages' is there but holds no value"),
        ([PAIR, {"prompt": "a", "completion": None}], "row 2: 'completion' is there but holds no value"),
        ([{"prompt": "a", "completion": [ANSWER]}], "row 1: prompt is a string and completion a list; make both text"),
        ([{"text": 5}], "column 'text' .* expected text"),
        ([{"body": "abc"}], "no usable columns; found body"),
        ([{"messages": "Hello"}], "column 'messages' .* expected a list of"),
        ([{"messages": [USER, ANSWER], "images": ["a.png"]}], "row 1: column 'images' holds an image"),
    ],
)  # fmt: skip
def test_rows_without_a_shape_are_refused_by_row_and_column(rows, words, train):
    with pytest.raises(DataError, match=words):
        train(rows)


def test_a_formatting_function_reads_the_users_columns_and_its_text_is_trained(train):
    rows = [{"question": "2+2=", "messages": [USER, ANSWER]}]
    trainer = train(rows, formatting_func=lambda row: row["question"] + " four")
    assert texts(trainer) == [("2+2= four^", "2+2= four^")]
    with pytest.raises(DataError, match="returned list for row 1"):
        train(rows, formatting_func=lambda row: [row["question"]])


# -- rows that are tokens already ----------------------------------------------------------------------------------

X = -100


@pytest.mark.parametrize(
    ("row", "ids", "labels"),
    [
        ({"completion_mask": [0, 0, 1, 1]}, [5, 6, 7, 1], [X, X, 7, 1]),
        ({"assistant_masks": [0, 1, 0, 1]}, [5, 6, 7, 1], [X, 6, X, 1]),
        ({"assistant_masks": [0, 1, 1, 1], "completion_mask": [0, 0, 1, 1]}, [5, 6, 7, 1], [X, X, 7, 1]),
        ({"attention_mask": [0, 1, 1, 1]}, [6, 7, 1], [6, 7, 1]),
        ({"attention_mask": [1, 1, 1, 0], "labels": [X, 6, 7, X]}, [5, 6, 7], [X, 6, 7]),
        ({"labels": [X, 6, 7, 1], "completion_mask": [0, 1, 1, 1]}, [5, 6, 7, 1], [X, 6, 7, 1]),
        ({"position_ids": [0, 1, 2, 3], "seq_lengths": [4]}, [5, 6, 7, 1], [5, 6, 7, 1]),
        ({"seq_lengths": 4, "row_ids": [7] * 4}, [5, 6, 7, 1], [5, 6, 7, 1]),
    ],
)
def test_masks_of_tokenised_rows_are_honoured(row, ids, labels, train):
    (found,) = train([{"input_ids": [5, 6, 7, 1], **row}]).train_dataset
    assert (found["input_ids"], found["labels"]) == (ids, labels)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"completion_mask": [0, 0, 1, 1], "labels": [5, 6, 7, 1]}, "labels where completion_mask is 0: row 1"),
        ({"attention_mask": [1, 0, 1, 1]}, "attention_mask"),
        ({"completion_mask": [0, 0, 2, 1]}, "completion_mask of other values"),
        ({"labels": [5, 6]}, "another number of labels than of input_ids: row 1"),
        ({"labels": 1}, "column 'labels'"),
        ({"labels": [5, None, 7, 1]}, "null"),
        ({"seq_lengths": [2, 2]}, "packed"),
        ({"position_ids": [0, 1, 0, 1]}, "position_ids"),
        ({"input_ids": [0, 6, 7, 1]}, "padded"),
        ({"input_ids": [5, 6, 7, 800]}, "row 1 holds 800"),
        ({"input_ids": [5, 6, -7, 1]}, "embedding"),
        ({"input_ids": [5.0, 6.5]}, "float64"),
        ({"input_ids": [[5, 6]]}, "input_ids"),
    ],
)
def test_masks_that_contradict_are_refused(row, words, train):
    with pytest.raises(DataError, match=words):
        train([{"input_ids": [5, 6, 7, 1], **row}])


# -- content that does not arrive ----------------------------------------------------------------------------------


def test_a_template_that_raises_is_one_block(train):
    rows = [{"messages": [USER, ANSWER]}, {"messages": [{"role": "system", "content": "Be short"}, USER, ANSWER]}]
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be rendered.*System role not supported.*row 2; change"):
        train(rows, tokenizer_with(NO_SYSTEM))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "system", "content": "Hi"}, USER, ANSWER], "content of system"),  # "Hi" stands in the answer, too
        ([USER, CALL, {"role": "tool", "content": "wet nine"}, ANSWER], "content of tool"),
        ([USER, {**CALL, "content": "rain in Oslo for city 3 days"}], "the call's name"),
        ([USER, {**CALL, "content": "rain in Oslo for city 3 days"}], "an argument of the call"),
        ([USER, {"role": "assistant", "content": "", "function_call": {"name": "rain", "arguments": "{}"}}], "call"),
    ],
)
def test_what_a_template_drops_is_named(messages, words, train):
    with pytest.raises(DataError, match=rf"does not arrive in the rendered text \(.*{words}.*row 1"):
        train([{"messages": messages}], tokenizer_with(DROPS))


def test_tool_schemas_that_the_template_drops_are_named(train):
    tools = [{"type": "function", "function": {"name": "rain", "description": "d"}}]
    with pytest.raises(DataError, match="a tool's schema"):
        train([{"messages": [{**USER, "content": "rain"}, ANSWER], "tools": tools}], tokenizer_with(PLAIN))


def test_calls_that_the_template_writes_pass(train):
    rows = Dataset.from_list([{"messages": [USER, CALL]}], on_mixed_types="use_json")
    ((whole, trained),) = texts(train(rows, tokenizer_with(CHATML), assistant_only_loss=True))
    plain = whole.replace("?", "")  # this tokenizer has no quotes and braces
    assert plain == "<user:Hello><assistant:!rain city: Oslo, days: 3>"
    assert trained.replace("?", "") == "!rain city: Oslo, days: 3>"


def test_nulls_that_arrow_adds_to_arguments_are_taken_out(train):
    other = {**CALL, "tool_calls": [{"type": "function", "function": {"name": "mix", "arguments": {"a": 1}}}]}
    rows = [{"messages": [USER, CALL]}, {"messages": [USER, other]}]
    assert [whole for whole, _ in texts(train(rows, tokenizer_with(CHATML)))] == [
        whole for whole, _ in texts(train(Dataset.from_list(rows, on_mixed_types="use_json"), tokenizer_with(CHATML)))
    ]


def test_null_content_is_refused_by_row(train):
    rows = [{"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": None}]}]
    with pytest.raises(DataError, match=r"row 1: messages\[0\] \(user\) has no content"):
        train(rows, tokenizer_with(PLAIN))


@pytest.mark.parametrize(
    "template", [PLAIN, "{%- for m in messages -%}{{ '<' }}{{ m['content'] }}{{ '>' }}{%- endfor -%}"]
)
def test_parts_are_their_text(template, train):
    parts = [{"type": "text", "text": "Plum"}]
    rows = [{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]}]
    text = [{"messages": [{"role": "user", "content": "Plum"}, {"role": "assistant", "content": "Plum"}]}]
    assert texts(train(rows, tokenizer_with(template))) == texts(train(text, tokenizer_with(template)))


def test_a_call_with_null_content_trains_the_call_alone(train):
    rows = Dataset.from_list([{"messages": [USER, {**CALL, "content": None}]}], on_mixed_types="use_json")
    assert "None" not in texts(train(rows, tokenizer_with(CHATML)))[0][0]


def test_an_answer_outside_the_mask_and_a_question_inside_it_are_refused(train):
    swapped = (
        "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- generation -%}{{ m.content }}{%- endgeneration -%}"
        "{%- else -%}{{ m.content }}{%- endif -%}{%- endfor -%}"
    )
    with pytest.raises(DataError) as error:
        train([{"messages": [USER, ANSWER]}], tokenizer_with(swapped), assistant_only_loss=True)
    assert "answer that is not trained on" in str(error.value)
    assert "text of the system, the user or a tool" in str(error.value)


def test_tool_output_in_a_completion_is_not_trained_on(train):
    row = {"prompt": [USER], "completion": [CALL, {"role": "tool", "content": "wet 9"}, ANSWER]}
    rows = Dataset.from_list([row], on_mixed_types="use_json")
    with pytest.raises(DataError, match=r"train on text of .*content of tool.*assistant_only_loss: true"):
        train(rows, tokenizer_with(CHATML))
    trained = texts(train(rows, tokenizer_with(CHATML), assistant_only_loss=True, max_length=None))[0][1]
    assert "wet" not in trained
    assert "Hi there" in trained


@pytest.mark.parametrize("row", [{"prompt": "a", "completion": " "}, {"messages": [USER, {**ANSWER, "content": ""}]}])
def test_empty_answers_are_named(row, train):
    assert "1 of 1 rows have an empty answer, or only white space: row 1" in said(train([row]))


def test_certain_roles_are_mapped_and_others_refused_by_row(train):
    mapped = [{"messages": [{"role": "human", "content": "Hello"}, {"role": "gpt", "content": "Hi there"}]}]
    assert texts(train(mapped)) == texts(train([{"messages": [USER, ANSWER]}]))
    with pytest.raises(DataError, match=r"row 2: .*role 'critic'"):
        train([*mapped, {"messages": [USER, {"role": "critic", "content": "Hi"}]}])


def test_rows_without_an_assistant_are_named_under_its_loss(train):
    answered, silent = {"messages": [USER, ANSWER]}, {"messages": [USER]}
    empty = {"messages": [USER, {**ANSWER, "content": ""}]}
    with pytest.raises(DataError, match=r"1 row has no answer to train on: row 1 \(roles: user\); add a message"):
        train([silent], assistant_only_loss=True)
    with pytest.raises(DataError, match=r"2 rows have no answer to train on: rows 2, 3 \(roles: user\)"):
        train([answered, silent, silent], assistant_only_loss=True)
    bare = "{%- for m in messages -%}{{ '<' }}{%- if m.role == 'assistant' -%}{%- generation -%}{{ m.content }}"
    bare += "{%- endgeneration -%}{%- else -%}{{ m.content }}{%- endif -%}{%- endfor -%}"
    with pytest.raises(DataError, match=r"1 row has no answer to train on: row 2 \(roles: assistant, user\)"):
        train([answered, empty], tokenizer_with(bare), assistant_only_loss=True)
    unmarked = bare.replace("m.role == 'assistant'", "m.content == 'Hi'")
    with pytest.raises(DataError, match=r"1 row has no assistant token .*row 2 \(roles: assistant, user\); mark"):
        train(
            [{"messages": [USER, {**ANSWER, "content": "Hi"}]}, answered],
            tokenizer_with(unmarked),
            assistant_only_loss=True,
        )


def test_prompts_that_change_before_their_completion_are_named_and_trls_words_are_not_shown(train, caplog):
    """The template opens an answer with a thought that it leaves out of answers: not what a model is asked with."""
    template = PLAIN + "{%- if add_generation_prompt -%}{{ '<assistant:think' }}{%- endif -%}"
    trainer = train([{"prompt": [USER], "completion": [ANSWER]}], tokenizer_with(template))
    assert "1 of 1 rows have a prompt whose end is left out" in said(trainer)
    assert "not a prefix" not in caplog.text


def test_of_prompts_those_that_change_are_named_and_no_others(train):
    """Only a question that ends with `?` is asked to think."""
    asked = "add_generation_prompt and messages[-1].content.endswith('?')"
    template = PLAIN + "{%- if " + asked + " -%}{{ '<assistant:think' }}{%- endif -%}"
    questions = ["Hello", "Why?", "So", "How?", "Yes"]
    rows = [{"prompt": [{"role": "user", "content": text}], "completion": [ANSWER]} for text in questions]
    trainer = train(rows, tokenizer_with(template))
    assert "2 of 5 rows have a prompt whose end is left out" in said(trainer)
    assert ": rows 2, 4; end the prompt" in said(trainer)


def test_thoughts_that_a_template_leaves_out_are_a_warning(train):
    template = PLAIN.replace("m['content']", "m['content'].split('</think>')[-1]")
    trainer = train([{"messages": [USER, {**ANSWER, "content": "<think>well</think>Hi"}]}], tokenizer_with(template))
    assert "thoughts that the chat template leaves out" in said(trainer)


# -- text that the tokenizer loses ---------------------------------------------------------------------------------


def test_lost_characters_are_counted_by_class(train):
    trainer = train([{"prompt": "Say: ", "completion": "hi é漢 ok"}, PAIR])
    found = said(trainer)
    assert (
        "1 of 2 rows lose text in the tokenizer: 2 of their 8 characters (25.0%: 1 Latin letters, 1 CJK letters)"
        in found
    )


def test_rows_that_lose_most_of_their_text_are_refused(train):
    with pytest.raises(DataError, match="Cyrillic letters"):
        train([{"prompt": "Say: ", "completion": "Привет"}])


def test_a_tokenizer_that_lowers_case_is_named_as_that(train):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    found = said(train([{"prompt": "Say: ", "completion": "Hello"}], tokenizer))
    assert "changed by the tokenizer, which does not keep case" in found
    assert "lose text" not in found


def test_double_start_and_end_tokens_are_named(train):
    tokenizer = tokenizer_with(bos_token="!")
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="! $A ^", special_tokens=[("!", start), ("^", end)]
    )
    found = said(train([{"text": "!abc"}, {"text": "de"}], tokenizer))
    assert "1 of 2 rows begin with two start tokens: row 1" in found
    assert "2 of 2 rows end with two end tokens: rows 1, 2" in found


def test_a_template_with_todays_date_is_named(train):
    dated = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + PLAIN
    assert "writes today's date ('Today: " in said(train([{"messages": [USER, ANSWER]}], tokenizer_with(dated)))
    assert "today" not in said(train([{"messages": [USER, ANSWER]}], tokenizer_with(PLAIN)))


# -- where generation stops ----------------------------------------------------------------------------------------


def test_the_end_that_is_trained_joins_the_saved_generation_config(train, tmp_path):
    tokenizer = tokenizer_with(CHATML, extra_special_tokens=[">"])
    end = tokenizer.convert_tokens_to_ids(">")
    trainer = train([{"messages": [USER, ANSWER]}], tokenizer, assistant_only_loss=True, max_steps=1)
    assert f"'>' ({end}), at which generation of this model does not stop" in said(trainer)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id
    assert set(saved) == {tokenizer.eos_token_id, end}


def test_an_end_that_the_model_knows_is_left_alone(train):
    trainer = train([PAIR])
    assert trainer.model.generation_config.eos_token_id == 1
    assert said(trainer) == ""


# -- the same words from the audit ---------------------------------------------------------------------------------

STOPPED = {
    "raises": ([{"messages": [{"role": "system", "content": "x"}, USER, ANSWER]}], NO_SYSTEM, "template_raises"),
    "drops": ([{"messages": [{"role": "tool", "content": "x"}, USER, ANSWER]}], DROPS, "content_dropped"),
    "lost": ([{"prompt": "a", "completion": "Привет"}], PLAIN, "text_lost"),
}


@pytest.mark.parametrize("kind", STOPPED)
def test_the_audit_has_an_error_where_training_stops(kind, train, tmp_path):
    rows, template, check = STOPPED[kind]
    found = tokenise(
        QTargetConfig(str(tmp_path / "audit"), **SETTINGS), Dataset.from_list(rows), tokenizer_with(template)
    )
    errors = [finding for finding in found.findings if finding.severity == "error"]
    assert check in [finding.check for finding in errors]
    with pytest.raises(DataError) as stopped:
        train(rows, tokenizer_with(template))
    for finding in errors:
        assert finding.message in str(stopped.value)


def test_two_processes_find_what_one_finds(train):
    rows = [{"prompt": "Say: ", "completion": f"word {i}" + ("é" if i % 300 == 7 else "")} for i in range(1100)]
    alone, together = (said(train(rows, dataset_num_proc=count)) for count in (None, 2))
    assert "rows 8, 308, 608, 908" in alone
    assert alone == together


# -- TRL's templates with a real tokenizer -------------------------------------------------------------------------

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
WRITES = ("qwen2_5", "qwen3", "llama3_1", "glm4moe", "gptoss")
DROPS_CALLS = ("gemma", "phi3", "cohere")


@pytest.fixture(scope="module")
def qwen():
    folder = SHARED / "models" / "tokenizer-qwen2"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return AutoTokenizer.from_pretrained(folder)


def tool_rows() -> Dataset:
    schema = {"type": "function", "function": {"name": "rain", "description": "rain", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}}  # fmt: skip
    row = {"messages": [{"role": "user", "content": "rain in Oslo for 3 days, city"}, CALL], "tools": [schema]}
    return Dataset.from_list([row], on_mixed_types="use_json")


@pytest.mark.parametrize("name", [*WRITES, *DROPS_CALLS])
def test_trls_templates_write_calls_or_are_refused(name, qwen, train):
    tokenizer = AutoTokenizer.from_pretrained(qwen.name_or_path)
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    if name in DROPS_CALLS:
        with pytest.raises(DataError, match="the call's name in assistant"):
            train(tool_rows(), tokenizer, model, max_length=None)
        return
    ((whole, _),) = texts(train(tool_rows(), tokenizer, model, max_length=None))
    assert whole.count("Oslo") == 2
    assert json.dumps(None) not in whole
