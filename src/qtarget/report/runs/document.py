"""From the folders of runs to one JSON document: curves, state, what differs, and what changed token by token."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtarget.core.errors import DataError
from qtarget.report.page import finite
from qtarget.report.runs.records import LOG_FILE, RUN_FILE, SAMPLES_FILE, SCHEMA_VERSION, read_lines
from qtarget.report.runs.rollouts import completions_of
from qtarget.report.runs.tokens import token_changes

METRICS = (
    "nll",
    "loss",
    "label_weight",
    "effective_sample_size",
    "residual_share",
    "entropy",
    "mean_token_accuracy",
    "reward",
    "kl/start",
    "divergence/kl_k3",
    "kl",
    "ratio/ess",
    "region/blocked_positive",
    "region/blocked_negative",
    "rollout/age",
)
"""What a curve holds beside ``step``: nats a token (nll, entropy, kl/start, kl_k3, and TRL's kl to the start), the
objective (loss), reward, shares, steps (age)."""
STATE_FILE = "trainer_state.json"
UNREMARKABLE = ("run_name", "logging_steps", "eval_steps", "save_steps", "report_to", "disable_tqdm", "heatmap_rows")


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        name: of the folder, made unique among those compared.
        folder: as given.
        description: ``qtarget_run.json``, or empty (a run of TRL's own trainer).
        log: logged lines, oldest first.
        samples: token samples, oldest first.
        checkpoints: step and folder, ascending.
    """

    name: str
    folder: Path
    description: dict[str, Any]
    log: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    checkpoints: list[tuple[int, Path]] = field(default_factory=list)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the output folders of some runs; folders of the same name get their parents' names before them.

    Raises:
        DataError: a folder holds no run, comes twice, or a record in it is broken.
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise DataError("a run is named twice; give each output_dir once")
    return [_read_run(path, name) for path, name in zip(paths, unique_names(paths), strict=True)]


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart.

    Example:
        >>> unique_names([Path("a/x/out"), Path("a/y/out"), Path("a/z")])
        ['x/out', 'y/out', 'z']
    """
    parts = [path.resolve().parts for path in paths]
    depth = [1] * len(parts)
    while True:
        names = ["/".join(part[-d:]) for part, d in zip(parts, depth, strict=True)]
        clashing = [i for i, name in enumerate(names) if names.count(name) > 1 and depth[i] < len(parts[i])]
        if not clashing:
            return names
        for i in clashing:
            depth[i] += 1


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected the output_dir of a run")
    checkpoints = find_checkpoints(folder)
    states = [folder / STATE_FILE, *(path / STATE_FILE for _, path in reversed(checkpoints))]
    log = read_lines(folder / LOG_FILE)
    if not log:
        log = next((_read_json(path).get("log_history", []) for path in states if path.is_file()), [])
    if not log and not checkpoints and not (folder / RUN_FILE).is_file():
        raise DataError(
            f"{folder} holds no run: neither {LOG_FILE} nor {STATE_FILE} nor a checkpoint; expected the output_dir of "
            "`qtarget train`, or of any transformers trainer"
        )
    description = _read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}
    if description and description.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{folder / RUN_FILE} has schema_version {description.get('schema_version')!r}, this qtarget reads "
            f"{SCHEMA_VERSION}; use the qtarget that wrote it"
        )
    return Run(name, folder, description, log, read_lines(folder / SAMPLES_FILE), checkpoints)


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint that has its configuration, ascending."""
    found = []
    for path in folder.glob("checkpoint-*"):
        step = path.name.rsplit("-", 1)[1]
        if step.isdigit() and any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            found.append((int(step), path))
    return sorted(found)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}); was it cut off? Delete it and report again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


# -- one run ---------------------------------------------------------------------------------------------------


def training_curve(log: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """``step`` and every metric of the training lines; None where missing or not finite."""
    return _curve(training_lines(log), "")


def training_lines(log: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Lines of a trainer's log about steps of training; the last steps of a run have one without ``loss``, if none is due.

    Example:
        >>> log = [{"step": 5, "loss": 2.0, "nll": 2.0}, {"step": 5, "eval_nll": 3.0}, {"step": 7, "train_loss": 2.0, "nll": 1.0}]
        >>> [line["step"] for line in training_lines(log)]
        [5, 7]
    """
    return [line for line in log if "loss" in line or {"train_loss", "nll"} <= line.keys()]


def evaluation_curves(log: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    """The same for each evaluation set: ``eval``, or ``eval_NAME``; of two evaluations at one step the later counts.

    Example:
        >>> evaluation_curves([{"eval_runtime": 1, "eval_nll": 2.0, "step": 0}])["eval"]["nll"]
        [2.0]
    """
    prefixes = [key.removesuffix("runtime") for line in log for key in line if _is_evaluation(key)]
    return {
        prefix.rstrip("_"): _curve([line for line in log if f"{prefix}runtime" in line], prefix)
        for prefix in dict.fromkeys(prefixes)
    }


def _is_evaluation(key: str) -> bool:
    return key.startswith("eval_") and key.endswith("_runtime")


def _curve(lines: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, list[float | None]]:
    by_step = {line["step"]: line for line in lines}
    steps = sorted(by_step)
    curve: dict[str, list[float | None]] = {"step": steps}
    for metric in METRICS:
        values = [finite(by_step[step].get(prefix + metric)) for step in steps]
        if any(value is not None for value in values):
            curve[metric] = values
    return curve


def state_of(run: Run) -> dict[str, Any]:
    """``finished``, ``stopped`` (with the reason) or ``unfinished``, and how far it came."""
    steps = [line["step"] for line in run.log if "step" in line]
    reason = next((line["stopped"] for line in reversed(run.log) if "stopped" in line), None)
    finished = any("train_loss" in line for line in run.log)  # train_runtime may stand in every line
    state = "stopped" if reason else "finished" if finished else "unfinished"
    return {
        "state": state,
        "reason": reason,
        "step": max([*steps, *(step for step, _ in run.checkpoints)], default=0),
        "max_steps": run.description.get("max_steps"),
    }


def notes_of(run: Run, evaluations: Mapping[str, Any]) -> list[str]:
    """What a reader of this run's numbers must know."""
    notes = []
    odd = [
        line["step"] for line in run.log if any(isinstance(v, float) and not math.isfinite(v) for v in line.values())
    ]
    if odd:
        notes.append(f"{len(odd)} logged lines hold values that are not finite, first at step {odd[0]}; left out")
    if not evaluations:
        notes.append("no evaluation was logged; set validation_file and eval_strategy")
    elif all("nll" not in curve and "reward" not in curve for curve in evaluations.values()):
        notes.append("no plain nll was logged: another trainer's run; its loss is its own objective")
    if not run.description:
        notes.append(f"no {RUN_FILE}: whether its rows and tokenizer are the others' cannot be checked")
    return notes


def describe_run(run: Run) -> dict[str, Any]:
    """A run as JSON: state, curves, first, last and lowest clean NLL of each evaluation set."""
    evaluations, train = evaluation_curves(run.log), training_curve(run.log)
    return {
        "name": run.name,
        "target": run.description.get("target"),
        "target_kwargs": run.description.get("target_kwargs"),
        "model": run.description.get("model"),
        "data": run.description.get("data"),
        "status": state_of(run),
        "train": train,
        "evaluations": evaluations,
        "clean_nll": ends_of(evaluations, "nll", "lowest"),
        "rewards": ends_of({"samples": train} | evaluations, "reward", "highest"),
        "notes": notes_of(run, evaluations),
        "completions": completions_of(run.folder),
    }


def ends_of(curves: Mapping[str, Mapping[str, Any]], metric: str, best: str) -> dict[str, dict[str, Any]]:
    """The first, last and best value of a metric in each curve that has it, each with its step.

    Args:
        best: what the best is called: ``lowest`` or ``highest``.

    Example:
        >>> ends_of({"samples": {"step": [1, 2], "reward": [0.5, 0.25]}}, "reward", "highest")["samples"]["highest"]
        {'reward': 0.5, 'step': 1}
    """
    found = {}
    for name, curve in curves.items():
        pairs = [(v, s) for s, v in zip(curve["step"], curve.get(metric, []), strict=False) if v is not None]
        if pairs:
            chosen = {"first": pairs[0], "last": pairs[-1], best: (min if best == "lowest" else max)(pairs)}
            found[name] = {end: {metric: value, "step": step} for end, (value, step) in chosen.items()}
    return found


# -- several runs ----------------------------------------------------------------------------------------------


def check_comparable(runs: Sequence[Run], same_rows: bool = False) -> None:
    """Refuse what has no common measure: nats a token under different tokenizers, NLL on different rows.

    Args:
        same_rows: all runs were scored on rows given to the report, so their own evaluation rows do not matter.

    Raises:
        DataError: says which runs, and what differs.
    """
    first: dict[str, tuple[Any, Run]] = {}
    for run in runs:
        data = run.description.get("data") or {}
        found = {"tokenizer": (run.description.get("model") or {}).get("tokenizer_fingerprint")}
        if not same_rows:
            found |= {f"rows of {name!r}": d["fingerprint"] for name, d in data.items() if name != "train"}
        for what, value in found.items():
            if value is None:  # unknown: it neither agrees nor stands for the others
                continue
            other, holder = first.setdefault(what, (value, run))
            if value == other:
                continue
            advice = (
                "report them one by one"
                if what == "tokenizer"
                else "report them one by one, or pass --rows FILE to score the checkpoints of all on the same rows"
            )
            raise DataError(
                f"{holder.name} and {run.name} differ in their {what}, so their nll cannot be compared; {advice}"
            )


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Settings, models, data and versions that are not the same in all runs: ``{"key", "values"}``, one value a run."""
    flat = [_flatten(run.description) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    out = []
    for key in keys:
        values = [one.get(key) for one in flat]
        if key.rsplit(".", 1)[-1] not in UNREMARKABLE and any(value != values[0] for value in values):
            out.append({"key": key, "values": [None if v is None else str(v) for v in values]})
    # a setting that the description also tells at its top is told once
    return [one for one in out if one["key"].removeprefix("settings.") not in set(keys) - {one["key"]}]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= _flatten(item, f"{prefix}{key}.") if isinstance(item, dict) and item else {f"{prefix}{key}": item}
    return out


def common_evaluation(described: Sequence[Mapping[str, Any]]) -> str | None:
    """The first evaluation set on which every run has a clean NLL."""
    names = [name for name in described[0]["clean_nll"] if all(name in one["clean_nll"] for one in described)]
    return names[0] if names else None


def finding(described: Sequence[Mapping[str, Any]]) -> str:
    """One sentence about the last clean NLL of the runs."""
    name = common_evaluation(described)
    if name is None:
        if rewards := [(one["name"], found) for one in described if (found := known(one["train"], "reward"))]:
            return f"Reward of samples, first to last line: {rewards_in_order(rewards)}"
        return "No evaluation with a plain nll is common to all runs, so nothing is ranked"
    last = [(one["name"], one["clean_nll"][name]["last"]["nll"]) for one in described]
    if len(last) == 1:
        first, end = (described[0]["clean_nll"][name][which] for which in ("first", "last"))
        start = f"{last[0][0]}: nll on {name} rows {first['nll']:.3f} at step {first['step']}"
        if first["step"] == end["step"]:
            return f"{start}, the only evaluation (eval_strategy: steps and eval_steps make a curve)"
        return f"{start}, {end['nll']:.3f} at step {end['step']}"
    return f"Nll on {name} rows at the last evaluation, nats a token: {in_order(last)}"


def in_order(values: Sequence[tuple[str, float]]) -> str:
    """Runs as they were named, unranked: a log has means alone, and no interval can be made of them.

    Example:
        >>> in_order([("a", 1.0), ("b", 0.9)])
        'a 1.000, b 0.900 (no interval, so no ranking: qtarget evaluate gives both)'
    """
    said = ", ".join(f"{name} {value:.3f}" for name, value in values)
    return f"{said} (no interval, so no ranking: qtarget evaluate gives both)"


def known(curve: Mapping[str, Any], metric: str) -> list[float]:
    """The values of a curve that were logged and are finite."""
    return [value for value in curve.get(metric, []) if value is not None]


def rewards_in_order(rewards: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Runs as they were named, unranked, each with the ends of its rewards.

    Example:
        >>> rewards_in_order([("a", [0.25, 0.3, 0.5])])
        'a 0.250 to 0.500 (samples of one batch each: qtarget evaluate asks held-out rows)'
    """
    said = ", ".join(f"{name} {values[0]:.3f} to {values[-1]:.3f}" for name, values in rewards)
    return f"{said} (samples of one batch each: qtarget evaluate asks held-out rows)"


def sample_changes(run: Run, first: int | None = None, last: int | None = None) -> list[dict[str, Any]]:
    """What changed token by token between two evaluations of a run, for each evaluation set with samples.

    Args:
        first, last: steps; the first and the last sampled ones by default.

    Raises:
        DataError: nothing was sampled at that step, or a step is named and nothing at all was sampled.
    """
    if not run.samples and (first is not None or last is not None):
        raise DataError(
            f"{run.name} has no token samples to compare at a step; train with eval_strategy and heatmap_rows, or name rows: "
            "--rows FILE"
        )
    out = []
    for name in dict.fromkeys(line["name"] for line in run.samples):
        rows = {line["step"]: line["rows"] for line in run.samples if line["name"] == name}
        ends = [min(rows) if first is None else first, max(rows) if last is None else last]
        if missing := [step for step in ends if step not in rows]:
            raise DataError(
                f"{run.name} has no token samples of {name} at step {missing[0]}; there are some at "
                f"{', '.join(map(str, sorted(rows)))}"
            )
        if ends[0] != ends[1]:
            where = {"run": run.name, "source": "samples", "rows_of": name, "from_step": ends[0], "to_step": ends[1]}
            out.append(where | token_changes(rows[ends[0]], rows[ends[1]]))
    return out


def compare_runs(runs: Sequence[Run], changes: Sequence[Mapping[str, Any]], *, same_rows: bool = False) -> dict:
    """The whole report as JSON; every number in the page and the pictures stands here.

    Args:
        changes: of ``sample_changes`` or of re-scored checkpoints.

    Raises:
        DataError: see ``check_comparable``.
    """
    check_comparable(runs, same_rows)
    described = [describe_run(run) for run in runs]
    rescored = [one for one in changes if one["source"] == "checkpoints"]
    return {
        "kind": "qtarget report",
        "schema_version": SCHEMA_VERSION,
        "finding": _rescored_finding(rescored) if same_rows and rescored else finding(described),
        "runs": described,
        "differences": differences(runs),
        "tokens": list(changes),
    }


def _rescored_finding(changes: Sequence[Mapping[str, Any]]) -> str:
    return f"Nll on the rows given, nats a token: {in_order([_ended(one) for one in changes])}"


def _ended(change: Mapping[str, Any]) -> tuple[str, float]:
    return f"{change['run']} (step {change['to_step']})", change["nll_after"]
