"""Time `qtarget inspect` on a large data set from an existing cache, and the page in a headless Chromium.

    python scripts/measure_inspect.py --tokenizer ../shared/data/models/tokenizer-gpt2 --output runs/inspect-speed

Tokens and cached numbers are synthetic (frequencies by Zipf's law, probabilities as skewed as a real model's), so no model
is run: 5,000 rows of 512 tokens, all but 64 of each trained, top 20 listed.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qtarget.scoring.cache.plan import tool_versions
from qtarget.scoring.cache.rows import ScoredRow
from qtarget.scoring.cache.schema import Provenance, fingerprint_chat_template, fingerprint_model, fingerprint_tokenizer
from qtarget.scoring.cache.writer import write_cache

TOP_K, PROMPT = 20, 64


class Synthetic:
    """A source whose numbers look like a language model's: half of the tokens nearly certain, a long tail."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def score(self, token_ids, top_k, candidate_ids=None, *, positions):
        out = []
        for row, places in zip(token_ids, positions, strict=True):
            rng = np.random.default_rng(row[:8])
            n = len(places)
            top = rng.dirichlet([0.05] * (TOP_K + 1), n).clip(1e-9)
            top[:, :TOP_K] = -np.sort(-top[:, :TOP_K])
            ids = rng.zipf(1.3, (n, TOP_K)) % self.vocab_size
            slot = np.where(rng.random(n) < 0.75, 0, rng.integers(0, TOP_K, n))
            ids[np.arange(n), slot] = row[places]
            top /= top.sum(-1, keepdims=True)
            logs = np.log(top).astype(np.float32)
            entropy = -(top * logs).sum(-1)
            label = logs[np.arange(n), slot]
            out.append(
                ScoredRow(label, entropy.astype(np.float32), ids.astype(np.int32), logs[:, :TOP_K], logs[:, TOP_K])
            )
        return out


def prepare(options: argparse.Namespace) -> Path:
    """Rows, a stand-in model of the right vocabulary, the cache and the config."""
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    rng = np.random.default_rng(0)
    ids = (rng.zipf(1.25, (options.rows, options.length)) % len(tokenizer)).tolist()
    rows = [{"input_ids": row, "labels": [-100] * PROMPT + row[PROMPT:]} for row in ids]
    (output / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    provenance = Provenance(
        model_id=str((output / "model").absolute()),
        model_fingerprint=fingerprint_model(model),
        tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
        chat_template_fingerprint=fingerprint_chat_template(tokenizer),
        vocab_size=len(tokenizer),
        dtype="float32",
        top_k=TOP_K,
        tail_policy="bucket",
        versions=tool_versions(),
    )
    write_cache(output / "cache", rows, Synthetic(len(tokenizer)), provenance)
    settings = {
        "model_name_or_path": str((output / "model").absolute()),
        "train_file": str((output / "rows.jsonl").absolute()),
        "reference_cache": str((output / "cache").absolute()),
        "output_dir": str(output / "out"),
        "max_length": options.length,
        "report_to": "none",
    }
    (output / "run.yaml").write_text(yaml.safe_dump(settings))
    return output / "run.yaml"


def browse(page: Path, chromium: str) -> dict[str, float]:
    """Seconds to open, sort and switch the target; longest frame while scrolling."""
    from playwright.sync_api import sync_playwright

    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=arguments)
        tab = browser.new_page()
        begin = time.perf_counter()
        tab.goto(page.absolute().as_uri())
        tab.wait_for_selector("html[data-ready]", timeout=120_000)
        out = {"open_seconds": time.perf_counter() - begin}
        measure = """async (act) => { const begin = performance.now(); const [id, value] = act;
            const box = document.getElementById(id); box.value = value; box.dispatchEvent(new Event("change"));
            await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
            return (performance.now() - begin) / 1000; }"""
        out["sort_seconds"] = tab.evaluate(measure, ["sort", "order"])
        out["switch_seconds"] = tab.evaluate(measure, ["target", "1"])
        frames = tab.evaluate(
            """async () => { const gaps = []; let last = performance.now();
            for (let i = 0; i < 60; i++) { scrollBy(0, 400); await new Promise(requestAnimationFrame);
              const now = performance.now(); gaps.push(now - last); last = now; } return gaps; }"""
        )
        out["scroll_frame_median_ms"], out["scroll_frame_worst_ms"] = float(np.median(frames)), max(frames)
        browser.close()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/inspect-speed"))
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--targets", default="sft,prior_surprise,dft")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--result", type=Path, help="Where to write the numbers.")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = options.output / "run.yaml"
    if not config.exists():
        prepare(options)
    page, numbers = options.output / "page.html", options.output / "page.json"
    command = [
        sys.executable, "-m", "qtarget.cli.main", "inspect", str(config), "--targets", options.targets, "--no-audit",
        "--output", str(page), "--json", str(numbers),
    ]  # fmt: skip
    begin = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - begin
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {
        "command": f"python scripts/measure_inspect.py --rows {options.rows} --length {options.length} --targets {options.targets}",
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "inspect_seconds": round(seconds, 1),
        "inspect_cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gigabytes": round(usage.ru_maxrss / 1e6, 2),
        "page_megabytes": round(page.stat().st_size / 1e6, 1),
        "json_megabytes": round(numbers.stat().st_size / 1e6, 1),
        "browser": {name: round(value, 3) for name, value in browse(page, options.chromium).items()},
    }
    print(json.dumps(result, indent=2))
    if options.result is not None:
        options.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
