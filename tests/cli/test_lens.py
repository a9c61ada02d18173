"""``qtarget lens``: the commands of its page in the docs, errors for people."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("jinja2")

from typer.testing import CliRunner

import qtarget
from qtarget.cli.app import app
from qtarget.cli.main import run
from tests import ROOT

PAGE = (ROOT / "docs/lens.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with the docs' ``my_losses.py``."""
    (tmp_path / "my_losses.py").write_text(blocks("python")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_of_the_docs_run(command, there):
    assert command[:2] == ["qtarget", "lens"]
    path = list(sys.path)
    result = CliRunner().invoke(app, command[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert sys.path == path
    if "my_losses:careful" in command:
        assert result.stdout == blocks("text")[0]
    html = Path(command[command.index("--output") + 1]).read_text()
    held = json.loads(re.search(r'id="qt-data">(.*?)</script>', html, flags=re.DOTALL).group(1))
    names = command[2 : command.index("--output")]
    assert [loss["name"] for loss in held["losses"]] == (qtarget.available_targets() if names == ["all"] else names)
    assert "src=" not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    if "--json" in command:
        numbers = json.loads(Path(command[command.index("--json") + 1]).read_text())
        assert numbers.pop("made_by").startswith("qtarget lens of ") and held == numbers
    if "--png" in command:
        size = Path(command[command.index("--png") + 1]).stat().st_size
        assert 20_000 < size < 300_000
        assert (ROOT / "docs/lens.png").stat().st_size < 300_000


def test_the_gallery_counts_every_target():
    """A new target: draw docs/lens.png again with the first command of the page, and correct the number."""
    assert set(re.findall(r"(\d+) (?:built-in )?targets", PAGE)) == {str(len(qtarget.available_targets()))}


def test_the_notebook_example_prints_what_it_says(there):
    code = "\n".join(blocks("python"))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == re.search(r"# (0\.5 .*)$", PAGE, flags=re.MULTILINE).group(1)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("nowhere:loss", "loss 'nowhere:loss' cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
        ("my_losses:careless", "careless"),
        ("my_losses:F.pi", "cannot be imported"),
        ("sftt", "did you mean sft"),
        ("dft(", "cannot be read"),
    ],
)
def test_errors_are_one_readable_block(loss, words, there, capsys):
    with pytest.raises(SystemExit) as ended:
        run(["lens", loss])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in said and "Traceback" not in said
    assert not Path("lens.html").exists()


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from qtarget.cli.main import run\n"
        "try: run(['lens', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'transformers', 'trl', 'matplotlib', 'jinja2'} & set(sys.modules), sorted(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
