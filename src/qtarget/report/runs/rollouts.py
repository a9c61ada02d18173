"""Samples that a run has kept: read, weighed anew under any trust region, and put into a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from qtarget.api import target_loss
from qtarget.core.errors import ConfigError, DataError
from qtarget.core.regions import TrustRegion
from qtarget.core.types import Reference, Target
from qtarget.report.runs.records import ROLLOUTS_FILE, RUN_FILE, read_lines

COLUMNS = ("log_probs", "anchor", "advantages", "weights", "losses")
"""Numbers of each token; None where it was not trained on."""
SHOWN = 200
"""Samples of a run in a report; in between they are left out evenly."""
RUN = "as trained"


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """The samples of a run's folder, or of a file.

    Raises:
        DataError: there are none, or one lacks what a sample has.
    """
    file = path / ROLLOUTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"{file} is not there; expected a config of `qtarget train`, or the folder of a run of `qtarget rl` (kept_samples)"
        )
    rows = read_lines(file)
    if not rows:
        raise DataError(f"{file} holds no samples; the run has logged nothing yet, or kept_samples is 0")
    for number, row in enumerate(rows, 1):
        check_sample(row, f"{file}, sample {number}")
    return rows


def check_sample(row: Mapping[str, Any], place: str) -> None:
    """Raise for what is no sample of ``qtarget rl``.

    Raises:
        DataError: says what is missing or of another length.
    """
    if missing := [name for name in ("step", "prompt", "tokens", *COLUMNS) if name not in row]:
        raise DataError(
            f"{place}: no {', '.join(missing)}; expected a line of {ROLLOUTS_FILE} as `qtarget rl` writes it"
        )
    if not isinstance(row["tokens"], list):
        raise DataError(f"{place}: tokens is no list of texts")
    for name in COLUMNS:
        values = row[name]
        good = isinstance(values, list) and all(v is None or isinstance(v, int | float) for v in values)
        if not good or len(values) != len(row["tokens"]):
            raise DataError(f"{place}: {name} is no list of {len(row['tokens'])} numbers, one a token")


def check_region(name: str, target: Target) -> None:
    """Raise where kept numbers cannot say what a target would do.

    Raises:
        ConfigError: no trust region, or one that reads more than the sampled token.
    """
    if not isinstance(target, TrustRegion):
        raise ConfigError(
            f"--targets {name}: samples carry advantages, and only trust regions read them (`qtarget targets`)"
        )
    if target.needs.rollout & {"distribution"}:
        raise ConfigError(
            f"--targets {name}: outcomes: listed reads other tokens than the sampled one, which are not kept"
        )


def region_weights(target: Target, row: Mapping[str, Any]) -> list[float | None]:
    """The weight ``w`` that a trust region gives each token of a sample; None where the advantage is 0 or the ratio unknown.

    The sampled token against all others is all that such a rule reads, so two outcomes stand for the vocabulary.

    Example:
        >>> from qtarget import get_target
        >>> row = {"log_probs": [-0.1, -3.0], "anchor": [-2.0, -3.0], "advantages": [1.0, 1.0]}
        >>> region_weights(get_target("dppo_tv"), row)
        [0.0, 1.0]
    """
    out: list[float | None] = [None] * len(row["log_probs"])
    places = [
        t
        for t, a in enumerate(row["advantages"])
        if a and row["log_probs"][t] is not None and row["anchor"][t] is not None
    ]
    if not places:
        return out
    live, anchor, given = (
        torch.tensor([row[name][t] for t in places], dtype=torch.float64)
        for name in ("log_probs", "anchor", "advantages")
    )
    live = live.clamp(max=-1e-12)
    logits = torch.stack([live, torch.log1p(-live.exp())], -1)
    _, report = target_loss(
        logits, torch.zeros(len(places), dtype=torch.long), target, advantages=given,
        rollout=Reference(label_log_probs=anchor), return_report=True,
    )  # fmt: skip
    found = report.label_weights / ((live - anchor).clamp(-20, 20).exp() * given)
    for t, value in zip(places, found.tolist(), strict=True):
        out[t] = round(value, 6)
    return out


def weighed(rows: Sequence[Mapping[str, Any]], targets: Mapping[str, Target]) -> list[dict[str, Any]]:
    """The samples with ``regions``: weights as the run had them, and under each of some trust regions."""
    return [
        {
            **row,
            "regions": {RUN: row["weights"]} | {name: region_weights(target, row) for name, target in targets.items()},
        }
        for row in rows
    ]


def summary_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By region: tokens with an advantage, mean weight, share blocked, share corrective (below 0)."""
    out = []
    for name in rows[0]["regions"]:
        values = [v for row in rows for v in row["regions"][name] if v is not None]
        out.append(
            {
                "region": name,
                "tokens": len(values),
                "mean": fmean(values) if values else None,
                "blocked": fmean(v == 0 for v in values) if values else None,
                "corrective": fmean(v < 0 for v in values) if values else None,
            }
        )
    return out


def thinned(rows: Sequence[Any], most: int = SHOWN) -> list[Any]:
    """At most so many, evenly spaced, first and last among them.

    Example:
        >>> thinned([1, 2, 3, 4, 5], 3)
        [1, 3, 5]
    """
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def completions_of(folder: Path) -> list[dict[str, Any]]:
    """What a report shows of a run's samples; nothing of a run that kept none."""
    if not (folder / ROLLOUTS_FILE).is_file() or not read_lines(folder / ROLLOUTS_FILE):
        return []
    return weighed(thinned(read_rollouts(folder)), {})


def rollouts_document(path: Path, targets: Mapping[str, Target], most: int) -> dict[str, Any]:
    """All that the page of `qtarget inspect RUN` holds.

    Args:
        path: a run's folder, or a file of samples.
        targets: trust regions under which the samples are weighed beside the run's own.
        most: samples in full; the summary is over all.
    """
    rows = weighed(read_rollouts(path), targets)
    described = path / RUN_FILE
    trained_with = read_description(described).get("target") if described.is_file() else None
    return {
        "kind": "qtarget inspect, samples",
        "name": path.name,
        "target": trained_with,
        "count": len(rows),
        "summary": summary_of(rows),
        "runs": [{"name": path.name, "completions": thinned(rows, most)}],
    }


def read_description(path: Path) -> dict[str, Any]:
    """``qtarget_run.json``, or nothing where it was cut off."""
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def rollouts_page(document: Mapping[str, Any]) -> str:
    """The samples as one HTML document."""
    from qtarget.report.page import render_page

    return render_page(
        "rollouts.html",
        document,
        title=f"Samples of {document['name']}",
        styles=("runs.css", "rollouts.css"),
        scripts=("rollouts.js", "rollouts_page.js"),
    )
