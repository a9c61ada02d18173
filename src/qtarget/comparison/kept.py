"""What a folder's finished runs were made with: a comparison goes on with the same, and judges their answers anew."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtarget.benchmarks.pool import RunLog
from qtarget.comparison.compare import RUNS, texts_file
from qtarget.core.errors import ConfigError
from qtarget.evaluation.contenders import Contender, weights_digest
from qtarget.evaluation.evaluate import RowSet
from qtarget.evaluation.judges import judged
from qtarget.evaluation.records import check_plan, differences
from qtarget.storage.files import digest, write_atomic, write_json

PLAN, DOCUMENT = "plan.json", "comparison.json"
METRICS, CONTENDERS = "metrics", "contenders"


def claim(folder: Path, plan: Mapping[str, Any], sets: Sequence[RowSet], *, resume: bool) -> str | None:
    """Leave the plan in the folder, or see that its runs were made with the same.

    More contenders are welcome. Another metric judges the answers of the finished runs again; nothing is trained for it.

    Args:
        folder: held by the caller.
        plan: JSON; ``metrics`` by set and ``contenders`` by name beside what all runs depend on.
        sets: the rows, with the metric of now.

    Returns:
        What was judged anew, in words, or None.

    Raises:
        ConfigError: there are runs, and ``resume`` is not set or something else differs; names it.
    """
    file, now = folder / PLAN, json.loads(json.dumps(plan))
    begun = (folder / RUNS).is_file()
    if begun and not resume:
        raise ConfigError(
            f"--output {folder} holds an earlier comparison; --resume goes on with its finished runs (more --seeds and "
            "--targets, or another --metric, are welcome), or choose another folder"
        )
    known = json.loads(file.read_text(encoding="utf-8")) if begun and file.is_file() else {}
    earlier, said = known.get(CONTENDERS, {}), None
    if known:
        check_plan(file, *({k: v for k, v in one.items() if k not in (METRICS, CONTENDERS)} for one in (known, now)))
        for name, keys in now[CONTENDERS].items():
            if lines := differences(earlier.get(name, keys), keys, name):
                raise ConfigError(
                    f"{file}: this comparison began with another {name}: {'; '.join(lines)}; name it otherwise under "
                    "`compare:`, or choose another --output"
                )
        if known[METRICS] != now[METRICS]:
            said = judge_again(
                folder, sets, [one.name for one in sets if known[METRICS][one.name] != now[METRICS][one.name]]
            )
    write_json(file, now | {CONTENDERS: earlier | now[CONTENDERS]})
    return said


def judge_again(folder: Path, sets: Sequence[RowSet], changed: Sequence[str]) -> str:
    """Scores of the finished runs by the metric of now, from the completions that are kept.

    Args:
        changed: names of the sets whose metric is another.

    Returns:
        How many runs, in words.

    Raises:
        ConfigError: the runs wrote no answers, as they were measured by likelihood alone; or the metric itself fails.
    """
    log = RunLog(folder / RUNS, resume=True)
    for key, run in log.runs.items():
        texts = json.loads(texts_file(folder, key).read_text(encoding="utf-8"))
        for rows in sets:
            if rows.name in changed:
                run["sets"][rows.name]["scores"] = _scores(rows, texts[rows.name], key, folder)
    lines = (json.dumps({"key": key, **run}) + "\n" for key, run in log.runs.items())
    write_atomic(folder / RUNS, "".join(lines).encode())
    return f"the kept answers of {len(log.runs)} finished runs were judged anew; nothing was trained for it"


def _scores(rows: RowSet, texts: Sequence[str] | None, key: str, folder: Path) -> list[float] | None:
    if rows.judge is None or rows.questions is None:
        return None
    if texts is None:
        raise ConfigError(
            f"--output {folder} was measured by nll, without answers, which --metric {rows.judge.name} would have to judge; "
            "choose another folder"
        )
    return [
        judged(rows.judge, one.text, text, one.reference, one.row, f"{rows.where(one.number)} ({key})")
        for one, text in zip(rows.questions, texts, strict=True)
    ]


def rows_digest(rows: Any) -> str:
    """Of training rows: whether they are those that a comparison began with."""
    return digest(json.dumps(rows.to_list(), sort_keys=True, default=str).encode())


def model_digest(model: str) -> str:
    """The same of the model's files."""
    return weights_digest(Contender(model, model, model))
