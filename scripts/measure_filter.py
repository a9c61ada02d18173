"""How well the filter finds injected row noise, what it says of clean rows, and how long 100,000 rows take.

    python scripts/measure_filter.py --data ../shared/data --output benchmarks/results/filter.json

Rows of the embedded tasks, SCAN and word problems under bases that know none, half or most of their format (as `qtarget
bench noise` makes them), and gsm8k, dolly and alpaca under a tiny story model. Row noise: another row's answer of the same
skill, another row's whole response, random tokens. Nothing is tuned here: the constants stand in ``qtarget.filtering``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import transformers

import qtarget
from qtarget.benchmarks.marked_data import load_story_tokenizer
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import BASES, embedded_tasks, generated_demonstrations, make_base, math_tasks, scan_tasks
from qtarget.data.embedded import base_model_path, load_demonstrations
from qtarget.data.noise import inject_noise
from qtarget.data.roc import roc_auc
from qtarget.data.tasks import DEMONSTRATED_SKILLS
from qtarget.filtering import WITNESSES, ScoredRows, decide
from qtarget.filtering.alone import without_prompt
from qtarget.filtering.prompts import told_by_prompt
from qtarget.scoring.sources.local import LocalSource
from qtarget.storage.models import load_whole

Row = dict[str, Any]
LONGEST = 512
RATES = (0.05, 0.2, 0.4)
SUBSETS = 3
FRESH = 20
LARGE_ROWS, LARGE_TOKENS = 100_000, 50
AT_MOST_COUNTED = 60_000
"""Trained tokens up to which agreement is counted."""


def scored(model: Any, tokenizer: Any, rows: list[Row]) -> tuple[ScoredRows, np.ndarray]:
    """Rows under a base, with and without their prompts, and which of them are marked."""
    ids, masks, kept = [], [], []
    for row in rows:
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        tokens = np.array(tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"][:LONGEST])
        if len(tokens) > prompt:
            ids.append(tokens)
            masks.append(np.arange(len(tokens)) >= prompt)
            kept.append(row)
    source = LocalSource(model)
    found = source.score(ids, 0, positions=[np.flatnonzero(mask) for mask in masks])
    answers = [without_prompt(*row) for row in zip(ids, masks, strict=True)]
    places = [np.flatnonzero(row["labels"] >= 0) for row in answers]
    alone = source.score([row["input_ids"] for row in answers], 0, positions=places)
    entropy: Any = [one.entropy for one in found]
    log_probs, without = ([one.label_log_probs for one in part] for part in (found, alone))
    rows_of = ScoredRows.of(ids, masks, log_probs, entropy, without)
    return rows_of, np.array([bool(row.get("noise_spans")) for row in kept])


def another_response(rows: list[Row], rate: float, seed: int) -> list[Row]:
    """Some rows with the whole response of another."""
    plain = [{k: v for k, v in row.items() if k not in ("answer", "skill")} for row in rows]
    return inject_noise(plain, kind="wrong_answer", rate=rate, seed=seed)


def random_responses(rows: list[Row], rate: float, seed: int, tokenizer: Any) -> list[Row]:
    """Some rows with every token of their response replaced."""
    chosen = set(Random(seed).sample(range(len(rows)), round(rate * len(rows))))
    bad = iter(
        inject_noise([rows[i] for i in sorted(chosen)], kind="random_tokens", rate=1.0, seed=seed, tokenizer=tokenizer)
    )
    return [next(bad) if i in chosen else {**row, "noise_spans": []} for i, row in enumerate(rows)]


def measured(rows: ScoredRows, marks: np.ndarray) -> dict[str, Any]:
    """Verdicts of every rule and, with marks, what they are worth."""
    out: dict[str, Any] = {"rows": len(rows), "marked": int(marks.sum()), "rules": {}}
    for rule in WITNESSES:
        if rule in ("agreement", "combined") and len(rows.log_probs) > AT_MOST_COUNTED:
            continue
        found = decide(rows, rule)
        line: dict[str, Any] = {"verdict": found.verdict, "dropped": found.dropped, "summary": found.summary}
        if marks.any():
            line |= {
                "roc": roc_auc(found.score, marks),
                "precision": float(marks[~found.keep].mean()) if found.dropped else None,
                "recall": float((~found.keep)[marks].mean()),
            }
        out["rules"][rule] = line | {
            name: value for name, value in found.facts.items() if name in ("gain", "kept_excess")
        }
    return out


def points(
    name: str, base: str, model: Any, tokenizer: Any, rows: list[Row], rates: tuple[float, ...]
) -> Iterator[dict[str, Any]]:
    """Clean rows, then each kind of noise at each rate."""
    plain = {"data": name, "base": base}
    yield plain | {"kind": "clean", "rate": 0.0} | measured(*scored(model, tokenizer, rows))
    for rate in rates:
        kinds: dict[str, Callable[[], list[Row]]] = {
            "wrong_answer": lambda rate=rate: inject_noise(rows, kind="wrong_answer", rate=rate, seed=0),
            "another_response": lambda rate=rate: another_response(rows, rate, 0),
            "random_response": lambda rate=rate: random_responses(rows, rate, 0, tokenizer),
        }
        for kind, make in kinds.items():
            yield plain | {"kind": kind, "rate": rate} | measured(*scored(model, tokenizer, make()))


def small_tasks(data: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """The tasks of `bench noise` under the bases of it, and subsets of skills."""
    start = Start()
    tokenizer = start.tokenizer()
    load = lambda path: load_whole("model", str(path), dtype=torch.float32).eval()  # noqa: E731
    own = load(base_model_path())
    yield from points("embedded, its own format", "own", own, tokenizer, load_demonstrations("base_format_test"), RATES)
    held = load_demonstrations("heldout_skills_test")
    yield from points("embedded, its own format, other skills", "own", own, tokenizer, held, (0.2,))
    for task in (embedded_tasks(), scan_tasks(data), math_tasks(data)):
        for base in BASES:
            model = load(make_base(task, base, folder, start))
            yield from points(
                task.name, base, model, tokenizer, task.train, RATES if task.name == "embedded" else (0.2, 0.4)
            )
            if task.name == "embedded":
                skills = sorted({row["skill"] for row in task.train})
                for seed in range(SUBSETS):
                    chosen = Random(seed).sample(skills, 3)
                    rows = [row for row in task.train if row["skill"] in chosen]
                    yield from points(f"embedded, {', '.join(chosen)}", base, model, tokenizer, rows, ())


def fresh_clean_sets(folder: Path) -> list[dict[str, Any]]:
    """Clean sets of other sizes, skills and problems than those that the constants were chosen beside."""
    start, out = Start(), []
    tokenizer, task = start.tokenizer(), embedded_tasks()
    taken = {row["prompt"] for row in task.train}
    for seed in range(FRESH):
        random = Random(f"fresh-{seed}")
        base, skills = (
            random.choice(("half", "most")),
            random.sample(DEMONSTRATED_SKILLS, random.randint(1, len(DEMONSTRATED_SKILLS))),
        )
        rows = [row for row in generated_demonstrations(3000, f"fresh-{seed}", taken) if row["skill"] in skills]
        rows = rows[: random.choice((100, 200, 400, 800))]
        model = load_whole("model", str(make_base(task, base, folder, start)), dtype=torch.float32).eval()
        point = {"data": f"embedded, {len(skills)} skills, seed {seed}", "base": base, "kind": "clean", "rate": 0.0}
        out.append(point | measured(*scored(model, tokenizer, rows)))
        print(seed, base, len(rows), {name: line["verdict"] for name, line in out[-1]["rules"].items()}, flush=True)
    return out


def real_rows(data: Path) -> Iterator[dict[str, Any]]:
    """People's rows under a story model that does not know them."""
    folder = data / "models" / "tinystories-656k"
    tokenizer, model = load_story_tokenizer(folder), load_whole("model", str(folder), dtype=torch.float32).eval()
    with gzip.open(data / "gsm8k/train.jsonl.gz", "rt") as file:
        problems = [json.loads(line) for line in file]
    sets = {"gsm8k": [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in problems[:400]]}
    for name, path in (("dolly", "dolly_3k/dolly_3k.json.gz"), ("alpaca", "alpaca_9k/random_9k.json.gz")):
        with gzip.open(data / path, "rt") as file:
            found = json.load(file)
        rows = [
            {"prompt": f"{row['instruction']}\n{row.get('input') or ''}\n", "completion": row["output"]}
            for row in found
        ]
        sets[name] = [row for row in rows if row["completion"]][:400]
    for name, rows in sets.items():
        yield from points(name, "tinystories", model, tokenizer, rows, (0.2,))


def large(rule: str = "surprise") -> dict[str, Any]:
    """Seconds of evidence, decision and writing of many synthetic rows, from a cache on disk."""
    from qtarget.filtering.lookup import rows_in_cache
    from qtarget.report.filtering.document import filter_document
    from qtarget.scoring.cache.reader import ReferenceCache
    from qtarget.scoring.sources.local import score_rows

    rng = np.random.default_rng(0)
    vocabulary = 512
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = [rng.integers(0, vocabulary, LARGE_TOKENS) for _ in range(LARGE_ROWS)]
    mask = np.arange(LARGE_TOKENS) >= LARGE_TOKENS // 2
    rows = [{"input_ids": row, "labels": np.where(mask, row, -100)} for row in ids]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cache"
        score_rows(
            model, rows, folder, model_id="random", tokenizer_fingerprint="t", chat_template_fingerprint="c",
            progress=False, shard_rows=20_000,
        )  # fmt: skip
        texts = [json.dumps({"prompt": "p" * 80, "completion": "c" * 80}) for _ in ids]
        seconds, begin = {}, time.perf_counter()
        cache = ReferenceCache.open(folder)
        found = rows_in_cache(cache, ids, [mask] * len(ids), np.arange(len(ids)))
        seconds["lookup"] = time.perf_counter() - begin
        begin = time.perf_counter()
        decision = decide(found, rule)
        seconds["evidence and decision"] = time.perf_counter() - begin
        begin = time.perf_counter()
        told_by_prompt(found, rng.random(len(ids)) < 0.2)  # what only rows of two kinds are asked
        seconds["prompts"] = time.perf_counter() - begin
        begin = time.perf_counter()
        document = filter_document(
            decision, found, len(ids), title="synthetic", cache=str(folder), decode=str, counted=False
        )
        scores = {key: values.tolist() for key, values in document.pop("scores").items()}
        with (Path(name) / "keep.jsonl").open("w") as keep, (Path(name) / "reasons.jsonl").open("w") as reasons:
            for i, text in enumerate(texts):
                keep.write(text + "\n")
                line = {
                    "row": i,
                    "scores": {key: values[i] for key, values in scores.items()},
                    "reason": decision.reason(i),
                }
                reasons.write(json.dumps(line) + "\n")
        seconds["document and writing"] = time.perf_counter() - begin
    return {
        "rows": LARGE_ROWS, "tokens": LARGE_ROWS * LARGE_TOKENS, "verdict": decision.verdict,
        "seconds": {key: round(value, 2) for key, value in seconds.items()}, "seconds_in_all": round(sum(seconds.values()), 1),
    }  # fmt: skip


def table(points: list[dict[str, Any]]) -> list[str]:
    """Lines of docs/filter.md: a set, a base and a kind of noise each, `surprise` at every rate."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for point in points:
        found = point["rules"]["surprise"]
        if point["kind"] != "clean":
            verdict = f"{found['dropped']}, {found['precision']:.2f}" if found["dropped"] else "cannot tell"
            key = point["data"], point["base"], point["kind"].replace("_", " ")
            lines.setdefault(key, []).append(f"{100 * point['rate']:g} %: {found['roc']:.2f} ({verdict})")
    return [f"| {' | '.join(key)} | {'; '.join(values)} |" for key, values in lines.items()]


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bases", type=Path, help="Folder of the bases, made if absent; default: a temporary one.")
    parser.add_argument("--only", choices=("points", "fresh", "large"), help="Measure this part again, keep the other.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(options.output.read_text()) if options.only else {}
    results |= {
        "benchmark": "filter",
        "qtarget": qtarget.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    with tempfile.TemporaryDirectory() as temporary:
        bases = options.bases or Path(temporary)
        parts = {
            "points": lambda: all_points(options.data, bases), "fresh": lambda: fresh_clean_sets(bases), "large": large
        }  # fmt: skip
        results |= {name: measure() for name, measure in parts.items() if options.only in (None, name)}
    options.output.write_text(json.dumps(results, indent=1) + "\n")


def all_points(data: Path, bases: Path) -> list[dict[str, Any]]:
    """Every point, said as it is measured."""
    found: list[dict[str, Any]] = []
    for part in (small_tasks(data, bases), real_rows(data)):
        for point in part:
            found.append(point)
            line = point["rules"]["surprise"]
            print(
                point["data"], point["base"], point["kind"], point["rate"], line["verdict"], line.get("roc"), flush=True
            )
    return found


if __name__ == "__main__":
    main()
