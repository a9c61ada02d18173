"""Message weights against conversations rendered by hand, one token a character."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qtarget.core.errors import DataError
from qtarget.data.columns import message_token_weights, row_loss_weights

CHATML = """{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}#
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
# Like Qwen3: the last assistant turn gets an empty thought, earlier ones do not.
THINKING = """{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' and loop.last %}[think]{% endif %}\
{{ m['content'] }}#
{% endfor %}"""
# Like Gemma: a system message alone is refused.
STRICT = """{% if messages|length < 2 %}{{ raise_exception('needs a user turn') }}{% endif %}""" + CHATML


@pytest.fixture(scope="module")
def tokenizer():
    characters = sorted({chr(i) for i in range(32, 127)} | {"\n"})
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)


def talk(*turns):
    return [{"role": role, "content": text} | ({} if w is None else {"weight": w}) for role, text, w in turns]


def spread(*segments) -> list[float]:
    return [float(weight) for text, weight in segments for _ in text]


def weights_of(tokenizer, messages, template, cut=None, **kwargs):
    bare = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    ids = tokenizer.apply_chat_template(bare, chat_template=template, tokenize=True, return_dict=True)["input_ids"]
    return message_token_weights(tokenizer, messages, ids[:cut], chat_template=template, **kwargs)


def test_the_test_tokenizer_has_one_token_a_character(tokenizer):
    assert tokenizer.decode(tokenizer("ab c#\n")["input_ids"]) == "ab c#\n"
    assert len(tokenizer("ab c#\n")["input_ids"]) == 6


def test_a_message_owns_its_header_its_text_and_its_end(tokenizer):
    messages = talk(("user", "hi", 0), ("assistant", "no", 0.5), ("user", "hm", None), ("assistant", "yes", 2))
    expected = spread(("<user>hi#\n", 0), ("<assistant>no#\n", 0.5), ("<user>hm#\n", 1), ("<assistant>yes#\n", 2))
    assert weights_of(tokenizer, messages, CHATML) == expected
    assert weights_of(tokenizer, messages, CHATML, cut=21) == expected[:21]


def test_a_template_that_rewrites_earlier_turns_still_has_the_right_borders(tokenizer):
    messages = talk(("user", "hi", 1), ("assistant", "no", 0), ("user", "hm", 1), ("assistant", "yes", 3))
    expected = spread(("<user>hi#\n", 1), ("<assistant>no#\n", 0), ("<user>hm#\n", 1), ("<assistant>[think]yes#\n", 3))
    assert weights_of(tokenizer, messages, THINKING) == expected


def test_repeated_text_does_not_confuse_the_borders(tokenizer):
    messages = talk(("assistant", "aaa", 0), ("assistant", "aaa", 1), ("assistant", "a", 0))
    for template, last in ((CHATML, "<assistant>a#\n"), (THINKING, "<assistant>[think]a#\n")):
        expected = spread(("<assistant>aaa#\n", 0), ("<assistant>aaa#\n", 1), (last, 0))
        assert weights_of(tokenizer, messages, template) == expected


def test_equal_weights_need_no_prefix_and_unequal_ones_say_what_is_wrong(tokenizer):
    same = talk(("system", "s", 1), ("user", "u", None), ("assistant", "a", 0))
    expected = spread(("<system>s#\n", 1), ("<user>u#\n", 1), ("<assistant>a#\n", 0))
    assert weights_of(tokenizer, same, STRICT) == expected
    with pytest.raises(
        DataError, match=r"first 1 message alone .*needs a user turn.*give messages 0 and 1 equal weights"
    ):
        weights_of(tokenizer, talk(("system", "s", 0), ("user", "u", 1)), STRICT)


def test_prefix_options_reach_the_template(tokenizer):
    template = CHATML.replace("#", "{{ mark }}")
    messages = talk(("user", "hi", 0), ("assistant", "no", 1))
    bare = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    ids = tokenizer.apply_chat_template(bare, chat_template=template, mark="@@", return_dict=True)["input_ids"]
    found = message_token_weights(tokenizer, messages, ids, chat_template=template, mark="@@")
    assert found == spread(("<user>hi@@\n", 0), ("<assistant>no@@\n", 1))
    with pytest.raises(DataError, match="not the rendered conversation"):
        message_token_weights(tokenizer, messages, ids, chat_template=template, mark="!!")


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "one", True, [1]])
def test_weights_that_are_no_weights_are_refused(tokenizer, weight):
    messages = talk(("user", "hi", None), ("assistant", "no", weight))
    with pytest.raises(DataError, match=r"weight of message 1 \(assistant\)"):
        weights_of(tokenizer, messages, CHATML)
    with pytest.raises(DataError, match=r"loss_weights\[1\]"):
        row_loss_weights({"loss_weights": [1, weight]}, 2)


def test_loss_weights_must_be_as_long_as_the_tokens():
    assert row_loss_weights({"loss_weights": (0, 2.5, 1)}, 3) == [0.0, 2.5, 1.0]
    with pytest.raises(DataError, match="2 entries, input_ids 3"):
        row_loss_weights({"loss_weights": [1, 1]}, 3)
    with pytest.raises(DataError, match="no `loss_weights`"):
        row_loss_weights({"input_ids": [1]}, 1)
    with pytest.raises(DataError, match="expected a list"):
        row_loss_weights({"loss_weights": 1.0}, 1)
