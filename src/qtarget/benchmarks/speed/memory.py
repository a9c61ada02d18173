"""How much memory does a loss take beyond its inputs? A fresh process for each contender and shape."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from qtarget.benchmarks.machine import machine
from qtarget.benchmarks.speed.losses import Problem, SpeedConfig, Step, frozen_arguments, ours, peers
from qtarget.loss.whole_rows import compile_obstacle

NAIVE_LIMIT = 4e9
"""Bytes above which naive cross entropy is not run: 65,536 x 49,152 float32 logits are 13 GB, four times over."""

COMPILED = () if compile_obstacle("cpu") else ("reverse_kl, live teacher, compiled",)
MEMORY = ("naive", "sft", "label_smoothing", "eaft", "asft", "target_sft", "reverse_kl, live teacher", *COMPILED)


def peak_of(name: str, config: SpeedConfig) -> dict[str, float]:
    """Peak MB of one step beyond its inputs; call it in a fresh process (a Linux CPU, or CUDA).

    A small step of the same kind comes first, so that libraries and threads are loaded and what is compiled is compiled.

    Returns:
        ``beyond_inputs`` and ``gradients`` (of hidden states and head: float32 where they are accumulated so).
    """
    small = SpeedConfig(**{**asdict(config), "tokens": 128, "vocab": 8192})
    memory_step(Problem.make(small), name)()
    problem = Problem.make(config)
    step = memory_step(problem, name)
    gc.collect()
    if config.device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # memory that the set-up has freed counts as free
    wide = 4 if name != "naive" else problem.weight.element_size()
    gradients = problem.weight.numel() * wide + problem.hidden.numel() * problem.hidden.element_size()
    if config.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = resident("VmRSS")
        step()
        peak = resident("VmHWM") - before
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated() - before
    return {"beyond_inputs": peak / 1e6, "gradients": gradients / 1e6}


def memory_step(problem: Problem, name: str) -> Step:
    """The contender of this name, its frozen numbers already made."""
    if name == "naive":
        return peers(problem, False)[name]
    target, *live = name.split(", ")
    backend = "compiled" if "compiled" in live else "auto"
    return ours(problem, target, backend=backend, **frozen_arguments(problem, target, live=bool(live)))


def resident(field: str) -> int:
    """Bytes of this process, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measured_peak(name: str, config: SpeedConfig) -> dict[str, float]:
    """``peak_of`` in a fresh process.

    Raises:
        RuntimeError: the process failed; its message is shown.
    """
    code = "import json,sys;from qtarget.benchmarks.speed.memory import *;torch.set_num_threads(int(sys.argv[3]))"
    code += ";print(json.dumps(peak_of(sys.argv[1],SpeedConfig(**json.loads(sys.argv[2])))))"
    # as many threads as here, which a fresh process does not inherit
    command = [sys.executable, "-c", code, name, json.dumps(asdict(config)), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_memory(
    config: SpeedConfig,
    tokens: tuple[int, ...],
    say: Callable[[str], None] = lambda _: None,
    save: Callable[[Any], None] = lambda _: None,
) -> dict[str, Any]:
    """Peak memory of every contender in ``MEMORY`` at each number of tokens, a process each."""
    rows: dict[str, dict[str, Any]] = {}
    results = {"config": asdict(config), "machine": machine(config.device), "rows": rows}
    for name in MEMORY:
        for count in tokens:
            here = replace(config, tokens=count)
            if name == "naive" and naive_bytes(here) > NAIVE_LIMIT:
                continue
            peak = measured_peak(name, here)
            rows.setdefault(name, {})[str(count)] = peak
            say(f"{name}, {count} tokens: {peak['beyond_inputs']:.0f} MB, of it gradients {peak['gradients']:.0f} MB")
            save(results)
    return results


def naive_bytes(config: SpeedConfig) -> int:
    """What naive cross entropy holds beyond inputs and gradients: four times the logits, as measured."""
    return 4 * config.tokens * config.vocab * getattr(torch, config.dtype).itemsize
