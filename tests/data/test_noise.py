"""Noise and its marks: whatever lies outside the marks is the clean row, and whatever lies inside is not."""

from __future__ import annotations

import copy
import itertools
import logging
from random import Random

import pytest
from transformers import AutoTokenizer

from qtarget.core.errors import ConfigError, DataError
from qtarget.data import tasks
from qtarget.data.embedded import base_model_path
from qtarget.data.noise import NOISE_KINDS, PREAMBLES, inject_noise, noise_token_mask, response_text


def _demonstrations(count: int) -> list[dict]:
    rng = Random(0)
    skills = tasks.DEMONSTRATED_SKILLS
    return [tasks.demonstration(tasks.sample_problem(skills[i % len(skills)], rng), rng) for i in range(count)]


def _as_messages(row: dict) -> dict:
    return {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": "an earlier turn"},
            {"role": "user", "content": "go on"},
            {"role": "assistant", "content": row["completion"]},
        ]
    }


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_model_path())


def _pieces_outside_marks(noisy: dict) -> list[str]:
    text, position, pieces = response_text(noisy), 0, []
    for start, end, _ in noisy["noise_spans"]:
        pieces.append(text[position:start])
        position = end
    return [*pieces, text[position:]]


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 1.0])
def test_random_tokens_replace_the_asked_share_and_mark_all_of_it(tokenizer, rate):
    clean = _demonstrations(60)
    tokens = [
        tokenizer(row["completion"], return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        for row in clean
    ]
    noisy = inject_noise(clean, kind="random_tokens", rate=rate, seed=1, tokenizer=tokenizer)
    assert sum(len(row["noise_spans"]) for row in noisy) == round(rate * sum(map(len, tokens)))
    for before, after, offsets in zip(clean, noisy, tokens, strict=True):
        # Walk both texts token by token: a token is either as before, or it is one marked span with another text.
        position, spans = 0, list(after["noise_spans"])
        text = after["completion"]
        for start, end in offsets:
            old = before["completion"][start:end]
            if spans and spans[0][0] == position:
                _, stop, kind = spans.pop(0)
                assert kind == "random_tokens"
                new = text[position:stop]
                assert new != old
                assert new.isprintable()
                assert new.startswith(" ") == old.startswith(" ")
                assert len(tokenizer.tokenize(new)) == 1
                position = stop
            else:
                assert text[position : position + len(old)] == old
                position += len(old)
        assert position == len(text)
        assert not spans
        assert {key: after[key] for key in ("prompt", "answer", "skill")} == {
            key: before[key] for key in ("prompt", "answer", "skill")
        }


def test_random_tokens_without_a_tokenizer_are_words_of_the_data():
    rows = [{"prompt": "p", "completion": "one two  three"}, {"prompt": "q", "completion": "four\nfive six"}]
    noisy = inject_noise(rows, kind="random_tokens", rate=0.5, seed=0)
    assert sum(len(row["noise_spans"]) for row in noisy) == 3
    words = {"one", "two", "three", "four", "five", "six"}
    for before, after in zip(rows, noisy, strict=True):
        old_words, new_words = before["completion"].split(), after["completion"].split()
        assert set(new_words) <= words
        changed = [new for old, new in zip(old_words, new_words, strict=True) if old != new]
        assert changed == [after["completion"][start:end] for start, end, _ in after["noise_spans"]]


def test_wrong_answers_come_from_the_same_skill_and_fail_the_checker():
    clean = _demonstrations(90)
    answers = {skill: {row["answer"] for row in clean if row["skill"] == skill} for skill in tasks.DEMONSTRATED_SKILLS}
    noisy = inject_noise(clean, kind="wrong_answer", rate=0.3, seed=2)
    touched = [index for index, row in enumerate(noisy) if row["noise_spans"]]
    assert len(touched) == 27
    for index, (before, after) in enumerate(zip(clean, noisy, strict=True)):
        assert after["answer"] == before["answer"]
        assert tasks.check(after, after["completion"]) == (index not in touched)
        if index in touched:
            stated = tasks.extract_answer(after["completion"])
            assert stated in answers[before["skill"]]
            start = after["completion"].index("[") + 1
            assert after["noise_spans"] == [[start, start + len(stated), "wrong_answer"]]
            assert "".join(_pieces_outside_marks(after)) == before["completion"].replace(f"[{before['answer']}]", "[]")


def test_wrong_answer_by_hand():
    rows = [{"completion": "It is 2.", "answer": "2"}, {"completion": "It is 5.", "answer": "5"}]
    noisy = inject_noise(rows, kind="wrong_answer", rate=1, seed=0)
    assert [row["completion"] for row in noisy] == ["It is 5.", "It is 2."]
    assert [row["noise_spans"] for row in noisy] == [[[6, 7, "wrong_answer"]]] * 2


def test_rows_without_an_answer_get_another_rows_response():
    rows = [{"prompt": "p", "completion": "red"}, {"prompt": "q", "completion": "green"}]
    noisy = inject_noise(rows, kind="wrong_answer", rate=1, seed=0)
    assert [row["completion"] for row in noisy] == ["green", "red"]
    assert [row["noise_spans"] for row in noisy] == [[[0, 5, "wrong_answer"]], [[0, 3, "wrong_answer"]]]


def test_boilerplate_goes_in_front():
    clean = _demonstrations(40)
    noisy = inject_noise(clean, kind="boilerplate", rate=0.25, seed=0)
    assert sum(bool(row["noise_spans"]) for row in noisy) == 10
    for before, after in zip(clean, noisy, strict=True):
        for start, end, kind in after["noise_spans"]:
            assert (start, kind) == (0, "boilerplate")
            assert after["completion"][:end] in {f"{preamble}\n" for preamble in PREAMBLES}
        assert after["completion"].endswith(before["completion"])
        assert "".join(_pieces_outside_marks(after)) == before["completion"]


def test_contradictory_duplicates_follow_their_originals():
    clean = _demonstrations(50)
    noisy = inject_noise(clean, kind="contradictory_duplicate", rate=0.2, seed=0)
    assert len(noisy) == 60
    duplicates = [index for index, row in enumerate(noisy) if row["noise_spans"]]
    assert len(duplicates) == 10
    for index in duplicates:
        original, duplicate = noisy[index - 1], noisy[index]
        assert original["prompt"] == duplicate["prompt"]
        assert tasks.check(original, original["completion"])
        assert not tasks.check(original, duplicate["completion"])
    kept = [{k: v for k, v in row.items() if k != "noise_spans"} for row in noisy if not row["noise_spans"]]
    assert kept == clean


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_messages_are_edited_in_the_last_assistant_turn_only(kind, tokenizer):
    rows = _demonstrations(30)
    for row in rows:
        del row["answer"], row["skill"]
    as_text = inject_noise(rows, kind=kind, rate=0.4, seed=4, tokenizer=tokenizer)
    as_messages = inject_noise(list(map(_as_messages, rows)), kind=kind, rate=0.4, seed=4, tokenizer=tokenizer)
    assert any(row["noise_spans"] for row in as_messages)
    for text_row, row in zip(as_text, as_messages, strict=True):
        assert row["noise_spans"] == text_row["noise_spans"]
        assert row["messages"] == _as_messages(text_row)["messages"]


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_pure_and_deterministic(kind, tokenizer):
    clean = [_as_messages(row) for row in _demonstrations(30)]
    kept = copy.deepcopy(clean)
    first = inject_noise(clean, kind=kind, rate=0.5, seed=7, tokenizer=tokenizer)
    first[0]["messages"][0]["content"] = "changed by the caller"
    assert clean == kept
    again = inject_noise(clean, kind=kind, rate=0.5, seed=7, tokenizer=tokenizer)
    other = inject_noise(clean, kind=kind, rate=0.5, seed=8, tokenizer=tokenizer)
    assert first[1:] == again[1:]
    assert again != other
    assert not any(row["noise_spans"] for row in inject_noise(clean, kind=kind, rate=0, seed=7, tokenizer=tokenizer))


def test_rows_that_cannot_take_the_noise_are_counted(caplog):
    rows = [
        {"completion": "It is 2.", "answer": "2", "skill": "a"},
        {"completion": "It is 3.", "answer": "3", "skill": "a"},
        {"completion": "no number here", "answer": "4", "skill": "a"},
        {"completion": "It is 5.", "answer": "5", "skill": "alone"},
    ]
    with caplog.at_level(logging.WARNING, logger="qtarget.data.noise"):
        noisy = inject_noise(rows, kind="wrong_answer", rate=1, seed=0)
    assert [bool(row["noise_spans"]) for row in noisy] == [True, True, False, False]
    assert "2 of 4 rows cannot take it" in caplog.text
    assert "4 rows asked for, 2 changed" in caplog.text


def test_words_without_an_alternative_are_counted(caplog):
    with caplog.at_level(logging.WARNING, logger="qtarget.data.noise"):
        noisy = inject_noise([{"completion": "yes yes"}], kind="random_tokens", rate=1, seed=0)
    assert noisy == [{"completion": "yes yes", "noise_spans": []}]
    assert "2 tokens stay as they were" in caplog.text


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_empty_responses_stay_and_the_rate_is_that_of_the_others(kind, caplog):
    spoken = [{"prompt": "p", "completion": f"say {i} now"} for i in range(10)]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    silent = [{"prompt": "p", "completion": ""}, {"messages": [{"role": "user", "content": "x"}, call]}]
    noisy = inject_noise([*silent, *spoken], kind=kind, rate=0.5, seed=3)
    assert noisy[:2] == [{**row, "noise_spans": []} for row in silent]
    assert noisy[2:] == inject_noise(spoken, kind=kind, rate=0.5, seed=3)
    assert "2 rows with an empty response stay unchanged; the rate is that of the other 10" in caplog.text


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_where_no_response_is_left_nothing_is_noised(kind):
    with pytest.raises(
        DataError, match=r"all responses are empty, or a call alone, from row 1 to row 3; .* give at least"
    ):
        inject_noise([{"prompt": "p", "completion": ""}] * 3, kind=kind, rate=0.5, seed=3)
    assert inject_noise([], kind=kind, rate=0, seed=3) == []


def test_errors_name_the_problem():
    rows = [{"completion": "a b"}]
    with pytest.raises(ConfigError, match=r"unknown noise kind 'typo'.*random_tokens, wrong_answer"):
        inject_noise(rows, kind="typo", rate=0.1, seed=0)
    for rate in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            inject_noise(rows, kind="boilerplate", rate=rate, seed=0)
    for bad in ({"prompt": "x"}, {"completion": None}, {"messages": [{"role": "user", "content": "x"}]}):
        with pytest.raises(DataError, match=r"row 2: .*no response"):
            inject_noise([*rows, bad], kind="boilerplate", rate=0.1, seed=0)
    noisy = inject_noise(rows, kind="boilerplate", rate=1, seed=0)
    with pytest.raises(DataError, match="row 1 is marked as noisy already"):
        inject_noise(noisy, kind="random_tokens", rate=1, seed=0)


def test_token_mask_by_hand():
    offsets = [(0, 3), (3, 5), (5, 5), (5, 9), (9, 10)]
    assert noise_token_mask(offsets, []) == [False] * 5
    assert noise_token_mask(offsets, [[3, 5, "x"]]) == [False, True, False, False, False]
    assert noise_token_mask(offsets, [[4, 6, "x"], [9, 10, "y"]]) == [False, True, False, True, True]


def test_token_mask_equals_brute_force_over_characters():
    rng = Random(0)
    for _ in range(200):
        cuts = sorted(rng.sample(range(21), 6))
        offsets = list(itertools.pairwise(cuts))
        spans = [[start, start + rng.randint(1, 4), "x"] for start in rng.sample(range(20), 3)]
        marked = {character for start, end, _ in spans for character in range(start, end)}
        expected = [bool(marked & set(range(start, end))) for start, end in offsets]
        assert noise_token_mask(offsets, spans) == expected


def test_other_response_is_whole_and_truncation_ends_at_a_word():
    rows = [
        {"prompt": f"{i}?", "completion": f"the answer is {i} .", "answer": str(i), "skill": str(i)} for i in range(20)
    ]
    moved = inject_noise(rows, kind="other_response", rate=0.5, seed=0)
    texts = {row["completion"] for row in rows}
    touched = [(old, new) for old, new in zip(rows, moved, strict=True) if new["noise_spans"]]
    assert len(touched) == 10
    for old, new in touched:
        assert new["completion"] in texts - {old["completion"]}
        assert new["noise_spans"] == [[0, len(new["completion"]), "other_response"]]
    cut = inject_noise(rows, kind="truncation", rate=0.5, seed=0)
    touched = [(old, new) for old, new in zip(rows, cut, strict=True) if new["noise_spans"]]
    assert len(touched) == 10
    for old, new in touched:
        assert old["completion"].startswith(new["completion"] + " ")
        ((start, end, kind),) = new["noise_spans"]
        assert (new["completion"][start:end], kind) == (new["completion"].split()[-1], "truncation")


def test_one_response_has_no_other_and_one_word_cannot_be_cut(caplog):
    with pytest.raises(DataError, match="two different responses"):
        inject_noise([{"prompt": "a", "completion": "x"}] * 3, kind="other_response", rate=1.0, seed=0)
    cut = inject_noise([{"prompt": "a", "completion": "x"}] * 3, kind="truncation", rate=1.0, seed=0)
    assert [row["completion"] for row in cut] == ["x"] * 3
    assert "cannot be cut" in caplog.text
