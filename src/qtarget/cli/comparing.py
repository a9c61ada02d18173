"""One comparison as the user asked for it: from a config to a document, in a folder that is held meanwhile."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qtarget.cli.options.frozen import FROZEN_KEYS
from qtarget.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from qtarget.cli.options.config import RunConfig
    from qtarget.cli.recipe import ConfigRecipe
    from qtarget.comparison.budget import Plan
    from qtarget.comparison.compare import Found
    from qtarget.comparison.jobs import Contender
    from qtarget.comparison.pools import Engine
    from qtarget.comparison.sets import Metric
    from qtarget.evaluation.evaluate import RowSet, SetName

PAGE = "comparison.html"


@dataclass(frozen=True)
class Machine:
    """What there is to run on.

    Attributes:
        seconds: of the budget, or None.
        at_once: processes; None: one a GPU, else one a core.
        address: of a Ray cluster.
        begin: when the command began, by the monotonic clock.
    """

    seconds: float | None
    at_once: int | None
    engine: Engine
    address: str | None
    begin: float


class Request:
    """One comparison as the user asked for it, from a config to a document."""

    def __init__(
        self, run: RunConfig, path: Path, contenders: Sequence[Contender], metrics: Mapping[SetName, Metric],
        forgetting: Path | None, folder: Path, batch_size: int, max_new_tokens: int | None,
    ) -> None:  # fmt: skip
        self.config, self.path, self.contenders, self.metrics = run, path, contenders, metrics
        self.forgetting, self.folder = forgetting, folder
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.about: dict[str, dict[str, Any]] = {}
        self.questions: list[str] = []
        self.numbers: dict[str, list[int]] = {}

    def run(self, plan: Plan, machine: Machine, *, resume: bool) -> dict[str, Any]:
        """Hold the folder, run what is missing, write document and page."""
        from qtarget.benchmarks.pool import quiet_libraries
        from qtarget.cli.options.interrupts import on_interrupt
        from qtarget.comparison.kept import DOCUMENT, claim, keep_earlier
        from qtarget.evaluation.generation import quiet
        from qtarget.storage.folders import COMPARISON, owned

        read = [*self.config.inputs, self.forgetting, self.path]
        words = "finished runs are kept, those under way are not: the same command with --resume goes on"
        with ExitStack() as stack:
            stack.enter_context(owned(self.folder, COMPARISON, inputs=read))
            stack.enter_context(on_interrupt(lambda: words))
            stack.enter_context(quiet("qtarget.integrations.shared.teacher"))  # which caches are, was said once
            self._refuse_teacherless()
            sets = self._sets()
            if said := claim(self.folder, self._plan(sets), sets, resume=resume):
                typer.echo(said)
                if kept := keep_earlier(self.folder, (DOCUMENT, PAGE)):
                    typer.echo(kept)
            recipe = self._recipe()
            stack.enter_context(quiet_libraries())  # many trainings would fill a screen
            contenders, left = self._able(recipe)
            document = self._document(recipe, contenders, left, plan, sets, machine)
            save(document, self.folder)
        return document

    def _refuse_teacherless(self) -> None:
        """Before anything is read or scored.

        Raises:
            ConfigError: a contender asks a teacher, and the config names none.
        """
        if any(self.config.given.get(key) is not None for key in FROZEN_KEYS["teacher"]):
            return
        for one in self.contenders:
            if self._plain[one.name].training.build_target().needs.teacher:
                raise ConfigError(
                    f"{one.name} needs a frozen teacher, and {self.path} names none; add `--teacher MODEL`, a model's folder (the "
                    "base itself, where there is no other), or leave that contender out"
                )

    def _sets(self) -> list[RowSet]:
        """The sets; what is said of them in the document is in ``about``."""
        from qtarget.cli.options.datasets import load_datasets, load_elsewhere
        from qtarget.comparison.sets import measured_set, unseen
        from qtarget.data.overlap import content_hashes
        from qtarget.data.prompts import questions_of

        self.train_rows, validation = self.rows = load_datasets(self.config, overlap=False)
        assert validation is not None, "a config without validation rows was refused"
        data: dict[Any, Any] = {"data": (self.config.data.validation_file or self.config.data.dataset_name, validation)}
        if self.forgetting is not None:
            data["forgetting"] = (str(self.forgetting), load_elsewhere(self.forgetting, self.config))
        sets = []
        for name, (file, dataset) in data.items():
            shown = Path(file[0] if isinstance(file, list) else str(file)).name
            numbers: Sequence[int] = range(len(dataset))
            if name == "data":
                field = self.config.training.dataset_text_field
                every = len(dataset)
                dataset, numbers = unseen(shown, dataset, content_hashes(self.train_rows, field), field)
                if len(dataset) < every:
                    typer.echo(
                        f"{shown}: {every - len(dataset)} of {every} rows are training rows too, and judge nobody"
                    )
            rows, kept = measured_set(name, shown, dataset, self.metrics[name], numbers)
            sets.append(rows)
            self.numbers[name] = kept
            self.about[name] = {
                "file": shown, "rows": len(kept), "not_judged": len(dataset) - len(kept), "fingerprint": rows.fingerprint,
                "metric": rows.judge.name if rows.judge else "nll",
            }  # fmt: skip
            if len(dataset) > len(kept):
                typer.echo(f"{shown}: {len(dataset) - len(kept)} of {len(dataset)} rows have no answer that "
                           f"--metric {self.metrics[name].name} can judge, and are not measured")  # fmt: skip
        self.questions = questions_of(sets[0].dataset.to_list(), self.config.training.dataset_text_field)
        if len(set(self.questions)) < 2:
            raise DataError(
                f"{self.about['data']['file']}: all rows to judge by are one row, again and again; expected many different ones"
            )
        return sets

    def _plan(self, sets: Sequence[RowSet]) -> dict[str, Any]:
        """What the finished runs in the folder depend on."""
        from qtarget.cli.recipe import OWN
        from qtarget.comparison.kept import CONTENDERS, METRICS, model_digest
        from qtarget.evaluation.evaluate import rows_digest, weights_rule

        varied = {"output_dir", "learning_rate", *OWN, *(key for keys in FROZEN_KEYS.values() for key in keys)}
        return {
            "settings": {key: str(value) for key, value in self.config.given.items() if key not in varied},
            "model": model_digest(str(self.config.model.model_name_or_path)),
            "rows": {"train": rows_digest(self.train_rows)} | {one.name: one.fingerprint for one in sets},
            METRICS: {name: vars(metric) | own_judge(metric.name) for name, metric in self.metrics.items()},
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            CONTENDERS: {one.name: self._own(one) for one in self.contenders},
            **weights_rule(sets, {}),  # the keys beside the rule are among the settings
        }

    def _own(self, one: Contender) -> dict[str, Any]:
        """What a contender's own runs depend on: its keys, its source, and the frozen models that it asks."""
        from qtarget.cli.missing import asks_witness

        config = self._plain[one.name]
        needs, given = config.training.build_target().needs, self.config.given
        asked = {
            "reference": bool(needs.reference) or one.filtered,
            "teacher": bool(needs.teacher),
            "witness": asks_witness(config, one.overrides.get("filter")) is not None,
        }
        frozen = {k: str(given[k]) for role, keys in FROZEN_KEYS.items() if asked[role] for k in keys if k in given}
        return dict(one.overrides) | own_source(one.overrides["target"]) | frozen

    @cached_property
    def _plain(self) -> dict[str, RunConfig]:
        """Each contender's config, without its filter and before what is missing is made."""
        bare = self._bare()
        return {one.name: bare.config({**one.overrides, "filter": "none"}) for one in self.contenders}

    def _bare(self) -> ConfigRecipe:
        """The config as it was given."""
        from qtarget.cli.recipe import ConfigRecipe

        forgetting = None if self.forgetting is None else str(self.forgetting.resolve())
        return ConfigRecipe(self.path.resolve(), dict(self.config.given), forgetting)

    def _recipe(self) -> ConfigRecipe:
        """The config with one reference cache for all, and one cross-fit for those that ask it, made here if it names none."""
        from qtarget.cli.missing import asks_witness, reference_for, witness_for

        recipe = self._bare()
        needs, asked_by = frozenset[str](), None
        for one in self.contenders:
            contender = self._plain[one.name]
            needs |= contender.training.build_target().needs.reference
            asked_by = asked_by or asks_witness(contender, one.overrides.get("filter"))
        config = recipe.config({"target": "sft", "target_kwargs": None})
        if asked_by is not None:
            witness = os.path.abspath(witness_for(config, self.rows, f"{asked_by}, a contender"))
            recipe = replace(recipe, given={**recipe.given, "witness": witness})
        asked = config.training
        is_live = asked.reference == "live" or asked.reference_model_name_or_path is not None
        if is_live or not (needs or any(one.filtered for one in self.contenders)):
            return recipe
        cache = os.path.abspath(reference_for(config, self.rows, "all contenders"))
        return replace(recipe, given={**without(recipe.given, "reference_cache"), "reference": cache})

    def _able(self, recipe: ConfigRecipe) -> tuple[list[Contender], list[str]]:
        """Contenders whose frozen models are there, and whose filter can tell rows apart; and who is left out, why.

        Raises:
            MissingStatisticError: a contender needs what the config does not name.
        """
        from qtarget.cli.recipe import led_astray, why_not_filtered
        from qtarget.integrations.sft.arguments import run_live
        from qtarget.integrations.shared.frozen import open_caches, open_witness

        copies: dict[str, tuple[str, str | None]] = {}
        judged: tuple[str, str | None] | None = None  # all contenders have one base and one cross-fit
        for one in self.contenders:
            config = recipe.config({**one.overrides, "filter": "none"})
            training = config.training
            run_live(training, str(config.model.model_name_or_path))
            open_caches(training, training.build_target(), {"reference": None, "teacher": None})
            witness = open_witness(training.witness, training.build_target(), training.cache_verify_key)
            if witness is not None and training.reference_cache is not None:
                copies[one.name] = judged = judged or led_astray(witness, training.reference_cache)
        for line in dict.fromkeys(said for said, _ in copies.values() if said):
            typer.echo(line)
        able, idle = [], dict[str, list[str]]()
        told: dict[str, str | None] = {}
        for one in self.contenders:
            rule = json.dumps(one.overrides.get("filter"))
            if one.filtered and rule not in told:
                told[rule] = why_not_filtered(recipe, one.overrides["filter"], self.train_rows)
            why = (told.get(rule) if one.filtered else None) or copies.get(one.name, ("", None))[1]
            if why is None:
                able.append(one)
            else:
                idle.setdefault(why, []).append(one.name)
        left = [f"{'; '.join(names)}: {why}" for why, names in idle.items()]
        for line in left:
            typer.echo(line)
        return able, left

    def _document(
        self, recipe: ConfigRecipe, contenders: Sequence[Contender], left: list[str], plan: Plan, sets: Sequence[RowSet],
        machine: Machine,
    ) -> dict[str, Any]:  # fmt: skip
        from qtarget.cli.options.outputs import progress_bar
        from qtarget.comparison.compare import Comparison
        from qtarget.comparison.halves import groups_of, halves
        from qtarget.comparison.pools import at_once_here, pool, visible_gpus
        from qtarget.comparison.worker import Setting
        from qtarget.evaluation.evaluate import Choices

        gpus = [] if self.config.training.use_cpu else visible_gpus()
        count = machine.at_once or at_once_here(gpus)
        choices = Choices(batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        files = {name: str(one["file"]) for name, one in self.about.items()}
        field = self.config.training.dataset_text_field
        setting = Setting(recipe, tuple(contenders), dict(self.metrics), files, choices, field)
        parts = halves(self.questions)
        left_seconds = None if machine.seconds is None else machine.seconds - (time.monotonic() - machine.begin)
        plan = replace(plan, contenders=tuple(one.name for one in contenders))
        with progress_bar() as advance, pool(machine.engine, count, gpus, setting, machine.address) as workers:
            comparison = Comparison(self.folder, workers, parts, at_once=count, seconds=left_seconds, advance=advance)
            found = comparison.run(plan)
        found.left_out[:0] = left
        cost = {
            "seconds": round(time.monotonic() - machine.begin, 1),
            "at_once": count,
            "engine": machine.engine,
            "gpus": len(gpus),
        }
        return self._write_up(found, contenders, parts, groups_of(self.questions), sets, cost)

    def _write_up(
        self, found: Found, contenders: Sequence[Contender], parts: Sequence[int], groups: Sequence[int],
        sets: Sequence[RowSet], cost: dict[str, Any],
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
            settings=settings, rows=row_texts(sets[0], self.numbers["data"]), left_out=found.left_out, cost=cost,
        )  # fmt: skip


def own_source(target: str) -> dict[str, str]:
    """What tells whether a user's own target was edited since: a hash of the files that define it; nothing for built-in ones."""
    from qtarget.registry import get_target

    modules = [part.partition(":")[0] for part in target.split("+") if ":" in part]
    if modules:
        get_target(target)  # which imports them
    return _source(modules)


def own_judge(metric: str) -> dict[str, str]:
    """The same of a user's own metric, which was imported when its name was checked."""
    return _source([metric.partition(":")[0]] if ":" in metric else [])


def _source(modules: Sequence[str]) -> dict[str, str]:
    from qtarget.storage.files import digest

    files = [getattr(sys.modules[name], "__file__", None) for name in modules]
    return {"source": digest(b"".join(Path(file).read_bytes() for file in files if file))} if modules else {}


def without(given: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The keys but one."""
    return {name: value for name, value in given.items() if name != key}


def save(document: dict[str, Any], folder: Path) -> None:
    """Write document and page, each whole or not at all."""
    from qtarget.comparison.kept import DOCUMENT
    from qtarget.report.comparison.page import comparison_page
    from qtarget.storage.files import write_atomic

    write_atomic(folder / DOCUMENT, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(folder / PAGE, comparison_page(document).encode(errors="replace"))
