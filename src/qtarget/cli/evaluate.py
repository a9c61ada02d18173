"""``qtarget evaluate``: likelihood, completed tasks and forgetting of trained models beside their base."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qtarget.cli.options.datasets import LimitsOption
from qtarget.cli.options.outputs import OverwriteOption
from qtarget.core.errors import ConfigError, counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qtarget.cli.options.outputs import Mark
    from qtarget.data.formats import Reading
    from qtarget.data.formats.shape import ReadOptions
    from qtarget.evaluation.contenders import Contender
    from qtarget.evaluation.evaluate import Choices, Evaluation, RowSet, Served
    from qtarget.evaluation.judges import Judge

PIPED_WIDTH = 160  # characters
BETWEEN_LINES = 10.0
"""Seconds between two lines of progress, where there is no terminal."""
ROWS_SUFFIX = ".rows.jsonl"
"""Of the file of records beside the output."""


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="RUN_OR_MODEL...", help="Runs, checkpoints, model folders, adapters, hub names."),
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="Rows with answers that no model was trained on; default: the runs' validation file."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="exact, regex, number, json, or your module:function; default: exact."),
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="For regex; its first group is the answer.")] = None,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", help="For exact and regex.")] = False,
    forgetting: Annotated[Path | None, typer.Option(help="Rows of what the base could do before.")] = None,
    forgetting_metric: Annotated[
        str | None, typer.Option(help="As --metric, or none for the likelihood alone; default: --metric's.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The untrained model; default: what the runs record.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="The numbers: one JSON file; default: RUN-evaluation.json beside the run.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="One HTML file; default: beside the output.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the rows that are known.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="The first rows alone.")] = None,
    no_nll: Annotated[bool, typer.Option("--no-nll", help="Leave out the nll of the rows' own answers.")] = False,
    no_generate: Annotated[bool, typer.Option("--no-generate", help="Leave out the models' answers.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the most likely token.")] = 0.0,
    samples: Annotated[int, typer.Option(min=1, help="Completions a row; their mean score counts.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws and of the bootstrap.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: 1.5 times the longest reference and 16 tokens, at most 2,048.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 32,
    url: Annotated[str | None, typer.Option(help="Of a server that completes: http://host:8000.")] = None,
    engine: Annotated[Literal["vllm", "sglang", "openai"], typer.Option(help="What --url is.")] = "vllm",
    served: Annotated[
        list[str] | None, typer.Option(metavar="MODEL=ID", help="Which of the models is served under which id.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="As transformers has it.")] = False,
    overwrite: OverwriteOption = False,
    limits: LimitsOption = None,
) -> None:
    """Compare trained models with their untrained base on rows with answers."""
    from qtarget.cli.options.outputs import Mark, check_outputs, held, progress_bar, say_written
    from qtarget.data.files import check_files
    from qtarget.data.limits.templates import bounded_templates
    from qtarget.evaluation.contenders import find_contenders, recorded_rows
    from qtarget.evaluation.records import refuse_earlier

    options = Options(metric, pattern, ignore_case, forgetting_metric, not no_generate, temperature, samples, limit)
    if resume and overwrite:
        raise ConfigError("--resume goes on with what --overwrite replaces; leave one of them out")
    if no_nll and no_generate:
        raise ConfigError("--no-nll and --no-generate leave nothing to do; leave one of them out")
    judges = options.judges(forgetting)
    names = served_names(served, url)
    for option, rows_file in (("--data", data), ("--forgetting", forgetting)):
        if rows_file is not None:
            check_files(rows_file, option)
    refuse_mistyped([*models, *([base] if base else [])])
    contenders = find_contenders(models, base)
    asks_other = data is not None
    if data is None:
        data = recorded_rows(contenders)
        typer.echo(f"rows: {data}, the validation file of the run")
    rows = rows_as_trained(contenders, data, limits)
    output = output or default_output(models)
    page = page or output.with_suffix(".html")
    records_file = output.with_suffix(ROWS_SUFFIX)
    inputs = [data, forgetting, *(path for one in contenders if (path := Path(one.model)).is_dir())]
    mark = Mark.of("evaluate", [*models, data, forgetting])
    refuse_earlier(records_file, resume or overwrite)
    check_outputs({"--output": output, "--page": page}, inputs, mark=mark, replaces=overwrite)
    check_outputs(
        {"the records": records_file}, inputs, replaces=True
    )  # lines of ours, which a resumed run goes on with
    texts = [options.read("data", data, judges[0], rows)]
    if forgetting is not None:
        texts.append(options.read("forgetting", forgetting, judges[1], rows_as_trained(contenders, forgetting, limits)))
    server = None if url is None else connect(url, engine, names, contenders)

    from qtarget.evaluation.evaluate import Choices, Evaluation, plan
    from qtarget.evaluation.generation import Decoding
    from qtarget.evaluation.records import Records

    choices = Choices(
        not no_nll, Decoding(temperature, samples, seed), max_new_tokens, batch_size, trust_remote_code, server
    )
    sets = [part.with_dataset() for part in texts]
    with held(output, mark=mark, replaces=overwrite):
        if overwrite:
            records_file.unlink(missing_ok=True)
        records = Records(records_file, plan(contenders, sets, choices), resume=resume)
        with bounded_templates(rows.limits.template_seconds), progress_bar(BETWEEN_LINES) as advance:
            evaluation = Evaluation(contenders, sets, choices, records, advance)
            document = write_up(evaluation, evaluation.run(), contenders, sets, choices)
        save(document, output, page, mark)
    print_evaluation(document)
    say_written([output, page, records_file])
    command = None if asks_other else comparison_of(models, contenders[-1].settings, options.judged_by(forgetting))
    if command is not None:
        typer.echo(f"next, whether another target does better on these rows:\n  {command}")


def rows_as_trained(contenders: Sequence[Contender], rows: Path, limits: str | None) -> ReadOptions:
    """How rows are read: as the runs among the contenders read theirs, of which this may be the validation file.

    Args:
        rows: their file; another than the runs' own may have another shape, and no tools.
        limits: ``--limits``; without it the runs'.

    Raises:
        ConfigError: the runs read rows in different ways.
        DataError: a tools file that is no longer there, or holds no schemas.
    """
    from qtarget.cli.options.datasets import options_elsewhere, options_of

    own = [one for one in contenders if _validated_on(one, rows)]
    read = options_of if own else options_elsewhere
    runs = own or [one for one in contenders if one.settings]
    given = next((found for one in runs if (found := one.settings.get("limits")) is not None), None)
    ways = {one.name: read({**one.settings, "limits": limits or given}) for one in runs}
    for name, way in ways.items():
        if way != (first := next(iter(ways.values()))):
            theirs = [field.name for field in fields(way) if getattr(way, field.name) != getattr(first, field.name)]
            raise ConfigError(
                f"{next(iter(ways))} and {name} read rows in different ways ({', '.join(theirs)}); evaluate one at a time"
            )
    return next(iter(ways.values()), read({"limits": limits}))


def _validated_on(contender: Contender, rows: Path) -> bool:
    named = contender.settings.get("validation_file")
    named = named if isinstance(named, list) else [named]
    return os.path.abspath(rows) in [os.path.abspath(one) for one in named if one is not None]


def refuse_mistyped(names: Sequence[str]) -> None:
    """Raise where a name without a slash is nearly that of a folder here.

    Raises:
        ConfigError: names the folder.
    """
    from qtarget.storage.folders import missing_folder

    for name in names:
        if "/" not in name and (words := missing_folder(name)) is not None:
            raise ConfigError(words)


def comparison_of(models: Sequence[str], settings: Mapping[str, Any], judged: Sequence[str]) -> str | None:
    """What compares other targets on the rows of the only run among the models, or goes on with it; None where there are
    several or none, or where they were compared.

    Args:
        settings: that the run recorded.
        judged: options that say how answers are judged.
    """
    from qtarget.cli.compared import comparison_folder
    from qtarget.cli.options.settings import RL
    from qtarget.command import from_here
    from qtarget.comparison.kept import DOCUMENT, PLAN
    from qtarget.report.runs.records import CONFIG_FILE

    if len(models) != 1 or not (config := Path(models[0]) / CONFIG_FILE).is_file() or settings.get("algorithm") == RL:
        return None
    folder = comparison_folder(models[0])
    if (folder / DOCUMENT).is_file():
        return None
    began = ["--resume"] if (folder / PLAN).is_file() else []
    return shlex.join(["qtarget", "compare", from_here(config), *judged, *began])


def default_output(models: Sequence[str]) -> Path:
    """Beside the runs among the models, else in the current folder."""
    from qtarget.cli.options.outputs import beside_runs, named_after
    from qtarget.report.runs.records import is_run

    paths = [path for name in models if (path := Path(name)).is_dir() and (is_run(path) or is_run(path.parent))]
    if paths:
        return beside_runs(paths, "evaluation.json")
    return Path(named_after([Path(name).resolve().name for name in models], "evaluation.json"))


@dataclass(frozen=True)
class Options:
    """What the user said about rows and judges; checked before anything heavy is imported."""

    metric: str | None
    pattern: str | None
    ignore_case: bool
    forgetting_metric: str | None
    generate: bool
    temperature: float
    samples: int
    limit: int | None

    def judges(self, forgetting: Path | None) -> list[Judge | None]:
        """Of ``--data`` and of ``--forgetting``; None where nothing is completed.

        Raises:
            ConfigError: options that contradict each other.
        """
        from qtarget.evaluation.judges import make_judge

        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(f"--samples {self.samples} at --temperature 0 would all be the same; set --temperature")
        if forgetting is None and self.forgetting_metric is not None:
            raise ConfigError("--forgetting-metric judges the rows of --forgetting; name that file")
        if not self.generate:
            if self.metric is not None or self.pattern is not None or self.ignore_case:
                raise ConfigError(
                    "--metric, --pattern and --ignore-case judge completions; leave them or --no-generate out"
                )
            return [None, None]
        metric = self.metric or "exact"
        judge = make_judge(metric, pattern=self.pattern, ignore_case=self.ignore_case)
        other = self.forgetting_metric
        if other is None or other == "none":
            return [judge, judge if other is None else None]
        pattern = self.pattern if other == "regex" else None
        return [judge, make_judge(other, pattern=pattern, ignore_case=self.ignore_case and other in ("exact", "regex"))]

    def judged_by(self, forgetting: Path | None) -> list[str]:
        """The options that say how answers are judged."""
        named = {
            "--metric": self.metric,
            "--pattern": self.pattern,
            "--forgetting": None if forgetting is None else str(forgetting),
            "--forgetting-metric": self.forgetting_metric,
        }
        given = [part for option, value in named.items() if value is not None for part in (option, value)]
        return given + (["--ignore-case"] if self.ignore_case else [])

    def read(self, name: Literal["data", "forgetting"], path: Path, judge: Judge | None, options: ReadOptions) -> Rows:
        """Rows of a file, as questions where they have answers.

        Raises:
            DataError: the file is unusable, or ``--metric`` asks for answers that its rows have not.
        """
        from qtarget.data.loading import announce, read_files
        from qtarget.evaluation.questions import ask, has_answers

        found = read_files(path, options)
        announce(found, str(path))
        rows = found.rows[: self.limit]
        asked = judge is not None and (has_answers(rows) or (name == "data" and self.metric is not None))
        if judge is not None and not asked:
            typer.echo(f"{path}: rows without answers; their likelihood is scored, and nothing is completed")
        return Rows(
            name,
            path,
            replace(found, rows=rows),
            options,
            ask(rows, judge, path.name) if asked and judge else None,
            judge if asked else None,
        )


@dataclass(frozen=True)
class Rows:
    """A set before the libraries are there that make a data set of it."""

    name: Literal["data", "forgetting"]
    path: Path
    reading: Reading
    options: ReadOptions
    questions: Any
    judge: Judge | None

    def with_dataset(self) -> RowSet:
        """The set that the evaluation takes."""
        from qtarget.data.loading import dataset_of
        from qtarget.evaluation.evaluate import RowSet

        return RowSet(self.name, self.path.name, dataset_of(self.reading, self.options), self.questions, self.judge)


def served_names(served: Sequence[str] | None, url: str | None) -> dict[str, str]:
    """``--served MODEL=ID`` as a dictionary.

    Raises:
        ConfigError: one is not of that form, or there is no ``--url``.
    """
    if served and url is None:
        raise ConfigError("--served says what a server calls a model; give its --url")
    pairs = [one.partition("=") for one in served or []]
    if wrong := [one[0] for one in pairs if not (one[0] and one[2])]:
        raise ConfigError(f"--served {wrong[0]}: expected MODEL=ID")
    return {one[0]: one[2] for one in pairs}


def connect(url: str, engine: str, names: dict[str, str], contenders: Sequence[Contender]) -> Served:
    """Ask a server once what it serves, and say who completes where.

    Raises:
        ScoringServerError: it fails.
        ConfigError: it serves none of the models.
    """
    from qtarget.evaluation.evaluate import Served
    from qtarget.evaluation.served import match_served, served_models
    from qtarget.scoring.sources.http import Endpoint

    endpoint = Endpoint(url)
    ids = match_served(contenders, served_models(endpoint), names, url)
    for one in contenders:
        typer.echo(f"{one.name} completes {f'at {url} as {ids[one.name]}' if one.name in ids else 'here'}")
    return Served(endpoint, engine, ids)


def write_up(
    evaluation: Evaluation, results: Any, contenders: Sequence[Contender], sets: Sequence[RowSet], choices: Choices
) -> dict[str, Any]:
    """The document of a finished evaluation."""
    from qtarget.report.evaluation.document import Entry, evaluation_document

    by_place = {one.model: one.name for one in contenders}
    entries = [
        Entry(one.name, one.model, by_place.get(one.base) if one.base else None, **evaluation.facts[one.name])
        for one in contenders
    ]
    about = {
        one.name: {
            "file": one.file, "rows": len(one.dataset), "fingerprint": one.fingerprint,
            "metric": one.judge.name if one.judge else None,
        }
        for one in sets
    }  # fmt: skip
    texts = {
        one.name: None
        if one.questions is None
        else [{"prompt": q.text, "reference": q.reference} for q in one.questions]
        for one in sets
    }
    where = (
        {} if choices.served is None else {"completed by": choices.served.engine, "url": choices.served.endpoint.url}
    )
    settings = asdict(choices.decoding) | {"batch_size": choices.batch_size} | where
    return evaluation_document(entries, about, results, settings=settings, texts=texts, seed=choices.decoding.seed)


def save(document: dict[str, Any], output: Path, page: Path, mark: Mark) -> None:
    """Write both files, each whole or not at all."""
    from qtarget.cli.options.outputs import write_numbers, write_page
    from qtarget.report.evaluation.page import evaluation_page

    write_numbers(output, document, mark)
    write_page(page, evaluation_page(document), mark)


def print_evaluation(document: dict[str, Any]) -> None:
    """A table a set, the notes, and the finding."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from qtarget.report.evaluation.document import nats, percent, points

    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    for name, about in document["sets"].items():
        table = Table(
            box=box.SIMPLE, caption=f"{name}: {about['file']}, {counted(about['rows'], 'row')}; 95 % intervals"
        )
        for column in ("model", "completed", "to the base", "nll, nats a token", "to the base"):
            table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
        for one in document["contenders"]:
            found: dict[str, Any] = one["sets"][name]
            to: dict[str, Any] = found["to_base"] or {"completion": None, "nll": None}
            cells = (
                one["name"] + (" (base)" if one["base"] is None else ""),
                percent(found["completion"]) if found["completion"] else "-",
                points(to["completion"]) if to["completion"] else "-",
                nats(found["nll"]) if found["nll"] else "-",
                nats(to["nll"], "+") if to["nll"] else "-",
            )
            table.add_row(*map(Text, cells))
        console.print(table)
    for one in document["contenders"]:
        for note in one["notes"]:
            console.print(Text(f"{one['name']}: {note}", style="yellow"), soft_wrap=True)
    console.print(Text(document["finding"]), soft_wrap=True)
