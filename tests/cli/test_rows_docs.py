"""docs/rows.md: its command runs on its rows and says what the page says; its Python runs; its tables are the code's."""

from __future__ import annotations

import re
import shlex

import pytest

pytest.importorskip("typer")

from qtarget.cli.main import run
from qtarget.data.files import READABLE
from qtarget.data.formats import FORMATS
from qtarget.data.formats.messages import CERTAIN_ROLES
from tests import ROOT

PAGE = (ROOT / "docs" / "rows.md").read_text(encoding="utf-8")


def block(kind):
    (found,) = re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.DOTALL)
    return found


def test_the_command_says_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text(block("json"), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        run(shlex.split(block("bash"))[1:])
    assert ended.value.code == 0
    assert capsys.readouterr().out == block("text")


def test_the_python_runs():
    pytest.importorskip("datasets")
    exec(block("python"), {})


def test_every_format_role_and_suffix_is_on_the_page():
    for word in (*FORMATS[1:], *CERTAIN_ROLES):
        assert f"`{word}`" in PAGE
    for suffix in READABLE:
        assert f"`{suffix}`" in PAGE or f"`{suffix.rsplit('.', 1)[0]}`" in PAGE


def test_the_keys_and_options_exist():
    from dataclasses import fields
    from inspect import signature

    from qtarget.cli.convert import convert
    from qtarget.cli.options.config import DataConfig
    from qtarget.cli.options.datasets import ROW_KEYS

    keys = re.findall(r"^\| `(\w+): [^|]*\| `--([\w-]+) ", PAGE, flags=re.MULTILINE)
    assert {key for key, _ in keys} == set(ROW_KEYS) <= {f.name for f in fields(DataConfig)}
    parameters = {name.removesuffix("_name").replace("_", "-") for name in signature(convert).parameters}
    assert {option for _, option in keys} <= parameters


def test_the_limits_and_their_defaults_are_the_codes():
    from dataclasses import asdict

    from qtarget.data.limits import Limits

    found = re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", PAGE, flags=re.MULTILINE)
    assert {name: float(value.replace(",", "")) for name, value in found} == asdict(Limits())
