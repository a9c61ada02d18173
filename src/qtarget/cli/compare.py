"""``qtarget compare``: which target, and does it help, on the user's own rows."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qtarget.core.errors import ConfigError

if TYPE_CHECKING:
    from qtarget.cli.options.config import RunConfig
    from qtarget.cli.options.recipe import ConfigRecipe
    from qtarget.comparison.compare import Found
    from qtarget.comparison.jobs import Contender
    from qtarget.comparison.sets import Metric

KEY = "compare"
"""Of a config: a list of contenders, for `qtarget compare` alone."""
TARGETS, RATES = "sft,consensus,dft", "0.3,1,3"
PLAN, DOCUMENT, PAGE, REFERENCE = "plan.json", "comparison.json", "comparison.html", "reference"
TOP_K = 32
"""Log-probs a token of a reference cache that is made here, where a contender reads a distribution."""
PIPED_WIDTH = 160


def compare(
    context: typer.Context,
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="As for `qtarget train`, with validation_file.")
    ],
    targets: Annotated[
        str | None,
        typer.Option(help=f"Names, name(key=value) or module:Class; default: {TARGETS} and the config's own."),
    ] = None,
    filters: Annotated[str, typer.Option(help="none, auto, or both: none,auto.")] = "none",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each contender, at its tuned learning rate.")] = 3,
    rates: Annotated[str, typer.Option(help="Learning rates tried, as multiples of the config's.")] = RATES,
    metric: Annotated[
        str | None,
        typer.Option(
            help="exact, regex, number, json, nll, or your module:function; default: exact, nll without answers."
        ),
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="For regex; its first group is the answer.")] = None,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", help="For exact and regex.")] = False,
    forgetting: Annotated[Path | None, typer.Option(help="Rows of what the base could do before.")] = None,
    forgetting_metric: Annotated[str | None, typer.Option(help="As --metric; default: --metric's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default: the config's output_dir with -compare.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the finished runs there.")] = False,
    budget: Annotated[
        str | None, typer.Option(help="90s, 30m, 2h: plans what fits, and says what it leaves out.")
    ] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a GPU, else one a core.")] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Who runs the processes.")] = "local",
    ray_address: Annotated[str | None, typer.Option(help="Of a running cluster; default: this machine.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows measured at once.")] = 32,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; see `qtarget evaluate`.")] = None,
) -> None:
    """Train contenders alike, judge them on the config's validation rows, and say which to take."""
    from qtarget.cli.options.config import build_config
    from qtarget.cli.options.contenders import find_contenders, split_outside
    from qtarget.cli.options.settings import read_settings
    from qtarget.comparison.budget import Plan, parse_budget

    begin = time.monotonic()
    sys.path.insert(0, str(Path.cwd()))  # a target or a metric of the user's lies in the current folder
    seconds = None if budget is None else parse_budget(budget)
    grid = parse_rates(rates)
    metrics = _metrics(metric, pattern, ignore_case, forgetting, forgetting_metric)
    settings = read_settings(config, context.args)
    listed = settings.pop(KEY, None)
    keys = {key: setting.value for key, setting in settings.items()}
    wanted = targets_of(targets, None if listed is None else listed.value, keys)
    contenders = find_contenders(wanted, split_outside(filters), keys)
    run = build_config(settings, config)
    if run.data.validation_file is None and run.data.dataset_name is None:
        raise ConfigError(
            f"{config}: validation_file is missing; a verdict needs rows with answers that no contender is trained on"
        )
    folder = output or Path(str(run.training.output_dir)).with_name(
        Path(str(run.training.output_dir)).name + "-compare"
    )
    request = Request(run, config, contenders, metrics, forgetting, folder, batch_size, max_new_tokens)
    learning_rates = tuple(float(run.training.learning_rate) * factor for factor in grid)
    plan = Plan(tuple(one.name for one in contenders), learning_rates, seeds)
    document = request.run(plan, resume, seconds, at_once, engine, ray_address, begin)
    print_comparison(document, [folder / DOCUMENT, folder / PAGE])


def parse_rates(text: str) -> tuple[float, ...]:
    """Factors, 1 first if it is among them: of equals the first is taken.

    Raises:
        ConfigError: not positive numbers.

    Example:
        >>> parse_rates("0.3,1,3")
        (1.0, 0.3, 3.0)
    """
    try:
        found = list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = []
    if not found or not all(0 < value < math.inf for value in found):
        raise ConfigError(f"--rates {text!r}; expected multiples of the config's learning rate, such as {RATES}")
    return tuple(sorted(found, key=lambda value: value != 1.0))


def targets_of(text: str | None, listed: Any, config: Mapping[str, Any]) -> list[Any]:
    """What ``--targets`` names, else the config's list, else the usual ones and the config's own.

    Raises:
        ConfigError: the list is none.
    """
    from qtarget.cli.options.contenders import split_outside

    if text is not None:
        return split_outside(text)
    if listed is not None:
        if not isinstance(listed, list) or not listed or not all(isinstance(one, str | dict) for one in listed):
            raise ConfigError(
                f"{KEY} is {listed!r}; expected a list of targets: names, or keys such as {{target: dft}}"
            )
        return listed
    own = config.get("target")
    usual = TARGETS.split(",")
    return usual + ([str(own)] if own and own not in usual else [])


def _metrics(
    metric: str | None, pattern: str | None, ignore_case: bool, forgetting: Path | None, other: str | None
) -> dict[str, Metric]:
    from qtarget.comparison.sets import Metric

    if forgetting is None and other is not None:
        raise ConfigError("--forgetting-metric judges the rows of --forgetting; name that file")
    data = Metric(metric or "exact", pattern, ignore_case, metric is not None and metric != "nll")
    data.judge()  # which says what is wrong with it before anything heavy
    if forgetting is None:
        return {"data": data}
    name = other or data.name
    second = Metric(name, pattern if name == "regex" else None, ignore_case and name in ("exact", "regex"))
    second.judge()
    return {"data": data, "forgetting": second}


class Request:
    """One comparison as the user asked for it, from a config to a document."""

    def __init__(
        self, run: RunConfig, path: Path, contenders: Sequence[Contender], metrics: Mapping[str, Metric],
        forgetting: Path | None, folder: Path, batch_size: int, max_new_tokens: int | None,
    ) -> None:  # fmt: skip
        self.config, self.path, self.contenders, self.metrics = run, path, contenders, metrics
        self.forgetting, self.folder = forgetting, folder
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    def run(
        self, plan: Any, resume: bool, seconds: float | None, at_once: int | None, engine: Any, address: str | None,
        begin: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Hold the folder, run what is missing, write document and page."""
        from qtarget.cli.options.interrupts import on_interrupt
        from qtarget.storage.folders import COMPARISON, owned

        read = [*self.config.inputs, self.forgetting, self.path]
        words = "finished runs are kept, those under way are not: the same command with --resume goes on"
        with ExitStack() as stack:
            stack.enter_context(owned(self.folder, COMPARISON, inputs=read))
            stack.enter_context(on_interrupt(lambda: words))
            sets, kept = self._sets()
            self._claim(resume, sets)
            recipe = self._recipe()
            contenders, left = self._able(recipe)
            document = self._document(
                recipe, contenders, left, plan, sets, kept, seconds, at_once, engine, address, begin
            )
            save(document, self.folder)
        return document

    def _sets(self) -> tuple[list[Any], dict[str, dict[str, Any]]]:
        """The sets, and what is said of them in the document."""
        from qtarget.cli.options.datasets import load_datasets
        from qtarget.comparison.sets import measured_set
        from qtarget.data.loading import load_dataset_file

        self.train_rows, validation = load_datasets(self.config)
        data = {"data": (self.config.data.validation_file or self.config.data.dataset_name, validation)}
        if self.forgetting is not None:
            data["forgetting"] = (str(self.forgetting), load_dataset_file(self.forgetting))
        sets, about = [], {}
        for name, (file, dataset) in data.items():
            shown = Path(file[0] if isinstance(file, list) else str(file)).name
            rows, kept = measured_set(name, shown, dataset, self.metrics[name])  # pyright: ignore[reportArgumentType]
            sets.append(rows)
            about[name] = {
                "file": shown, "rows": len(kept), "not_judged": len(dataset) - len(kept), "fingerprint": rows.fingerprint,
                "metric": rows.judge.name if rows.judge else "nll",
            }  # fmt: skip
            if len(dataset) > len(kept):
                typer.echo(f"{shown}: {len(dataset) - len(kept)} of {len(dataset)} rows have no answer that "
                           f"--metric {self.metrics[name].name} can judge, and are not measured")  # fmt: skip
        self.about = about
        return sets, about

    def _claim(self, resume: bool, sets: Sequence[Any]) -> None:
        """Leave the plan in the folder, or see that it is the same."""
        from qtarget.comparison.compare import RUNS
        from qtarget.evaluation.contenders import Contender, weights_digest
        from qtarget.evaluation.records import check_plan
        from qtarget.storage.files import digest, write_json

        file = self.folder / PLAN
        if (self.folder / RUNS).is_file() and not resume:
            raise ConfigError(
                f"--output {self.folder} holds an earlier comparison; --resume goes on with its finished runs (more --seeds "
                "and --targets are welcome), or choose another folder"
            )
        varied = ("output_dir", "target", "target_kwargs", "guard", "learning_rate", "reference_cache", "compare")
        model = str(self.config.model.model_name_or_path)
        rows = json.dumps(self.train_rows.to_list(), sort_keys=True, default=str).encode()
        now = {
            "settings": {key: str(value) for key, value in self.config.given.items() if key not in varied},
            "model": weights_digest(Contender(model, model, model)),
            "rows": {"train": digest(rows)} | {one.name: one.fingerprint for one in sets},
            "metrics": {name: vars(metric) for name, metric in self.metrics.items()},
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
        }
        if file.is_file():
            check_plan(file, json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(now)))
        write_json(file, now)

    def _recipe(self) -> ConfigRecipe:
        """The config with one reference cache for all, scored here if it names none."""
        from qtarget.cli.options.recipe import ConfigRecipe

        given = {key: value for key, value in self.config.given.items() if key != KEY}
        forgetting = None if self.forgetting is None else str(self.forgetting.resolve())
        recipe = ConfigRecipe(self.path.resolve(), given, forgetting)
        needs = frozenset[str]()
        for one in self.contenders:
            needs |= recipe.config({**one.overrides, "filter": "none"}).training.build_target().needs.reference
        if given.get("reference_cache") is not None or not (needs or any(one.filtered for one in self.contenders)):
            return recipe
        cache = (self.folder / REFERENCE).resolve()
        score_once(recipe.config({"target": "sft"}), cache, TOP_K if "distribution" in needs else 0)
        return ConfigRecipe(recipe.path, given | {"reference_cache": str(cache)}, forgetting)

    def _able(self, recipe: ConfigRecipe) -> tuple[list[Contender], list[str]]:
        """Contenders whose frozen models are there, and whose filter can tell rows apart; and who is left out, why.

        Raises:
            MissingStatisticError: a contender needs what the config does not name.
        """
        from qtarget.cli.options.recipe import why_not_filtered
        from qtarget.integrations.shared.frozen import open_caches

        for one in self.contenders:
            training = recipe.config({**one.overrides, "filter": "none"}).training
            open_caches(training, training.build_target(), {"reference": None, "teacher": None})
        reasons: dict[str, str | None] = {}
        able, left = [], []
        for one in self.contenders:
            rule = json.dumps(one.overrides.get("filter"))
            if one.filtered and rule not in reasons:
                reasons[rule] = why_not_filtered(recipe, one.overrides["filter"])
            why = reasons.get(rule) if one.filtered else None
            able += [one] if why is None else []
            left += [] if why is None else [f"{one.name}: {why}"]
        for line in left:
            typer.echo(line)
        return able, left

    def _document(
        self, recipe: ConfigRecipe, contenders: Sequence[Contender], left: list[str], plan: Any, sets: Sequence[Any],
        about: Mapping[str, Mapping[str, Any]], seconds: float | None, at_once: int | None, engine: Any,
        address: str | None, begin: float,
    ) -> dict[str, Any]:  # fmt: skip
        from dataclasses import replace

        from qtarget.cli.options.outputs import progress_bar
        from qtarget.comparison.compare import Comparison
        from qtarget.comparison.halves import halves, prompt_groups
        from qtarget.comparison.pools import at_once_here, pool, visible_gpus
        from qtarget.comparison.worker import Setting
        from qtarget.evaluation.evaluate import Choices

        gpus = [] if self.config.training.use_cpu else visible_gpus()
        count = at_once or at_once_here(gpus)
        choices = Choices(batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        files = {name: str(one["file"]) for name, one in about.items()}
        setting = Setting(recipe, tuple(contenders), dict(self.metrics), files, choices)
        rows = sets[0].dataset.to_list()
        parts = halves(rows)
        left_seconds = None if seconds is None else seconds - (time.monotonic() - begin)
        plan = replace(plan, contenders=tuple(one.name for one in contenders))
        with progress_bar() as advance, pool(engine, count, gpus, setting, address) as workers:
            comparison = Comparison(self.folder, workers, parts, at_once=count, seconds=left_seconds, advance=advance)
            found = comparison.run(plan)
        found.left_out[:0] = left
        cost = {"seconds": round(time.monotonic() - begin, 1), "at_once": count, "engine": engine, "gpus": len(gpus)}
        return self._write_up(found, contenders, parts, prompt_groups(rows), sets, cost)

    def _write_up(
        self, found: Found, contenders: Sequence[Contender], parts: Sequence[int], groups: Sequence[int],
        sets: Sequence[Any], cost: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        from qtarget.comparison.assemble import base_entry, entry_of
        from qtarget.comparison.sets import row_texts
        from qtarget.report.comparison.document import comparison_document

        model = Path(str(self.config.model.model_name_or_path)).name
        entries = [entry_of(found, one, parts, self.folder) for one in contenders if one.name in found.plan.contenders]
        runs = [*(r for rates in found.tuning.values() for r in rates.values()), *found.final.values(), found.base]
        cost |= {"runs": len(runs), "run_seconds": round(sum(r["seconds"] for r in runs), 1),
                 "cpu_seconds": round(sum(r["cpu_seconds"] for r in runs), 1)}  # fmt: skip
        settings = {
            "config": self.path.name, "model": str(self.config.model.model_name_or_path), "steps": found.base["steps"],
            "training rows": len(self.train_rows), "learning rates tried": sorted(found.plan.rates),
            "seeds": found.plan.seeds, "batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens,
        }  # fmt: skip
        return comparison_document(
            base_entry(found, f"{model} (untrained)", self.folder), entries, groups=groups, sets=self.about,
            settings=settings, rows=row_texts(sets[0]), left_out=found.left_out, cost=cost,
        )  # fmt: skip


def score_once(config: RunConfig, folder: Path, top_k: int) -> None:
    """The reference cache of a comparison; one that is finished there is taken as it is."""
    from qtarget.cli.score import print_scored, run_scoring
    from qtarget.scoring.cache.reader import ReferenceCache
    from qtarget.scoring.cache.schema import MANIFEST

    if (folder / MANIFEST).is_file() and ReferenceCache.open(folder).manifest.top_k >= top_k:
        return
    import shutil

    if (folder / MANIFEST).is_file():
        shutil.rmtree(folder)  # ours, and of a comparison that needed less of it
    begin = time.perf_counter()
    manifest = run_scoring(config, folder, top_k, "bucket")
    print_scored(manifest, folder, time.perf_counter() - begin)


def save(document: dict[str, Any], folder: Path) -> None:
    """Write document and page, each whole or not at all."""
    from qtarget.report.comparison.page import comparison_page
    from qtarget.storage.files import write_atomic

    write_atomic(folder / DOCUMENT, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(folder / PAGE, comparison_page(document).encode(errors="replace"))


def print_comparison(document: dict[str, Any], written: Sequence[Path]) -> None:
    """The table, the notes, what was left out, the verdict, and where the files are."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from qtarget.report.comparison.document import level_words, memory_words
    from qtarget.report.comparison.verdict import Measure, amount

    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    measure = Measure(**document["measure"])
    about = document["sets"]["data"]
    table = Table(
        box=box.SIMPLE, caption=f"{about['file']}, {about['rows']:,} rows by {about['metric']}; {measure.seeds} seeds; 95 % "
        "intervals that hold for all contenders together",
    )  # fmt: skip
    for column in (
        "contender",
        "rate",
        "level",
        f"to {document['baseline']}",
        "nll",
        "forgetting",
        "s a run",
        "memory",
    ):
        table.add_column(column, justify="left" if column == "contender" else "right", overflow="fold")
    for one in [document["base"], *document["contenders"]]:
        forgotten = one["forgetting"]["to_base"] if one["forgetting"] else None
        other = Measure(document["sets"].get("forgetting", about)["metric"], 0, 0)
        cells = (
            one["name"],
            "-" if one["best_rate"] is None else f"{one['best_rate']:g}",
            level_words(one["level"], measure),
            "-" if one["to_baseline"] is None else amount(one["to_baseline"], measure),
            "-" if one["nll"] is None else f"{one['nll']:.3f}",
            "-" if forgotten is None else amount(forgotten, other, ends=False),
            f"{sum(one['seconds']) / len(one['seconds']):.1f}",
            memory_words(one["memory_bytes"]),
        )
        table.add_row(*map(Text, cells))
    console.print(table)
    for one in document["contenders"]:
        for note in one["notes"]:
            console.print(Text(f"{one['name']}: {note}", style="yellow"), soft_wrap=True)
    for line in document["left_out"]:
        console.print(Text(f"left out: {line}", style="yellow"), soft_wrap=True)
    console.print(Text(document["finding"]), soft_wrap=True)
    console.print(Text(", ".join(map(str, written))), soft_wrap=True)
