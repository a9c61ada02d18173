"""How SmolLM2-135M-Instruct follows instructions that a program can check (IFEval), before any training.

    qtarget bench base --output runs/smollm2
    python scripts/measure_ifeval.py --data ../shared/data --base runs/smollm2 --output benchmarks/results/ifeval_smollm2.json

All prompts, greedy, one answer each, judged by the official checks of `lm_eval` (`make real` installs them). The answers are
kept, and judged once more as if they had been cut earlier: what a shorter answer costs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.pool import RunLog, one_thread, quiet_libraries, save_results
from qtarget.benchmarks.real.instructions import (
    BATCH,
    PROMPTS,
    answers_to,
    asked_of,
    check_ready,
    checker_versions,
    followed,
    instruction_rows,
)
from qtarget.benchmarks.start import Start
from qtarget.evaluation.generation import Completion
from qtarget.storage.files import digest_file

Row = Mapping[str, Any]
LENGTHS = (32, 64, 128)


def cut(tokenizer: Any, text: str, tokens: int) -> str:
    """The first tokens of an answer, as its text is read; greedy decoding with less room gives them but where that differs."""
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens])


def answered(
    base: str, rows: Sequence[Row], longest: int, log: RunLog
) -> tuple[Any, list[Completion], dict[str, float]]:
    """The tokenizer, the base's answers, and the seconds that they took; batch by batch, those in the log not again."""
    start = Start(base)
    tokenizer, model = start.tokenizer(), start.load()
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"]))  # little padding
    batches = [by_length[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    weights = digest_file(start.path / "model.safetensors")[:8]
    keys = [f"{weights}, prompts {[rows[i]['key'] for i in batch]}, {longest} tokens" for batch in batches]
    for batch, key in zip(batches, keys, strict=True):
        if key not in log.runs:
            wall, cpu = time.perf_counter(), time.process_time()
            said = answers_to(model, tokenizer, [rows[i] for i in batch], longest)
            spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            log.add(key, {"answers": [[answer.text, answer.stopped] for answer in said], **spent})
    runs = [log.runs[key] for key in keys]
    found = {i: Completion(*said) for batch, run in zip(batches, runs, strict=True)
             for i, said in zip(batch, run["answers"], strict=True)}  # fmt: skip
    spent = {name: round(sum(run[name] for run in runs), 1) for name in ("seconds", "cpu_seconds")}
    return tokenizer, [found[i] for i in range(len(rows))], spent


def judged(
    tokenizer: Any, rows: Sequence[Row], answers: Sequence[Completion], lengths: Sequence[int]
) -> dict[str, Any]:
    """What the answers follow at each length, and how long they are in all."""
    tokens, longest = [len(tokenizer(one.text, add_special_tokens=False)["input_ids"]) for one in answers], max(lengths)
    found = {}
    for length in lengths:
        # at the longest nothing is cut: a text may be read in more tokens than it was written in
        whole = [length == longest or size < length for size in tokens]
        texts = [one.text if is_whole else cut(tokenizer, one.text, length)
                 for one, is_whole in zip(answers, whole, strict=True)]  # fmt: skip
        ended = [int(one.stopped and is_whole) for one, is_whole in zip(answers, whole, strict=True)]
        found[str(length)] = {**followed(rows, texts), "ended": ended}
    return {"answer_tokens": sum(tokens), "lengths": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the real data")
    parser.add_argument("--base", required=True, help="folder of `qtarget bench base`")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="fewer are drawn with a fixed seed")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="in tokens; the longest is generated")
    parser.add_argument("--resume", action="store_true", help="go on with the answers beside --output")
    given = parser.parse_args()
    check_ready(given.data)
    rows = instruction_rows(given.data, given.prompts)
    log = RunLog(given.output.with_suffix(".runs.jsonl"), given.resume)
    with quiet_libraries(), one_thread():
        tokenizer, answers, spent = answered(given.base, rows, max(given.lengths), log)
        found = judged(tokenizer, rows, answers, given.lengths)
    save_results(given.output, {
        "benchmark": "instruction following (IFEval), untrained", "command": "python scripts/measure_ifeval.py",
        "base": "SmolLM2-135M-Instruct, four-bit weights (Q4_1), computed in float32", "spent": spent,
        "keys": [row["key"] for row in rows], "asked": asked_of(rows), **found, "answers": [one.text for one in answers],
        "machine": machine_facts(), "versions": {**versions(), **checker_versions()},
    })  # fmt: skip
    print(f"{given.output}: {given.prompts} prompts, {spent['cpu_seconds']:.0f} s of processor time")


if __name__ == "__main__":
    main()
