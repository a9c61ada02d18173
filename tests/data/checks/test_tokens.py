"""Checks of tokenised rows: each fires on a row made for it and is silent beside it; roles against a real template."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qtarget.data.checks.tokens import (
    Vocabulary,
    check_ends,
    check_known,
    check_lengths,
    check_positions,
    check_roles,
    check_runaway,
    check_tokens,
)

END, UNKNOWN, TURN_END = 1, 2, 3
WORDS = Vocabulary(
    50, frozenset({END, TURN_END}), UNKNOWN, frozenset({40, 41, 42}), lambda ids: " ".join(map(str, ids))
)


def row(ids: list[int], trained_from: int = 2) -> dict:
    labels = [-100] * trained_from + ids[trained_from:]
    return {"input_ids": np.array(ids), "labels": np.array(labels)}


GOOD = row([10, 11, 12, 13, END])


def test_good_rows_have_facts_alone():
    assert [found.severity for found in check_tokens([GOOD] * 3, WORDS, max_length=8)] == ["info"]


def test_a_missing_end_is_found_and_a_line_end_behind_it_is_not():
    chatml = row([10, 11, 12, TURN_END, 20])
    cut_off = row([10, 11, 12, 13, 14])
    end_in_prompt = row([10, END, 12, 13])
    end_unsupervised = {"input_ids": [10, 11, 12, END], "labels": [-100, -100, 12, -100]}
    nothing_trained = row([10, 11, 12], trained_from=3)
    (found,) = check_ends([GOOD, chatml, cut_off, end_in_prompt, end_unsupervised, nothing_trained], WORDS)
    assert (found.check, found.severity, found.rows) == ("missing_end", "warning", (2, 3, 4))
    assert "3 of 5 rows" in found.message
    assert found.evidence["examples"][0] == {"row": 2, "text": "12 13 14"}
    assert check_ends([GOOD, chatml, nothing_trained], WORDS) == []


def test_a_row_longer_than_the_model_was_made_for_is_named_unless_it_is_cut():
    placed = Vocabulary(50, WORDS.end_ids, None, frozenset(), WORDS.decode, positions=4)
    names = {limit: {f.check for f in check_tokens([GOOD], placed, max_length=limit)} for limit in (None, 8, 4)}
    assert names[None] == names[8] == {"beyond_model", "lengths"}
    assert names[4] == {"lengths"}
    (found,) = check_positions([GOOD], placed, 8)
    assert found.severity == "warning" and "set max_length to 4 or less" in found.message
    (found,) = check_positions([GOOD], replace(placed, has_table=True), None)
    assert found.severity == "error"
    short = row([10, 11, END])
    assert [f.count for f in check_positions([short, short], placed, 8, filled=True)] == [2]
    assert check_positions([short], placed, 8) == check_positions([short], placed, 4, filled=True) == []


def test_ids_that_the_model_does_not_have_are_an_error():
    found = check_known([GOOD, row([10, 11, 50]), row([10, -1, 12])], WORDS)
    assert [(f.check, f.severity, f.rows) for f in found] == [("outside_vocabulary", "error", (1, 2))]
    assert found[0].evidence == {"largest_id": 50, "vocabulary": 50}
    assert check_known([GOOD, row([10, 11, 49])], WORDS) == []


def test_a_masked_id_is_named_and_its_place_explained():
    (found,) = check_known([GOOD, row([10, -100, 49])], WORDS)
    assert "row 2 holds -100" in found.message
    assert "-100 masks labels, and stands in no input_ids" in found.message


def test_unknown_tokens_are_counted_and_shown():
    (found,) = check_known([GOOD, row([10, 11, UNKNOWN, UNKNOWN, END])], WORDS)
    assert (found.check, found.count, found.rows) == ("unknown_tokens", 1, (1,))
    assert found.evidence == {"tokens": 2, "examples": [{"row": 1, "position": 2, "text": "10 11 2 2 1"}]}
    without = Vocabulary(50, WORDS.end_ids, None, frozenset(), WORDS.decode)
    assert check_known([row([10, 11, UNKNOWN])], without) == []


def test_rows_in_bytes_are_told_from_a_single_emoji():
    (found,) = check_known([row([10, 40, 41, 42, END]), row([*range(10, 30), 40, 41, 42, END])], WORDS)
    assert (found.check, found.rows) == ("byte_tokens", (0,))


def test_a_mask_that_runs_away_is_measured_against_the_other_rows():
    whole = row([10, 11, 12, END], trained_from=0)
    masked = row([10, 11, 12, 13, 14, END], trained_from=4)
    (found,) = check_runaway([masked, whole, masked])
    assert (found.check, found.rows, found.evidence) == ("runaway_mask", (1,), {"median_share": 0.4})
    assert check_runaway([whole] * 3) == []  # plain text is trained on as a whole
    assert check_runaway([masked] * 3) == []
    long_answer = row(list(range(10, 410)), trained_from=7)
    assert check_runaway([masked, long_answer, masked]) == [], "its prompt is masked, though it is little of the row"
    assert check_runaway([masked, row(list(range(10, 410)), trained_from=2), masked])[0].rows == (1,)


def test_lengths_are_those_of_numpy():
    rows = [row(list(range(10, 10 + n))) for n in range(3, 103)]
    (found,) = check_lengths(rows, 50)
    assert {name: found.evidence[name] for name in ("min", "median", "p95", "max", "over_max_length")} == {
        "min": 3, "median": 53, "p95": 98, "max": 102, "over_max_length": 52,
    }  # fmt: skip
    assert found.evidence["tokens"] == sum(range(3, 103))
    assert found.evidence["trained_tokens"] == sum(range(3, 103)) - 200
    assert check_lengths([], 50) == []


class TestTokenizers:
    def test_end_marks_and_unknown_tokens_of_the_embedded_tokenizer(self):
        from transformers import AutoTokenizer

        from qtarget.data.embedded import base_model_path

        tokenizer = AutoTokenizer.from_pretrained(base_model_path())
        vocabulary = Vocabulary.of(tokenizer, 4096, [7])
        assert {tokenizer.eos_token_id, 7} <= vocabulary.end_ids
        assert vocabulary.size == 4096
        assert Vocabulary.of(tokenizer).size == len(tokenizer)

    def test_a_tokenizer_whose_unknown_token_is_its_end_mark_has_no_unknown_token(self):
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = {"<end>": 0, "a": 1, "<0x41>": 2, "<pad>": 3, "<unk>": 4}
        inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        as_gpt2 = PreTrainedTokenizerFast(
            tokenizer_object=inner, eos_token="<end>", unk_token="<end>", pad_token="<pad>"
        )
        assert (Vocabulary.of(as_gpt2).unknown_id, Vocabulary.of(as_gpt2).end_ids) == (None, {0})
        usual = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>", pad_token="<pad>")
        found = Vocabulary.of(usual)
        assert (found.unknown_id, found.end_ids, found.byte_ids) == (4, {0}, {2})


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    from qtarget.data.embedded import base_model_path

    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    tokenizer.chat_template = TEMPLATE
    return tokenizer


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]


def rendered(tokenizer, messages, roles):
    """Tokens, and labels at the messages of some roles; every message tokenises alone in this template."""
    parts = [tokenizer(f"<{m['role']}>{m['content']}")["input_ids"] + [tokenizer.eos_token_id] for m in messages]
    labels = [token if m["role"] in roles else -100 for m, part in zip(messages, parts) for token in part]
    return {"input_ids": [token for part in parts for token in part], "labels": labels}


@pytest.mark.parametrize("assistant_only", [True, False])
def test_text_of_others_in_the_mask_is_found(tokenizer, assistant_only):
    clean = rendered(tokenizer, TALK, {"assistant"})
    whole = rendered(tokenizer, TALK, {"system", "user", "assistant"})
    whole_ids = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert clean["input_ids"] == whole_ids
    raw = [{"messages": TALK}] * 2 + [{"prompt": "a", "completion": "b"}]
    other = {"input_ids": [5, 6], "labels": [5, 6]}
    found = check_roles(raw, [clean, whole, other], tokenizer, chat_template=None, assistant_only=assistant_only)
    assert [(f.check, f.severity, f.rows) for f in found] == [
        ("foreign_text", "error" if assistant_only else "warning", (1,))
    ]
    foreign = sum(
        len(tokenizer(f"<{m['role']}>{m['content']}")["input_ids"]) + 1 for m in TALK if m["role"] != "assistant"
    )
    assert found[0].evidence["tokens"] == foreign - 1  # the first token of a row is predicted by nothing
    assert "Be brief." in found[0].evidence["examples"][0]["text"]
    assert check_roles(raw, [clean, clean, other], tokenizer, chat_template=None, assistant_only=assistant_only) == []


def test_rows_that_are_not_their_conversation_are_left_unchecked(tokenizer):
    strange = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    whole = rendered(tokenizer, TALK, {"user", "assistant"})
    raw = [{"messages": TALK}] * 2
    found, unchecked = check_roles(raw, [strange, whole], tokenizer, chat_template=None, assistant_only=True)
    assert (found.check, found.rows) == ("foreign_text", (1,))
    assert "1 of 1 rows" in found.message  # the other one was not looked through
    assert (unchecked.check, unchecked.severity, unchecked.count, unchecked.rows) == (
        "roles_unchecked",
        "info",
        1,
        (0,),
    )


def test_a_sample_of_the_conversations_says_how_many_it_left_out(tokenizer, monkeypatch):
    """Silence about rows that nobody looked at would pass for a clean bill."""
    monkeypatch.setattr("qtarget.data.checks.tokens.ROLES_CHECKED", 2)
    clean, strange = rendered(tokenizer, TALK, {"assistant"}), {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    raw = [{"messages": TALK}] * 5
    (found,) = check_roles(raw, [clean] * 5, tokenizer, chat_template=None, assistant_only=True)
    assert (found.check, found.count, found.rows, found.evidence) == (
        "roles_unchecked", 3, (), {"conversations": 5, "untraceable": 0, "outside_sample": 3},
    )  # fmt: skip
    (found,) = check_roles(raw, [strange] * 5, tokenizer, chat_template=None, assistant_only=True)
    assert (found.count, found.rows) == (5, (0, 3))
