"""Spans of characters on real tokens: which characters of the text the tokens of weight 0 stand for."""

import pytest
from transformers import AutoTokenizer

from qtarget.data.embedded import base_model_path
from qtarget.data.spans import Span, UnplacedSpansError, span_weights, spans_in_row


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_model_path())


def zeros(tokenizer, ids, weights):
    return tokenizer.decode([i for i, w in zip(ids, weights, strict=True) if w == 0])


@pytest.mark.parametrize(
    ("prompt", "response", "marked"),
    [
        ("Say: ", "Wrong answer. No, the right one is 42.", "Wrong answer."),
        ("Q", "héllo 🙂 wörld 日本語 ok", "🙂"),
        ("日本", "日本語テキスト", "本語"),
        ("Q\n", "a\n\n  b = 1\n  c = 2", "b = 1"),
    ],
)
def test_the_tokens_of_weight_zero_are_the_marked_text(tokenizer, prompt, response, marked):
    start = response.index(marked)
    ids = tokenizer(prompt + response)["input_ids"]
    row = {"prompt": prompt, "completion": response, "input_ids": ids}
    weights = spans_in_row({**row, "weight_spans": [[start, start + len(marked), 0]]}, tokenizer, None)
    assert zeros(tokenizer, ids, weights).strip() == marked


def test_a_straddling_token_takes_the_weight_of_most_of_its_characters():
    spans = [Span(2, 4, 0.0), Span(4, 6, 3.0)]
    assert span_weights([(0, 2), (1, 4), (0, 3), (3, 5), (5, 9), (6, 6)], spans) == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]


def test_a_message_whose_ends_the_template_strips(tokenizer):
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "  Bad step. Good step.\n", "weight_spans": [[0, 11, 0]]},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Bad step. Good step."},
    ]
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def render(part):
        return tokenizer.apply_chat_template(part, chat_template=template, tokenize=False)

    row = {"messages": messages, "input_ids": ids}
    weights = spans_in_row(row, tokenizer, render)
    assert zeros(tokenizer, ids, weights) == "Bad step."
    assert weights.index(0.0) == tokenizer(text[: text.index("Bad")], add_special_tokens=False)["input_ids"].__len__()
    upper = lambda part: render(part).upper()  # noqa: E731
    with pytest.raises(UnplacedSpansError, match="as it is"):
        spans_in_row(row, tokenizer, upper)


def test_other_tokens_than_those_of_the_text_are_unplaced(tokenizer):
    ids = tokenizer("abc defg")["input_ids"]
    row = {"prompt": "abc ", "completion": "xyz", "input_ids": ids, "weight_spans": [[0, 1, 0]]}
    with pytest.raises(UnplacedSpansError, match="not those of its text"):
        spans_in_row(row, tokenizer, None)
