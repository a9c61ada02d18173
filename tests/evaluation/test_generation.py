"""Completions against a loop that takes one prompt and one token at a time."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qtarget.core.errors import ConfigError, DataError
from qtarget.data.embedded import base_model_path, load_demonstrations
from qtarget.evaluation.generation import (
    Decoding,
    complete,
    new_tokens,
    prompt_ids,
    refuse_full,
    room,
)
from qtarget.evaluation.judges import make_judge
from qtarget.evaluation.questions import ask, split
from qtarget.integrations.shared.saved.ends import end_of_turn, stop_ids
from qtarget.storage.models import context_of


@pytest.fixture(scope="module")
def embedded():
    path = base_model_path()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@torch.no_grad()
def alone(model, ids: list[int], stops: list[int], most: int) -> tuple[list[int], bool]:
    """Greedy, without batch, padding, cache or ``generate``."""
    said: list[int] = []
    while len(said) < most:
        token = int(model(torch.tensor([ids + said])).logits[0, -1].argmax())
        if token in stops:
            return said, True
        said.append(token)
    return said, False


def test_a_padded_batch_says_what_each_prompt_alone_would_be_answered(embedded):
    model, tokenizer = embedded
    prompts = [row["prompt"] for row in load_demonstrations("heldout_skills_test")[:8]] + ["Q", "a b c " * 12]
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    assert len({len(one) for one in ids}) > 3
    found = complete(model, tokenizer, ids, max_new_tokens=9, stops=[0])
    kept = []
    for one, (said,) in zip(ids, found, strict=True):
        tokens, stopped = alone(model, one, [0], 9)
        assert (said.text, said.stopped) == (tokenizer.decode(tokens, skip_special_tokens=True), stopped)
        kept.append(stopped)
    assert set(kept) == {True, False}


def test_the_models_own_penalties_do_not_count_and_its_modes_are_kept(embedded):
    model, tokenizer = embedded
    ids = [prompt_ids(tokenizer, row["prompt"]) for row in load_demonstrations("base_format_test")[:6]]
    plain = complete(model, tokenizer, ids, max_new_tokens=12, stops=[0])
    own = model.generation_config
    try:
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=8,
            eos_token_id=0, pad_token_id=1,
        )  # fmt: skip
        model.train()
        assert complete(model, tokenizer, ids, max_new_tokens=12, stops=[0]) == plain
        assert model.training
    finally:
        model.generation_config = own
        model.eval()


def test_the_head_is_not_copied_for_every_prompt(embedded):
    """torch 2.13 multiplies a slice by an expanded copy of the weight, one a prompt: the head gets whole tensors."""
    model, tokenizer = embedded
    head, seen = model.get_output_embeddings(), []
    own = head.register_forward_hook(lambda _, given, said: seen.append((given[0].is_contiguous(), given[0].shape[1])))
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in load_demonstrations("test")[:3]]
    complete(model, tokenizer, prompts, max_new_tokens=2, stops=[])
    own.remove()
    assert seen[0] == (True, 1) and all(
        is_whole for is_whole, _ in seen
    )  # the first is the prompt's last position alone
    assert not head._forward_pre_hooks


def test_draws_follow_the_models_distribution_and_are_repeatable(embedded):
    model, tokenizer = embedded
    ids = [prompt_ids(tokenizer, "The ")]
    drawn = Decoding(temperature=2.0, samples=400)
    before = torch.random.get_rng_state()
    found = complete(model, tokenizer, ids, max_new_tokens=1, stops=[0], decoding=drawn)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found == complete(model, tokenizer, ids, max_new_tokens=1, stops=[0], decoding=drawn)
    assert found != complete(model, tokenizer, ids, max_new_tokens=1, stops=[0], decoding=drawn, stream=1)
    with torch.no_grad():
        expected = (model(torch.tensor(ids)).logits[0, -1] / 2.0).softmax(-1)
    top = int(expected.argmax())
    share = sum(one.text == tokenizer.decode([top]) for one in found[0]) / 400
    p = float(expected[top])
    assert p < 0.9 and abs(share - p) < 4 * (p * (1 - p) / 400) ** 0.5


def test_what_ends_a_turn(embedded):
    _, tokenizer = embedded
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    other = AutoTokenizer.from_pretrained(base_model_path())
    other.add_special_tokens({"additional_special_tokens": ["<end>"]})
    turn = other.convert_tokens_to_ids("<end>")
    other.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<end>\n{% endfor %}"
    assert end_of_turn(other) == turn
    assert stop_ids(other, GenerationConfig(eos_token_id=[0, 7]), chat=True) == [0, 7, turn]
    assert stop_ids(other, GenerationConfig(eos_token_id=[0, 7])) == [0, 7]
    other.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(other) is None
    other.chat_template = "{{ raise_exception('only systems') }}"
    assert end_of_turn(other) is None


def test_prompts_are_what_training_makes_of_them(embedded):
    _, tokenizer = embedded
    question = [{"role": "user", "content": "What is 2+2?"}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert text.endswith("Response:\n")
    assert tokenizer.decode(prompt_ids(tokenizer, question)) == text
    other = AutoTokenizer.from_pretrained(base_model_path())
    other.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        prompt_ids(other, question)
    other.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(ConfigError, match="no users"):
        prompt_ids(other, question)


def test_how_long_answers_may_become(embedded):
    model, tokenizer = embedded
    longest = len(tokenizer("ten letters")["input_ids"])
    assert new_tokens(tokenizer, ["a", "ten letters"]) == -(-3 * longest // 2) + 16
    assert new_tokens(tokenizer, ["ab " * 5000]) == 2048
    assert context_of(model.config) == 256
    assert [room([10, 250], 20, 256), room([10, 250], 20, None), room([1], 20, 256)] == [6, 20, 20]


def test_prompts_that_leave_no_room_are_all_named():
    refuse_full([10, 255], 256, "rows.jsonl")
    refuse_full([10, 900], None, "rows.jsonl")
    with pytest.raises(
        DataError, match=r"rows.jsonl: 2 of 3 rows .* the 256 positions of a .* 300 tokens.*: rows 4, 9; leave"
    ):
        refuse_full([256, 10, 300], 256, "rows.jsonl", [3, 5, 8], "a")
    every = ", ".join(map(str, range(1, 41)))
    with pytest.raises(DataError, match=f"40 of 40 rows .*: rows {every}; leave out these rows"):
        refuse_full([256] * 40, 256, "rows.jsonl")
    with pytest.raises(
        DataError, match=r"rows 1, 2, 3, 4, 5, \.\.\.; leave out rows whose prompt has 256 tokens or more"
    ):
        refuse_full([256] * 4000, 256, "rows.jsonl")


def test_an_answer_of_weight_0_is_no_question_that_counts():
    user, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [
        {"messages": [user, said], "weight": None},
        {"messages": [user, said], "weight": "0"},
        {"messages": [user, {**said, "weight": 0}, user, said]},
        {"messages": [user, said, user, {**said, "weight": 0}]},
    ]
    judge = make_judge("exact")
    assert [one.counts for one in ask(rows, judge, "rows.jsonl")] == [True, False, True, False]
    chats = [{"prompt": [user], "completion": [{**said, "weight": weight}]} for weight in (0.5, 0)]
    assert [one.counts for one in ask(chats, judge, "rows.jsonl")] == [True, False]
    with pytest.raises(DataError, match=r"rows.jsonl: all 2 rows have answers of weight 0.*take the weights away"):
        ask([rows[1], rows[3]], judge, "rows.jsonl")
    with pytest.raises(DataError, match=r"row 1: weight .*-1"):
        ask([{**rows[0], "weight": -1}], judge, "rows.jsonl")


def test_questions_of_each_format():
    user, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert split({"prompt": "q", "completion": "a"}, "") == ("q", "a")
    assert split({"prompt": [user], "completion": [said]}, "") == ([user], "a")
    two = [{"role": "system", "content": "s"}, user, said, user, {**said, "content": "last", "name": None}]
    assert split({"messages": two}, "") == (two[:4], "last")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert split({"messages": [user, {"role": "assistant", "content": parts}]}, "") == ([user], "ab")


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([{"text": "a"}], "rows without answers"),
        ([{"messages": [{"role": "user", "content": "q"}]}], "row 1: no message of the assistant"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "row 1: nothing before"),
        ([{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": " "}], "row 2: the answer is empty"),
        (
            [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "b"}],
            "row 2: the reference does not match",
        ),
    ],
)
def test_rows_that_cannot_be_asked(rows, part):
    with pytest.raises(DataError, match=part):
        ask(rows, make_judge("regex", pattern="(a)"), "rows.jsonl")
