"""``qtarget lens``: the commands of its page in the docs, errors for people, and that the page holds what the JSON holds."""

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
from qtarget.report.page import asset

ROOT = Path(__file__).parents[2]
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
        assert result.stdout == next(block for block in blocks("") if block.startswith("my_losses"))
    html = Path(command[command.index("--output") + 1]).read_text()
    held = json.loads(re.search(r'id="qt-data">(.*?)</script>', html, flags=re.DOTALL).group(1))
    names = command[2 : command.index("--output")]
    assert [loss["name"] for loss in held["losses"]] == (qtarget.available_targets() if names == ["all"] else names)
    assert "src=" not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    if "--json" in command:
        assert held == json.loads(Path(command[command.index("--json") + 1]).read_text())
    if "--png" in command:
        size = Path(command[command.index("--png") + 1]).stat().st_size
        assert 20_000 < size < 300_000
        assert (ROOT / "docs/lens.png").stat().st_size < 300_000


def test_the_notebook_example_prints_what_it_says(there):
    code = "\n".join(blocks("python"))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == re.search(r"# (0\.5 .*)$", PAGE, flags=re.MULTILINE).group(1)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("nowhere:loss", "loss 'nowhere:loss' cannot be imported (No module named 'nowhere')"),
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


def test_the_page_shows_the_numbers_of_the_json(there, open_page):
    """In a real browser: a row a loss, the verdicts, the checks, the curves' points; names are text and not markup."""
    hostile = "my_losses:careful(**{})"
    (there / "my_losses.py").write_text(blocks("python")[0] + "\nvars()['<img src=x onerror=alert(1)>'] = careful\n")
    losses = ["dft", "target_sft", "gem", "reverse_kl", "my_losses:<img src=x onerror=alert", "sft"]
    assert "(**" in hostile
    losses[4] = "my_losses:careful"
    result = CliRunner().invoke(app, ["lens", *losses, "--output", "p.html", "--json", "p.json"], catch_exceptions=False)
    assert result.exit_code == 0
    document = json.loads(Path("p.json").read_text())
    page = open_page(there / "p.html")
    rows = page.locator("#lens-summary tbody tr")
    assert rows.count() == len(losses)
    for i, loss in enumerate(document["losses"]):
        assert rows.nth(i).locator("th").inner_text() == loss["name"]
        if loss["form"]["fits"]:
            assert rows.nth(i).locator("td").nth(1).inner_text() == loss["form"]["a"]["name"]
        section = page.locator(f"#loss-{i}")
        assert section.locator("ul li").all_inner_texts() == loss["verdict"]
        assert section.locator("tbody tr").count() == len(loss["checks"])
        assert section.locator("tbody tr td:last-child").all_inner_texts() == [c["finding"] for c in loss["checks"]]
    shown = page.locator("#loss-0 svg circle title").all_text_contents()
    at_half = next(text for text in shown if "observed token: " in text and "probability of the observed token 0.5," in text)
    assert at_half.endswith(" 0.25")
    assert page.locator("#loss-1 figure").count() == 5
    assert page.locator("#loss-3 figure").count() == 4  # no weights where the form does not fit
    for scheme in ("light", "dark"):
        assert open_page(there / "p.html", scheme=scheme).locator("#qt-problem").is_hidden()


def test_a_hostile_name_stays_text(there, open_page):
    from qtarget.report.lens import lens
    from qtarget.report.lens_loss import load_loss
    from qtarget.report.lens_page import lens_page

    document = lens([load_loss("sft")])
    name = "</script><img src=x onerror=\"document.title='owned'\">\u202e"
    document["losses"][0]["name"] = name
    path = there / "hostile.html"
    path.write_text(lens_page(document), encoding="utf-8")
    page = open_page(path)
    assert page.locator("#loss-0 h2").inner_text() == name.replace("\u202e", "U+202E")
    assert page.locator("img").count() == 0 and "owned" not in page.title()[:10]


def test_the_script_sets_no_markup():
    assert "innerHTML" not in asset("lens.js") and "insertAdjacentHTML" not in asset("lens.js")


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from qtarget.cli.main import run\n"
        "try: run(['lens', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'transformers', 'trl', 'matplotlib', 'jinja2'} & set(sys.modules), sorted(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
