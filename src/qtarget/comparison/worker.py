"""One process's part: train a contender, measure it on the user's rows, give the numbers back. Nothing stays on disk."""

from __future__ import annotations

import gc
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from qtarget.comparison.jobs import Contender, Job, run_keys
from qtarget.comparison.memory import peak_bytes, reset_peak
from qtarget.comparison.sets import Metric, measured_set, unseen
from qtarget.core.errors import QTargetError
from qtarget.data.overlap import content_hashes
from qtarget.evaluation import contenders as evaluated
from qtarget.evaluation.evaluate import Choices, Evaluation, RowSet, SetName, asked_prompts
from qtarget.evaluation.loaded import Loaded
from qtarget.evaluation.records import Records
from qtarget.report.page import finite
from qtarget.storage.models import context_of


class Recipe(Protocol):
    """A config that contenders vary; travels to worker processes."""

    def rows(self) -> tuple[Any, Any]:
        """Training and validation rows."""
        ...

    def forgetting_rows(self) -> Any:
        """Rows of what the base could do before, or None."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """The config's keys, resolved."""
        ...

    def trainer(self, overrides: Mapping[str, Any], train_rows: Any, validation_rows: Any) -> Any:
        """What `qtarget train` would run."""
        ...


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        metrics: by set: ``data``, and ``forgetting`` if there is one.
        files: names of the sets for people.
        text_field: of rows that are text.
    """

    recipe: Recipe
    contenders: tuple[Contender, ...]
    metrics: Mapping[SetName, Metric]
    files: Mapping[str, str]
    choices: Choices = field(default_factory=Choices)
    text_field: str = "text"


class ComparisonWorker:
    """Runs jobs one after another; rows and their tokens are read once."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._ready: dict[str, Any] = {}
        self._contenders = {one.name: one for one in setting.contenders}

    @cached_property
    def _rows(self) -> tuple[Any, Any]:
        return self.setting.recipe.rows()

    @cached_property
    def _sets(self) -> list[RowSet]:
        setting, (train, validation) = self.setting, self._rows
        trained = content_hashes(train, setting.text_field)
        judged, _ = unseen(setting.files["data"], validation, trained, setting.text_field)
        data = {"data": judged, "forgetting": setting.recipe.forgetting_rows()}
        return [
            measured_set(name, setting.files[name], data[name], metric)[0] for name, metric in setting.metrics.items()
        ]  # fmt: skip

    def __call__(self, job: Job) -> dict[str, Any]:
        """Run a job.

        Returns:
            A ``Result`` with the completions in ``texts``; or ``failed``, why there is none.
        """
        import torch

        folder = Path(tempfile.mkdtemp(prefix="qtarget-compare-"))
        try:
            with _quiet():
                return self._run(job, folder)
        except (QTargetError, torch.OutOfMemoryError) as error:
            return {"failed": str(error)}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run(self, job: Job, folder: Path) -> dict[str, Any]:
        from transformers import PrinterCallback

        reset_peak()
        begin, cpu = time.perf_counter(), time.process_time()
        looks = job.kind == "final"
        sets = self._sets  # read before there is a trainer: to build another config resets accelerate's state
        overrides = {**self._contenders[job.contender].overrides, **run_keys(job, folder / "run")}
        trainer = self.setting.recipe.trainer(overrides, self._rows[0], self._rows[1] if looks else None)
        trainer.remove_callback(PrinterCallback)  # which stands in for the bar that is turned off
        for rows in sets:  # what cannot be asked is refused before it is trained
            asked_prompts(trainer.processing_class, context_of(trainer._base_model().config), rows, job.contender)
        if job.kind == "base":
            steps = planned_steps(trainer)
        else:
            trainer.train()
            trainer.end()
            steps = trainer.state.global_step
        trained, peak = time.perf_counter() - begin, peak_bytes()
        history = trainer.state.log_history
        out = {
            "steps": steps,
            "train_seconds": round(trained, 3),
            "memory_bytes": peak,
            "curve": _points(history, "nll"),
            "validation": _points(history, "eval_nll"),
        }
        out |= self._measured(job.key, trainer, folder)
        spent = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
        return out | {name: round(value, 3) for name, value in spent.items()}

    def _measured(self, name: str, trainer: Any, folder: Path) -> dict[str, Any]:
        """Numbers of every set by the model as it is now."""
        loaded = InMemory(name, trainer, self._ready, self.setting.recipe.settings())
        records = Records(folder / "measured.rows.jsonl", {}, resume=False)
        evaluation = Evaluation([loaded.contender], self._sets, self.setting.choices, records)
        evaluation.evaluate(loaded)
        sets, texts = {}, {}
        for rows in self._sets:
            found = evaluation.results_of(rows, loaded.contender)
            said = found["completion"]
            sets[rows.name] = {
                "nll": [[line["nats"], line["tokens"]] for line in found["nll"] or []] or None,
                "scores": said and [line and sum(line["scores"]) / len(line["scores"]) for line in said],
                "unfinished": said and sum(not all(line["stopped"]) for line in said if line),
            }
            texts[rows.name] = said and [line and line["completions"][0] for line in said]
        return {"sets": sets, "texts": texts, "max_new_tokens": evaluation.facts[name]["max_new_tokens"]}


class InMemory(Loaded):
    """A model that was just trained, as an evaluation takes it: nothing is saved and loaded again."""

    def __init__(self, name: str, trainer: Any, ready: dict[str, Any], settings: Mapping[str, Any]) -> None:
        self.contender, self.notes = evaluated.Contender(name, "", "", settings=settings), []
        self.tokenizer = trainer.processing_class
        model = trainer._base_model()
        model.eval()
        self.model, self.context = model, context_of(model.config)  # in place of the cached properties
        self._head, self._known = trainer.head_spec, ready

    def ready_rows(self, rows: RowSet) -> Any:
        """Tokenised once in a process: all contenders read the same tokens."""
        from dataclasses import replace

        if rows.name not in self._known:
            self._known[rows.name] = replace(super().ready_rows(rows), model=None)
            self.model.eval()
        return replace(self._known[rows.name], model=self.model, head=self._head)


def planned_steps(trainer: Any) -> int:
    """Optimizer steps that a config asks for, by ``max_steps`` or by epochs over the rows."""
    return int(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1])


def _points(history: list[dict[str, Any]], key: str) -> list[list[float | None]]:
    return [[line["step"], finite(round(line[key], 5))] for line in history if key in line]


@contextmanager
def _quiet() -> Iterator[None]:
    """What a run would say for itself was said once, by the comparison."""
    earlier = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(earlier)
