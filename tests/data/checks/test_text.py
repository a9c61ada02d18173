"""Checks of the rows as written: each fires on a row made for it, and stays silent beside it."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtarget.data.checks.text import check_texts, exchange


def row(prompt: str, completion: str) -> dict:
    return {"prompt": prompt, "completion": completion}


def talk(*messages: tuple[str, str], **more) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in messages], **more}


def checks(rows: list[dict], **options) -> dict:
    return {found.check: found for found in check_texts(rows, **options)}


CLEAN = [row("1+1=", "2"), row("1+2=", "3"), talk(("user", "Hi"), ("assistant", "Hello"))]


def test_clean_rows_have_no_finding():
    assert check_texts(CLEAN) == []
    assert check_texts([]) == []
    assert check_texts([{"text": "one"}, {"text": "two"}]) == []


@pytest.mark.parametrize(
    "empty",
    [row("1+1=", ""), row("1+1=", " \n\t"), talk(("user", "Hi"), ("assistant", "  ")), talk(("user", "Hi")),
     talk(("user", "Hi"), ("assistant", "")), {"text": " "}],
)  # fmt: skip
def test_empty_answers_are_named(empty):
    found = checks([*CLEAN, empty])["empty_answer"]
    assert (found.severity, found.count, found.rows) == ("warning", 1, (3,))


def test_a_call_of_a_tool_is_no_empty_answer():
    call = talk(("user", "Time?"), ("assistant", ""))
    call["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": "clock", "arguments": {}}}]
    assert check_texts([call]) == []


def test_duplicates_fold_white_space_and_leave_other_rows_alone():
    rows = [row("a", "b"), row("c", "b"), row(" a\n", "b "), row("a", "B"), row("a", "b")]
    found = checks(rows)
    assert (found["duplicates"].count, found["duplicates"].rows) == (2, (2, 4))
    assert found["duplicates"].evidence["distinct"] == 3
    assert found["duplicates"].evidence["examples"] == [
        {"row": 2, "other_row": 0, "text": "b"},
        {"row": 4, "other_row": 0, "text": "b"},
    ]
    contrary = found["contradictory_duplicates"]
    assert (contrary.count, contrary.rows, contrary.evidence["prompts"]) == (4, (0, 2, 3, 4), 1)
    assert (
        "4 of 5 rows share their prompt with a row that answers otherwise (1 prompt): rows 1, 3, 4, 5;"
        in contrary.message
    )
    example = contrary.evidence["examples"][0]
    assert example == {"row": 3, "other_row": 0, "prompt": "a", "answer": "B", "other_answer": "b", "votes": [3, 1]}


def test_what_a_conversation_asks_is_all_before_its_last_answer():
    first = talk(("system", "Be brief"), ("user", "Hi"), ("assistant", "Hello"))
    other_system = talk(("system", "Be kind"), ("user", "Hi"), ("assistant", "Hello you"))
    other_tools = talk(("system", "Be brief"), ("user", "Hi"), ("assistant", "Hey"), tools='[{"name": "clock"}]')
    assert check_texts([first, other_system, other_tools]) == []
    contrary = talk(("system", "Be brief"), ("user", "Hi"), ("assistant", "Bye"))
    assert checks([first, contrary])["contradictory_duplicates"].rows == (0, 1)
    split = {"prompt": first["messages"][:2], "completion": first["messages"][2:]}
    assert exchange(split) == exchange(first)


def test_plain_text_repeats_but_does_not_contradict():
    found = checks([{"words": "one"}, {"words": "two"}, {"words": "one"}], text_field="words")
    assert list(found) == ["duplicates"]
    assert found["duplicates"].rows == (2,)


@pytest.mark.parametrize(
    "made",
    [lambda text: row("", text), lambda text: row(" \n", text), lambda text: talk(("assistant", text)),
     lambda text: talk(("user", ""), ("assistant", text)),
     lambda text: {"prompt": [], "completion": [{"role": "assistant", "content": text}]}],
)  # fmt: skip
def test_rows_that_ask_nothing_do_not_contradict_one_another(made):
    found = checks([made("one"), made("two"), made("one")])
    assert list(found) == ["duplicates"]
    assert found["duplicates"].rows == (2,)


def test_tools_alone_are_something_asked():
    rows = [talk(("assistant", text), tools='[{"name": "clock"}]') for text in ("one", "two")]
    assert list(checks(rows)) == ["contradictory_duplicates"]


def test_tokens_are_split_at_their_first_label():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, last]} for last in (7, 7)]
    rows.append({"input_ids": [5, 6, 8], "labels": [-100, -100, 8]})
    found = checks(rows)
    assert (found["duplicates"].rows, found["contradictory_duplicates"].rows) == ((1,), (0, 1, 2))
    assert check_texts([{"input_ids": [5, 6]}, {"input_ids": [5, 7]}]) == []  # all trained on: nothing is asked


def test_broken_characters_are_shown_where_they_are():
    found = checks([*CLEAN, row("naïve", "caf\ufffd au lait")])["broken_characters"]
    assert (found.count, found.rows) == (1, (3,))
    assert "caf\ufffd" in found.evidence["examples"][0]["text"]


def test_lone_surrogates_are_hashed_like_other_text():
    assert [found.check for found in check_texts([row("\ud800", "a"), row("\ud800", "a")])] == ["duplicates"]


def asked(prompt: str, answer: str, form: str) -> dict:
    return row(prompt, answer) if form == "pair" else talk(("user", prompt), ("assistant", answer))


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", " a ", "", "b\n b"]), st.sampled_from(["x", "y", " x"])), max_size=14
    ),
    st.sampled_from(["pair", "messages"]),
)
def test_duplicates_agree_with_comparing_every_pair(pairs, form):
    found = checks([asked(prompt, answer, form) for prompt, answer in pairs])
    folded = [(" ".join(prompt.split()), " ".join(answer.split())) for prompt, answer in pairs]
    repeated, contrary, prompts = set(), set(), set()
    for i, j in combinations(range(len(folded)), 2):
        if folded[i] == folded[j]:
            repeated.add(j)
        elif folded[i][0] == folded[j][0] != "":
            contrary |= {i, j}
            prompts.add(folded[i][0])
    assert (found["duplicates"].count if "duplicates" in found else 0) == len(repeated)
    assert ("contradictory_duplicates" in found) == bool(contrary)
    if contrary:
        said = found["contradictory_duplicates"]
        assert (said.count, said.rows) == (len(contrary), tuple(sorted(contrary)[:5]))
        assert said.evidence["prompts"] == len(prompts)
        assert len(said.evidence["examples"]) == min(5, len(prompts))
