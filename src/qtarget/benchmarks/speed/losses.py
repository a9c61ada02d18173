"""How fast and how small is the loss? Every target against the bare matrix products, and against other losses.

One process, contenders interleaved, medians of CPU (or CUDA) time as ratios to the *floor*: the matrix products that no
loss from hidden states and head can avoid.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

import qtarget
from qtarget.benchmarks.machine import machine
from qtarget.core.shapes import Tensor
from qtarget.core.types import DATA_FIELDS
from qtarget.loss.whole_rows import compile_obstacle

Step = Callable[[], Any]
"""One forward and backward pass."""

SHORT = ("sft", "dft", "p_power", "prior_surprise", "eaft", "label_smoothing", "asft", "distillation", "target_sft")
SUITES = {"few": ("sft", "eaft", "asft", "target_sft"), "short": SHORT}
LIVE = ("reverse_kl", "generalized_jsd", "target_sft")
FLOOR, LIVE_FLOOR, FIVE = "floor", "floor, 4 products", "floor, 5 products"
"""A live teacher's logits are a fourth product; five are what making them a second time, for the gradient, would take."""


@dataclass(frozen=True)
class SpeedConfig:
    """Shape and effort of one comparison.

    Attributes:
        tokens, width, vocab: N, D, V.
        dtype: of hidden states and head: ``float32`` or ``bfloat16``.
        device: ``cpu`` or ``cuda``.
        rounds: how often each contender runs after one round that is not counted.
        top_k: k of the cached reference or teacher.
        suite: ``few``, ``short`` or ``all`` targets; ``few`` leaves out masks, frozen heads and live teachers too.
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
    frozen: qtarget.FrozenHead
    top_k: int

    @cached_property
    def known(self) -> qtarget.Reference:
        """The frozen model's top-k numbers, as a cache holds them."""
        return qtarget.token_statistics(
            hidden=self.frozen.hidden,
            lm_head_weight=self.frozen.lm_head_weight,
            labels=self.labels,
            top_k=self.top_k,
            chunk_size=64,
        )

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
        frozen = qtarget.FrozenHead(other, weight.detach())
        return cls(hidden.requires_grad_(), weight.requires_grad_(), labels, frozen, config.top_k)


def backward(loss: Tensor, *leaves: Tensor) -> None:
    """Differentiate and forget."""
    loss.backward()
    for leaf in leaves:
        leaf.grad = None


def floors(problem: Problem) -> dict[str, Step]:
    """The bare matrix products: the logits (live, frozen, ...), one hidden and one head gradient."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    # made once: the floor holds products alone, no allocation
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)

    def products(forward: int) -> Step:
        def step() -> None:
            for _ in range(forward):
                torch.mm(hidden, weight.T, out=logits)
            torch.mm(logits, weight, out=hidden_gradient)
            torch.mm(logits.T, hidden, out=weight_gradient)

        return step

    return {FLOOR: products(1), LIVE_FLOOR: products(2), FIVE: products(3)}


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
    """The reference or teacher that a target needs: cached top-k numbers, or a live head; what rows say of rows is 0.5."""
    needs = qtarget.get_target(target).needs
    half = torch.full(problem.labels.shape, 0.5, device=problem.labels.device)
    changes = dict.fromkeys(DATA_FIELDS, half) | changes
    known = problem.frozen if live else qtarget.Reference(**{**vars(problem.known), **changes})
    return {role: known for role in ("reference", "teacher") if getattr(needs, role)}


def peers(problem: Problem, others: bool = True) -> dict[str, Step]:
    """Naive cross entropy, and with ``others`` the libraries' from hidden states, where they are installed: no row without."""
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
    with suppress(ImportError):
        # private in TRL 1.16, but what its trainers call
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction  # pyright: ignore

        def in_trl() -> None:
            per_token: Any = _ChunkedLogProbFunction.apply(
                hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
            )
            backward(-per_token[0].mean(), hidden, weight)

        found["TRL tiled head"] = in_trl
    with suppress(ImportError):
        from torchtune.modules.loss import CEWithChunkedOutputLoss  # pyright: ignore[reportMissingImports]

        chunked = CEWithChunkedOutputLoss(8)

        def in_torchtune() -> None:
            pieces = [F.linear(h, weight) for h in hidden[None].chunk(8, dim=1)]
            backward(chunked(pieces, labels[None]), hidden, weight)

        found["torchtune, 8 chunks"] = in_torchtune
    # without a GPU it raises NotImplementedError as it loads, unless UNSLOTH_ZOO_DISABLE_GPU_INIT=1
    with suppress(ImportError, NotImplementedError):
        from unsloth_zoo.fused_losses.cross_entropy_loss import (  # pyright: ignore[reportMissingImports]
            unsloth_fused_ce_loss,
        )

        def in_unsloth() -> None:
            loss = unsloth_fused_ce_loss(None, hidden[None], weight, None, labels[None], shift_labels=False)
            backward(loss, hidden, weight)

        found["Unsloth"] = in_unsloth
    if hidden.device.type == "cuda":
        found.update(cuda_peers(problem))
    return found


def cuda_peers(problem: Problem) -> dict[str, Step]:
    """Peers that need a GPU: Liger-Kernel and Apple's cut-cross-entropy."""
    hidden, weight, labels = problem.hidden, problem.weight, problem.labels
    found: dict[str, Step] = {}
    with suppress(ImportError):
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyLoss,
        )

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda: backward(liger(weight, hidden, labels), hidden, weight)
    with suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        found["cut-cross-entropy"] = lambda: backward(linear_cross_entropy(hidden, weight, labels), hidden, weight)
    return found


def contenders(config: SpeedConfig, problem: Problem) -> dict[str, Step]:
    """Everything that is timed, by name."""
    half = problem.labels.clone()
    half[::2] = -100
    steps: dict[str, Step] = {**floors(problem), **peers(problem, config.peers)}
    for name in SUITES.get(config.suite, tuple(qtarget.available_targets())):
        steps[name] = ours(problem, name, **frozen_arguments(problem, name))
    if config.suite == "few":
        return {name: step for name, step in steps.items() if name not in (LIVE_FLOOR, FIVE)}
    steps["sft, half masked"] = ours(problem, "sft", labels=half)
    steps["sft, frozen head"] = ours(problem, "sft", frozen_head=True)
    steps["sft, with report"] = ours_with_report(problem)
    whole = {f"{name}, live teacher": (name, frozen_arguments(problem, name, live=True)) for name in LIVE}
    if config.suite == "all":
        whole["asft, tail spread"] = ("asft", frozen_arguments(problem, "asft", tail_policy="spread"))
        whole["gem"] = ("gem", {})
    for name, (target, arguments) in whole.items():
        steps[name] = ours(problem, target, **arguments)
        if not compile_obstacle(config.device):
            steps[f"{name}, compiled"] = ours(problem, target, backend="compiled", **arguments)
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
    return LIVE_FLOOR if "live teacher" in name else FLOOR


def run_speed(
    config: SpeedConfig, say: Callable[[str], None] = lambda _: None, save: Callable[[Any], None] = lambda _: None
) -> dict[str, Any]:
    """Time everything; returns what ``qtarget bench speed`` writes, and hands it to ``save`` after every counted round.

    Returns:
        ``config``, ``machine``, and for each contender ``seconds`` (all rounds), ``median``, ``floor`` (its name) and
        ``ratio`` (``median``, ``low``, ``high``: over the rounds, each against the floor of the same round); for a live
        teacher ``ratio_to_five_products`` too.
    """
    torch.manual_seed(config.seed)
    steps = contenders(config, Problem.make(config))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    results: dict[str, Any] = {"config": asdict(config), "machine": machine(config.device), "rows": {}}
    for turn in range(config.rounds + 1):
        for name, step in steps.items():
            elapsed = seconds(step, config.device)
            if turn:
                taken[name].append(elapsed)
        say(f"round {turn} of {config.rounds}" if turn else "warm-up round, not counted")
        if turn:
            results["rows"] = {name: summary(name, taken) for name in steps}
            save(results)
    return results


def summary(name: str, taken: dict[str, list[float]]) -> dict[str, Any]:
    """Times of one contender and their ratios to its floor."""
    times, floor = taken[name], taken[floor_of(name)]
    row = {
        "seconds": times,
        "median": statistics.median(times),
        "floor": floor_of(name),
        "ratio": against(times, floor),
    }
    return {**row, "ratio_to_five_products": against(times, taken[FIVE])} if row["floor"] == LIVE_FLOOR else row


def against(times: list[float], floor: list[float]) -> dict[str, float]:
    """Ratio of the medians, and the lowest and highest ratio of one round."""
    ratios = [t / f for t, f in zip(times, floor, strict=True)]
    middle = statistics.median(times) / statistics.median(floor)
    return {"median": middle, "low": min(ratios), "high": max(ratios)}
