"""Rows as other projects write them; what is right stands here by hand."""

from __future__ import annotations

import json

import pytest

from qtarget.core.errors import ConfigError, DataError
from qtarget.data.formats.shape import ReadOptions
from qtarget.data.loading import read_files


def read(tmp_path, *rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return read_files(path, ReadOptions(**options))


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def called(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


RAIN = {
    "name": "rain",
    "description": "rain",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
RAIN_TOOL = {"type": "function", "function": RAIN}
TALK = [user("Hello"), assistant("Hi")]

# name: (rows as they were written, rows as they are trained, words of the announcement)
SHAPES = {
    "alpaca": (
        [{"instruction": "Translate to French", "input": "cat", "output": "chat"}, {"instruction": "Say hi", "output": "hi"}],
        [
            {"prompt": [user("Translate to French\ncat")], "completion": [assistant("chat")]},
            {"prompt": [user("Say hi")], "completion": [assistant("hi")]},
        ],
        ["read 2 rows as alpaca: instruction and input -> prompt", "output -> completion"],
    ),
    "alpaca with its rendered text": (
        [{"instruction": "Say hi", "input": "", "output": "hi", "text": "Below is an instruction ... hi"}],
        [{"prompt": [user("Say hi")], "completion": [assistant("hi")]}],
        ["`text` is not what rows of `instruction` and `output` train"],
    ),
    "alpaca with system and history": (
        [
            {"instruction": "And two?", "input": "", "output": "2", "system": "Count", "history": [["One?", "1"]]},
            {"instruction": "Three?", "input": "", "output": "3", "system": "", "history": []},
        ],
        [
            {
                "prompt": [{"role": "system", "content": "Count"}, user("One?"), assistant("1"), user("And two?")],
                "completion": [assistant("2")],
            },
            {"prompt": [user("Three?")], "completion": [assistant("3")]},
        ],
        ["1 row: `history` -> earlier turns", "1 row: column `system`"],
    ),
    "sharegpt": (
        [{"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}], "id": "x1"}],
        [{"id": "x1", "messages": TALK}],
        ["sharegpt", "role human -> user", "role gpt -> assistant"],
    ),
    "sharegpt of LLaMA-Factory": (
        [
            {
                "conversations": [
                    {"from": "human", "value": "Rain?"},
                    {"from": "function_call", "value": '{"name": "rain", "arguments": {"city": "Oslo"}}'},
                    {"from": "observation", "value": '{"mm": 3}'},
                    {"from": "gpt", "value": "Yes"},
                ],
                "system": "Be short",
                "tools": json.dumps([RAIN]),
            }
        ],
        [
            {
                "tools": [RAIN_TOOL],
                "messages": [
                    {"role": "system", "content": "Be short"},
                    user("Rain?"),
                    assistant("", tool_calls=[called("rain", city="Oslo")]),
                    {"role": "tool", "content": '{"mm": 3}'},
                    assistant("Yes"),
                ],
            }
        ],
        ["role function_call -> assistant with `tool_calls`", "role observation -> tool", "column `system`"],
    ),
    "sharegpt with parallel calls": (
        [
            {
                "conversations": [
                    {"from": "human", "value": "Rain?"},
                    {"from": "function_call", "value": '[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": 1}}]'},
                ],
                "tools": "",
            }
        ],
        [{"messages": [user("Rain?"), assistant("", tool_calls=[called("a"), called("b", x=1)])]}],
        [],
    ),
    "sharegpt keys in messages": (
        [{"messages": [{"from": "user", "value": "Hello"}, {"from": "assistant", "value": "Hi"}]}],
        [{"messages": TALK}],
        [],
    ),
    "content parts": (
        [{"messages": [user([{"type": "text", "text": "Name "}, {"type": "text", "text": "a fruit"}]), assistant("Plum")]}],
        [{"messages": [user("Name a fruit"), assistant("Plum")]}],
        ["1 row: content parts -> their text"],
    ),
    "human roles": (
        [{"messages": [{"role": "human", "content": "Hello"}, {"role": "gpt", "content": "Hi"}]}],
        [{"messages": TALK}],
        ["role human -> user"],
    ),
    "roles in capitals": (
        [{"messages": [{"role": "User", "content": "Hello"}, {"role": "MODEL", "content": "Hi"}]}],
        [{"messages": TALK}],
        ["role User -> user", "role MODEL -> assistant"],
    ),
    "developer": (
        [{"messages": [{"role": "developer", "content": "Be short"}, *TALK]}],
        [{"messages": [{"role": "system", "content": "Be short"}, *TALK]}],
        ["role developer -> system"],
    ),
    "developer beside system": (
        [{"messages": [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, *TALK]}],
        [{"messages": [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, *TALK]}],
        [],
    ),
    "names stay": (
        [{"messages": [{"role": "user", "name": "Ada", "content": "Hello"}, assistant("Hi", weight=0)]}],
        [{"messages": [{"role": "user", "name": "Ada", "content": "Hello"}, assistant("Hi", weight=0)]}],
        [],
    ),
    "openai log with function_call": (
        [
            {
                "messages": [
                    user("Rain?"),
                    assistant(None, function_call={"name": "rain", "arguments": '{"city": "Oslo"}'}),
                    {"role": "function", "name": "rain", "content": "3 mm"},
                    assistant("Yes", refusal=None, annotations=[]),
                ],
                "functions": [RAIN],
            }
        ],
        [
            {
                "messages": [
                    user("Rain?"),
                    assistant(None, tool_calls=[called("rain", city="Oslo")]),
                    {"role": "tool", "name": "rain", "content": "3 mm"},
                    assistant("Yes", annotations=[]),
                ],
                "tools": [RAIN_TOOL],
            }
        ],
        ["`function_call` -> `tool_calls`", "role function -> tool", "arguments as JSON text", "`functions` -> `tools`"],
    ),
    "openai log with parallel calls": (
        [
            {
                "messages": [
                    user("Rain?"),
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"id": "c1", "type": "function", "function": {"name": "a", "arguments": '{"x": [1, {"y": null}]}'}},
                            {"id": "c2", "type": "function", "function": {"name": "b", "arguments": ""}},
                        ],
                    },
                    {"role": "tool", "tool_call_id": "c1", "content": {"mm": 3, "ü": None}},
                    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "none"}]},
                    assistant("Yes", tool_calls=None),
                ],
                "tools": [RAIN_TOOL],
            }
        ],
        [
            {
                "messages": [
                    user("Rain?"),
                    assistant(
                        None,
                        tool_calls=[
                            {"id": "c1", **called("a", x=[1, {"y": None}])},
                            {"id": "c2", **called("b")},
                        ],
                    ),
                    {"role": "tool", "tool_call_id": "c1", "content": '{"mm": 3, "ü": null}'},
                    {"role": "tool", "tool_call_id": "c2", "content": "none"},
                    assistant("Yes"),
                ],
                "tools": [RAIN_TOOL],
            }
        ],
        ["tool output that is an object -> JSON text", "calls without arguments -> {}"],
    ),
    "calls without function around them": (
        [{"messages": [user("Rain?"), assistant("", tool_calls=[{"name": "rain", "arguments": {"city": "Oslo"}}])]}],
        [{"messages": [user("Rain?"), assistant("", tool_calls=[called("rain", city="Oslo")])]}],
        ["OpenAI's form"],
    ),
    "anthropic": (
        [
            {
                "system": [{"type": "text", "text": "Be short", "cache_control": {"type": "ephemeral"}}],
                "messages": [
                    user("Rain?"),
                    assistant(
                        [
                            {"type": "thinking", "thinking": "I look", "signature": "abc"},
                            {"type": "text", "text": "Let me see."},
                            {"type": "tool_use", "id": "t1", "name": "rain", "input": {"city": "Oslo"}},
                            {"type": "tool_use", "id": "t2", "name": "rain", "input": {"city": "Rome"}},
                        ]
                    ),
                    user(
                        [
                            {"type": "tool_result", "tool_use_id": "t1", "content": "3 mm"},
                            {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "0 mm"}]},
                            {"type": "text", "text": "So?"},
                        ]
                    ),
                    assistant([{"type": "text", "text": "Yes"}]),
                ],
                "tools": [{"name": "rain", "description": "rain", "input_schema": RAIN["parameters"]}],
            },
            {"system": "Be long", "messages": TALK},
        ],
        [
            {
                "messages": [
                    {"role": "system", "content": "Be short"},
                    user("Rain?"),
                    assistant(
                        "Let me see.",
                        reasoning_content="I look",
                        tool_calls=[{"id": "t1", **called("rain", city="Oslo")}, {"id": "t2", **called("rain", city="Rome")}],
                    ),
                    {"role": "tool", "tool_call_id": "t1", "name": "rain", "content": "3 mm"},
                    {"role": "tool", "tool_call_id": "t2", "name": "rain", "content": "0 mm"},
                    user("So?"),
                    assistant("Yes"),
                ],
                "tools": [RAIN_TOOL],
            },
            {"messages": [{"role": "system", "content": "Be long"}, *TALK]},
        ],
        ["read 2 rows as anthropic", "`tool_use` blocks -> `tool_calls`", "`tool_result` blocks"],
    ),
    "tools that are none": (
        [
            {"messages": TALK, "tools": ""},
            {"messages": TALK, "tools": "[]"},
            {"messages": TALK, "tools": []},
            {"messages": TALK, "tools": None},
            {"messages": TALK, "tools": json.dumps([RAIN_TOOL])},
        ],
        [*[{"messages": TALK}] * 4, {"messages": TALK, "tools": [RAIN_TOOL]}],
        [],
    ),
    "two shapes in one row": (
        [{"messages": TALK, "prompt": "2+2= ", "completion": "4", "text": "note"}],
        [{"prompt": "2+2= ", "completion": "4"}],
        ["`messages` and `text` are not what rows of `prompt` and `completion` train: left out of training"],
    ),
    "a prompt beside messages": (
        [{"prompt": "Hello", "messages": TALK, "prompt_id": "p"}],
        [{"messages": TALK, "prompt_id": "p"}],
        ["`prompt` is not what rows of `messages` train"],
    ),
    "a text note": (
        [{"prompt": "Norway? ", "completion": "Oslo", "text": "geo"}], [{"prompt": "Norway? ", "completion": "Oslo"}], [],
    ),
    "messages as JSON text": ([{"messages": json.dumps(TALK)}], [{"messages": TALK}], ["as JSON text -> a list of messages"]),
    "template arguments as JSON text": (
        [{"messages": TALK, "chat_template_kwargs": '{"think": false}'}, {"messages": TALK, "chat_template_kwargs": None}],
        [{"messages": TALK, "chat_template_kwargs": {"think": False}}, {"messages": TALK}],
        [],
    ),
    "images that are none": ([{"messages": TALK, "images": []}], [{"messages": TALK}], []),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_rows_are_read_as_they_were_meant(tmp_path, name):
    given, expected, words = SHAPES[name]
    reading = read(tmp_path, *given)
    assert reading.rows == expected
    for word in words:
        assert word in "\n".join(reading.announced)


def test_what_is_converted_is_read_again_as_it_is(tmp_path):
    for given, expected, _ in SHAPES.values():
        again = read(tmp_path, *read(tmp_path, *given).rows)
        assert again.rows == expected
        assert not again.changed


REFUSED = {
    "null content": ([{"messages": [user("a"), assistant(None)]}], ["line 1", "[1] (assistant)", "null", "null_content: drop"]),
    "missing content": ([{"messages": [user("a"), {"role": "assistant"}]}], ["messages[1]", "the key is missing"]),
    "null and no calls": ([{"messages": [user("a"), assistant(None, tool_calls=[])]}], ["messages[1]", "calls no tool"]),
    "unknown role": ([{"messages": [{"role": "narrator", "content": "a"}]}], ["line 1", "'narrator'", "roles: {narrator: user}"]),
    "an image": (
        [{"messages": TALK}, {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}]), assistant("a")]}],
        ["line 2", "messages[0]", "'image_url'"],
    ),
    "audio": ([{"messages": [user([{"type": "input_audio", "input_audio": {}}])]}], ["'input_audio'"]),
    "an image of Anthropic's": (
        [{"messages": [user([{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "source": {}}]}])]}],
        ["'image'", "tool_result"],
    ),
    "a number": ([{"messages": [user(5)]}], ["content is an integer 5", "expected text"]),
    "an object": ([{"messages": [user({"text": "a"})]}], ["content is an object", "expected text"]),
    "arguments that are no JSON": (
        [{"messages": [assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{city: Oslo"}}])]}],
        ["tool_calls[0]", "not JSON"],
    ),
    "arguments that are a list": (
        [{"messages": [assistant("", tool_calls=[{"function": {"name": "f", "arguments": [1]}}])]}],
        ["expected an object"],
    ),
    "a call without a name": ([{"messages": [assistant("", tool_calls=[{"function": {"arguments": {}}}])]}], ["no function name"]),
    "a function_call turn that is prose": (
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "rain(Oslo)"}]}],
        ["conversations[1]", "not JSON"],
    ),
    "tools that are no JSON": ([{"messages": TALK, "tools": "rain"}], ["'tools'", "not JSON"]),
    "tools that are an object": ([{"messages": TALK, "tools": {"name": "rain"}}], ["'tools' is an object"]),
    "labels of a classifier": ([{"prompt": "good", "completion": "yes", "labels": 1}], ["'labels'", "rename it"]),
    "two system prompts": (
        [{"system": "A", "messages": [{"role": "system", "content": "B"}, *TALK]}],
        ["another system prompt"],
    ),
    "openai and anthropic": (
        [
            {"messages": [user("a"), assistant("", tool_calls=[called("f")])]},
            {"messages": [assistant([{"type": "tool_use", "id": "t", "name": "f", "input": {}}])]},
        ],
        ["line 2", "anthropic", "line 1", "split it"],
    ),
    "alpaca and sharegpt": (
        [{"instruction": "a", "output": "b"}, {"conversations": [{"from": "human", "value": "a"}]}],
        ["line 2", "`conversations`", "line 1", "`instruction` and `output`"],
    ),
    "text and messages": (
        [{"prompt": "a", "completion": "b"}, {"prompt": [user("a")], "completion": [assistant("b")]}],
        ["line 2", "a list of messages", "line 1"],
    ),
    "alpaca with a number": ([{"instruction": "a", "input": 3, "output": "b"}], ["'input' is an integer"]),
    "single messages": ([user("a"), assistant("b")], ["single messages", '{"messages": [...]}']),
    "messages that are prose": ([{"messages": "Hello"}], ["'messages' is a string"]),
    "messages that are cut JSON": ([{"messages": '[{"role"'}], ["'messages'", "not JSON"]),
    "two names for a role": (
        [{"conversations": [{"from": "human", "role": "assistant", "value": "a"}]}],
        ["conversations[0] has both 'role' and 'from'"],
    ),
    "template arguments that are a list": ([{"messages": TALK, "chat_template_kwargs": [1]}], ["'chat_template_kwargs' is a list"]),
    "an id beyond 64 bits": ([{"input_ids": [1, 2**70]}], ["line 1", "'input_ids'", "64 bits"]),
    "a preference": ([{"prompt": "a", "chosen": "b", "rejected": "c"}], ["line 1", "rename 'chosen' to 'completion'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_row_and_cause(tmp_path, name):
    rows, words = REFUSED[name]
    with pytest.raises(DataError) as raised:
        read(tmp_path, *rows)
    for word in [str(tmp_path / "rows.jsonl"), *words]:
        assert word in str(raised.value)


def test_rows_without_content_are_left_out_by_count_where_that_is_asked_for(tmp_path):
    reading = read(tmp_path, {"messages": TALK}, {"messages": [user("a"), assistant(None)]}, null_content="drop")
    assert reading.rows == [{"messages": TALK}]
    assert "1 row left out" in reading.announced[-1]
    assert "line 2" in reading.announced[-1]
    with pytest.raises(DataError, match="no rows that can be trained"):
        read(tmp_path, {"messages": [user("a"), assistant(None)]}, null_content="drop")


def test_roles_of_the_users_own(tmp_path):
    row = {"messages": [{"role": "narrator", "content": "It rains"}, {"role": "bard", "content": "Hi"}]}
    reading = read(tmp_path, row, roles={"narrator": "narrator", "bard": "assistant"})
    assert [m["role"] for m in reading.rows[0]["messages"]] == ["narrator", "assistant"]


def test_a_format_by_name(tmp_path):
    row = {"instruction": "a", "output": "b", "messages": TALK}
    assert read(tmp_path, row).rows == [{"messages": TALK, "instruction": "a", "output": "b"}]
    assert read(tmp_path, row, format="alpaca").rows == [{"prompt": [user("a")], "completion": [assistant("b")]}]
    with pytest.raises(DataError, match="not a row of format sharegpt"):
        read(tmp_path, row, format="sharegpt")
    with pytest.raises(ConfigError, match="did you mean 'alpaca'"):
        read(tmp_path, row, format="alpacca")


def part(name, status="completed", **more):
    return {
        "type": "tool",
        "tool_id": f"id-{name}",
        "tool_name": name,
        "tool_input": {"q": name},
        "tool_status": status,
        **more,
    }


SESSION = [
    {"id": "1", "role": "user", "parts": [{"type": "text", "text": "Rain?"}], "created_at": "t", "message_kind": "user_query"},
    {
        "id": "2",
        "role": "assistant",
        "created_at": "t",
        "message_kind": "assistant_step",
        "parts": [
            {"type": "context", "uri": "viking://x", "context_type": "memory", "abstract": "SECRET"},
            {"type": "text", "text": "I look."},
            part("good", tool_output="3 mm", tool_output_truncated=True),
            {"type": "text", "text": "Again."},
            part("bad", "error", tool_output="Timeout"),
            part("late", "running"),
        ],
    },
    {"id": "3", "role": "user", "message_kind": "tool_transport", "created_at": "t",
     "parts": [{"type": "text", "text": "TRANSPORT"}]},
    {"id": "4", "role": "assistant", "message_kind": "checkpoint", "created_at": "t",
     "parts": [{"type": "text", "text": "SUMMARY"}]},
    {"id": "5", "role": "assistant", "content": "Yes", "created_at": "t"},
]  # fmt: skip


def test_a_session_is_one_row_with_calls_and_results_split(tmp_path):
    reading = read(tmp_path, *SESSION, tools=[RAIN_TOOL])
    (row,) = reading.rows
    assert row == {
        "messages": [
            user("Rain?"),
            assistant("I look.", tool_calls=[{"id": "id-good", **called("good", q="good")}]),
            {"role": "tool", "tool_call_id": "id-good", "name": "good", "content": "3 mm", "weight": 0},
            assistant(
                "Again.",
                tool_calls=[{"id": "id-bad", **called("bad", q="bad")}, {"id": "id-late", **called("late", q="late")}],
                weight=0,
            ),
            {"role": "tool", "tool_call_id": "id-bad", "name": "bad", "content": "Timeout", "weight": 0},
            assistant("Yes"),
        ],
        "tools": [RAIN_TOOL],
    }
    said = "\n".join(reading.announced)
    for word in ("read 5 messages as openviking", "tool_transport", "checkpoint", "previews", "weight 0", "not whole"):
        assert word in said
    assert "--tools" not in said
    assert "--tools tools.json" in "\n".join(read(tmp_path, *SESSION).announced)
    assert not any(word in json.dumps(row) for word in ("SECRET", "TRANSPORT", "SUMMARY"))


def test_an_image_in_a_session_is_refused_by_its_line(tmp_path):
    with pytest.raises(DataError, match=r"line 2: a part of type 'image_url'"):
        read(tmp_path, SESSION[0], {"role": "user", "parts": [{"type": "image_url", "url": "x"}], "created_at": "t"})
