"""How fast and how small is the loss? Every target against the bare matrix products, and against other losses.

One process, contenders interleaved, medians of CPU (or CUDA) time as ratios to the *floor*: the matrix products that no
loss from hidden states and head can avoid. Memory is measured in a fresh process for each contender.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import qtarget
from qtarget.loss.head import multiplies_bfloat16
from qtarget.shapes import Tensor

Step = Callable[[], Any]
"""One forward and backward pass."""

SHORT = ("sft", "dft", "p_power", "prior_surprise", "eaft", "label_smoothing", "asft", "distillation", "target_sft")
LIVE = ("reverse_kl", "generalized_jsd", "target_sft")


@dataclass(frozen=True)
class SpeedConfig:
    """Shape and effort of one comparison.

    Attributes:
        tokens, width, vocab: N, D, V.
        dtype: of hidden states and head: ``float32`` or ``bfloat16``.
        device: ``cpu`` or ``cuda``.
        rounds: how often each contender runs after one round that is not counted.
        top_k: k of the cached reference or teacher.
        suite: ``short`` or ``all`` targets.
        peers: also time other libraries' losses.
        seed: of the random inputs.
    """

    tokens: int = 2048
    width: int = 576
    vocab: int = 49152
    dtype: str = "float32"
    device: str = "cpu"
    rounds: int = 5
    top_k: int = 64
    suite: str = "short"
    peers: bool = True
    seed: int = 0


@dataclass
class Problem:
    """Inputs that all contenders share."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    known: qtarget.Reference
    frozen: qtarget.FrozenHead

    @classmethod
    def make(cls, config: SpeedConfig) -> Problem:
        """Random hidden states and head; the frozen model is the same head on perturbed hidden states."""
        rng = torch.Generator().manual_seed(config.seed)
        dtype, device = getattr(torch, config.dtype), config.device
        hidden = torch.randn(config.tokens, config.width, generator=rng)
        weight = torch.randn(config.vocab, config.width, generator=rng).mul_(2 / config.width**0.5)
        labels = torch.randint(config.vocab, (config.tokens,), generator=rng)
        other = hidden + 0.3 * torch.randn(hidden.shape, generator=rng)
        hidden, weight, labels, other = (
            t.to(device, dtype if t.is_floating_point() else t.dtype) for t in (hidden, weight, labels, other)
        )
        frozen = qtarget.FrozenHead(other, weight)
        known = qtarget.token_statistics(
            hidden=other, lm_head_weight=weight, labels=labels, top_k=config.top_k, chunk_size=64
        )
        return cls(hidden.requires_grad_(), weight.requires_grad_(), labels, known, frozen)


def backward(loss: Tensor, *leaves: Tensor) -> None:
    """Differentiate and forget."""
    loss.backward()
    for leaf in leaves:
        leaf.grad = None


def products(problem: Problem, forward: int = 1) -> Step:
    """The bare matrix products: ``forward`` logits (live, frozen, ...), one hidden and one head gradient."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> None:
        for _ in range(forward):
            torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=hidden_gradient)
        torch.mm(logits.T, hidden, out=weight_gradient)

    return step


def ours(
    problem: Problem, target: str, *, labels: Tensor | None = None, frozen_head: bool = False, **kwargs: Any
) -> Step:
    """Our loss: forward and backward."""
    built = qtarget.get_target(target)
    weight = problem.weight.detach() if frozen_head else problem.weight
    labels = problem.labels if labels is None else labels
    if built.scope != "token":
        kwargs["sequence_ids"] = torch.arange(len(labels), device=labels.device) // 128

    def step() -> None:
        loss = qtarget.linear_target_loss(problem.hidden, weight, labels, built, **kwargs)
        backward(loss, problem.hidden, weight)

    return step


def frozen_arguments(problem: Problem, target: str, live: bool = False, **changes: Any) -> dict[str, Any]:
    """The reference or teacher that a target needs: cached top-k numbers, or a live head."""
    needs = qtarget.get_target(target).needs
    known = problem.frozen if live else qtarget.Reference(**{**vars(problem.known), **changes})
    return {role: known for role in ("reference", "teacher") if getattr(needs, role)}


def peers(problem: Problem, others: bool = True) -> dict[str, Step]:
    """Naive cross entropy, and with ``others`` the libraries' from hidden states, where they are installed."""
    hidden, weight, labels = problem.hidden, problem.weight, problem.labels

    def naive(cast: bool) -> Step:
        def step() -> None:
            logits = F.linear(hidden, weight)
            backward(F.cross_entropy(logits.float() if cast else logits, labels), hidden, weight)

        return step

    found: dict[str, Step] = {"naive": naive(False)}
    if hidden.dtype != torch.float32:
        found["naive, float32 logits"] = naive(True)
    if not others:
        return found
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions(acc_policy="compact")  # pyright: ignore # its fastest here

        def in_torch() -> None:
            backward(F.linear_cross_entropy(hidden, weight, labels, options=options), hidden, weight)  # pyright: ignore

        found["torch linear_cross_entropy, compact"] = in_torch
    try:
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction  # pyright: ignore

        def in_trl() -> None:
            per_token: Any = _ChunkedLogProbFunction.apply(
                hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
            )
            backward(-per_token[0].mean(), hidden, weight)

        found["TRL tiled head"] = in_trl
    except ImportError:
        pass
    try:
        from torchtune.modules.loss import CEWithChunkedOutputLoss  # pyright: ignore[reportMissingImports]

        chunked = CEWithChunkedOutputLoss(8)

        def in_torchtune() -> None:
            pieces = [F.linear(h, weight) for h in hidden[None].chunk(8, dim=1)]
            backward(chunked(pieces, labels[None]), hidden, weight)

        found["torchtune, 8 chunks"] = in_torchtune
    except ImportError:
        pass
    if hidden.device.type == "cuda":
        found.update(cuda_peers(problem))
    return found


def cuda_peers(problem: Problem) -> dict[str, Step]:
    """Peers that need a GPU: Liger-Kernel and Apple's cut-cross-entropy."""
    hidden, weight, labels = problem.hidden, problem.weight, problem.labels
    found: dict[str, Step] = {}
    try:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyLoss,
        )

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda: backward(liger(weight, hidden, labels), hidden, weight)
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        found["cut-cross-entropy"] = lambda: backward(linear_cross_entropy(hidden, weight, labels), hidden, weight)
    except ImportError:
        pass
    return found


def contenders(config: SpeedConfig, problem: Problem) -> dict[str, Step]:
    """Everything that is timed, by name."""
    names = SHORT if config.suite == "short" else tuple(qtarget.available_targets())
    half = problem.labels.clone()
    half[::2] = -100
    steps: dict[str, Step] = {
        "floor": products(problem),
        "floor, 4 products": products(problem, 2),
        **peers(problem, config.peers),
    }
    for name in names:
        steps[name] = ours(problem, name, **frozen_arguments(problem, name))
    steps["sft, half masked"] = ours(problem, "sft", labels=half)
    steps["sft, frozen head"] = ours(problem, "sft", frozen_head=True)
    steps["sft, with report"] = ours_with_report(problem)
    for name in LIVE:
        steps[f"{name}, live teacher"] = ours(problem, name, **frozen_arguments(problem, name, live=True))
    if config.suite == "all":
        steps["asft, tail spread"] = ours(problem, "asft", **frozen_arguments(problem, "asft", tail_policy="spread"))
    if config.dtype != "float32":
        arguments = frozen_arguments(problem, "asft")
        steps["asft, bfloat16 logits"] = ours(problem, "asft", logits_dtype=torch.bfloat16, **arguments)
    return steps


def ours_with_report(problem: Problem) -> Step:
    """Plain SFT with the per-token report that training asks for."""

    def step() -> None:
        loss, _ = qtarget.linear_target_loss(problem.hidden, problem.weight, problem.labels, "sft", return_report=True)
        backward(loss, problem.hidden, problem.weight)

    return step


def seconds(step: Step, device: str) -> float:
    """CPU seconds of all threads, or device seconds, of one call."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def floor_of(name: str) -> str:
    """Which floor a contender is compared with: a live teacher's logits are one product more."""
    return "floor, 4 products" if name.endswith("live teacher") else "floor"


def machine(device: str) -> dict[str, Any]:
    """What the numbers are from."""
    facts: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": multiplies_bfloat16("cpu"),
    }
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        facts["processor"] = next((v.strip() for k, _, v in lines if k.strip() == "model name"), facts["processor"])
    if device != "cpu":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def run_speed(config: SpeedConfig, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Time everything; returns what ``qtarget bench speed`` writes.

    Returns:
        ``config``, ``machine``, and for each contender ``seconds`` (all rounds), ``median``, ``floor`` (its name) and
        ``ratio`` (``median``, ``low``, ``high``: over the rounds, each against the floor of the same round).
    """
    torch.manual_seed(config.seed)
    steps = contenders(config, Problem.make(config))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(config.rounds + 1):
        for name, step in steps.items():
            elapsed = seconds(step, config.device)
            if turn:
                taken[name].append(elapsed)
        say(f"round {turn} of {config.rounds}" if turn else "warm-up round, not counted")
    rows = {}
    for name, times in taken.items():
        floor = taken[floor_of(name)]
        ratios = [t / f for t, f in zip(times, floor, strict=True)]
        middle = statistics.median(times) / statistics.median(floor)
        rows[name] = {
            "seconds": times,
            "median": statistics.median(times),
            "floor": floor_of(name),
            "ratio": {"median": middle, "low": min(ratios), "high": max(ratios)},
        }
    return {"config": asdict(config), "machine": machine(config.device), "rows": rows}


# -- memory --------------------------------------------------------------------------------------------------------

MEMORY = ("naive", "sft", "label_smoothing", "eaft", "asft", "target_sft", "reverse_kl, live teacher")


def peak_of(name: str, config: SpeedConfig) -> dict[str, float]:
    """Peak MB of one step beyond its inputs; call it in a fresh process (a Linux CPU, or CUDA).

    A small step of the same kind comes first, so that libraries and threads are loaded.

    Returns:
        ``beyond_inputs`` and ``gradients`` (of hidden states and head: float32 where they are accumulated so).
    """
    small = SpeedConfig(**{**asdict(config), "tokens": 32, "vocab": 1024, "top_k": min(config.top_k, 1024)})
    warm = Problem.make(small)
    {**peers(warm, False), **memory_steps(warm)}[name]()
    problem = Problem.make(config)
    step = {**peers(problem, False), **memory_steps(problem)}[name]
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


def memory_steps(problem: Problem) -> dict[str, Step]:
    """Our losses among those whose memory is measured."""
    plain = {n: ours(problem, n, **frozen_arguments(problem, n)) for n in MEMORY if "," not in n and n != "naive"}
    live = {
        n: ours(problem, t := n.split(",")[0], **frozen_arguments(problem, t, live=True)) for n in MEMORY if "," in n
    }
    return {**plain, **live}


def resident(field: str) -> int:
    """Bytes of this process, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def run_memory(
    config: SpeedConfig, tokens: tuple[int, ...], say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Peak memory of every contender in ``MEMORY`` at each number of tokens, a process each.

    Raises:
        RuntimeError: a measuring process failed; its message is shown.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name in MEMORY:
        for count in tokens:
            if name == "naive" and count > 2048:
                continue  # 65,536 x 49,152 float32 logits are 13 GB, three times over
            arguments = json.dumps({**asdict(config), "tokens": count})
            code = "import json,sys;from qtarget.benchmarks.speed import *;torch.set_num_threads(int(sys.argv[3]))"
            code += ";print(json.dumps(peak_of(sys.argv[1],SpeedConfig(**json.loads(sys.argv[2])))))"
            command = [sys.executable, "-c", code, name, arguments, str(torch.get_num_threads())]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"measuring {name} failed:\n{done.stderr}")
            rows.setdefault(name, {})[str(count)] = json.loads(done.stdout.splitlines()[-1])
            peak = rows[name][str(count)]
            say(f"{name}, {count} tokens: {peak['beyond_inputs']:.0f} MB, of it gradients {peak['gradients']:.0f} MB")
    return {"config": asdict(config), "machine": machine(config.device), "rows": rows}
