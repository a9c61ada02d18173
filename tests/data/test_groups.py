"""What tells rows apart: a column, or the language that a library detects."""

from __future__ import annotations

import sys

import pytest

from qtarget.core.errors import ConfigError, MissingDependencyError
from qtarget.data.embedded import load_demonstrations
from qtarget.data.groups import languages, response, row_groups

FEW = [*(f"Die Antwort lautet also [{i}]." for i in range(10)), "La réponse est donc [4].", "[4]"]


def test_a_few_rows_of_another_language_are_told():
    pytest.importorskip("py3langid")
    many = [row["completion"] for row in load_demonstrations("train")[:190]]
    assert languages(many + FEW) == ["en"] * 190 + ["de"] * 10 + ["fr", "unknown"]
    assert languages(["12 + 3", ""]) == ["unknown", "unknown"]


def test_columns_and_the_language_of_what_a_row_answers():
    rows = [
        {"prompt": "Sag es auf Deutsch", "completion": text, "source": name}
        for text, name in zip(FEW, "aabbccaabbcc", strict=True)
    ]
    assert row_groups(rows) == ("source", list("aabbccaabbcc"))
    assert row_groups(rows, at_most=2) is None
    assert row_groups([{**row, "language": "x"} for row in rows], "language") == ("language", ["x"] * 12), (
        "its own column"
    )
    with pytest.raises(ConfigError, match="no such column; columns: prompt, completion, source; or `language`"):
        row_groups(rows, "colour")
    later = [{"text": "a"}, {"text": "b", "source": "web"}]
    assert row_groups(later) is None, "half of the rows say nothing"
    assert row_groups(later, "source") == ("source", ["None", "web"])
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Ja"}]
    shapes = {"messages": chat}, {"prompt": chat[:1], "completion": chat[1:]}, {"text": "so"}, {"input_ids": [1]}
    assert [response(row) for row in shapes] == ["Ja", "Ja", "so", ""]


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(MissingDependencyError, match=r"qtarget\[language\]"):
        row_groups([{"text": "a"}], "language")
