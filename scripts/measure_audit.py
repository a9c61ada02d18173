"""How well base surprise finds noise that somebody marked, and what the audit reports of it.

    python scripts/measure_audit.py --data ../shared/data --output benchmarks/results/audit_noise.json
    python scripts/measure_audit.py --only smollm2 --caches runs/inspect_smollm2 --output benchmarks/results/audit_smollm2.json

Two real data sets (GSM8K solutions marked right or wrong, HaluEval answers with hallucinations marked) under a tiny story
model, and the embedded tasks under the embedded base with injected noise, in a response format that the base knows and in
one that it does not. Every row is scored once; nothing is trained. `--only smollm2` reads what
`scripts/measure_marked_rows.py --base` left: the marked sets, and answers that we exchanged, as SmolLM2 scored them.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer

import qtarget
from qtarget import QTargetConfig
from qtarget.benchmarks.marked_data import MARKED_DATA, load_story_tokenizer
from qtarget.data.embedded import base_model_path, load_demonstrations
from qtarget.data.noise import inject_noise, noise_token_mask
from qtarget.data.roc import roc_auc
from qtarget.integrations.sft.audit import cut, tokenise
from qtarget.integrations.sft.score import score
from qtarget.report.audit.noise import row_means, suspected_rows, suspected_tokens, token_threshold
from qtarget.report.audit.prior import agreed_labels, flawed_prior
from qtarget.report.audit.scored import ScoredTokens, score_from_cache
from qtarget.scoring.cache.reader import ReferenceCache

INJECTED = (("random_tokens", 0.05), ("random_tokens", 0.2), ("wrong_answer", 0.2))
SPLITS = {"known_format": "base_format_test", "unknown_format": "train"}


def token_marks(rows: list[dict[str, Any]], scored: ScoredTokens, tokenizer: Any) -> np.ndarray:
    """``[labels]`` whether each trained token overlaps a marked span."""
    marks = []
    for row, number in enumerate(scored.numbers):
        text = rows[number]
        encoded = tokenizer(text["prompt"] + text["completion"] + tokenizer.eos_token, return_offsets_mapping=True)
        begin, end = scored.offsets[row], scored.offsets[row + 1]
        places = scored.places[(scored.places >= begin) & (scored.places < end)] - begin
        assert encoded["input_ids"][: end - begin] == scored.ids[begin:end].tolist(), f"row {number}: other tokens"
        start, stop = len(text["prompt"]), len(text["prompt"]) + len(text["completion"])
        offsets = [encoded["offset_mapping"][place] for place in places]
        inside = [(max(a, start) - start, min(b, stop) - start) for a, b in offsets]
        marks += noise_token_mask(inside, text["noise_spans"])
    return np.array(marks, dtype=bool)


def found(reported: np.ndarray, marks: np.ndarray) -> dict[str, Any]:
    """Of what the audit reports: how much is marked."""
    hits, count = int((reported & marks).sum()), int(reported.sum())
    return {
        "reported": count,
        "precision": hits / count if count else None,
        "recall": hits / int(marks.sum()) if marks.any() else None,
        "marked_share": float(marks.mean()),
    }


def measure(
    rows: list[dict[str, Any]],
    model: Path,
    tokenizer: Any,
    max_length: int,
    is_noise: list[bool],
    cache: Path | None = None,
) -> dict:
    """Score the rows (or look them up), audit them, compare with the marks."""
    dataset = Dataset.from_list([{key: row[key] for key in ("prompt", "completion")} for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        args = QTargetConfig(
            output_dir=folder, max_length=max_length, bf16=False, use_cpu=True, disable_tqdm=True, report_to=[]
        )
        seconds = {}
        if cache is None:
            cache, begin = Path(folder) / "cache", time.perf_counter()
            score(str(model), args, dataset, None, tokenizer, directory=cache, top_k=8, progress=False)
            seconds["score"] = time.perf_counter() - begin
        begin = time.perf_counter()
        tokens = [cut(row, args) for row in tokenise(args, dataset, tokenizer).rows]
        scored, missing = score_from_cache(tokens, ReferenceCache.open(cache))
        assert not missing, f"{len(missing)} rows are not in {cache}"
        suspected, unusual, groups = suspected_tokens(scored), suspected_rows(scored), flawed_prior(scored)
        seconds["audit"] = time.perf_counter() - begin
    marks, noisy = token_marks(rows, scored, tokenizer), np.array(is_noise)[scored.numbers]
    surprise = -scored.log_probs.astype(np.float64)
    assert scored.ranks is not None
    per_row = {"mean_surprise": surprise, "mean_excess": scored.excess, "suspected_share": suspected.astype(float)}
    agreed = agreed_labels(scored)
    return {
        "rows": len(noisy),
        "labels": len(marks),
        "mean_surprise": float(surprise.mean()),
        "median_surprise": float(np.median(surprise)),
        "mean_entropy": float(scored.entropy.mean(dtype=np.float64)),
        "favourite_share": float((scored.ranks == 1).mean()),
        "row_auc": {name: roc_auc(row_means(scored, values), noisy) for name, values in per_row.items()},
        "token_auc": {"surprise": roc_auc(surprise, marks), "excess": roc_auc(scored.excess, marks)},
        "surprising_rows": found(unusual, noisy),
        "surprising_tokens": found(suspected, marks) | {"threshold": token_threshold(scored)},
        "surprising_tokens_unagreed": found(suspected & ~agreed, marks),
        "flawed_prior": {"labels": int(agreed.sum()), "contexts": len(groups)} | found(agreed, marks),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def real(data: Path, limit: int | None, caches: Path | None) -> dict[str, Any]:
    """The marked data sets under the story model; ``caches`` holds ``NAME/cache`` of each, if they are scored already."""
    model = data / "models" / "tinystories-656k"
    out = {}
    for name, load in MARKED_DATA.items():
        rows = [{**row, "prompt": "<|start_story|>" + row["prompt"]} for row in load(data)[:limit]]
        noisy = [row["is_noise"] for row in rows]
        cache = None if caches is None else caches / name / "cache"
        out[name] = measure(rows, model, load_story_tokenizer(model), 512, noisy, cache)
        print(name, json.dumps(out[name], indent=1))
    return out


def real_model(caches: Path) -> dict[str, Any]:
    """Every folder of rows and cache that ``scripts/measure_marked_rows.py --base`` left."""
    out = {}
    for cache in sorted(caches.glob("*/cache")):
        folder = cache.parent
        rows = [json.loads(line) for line in (folder / f"{folder.name}.jsonl").read_text().splitlines()]
        settings = yaml.safe_load((folder / "run.yaml").read_text())
        base, length = Path(settings["model_name_or_path"]), settings["max_length"]
        noisy = [row["is_noise"] for row in rows]
        out[folder.name] = measure(rows, base, AutoTokenizer.from_pretrained(base), length, noisy, cache)
        print(folder.name, json.dumps(out[folder.name], indent=1))
    return out


def injected(limit: int) -> dict[str, Any]:
    """The embedded tasks under the embedded base: injected noise in both formats."""
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    out = {}
    for format_, split in SPLITS.items():
        for kind, rate in INJECTED:
            clean = load_demonstrations(split)[:limit]
            rows = inject_noise(clean, kind=kind, rate=rate, seed=0, tokenizer=tokenizer)
            name = f"{format_}, {kind} {rate}"
            out[name] = measure(rows, base_model_path(), tokenizer, 128, [bool(row["noise_spans"]) for row in rows])
            print(name, json.dumps(out[name], indent=1))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("runs/audit_noise.json"))
    parser.add_argument("--limit", type=int, help="first so many rows of each real data set")
    parser.add_argument(
        "--only", choices=("injected", "real", "smollm2"), help="measure one part, keep the other of --output"
    )
    parser.add_argument(
        "--caches", type=Path, help="of the real data sets: the --output of scripts/measure_marked_rows.py"
    )
    options = parser.parse_args()
    if options.only == "smollm2" and options.caches is None:
        parser.error(
            "--only smollm2 reads caches; name the --output of scripts/measure_marked_rows.py --base with --caches"
        )
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    known = json.loads(options.output.read_text()) if options.only and options.output.is_file() else {}
    limit = f" --limit {options.limit}" if options.limit else ""
    results = known | {
        "command": f"python scripts/measure_audit.py{' --only smollm2' if options.only == 'smollm2' else limit}",
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "qtarget": qtarget.__version__},
    }
    if options.only == "smollm2":
        results["smollm2"] = real_model(options.caches)
    if options.only in (None, "injected"):
        results["injected"] = injected(600)
    if options.only in (None, "real"):
        results["real"] = real(options.data, options.limit, options.caches)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
