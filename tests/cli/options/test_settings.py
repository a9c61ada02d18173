"""YAML, overrides and types, against what a reader of the annotation would say."""

from __future__ import annotations

import enum
from typing import Any, Literal

import pytest

from qtarget.cli.options.settings import Setting, coerce, parse_overrides, parse_yaml, read_settings
from qtarget.core.errors import ConfigError


class Colour(enum.StrEnum):
    RED = "red"
    NO = "no"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), (".5", 0.5), ("5.", 5.0), ("-1", -1), ("007", 7),
        ("1_000", "1_000"),
        ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("0x1f", "0x1f"), ("1.2.3", "1.2.3"),
        ("no", "no"),
        ("on", "on"), ("y", "y"), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("'1'", "1"),
        ("[q_proj, 1e-2]", ["q_proj", 0.01]), ('{"a": {"b": 1}}', {"a": {"b": 1}}), ("-.inf", float("-inf")),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


def test_overrides_in_all_their_forms():
    arguments = ["--a", "1e-4", "--b=x=y", "--packing", "--max-steps", "-1", "--d", "{k: [1, 2]}", "--e="]
    values = {key: setting.value for key, setting in parse_overrides(arguments).items()}
    assert values == {"a": 1e-4, "b": "x=y", "packing": True, "max_steps": -1, "d": {"k": [1, 2]}, "e": None}
    with pytest.raises(ConfigError, match="'1' belongs to no key"):
        parse_overrides(["1"])
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_overrides(["--a", "{b: "])


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3), (3, float, 3.0), (0.5, float, 0.5), (True, bool, True), ("yes", bool, True), ("off", bool, False),
        ("x", str, "x"),
        (None, int | None, None), (4, int | None, 4), ("no", Colour | str, "no"),
        (["a"], None | str | list[str], ["a"]),
        ({"a": 1}, dict | str | None, {"a": 1}),
        ('{"a": 1}', dict[str, Any] | str | None, {"a": 1}),
        ("z.json", dict | str | None, "z.json"),
        ("a", Literal["a", "b"], "a"), (False, str | Literal[False] | None, False), ([1, 2], list[int], [1, 2]),
    ],
)  # fmt: skip
def test_values_that_fit(value, hint, expected):
    found = coerce("key", Setting(value, "c.yaml"), hint)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        ("many", int, "an integer"), (1.5, int, "an integer"), (True, int, "an integer"),
        ("1e-4x", float, "a number"),
        (True, float, "a number"), (1, bool, "true or false"),
        ("maybe", bool, "true or false"), (None, int, "an integer"),
        (1.10, str, "text (put the value in quotes)"),
        ([1], str, "text"), ({"a": 1}, list[str], "a list (text)"),
        (["a", 1], list[str], "a list"),
        ("blue", Colour | str, "one of red, no"),
        ("{a:", dict | str | None, "a mapping"), ("c", Literal["a", "b"], "one of a, b"),
        (1, int | None, None),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_name_key_value_and_type(value, hint, words):
    if words is None:
        assert coerce("key", Setting(value, "c.yaml"), hint) == value
        return
    with pytest.raises(ConfigError) as raised:
        coerce("key", Setting(value, "c.yaml"), hint)
    assert f"key is {value!r} in c.yaml, expected " in str(raised.value)
    assert words in str(raised.value)


def test_text_on_the_command_line_needs_no_quotes():
    settings = parse_overrides(["--a", "1.10", "--b", "true", "--c", "5"])
    assert coerce("a", settings["a"], str) == "1.10"
    assert coerce("b", settings["b"], str | None) == "true"
    assert coerce("c", settings["c"], int | str | None) == 5


def test_choices_are_listed():
    with pytest.raises(ConfigError, match="expected one of nf4, fp4"):
        coerce("quant", Setting("int3", "c.yaml"), str, ["nf4", "fp4"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: [1,\nc: 2\n", "line 2, column 4"), ("a: 1\na: 2\n", "'a' stands there twice"),
        ("- a\n", "holds list"), ("", "holds NoneType"),
    ],
)  # fmt: skip
def test_broken_files_say_where(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_settings(path, [])


def test_overrides_win_and_a_misplaced_config_is_explained(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: 1\nb: 2\n")
    settings = read_settings(path, ["--b", "3"])
    assert {key: setting.value for key, setting in settings.items()} == {"a": 1, "b": 3}
    with pytest.raises(ConfigError, match="the config comes first"):
        read_settings(tmp_path / "1e-4", [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a0: &a0 [x,x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1},*a{i - 1}]\n" for i in range(1, 40)), "aliases"),
        ("a: &a {b: *a}\n", "lies in itself"),
        ("a: " + "[" * 5000 + "]" * 5000, "recursion"),
    ],
)
def test_yaml_that_grows_without_end_is_refused(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"is not valid YAML.*{words}"):
        read_settings(tmp_path / "c.yaml", [])


def test_yaml_may_use_aliases(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a [1, 2]\nb: [*a, *a]\n")
    assert read_settings(tmp_path / "c.yaml", [])["b"].value == [[1, 2], [1, 2]]
