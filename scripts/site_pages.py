"""What the site has beside the pages of ``docs/``: README, the project's own pages, and what is looked up, from the code.

MkDocs calls the functions (``hooks`` in mkdocs.yml).
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md"} | {
    f"{name}.md": f"{name.lower()}.md" for name in ("CONTRIBUTING", "NOTATION", "SECURITY", "CHANGELOG")
}
"""Files beside ``docs/`` -> their page."""
LINK = re.compile(r"(\]\()(?!https?://|#|mailto:)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and the files of the repository that pages link to."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=site_links((ROOT / source).read_text(), ROOT, page)))
    lookup = {"keys": keys_page, "verbs": verbs_page, "errors": errors_page, "python": python_page}
    for name, write in lookup.items():
        files.append(File.generated(config, f"lookup/{name}.md", content=write()))
    linked = {
        path
        for page in [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in PAGES)]
        for path in linked_files(page.read_text(), page.parent)
    }
    for path in sorted(linked):
        uri = destination(path)
        content = site_links(path.read_text(), path.parent, uri) if path.suffix == ".md" else path.read_bytes()
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of ``docs/`` lead to what ``on_files`` has added."""
    origin = ROOT / "docs" / page.file.src_uri
    return site_links(markdown, origin.parent, page.file.src_uri) if origin.is_file() else markdown


def linked_files(markdown: str, folder: Path) -> set[Path]:
    """Files beside ``docs/`` that are no pages: raw results, examples. Of a folder its README."""
    found = {as_file((folder / target).resolve()) for _, target in LINK.findall(markdown)}
    return {path for path in found if path.is_file() and (destination(path) or "").startswith("files/")}


def as_file(path: Path) -> Path:
    return path / "README.md" if path.is_dir() else path


def destination(path: Path) -> str:
    """Where the site has a file of the repository, from its root; empty for what it has not."""
    if path.is_relative_to(ROOT / "docs"):
        return str(path.relative_to(ROOT / "docs"))
    if not path.is_relative_to(ROOT) or not path.exists():
        return ""
    name = str(path.relative_to(ROOT))
    return PAGES.get(name, f"files/{name}")


def site_links(markdown: str, folder: Path, page: str) -> str:
    """Links of a file in ``folder`` as the site has them on ``page``."""

    def moved(match: re.Match[str]) -> str:
        name, mark, anchor = match[2].partition("#")
        found = destination(as_file((folder / name).resolve()))
        return match[1] + os.path.relpath(found, os.path.dirname(page) or ".") + mark + anchor if found else match[0]

    return LINK.sub(moved, markdown)


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; bars and line ends in a cell are escaped."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in [list(columns), ["---"] * len(columns), *cells]]
    return "\n".join(lines) + "\n"


def keys_page() -> str:
    """Every key of a config file with its type and default: ours, then TRL's and transformers'."""
    from transformers import TrainingArguments
    from trl.trainer.model_config import ModelConfig
    from trl.trainer.sft_config import SFTConfig

    from qtarget.cli.options.config import DataConfig
    from qtarget.integrations.sft.config import QTargetConfig

    seen: set[str] = set()
    text = "# Keys of a config\n\nEvery key that a config may have, with its default. `--key value` says it too.\n"
    sections: list[tuple[str, type, type | None]] = [
        ("Rows", DataConfig, None),
        ("Target, reference, teacher, weights", QTargetConfig, SFTConfig),
        ("Model, adapters and quantisation (TRL's ModelConfig)", ModelConfig, None),
        ("Fine-tuning (TRL's SFTConfig)", SFTConfig, TrainingArguments),
        ("Training (transformers' TrainingArguments)", TrainingArguments, None),
    ]
    for title, kind, less in sections:
        known = {field.name for field in dataclasses.fields(less)} if less else set()
        fields = [field for field in dataclasses.fields(kind) if field.name not in known | seen and field.init]
        seen |= {field.name for field in fields}
        said = documented(kind)
        rows = [
            (f"`{field.name}`", f"`{default_of(field)}`", field.metadata.get("help") or said.get(field.name, ""))
            for field in fields
        ]
        text += f"\n## {title}\n\n" + table(("key", "default", "what it is"), rows)
    return text


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return str(getattr(field.default, "value", field.default))
    return str(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "required"


def documented(kind: type) -> dict[str, str]:
    """Names and words of the section ``Attributes`` of a docstring."""
    lines = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].splitlines()
    words: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        if found := re.match(r" {4}(\w[\w, ]*): (.*)", line):
            names = [name.strip() for name in found[1].split(",")]
            words |= dict.fromkeys(names, found[2])
        elif line.startswith("     "):
            words |= {name: f"{words[name]} {line.strip()}" for name in names}
        elif line.strip():
            break
    return words


def verbs_page() -> str:
    """Every command with its arguments and options."""
    from typer.main import get_command

    from qtarget.cli.app import app

    text = "# Commands\n\nEvery verb of `qtarget` with its options, as `--help` says them.\n"
    return text + "".join(commands(get_command(app), "qtarget"))


def commands(command: Any, name: str) -> Iterator[str]:
    """A section a command, groups before what is in them."""
    if found := getattr(command, "commands", None):
        for key, part in sorted(found.items()):
            yield from commands(part, f"{name} {key}")
        return
    rows = []
    for part in command.params:
        if part.name == "help" or getattr(part, "hidden", False):
            continue
        said = part.opts if part.param_type_name == "option" else [part.metavar or part.name.upper()]
        names = ", ".join(f"`{option}`" for option in said)
        empty = part.default is None or callable(part.default) or part.default is False or part.required
        rows.append((names, "" if empty else f"`{part.default}`", getattr(part, "help", "") or ""))
    first, _, rest = (command.help or "").partition("\n")
    yield f"\n## {name}\n\n{first}\n\n{' '.join(rest.split())}\n\n" + (
        table(("option", "default", "what it is"), rows) if rows else ""
    )


def errors_page() -> str:
    """Every error class, in the order of their family."""
    from qtarget.core.errors import QTargetError

    rows = []

    def walk(kind: type, depth: int) -> None:
        rows.append((f"{'&emsp;' * depth}`{kind.__name__}`", (inspect.getdoc(kind) or "").partition("\n\n")[0]))
        for part in kind.__subclasses__():
            if part.__module__.startswith("qtarget."):
                walk(part, depth + 1)

    walk(QTargetError, 0)
    return (
        "# Errors\n\nCatch `qtarget.QTargetError` and you catch them all. Each says what is wrong, what was expected, and the "
        "next step.\n\n" + table(("class", "when"), rows)
    )


def python_page() -> str:
    """The public names, by mkdocstrings."""
    import qtarget

    names = [*qtarget.__all__, "QTargetTrainer", "QTargetConfig"]
    parts = [f"::: qtarget.{name}\n" for name in sorted(set(names), key=str.lower)]
    return "# Python\n\nThe public names of `qtarget`.\n\n" + "\n".join(parts)
