"""What a folder's finished runs were made with: a comparison goes on with the same, and judges their answers anew."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtarget.benchmarks.pool import RunLog
from qtarget.comparison.compare import RUNS, texts_file
from qtarget.comparison.jobs import contender_of
from qtarget.core.errors import ConfigError, counted
from qtarget.evaluation.contenders import Contender, weights_digest
from qtarget.evaluation.evaluate import RowSet
from qtarget.evaluation.judges import judged
from qtarget.evaluation.records import check_plan, differences
from qtarget.storage.files import write_atomic, write_json

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
    earlier, said = _ran(folder, known), None
    if known:
        changed = [one.name for one in sets if known.get(METRICS, {}).get(one.name) != now[METRICS][one.name]]
        if changed and known["rows"] != now["rows"] and known["rows"]["train"] == now["rows"]["train"]:
            raise ConfigError(
                f"--output {folder}: this metric judges other rows than the finished runs answered, as it fits other answers; "
                "choose another folder, or the metric that it was begun with"
            )
        check_plan(file, *({k: v for k, v in one.items() if k not in (METRICS, CONTENDERS)} for one in (known, now)))
        for name, keys in now[CONTENDERS].items():
            if lines := differences(earlier.get(name, keys), keys, name):
                raise ConfigError(
                    f"{file}: this comparison began with another {name}: {'; '.join(lines)}; name it otherwise under "
                    "`compare:`, or choose another --output"
                )
        if changed:
            known.pop(
                METRICS, None
            )  # a kill from here on leaves scores of nobody knows which metric: all are judged anew
            write_json(file, known)
            said = judge_again(folder, sets)
    write_json(file, now | {CONTENDERS: earlier | now[CONTENDERS]})
    return said


def _ran(folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Contenders of the plan that have a finished run; one that could not be trained may come with other keys."""
    if not known:
        return {}
    names = {contender_of(key) for key in RunLog(folder / RUNS, resume=True).runs}
    return {name: keys for name, keys in known[CONTENDERS].items() if name in names}


def keep_earlier(folder: Path, names: Sequence[str]) -> str | None:
    """Documents of an earlier metric, under a name that says which; what was kept, in words.

    Args:
        names: of the files, the JSON document first.
    """
    if not (folder / names[0]).is_file():
        return None
    earlier = json.loads((folder / names[0]).read_text(encoding="utf-8"))["measure"]["metric"]
    kept = []
    for path in (folder / name for name in names if (folder / name).is_file()):
        kept.append(path.with_stem(f"{path.stem}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', earlier)}"))
        path.replace(kept[-1])
    return f"the verdict by {earlier} is kept: {', '.join(map(str, kept))}"


def judge_again(folder: Path, sets: Sequence[RowSet]) -> str:
    """Scores of the finished runs by the metrics of now, from the completions that are kept.

    Returns:
        How many runs, in words.

    Runs that were measured by likelihood alone have none: they are trained again.

    Raises:
        ConfigError: no run wrote answers; some are gone; or the metric itself fails.
    """
    log, without = RunLog(folder / RUNS, resume=True), list[str]()
    for key, run in log.runs.items():
        file = texts_file(folder, key)
        if not file.is_file():
            raise ConfigError(f"{file}, the answers of a finished run ({key}), is gone; choose another --output")
        texts = json.loads(file.read_text(encoding="utf-8"))
        if any(rows.judge is not None and texts[rows.name] is None for rows in sets):
            without.append(key)
            continue
        for rows in sets:
            run["sets"][rows.name]["scores"] = _scores(rows, texts[rows.name], key)
    if len(without) == len(log.runs):
        raise ConfigError(
            f"--output {folder} was measured by nll, without answers, which another metric would have to judge; choose another "
            "folder"
        )
    kept = {key: run for key, run in log.runs.items() if key not in without}
    write_atomic(folder / RUNS, "".join(json.dumps({"key": key, **run}) + "\n" for key, run in kept.items()).encode())
    again = f"; {counted(len(without), 'run')} without answers is made again" if without else ""
    return (
        f"the kept answers of {counted(len(kept), 'finished run')} were judged anew{again}; where another rate is best now, it "
        "is trained"
    )


def _scores(rows: RowSet, texts: Sequence[str | None], key: str) -> list[float | None] | None:
    if rows.judge is None or rows.questions is None:
        return None
    return [
        None
        if text is None
        else judged(rows.judge, one.text, text, one.reference, one.row, f"{rows.where(one.number)} ({key})")
        for one, text in zip(rows.questions, texts, strict=True)
    ]


def model_digest(model: str) -> str:
    """Of a model's files: whether it is the one that a comparison began with."""
    return weights_digest(Contender(model, model, model))
