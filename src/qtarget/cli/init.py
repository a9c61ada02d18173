"""``qtarget init``: from a file of rows and a model to a config that trains."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtarget.core.errors import ConfigError, DataError, counted

if TYPE_CHECKING:
    from qtarget.cli.options.config import RunConfig
    from qtarget.cli.options.settings import Setting
    from qtarget.data.formats import Reading
    from qtarget.starting.choices import Fit, Size
    from qtarget.starting.machine import Machine
    from qtarget.starting.survey import Survey
    from qtarget.starting.written import Known

HARDWARE = {"use_cpu": True, "bf16": False, "fp16": False}
"""Nothing is trained here; none of these decides a token."""


def init(
    context: typer.Context,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file of rows, or a pattern such as 'data/*.jsonl'.")],
    model: Annotated[str, typer.Option(help="The base model: a folder, or a hub name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The config to write.")] = Path("run.yaml"),
    validation: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share of the rows to validate with, by prompt; 0 for none.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the choice of validation rows.")] = 0,
) -> None:
    """Write a config for DATA and a model, with validation rows split off; any key can be set by `--key value`."""
    from qtarget.cli.options.settings import parse_overrides
    from qtarget.starting.machine import this_machine

    refuse_existing(output, data)
    overrides = parse_overrides(context.args)
    machine = this_machine(cpu="use_cpu" in overrides and overrides["use_cpu"].value is True)
    start = prepare(data, model, output, overrides, validation, seed, machine)
    write_start(start, output)
    for line in start.said:
        typer.echo(line)
    typer.echo(f"wrote {output}{''.join(f', {path}' for path in start.files)}\n")
    for line in next_steps(output, start.validated):
        typer.echo(line)


def next_steps(output: Path, validated: bool) -> list[str]:
    """Commands to go on with, each of which runs as it stands.

    Args:
        validated: whether there are validation rows.

    Example:
        >>> print("\\n".join(next_steps(Path("run.yaml"), True)))
        what is wrong with the rows, by their text, their tokens and what the base expects:
          qtarget score run.yaml
          qtarget audit-data run.yaml
        which target, on the validation rows:
          qtarget compare run.yaml --targets sft,consensus --filters none,auto
        or train as it stands:
          qtarget train run.yaml
    """
    from qtarget.report.audit.contenders import proposal

    compare = ("  " + shlex.join(["qtarget", "compare", str(output), *proposal().options()]),)
    name = shlex.quote(str(output))
    return [
        "what is wrong with the rows, by their text, their tokens and what the base expects:",
        f"  qtarget score {name}",
        f"  qtarget audit-data {name}",
        "which target, on the validation rows:"
        if validated
        else "no validation rows, so `qtarget compare` cannot judge",
        *(compare if validated else ()),
        "or train as it stands:",
        f"  qtarget train {name}",
    ]


@dataclass(frozen=True)
class Start:
    """What is to be written and said.

    Attributes:
        config: text of the YAML file.
        files: what lies beside it.
        said: lines about rows, model and choices.
        validated: whether the config names validation rows.
    """

    config: str
    files: Mapping[Path, bytes]
    said: Sequence[str]
    validated: bool


def prepare(
    data: str,
    model: str,
    output: Path,
    overrides: Mapping[str, Setting],
    share: float,
    seed: int,
    machine: Machine,
) -> Start:
    """Look at everything and decide; writes nothing.

    Args:
        overrides: keys of the config that the user sets.
        share, seed: of the validation rows.

    Raises:
        ConfigError: no such model, a key that is unknown, or an output that is there already.
        DataError: rows that training would refuse.
        UnsupportedModelError: no causal language model.
    """
    from qtarget.cli.options.outputs import check_outputs
    from qtarget.data.files import check_file, expand
    from qtarget.starting.columns import with_roles
    from qtarget.starting.config_file import config_text, with_given
    from qtarget.starting.written import beside, config_lines, summary
    from qtarget.storage.folders import missing_folder

    paths = expand(data)
    for path in paths:
        check_file(path)
    check_outputs({"-o": output}, paths)
    if (words := missing_folder(model, (output.parent, Path()))) is not None:
        raise ConfigError(f"--model: {words}")
    # before rows are read: a wrong key or model is told at once
    config = checked(overrides, {"model_name_or_path": model, "train_file": [str(path) for path in paths]}, output)
    ours = (*HARDWARE, "output_dir")
    settings = {key: said.value if key in ours else config.given[key] for key, said in overrides.items()}
    reading, originals, renamed = read(paths, row_options_of(config))
    known = look(config, reading, model, machine)
    if not config.data.roles:  # which the config keeps, and would read again
        originals = [with_roles(row, made) for row, made in zip(originals, reading.rows, strict=True)]
    originals = known.parted or originals
    training, validation = rows_apart(config, reading, share, seed)
    copied = {"train": training} if validation or renamed or known.parted else {}
    copied |= {"validation": validation} if validation else {}
    if known.parted:  # the copy is of the shape that is told from its first row, with roles of its own
        settings = {key: value for key, value in settings.items() if key not in ("data_format", "roles")}
    files = {beside(output, f"{name}.jsonl"): lines_of([originals[i] for i in rows]) for name, rows in copied.items()}
    if known.template is not None:
        files[beside(output, "chat_template.jinja")] = known.template.encode()
    lines = config_lines(known, model, output, paths, list(copied))
    heading = (
        f"{data}: {counted(len(reading.rows), 'row')} as {reading.shape}, for {model}. Keys are TRL's and qtarget's."
    )
    trained = known.survey.cut(config.training, known.length, training).supervised_tokens
    said = summary(known, data, len(training), len(validation), trained, seed)
    validated = bool(validation) or config.data.validation_file is not None
    return Start(config_text(with_given(lines, settings), heading), files, said, validated)


def refuse_existing(output: Path, data: str) -> None:
    """Raise where the config is there already.

    Raises:
        ConfigError: proposes a name after the data.
    """
    from qtarget.data.files import stem_of

    if output.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"-o {output}: expected a name that ends in .yaml")
    if output.exists():
        stem = stem_of(Path(data).name)
        free = output.with_name(f"{stem}.yaml")
        usable = stem and not set("*?[") & set(stem) and not free.exists()
        other = f"write another with -o {shlex.quote(str(free))}" if usable else "choose another -o"
        raise ConfigError(f"{output} exists; {other}, or delete it")


def checked(overrides: Mapping[str, Setting], settings: Mapping[str, Any], output: Path) -> RunConfig:
    """The user's keys and ours as training would take them, on any machine."""
    from qtarget.cli.options.config import build_config
    from qtarget.cli.options.settings import Setting

    for key in ("train_file", "model_name_or_path", "dataset_name"):
        if key in overrides:
            raise ConfigError(f"--{key} is said by DATA and --model; leave it out")
    mine = {key: Setting(value, "init") for key, value in {**settings, "output_dir": "runs", **HARDWARE}.items()}
    return build_config({**overrides, **mine}, output)


def row_options_of(config: RunConfig) -> Any:
    """How rows are read."""
    from qtarget.cli.options.datasets import options_of, row_settings

    return options_of(row_settings(config))


def read(paths: Sequence[Path], options: Any) -> tuple[Reading, list[Any], dict[str, str]]:
    """Rows as training takes them, as they stand in their files, and the columns that were renamed for it.

    Raises:
        DataError: rows of no shape that is known.
    """
    from functools import partial

    from qtarget.data.loading import read_originals
    from qtarget.starting.columns import rename, renamed_columns

    first: list[Any] = []

    def noted(value: Any) -> Any:
        first.extend([] if first else [value])
        return value

    try:
        return *read_originals(paths, options, noted), {}
    except DataError:
        names = renamed_columns(first[0]) if first and isinstance(first[0], dict) else {}
        if not names or options.format != "auto":
            raise
    reading, rows = read_originals(paths, options, partial(rename, names=names))
    words = ", ".join(f"{theirs} -> {ours}" for theirs, ours in names.items())
    reading.announced.insert(0, f"columns {words}, in the copy that is written")
    return reading, rows, names


def look(config: RunConfig, reading: Reading, model: str, machine: Machine) -> Known:
    """Model and rows, and what follows from them."""
    from transformers import AutoTokenizer

    from qtarget.data.checks.tokens import Vocabulary, check_positions
    from qtarget.data.loading import dataset_of
    from qtarget.starting.choices import fit, row_length
    from qtarget.starting.model import size_of
    from qtarget.starting.survey import answers_alone, chat_template, is_conversation, survey
    from qtarget.starting.written import Known
    from qtarget.storage.models import load_named

    options = {"revision": config.model.model_revision, "trust_remote_code": config.training.trust_remote_code}
    name = str(config.model.model_name_or_path)
    size = size_of(name, **options)
    tokenizer = load_named(AutoTokenizer, "--model", name, **options)
    talks = is_conversation(reading.rows[0])
    template = None
    if talks and not tokenizer.chat_template and config.training.chat_template_path is None:
        template = tokenizer.chat_template = chat_template()
    read_as = row_options_of(config)
    rows = dataset_of(reading, read_as)
    alone = None
    if reading.rows[0].get("messages") is not None and "assistant_only_loss" not in config.given:
        refuse_unanswered(reading)
        alone = answers_alone(config.training, rows, tokenizer)
    apart = parted_rows(config, reading) if alone is None else None
    surveyed = rows if apart is None else dataset_of(replace(reading, rows=apart), read_as)
    found = alone or survey(config.training, surveyed, tokenizer)
    ours = row_length(found.lengths, size.positions)
    length: int | None = config.given.get("max_length", ours)
    longest = length or row_length(found.lengths, None)
    fits = fit(size, longest, len(reading.rows), machine, config.given.get("use_peft"))
    placed = Vocabulary.of(tokenizer, size.vocabulary, positions=size.positions)
    cut = [
        *found.cut(config.training, length).messages(),
        *(f.message for f in check_positions(found.tokens, placed, length)),
    ]
    marked = (alone is not None) if reading.rows[0].get("messages") is not None and apart is None else None
    packed = packing(name, size, found, longest, fits, options)
    bare = not talks and reading.rows[0].get("input_ids") is None and bool(tokenizer.chat_template)
    notes = [*found.notes, *cut]
    return Known(reading, size, found, machine, fits, length, notes, template, marked, apart, packed, bare)


def parted_rows(config: RunConfig, reading: Reading) -> list[Any] | None:
    """Rows as prompt and completion, where they can be, and where the user did not say what is trained."""
    from qtarget.starting.turns import parted

    said = {"assistant_only_loss", "completion_only_loss", "validation_file"} & set(config.given)
    return None if said else parted(reading.rows)


def refuse_unanswered(reading: Reading) -> None:
    """Conversations in which nobody answers: one of them would decide that prompts are trained in all rows.

    Raises:
        DataError: names the lines.
    """
    silent = [
        str(place)
        for place, row in zip(reading.places, reading.rows, strict=True)
        if not any(message.get("role") == "assistant" for message in row["messages"])
    ]
    if silent:
        more = f" and {len(silent) - 5:,} more" if len(silent) > 5 else ""
        prompts = "; `qtarget rl` takes prompts alone, in a column `prompt` (docs/rl.md)"
        raise DataError(
            f"no assistant answers in {'; '.join(silent[:5])}{more}; remove the rows, add the answers, or say "
            f"--assistant_only_loss false to train whole conversations{prompts * (len(silent) == len(reading.rows))}"
        )


def packing(name: str, size: Size, found: Survey, length: int, fits: Fit, options: Mapping[str, Any]) -> bool | None:
    """True where packing pays and is safe, False where it pays and is not, None where it does not pay or was not tried."""
    from qtarget.starting.choices import packing_pays
    from qtarget.starting.model import keeps_packed_rows_apart

    if not packing_pays(found.lengths, length, fits.batch):
        return None
    return keeps_packed_rows_apart(name, size, **options)


def rows_apart(config: RunConfig, reading: Reading, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of training and validation rows; no validation rows where the user has a file of them."""
    from qtarget.data.prompts import prompt_of
    from qtarget.starting.split import split_rows

    if config.data.validation_file is not None:
        share = 0.0
    prompts = [prompt_of(row, config.training.dataset_text_field) for row in reading.rows]
    return split_rows(prompts, share, seed)


def lines_of(rows: Sequence[Any]) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()


def write_start(start: Start, output: Path) -> None:
    """The files, the config last; nothing is written over, and a run that was stopped is finished.

    Raises:
        ConfigError: a file with another content is there.
    """
    from qtarget.storage.files import write_atomic

    for path, content in start.files.items():
        if path.exists() and path.read_bytes() != content:
            raise ConfigError(f"{path} exists, with another content; choose another -o, or delete it")
    for path, content in start.files.items():
        write_atomic(path, content)
    write_atomic(output, start.config.encode())
