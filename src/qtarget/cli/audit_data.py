"""``qtarget audit-data``: what is wrong with the rows before anything is trained on them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qtarget.cli.options.outputs import Mark, OverwriteOption
from qtarget.core.errors import CacheMismatchError, ConfigError, counted, inflected

if TYPE_CHECKING:
    from rich.console import Console

    from qtarget.cli.options.config import RunConfig
    from qtarget.cli.options.settings import Setting
    from qtarget.data.checks.findings import Finding
    from qtarget.data.checks.tokens import Vocabulary
    from qtarget.report.audit.advice import Advice, Statement
    from qtarget.report.audit.document import DataAudit
    from qtarget.scoring.cache.reader import ReferenceCache

FAILED = 1
EXAMPLES = 3
STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
# Nothing is trained, so the machine need not be able to; none of these decides a token.
HARDWARE = {"use_cpu": True, "bf16": False, "fp16": False}


def audit_data(
    context: typer.Context,
    source: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml|DATA", help="A config of `qtarget train`, or a file of rows.")
    ],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write everything as JSON.")
    ] = None,
    split: Annotated[Literal["train", "validation"], typer.Option(help="Which rows of the config.")] = "train",
    overwrite: OverwriteOption = False,
) -> None:
    """Check rows, tokens, masks and the base's surprise; exit code 1 on errors. Any key can be set by `--key value`."""
    from rich.console import Console

    from qtarget.cli.options.outputs import say_written, write_numbers
    from qtarget.cli.options.settings import parse_overrides
    from qtarget.command import remember

    is_data = names_rows(source)
    remember("run.yaml" if is_data else source, () if is_data else context.args)
    audit = run_audit(source, parse_overrides(context.args), split, json_file, overwrite=overwrite)
    if json_file is not None:
        write_numbers(json_file, audit.as_dict(), mark_of(source, split))
    print_audit(audit, Console())
    if is_data:
        print_start(source, context.args, Console())
    if json_file is not None:
        say_written([json_file])
    if audit.errors:
        raise typer.Exit(FAILED)


def run_audit(
    source: Path,
    overrides: Mapping[str, Setting],
    split: Literal["train", "validation"] = "train",
    json_file: Path | None = None,
    *,
    overwrite: bool = False,
) -> DataAudit:
    """Audit the rows of a config, or of a file: with its tokens where ``model_name_or_path`` is given.

    Args:
        json_file: where the caller will write, which must be none of the files read here.
        overwrite: whoever made what is there.

    Raises:
        ConfigError: no such split, settings that training refuses too, or see ``check_outputs``.
        DataError: the file is unusable, or a folder.
        CacheMismatchError: the command line names a cache that is none.
    """
    from qtarget.cli.options.config import build_config
    from qtarget.cli.options.early import check_settings
    from qtarget.cli.options.outputs import check_outputs
    from qtarget.cli.options.settings import Setting, read_settings
    from qtarget.data.files import expand

    is_data = names_rows(source)
    if is_data and "model_name_or_path" not in overrides:
        files = expand(source)
        check_outputs({"--json": json_file}, files, mark=mark_of(source, split), replaces=overwrite)
        return replace(_texts_alone(source, overrides, split), files=tuple(map(str, files)))
    settings = dict(overrides) if is_data else read_settings(source, []) | dict(overrides)
    if is_data:
        settings["train_file"] = Setting(str(source.absolute()), "the command line")
    settings |= {key: Setting(value, "audit-data") for key, value in HARDWARE.items()}
    check_settings(settings, source)
    config = build_config(settings, source)
    check_outputs({"--json": json_file}, [source, *config.inputs], mark=mark_of(source, split), replaces=overwrite)
    required = not {"reference", "reference_cache"}.isdisjoint(overrides)
    audit = audit_config(config, split, cache_required=required, alone=is_data)
    return replace(audit, files=tuple(map(str, expand(source))) if is_data else names_of_rows(config, split))


def names_rows(source: Path) -> bool:
    """Whether a path, or a pattern, is of rows and not of a config.

    Raises:
        DataError: it is a folder.
    """
    from qtarget.data.files import READABLE, check_file

    if source.is_dir():
        check_file(source)
    return source.name.lower().endswith(READABLE)


def names_of_rows(config: RunConfig, split: Literal["train", "validation"]) -> tuple[str, ...]:
    """Files of a config's rows, or their data set with its split."""
    from qtarget.cli.options.datasets import row_files

    data = config.data
    if data.dataset_name is not None and data.train_file is None:
        part = data.dataset_train_split if split == "train" else data.dataset_test_split
        return (f"{data.dataset_name}, split {part}",)
    return tuple(row_files(config, split))


def mark_of(source: Path, split: str) -> Mark:
    """Of a file of findings."""
    return Mark.of("audit-data", [source, split])


def _texts_alone(source: Path, overrides: Mapping[str, Setting], split: str) -> DataAudit:
    from qtarget.cli.options.datasets import ROW_KEYS, row_options
    from qtarget.data.loading import load_rows
    from qtarget.report.audit.document import audit_texts

    unused = sorted(set(overrides) - {"dataset_text_field", "limits", *ROW_KEYS})
    if unused or split != "train":
        raise ConfigError(
            f"{', '.join(f'--{key}' for key in unused) or '--split'} says nothing about {source} without a tokenizer; pass "
            "CONFIG.yaml, or --model_name_or_path MODEL too"
        )
    given = {key: setting.value for key, setting in overrides.items()}
    text_field = str(given.pop("dataset_text_field", "text"))
    rows = load_rows(source, text_field=text_field, options=row_options(**given))
    return audit_texts(rows, text_field=text_field)


def audit_config(
    config: RunConfig, split: Literal["train", "validation"], *, cache_required: bool, alone: bool = False
) -> DataAudit:
    """Audit the rows of a config, tokenised exactly as training does; the model's weights are not read.

    Args:
        cache_required: a ``reference_cache`` that is not there is an error; else its checks are left out.
        alone: the config was made of a file of rows, and no config that trains.
    """
    from qtarget.cli.compared import found_comparison
    from qtarget.cli.options.datasets import load_datasets
    from qtarget.cli.options.frozen import found_reference, found_witness
    from qtarget.integrations.sft.audit import cut, tokenise
    from qtarget.report.audit.document import audit_data, audit_unrendered

    training = config.training
    both = load_datasets(config)
    rows = both[split == "validation"]
    if rows is None:
        raise ConfigError("--split validation: the config names no validation_file; set it, or audit the training rows")
    tokenizer, model, ends = load_tokenizer(config)
    tokens = tokenise(training, rows, tokenizer)
    raw: Any = list(rows)
    if tokens.rows is None:
        return audit_unrendered(raw, tokens.findings, text_field=training.dataset_text_field)
    cache = open_cache(found_reference(config, both), cache_required)
    return audit_data(
        raw,
        tokens.rows,
        [cut(row, training) for row in tokens.rows],
        tokenizer=tokens.tokenizer,
        vocabulary=vocabulary_of(tokens.tokenizer, model, ends),
        max_length=training.max_length,
        keep_end=training.truncation_mode == "keep_end",
        chat_template=tokens.chat_template,
        assistant_only=training.assistant_only_loss,
        text_field=training.dataset_text_field,
        cache=cache,
        witness=open_cache(found_witness(config, both), True),
        sided=training.cache_verify_key is None,
        teacher=bool(training.teacher_cache or training.teacher_model_name_or_path),
        validation=None if alone else both[1] is not None,
        compared=found_comparison(config, both[0]),
        more=[
            *tokens.findings,
            *(cache_findings(cache, tokens, model.vocab_size, len(rows)) if cache is not None else ()),
        ],
    )


def vocabulary_of(tokenizer: Any, model: Any, ends: Sequence[int]) -> Vocabulary:
    """What checks of tokens need; arguments as ``load_tokenizer`` returns them, the tokenizer as training prepares it."""
    from qtarget.data.checks.tokens import Vocabulary
    from qtarget.integrations.shared.saved.ends import turn_ends
    from qtarget.storage.models import room_of

    return Vocabulary.of(tokenizer, model.vocab_size, [*ends, *turn_ends(tokenizer)], room_of(model, tokenizer))


def load_tokenizer(config: RunConfig) -> tuple[Any, Any, list[int]]:
    """Tokenizer, the text model's configuration, and its end tokens."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from qtarget.integrations.shared.saved.ends import end_ids

    name, revision = str(config.model.model_name_or_path), config.model.model_revision
    keywords = {"revision": revision, "trust_remote_code": config.training.trust_remote_code}
    try:
        model = AutoConfig.from_pretrained(name, **keywords).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(name, **keywords)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model_name_or_path {name} cannot be loaded: {error}; expected a folder with config.json and a tokenizer, or a "
            "hub name"
        ) from error
    try:
        generation = GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:  # many models have no generation_config.json
        generation = None
    return tokenizer, model, end_ids(generation, model)


def open_cache(path: str | None, required: bool) -> ReferenceCache | None:
    from qtarget.scoring.cache.reader import ReferenceCache

    if path is None or (not required and not Path(path).exists()):
        return None
    return ReferenceCache.open(path, verify=False)


def cache_findings(cache: ReferenceCache, tokens: Any, vocab_size: int, rows: int) -> list[Finding]:
    """A cache of another tokenizer, template or vocabulary, at which training stops."""
    from qtarget.data.checks.findings import Finding
    from qtarget.scoring.cache.schema import fingerprint_chat_template, fingerprint_tokenizer

    try:
        cache.require(
            tokenizer_fingerprint=fingerprint_tokenizer(tokens.tokenizer),
            chat_template_fingerprint=fingerprint_chat_template(tokens.chat_template or tokens.tokenizer),
            vocab_size=vocab_size,
        )
    except CacheMismatchError as error:
        return [Finding("cache_mismatch", "error", rows, (), str(error))]
    return []


def print_audit(audit: DataAudit, console: Console) -> None:
    """Findings with a few examples each, then the suggestion."""
    from rich.text import Text

    from qtarget.data.files import READABLE, distinct_names

    for found in audit.findings:
        line = Text(f"{found.severity:8}", style=STYLES[found.severity])
        console.print(line + Text(f"{found.check}: ", style="bold") + Text(_visible(found.message)), soft_wrap=True)
        for example in found.evidence.get("examples", ())[:EXAMPLES]:
            console.print(Text(f"          {example_line(example)}", style="dim"), soft_wrap=True)
    console.print()
    _print_advice(audit.advice, console)
    warned = sum(found.severity == "warning" for found in audit.findings)
    words = f"{counted(audit.errors, 'kind')} of errors" if audit.errors else "no errors"
    words += f", {counted(warned, 'kind')} of warnings" if warned else ""
    are_files = all(name.lower().endswith(READABLE) for name in audit.files)  # a data set has a name of its own
    names = distinct_names([Path(file) for file in audit.files]) if are_files else audit.files
    files = f" of {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
    rows = counted(audit.rows, "row") + files * bool(audit.files)
    console.print(Text(f"\n{rows}: {words}", style="bold red" if audit.errors else "bold green"))


def _print_advice(advice: Advice, console: Console) -> None:
    from rich.text import Text

    from qtarget.report.audit.advice import own_evidence

    if own := own_evidence(advice.facts):
        console.print(Text("Your rows: ", style="bold") + Text("; ".join(own)), soft_wrap=True)
    console.print(Text("Which target? ", style="bold") + Text(advice.summary, style=""), soft_wrap=True)
    for i, statement in enumerate(advice.ranked, start=1):
        console.print(
            Text(f"  {i}. {', '.join(statement.targets)}: {statement.reason} {_files([statement])}"), soft_wrap=True
        )
    if advice.avoid:
        words = "; ".join(f"{', '.join(one.targets)}: {one.reason}" for one in advice.avoid)
        console.print(Text(f"  not {words} {_files(advice.avoid)}"), soft_wrap=True)
    for note in advice.notes:
        console.print(Text(f"  note: {note}"), soft_wrap=True)


def _files(statements: Sequence[Statement]) -> str:
    """Files that statements rest on."""
    return f"[{', '.join(dict.fromkeys(entry['file'] for one in statements for entry in one.evidence))}]"


def print_start(source: Path, arguments: Sequence[str], console: Console) -> None:
    """How the config comes about that the commands above name: nothing but a config can be scored, compared and trained."""
    from rich.text import Text

    words = [
        "--model" + word.removeprefix("--model_name_or_path") if word.startswith("--model_name") else word
        for word in arguments
    ]
    unknown = () if any(word.startswith("--model") for word in words) else ("--model", "MODEL")
    command = shlex.join(["qtarget", "init", str(source), *unknown, *words])
    console.print(Text(f"Commands above that name run.yaml: `{command}` writes it"), soft_wrap=True)


def example_line(example: Mapping[str, Any]) -> str:
    """One example of a finding, its text quoted.

    Example:
        >>> example_line({"row": 3, "text": "\\n", "log_prob": -9.5, "rank": None, "base_text": " a", "base_probability": 0.98})
        "row 4: '\\\\n' log p -9.50, rank beyond top-k; the base: ' a' (0.98)"
    """
    where = f"row {example['row'] + 1}" + (f", token {example['position']}" if "position" in example else "")
    if "answer" in example:
        return f"{where}: {example['answer']!r}, row {example['other_row'] + 1}: {example['other_answer']!r}"
    text = f"{example['before']!r} + " if example.get("before") else ""
    line = f"{where}: {text}{example['text']!r}"
    if "other_row" in example:
        line += f", as row {example['other_row'] + 1}"
    if "log_prob" in example:
        line += f" log p {example['log_prob']:.2f}"
    if "base_text" in example:
        rank = example["rank"] or "beyond top-k"
        line += f", rank {rank}; the base: {example['base_text']!r} ({example['base_probability']:.2f})"
    if "rows_agreeing" in example:
        line += f"; {counted(example['rows_agreeing'], 'row')} {inflected(example['rows_agreeing'], 'agree')}"
    return line


def _visible(text: str) -> str:
    """Without characters that steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
