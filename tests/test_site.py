"""The site: it builds without a warning, and every command of the pages that it adds to the others' runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ROOT

PAGES = (
    "tutorial", "noisy_rows", "lora",
    *(pytest.param(page, marks=pytest.mark.nightly) for page in ("small_from_big", "many_gpus", "cluster", "resume")),
)  # fmt: skip
"""Pages without a test of their own; they run from the root of a checkout."""
SMALL = {
    "train": ["--max_steps", "4"],
    "score": ["--shard-rows", "512"],
    "compare": ["--seeds", "1", "--rates", "1", "--max_steps", "4", "--at-once", "1", "--max-new-tokens", "8"],
    "evaluate": ["--limit", "16"],
}
"""What a test adds to a command, so that it takes seconds."""


def commands(page: str) -> list[list[str]]:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return [
        shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages name."""
    for folder in ("src/qtarget/data/embedded", "examples"):
        (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_here(command: list[str]) -> None:
    from typer.testing import CliRunner

    from qtarget.cli.app import app

    given = shlex.split(shlex.join(command).replace(" --max_steps 250", ""))  # a teacher's steps
    small = [] if "--max_steps" in given else SMALL.get(command[1], [])
    result = CliRunner().invoke(app, [*given[1:], *small], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def run_apart(command: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}"}
    binary = [sys.executable, "-m", "torch.distributed.run"]
    done = subprocess.run(
        [*binary, *command[1:], *SMALL["train"]], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


RUNNERS: dict[str, Callable[[list[str]], None]] = {"qtarget": run_here, "torchrun": run_apart}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_run_in_order(page: str, checkout: Path) -> None:
    found = commands(page)
    assert found
    for command in found:
        RUNNERS[command[0]](command)


def test_every_page_says_first_what_one_can_do_after_it() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        title, first = page.read_text(encoding="utf-8").split("\n\n")[:2]
        assert title.startswith("# "), page.name
        assert first.startswith("After this page you "), page.name


QUESTIONS = {
    "How do I mask a step?": "weight_spans",
    "Which target for a noisy base?": "consensus",
    "What does this cost in memory?": "one chunk of logits",
    "How do I resume?": "--resume true",
    "How do I use my own metric?": "--metric judges:close",
    "How do I train with a teacher's API?": "teacher: http",
    "What happens to rows that are too long?": "max_length",
    "Does it work with QLoRA?": "load_in_4bit",
    "How do I know whether it helped?": "qtarget compare",
    "How do I stop a run that does not learn?": "not learning",
}
"""What is asked first -> what the answer names."""


def heading_anchors(text: str) -> set[str]:
    """As the site makes them."""
    from markdown.extensions.toc import slugify

    return {slugify(line.lstrip("# ").replace("`", ""), "-") for line in text.splitlines() if line.startswith("#")}


def test_ten_questions_are_answered_within_two_clicks() -> None:
    """The front page leads to the questions, and each of those to a page and a heading that are there."""
    pytest.importorskip("markdown", reason="markdown is not installed: pip install 'qtarget[docs]'")
    assert "](docs/questions.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    text = (ROOT / "docs/questions.md").read_text(encoding="utf-8")
    rows = {row[0]: row[1:] for row in re.findall(r"^\| (.+?) \| (.+) \| (.+) \|$", text, re.MULTILINE)}
    for question, words in QUESTIONS.items():
        assert words in rows[question][0], question
    for _, more in rows.values():
        for name, anchor in re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", more):
            page = (ROOT / "docs" / name).read_text(encoding="utf-8")
            assert not anchor or anchor in heading_anchors(page), (name, anchor)


def test_the_keys_of_other_tools_are_told_as_keys_of_ours() -> None:
    """Every name in the right column of docs/migrate.md that looks like a key is one."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from site_pages import keys_page
    finally:
        sys.path.pop(0)
    known = set(re.findall(r"^\| `(\w+)`", keys_page(), re.MULTILINE))
    text = (ROOT / "docs/migrate.md").read_text(encoding="utf-8")
    told = [row.split(" | ")[-1] for row in re.findall(r"^\| .+? \|$", text, re.MULTILINE)]
    ours = {key for cell in told for key in re.findall(r"`(\w+)(?::[^`]*)?`", cell)}
    assert len(ours) > 10
    assert ours - known <= {"SFTConfig", "hybrid_distillation", "sharegpt"}, ours - known


@pytest.mark.nightly
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """As `make check` does; here links and anchors of pages that another test wrote cannot hide."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'qtarget[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    home = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert "Choose, for every token" in home
    keys = (tmp_path / "site/lookup/keys.html").read_text(encoding="utf-8")
    assert all(f"<code>{name}</code>" in keys for name in ("target", "learning_rate", "lora_r", "assistant_only_loss"))
    assert "CacheMismatchError" in (tmp_path / "site/lookup/errors.html").read_text(encoding="utf-8")
